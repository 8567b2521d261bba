//! Messages on their way to the broker: events, and answers. An entry leaves only when the broker acknowledged it, or when
//! the outbox is full and a newer event needs its place.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

/// Limits of the waiting messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutboxLimits {
    /// Most messages.
    pub entries_max: usize,
    /// Largest sum of the payload sizes, in bytes.
    pub bytes_max: usize,
}

/// The sequence number of a message; it increases by 1 with each message.
pub type Sequence = u64;

/// A message that waits or is in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its sequence number.
    pub sequence: Sequence,
    /// Its topic.
    pub topic: String,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// A handle to the messages; clones share them.
#[derive(Clone)]
pub struct Outbox(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    changed: Notify,
}

struct Queue {
    limits: OutboxLimits,
    /// In order. Those before `sent` are in flight on the present connection.
    entries: VecDeque<Entry>,
    sent: usize,
    bytes: usize,
    next: Sequence,
}

impl Outbox {
    /// Creates an empty outbox.
    pub fn new(limits: OutboxLimits) -> Self {
        let queue = Queue { limits, entries: VecDeque::new(), sent: 0, bytes: 0, next: 0 };
        Outbox(Arc::new(Shared { queue: Mutex::new(queue), changed: Notify::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().expect("no thread panics with the lock held")
    }

    /// Appends a message without waiting. Returns the messages that were dropped to stay within the limits, oldest first.
    pub fn push(&self, topic: String, payload: Vec<u8>) -> Vec<Entry> {
        let mut queue = self.lock();
        let sequence = queue.next;
        queue.next += 1;
        queue.bytes += payload.len();
        queue.entries.push_back(Entry { sequence, topic, payload });
        let dropped = queue.drop_oldest();
        drop(queue);
        self.0.changed.notify_one();
        dropped
    }

    /// Changes the limits; returns the number of messages that were dropped to stay within them.
    pub fn set_limits(&self, limits: OutboxLimits) -> usize {
        let mut queue = self.lock();
        queue.limits = limits;
        queue.drop_oldest().len()
    }

    /// Marks the oldest message that is not in flight as in flight and returns it.
    pub fn take_next(&self) -> Option<Entry> {
        let mut queue = self.lock();
        let entry = queue.entries.get(queue.sent).cloned()?;
        queue.sent += 1;
        Some(entry)
    }

    /// Removes a message that the broker acknowledged; `false` if it had been dropped before.
    pub fn acknowledged(&self, sequence: Sequence) -> bool {
        let mut queue = self.lock();
        let place = queue.entries.iter().position(|entry| entry.sequence == sequence);
        let removed = place.and_then(|place| queue.remove(place)).is_some();
        drop(queue);
        self.0.changed.notify_one();
        removed
    }

    /// Marks every message as not in flight, to be sent again on the next connection.
    pub fn rewind(&self) {
        self.lock().sent = 0;
    }

    /// Returns whether no message waits or is in flight.
    pub fn is_empty(&self) -> bool {
        self.lock().entries.is_empty()
    }

    /// Returns the number of messages that wait or are in flight.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Waits for a message that was added or acknowledged since the last call.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }
}

impl Queue {
    /// Removes the oldest messages until the rest is within the limits.
    fn drop_oldest(&mut self) -> Vec<Entry> {
        let mut dropped = Vec::new();
        while self.entries.len() > self.limits.entries_max || self.bytes > self.limits.bytes_max {
            let Some(oldest) = self.remove(0) else { break };
            dropped.push(oldest);
        }
        dropped
    }

    fn remove(&mut self, place: usize) -> Option<Entry> {
        let entry = self.entries.remove(place)?;
        self.bytes -= entry.payload.len();
        if place < self.sent {
            self.sent -= 1;
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox(entries_max: usize, bytes_max: usize) -> Outbox {
        Outbox::new(OutboxLimits { entries_max, bytes_max })
    }

    fn sequences(entries: &[Entry]) -> Vec<Sequence> {
        entries.iter().map(|entry| entry.sequence).collect()
    }

    #[test]
    fn only_an_acknowledgement_removes_a_message() {
        let outbox = outbox(10, 100);
        for n in 0..3 {
            assert!(outbox.push("t".into(), vec![n]).is_empty());
        }
        assert_eq!(outbox.take_next().unwrap().payload, [0]);
        assert_eq!(outbox.take_next().unwrap().payload, [1]);
        assert!(outbox.acknowledged(1), "out of order, too");
        assert!(!outbox.acknowledged(1));
        outbox.rewind();
        assert_eq!(outbox.take_next().unwrap().payload, [0], "sent again on the next connection");
        assert_eq!(outbox.take_next().unwrap().payload, [2]);
        assert_eq!(outbox.take_next(), None);
        assert!(outbox.acknowledged(0) && outbox.acknowledged(2));
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_full_outbox_drops_the_oldest() {
        let by_count = outbox(2, 100);
        by_count.push("t".into(), vec![0]);
        by_count.push("t".into(), vec![1]);
        assert_eq!(by_count.take_next().unwrap().sequence, 0);
        assert_eq!(sequences(&by_count.push("t".into(), vec![2])), [0]);
        assert!(!by_count.acknowledged(0), "dropped while in flight");
        assert_eq!(by_count.take_next().unwrap().sequence, 1, "the rest keeps its order");

        let by_bytes = outbox(100, 10);
        by_bytes.push("t".into(), vec![0; 4]);
        by_bytes.push("t".into(), vec![1; 4]);
        assert_eq!(sequences(&by_bytes.push("t".into(), vec![2; 9])), [0, 1]);
        assert_eq!(by_bytes.len(), 1);
        assert_eq!(
            sequences(&by_bytes.push("t".into(), vec![3; 11])),
            [2, 3],
            "a message above the limit is dropped at once"
        );
        assert!(by_bytes.is_empty());
    }

    #[test]
    fn smaller_limits_drop_the_oldest() {
        let outbox = outbox(10, 100);
        for n in 0..3 {
            outbox.push("t".into(), vec![n]);
        }
        outbox.take_next();
        assert_eq!(outbox.set_limits(OutboxLimits { entries_max: 2, bytes_max: 100 }), 1);
        assert_eq!(outbox.take_next().unwrap().payload, [1], "nothing is in flight any more");
        assert_eq!(outbox.len(), 2);
    }

    #[tokio::test]
    async fn changed_returns_for_a_message_that_came_before() {
        let outbox = outbox(10, 100);
        outbox.push("t".into(), vec![0]);
        outbox.changed().await;
        assert_eq!(outbox.len(), 1);
    }
}
