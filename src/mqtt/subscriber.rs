//! Listening to a broker, as any subscriber does.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime};

use rumqttc::{Client, Connection, ConnectionError, Event, MqttOptions, Packet, QoS};

/// Messages that wait to be looked at; when there are more, the connection waits.
const MESSAGES_MAX: usize = 256;
/// How long the broker may take to take the subscription.
const CONNECT: Duration = Duration::from_secs(10);
const PACKET_BYTES_MAX: usize = 256 * 1024;

/// A message and when it came.
#[derive(Debug, Clone)]
pub struct Message {
    pub topic: String,
    pub payload: Vec<u8>,
    pub received_at: SystemTime,
}

#[derive(Debug, thiserror::Error)]
pub enum SubscriberError {
    #[error("{host}:{port}: no subscription within {} s", CONNECT.as_secs())]
    Timeout { host: String, port: u16 },
    #[error("{0}")]
    Connection(String),
    #[error("cannot start its thread: {0}")]
    Thread(std::io::Error),
}

type Heard = Result<Option<Message>, String>;

/// One subscription; the connection ends when it is dropped.
pub struct Subscriber {
    client: Client,
    heard: Receiver<Heard>,
}

impl Subscriber {
    /// Connects and waits until the broker took the subscription to `filter`.
    pub fn connect(host: &str, port: u16, filter: &str) -> Result<Self, SubscriberError> {
        let id = format!("bloomcast-listener-{:x}", fastrand::u64(..));
        let mut options = MqttOptions::new(id, host, port);
        options.set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX);
        let (client, connection) = Client::new(options, 8);
        client.subscribe(filter, QoS::AtLeastOnce).map_err(|e| SubscriberError::Connection(e.to_string()))?;
        let (sender, heard) = sync_channel(MESSAGES_MAX);
        thread::Builder::new()
            .name("subscriber".into())
            .spawn(move || pump(connection, &sender))
            .map_err(SubscriberError::Thread)?;
        match heard.recv_timeout(CONNECT) {
            Ok(Ok(_)) => Ok(Subscriber { client, heard }),
            Ok(Err(reason)) => Err(SubscriberError::Connection(reason)),
            Err(_) => Err(SubscriberError::Timeout { host: host.into(), port }),
        }
    }

    /// The next message; none where `wait` is over first.
    pub fn next(&self, wait: Duration) -> Result<Option<Message>, SubscriberError> {
        match self.heard.recv_timeout(wait) {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(reason)) => Err(SubscriberError::Connection(reason)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(SubscriberError::Connection("closed".into())),
        }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        // Where the connection is gone already, there is nothing to end.
        let _ = self.client.try_disconnect();
    }
}

/// Sends on what comes: first that the subscription was taken, then messages, an error last.
fn pump(mut connection: Connection, heard: &SyncSender<Heard>) {
    for event in connection.iter() {
        let news = match event {
            Ok(Event::Incoming(Packet::SubAck(_))) => Ok(None),
            Ok(Event::Incoming(Packet::Publish(publish))) => Ok(Some(Message {
                topic: publish.topic,
                payload: publish.payload.to_vec(),
                received_at: SystemTime::now(),
            })),
            Ok(_) => continue,
            Err(ConnectionError::RequestsDone) => return,
            Err(error) => Err(error.to_string()),
        };
        let failed = news.is_err();
        if heard.send(news).is_err() || failed {
            return;
        }
    }
}
