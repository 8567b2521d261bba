//! Fine-tuning of the last convolution with its batch normalization and the head, on the feature maps of the frozen layers.
//!
//! The statistics of the batch normalization are frozen, so it is a gain and a shift per channel:
//! `features = mean over the positions of ReLU6(gain · (W x) + shift)`. Initially the gain is 1, and `W` and the shift are
//! the pretrained weights.

use std::convert::Infallible;

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::train::features::Features;
use crate::train::optim::head::{SoftTargets, head_groups, val_metrics};
use crate::train::optim::training_loop::{Hyperparams, Learner, ParamGroup, ValMetrics, random_below};
use crate::train::parallel;
use crate::vision::LastConvWeights;
use crate::vision::head::{dot, linear};
use crate::vision::last_conv::{LastConvError, RELU6_MAX, convolve};

/// Images that one thread processes at once; their activations about fit the L2 cache. The gradients of the chunks are added
/// in order, so that the result does not depend on the number of threads.
const CHUNK: usize = 8;

/// Indices of the parameter groups.
const WEIGHT: usize = 0;
const GAIN: usize = 1;
const SHIFT: usize = 2;
const HEAD: usize = 3;
const BIAS: usize = 4;

/// The last convolution and the head with their training and validation sets.
pub struct LastConvLearner<'a> {
    train: &'a Features,
    val: &'a Features,
    targets: SoftTargets,
    dropout: f32,
    threads: usize,
    /// Channels of a feature map.
    inputs: usize,
    /// Weight `[outputs, inputs]`, gain `[outputs]`, shift `[outputs]`, head `[classes, outputs]`, bias `[classes]`.
    groups: [ParamGroup; 5],
}

/// The sums over a chunk of the loss and its gradients.
struct ChunkGradient {
    loss: f32,
    /// With respect to gain × weight, `[outputs, inputs]`.
    weight: Vec<f32>,
    shift: Vec<f32>,
    head: Vec<f32>,
    bias: Vec<f32>,
}

/// An image of a batch.
struct Sample {
    image: usize,
    view: usize,
    dropout_seed: u64,
}

impl<'a> LastConvLearner<'a> {
    /// `train` and `val` hold feature maps `[positions, channels]`; `pretrained` is the network's last convolution.
    /// `classes` includes the unknown classes, which come last; `threads` is at least 1.
    pub fn new(
        train: &'a Features,
        val: &'a Features,
        pretrained: &LastConvWeights,
        classes: usize,
        hyperparams: &Hyperparams,
        threads: usize,
    ) -> Self {
        let [head, bias] = head_groups(classes, pretrained.outputs());
        let groups = [
            ParamGroup::new("conv.weight", pretrained.weight().to_vec(), true),
            ParamGroup::new("conv.gain", vec![1.0; pretrained.outputs()], false),
            ParamGroup::new("conv.shift", pretrained.bias().to_vec(), false),
            head,
            bias,
        ];
        let targets = SoftTargets::new(&train.classes(), classes, hyperparams);
        LastConvLearner {
            train,
            val,
            targets,
            dropout: hyperparams.dropout,
            threads,
            inputs: pretrained.inputs(),
            groups,
        }
    }

    /// Returns the fine-tuned convolution, and the weight `[classes, outputs]` and bias `[classes]` of the head.
    ///
    /// # Errors
    /// Fails if a weight is not finite or too large.
    pub fn params(&self) -> Result<(LastConvWeights, Vec<f32>, Vec<f32>), LastConvError> {
        let conv = LastConvWeights::new(self.inputs, self.weight_with_gain(), self.groups[SHIFT].values.clone())?;
        Ok((conv, self.groups[HEAD].values.clone(), self.groups[BIAS].values.clone()))
    }

    /// Returns gain × weight, `[outputs, inputs]`.
    fn weight_with_gain(&self) -> Vec<f32> {
        let filters = self.groups[WEIGHT].values.chunks_exact(self.inputs);
        filters.zip(&self.groups[GAIN].values).flat_map(|(filter, gain)| filter.iter().map(move |w| w * gain)).collect()
    }

