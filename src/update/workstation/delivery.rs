//! One device's part of a push, from the first look at it to its last word. Pure: messages and time come in, messages go
//! out.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::preflight::{self, Incompatible};
use crate::bundle::{BACKBONE, Identity, Manifest, PrivateKey};
use crate::mqtt::message::{ONLINE, SCHEMA, json};
use crate::mqtt::topics::Topics;
use crate::update::protocol::{Action, Answer, ModelStatus, Offer, Progress, SignedOrder, UpdateStatus};
use crate::update::transfer;

/// How long the retained messages of a device that is there may take.
const LOOK: Duration = Duration::from_secs(3);
/// An offer that nothing came of for so long is repeated, and then after twice the time, up to the longest.
const REPEAT: Duration = Duration::from_secs(3);
const REPEAT_MAX: Duration = Duration::from_secs(24);
/// How long nothing may arrive, and a model may take to prove itself: a large network on a small device.
const PATIENCE: Duration = Duration::from_secs(60);
const PROOF: Duration = Duration::from_secs(300);
/// What a trial may take, and beyond that.
const TRIAL_MAX: Duration = Duration::from_secs(86_400);
const TRIAL_MARGIN: Duration = Duration::from_secs(30);
/// Pieces under way that the device has not told of.
const WINDOW: u32 = 3 * transfer::PROGRESS_EVERY;
/// Times that pieces were sent in vain before smaller ones are tried, and that a device began anew before it is left in peace.
const VAIN_MAX: u32 = 3;
/// Messages smaller than these are no broker's limit.
const HALVED_MIN: u32 = 1024;

/// What is sent.
pub struct PushPayload {
    pub bytes: Vec<u8>,
    pub manifest: Manifest,
    pub model: Identity,
    /// The largest message that the broker takes.
    pub packet_bytes_max: usize,
    /// Sends a model that is a step back.
    pub force: bool,
    /// What signs the order to take a model that is not newer.
    pub key: Option<PrivateKey>,
}

/// How it ended for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeliveryStatus {
    Confirmed,
    /// It would be sent (`--dry-run`).
    Fit,
    /// By the gate, before anything was sent, or by the device.
    Refused,
    RolledBack,
    Offline,
    /// It was sent, and no answer came.
    Silent,
    /// Not begun, since another device failed.
    Stopped,
}

impl DeliveryStatus {
    /// As it stands in tables.
    pub fn word(self) -> &'static str {
        match self {
            DeliveryStatus::Confirmed => "confirmed",
            DeliveryStatus::Fit => "fit",
            DeliveryStatus::Refused => "refused",
            DeliveryStatus::RolledBack => "rolled back",
            DeliveryStatus::Offline => "offline",
            DeliveryStatus::Silent => "no answer",
            DeliveryStatus::Stopped => "not begun",
        }
    }

    pub fn is_good(self) -> bool {
        matches!(self, DeliveryStatus::Confirmed | DeliveryStatus::Fit)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub ending: DeliveryStatus,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// For the device's retained messages.
    Looking {
        until: Instant,
    },
    /// It is there, and waits for its turn.
    Ready,
    /// Pieces go, or will go once the offer is answered.
    Sending {
        until: Instant,
    },
    /// All has arrived; the model proves itself.
    Proving {
        until: Instant,
    },
    OnTrial {
        until: Instant,
    },
    Done(Outcome),
}

pub struct Delivery {
    pub topics: Topics,
    stage: Stage,
    /// Something was sent to it.
    begun: bool,
    online: Option<bool>,
    note: Option<Option<ModelStatus>>,
    transfer: Uuid,
    chunk_bytes: u32,
    chunks: u32,
    /// Pieces that the device has, and the most it ever had.
    there: u32,
    most: u32,
    /// The piece that goes next.
    next: u32,
    /// An offer is under way. Whatever was sent before it has arrived once it is answered, or never will; until then nothing else
    /// is sent.
    asking: bool,
    /// When the offer is made again, and after how long once more.
    repeat: Instant,
    pause: Duration,
    /// Times that pieces were sent and none arrived; that the device had fewer than before.
    in_vain: u32,
    lost: u32,
}

