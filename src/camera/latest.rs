//! A mailbox with one slot: the newest frame wins, and nobody ever looks at a stale picture. That the camera was lost is told
//! even where frames came again before anybody looked.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use crate::frame::Frame;

/// What the camera has to say.
#[derive(Debug)]
pub enum MailboxItem {
    Frame(Frame),
    /// The camera gives no frames since `at`; it is being reopened.
    Lost {
        at: SystemTime,
    },
}

/// What [`Receiver::take`] came back with.
pub enum RecvResult {
    MailboxItem(MailboxItem),
    /// Nothing came within the time given.
    Nothing,
    /// The sender is gone and the slot is empty.
    Ended,
}

/// The other side is gone.
#[derive(Debug, PartialEq, Eq)]
pub struct Closed;

#[derive(Default)]
struct Slot {
    /// When the camera was lost, since somebody looked last.
    lost: Option<SystemTime>,
    /// Newer than that.
    frame: Option<Frame>,
    closed: bool,
}

impl Slot {
    fn take(&mut self) -> Option<MailboxItem> {
        let lost = self.lost.take().map(|at| MailboxItem::Lost { at });
        lost.or_else(|| self.frame.take().map(MailboxItem::Frame))
    }
}

#[derive(Default)]
struct Shared {
    slot: Mutex<Slot>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().expect("no holder of the mailbox panics")
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits until `ready` gives something, the mailbox is closed, or `wait` is over.
    fn wait_for<T>(&self, wait: Duration, ready: impl Fn(&mut Slot) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + wait;
        let mut slot = self.lock();
        loop {
            if let Some(value) = ready(&mut slot) {
                return Some(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            slot = self.changed.wait_timeout(slot, left).expect("no holder of the mailbox panics").0;
        }
    }
}

/// The camera's end.
pub struct Sender(Arc<Shared>);

/// The next stage's end.
pub struct Receiver(Arc<Shared>);

/// A new, empty mailbox.
pub fn mailbox() -> (Sender, Receiver) {
    let shared = Arc::new(Shared::default());
    (Sender(shared.clone()), Receiver(shared))
}

impl Sender {
    /// Puts `news` into the slot; true where a frame that nobody had taken was overwritten.
    pub fn publish(&self, news: MailboxItem) -> Result<bool, Closed> {
        let mut slot = self.0.lock();
        if slot.closed {
            return Err(Closed);
        }
        let before = match news {
            MailboxItem::Frame(frame) => slot.frame.replace(frame),
            MailboxItem::Lost { at } => {
                slot.lost = Some(at);
                slot.frame.take()
            }
        };
        self.0.changed.notify_all();
        Ok(before.is_some())
    }

    /// Waits `wait`, or less: true as soon as the receiver is gone.
    pub fn closed_within(&self, wait: Duration) -> bool {
        self.0.wait_for(wait, |slot| slot.closed.then_some(())).is_some()
    }
}

impl Receiver {
    /// Takes what is newest, waiting at most `wait` for it.
    pub fn take(&self, wait: Duration) -> RecvResult {
        let taken = self.0.wait_for(wait, |slot| match slot.take() {
            Some(news) => Some(RecvResult::MailboxItem(news)),
            None => slot.closed.then_some(RecvResult::Ended),
        });
        taken.unwrap_or(RecvResult::Nothing)
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Picture;

    fn frame(mark: u8) -> MailboxItem {
        MailboxItem::Frame(Frame {
            captured_at: SystemTime::UNIX_EPOCH,
            picture: Picture::Encoded(vec![mark]),
            origin: None,
        })
    }

    fn mark(taken: RecvResult) -> Option<u8> {
        match taken {
            RecvResult::MailboxItem(MailboxItem::Frame(Frame { picture: Picture::Encoded(bytes), .. })) => {
                Some(bytes[0])
            }
            _ => None,
        }
    }

    #[test]
    fn the_newest_frame_wins_and_the_overwritten_one_is_told() {
        let (sender, receiver) = mailbox();
        assert_eq!(sender.publish(frame(1)), Ok(false));
        assert_eq!(sender.publish(frame(2)), Ok(true));
        assert_eq!(mark(receiver.take(Duration::ZERO)), Some(2));
        assert!(matches!(receiver.take(Duration::ZERO), RecvResult::Nothing));
        assert_eq!(sender.publish(frame(3)), Ok(false));
    }

    #[test]
    fn a_loss_is_told_before_the_frame_that_came_after_it() {
        let (sender, receiver) = mailbox();
        let at = SystemTime::UNIX_EPOCH;
        sender.publish(frame(1)).unwrap();
        assert_eq!(sender.publish(MailboxItem::Lost { at }), Ok(true), "what was seen before the loss is stale");
        assert_eq!(sender.publish(frame(2)), Ok(false));
        assert_eq!(sender.publish(frame(3)), Ok(true));
        assert!(matches!(receiver.take(Duration::ZERO), RecvResult::MailboxItem(MailboxItem::Lost { .. })));
        assert_eq!(mark(receiver.take(Duration::ZERO)), Some(3));
        assert!(matches!(receiver.take(Duration::ZERO), RecvResult::Nothing));
    }

    #[test]
    fn the_last_frame_is_still_taken_when_the_sender_is_gone() {
        let (sender, receiver) = mailbox();
        sender.publish(frame(9)).unwrap();
        drop(sender);
        assert_eq!(mark(receiver.take(Duration::ZERO)), Some(9));
        assert!(matches!(receiver.take(Duration::from_secs(60)), RecvResult::Ended));
    }

    #[test]
    fn a_waiting_sender_wakes_when_the_receiver_goes() {
        let (sender, receiver) = mailbox();
        let waiter = std::thread::spawn(move || {
            let closed = sender.closed_within(Duration::from_secs(60));
            (closed, sender.publish(frame(1)))
        });
        drop(receiver);
        assert_eq!(waiter.join().unwrap(), (true, Err(Closed)));
    }
}
