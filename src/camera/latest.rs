//! A mailbox with one slot: a new frame replaces an older one that was not received. The loss of the camera is kept beside
//! the frame, so that it is received even if newer frames follow it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use crate::frame::Frame;

/// An item of the mailbox.
#[derive(Debug)]
pub enum MailboxItem {
    /// The newest frame.
    Frame(Frame),
    /// The camera failed and is being reopened.
    Lost {
        /// Wall-clock time of the failure.
        at: SystemTime,
    },
}

/// Result of [`Receiver::recv`].
pub enum RecvResult {
    /// A pending loss of the camera if there is one, else the newest frame.
    Item(MailboxItem),
    /// No item arrived within the timeout.
    Timeout,
    /// The mailbox is empty and the sender was dropped.
    Closed,
}

/// Error of [`Sender::send`]: the receiver was dropped.
#[derive(Debug, PartialEq, Eq)]
pub struct Closed;

#[derive(Default)]
struct Slot {
    /// Time of the last loss of the camera that was not received yet.
    lost: Option<SystemTime>,
    /// The newest frame; it is newer than `lost`.
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

    /// Calls `poll` after each change of the slot until it returns a value; `None` if it returns none within `timeout`.
    fn wait_for<T>(&self, timeout: Duration, poll: impl Fn(&mut Slot) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let mut slot = self.lock();
        loop {
            if let Some(value) = poll(&mut slot) {
                return Some(value);
            }
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return None;
            }
            slot = self.changed.wait_timeout(slot, remaining).expect("no holder of the mailbox panics").0;
        }
    }
}

/// The camera's end of the mailbox.
pub struct Sender(Arc<Shared>);

/// The vision stage's end of the mailbox.
pub struct Receiver(Arc<Shared>);

/// Creates an empty mailbox.
pub fn mailbox() -> (Sender, Receiver) {
    let shared = Arc::new(Shared::default());
    (Sender(shared.clone()), Receiver(shared))
}

impl Sender {
    /// Puts `item` into the mailbox without blocking. Returns whether it replaced a frame that was not received;
    /// [`MailboxItem::Lost`] discards such a frame as well.
    ///
    /// # Errors
    ///
    /// [`Closed`] if the receiver was dropped.
    pub fn send(&self, item: MailboxItem) -> Result<bool, Closed> {
        let mut slot = self.0.lock();
        if slot.closed {
            return Err(Closed);
        }
        let replaced = match item {
            MailboxItem::Frame(frame) => slot.frame.replace(frame),
            MailboxItem::Lost { at } => {
                slot.lost = Some(at);
                slot.frame.take()
            }
        };
        self.0.changed.notify_all();
        Ok(replaced.is_some())
    }

    /// Waits until the receiver is dropped, at most `timeout`. Returns whether it was.
    pub fn wait_closed(&self, timeout: Duration) -> bool {
        self.0.wait_for(timeout, |slot| slot.closed.then_some(())).is_some()
    }
}

impl Receiver {
    /// Takes the next item, waiting at most `timeout` for it.
    pub fn recv(&self, timeout: Duration) -> RecvResult {
        let received = self.0.wait_for(timeout, |slot| match slot.take() {
            Some(item) => Some(RecvResult::Item(item)),
            None => slot.closed.then_some(RecvResult::Closed),
        });
        received.unwrap_or(RecvResult::Timeout)
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

    fn frame(id: u8) -> MailboxItem {
        MailboxItem::Frame(Frame {
            captured_at: SystemTime::UNIX_EPOCH,
            picture: Picture::Encoded(vec![id]),
            origin: None,
        })
    }

    fn frame_id(received: RecvResult) -> Option<u8> {
        match received {
            RecvResult::Item(MailboxItem::Frame(Frame { picture: Picture::Encoded(bytes), .. })) => Some(bytes[0]),
            _ => None,
        }
    }

    #[test]
    fn send_replaces_an_unreceived_frame_and_reports_it() {
        let (sender, receiver) = mailbox();
        assert_eq!(sender.send(frame(1)), Ok(false));
        assert_eq!(sender.send(frame(2)), Ok(true));
        assert_eq!(frame_id(receiver.recv(Duration::ZERO)), Some(2));
        assert!(matches!(receiver.recv(Duration::ZERO), RecvResult::Timeout));
        assert_eq!(sender.send(frame(3)), Ok(false));
    }

    #[test]
    fn receives_a_loss_before_the_frames_that_follow_it() {
        let (sender, receiver) = mailbox();
        let at = SystemTime::UNIX_EPOCH;
        sender.send(frame(1)).unwrap();
        assert_eq!(sender.send(MailboxItem::Lost { at }), Ok(true), "a frame before the loss is stale");
        assert_eq!(sender.send(frame(2)), Ok(false));
        assert_eq!(sender.send(frame(3)), Ok(true));
        assert!(matches!(receiver.recv(Duration::ZERO), RecvResult::Item(MailboxItem::Lost { .. })));
        assert_eq!(frame_id(receiver.recv(Duration::ZERO)), Some(3));
        assert!(matches!(receiver.recv(Duration::ZERO), RecvResult::Timeout));
    }

    #[test]
    fn receives_the_last_frame_after_the_sender_is_dropped() {
        let (sender, receiver) = mailbox();
        sender.send(frame(9)).unwrap();
        drop(sender);
        assert_eq!(frame_id(receiver.recv(Duration::ZERO)), Some(9));
        assert!(matches!(receiver.recv(Duration::from_secs(60)), RecvResult::Closed));
    }

    #[test]
    fn dropping_the_receiver_wakes_a_waiting_sender() {
        let (sender, receiver) = mailbox();
        let waiter = std::thread::spawn(move || {
            let closed = sender.wait_closed(Duration::from_secs(60));
            (closed, sender.send(frame(1)))
        });
        drop(receiver);
        assert_eq!(waiter.join().unwrap(), (true, Err(Closed)));
    }
}
