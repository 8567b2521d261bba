//! The delivery of a model to one device, from the probe to the final answer. It performs no I/O and reads no clock; the
//! caller passes messages and the time.
//!
//! An offer is also the request for the transfer's progress: while the device receives the model, it answers each offer, also a
//! repeated one, with a [`TransferProgress`] message that has `resend` set, and chunks are sent from its `next` on.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::preflight::{self, Incompatible};
use crate::bundle::{BACKBONE, Identity, Manifest, PrivateKey};
use crate::mqtt::Topics;
use crate::mqtt::message::{ONLINE, SCHEMA, json};
use crate::update::protocol::{Action, Answer, ModelStatus, Offer, SignedCommand, TransferProgress, UpdateStatus};
use crate::update::transfer;

/// The longest wait for a device's retained messages.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// First interval after which an unanswered offer is published again; it doubles each time.
const OFFER_INTERVAL_MIN: Duration = Duration::from_secs(3);
/// The longest interval between two offers.
const OFFER_INTERVAL_MAX: Duration = Duration::from_secs(24);
/// The longest time without progress while chunks are sent.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest time that the validation of a complete model takes: a large network on a small device.
const VALIDATION_TIMEOUT: Duration = Duration::from_secs(300);
/// The longest trial.
const TRIAL_MAX: Duration = Duration::from_secs(86_400);
/// Wait for the answer after the end of a trial.
const TRIAL_MARGIN: Duration = Duration::from_secs(30);
/// The most chunks in flight: sent, and not yet covered by a progress message.
const WINDOW_CHUNKS: u32 = 3 * transfer::PROGRESS_EVERY;
/// Stalls before the chunk size is halved.
const STALLS_MAX: u32 = 3;
/// Restarts of the transfer by the device before the delivery is given up.
const RESTARTS_MAX: u32 = 3;
/// The smallest chunk size, in bytes, that halving leads to; no broker limits messages to less.
const HALVED_CHUNK_BYTES_MIN: u32 = 1024;

/// The model that a push sends, and how.
pub struct PushPayload {
    /// The signed bundle.
    pub bytes: Vec<u8>,
    /// Manifest of the bundle.
    pub manifest: Manifest,
    /// Identity of the bundle; its `sha256` is that of `bytes`.
    pub model: Identity,
    /// The largest MQTT packet that the broker accepts, in bytes.
    pub packet_bytes_max: usize,
    /// Sends the model even if it is a downgrade.
    pub force: bool,
    /// Signs the command to accept a model that is not newer; `None` sends offers without such a command.
    pub key: Option<PrivateKey>,
}

/// Final status of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeliveryStatus {
    /// The model is active and has passed its trial.
    Confirmed,
    /// The model would be sent (`--dry-run`).
    #[serde(rename = "fit")]
    Fits,
    /// Rejected by the preflight check, before anything was sent, or by the device.
    Refused,
    /// The model was active and is no longer.
    RolledBack,
    /// The device is not connected to the broker.
    Offline,
    /// The device or the broker did not respond in time.
    #[serde(rename = "silent")]
    NoAnswer,
    /// Not started because another device failed.
    #[serde(rename = "stopped")]
    NotStarted,
}

impl DeliveryStatus {
    /// Returns the text for tables.
    pub fn text(self) -> &'static str {
        match self {
            DeliveryStatus::Confirmed => "confirmed",
            DeliveryStatus::Fits => "fit",
            DeliveryStatus::Refused => "refused",
            DeliveryStatus::RolledBack => "rolled back",
            DeliveryStatus::Offline => "offline",
            DeliveryStatus::NoAnswer => "no answer",
            DeliveryStatus::NotStarted => "not started",
        }
    }

    /// Returns whether this is [`DeliveryStatus::Confirmed`] or [`DeliveryStatus::Fits`].
    pub fn is_good(self) -> bool {
        matches!(self, DeliveryStatus::Confirmed | DeliveryStatus::Fits)
    }
}

