//! The trial of a new model on its first frames. It performs no I/O and reads no clock; the caller passes the time.

use std::time::{Duration, Instant};

use crate::update::protocol::TrialLimits;
use crate::vision_stage::FrameReport;

/// Result of a trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrialOutcome {
    /// The model stays active.
    Confirmed,
    /// The model has to be rolled back, for this reason.
    Failed(String),
}

/// A running trial.
pub struct Trial {
    deadline: Instant,
    frames_left: u32,
    /// The shortest processor time of the backbone for a frame so far.
    fastest: Option<Duration>,
    /// Upper limit of `fastest`; `None` disables the check.
    limit: Option<Duration>,
}

impl Trial {
    /// Starts a trial. It fails if even the fastest frame takes longer than `limit`; `None` disables this check.
    pub fn start(limits: TrialLimits, limit: Option<Duration>, now: Instant) -> Self {
        let deadline = now + Duration::from_secs(limits.seconds);
        Trial { deadline, frames_left: limits.frames, fastest: None, limit }
    }

    /// Records a frame; returns the outcome once a frame fails or a limit of the trial is reached.
    pub fn report(&mut self, report: FrameReport, now: Instant) -> Option<TrialOutcome> {
        match report {
            FrameReport::Failed(reason) => Some(TrialOutcome::Failed(reason)),
            FrameReport::Classified(time) => {
                self.fastest = Some(self.fastest.map_or(time, |fastest| fastest.min(time)));
                self.frames_left = self.frames_left.saturating_sub(1);
                (self.frames_left == 0).then(|| self.outcome()).or_else(|| self.check_time(now))
            }
        }
    }

    /// Returns the outcome once the time is up and at least one frame was classified.
    pub fn check_time(&self, now: Instant) -> Option<TrialOutcome> {
        (now >= self.deadline && self.fastest.is_some()).then(|| self.outcome())
    }

    fn outcome(&self) -> TrialOutcome {
        match (self.fastest, self.limit) {
            (Some(fastest), Some(limit)) if fastest > limit => {
                let (fastest, limit) = (fastest.as_millis(), limit.as_millis());
                TrialOutcome::Failed(format!(
                    "the backbone takes at least {fastest} ms per frame, the limit is {limit} ms"
                ))
            }
            _ => TrialOutcome::Confirmed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: TrialLimits = TrialLimits { frames: 3, seconds: 60 };
    const LIMIT: Option<Duration> = Some(Duration::from_millis(50));

    fn classified(ms: u64) -> FrameReport {
        FrameReport::Classified(Duration::from_millis(ms))
    }

    #[test]
    fn confirms_after_enough_frames_unless_all_are_too_slow() {
        let now = Instant::now();
        let mut good = Trial::start(LIMITS, LIMIT, now);
        assert_eq!((good.report(classified(90), now), good.report(classified(500), now)), (None, None));
        let confirmed = good.report(classified(50), now);
        assert_eq!(confirmed, Some(TrialOutcome::Confirmed), "slow frames may be due to other load");
        let mut slow = Trial::start(LIMITS, LIMIT, now);
        slow.report(classified(51), now);
        slow.report(classified(70), now);
        let failed = TrialOutcome::Failed("the backbone takes at least 51 ms per frame, the limit is 50 ms".into());
        assert_eq!(slow.report(classified(90), now), Some(failed));
        let mut unlimited = Trial::start(TrialLimits { frames: 1, seconds: 1 }, None, now);
        assert_eq!(unlimited.report(classified(9000), now), Some(TrialOutcome::Confirmed));
    }

    #[test]
    fn ends_on_the_first_failure_or_when_the_time_is_up_after_at_least_one_frame() {
        let now = Instant::now();
        let late = now + Duration::from_secs(LIMITS.seconds);
        let mut trial = Trial::start(LIMITS, LIMIT, now);
        assert_eq!(trial.check_time(late), None, "no frame was classified");
        assert_eq!(trial.report(classified(20), late), Some(TrialOutcome::Confirmed), "one frame is enough by then");
        let mut trial = Trial::start(LIMITS, LIMIT, now);
        trial.report(classified(20), now);
        assert_eq!((trial.check_time(now), trial.check_time(late)), (None, Some(TrialOutcome::Confirmed)));
        let panicked = FrameReport::Failed("panic".into());
        assert_eq!(trial.report(panicked, now), Some(TrialOutcome::Failed("panic".into())));
    }
}
