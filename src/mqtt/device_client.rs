//! A device's MQTT client: keeps a connection to the broker, publishes, receives commands.
//!
//! Each connection has a clean session, so that only the outbox tracks which messages the broker has not acknowledged. A
//! connection begins with the retained messages (discovery, model, state, then `online`: a subscriber that sees `online` can
//! rely on the rest) and ends with `offline`, published by the client or by its last will.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use rumqttc::{Event, Outgoing, Packet, Publish, SubscribeReasonCode};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout};
use tracing::{debug, error, info, warn};

use super::connection::{Connection, ConnectionOptions, Disconnected, InFlight};
use super::discovery::{self, DiscoveryOptions};
use super::discovery_record::DiscoveryRecord;
use super::message::{Encoder, OFFLINE, ONLINE};
use super::outbox::{Entry, Outbox, Sequence};
use super::setting;
use super::subscriptions::{Subscriptions, Suspicion};
use super::topics::{Request, Topics};
use crate::decide::Observation;
use crate::system::{Counters, LogLimiter};
use crate::vision::Labels;
use crate::vision_stage::{ActiveSettings, Setting};

/// Former discovery topics that are emptied on one connection: the client's queue holds a few more messages.
const EMPTIED_MAX: usize = 8;

/// The retained messages about a model, held back until the newest observation has this model's version.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelAnnouncement {
    /// Version of the model.
    pub version: u64,
    /// Its classes, for Home Assistant's discovery.
    pub classes: Labels,
    /// The payload of `…/model`.
    pub status: Vec<u8>,
}

impl ModelAnnouncement {
    /// Returns topics and payloads; with Home Assistant's discovery if `discovery` is set.
    pub fn messages(&self, topics: &Topics, discovery: bool) -> Vec<(String, Vec<u8>)> {
        let discovery = discovery.then(|| (topics.discovery(), discovery::discovery_payload(topics, &self.classes)));
        discovery.into_iter().chain([(topics.model(), self.status.clone())]).collect()
    }
}

/// A message for the update agent.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// A connection was made; messages on the one before may be lost.
    Connected,
    /// Payload of `…/model/offer`.
    Offer(Vec<u8>),
    /// Number and payload of `…/model/chunk/<n>`.
    Chunk(u32, Vec<u8>),
    /// Payload of `…/model/rollback`.
    Rollback(Vec<u8>),
}

/// Hands a command to the update agent; returns `false` if its queue is full.
pub type CommandSink = Box<dyn Fn(Command) -> bool + Send>;

/// A device's MQTT client.
pub struct DeviceClient {
    /// Options of the connections.
    pub options: ConnectionOptions,
    /// The device's topics.
    pub topics: Topics,
    /// Encodes the state.
    pub encoder: Encoder,
    /// Home Assistant's discovery.
    pub discovery: DiscoveryOptions,
    /// The topics on which discovery was published.
    pub discovery_record: DiscoveryRecord,
    /// The messages about the model.
    pub announcements: Announcements,
    /// The newest observation.
    pub state: watch::Receiver<Observation>,
    /// The settings in force.
    pub active_settings: watch::Receiver<ActiveSettings>,
    /// Events.
    pub outbox: Outbox,
    /// Answers of the update agent.
    pub agent_outbox: Outbox,
    /// Receives settings from `…/set/<setting>`.
    pub settings: SyncSender<Setting>,
    /// Receives commands for the update agent.
    pub commands: CommandSink,
    /// Counts connections and events.
    pub counters: Arc<Counters>,
    /// Limits the log lines about messages that are refused.
    pub refused: LogLimiter,
}

/// The end that a client is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// None: it runs.
    No,
    /// It drains the outboxes, publishes `offline` and disconnects.
    Disconnect,
    /// It leaves its connection to the next client.
    HandOver,
}

/// What the next client continues: the connection, if there is one, and the state of its subscriptions.
pub struct KeptConnection {
    connection: Option<Connection>,
    subscriptions: Subscriptions,
}

