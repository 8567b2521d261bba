//! Limits log lines about many things of one kind: the first ones are logged, the others counted once a minute.

use std::time::{Duration, Instant};

use tracing::warn;

/// Interval of the counts.
const INTERVAL: Duration = Duration::from_secs(60);
/// Different messages that are logged in one interval.
const DIFFERENT_MAX: usize = 8;

/// Limits the log lines of one kind. A message that was logged is not logged again while such messages keep coming.
#[derive(Debug)]
pub struct LogLimiter {
    /// Name of the messages, in the plural.
    kind: &'static str,
    /// Start of the present interval; `None` after one without a message.
    started: Option<Instant>,
    /// The messages that were logged.
    logged: Vec<String>,
    /// Messages of the present interval that were not logged.
    left_out: u64,
    /// Whether a message came in the present interval.
    active: bool,
}

impl LogLimiter {
    /// Starts without messages; `kind` names them in the plural, for example "broken frames".
    pub fn new(kind: &'static str) -> Self {
        LogLimiter { kind, started: None, logged: Vec::new(), left_out: 0, active: false }
    }

    /// Logs a warning, or counts it.
    pub fn warn(&mut self, message: String) {
        if let Some(message) = self.admit(message, Instant::now()) {
            warn!("{message}");
        }
    }

    /// Logs the count of the messages that were left out, once a minute; to be called often.
    pub fn flush(&mut self) {
        if let Some(left_out) = self.count(Instant::now()) {
            warn!("{left_out} more {} in the last {} s", self.kind, INTERVAL.as_secs());
        }
    }

    /// Returns the message if it is to be logged.
    fn admit(&mut self, message: String, now: Instant) -> Option<String> {
        self.started.get_or_insert(now);
        self.active = true;
        if self.logged.len() < DIFFERENT_MAX && !self.logged.contains(&message) {
            self.logged.push(message.clone());
            return Some(message);
        }
        self.left_out += 1;
        None
    }

    /// Returns the number of messages that were left out in the interval that has ended, if there were any.
    fn count(&mut self, now: Instant) -> Option<u64> {
        if now.duration_since(self.started?) < INTERVAL {
            return None;
        }
        self.started = Some(now);
        if !std::mem::take(&mut self.active) {
            self.started = None;
            self.logged.clear();
        }
        Some(std::mem::take(&mut self.left_out)).filter(|left_out| *left_out > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_messages_is_logged_and_the_others_are_counted() {
        let (mut limiter, start) = (LogLimiter::new("broken frames"), Instant::now());
        let mut admitted = |message: &str, s: u64| {
            let now = start + Duration::from_secs(s);
            (limiter.count(now), limiter.admit(message.into(), now).is_some())
        };
        assert_eq!(admitted("a", 0), (None, true));
        assert_eq!(admitted("a", 1), (None, false));
        assert_eq!(admitted("b", 2), (None, true));
        assert_eq!(admitted("a", 59), (None, false));
        assert_eq!(admitted("a", 61), (Some(2), false), "the first minute");
        assert_eq!(admitted("c", 62), (None, true));
        assert_eq!(limiter.count(start + Duration::from_secs(122)), Some(1));
        assert_eq!(limiter.count(start + Duration::from_secs(183)), None);
        assert!(limiter.admit("a".into(), start + Duration::from_secs(184)).is_some(), "after a minute without");
    }

    #[test]
    fn different_messages_are_limited_as_well() {
        let (mut limiter, now) = (LogLimiter::new("broken frames"), Instant::now());
        let logged = (0..1000).filter(|n| limiter.admit(n.to_string(), now).is_some()).count();
        assert_eq!(logged, DIFFERENT_MAX);
        assert_eq!(limiter.count(now + INTERVAL), Some(1000 - DIFFERENT_MAX as u64));
    }
}
