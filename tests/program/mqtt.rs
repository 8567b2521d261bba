//! MQTT subscribers of the tests.

use std::cell::RefCell;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bloomcast::mqtt::access::BrokerAccess;
use bloomcast::mqtt::client::{Client, Message};
use serde_json::Value;

use super::tools::{TIMEOUT, wait_until};

/// A subscriber to all topics (`#`).
pub struct Listener(RefCell<Client>);

impl Listener {
    pub fn connect(port: u16) -> Self {
        Listener(RefCell::new(subscribe(port).unwrap()))
    }

    /// Subscribes to these filters only.
    pub fn to(port: u16, filters: &[&str]) -> Self {
        let filters: Vec<String> = filters.iter().map(|filter| (*filter).to_owned()).collect();
        Listener(RefCell::new(Client::connect(&BrokerAccess::local(port), &filters).unwrap()))
    }

    /// Connects, and retries until the broker accepts the connection.
    pub fn connect_with_retry(port: u16) -> Self {
        let mut subscriber = None;
        wait_until("the broker", || {
            subscriber = subscribe(port);
            subscriber.is_some()
        });
        Listener(RefCell::new(subscriber.unwrap()))
    }

    /// Returns the next message, or an error if the connection is lost.
    pub fn next(&self) -> Result<Message, String> {
        match self.0.borrow_mut().next(TIMEOUT) {
            Ok(Some(message)) => Ok(message),
            Ok(None) => panic!("no message within {TIMEOUT:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Waits for a message whose topic ends with `topic` and whose value satisfies `accept`; returns its JSON or text.
    pub fn wait(&self, topic: &str, accept: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + TIMEOUT;
        let mut last = Value::Null;
        while Instant::now() < deadline {
            let message = self.next().unwrap();
            let value = json_or_text(&message.payload);
            if message.topic.ends_with(topic) && accept(&value) {
                return value;
            }
            if message.topic.ends_with(topic) {
                last = value;
            }
        }
        panic!("no message matches on {topic} within {TIMEOUT:?}; the last one: {last}");
    }

    /// Returns whether no message arrives within `wait`.
    pub fn receives_nothing_for(&self, wait: Duration) -> bool {
        self.0.borrow_mut().next(wait).unwrap().is_none()
    }
}

fn subscribe(port: u16) -> Option<Client> {
    Client::connect(&BrokerAccess::local(port), &["#".into()]).ok()
}

fn json_or_text(payload: &[u8]) -> Value {
    serde_json::from_slice(payload).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(payload).into()))
}

pub fn publish(port: u16, topic: &str, payload: &str) {
    let status = Command::new("mosquitto_pub")
        .args(["-p", &port.to_string(), "-q", "1", "-t", topic, "-m", payload])
        .status()
        .unwrap();
    assert!(status.success());
}

/// Publishes a retained message; an empty one removes it.
pub fn publish_retained(port: u16, topic: &str, payload: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, payload).unwrap();
    let mut command = Command::new("mosquitto_pub");
    command.args(["-p", &port.to_string(), "-q", "1", "-r", "-t", topic]);
    match payload {
        [] => command.arg("-n"),
        _ => command.arg("-f").arg(file.path()),
    };
    assert!(command.status().unwrap().success());
}

/// A `mosquitto_sub` with a persistent session, which reconnects by itself and writes the payloads to a file.
pub struct PersistentSubscriber {
    child: Child,
    file: tempfile::NamedTempFile,
}

impl PersistentSubscriber {
    pub fn subscribe(port: u16, topic: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let child = Command::new("mosquitto_sub")
            .args(["-p", &port.to_string(), "-c", "-i", "persistent", "-q", "1", "-t", topic])
            .stdout(Stdio::from(file.reopen().unwrap()))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        PersistentSubscriber { child, file }
    }

    /// Returns the distinct ids of the events received so far, in order of arrival.
    pub fn ids(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.file.path()).unwrap();
        let mut ids = Vec::new();
        for line in text.lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            let id = event["id"].as_str().unwrap().to_owned();
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }
}

impl Drop for PersistentSubscriber {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
