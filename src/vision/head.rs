//! The last layer: from features to calibrated probabilities.

/// A linear layer, softmax behind it, and the temperature that makes its probabilities honest.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    width: usize,
    /// `[classes, width]`, a class a row.
    weight: Vec<f32>,
    /// `[classes]`
    bias: Vec<f32>,
    temperature: f32,
}

/// Larger weights are no trained head's, and logits might overflow.
const NUMBER_MAX: f32 = 1e4;

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum HeadError {
    #[error("the head has {weights} weights and {biases} biases, expected {biases} × {width}")]
    Shape { weights: usize, biases: usize, width: usize },
    #[error("the head holds a number that is not finite, or beyond {NUMBER_MAX}")]
    TooLarge,
    #[error("temperature {0}, expected a number above 0")]
    Temperature(f32),
}

impl Head {
    /// `weight`: `[classes, width]`, a class a row; `bias`: `[classes]`.
    pub fn new(width: usize, weight: Vec<f32>, bias: Vec<f32>, temperature: f32) -> Result<Self, HeadError> {
        if bias.is_empty() || width.checked_mul(bias.len()) != Some(weight.len()) {
            return Err(HeadError::Shape { weights: weight.len(), biases: bias.len(), width });
        }
        if !weight.iter().chain(&bias).all(|v| v.abs() <= NUMBER_MAX) {
            return Err(HeadError::TooLarge);
        }
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(HeadError::Temperature(temperature));
        }
        Ok(Head { width, weight, bias, temperature })
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn classes(&self) -> usize {
        self.bias.len()
    }

    /// `[classes, width]`, a class a row.
    pub fn weight(&self) -> &[f32] {
        &self.weight
    }

    /// `[classes]`
    pub fn bias(&self) -> &[f32] {
        &self.bias
    }

    pub fn temperature(&self) -> f32 {
        self.temperature
    }

    /// in: `[width]`; out: `[classes]`, before the temperature.
    ///
    /// # Panics
    /// Where `features` is not `width` long.
    pub fn logits(&self, features: &[f32]) -> Vec<f32> {
        linear(&self.weight, &self.bias, features)
    }

    /// in: `[width]`; out: `[classes]`, 0–1, calibrated, summing to 1.
    ///
    /// # Panics
    /// As [`Head::logits`].
    pub fn probabilities(&self, features: &[f32], out: &mut Vec<f32>) {
        out.clear();
        out.extend(sums(&self.weight, &self.bias, features));
        soften(out, self.temperature);
    }
}

/// A linear layer. `weight`: `[classes, width]`, a class a row; `bias` and out: `[classes]`; in:
/// `[width]`.
///
/// # Panics
/// Where the lengths do not fit.
pub fn linear(weight: &[f32], bias: &[f32], features: &[f32]) -> Vec<f32> {
    sums(weight, bias, features).collect()
}

fn sums(weight: &[f32], bias: &[f32], features: &[f32]) -> impl Iterator<Item = f32> {
    assert_eq!(features.len() * bias.len(), weight.len(), "one feature vector's length");
    let rows = weight.chunks_exact(features.len());
    rows.zip(bias).map(|(row, bias)| dot(row, features) + bias)
}

/// `exp(z / T)`, normalised; the largest logit is taken off first, so that nothing overflows.
pub fn softmax(logits: &[f32], temperature: f32) -> Vec<f32> {
    let mut out = logits.to_vec();
    soften(&mut out, temperature);
    out
}

fn soften(logits: &mut [f32], temperature: f32) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter_mut().for_each(|z| *z = ((*z - largest) / temperature).exp());
    let sum: f32 = logits.iter().sum();
    logits.iter_mut().for_each(|p| *p /= sum);
}

/// Eight sums side by side, which the compiler keeps in vector registers; the order of the additions
/// is the same on every machine.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// The place of the largest value.
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
    fn large_logits_do_not_overflow() {
        assert_eq!(softmax(&[1000.0, 0.0], 1.0), [1.0, 0.0]);
    }

    #[test]
    fn what_is_no_head_is_refused() {
        assert!(matches!(Head::new(3, vec![0.0; 5], vec![0.0; 2], 1.0), Err(HeadError::Shape { .. })));
        assert!(matches!(Head::new(0, vec![], vec![], 1.0), Err(HeadError::Shape { .. })));
        assert_eq!(Head::new(1, vec![f32::NAN], vec![0.0], 1.0), Err(HeadError::TooLarge));
        assert_eq!(Head::new(1, vec![3e38], vec![0.0], 1.0), Err(HeadError::TooLarge));
        assert_eq!(Head::new(1, vec![0.0], vec![0.0], 0.0), Err(HeadError::Temperature(0.0)));
    }

    #[test]
    fn dot_handles_every_length() {
        for n in 0..20 {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let expected: f32 = (0..n).map(|i| (i * i) as f32).sum();
            assert_eq!(dot(&a, &a), expected);
        }
    }
}
