//! Heartbeats of the stage threads, which the watchdog checks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The heartbeat of one stage: the stage's thread calls [`Heartbeat::beat`] on its clone, the watchdog reads the age of the
/// last beat.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    stage: &'static str,
    started: Instant,
    /// Milliseconds from `started` to the last beat.
    last_ms: Arc<AtomicU64>,
}

impl Heartbeat {
    /// Creates the heartbeat of the stage of this name; its creation counts as the first beat.
    pub fn new(stage: &'static str) -> Self {
        Heartbeat { stage, started: Instant::now(), last_ms: Arc::default() }
    }

    /// Records that the stage makes progress.
    pub fn beat(&self) {
        self.last_ms.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Returns the time since the last beat.
    fn age(&self) -> Duration {
        self.started.elapsed().saturating_sub(Duration::from_millis(self.last_ms.load(Ordering::Relaxed)))
    }
}

/// Returns the stage whose last beat is oldest, with its age, if it is older than `age_max`.
pub(super) fn stalled(heartbeats: &[Heartbeat], age_max: Duration) -> Option<(&'static str, Duration)> {
    let ages = heartbeats.iter().map(|heartbeat| (heartbeat.stage, heartbeat.age()));
    ages.max_by_key(|(_, age)| *age).filter(|(_, age)| *age > age_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_stage_with_the_oldest_beat() {
        let heartbeats = [Heartbeat::new("camera"), Heartbeat::new("vision")];
        assert_eq!(stalled(&heartbeats, Duration::from_secs(60)), None);
        std::thread::sleep(Duration::from_millis(20));
        heartbeats[0].clone().beat();
        let (stage, age) = stalled(&heartbeats, Duration::from_millis(15)).unwrap();
        assert!(stage == "vision" && age >= Duration::from_millis(20));
        heartbeats[1].beat();
        assert_eq!(stalled(&heartbeats, Duration::from_secs(60)), None);
    }
}
