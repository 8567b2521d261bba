//! One device's part of a push, from the first look at it to its last word. Pure: messages and time come in, messages go
//! out.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::gate;
use super::message::{Action, Answer, Identity, Note, Offer, Progress, SignedOrder, Terms, Verdict};
use super::transfer;
use crate::bundle::{BACKBONE, Manifest, PrivateKey};
use crate::mqtt::message::{ONLINE, SCHEMA, json};
use crate::mqtt::topics::Topics;

/// How long the retained messages of a device that is there may take.
const LOOK: Duration = Duration::from_secs(3);
/// An offer, or a piece, that nothing came of for so long is repeated.
const REPEAT: Duration = Duration::from_secs(3);
/// How long a device may be silent while it should answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a trial may take beyond its terms.
const TRIAL_MARGIN: Duration = Duration::from_secs(30);
/// Pieces under way that the device has not told of.
const WINDOW: u32 = 3 * transfer::PROGRESS_EVERY;
/// Connections that broke with nothing gained before smaller pieces are tried.
const BREAKS_MAX: u32 = 2;

/// What is sent.
pub struct Parcel {
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
pub enum Ending {
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

impl Ending {
    /// As it stands in tables.
    pub fn word(self) -> &'static str {
        match self {
            Ending::Confirmed => "confirmed",
            Ending::Fit => "fit",
            Ending::Refused => "refused",
            Ending::RolledBack => "rolled back",
            Ending::Offline => "offline",
            Ending::Silent => "no answer",
            Ending::Stopped => "not begun",
        }
    }

    pub fn is_good(self) -> bool {
        matches!(self, Ending::Confirmed | Ending::Fit)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub ending: Ending,
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
    /// The offer was made; no word yet.
    Offering {
        until: Instant,
    },
    Sending,
    /// All is sent; the model proves itself.
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
    online: Option<bool>,
    note: Option<Note>,
    transfer: Uuid,
    chunk_bytes: u32,
    /// Pieces that the device has.
    there: u32,
    /// The piece that goes next.
    next: u32,
    chunks: u32,
    /// When something last came of what was sent, and when it is repeated.
    heard: Instant,
    repeat: Instant,
    /// Connections that broke since a piece arrived.
    breaks: u32,
}

/// Puts a message on its way; false where there is no room at the moment.
pub type Send<'a> = &'a mut dyn FnMut(&str, Vec<u8>) -> bool;

impl Delivery {
    pub fn new(topics: Topics, parcel: &Parcel, now: Instant) -> Self {
        let longest = topics.chunk(u32::MAX).len();
        Delivery {
            topics,
            stage: Stage::Looking { until: now + LOOK },
            online: None,
            note: None,
            transfer: Uuid::now_v7(),
            chunk_bytes: transfer::chunk_bytes(parcel.packet_bytes_max, longest),
            there: 0,
            next: 0,
            chunks: 0,
            heard: now,
            repeat: now,
            breaks: 0,
        }
    }

