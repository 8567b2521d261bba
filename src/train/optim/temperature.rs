//! Temperature scaling: one temperature for all logits, fitted on the validation set so that the confidences match the
//! accuracy (Guo et al., "On Calibration of Modern Neural Networks", 2017).

use crate::vision::head::softmax;

/// Search range of the temperature.
const RANGE: (f64, f64) = (0.05, 20.0);
/// Width of the interval of ln(temperature) at which the search ends.
const TOLERANCE: f64 = 1e-3;

/// Returns the temperature, 0.05–20, that minimizes the mean cross-entropy of `logits` (`[images][classes]`), found by
/// golden-section search over its logarithm to a relative accuracy of 10⁻³.
///
/// # Panics
/// Panics if a class index is not below the number of logits.
pub fn fit(logits: &[Vec<f32>], classes: &[usize]) -> f32 {
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (RANGE.0.ln(), RANGE.1.ln());
    while high - low > TOLERANCE {
        let step = (high - low) * golden;
        let (left, right) = (high - step, low + step);
        if cross_entropy(logits, classes, left.exp() as f32) < cross_entropy(logits, classes, right.exp() as f32) {
            high = right;
        } else {
            low = left;
        }
    }
    f64::midpoint(low, high).exp() as f32
}

/// Returns the mean cross-entropy of `logits / temperature` in nats.
///
/// # Panics
/// Panics if a class index is not below the number of logits.
pub fn cross_entropy(logits: &[Vec<f32>], classes: &[usize], temperature: f32) -> f64 {
    let loss = |(logits, class): (&Vec<f32>, &usize)| {
        -f64::from(softmax(logits, temperature)[*class].clamp(f32::MIN_POSITIVE, 1.0)).ln()
    };
    logits.iter().zip(classes).map(loss).sum::<f64>() / classes.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibrates_an_overconfident_head() {
        // Correct in three of four cases, but with a confidence of 99.3 %.
        let logits: Vec<Vec<f32>> = (0..100).map(|_| vec![5.0, 0.0]).collect();
        let classes: Vec<usize> = (0..100).map(|i| usize::from(i % 4 == 0)).collect();
        let t = fit(&logits, &classes);
        let p = softmax(&logits[0], t)[0];
        assert!((p - 0.75).abs() < 1e-3, "{p}");
        assert!(cross_entropy(&logits, &classes, t) < cross_entropy(&logits, &classes, 1.0));
    }
}
