//! The training loop: mini-batches, stochastic gradient descent with momentum or Adam, a learning rate that
//! follows a schedule, the best epoch kept. The same seed gives the same numbers on the same kind of machine,
//! whatever the number of threads.

use clap::ValueEnum;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// The settings of the loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sgd {
    pub seed: u64,
    pub epochs: usize,
    /// Epochs without a better validation loss after which training ends; 0 trains them all.
    pub patience: usize,
    pub batch: usize,
    pub optimiser: Optimiser,
    /// The largest that the schedule reaches.
    pub learning_rate: f32,
    pub schedule: Schedule,
    /// Epochs in which the learning rate grows from nothing.
    pub warm_up: usize,
    /// Of `schedule = "step"`: epochs between two steps, and what each multiplies the learning rate by.
    pub step_epochs: usize,
    pub step_factor: f32,
    /// Of `optimiser = "sgd"`.
    pub momentum: f32,
    pub nesterov: bool,
    /// Of the weights, not of biases. With SGD part of the gradient, with Adam apart from it (AdamW).
    pub weight_decay: f32,
    /// Share of the truth that is given to all classes alike, 0–1.
    pub label_smoothing: f32,
    /// Whether a photograph of a rare class counts more, so that all classes count the same.
    pub balance: bool,
    /// Share of the features that a step does not see, 0–1; of a fine-tuned convolution only.
    pub dropout: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Optimiser {
    Sgd,
    /// Adam (Kingma and Ba, 2014) with weight decay apart (Loshchilov and Hutter, 2017).
    Adam,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    Constant,
    Step,
    /// Falls to zero along half a cosine.
    Cosine,
}

impl Sgd {
    /// At a share of the way, `at` steps of `of`, `per_epoch` steps an epoch.
    fn rate(&self, at: usize, of: usize, per_epoch: usize) -> f32 {
        let warm_up = (self.warm_up * per_epoch).min(of);
        if at < warm_up {
            return self.learning_rate * (at + 1) as f32 / warm_up as f32;
        }
        match self.schedule {
            Schedule::Constant => self.learning_rate,
            Schedule::Step => {
                let steps = (at - warm_up) / (self.step_epochs.max(1) * per_epoch);
                self.learning_rate * self.step_factor.powi(steps as i32)
            }
            Schedule::Cosine => {
                let share = (at - warm_up) as f32 / (of - warm_up) as f32;
                self.learning_rate * 0.5 * (1.0 + (std::f32::consts::PI * share).cos())
            }
        }
    }
}

/// Numbers that are learned, with their gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamGroup {
    pub name: &'static str,
    pub values: Vec<f32>,
    pub gradient: Vec<f32>,
    /// Whether weight decay pulls at them.
    pub decays: bool,
}

impl ParamGroup {
    pub fn new(name: &'static str, values: Vec<f32>, decays: bool) -> Self {
        ParamGroup { name, gradient: vec![0.0; values.len()], values, decays }
    }
}

/// Loss and accuracy on the validation set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// Mean cross-entropy in nats, at the temperature that makes it least.
    pub loss: f64,
    /// Share whose best class is right, 0–1.
    pub accuracy: f64,
}

/// What can be trained.
pub trait Learner {
    /// Photographs it learns from.
    fn photographs(&self) -> usize;
    fn groups(&mut self) -> &mut [ParamGroup];
    /// Computes the gradient on a batch; gives the mean loss in nats.
    fn learn(&mut self, batch: &[usize], rng: &mut ChaCha8Rng) -> f32;
    fn measure(&self) -> Measure;
}

/// An epoch that is over.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// From 1.
    pub epoch: usize,
    /// At its last step.
    pub learning_rate: f32,
    /// Mean over its steps, in nats, against the smoothed truth.
    pub train_loss: f32,
    pub val: Measure,
    /// Whether no epoch before had a lower validation loss.
    pub best: bool,
}

/// Trains; `told` sees each epoch as it ends, and the numbers as they are then. What it gives back as an error
/// ends the training, and so does a loss that is no number: it stands last in what is given back. Leaves the numbers of
/// the best epoch.
pub fn fit<E>(
    learner: &mut dyn Learner,
    settings: &Sgd,
    mut told: impl FnMut(&Epoch, &[ParamGroup]) -> Result<(), E>,
) -> Result<Vec<Epoch>, E> {
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let mut order: Vec<usize> = (0..learner.photographs()).collect();
    let per_epoch = order.len().div_ceil(settings.batch);
    let steps = settings.epochs * per_epoch;
    let mut memory = OptimizerState::of(learner.groups());
    let mut history: Vec<Epoch> = Vec::new();
    let mut best: Option<(Epoch, Vec<Vec<f32>>)> = None;
    for epoch in 1..=settings.epochs {
        shuffle(&mut order, &mut rng);
        let (mut loss, mut learning_rate) = (0.0, 0.0);
        for batch in order.chunks(settings.batch) {
            loss += learner.learn(batch, &mut rng) * batch.len() as f32;
            learning_rate = settings.rate(memory.steps, steps, per_epoch);
            memory.step(learner.groups(), settings, learning_rate);
        }
        let val = learner.measure();
        let better = val.loss.is_finite() && best.as_ref().is_none_or(|(best, _)| val.loss < best.val.loss);
        let train_loss = loss / order.len() as f32;
        let ended = Epoch { epoch, learning_rate, train_loss, val, best: better };
        history.push(ended);
        if better {
            best = Some((ended, learner.groups().iter().map(|group| group.values.clone()).collect()));
        }
        told(&ended, learner.groups())?;
        if !val.loss.is_finite() {
            break;
        }
        let since = epoch - best.as_ref().map_or(0, |(best, _)| best.epoch);
        if settings.patience > 0 && since >= settings.patience {
            break;
        }
    }
    if let Some((_, values)) = best {
        for (group, values) in learner.groups().iter_mut().zip(values) {
            group.values = values;
        }
    }
    Ok(history)
}

