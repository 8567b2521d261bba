//! A device's connection to the broker.
//!
//! Each connection is a client of its own, with a clean session, so that nothing is resent behind our
//! back: the outbox alone knows what the broker has not acknowledged. A connection begins with the
//! retained messages (discovery, model, state, and then `online`, so that whoever sees `online` can
//! trust the rest) and ends with `offline`, said by us or by the last will.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use rumqttc::{
    AsyncClient, ConnectionError, Event, EventLoop, LastWill, Outgoing, Packet, Publish, QoS, SubscribeReasonCode,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};

use super::access::{BrokerAccess, reason};
use super::message::{OFFLINE, ONLINE};
use super::outbox::{Entry, Outbox, Sequence};
use super::setting::Setting;
use super::topics::{Order, Topics};
use crate::system::Counters;

/// What the connection goes by.
#[derive(Debug, Clone)]
pub struct ConnectionOptions {
    pub access: BrokerAccess,
    pub reconnect_min: Duration,
    pub reconnect_max: Duration,
    pub inflight_max: u16,
    /// How long the end waits for the last acknowledgements.
    pub farewell: Duration,
}

/// Everything that is to be said, and where it goes.
pub struct Link {
    pub settings: ConnectionOptions,
    pub topics: Topics,
    /// What there is to say of the model.
    pub about: watch::Receiver<About>,
    /// The newest state.
    pub state: watch::Receiver<Vec<u8>>,
    pub outbox: Outbox,
    /// What became of models that were offered.
    pub answers: Outbox,
    /// Where settings from afar go.
    pub orders: SyncSender<Setting>,
    /// Where goes what concerns the model; false where there is no room.
    pub mail: Box<dyn Fn(Mail) -> bool + Send>,
    pub counters: Arc<Counters>,
}

/// Topics and payloads of the retained messages that change with the model: discovery, model.
pub type About = Vec<(String, Vec<u8>)>;

/// What came that concerns the model, or lets it be told how it stands.
#[derive(Debug, PartialEq, Eq)]
pub enum Mail {
    /// A connection began: what came on the one before may be lost.
    Connected,
    Offer(Vec<u8>),
    /// By its number.
    Chunk(u32, Vec<u8>),
    Rollback(Vec<u8>),
}

/// Messages besides events that may be under way: what is said of the model, answers, the state, the status.
const OTHERS_MAX: u16 = 24;
/// A larger message to a device breaks its connection; none that means well comes near.
pub const INCOMING_BYTES_MAX: usize = 1 << 20;
/// An MQTT publish's bytes beside topic and payload, at most.
pub const PUBLISH_OVERHEAD: usize = 16;

/// What a message under way is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parcel {
    Event(Sequence),
    Answer(Sequence),
    State,
    Other,
}

/// Why a connection ended, and how long it had stood.
struct Broken {
    reason: String,
    lasted: Duration,
}

