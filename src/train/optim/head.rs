//! Training of the head on frozen features: softmax regression.

use rand_chacha::ChaCha8Rng;

use crate::train::features::Features;
use crate::train::optim::temperature;
use crate::train::optim::training_loop::{Hyperparams, Learner, ParamGroup, ValMetrics, random_below};
use crate::vision::head::{argmax, linear, softmax};

/// A linear layer with its training and validation sets.
pub struct HeadLearner<'a> {
    train: &'a Features,
    val: &'a Features,
    targets: SoftTargets,
    /// Weight `[classes, width]`, bias `[classes]`.
    groups: [ParamGroup; 2],
}

impl<'a> HeadLearner<'a> {
    /// Creates a learner with all weights and biases zero. `classes`: with the unknown classes, which come last.
    pub fn new(train: &'a Features, val: &'a Features, classes: usize, hyperparams: &Hyperparams) -> Self {
        let groups = head_groups(classes, train.width);
        HeadLearner { train, val, targets: SoftTargets::new(&train.classes(), classes, hyperparams), groups }
    }

    /// Returns the weight `[classes, width]` and the bias `[classes]`.
    pub fn into_params(self) -> (Vec<f32>, Vec<f32>) {
        let [weight, bias] = self.groups;
        (weight.values, bias.values)
    }
}

/// Returns the parameter groups of a head with all values zero: weight `[classes, width]`, bias `[classes]`.
pub fn head_groups(classes: usize, width: usize) -> [ParamGroup; 2] {
    [
        ParamGroup::new("head.weight", vec![0.0; classes * width], true),
        ParamGroup::new("head.bias", vec![0.0; classes], false),
    ]
}

impl Learner for HeadLearner<'_> {
    fn train_len(&self) -> usize {
        self.train.len()
    }

    fn param_groups(&mut self) -> &mut [ParamGroup] {
        &mut self.groups
    }

    fn loss_and_gradient(&mut self, batch: &[usize], rng: &mut ChaCha8Rng) -> f32 {
        let [weight, bias] = &mut self.groups;
        weight.gradient.fill(0.0);
        bias.gradient.fill(0.0);
        let scale = 1.0 / batch.len() as f32;
        let mut loss = 0.0;
        for &i in batch {
            let view = if self.train.views > 1 { random_below(rng, self.train.views) } else { 0 };
            let row = self.train.row(i, view);
            let logits = linear(&weight.values, &bias.values, &row);
            let (sample_loss, grad_logits) = self.targets.cross_entropy(&logits, self.train.class(i));
            loss += sample_loss * scale;
            let rows = weight.gradient.chunks_exact_mut(row.len());
            for ((grad_logit, weight), bias) in grad_logits.iter().zip(rows).zip(&mut bias.gradient) {
                let grad_logit = grad_logit * scale;
                *bias += grad_logit;
                for (weight, x) in weight.iter_mut().zip(row.iter()) {
                    *weight += grad_logit * x;
                }
            }
        }
        loss
    }

    fn validate(&self) -> ValMetrics {
        let [weight, bias] = &self.groups;
        let logits: Vec<_> = self.val.rows().map(|row| linear(&weight.values, &bias.values, &row)).collect();
        val_metrics(&logits, &self.val.classes())
    }
}

/// Returns the mean cross-entropy at the fitted temperature, and the accuracy, of `logits` (`[images][classes]`). The validation set
/// has images of each of the model's classes; further logits, of unknown classes, are left out.
///
/// # Panics
/// Panics if a class index is not below the number of logits.
pub fn val_metrics(logits: &[Vec<f32>], classes: &[usize]) -> ValMetrics {
    let known = classes.iter().max().map_or(0, |last| last + 1);
    let logits: Vec<Vec<f32>> = logits.iter().map(|logits| logits[..known].to_vec()).collect();
    let correct = logits.iter().zip(classes).filter(|(logits, class)| argmax(logits) == **class).count();
    let temperature = temperature::fit(&logits, classes);
    ValMetrics {
        loss: temperature::cross_entropy(&logits, classes, temperature),
        accuracy: correct as f64 / classes.len() as f64,
    }
}

/// The target distributions: one-hot with label smoothing, and a weight per class.
#[derive(Debug, Clone)]
pub struct SoftTargets {
    smoothing: f32,
    /// `[classes]`
    class_weights: Vec<f32>,
}

