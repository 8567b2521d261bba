//! Decides from predictions what is observed: smoothing, hysteresis and dwell times.
//!
//! Pure: no clock and, besides log lines, no I/O; each frame brings its capture time.
//!
//! Each class has a score that follows the class's probability as an exponential moving average (a frame that is unknown
//! counts as probability 0 for every class). A class becomes the observed one when its score is the largest, reaches the
//! enter threshold and stays so for the enter dwell time; it is left when its score falls below the leave threshold for the
//! leave dwell time. An interruption restarts the dwell time.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use smallvec::SmallVec;
use tracing::warn;

use crate::system::clock::Step;
use crate::vision::head::argmax;
use crate::vision::labels::ClassName;
use crate::vision::{Labels, Prediction, Quality, Region};

/// The most classes that an [`Observation`] lists.
pub const TOP_MAX: usize = 5;
/// A longer gap between two frames, or a clock that was set, restarts smoothing and dwell times.
const GAP_MAX: Duration = Duration::from_secs(60);
/// An observation is published again when a score has changed by at least this since the last publication.
const SCORE_STEP: f32 = 0.05;
/// An observation is published again when the place of its class overlaps that of the last publication by less than this:
/// intersection over union.
const MOVED_BELOW: f32 = 0.5;

/// Hysteresis thresholds of a class, 0–1, `leave` at most `enter`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    /// Score at which the class is entered.
    pub enter: f32,
    /// Score below which it is left.
    pub leave: f32,
}

/// The configured decision rules, for models of any classes.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// See [`Rules::smoothing`].
    pub smoothing: Duration,
    /// See [`Rules::enter_dwell`].
    pub enter_dwell: Duration,
    /// See [`Rules::leave_dwell`].
    pub leave_dwell: Duration,
    /// See [`Rules::state_interval`].
    pub state_interval: Duration,
    /// Thresholds of a class that `class_thresholds` does not name.
    pub thresholds: Thresholds,
    /// Thresholds by class name.
    pub class_thresholds: BTreeMap<String, Thresholds>,
}

/// The decision rules for the classes of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Time constant of the moving average; zero uses each frame alone.
    pub smoothing: Duration,
    /// Time for which another class must hold before it is observed.
    pub enter_dwell: Duration,
    /// Time for which no class must hold before `unknown` is observed. If it is longer than `enter_dwell`, a flower that
    /// replaces another is one event.
    pub leave_dwell: Duration,
    /// Minimum time between two publications of observations that differ only in their scores.
    pub state_interval: Duration,
    /// Thresholds of the classes that have none of their own.
    pub common: Thresholds,
    /// Thresholds of each class.
    pub thresholds: Vec<Thresholds>,
}

/// Thresholds that were refused because `leave` would be above `enter`, so that the observed class would oscillate.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("leave must not be above enter, for any class")]
pub struct InvalidHysteresis;

/// Thresholds for a class that the model does not have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model has no class {class:?}; its classes are {classes}")]
pub struct UnknownClass {
    /// The configured class.
    pub class: String,
    /// The model's classes, comma separated.
    pub classes: String,
}

impl Policy {
    /// Returns the rules for a model's classes.
    ///
    /// # Errors
    /// Thresholds are configured for a class that is not in `labels`.
    pub fn rules(&self, labels: &Labels) -> Result<Rules, UnknownClass> {
        match self.unknown_class(labels) {
            None => Ok(self.rules_for_known(labels)),
            Some(class) => Err(UnknownClass { class: class.into(), classes: labels.names().join(", ") }),
        }
    }

    /// Returns the rules for a model's classes; thresholds for a class that is not in `labels` are logged and ignored, as
    /// another model may have it.
    pub fn rules_for_known(&self, labels: &Labels) -> Rules {
        if let Some(class) = self.unknown_class(labels) {
            warn!("decide.classes = {class}: the model has no such class");
        }
        let mut thresholds = vec![self.thresholds; labels.names().len()];
        for (name, own) in &self.class_thresholds {
            if let Some(class) = configured_class(name, labels) {
                thresholds[class] = *own;
            }
        }
        Rules {
            smoothing: self.smoothing,
            enter_dwell: self.enter_dwell,
            leave_dwell: self.leave_dwell,
            state_interval: self.state_interval,
            common: self.thresholds,
            thresholds,
        }
    }