impl Link {
    /// Keeps connecting until `stop` is set (or its sender dropped), then says farewell.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut pause = self.settings.reconnect_min;
        let wire = loop {
            let lasted = match self.connection(&mut stop).await {
                Ok(wire) => break wire,
                Err(Broken { reason, lasted }) => {
                    warn!("broker {}: {reason}", self.settings.access);
                    lasted
                }
            };
            if lasted >= self.settings.reconnect_max {
                pause = self.settings.reconnect_min;
            }
            let jittered = pause.mul_f64(0.5 + 0.5 * fastrand::f64());
            info!("connecting again in {} ms", jittered.as_millis());
            tokio::select! {
                () = sleep(jittered) => {}
                () = stopped(&mut stop) => break None,
            }
            pause = (pause * 2).min(self.settings.reconnect_max);
        };
        let farewell = self.settings.farewell;
        if timeout(farewell, self.last_words(wire)).await.is_err() {
            warn!("the broker did not take the farewell within {} ms", farewell.as_millis());
        }
    }

    /// One connection until it breaks, or until `stop` is set; then what stands of it.
    async fn connection(&mut self, stop: &mut watch::Receiver<bool>) -> Result<Option<Wire>, Broken> {
        let mut wire = self.dial();
        tokio::select! {
            greeted = wire.greeted() => greeted.map_err(|reason| Broken { reason, lasted: Duration::ZERO })?,
            () = stopped(stop) => return Ok(None),
        }
        let began = Instant::now();
        self.counters.connections.add(1);
        info!("connected to {} as {}", self.settings.access, self.topics.device());
        match self.talk(&mut wire, stop).await {
            Ok(()) => Ok(Some(wire)),
            Err(reason) => Err(Broken { reason, lasted: began.elapsed() }),
        }
    }

    /// Begins a new connection, on which nothing is under way.
    fn dial(&self) -> Wire {
        self.outbox.rewind();
        self.answers.rewind();
        Wire::connect(&self.settings, &self.topics)
    }

    /// Says farewell on the connection that stands. Where there is none, or it breaks, and events are left,
    /// connects again to say them, until somebody's patience is over.
    async fn last_words(&mut self, wire: Option<Wire>) {
        if let Some(mut wire) = wire
            && let Err(reason) = self.farewell(&mut wire).await
        {
            debug!("{reason}");
        }
        while !self.outbox.is_empty() || !self.answers.is_empty() {
            let mut wire = self.dial();
            let said = match wire.greeted().await {
                Ok(()) => self.farewell(&mut wire).await,
                Err(reason) => Err(reason),
            };
            if let Err(reason) = said {
                debug!("{reason}");
                sleep(self.settings.reconnect_min / 2).await;
            }
        }
    }

    /// Says everything there is to say until `stop` is set.
    async fn talk(&mut self, wire: &mut Wire, stop: &mut watch::Receiver<bool>) -> Result<(), String> {
        self.about.mark_changed();
        self.send_state(wire)?;
        // Whoever sees `online` may ask for something at once.
        self.topics.orders().into_iter().try_for_each(|filter| wire.subscribe(filter))?;
        wire.send(&self.topics.status(), true, ONLINE.into(), Parcel::Other)?;
        self.send_waiting(wire)?;
        loop {
            tokio::select! {
                event = wire.next() => self.heard(wire, event?)?,
                Ok(()) = self.about.changed() => self.send_about(wire)?,
                Ok(()) = self.state.changed(), if !wire.under_way(Parcel::State) => self.send_state(wire)?,
                () = self.outbox.changed() => self.send_waiting(wire)?,
                () = self.answers.changed() => self.send_waiting(wire)?,
                () = stopped(stop) => return Ok(()),
            }
        }
    }

    /// The last state, the last events, `offline`, and the end of the connection.
    async fn farewell(&mut self, wire: &mut Wire) -> Result<(), String> {
        // Asked of the value, not of the channel: its sender may be gone by now.
        if self.state.borrow().has_changed() {
            self.send_state(wire)?;
        }
        self.send_waiting(wire)?;
        while !self.outbox.is_empty() || !self.answers.is_empty() {
            let event = wire.next().await?;
            self.heard(wire, event)?;
        }
        wire.send(&self.topics.status(), true, OFFLINE.into(), Parcel::Other)?;
        while !wire.is_idle() {
            let event = wire.next().await?;
            self.heard(wire, event)?;
        }
        wire.disconnect().await;
        Ok(())
    }

    /// The state names the model: what there is to say of that goes first.
    fn send_state(&mut self, wire: &mut Wire) -> Result<(), String> {
        let payload = self.state.borrow_and_update().clone();
        self.send_about_first(wire)?;
        wire.send(&self.topics.state(), true, payload, Parcel::State)
    }

    /// Looked at once the message that names the model is at hand, so that none overtakes it.
    fn send_about_first(&mut self, wire: &mut Wire) -> Result<(), String> {
        if self.about.borrow().has_changed() { self.send_about(wire) } else { Ok(()) }
    }

    fn send_about(&mut self, wire: &mut Wire) -> Result<(), String> {
        let about = self.about.borrow_and_update().clone();
        about.into_iter().try_for_each(|(topic, payload)| wire.send(&topic, true, payload, Parcel::Other))
    }

    /// Answers and events, as far as there is room. An event names the model as well.
    fn send_waiting(&mut self, wire: &mut Wire) -> Result<(), String> {
        self.send_from(self.answers.clone(), Parcel::Answer, wire)?;
        self.send_from(self.outbox.clone(), Parcel::Event, wire)
    }

    fn send_from(&mut self, outbox: Outbox, parcel: fn(Sequence) -> Parcel, wire: &mut Wire) -> Result<(), String> {
        while wire.has_room() {
            let Some(Entry { sequence, topic, payload }) = outbox.take_next() else { break };
            self.send_about_first(wire)?;
            if wire.fits(&topic, &payload) {
                wire.send(&topic, false, payload, parcel(sequence))?;
            } else {
                let bytes = payload.len();
                error!("{topic}: {bytes} bytes, more than mqtt.packet_bytes_max allows; the message is lost");
                outbox.acknowledged(sequence);
                if let Parcel::Event(_) = parcel(sequence) {
                    self.counters.events_lost.add(1);
                }
            }
        }
        Ok(())
    }

    fn heard(&mut self, wire: &mut Wire, event: Event) -> Result<(), String> {
        match event {
            Event::Outgoing(Outgoing::Publish(id)) => wire.on_its_way(id),
            Event::Incoming(Packet::PubAck(ack)) => {
                self.arrived(wire.arrived(ack.pkid));
                self.send_waiting(wire)?;
            }
            Event::Incoming(Packet::Publish(publish)) => self.order(&publish),
            Event::Incoming(Packet::SubAck(ack)) => self.subscribed(wire, &ack.return_codes),
            Event::Incoming(Packet::Disconnect) => return Err("disconnected".into()),
            _ => {}
        }
        Ok(())
    }

    /// The broker has it.
    fn arrived(&self, parcel: Option<Parcel>) {
        match parcel {
            Some(Parcel::Event(sequence)) if self.outbox.acknowledged(sequence) => self.counters.acknowledged.add(1),
            Some(Parcel::Answer(sequence)) => drop(self.answers.acknowledged(sequence)),
            _ => {}
        }
    }

    /// The broker took a subscription, or refuses it. They are answered in their order.
    fn subscribed(&self, wire: &mut Wire, codes: &[SubscribeReasonCode]) {
        let filter = wire.asked.pop_front().unwrap_or_default();
        if codes.contains(&SubscribeReasonCode::Failure) {
            warn!("the broker refuses the subscription to {filter}: what is sent there is not heard");
        }
        if wire.asked.is_empty() {
            (self.mail)(Mail::Connected);
        }
    }

    fn order(&self, publish: &Publish) {
        let topic = publish.topic.as_str();
        let Some(order) = self.topics.order(topic) else { return };
        let payload = publish.payload.to_vec();
        let mail = match order {
            Order::Set(name) => return self.set(topic, name, &payload),
            Order::Offer | Order::Rollback if publish.retain => {
                return warn!("{topic}: a retained message is left out: what asks for a model must not be retained");
            }
            Order::Offer => Mail::Offer(payload),
            Order::Rollback => Mail::Rollback(payload),
            Order::Chunk(number) => Mail::Chunk(number, payload),
        };
        if !(self.mail)(mail) {
            debug!("{topic}: too much at once, this one is left out");
        }
    }

    fn set(&self, topic: &str, name: &str, payload: &[u8]) {
        match Setting::parse(name, payload) {
            Ok(setting) => {
                if self.orders.try_send(setting).is_err() {
                    warn!("{topic}: too many settings at once, this one is left out");
                }
            }
            Err(error) => warn!("{topic}: {error}"),
        }
    }
}