/// What the optimiser remembers of the steps before.
struct OptimizerState {
    steps: usize,
    /// Of each group: the velocity, or the mean of the gradient, and of its square.
    first: Vec<Vec<f32>>,
    second: Vec<Vec<f32>>,
}

impl OptimizerState {
    fn of(groups: &[ParamGroup]) -> Self {
        let zeros = || groups.iter().map(|group| vec![0.0; group.values.len()]).collect();
        OptimizerState { steps: 0, first: zeros(), second: zeros() }
    }

    fn step(&mut self, groups: &mut [ParamGroup], settings: &Sgd, rate: f32) {
        self.steps += 1;
        for ((group, first), second) in groups.iter_mut().zip(&mut self.first).zip(&mut self.second) {
            let decay = if group.decays { settings.weight_decay } else { 0.0 };
            match settings.optimiser {
                Optimiser::Sgd => sgd_step(group, first, settings, rate, decay),
                Optimiser::Adam => adam_step(group, first, second, self.steps, rate, decay),
            }
        }
    }
}

/// v ← μ v + g; w ← w − r v, or with Nesterov w − r (g + μ v)
fn sgd_step(group: &mut ParamGroup, velocity: &mut [f32], settings: &Sgd, rate: f32, decay: f32) {
    let momentum = settings.momentum;
    for ((value, gradient), velocity) in group.values.iter_mut().zip(&group.gradient).zip(velocity) {
        let gradient = gradient + decay * *value;
        *velocity = momentum * *velocity + gradient;
        *value -= rate * if settings.nesterov { gradient + momentum * *velocity } else { *velocity };
    }
}

/// m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²; w ← w − r (m̂ / (√v̂ + ε) + λ w)
fn adam_step(group: &mut ParamGroup, first: &mut [f32], second: &mut [f32], steps: usize, rate: f32, decay: f32) {
    const BETA: [f32; 2] = [0.9, 0.999];
    const EPSILON: f32 = 1e-7;
    let unbias = BETA.map(|beta| 1.0 / (1.0 - beta.powi(steps.try_into().unwrap_or(i32::MAX))));
    let moments = first.iter_mut().zip(second);
    for ((value, gradient), (first, second)) in group.values.iter_mut().zip(&group.gradient).zip(moments) {
        *first = BETA[0] * *first + (1.0 - BETA[0]) * gradient;
        *second = BETA[1] * *second + (1.0 - BETA[1]) * gradient * gradient;
        let step = *first * unbias[0] / ((*second * unbias[1]).sqrt() + EPSILON);
        *value -= rate * (step + decay * *value);
    }
}

/// Fisher and Yates, from the end.
pub fn shuffle(order: &mut [usize], rng: &mut ChaCha8Rng) {
    for last in (1..order.len()).rev() {
        order.swap(last, below(rng, last + 1));
    }
}

/// A number below `n`; the bias of the remainder is below 2⁻³² for every set that fits a disk.
pub fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    (rng.next_u64() % n as u64) as usize
}

#[cfg(test)]
pub mod tests {
    use std::convert::Infallible;

    use super::*;

    pub fn settings() -> Sgd {
        Sgd {
            seed: 1,
            epochs: 20,
            patience: 0,
            batch: 16,
            optimiser: Optimiser::Sgd,
            learning_rate: 0.1,
            schedule: Schedule::Cosine,
            warm_up: 0,
            step_epochs: 5,
            step_factor: 0.1,
            momentum: 0.9,
            nesterov: true,
            weight_decay: 0.0,
            label_smoothing: 0.0,
            balance: false,
            dropout: 0.0,
        }
    }

