//! Out-of-distribution detection: an image is `unknown` if its similarity to the training images is too small, whatever
//! probability the softmax gives its best class.
//!
//! The similarity is the cosine of the angle between the feature vector and the subspace that the training images of the classes
//! span. If the model has learned classes of other images, it is reduced by the weighted logarithm of the odds that the image belongs
//! to one of them: `cosine − weight · ln(P(other) / P(known))`.

use super::Head;
use super::head::{dot, log_sum_exp};

/// A subspace of the feature space, and the smallest similarity to it of a known image.
#[derive(Debug, Clone, PartialEq)]
pub struct OodDetector {
    width: usize,
    /// `[rank, width]`, orthonormal rows.
    basis: Vec<f32>,
    /// Similarity below which an image is unknown.
    threshold: f32,
    unknown: Option<UnknownClasses>,
}

/// Classes of images that are none of the model's, learned from examples. They are never published but as `unknown`.
#[derive(Debug, Clone, PartialEq)]
pub struct UnknownClasses {
    /// Their linear layer, beside that of the model's classes. Its temperature is not used.
    pub head: Head,
    /// Weight of the logarithm of the odds, above 0.
    pub log_odds_weight: f32,
    /// Threshold for the cosine alone, 0–1: [`OodDetector::without_unknown_classes`].
    pub cosine_threshold: f32,
}

/// An error of the parameters of an [`OodDetector`].
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum OodError {
    /// The basis is not `[rank, width]` with a rank of 1 to `width`; its number of values and the width.
    #[error("the subspace has {0} values, expected a multiple of {1}, at most {1} rows")]
    Shape(usize, usize),
    /// The squared length of a row of the basis differs from 1 by 1e-3 or more.
    #[error("a basis vector of the subspace is not of length 1")]
    NotNormalized,
    /// The threshold is not in 0–1, or, with unknown classes, not in −100–100; its value.
    #[error("unknown threshold {0}, expected 0 to 1, or -100 to 100 with unknown classes")]
    Threshold(f32),
    /// The unknown classes have another width, or the weight of their log-odds is not above 0 and at most 1.
    #[error(
        "the unknown classes have {0} features and a log-odds weight of {1}, expected {2} features and a weight of 0 to 1"
    )]
    UnknownClasses(usize, f32, usize),
}

impl OodDetector {
    /// Creates a detector. `basis`: `[rank, width]`, orthonormal rows; `threshold`: 0–1.
    ///
    /// # Errors
    /// If the basis is empty, has another width or more than `width` rows, a row is not of length 1 (within 1e-3), or
    /// the threshold is out of range.
    pub fn new(width: usize, basis: Vec<f32>, threshold: f32) -> Result<Self, OodError> {
        if width == 0 || basis.is_empty() || !basis.len().is_multiple_of(width) || basis.len() / width > width {
            return Err(OodError::Shape(basis.len(), width));
        }
        let has_unit_length = |row: &[f32]| (dot(row, row) - 1.0).abs() < 1e-3;
        if !basis.chunks_exact(width).all(has_unit_length) {
            return Err(OodError::NotNormalized);
        }
        if !(0.0..=1.0).contains(&threshold) {
            return Err(OodError::Threshold(threshold));
        }
        Ok(OodDetector { width, basis, threshold, unknown: None })
    }

    /// Returns the same subspace with the unknown classes and another threshold.
    ///
    /// # Errors
    /// If the unknown classes have another width, or their weight or the threshold is out of range.
    pub fn with_unknown_classes(self, unknown: UnknownClasses, threshold: f32) -> Result<Self, OodError> {
        let (width, weight) = (unknown.head.width(), unknown.log_odds_weight);
        if !(0.0..=1.0).contains(&unknown.cosine_threshold) {
            return Err(OodError::Threshold(unknown.cosine_threshold));
        }
        if width != self.width || !(weight > 0.0 && weight <= 1.0) {
            return Err(OodError::UnknownClasses(width, weight, self.width));
        }
        OodDetector { unknown: Some(unknown), ..self }.with_threshold(threshold)
    }

    /// Returns the same detector with other unknown classes, if it has any.
    ///
    /// # Panics
    /// If they have another width.
    pub fn with_unknown_head(&self, head: Head) -> Self {
        assert_eq!(head.width(), self.width, "width of the unknown classes");
        let unknown = self.unknown.as_ref().map(|unknown| UnknownClasses { head, ..unknown.clone() });
        OodDetector { unknown, ..self.clone() }
    }

    /// Returns the detector of the cosine alone, which programs that do not know unknown classes have.
    pub fn without_unknown_classes(&self) -> Self {
        let threshold = self.unknown.as_ref().map_or(self.threshold, |unknown| unknown.cosine_threshold);
        OodDetector { threshold, unknown: None, ..self.clone() }
    }

    /// Returns the same detector with another threshold.
    ///
    /// # Errors
    /// If the threshold is not in 0–1, or, with unknown classes, not in −100–100.
    pub fn with_threshold(self, threshold: f32) -> Result<Self, OodError> {
        let range = if self.unknown.is_some() { -100.0..=100.0 } else { 0.0..=1.0 };
        if !range.contains(&threshold) {
            return Err(OodError::Threshold(threshold));
        }
        Ok(OodDetector { threshold, ..self })
    }

