//! Detects that the system's clock was set, by comparison with the monotonic clock.

use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

/// A smaller difference between the clocks is not a step: time daemons slew the clock, and the two are not read at once.
const STEP_MIN: Duration = Duration::from_secs(1);

/// A step of the system's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It was set forward by this time.
    Forward(Duration),
    /// It was set back by this time.
    Back(Duration),
}

impl Step {
    /// Returns a time of before the step as the clock would show it now.
    pub fn apply(self, time: SystemTime) -> SystemTime {
        let moved = match self {
            Step::Forward(by) => time.checked_add(by),
            Step::Back(by) => time.checked_sub(by),
        };
        moved.unwrap_or(time)
    }
}

/// Compares the system's clock with the time since the boot, which also runs while the system is suspended.
#[derive(Debug)]
pub struct ClockWatch {
    wall: SystemTime,
    since_boot: Duration,
    /// The newest step.
    last: Option<Step>,
}

impl ClockWatch {
    /// Starts with the present times.
    pub fn start() -> Self {
        Self::new(SystemTime::now(), since_boot())
    }

    fn new(wall: SystemTime, since_boot: Duration) -> Self {
        ClockWatch { wall, since_boot, last: None }
    }

    /// Returns the step since the last call, if the clock was set by at least a second.
    pub fn check(&mut self) -> Option<Step> {
        self.step(SystemTime::now(), since_boot())
    }

    fn step(&mut self, wall: SystemTime, since_boot: Duration) -> Option<Step> {
        let expected = self.wall + since_boot.saturating_sub(self.since_boot);
        let step = match wall.duration_since(expected) {
            Ok(by) if by >= STEP_MIN => Some(Step::Forward(by)),
            Err(error) if error.duration() >= STEP_MIN => Some(Step::Back(error.duration())),
            _ => None,
        };
        (self.wall, self.since_boot) = (wall, since_boot);
        self.last = step.or(self.last);
        step
    }

    /// Returns the capture time of a frame of the last moments as the clock would show it now: a frame that was captured before
    /// the newest step has a time that is further from the present one than the step would move it.
    pub fn corrected(&self, captured_at: SystemTime) -> SystemTime {
        let distance = |time: SystemTime| match self.wall.duration_since(time) {
            Ok(distance) => distance,
            Err(error) => error.duration(),
        };
        let moved = self.last.map_or(captured_at, |step| step.apply(captured_at));
        if distance(moved) < distance(captured_at) { moved } else { captured_at }
    }
}

/// Returns the time since the boot.
fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_is_a_step_and_one_that_runs_is_not() {
        let (wall, s) = (SystemTime::UNIX_EPOCH, Duration::from_secs);
        let mut clock = ClockWatch::new(wall, s(0));
        assert_eq!(clock.step(wall + s(100), s(100)), None);
        assert_eq!(clock.step(wall + s(110) + Duration::from_millis(900), s(110)), None);
        assert_eq!(clock.corrected(wall + s(110)), wall + s(110));
        let years = s(50 * 365 * 86_400);
        let forward = clock.step(wall + s(111) + years, s(111)).unwrap();
        assert_eq!(forward, Step::Forward(years - Duration::from_millis(900)));
        // A frame from before the step, and one from after it.
        assert_eq!(clock.corrected(wall + s(110)), forward.apply(wall + s(110)));
        assert_eq!(clock.corrected(wall + s(111) + years), wall + s(111) + years);
        let back = clock.step(wall + s(112), s(112)).unwrap();
        assert_eq!(back, Step::Back(years));
        assert_eq!(clock.corrected(wall + years + s(112)), wall + s(112));
        assert_eq!(clock.corrected(wall + s(112)), wall + s(112));
        assert_eq!(clock.step(wall + s(200), s(200)), None);
    }

    #[test]
    fn the_present_clock_has_no_step() {
        let mut clock = ClockWatch::start();
        assert!(clock.since_boot > Duration::ZERO);
        assert_eq!(clock.check(), None);
    }
}
