//! The first frames of a new model, during which it may fail. Pure: time comes with what is told.

use std::time::{Duration, Instant};

use crate::update::protocol::TrialLimits;
use crate::vision_stage::Report;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Confirmed,
    /// Why the model must go.
    Failed(String),
}

pub struct Trial {
    ends: Instant,
    frames_left: u32,
    /// How long the network worked for the frame that it was quickest with.
    quickest: Option<Duration>,
    /// That must not be above; none where there is nothing to compare with.
    limit: Option<Duration>,
}

impl Trial {
    pub fn begin(terms: TrialLimits, limit: Option<Duration>, now: Instant) -> Self {
        let ends = now + Duration::from_secs(terms.seconds);
        Trial { ends, frames_left: terms.frames, quickest: None, limit }
    }

    /// What a frame decides, if it does.
    pub fn hear(&mut self, report: Report, now: Instant) -> Option<Outcome> {
        match report {
            Report::Failed(reason) => Some(Outcome::Failed(reason)),
            Report::Seen(time) => {
                self.quickest = Some(self.quickest.map_or(time, |quickest| quickest.min(time)));
                self.frames_left = self.frames_left.saturating_sub(1);
                (self.frames_left == 0).then(|| self.judge()).or_else(|| self.at(now))
            }
        }
    }

    /// What the time decides, if it does. A model that has not seen a single frame has shown nothing.
    pub fn at(&mut self, now: Instant) -> Option<Outcome> {
        (now >= self.ends && self.quickest.is_some()).then(|| self.judge())
    }

    fn judge(&self) -> Outcome {
        match (self.quickest, self.limit) {
            (Some(quickest), Some(limit)) if quickest > limit => {
                let (took, limit) = (quickest.as_millis(), limit.as_millis());
                Outcome::Failed(format!("it works {took} ms and more for a frame, the limit is {limit} ms"))
            }
            _ => Outcome::Confirmed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: TrialLimits = TrialLimits { frames: 3, seconds: 60 };
    const LIMIT: Option<Duration> = Some(Duration::from_millis(50));

    fn seen(ms: u64) -> Report {
        Report::Seen(Duration::from_millis(ms))
    }

    #[test]
    fn enough_good_frames_confirm_and_slow_ones_do_not() {
        let now = Instant::now();
        let mut good = Trial::begin(TERMS, LIMIT, now);
        assert_eq!((good.hear(seen(90), now), good.hear(seen(500), now)), (None, None));
        assert_eq!(good.hear(seen(50), now), Some(Outcome::Confirmed), "a busy machine is not the model's fault");
        let mut slow = Trial::begin(TERMS, LIMIT, now);
        slow.hear(seen(51), now);
        slow.hear(seen(70), now);
        let failed = Outcome::Failed("it works 51 ms and more for a frame, the limit is 50 ms".into());
        assert_eq!(slow.hear(seen(90), now), Some(failed));
        let mut unknown = Trial::begin(TrialLimits { frames: 1, seconds: 1 }, None, now);
        assert_eq!(unknown.hear(seen(9000), now), Some(Outcome::Confirmed));
    }

    #[test]
    fn one_failure_ends_it_and_time_confirms_what_was_seen_not_to_fail() {
        let now = Instant::now();
        let late = now + Duration::from_secs(TERMS.seconds);
        let mut trial = Trial::begin(TERMS, LIMIT, now);
        assert_eq!(trial.at(late), None, "no frame was seen");
        assert_eq!(trial.hear(seen(20), late), Some(Outcome::Confirmed), "one is enough after so long");
        let mut trial = Trial::begin(TERMS, LIMIT, now);
        trial.hear(seen(20), now);
        assert_eq!((trial.at(now), trial.at(late)), (None, Some(Outcome::Confirmed)));
        let panicked = Report::Failed("panic".into());
        assert_eq!(trial.hear(panicked, now), Some(Outcome::Failed("panic".into())));
    }
}