    /// Returns the length of a feature vector.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the basis, `[rank, width]`, orthonormal rows.
    pub fn basis(&self) -> &[f32] {
        &self.basis
    }

    /// Returns the learned classes of other images, if the model has any.
    pub fn unknown_classes(&self) -> Option<&UnknownClasses> {
        self.unknown.as_ref()
    }

    /// Returns the similarity below which an image is unknown.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Returns the similarity to the training images: the cosine, reduced by the log-odds of the unknown classes; NaN if a feature
    /// is NaN. in: features `[width]`, logits of the model's classes `[classes]`.
    pub fn similarity(&self, features: &[f32], logits: &[f32]) -> f32 {
        let log_odds = |unknown: &UnknownClasses| {
            let (weight, bias) = (unknown.head.weight().chunks_exact(self.width), unknown.head.bias());
            let unknown_logits = weight.zip(bias).map(|(row, bias)| dot(row, features) + bias);
            unknown.log_odds_weight * (log_sum_exp(unknown_logits) - log_sum_exp(logits.iter().copied()))
        };
        self.cosine(features) - self.unknown.as_ref().map_or(0.0, log_odds)
    }

    /// Returns the cosine of the angle to the subspace, 0–1; NaN if a feature is NaN. in: `[width]`.
    pub fn cosine(&self, features: &[f32]) -> f32 {
        let squared_norm = dot(features, features);
        if squared_norm == 0.0 {
            return 0.0;
        }
        let squared_projection: f32 = self.basis.chunks_exact(self.width).map(|row| dot(row, features).powi(2)).sum();
        // NaN passes through `clamp`, and `is_known` is false for it.
        (squared_projection / squared_norm).sqrt().clamp(0.0, 1.0)
    }

    /// Returns whether an image of this similarity is in the distribution of the classes; false for NaN.
    pub fn is_known(&self, similarity: f32) -> bool {
        similarity >= self.threshold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_depends_on_the_angle_and_not_on_the_length() {
        let plane = OodDetector::new(3, vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0], 0.9).unwrap();
        assert!((plane.cosine(&[3.0, 4.0, 0.0]) - 1.0).abs() < 1e-6);
        let at_45_degrees = plane.similarity(&[30.0, 40.0, 50.0], &[7.0]);
        assert!((at_45_degrees - 0.5f32.sqrt()).abs() < 1e-6, "{at_45_degrees}");
        assert!(!plane.is_known(at_45_degrees) && plane.is_known(0.9));
        assert_eq!(plane.cosine(&[0.0; 3]), 0.0);
        assert!(!plane.is_known(plane.cosine(&[f32::NAN, 1.0, 0.0])));
    }

    #[test]
    fn unknown_classes_reduce_the_similarity_by_their_log_odds() {
        let plane = OodDetector::new(2, vec![1.0, 0.0], 0.5).unwrap();
        // Logits 2·y and y of the feature vector (x, y).
        let head = Head::new(2, vec![0.0, 2.0, 0.0, 1.0], vec![0.0; 2], 1.0).unwrap();
        let unknown = UnknownClasses { head: head.clone(), log_odds_weight: 0.1, cosine_threshold: 0.5 };
        let detector = plane.clone().with_unknown_classes(unknown, -0.25).unwrap();
        let features = [3.0f32, 4.0];
        let log_odds = (8.0f32.exp() + 4.0f32.exp()).ln() - (1.0f32.exp() + 2.0f32.exp()).ln();
        let similarity = detector.similarity(&features, &[1.0, 2.0]);
        assert!((similarity - (0.6 - 0.1 * log_odds)).abs() < 1e-5, "{similarity}");
        assert!(detector.is_known(-0.25) && !detector.is_known(-0.26));
        for log_odds_weight in [0.0, 1.5, f32::NAN] {
            let unknown = UnknownClasses { head: head.clone(), log_odds_weight, cosine_threshold: 0.5 };
            assert!(matches!(plane.clone().with_unknown_classes(unknown, 0.0), Err(OodError::UnknownClasses(..))));
        }
        let narrow = Head::new(1, vec![0.0; 2], vec![0.0; 2], 1.0).unwrap();
        assert_eq!(detector.without_unknown_classes(), plane);
        let unknown = UnknownClasses { head: head.clone(), log_odds_weight: 0.1, cosine_threshold: 1.5 };
        assert_eq!(plane.clone().with_unknown_classes(unknown, 0.0), Err(OodError::Threshold(1.5)));
        let unknown = UnknownClasses { head: narrow, log_odds_weight: 0.1, cosine_threshold: 0.5 };
        assert_eq!(plane.with_unknown_classes(unknown, 0.0), Err(OodError::UnknownClasses(1, 0.1, 2)));
    }

    #[test]
    fn rejects_an_invalid_basis_or_threshold() {
        assert_eq!(OodDetector::new(2, vec![1.0; 3], 0.0), Err(OodError::Shape(3, 2)));
        assert_eq!(OodDetector::new(1, vec![1.0; 2], 0.0), Err(OodError::Shape(2, 1)));
        assert_eq!(OodDetector::new(2, vec![1.0; 2], 0.0), Err(OodError::NotNormalized));
        assert_eq!(OodDetector::new(1, vec![f32::NAN], 0.0), Err(OodError::NotNormalized));
        assert!(OodDetector::new(1, vec![1.0], f32::NAN).is_err());
    }
}