    fn unknown_class(&self, labels: &Labels) -> Option<&str> {
        self.class_thresholds.keys().map(String::as_str).find(|name| configured_class(name, labels).is_none())
    }
}

/// Returns the class that a configured name means: the class of this name, else the only one whose name differs in case alone,
/// as in environment variables.
fn configured_class(name: &str, labels: &Labels) -> Option<usize> {
    labels.position(name).or_else(|| {
        let lower = name.to_lowercase();
        let mut like = (0..labels.names().len()).filter(|class| labels.names()[*class].to_lowercase() == lower);
        like.next().filter(|_| like.next().is_none())
    })
}

impl Rules {
    /// Sets the enter threshold of every class, 0–1.
    ///
    /// # Errors
    /// It is below the leave threshold of a class; nothing is changed then.
    pub fn set_enter(&mut self, enter: f32) -> Result<(), InvalidHysteresis> {
        if self.thresholds.iter().chain([&self.common]).any(|class| class.leave > enter) {
            return Err(InvalidHysteresis);
        }
        self.all_thresholds().for_each(|class| class.enter = enter);
        Ok(())
    }

    /// Sets the leave threshold of every class, 0–1.
    ///
    /// # Errors
    /// It is above the enter threshold of a class; nothing is changed then.
    pub fn set_leave(&mut self, leave: f32) -> Result<(), InvalidHysteresis> {
        if self.thresholds.iter().chain([&self.common]).any(|class| leave > class.enter) {
            return Err(InvalidHysteresis);
        }
        self.all_thresholds().for_each(|class| class.leave = leave);
        Ok(())
    }

    fn all_thresholds(&mut self) -> impl Iterator<Item = &mut Thresholds> {
        self.thresholds.iter_mut().chain([&mut self.common])
    }
}

/// A class and its score.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranked {
    /// The class.
    pub class: ClassName,
    /// Its score, 0–1.
    pub confidence: f32,
}

/// The best classes with their scores, best first.
pub type Top = SmallVec<[Ranked; TOP_MAX]>;

/// The most places that an [`Observation`] lists.
pub const FOUND_MAX: usize = 8;

/// A place in the frame where a class was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The class.
    pub class: ClassName,
    /// Its probability in this frame, 0–1.
    pub confidence: f32,
    /// The part of the rotated and mirrored frame.
    pub region: Region,
}

/// The places in the newest frame, the most similar to the training images first.
pub type AllFound = SmallVec<[Found; FOUND_MAX]>;

/// The present state of the camera's view.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// The observed class; `None` is `unknown`.
    pub class: Option<ClassName>,
    /// Score of the class, 0–1; of `unknown`, 1 minus the best score.
    pub confidence: f32,
    /// The best classes.
    pub top: Top,
    /// Where classes were found in the newest frame; empty if it was not scanned.
    pub found: AllFound,
    /// Capture time of the frame that made it this class.
    pub since: SystemTime,
    /// Capture time of the newest frame.
    pub captured_at: SystemTime,
    /// Whether the camera delivers frames.
    pub camera_ok: bool,
    /// Quality of the newest frame. A frame whose quality is not ok does not change the class and the scores.
    pub quality: Quality,
    /// Whether classification is paused.
    pub paused: bool,
    /// Version of the model.
    pub model: u64,
}

/// A change of the observed class.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The new class; `None` is `unknown`.
    pub class: Option<ClassName>,
    /// The class before; `None` is `unknown`.
    pub previous: Option<ClassName>,
    /// See [`Observation::confidence`].
    pub confidence: f32,
    /// The best classes.
    pub top: Top,
    /// Where classes were found in the frame that caused the change; empty if it was not scanned.
    pub found: AllFound,
    /// Capture time of the frame that caused the change.
    pub captured_at: SystemTime,
    /// Version of the model.
    pub model: u64,
}

/// Returns the first place where `class` was found.
pub fn region_of(found: &AllFound, class: Option<&ClassName>) -> Option<Region> {
    found.iter().find(|found| Some(&found.class) == class).map(|found| found.region)
}

/// The result of one frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The state after the frame.
    pub observation: Observation,
    /// The change, if the frame caused one.
    pub event: Option<Event>,
    /// Whether the observation differs enough from the one published last to be published.
    pub publish: bool,
}

