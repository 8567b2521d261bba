//! Threads that compute a frame together. While a frame is computed they wait awake for their next piece: a piece takes some fifty
//! microseconds, and to wake a thread takes as long. Between frames they sleep.

use std::cell::UnsafeCell;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::vision::clock;

/// As many threads as a device has cores, but for one.
pub fn all_but_one() -> usize {
    thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1)).clamp(1, THREADS_MAX)
}

/// The most threads of a team, its caller among them.
pub const THREADS_MAX: usize = 64;
/// How long a thread without work stays awake.
const AWAKE: Duration = Duration::from_micros(200);

type Work<'a> = &'a (dyn Fn(usize) + Sync);

/// Threads beside the caller's own.
pub struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// One caller at a time.
    calling: Mutex<()>,
}

struct Shared {
    /// Counts pieces of work.
    piece: AtomicUsize,
    work: UnsafeCell<Work<'static>>,
    /// Helpers that are not done with the piece.
    busy: AtomicUsize,
    panicked: AtomicBool,
    ended: AtomicBool,
    worked_ns: AtomicU64,
}

// SAFETY: `work` is written only while no helper is busy, and read only between the count of a piece and the end of `busy`.
unsafe impl Sync for Shared {}
// SAFETY: what `work` refers to may be shared among threads.
unsafe impl Send for Shared {}

impl Team {
    /// A team of so many threads, the caller's among them; none where that is one.
    pub fn of(threads: usize) -> io::Result<Option<Arc<Self>>> {
        (threads > 1).then(|| Team::new(threads).map(Arc::new)).transpose()
    }

    /// `threads`: with the caller's, at most [`THREADS_MAX`].
    fn new(threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            piece: AtomicUsize::new(0),
            work: UnsafeCell::new(&|_| {}),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            worked_ns: AtomicU64::new(0),
        });
        let mut team = Team { shared, helpers: Vec::new(), calling: Mutex::new(()) };
        for nth in 1..threads.clamp(1, THREADS_MAX) {
            let shared = Arc::clone(&team.shared);
            let helper = thread::Builder::new().name(format!("kernels-{nth}")).spawn(move || shared.help(nth))?;
            team.helpers.push(helper);
        }
        Ok(team)
    }

    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// There will be work in a moment.
    pub fn wake(&self) {
        self.helpers.iter().for_each(|helper| helper.thread().unpark());
    }

    /// Calls `work` once with each number below [`Team::threads`], 0 on this thread, and returns when all are done. What the others
    /// worked counts as this thread's work ([`clock::worked`]). A panic in one of them goes on here.
    pub fn run(&self, work: Work<'_>) {
        let _alone = self.calling.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: the reference is used by helpers only, and until each has counted itself out of `busy`, which is waited for below,
        // whatever happens. Nobody reads the cell now: no helper is busy, and no other caller is here.
        unsafe { *shared.work.get() = std::mem::transmute::<Work<'_>, Work<'static>>(work) };
        shared.busy.store(self.helpers.len(), Ordering::Relaxed);
        shared.piece.fetch_add(1, Ordering::Release);
        self.wake();
        let own = catch_unwind(AssertUnwindSafe(|| work(0)));
        let done = || shared.busy.load(Ordering::Acquire) == 0;
        // A wait so short is nothing, and to ask the clock would take as long.
        if !awake(done) {
            let began = clock::worked();
            while !awake(done) {
                thread::yield_now();
            }
            clock::lend(Duration::ZERO, clock::worked() - began);
        }
        clock::lend(Duration::from_nanos(shared.worked_ns.swap(0, Ordering::Relaxed)), Duration::ZERO);
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!panicked, "a thread of the kernels panicked; its message stands above");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.shared.piece.fetch_add(1, Ordering::Release);
        self.wake();
        for helper in self.helpers.drain(..) {
            helper.join().expect("a helper catches its panics");
        }
    }
}

impl Shared {
    fn help(&self, nth: usize) {
        let (mut seen, mut since) = (0, clock::worked());
        loop {
            while !awake(|| self.piece.load(Ordering::Acquire) != seen) {
                thread::park();
                since = clock::worked();
            }
            seen += 1;
            if self.ended.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: a piece was counted after `work` was written, and this helper is still counted as busy.
            let work = unsafe { *self.work.get() };
            if catch_unwind(AssertUnwindSafe(|| work(nth))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
            // Nobody waits for this: the time of a frame's last piece is found with the next frame's first.
            let now = clock::worked();
            self.worked_ns.fetch_add((now - since).as_nanos() as u64, Ordering::Relaxed);
            since = now;
        }
    }
}

/// Waits awake for a while; false where that was not long enough.
fn awake(done: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    loop {
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if began.elapsed() >= AWAKE {
            return false;
        }
    }
}

impl fmt::Debug for Team {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Team of {}", self.threads())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_turn_in_each_piece() {
        let team = Team::new(4).unwrap();
        let counts: [AtomicUsize; 4] = Default::default();
        for piece in 1..=1000 {
            team.run(&|nth| {
                counts[nth].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == piece));
        }
    }

    #[test]
    fn several_callers_take_turns() {
        let team = Team::new(3).unwrap();
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        team.run(&|_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 4 * 200 * 3);
    }

    #[test]
    fn a_panic_comes_to_the_caller_and_the_team_goes_on() {
        let team = Team::new(2).unwrap();
        for panics in 0..2 {
            let ran = catch_unwind(AssertUnwindSafe(|| team.run(&|nth| assert!(nth != panics))));
            assert!(ran.is_err());
        }
        let count = AtomicUsize::new(0);
        team.run(&|nth| {
            count.fetch_add(nth, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 1);
    }
}