/// The outcome of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveryOutcome {
    /// Final status.
    pub status: DeliveryStatus,
    /// Explanation of the status; may be empty.
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum DeliveryState {
    /// Waits for the device's retained messages.
    Probing {
        deadline: Instant,
    },
    /// The device is online and can use the model; the delivery has not started.
    Ready,
    /// Sends chunks, or waits for the answer to an offer.
    Sending {
        deadline: Instant,
    },
    /// The device has all chunks and validates the model.
    Validating {
        deadline: Instant,
    },
    /// The model is active on trial.
    OnTrial {
        deadline: Instant,
    },
    Done(DeliveryOutcome),
}

/// The delivery of a model to one device.
pub struct Delivery {
    /// Topics of the device.
    pub topics: Topics,
    state: DeliveryState,
    /// Whether [`Delivery::start`] has started to send.
    started: bool,
    /// Whether `…/status` is `online`; `None` before it arrives.
    online: Option<bool>,
    /// The retained `…/model`: `None` before it arrives, `Some(None)` if it is not valid.
    model_status: Option<Option<ModelStatus>>,
    transfer: Uuid,
    chunk_bytes: u32,
    /// Number of chunks of the model.
    chunks: u32,
    /// Number of chunks that the device has.
    received: u32,
    /// The largest value of `received` so far.
    received_max: u32,
    /// Index of the next chunk to send.
    next: u32,
    /// Whether an offer is due or unanswered. The device answers a repeated offer with a [`TransferProgress`] message with `resend`, and no
    /// chunk is sent until then: by then, each chunk sent before the offer has arrived or is lost.
    offer_unanswered: bool,
    next_offer_at: Instant,
    /// Interval after the next offer.
    offer_interval: Duration,
    /// Number of successive stalls: chunks were sent, and no chunk arrived.
    stalls: u32,
    /// Number of times that the device has lost the received chunks.
    restarts: u32,
}

/// Publishes a payload on a topic; returns `false` if the queue is full.
pub type PublishFn<'a> = &'a mut dyn FnMut(&str, Vec<u8>) -> bool;

impl Delivery {
    /// Creates a delivery that probes the device for up to 3 s.
    pub fn new(topics: Topics, payload: &PushPayload, now: Instant) -> Self {
        let topic_bytes_max = topics.chunk(u32::MAX).len();
        Delivery {
            topics,
            state: DeliveryState::Probing { deadline: now + PROBE_TIMEOUT },
            started: false,
            online: None,
            model_status: None,
            transfer: Uuid::now_v7(),
            chunk_bytes: transfer::chunk_bytes_for(payload.packet_bytes_max, topic_bytes_max),
            chunks: 0,
            received: 0,
            received_max: 0,
            next: 0,
            offer_unanswered: true,
            next_offer_at: now,
            offer_interval: OFFER_INTERVAL_MIN,
            stalls: 0,
            restarts: 0,
        }
    }

    /// Returns the topics of a device whose messages [`Delivery::handle`] needs.
    pub fn filters(topics: &Topics) -> [String; 4] {
        [topics.status(), topics.model(), topics.answer(), topics.progress()]
    }

    /// Returns whether the delivery waits for the device's retained messages.
    pub fn is_probing(&self) -> bool {
        matches!(self.state, DeliveryState::Probing { .. })
    }

    /// Returns whether the device is online and can use the model, and the delivery has not started.
    pub fn is_ready(&self) -> bool {
        self.state == DeliveryState::Ready
    }

