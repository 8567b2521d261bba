//! From predictions to events: what is seen now, and when that changes.
//!
//! Pure: no clock, no I/O. Time comes with the frames.
//!
//! Each class has a value that follows its probability with a time constant (a frame that is
//! unknown counts zero for every class). The class with the largest value is entered when the value
//! reaches its enter threshold, and left when it falls below its leave threshold; either must last
//! for its dwell time. Whatever interrupts it makes the waiting begin anew.

use std::time::{Duration, SystemTime};

use smallvec::SmallVec;

use crate::vision::Prediction;

/// How many classes a [`Sight`] lists.
pub const TOP_MAX: usize = 5;
/// After a longer gap, or a clock that was set, deciding begins anew.
const GAP_MAX: Duration = Duration::from_secs(60);
/// A value that moved less than this since it was last told is not worth telling.
const STEP: f32 = 0.05;

/// What is decided by.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Time constant of the values; zero takes each frame for itself.
    pub smoothing: Duration,
    /// How long another class must hold before it is seen.
    pub enter_dwell: Duration,
    /// How long no class must hold before nothing is seen. Where this is the longer one, a flower that
    /// takes another's place is one event.
    pub leave_dwell: Duration,
    /// A state that only differs in its values is told at most once in this time.
    pub state_interval: Duration,
    /// One a class.
    pub thresholds: Vec<Thresholds>,
}

/// Both 0–1; the distance between them keeps a value at the edge from flickering.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    pub enter: f32,
    pub leave: f32,
}

/// Why a threshold was not changed: a class would be entered and left at once, again and again.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("leave must not be above enter, for any class")]
pub struct Flicker;

impl Rules {
    /// Sets every class's enter threshold, 0–1.
    pub fn set_enter(&mut self, enter: f32) -> Result<(), Flicker> {
        if self.thresholds.iter().any(|class| class.leave > enter) {
            return Err(Flicker);
        }
        self.thresholds.iter_mut().for_each(|class| class.enter = enter);
        Ok(())
    }

    /// Sets every class's leave threshold, 0–1.
    pub fn set_leave(&mut self, leave: f32) -> Result<(), Flicker> {
        if self.thresholds.iter().any(|class| leave > class.enter) {
            return Err(Flicker);
        }
        self.thresholds.iter_mut().for_each(|class| class.leave = leave);
        Ok(())
    }
}

/// What is seen. A class is its place among the labels; none is `unknown`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sight {
    pub class: Option<usize>,
    /// The class's value; for `unknown`, what the best class lacks to 1.
    pub confidence: f32,
    /// Classes and values, best first, at most [`TOP_MAX`].
    pub top: SmallVec<[(usize, f32); TOP_MAX]>,
    /// When the frame was caught that made it this class.
    pub since: SystemTime,
    /// When the newest frame was caught.
    pub captured_at: SystemTime,
    /// False while the camera gives no frames.
    pub camera_ok: bool,
}

/// What one frame led to.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    pub sight: Sight,
    /// What was seen before, where this frame changed it.
    pub previous: Option<Option<usize>>,
    /// The sight differs enough from the one told last.
    pub tell: bool,
}

/// The state of one camera.
#[derive(Debug)]
pub struct Decider {
    rules: Rules,
    values: Vec<f32>,
    last_frame: Option<SystemTime>,
    class: Option<usize>,
    since: SystemTime,
    /// A change that has not lasted long enough, and since when it is due.
    pending: Option<(Option<usize>, SystemTime)>,
    told: Option<Sight>,
}

impl Decider {
    /// `now` is when the watching begins.
    pub fn new(rules: Rules, now: SystemTime) -> Self {
        let values = vec![0.0; rules.thresholds.len()];
        Decider { rules, values, last_frame: None, class: None, since: now, pending: None, told: None }
    }

    /// Whether the camera gave frames when it was last heard of.
    pub fn camera_ok(&self) -> bool {
        self.told.as_ref().is_some_and(|told| told.camera_ok)
    }

    /// What was told last.
    pub fn told(&self) -> Option<&Sight> {
        self.told.as_ref()
    }

    /// Other classes: what was seen of the old ones is forgotten, and should have been taken back before.
    pub fn relearn(&mut self, thresholds: Vec<Thresholds>) {
        self.values = vec![0.0; thresholds.len()];
        self.rules.thresholds = thresholds;
        (self.class, self.last_frame, self.pending, self.told) = (None, None, None, None);
    }

    pub fn rules_mut(&mut self) -> &mut Rules {
        &mut self.rules
    }

