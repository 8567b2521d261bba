//! The subscriptions of a device, also where a retained message breaks each connection that receives it.
//!
//! A broker delivers retained messages right after a subscription. One that is larger than
//! [`INCOMING_BYTES_MAX`](super::connection::INCOMING_BYTES_MAX) breaks the connection. After that, the filters are subscribed
//! one by one, each once the retained messages of the one before have been delivered, and the one that breaks the connection is
//! left out for a while.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The first time for which a filter is left out; it doubles each time that the filter breaks a connection again.
const LEFT_OUT_MIN: Duration = Duration::from_secs(600);
/// The longest time for which a filter is left out.
const LEFT_OUT_MAX: Duration = Duration::from_secs(24 * 3600);
/// The last filters are suspected for this long after their subscription: a broker delivers many retained messages bit by bit.
const SUSPECTED: Duration = Duration::from_secs(60);

/// The state of the subscriptions, over all connections.
#[derive(Debug)]
pub(super) struct Subscriptions {
    /// The filters of an ordinary connection, subscribed at once.
    together: Vec<String>,
    /// The same topics, as filters of one topic where possible.
    one_by_one: Vec<String>,
    /// Whether the filters are subscribed one by one.
    careful: bool,
    left_out: Vec<LeftOut>,
    /// Filters that are not subscribed on this connection yet.
    waiting: VecDeque<String>,
    /// Filters whose retained messages may not have been delivered yet; empty once all have been.
    pending: Vec<String>,
    /// The filters that were subscribed to last on this connection, and when.
    last: Option<(Vec<String>, Instant)>,
}

#[derive(Debug)]
struct LeftOut {
    filter: String,
    wait: Duration,
    until: Instant,
}

/// The conclusion from a connection that broke right after a subscription.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Suspicion {
    /// The filters are subscribed one by one from now on.
    OneByOne,
    /// This filter is left out for this time.
    LeftOut(String, Duration),
}

impl Subscriptions {
    /// Starts with filters that are subscribed together, and filters of the same topics to be subscribed one by one.
    pub fn new(together: Vec<String>, one_by_one: Vec<String>) -> Self {
        let (left_out, waiting, pending) = (Vec::new(), VecDeque::new(), Vec::new());
        Subscriptions { together, one_by_one, careful: false, left_out, waiting, pending, last: None }
    }

    /// Begins a connection; returns the filters to subscribe to now.
    pub fn begin(&mut self, now: Instant) -> Vec<String> {
        if !self.careful {
            self.waiting.clear();
            return self.subscribe(self.together.clone(), now);
        }
        let is_left_out = |filter: &String| self.left_out.iter().any(|out| out.filter == *filter && now < out.until);
        self.waiting = self.one_by_one.iter().filter(|filter| !is_left_out(filter)).cloned().collect();
        self.next(now)
    }

    /// Records that the retained messages of the last subscriptions were delivered; returns the filters to subscribe to next,
    /// none if all are subscribed to.
    pub fn delivered(&mut self, now: Instant) -> Vec<String> {
        for filter in &self.pending {
            self.left_out.retain(|out| out.filter != *filter);
        }
        self.next(now)
    }

    fn next(&mut self, now: Instant) -> Vec<String> {
        let filters = self.waiting.pop_front().into_iter().collect();
        self.subscribe(filters, now)
    }

    fn subscribe(&mut self, filters: Vec<String>, now: Instant) -> Vec<String> {
        if !filters.is_empty() {
            self.last = Some((filters.clone(), now));
        }
        self.pending.clone_from(&filters);
        filters
    }

    /// Whether all filters are subscribed to that are not left out, and their retained messages delivered.
    pub fn is_complete(&self) -> bool {
        self.pending.is_empty() && self.waiting.is_empty()
    }

    /// Returns when a filter that is left out is to be tried again.
    pub fn retry_at(&self) -> Option<Instant> {
        self.left_out.iter().map(|out| out.until).min()
    }