/// Returns once `stop` is set or its sender is gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop as well.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// One connection's client, and what is under way on it.
struct Wire {
    client: AsyncClient,
    events: mpsc::Receiver<Result<Event, ConnectionError>>,
    poller: JoinHandle<()>,
    packet_bytes_max: usize,
    inflight_max: usize,
    /// Handed to the client, which has not given them a packet id yet; in order.
    handed: VecDeque<Parcel>,
    /// Filters of subscriptions that the broker has not answered; in order.
    asked: VecDeque<String>,
    /// Sent, by packet id.
    sent: HashMap<u16, Parcel>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.poller.abort();
    }
}

impl Wire {
    fn connect(settings: &ConnectionOptions, topics: &Topics) -> Self {
        let mut options = settings.access.options(format!("bloomcast-{}", topics.device()), INCOMING_BYTES_MAX);
        options.set_inflight(settings.inflight_max + OTHERS_MAX);
        options.set_last_will(LastWill::new(topics.status(), OFFLINE, QoS::AtLeastOnce, true));
        let inflight_max = usize::from(settings.inflight_max);
        let (client, poll) = AsyncClient::new(options, inflight_max + usize::from(OTHERS_MAX));
        let (sender, events) = mpsc::channel(64);
        Wire {
            client,
            events,
            poller: tokio::spawn(pump(poll, sender)),
            packet_bytes_max: settings.access.packet_bytes_max,
            inflight_max,
            handed: VecDeque::new(),
            asked: VecDeque::new(),
            sent: HashMap::new(),
        }
    }

