//! The training loop: mini-batch SGD with momentum or AdamW, a learning rate schedule, early stopping, and the parameters of
//! the best epoch. The same seed gives the same parameters on the same processor architecture, for any number of threads.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// Hyperparameters of the training loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hyperparams {
    /// Seed of all random choices of a run, such as the order of the images, the augmented views and the dropout.
    pub seed: u64,
    /// Largest number of epochs, 1–100,000.
    pub epochs: usize,
    /// Early stopping: ends after this many epochs without a lower validation loss; 0 disables it.
    pub patience: usize,
    /// Images a mini-batch, at least 1.
    pub batch: usize,
    /// The optimizer.
    #[serde(rename = "optimiser")]
    pub optimizer: Optimizer,
    /// Peak learning rate of the schedule, above 0.
    pub learning_rate: f32,
    /// The learning rate schedule.
    pub schedule: Schedule,
    /// Epochs in which the learning rate rises linearly from 0.
    pub warm_up: usize,
    /// With [`Schedule::Step`]: epochs between two steps.
    pub step_epochs: usize,
    /// With [`Schedule::Step`]: factor of the learning rate at each step.
    pub step_factor: f32,
    /// With [`Optimizer::Sgd`], 0–1.
    pub momentum: f32,
    /// With [`Optimizer::Sgd`]: whether to use Nesterov momentum.
    pub nesterov: bool,
    /// Weight decay of weights, not of biases: L2 regularization with SGD, decoupled with Adam (AdamW).
    pub weight_decay: f32,
    /// Label smoothing, 0–1.
    pub label_smoothing: f32,
    /// Whether the loss weights the classes inversely to their frequency.
    pub balance: bool,
    /// Dropout rate of the features, 0 to below 1; only if the last convolution is fine-tuned.
    pub dropout: f32,
}

/// The optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Optimizer {
    /// Stochastic gradient descent with momentum.
    Sgd,
    /// Adam (Kingma and Ba, 2014) with decoupled weight decay (Loshchilov and Hutter, 2017).
    Adam,
}

/// The learning rate schedule, after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// The peak learning rate throughout.
    Constant,
    /// Multiplied by a factor every few epochs.
    Step,
    /// Cosine annealing to 0.
    Cosine,
}

impl Hyperparams {
    /// Returns the learning rate of step `step` (from 0) of `steps`, with `per_epoch` steps an epoch.
    fn rate(&self, step: usize, steps: usize, per_epoch: usize) -> f32 {
        let warm_up = (self.warm_up * per_epoch).min(steps);
        if step < warm_up {
            return self.learning_rate * (step + 1) as f32 / warm_up as f32;
        }
        match self.schedule {
            Schedule::Constant => self.learning_rate,
            Schedule::Step => {
                let drops = (step - warm_up) / (self.step_epochs.max(1) * per_epoch);
                self.learning_rate * self.step_factor.powi(drops as i32)
            }
            Schedule::Cosine => {
                let progress = (step - warm_up) as f32 / (steps - warm_up) as f32;
                self.learning_rate * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos())
            }
        }
    }
}

/// A parameter tensor with its gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamGroup {
    /// Name of the tensor in a checkpoint.
    pub name: &'static str,
    /// The parameters, flattened in row-major order.
    pub values: Vec<f32>,
    /// As long as `values`.
    pub gradient: Vec<f32>,
    /// Whether weight decay applies.
    pub weight_decay: bool,
}

impl ParamGroup {
    /// Creates a group with a zero gradient.
    pub fn new(name: &'static str, values: Vec<f32>, weight_decay: bool) -> Self {
        ParamGroup { name, gradient: vec![0.0; values.len()], values, weight_decay }
    }
}

/// Loss and accuracy on the validation set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ValMetrics {
    /// Mean cross-entropy in nats, at the fitted temperature.
    pub loss: f64,
    /// Fraction of images whose top class is correct, 0–1.
    pub accuracy: f64,
}

