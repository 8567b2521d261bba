//! Whoever is no device: listens to a broker as any subscriber does, and publishes.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime};

use rumqttc::{Connection, Event, Packet, QoS, SubscribeFilter, SubscribeReasonCode};

use super::access::{BrokerAccess, reason};

/// Messages that wait to be looked at; when there are more, the connection waits.
const MESSAGES_MAX: usize = 256;
/// Messages of our own that may wait.
const WAITING_MAX: usize = 64;
/// Subscriptions in one packet.
const FILTERS_MAX: usize = 16;
/// How long the broker may take to take the subscriptions.
const CONNECT: Duration = Duration::from_secs(10);
const INCOMING_BYTES_MAX: usize = 1 << 20;

/// A message and when it came.
#[derive(Debug, Clone)]
pub struct Message {
    pub topic: String,
    pub payload: Vec<u8>,
    pub received_at: SystemTime,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("broker {broker}: no subscription within {} s", CONNECT.as_secs())]
    Timeout { broker: String },
    #[error("broker {broker}: {reason}")]
    Connection { broker: String, reason: String },
    #[error("broker {broker}: refuses the subscription to {filter}")]
    Subscription { broker: String, filter: String },
    #[error("cannot start its thread: {0}")]
    Thread(std::io::Error),
}

enum Heard {
    /// The broker answered a subscription: a place in the list that it refuses, if any.
    Subscribed(Option<usize>),
    Message(Message),
    Broken(String),
}

/// One connection with its subscriptions; it ends when it is dropped, and does not come back by itself.
pub struct Client {
    client: rumqttc::Client,
    heard: Receiver<Heard>,
    /// What came before the broker said that it would.
    early: VecDeque<Message>,
    broker: String,
}

impl Client {
    /// Connects and waits until the broker took the subscriptions.
    pub fn connect(access: &BrokerAccess, filters: &[String]) -> Result<Self, ClientError> {
        let mut options = access.options(format!("bloomcast-{:x}", fastrand::u64(..)), INCOMING_BYTES_MAX);
        options.set_inflight(WAITING_MAX as u16);
        let (client, connection) = rumqttc::Client::new(options, WAITING_MAX);
        let (sender, heard) = sync_channel(MESSAGES_MAX);
        let mut this = Client { client, heard, early: VecDeque::new(), broker: access.to_string() };
        thread::Builder::new()
            .name("mqtt-client".into())
            .spawn(move || pump(connection, &sender))
            .map_err(ClientError::Thread)?;
        for filters in filters.chunks(FILTERS_MAX) {
            this.subscribe(filters)?;
        }
        Ok(this)
    }

    /// Waits for the broker's answer.
    fn subscribe(&mut self, filters: &[String]) -> Result<(), ClientError> {
        let asked = filters.iter().map(|filter| SubscribeFilter::new(filter.clone(), QoS::AtLeastOnce));
        self.client.try_subscribe_many(asked).map_err(|e| self.broken(e.to_string()))?;
        loop {
            match self.heard.recv_timeout(CONNECT) {
                Ok(Heard::Subscribed(None)) => return Ok(()),
                Ok(Heard::Subscribed(Some(refused))) => {
                    let filter = filters.get(refused).cloned().unwrap_or_default();
                    return Err(ClientError::Subscription { broker: self.broker.clone(), filter });
                }
                Ok(Heard::Message(message)) => self.early.push_back(message),
                Ok(Heard::Broken(reason)) => return Err(self.broken(reason)),
                Err(RecvTimeoutError::Timeout) => return Err(ClientError::Timeout { broker: self.broker.clone() }),
                Err(RecvTimeoutError::Disconnected) => return Err(self.broken("the connection is closed".into())),
            }
        }
    }

    /// The next message; none where `wait` is over first; an error where the connection is gone.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Message>, ClientError> {
        if let Some(message) = self.early.pop_front() {
            return Ok(Some(message));
        }
        match self.heard.recv_timeout(wait) {
            Ok(Heard::Message(message)) => Ok(Some(message)),
            Ok(Heard::Subscribed(_)) | Err(RecvTimeoutError::Timeout) => Ok(None),
            Ok(Heard::Broken(reason)) => Err(self.broken(reason)),
            Err(RecvTimeoutError::Disconnected) => Err(self.broken("the connection is closed".into())),
        }
    }

    /// Sends a message, not retained, at least once; false where it must wait.
    pub fn publish(&self, topic: &str, payload: Vec<u8>) -> bool {
        self.client.try_publish(topic, QoS::AtLeastOnce, false, payload).is_ok()
    }

    fn broken(&self, reason: String) -> ClientError {
        ClientError::Connection { broker: self.broker.clone(), reason }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Where the connection is gone already, there is nothing to end.
        let _ = self.client.try_disconnect();
    }
}

/// Sends on what comes, until the connection breaks or nobody listens.
fn pump(mut connection: Connection, heard: &SyncSender<Heard>) {
    for event in connection.iter() {
        let news = match event {
            Ok(Event::Incoming(Packet::SubAck(ack))) => {
                Heard::Subscribed(ack.return_codes.iter().position(|code| *code == SubscribeReasonCode::Failure))
            }
            Ok(Event::Incoming(Packet::Publish(publish))) => Heard::Message(Message {
                topic: publish.topic,
                payload: publish.payload.to_vec(),
                received_at: SystemTime::now(),
            }),
            Ok(_) => continue,
            Err(error) => Heard::Broken(reason(&error)),
        };
        let failed = matches!(news, Heard::Broken(_));
        if heard.send(news).is_err() || failed {
            return;
        }
    }
}
