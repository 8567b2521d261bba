//! The stage from frames to decisions: decodes, classifies, decides, and hands over what is to be said.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::camera::latest::{self, News, Taken};
use crate::camera::{Frame, Pace};
use crate::decide::{Decider, Decision, Flicker};
use crate::health::Counters;
use crate::mqtt::{Outbox, Setting, message};
use crate::vision::{Classifier, Prediction, Stages, decode};

/// How often settings are looked for while no frame comes.
const IDLE: Duration = Duration::from_millis(100);

/// A frame that was classified, for whoever wants to look on.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The file a replayed frame came from.
    pub origin: Option<PathBuf>,
    pub captured_at: SystemTime,
    pub prediction: Prediction,
    pub stages: Stages,
}

/// Called with each frame that was classified, on the vision thread.
pub type Observer = Box<dyn FnMut(Seen) + Send>;

/// What the vision thread works with.
pub struct Watcher {
    mailbox: latest::Receiver,
    classifier: Classifier,
    voice: Voice,
    state: watch::Sender<Vec<u8>>,
    orders: mpsc::Receiver<Setting>,
    pace: Pace,
    observer: Observer,
    /// After so long without a frame that could be classified, nothing is seen.
    patience: Duration,
    last_good: Instant,
}

impl Watcher {
    /// Gives the newest state as well, which is from the start what a camera sees that has yet to show
    /// itself.
    pub fn new(
        mailbox: latest::Receiver,
        classifier: Classifier,
        mut voice: Voice,
        orders: mpsc::Receiver<Setting>,
        pace: Pace,
        patience: Duration,
        observer: Observer,
    ) -> (Self, watch::Receiver<Vec<u8>>) {
        let blind = voice.decider.blind(SystemTime::now(), false);
        let (state, newest) = watch::channel(voice.sender.state(&blind.sight, false));
        let last_good = Instant::now();
        (Watcher { mailbox, classifier, voice, state, orders, pace, observer, patience, last_good }, newest)
    }

    /// Works until the camera has ended or `stop` is set.
    pub fn watch(&mut self, stop: &watch::Receiver<bool>) {
        while !*stop.borrow() {
            self.obey();
            match self.mailbox.take(IDLE) {
                Taken::News(News::Frame(frame)) => self.look(frame),
                Taken::News(News::Lost { at }) => self.see_nothing(at, false),
                Taken::Nothing => {}
                Taken::Ended => return info!("the camera has no more frames"),
            }
        }
    }

    fn look(&mut self, frame: Frame) {
        if self.voice.paused {
            // That it gives frames is told all the same.
            return self.see_nothing(frame.captured_at, true);
        }
        let (captured_at, origin) = (frame.captured_at, frame.origin.clone());
        let (prediction, stages) = match self.classify(&frame) {
            Ok(classified) => classified,
            Err(reason) => return self.skip(&frame, &reason),
        };
        self.last_good = Instant::now();
        self.voice.counters.classified.add(1);
        let decision = self.voice.decider.seen(&prediction, captured_at);
        self.say(&decision);
        (self.observer)(Seen { origin, captured_at, prediction, stages });
    }

    fn classify(&mut self, frame: &Frame) -> Result<(Prediction, Stages), String> {
        let began = Instant::now();
        let picture = decode::picture(&frame.picture).map_err(|e| e.to_string())?;
        let decode = began.elapsed();
        let (prediction, stages) = self.classifier.classify(&picture).map_err(|e| e.to_string())?;
        Ok((prediction, Stages { decode, ..stages }))
    }

    fn skip(&mut self, frame: &Frame, reason: &str) {
        self.voice.counters.broken.add(1);
        let from = frame.origin.as_ref().map_or(String::new(), |path| format!("{}: ", path.display()));
        warn!("{from}a frame is broken and skipped: {reason}");
        if self.last_good.elapsed() >= self.patience {
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
        while let Ok(setting) = self.orders.try_recv() {
            match self.apply(setting) {
                Ok(()) => info!("set from afar: {setting:?}"),
                Err(flicker) => warn!("the setting {setting:?} is left out: {flicker}"),
            }
        }
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
            Setting::IntervalMs(ms) => self.pace.set(ms),
            Setting::Pause(paused) => self.pause(paused),
        }
        Ok(())
    }
}

/// Turns decisions into messages.
pub struct Voice {
    decider: Decider,
    sender: message::Sender,
    outbox: Outbox,
    counters: Arc<Counters>,
    paused: bool,
}

impl Voice {
    pub fn new(decider: Decider, sender: message::Sender, outbox: Outbox, counters: Arc<Counters>) -> Self {
        Voice { decider, sender, outbox, counters, paused: false }
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
            let lost = self.outbox.push(self.sender.event(id, &decision.sight, previous));
            if !lost.is_empty() {
                self.counters.events_lost.add(lost.len() as u64);
                error!("the outbox is full: {} events are lost, oldest first; see mqtt.outbox_entries_max", lost.len());
            }
        }
        decision.tell.then(|| self.sender.state(&decision.sight, self.paused))
    }
}
