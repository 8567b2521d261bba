//! One connection to the broker: its client and the messages in flight on it.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use rumqttc::{AsyncClient, ConnectionError, Event, EventLoop, LastWill, Outgoing, Packet, QoS, StateError, mqttbytes};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{debug, error};

use super::access::{BrokerAccess, reason};
use super::message::OFFLINE;
use super::outbox::Sequence;
use super::topics::Topics;

/// The largest packet from the broker, in bytes; a larger one breaks the connection.
pub const INCOMING_BYTES_MAX: usize = 1 << 20;
/// The most bytes of an MQTT PUBLISH packet beside topic and payload.
pub const PUBLISH_OVERHEAD: usize = 16;

/// Options of a device's connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionOptions {
    /// The broker.
    pub access: BrokerAccess,
    /// Wait before the first reconnect; it doubles with each failure.
    pub reconnect_min: Duration,
    /// The longest wait before a reconnect.
    pub reconnect_max: Duration,
    /// The most unacknowledged events.
    pub inflight_max: u16,
    /// The longest wait for the last acknowledgements when the client stops.
    pub shutdown_timeout: Duration,
}

/// The most messages in flight besides events: announcements, answers, the state, the status.
const OTHERS_MAX: u16 = 24;

/// A message that is not acknowledged yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InFlight {
    /// An event, by its sequence number in the outbox.
    Event(Sequence),
    /// An answer of the update agent, by its sequence number in the agent's outbox.
    Answer(Sequence),
    /// The state.
    State,
    /// The settings in force.
    Settings,
    /// `online` after a subscription: the broker acknowledges it after the retained messages of the filters before.
    Online,
    /// A retained message that is published again on the next connection.
    Other,
    /// An empty message on a former topic of discovery.
    EmptyDiscovery,
}

/// The end of a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum Disconnected {
    #[error("{0}")]
    Broken(String),
    /// The broker sent a packet that this client does not accept, for example one that is too large.
    #[error("the broker sent a packet that is not accepted: {0}")]
    InvalidPacket(String),
    #[error("cannot queue a packet: {0}")]
    Queue(#[from] rumqttc::ClientError),
    #[error("the broker closed the connection")]
    ByBroker,
    #[error("the connection's task ended")]
    TaskEnded,
}

/// A connection and the messages in flight on it. A reload that changes none of its options hands it to the next client.
pub(super) struct Connection {
    client: AsyncClient,
    events: mpsc::Receiver<Result<Event, ConnectionError>>,
    poller: JoinHandle<()>,
    packet_bytes_max: usize,
    inflight_max: usize,
    /// Messages that the client has not given a packet id yet, in order.
    queued: VecDeque<InFlight>,
    /// Filters of subscriptions that the broker has not answered, in order.
    subscribing: VecDeque<String>,
    /// Messages that were sent, by packet id.
    sent: HashMap<u16, InFlight>,
    /// The retained messages that were published last, by topic.
    retained: HashMap<String, Vec<u8>>,
    /// Topic and size in bytes of the largest message since nothing was in flight.
    largest: Option<(String, usize)>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.poller.abort();
    }
}

impl Connection {
    /// Starts to connect, with `offline` as the last will.
    pub fn open(options: &ConnectionOptions, topics: &Topics) -> Self {
        let mut mqtt = options.access.options(&format!("bloomcast-{}", topics.device()), INCOMING_BYTES_MAX);
        mqtt.set_inflight(options.inflight_max + OTHERS_MAX);
        mqtt.set_last_will(LastWill::new(topics.status(), OFFLINE, QoS::AtLeastOnce, true));
        let inflight_max = usize::from(options.inflight_max);
        let (client, event_loop) = AsyncClient::new(mqtt, inflight_max + usize::from(OTHERS_MAX));
        let (sender, events) = mpsc::channel(64);
        Connection {
            client,
            events,
            poller: tokio::spawn(poll(event_loop, options.access.clone(), sender)),
            packet_bytes_max: options.access.packet_bytes_max,
            inflight_max,
            queued: VecDeque::new(),
            subscribing: VecDeque::new(),
            sent: HashMap::new(),
            retained: HashMap::new(),
            largest: None,
        }
    }

    /// Returns the next event of the connection.
    ///
    /// # Errors
    /// If the connection is broken.
    pub async fn next(&mut self) -> Result<Event, Disconnected> {
        match self.events.recv().await {
            Some(Ok(event)) => {
                debug!("{event:?}");
                Ok(event)
            }
            // An I/O error while a packet is read is of this kind as well.
            Some(Err(ConnectionError::MqttState(StateError::Deserialization(error))))
                if !matches!(error, mqttbytes::Error::Io(_) | mqttbytes::Error::InsufficientBytes(_)) =>
            {
                Err(Disconnected::InvalidPacket(error.to_string()))
            }
            Some(Err(error)) => Err(Disconnected::Broken(reason(&error))),
            None => Err(Disconnected::TaskEnded),
        }
    }