/// A client that has stopped.
pub struct StoppedClient {
    /// The connection, after [`Stop::HandOver`].
    pub connection: Option<KeptConnection>,
    /// The topics on which discovery was published.
    pub discovery_record: DiscoveryRecord,
}

/// The newest announcement, held back until an observation of its model is available.
pub struct Announcements {
    newest: watch::Receiver<ModelAnnouncement>,
    /// Whether `newest` holds an announcement that is not copied to `current` yet.
    unread: bool,
    current: ModelAnnouncement,
    /// Whether `current` is not published on this connection yet.
    pending: bool,
}

impl Announcements {
    /// Starts with the present value as the current announcement.
    pub fn new(mut newest: watch::Receiver<ModelAnnouncement>) -> Self {
        let current = newest.borrow_and_update().clone();
        Announcements { newest, unread: false, current, pending: true }
    }

    /// Waits for another announcement; an error means that the sender was dropped.
    async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.newest.changed().await?;
        self.unread = true;
        Ok(())
    }

    /// Takes the announcement that is to be published while the observed model has this version.
    fn due(&mut self, version: u64) -> Option<ModelAnnouncement> {
        // Read and marked as read under one lock: an announcement that is sent meanwhile stays unread.
        let newest = self.newest.borrow_and_update();
        self.unread |= newest.has_changed();
        if self.unread && newest.version == version {
            self.current = newest.clone();
            (self.unread, self.pending) = (false, true);
        }
        std::mem::take(&mut self.pending).then(|| self.current.clone())
    }
}

/// A connection that ended, and its duration.
struct Broken {
    error: Disconnected,
    lasted: Duration,
}

impl DeviceClient {
    /// Continues a connection of an earlier client, if there is one, and connects again and again until `stop` is set or its
    /// sender dropped.
    pub async fn run(mut self, kept: Option<KeptConnection>, mut stop: watch::Receiver<Stop>) -> StoppedClient {
        let (mut kept, mut subscriptions) = match kept {
            Some(KeptConnection { connection, subscriptions }) => (connection, subscriptions),
            None => (None, self.subscriptions()),
        };
        let mut pause = self.options.reconnect_min;
        let connection = loop {
            let lasted = match self.connect(kept.take(), &mut subscriptions, &mut stop).await {
                Ok(connection) => break connection,
                Err(Broken { error, lasted }) => {
                    warn!("broker {}: {error}", self.options.access);
                    lasted
                }
            };
            if lasted >= self.options.reconnect_max {
                pause = self.options.reconnect_min;
            }
            let jittered = pause.mul_f64(0.5 + 0.5 * fastrand::f64());
            info!("reconnecting in {} ms", jittered.as_millis());
            tokio::select! {
                () = sleep(jittered) => {}
                () = stopped(&mut stop) => break None,
            }
            pause = (pause * 2).min(self.options.reconnect_max);
        };
        if *stop.borrow() == Stop::HandOver {
            let connection = Some(KeptConnection { connection, subscriptions });
            return StoppedClient { connection, discovery_record: self.discovery_record };
        }
        let shutdown_timeout = self.options.shutdown_timeout;
        if timeout(shutdown_timeout, self.shut_down(connection)).await.is_err() {
            warn!("the broker did not acknowledge everything within {} ms", shutdown_timeout.as_millis());
        }
        StoppedClient { connection: None, discovery_record: self.discovery_record }
    }

    /// Returns the subscriptions of the first connection.
    fn subscriptions(&self) -> Subscriptions {
        let status = self.discovery.enabled.then(|| self.discovery.status_topic.clone());
        let with_status = |filters: Vec<String>| status.iter().cloned().chain(filters).collect();
        let one_by_one = self.topics.single_request_filters(setting::NAMES);
        Subscriptions::new(with_status(self.topics.request_filters()), with_status(one_by_one))
    }

