//! The stage from frames to decisions: a thread that decodes, classifies, decides and publishes the result into channels.
//!
//! ```text
//! mailbox ──Frame──▶ decode ──▶ classify ──Prediction──▶ decide ──Event──▶ events (a queue)
//!                                  ▲                        └──Observation──▶ state (the newest value)
//!                     Commands ────┘  settings, model swaps
//! ```

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

use image::RgbImage;
use tokio::sync::{mpsc as queue, watch};
use tracing::{error, info, warn};

use crate::camera::Pace;
use crate::camera::latest::{self, MailboxItem, RecvResult};
use crate::decide::{Decider, Decision, Event, InvalidHysteresis, Observation, Thresholds};
use crate::frame::Frame;
use crate::system::clock::ClockWatch;
use crate::system::paths::printable;
use crate::system::{Counters, Heartbeat, LogLimiter};
use crate::vision::decode::DecodeError;
use crate::vision::labels::ClassName;
use crate::vision::{BackboneError, Classifier, FrameFilter, FrameResult, Quality, StageTimes, Transform, decode};

/// Interval at which commands are checked while no frame arrives.
const IDLE: Duration = Duration::from_millis(100);

/// A setting that can be changed while the daemon runs; it lasts until the next start or reload, a pause until the next start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Setting {
    /// Whether classification is paused.
    Pause(bool),
    /// Interval between two frames that are classified.
    IntervalMs(u64),
    /// [`crate::decide::Rules::smoothing`].
    SmoothingMs(u64),
    /// [`crate::decide::Rules::enter_dwell`].
    EnterDwellMs(u64),
    /// [`crate::decide::Rules::leave_dwell`].
    LeaveDwellMs(u64),
    /// Enter threshold of every class, above 0, at most 1.
    Enter(f32),
    /// Leave threshold of every class, above 0, at most 1.
    Leave(f32),
}

/// The setting as `name = value`, with its name in the topic.
impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Setting::Pause(paused) => write!(f, "pause = {paused}"),
            Setting::IntervalMs(ms) => write!(f, "interval_ms = {ms}"),
            Setting::SmoothingMs(ms) => write!(f, "smoothing_ms = {ms}"),
            Setting::EnterDwellMs(ms) => write!(f, "enter_dwell_ms = {ms}"),
            Setting::LeaveDwellMs(ms) => write!(f, "leave_dwell_ms = {ms}"),
            Setting::Enter(enter) => write!(f, "enter = {enter}"),
            Setting::Leave(leave) => write!(f, "leave = {leave}"),
        }
    }
}

/// The settings that can be changed while the daemon runs, with their values in force.
#[derive(Debug, Clone, PartialEq)]
pub struct ActiveSettings {
    /// Whether classification is paused.
    pub paused: bool,
    /// Interval between two frames that are classified.
    pub interval: Duration,
    /// [`crate::decide::Rules::smoothing`].
    pub smoothing: Duration,
    /// [`crate::decide::Rules::enter_dwell`].
    pub enter_dwell: Duration,
    /// [`crate::decide::Rules::leave_dwell`].
    pub leave_dwell: Duration,
    /// Thresholds of the classes that have none of their own.
    pub thresholds: Thresholds,
    /// Thresholds of the classes whose thresholds differ from these.
    pub class_thresholds: Vec<(ClassName, Thresholds)>,
}

impl ActiveSettings {
    /// Returns the settings of a decider and a pace.
    pub fn new(decider: &Decider, pace: &Pace) -> Self {
        let (rules, labels) = (decider.rules(), decider.labels());
        let own = rules.thresholds.iter().enumerate().filter(|(_, own)| **own != rules.common);
        ActiveSettings {
            paused: decider.paused(),
            interval: pace.interval(),
            smoothing: rules.smoothing,
            enter_dwell: rules.enter_dwell,
            leave_dwell: rules.leave_dwell,
            thresholds: rules.common,
            class_thresholds: own.map(|(class, own)| (labels.class_name(class), *own)).collect(),
        }
    }
}

/// A frame that was classified.
#[derive(Debug, Clone)]
pub struct ClassifiedFrame {
    /// The file that a replayed frame was read from.
    pub origin: Option<PathBuf>,
    /// Time of the capture.
    pub captured_at: SystemTime,
    /// The predicted class; `None` is unknown.
    pub class: Option<usize>,
    /// Time of each processing stage.
    pub stages: StageTimes,
}

/// Called on the vision thread for each classified frame.
pub type OnClassified = Box<dyn FnMut(ClassifiedFrame) + Send>;

/// Receives a report for each frame of a model on trial; returns `false` once it needs no more.
pub type FrameObserver = Box<dyn FnMut(FrameReport) -> bool + Send>;

