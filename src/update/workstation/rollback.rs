//! Asks a device to take its model back.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::bundle::PrivateKey;
use crate::mqtt::access::BrokerAccess;
use crate::mqtt::client::{Client, ClientError};
use crate::mqtt::message::{ONLINE, SCHEMA, json};
use crate::mqtt::topics::Topics;
use crate::update::protocol::{Action, Answer, ModelStatus, Rollback, SignedOrder};
use crate::update::workstation::push::reconnected;

/// How long a device may take to be seen, and to answer.
const LOOK: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(30);
/// An order that nothing came of for so long is repeated.
const REPEAT: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum RollbackError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{device}: nothing says online on {topic}")]
    Offline { device: String, topic: String },
    #[error("{device}: it is online, but nothing that can be read is retained on {topic}")]
    NoNote { device: String, topic: String },
    #[error("{device}: no answer within {} s", PATIENCE.as_secs())]
    Silent { device: String },
}

/// Waits for the device's answer, which may be a refusal.
pub fn rollback_device(access: &BrokerAccess, topics: &Topics, key: &PrivateKey) -> Result<Answer, RollbackError> {
    let filters = [topics.status(), topics.model(), topics.answer()];
    let mut client = Client::connect(access, &filters)?;
    let device = topics.device().to_string();
    let note = match look(&mut client, topics)? {
        (false, _) => return Err(RollbackError::Offline { device, topic: topics.status() }),
        (true, None) => return Err(RollbackError::NoNote { device, topic: topics.model() }),
        (true, Some(note)) => note,
    };
    let order = SignedOrder::sign(key, Action::Rollback, topics.root(), note.generation, &note.model.sha256);
    let rollback = Rollback { schema: SCHEMA, transfer: Uuid::now_v7(), order };
    let (mut until, mut repeat) = (Instant::now() + PATIENCE, Instant::now());
    while Instant::now() < until {
        if Instant::now() >= repeat && client.publish(&topics.rollback(), json(&rollback)) {
            repeat = Instant::now() + REPEAT;
        }
        match client.next(TICK) {
            Ok(None) => {}
            Ok(Some(message)) => {
                let answer = serde_json::from_slice(&message.payload).ok();
                let ours = |answer: &Answer| answer.transfer == Some(rollback.transfer);
                if let Some(answer) = answer.filter(|answer| message.topic == topics.answer() && ours(answer)) {
                    return Ok(answer);
                }
            }
            Err(_) => {
                client = reconnected(access, &filters)?;
                (until, repeat) = (Instant::now() + PATIENCE, Instant::now());
            }
        }
    }
    Err(RollbackError::Silent { device })
}

/// Whether the device says that it is there, and what it retains of its model.
fn look(client: &mut Client, topics: &Topics) -> Result<(bool, Option<ModelStatus>), ClientError> {
    let (began, mut online, mut note) = (Instant::now(), false, None);
    while began.elapsed() < LOOK && !(online && note.is_some()) {
        let Some(message) = client.next(TICK)? else { continue };
        if message.topic == topics.status() {
            online = message.payload == ONLINE.as_bytes();
        } else if message.topic == topics.model() {
            note = serde_json::from_slice(&message.payload).ok();
        }
    }
    Ok((online, note))
}