    /// Runs the forward and backward pass of a chunk. `weight` is gain × weight.
    fn chunk_gradient(&self, weight: &[f32], samples: &[Sample], buffers: &mut Buffers) -> ChunkGradient {
        let (inputs, outputs) = (self.inputs, self.groups[GAIN].values.len());
        let positions = self.train.width / inputs;
        let Buffers { maps, activations } = buffers;
        maps.clear();
        for sample in samples {
            maps.extend_from_slice(&self.train.row(sample.image, sample.view));
        }
        activations.resize(samples.len() * positions * outputs, 0.0);
        convolve(maps, weight, inputs, activations);
        let mut gradient = ChunkGradient {
            loss: 0.0,
            weight: vec![0.0; weight.len()],
            shift: vec![0.0; outputs],
            head: vec![0.0; self.groups[HEAD].values.len()],
            bias: vec![0.0; self.groups[BIAS].values.len()],
        };
        for (sample, activations) in samples.iter().zip(activations.chunks_exact_mut(positions * outputs)) {
            // `pool` overwrites the activations with the derivative of ReLU6.
            let mut features = self.pool(activations);
            let mask = self.dropout_mask(sample.dropout_seed, outputs);
            features.iter_mut().zip(&mask).for_each(|(feature, mask)| *feature *= mask);
            let logits = linear(&self.groups[HEAD].values, &self.groups[BIAS].values, &features);
            let (loss, grad_logits) = self.targets.cross_entropy(&logits, self.train.class(sample.image));
            gradient.loss += loss;
            let grad_activation =
                self.head_backward(&mut gradient, &features, &grad_logits, &mask, 1.0 / positions as f32);
            for position in activations.chunks_exact_mut(outputs) {
                for ((value, grad_activation), shift) in
                    position.iter_mut().zip(&grad_activation).zip(&mut gradient.shift)
                {
                    // The chain rule: `value` is the derivative of ReLU6.
                    *value *= grad_activation;
                    *shift += *value;
                }
            }
        }
        let grad_activation = ArrayView2::from_shape((samples.len() * positions, outputs), activations.as_slice())
            .expect("a row a position");
        let maps = ArrayView2::from_shape((samples.len() * positions, inputs), maps.as_slice()).expect("whole maps");
        let mut out = ArrayViewMut2::from_shape((outputs, inputs), &mut gradient.weight).expect("whole filters");
        general_mat_mul(1.0, &grad_activation.t(), &maps, 0.0, &mut out);
        gradient
    }

    /// Adds the shift, applies ReLU6 and global average pooling; overwrites `activations` with the derivative of ReLU6, 1 or 0, for
    /// the backward pass. in: `[positions, outputs]`; out: `[outputs]`.
    fn pool(&self, activations: &mut [f32]) -> Vec<f32> {
        let shift = &self.groups[SHIFT].values;
        let scale = shift.len() as f32 / activations.len() as f32;
        let mut features = vec![0.0; shift.len()];
        for position in activations.chunks_exact_mut(shift.len()) {
            for ((value, shift), feature) in position.iter_mut().zip(shift).zip(&mut features) {
                let sum = *value + shift;
                *feature += sum.clamp(0.0, RELU6_MAX) * scale;
                *value = if sum > 0.0 && sum < RELU6_MAX { 1.0 } else { 0.0 };
            }
        }
        features
    }