/// The result of a frame of a model on trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrameReport {
    /// It classified the frame; processor time of the backbone.
    Classified(Duration),
    /// It failed on a picture that was decoded, for this reason.
    Failed(String),
}

/// Another model, to replace the present one between two frames.
pub struct Swap {
    /// The model.
    pub classifier: Classifier,
    /// Its version.
    pub version: u64,
    /// The thresholds of its classes.
    pub thresholds: Vec<Thresholds>,
    /// The thresholds of its classes that have none of their own.
    pub common: Thresholds,
    /// Observes its frames, if it is on trial.
    pub trial_observer: Option<FrameObserver>,
    /// Receives the replaced model once the swap is done.
    pub replaced: mpsc::SyncSender<Classifier>,
}

/// The inputs of the vision thread beside frames, and the settings that they result in.
pub struct Commands {
    /// Changed settings.
    pub settings: mpsc::Receiver<Setting>,
    /// Models to swap in.
    pub swaps: mpsc::Receiver<Swap>,
    /// Observes the frames of the first model, if it is on trial.
    pub trial_observer: Option<FrameObserver>,
    /// Receives the settings in force after each change.
    pub active_settings: watch::Sender<ActiveSettings>,
}

/// The outputs of the vision thread. Neither waits for its receiver.
pub struct Publisher {
    events: queue::Sender<Event>,
    state: watch::Sender<Observation>,
    counters: Arc<Counters>,
}

/// Options of the vision thread.
pub struct VisionOptions {
    /// The interval between frames, shared with the camera.
    pub pace: Pace,
    /// Time without a frame that could be classified after which `unknown` is observed.
    pub lost_after: Duration,
    /// Rotation, mirroring and cropping of each frame.
    pub transform: Transform,
    /// Finds frames that are not classified.
    pub filter: FrameFilter,
}

/// The vision thread's state.
pub struct VisionStage {
    mailbox: latest::Receiver,
    classifier: Classifier,
    decider: Decider,
    publisher: Publisher,
    commands: Commands,
    options: VisionOptions,
    on_classified: OnClassified,
    last_classified: Instant,
    clock: ClockWatch,
    /// Quality of the last frame.
    quality: Quality,
    skipped: LogLimiter,
    unfit: LogLimiter,
    rejected: LogLimiter,
}

/// A frame that could not be classified.
#[derive(Debug, thiserror::Error)]
enum FrameError {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error("the model panicked; see the message above in the log")]
    Panicked,
}

impl Publisher {
    /// Creates the outputs. Returns the receivers of the events, of which at most `events_max` wait, and of the newest
    /// observation, which begins as the decider's last published one, else as `unknown` with `camera_ok: false`.
    pub fn new(
        decider: &mut Decider,
        events_max: usize,
        counters: Arc<Counters>,
    ) -> (Self, queue::Receiver<Event>, watch::Receiver<Observation>) {
        let first = match decider.published() {
            Some(published) => published.clone(),
            None => decider.observe_unknown(SystemTime::now(), false).observation,
        };
        let (events, event_queue) = queue::channel(events_max);
        let (state, newest) = watch::channel(first);
        (Publisher { events, state, counters }, event_queue, newest)
    }

    fn publish(&self, decision: Decision) {
        if let Some(event) = decision.event {
            self.counters.events.add(1);
            if let Err(error) = self.events.try_send(event) {
                self.counters.events_lost.add(1);
                error!("an event is lost: the queue to the broker's connection is full or closed: {error}");
            }
        }
        if decision.publish {
            self.state.send_replace(decision.observation);
        }
    }
}

impl VisionStage {
    /// Creates the stage; [`VisionStage::run`] starts it.
    pub fn new(
        mailbox: latest::Receiver,
        classifier: Classifier,
        mut decider: Decider,
        publisher: Publisher,
        commands: Commands,
        options: VisionOptions,
        on_classified: OnClassified,
    ) -> Self {
        decider.set_frame_region(options.transform.region);
        let last_classified = Instant::now();
        let clock = ClockWatch::start();
        let skipped = LogLimiter::new("frames skipped");
        VisionStage {
            mailbox,
            classifier,
            decider,
            publisher,
            commands,
            options,
            on_classified,
            last_classified,
            clock,
            quality: Quality::Ok,
            skipped,
            unfit: LogLimiter::new("changes of the quality"),
            rejected: LogLimiter::new("settings rejected"),
        }
    }

