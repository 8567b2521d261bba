//! Detects that the system's clock was set, by comparison with the monotonic clock.

use std::time::{Duration, Instant, SystemTime};

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

/// Compares the system's clock with the monotonic one.
#[derive(Debug)]
pub struct ClockWatch {
    wall: SystemTime,
    monotonic: Instant,
}

impl ClockWatch {
    /// Starts with the present times.
    pub fn new(wall: SystemTime, monotonic: Instant) -> Self {
        ClockWatch { wall, monotonic }
    }

    /// Returns the step since the last call, if the clock was set by at least a second.
    pub fn step(&mut self, wall: SystemTime, monotonic: Instant) -> Option<Step> {
        let expected = self.wall + monotonic.saturating_duration_since(self.monotonic);
        let step = match wall.duration_since(expected) {
            Ok(by) if by >= STEP_MIN => Some(Step::Forward(by)),
            Err(error) if error.duration() >= STEP_MIN => Some(Step::Back(error.duration())),
            _ => None,
        };
        (self.wall, self.monotonic) = (wall, monotonic);
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_is_a_step_and_one_that_runs_is_not() {
        let (wall, monotonic) = (SystemTime::UNIX_EPOCH, Instant::now());
        let s = Duration::from_secs;
        let mut clock = ClockWatch::new(wall, monotonic);
        assert_eq!(clock.step(wall + s(100), monotonic + s(100)), None);
        assert_eq!(clock.step(wall + s(110) + Duration::from_millis(900), monotonic + s(110)), None);
        let years = s(50 * 365 * 86_400);
        let forward = clock.step(wall + s(111) + years, monotonic + s(111)).unwrap();
        assert_eq!(forward, Step::Forward(years - Duration::from_millis(900)));
        assert_eq!(forward.apply(wall + s(1)), wall + s(1) + years - Duration::from_millis(900));
        let back = clock.step(wall + s(112), monotonic + s(112)).unwrap();
        assert_eq!(back, Step::Back(years));
        assert_eq!(back.apply(wall + years), wall);
        assert_eq!(clock.step(wall + s(200), monotonic + s(200)), None);
    }
}
