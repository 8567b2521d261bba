//! The loop that keeps a camera going: open, read, notice a stall, close, wait, open again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use tracing::{info, warn};

use super::latest::{MailboxItem, Sender};
use super::{CameraError, FrameSource, Next};
use crate::system::{Counters, Heartbeat};

/// How long one wait for a frame lasts before the stall timer and the mailbox are looked at.
const POLL: Duration = Duration::from_millis(100);
/// The longest wait without a sign of life.
const BEAT: Duration = Duration::from_secs(1);

/// The time between two frames; it can be changed while the camera runs.
#[derive(Debug, Clone)]
pub struct Pace(Arc<AtomicU64>);

impl Pace {
    pub fn new(interval_ms: u64) -> Self {
        Pace(Arc::new(AtomicU64::new(interval_ms)))
    }

    pub fn set(&self, interval_ms: u64) {
        self.0.store(interval_ms, Ordering::Relaxed);
    }

    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// What the loop goes by.
#[derive(Debug, Clone)]
pub struct Supervisor {
    /// At most one frame in this time goes on to the next stage. None for a source that keeps its own
    /// pace: every frame passes, and however slow it is, it has not stalled.
    pub pace: Option<Pace>,
    /// A camera that gave nothing for this long is reopened.
    pub stall: Duration,
    /// The first wait before a reopening; it doubles with each failure in a row.
    pub reopen_min: Duration,
    pub reopen_max: Duration,
}

/// Reads `source` into `mailbox` until it ends or the mailbox is closed from the other side. The `heartbeat` beats whether the
/// camera gives frames or is being reopened.
pub fn watch(
    source: &mut dyn FrameSource,
    rules: &Supervisor,
    mailbox: &Sender,
    counters: &Counters,
    heartbeat: &Heartbeat,
) {
    let mut pause = rules.reopen_min;
    loop {
        let frames_before = counters.captured.get();
        let ended = read(source, rules, mailbox, counters, heartbeat);
        source.close();
        let Err(error) = ended else { return };
        if counters.captured.get() > frames_before {
            pause = rules.reopen_min;
        }
        counters.camera_failures.add(1);
        warn!("{error}; opening again in {} ms", pause.as_millis());
        let lost = MailboxItem::Lost { at: SystemTime::now() };
        if mailbox.publish(lost).is_err() || closed_within(mailbox, pause, heartbeat) {
            return;
        }
        pause = (pause * 2).min(rules.reopen_max);
    }
}

/// Waits, beating; true as soon as nobody wants frames any more.
fn closed_within(mailbox: &Sender, wait: Duration, heartbeat: &Heartbeat) -> bool {
    let until = Instant::now() + wait;
    loop {
        heartbeat.beat();
        let left = until.saturating_duration_since(Instant::now());
        if mailbox.closed_within(left.min(BEAT)) {
            return true;
        }
        if left <= BEAT {
            return false;
        }
    }
}

/// Reads until the source ends or nobody wants its frames any more; an error asks for a reopening.
fn read(
    source: &mut dyn FrameSource,
    rules: &Supervisor,
    mailbox: &Sender,
    counters: &Counters,
    heartbeat: &Heartbeat,
) -> Result<(), CameraError> {
    heartbeat.beat();
    source.open()?;
    let mut gate = RateLimiter::default();
    let mut last_frame = Instant::now();
    let mut first = true;
    loop {
        heartbeat.beat();
        match source.next(POLL)? {
            Next::Frame(frame) => {
                if std::mem::take(&mut first) {
                    info!("the camera gives frames");
                }
                last_frame = Instant::now();
                counters.captured.add(1);
                let interval = rules.pace.as_ref().map_or(Duration::ZERO, Pace::interval);
                if gate.lets_pass(frame.captured_at, interval) {
                    let Ok(overwrote) = mailbox.publish(MailboxItem::Frame(frame)) else { return Ok(()) };
                    counters.dropped.add(u64::from(overwrote));
                }
            }
            Next::Broken(reason) => {
                last_frame = Instant::now();
                counters.broken.add(1);
                warn!("{reason}; skipped");
            }
            Next::Pending => {
                let silent = last_frame.elapsed();
                // A source that keeps its own pace may well be slower than that.
                if rules.pace.is_some() && silent >= rules.stall {
                    return Err(CameraError::Stalled(silent.as_millis()));
                }
            }
            Next::Ended => return Ok(()),
        }
        if mailbox.closed_within(Duration::ZERO) {
            return Ok(());
        }
    }
}

/// Lets one frame pass an interval, by the times the frames were caught.
#[derive(Default)]
struct RateLimiter {
    due: Option<SystemTime>,
}

impl RateLimiter {
    fn lets_pass(&mut self, captured_at: SystemTime, interval: Duration) -> bool {
        let late = self.due.map(|due| captured_at.duration_since(due).map_err(|e| e.duration()));
        let base = match (self.due, late) {
            // Too early. A due time further off than one interval is none: the clock was set back.
            (_, Some(Err(early))) if early <= interval => return false,
            // The due time moves in whole intervals, so that a camera's jitter does not add up.
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
    fn the_gate_keeps_the_mean_rate_in_spite_of_jitter() {
        let mut gate = RateLimiter::default();
        // 30 frames a second, each up to 5 ms late.
        let passed = (0..300).filter(|i| gate.lets_pass(at_ms(i * 1000 / 30 + i % 6), INTERVAL)).count();
        assert!((49..=51).contains(&passed), "{passed} of 300 frames in 10 s");
    }

    #[test]
    fn the_gate_survives_a_clock_that_is_set_back_or_forward() {
        let mut gate = RateLimiter::default();
        assert!(gate.lets_pass(at_ms(900_000), INTERVAL));
        assert!(gate.lets_pass(at_ms(100), INTERVAL), "set back by a quarter of an hour");
        assert!(!gate.lets_pass(at_ms(150), INTERVAL));
        assert!(gate.lets_pass(at_ms(900_000), INTERVAL), "and forward again");
        assert!(!gate.lets_pass(at_ms(900_050), INTERVAL));
    }

    #[test]
    fn no_interval_lets_every_frame_pass() {
        let mut gate = RateLimiter::default();
        assert!((0..5).all(|i| gate.lets_pass(at_ms(i), Duration::ZERO)));
    }

    /// Fails on the first two openings, stalls after one frame on the third, then ends.
    struct Moody {
        openings: u32,
        frames_left: u32,
    }

    impl FrameSource for Moody {
        fn open(&mut self) -> Result<(), CameraError> {
            self.openings += 1;
            self.frames_left = 1;
            match self.openings {
                1 | 2 => Err(CameraError::Open { path: "moody".into(), reason: "not today".into() }),
                _ => Ok(()),
            }
        }

        fn next(&mut self, _: Duration) -> Result<Next, CameraError> {
            if self.frames_left > 0 {
                self.frames_left -= 1;
                return Ok(Next::Frame(Frame {
                    captured_at: SystemTime::now(),
                    picture: Picture::Encoded(vec![self.openings as u8]),
                    origin: None,
                }));
            }
            Ok(if self.openings == 3 { Next::Pending } else { Next::Ended })
        }

        fn close(&mut self) {}
    }

    #[test]
    fn a_camera_that_fails_or_stalls_is_opened_again_until_it_ends() {
        let rules = Supervisor {
            pace: Some(Pace::new(0)),
            stall: Duration::from_millis(20),
            reopen_min: Duration::from_millis(1),
            reopen_max: Duration::from_millis(2),
        };
        let counters = Arc::new(Counters::default());
        let (sender, receiver) = mailbox();
        let mut source = Moody { openings: 0, frames_left: 0 };
        watch(&mut source, &rules, &sender, &counters, &Heartbeat::new("camera"));
        assert_eq!(source.openings, 4);
        assert_eq!(counters.captured.get(), 2);
        assert_eq!(counters.camera_failures.get(), 3);
        drop(sender);
        assert!(
            matches!(receiver.take(Duration::ZERO), RecvResult::MailboxItem(MailboxItem::Lost { .. })),
            "nobody looked meanwhile"
        );
        assert!(matches!(receiver.take(Duration::ZERO), RecvResult::MailboxItem(MailboxItem::Frame(_))));
    }
}
