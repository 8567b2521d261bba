//! What the daemon counts, for its log and for whoever asks how it fares.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that several threads raise.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counted since the start of the daemon.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames the camera gave.
    pub captured: Counter,
    /// Frames that a newer one overwrote before anybody looked.
    pub dropped: Counter,
    /// Frames that could not be read or decoded.
    pub broken: Counter,
    /// Frames that were classified.
    pub classified: Counter,
    /// Times the camera failed and was opened again.
    pub camera_failures: Counter,
    /// Events that were decided.
    pub events: Counter,
    /// Events that the broker acknowledged.
    pub acknowledged: Counter,
    /// Events that a full outbox had to give up, oldest first.
    pub events_lost: Counter,
    /// Connections to the broker that were made.
    pub connections: Counter,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "captured={} dropped={} broken={} classified={} camera_failures={} events={} acknowledged={} events_lost={} connections={}",
            self.captured.get(),
            self.dropped.get(),
            self.broken.get(),
            self.classified.get(),
            self.camera_failures.get(),
            self.events.get(),
            self.acknowledged.get(),
            self.events_lost.get(),
            self.connections.get(),
        )
    }
}