    /// Runs one connection until it breaks or `stop` is set; returns it in the latter case, if it was accepted.
    async fn connect(
        &mut self,
        kept: Option<Connection>,
        subscriptions: &mut Subscriptions,
        stop: &mut watch::Receiver<Stop>,
    ) -> Result<Option<Connection>, Broken> {
        let is_new = kept.is_none();
        let mut connection = kept.unwrap_or_else(|| self.open());
        if is_new {
            tokio::select! {
                accepted = connection.accepted() => accepted.map_err(|error| Broken { error, lasted: Duration::ZERO })?,
                () = stopped(stop) => return Ok(None),
            }
            self.counters.connections.add(1);
            info!("connected to {} as {}", self.options.access, self.topics.device());
        }
        let began = Instant::now();
        let served = match self.begin(&mut connection, is_new, subscriptions) {
            Ok(()) => self.serve(&mut connection, subscriptions, stop).await,
            Err(error) => Err(error),
        };
        let Err(error) = served else { return Ok(Some(connection)) };
        if let Some((topic, bytes)) = connection.largest_unacknowledged()
            && matches!(error, Disconnected::Broken(_) | Disconnected::ByBroker)
        {
            warn!(
                "the largest message that the broker did not acknowledge: {bytes} bytes on {topic}; if the broker has a limit below this, set mqtt.packet_bytes_max to it"
            );
        }
        self.suspect(subscriptions, &error);
        Err(Broken { error, lasted: began.elapsed() })
    }

    /// Draws the conclusion from a connection that broke, if it broke right after a subscription.
    fn suspect(&self, subscriptions: &mut Subscriptions, error: &Disconnected) {
        let invalid_packet = matches!(error, Disconnected::InvalidPacket(_));
        match subscriptions.broken(invalid_packet, Instant::now()) {
            None => {}
            Some(Suspicion::OneByOne) => warn!(
                "a retained message below {} probably breaks the connection; subscribing to the topics one by one",
                self.topics.root()
            ),
            Some(Suspicion::LeftOut(filter, wait)) => error!(
                "a retained message on {filter} breaks the connection; messages there are not received for {} minutes. Remove it with `mosquitto_pub -r -n -t TOPIC`",
                wait.as_secs() / 60
            ),
        }
    }

    /// Starts a connection, on which nothing is in flight.
    fn open(&mut self) -> Connection {
        self.outbox.rewind();
        self.agent_outbox.rewind();
        self.announcements.pending = true;
        Connection::open(&self.options, &self.topics)
    }

    /// Publishes the retained messages and, on a new connection, subscribes.
    fn begin(
        &mut self,
        connection: &mut Connection,
        is_new: bool,
        subscriptions: &mut Subscriptions,
    ) -> Result<(), Disconnected> {
        let present = self.discovery_topic();
        for topic in self.discovery_record.outdated(present.as_deref()).into_iter().take(EMPTIED_MAX) {
            info!("emptying the former discovery topic {topic}");
            connection.publish_retained(&topic, Vec::new(), InFlight::EmptyDiscovery)?;
        }
        self.publish_state(connection)?;
        self.publish_settings(connection)?;
        if is_new {
            // Before `online`: a client that sees `online` may send a command at once.
            let filters = subscriptions.begin(Instant::now());
            self.subscribe(connection, filters)?;
        } else {
            // The agent is another one than before the reload.
            (self.commands)(Command::Connected);
        }
        self.publish_waiting(connection)
    }

    /// Subscribes and publishes `online`, whose acknowledgement shows that the retained messages were delivered.
    fn subscribe(&self, connection: &mut Connection, filters: Vec<String>) -> Result<(), Disconnected> {
        filters.into_iter().try_for_each(|filter| connection.subscribe(filter))?;
        let status = self.topics.status();
        connection.forget(&status);
        connection.publish_retained(&status, ONLINE.into(), InFlight::Online)
    }