/// The decision state of one camera.
#[derive(Debug)]
pub struct Decider {
    rules: Rules,
    labels: Labels,
    /// Version of the model.
    model: u64,
    /// Moving average of each class's probability.
    scores: Vec<f32>,
    last_frame: Option<SystemTime>,
    /// Time of the last frame, also of one that could not be judged.
    last_seen: Option<SystemTime>,
    class: Option<usize>,
    since: SystemTime,
    /// A change that has not lasted for its dwell time, and its first frame's time.
    pending: Option<(Option<usize>, SystemTime)>,
    paused: bool,
    /// The part of the rotated and mirrored frame that is classified.
    frame_region: Region,
    found: AllFound,
    published: Option<Observation>,
}

impl Decider {
    /// Starts with `unknown`, observed since `now`. `model` is the version of the model that has these labels.
    ///
    /// # Panics
    /// If `rules` has not one threshold a label.
    pub fn new(rules: Rules, labels: Labels, model: u64, now: SystemTime) -> Self {
        assert_eq!(rules.thresholds.len(), labels.names().len(), "one threshold a class");
        Decider {
            scores: vec![0.0; rules.thresholds.len()],
            rules,
            labels,
            model,
            last_frame: None,
            last_seen: None,
            class: None,
            since: now,
            pending: None,
            paused: false,
            frame_region: Region::WHOLE,
            found: AllFound::new(),
            published: None,
        }
    }

    /// Sets the part of the rotated and mirrored frame that the predictions are of.
    pub fn set_frame_region(&mut self, region: Region) {
        self.frame_region = region;
    }

    /// The classes that are decided among.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Whether the camera gave frames when an observation was published last.
    pub fn camera_ok(&self) -> bool {
        self.published.as_ref().is_some_and(|published| published.camera_ok)
    }

    /// Whether classification is paused.
    pub fn paused(&self) -> bool {
        self.paused
    }

    /// The observation that was published last.
    pub fn published(&self) -> Option<&Observation> {
        self.published.as_ref()
    }

    /// The rules.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The rules, to be changed while it runs.
    pub fn rules_mut(&mut self) -> &mut Rules {
        &mut self.rules
    }

    /// Continues after a step of the clock: the times of earlier frames become those that the clock would have shown.
    pub fn clock_set(&mut self, step: Step) {
        self.since = step.apply(self.since);
        self.last_frame = self.last_frame.map(|time| step.apply(time));
        self.last_seen = self.last_seen.map(|time| step.apply(time));
        self.pending = self.pending.map(|(class, since)| (class, step.apply(since)));
    }

    /// Continues with another model of the same classes; the observation stays.
    pub fn set_model(&mut self, model: u64) {
        self.model = model;
        if let Some(published) = &mut self.published {
            published.model = model;
        }
    }

    /// Continues with a model of other classes and drops the present observation, which the caller has ended with
    /// [`Decider::observe_unknown`] before.
    ///
    /// # Panics
    /// If there is not one threshold a label.
    pub fn reset_classes(&mut self, labels: Labels, model: u64, thresholds: Vec<Thresholds>, common: Thresholds) {
        assert_eq!(thresholds.len(), labels.names().len(), "one threshold a class");
        self.scores = vec![0.0; thresholds.len()];
        (self.rules.thresholds, self.rules.common) = (thresholds, common);
        (self.labels, self.model) = (labels, model);
        (self.class, self.last_frame, self.pending, self.published) = (None, None, None, None);
    }

    /// Takes the prediction of a frame captured at `at`.
    pub fn classified(&mut self, prediction: &Prediction, at: SystemTime) -> Decision {
        self.smooth(prediction, at);
        let found = prediction.found.iter().map(|found| Found {
            class: self.labels.class_name(found.class),
            confidence: found.confidence,
            region: found.region.within(&self.frame_region),
        });
        self.found = found.take(FOUND_MAX).collect();
        let target = self.target();
        let class = if self.dwell_elapsed(target, at) { target } else { self.class };
        self.decide(class, at, true, Quality::Ok)
    }

    /// Takes a frame captured at `at` that cannot be judged: the class and the scores stay, and the time up to it does not count as
    /// dwell time.
    pub fn unfit(&mut self, quality: Quality, at: SystemTime) -> Decision {
        let waited = self.last_seen.and_then(|last| at.duration_since(last).ok()).unwrap_or_default();
        self.pending = self.pending.map(|(class, since)| (class, since + waited));
        self.last_seen = Some(at);
        self.found.clear();
        self.decide(self.class, at, true, quality)
    }

