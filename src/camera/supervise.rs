//! Supervision of a frame source: opens it, reads it, detects stalls, and reopens it after a growing delay.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use tracing::{info, warn};

use super::latest::{MailboxItem, Sender};
use super::{CameraError, FrameSource, NextFrame};
use crate::system::{Counters, Heartbeat, LogLimiter};

/// The longest wait for a frame before the stall timeout and the mailbox are checked.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// The longest time between two heartbeats while the supervisor waits.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// Time between two frames, in milliseconds. Clones share the value, which can be changed while the camera runs.
#[derive(Debug, Clone)]
pub struct Pace(Arc<AtomicU64>);

impl Pace {
    /// Creates a pace of one frame every `interval_ms` milliseconds; 0 lets every frame pass.
    pub fn new(interval_ms: u64) -> Self {
        Pace(Arc::new(AtomicU64::new(interval_ms)))
    }

    /// Changes the interval, in milliseconds.
    pub fn set(&self, interval_ms: u64) {
        self.0.store(interval_ms, Ordering::Relaxed);
    }

    /// Returns the present interval.
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// Options of [`supervise`].
#[derive(Debug, Clone)]
pub struct SupervisorOptions {
    /// At most one frame per interval is sent to the next stage. `None` for a source with a pace of its own: every frame is
    /// sent, and the stall timeout does not apply.
    pub pace: Option<Pace>,
    /// A camera without a frame for this long is reopened.
    pub stall: Duration,
    /// The first delay before the camera is reopened; it doubles with each consecutive failure.
    pub reopen_min: Duration,
    /// The longest delay before the camera is reopened.
    pub reopen_max: Duration,
}

/// Sends the frames of `source` to `mailbox` until the source ends or the receiver of the mailbox is dropped, and reopens
/// the source when it fails. Beats `heartbeat` while frames arrive and while it waits to reopen.
pub fn supervise(
    source: &mut dyn FrameSource,
    options: &SupervisorOptions,
    mailbox: &Sender,
    counters: &Counters,
    heartbeat: &Heartbeat,
) {
    let mut delay = options.reopen_min;
    let mut broken = LogLimiter::new("broken frames");
    loop {
        let captured_before = counters.captured.get();
        let result = read_until_failure(source, options, mailbox, counters, heartbeat, &mut broken);
        source.close();
        let Err(error) = result else { return };
        if counters.captured.get() > captured_before {
            delay = options.reopen_min;
        }
        counters.camera_failures.add(1);
        warn!("{error}; reopening in {} ms", delay.as_millis());
        let lost = MailboxItem::Lost { at: SystemTime::now() };
        if mailbox.send(lost).is_err() || wait_closed(mailbox, delay, heartbeat) {
            return;
        }
        delay = (delay * 2).min(options.reopen_max);
    }
}

/// Waits until the receiver of the mailbox is dropped, at most `timeout`, with heartbeats. Returns whether it was dropped.
fn wait_closed(mailbox: &Sender, timeout: Duration, heartbeat: &Heartbeat) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        heartbeat.beat();
        let remaining = deadline.saturating_duration_since(Instant::now());
        if mailbox.wait_closed(remaining.min(HEARTBEAT_INTERVAL)) {
            return true;
        }
        if remaining <= HEARTBEAT_INTERVAL {
            return false;
        }
    }
}

/// Opens the source and sends its frames until it ends or the receiver of the mailbox is dropped. An error means that the
/// source must be reopened.
fn read_until_failure(
    source: &mut dyn FrameSource,
    options: &SupervisorOptions,
    mailbox: &Sender,
    counters: &Counters,
    heartbeat: &Heartbeat,
    broken: &mut LogLimiter,
) -> Result<(), CameraError> {
    heartbeat.beat();
    source.open()?;
    let mut limiter = RateLimiter::default();
    let mut last_frame = Instant::now();
    let mut first = true;
    loop {
        heartbeat.beat();
        broken.flush();
        match source.next(POLL_TIMEOUT)? {
            NextFrame::Frame(frame) => {
                if std::mem::take(&mut first) {
                    info!("the camera delivers frames");
                }
                last_frame = Instant::now();
                counters.captured.add(1);
                let interval = options.pace.as_ref().map_or(Duration::ZERO, Pace::interval);
                if limiter.allows(frame.captured_at, interval) {
                    let Ok(replaced) = mailbox.send(MailboxItem::Frame(frame)) else { return Ok(()) };
                    counters.dropped.add(u64::from(replaced));
                }
            }
            NextFrame::Broken(reason) => {
                last_frame = Instant::now();
                counters.broken.add(1);
                broken.warn(format!("{reason}; skipped"));
            }
            NextFrame::Pending => {
                let elapsed = last_frame.elapsed();
                // A source with a pace of its own may be slower than the stall timeout.
                if options.pace.is_some() && elapsed >= options.stall {
                    return Err(CameraError::Stalled(elapsed.as_millis()));
                }
            }
            NextFrame::Ended => return Ok(()),
        }
        if mailbox.wait_closed(Duration::ZERO) {
            return Ok(());
        }
    }
}