    /// A frame was classified.
    pub fn seen(&mut self, prediction: &Prediction, at: SystemTime) -> Decision {
        self.smooth(prediction, at);
        let target = self.target();
        let class = if self.lasted(target, at) { target } else { self.class };
        self.decide(class, at, true)
    }

    /// Nothing is seen from now on, and at once: before the first frame, when the camera fails, when
    /// the watching is paused.
    pub fn blind(&mut self, at: SystemTime, camera_ok: bool) -> Decision {
        self.values.fill(0.0);
        self.last_frame = None;
        self.pending = None;
        self.decide(None, at, camera_ok)
    }

    fn smooth(&mut self, prediction: &Prediction, at: SystemTime) {
        // A clock that was set begins anew, as the first frame does: a device without a battery wakes up
        // in the past.
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
        for (value, probability) in self.values.iter_mut().zip(&prediction.probabilities) {
            let seen = if prediction.known { *probability } else { 0.0 };
            *value += weight * (seen - *value);
        }
        self.last_frame = Some(at);
    }

    /// What the values speak for.
    fn target(&self) -> Option<usize> {
        let best = crate::vision::head::argmax(&self.values);
        if self.values[best] >= self.rules.thresholds[best].enter {
            return Some(best);
        }
        self.class.filter(|class| self.values[*class] >= self.rules.thresholds[*class].leave)
    }

