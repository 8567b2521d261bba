//! Requests a device to roll back to its previous model.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::bundle::PrivateKey;
use crate::mqtt::client::{Client, ClientError};
use crate::mqtt::message::{ONLINE, SCHEMA, json};
use crate::mqtt::{BrokerAccess, Topics};
use crate::update::protocol::{Action, Answer, ModelStatus, RollbackRequest, SignedCommand};
use crate::update::workstation::push::reconnect;

/// The longest wait for the device's retained messages.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// The longest wait for the device's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval at which an unanswered request is published again.
const REQUEST_INTERVAL: Duration = Duration::from_secs(3);
/// The longest wait for one message.
const TICK: Duration = Duration::from_millis(50);

/// Reason for a rollback request without an answer.
#[derive(Debug, thiserror::Error)]
pub enum RollbackError {
    /// The connection to the broker failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// `…/status` is not `online`.
    #[error("{device}: offline: expected online on {topic}")]
    Offline {
        /// Name of the device.
        device: String,
        /// Its status topic.
        topic: String,
    },
    /// The device is online without a valid retained `…/model`.
    #[error("{device}: online, but no valid model status is retained on {topic}")]
    NoModelStatus {
        /// Name of the device.
        device: String,
        /// Its model status topic.
        topic: String,
    },
    /// The device did not answer within 30 s.
    #[error("{device}: no answer within {} s", ANSWER_TIMEOUT.as_secs())]
    NoAnswer {
        /// Name of the device.
        device: String,
    },
}

/// Requests a rollback, signed with `key`, and waits up to 30 s for the device's answer, which may be a refusal.
///
/// # Errors
/// If the broker cannot be reached, or the device is offline, retains no valid model status, or does not answer.
pub fn rollback_device(access: &BrokerAccess, topics: &Topics, key: &PrivateKey) -> Result<Answer, RollbackError> {
    let filters = [topics.status(), topics.model(), topics.answer()];
    let mut client = Client::connect(access, &filters)?;
    let device = topics.device().to_string();
    let status = match probe(&mut client, topics)? {
        (false, _) => return Err(RollbackError::Offline { device, topic: topics.status() }),
        (true, None) => return Err(RollbackError::NoModelStatus { device, topic: topics.model() }),
        (true, Some(status)) => status,
    };
    let command = SignedCommand::sign(key, Action::Rollback, topics.root(), status.generation, &status.model.sha256);
    let request = RollbackRequest { schema: SCHEMA, transfer: Uuid::now_v7(), command };
    let (mut deadline, mut next_request) = (Instant::now() + ANSWER_TIMEOUT, Instant::now());
    while Instant::now() < deadline {
        if Instant::now() >= next_request && client.publish(&topics.rollback(), json(&request)) {
            next_request = Instant::now() + REQUEST_INTERVAL;
        }
        match client.next(TICK) {
            Ok(None) => {}
            Ok(Some(message)) => {
                let answer: Option<Answer> = serde_json::from_slice(&message.payload).ok();
                let is_ours = |answer: &Answer| answer.transfer == Some(request.transfer);
                if let Some(answer) = answer.filter(|answer| message.topic == topics.answer() && is_ours(answer)) {
                    return Ok(answer);
                }
            }
            Err(_) => {
                client = reconnect(access, &filters)?;
                (deadline, next_request) = (Instant::now() + ANSWER_TIMEOUT, Instant::now());
            }
        }
    }
    Err(RollbackError::NoAnswer { device })
}

/// Waits up to [`PROBE_TIMEOUT`] for the device's retained messages; returns whether it is online, and its model status.
fn probe(client: &mut Client, topics: &Topics) -> Result<(bool, Option<ModelStatus>), ClientError> {
    let (started, mut online, mut status) = (Instant::now(), false, None);
    while started.elapsed() < PROBE_TIMEOUT && !(online && status.is_some()) {
        let Some(message) = client.next(TICK)? else { continue };
        if message.topic == topics.status() {
            online = message.payload == ONLINE.as_bytes();
        } else if message.topic == topics.model() {
            status = serde_json::from_slice(&message.payload).ok();
        }
    }
    Ok((online, status))
}
