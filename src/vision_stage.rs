//! The stage from frames to decisions: decodes, classifies, decides, and hands over what is to be said.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime};

use image::RgbImage;
use tokio::sync::watch;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::camera::Pace;
use crate::camera::latest::{self, MailboxItem, RecvResult};
use crate::decide::{Decider, Decision, Flicker, Thresholds};
use crate::frame::Frame;
use crate::mqtt::{About, Outbox, Setting, message};
use crate::system::{Counters, Heartbeat};
use crate::vision::{Classifier, FrameDiff, Labels, Prediction, Stages, decode};

/// How often settings are looked for while no frame comes.
const IDLE: Duration = Duration::from_millis(100);

/// A frame that was classified, for whoever wants to look on.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The file a replayed frame came from.
    pub origin: Option<PathBuf>,
    pub captured_at: SystemTime,
    /// What it was taken for; none where it is unknown.
    pub class: Option<usize>,
    pub stages: Stages,
}

/// Called with each frame that was classified, on the vision thread.
pub type Observer = Box<dyn FnMut(Seen) + Send>;

/// Is told how a model fares with each frame; false once it wants to know no more.
pub type Witness = Box<dyn FnMut(Report) -> bool + Send>;

/// How a model fared with a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// How long its network worked.
    Seen(Duration),
    /// The model failed, which no picture is to blame for.
    Failed(String),
}

/// Another model, to be put in the place of the present one between two frames.
pub struct Swap {
    pub classifier: Classifier,
    pub version: u64,
    /// Of its classes.
    pub thresholds: Vec<Thresholds>,
    /// What there is to say of it.
    pub about: About,
    pub witness: Option<Witness>,
    /// Takes the model that was replaced, and is thereby told that it was.
    pub replaced: mpsc::SyncSender<Classifier>,
}

/// What comes to the vision thread besides frames.
pub struct Orders {
    pub settings: mpsc::Receiver<Setting>,
    pub swaps: mpsc::Receiver<Swap>,
    /// Where it is told what there is to say of another model.
    pub about: watch::Sender<About>,
    /// Of the model at the start, where it is on trial.
    pub witness: Option<Witness>,
}

/// What the vision thread works with.
pub struct Watcher {
    mailbox: latest::Receiver,
    classifier: Classifier,
    voice: Voice,
    state: watch::Sender<Vec<u8>>,
    orders: Orders,
    habits: Habits,
    observer: Observer,
    last_good: Instant,
}

/// How it looks.
pub struct Habits {
    pub pace: Pace,
    /// After so long without a frame that could be classified, nothing is seen.
    pub patience: Duration,
    /// Which frames need not be classified again.
    pub still: FrameDiff,
}

impl Watcher {
    /// Gives the newest state as well: what was seen before, or else what a camera sees that has yet to show itself.
    pub fn new(
        mailbox: latest::Receiver,
        classifier: Classifier,
        mut voice: Voice,
        orders: Orders,
        habits: Habits,
        observer: Observer,
    ) -> (Self, watch::Receiver<Vec<u8>>) {
        let sight = match voice.decider.told() {
            Some(told) => told.clone(),
            None => voice.decider.blind(SystemTime::now(), false).sight,
        };
        let (state, newest) = watch::channel(voice.sender.state(&sight, false));
        let last_good = Instant::now();
        (Watcher { mailbox, classifier, voice, state, orders, habits, observer, last_good }, newest)
    }

    /// Works until the camera has ended or `stop` is set.
    pub fn watch(&mut self, stop: &watch::Receiver<bool>, heartbeat: &Heartbeat) {
        while !*stop.borrow() {
            heartbeat.beat();
            self.obey();
            match self.mailbox.take(IDLE) {
                RecvResult::MailboxItem(MailboxItem::Frame(frame)) => self.look(frame),
                RecvResult::MailboxItem(MailboxItem::Lost { at }) => self.see_nothing(at, false),
                RecvResult::Nothing => {}
                RecvResult::Ended => return info!("the camera has no more frames"),
            }
        }
    }

    /// What is seen, for whoever goes on with it.
    pub fn into_seen(self) -> (Labels, Decider) {
        (self.voice.sender.labels, self.voice.decider)
    }

    fn look(&mut self, frame: Frame) {
        if self.voice.paused {
            // That it gives frames is told all the same.
            return self.see_nothing(frame.captured_at, true);
        }
        let captured_at = frame.captured_at;
        let (decision, class, stages) = match self.decide(&frame) {
            Ok(decided) => decided,
            Err(reason) => {
                self.habits.still.forget();
                return self.skip(&frame, &reason);
            }
        };
        self.last_good = Instant::now();
        self.say(&decision);
        let Some(stages) = stages else { return self.voice.counters.still.add(1) };
        self.voice.counters.classified.add(1);
        (self.observer)(Seen { origin: frame.origin, captured_at, class, stages });
    }

    /// What a frame leads to, what it was taken for, and how long that took; a frame that is like the last one took no time.
    fn decide(&mut self, frame: &Frame) -> Result<(Decision, Option<usize>, Option<Stages>), String> {
        let began = Instant::now();
        let picture = decode::picture(&frame.picture).map_err(|e| e.to_string())?;
        let decode = began.elapsed();
        let Watcher { classifier, orders, habits, voice, .. } = self;
        let (prediction, stages) = judge(classifier, orders, &mut habits.still, &picture)?;
        let decision = voice.decider.seen(prediction, frame.captured_at);
        Ok((decision, prediction.class(), stages.map(|stages| Stages { decode, ..stages })))
    }