/// A model that [`fit`] trains.
pub trait Learner {
    /// Returns the number of training images.
    fn train_len(&self) -> usize;
    /// Returns the parameters, always in the same order.
    fn param_groups(&mut self) -> &mut [ParamGroup];
    /// Computes the gradient on a batch of image indices and returns the mean loss in nats.
    fn loss_and_gradient(&mut self, batch: &[usize], rng: &mut ChaCha8Rng) -> f32;
    /// Evaluates the current parameters on the validation set.
    fn validate(&self) -> ValMetrics;
}

/// The metrics of a finished epoch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// From 1.
    pub epoch: usize,
    /// Learning rate of the last step.
    pub learning_rate: f32,
    /// Mean training loss in nats, with label smoothing and class weights.
    pub train_loss: f32,
    /// Metrics on the validation set.
    pub val: ValMetrics,
    /// Whether the validation loss is the lowest so far.
    pub best: bool,
}

/// Trains `learner` and returns the metrics of each epoch. `on_epoch` is called after each epoch with its metrics and the
/// current parameters. At the end, the learner has the parameters of the best epoch. A validation loss that is not finite
/// ends the training; that epoch is the last one returned.
///
/// # Errors
/// Returns the first error of `on_epoch`, which ends the training.
///
/// # Panics
/// Panics if the batch size is 0, or if `learner` panics.
pub fn fit<E>(
    learner: &mut dyn Learner,
    hyperparams: &Hyperparams,
    mut on_epoch: impl FnMut(&Epoch, &[ParamGroup]) -> Result<(), E>,
) -> Result<Vec<Epoch>, E> {
    let mut rng = ChaCha8Rng::seed_from_u64(hyperparams.seed);
    let mut order: Vec<usize> = (0..learner.train_len()).collect();
    let per_epoch = order.len().div_ceil(hyperparams.batch);
    let steps = hyperparams.epochs * per_epoch;
    let mut state = OptimizerState::new(learner.param_groups());
    let mut history: Vec<Epoch> = Vec::new();
    let mut best: Option<(Epoch, Vec<Vec<f32>>)> = None;
    for epoch in 1..=hyperparams.epochs {
        shuffle(&mut order, &mut rng);
        let (mut loss, mut learning_rate) = (0.0, 0.0);
        for batch in order.chunks(hyperparams.batch) {
            loss += learner.loss_and_gradient(batch, &mut rng) * batch.len() as f32;
            learning_rate = hyperparams.rate(state.steps, steps, per_epoch);
            state.step(learner.param_groups(), hyperparams, learning_rate);
        }
        let val = learner.validate();
        let is_best = val.loss.is_finite() && best.as_ref().is_none_or(|(best, _)| val.loss < best.val.loss);
        let train_loss = loss / order.len() as f32;
        let metrics = Epoch { epoch, learning_rate, train_loss, val, best: is_best };
        history.push(metrics);
        if is_best {
            best = Some((metrics, learner.param_groups().iter().map(|group| group.values.clone()).collect()));
        }
        on_epoch(&metrics, learner.param_groups())?;
        if !val.loss.is_finite() {
            break;
        }
        let epochs_since_best = epoch - best.as_ref().map_or(0, |(best, _)| best.epoch);
        if hyperparams.patience > 0 && epochs_since_best >= hyperparams.patience {
            break;
        }
    }
    if let Some((_, values)) = best {
        for (group, values) in learner.param_groups().iter_mut().zip(values) {
            group.values = values;
        }
    }
    Ok(history)
}

/// The state of the optimizer between steps.
struct OptimizerState {
    steps: usize,
    /// For each group: the velocity of SGD, or the first moment of Adam.
    first: Vec<Vec<f32>>,
    /// For each group: the second moment of Adam.
    second: Vec<Vec<f32>>,
}

impl OptimizerState {
    fn new(groups: &[ParamGroup]) -> Self {
        let zeros = || groups.iter().map(|group| vec![0.0; group.values.len()]).collect();
        OptimizerState { steps: 0, first: zeros(), second: zeros() }
    }

    fn step(&mut self, groups: &mut [ParamGroup], hyperparams: &Hyperparams, rate: f32) {
        self.steps += 1;
        for ((group, first), second) in groups.iter_mut().zip(&mut self.first).zip(&mut self.second) {
            let decay = if group.weight_decay { hyperparams.weight_decay } else { 0.0 };
            match hyperparams.optimizer {
                Optimizer::Sgd => sgd_step(group, first, hyperparams, rate, decay),
                Optimizer::Adam => adam_step(group, first, second, self.steps, rate, decay),
            }
        }
    }
}