    /// True once `target` differs from what is seen, and has done so for the dwell time.
    fn lasted(&mut self, target: Option<usize>, at: SystemTime) -> bool {
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

    fn decide(&mut self, class: Option<usize>, at: SystemTime, camera_ok: bool) -> Decision {
        let mut previous = None;
        if class != self.class {
            previous = Some(std::mem::replace(&mut self.class, class));
            self.since = at;
            self.pending = None;
        }
        let mut top = SmallVec::new();
        for (class, value) in self.values.iter().copied().enumerate() {
            let place = top.partition_point(|(_, better)| *better >= value);
            top.truncate(TOP_MAX - usize::from(place < TOP_MAX));
            if place < TOP_MAX {
                top.insert(place, (class, value));
            }
        }
        let best = top.first().map_or(0.0, |(_, value)| *value);
        let confidence = class.map_or(1.0 - best, |class| self.values[class]);
        let sight = Sight { class, confidence, top, since: self.since, captured_at: at, camera_ok };
        let tell = self.worth_telling(&sight);
        if tell {
            self.told = Some(sight.clone());
        }
        Decision { sight, previous, tell }
    }

    fn worth_telling(&self, sight: &Sight) -> bool {
        let Some(told) = &self.told else { return true };
        if told.class != sight.class || told.camera_ok != sight.camera_ok {
            return true;
        }
        let waited = match sight.captured_at.duration_since(told.captured_at) {
            Ok(elapsed) => elapsed >= self.rules.state_interval,
            Err(_) => true,
        };
        let value = |sight: &Sight, class: usize| {
            sight.top.iter().find(|(there, _)| *there == class).map_or(0.0, |(_, value)| *value)
        };
        let moved = |(class, now): &(usize, f32)| (now - value(told, *class)).abs() >= STEP;
        waited && sight.top.iter().any(moved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Option<usize> = Some(0);
    const B: Option<usize> = Some(1);
    const UNKNOWN: Option<usize> = None;

    fn at(ms: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(10_000 + ms)
    }

    fn rules(smoothing_ms: u64, dwell_ms: u64) -> Rules {
        Rules {
            smoothing: Duration::from_millis(smoothing_ms),
            enter_dwell: Duration::from_millis(dwell_ms),
            leave_dwell: Duration::from_millis(dwell_ms),
            state_interval: Duration::from_secs(1),
            thresholds: vec![Thresholds { enter: 0.7, leave: 0.5 }; 2],
        }
    }

    fn prediction(a: f32, known: bool) -> Prediction {
        Prediction { probabilities: vec![a, 1.0 - a], similarity: 0.0, known }
    }

    /// A trace: milliseconds, the probability of A (the rest is B's), or none for an unknown frame.
    fn changes(rules: Rules, trace: &[(u64, Option<f32>)]) -> Vec<(u64, Option<usize>)> {
        let mut decider = Decider::new(rules, at(0));
        let mut changes = Vec::new();
        for (ms, a) in trace {
            let decision = decider.seen(&prediction(a.unwrap_or(0.9), a.is_some()), at(*ms));
            if let Some(previous) = decision.previous {
                assert_ne!(previous, decision.sight.class);
                assert!(decision.tell, "a change is always told");
                assert_eq!(decision.sight.since, at(*ms));
                changes.push((*ms, decision.sight.class));
            }
        }
        changes
    }

    #[test]
    fn traces_lead_to_the_changes_expected() {
        type Trace<'a> = &'a [(u64, Option<f32>)];
        type Changes<'a> = &'a [(u64, Option<usize>)];
        let cases: &[(&str, u64, u64, Trace, Changes)] = &[
            ("entered at once without dwell", 0, 0, &[(0, Some(0.7))], &[(0, A)]),
            ("just below enter is not entered", 0, 0, &[(0, Some(0.69)), (100, Some(0.69))], &[]),
            ("between leave and enter what is seen stays", 0, 0, &[(0, Some(0.9)), (100, Some(0.51))], &[(0, A)]),
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
                "below threshold resets what was pending",
                0,
                200,
                &[(0, Some(0.9)), (150, Some(0.6)), (200, Some(0.9)), (399, Some(0.9)), (400, Some(0.9))],
                &[(400, A)],
            ),
            (
                "another class resets what was pending",
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
                "smoothing rides out one wrong frame",
                300,
                0,
                &[(0, Some(0.95)), (100, Some(0.95)), (200, Some(0.05)), (300, Some(0.95)), (400, Some(0.95))],
                &[(0, A)],
            ),
            (
                "smoothing goes by time, not by frames: after a long gap one frame is enough",
                300,
                0,
                &[(0, Some(0.95)), (3000, Some(0.05))],
                &[(0, A), (3000, B)],
            ),
            (
                "a clock set forward makes nothing last",
                300,
                200,
                &[(0, Some(0.9)), (100, Some(0.9)), (99_000, Some(0.9)), (99_100, Some(0.9)), (99_200, Some(0.9))],
                &[(99_200, A)],
            ),
            (
                "a clock set back begins anew",
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
    fn a_longer_dwell_for_leaving_makes_an_exchange_one_event() {
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
    fn thresholds_are_changed_unless_a_class_would_flicker() {
        let mut rules = rules(0, 0);
        assert_eq!(rules.set_enter(0.4), Err(Flicker));
        assert_eq!(rules.set_leave(0.8), Err(Flicker));
        assert_eq!(rules.thresholds, [Thresholds { enter: 0.7, leave: 0.5 }; 2]);
        assert_eq!((rules.set_enter(0.9), rules.set_leave(0.8)), (Ok(()), Ok(())));
        assert_eq!(rules.thresholds, [Thresholds { enter: 0.9, leave: 0.8 }; 2]);
    }

    #[test]
    fn a_lost_camera_sees_nothing_at_once_and_starts_anew() {
        let mut decider = Decider::new(rules(0, 500), at(0));
        let blind = decider.blind(at(0), false);
        assert_eq!((blind.sight.class, blind.sight.camera_ok, blind.tell), (UNKNOWN, false, true));
        decider.seen(&prediction(0.9, true), at(0));
        assert_eq!(decider.seen(&prediction(0.9, true), at(500)).previous, Some(UNKNOWN));
        let lost = decider.blind(at(600), false);
        assert_eq!((lost.previous, lost.sight.class, lost.sight.camera_ok), (Some(A), UNKNOWN, false));
        assert_eq!(lost.sight.confidence, 1.0);
        let again = decider.blind(at(700), false);
        assert_eq!((again.previous, again.tell), (None, false));
        let back = decider.seen(&prediction(0.9, true), at(800));
        assert_eq!((back.previous, back.sight.camera_ok, back.tell), (None, true, true));
        assert_eq!(decider.seen(&prediction(0.9, true), at(1300)).sight.class, A);
    }

    #[test]
    fn values_are_told_when_they_moved_but_not_too_often() {
        let mut decider = Decider::new(rules(0, 0), at(0));
        let told = [(0, 0.9), (1000, 0.89), (1500, 0.8), (1600, 0.95), (2500, 0.95), (4000, 0.93)]
            .map(|(ms, a)| decider.seen(&prediction(a, true), at(ms)).tell);
        assert_eq!(told, [true, false, true, false, true, false]);
    }

    #[test]
    fn the_top_is_sorted_and_unknown_says_what_is_lacking() {
        let mut decider = Decider::new(rules(0, 0), at(0));
        let sight = decider.seen(&prediction(0.4, true), at(0)).sight;
        assert_eq!(sight.class, UNKNOWN);
        assert_eq!(sight.top.iter().map(|(class, _)| *class).collect::<Vec<_>>(), [1, 0]);
        assert!((sight.confidence - 0.4).abs() < 1e-6);
    }
}