    /// Waits for the broker's CONNACK.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn accepted(&mut self) -> Result<(), Disconnected> {
        loop {
            if let Event::Incoming(Packet::ConnAck(_)) = self.next().await? {
                return Ok(());
            }
        }
    }

    /// Subscribes with QoS 1.
    ///
    /// # Errors
    /// If the client's queue is full or closed.
    pub fn subscribe(&mut self, filter: String) -> Result<(), Disconnected> {
        self.subscribing.push_back(filter.clone());
        Ok(self.client.try_subscribe(filter, QoS::AtLeastOnce)?)
    }

    /// Removes and returns the oldest pending filter, which the received SUBACK answers.
    pub fn subscribed(&mut self) -> String {
        self.subscribing.pop_front().unwrap_or_default()
    }

    /// Whether the broker has answered every subscription.
    pub fn all_subscribed(&self) -> bool {
        self.subscribing.is_empty()
    }

    /// Whether a message is within the largest packet that is sent.
    pub fn fits(&self, topic: &str, payload: &[u8]) -> bool {
        topic.len() + payload.len() + PUBLISH_OVERHEAD <= self.packet_bytes_max
    }

    /// Whether one more event may be in flight.
    pub fn has_room(&self) -> bool {
        self.queued.len() + self.sent.len() < self.inflight_max
    }

    /// Publishes with QoS 1. A message that is too large is logged and dropped.
    ///
    /// # Errors
    /// If the client's queue is full or closed.
    pub fn publish(&mut self, topic: &str, payload: Vec<u8>, message: InFlight) -> Result<(), Disconnected> {
        self.send(topic, false, payload, message)
    }

    /// Publishes a retained message with QoS 1, unless it equals the last one on its topic.
    ///
    /// # Errors
    /// As [`Self::publish`].
    pub fn publish_retained(&mut self, topic: &str, payload: Vec<u8>, message: InFlight) -> Result<(), Disconnected> {
        if self.retained.get(topic) == Some(&payload) {
            return Ok(());
        }
        self.retained.insert(topic.to_owned(), payload.clone());
        self.send(topic, true, payload, message)
    }

    /// Forgets the published retained messages, so that each is published again.
    pub fn forget_retained(&mut self) {
        self.retained.clear();
    }

    /// Forgets one of them.
    pub fn forget(&mut self, topic: &str) {
        self.retained.remove(topic);
    }

    fn send(&mut self, topic: &str, retain: bool, payload: Vec<u8>, message: InFlight) -> Result<(), Disconnected> {
        let bytes = topic.len() + payload.len() + PUBLISH_OVERHEAD;
        if bytes > self.packet_bytes_max {
            error!(
                "{topic}: a message of {bytes} bytes, mqtt.packet_bytes_max is {}; not published",
                self.packet_bytes_max
            );
            return Ok(());
        }
        self.client.try_publish(topic, QoS::AtLeastOnce, retain, payload)?;
        self.queued.push_back(message);
        if self.largest.as_ref().is_none_or(|(_, largest)| bytes > *largest) {
            self.largest = Some((topic.to_owned(), bytes));
        }
        Ok(())
    }

    /// Returns topic and size in bytes of the largest message that was published since nothing was in flight: if the broker
    /// closed the connection because of a message, it is likely this one.
    pub fn largest_unacknowledged(&self) -> Option<(&str, usize)> {
        self.largest.as_ref().map(|(topic, bytes)| (topic.as_str(), *bytes))
    }

    /// Records that the client gave the oldest queued message this packet id and sent it.
    pub fn sent(&mut self, id: u16) {
        if let Some(message) = self.queued.pop_front() {
            self.sent.insert(id, message);
        }
    }

    /// Takes the message that a PUBACK acknowledges.
    pub fn acknowledged(&mut self, id: u16) -> Option<InFlight> {
        let message = self.sent.remove(&id);
        if self.is_idle() {
            self.largest = None;
        }
        message
    }

    /// Returns whether a message like this is queued or in flight.
    pub fn is_in_flight(&self, message: InFlight) -> bool {
        self.queued.contains(&message) || self.sent.values().any(|sent| *sent == message)
    }

    /// Whether no message is in flight.
    pub fn is_idle(&self) -> bool {
        self.queued.is_empty() && self.sent.is_empty()
    }

    /// Sends DISCONNECT, so that the broker does not publish the last will.
    pub async fn disconnect(&mut self) {
        if self.client.try_disconnect().is_ok() {
            // The broker closes the connection afterwards, or it is gone already.
            while let Some(Ok(event)) = self.events.recv().await {
                if event == Event::Outgoing(Outgoing::Disconnect) {
                    return;
                }
            }
        }
    }
}

/// Connects and polls the event loop, in a task of its own: a poll that is cancelled may leave a packet partly written.
async fn poll(mut event_loop: EventLoop, access: BrokerAccess, events: mpsc::Sender<Result<Event, ConnectionError>>) {
    let mut event = access.connect(&mut event_loop).await;
    loop {
        let failed = event.is_err();
        if events.send(event).await.is_err() || failed {
            return;
        }
        event = event_loop.poll().await;
    }
}