    /// Publishes all retained messages again.
    fn publish_again(&mut self, connection: &mut Connection) -> Result<(), Disconnected> {
        connection.forget_retained();
        self.announcements.pending = true;
        self.publish_state(connection)?;
        self.publish_settings(connection)?;
        connection.publish_retained(&self.topics.status(), ONLINE.into(), InFlight::Other)
    }

    /// Drains the outboxes on the present connection. Without one, or if it breaks, connects again while messages are left;
    /// the caller bounds the time.
    async fn shut_down(&mut self, connection: Option<Connection>) {
        if let Some(mut connection) = connection
            && let Err(error) = self.drain(&mut connection).await
        {
            debug!("{error}");
        }
        while !self.outbox.is_empty() || !self.agent_outbox.is_empty() {
            let mut connection = self.open();
            let drained = match connection.accepted().await {
                Ok(()) => self.drain(&mut connection).await,
                Err(error) => Err(error),
            };
            if let Err(error) = drained {
                debug!("{error}");
                sleep(self.options.reconnect_min / 2).await;
            }
        }
    }

    /// Publishes and receives until `stop` is set.
    async fn serve(
        &mut self,
        connection: &mut Connection,
        subscriptions: &mut Subscriptions,
        stop: &mut watch::Receiver<Stop>,
    ) -> Result<(), Disconnected> {
        loop {
            self.refused.flush();
            tokio::select! {
                event = connection.next() => {
                    if self.handle(connection, event?)? == Some(InFlight::Online) {
                        self.subscribe_next(connection, subscriptions)?;
                    }
                }
                Ok(()) = self.announcements.changed() => {
                    self.publish_announcement(connection, self.observed_version())?;
                }
                Ok(()) = self.state.changed(), if !connection.is_in_flight(InFlight::State) => {
                    self.publish_state(connection)?;
                }
                Ok(()) = self.active_settings.changed(), if !connection.is_in_flight(InFlight::Settings) => {
                    self.publish_settings(connection)?;
                }
                () = self.outbox.changed() => self.publish_waiting(connection)?,
                () = self.agent_outbox.changed() => self.publish_waiting(connection)?,
                () = wait_until(subscriptions.retry_at()), if subscriptions.is_complete() => {
                    let filters = subscriptions.retry(Instant::now());
                    self.subscribe(connection, filters)?;
                }
                () = stopped(stop) => return Ok(()),
            }
        }
    }

    /// Subscribes to the next filters, after the retained messages of those before were delivered.
    fn subscribe_next(
        &self,
        connection: &mut Connection,
        subscriptions: &mut Subscriptions,
    ) -> Result<(), Disconnected> {
        let filters = subscriptions.delivered(Instant::now());
        if filters.is_empty() { Ok(()) } else { self.subscribe(connection, filters) }
    }

    /// Publishes the last state, the remaining events and answers, and `offline`; waits for the acknowledgements; disconnects.
    async fn drain(&mut self, connection: &mut Connection) -> Result<(), Disconnected> {
        // `Ref::has_changed` also works after the sender was dropped, unlike `Receiver::has_changed`.
        if self.state.borrow().has_changed() {
            self.publish_state(connection)?;
        }
        self.publish_waiting(connection)?;
        while !self.outbox.is_empty() || !self.agent_outbox.is_empty() {
            let event = connection.next().await?;
            self.handle(connection, event)?;
        }
        connection.publish_retained(&self.topics.status(), OFFLINE.into(), InFlight::Other)?;
        while !connection.is_idle() {
            let event = connection.next().await?;
            self.handle(connection, event)?;
        }
        connection.disconnect().await;
        Ok(())
    }

    fn publish_state(&mut self, connection: &mut Connection) -> Result<(), Disconnected> {
        // Read first: the announcement of the model that it names precedes it.
        let observation = self.state.borrow_and_update().clone();
        self.publish_announcement(connection, observation.model)?;
        connection.publish_retained(&self.topics.state(), self.encoder.state(&observation), InFlight::State)
    }

