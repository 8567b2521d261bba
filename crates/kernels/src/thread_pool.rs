//! Threads that compute an image together.
//!
//! While an image is computed, helper threads wait for their next task in a busy loop: a task takes about fifty microseconds, and to
//! wake a thread takes as long. Between images they are parked.

use std::cell::UnsafeCell;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crate::cpu_time::{CpuTime, try_thread_cpu_time};

/// The most threads of a pool, the calling thread included.
pub const THREADS_MAX: usize = 64;
/// Time that a thread without work waits in a busy loop.
const SPIN: Duration = Duration::from_micros(200);
/// Calling threads whose processor time a pool keeps; beyond it, the oldest entry is dropped.
const CALLERS_MAX: usize = 64;

/// Returns the default number of threads: the available cores but one, from 1 to [`THREADS_MAX`].
pub fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1)).clamp(1, THREADS_MAX)
}

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// Helper threads beside the calling one. It serves one caller at a time.
pub struct ThreadPool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by the caller whose task runs.
    callers: Mutex<Callers>,
}

/// The processor time of the pool by calling thread.
struct Callers {
    /// Nanoseconds that the helpers spent on a thread's tasks, less those that it waited for them in a busy loop.
    entries: Vec<(ThreadId, i64)>,
    /// The thread whose task the helpers ran last.
    last: Option<ThreadId>,
}

struct Shared {
    /// Counts tasks.
    task_count: AtomicUsize,
    task: UnsafeCell<Task<'static>>,
    /// Helpers that have not finished the task.
    busy: AtomicUsize,
    panicked: AtomicBool,
    ended: AtomicBool,
    /// Processor time of the helpers that is in no entry yet.
    helper_nanos: AtomicI64,
}

// SAFETY: `task` is written only by the caller that holds the lock, while no helper is busy, and read by a helper only after it has seen
// the count of the task and before it leaves `busy`. The other fields are atomic.
unsafe impl Sync for Shared {}
// SAFETY: the closure that `task` refers to is `Sync`, so that a reference to it may go to another thread.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// Starts a pool of `threads` threads, the calling thread included and at most [`THREADS_MAX`]; returns `None` for 0 and 1.
    ///
    /// # Errors
    /// If the system cannot start a thread.
    pub fn with_threads(threads: usize) -> io::Result<Option<Arc<Self>>> {
        (threads > 1).then(|| ThreadPool::new(threads).map(Arc::new)).transpose()
    }

    fn new(threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            task_count: AtomicUsize::new(0),
            task: UnsafeCell::new(&|_| {}),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            helper_nanos: AtomicI64::new(0),
        });
        let callers = Mutex::new(Callers { entries: Vec::with_capacity(CALLERS_MAX), last: None });
        let mut pool = ThreadPool { shared, helpers: Vec::new(), callers };
        for n in 1..threads.clamp(1, THREADS_MAX) {
            let shared = Arc::clone(&pool.shared);
            let helper = thread::Builder::new().name(format!("kernels-{n}")).spawn(move || shared.help(n))?;
            pool.helpers.push(helper);
        }
        Ok(pool)
    }

    /// Returns the number of threads, the calling thread included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Returns the processor time that the helpers spent for the calling thread since its last call, less the time it waited for them in
    /// a busy loop, and resets it. Of the last task a helper's time may still be missing; the next call includes it.
    pub fn take_cpu_time(&self) -> CpuTime {
        let mut callers = self.lock();
        callers.add_for_last(self.shared.helper_nanos.swap(0, Ordering::Relaxed));
        CpuTime::from_nanos(callers.take(thread::current().id()))
    }

    /// Wakes the helpers, for tasks that follow in a moment.
    pub(crate) fn wake(&self) {
        self.helpers.iter().for_each(|helper| helper.thread().unpark());
    }

    /// Calls `task` once with each number below [`ThreadPool::threads`], 0 on the calling thread, and returns when all have finished.
    ///
    /// # Panics
    /// If `task` panics on any thread.
    pub(crate) fn run(&self, task: Task<'_>) {
        let mut callers = self.lock();
        let shared = &*self.shared;
        callers.add_for_last(shared.helper_nanos.swap(0, Ordering::Relaxed));
        callers.last = Some(thread::current().id());
        shared.panicked.store(false, Ordering::Relaxed);
        // SAFETY: the lifetime is erased only: helpers use the reference until they leave `busy`, and `wait` below waits for that before
        // this function returns or unwinds. The cell is not read now: no helper is busy, and the lock excludes other callers.
        unsafe { *shared.task.get() = std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        let wait = WaitForHelpers { shared, callers: &mut callers };
        shared.busy.store(self.helpers.len(), Ordering::Relaxed);
        shared.task_count.fetch_add(1, Ordering::Release);
        self.wake();
        task(0);
        drop(wait);
        assert!(!shared.panicked.load(Ordering::Relaxed), "a thread of the pool panicked; its message is above");
    }

    fn lock(&self) -> MutexGuard<'_, Callers> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.shared.task_count.fetch_add(1, Ordering::Release);
        self.wake();
        for helper in self.helpers.drain(..) {
            helper.join().expect("a helper catches its panics");
        }
    }
}

/// Waits on drop, also of an unwinding caller, until no helper uses the task. The drop itself cannot unwind before that.
struct WaitForHelpers<'a> {
    shared: &'a Shared,
    callers: &'a mut Callers,
}