/// v ← μ v + g; w ← w − r v, or with Nesterov w − r (g + μ v)
fn sgd_step(group: &mut ParamGroup, velocity: &mut [f32], hyperparams: &Hyperparams, rate: f32, decay: f32) {
    let momentum = hyperparams.momentum;
    for ((value, gradient), velocity) in group.values.iter_mut().zip(&group.gradient).zip(velocity) {
        let gradient = gradient + decay * *value;
        *velocity = momentum * *velocity + gradient;
        *value -= rate * if hyperparams.nesterov { gradient + momentum * *velocity } else { *velocity };
    }
}

/// m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²; w ← w − r (m̂ / (√v̂ + ε) + λ w)
fn adam_step(group: &mut ParamGroup, first: &mut [f32], second: &mut [f32], steps: usize, rate: f32, decay: f32) {
    // The defaults of `keras.optimizers.Adam`.
    const BETA: [f32; 2] = [0.9, 0.999];
    const EPSILON: f32 = 1e-7;
    let bias_correction = BETA.map(|beta| 1.0 / (1.0 - beta.powi(steps.try_into().unwrap_or(i32::MAX))));
    let moments = first.iter_mut().zip(second);
    for ((value, gradient), (first, second)) in group.values.iter_mut().zip(&group.gradient).zip(moments) {
        *first = BETA[0] * *first + (1.0 - BETA[0]) * gradient;
        *second = BETA[1] * *second + (1.0 - BETA[1]) * gradient * gradient;
        let step = *first * bias_correction[0] / ((*second * bias_correction[1]).sqrt() + EPSILON);
        *value -= rate * (step + decay * *value);
    }
}

/// Fisher–Yates shuffle, from the end.
pub fn shuffle(order: &mut [usize], rng: &mut ChaCha8Rng) {
    for last in (1..order.len()).rev() {
        order.swap(last, random_below(rng, last + 1));
    }
}

/// Returns a random integer below `n`. The modulo bias is below 2⁻³² for `n` up to 2³².
///
/// # Panics
/// Panics if `n` is 0.
pub fn random_below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    (rng.next_u64() % n as u64) as usize
}

#[cfg(test)]
pub(crate) mod tests {
    use std::convert::Infallible;

    use super::*;

