//! The classification head: from features to calibrated probabilities.

/// A linear layer and a softmax with a temperature (temperature scaling, Guo et al. 2017).
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    width: usize,
    /// `[classes, width]`, one row per class.
    weight: Vec<f32>,
    /// `[classes]`
    bias: Vec<f32>,
    temperature: f32,
}

/// Largest absolute weight and bias; beyond trained weights, and small enough that logits do not overflow.
const WEIGHT_MAX: f32 = 1e4;

/// An error of the parameters of a [`Head`].
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum HeadError {
    /// The number of weights is not classes × width, or there is no class.
    #[error("the head has {weights} weights and {biases} biases, expected {biases} × {width}")]
    Shape {
        /// Number of weights.
        weights: usize,
        /// Number of biases, one per class.
        biases: usize,
        /// Length of a feature vector.
        width: usize,
    },
    /// The absolute value of a weight or bias is above 10,000, or not finite.
    #[error("the head has a weight or bias that is not finite or above {WEIGHT_MAX}")]
    TooLarge,
    /// The temperature is not finite or not positive; its value.
    #[error("temperature {0}, expected a finite value above 0")]
    Temperature(f32),
}

impl Head {
    /// Creates a head. `weight`: `[classes, width]`, one row per class; `bias`: `[classes]`; `temperature`: above 0.
    ///
    /// # Errors
    /// If the lengths do not match, there is no class, a value is not finite or too large, or the temperature is not
    /// positive.
    pub fn new(width: usize, weight: Vec<f32>, bias: Vec<f32>, temperature: f32) -> Result<Self, HeadError> {
        if bias.is_empty() || width.checked_mul(bias.len()) != Some(weight.len()) {
            return Err(HeadError::Shape { weights: weight.len(), biases: bias.len(), width });
        }
        if !weight.iter().chain(&bias).all(|v| v.abs() <= WEIGHT_MAX) {
            return Err(HeadError::TooLarge);
        }
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(HeadError::Temperature(temperature));
        }
        Ok(Head { width, weight, bias, temperature })
    }

    /// Returns the length of a feature vector.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the number of classes.
    pub fn classes(&self) -> usize {
        self.bias.len()
    }

    /// Returns the weights, `[classes, width]`, one row per class.
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// Returns the biases, `[classes]`.
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// Returns the divisor of the logits.
    pub fn temperature(&self) -> f32 {
        self.temperature
    }

    /// Computes the logits, not divided by the temperature. in: `[width]`; out: `[classes]`.
    ///
    /// # Panics
    /// If `features` is not `width` long.
    pub fn logits(&self, features: &[f32]) -> Vec<f32> {
        linear(&self.weight, &self.bias, features)
    }

    /// Computes the calibrated probabilities. in: `[width]`; out: `[classes]`, 0–1, summing to 1; its buffer is reused.
    ///
    /// # Panics
    /// As [`Head::logits`].
    pub fn probabilities(&self, features: &[f32], out: &mut Vec<f32>) {
        self.logits_into(features, out);
        softmax_in_place(out, self.temperature);
    }

    /// As [`Head::logits`], into an existing buffer.
    pub fn logits_into(&self, features: &[f32], out: &mut Vec<f32>) {
        out.clear();
        out.extend(weighted_sums(&self.weight, &self.bias, features));
    }
}

/// Computes a linear layer. `weight`: `[classes, width]`, one row per class; `bias` and out: `[classes]`; in: `[width]`.
///
/// # Panics
/// If the lengths do not match.
pub fn linear(weight: &[f32], bias: &[f32], features: &[f32]) -> Vec<f32> {
    weighted_sums(weight, bias, features).collect()
}

/// Returns an iterator over the outputs of a linear layer; shapes as in [`linear`].
fn weighted_sums(weight: &[f32], bias: &[f32], features: &[f32]) -> impl Iterator<Item = f32> {
    assert_eq!(features.len() * bias.len(), weight.len(), "length of the feature vector");
    let rows = weight.chunks_exact(features.len());
    rows.zip(bias).map(|(row, bias)| dot(row, features) + bias)
}

/// Computes `softmax(logits / temperature)`. in, out: `[classes]`.
pub fn softmax(logits: &[f32], temperature: f32) -> Vec<f32> {
    let mut out = logits.to_vec();
    softmax_in_place(&mut out, temperature);
    out
}

/// Replaces the logits by `softmax(logits / temperature)`; subtracts the largest logit first, so that `exp` does not overflow.
pub(super) fn softmax_in_place(logits: &mut [f32], temperature: f32) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter_mut().for_each(|z| *z = ((*z - largest) / temperature).exp());
    let sum: f32 = logits.iter().sum();
    logits.iter_mut().for_each(|p| *p /= sum);
}

/// Returns the logarithm of the sum of the exponentials of at least one value.
pub fn log_sum_exp(values: impl Iterator<Item = f32> + Clone) -> f32 {
    let largest = values.clone().fold(f32::NEG_INFINITY, f32::max);
    largest + values.map(|value| (value - largest).exp()).sum::<f32>().ln()
}

/// Computes the dot product. Eight partial sums stay in vector registers; the order of the additions is the same on every
/// machine.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail_sum: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + tail_sum
}

/// Returns the index of the largest value, the first of equal ones; 0 for an empty slice.
pub fn argmax(values: &[f32]) -> usize {
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (i, value) in values.iter().enumerate() {
        if *value > largest {
            (best, largest) = (i, *value);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_follow_the_formula() {
        let head = Head::new(3, vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0], vec![0.5, -0.5], 2.0).unwrap();
        assert_eq!(head.logits(&[1.0, 2.0, 9.0]), [1.5, 1.5]);
        let mut p = vec![7.0];
        head.probabilities(&[3.0, 0.0, 0.0], &mut p);
        // logits 3.5 and −0.5: 1 / (1 + e^(−4 / 2))
        assert!((p[0] - 1.0 / (1.0 + (-2.0f32).exp())).abs() < 1e-6);
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(argmax(&p), 0);
    }

    #[test]
    fn log_sum_exp_does_not_overflow() {
        assert!((log_sum_exp([1000.0, 1000.0].into_iter()) - (1000.0 + 2.0f32.ln())).abs() < 1e-3);
        assert!((log_sum_exp([0.0, 1.0f32.ln(), 2.0f32.ln()].into_iter()) - 4.0f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn large_logits_do_not_overflow() {
        assert_eq!(softmax(&[1000.0, 0.0], 1.0), [1.0, 0.0]);
    }

    #[test]
    fn rejects_invalid_parameters() {
        assert!(matches!(Head::new(3, vec![0.0; 5], vec![0.0; 2], 1.0), Err(HeadError::Shape { .. })));
        assert!(matches!(Head::new(0, vec![], vec![], 1.0), Err(HeadError::Shape { .. })));
        assert_eq!(Head::new(1, vec![f32::NAN], vec![0.0], 1.0), Err(HeadError::TooLarge));
        assert_eq!(Head::new(1, vec![3e38], vec![0.0], 1.0), Err(HeadError::TooLarge));
        assert_eq!(Head::new(1, vec![0.0], vec![0.0], 0.0), Err(HeadError::Temperature(0.0)));
    }

    #[test]
    fn dot_supports_every_length() {
        for n in 0..20 {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let expected: f32 = (0..n).map(|i| (i * i) as f32).sum();
            assert_eq!(dot(&a, &a), expected);
        }
    }
}