/// Puts a message on its way; false where there is no room at the moment.
pub type Send<'a> = &'a mut dyn FnMut(&str, Vec<u8>) -> bool;

impl Delivery {
    pub fn new(topics: Topics, parcel: &PushPayload, now: Instant) -> Self {
        let longest = topics.chunk(u32::MAX).len();
        Delivery {
            topics,
            stage: Stage::Looking { until: now + LOOK },
            begun: false,
            online: None,
            note: None,
            transfer: Uuid::now_v7(),
            chunk_bytes: transfer::chunk_bytes(parcel.packet_bytes_max, longest),
            chunks: 0,
            there: 0,
            most: 0,
            next: 0,
            asking: true,
            repeat: now,
            pause: REPEAT,
            in_vain: 0,
            lost: 0,
        }
    }

    /// The topics that a device is listened to on.
    pub fn filters(topics: &Topics) -> [String; 4] {
        [topics.status(), topics.model(), topics.answer(), topics.progress()]
    }

    pub fn is_looking(&self) -> bool {
        matches!(self.stage, Stage::Looking { .. })
    }

    pub fn is_ready(&self) -> bool {
        self.stage == Stage::Ready
    }

    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.stage {
            Stage::Done(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Whether the model was sent and did not stay. A device that is not there says nothing about the model.
    pub fn has_failed(&self) -> bool {
        let bad = |outcome: &Outcome| !outcome.ending.is_good() && outcome.ending != DeliveryStatus::Offline;
        self.begun && self.outcome().is_some_and(bad)
    }

    /// What it is at, in a word or two, and how much has arrived of how much.
    pub fn shown(&self) -> (String, u32, u32) {
        let word = match &self.stage {
            Stage::Looking { .. } => "looking".into(),
            Stage::Ready => "waiting".into(),
            Stage::Sending { .. } => "sending".into(),
            Stage::Proving { .. } => "proving itself".into(),
            Stage::OnTrial { .. } => "on trial".into(),
            Stage::Done(Outcome { ending, reason }) if reason.is_empty() => ending.word().into(),
            Stage::Done(Outcome { ending, reason }) => format!("{}: {reason}", ending.word()),
        };
        (word, self.there, self.chunks)
    }

    /// Begins to send, should the device still be as it was when it was looked at.
    pub fn begin(&mut self, parcel: &PushPayload, now: Instant) {
        self.look(parcel, true);
        if self.is_ready() {
            self.begun = true;
            self.stage = Stage::Sending { until: now + PATIENCE };
            self.ask(now);
        }
    }

    pub fn end(&mut self, ending: DeliveryStatus, reason: impl Into<String>) {
        self.stage = Stage::Done(Outcome { ending, reason: reason.into() });
    }

    /// A connection began, after a while perhaps; what was under way on the one before may be lost.
    pub fn connected(&mut self, now: Instant) {
        match &mut self.stage {
            Stage::Looking { until } => *until = now + LOOK,
            Stage::Sending { until } => {
                *until = now + PATIENCE;
                self.sent_in_vain(now);
            }
            Stage::Proving { until } => *until = (*until).max(now + PATIENCE),
            Stage::OnTrial { until } => *until = (*until).max(now + TRIAL_MARGIN),
            Stage::Ready | Stage::Done(_) => {}
        }
        self.ask(now);
    }

    /// Makes the offer at once; its answer tells where the device is.
    fn ask(&mut self, now: Instant) {
        (self.asking, self.repeat, self.pause) = (true, now, REPEAT);
    }

    /// Perhaps the broker takes no messages as large as these, and says so by breaking the connection, or not at all.
    fn sent_in_vain(&mut self, now: Instant) {
        self.in_vain += 1;
        if self.in_vain < VAIN_MAX {
            return;
        }
        if self.chunk_bytes / 2 < HALVED_MIN {
            let topic = self.topics.chunk(self.there);
            return self.end(
                DeliveryStatus::Silent,
                format!("what is sent to {topic} does not arrive; see the broker's limits and its ACL"),
            );
        }
        (self.chunk_bytes, self.in_vain) = (self.chunk_bytes / 2, 0);
        (self.there, self.most, self.next) = (0, 0, 0);
        self.stage = Stage::Sending { until: now + PATIENCE };
        self.ask(now);
    }

    /// A message on one of its topics.
    pub fn hear(&mut self, topic: &str, payload: &[u8], parcel: &PushPayload, now: Instant) {
        if topic == self.topics.status() {
            self.online = Some(payload == ONLINE.as_bytes());
        } else if topic == self.topics.model() {
            self.note = Some(read(payload));
        } else if topic == self.topics.progress() {
            read(payload).into_iter().for_each(|progress| self.progress(&progress, now));
        } else if topic == self.topics.answer() {
            read(payload).into_iter().for_each(|answer| self.answer(&answer, parcel, now));
        }
    }

    fn progress(&mut self, progress: &Progress, now: Instant) {
        if progress.transfer != self.transfer || progress.chunks != self.chunks || progress.next > self.chunks {
            return;
        }
        let anew = progress.again && progress.next == 0;
        // After a broken connection a device may say once more what it said before.
        let stale = !progress.again && progress.next < self.there;
        match self.stage {
            Stage::Sending { .. } if !stale => {}
            Stage::Proving { .. } if progress.again => {}
            // It is being received again: it decides no more.
            Stage::OnTrial { .. } if anew => return self.end(DeliveryStatus::RolledBack, "why was not heard"),
            _ => return,
        }
        if anew && self.there > 0 {
            self.lost += 1;
            if self.lost == VAIN_MAX {
                return self.end(DeliveryStatus::Silent, "the device began anew each time");
            }
        }
        let (advanced, sent) = (progress.next > self.most, self.next > self.there);
        self.there = progress.next;
        self.most = self.most.max(self.there);
        if progress.next == self.chunks {
            self.stage = Stage::Proving { until: now + PROOF };
            (self.asking, self.repeat, self.pause) = (true, now + REPEAT_MAX, REPEAT_MAX);
            return;
        }
        if advanced {
            self.in_vain = 0;
        }
        if advanced || !matches!(self.stage, Stage::Sending { .. }) {
            self.stage = Stage::Sending { until: now + PATIENCE };
        }
        if progress.again {
            self.next = progress.next;
            self.asking = false;
            if sent && !advanced {
                return self.sent_in_vain(now);
            }
        }
        self.next = self.next.max(progress.next);
        (self.repeat, self.pause) = (now + REPEAT, REPEAT);
    }

    fn answer(&mut self, answer: &Answer, parcel: &PushPayload, now: Instant) {
        // What becomes of it on trial concerns us, whoever asked; a device that was started anew knows not who did.
        let about_it = answer.model.sha256 == parcel.model.sha256
            && (answer.transfer.is_none() || matches!(self.stage, Stage::OnTrial { .. }));
        let waits = matches!(self.stage, Stage::Sending { .. } | Stage::Proving { .. } | Stage::OnTrial { .. });
        if !waits || !(about_it || answer.transfer == Some(self.transfer)) {
            return;
        }
        let reason = answer.reason.clone().unwrap_or_default();
        match answer.answer {
            UpdateStatus::Accepted => {
                let terms = answer.trial.map_or(TRIAL_MAX, |terms| Duration::from_secs(terms.seconds));
                self.there = self.chunks;
                (self.repeat, self.pause) = (now + REPEAT_MAX, REPEAT_MAX);
                if !matches!(self.stage, Stage::OnTrial { .. }) {
                    self.stage = Stage::OnTrial { until: now + terms.min(TRIAL_MAX) + TRIAL_MARGIN };
                }
            }
            UpdateStatus::Confirmed => {
                self.there = self.chunks;
                self.end(DeliveryStatus::Confirmed, reason);
            }
            UpdateStatus::Refused => self.end(DeliveryStatus::Refused, reason),
            UpdateStatus::RolledBack => self.end(DeliveryStatus::RolledBack, reason),
        }
    }

    /// Does what is due.
    pub fn step(&mut self, parcel: &PushPayload, now: Instant, send: Send) {
        match self.stage {
            Stage::Looking { until } => self.look(parcel, now >= until),
            Stage::Sending { until } if now >= until => {
                let seconds = PATIENCE.as_secs();
                self.end(DeliveryStatus::Silent, format!("nothing on {} for {seconds} s", self.topics.progress()));
            }
            Stage::Proving { until } if now >= until => {
                let seconds = PROOF.as_secs();
                self.end(DeliveryStatus::Silent, format!("nothing on {} for {seconds} s", self.topics.answer()));
            }
            Stage::OnTrial { until } if now >= until => {
                self.end(
                    DeliveryStatus::Silent,
                    "it is still on trial: the camera gives no frames, or the device is gone",
                );
            }
            Stage::Sending { .. } | Stage::Proving { .. } | Stage::OnTrial { .. } => {
                if !self.asking {
                    self.send_pieces(parcel, send);
                }
                // Whoever asks is told how it stands, should a word have been lost.
                self.offer(parcel, now, send);
            }
            Stage::Ready | Stage::Done(_) => {}
        }
    }

    /// `last`: what has not been heard by now will not be.
    fn look(&mut self, parcel: &PushPayload, last: bool) {
        let (status, model) = (self.topics.status(), self.topics.model());
        match (self.online, &self.note) {
            (Some(true), Some(Some(note))) => match fit(parcel, note) {
                Ok(None) => self.stage = Stage::Ready,
                Ok(Some(already)) => self.end(DeliveryStatus::Confirmed, already),
                Err(gate) => self.end(DeliveryStatus::Refused, gate.to_string()),
            },
            (Some(false), Some(_)) => self.end(DeliveryStatus::Offline, ""),
            _ if !last => {}
            (None, _) => {
                self.end(DeliveryStatus::Offline, format!("nothing is retained on {status}: it was never here"))
            }
            (Some(false), None) => self.end(DeliveryStatus::Offline, format!("nothing is retained on {model}")),
            (Some(true), None) => {
                self.end(DeliveryStatus::Refused, format!("it is online, but nothing is retained on {model}"))
            }
            (Some(true), Some(None)) => {
                self.end(
                    DeliveryStatus::Refused,
                    format!("{model} cannot be read: its program is older than this one"),
                );
            }
        }
    }

    fn offer(&mut self, parcel: &PushPayload, now: Instant, send: Send) {
        if now < self.repeat {
            return;
        }
        // An order is for a model that is to come, not for one that is there.
        let wanted = parcel.key.as_ref().filter(|_| matches!(self.stage, Stage::Sending { .. }));
        let force = wanted.zip(self.note.iter().flatten().next()).map(|(key, note)| {
            SignedOrder::sign(key, Action::Force, self.topics.root(), note.generation, &parcel.model.sha256)
        });
        let offer = Offer {
            schema: SCHEMA,
            transfer: self.transfer,
            model: parcel.model.clone(),
            bytes: parcel.bytes.len() as u64,
            chunk_bytes: self.chunk_bytes,
            force,
        };
        self.chunks = offer.chunks();
        if send(&self.topics.offer(), json(&offer)) {
            self.asking = true;
            self.repeat = now + self.pause;
            self.pause = (self.pause * 2).min(REPEAT_MAX);
        }
    }

    fn send_pieces(&mut self, parcel: &PushPayload, send: Send) {
        while self.next < self.chunks.min(self.there + WINDOW) {
            let Some(piece) = transfer::piece(self.transfer, &parcel.bytes, self.chunk_bytes, self.next) else { break };
            if !send(&self.topics.chunk(self.next), piece) {
                break;
            }
            self.next += 1;
        }
    }
}

/// Why a model would not be sent; or why it need not.
fn fit(parcel: &PushPayload, note: &ModelStatus) -> Result<Option<&'static str>, Incompatible> {
    if note.model.sha256 == parcel.model.sha256 {
        return Ok((!note.trial).then_some("it decides already"));
    }
    let carries = parcel.manifest.members.contains_key(BACKBONE);
    preflight::check(&parcel.manifest, carries, note, parcel.force).map(|()| None)
}

/// What cannot be read is nobody's.
fn read<T: DeserializeOwned>(payload: &[u8]) -> Option<T> {
    serde_json::from_slice(payload).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::{BUILT_IN, Bundle};
    use crate::mqtt::topics::DeviceName;
    use crate::update::protocol::{TrialLimits, identity, older_note};
    use crate::update::transfer::{ChunkResult, Transfer};

    /// A push to one device, with the messages that wait to be delivered to it.
    struct Push {
        parcel: PushPayload,
        delivery: Delivery,
        sent: Vec<(String, Vec<u8>)>,
        now: Instant,
    }

    impl Push {
        fn new() -> Self {
            let manifest = Bundle::built_in().unwrap().manifest().clone();
            let model = identity(&manifest, Bundle::built_in().unwrap().sha256());
            let parcel = PushPayload {
                bytes: BUILT_IN.to_vec(),
                manifest,
                model,
                packet_bytes_max: 65_536,
                force: false,
                key: None,
            };
            let topics = Topics::new("bloomcast", "homeassistant", DeviceName::new("pi").unwrap());
            let now = Instant::now();
            Push { delivery: Delivery::new(topics, &parcel, now), parcel, sent: Vec::new(), now }
        }

        fn note(&self) -> ModelStatus {
            older_note(&self.parcel.manifest)
        }

        fn hear(&mut self, topic: &str, payload: &[u8]) {
            self.delivery.hear(topic, payload, &self.parcel, self.now);
            self.step();
        }

        fn step(&mut self) {
            let sent = &mut self.sent;
            self.delivery.step(&self.parcel, self.now, &mut |topic, payload| {
                sent.push((topic.to_owned(), payload));
                true
            });
        }

        /// Until the offer was made.
        fn begin(&mut self) {
            self.hear("bloomcast/pi/status", b"online");
            let note = json(&self.note());
            self.hear("bloomcast/pi/model", &note);
            assert!(self.delivery.is_ready());
            self.delivery.begin(&self.parcel, self.now);
            self.step();
        }

        fn offer(&mut self) -> Offer {
            let (topic, payload) = self.sent.remove(0);
            assert_eq!(topic, "bloomcast/pi/model/offer");
            serde_json::from_slice(&payload).unwrap()
        }

        /// Hands what was sent to the device, but for what `lost` says; gives the whole once it is there.
        fn deliver(&mut self, device: &mut Transfer, mut lost: impl FnMut(u32) -> bool) -> Option<Vec<u8>> {
            for (topic, payload) in std::mem::take(&mut self.sent) {
                let Some(number) = topic.strip_prefix("bloomcast/pi/model/chunk/") else { continue };
                let number = number.parse().unwrap();
                let taken = if lost(number) { ChunkResult::Quiet } else { device.take(number, &payload, self.now) };
                match taken {
                    ChunkResult::Whole(bytes) => {
                        self.told(device, false);
                        return Some(bytes);
                    }
                    ChunkResult::Progress => self.told(device, false),
                    ChunkResult::Gap => self.told(device, true),
                    _ => {}
                }
            }
            None
        }

        fn told(&mut self, device: &Transfer, again: bool) {
            self.hear("bloomcast/pi/model/progress", &json(&device.progress(again)));
        }

        fn answered(&mut self, verdict: UpdateStatus, reason: Option<&str>) {
            let answer = Answer {
                schema: SCHEMA,
                device: "pi".into(),
                transfer: Some(self.delivery.transfer),
                answer: verdict,
                reason: reason.map(str::to_owned),
                model: self.parcel.model.clone(),
                trial: Some(TrialLimits { frames: 10, seconds: 5 }),
                at: String::new(),
            };
            self.hear("bloomcast/pi/model/answer", &json(&answer));
        }

        fn ending(&self) -> Option<DeliveryStatus> {
            self.delivery.outcome().map(|outcome| outcome.ending)
        }
    }

    fn device(offer: Offer, now: Instant) -> Transfer {
        Transfer::new(offer, 16 << 20, now).unwrap()
    }

    #[test]
    fn a_model_goes_in_a_window_of_pieces_and_is_confirmed() {
        let mut push = Push::new();
        push.begin();
        let mut device = device(push.offer(), push.now);
        push.told(&device, true);
        assert_eq!(push.sent.len(), WINDOW as usize, "no more is under way");
        let whole = (0..100).find_map(|_| push.deliver(&mut device, |_| false));
        assert_eq!(whole.unwrap(), BUILT_IN);
        assert_eq!(push.delivery.shown().0, "proving itself");
        push.answered(UpdateStatus::Accepted, None);
        assert_eq!(push.delivery.shown().0, "on trial");
        push.answered(UpdateStatus::Confirmed, None);
        assert_eq!((push.ending(), push.delivery.has_failed()), (Some(DeliveryStatus::Confirmed), false));
    }

    #[test]
    fn lost_pieces_are_sent_again() {
        let mut push = Push::new();
        push.begin();
        let mut device = device(push.offer(), push.now);
        push.told(&device, true);
        // Lost in the middle, which the device notices, and at the end, which only time tells.
        let last = push.delivery.chunks - 1;
        let mut losses = 0u32;
        let whole = loop {
            let whole = push.deliver(&mut device, |number| {
                let lose = losses < 1 && number == 2 || losses < 3 && number == last;
                losses += u32::from(lose);
                lose
            });
            if let Some(whole) = whole {
                break whole;
            }
            if push.sent.is_empty() {
                push.now += REPEAT;
                push.step();
                assert!(push.sent.iter().any(|(topic, _)| topic.ends_with("/offer")), "asks where the device is");
                push.sent.clear();
                push.told(&device, true);
            }
        };
        assert_eq!((whole.as_slice(), losses), (BUILT_IN, 3));
    }

    #[test]
    fn a_broker_that_takes_no_large_messages_gets_smaller_ones_and_at_last_is_told_of() {
        // It breaks the connection, or keeps the piece and says nothing.
        for breaks in [true, false] {
            let mut push = Push::new();
            push.begin();
            let mut sizes = Vec::new();
            while push.ending().is_none() {
                let offer = push.offer();
                if sizes.last() != Some(&offer.chunk_bytes) {
                    sizes.push(offer.chunk_bytes);
                }
                push.told(&device(offer, push.now), true);
                push.sent.clear();
                match breaks {
                    true => push.delivery.connected(push.now),
                    false => push.now = push.delivery.repeat,
                }
                push.step();
                assert!(sizes.len() < 20);
            }
            assert!(sizes.windows(2).all(|pair| pair[1] == pair[0] / 2) && sizes.len() > 5, "{sizes:?}");
            let reason = &push.delivery.outcome().unwrap().reason;
            assert_eq!(push.ending(), Some(DeliveryStatus::Silent));
            assert!(reason.contains("pi/model/chunk/0 does not arrive; see the broker's limits"), "{reason}");
        }
    }

    #[test]
    fn a_device_that_dies_of_the_model_is_left_in_peace() {
        let mut push = Push::new();
        push.begin();
        for death in 0..VAIN_MAX {
            assert_eq!(push.ending(), None, "{death}");
            let mut device = device(push.offer(), push.now);
            push.told(&device, true);
            while push.ending().is_none() && push.deliver(&mut device, |_| false).is_none() {}
            push.now += REPEAT_MAX;
            push.step();
        }
        let device = device(push.offer(), push.now);
        push.told(&device, true);
        assert_eq!(push.ending(), Some(DeliveryStatus::Silent));
        assert!(push.delivery.has_failed());
    }

    #[test]
    fn a_broker_that_is_long_away_costs_nobody_their_patience() {
        let mut push = Push::new();
        push.begin();
        push.now += 2 * PATIENCE;
        push.delivery.connected(push.now);
        push.step();
        push.answered(UpdateStatus::Accepted, None);
        push.now += Duration::from_secs(3600);
        push.delivery.connected(push.now);
        push.step();
        assert_eq!(push.ending(), None);
        push.answered(UpdateStatus::Confirmed, None);
        assert_eq!(push.ending(), Some(DeliveryStatus::Confirmed));
    }

    #[test]
    fn who_is_not_there_and_who_says_nothing_is_told_apart() {
        let mut absent = Push::new();
        absent.now += LOOK;
        absent.step();
        assert_eq!(absent.ending(), Some(DeliveryStatus::Offline));
        let mut off = Push::new();
        off.hear("bloomcast/pi/status", b"offline");
        let note = json(&off.note());
        off.hear("bloomcast/pi/model", &note);
        assert_eq!((off.ending(), off.delivery.has_failed()), (Some(DeliveryStatus::Offline), false));
        let mut gone = Push::new();
        gone.hear("bloomcast/pi/status", b"online");
        gone.hear("bloomcast/pi/model", &note);
        gone.hear("bloomcast/pi/status", b"offline");
        gone.delivery.begin(&gone.parcel, gone.now);
        assert_eq!(gone.ending(), Some(DeliveryStatus::Offline), "it went while it waited for its turn");
        let mut silent = Push::new();
        silent.begin();
        for _ in 0..=PATIENCE.as_secs() {
            silent.now += Duration::from_secs(1);
            silent.step();
        }
        assert_eq!(silent.ending(), Some(DeliveryStatus::Silent));
        // At 0, 3, 9, 21 and 45 seconds.
        assert_eq!(silent.sent.len(), 5);
    }

    #[test]
    fn what_the_device_says_of_the_model_ends_it_and_what_others_are_told_does_not() {
        let mut push = Push::new();
        push.begin();
        let answer = Answer {
            schema: SCHEMA,
            device: "pi".into(),
            transfer: Some(Uuid::from_u128(9)),
            answer: UpdateStatus::Refused,
            reason: None,
            model: push.parcel.model.clone(),
            trial: Some(TrialLimits { frames: 1, seconds: u64::MAX }),
            at: String::new(),
        };
        push.hear("bloomcast/pi/model/answer", &json(&answer));
        push.hear("bloomcast/pi/model/answer", b"rubbish");
        assert_eq!(push.ending(), None);
        let accepted =
            Answer { transfer: Some(push.delivery.transfer), answer: UpdateStatus::Accepted, ..answer.clone() };
        push.hear("bloomcast/pi/model/answer", &json(&accepted));
        let taken_back = Answer { answer: UpdateStatus::RolledBack, ..answer };
        push.hear("bloomcast/pi/model/answer", &json(&taken_back));
        assert_eq!(push.ending(), Some(DeliveryStatus::RolledBack), "whoever took it back");
    }
}