    pub fn hyperparams() -> Hyperparams {
        Hyperparams {
            seed: 1,
            epochs: 20,
            patience: 0,
            batch: 16,
            optimizer: Optimizer::Sgd,
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

    /// Checks the gradient of `learner` against finite differences of its loss with step `h`. Every call uses the same
    /// random numbers.
    pub fn expect_gradient(learner: &mut dyn Learner, batch: &[usize], h: f32, tolerance: f64) {
        let loss =
            |learner: &mut dyn Learner| f64::from(learner.loss_and_gradient(batch, &mut ChaCha8Rng::seed_from_u64(3)));
        loss(learner);
        let exact: Vec<Vec<f32>> = learner.param_groups().iter().map(|group| group.gradient.clone()).collect();
        for (at, exact) in exact.iter().enumerate() {
            let name = learner.param_groups()[at].name;
            for (i, exact) in exact.iter().enumerate() {
                let before = learner.param_groups()[at].values[i];
                learner.param_groups()[at].values[i] = before + h;
                let above = loss(learner);
                learner.param_groups()[at].values[i] = before - h;
                let below = loss(learner);
                learner.param_groups()[at].values[i] = before;
                let numeric = (above - below) / f64::from(2.0 * h);
                let off = (numeric - f64::from(*exact)).abs();
                assert!(off < tolerance, "{name}[{i}]: {exact}, expected {numeric}");
            }
        }
    }

    /// One parameter with the training loss (x − 3)²/2 and the validation loss |x − 2|.
    struct Quadratic(Vec<ParamGroup>);

    impl Learner for Quadratic {
        fn train_len(&self) -> usize {
            32
        }
        fn param_groups(&mut self) -> &mut [ParamGroup] {
            &mut self.0
        }
        fn loss_and_gradient(&mut self, _: &[usize], _: &mut ChaCha8Rng) -> f32 {
            let error = self.0[0].values[0] - 3.0;
            self.0[0].gradient[0] = error;
            error * error / 2.0
        }
        fn validate(&self) -> ValMetrics {
            ValMetrics { loss: f64::from(self.0[0].values[0] - 2.0).abs(), accuracy: 0.0 }
        }
    }

    fn run(hyperparams: &Hyperparams) -> (f32, Vec<Epoch>) {
        let mut learner = Quadratic(vec![ParamGroup::new("x", vec![0.0], true)]);
        let history = fit(&mut learner, hyperparams, |_, _| Ok::<(), Infallible>(())).unwrap();
        (learner.0[0].values[0], history)
    }

    #[test]
    fn keeps_the_best_epoch_and_stops_early_with_patience() {
        let slow = Hyperparams { momentum: 0.0, nesterov: false, schedule: Schedule::Constant, ..hyperparams() };
        let (kept, history) = run(&slow);
        assert_eq!(history.len(), 20);
        let best = history.iter().rev().find(|epoch| epoch.best).unwrap();
        assert!((f64::from(kept - 2.0).abs() - best.val.loss).abs() < 1e-6, "{kept}");
        assert!(history[19].val.loss > best.val.loss + 0.5, "the last epoch is past the optimum");
        let (again, short) = run(&Hyperparams { patience: 3, ..slow });
        assert_eq!((again, short.len()), (kept, best.epoch + 3));
    }

    #[test]
    fn every_optimizer_converges() {
        let final_value = |hyperparams: &Hyperparams| {
            let mut learner = Quadratic(vec![ParamGroup::new("x", vec![0.0], true)]);
            let mut last = 0.0;
            fit(&mut learner, hyperparams, |_, groups| {
                last = groups[0].values[0];
                Ok::<(), Infallible>(())
            })
            .unwrap();
            last
        };
        let long = Hyperparams { epochs: 200, ..hyperparams() };
        for optimizer in [Optimizer::Sgd, Optimizer::Adam] {
            for nesterov in [false, true] {
                let reached = final_value(&Hyperparams { optimizer, nesterov, ..long.clone() });
                assert!((reached - 3.0).abs() < 0.02, "{optimizer:?} {nesterov}: {reached}");
            }
        }
        // The gradient x − 3 and the decay x cancel at 1.5.
        let decayed = final_value(&Hyperparams { weight_decay: 1.0, ..long });
        assert!((decayed - 1.5).abs() < 0.01, "{decayed}");
    }

    #[test]
    fn learning_rate_follows_the_schedule() {
        let rates = |schedule: Schedule, warm_up: usize| {
            let hyperparams = Hyperparams { schedule, warm_up, learning_rate: 1.0, step_epochs: 2, ..hyperparams() };
            [0, 9, 10, 20, 39].map(|step| hyperparams.rate(step, 40, 10))
        };
        assert_eq!(rates(Schedule::Constant, 0), [1.0; 5]);
        assert_eq!(rates(Schedule::Constant, 1), [0.1, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates(Schedule::Step, 0), [1.0, 1.0, 1.0, 0.1, 0.1]);
        let cosine = rates(Schedule::Cosine, 1);
        assert!(cosine[0] == 0.1 && cosine[2] == 1.0 && (cosine[3] - 0.75).abs() < 1e-6 && cosine[4] < 0.01);
    }

    #[test]
    fn an_error_of_the_callback_ends_the_training() {
        let mut learner = Quadratic(vec![ParamGroup::new("x", vec![0.0], true)]);
        let on_epoch = |epoch: &Epoch, _: &[ParamGroup]| if epoch.epoch == 2 { Err("disk full") } else { Ok(()) };
        assert_eq!(fit(&mut learner, &hyperparams(), on_epoch), Err("disk full"));
    }

    #[test]
    fn shuffle_is_a_permutation() {
        let mut order: Vec<usize> = (0..100).collect();
        shuffle(&mut order, &mut ChaCha8Rng::seed_from_u64(1));
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
