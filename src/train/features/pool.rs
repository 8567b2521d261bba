//! The same work on many things, on all cores, the results in the order of the things.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Runs `work` for every number below `count` on `threads` threads, each with a state of its own from
/// `init`. `progress` is told how many are done, from whichever thread did the last one. The first error
/// of a thread ends that thread, and is given back once all have ended.
pub fn map<S, T: Send, E: Send>(
    count: usize,
    threads: usize,
    name: &str,
    init: impl Fn() -> Result<S, E> + Sync,
    work: impl Fn(&mut S, usize) -> Result<T, E> + Sync,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Vec<T>, E> {
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let worker = || -> Result<Vec<(usize, T)>, E> {
        let mut state = init()?;
        let mut results = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return Ok(results);
            }
            results.push((i, work(&mut state, i)?));
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
    };
    let mut results = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.clamp(1, count.max(1)))
            .map(|n| {
                let builder = thread::Builder::new().name(format!("{name}-{n}"));
                builder.spawn_scoped(scope, worker).expect("the system gives a core a thread")
            })
            .collect();
        let mut all = Vec::with_capacity(count);
        for worker in workers {
            all.extend(worker.join().expect("a worker returns its errors")?);
        }
        Ok::<_, E>(all)
    })?;
    results.sort_by_key(|(i, _)| *i);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_whatever_the_threads_and_errors_are_given_back() {
        for threads in [0, 1, 2, 7] {
            let told = AtomicUsize::new(0);
            let tell = |done: usize| {
                told.fetch_max(done, Ordering::Relaxed);
            };
            let squares = map(50, threads, "test", || Ok::<_, ()>(()), |(), i| Ok(i * i), &tell);
            assert_eq!(squares, Ok((0..50).map(|i| i * i).collect()));
            assert_eq!(told.into_inner(), 50);
        }
        let failed = map(50, 2, "test", || Ok(()), |(), i| if i == 30 { Err(i) } else { Ok(i) }, &|_| {});
        assert_eq!(failed, Err(30));
    }
}
