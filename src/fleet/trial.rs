//! The first frames of a new model, during which it may fail. Pure: time comes with what is told.

use std::time::{Duration, Instant};

use super::message::Terms;
use crate::watcher::Report;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Confirmed,
    /// Why the model must go.
    Failed(String),
}

pub struct Trial {
    ends: Instant,
    frames_left: u32,
    times: Vec<Duration>,
    /// The median of all frames must not be above; none where there is nothing to compare with.
    limit: Option<Duration>,
}

impl Trial {
    pub fn begin(terms: Terms, limit: Option<Duration>, now: Instant) -> Self {
        let ends = now + Duration::from_secs(terms.seconds);
        Trial { ends, frames_left: terms.frames, times: Vec::new(), limit }
    }

    pub fn ends(&self) -> Instant {
        self.ends
    }

    /// What a frame decides, if it does.
    pub fn hear(&mut self, report: Report) -> Option<Outcome> {
        match report {
            Report::Failed(reason) => Some(Outcome::Failed(reason)),
            Report::Seen(time) => {
                self.times.push(time);
                self.frames_left = self.frames_left.saturating_sub(1);
                (self.frames_left == 0).then(|| self.judge())
            }
        }
    }

    /// What the time decides, if it does. A camera that gives no frames is no fault of the model.
    pub fn at(&mut self, now: Instant) -> Option<Outcome> {
        (now >= self.ends).then(|| self.judge())
    }

    fn judge(&mut self) -> Outcome {
        self.times.sort_unstable();
        match (self.times.get(self.times.len() / 2), self.limit) {
            (Some(median), Some(limit)) if *median > limit => {
                let (took, limit) = (median.as_secs_f64() * 1e3, limit.as_secs_f64() * 1e3);
                Outcome::Failed(format!("a frame takes it {took:.0} ms, the limit is {limit:.0} ms"))
            }
            _ => Outcome::Confirmed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms { frames: 3, seconds: 60 };
    const LIMIT: Option<Duration> = Some(Duration::from_millis(50));

    fn seen(ms: u64) -> Report {
        Report::Seen(Duration::from_millis(ms))
    }

    #[test]
    fn enough_good_frames_confirm_and_slow_ones_do_not() {
        let now = Instant::now();
        let mut good = Trial::begin(TERMS, LIMIT, now);
        assert_eq!((good.hear(seen(20)), good.hear(seen(500))), (None, None));
        assert_eq!(good.hear(seen(50)), Some(Outcome::Confirmed), "one slow frame is an accident");
        let mut slow = Trial::begin(TERMS, LIMIT, now);
        slow.hear(seen(51));
        slow.hear(seen(20));
        let failed = Outcome::Failed("a frame takes it 51 ms, the limit is 50 ms".into());
        assert_eq!(slow.hear(seen(90)), Some(failed));
        let mut unknown = Trial::begin(Terms { frames: 1, seconds: 1 }, None, now);
        assert_eq!(unknown.hear(seen(9000)), Some(Outcome::Confirmed));
    }

    #[test]
    fn one_failure_ends_it_and_time_confirms_what_was_not_seen_to_fail() {
        let now = Instant::now();
        let mut trial = Trial::begin(TERMS, LIMIT, now);
        assert_eq!(trial.at(now + Duration::from_secs(59)), None);
        assert_eq!(trial.at(trial.ends()), Some(Outcome::Confirmed));
        assert_eq!(trial.hear(Report::Failed("panic".into())), Some(Outcome::Failed("panic".into())));
    }
}