    /// Runs until the camera has ended or `stop` is set; returns the decision state, for a daemon that continues it.
    pub fn run(mut self, stop: &watch::Receiver<bool>, heartbeat: &Heartbeat) -> Decider {
        while !*stop.borrow() {
            heartbeat.beat();
            self.apply_commands();
            self.skipped.flush();
            self.unfit.flush();
            self.rejected.flush();
            let item = self.mailbox.recv(IDLE);
            // After the wait: the times of earlier frames are moved before those of a frame that came meanwhile are used.
            if let Some(step) = self.clock.check() {
                warn!("the clock was set: {step:?}");
                self.decider.clock_set(step);
            }
            match item {
                RecvResult::Item(MailboxItem::Frame(frame)) => {
                    let captured_at = self.clock.corrected(frame.captured_at);
                    self.process(Frame { captured_at, ..frame });
                }
                RecvResult::Item(MailboxItem::Lost { at }) => {
                    self.classifier.reset_scan();
                    self.observe_unknown(self.clock.corrected(at), false);
                }
                RecvResult::Timeout => {}
                RecvResult::Closed => {
                    info!("the source has no more frames");
                    break;
                }
            }
        }
        self.decider
    }

    fn process(&mut self, frame: Frame) {
        if self.decider.paused() {
            // Frames while paused still show that the camera works.
            return self.observe_unknown(frame.captured_at, true);
        }
        let captured_at = frame.captured_at;
        let result = match self.classify(&frame) {
            Ok(result) => result,
            Err(error) => {
                self.options.filter.diff.reset();
                self.classifier.reset_scan();
                return self.skip(&frame, &error);
            }
        };
        self.last_classified = Instant::now();
        if let FrameResult::Unfit(quality) = result {
            self.publisher.counters.unfit.add(1);
            self.log_quality(quality);
            return self.publisher.publish(self.decider.unfit(quality, captured_at));
        }
        self.log_quality(Quality::Ok);
        let prediction = self.classifier.last_prediction();
        let class = prediction.class();
        self.publisher.publish(self.decider.classified(prediction, captured_at));
        let FrameResult::Classified(stages) = result else { return self.publisher.counters.still.add(1) };
        self.publisher.counters.classified.add(1);
        (self.on_classified)(ClassifiedFrame { origin: frame.origin, captured_at, class, stages });
    }

    /// Decodes, transforms and classifies a frame.
    fn classify(&mut self, frame: &Frame) -> Result<FrameResult, FrameError> {
        let started = Instant::now();
        let picture = self.options.transform.apply(decode::picture(&frame.picture)?);
        let decode = started.elapsed();
        let VisionStage { classifier, commands, options, .. } = self;
        let result = predict(classifier, &mut commands.trial_observer, &mut options.filter, &picture)?;
        Ok(match result {
            FrameResult::Classified(stages) => FrameResult::Classified(StageTimes { decode, ..stages }),
            other => other,
        })
    }

    /// Logs a change of the frames' quality; not each change of frames at a limit.
    fn log_quality(&mut self, quality: Quality) {
        if quality == self.quality {
            return;
        }
        self.quality = quality;
        match quality {
            Quality::Ok => self.unfit.warn("frames can be classified again".into()),
            unfit => self.unfit.warn(format!("frames are {unfit} and not classified")),
        }
    }

    fn skip(&mut self, frame: &Frame, error: &FrameError) {
        self.publisher.counters.broken.add(1);
        let origin = frame.origin.as_ref().map_or(String::new(), |path| format!("{}: ", printable(path)));
        match error {
            FrameError::Decode(_) => self.skipped.warn(format!("{origin}broken frame skipped: {error}")),
            FrameError::Backbone(_) | FrameError::Panicked => {
                self.skipped.warn(format!("{origin}frame skipped: {error}"));
            }
        }
        if self.last_classified.elapsed() >= self.options.lost_after {
            self.observe_unknown(frame.captured_at, false);
        }
    }

    fn observe_unknown(&mut self, at: SystemTime, camera_ok: bool) {
        let decision = self.decider.observe_unknown(at, camera_ok);
        self.publisher.publish(decision);
    }

    fn apply_commands(&mut self) {
        while let Ok(setting) = self.commands.settings.try_recv() {
            match self.apply(setting) {
                Ok(()) => info!("setting changed over MQTT: {setting}"),
                Err(error) => self.rejected.warn(format!("setting {setting} rejected: {error}")),
            }
            self.publish_settings();
        }
        if let Ok(swap) = self.commands.swaps.try_recv() {
            self.swap(swap);
            self.publish_settings();
        }
    }

    fn publish_settings(&self) {
        let present = ActiveSettings::new(&self.decider, &self.options.pace);
        self.commands.active_settings.send_if_modified(|published| {
            let is_new = *published != present;
            *published = present;
            is_new
        });
    }