    fn publish_settings(&mut self, connection: &mut Connection) -> Result<(), Disconnected> {
        let payload = Encoder::settings(&self.active_settings.borrow_and_update());
        connection.publish_retained(&self.topics.settings(), payload, InFlight::Settings)
    }

    /// Returns the topic on which discovery is published.
    fn discovery_topic(&self) -> Option<String> {
        self.discovery.enabled.then(|| self.topics.discovery())
    }

    /// Publishes the announcement of the model of this version if it is due. It precedes every message that names the model.
    fn publish_announcement(&mut self, connection: &mut Connection, version: u64) -> Result<(), Disconnected> {
        let Some(announcement) = self.announcements.due(version) else { return Ok(()) };
        if let Some(topic) = self.discovery_topic() {
            self.discovery_record.add(&topic);
        }
        let messages = announcement.messages(&self.topics, self.discovery.enabled);
        messages
            .into_iter()
            .try_for_each(|(topic, payload)| connection.publish_retained(&topic, payload, InFlight::Other))
    }

    /// Returns the version of the model that the newest observation names.
    fn observed_version(&self) -> u64 {
        self.state.borrow().model
    }

    /// Publishes answers and events as far as there is room.
    fn publish_waiting(&mut self, connection: &mut Connection) -> Result<(), Disconnected> {
        let (answers, events) = (self.agent_outbox.clone(), self.outbox.clone());
        self.publish_from(&answers, InFlight::Answer, connection)?;
        self.publish_from(&events, InFlight::Event, connection)
    }

    fn publish_from(
        &mut self,
        outbox: &Outbox,
        message: fn(Sequence) -> InFlight,
        connection: &mut Connection,
    ) -> Result<(), Disconnected> {
        while connection.has_room() {
            let Some(Entry { sequence, topic, payload }) = outbox.take_next() else { break };
            self.publish_announcement(connection, self.observed_version())?;
            if connection.fits(&topic, &payload) {
                connection.publish(&topic, payload, message(sequence))?;
            } else {
                let bytes = payload.len();
                error!("{topic}: {bytes} bytes, more than mqtt.packet_bytes_max allows; the message is lost");
                outbox.acknowledged(sequence);
                if let InFlight::Event(_) = message(sequence) {
                    self.counters.events_lost.add(1);
                }
            }
        }
        Ok(())
    }

    /// Handles an event; returns the message that it acknowledges.
    fn handle(&mut self, connection: &mut Connection, event: Event) -> Result<Option<InFlight>, Disconnected> {
        match event {
            Event::Outgoing(Outgoing::Publish(id)) => connection.sent(id),
            Event::Incoming(Packet::PubAck(ack)) => {
                let message = connection.acknowledged(ack.pkid);
                self.acknowledge(message);
                if message == Some(InFlight::EmptyDiscovery) && !connection.is_in_flight(InFlight::EmptyDiscovery) {
                    self.discovery_record.keep(self.discovery_topic().as_deref());
                }
                self.publish_waiting(connection)?;
                return Ok(message);
            }
            // A retained one is from before this connection, which has published everything.
            Event::Incoming(Packet::Publish(publish))
                if self.discovery.enabled && publish.topic == self.discovery.status_topic =>
            {
                // Messages in flight reach Home Assistant, which has subscribed before.
                let is_due = !publish.retain && !connection.is_in_flight(InFlight::Other);
                if publish.payload == ONLINE && is_due {
                    info!("{}: {ONLINE}; publishing all retained messages again", publish.topic);
                    self.publish_again(connection)?;
                }
            }
            Event::Incoming(Packet::Publish(publish)) => self.receive(&publish),
            Event::Incoming(Packet::SubAck(ack)) => {
                subscribed(connection, &ack.return_codes);
                if connection.all_subscribed() {
                    (self.commands)(Command::Connected);
                }
            }
            Event::Incoming(Packet::Disconnect) => return Err(Disconnected::ByBroker),
            _ => {}
        }
        Ok(None)
    }