impl Drop for WaitForHelpers<'_> {
    fn drop(&mut self) {
        let done = || self.shared.busy.load(Ordering::Acquire) == 0;
        // A wait this short takes less than reading the clock would.
        if spin_until(done) {
            return;
        }
        let began = try_thread_cpu_time();
        while !spin_until(done) {
            thread::yield_now();
        }
        if let (Some(began), Some(now)) = (began, try_thread_cpu_time()) {
            self.callers.add_for_last(-(now.saturating_sub(began).as_nanos() as i64));
        }
    }
}

impl Callers {
    /// Adds nanoseconds to the entry of the last caller. Allocates nothing: the entries have their capacity from the start.
    fn add_for_last(&mut self, nanos: i64) {
        let Some(last) = self.last.filter(|_| nanos != 0) else { return };
        if let Some((_, sum)) = self.entries.iter_mut().find(|(caller, _)| *caller == last) {
            *sum += nanos;
            return;
        }
        if self.entries.len() == CALLERS_MAX {
            self.entries.remove(0);
        }
        self.entries.push((last, nanos));
    }

    /// Removes the entry of a thread.
    fn take(&mut self, caller: ThreadId) -> i64 {
        let at = self.entries.iter().position(|(thread, _)| *thread == caller);
        at.map_or(0, |at| self.entries.remove(at).1)
    }
}

impl Shared {
    fn help(&self, n: usize) {
        let (mut seen, mut since) = (0, try_thread_cpu_time());
        loop {
            while !spin_until(|| self.task_count.load(Ordering::Acquire) != seen) {
                thread::park();
                since = try_thread_cpu_time();
            }
            seen = seen.wrapping_add(1);
            if self.ended.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: the task was written before it was counted, and lives until this helper leaves `busy` below.
            let task = unsafe { *self.task.get() };
            if catch_unwind(AssertUnwindSafe(|| task(n))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
            // The caller does not wait for the clock: the time of an image's last task is read with the next image's first.
            let now = try_thread_cpu_time();
            if let (Some(since), Some(now)) = (since, now) {
                self.helper_nanos.fetch_add(now.saturating_sub(since).as_nanos() as i64, Ordering::Relaxed);
            }
            since = now;
        }
    }
}

/// Waits in a busy loop for [`SPIN`]; returns whether `done` held before its end.
fn spin_until(done: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    loop {
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if began.elapsed() >= SPIN {
            return false;
        }
    }
}

impl fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu_time::thread_cpu_time;

    /// Takes processor time of the calling thread.
    fn work(time: Duration) {
        let began = thread_cpu_time();
        while thread_cpu_time() - began < time {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn each_thread_runs_each_task_once() {
        let pool = ThreadPool::new(4).unwrap();
        let counts: [AtomicUsize; 4] = Default::default();
        for task in 1..=1000 {
            pool.run(&|n| {
                counts[n].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == task));
        }
    }

    #[test]
    fn several_callers_take_turns() {
        let pool = ThreadPool::new(3).unwrap();
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(&|_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 4 * 200 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_stays_usable() {
        let pool = ThreadPool::new(2).unwrap();
        for panics in 0..2 {
            let ran = catch_unwind(AssertUnwindSafe(|| pool.run(&|n| assert!(n != panics))));
            assert!(ran.is_err());
        }
        assert!(catch_unwind(AssertUnwindSafe(|| pool.run(&|_| panic!("all threads")))).is_err());
        let count = AtomicUsize::new(0);
        pool.run(&|n| {
            count.fetch_add(n, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 1);
    }

    #[test]
    fn a_panicking_caller_waits_for_the_helpers_that_use_its_closure() {
        let pool = ThreadPool::new(3).unwrap();
        let finished = AtomicUsize::new(0);
        let ran = catch_unwind(AssertUnwindSafe(|| {
            pool.run(&|n| {
                assert!(n != 0, "the caller panics");
                thread::sleep(Duration::from_millis(30));
                finished.fetch_add(1, Ordering::Relaxed);
            });
        }));
        assert!(ran.is_err());
        assert_eq!(finished.load(Ordering::Relaxed), 2);
        pool.run(&|_| {});
    }

    #[test]
    fn the_processor_time_of_the_helpers_belongs_to_the_thread_that_called_them() {
        let pool = ThreadPool::new(2).unwrap();
        let own = thread_cpu_time();
        pool.run(&|_| work(Duration::from_millis(30)));
        // A second task, so that the time of the first is certainly in.
        pool.run(&|_| {});
        thread::scope(|scope| {
            scope.spawn(|| assert_eq!(pool.take_cpu_time(), CpuTime::default()));
        });
        let lent = pool.take_cpu_time();
        let all = lent.plus_own(thread_cpu_time() - own);
        assert!(all >= Duration::from_millis(58) && all < Duration::from_millis(120), "{all:?}");
        assert!(pool.take_cpu_time().as_nanos() < 10_000_000, "it is reset");
    }

    #[test]
    fn a_wait_for_the_helpers_is_no_processor_time_of_the_caller() {
        let pool = ThreadPool::new(2).unwrap();
        let own = thread_cpu_time();
        pool.run(&|n| thread::sleep(Duration::from_millis(60 * n as u64)));
        let spun = thread_cpu_time() - own;
        let all = pool.take_cpu_time().plus_own(spun);
        assert!(all < Duration::from_millis(20) && all <= spun, "{all:?} of {spun:?}");
    }

    #[test]
    fn the_entries_of_callers_do_not_grow() {
        let pool = ThreadPool::new(2).unwrap();
        for _ in 0..CALLERS_MAX + 20 {
            thread::scope(|scope| {
                scope.spawn(|| pool.run(&|_| work(Duration::from_micros(50))));
            });
        }
        let callers = pool.lock();
        assert!(callers.entries.len() <= CALLERS_MAX);
        assert_eq!(callers.entries.capacity(), CALLERS_MAX);
    }
}