    /// What happened on the connection, or why it ended.
    async fn next(&mut self) -> Result<Event, String> {
        match self.events.recv().await {
            Some(Ok(event)) => {
                debug!("{event:?}");
                Ok(event)
            }
            Some(Err(error)) => Err(reason(&error)),
            None => Err("the connection's task ended".into()),
        }
    }

    /// Waits until the broker took the connection.
    async fn greeted(&mut self) -> Result<(), String> {
        loop {
            if let Event::Incoming(Packet::ConnAck(_)) = self.next().await? {
                return Ok(());
            }
        }
    }

    fn subscribe(&mut self, filter: String) -> Result<(), String> {
        self.asked.push_back(filter.clone());
        self.client.try_subscribe(filter, QoS::AtLeastOnce).map_err(|e| e.to_string())
    }

    fn fits(&self, topic: &str, payload: &[u8]) -> bool {
        topic.len() + payload.len() + PUBLISH_OVERHEAD <= self.packet_bytes_max
    }

    /// Room for one more event.
    fn has_room(&self) -> bool {
        self.handed.len() + self.sent.len() < self.inflight_max
    }

    fn send(&mut self, topic: &str, retain: bool, payload: Vec<u8>, parcel: Parcel) -> Result<(), String> {
        if !self.fits(topic, &payload) {
            error!("{topic}: {} bytes, more than mqtt.packet_bytes_max allows; not published", payload.len());
            return Ok(());
        }
        self.client.try_publish(topic, QoS::AtLeastOnce, retain, payload).map_err(|e| e.to_string())?;
        self.handed.push_back(parcel);
        Ok(())
    }

    /// The client gave the oldest message handed to it this packet id, and sent it.
    fn on_its_way(&mut self, id: u16) {
        if let Some(parcel) = self.handed.pop_front() {
            self.sent.insert(id, parcel);
        }
    }

    fn arrived(&mut self, id: u16) -> Option<Parcel> {
        self.sent.remove(&id)
    }

    fn under_way(&self, parcel: Parcel) -> bool {
        self.handed.contains(&parcel) || self.sent.values().any(|sent| *sent == parcel)
    }

    fn is_idle(&self) -> bool {
        self.handed.is_empty() && self.sent.is_empty()
    }

    /// Ends the connection in order, so that the broker does not speak the last will.
    async fn disconnect(&mut self) {
        if self.client.try_disconnect().is_ok() {
            // Until the broker closes, or the pump finds the connection gone.
            while let Some(Ok(event)) = self.events.recv().await {
                if event == Event::Outgoing(Outgoing::Disconnect) {
                    return;
                }
            }
        }
    }
}

/// Polls in a task of its own, since a poll that is broken off may leave half a packet behind.
async fn pump(mut poll: EventLoop, events: mpsc::Sender<Result<Event, ConnectionError>>) {
    loop {
        let event = poll.poll().await;
        let failed = event.is_err();
        if events.send(event).await.is_err() || failed {
            return;
        }
    }
}