/// Limits frames to one per interval, by their capture times.
#[derive(Default)]
struct RateLimiter {
    /// The earliest capture time of the next frame that passes.
    due: Option<SystemTime>,
}

impl RateLimiter {
    /// Returns whether a frame captured at this time passes, and records it if it does.
    fn allows(&mut self, captured_at: SystemTime, interval: Duration) -> bool {
        let lateness = self.due.map(|due| captured_at.duration_since(due).map_err(|e| e.duration()));
        let base = match (self.due, lateness) {
            // Too early. A due time more than one interval ahead is ignored: the clock was set back.
            (_, Some(Err(early))) if early <= interval => return false,
            // The due time advances in whole intervals, so that the camera's jitter does not accumulate.
            (Some(due), Some(Ok(late))) if late < interval => due,
            _ => captured_at,
        };
        self.due = Some(base + interval);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::latest::{RecvResult, mailbox};
    use super::*;
    use crate::frame::{Frame, Picture};

    const INTERVAL: Duration = Duration::from_millis(200);

    fn at_ms(ms: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000 + ms)
    }

    #[test]
    fn rate_limiter_keeps_the_mean_rate_despite_jitter() {
        let mut limiter = RateLimiter::default();
        // 30 frames a second, each up to 5 ms late.
        let passed = (0..300).filter(|i| limiter.allows(at_ms(i * 1000 / 30 + i % 6), INTERVAL)).count();
        assert!((49..=51).contains(&passed), "{passed} of 300 frames in 10 s");
    }

    #[test]
    fn rate_limiter_recovers_from_clock_changes() {
        let mut limiter = RateLimiter::default();
        assert!(limiter.allows(at_ms(900_000), INTERVAL));
        assert!(limiter.allows(at_ms(100), INTERVAL), "clock set back by 15 minutes");
        assert!(!limiter.allows(at_ms(150), INTERVAL));
        assert!(limiter.allows(at_ms(900_000), INTERVAL), "clock set forward again");
        assert!(!limiter.allows(at_ms(900_050), INTERVAL));
    }

    #[test]
    fn rate_limiter_without_interval_allows_every_frame() {
        let mut limiter = RateLimiter::default();
        assert!((0..5).all(|i| limiter.allows(at_ms(i), Duration::ZERO)));
    }

    /// A source whose first two openings fail, whose third gives one frame and stalls, and whose fourth gives one frame and
    /// ends.
    struct FailingSource {
        openings: u32,
        frames_left: u32,
    }

    impl FrameSource for FailingSource {
        fn open(&mut self) -> Result<(), CameraError> {
            self.openings += 1;
            self.frames_left = 1;
            match self.openings {
                1 | 2 => Err(CameraError::Open { path: "test camera".into(), reason: "busy".into() }),
                _ => Ok(()),
            }
        }

        fn next(&mut self, _: Duration) -> Result<NextFrame, CameraError> {
            if self.frames_left > 0 {
                self.frames_left -= 1;
                return Ok(NextFrame::Frame(Frame {
                    captured_at: SystemTime::now(),
                    picture: Picture::Encoded(vec![self.openings as u8]),
                    origin: None,
                }));
            }
            Ok(if self.openings == 3 { NextFrame::Pending } else { NextFrame::Ended })
        }

        fn close(&mut self) {}
    }

    #[test]
    fn reopens_a_source_that_fails_or_stalls_until_it_ends() {
        let options = SupervisorOptions {
            pace: Some(Pace::new(0)),
            stall: Duration::from_millis(20),
            reopen_min: Duration::from_millis(1),
            reopen_max: Duration::from_millis(2),
        };
        let counters = Arc::new(Counters::default());
        let (sender, receiver) = mailbox();
        let mut source = FailingSource { openings: 0, frames_left: 0 };
        supervise(&mut source, &options, &sender, &counters, &Heartbeat::new("camera"));
        assert_eq!(source.openings, 4);
        assert_eq!(counters.captured.get(), 2);
        assert_eq!(counters.camera_failures.get(), 3);
        drop(sender);
        assert!(
            matches!(receiver.recv(Duration::ZERO), RecvResult::Item(MailboxItem::Lost { .. })),
            "no item was received before"
        );
        assert!(matches!(receiver.recv(Duration::ZERO), RecvResult::Item(MailboxItem::Frame(_))));
    }
}