    /// Adds the gradient of the head, and returns the gradient with respect to the activations, `[outputs]`, which is the
    /// same at every position. `grad_logits`: `[classes]`; `mask`: the dropout mask; `scale`: 1 / positions.
    fn head_backward(
        &self,
        gradient: &mut ChunkGradient,
        features: &[f32],
        grad_logits: &[f32],
        mask: &[f32],
        scale: f32,
    ) -> Vec<f32> {
        let mut grad_features = vec![0.0; features.len()];
        let head = self.groups[HEAD].values.chunks_exact(features.len());
        let head_gradient = gradient.head.chunks_exact_mut(features.len());
        for (((grad_logit, weight), grad_weight), grad_bias) in
            grad_logits.iter().zip(head).zip(head_gradient).zip(&mut gradient.bias)
        {
            *grad_bias += grad_logit;
            for (((grad_weight, feature), grad_feature), weight) in
                grad_weight.iter_mut().zip(features).zip(&mut grad_features).zip(weight)
            {
                *grad_weight += grad_logit * feature;
                *grad_feature += grad_logit * weight;
            }
        }
        grad_features.iter_mut().zip(mask).for_each(|(grad_feature, mask)| *grad_feature *= mask * scale);
        grad_features
    }

    /// Returns the inverted dropout mask, `[outputs]`: 0 for a dropped feature, 1 / (1 − rate) for the others.
    fn dropout_mask(&self, seed: u64, outputs: usize) -> Vec<f32> {
        if self.dropout == 0.0 {
            return vec![1.0; outputs];
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let limit = (f64::from(self.dropout) * f64::from(u32::MAX)) as u32;
        let scale = 1.0 / (1.0 - self.dropout);
        (0..outputs).map(|_| if rng.next_u32() < limit { 0.0 } else { scale }).collect()
    }
}

/// The buffers of one thread.
#[derive(Default)]
struct Buffers {
    /// `[images · positions, inputs]`
    maps: Vec<f32>,
    /// `[images · positions, outputs]`
    activations: Vec<f32>,
}

impl Learner for LastConvLearner<'_> {
    fn train_len(&self) -> usize {
        self.train.len()
    }

    fn param_groups(&mut self) -> &mut [ParamGroup] {
        &mut self.groups
    }

    fn loss_and_gradient(&mut self, batch: &[usize], rng: &mut ChaCha8Rng) -> f32 {
        // The fields are drawn in this order.
        let sample = |image: &usize| Sample {
            image: *image,
            view: random_below(rng, self.train.views),
            dropout_seed: rng.next_u64(),
        };
        let samples: Vec<Sample> = batch.iter().map(sample).collect();
        let weight = self.weight_with_gain();
        let chunks: Vec<&[Sample]> = samples.chunks(CHUNK).collect();
        let work =
            |buffers: &mut Buffers, i: usize| Ok::<_, Infallible>(self.chunk_gradient(&weight, chunks[i], buffers));
        let init = || Ok(Buffers::default());
        let Ok(gradients) = parallel::map(chunks.len(), self.threads, "last-conv", init, work, &|_| {});
        let scale = 1.0 / batch.len() as f32;
        self.groups.iter_mut().for_each(|group| group.gradient.fill(0.0));
        let mut loss = 0.0;
        for chunk in &gradients {
            loss += chunk.loss * scale;
            let sums = [(WEIGHT, &chunk.weight), (SHIFT, &chunk.shift), (HEAD, &chunk.head), (BIAS, &chunk.bias)];
            for (group, sum) in sums {
                for (gradient, sum) in self.groups[group].gradient.iter_mut().zip(sum) {
                    *gradient += scale * sum;
                }
            }
        }
        // So far the gradient is with respect to gain × weight.
        let [weight, gain, ..] = &mut self.groups;
        let filters = weight.values.chunks_exact(self.inputs).zip(weight.gradient.chunks_exact_mut(self.inputs));
        for ((filter, gradient), (gain, grad_gain)) in filters.zip(gain.values.iter().zip(&mut gain.gradient)) {
            *grad_gain = dot(filter, gradient);
            gradient.iter_mut().for_each(|g| *g *= gain);
        }
        loss
    }