    /// Observes `unknown` from now on, without dwell time: before the first frame, when the camera fails, while
    /// classification is paused.
    pub fn observe_unknown(&mut self, at: SystemTime, camera_ok: bool) -> Decision {
        self.scores.fill(0.0);
        self.found.clear();
        self.last_frame = None;
        self.pending = None;
        self.decide(None, at, camera_ok, Quality::Ok)
    }

    /// Pauses or resumes classification; either observes `unknown` and publishes.
    pub fn set_paused(&mut self, paused: bool, at: SystemTime) -> Decision {
        self.paused = paused;
        let decision = self.observe_unknown(at, self.camera_ok());
        self.published = Some(decision.observation.clone());
        Decision { publish: true, ..decision }
    }

    fn smooth(&mut self, prediction: &Prediction, at: SystemTime) {
        // After a clock that was set, smoothing restarts as with the first frame: a device without a battery-backed clock
        // boots in the past.
        let elapsed = self.last_frame.and_then(|last| at.duration_since(last).ok()).filter(|gap| *gap <= GAP_MAX);
        if elapsed.is_none() {
            self.pending = None;
        }
        let weight = match elapsed {
            Some(elapsed) if !self.rules.smoothing.is_zero() => {
                1.0 - (-elapsed.as_secs_f32() / self.rules.smoothing.as_secs_f32()).exp()
            }
            _ => 1.0,
        };
        for (score, probability) in self.scores.iter_mut().zip(&prediction.probabilities) {
            let observed = if prediction.known { *probability } else { 0.0 };
            *score += weight * (observed - *score);
        }
        (self.last_frame, self.last_seen) = (Some(at), Some(at));
    }

    /// Returns the class that the scores and thresholds select.
    fn target(&self) -> Option<usize> {
        let best = argmax(&self.scores);
        if self.scores[best] >= self.rules.thresholds[best].enter {
            return Some(best);
        }
        self.class.filter(|class| self.scores[*class] >= self.rules.thresholds[*class].leave)
    }

    /// Returns whether `target` differs from the present class and has done so for the dwell time.
    fn dwell_elapsed(&mut self, target: Option<usize>, at: SystemTime) -> bool {
        if target == self.class {
            self.pending = None;
            return false;
        }
        let since = match self.pending {
            Some((pending, since)) if pending == target => since,
            _ => {
                self.pending = Some((target, at));
                at
            }
        };
        let dwell = if target.is_some() { self.rules.enter_dwell } else { self.rules.leave_dwell };
        at.duration_since(since).is_ok_and(|waited| waited >= dwell)
    }

    fn decide(&mut self, class: Option<usize>, at: SystemTime, camera_ok: bool, quality: Quality) -> Decision {
        let top = self.top();
        let confidence = match class {
            Some(class) => self.scores[class],
            None => 1.0 - top.first().map_or(0.0, |best| best.confidence),
        };
        let name = |class: Option<usize>| class.map(|class| self.labels.class_name(class));
        let event = (class != self.class).then(|| Event {
            class: name(class),
            previous: name(self.class),
            confidence,
            top: top.clone(),
            found: self.found.clone(),
            captured_at: at,
            model: self.model,
        });
        if event.is_some() {
            self.class = class;
            self.since = at;
            self.pending = None;
        }
        let observation = Observation {
            class: name(class),
            confidence,
            top,
            found: self.found.clone(),
            since: self.since,
            captured_at: at,
            camera_ok,
            quality,
            paused: self.paused,
            model: self.model,
        };
        let publish = self.is_worth_publishing(&observation);
        if publish {
            self.published = Some(observation.clone());
        }
        Decision { observation, event, publish }
    }

    /// The best classes; of equal scores the first class comes first.
    fn top(&self) -> Top {
        let mut best: SmallVec<[(usize, f32); TOP_MAX]> = SmallVec::new();
        for (class, score) in self.scores.iter().copied().enumerate() {
            let rank = best.partition_point(|(_, better)| *better >= score);
            best.truncate(TOP_MAX - usize::from(rank < TOP_MAX));
            if rank < TOP_MAX {
                best.insert(rank, (class, score));
            }
        }
        best.into_iter()
            .map(|(class, confidence)| Ranked { class: self.labels.class_name(class), confidence })
            .collect()
    }

