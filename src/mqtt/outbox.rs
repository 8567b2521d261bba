//! Messages on their way to the broker: events, and answers. An entry leaves only when the broker acknowledged it, or when
//! the outbox is full and a newer event needs its place.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

/// How much may wait.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub entries_max: usize,
    /// Of all payloads together.
    pub bytes_max: usize,
}

/// One message's place in their order; grows by one with each.
pub type Sequence = u64;

/// A message that waits or is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub sequence: Sequence,
    pub topic: String,
    pub payload: Vec<u8>,
}

/// A handle; clones share the same entries.
#[derive(Clone)]
pub struct Outbox(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    changed: Notify,
    limits: Limits,
}

#[derive(Default)]
struct Queue {
    /// In order. Those before `sent` are under way on the present connection.
    entries: VecDeque<Entry>,
    sent: usize,
    bytes: usize,
    next: Sequence,
}

impl Outbox {
    pub fn new(limits: Limits) -> Self {
        Outbox(Arc::new(Shared { queue: Mutex::default(), changed: Notify::new(), limits }))
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().expect("no holder of the outbox panics")
    }

    /// Takes a message and never waits. Gives back what had to go for it, oldest first.
    pub fn push(&self, topic: String, payload: Vec<u8>) -> Vec<Entry> {
        let mut queue = self.lock();
        let sequence = queue.next;
        queue.next += 1;
        queue.bytes += payload.len();
        queue.entries.push_back(Entry { sequence, topic, payload });
        let mut lost = Vec::new();
        while queue.entries.len() > self.0.limits.entries_max || queue.bytes > self.0.limits.bytes_max {
            let Some(oldest) = queue.remove(0) else { break };
            lost.push(oldest);
        }
        drop(queue);
        self.0.changed.notify_one();
        lost
    }

    /// Takes all that waits in another, oldest first; gives how much had to go for it.
    pub fn adopt(&self, other: &Outbox) -> usize {
        let entries = std::mem::take(&mut *other.lock()).entries;
        entries.into_iter().map(|entry| self.push(entry.topic, entry.payload).len()).sum()
    }

    /// The oldest entry that is not under way; from now on it is.
    pub fn take_next(&self) -> Option<Entry> {
        let mut queue = self.lock();
        let entry = queue.entries.get(queue.sent).cloned()?;
        queue.sent += 1;
        Some(entry)
    }

    /// The broker has it. False where it had been given up before.
    pub fn acknowledged(&self, sequence: Sequence) -> bool {
        let mut queue = self.lock();
        let place = queue.entries.iter().position(|entry| entry.sequence == sequence);
        let gone = place.and_then(|place| queue.remove(place)).is_some();
        drop(queue);
        self.0.changed.notify_one();
        gone
    }

    /// The connection is gone: nothing is under way any more, and everything is to be sent again.
    pub fn rewind(&self) {
        self.lock().sent = 0;
    }

    pub fn is_empty(&self) -> bool {
        self.lock().entries.is_empty()
    }

    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Waits until something came or went since the last wait.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }
}

impl Queue {
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
        Outbox::new(Limits { entries_max, bytes_max })
    }

    fn sequences(entries: &[Entry]) -> Vec<Sequence> {
        entries.iter().map(|entry| entry.sequence).collect()
    }

    #[test]
    fn only_an_acknowledgement_lets_an_entry_go() {
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
    fn when_it_is_full_the_oldest_go() {
        let by_count = outbox(2, 100);
        by_count.push("t".into(), vec![0]);
        by_count.push("t".into(), vec![1]);
        assert_eq!(by_count.take_next().unwrap().sequence, 0);
        assert_eq!(sequences(&by_count.push("t".into(), vec![2])), [0]);
        assert!(!by_count.acknowledged(0), "given up while it was under way");
        assert_eq!(by_count.take_next().unwrap().sequence, 1, "the rest keeps its order");

        let by_bytes = outbox(100, 10);
        by_bytes.push("t".into(), vec![0; 4]);
        by_bytes.push("t".into(), vec![1; 4]);
        assert_eq!(sequences(&by_bytes.push("t".into(), vec![2; 9])), [0, 1]);
        assert_eq!(by_bytes.len(), 1);
        assert_eq!(sequences(&by_bytes.push("t".into(), vec![3; 11])), [2, 3], "what never fits goes at once");
        assert!(by_bytes.is_empty());
    }

    #[test]
    fn another_takes_over_what_waits() {
        let (old, new) = (outbox(10, 100), outbox(2, 100));
        for n in 0..3 {
            old.push("t".into(), vec![n]);
        }
        old.take_next();
        assert_eq!(new.adopt(&old), 1, "it has less room");
        assert!(old.is_empty());
        assert_eq!((new.take_next().unwrap().payload, new.take_next().unwrap().payload), (vec![1], vec![2]));
    }

    #[tokio::test]
    async fn a_waiter_wakes_for_what_came_before_it_waited() {
        let outbox = outbox(10, 100);
        outbox.push("t".into(), vec![0]);
        outbox.changed().await;
        assert_eq!(outbox.len(), 1);
    }
}
