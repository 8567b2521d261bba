//! The connection to the broker; here and in `subscriber` alone rumqttc is named.
//!
//! Each connection is a client of its own, with a clean session, so that nothing is resent behind our
//! back: the outbox alone knows what the broker has not acknowledged. A connection begins with the
//! retained messages (discovery, model, state, and then `online`, so that whoever sees `online` can
//! trust the rest) and ends with `offline`, said by us or by the last will.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use rumqttc::{
    AsyncClient, ConnectReturnCode, ConnectionError, Event, EventLoop, LastWill, MqttOptions, Outgoing, Packet, QoS,
    SubscribeReasonCode,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info, warn};

use super::message::{OFFLINE, ONLINE};
use super::outbox::{Outbox, Sequence};
use super::setting::Setting;
use super::topics::Topics;
use crate::health::Counters;

/// What the connection goes by.
#[derive(Debug, Clone)]
pub struct LinkSettings {
    pub host: String,
    pub port: u16,
    pub credentials: Option<Credentials>,
    pub keep_alive: Duration,
    pub reconnect_min: Duration,
    pub reconnect_max: Duration,
    pub packet_bytes_max: usize,
    pub inflight_max: u16,
    /// How long the end waits for the last acknowledgements.
    pub farewell: Duration,
}

/// A user's name and password; the password is never printed.
#[derive(Clone)]
pub struct Credentials {
    pub user: String,
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// Everything that is to be said, and where it goes.
pub struct Link {
    pub settings: LinkSettings,
    pub topics: Topics,
    /// Topics and payloads of retained messages that do not change: discovery, model.
    pub fixed: Vec<(String, Vec<u8>)>,
    /// The newest state.
    pub state: watch::Receiver<Vec<u8>>,
    pub outbox: Outbox,
    /// Where settings from afar go.
    pub orders: SyncSender<Setting>,
    pub counters: Arc<Counters>,
}

/// Messages besides events that may be under way: the fixed ones, the state, the status.
const OTHERS_MAX: u16 = 16;
/// A larger message under `…/set/` breaks the connection; none that means well comes near.
const INCOMING_BYTES_MAX: usize = 1 << 20;
/// An MQTT publish's bytes beside topic and payload, at most.
const PUBLISH_OVERHEAD: usize = 16;

/// What a message under way is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parcel {
    Event(Sequence),
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
                    let (host, port) = (&self.settings.host, self.settings.port);
                    warn!("broker {host}:{port}: {reason}");
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
        if !self.outbox.is_empty() {
            error!("{} events were not acknowledged by the broker and are lost", self.outbox.len());
            self.counters.events_lost.add(self.outbox.len() as u64);
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
        info!("connected to {}:{} as {}", self.settings.host, self.settings.port, self.topics.device());
        match self.talk(&mut wire, stop).await {
            Ok(()) => Ok(Some(wire)),
            Err(reason) => Err(Broken { reason, lasted: began.elapsed() }),
        }
    }

    /// Begins a new connection, on which nothing is under way.
    fn dial(&self) -> Wire {
        self.outbox.rewind();
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
        while !self.outbox.is_empty() {
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
        for (topic, payload) in &self.fixed {
            wire.send(topic, true, payload.clone(), Parcel::Other)?;
        }
        self.send_state(wire)?;
        wire.send(&self.topics.status(), true, ONLINE.into(), Parcel::Other)?;
        wire.subscribe(self.topics.set_all())?;
        self.send_events(wire)?;
        loop {
            tokio::select! {
                event = wire.next() => self.heard(wire, event?)?,
                Ok(()) = self.state.changed(), if !wire.under_way(Parcel::State) => self.send_state(wire)?,
                () = self.outbox.changed() => self.send_events(wire)?,
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
        self.send_events(wire)?;
        while !self.outbox.is_empty() {
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

    fn send_state(&mut self, wire: &mut Wire) -> Result<(), String> {
        let payload = self.state.borrow_and_update().clone();
        wire.send(&self.topics.state(), true, payload, Parcel::State)
    }

    fn send_events(&self, wire: &mut Wire) -> Result<(), String> {
        let topic = self.topics.event();
        while wire.has_room() {
            let Some(entry) = self.outbox.take_next() else { break };
            if wire.fits(&topic, &entry.payload) {
                wire.send(&topic, false, entry.payload, Parcel::Event(entry.sequence))?;
            } else {
                let bytes = entry.payload.len();
                error!("an event of {bytes} bytes is more than mqtt.packet_bytes_max allows, and is lost");
                self.outbox.acknowledged(entry.sequence);
                self.counters.events_lost.add(1);
            }
        }
        Ok(())
    }

    fn heard(&mut self, wire: &mut Wire, event: Event) -> Result<(), String> {
        match event {
            Event::Outgoing(Outgoing::Publish(id)) => wire.on_its_way(id),
            Event::Incoming(Packet::PubAck(ack)) => {
                if let Some(Parcel::Event(sequence)) = wire.arrived(ack.pkid)
                    && self.outbox.acknowledged(sequence)
                {
                    self.counters.acknowledged.add(1);
                }
                self.send_events(wire)?;
            }
            Event::Incoming(Packet::Publish(publish)) => self.order(&publish.topic, &publish.payload),
            Event::Incoming(Packet::SubAck(ack)) if ack.return_codes.contains(&SubscribeReasonCode::Failure) => {
                warn!("the broker refuses the subscription to {}: no settings from afar", self.topics.set_all());
            }
            Event::Incoming(Packet::Disconnect) => return Err("disconnected".into()),
            _ => {}
        }
        Ok(())
    }

    fn order(&self, topic: &str, payload: &[u8]) {
        let Some(name) = self.topics.setting_of(topic) else { return };
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
    /// Sent, by packet id.
    sent: HashMap<u16, Parcel>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.poller.abort();
    }
}

impl Wire {
    fn connect(settings: &LinkSettings, topics: &Topics) -> Self {
        let id = format!("bloomcast-{}", topics.device());
        let mut options = MqttOptions::new(id, settings.host.clone(), settings.port);
        options.set_keep_alive(settings.keep_alive);
        options.set_clean_session(true);
        options.set_max_packet_size(INCOMING_BYTES_MAX, settings.packet_bytes_max);
        options.set_inflight(settings.inflight_max + OTHERS_MAX);
        options.set_last_will(LastWill::new(topics.status(), OFFLINE, QoS::AtLeastOnce, true));
        if let Some(credentials) = &settings.credentials {
            options.set_credentials(&credentials.user, &credentials.password);
        }
        let inflight_max = usize::from(settings.inflight_max);
        let (client, poll) = AsyncClient::new(options, inflight_max + usize::from(OTHERS_MAX));
        let (sender, events) = mpsc::channel(64);
        Wire {
            client,
            events,
            poller: tokio::spawn(pump(poll, sender)),
            packet_bytes_max: settings.packet_bytes_max,
            inflight_max,
            handed: VecDeque::new(),
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

    fn subscribe(&self, filter: String) -> Result<(), String> {
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

/// The error in words that help.
fn reason(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ConnectionRefused(
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
        ) => "the broker refuses the user name or password; see mqtt.credentials_file".into(),
        ConnectionError::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}
