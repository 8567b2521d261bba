//! The last convolution: from the map the frozen part of a network gives to the features.
//!
//! A 1×1 convolution with its batch normalisation folded in, ReLU6, and the mean over all places. A
//! fine-tuned one takes the place of the network's own.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2};

/// What ReLU6 cuts off at.
pub const CEILING: f32 = 6.0;
/// Larger weights are no trained network's.
const NUMBER_MAX: f32 = 1e4;

/// The numbers of a last convolution.
#[derive(Debug, Clone, PartialEq)]
pub struct LastConvWeights {
    inputs: usize,
    /// `[outputs, inputs]`, a filter a row.
    weight: Vec<f32>,
    /// `[outputs]`
    bias: Vec<f32>,
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum LastConvError {
    #[error("the last convolution has {weights} weights and {biases} biases, expected {biases} × {inputs}")]
    Shape { weights: usize, biases: usize, inputs: usize },
    #[error("the last convolution holds a number that is not finite, or beyond {NUMBER_MAX}")]
    TooLarge,
}

impl LastConvWeights {
    /// `weight`: `[outputs, inputs]`, a filter a row; `bias`: `[outputs]`.
    pub fn new(inputs: usize, weight: Vec<f32>, bias: Vec<f32>) -> Result<Self, LastConvError> {
        if inputs == 0 || bias.is_empty() || inputs.checked_mul(bias.len()) != Some(weight.len()) {
            return Err(LastConvError::Shape { weights: weight.len(), biases: bias.len(), inputs });
        }
        if !weight.iter().chain(&bias).all(|v| v.abs() <= NUMBER_MAX) {
            return Err(LastConvError::TooLarge);
        }
        Ok(LastConvWeights { inputs, weight, bias })
    }

    /// Channels of the map it looks at.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Features it gives.
    pub fn outputs(&self) -> usize {
        self.bias.len()
    }

    /// `[outputs, inputs]`, a filter a row.
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// `[outputs]`
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// in: `[places, inputs]`, the map channels-last; out: `[places, outputs]`, after ReLU6.
    pub fn activations(&self, map: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; map.len() / self.inputs * self.outputs()];
        convolve(map, &self.weight, self.inputs, &mut out);
        for place in out.chunks_exact_mut(self.outputs()) {
            for (value, bias) in place.iter_mut().zip(&self.bias) {
                *value = (*value + bias).clamp(0.0, CEILING);
            }
        }
        out
    }

    /// in: `[places, inputs]`, the map channels-last; out: `[outputs]`, the mean over the places.
    pub fn features(&self, map: &[f32]) -> Vec<f32> {
        let mut features = vec![0.0; self.outputs()];
        for place in self.activations(map).chunks_exact(self.outputs()) {
            for (feature, value) in features.iter_mut().zip(place) {
                *feature += value;
            }
        }
        let share = self.inputs as f32 / map.len() as f32;
        features.iter_mut().for_each(|feature| *feature *= share);
        features
    }
}

/// `out[row, filter] = map[row, :] · weight[filter, :]`. map: `[rows, inputs]`; weight: `[outputs, inputs]`;
/// out: `[rows, outputs]`.
///
/// # Panics
/// Where the lengths do not fit.
pub fn convolve(map: &[f32], weight: &[f32], inputs: usize, out: &mut [f32]) {
    let (rows, outputs) = (map.len() / inputs, weight.len() / inputs);
    let map = ArrayView2::from_shape((rows, inputs), map).expect("whole rows");
    let weight = ArrayView2::from_shape((outputs, inputs), weight).expect("whole filters");
    let mut out = ArrayViewMut2::from_shape((rows, outputs), out).expect("a number a row and filter");
    general_mat_mul(1.0, &map, &weight.t(), 0.0, &mut out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_the_mean_of_what_relu6_lets_through() {
        // Two filters over two channels, three places.
        let tail = LastConvWeights::new(2, vec![1.0, 0.0, 1.0, -1.0], vec![0.5, 0.0]).unwrap();
        let map = [1.0, 2.0, 9.0, 1.0, -3.0, -6.0];
        assert_eq!(tail.activations(&map), [1.5, 0.0, 6.0, 6.0, 0.0, 3.0]);
        assert_eq!(tail.features(&map), [2.5, 3.0]);
    }

    #[test]
    fn what_is_no_convolution_is_refused() {
        assert!(matches!(LastConvWeights::new(2, vec![0.0; 3], vec![0.0; 2]), Err(LastConvError::Shape { .. })));
        assert!(matches!(LastConvWeights::new(2, vec![], vec![]), Err(LastConvError::Shape { .. })));
        assert!(matches!(LastConvWeights::new(0, vec![], vec![0.0]), Err(LastConvError::Shape { .. })));
        assert_eq!(LastConvWeights::new(1, vec![f32::NAN], vec![0.0]), Err(LastConvError::TooLarge));
    }
}