    fn is_worth_publishing(&self, observation: &Observation) -> bool {
        let Some(published) = &self.published else { return true };
        let is_same = published.class == observation.class
            && published.camera_ok == observation.camera_ok
            // It changes when the clock is set.
            && published.since == observation.since;
        if !is_same {
            return true;
        }
        let due = match observation.captured_at.duration_since(published.captured_at) {
            Ok(elapsed) => elapsed >= self.rules.state_interval,
            Err(_) => true,
        };
        let score_before = |class: &ClassName| {
            published.top.iter().find(|ranked| ranked.class == *class).map_or(0.0, |ranked| ranked.confidence)
        };
        let changed = |now: &Ranked| (now.confidence - score_before(&now.class)).abs() >= SCORE_STEP;
        let [region, region_before] =
            [observation, published].map(|observation| region_of(&observation.found, observation.class.as_ref()));
        let moved = match (region, region_before) {
            (Some(now), Some(before)) => now.intersection_over_union(&before) < MOVED_BELOW,
            (now, before) => now.is_some() != before.is_some(),
        };
        // A quality at its limit may change with each frame.
        due && (moved || observation.quality != published.quality || observation.top.iter().any(changed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::Detection;

    const A: Option<usize> = Some(0);
    const B: Option<usize> = Some(1);
    const UNKNOWN: Option<usize> = None;

    fn labels() -> Labels {
        Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap()
    }

    fn decider(rules: Rules) -> Decider {
        Decider::new(rules, labels(), 7, at(0))
    }

    fn index(class: &Option<ClassName>) -> Option<usize> {
        class.as_ref().map(|class| labels().position(class).unwrap())
    }

    fn at(ms: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(10_000 + ms)
    }

    fn rules(smoothing_ms: u64, dwell_ms: u64) -> Rules {
        Rules {
            smoothing: Duration::from_millis(smoothing_ms),
            enter_dwell: Duration::from_millis(dwell_ms),
            leave_dwell: Duration::from_millis(dwell_ms),
            state_interval: Duration::from_secs(1),
            common: Thresholds { enter: 0.7, leave: 0.5 },
            thresholds: vec![Thresholds { enter: 0.7, leave: 0.5 }; 2],
        }
    }

    fn prediction(a: f32, known: bool) -> Prediction {
        Prediction { probabilities: vec![a, 1.0 - a], known, ..Prediction::default() }
    }

    /// Returns the events of a trace: milliseconds, the probability of A (the rest is B's), or `None` for an unknown frame.
    fn changes(rules: Rules, trace: &[(u64, Option<f32>)]) -> Vec<(u64, Option<usize>)> {
        let mut decider = decider(rules);
        let mut changes = Vec::new();
        for (ms, a) in trace {
            let decision = decider.classified(&prediction(a.unwrap_or(0.9), a.is_some()), at(*ms));
            if let Some(event) = decision.event {
                assert_ne!(event.previous, event.class);
                assert_eq!((&event.class, event.model), (&decision.observation.class, 7));
                assert!(decision.publish, "a change is always published");
                assert_eq!((decision.observation.since, event.captured_at), (at(*ms), at(*ms)));
                changes.push((*ms, index(&event.class)));
            }
        }
        changes
    }

    #[test]
    fn an_unfit_frame_changes_the_quality_alone() {
        let mut decider = decider(rules(0, 200));
        decider.classified(&prediction(0.9, true), at(0));
        decider.classified(&prediction(0.9, true), at(200));
        // A change to B begins; the time before dark frames does not count.
        decider.classified(&prediction(0.1, true), at(300));
        let dark = decider.unfit(Quality::Dark, at(450));
        assert_eq!((dark.event, index(&dark.observation.class)), (None, A));
        assert_eq!((dark.observation.since, dark.observation.captured_at), (at(200), at(450)));
        assert!(dark.observation.camera_ok && dark.observation.quality == Quality::Dark && !dark.publish);
        assert!(decider.unfit(Quality::Dark, at(1200)).publish, "after the interval of the state");
        assert!(!decider.unfit(Quality::Dark, at(9000)).publish, "nothing has changed");
        let back = decider.classified(&prediction(0.1, true), at(9100));
        assert_eq!((back.event, back.observation.quality, back.publish), (None, Quality::Ok, true));
        assert_eq!(index(&decider.classified(&prediction(0.1, true), at(9200)).observation.class), B);
    }

    #[test]
    fn unfit_frames_in_between_delay_a_change_and_do_not_prevent_it() {
        let mut decider = decider(rules(0, 400));
        let changed_at = (0..20).find(|i| {
            let at = at(100 * i);
            let decision = match i % 3 {
                2 => decider.unfit(Quality::Blurred, at),
                _ => decider.classified(&prediction(0.9, true), at),
            };
            decision.event.is_some()
        });
        // Of each 300 ms, 200 count.
        assert_eq!(changed_at, Some(6));
    }

    #[test]
    fn traces_lead_to_the_expected_events() {
        type Trace<'a> = &'a [(u64, Option<f32>)];
        type Changes<'a> = &'a [(u64, Option<usize>)];
        let cases: &[(&str, u64, u64, Trace, Changes)] = &[
            ("entered at once without dwell", 0, 0, &[(0, Some(0.7))], &[(0, A)]),
            ("just below enter is not entered", 0, 0, &[(0, Some(0.69)), (100, Some(0.69))], &[]),
            ("between leave and enter the class stays", 0, 0, &[(0, Some(0.9)), (100, Some(0.51))], &[(0, A)]),
            ("below leave it is left", 0, 0, &[(0, Some(0.9)), (100, Some(0.49))], &[(0, A), (100, UNKNOWN)]),
            ("one class follows another directly", 0, 0, &[(0, Some(0.9)), (100, Some(0.1))], &[(0, A), (100, B)]),
            ("an unknown frame counts for no class", 0, 0, &[(0, Some(0.9)), (100, None)], &[(0, A), (100, UNKNOWN)]),
            (
                "a change must last for the dwell time",
                0,
                200,
                &[(0, Some(0.9)), (100, Some(0.9)), (199, Some(0.9)), (200, Some(0.9))],
                &[(200, A)],
            ),
            (
                "a score below the threshold restarts the dwell time",
                0,
                200,
                &[(0, Some(0.9)), (150, Some(0.6)), (200, Some(0.9)), (399, Some(0.9)), (400, Some(0.9))],
                &[(400, A)],
            ),
            (
                "another class restarts the dwell time",
                0,
                200,
                &[(0, Some(0.9)), (100, Some(0.1)), (200, Some(0.9)), (300, Some(0.9)), (400, Some(0.9))],
                &[(400, A)],
            ),
            (
                "a short absence is no event",
                0,
                200,
                &[(0, Some(0.9)), (200, Some(0.9)), (300, None), (400, Some(0.9)), (500, None), (600, Some(0.9))],
                &[(200, A)],
            ),
            (
                "smoothing hides one wrong frame",
                300,
                0,
                &[(0, Some(0.95)), (100, Some(0.95)), (200, Some(0.05)), (300, Some(0.95)), (400, Some(0.95))],
                &[(0, A)],
            ),
            (
                "smoothing depends on time, not on frames: after a long gap one frame is enough",
                300,
                0,
                &[(0, Some(0.95)), (3000, Some(0.05))],
                &[(0, A), (3000, B)],
            ),
            (
                "a clock set forward restarts the dwell time",
                300,
                200,
                &[(0, Some(0.9)), (100, Some(0.9)), (99_000, Some(0.9)), (99_100, Some(0.9)), (99_200, Some(0.9))],
                &[(99_200, A)],
            ),
            (
                "a clock set back restarts smoothing and dwell time",
                300,
                100,
                &[(5000, Some(0.9)), (5100, Some(0.9)), (0, Some(0.1)), (100, Some(0.1))],
                &[(5100, A), (100, B)],
            ),
        ];
        for (name, smoothing_ms, dwell_ms, trace, expected) in cases {
            assert_eq!(changes(rules(*smoothing_ms, *dwell_ms), trace), *expected, "{name}");
        }
    }

    #[test]
    fn after_a_clock_step_the_observation_began_when_the_clock_would_have_shown() {
        let mut decider = decider(rules(0, 200));
        decider.classified(&prediction(0.9, true), at(0));
        assert_eq!(index(&decider.classified(&prediction(0.9, true), at(200)).observation.class), A);
        decider.classified(&prediction(0.1, true), at(300));
        // From 1970 to a real time, within the dwell time of the other class.
        let years = Duration::from_secs(56 * 365 * 86_400);
        decider.clock_set(Step::Forward(years));
        let same = decider.classified(&prediction(0.9, true), at(400) + years);
        assert_eq!((same.observation.since, same.event.is_none(), same.publish), (at(200) + years, true, true));
        for ms in [500, 600, 700, 900] {
            decider.classified(&prediction(0.05, true), at(ms) + years);
        }
        assert_eq!(index(&decider.published().unwrap().class), B);
        decider.clock_set(Step::Back(years));
        let observation = decider.classified(&prediction(0.05, true), at(1000)).observation;
        assert!(observation.since <= observation.captured_at && observation.since > at(500), "{observation:?}");
    }

    #[test]
    fn a_longer_leave_dwell_makes_a_replacement_one_event() {
        let rules = Rules { leave_dwell: Duration::from_millis(300), ..rules(0, 100) };
        let exchange = [0.9, 0.9, 0.6, 0.4, 0.4, 0.2, 0.2, 0.2].map(Some);
        let trace: Vec<_> = exchange.iter().enumerate().map(|(i, a)| (i as u64 * 100, *a)).collect();
        assert_eq!(changes(rules.clone(), &trace), [(100, A), (600, B)]);
        let gone: Vec<_> = (0..8).map(|i| (i * 100, (i < 2).then_some(0.9))).collect();
        assert_eq!(changes(rules, &gone), [(100, A), (500, UNKNOWN)]);
    }

    #[test]
    fn thresholds_are_per_class() {
        let mut rules = rules(0, 0);
        rules.thresholds[1] = Thresholds { enter: 0.95, leave: 0.9 };
        let trace = [(0, Some(0.25)), (100, Some(0.04)), (200, Some(0.08)), (300, Some(0.12))];
        assert_eq!(changes(rules, &trace), [(100, B), (300, UNKNOWN)]);
    }

    #[test]
    fn refuses_a_leave_threshold_above_enter() {
        let mut rules = rules(0, 0);
        assert_eq!(rules.set_enter(0.4), Err(InvalidHysteresis));
        assert_eq!(rules.set_leave(0.8), Err(InvalidHysteresis));
        assert_eq!(rules.thresholds, [Thresholds { enter: 0.7, leave: 0.5 }; 2]);
        assert_eq!((rules.set_enter(0.9), rules.set_leave(0.8)), (Ok(()), Ok(())));
        assert_eq!(rules.thresholds, [Thresholds { enter: 0.9, leave: 0.8 }; 2]);
    }

    #[test]
    fn a_lost_camera_is_unknown_at_once_and_restarts_the_dwell_time() {
        let mut decider = decider(rules(0, 500));
        let first = decider.observe_unknown(at(0), false);
        assert_eq!((first.observation.class, first.observation.camera_ok, first.publish), (None, false, true));
        decider.classified(&prediction(0.9, true), at(0));
        let entered = decider.classified(&prediction(0.9, true), at(500)).event.unwrap();
        assert_eq!((index(&entered.class), entered.previous), (A, None));
        let lost = decider.observe_unknown(at(600), false);
        assert_eq!(index(&lost.event.unwrap().previous), A);
        assert_eq!((lost.observation.class, lost.observation.camera_ok), (None, false));
        assert_eq!(lost.observation.confidence, 1.0);
        let again = decider.observe_unknown(at(700), false);
        assert_eq!((again.event, again.publish), (None, false));
        let back = decider.classified(&prediction(0.9, true), at(800));
        assert_eq!((back.event, back.observation.camera_ok, back.publish), (None, true, true));
        assert_eq!(index(&decider.classified(&prediction(0.9, true), at(1300)).observation.class), A);
    }

    #[test]
    fn changed_scores_are_published_at_most_once_an_interval() {
        let mut decider = decider(rules(0, 0));
        let published = [(0, 0.9), (1000, 0.89), (1500, 0.8), (1600, 0.95), (2500, 0.95), (4000, 0.93)]
            .map(|(ms, a)| decider.classified(&prediction(a, true), at(ms)).publish);
        assert_eq!(published, [true, false, true, false, true, false]);
    }

    #[test]
    fn the_top_is_sorted_and_unknown_has_the_remaining_confidence() {
        let mut decider = decider(rules(0, 0));
        let observation = decider.classified(&prediction(0.4, true), at(0)).observation;
        assert_eq!(index(&observation.class), UNKNOWN);
        let top: Vec<&str> = observation.top.iter().map(|ranked| &*ranked.class).collect();
        assert_eq!(top, ["tulips", "daisy"]);
        assert!((observation.confidence - 0.4).abs() < 1e-6);
    }

    #[test]
    fn pausing_is_published_and_ends_the_observation() {
        let mut decider = decider(rules(0, 0));
        decider.classified(&prediction(0.9, true), at(0));
        let paused = decider.set_paused(true, at(100));
        assert_eq!((paused.publish, paused.observation.paused, paused.observation.camera_ok), (true, true, true));
        assert_eq!(index(&paused.event.unwrap().previous), A);
        assert!(decider.published().unwrap().paused);
        let resumed = decider.set_paused(false, at(200));
        assert_eq!((resumed.publish, resumed.observation.paused, resumed.event), (true, false, None));
    }

    #[test]
    fn another_model_keeps_the_observation_unless_its_classes_differ() {
        let mut decider = decider(rules(0, 0));
        decider.classified(&prediction(0.9, true), at(0));
        decider.set_model(8);
        assert_eq!((decider.published().unwrap().model, index(&decider.published().unwrap().class)), (8, A));
        let others = Labels::new(vec!["aster".into(), "rose".into(), "lily".into()]).unwrap();
        let common = Thresholds { enter: 0.7, leave: 0.5 };
        decider.reset_classes(others, 9, vec![common; 3], common);
        assert_eq!(decider.published(), None);
        let first = decider.observe_unknown(at(100), true);
        assert_eq!((first.publish, first.event, first.observation.model), (true, None, 9));
        assert_eq!(first.observation.top.len(), 3);
    }

    #[test]
    fn thresholds_of_a_class_that_the_model_lacks_are_an_error_or_ignored() {
        let thresholds = Thresholds { enter: 0.7, leave: 0.5 };
        let own = Thresholds { enter: 0.9, leave: 0.8 };
        let mut policy = Policy {
            smoothing: Duration::ZERO,
            enter_dwell: Duration::ZERO,
            leave_dwell: Duration::ZERO,
            state_interval: Duration::ZERO,
            thresholds,
            class_thresholds: [("tulips".to_owned(), own)].into(),
        };
        assert_eq!(policy.rules(&labels()).unwrap().thresholds, [thresholds, own]);
        policy.class_thresholds.insert("orchid".into(), own);
        let error = policy.rules(&labels()).unwrap_err().to_string();
        assert_eq!(error, "the model has no class \"orchid\"; its classes are daisy, tulips");
        assert_eq!(policy.rules_for_known(&labels()).thresholds, [thresholds, own]);
    }

    #[test]
    fn places_are_those_of_the_whole_frame_and_a_moved_one_is_published() {
        let mut decider = decider(Rules { state_interval: Duration::from_millis(100), ..rules(0, 0) });
        decider.set_frame_region(Region::new([0.5, 0.0, 0.5, 1.0]).unwrap());
        let found = |class: usize, bounds| Detection { class, confidence: 0.9, region: Region::new(bounds).unwrap() };
        let mut frame =
            |ms, found: Vec<Detection>| decider.classified(&Prediction { found, ..prediction(1.0, true) }, at(ms));
        let first = frame(0, vec![found(1, [0.0, 0.0, 0.2, 0.2]), found(0, [0.5, 0.5, 0.5, 0.5])]);
        let observation = &first.observation;
        assert_eq!(observation.found.iter().map(|found| &*found.class).collect::<Vec<_>>(), ["tulips", "daisy"]);
        let class = labels().class_name(0);
        assert_eq!(region_of(&observation.found, Some(&class)), Region::new([0.75, 0.5, 0.25, 0.5]).ok());
        assert_eq!(region_of(&observation.found, None), None);
        frame(1000, vec![found(0, [0.5, 0.5, 0.5, 0.5])]);
        assert!(!frame(2000, vec![found(0, [0.5, 0.45, 0.5, 0.5])]).publish, "about the same place");
        assert!(frame(3000, vec![found(0, [0.0, 0.0, 0.5, 0.5])]).publish, "another place");
        assert!(!frame(3050, vec![]).publish, "too soon");
        assert!(frame(4000, vec![]).publish, "no place any more");
    }
}