impl SoftTargets {
    /// `labels` is the class of each training image. With [`Hyperparams::balance`] the weight of a class is inversely proportional
    /// to its frequency, with mean 1 over the images.
    pub fn new(labels: &[usize], classes: usize, hyperparams: &Hyperparams) -> Self {
        let weight = |class: usize| {
            let count = labels.iter().filter(|label| **label == class).count().max(1);
            if hyperparams.balance { labels.len() as f32 / (classes * count) as f32 } else { 1.0 }
        };
        SoftTargets { smoothing: hyperparams.label_smoothing, class_weights: (0..classes).map(weight).collect() }
    }

    /// Returns the weighted cross-entropy in nats for an image of `class`, and its gradient with respect to the logits,
    /// `[classes]`.
    ///
    /// # Panics
    /// Panics if `class` is not below the number of classes.
    pub fn cross_entropy(&self, logits: &[f32], class: usize) -> (f32, Vec<f32>) {
        let (weight, uniform) = (self.class_weights[class], self.smoothing / logits.len() as f32);
        let mut loss = 0.0;
        let mut gradient = softmax(logits, 1.0);
        for (other, p) in gradient.iter_mut().enumerate() {
            let target = uniform + if other == class { 1.0 - self.smoothing } else { 0.0 };
            loss -= weight * target * p.max(f32::MIN_POSITIVE).ln();
            // d loss / d logits = p − y
            *p = weight * (*p - target);
        }
        (loss, gradient)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use rand_chacha::rand_core::SeedableRng;

    use super::super::training_loop::tests::{expect_gradient, hyperparams};
    use super::super::training_loop::{Optimizer, fit};
    use super::*;
    use crate::train::data::image_set::{HashedImage, Origin};
    use crate::train::features::Values;

    /// Features of three classes in four dimensions: coordinate `class` is raised, with uniform noise; two views each.
    fn features(n: usize) -> Features {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut features = Features { width: 4, views: 2, ..Features::default() };
        for i in 0..n {
            let class = i % 3;
            let mut values: Vec<f32> = (0..8).map(|_| random_below(&mut rng, 1000) as f32 / 1000.0 - 0.5).collect();
            values[class] += 1.0;
            values[4 + class] += 1.0;
            features.values.push(Values::Single(values));
            features.images.push(HashedImage {
                path: i.to_string().into(),
                class,
                content_hash: [0; 32],
                origin: Origin::File,
            });
        }
        features
    }

    #[test]
    fn gradient_matches_finite_differences() {
        let features = features(13);
        let hyperparams = Hyperparams { label_smoothing: 0.1, balance: true, ..hyperparams() };
        let mut learner = HeadLearner::new(&features, &features, 3, &hyperparams);
        let params = learner.groups.iter_mut().flat_map(|group| &mut group.values);
        params.enumerate().for_each(|(i, value)| *value = (i as f32 * 0.7).sin());
        expect_gradient(&mut learner, &(0..13).collect::<Vec<_>>(), 1e-2, 2e-4);
    }

    #[test]
    fn converges_and_is_reproducible_for_a_seed() {
        let features = features(300);
        let run = |hyperparams: &Hyperparams| {
            let mut learner = HeadLearner::new(&features, &features, 3, hyperparams);
            let history = fit(&mut learner, hyperparams, |_, _| Ok::<(), Infallible>(())).unwrap();
            (learner.into_params(), history)
        };
        for optimizer in [Optimizer::Sgd, Optimizer::Adam] {
            let hyperparams = Hyperparams { optimizer, ..hyperparams() };
            let (params, history) = run(&hyperparams);
            assert!(history[19].train_loss < history[0].train_loss * 0.6, "{history:?}");
            assert!(history[19].val.accuracy > 0.96, "{history:?}");
            assert_eq!(run(&hyperparams), (params.clone(), history));
            assert_ne!(run(&Hyperparams { seed: 2, ..hyperparams }).0, params);
        }
    }

    #[test]
    fn balance_weights_a_rare_class_more() {
        let labels = [0, 0, 0, 1];
        assert_eq!(SoftTargets::new(&labels, 2, &hyperparams()).class_weights, [1.0, 1.0]);
        let balanced = SoftTargets::new(&labels, 2, &Hyperparams { balance: true, ..hyperparams() });
        assert_eq!(balanced.class_weights, [4.0 / 6.0, 2.0]);
    }
}