    /// Returns the outcome; `None` before the delivery is finished.
    pub fn outcome(&self) -> Option<&DeliveryOutcome> {
        match &self.state {
            DeliveryState::Done(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Returns whether the delivery started and the model was not confirmed. An offline device is not a failure of the model.
    pub fn has_failed(&self) -> bool {
        let is_failure =
            |outcome: &DeliveryOutcome| !outcome.status.is_good() && outcome.status != DeliveryStatus::Offline;
        self.started && self.outcome().is_some_and(is_failure)
    }

    /// Returns a text for the state, the number of chunks that the device has, and the number of chunks of the model.
    pub fn progress(&self) -> (String, u32, u32) {
        let text = match &self.state {
            DeliveryState::Probing { .. } => "probing".into(),
            DeliveryState::Ready => "waiting".into(),
            DeliveryState::Sending { .. } => "sending".into(),
            DeliveryState::Validating { .. } => "validating".into(),
            DeliveryState::OnTrial { .. } => "on trial".into(),
            DeliveryState::Done(DeliveryOutcome { status, reason }) if reason.is_empty() => status.text().into(),
            DeliveryState::Done(DeliveryOutcome { status, reason }) => format!("{}: {reason}", status.text()),
        };
        (text, self.received, self.chunks)
    }

    /// Starts to send, unless the device's retained messages have changed and no longer allow it.
    pub fn start(&mut self, payload: &PushPayload, now: Instant) {
        self.probe(payload, true);
        if self.is_ready() {
            self.started = true;
            self.state = DeliveryState::Sending { deadline: now + PROGRESS_TIMEOUT };
            self.schedule_offer(now);
        }
    }

    /// Ends the delivery with an outcome.
    pub fn finish(&mut self, status: DeliveryStatus, reason: impl Into<String>) {
        self.state = DeliveryState::Done(DeliveryOutcome { status, reason: reason.into() });
    }

    /// Handles a new connection to the broker. Messages in flight on the previous one may be lost, so this extends the
    /// deadline and makes an offer due.
    pub fn reconnected(&mut self, now: Instant) {
        match &mut self.state {
            DeliveryState::Probing { deadline } => *deadline = now + PROBE_TIMEOUT,
            DeliveryState::Sending { deadline } => {
                *deadline = now + PROGRESS_TIMEOUT;
                self.handle_stall(now);
            }
            DeliveryState::Validating { deadline } => *deadline = (*deadline).max(now + PROGRESS_TIMEOUT),
            DeliveryState::OnTrial { deadline } => *deadline = (*deadline).max(now + TRIAL_MARGIN),
            DeliveryState::Ready | DeliveryState::Done(_) => {}
        }
        self.schedule_offer(now);
    }

    /// Makes an offer due now; the device answers it with its progress.
    fn schedule_offer(&mut self, now: Instant) {
        (self.offer_unanswered, self.next_offer_at, self.offer_interval) = (true, now, OFFER_INTERVAL_MIN);
    }

    /// Counts a stall; after [`STALLS_MAX`] of them, starts again with chunks of half the size. The broker may not accept
    /// messages of this size: it then closes the connection or drops them.
    fn handle_stall(&mut self, now: Instant) {
        self.stalls += 1;
        if self.stalls < STALLS_MAX {
            return;
        }
        if self.chunk_bytes / 2 < HALVED_CHUNK_BYTES_MIN {
            let topic = self.topics.chunk(self.received);
            return self.finish(
                DeliveryStatus::NoAnswer,
                format!("messages to {topic} do not arrive; check the broker's message size limit and its ACL"),
            );
        }
        (self.chunk_bytes, self.stalls) = (self.chunk_bytes / 2, 0);
        (self.received, self.received_max, self.next) = (0, 0, 0);
        self.state = DeliveryState::Sending { deadline: now + PROGRESS_TIMEOUT };
        self.schedule_offer(now);
    }

    /// Handles a message on one of the device's topics; ignores it if it is not valid.
    pub fn handle(&mut self, topic: &str, message: &[u8], payload: &PushPayload, now: Instant) {
        if topic == self.topics.status() {
            self.online = Some(message == ONLINE.as_bytes());
        } else if topic == self.topics.model() {
            self.model_status = Some(parse(message));
        } else if topic == self.topics.progress() {
            parse(message).into_iter().for_each(|progress| self.handle_progress(&progress, now));
        } else if topic == self.topics.answer() {
            parse(message).into_iter().for_each(|answer| self.handle_answer(&answer, payload, now));
        }
    }

    fn handle_progress(&mut self, progress: &TransferProgress, now: Instant) {
        if progress.transfer != self.transfer || progress.chunks != self.chunks || progress.next > self.chunks {
            return;
        }
        let is_restart = progress.resend && progress.next == 0;
        // After a reconnect, a device may publish an earlier progress again.
        let is_stale = !progress.resend && progress.next < self.received;
        match self.state {
            DeliveryState::Sending { .. } if !is_stale => {}
            DeliveryState::Validating { .. } if progress.resend => {}
            // The device receives the model again, so the model is not active any more.
            DeliveryState::OnTrial { .. } if is_restart => {
                return self.finish(DeliveryStatus::RolledBack, "no answer with the reason was received");
            }
            _ => return,
        }
        if is_restart && self.received > 0 {
            self.restarts += 1;
            if self.restarts == RESTARTS_MAX {
                return self.finish(
                    DeliveryStatus::NoAnswer,
                    format!("the device restarted the transfer {RESTARTS_MAX} times"),
                );
            }
        }
        self.advance(progress, now);
    }

    /// Continues the transfer from the device's progress.
    fn advance(&mut self, progress: &TransferProgress, now: Instant) {
        let (has_advanced, has_sent) = (progress.next > self.received_max, self.next > self.received);
        self.received = progress.next;
        self.received_max = self.received_max.max(self.received);
        if progress.next == self.chunks {
            self.state = DeliveryState::Validating { deadline: now + VALIDATION_TIMEOUT };
            self.offer_unanswered = true;
            (self.next_offer_at, self.offer_interval) = (now + OFFER_INTERVAL_MAX, OFFER_INTERVAL_MAX);
            return;
        }
        if has_advanced {
            self.stalls = 0;
        }
        if has_advanced || !matches!(self.state, DeliveryState::Sending { .. }) {
            self.state = DeliveryState::Sending { deadline: now + PROGRESS_TIMEOUT };
        }
        if progress.resend {
            self.next = progress.next;
            self.offer_unanswered = false;
            if has_sent && !has_advanced {
                return self.handle_stall(now);
            }
        }
        self.next = self.next.max(progress.next);
        (self.next_offer_at, self.offer_interval) = (now + OFFER_INTERVAL_MIN, OFFER_INTERVAL_MIN);
    }

    fn handle_answer(&mut self, answer: &Answer, payload: &PushPayload, now: Instant) {
        // On trial, an answer about the model counts, whichever client requested it. After a restart, a device answers without
        // a transfer.
        let is_about_model = answer.model.sha256 == payload.model.sha256
            && (answer.transfer.is_none() || matches!(self.state, DeliveryState::OnTrial { .. }));
        let is_expected = matches!(
            self.state,
            DeliveryState::Sending { .. } | DeliveryState::Validating { .. } | DeliveryState::OnTrial { .. }
        );
        if !is_expected || !(is_about_model || answer.transfer == Some(self.transfer)) {
            return;
        }
        let reason = answer.reason.clone().unwrap_or_default();
        match answer.status {
            UpdateStatus::Accepted => {
                let trial = answer.trial.map_or(TRIAL_MAX, |limits| Duration::from_secs(limits.seconds));
                self.received = self.chunks;
                (self.next_offer_at, self.offer_interval) = (now + OFFER_INTERVAL_MAX, OFFER_INTERVAL_MAX);
                if !matches!(self.state, DeliveryState::OnTrial { .. }) {
                    self.state = DeliveryState::OnTrial { deadline: now + trial.min(TRIAL_MAX) + TRIAL_MARGIN };
                }
            }
            UpdateStatus::Confirmed => {
                self.received = self.chunks;
                self.finish(DeliveryStatus::Confirmed, reason);
            }
            UpdateStatus::Refused => self.finish(DeliveryStatus::Refused, reason),
            UpdateStatus::RolledBack => self.finish(DeliveryStatus::RolledBack, reason),
        }
    }

    /// Publishes the chunks and the offer that are due, and ends the delivery if its deadline has passed.
    pub fn tick(&mut self, payload: &PushPayload, now: Instant, publish: PublishFn) {
        match self.state {
            DeliveryState::Probing { deadline } => self.probe(payload, now >= deadline),
            DeliveryState::Sending { deadline } if now >= deadline => {
                let seconds = PROGRESS_TIMEOUT.as_secs();
                self.finish(
                    DeliveryStatus::NoAnswer,
                    format!("no progress on {} within {seconds} s", self.topics.progress()),
                );
            }
            DeliveryState::Validating { deadline } if now >= deadline => {
                let seconds = VALIDATION_TIMEOUT.as_secs();
                self.finish(
                    DeliveryStatus::NoAnswer,
                    format!("no answer on {} within {seconds} s", self.topics.answer()),
                );
            }
            DeliveryState::OnTrial { deadline } if now >= deadline => {
                self.finish(
                    DeliveryStatus::NoAnswer,
                    "still on trial: the camera delivers no frames, or the device is disconnected",
                );
            }
            DeliveryState::Sending { .. } | DeliveryState::Validating { .. } | DeliveryState::OnTrial { .. } => {
                if !self.offer_unanswered {
                    self.send_chunks(payload, publish);
                }
                // The device answers a repeated offer with its present state, which replaces a lost message.
                self.publish_offer_if_due(payload, now, publish);
            }
            DeliveryState::Ready | DeliveryState::Done(_) => {}
        }
    }

    /// Evaluates the device's retained messages; with `is_last`, treats those that have not arrived as missing.
    fn probe(&mut self, payload: &PushPayload, is_last: bool) {
        let (status, model) = (self.topics.status(), self.topics.model());
        match (self.online, &self.model_status) {
            (Some(true), Some(Some(model_status))) => match is_needed(payload, model_status) {
                Ok(true) => self.state = DeliveryState::Ready,
                Ok(false) => self.finish(DeliveryStatus::Confirmed, "the model is already active"),
                Err(incompatible) => self.finish(DeliveryStatus::Refused, incompatible.to_string()),
            },
            (Some(false), Some(_)) => self.finish(DeliveryStatus::Offline, ""),
            _ if !is_last => {}
            (None, _) => self.finish(
                DeliveryStatus::Offline,
                format!("nothing is retained on {status}: the device has never been connected"),
            ),
            (Some(false), None) => self.finish(DeliveryStatus::Offline, format!("nothing is retained on {model}")),
            (Some(true), None) => {
                self.finish(DeliveryStatus::Refused, format!("online, but nothing is retained on {model}"));
            }
            (Some(true), Some(None)) => self.finish(
                DeliveryStatus::Refused,
                format!("{model} is not valid: the device runs an older version of bloomcast"),
            ),
        }
    }

    fn publish_offer_if_due(&mut self, payload: &PushPayload, now: Instant, publish: PublishFn) {
        if now < self.next_offer_at {
            return;
        }
        // The command refers to a model that is yet to be received.
        let key = payload.key.as_ref().filter(|_| matches!(self.state, DeliveryState::Sending { .. }));
        let force = key.zip(self.model_status.iter().flatten().next()).map(|(key, status)| {
            SignedCommand::sign(key, Action::Force, self.topics.root(), status.generation, &payload.model.sha256)
        });
        let offer = Offer {
            schema: SCHEMA,
            transfer: self.transfer,
            model: payload.model.clone(),
            bytes: payload.bytes.len() as u64,
            chunk_bytes: self.chunk_bytes,
            force,
        };
        self.chunks = offer.chunks();
        if publish(&self.topics.offer(), json(&offer)) {
            self.offer_unanswered = true;
            self.next_offer_at = now + self.offer_interval;
            self.offer_interval = (self.offer_interval * 2).min(OFFER_INTERVAL_MAX);
        }
    }

    fn send_chunks(&mut self, payload: &PushPayload, publish: PublishFn) {
        while self.next < self.chunks.min(self.received + WINDOW_CHUNKS) {
            let Some(chunk) = transfer::chunk(self.transfer, &payload.bytes, self.chunk_bytes, self.next) else {
                break;
            };
            if !publish(&self.topics.chunk(self.next), chunk) {
                break;
            }
            self.next += 1;
        }
    }
}

/// Returns whether a device needs the model: `false` if it is active and confirmed there.
///
/// # Errors
/// The device needs the model and the preflight check rejects it.
fn is_needed(payload: &PushPayload, status: &ModelStatus) -> Result<bool, Incompatible> {
    if status.model.sha256 == payload.model.sha256 {
        return Ok(status.trial);
    }
    let has_backbone = payload.manifest.members.contains_key(BACKBONE);
    preflight::check(&payload.manifest, has_backbone, status, payload.force).map(|()| true)
}

/// Parses a message's JSON; `None` if it is not valid.
fn parse<T: DeserializeOwned>(message: &[u8]) -> Option<T> {
    serde_json::from_slice(message).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::{BUILT_IN, Bundle};
    use crate::mqtt::DeviceName;
    use crate::update::protocol::{TrialLimits, identity, older_status};
    use crate::update::transfer::{ChunkResult, Transfer};

    /// A delivery to one device, with the published messages that the device has not received.
    struct Harness {
        payload: PushPayload,
        delivery: Delivery,
        published: Vec<(String, Vec<u8>)>,
        now: Instant,
    }

    impl Harness {
        fn new() -> Self {
            let manifest = Bundle::built_in().unwrap().manifest().clone();
            let model = identity(&manifest, Bundle::built_in().unwrap().sha256());
            let payload = PushPayload {
                bytes: BUILT_IN.to_vec(),
                manifest,
                model,
                packet_bytes_max: 65_536,
                force: false,
                key: None,
            };
            let topics = Topics::new("bloomcast", "homeassistant", DeviceName::new("pi").unwrap());
            let now = Instant::now();
            Harness { delivery: Delivery::new(topics, &payload, now), payload, published: Vec::new(), now }
        }

        fn older_status(&self) -> ModelStatus {
            older_status(&self.payload.manifest)
        }

        fn handle(&mut self, topic: &str, message: &[u8]) {
            self.delivery.handle(topic, message, &self.payload, self.now);
            self.tick();
        }

        fn tick(&mut self) {
            let published = &mut self.published;
            self.delivery.tick(&self.payload, self.now, &mut |topic, message| {
                published.push((topic.to_owned(), message));
                true
            });
        }

        /// Starts the delivery and publishes the first offer.
        fn start(&mut self) {
            self.handle("bloomcast/pi/status", b"online");
            let status = json(&self.older_status());
            self.handle("bloomcast/pi/model", &status);
            assert!(self.delivery.is_ready());
            self.delivery.start(&self.payload, self.now);
            self.tick();
        }

        /// Takes the oldest message, which is an offer.
        fn take_offer(&mut self) -> Offer {
            let (topic, message) = self.published.remove(0);
            assert_eq!(topic, "bloomcast/pi/model/offer");
            serde_json::from_slice(&message).unwrap()
        }

        /// Delivers the published chunks to the device, except those for which `is_lost` holds; returns the complete bundle.
        fn deliver(&mut self, device: &mut Transfer, mut is_lost: impl FnMut(u32) -> bool) -> Option<Vec<u8>> {
            for (topic, message) in std::mem::take(&mut self.published) {
                let Some(number) = topic.strip_prefix("bloomcast/pi/model/chunk/") else { continue };
                let number = number.parse().unwrap();
                let result =
                    if is_lost(number) { ChunkResult::Accepted } else { device.take(number, &message, self.now) };
                match result {
                    ChunkResult::Complete(bytes) => {
                        self.report_progress(device, false);
                        return Some(bytes);
                    }
                    ChunkResult::Progress => self.report_progress(device, false),
                    ChunkResult::Gap => self.report_progress(device, true),
                    _ => {}
                }
            }
            None
        }

        fn report_progress(&mut self, device: &Transfer, resend: bool) {
            self.handle("bloomcast/pi/model/progress", &json(&device.progress(resend)));
        }

        fn answer(&mut self, status: UpdateStatus, reason: Option<&str>) {
            let answer = Answer {
                schema: SCHEMA,
                device: "pi".into(),
                transfer: Some(self.delivery.transfer),
                status,
                reason: reason.map(str::to_owned),
                model: self.payload.model.clone(),
                trial: Some(TrialLimits { frames: 10, seconds: 5 }),
                at: String::new(),
            };
            self.handle("bloomcast/pi/model/answer", &json(&answer));
        }

        fn final_status(&self) -> Option<DeliveryStatus> {
            self.delivery.outcome().map(|outcome| outcome.status)
        }
    }

    fn device(offer: Offer, now: Instant) -> Transfer {
        Transfer::new(offer, 16 << 20, now).unwrap()
    }

    #[test]
    fn sends_chunks_within_the_window_until_the_model_is_confirmed() {
        let mut push = Harness::new();
        push.start();
        let mut device = device(push.take_offer(), push.now);
        push.report_progress(&device, true);
        assert_eq!(push.published.len(), WINDOW_CHUNKS as usize, "no more chunks are in flight");
        let bundle = (0..100).find_map(|_| push.deliver(&mut device, |_| false));
        assert_eq!(bundle.unwrap(), BUILT_IN);
        assert_eq!(push.delivery.progress().0, "validating");
        push.answer(UpdateStatus::Accepted, None);
        assert_eq!(push.delivery.progress().0, "on trial");
        push.answer(UpdateStatus::Confirmed, None);
        assert_eq!((push.final_status(), push.delivery.has_failed()), (Some(DeliveryStatus::Confirmed), false));
    }

    #[test]
    fn sends_lost_chunks_again() {
        let mut push = Harness::new();
        push.start();
        let mut device = device(push.take_offer(), push.now);
        push.report_progress(&device, true);
        // Loses a chunk in the middle, which the device detects, and the last one, which only a timeout detects.
        let last = push.delivery.chunks - 1;
        let mut losses = 0u32;
        let bundle = loop {
            let bundle = push.deliver(&mut device, |number| {
                let lose = losses < 1 && number == 2 || losses < 3 && number == last;
                losses += u32::from(lose);
                lose
            });
            if let Some(bundle) = bundle {
                break bundle;
            }
            if push.published.is_empty() {
                push.now += OFFER_INTERVAL_MIN;
                push.tick();
                assert!(
                    push.published.iter().any(|(topic, _)| topic.ends_with("/offer")),
                    "an offer requests the progress"
                );
                push.published.clear();
                push.report_progress(&device, true);
            }
        };
        assert_eq!((bundle.as_slice(), losses), (BUILT_IN, 3));
    }

    #[test]
    fn halves_the_chunk_size_while_chunks_do_not_arrive_and_gives_up_at_the_smallest() {
        // The broker closes the connection, or drops the chunk.
        for closes in [true, false] {
            let mut push = Harness::new();
            push.start();
            let mut sizes = Vec::new();
            while push.final_status().is_none() {
                let offer = push.take_offer();
                if sizes.last() != Some(&offer.chunk_bytes) {
                    sizes.push(offer.chunk_bytes);
                }
                push.report_progress(&device(offer, push.now), true);
                push.published.clear();
                match closes {
                    true => push.delivery.reconnected(push.now),
                    false => push.now = push.delivery.next_offer_at,
                }
                push.tick();
                assert!(sizes.len() < 20);
            }
            assert!(sizes.windows(2).all(|pair| pair[1] == pair[0] / 2) && sizes.len() > 5, "{sizes:?}");
            let reason = &push.delivery.outcome().unwrap().reason;
            assert_eq!(push.final_status(), Some(DeliveryStatus::NoAnswer));
            assert!(
                reason.contains("pi/model/chunk/0 do not arrive; check the broker's message size limit"),
                "{reason}"
            );
        }
    }

    #[test]
    fn gives_up_after_the_device_restarts_the_transfer_several_times() {
        let mut push = Harness::new();
        push.start();
        for restart in 0..RESTARTS_MAX {
            assert_eq!(push.final_status(), None, "{restart}");
            let mut device = device(push.take_offer(), push.now);
            push.report_progress(&device, true);
            while push.final_status().is_none() && push.deliver(&mut device, |_| false).is_none() {}
            push.now += OFFER_INTERVAL_MAX;
            push.tick();
        }
        let device = device(push.take_offer(), push.now);
        push.report_progress(&device, true);
        assert_eq!(push.final_status(), Some(DeliveryStatus::NoAnswer));
        assert!(push.delivery.has_failed());
    }

    #[test]
    fn reconnecting_extends_the_deadlines() {
        let mut push = Harness::new();
        push.start();
        push.now += 2 * PROGRESS_TIMEOUT;
        push.delivery.reconnected(push.now);
        push.tick();
        push.answer(UpdateStatus::Accepted, None);
        push.now += Duration::from_secs(3600);
        push.delivery.reconnected(push.now);
        push.tick();
        assert_eq!(push.final_status(), None);
        push.answer(UpdateStatus::Confirmed, None);
        assert_eq!(push.final_status(), Some(DeliveryStatus::Confirmed));
    }

    #[test]
    fn distinguishes_an_offline_device_from_an_unresponsive_one() {
        let mut absent = Harness::new();
        absent.now += PROBE_TIMEOUT;
        absent.tick();
        assert_eq!(absent.final_status(), Some(DeliveryStatus::Offline));
        let mut offline = Harness::new();
        offline.handle("bloomcast/pi/status", b"offline");
        let status = json(&offline.older_status());
        offline.handle("bloomcast/pi/model", &status);
        assert_eq!((offline.final_status(), offline.delivery.has_failed()), (Some(DeliveryStatus::Offline), false));
        let mut gone = Harness::new();
        gone.handle("bloomcast/pi/status", b"online");
        gone.handle("bloomcast/pi/model", &status);
        gone.handle("bloomcast/pi/status", b"offline");
        gone.delivery.start(&gone.payload, gone.now);
        assert_eq!(gone.final_status(), Some(DeliveryStatus::Offline), "it disconnected before the delivery started");
        let mut unresponsive = Harness::new();
        unresponsive.start();
        for _ in 0..=PROGRESS_TIMEOUT.as_secs() {
            unresponsive.now += Duration::from_secs(1);
            unresponsive.tick();
        }
        assert_eq!(unresponsive.final_status(), Some(DeliveryStatus::NoAnswer));
        // Offers at 0, 3, 9, 21 and 45 seconds.
        assert_eq!(unresponsive.published.len(), 5);
    }

    #[test]
    fn ignores_answers_to_other_transfers_until_the_model_is_on_trial() {
        let mut push = Harness::new();
        push.start();
        let answer = Answer {
            schema: SCHEMA,
            device: "pi".into(),
            transfer: Some(Uuid::from_u128(9)),
            status: UpdateStatus::Refused,
            reason: None,
            model: push.payload.model.clone(),
            trial: Some(TrialLimits { frames: 1, seconds: u64::MAX }),
            at: String::new(),
        };
        push.handle("bloomcast/pi/model/answer", &json(&answer));
        push.handle("bloomcast/pi/model/answer", b"rubbish");
        assert_eq!(push.final_status(), None);
        let accepted =
            Answer { transfer: Some(push.delivery.transfer), status: UpdateStatus::Accepted, ..answer.clone() };
        push.handle("bloomcast/pi/model/answer", &json(&accepted));
        let rolled_back = Answer { status: UpdateStatus::RolledBack, ..answer };
        push.handle("bloomcast/pi/model/answer", &json(&rolled_back));
        assert_eq!(push.final_status(), Some(DeliveryStatus::RolledBack), "requested by another client");
    }
}