    /// The gradient that `learner` computes is what finite differences of its loss give. `seed` makes the
    /// chances of each call the same.
    pub fn expect_gradient(learner: &mut dyn Learner, batch: &[usize], h: f32, tolerance: f64) {
        let loss = |learner: &mut dyn Learner| f64::from(learner.learn(batch, &mut ChaCha8Rng::seed_from_u64(3)));
        loss(learner);
        let exact: Vec<Vec<f32>> = learner.groups().iter().map(|group| group.gradient.clone()).collect();
        for (at, exact) in exact.iter().enumerate() {
            let name = learner.groups()[at].name;
            for (i, exact) in exact.iter().enumerate() {
                let before = learner.groups()[at].values[i];
                learner.groups()[at].values[i] = before + h;
                let above = loss(learner);
                learner.groups()[at].values[i] = before - h;
                let below = loss(learner);
                learner.groups()[at].values[i] = before;
                let numeric = (above - below) / f64::from(2.0 * h);
                let off = (numeric - f64::from(*exact)).abs();
                assert!(off < tolerance, "{name}[{i}]: {exact}, expected {numeric}");
            }
        }
    }

    /// One number that is pulled to 3; the validation set wants 2.
    struct Bowl(Vec<ParamGroup>);

    impl Learner for Bowl {
        fn photographs(&self) -> usize {
            32
        }
        fn groups(&mut self) -> &mut [ParamGroup] {
            &mut self.0
        }
        fn learn(&mut self, _: &[usize], _: &mut ChaCha8Rng) -> f32 {
            let off = self.0[0].values[0] - 3.0;
            self.0[0].gradient[0] = off;
            off * off / 2.0
        }
        fn measure(&self) -> Measure {
            Measure { loss: f64::from(self.0[0].values[0] - 2.0).abs(), accuracy: 0.0 }
        }
    }

    fn run(settings: &Sgd) -> (f32, Vec<Epoch>) {
        let mut bowl = Bowl(vec![ParamGroup::new("x", vec![0.0], true)]);
        let history = fit(&mut bowl, settings, |_, _| Ok::<(), Infallible>(())).unwrap();
        (bowl.0[0].values[0], history)
    }

    #[test]
    fn the_best_epoch_is_kept_and_patience_ends() {
        let slow = Sgd { momentum: 0.0, nesterov: false, schedule: Schedule::Constant, ..settings() };
        let (kept, history) = run(&slow);
        assert_eq!(history.len(), 20);
        let best = history.iter().rev().find(|epoch| epoch.best).unwrap();
        assert!((f64::from(kept - 2.0).abs() - best.val.loss).abs() < 1e-6, "{kept}");
        assert!(history[19].val.loss > best.val.loss + 0.5, "it went on to 3");
        let (again, short) = run(&Sgd { patience: 3, ..slow });
        assert_eq!((again, short.len()), (kept, best.epoch + 3));
    }

    #[test]
    fn every_optimiser_reaches_the_bottom() {
        let goes_to = |settings: &Sgd| {
            let mut bowl = Bowl(vec![ParamGroup::new("x", vec![0.0], true)]);
            let mut last = 0.0;
            fit(&mut bowl, settings, |_, groups| {
                last = groups[0].values[0];
                Ok::<(), Infallible>(())
            })
            .unwrap();
            last
        };
        let long = Sgd { epochs: 200, ..settings() };
        for optimiser in [Optimiser::Sgd, Optimiser::Adam] {
            for nesterov in [false, true] {
                let reached = goes_to(&Sgd { optimiser, nesterov, ..long.clone() });
                assert!((reached - 3.0).abs() < 0.02, "{optimiser:?} {nesterov}: {reached}");
            }
        }
        // The gradient x − 3 and the decay x are even at 1.5.
        let decayed = goes_to(&Sgd { weight_decay: 1.0, ..long });
        assert!((decayed - 1.5).abs() < 0.01, "{decayed}");
    }

    #[test]
    fn the_learning_rate_follows_its_schedule() {
        let rates = |schedule: Schedule, warm_up: usize| {
            let settings = Sgd { schedule, warm_up, learning_rate: 1.0, step_epochs: 2, ..settings() };
            [0, 9, 10, 20, 39].map(|at| settings.rate(at, 40, 10))
        };
        assert_eq!(rates(Schedule::Constant, 0), [1.0; 5]);
        assert_eq!(rates(Schedule::Constant, 1), [0.1, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates(Schedule::Step, 0), [1.0, 1.0, 1.0, 0.1, 0.1]);
        let cosine = rates(Schedule::Cosine, 1);
        assert!(cosine[0] == 0.1 && cosine[2] == 1.0 && (cosine[3] - 0.75).abs() < 1e-6 && cosine[4] < 0.01);
    }

    #[test]
    fn an_error_ends_the_training() {
        let mut bowl = Bowl(vec![ParamGroup::new("x", vec![0.0], true)]);
        let full = |epoch: &Epoch, _: &[ParamGroup]| if epoch.epoch == 2 { Err("disk full") } else { Ok(()) };
        assert_eq!(fit(&mut bowl, &settings(), full), Err("disk full"));
    }

    #[test]
    fn a_shuffle_keeps_every_number() {
        let mut order: Vec<usize> = (0..100).collect();
        shuffle(&mut order, &mut ChaCha8Rng::seed_from_u64(1));
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
