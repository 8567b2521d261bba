//! The last convolution in training, with its batch normalisation and the head behind it, on maps of the
//! frozen layers before it.
//!
//! The normalisation's statistics stay as they are, so that it is a gain and a shift a channel:
//! `features = mean over the places of ReLU6(gain · (W x) + shift)`. At the start the gain is 1, and `W` and
//! the shift are the network's own.

use std::convert::Infallible;

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::train::features::Features;
use crate::train::features::pool;
use crate::train::optim::head::{SoftTargets, head_groups, measure};
use crate::train::optim::sgd::{Learner, Measure, ParamGroup, Sgd, below};
use crate::vision::LastConvWeights;
use crate::vision::head::{dot, linear};
use crate::vision::last_conv::{RELU6_MAX, convolve};

/// Photographs that one thread takes at once: their activations stay near the second-level cache. The sums
/// over them are added in order, so that the number of threads does not matter.
const CHUNK: usize = 8;

/// The places of the groups.
const WEIGHT: usize = 0;
const GAIN: usize = 1;
const SHIFT: usize = 2;
const HEAD: usize = 3;
const BIAS: usize = 4;

pub struct LastConvLearner<'a> {
    train: &'a Features,
    val: &'a Features,
    truth: SoftTargets,
    dropout: f32,
    threads: usize,
    /// Channels of a map.
    inputs: usize,
    /// Weight `[outputs, inputs]`, gain `[outputs]`, shift `[outputs]`, head `[classes, outputs]`, bias `[classes]`.
    groups: [ParamGroup; 5],
}

/// What a chunk adds to the gradient.
struct Share {
    loss: f32,
    /// By the weights with the gain in them, `[outputs, inputs]`.
    weight: Vec<f32>,
    shift: Vec<f32>,
    head: Vec<f32>,
    bias: Vec<f32>,
}

/// One photograph of a batch: which, which view of it, and the seed of its dropout.
type Sample = (usize, usize, u64);

impl<'a> LastConvLearner<'a> {
    /// `train`, `val`: maps `[places, channels]`; `own`: the network's last convolution.
    pub fn new(
        train: &'a Features,
        val: &'a Features,
        own: &LastConvWeights,
        classes: usize,
        settings: &Sgd,
        threads: usize,
    ) -> Self {
        let [head, bias] = head_groups(classes, own.outputs());
        let groups = [
            ParamGroup::new("conv.weight", own.weight().to_vec(), true),
            ParamGroup::new("conv.gain", vec![1.0; own.outputs()], false),
            ParamGroup::new("conv.shift", own.bias().to_vec(), false),
            head,
            bias,
        ];
        let truth = SoftTargets::new(&train.classes(), classes, settings);
        LastConvLearner { train, val, truth, dropout: settings.dropout, threads, inputs: own.inputs(), groups }
    }

    /// The fine-tuned convolution; the weight `[classes, width]` and the bias `[classes]` of the head. Fails where
    /// training gave a number that is none.
    pub fn numbers(&self) -> Result<(LastConvWeights, Vec<f32>, Vec<f32>), crate::vision::last_conv::LastConvError> {
        let tail = LastConvWeights::new(self.inputs, self.weight_with_gain(), self.groups[SHIFT].values.clone())?;
        Ok((tail, self.groups[HEAD].values.clone(), self.groups[BIAS].values.clone()))
    }

    fn weight_with_gain(&self) -> Vec<f32> {
        let filters = self.groups[WEIGHT].values.chunks_exact(self.inputs);
        filters.zip(&self.groups[GAIN].values).flat_map(|(filter, gain)| filter.iter().map(move |w| w * gain)).collect()
    }

