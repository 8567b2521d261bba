//! How long a thread has worked, which does not hang on what else the machine does meanwhile.

use std::cell::Cell;
use std::time::Duration;

use nix::time::ClockId;

thread_local! {
    /// What others worked for this thread, less what it waited awake for them, in nanoseconds.
    static LENT: Cell<i64> = const { Cell::new(0) };
}

/// Processor time of this thread since it began, and of others that worked for it.
pub fn worked() -> Duration {
    let own = ClockId::CLOCK_THREAD_CPUTIME_ID.now().map(Duration::from).expect("Linux counts every thread's time");
    Duration::from_nanos((own.as_nanos() as i64 + LENT.get()).max(0) as u64)
}

/// Others have worked for this thread, which waited awake for them.
pub fn lend(worked: Duration, waited: Duration) {
    LENT.set(LENT.get() + worked.as_nanos() as i64 - waited.as_nanos() as i64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_is_no_work_and_the_work_of_others_is() {
        let began = worked();
        std::thread::sleep(Duration::from_millis(50));
        assert!(worked() - began < Duration::from_millis(40));
        lend(Duration::from_secs(2), Duration::from_secs(1));
        let more = worked() - began;
        assert!(more >= Duration::from_secs(1) && more < Duration::from_millis(1040), "{more:?}");
    }
}
