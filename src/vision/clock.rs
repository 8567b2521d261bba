//! How long a thread has worked, which does not hang on what else the machine does meanwhile.

use std::time::Duration;

use nix::time::ClockId;

/// Processor time of this thread since it began.
pub fn worked() -> Duration {
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().map(Duration::from).expect("Linux counts every thread's time")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_is_no_work() {
        let began = worked();
        std::thread::sleep(Duration::from_millis(50));
        assert!(worked() - began < Duration::from_millis(40));
    }
}