    fn apply(&mut self, setting: Setting) -> Result<(), InvalidHysteresis> {
        let rules = self.decider.rules_mut();
        match setting {
            Setting::Enter(enter) => rules.set_enter(enter)?,
            Setting::Leave(leave) => rules.set_leave(leave)?,
            Setting::SmoothingMs(ms) => rules.smoothing = Duration::from_millis(ms),
            Setting::EnterDwellMs(ms) => rules.enter_dwell = Duration::from_millis(ms),
            Setting::LeaveDwellMs(ms) => rules.leave_dwell = Duration::from_millis(ms),
            Setting::IntervalMs(ms) => self.options.pace.set(ms),
            Setting::Pause(paused) => self.pause(paused),
        }
        Ok(())
    }

    fn pause(&mut self, paused: bool) {
        if paused == self.decider.paused() {
            return;
        }
        self.last_classified = Instant::now();
        self.classifier.reset_scan();
        let decision = self.decider.set_paused(paused, SystemTime::now());
        self.publisher.publish(decision);
    }

    /// Replaces the model. The observation stays if the classes are the same; otherwise it ends as `unknown` under the old
    /// model, and the new one starts with `unknown`.
    fn swap(&mut self, swap: Swap) {
        let same_classes = self.decider.labels() == swap.classifier.labels();
        let camera_ok = self.decider.camera_ok();
        if !same_classes {
            self.observe_unknown(SystemTime::now(), camera_ok);
        }
        let replaced = std::mem::replace(&mut self.classifier, swap.classifier);
        self.options.filter.diff.reset();
        self.commands.trial_observer = swap.trial_observer;
        if same_classes {
            self.decider.set_model(swap.version);
            if let Some(observation) = self.decider.published() {
                self.publisher.state.send_replace(observation.clone());
            }
        } else {
            let labels = self.classifier.labels().clone();
            self.decider.reset_classes(labels, swap.version, swap.thresholds, swap.common);
            self.observe_unknown(SystemTime::now(), camera_ok);
        }
        // The receiver is gone if the daemon is about to stop.
        let _ = swap.replaced.send(replaced);
    }
}

/// Classifies a picture unless it is unfit or equals the previous one; a model on trial classifies every picture. A panic of the model
/// is an error, as it is for the trial.
fn predict(
    classifier: &mut Classifier,
    trial_observer: &mut Option<FrameObserver>,
    filter: &mut FrameFilter,
    picture: &RgbImage,
) -> Result<FrameResult, FrameError> {
    if trial_observer.is_some() {
        filter.diff.reset();
    }
    let mut cpu_time = Duration::ZERO;
    let mut classify = || -> Result<FrameResult, BackboneError> {
        let result = classifier.classify_frame(picture, filter)?;
        cpu_time = match result {
            FrameResult::Classified(stages) => stages.cpu_time,
            FrameResult::Unfit(_) if trial_observer.is_some() => classifier.classify(picture)?.1.cpu_time,
            FrameResult::Unfit(_) | FrameResult::Unchanged => Duration::ZERO,
        };
        Ok(result)
    };
    let classified = match catch_unwind(AssertUnwindSafe(&mut classify)) {
        Ok(classified) => classified.map_err(FrameError::from),
        Err(_) => Err(FrameError::Panicked),
    };
    if let Some(report_to_trial) = trial_observer {
        let report = match &classified {
            Ok(_) => FrameReport::Classified(cpu_time),
            Err(error) => FrameReport::Failed(error.to_string()),
        };
        if !report_to_trial(report) {
            *trial_observer = None;
        }
    }
    classified
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::{Rules, Thresholds};
    use crate::vision::Labels;

    #[test]
    fn an_event_that_finds_the_queue_full_is_counted_as_lost() {
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        let rules = Rules {
            smoothing: Duration::ZERO,
            enter_dwell: Duration::ZERO,
            leave_dwell: Duration::ZERO,
            state_interval: Duration::ZERO,
            common: Thresholds { enter: 0.7, leave: 0.45 },
            thresholds: vec![Thresholds { enter: 0.7, leave: 0.45 }; 2],
        };
        let mut decider = Decider::new(rules, labels, 1, SystemTime::UNIX_EPOCH);
        let counters = Arc::<Counters>::default();
        let (publisher, mut events, state) = Publisher::new(&mut decider, 1, counters.clone());
        let first = state.borrow().clone();
        let event = |confidence: f32| Event {
            class: None,
            previous: None,
            confidence,
            top: first.top.clone(),
            found: first.found.clone(),
            captured_at: first.captured_at,
            model: 1,
        };
        for confidence in [0.25, 0.5] {
            let observation = Observation { confidence, ..first.clone() };
            publisher.publish(Decision { observation, event: Some(event(confidence)), publish: true });
        }
        assert_eq!((counters.events.get(), counters.events_lost.get()), (2, 1));
        assert_eq!(events.try_recv().unwrap(), event(0.25));
        assert!(events.try_recv().is_err());
        assert_eq!(
            state.borrow().confidence,
            0.5,
            "the state is a slot: the newest observation replaces the one before"
        );
    }
}
