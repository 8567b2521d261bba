//! The daemon's counters since its start.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that several threads may increment.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Returns the present value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts of frames, events and connections since the start of the daemon; a reload keeps them.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames read from the camera. A frame that the rate limit skips is counted here only.
    pub captured: Counter,
    /// Frames that a newer one replaced in the mailbox before they were classified; those that the rate limit skips are not
    /// included.
    pub dropped: Counter,
    /// Frames that could not be read or decoded, or on which the model failed.
    pub broken: Counter,
    /// Frames that were classified.
    pub classified: Counter,
    /// Frames that were not classified because they equal the previous one within `camera.still_threshold`.
    pub still: Counter,
    /// Frames that were not classified because they are too dark, blank or blurred: `camera.dark`, `blank` and `blurred`.
    pub unfit: Counter,
    /// Times that the camera failed and was reopened.
    pub camera_failures: Counter,
    /// Events.
    pub events: Counter,
    /// Events that the broker acknowledged.
    pub acknowledged: Counter,
    /// Events that were lost: the queue or the outbox was full, the event exceeded `mqtt.packet_bytes_max`, the outbox was
    /// smaller after a reload, or the broker had not acknowledged the event at shutdown.
    pub events_lost: Counter,
    /// Connections to the broker that were accepted.
    pub connections: Counter,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "captured={} dropped={} broken={} classified={} still={} unfit={} camera_failures={} events={} acknowledged={} events_lost={} connections={}",
            self.captured.get(),
            self.dropped.get(),
            self.broken.get(),
            self.classified.get(),
            self.still.get(),
            self.unfit.get(),
            self.camera_failures.get(),
            self.events.get(),
            self.acknowledged.get(),
            self.events_lost.get(),
            self.connections.get(),
        )
    }
}
