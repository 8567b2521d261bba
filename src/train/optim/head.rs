//! The head in training, on features that stay as they are: softmax regression.

use rand_chacha::ChaCha8Rng;

use crate::train::features::Features;
use crate::train::optim::sgd::{Learner, Measure, ParamGroup, Sgd, below};
use crate::train::optim::temperature;
use crate::vision::head::{argmax, linear, softmax};

/// A linear layer, the photographs it learns from, and those it is measured on.
pub struct HeadLearner<'a> {
    train: &'a Features,
    val: &'a Features,
    truth: SoftTargets,
    /// Weight `[classes, width]`, bias `[classes]`.
    groups: [ParamGroup; 2],
}

impl<'a> HeadLearner<'a> {
    pub fn new(train: &'a Features, val: &'a Features, classes: usize, settings: &Sgd) -> Self {
        let groups = head_groups(classes, train.width);
        HeadLearner { train, val, truth: SoftTargets::new(&train.classes(), classes, settings), groups }
    }

    /// Weight `[classes, width]` and bias `[classes]`.
    pub fn into_numbers(self) -> (Vec<f32>, Vec<f32>) {
        let [weight, bias] = self.groups;
        (weight.values, bias.values)
    }
}

/// A head that knows nothing yet.
pub fn head_groups(classes: usize, width: usize) -> [ParamGroup; 2] {
    [
        ParamGroup::new("head.weight", vec![0.0; classes * width], true),
        ParamGroup::new("head.bias", vec![0.0; classes], false),
    ]
}

impl Learner for HeadLearner<'_> {
    fn photographs(&self) -> usize {
        self.train.len()
    }

    fn groups(&mut self) -> &mut [ParamGroup] {
        &mut self.groups
    }

    fn learn(&mut self, batch: &[usize], rng: &mut ChaCha8Rng) -> f32 {
        let [weight, bias] = &mut self.groups;
        weight.gradient.fill(0.0);
        bias.gradient.fill(0.0);
        let share = 1.0 / batch.len() as f32;
        let mut loss = 0.0;
        for &i in batch {
            let view = if self.train.views > 1 { below(rng, self.train.views) } else { 0 };
            let row = self.train.row(i, view);
            let logits = linear(&weight.values, &bias.values, &row);
            let (one, error) = self.truth.error(&logits, self.train.class(i));
            loss += one * share;
            let filters = weight.gradient.chunks_exact_mut(row.len());
            for ((error, filter), bias) in error.iter().zip(filters).zip(&mut bias.gradient) {
                let step = error * share;
                *bias += step;
                for (to, x) in filter.iter_mut().zip(row.iter()) {
                    *to += step * x;
                }
            }
        }
        loss
    }

    fn measure(&self) -> Measure {
        let [weight, bias] = &self.groups;
        let logits: Vec<_> = self.val.rows().map(|row| linear(&weight.values, &bias.values, &row)).collect();
        measure(&logits, &self.val.classes())
    }
}

/// Mean cross-entropy, at the temperature that makes it least, and accuracy of `logits`, `[images][classes]`.
pub fn measure(logits: &[Vec<f32>], classes: &[usize]) -> Measure {
    let right = logits.iter().zip(classes).filter(|(logits, class)| argmax(logits) == **class).count();
    let fitted = temperature::temperature(logits, classes);
    Measure { loss: temperature::cross_entropy(logits, classes, fitted), accuracy: right as f64 / classes.len() as f64 }
}

/// What a photograph should be taken for, and how much it counts.
#[derive(Debug, Clone)]
pub struct SoftTargets {
    smoothing: f32,
    /// Of each class.
    weights: Vec<f32>,
}

impl SoftTargets {
    /// `of`: the class of each photograph.
    pub fn new(of: &[usize], classes: usize, settings: &Sgd) -> Self {
        let weight = |class: usize| {
            let count = of.iter().filter(|other| **other == class).count().max(1);
            if settings.balance { of.len() as f32 / (classes * count) as f32 } else { 1.0 }
        };
        SoftTargets { smoothing: settings.label_smoothing, weights: (0..classes).map(weight).collect() }
    }

    /// Cross-entropy in nats against the smoothed truth, and its gradient by the logits, `[classes]`.
    pub fn error(&self, logits: &[f32], class: usize) -> (f32, Vec<f32>) {
        let (weight, spread) = (self.weights[class], self.smoothing / logits.len() as f32);
        let mut loss = 0.0;
        let mut error = softmax(logits, 1.0);
        for (other, p) in error.iter_mut().enumerate() {
            let truth = spread + if other == class { 1.0 - self.smoothing } else { 0.0 };
            loss -= weight * truth * p.max(f32::MIN_POSITIVE).ln();
            // d loss / d logits = p − y
            *p = weight * (*p - truth);
        }
        (loss, error)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use rand_chacha::rand_core::SeedableRng;

    use super::super::sgd::tests::{expect_gradient, settings};
    use super::super::sgd::{Optimiser, fit};
    use super::*;
    use crate::train::data::photographs::Photograph;
    use crate::train::features::Values;

    /// Three classes in four dimensions, told apart by a coordinate, with some noise; two views each.
    fn features(n: usize) -> Features {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut features = Features { width: 4, views: 2, ..Features::default() };
        for i in 0..n {
            let class = i % 3;
            let mut values: Vec<f32> = (0..8).map(|_| below(&mut rng, 1000) as f32 / 1000.0 - 0.5).collect();
            values[class] += 1.0;
            values[4 + class] += 1.0;
            features.values.push(Values::Single(values));
            features.images.push(Photograph { path: i.to_string().into(), class, content: [0; 32] });
        }
        features
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let features = features(13);
        let settings = Sgd { label_smoothing: 0.1, balance: true, ..settings() };
        let mut learner = HeadLearner::new(&features, &features, 3, &settings);
        let numbers = learner.groups.iter_mut().flat_map(|group| &mut group.values);
        numbers.enumerate().for_each(|(i, value)| *value = (i as f32 * 0.7).sin());
        expect_gradient(&mut learner, &(0..13).collect::<Vec<_>>(), 1e-2, 2e-4);
    }

    #[test]
    fn it_learns_what_can_be_learned_and_the_seed_decides_every_bit() {
        let features = features(300);
        let run = |settings: &Sgd| {
            let mut learner = HeadLearner::new(&features, &features, 3, settings);
            let history = fit(&mut learner, settings, |_, _| Ok::<(), Infallible>(())).unwrap();
            (learner.into_numbers(), history)
        };
        for optimiser in [Optimiser::Sgd, Optimiser::Adam] {
            let settings = Sgd { optimiser, ..settings() };
            let (numbers, history) = run(&settings);
            assert!(history[19].train_loss < history[0].train_loss * 0.6, "{history:?}");
            assert!(history[19].val.accuracy > 0.96, "{history:?}");
            assert_eq!(run(&settings), (numbers.clone(), history));
            assert_ne!(run(&Sgd { seed: 2, ..settings }).0, numbers);
        }
    }

    #[test]
    fn a_rare_class_counts_more_where_all_shall_count_the_same() {
        let of = [0, 0, 0, 1];
        assert_eq!(SoftTargets::new(&of, 2, &settings()).weights, [1.0, 1.0]);
        let balanced = SoftTargets::new(&of, 2, &Sgd { balance: true, ..settings() });
        assert_eq!(balanced.weights, [4.0 / 6.0, 2.0]);
    }
}
