//! Asks a device to take its model back.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::message::{Action, Answer, Note, Rollback, SignedOrder};
use super::push::reconnected;
use crate::bundle::PrivateKey;
use crate::mqtt::access::Access;
use crate::mqtt::client::{Client, ClientError};
use crate::mqtt::message::{ONLINE, SCHEMA, json};
use crate::mqtt::topics::Topics;

/// How long a device may take to be seen, and to answer.
const LOOK: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(30);
/// An order that nothing came of for so long is repeated.
const REPEAT: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum RecallError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{device}: nothing says online on {topic}")]
    Offline { device: String, topic: String },
    #[error("{device}: no answer within {} s", PATIENCE.as_secs())]
    Silent { device: String },
}

/// Waits for the device's answer, which may be a refusal.
pub fn recall(access: &Access, topics: &Topics, key: &PrivateKey) -> Result<Answer, RecallError> {
    let filters = [topics.status(), topics.model(), topics.answer()];
    let mut client = Client::connect(access, &filters)?;
    let device = topics.device().to_string();
    let note = look(&mut client, topics)?
        .ok_or_else(|| RecallError::Offline { device: device.clone(), topic: topics.status() })?;
    let order = SignedOrder::sign(key, Action::Rollback, topics.root(), note.generation, &note.model.sha256);
    let rollback = Rollback { schema: SCHEMA, transfer: Uuid::now_v7(), order };
    let (began, mut repeat) = (Instant::now(), Instant::now());
    while began.elapsed() < PATIENCE {
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
            Err(_) => (client, repeat) = (reconnected(access, &filters)?, Instant::now()),
        }
    }
    Err(RecallError::Silent { device })
}

/// What the device retains, once it says that it is there.
fn look(client: &mut Client, topics: &Topics) -> Result<Option<Note>, ClientError> {
    let (began, mut online, mut note) = (Instant::now(), false, None);
    while began.elapsed() < LOOK {
        let Some(message) = client.next(TICK)? else { continue };
        if message.topic == topics.status() {
            online = message.payload == ONLINE.as_bytes();
        } else if message.topic == topics.model() {
            note = serde_json::from_slice(&message.payload).ok();
        }
        if online && note.is_some() {
            return Ok(note);
        }
    }
    Ok(None)
}