    fn skip(&mut self, frame: &Frame, reason: &str) {
        self.voice.counters.broken.add(1);
        let from = frame.origin.as_ref().map_or(String::new(), |path| format!("{}: ", path.display()));
        warn!("{from}a frame is broken and skipped: {reason}");
        if self.last_good.elapsed() >= self.habits.patience {
            self.see_nothing(frame.captured_at, false);
        }
    }

    fn see_nothing(&mut self, at: SystemTime, camera_ok: bool) {
        let decision = self.voice.decider.blind(at, camera_ok);
        self.say(&decision);
    }

    fn say(&mut self, decision: &Decision) {
        if let Some(state) = self.voice.say(decision) {
            self.state.send_replace(state);
        }
    }

    /// Does what was asked from afar.
    fn obey(&mut self) {
        while let Ok(setting) = self.orders.settings.try_recv() {
            match self.apply(setting) {
                Ok(()) => info!("set from afar: {setting:?}"),
                Err(flicker) => warn!("the setting {setting:?} is left out: {flicker}"),
            }
        }
        if let Ok(swap) = self.orders.swaps.try_recv() {
            self.swap(swap);
        }
    }

    /// Puts another model in the place of the present one. What is seen stays seen where the classes are the same.
    fn swap(&mut self, swap: Swap) {
        let same_classes = self.voice.sender.labels == *swap.classifier.labels();
        if !same_classes {
            // In the words of the old model.
            let camera_ok = self.voice.decider.camera_ok();
            self.see_nothing(SystemTime::now(), camera_ok);
        }
        let replaced = std::mem::replace(&mut self.classifier, swap.classifier);
        self.habits.still.forget();
        self.voice.sender.labels = self.classifier.labels().clone();
        self.voice.sender.model = swap.version;
        self.orders.about.send_replace(swap.about);
        self.orders.witness = swap.witness;
        if same_classes {
            if let Some(sight) = self.voice.decider.told() {
                self.state.send_replace(self.voice.sender.state(sight, self.voice.paused));
            }
        } else {
            let camera_ok = self.voice.decider.camera_ok();
            self.voice.decider.relearn(swap.thresholds);
            self.see_nothing(SystemTime::now(), camera_ok);
        }
        // Nobody waits for it where the program is about to end.
        let _ = swap.replaced.send(replaced);
    }

    fn pause(&mut self, paused: bool) {
        if paused == self.voice.paused {
            return;
        }
        self.voice.paused = paused;
        self.last_good = Instant::now();
        let decider = &mut self.voice.decider;
        let decision = decider.blind(SystemTime::now(), decider.camera_ok());
        self.say(&Decision { tell: true, ..decision });
    }

    fn apply(&mut self, setting: Setting) -> Result<(), Flicker> {
        let rules = self.voice.decider.rules_mut();
        match setting {
            Setting::Enter(enter) => rules.set_enter(enter)?,
            Setting::Leave(leave) => rules.set_leave(leave)?,
            Setting::SmoothingMs(ms) => rules.smoothing = Duration::from_millis(ms),
            Setting::EnterDwellMs(ms) => rules.enter_dwell = Duration::from_millis(ms),
            Setting::LeaveDwellMs(ms) => rules.leave_dwell = Duration::from_millis(ms),
            Setting::IntervalMs(ms) => self.habits.pace.set(ms),
            Setting::Pause(paused) => self.pause(paused),
        }
        Ok(())
    }
}

/// A model that panics has failed on this picture, as one that gives an error has. One on trial looks at every picture.
fn judge<'a>(
    classifier: &'a mut Classifier,
    orders: &mut Orders,
    still: &mut FrameDiff,
    picture: &RgbImage,
) -> Result<(&'a Prediction, Option<Stages>), String> {
    if orders.witness.is_some() {
        still.forget();
    }
    let classify = || classifier.classify_if_changed(picture, still).map_err(|e| e.to_string());
    let judged = catch_unwind(AssertUnwindSafe(classify))
        .unwrap_or_else(|_| Err("the model panicked; its message stands in the log".into()));
    if let Some(witness) = &mut orders.witness {
        let report = match &judged {
            Ok(stages) => Report::Seen(stages.map_or(Duration::ZERO, |stages| stages.work)),
            Err(reason) => Report::Failed(reason.clone()),
        };
        if !witness(report) {
            orders.witness = None;
        }
    }
    judged.map(|stages| (classifier.last(), stages))
}

/// Turns decisions into messages.
pub struct Voice {
    decider: Decider,
    sender: message::Sender,
    /// Where events go.
    topic: String,
    outbox: Outbox,
    counters: Arc<Counters>,
    paused: bool,
}

impl Voice {
    pub fn new(
        decider: Decider,
        sender: message::Sender,
        topic: String,
        outbox: Outbox,
        counters: Arc<Counters>,
    ) -> Self {
        Voice { decider, sender, topic, outbox, counters, paused: false }
    }

    /// Puts the event of a change into the outbox; gives the state where it is worth telling.
    fn say(&mut self, decision: &Decision) -> Option<Vec<u8>> {
        if let Some(previous) = decision.previous {
            let id = Uuid::now_v7();
            let labels = &self.sender.labels;
            info!(
                "event {id}: {} → {}, confidence {:.2}",
                labels.name(previous),
                labels.name(decision.sight.class),
                decision.sight.confidence
            );
            self.counters.events.add(1);
            let event = self.sender.event(id, &decision.sight, previous);
            let lost = self.outbox.push(self.topic.clone(), event);
            if !lost.is_empty() {
                self.counters.events_lost.add(lost.len() as u64);
                error!("the outbox is full: {} events are lost, oldest first; see mqtt.outbox_entries_max", lost.len());
            }
        }
        decision.tell.then(|| self.sender.state(&decision.sight, self.paused))
    }
}
