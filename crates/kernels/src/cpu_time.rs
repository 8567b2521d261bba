//! Processor time, which does not depend on the other load of the machine.

use std::time::Duration;

use nix::time::ClockId;

/// Returns the processor time of the calling thread since it started (`CLOCK_THREAD_CPUTIME_ID`).
///
/// # Panics
/// If the system has no such clock; Linux always has.
pub fn thread_cpu_time() -> Duration {
    try_thread_cpu_time().expect("Linux has CLOCK_THREAD_CPUTIME_ID")
}

/// The same without the panic.
pub(crate) fn try_thread_cpu_time() -> Option<Duration> {
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().map(Duration::from).ok()
}

/// Correction to a caller's own processor time: plus the helper threads' time, minus the caller's busy-waiting. It can be negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuTime {
    nanos: i64,
}

impl CpuTime {
    /// Returns the time in nanoseconds.
    pub fn as_nanos(self) -> i64 {
        self.nanos
    }

    /// Returns the sum with the calling thread's own processor time, at least zero.
    pub fn plus_own(self, own: Duration) -> Duration {
        let nanos = i128::from(self.nanos) + own.as_nanos() as i128;
        Duration::from_nanos(nanos.clamp(0, i128::from(u64::MAX)) as u64)
    }

    pub(crate) fn from_nanos(nanos: i64) -> Self {
        CpuTime { nanos }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleeping_thread_takes_no_processor_time() {
        let began = thread_cpu_time();
        std::thread::sleep(Duration::from_millis(50));
        assert!(thread_cpu_time() - began < Duration::from_millis(40));
    }

    #[test]
    fn the_sum_with_the_own_time_is_never_negative() {
        let own = Duration::from_millis(3);
        assert_eq!(CpuTime::from_nanos(2_000_000).plus_own(own), Duration::from_millis(5));
        assert_eq!(CpuTime::from_nanos(-2_000_000).plus_own(own), Duration::from_millis(1));
        assert_eq!(CpuTime::from_nanos(-4_000_000).plus_own(own), Duration::ZERO);
    }
}
