//! The MQTT client of a workstation: subscribes and publishes, for `push`, `rollback` and the demo.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime};

use rumqttc::{AsyncClient, Event, EventLoop, Packet, QoS, SubscribeFilter, SubscribeReasonCode};
use tokio::runtime::Builder;

use super::access::{BrokerAccess, reason};

/// Received messages that wait for [`Client::next`]; the connection waits while there are more.
const MESSAGES_MAX: usize = 256;
/// The most published messages that wait for an acknowledgement.
const WAITING_MAX: usize = 64;
/// The most filters in one SUBSCRIBE packet.
const FILTERS_MAX: usize = 16;
/// The longest wait for a SUBACK, on top of that for the connection.
const SUBACK_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest packet from the broker, in bytes.
const INCOMING_BYTES_MAX: usize = 1 << 20;

/// A received message.
#[derive(Debug, Clone)]
pub struct Message {
    /// Its topic.
    pub topic: String,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Wall-clock time of the reception.
    pub received_at: SystemTime,
}

/// An error of the connection to the broker.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The SUBACK does not arrive in time.
    #[error("broker {broker}: no answer to the subscription within {} s", waited.as_secs())]
    Timeout {
        /// Host and port of the broker.
        broker: String,
        /// The longest wait.
        waited: Duration,
    },
    /// The connection fails or is closed.
    #[error("broker {broker}: {reason}")]
    Connection {
        /// Host and port of the broker.
        broker: String,
        /// The cause.
        reason: String,
    },
    /// The broker refuses a filter.
    #[error("broker {broker}: the broker refuses the subscription to {filter}")]
    Subscription {
        /// Host and port of the broker.
        broker: String,
        /// The refused filter.
        filter: String,
    },
    /// The client's thread cannot be started.
    #[error("cannot start the MQTT client thread: {0}")]
    Thread(std::io::Error),
}

enum Incoming {
    /// SUBACK: the index of the first filter that the broker refuses, if any.
    Subscribed(Option<usize>),
    Message(Message),
    Broken(String),
}

/// One connection with its subscriptions. It is closed when it is dropped; it does not reconnect.
pub struct Client {
    client: AsyncClient,
    incoming: Receiver<Incoming>,
    /// Messages that arrived before the SUBACK.
    early: VecDeque<Message>,
    broker: String,
    /// The longest wait for the connection and a SUBACK.
    subscribe_timeout: Duration,
}

impl Client {
    /// Connects, subscribes with QoS 1 and waits for the SUBACK.
    ///
    /// # Errors
    /// If the connection fails, the SUBACK does not arrive in time, the broker refuses a filter, or the thread cannot be
    /// started.
    pub fn connect(access: &BrokerAccess, filters: &[String]) -> Result<Self, ClientError> {
        let mut options = access.options(&format!("bloomcast-{:x}", fastrand::u64(..)), INCOMING_BYTES_MAX);
        options.set_inflight(WAITING_MAX as u16);
        let (client, event_loop) = AsyncClient::new(options, WAITING_MAX);
        let (sender, incoming) = sync_channel(MESSAGES_MAX);
        let mut this = Client {
            client,
            incoming,
            early: VecDeque::new(),
            broker: access.to_string(),
            subscribe_timeout: access.connect_timeout + SUBACK_TIMEOUT,
        };
        let runtime = Builder::new_current_thread().enable_all().build().map_err(ClientError::Thread)?;
        let access = access.clone();
        thread::Builder::new()
            .name("mqtt-client".into())
            .spawn(move || {
                runtime.block_on(forward(event_loop, access, &sender));
                // A drop would wait for a pending name lookup.
                runtime.shutdown_background();
            })
            .map_err(ClientError::Thread)?;
        for filters in filters.chunks(FILTERS_MAX) {
            this.subscribe(filters)?;
        }
        Ok(this)
    }

    /// Subscribes and waits for the SUBACK.
    fn subscribe(&mut self, filters: &[String]) -> Result<(), ClientError> {
        let subscriptions = filters.iter().map(|filter| SubscribeFilter::new(filter.clone(), QoS::AtLeastOnce));
        self.client.try_subscribe_many(subscriptions).map_err(|e| self.broken(e.to_string()))?;
        loop {
            match self.incoming.recv_timeout(self.subscribe_timeout) {
                Ok(Incoming::Subscribed(None)) => return Ok(()),
                Ok(Incoming::Subscribed(Some(refused))) => {
                    let filter = filters.get(refused).cloned().unwrap_or_default();
                    return Err(ClientError::Subscription { broker: self.broker.clone(), filter });
                }
                Ok(Incoming::Message(message)) => self.early.push_back(message),
                Ok(Incoming::Broken(reason)) => return Err(self.broken(reason)),
                Err(RecvTimeoutError::Timeout) => {
                    let (broker, waited) = (self.broker.clone(), self.subscribe_timeout);
                    return Err(ClientError::Timeout { broker, waited });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.broken("the connection is closed".into())),
            }
        }
    }

    /// Waits for the next message, at most `wait`; `None` if no message arrives in this time.
    ///
    /// # Errors
    /// If the connection is closed.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Message>, ClientError> {
        if let Some(message) = self.early.pop_front() {
            return Ok(Some(message));
        }
        match self.incoming.recv_timeout(wait) {
            Ok(Incoming::Message(message)) => Ok(Some(message)),
            Ok(Incoming::Subscribed(_)) | Err(RecvTimeoutError::Timeout) => Ok(None),
            Ok(Incoming::Broken(reason)) => Err(self.broken(reason)),
            Err(RecvTimeoutError::Disconnected) => Err(self.broken("the connection is closed".into())),
        }
    }

    /// Publishes a message with QoS 1, not retained; returns `false` if the queue is full.
    pub fn publish(&self, topic: &str, payload: Vec<u8>) -> bool {
        self.client.try_publish(topic, QoS::AtLeastOnce, false, payload).is_ok()
    }

    fn broken(&self, reason: String) -> ClientError {
        ClientError::Connection { broker: self.broker.clone(), reason }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // An error means that the connection is closed already.
        let _ = self.client.try_disconnect();
    }
}

/// Connects, then forwards received packets until the connection breaks or the receiver is dropped.
async fn forward(mut event_loop: EventLoop, access: BrokerAccess, incoming: &SyncSender<Incoming>) {
    let mut event = access.connect(&mut event_loop).await;
    loop {
        let message = match event {
            Ok(Event::Incoming(Packet::SubAck(ack))) => {
                let refused = ack.return_codes.iter().position(|code| *code == SubscribeReasonCode::Failure);
                Some(Incoming::Subscribed(refused))
            }
            Ok(Event::Incoming(Packet::Publish(publish))) => Some(Incoming::Message(Message {
                topic: publish.topic,
                payload: publish.payload.to_vec(),
                received_at: SystemTime::now(),
            })),
            Ok(_) => None,
            Err(error) => Some(Incoming::Broken(reason(&error))),
        };
        let failed = matches!(message, Some(Incoming::Broken(_)));
        if message.is_some_and(|message| incoming.send(message).is_err()) || failed {
            return;
        }
        event = event_loop.poll().await;
    }
}