    fn share(&self, weight: &[f32], samples: &[Sample], buffers: &mut Buffers) -> Share {
        let (inputs, outputs) = (self.inputs, self.groups[GAIN].values.len());
        let places = self.train.width / inputs;
        let Buffers { maps, activations } = buffers;
        maps.clear();
        for (i, view, _) in samples {
            maps.extend_from_slice(&self.train.row(*i, *view));
        }
        activations.resize(samples.len() * places * outputs, 0.0);
        convolve(maps, weight, inputs, activations);
        let mut share = Share {
            loss: 0.0,
            weight: vec![0.0; weight.len()],
            shift: vec![0.0; outputs],
            head: vec![0.0; self.groups[HEAD].values.len()],
            bias: vec![0.0; self.groups[BIAS].values.len()],
        };
        for ((i, _, seed), activations) in samples.iter().zip(activations.chunks_exact_mut(places * outputs)) {
            let mut features = self.pool(activations);
            let kept = self.kept(*seed, outputs);
            features.iter_mut().zip(&kept).for_each(|(feature, kept)| *feature *= kept);
            let logits = linear(&self.groups[HEAD].values, &self.groups[BIAS].values, &features);
            let (loss, error) = self.truth.error(&logits, self.train.class(*i));
            share.loss += loss;
            let slope = self.head_backward(&mut share, &features, &error, &kept, 1.0 / places as f32);
            for place in activations.chunks_exact_mut(outputs) {
                for ((open, slope), shift) in place.iter_mut().zip(&slope).zip(&mut share.shift) {
                    // Where ReLU6 let the value through, its slope is 1; elsewhere 0.
                    *open *= slope;
                    *shift += *open;
                }
            }
        }
        let by_activation = ArrayView2::from_shape((samples.len() * places, outputs), activations.as_slice());
        let maps = ArrayView2::from_shape((samples.len() * places, inputs), maps.as_slice()).expect("whole maps");
        let mut out = ArrayViewMut2::from_shape((outputs, inputs), &mut share.weight).expect("whole filters");
        general_mat_mul(1.0, &by_activation.expect("whole activations").t(), &maps, 0.0, &mut out);
        share
    }

    /// Adds the shift, clips, and takes the mean over the places. Leaves 1 where ReLU6 let the value through,
    /// 0 elsewhere. in: `[places, outputs]`; out: `[outputs]`.
    fn pool(&self, activations: &mut [f32]) -> Vec<f32> {
        let shift = &self.groups[SHIFT].values;
        let share = shift.len() as f32 / activations.len() as f32;
        let mut features = vec![0.0; shift.len()];
        for place in activations.chunks_exact_mut(shift.len()) {
            for ((value, shift), feature) in place.iter_mut().zip(shift).zip(&mut features) {
                let sum = *value + shift;
                *feature += sum.clamp(0.0, RELU6_MAX) * share;
                *value = if sum > 0.0 && sum < RELU6_MAX { 1.0 } else { 0.0 };
            }
        }
        features
    }

    /// Adds to the head's gradient; gives the gradient by the sum over the places of each feature.
    fn head_backward(
        &self,
        share: &mut Share,
        features: &[f32],
        error: &[f32],
        kept: &[f32],
        place_share: f32,
    ) -> Vec<f32> {
        let mut slope = vec![0.0; features.len()];
        let head = self.groups[HEAD].values.chunks_exact(features.len());
        for (((error, weight), to), bias) in
            error.iter().zip(head).zip(share.head.chunks_exact_mut(features.len())).zip(&mut share.bias)
        {
            *bias += error;
            for (((to, feature), slope), weight) in to.iter_mut().zip(features).zip(&mut slope).zip(weight) {
                *to += error * feature;
                *slope += error * weight;
            }
        }
        slope.iter_mut().zip(kept).for_each(|(slope, kept)| *slope *= kept * place_share);
        slope
    }

    /// 0 for a feature that a step does not see; for others what makes up for those.
    fn kept(&self, seed: u64, outputs: usize) -> Vec<f32> {
        if self.dropout == 0.0 {
            return vec![1.0; outputs];
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let limit = (f64::from(self.dropout) * f64::from(u32::MAX)) as u32;
        let scale = 1.0 / (1.0 - self.dropout);
        (0..outputs).map(|_| if rng.next_u32() < limit { 0.0 } else { scale }).collect()
    }
}

/// One thread's memory.
#[derive(Default)]
struct Buffers {
    /// `[photographs × places, inputs]`
    maps: Vec<f32>,
    /// `[photographs × places, outputs]`
    activations: Vec<f32>,
}

impl Learner for LastConvLearner<'_> {
    fn photographs(&self) -> usize {
        self.train.len()
    }

    fn groups(&mut self) -> &mut [ParamGroup] {
        &mut self.groups
    }

    fn learn(&mut self, batch: &[usize], rng: &mut ChaCha8Rng) -> f32 {
        let samples: Vec<Sample> = batch.iter().map(|i| (*i, below(rng, self.train.views), rng.next_u64())).collect();
        let weight = self.weight_with_gain();
        let chunks: Vec<&[Sample]> = samples.chunks(CHUNK).collect();
        let work = |buffers: &mut Buffers, i: usize| Ok::<_, Infallible>(self.share(&weight, chunks[i], buffers));
        let init = || Ok(Buffers::default());
        let Ok(shares) = pool::map(chunks.len(), self.threads, "tail", init, work, &|_| {});
        let share = 1.0 / batch.len() as f32;
        self.groups.iter_mut().for_each(|group| group.gradient.fill(0.0));
        let mut loss = 0.0;
        for chunk in &shares {
            loss += chunk.loss * share;
            let parts = [(WEIGHT, &chunk.weight), (SHIFT, &chunk.shift), (HEAD, &chunk.head), (BIAS, &chunk.bias)];
            for (group, part) in parts {
                for (to, from) in self.groups[group].gradient.iter_mut().zip(part) {
                    *to += share * from;
                }
            }
        }
        // The weights that were convolved with are gain × weight.
        let [weight, gain, ..] = &mut self.groups;
        let filters = weight.values.chunks_exact(self.inputs).zip(weight.gradient.chunks_exact_mut(self.inputs));
        for ((filter, gradient), (gain, to)) in filters.zip(gain.values.iter().zip(&mut gain.gradient)) {
            *to = dot(filter, gradient);
            gradient.iter_mut().for_each(|g| *g *= gain);
        }
        loss
    }

