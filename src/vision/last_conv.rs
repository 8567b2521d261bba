//! The last convolution: from the feature map of the frozen layers to the feature vector.
//!
//! A 1×1 convolution with its batch normalisation folded in, ReLU6, and global average pooling. A fine-tuned one replaces
//! the network's own.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2};

/// Upper bound of ReLU6.
pub const RELU6_MAX: f32 = 6.0;
/// Largest absolute weight and bias; beyond those of trained networks.
const WEIGHT_MAX: f32 = 1e4;

/// The weights of a last convolution.
#[derive(Debug, Clone, PartialEq)]
pub struct LastConvWeights {
    inputs: usize,
    /// `[outputs, inputs]`, one row per filter.
    weight: Vec<f32>,
    /// `[outputs]`
    bias: Vec<f32>,
}

/// An error of the weights of a last convolution.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum LastConvError {
    /// The number of weights is not outputs × inputs, or there is no input or output.
    #[error("the last convolution has {weights} weights and {biases} biases, expected {biases} × {inputs}")]
    Shape {
        /// Number of weights.
        weights: usize,
        /// Number of biases, one per output channel.
        biases: usize,
        /// Number of input channels.
        inputs: usize,
    },
    /// The absolute value of a weight or bias is above 10,000, or not finite.
    #[error("the last convolution has a weight or bias that is not finite or above {WEIGHT_MAX}")]
    TooLarge,
}

impl LastConvWeights {
    /// Creates the weights. `weight`: `[outputs, inputs]`, one row per filter; `bias`: `[outputs]`.
    ///
    /// # Errors
    /// If the lengths do not match, there is no input or output, or a value is not finite or too large.
    pub fn new(inputs: usize, weight: Vec<f32>, bias: Vec<f32>) -> Result<Self, LastConvError> {
        if inputs == 0 || bias.is_empty() || inputs.checked_mul(bias.len()) != Some(weight.len()) {
            return Err(LastConvError::Shape { weights: weight.len(), biases: bias.len(), inputs });
        }
        if !weight.iter().chain(&bias).all(|v| v.abs() <= WEIGHT_MAX) {
            return Err(LastConvError::TooLarge);
        }
        Ok(LastConvWeights { inputs, weight, bias })
    }

    /// Returns the channels of the input feature map.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Returns the output channels, the length of the feature vector.
    pub fn outputs(&self) -> usize {
        self.bias.len()
    }

    /// Returns the weights, `[outputs, inputs]`, one row per filter.
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// Returns the biases, `[outputs]`.
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// Computes the convolution with ReLU6. in: `[positions, inputs]`, channels last; out: `[positions, outputs]`.
    ///
    /// # Panics
    /// If the length of `feature_map` is not a multiple of `inputs`.
    pub fn activations(&self, feature_map: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; feature_map.len() / self.inputs * self.outputs()];
        convolve(feature_map, &self.weight, self.inputs, &mut out);
        for position in out.chunks_exact_mut(self.outputs()) {
            for (value, bias) in position.iter_mut().zip(&self.bias) {
                *value = (*value + bias).clamp(0.0, RELU6_MAX);
            }
        }
        out
    }

    /// Computes the feature vector, the mean of [`Self::activations`] over the positions. in: `[positions, inputs]`, channels
    /// last; out: `[outputs]`.
    ///
    /// # Panics
    /// As [`Self::activations`].
    pub fn features(&self, feature_map: &[f32]) -> Vec<f32> {
        let mut features = vec![0.0; self.outputs()];
        for position in self.activations(feature_map).chunks_exact(self.outputs()) {
            for (feature, value) in features.iter_mut().zip(position) {
                *feature += value;
            }
        }
        let scale = self.inputs as f32 / feature_map.len() as f32;
        features.iter_mut().for_each(|feature| *feature *= scale);
        features
    }
}

/// Computes a 1×1 convolution without bias, `out[position, filter] = feature_map[position, :] · weight[filter, :]`.
/// feature_map: `[positions, inputs]`; weight: `[outputs, inputs]`; out: `[positions, outputs]`.
///
/// # Panics
/// If the lengths do not match.
pub fn convolve(feature_map: &[f32], weight: &[f32], inputs: usize, out: &mut [f32]) {
    let (positions, outputs) = (feature_map.len() / inputs, weight.len() / inputs);
    let feature_map = ArrayView2::from_shape((positions, inputs), feature_map).expect("inputs values per position");
    let weight = ArrayView2::from_shape((outputs, inputs), weight).expect("inputs values per filter");
    let mut out = ArrayViewMut2::from_shape((positions, outputs), out).expect("one value per position and filter");
    general_mat_mul(1.0, &feature_map, &weight.t(), 0.0, &mut out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_the_mean_of_the_activations_after_relu6() {
        // Two filters over two channels, three positions.
        let last_conv = LastConvWeights::new(2, vec![1.0, 0.0, 1.0, -1.0], vec![0.5, 0.0]).unwrap();
        let feature_map = [1.0, 2.0, 9.0, 1.0, -3.0, -6.0];
        assert_eq!(last_conv.activations(&feature_map), [1.5, 0.0, 6.0, 6.0, 0.0, 3.0]);
        assert_eq!(last_conv.features(&feature_map), [2.5, 3.0]);
    }

    #[test]
    fn rejects_invalid_weights() {
        assert!(matches!(LastConvWeights::new(2, vec![0.0; 3], vec![0.0; 2]), Err(LastConvError::Shape { .. })));
        assert!(matches!(LastConvWeights::new(2, vec![], vec![]), Err(LastConvError::Shape { .. })));
        assert!(matches!(LastConvWeights::new(0, vec![], vec![0.0]), Err(LastConvError::Shape { .. })));
        assert_eq!(LastConvWeights::new(1, vec![f32::NAN], vec![0.0]), Err(LastConvError::TooLarge));
    }
}