    /// The topics that it listens to.
    pub fn filters(&self) -> [String; 4] {
        [self.topics.status(), self.topics.model(), self.topics.answer(), self.topics.progress()]
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

    /// What it is at, in a word or two, and how much has arrived of how much.
    pub fn shown(&self) -> (String, u32, u32) {
        let word = match &self.stage {
            Stage::Looking { .. } => "looking".into(),
            Stage::Ready => "waiting".into(),
            Stage::Offering { .. } => "offering".into(),
            Stage::Sending => "sending".into(),
            Stage::Proving { .. } => "proving itself".into(),
            Stage::OnTrial { .. } => "on trial".into(),
            Stage::Done(Outcome { ending, reason }) if reason.is_empty() => ending.word().into(),
            Stage::Done(Outcome { ending, reason }) => format!("{}: {reason}", ending.word()),
        };
        (word, self.there, self.chunks)
    }

    /// Begins to send.
    pub fn begin(&mut self, now: Instant) {
        (self.stage, self.heard, self.repeat) = (Stage::Offering { until: now + PATIENCE }, now, now);
    }

    pub fn end(&mut self, ending: Ending, reason: impl Into<String>) {
        self.stage = Stage::Done(Outcome { ending, reason: reason.into() });
    }

    /// A connection began; what was under way on the one before may be lost.
    pub fn connected(&mut self, now: Instant) {
        self.repeat = now;
        if matches!(self.stage, Stage::Offering { .. } | Stage::Sending) {
            self.breaks += 1;
            if self.breaks > BREAKS_MAX && self.chunk_bytes / 2 >= transfer::CHUNK_BYTES_MIN {
                // Perhaps the broker takes no messages as large as these.
                (self.chunk_bytes, self.breaks) = (self.chunk_bytes / 2, 0);
                self.restart(now);
            }
        }
    }

    fn restart(&mut self, now: Instant) {
        (self.there, self.next) = (0, 0);
        self.begin(now);
    }

    /// A message on one of its topics.
    pub fn hear(&mut self, topic: &str, payload: &[u8], parcel: &Parcel, now: Instant) {
        if topic == self.topics.status() {
            self.online = Some(payload == ONLINE.as_bytes());
        } else if topic == self.topics.model() {
            self.note = read(payload).or(self.note.take());
        } else if topic == self.topics.progress() {
            read(payload).into_iter().for_each(|progress| self.progress(&progress, now));
        } else if topic == self.topics.answer() {
            read(payload).into_iter().for_each(|answer| self.answer(&answer, parcel, now));
        }
    }

    fn progress(&mut self, progress: &Progress, now: Instant) {
        let expected = matches!(self.stage, Stage::Offering { .. } | Stage::Sending | Stage::Proving { .. });
        if progress.transfer != self.transfer || progress.chunks != self.chunks || !expected {
            return;
        }
        if progress.next > self.there {
            self.breaks = 0;
        }
        self.there = progress.next;
        if progress.again || self.next < progress.next {
            self.next = progress.next;
        }
        (self.stage, self.heard, self.repeat) = (Stage::Sending, now, now + REPEAT);
    }

    fn answer(&mut self, answer: &Answer, parcel: &Parcel, now: Instant) {
        // A device that was started anew knows the model, and not who sent it.
        let ours = answer.transfer == Some(self.transfer)
            || (answer.transfer.is_none() && answer.model.sha256 == parcel.model.sha256);
        if !ours || matches!(self.stage, Stage::Looking { .. } | Stage::Ready | Stage::Done(_)) {
            return;
        }
        let reason = answer.reason.clone().unwrap_or_default();
        match answer.answer {
            Verdict::Accepted => {
                let Terms { seconds, .. } = answer.trial.unwrap_or(Terms { frames: 0, seconds: 300 });
                self.there = self.chunks;
                self.stage = Stage::OnTrial { until: now + Duration::from_secs(seconds) + TRIAL_MARGIN };
            }
            Verdict::Confirmed => {
                self.there = self.chunks;
                self.end(Ending::Confirmed, reason);
            }
            Verdict::Refused => self.end(Ending::Refused, reason),
            Verdict::RolledBack => self.end(Ending::RolledBack, reason),
        }
    }

    /// Does what is due.
    pub fn step(&mut self, parcel: &Parcel, now: Instant, send: Send) {
        match self.stage {
            Stage::Looking { until } => self.look(parcel, now >= until),
            Stage::Offering { until } | Stage::Proving { until } => {
                if now >= until {
                    return self.end(Ending::Silent, format!("nothing was heard for {} s", PATIENCE.as_secs()));
                }
                self.offer(parcel, now, send);
            }
            Stage::Sending => {
                if now >= self.heard + PATIENCE {
                    return self.end(Ending::Silent, format!("nothing was heard for {} s", PATIENCE.as_secs()));
                }
                self.send_pieces(parcel, now, send);
            }
            Stage::OnTrial { until } if now >= until => {
                self.end(Ending::Silent, "the trial is over, and no word came");
            }
            // Whoever asks again is told how it stands, should the answer have been lost.
            Stage::OnTrial { .. } => self.offer(parcel, now, send),
            Stage::Ready | Stage::Done(_) => {}
        }
    }

    fn look(&mut self, parcel: &Parcel, late: bool) {
        let Some((online, note)) = self.online.zip(self.note.as_ref()) else {
            if late {
                let (status, model) = (self.topics.status(), self.topics.model());
                self.end(
                    Ending::Offline,
                    match (self.online, &self.note) {
                        (None, None) => format!("nothing is retained on {status}: it was never here"),
                        (Some(false), _) | (None, _) => format!("nothing says online on {status}"),
                        (Some(true), _) => format!("{model} cannot be read: its program is older than this one"),
                    },
                );
            }
            return;
        };
        if !online {
            return self.end(Ending::Offline, "");
        }
        let carries = parcel.manifest.members.contains_key(BACKBONE);
        let decides_already = note.model.sha256 == parcel.model.sha256;
        if decides_already && !note.trial {
            return self.end(Ending::Confirmed, "it decides already");
        }
        match gate::check(&parcel.manifest, carries, note, parcel.force || decides_already) {
            Ok(()) => self.stage = Stage::Ready,
            Err(gate) => self.end(Ending::Refused, gate.to_string()),
        }
    }

    fn offer(&mut self, parcel: &Parcel, now: Instant, send: Send) {
        if now < self.repeat {
            return;
        }
        let force = parcel.key.as_ref().filter(|_| parcel.force).zip(self.note.as_ref()).map(|(key, note)| {
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
            self.repeat = now + REPEAT;
        }
    }

    fn send_pieces(&mut self, parcel: &Parcel, now: Instant, send: Send) {
        while self.next < self.chunks && self.next < self.there + WINDOW {
            let Some(piece) = transfer::piece(self.transfer, &parcel.bytes, self.chunk_bytes, self.next) else { break };
            if !send(&self.topics.chunk(self.next), piece) {
                return;
            }
            self.next += 1;
        }
        if self.next == self.chunks {
            (self.stage, self.repeat) = (Stage::Proving { until: now + PATIENCE }, now + REPEAT);
        } else {
            // Nothing came of the last pieces: the device tells where it is.
            self.offer(parcel, now, send);
        }
    }
}

/// What cannot be read is nobody's.
fn read<T: DeserializeOwned>(payload: &[u8]) -> Option<T> {
    serde_json::from_slice(payload).ok()
}

#[cfg(test)]
mod tests {
    use super::super::message::{NetworkRef, Source, identity};
    use super::super::transfer::{Taken, Transfer};
    use super::*;
    use crate::bundle::manifest::FORMAT;
    use crate::bundle::{BUILT_IN, Bundle};
    use crate::mqtt::topics::DeviceName;

    /// A push to one device, with the messages that wait to be delivered to it.
    struct Push {
        parcel: Parcel,
        delivery: Delivery,
        sent: Vec<(String, Vec<u8>)>,
        now: Instant,
    }

    impl Push {
        fn new() -> Self {
            let manifest = Bundle::built_in().unwrap().manifest().clone();
            let model = identity(&manifest, Bundle::built_in().unwrap().sha256());
            let parcel =
                Parcel { bytes: BUILT_IN.to_vec(), manifest, model, packet_bytes_max: 65_536, force: false, key: None };
            let topics = Topics::new("bloomcast", "homeassistant", DeviceName::new("pi").unwrap());
            let now = Instant::now();
            Push { delivery: Delivery::new(topics, &parcel, now), parcel, sent: Vec::new(), now }
        }

        fn note(&self) -> Note {
            let manifest = &self.parcel.manifest;
            let network = NetworkRef { name: "n".into(), sha256: manifest.backbone.sha256.clone() };
            Note {
                schema: SCHEMA,
                model: Identity { version: 1, sha256: "old".into(), ..self.parcel.model.clone() },
                classes: manifest.classes.names().to_vec(),
                backbone: "n".into(),
                format: FORMAT,
                network,
                dataset: "another".into(),
                metrics: manifest.metrics.clone(),
                signed_by: None,
                source: Source::BuiltIn,
                trial: false,
                previous: None,
                generation: 0,
                trouble: None,
            }
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
            self.delivery.begin(self.now);
            self.step();
        }

        fn offer(&mut self) -> Offer {
            let (topic, payload) = self.sent.remove(0);
            assert_eq!(topic, "bloomcast/pi/model/offer");
            serde_json::from_slice(&payload).unwrap()
        }

        /// Hands what was sent to the device, but for what `lost` says; gives the whole once it is there.
        fn deliver(&mut self, device: &mut Transfer, lost: impl Fn(u32) -> bool) -> Option<Vec<u8>> {
            for (topic, payload) in std::mem::take(&mut self.sent) {
                let Some(number) = topic.strip_prefix("bloomcast/pi/model/chunk/") else { continue };
                let number = number.parse().unwrap();
                let taken = if lost(number) { Taken::Quiet } else { device.take(number, &payload, self.now) };
                match taken {
                    Taken::Whole(bytes) => return Some(bytes),
                    Taken::Progress => self.told(device, false),
                    Taken::Gap => self.told(device, true),
                    _ => {}
                }
            }
            None
        }

        fn told(&mut self, device: &Transfer, again: bool) {
            self.hear("bloomcast/pi/model/progress", &json(&device.progress(again)));
        }

        fn answered(&mut self, verdict: Verdict, reason: Option<&str>) {
            let answer = Answer {
                schema: SCHEMA,
                device: "pi".into(),
                transfer: Some(self.delivery.transfer),
                answer: verdict,
                reason: reason.map(str::to_owned),
                model: self.parcel.model.clone(),
                trial: Some(Terms { frames: 10, seconds: 5 }),
                at: String::new(),
            };
            self.hear("bloomcast/pi/model/answer", &json(&answer));
        }

        fn ending(&self) -> Option<Ending> {
            self.delivery.outcome().map(|outcome| outcome.ending)
        }
    }

    fn device(offer: Offer, now: Instant) -> Transfer {
        Transfer::new(offer, 16 << 20, 1 << 19, now).unwrap()
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
        push.answered(Verdict::Accepted, None);
        assert_eq!(push.delivery.shown().0, "on trial");
        push.answered(Verdict::Confirmed, None);
        assert_eq!(push.ending(), Some(Ending::Confirmed));
    }

    #[test]
    fn lost_pieces_are_sent_again() {
        let mut push = Push::new();
        push.begin();
        let mut device = device(push.offer(), push.now);
        push.told(&device, true);
        // Lost in the middle, which the device notices, and at the end, which only time tells.
        let last = push.delivery.chunks - 1;
        let mut round = 0;
        let whole = loop {
            round += 1;
            assert!(round < 100);
            let lost = |number| round < 3 && number == 2 || round < 8 && number == last;
            if let Some(whole) = push.deliver(&mut device, lost) {
                break whole;
            }
            if push.sent.is_empty() {
                push.now += REPEAT;
                push.step();
                assert!(push.sent.iter().any(|(topic, _)| topic.ends_with("/offer")), "asks where the device is");
                push.told(&device, true);
            }
        };
        assert_eq!(whole, BUILT_IN);
    }

    #[test]
    fn a_broker_that_takes_no_large_messages_gets_smaller_ones() {
        let mut push = Push::new();
        push.begin();
        let first = push.offer();
        for _ in 0..=BREAKS_MAX {
            push.delivery.connected(push.now);
            push.step();
        }
        let last = std::mem::take(&mut push.sent).pop().unwrap();
        let smaller: Offer = serde_json::from_slice(&last.1).unwrap();
        assert_eq!((smaller.transfer, smaller.chunk_bytes), (first.transfer, first.chunk_bytes / 2));
        assert_eq!(push.delivery.chunks, smaller.chunks());
    }

    #[test]
    fn who_is_not_there_and_who_says_nothing_is_told_apart() {
        let mut absent = Push::new();
        absent.now += LOOK;
        absent.step();
        assert_eq!(absent.ending(), Some(Ending::Offline));
        let mut off = Push::new();
        off.hear("bloomcast/pi/status", b"offline");
        let note = json(&off.note());
        off.hear("bloomcast/pi/model", &note);
        assert_eq!(off.ending(), Some(Ending::Offline));
        let mut silent = Push::new();
        silent.begin();
        for _ in 0..=PATIENCE.as_secs() {
            silent.now += Duration::from_secs(1);
            silent.step();
        }
        assert_eq!(silent.ending(), Some(Ending::Silent));
        assert_eq!(silent.sent.len() as u64, PATIENCE.as_secs() / REPEAT.as_secs());
    }

    #[test]
    fn what_the_device_says_ends_it_and_what_others_are_told_does_not() {
        let mut push = Push::new();
        push.begin();
        let mut other = push.delivery.transfer;
        std::mem::swap(&mut push.delivery.transfer, &mut other);
        push.delivery.transfer = Uuid::from_u128(1);
        push.answered(Verdict::Refused, Some("no"));
        assert_eq!(push.ending(), Some(Ending::Refused), "its own");
        let mut push = Push::new();
        push.begin();
        let own = std::mem::replace(&mut push.delivery.transfer, Uuid::from_u128(1));
        let foreign = Push { delivery: Delivery { transfer: own, ..push.delivery }, ..push };
        let mut push = foreign;
        let answer = Answer {
            schema: SCHEMA,
            device: "pi".into(),
            transfer: Some(Uuid::from_u128(9)),
            answer: Verdict::Refused,
            reason: None,
            model: push.parcel.model.clone(),
            trial: None,
            at: String::new(),
        };
        push.hear("bloomcast/pi/model/answer", &json(&answer));
        push.hear("bloomcast/pi/model/answer", b"rubbish");
        assert_eq!(push.ending(), None);
        let restarted = Answer { transfer: None, answer: Verdict::RolledBack, ..answer };
        push.hear("bloomcast/pi/model/answer", &json(&restarted));
        assert_eq!(push.ending(), Some(Ending::RolledBack));
    }
}