    fn measure(&self) -> Measure {
        let weight = self.weight_with_gain();
        let logits = |activations: &mut Vec<f32>, i: usize| {
            let map = self.val.row(i, 0);
            activations.resize(map.len() / self.inputs * self.groups[GAIN].values.len(), 0.0);
            convolve(&map, &weight, self.inputs, activations);
            let features = self.pool(activations);
            Ok::<_, Infallible>(linear(&self.groups[HEAD].values, &self.groups[BIAS].values, &features))
        };
        let init = || Ok(Vec::new());
        let Ok(logits) = pool::map(self.val.len(), self.threads, "tail", init, logits, &|_| {});
        measure(&logits, &self.val.classes())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::super::sgd::tests::{expect_gradient, settings};
    use super::super::sgd::{Optimiser, fit};
    use super::*;
    use crate::train::data::photographs::Photograph;
    use crate::train::features::Values;

    /// Maps of two places and three channels; a class lights up its channel at one of the places.
    fn maps(n: usize, views: usize) -> Features {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut maps = Features { width: 6, views, ..Features::default() };
        for i in 0..n {
            let class = i % 3;
            let mut values: Vec<f32> = (0..6 * views).map(|_| below(&mut rng, 1000) as f32 / 1000.0 - 0.5).collect();
            for view in 0..views {
                values[view * 6 + 3 * below(&mut rng, 2) + class] += 2.0;
            }
            maps.values.push(Values::Single(values));
            maps.images.push(Photograph { path: i.to_string().into(), class, content: [0; 32] });
        }
        maps
    }

    fn own() -> LastConvWeights {
        let weight = (0..12).map(|i| (i as f32 * 1.3).sin() * 2.0).collect();
        LastConvWeights::new(3, weight, vec![0.2, -0.1, 0.3, 5.0]).unwrap()
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let maps = maps(11, 2);
        let settings = Sgd { label_smoothing: 0.1, dropout: 0.3, balance: true, ..settings() };
        let mut learner = LastConvLearner::new(&maps, &maps, &own(), 3, &settings, 2);
        for group in [GAIN, HEAD, BIAS] {
            let values = learner.groups[group].values.iter_mut();
            values.enumerate().for_each(|(i, value)| *value += (i as f32 * 0.9).cos() * 0.5);
        }
        expect_gradient(&mut learner, &(0..11).collect::<Vec<_>>(), 2e-3, 2e-3);
    }

    #[test]
    fn it_learns_and_the_threads_change_no_bit() {
        let (maps, settings) = (maps(120, 3), Sgd { optimiser: Optimiser::Adam, dropout: 0.1, ..settings() });
        let run = |threads: usize| {
            let settings = Sgd { learning_rate: 0.05, ..settings.clone() };
            let mut learner = LastConvLearner::new(&maps, &maps, &own(), 3, &settings, threads);
            let history = fit(&mut learner, &settings, |_, _| Ok::<(), Infallible>(())).unwrap();
            (learner.groups.map(|group| group.values), history)
        };
        let (values, history) = run(1);
        assert!(history[19].val.accuracy > 0.95, "{history:?}");
        assert_ne!(values[WEIGHT], own().weight());
        assert_eq!(run(3), (values, history));
    }

    #[test]
    fn what_it_measures_is_what_its_tail_and_head_give() {
        let maps = maps(12, 1);
        let mut learner = LastConvLearner::new(&maps, &maps, &own(), 3, &settings(), 1);
        learner.groups[GAIN].values[2] = -0.5;
        learner.groups[HEAD].values.iter_mut().enumerate().for_each(|(i, w)| *w = (i as f32).sin());
        let (tail, weight, bias) = learner.numbers().unwrap();
        let logits: Vec<Vec<f32>> = maps.rows().map(|map| linear(&weight, &bias, &tail.features(&map))).collect();
        let expected = measure(&logits, &maps.classes());
        assert!((learner.measure().loss - expected.loss).abs() < 1e-5);
        assert_eq!(learner.measure().accuracy, expected.accuracy);
    }
}