    fn acknowledge(&self, message: Option<InFlight>) {
        match message {
            Some(InFlight::Event(sequence)) if self.outbox.acknowledged(sequence) => self.counters.acknowledged.add(1),
            Some(InFlight::Answer(sequence)) => drop(self.agent_outbox.acknowledged(sequence)),
            _ => {}
        }
    }

    fn receive(&mut self, publish: &Publish) {
        let topic = publish.topic.as_str();
        let Some(request) = self.topics.parse_request(topic) else { return };
        let payload = publish.payload.to_vec();
        let command = match request {
            Request::Set(_) | Request::Offer | Request::Rollback if publish.retain => {
                return self.refused.warn(format!("{topic}: retained message refused: a request must not be retained"));
            }
            Request::Set(name) => return self.set(topic, name, &payload),
            Request::Offer => Command::Offer(payload),
            Request::Rollback => Command::Rollback(payload),
            Request::Chunk(number) => Command::Chunk(number, payload),
        };
        if !(self.commands)(command) {
            debug!("{topic}: message dropped, the update agent's queue is full");
        }
    }

    fn set(&mut self, topic: &str, name: &str, payload: &[u8]) {
        match setting::parse(name, payload) {
            Ok(setting) => {
                if let Err(error) = self.settings.try_send(setting) {
                    let reason = match error {
                        TrySendError::Full(_) => "too many at once",
                        TrySendError::Disconnected(_) => "the vision thread has ended",
                    };
                    self.refused.warn(format!("{topic}: setting dropped, {reason}"));
                }
            }
            Err(error) => self.refused.warn(format!("{topic}: {error}")),
        }
    }
}

/// Warns where the broker refuses a subscription.
fn subscribed(connection: &mut Connection, codes: &[SubscribeReasonCode]) {
    let filter = connection.subscribed();
    if codes.contains(&SubscribeReasonCode::Failure) {
        warn!("the broker refuses the subscription to {filter}: messages there are not received");
    }
}

/// Returns once `stop` is set or its sender dropped.
async fn stopped(stop: &mut watch::Receiver<Stop>) {
    // An error means that the sender was dropped, which is a stop as well.
    let _ = stop.wait_for(|stop| *stop != Stop::No).await;
}

/// Returns at this time; never for `None`.
async fn wait_until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announcement(version: u64, status: &str) -> ModelAnnouncement {
        let classes = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        ModelAnnouncement { version, classes, status: status.into() }
    }

    #[test]
    fn an_announcement_waits_for_the_first_observation_of_its_model() {
        let (sender, newest) = watch::channel(announcement(1, "a"));
        let mut announcements = Announcements::new(newest);
        assert_eq!(announcements.due(1), Some(announcement(1, "a")));
        assert_eq!(announcements.due(1), None);
        sender.send_replace(announcement(2, "b"));
        assert_eq!(announcements.due(1), None, "model 1 is still observed");
        announcements.pending = true;
        assert_eq!(announcements.due(1), Some(announcement(1, "a")), "a new connection announces the observed model");
        assert_eq!(announcements.due(2), Some(announcement(2, "b")));
        sender.send_replace(announcement(2, "c"));
        assert_eq!(announcements.due(2), Some(announcement(2, "c")), "its status changed");
        assert_eq!(announcements.due(2), None);
    }

    #[tokio::test]
    async fn a_change_that_was_waited_for_is_not_lost() {
        let (sender, newest) = watch::channel(announcement(1, "a"));
        let mut announcements = Announcements::new(newest);
        announcements.due(1);
        sender.send_replace(announcement(2, "b"));
        announcements.changed().await.unwrap();
        assert_eq!(announcements.due(1), None);
        assert_eq!(announcements.due(2), Some(announcement(2, "b")));
    }
}