    fn validate(&self) -> ValMetrics {
        let weight = self.weight_with_gain();
        let logits = |activations: &mut Vec<f32>, i: usize| {
            let map = self.val.row(i, 0);
            activations.resize(map.len() / self.inputs * self.groups[GAIN].values.len(), 0.0);
            convolve(&map, &weight, self.inputs, activations);
            let features = self.pool(activations);
            Ok::<_, Infallible>(linear(&self.groups[HEAD].values, &self.groups[BIAS].values, &features))
        };
        let init = || Ok(Vec::new());
        let Ok(logits) = parallel::map(self.val.len(), self.threads, "last-conv", init, logits, &|_| {});
        val_metrics(&logits, &self.val.classes())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::super::training_loop::tests::{expect_gradient, hyperparams};
    use super::super::training_loop::{Optimizer, fit};
    use super::*;
    use crate::train::data::image_set::{HashedImage, Origin};
    use crate::train::features::Values;

    /// Feature maps of two positions and three channels; channel `class` is raised at one of the positions.
    fn maps(n: usize, views: usize) -> Features {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut maps = Features { width: 6, views, ..Features::default() };
        for i in 0..n {
            let class = i % 3;
            let mut values: Vec<f32> =
                (0..6 * views).map(|_| random_below(&mut rng, 1000) as f32 / 1000.0 - 0.5).collect();
            for view in 0..views {
                values[view * 6 + 3 * random_below(&mut rng, 2) + class] += 2.0;
            }
            maps.values.push(Values::Single(values));
            maps.images.push(HashedImage {
                path: i.to_string().into(),
                class,
                content_hash: [0; 32],
                origin: Origin::File,
            });
        }
        maps
    }

    fn pretrained() -> LastConvWeights {
        let weight = (0..12).map(|i| (i as f32 * 1.3).sin() * 2.0).collect();
        LastConvWeights::new(3, weight, vec![0.2, -0.1, 0.3, 5.0]).unwrap()
    }

    #[test]
    fn gradient_matches_finite_differences() {
        let maps = maps(11, 2);
        let hyperparams = Hyperparams { label_smoothing: 0.1, dropout: 0.3, balance: true, ..hyperparams() };
        let mut learner = LastConvLearner::new(&maps, &maps, &pretrained(), 3, &hyperparams, 2);
        for group in [GAIN, HEAD, BIAS] {
            let values = learner.groups[group].values.iter_mut();
            values.enumerate().for_each(|(i, value)| *value += (i as f32 * 0.9).cos() * 0.5);
        }
        expect_gradient(&mut learner, &(0..11).collect::<Vec<_>>(), 2e-3, 2e-3);
    }

    #[test]
    fn converges_and_does_not_depend_on_the_number_of_threads() {
        let (maps, hyperparams) =
            (maps(120, 3), Hyperparams { optimizer: Optimizer::Adam, dropout: 0.1, ..hyperparams() });
        let run = |threads: usize| {
            let hyperparams = Hyperparams { learning_rate: 0.05, ..hyperparams.clone() };
            let mut learner = LastConvLearner::new(&maps, &maps, &pretrained(), 3, &hyperparams, threads);
            let history = fit(&mut learner, &hyperparams, |_, _| Ok::<(), Infallible>(())).unwrap();
            (learner.groups.map(|group| group.values), history)
        };
        let (values, history) = run(1);
        assert!(history[19].val.accuracy > 0.95, "{history:?}");
        assert_ne!(values[WEIGHT], pretrained().weight());
        assert_eq!(run(3), (values, history));
    }

    #[test]
    fn validation_metrics_match_the_exported_parameters() {
        let maps = maps(12, 1);
        let mut learner = LastConvLearner::new(&maps, &maps, &pretrained(), 3, &hyperparams(), 1);
        learner.groups[GAIN].values[2] = -0.5;
        learner.groups[HEAD].values.iter_mut().enumerate().for_each(|(i, w)| *w = (i as f32).sin());
        let (conv, weight, bias) = learner.params().unwrap();
        let logits: Vec<Vec<f32>> = maps.rows().map(|map| linear(&weight, &bias, &conv.features(&map))).collect();
        let expected = val_metrics(&logits, &maps.classes());
        assert!((learner.validate().loss - expected.loss).abs() < 1e-5);
        assert_eq!(learner.validate().accuracy, expected.accuracy);
    }
}