    /// Returns the filters that are to be tried again on this connection.
    pub fn retry(&mut self, now: Instant) -> Vec<String> {
        let due = self.left_out.iter_mut().find(|out| out.until <= now);
        let Some(out) = due else { return Vec::new() };
        // Until it is known whether it breaks the connection.
        out.until = now + out.wait;
        let filter = out.filter.clone();
        self.subscribe(vec![filter], now)
    }

    /// Records that the connection broke; `invalid_packet`, because of a packet that this client does not accept. Returns what
    /// changes, if a retained message is the likely cause.
    pub fn broken(&mut self, invalid_packet: bool, now: Instant) -> Option<Suspicion> {
        self.pending.clear();
        self.waiting.clear();
        let (suspected, subscribed_at) = self.last.take()?;
        if !invalid_packet || now.duration_since(subscribed_at) > SUSPECTED {
            return None;
        }
        if !self.careful {
            self.careful = true;
            return Some(Suspicion::OneByOne);
        }
        let filter = suspected.into_iter().next()?;
        let before = self.left_out.iter().position(|out| out.filter == filter);
        let wait = before.map_or(LEFT_OUT_MIN, |place| (self.left_out.remove(place).wait * 2).min(LEFT_OUT_MAX));
        self.left_out.push(LeftOut { filter: filter.clone(), wait, until: now + wait });
        Some(Suspicion::LeftOut(filter, wait))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subscriptions() -> Subscriptions {
        Subscriptions::new(vec!["set/+".into(), "offer".into()], ["set/a", "set/b", "offer"].map(String::from).into())
    }

    #[test]
    fn the_filter_that_breaks_connections_is_left_out_and_tried_again() {
        let (mut subscriptions, now) = (subscriptions(), Instant::now());
        assert_eq!(subscriptions.begin(now), ["set/+", "offer"]);
        assert_eq!(subscriptions.broken(true, now), Some(Suspicion::OneByOne));
        assert_eq!(subscriptions.begin(now), ["set/a"]);
        assert_eq!(subscriptions.delivered(now), ["set/b"]);
        assert_eq!(subscriptions.broken(true, now), Some(Suspicion::LeftOut("set/b".into(), LEFT_OUT_MIN)));
        assert_eq!(subscriptions.begin(now), ["set/a"]);
        assert_eq!(subscriptions.delivered(now), ["offer"]);
        assert!(!subscriptions.is_complete());
        assert_eq!(subscriptions.delivered(now), [""; 0]);
        assert!(subscriptions.is_complete());
        // On the same connection, later.
        assert_eq!(subscriptions.retry_at(), Some(now + LEFT_OUT_MIN));
        assert_eq!(subscriptions.retry(now), [""; 0]);
        let later = now + LEFT_OUT_MIN;
        assert_eq!(subscriptions.retry(later), ["set/b"]);
        assert_eq!(subscriptions.broken(true, later), Some(Suspicion::LeftOut("set/b".into(), LEFT_OUT_MIN * 2)));
        let later = later + LEFT_OUT_MIN * 2;
        assert_eq!(subscriptions.begin(later), ["set/a"]);
        assert_eq!(
            (subscriptions.delivered(now), subscriptions.delivered(now)),
            (vec!["set/b".into()], vec!["offer".into()])
        );
        subscriptions.delivered(now);
        assert_eq!(subscriptions.retry_at(), None, "it breaks nothing any more");
    }

    #[test]
    fn a_broker_that_stops_is_not_suspected() {
        let (mut subscriptions, now) = (subscriptions(), Instant::now());
        for _ in 0..3 {
            assert_eq!(subscriptions.begin(now), ["set/+", "offer"]);
            assert_eq!(subscriptions.broken(false, now), None);
        }
        // A message that is too large and not retained, later.
        subscriptions.begin(now);
        subscriptions.delivered(now);
        assert_eq!(subscriptions.broken(true, now + SUSPECTED * 2), None);
        // One of many retained messages, after the first of them.
        subscriptions.begin(now);
        subscriptions.delivered(now);
        assert_eq!(subscriptions.broken(true, now + SUSPECTED / 2), Some(Suspicion::OneByOne));
    }
}
