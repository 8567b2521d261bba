//! A parallel map over indices, with results in the order of the indices.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Returns `work(state, i)` for every `i` below `count`, in order, computed by `threads` threads (at least one, at most
/// `count`) named `{name}-{n}`. Each thread makes its own state with `init`. `progress` is called after each item with the
/// number of finished items, on the thread that finished it.
///
/// # Errors
/// The first error of `init` or `work` ends its thread; it is returned after all threads have ended.
///
/// # Panics
/// Panics if the system cannot start a thread, or if `init`, `work` or `progress` panics.
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
                builder.spawn_scoped(scope, worker).expect("the system can start a thread")
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
    fn returns_results_in_order_for_any_number_of_threads_and_returns_errors() {
        for threads in [0, 1, 2, 7] {
            let reported = AtomicUsize::new(0);
            let progress = |done: usize| {
                reported.fetch_max(done, Ordering::Relaxed);
            };
            let squares = map(50, threads, "test", || Ok::<_, ()>(()), |(), i| Ok(i * i), &progress);
            assert_eq!(squares, Ok((0..50).map(|i| i * i).collect()));
            assert_eq!(reported.into_inner(), 50);
        }
        let failed = map(50, 2, "test", || Ok(()), |(), i| if i == 30 { Err(i) } else { Ok(i) }, &|_| {});
        assert_eq!(failed, Err(30));
    }
}
