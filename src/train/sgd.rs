//! The head's training: softmax regression by mini-batch stochastic gradient descent with Nesterov
//! momentum. The same seed gives the same numbers on the same kind of machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::features::Features;
use crate::vision::head::{linear, softmax};

/// The settings of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sgd {
    pub epochs: usize,
    pub batch: usize,
    /// At the start; it falls to zero along half a cosine.
    pub learning_rate: f32,
    pub momentum: f32,
    /// Of the weights, not of the biases.
    pub weight_decay: f32,
    /// Share of the truth that is given to all classes alike, 0–1.
    pub label_smoothing: f32,
    pub seed: u64,
}

impl Default for Sgd {
    /// Found on the five flowers' validation set; see the README for what it reaches.
    fn default() -> Self {
        Sgd {
            epochs: 60,
            batch: 64,
            learning_rate: 0.006,
            momentum: 0.9,
            weight_decay: 0.06,
            label_smoothing: 0.05,
            seed: 1,
        }
    }
}

/// A linear layer in training.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    pub width: usize,
    /// `[classes, width]`, a class a row.
    pub weight: Vec<f32>,
    /// `[classes]`
    pub bias: Vec<f32>,
}

impl Layer {
    pub fn zeros(classes: usize, width: usize) -> Self {
        Layer { width, weight: vec![0.0; classes * width], bias: vec![0.0; classes] }
    }

    /// in: `[width]`; out: `[classes]`.
    pub fn logits(&self, features: &[f32]) -> Vec<f32> {
        linear(&self.weight, &self.bias, features)
    }

    /// Adds `scale × source`.
    fn add(&mut self, scale: f32, source: &Layer) {
        for (to, from) in self.weight.iter_mut().zip(&source.weight) {
            *to += scale * from;
        }
        for (to, from) in self.bias.iter_mut().zip(&source.bias) {
            *to += scale * from;
        }
    }

    fn scale(&mut self, factor: f32) {
        self.weight.iter_mut().chain(&mut self.bias).for_each(|v| *v *= factor);
    }
}

/// Mean cross-entropy of a batch in nats against the smoothed truth, and its gradient.
pub fn gradient(layer: &Layer, features: &Features, batch: &[usize], smoothing: f32, out: &mut Layer) -> f32 {
    out.scale(0.0);
    let share = 1.0 / batch.len() as f32;
    let spread = smoothing / layer.bias.len() as f32;
    let mut loss = 0.0;
    for &i in batch {
        let (row, class) = (features.row(i), features.classes[i]);
        let mut error = softmax(&layer.logits(row), 1.0);
        for (other, p) in error.iter_mut().enumerate() {
            let truth = spread + if other == class { 1.0 - smoothing } else { 0.0 };
            loss -= truth * p.max(f32::MIN_POSITIVE).ln() * share;
            // d loss / d logits = p − y
            *p -= truth;
        }
        for ((error, to), bias) in error.iter().zip(out.weight.chunks_exact_mut(layer.width)).zip(&mut out.bias) {
            let step = error * share;
            *bias += step;
            for (to, x) in to.iter_mut().zip(row) {
                *to += step * x;
            }
        }
    }
    loss
}

/// Trains on all rows; `progress` is told the epoch (from 1) and its mean loss.
pub fn fit(features: &Features, classes: usize, settings: &Sgd, progress: &mut dyn FnMut(usize, f32)) -> Layer {
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let mut layer = Layer::zeros(classes, features.width);
    let mut velocity = layer.clone();
    let mut step = layer.clone();
    let mut order: Vec<usize> = (0..features.len()).collect();
    let steps = settings.epochs * order.len().div_ceil(settings.batch);
    let mut taken = 0;
    for epoch in 1..=settings.epochs {
        shuffle(&mut order, &mut rng);
        let mut loss = 0.0;
        for batch in order.chunks(settings.batch) {
            let progress = taken as f32 / steps as f32;
            let rate = settings.learning_rate * 0.5 * (1.0 + (std::f32::consts::PI * progress).cos());
            loss += gradient(&layer, features, batch, settings.label_smoothing, &mut step) * batch.len() as f32;
            for (gradient, weight) in step.weight.iter_mut().zip(&layer.weight) {
                *gradient += settings.weight_decay * weight;
            }
            // Nesterov: v ← μ v + g; w ← w − r (g + μ v)
            velocity.scale(settings.momentum);
            velocity.add(1.0, &step);
            step.add(settings.momentum, &velocity);
            layer.add(-rate, &step);
            taken += 1;
        }
        progress(epoch, loss / order.len() as f32);
    }
    layer
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
mod tests {
    use super::*;

    /// Three classes in four dimensions, told apart by the sign of a coordinate, with some noise.
    fn features(n: usize) -> Features {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut features = Features { width: 4, ..Features::default() };
        for i in 0..n {
            let class = i % 3;
            let noise = |rng: &mut ChaCha8Rng| below(rng, 1000) as f32 / 1000.0 - 0.5;
            let mut row: Vec<f32> = (0..4).map(|_| noise(&mut rng)).collect();
            row[class] += 1.0;
            features.values.extend(row);
            features.classes.push(class);
        }
        features
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let features = features(12);
        let mut layer = Layer::zeros(3, 4);
        layer.weight.iter_mut().enumerate().for_each(|(i, w)| *w = (i as f32 * 0.7).sin());
        layer.bias.copy_from_slice(&[0.1, -0.2, 0.3]);
        let batch: Vec<usize> = (0..12).collect();
        let mut analytic = layer.clone();
        gradient(&layer, &features, &batch, 0.1, &mut analytic);
        let mut scratch = layer.clone();
        let mut loss_at = |layer: &Layer| f64::from(gradient(layer, &features, &batch, 0.1, &mut scratch));
        let h = 1e-2;
        for i in 0..layer.weight.len() + layer.bias.len() {
            let moved = |by: f32| {
                let mut moved = layer.clone();
                match i.checked_sub(layer.weight.len()) {
                    None => moved.weight[i] += by,
                    Some(bias) => moved.bias[bias] += by,
                }
                moved
            };
            let numeric = (loss_at(&moved(h)) - loss_at(&moved(-h))) / f64::from(2.0 * h);
            let exact = match i.checked_sub(layer.weight.len()) {
                None => analytic.weight[i],
                Some(bias) => analytic.bias[bias],
            };
            assert!((numeric - f64::from(exact)).abs() < 2e-4, "parameter {i}: {exact}, expected {numeric}");
        }
    }

    #[test]
    fn it_learns_what_can_be_learned_and_the_seed_decides_every_bit() {
        let features = features(300);
        let settings =
            Sgd { epochs: 20, learning_rate: 0.1, weight_decay: 0.0, label_smoothing: 0.0, ..Sgd::default() };
        let mut losses = Vec::new();
        let layer = fit(&features, 3, &settings, &mut |_, loss| losses.push(loss));
        assert_eq!(losses.len(), 20);
        assert!(losses[19] < losses[0] * 0.6, "{losses:?}");
        let right = features
            .rows()
            .zip(&features.classes)
            .filter(|(row, class)| crate::vision::head::argmax(&layer.logits(row)) == **class)
            .count();
        assert!(right >= 290, "{right} of 300");
        assert_eq!(fit(&features, 3, &settings, &mut |_, _| {}), layer);
        let other = Sgd { seed: 2, ..settings };
        assert_ne!(fit(&features, 3, &other, &mut |_, _| {}), layer);
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
