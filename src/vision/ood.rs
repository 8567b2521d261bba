//! Out-of-distribution detection: an image is `unknown` if its features point out of the subspace that the training
//! images span, whatever probability the softmax gives its best class.
//!
//! The measure is the cosine of the angle between the feature vector and the subspace.

use super::head::dot;

/// A subspace of the feature space, and the smallest similarity to it of a known image.
#[derive(Debug, Clone, PartialEq)]
pub struct OodDetector {
    width: usize,
    /// `[rank, width]`, orthonormal rows.
    basis: Vec<f32>,
    /// Similarity below which an image is unknown.
    threshold: f32,
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
    /// The threshold is not in 0–1; its value.
    #[error("unknown threshold {0}, expected 0 to 1")]
    Threshold(f32),
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
        Ok(OodDetector { width, basis, threshold })
    }

    /// Returns the same subspace with another threshold.
    ///
    /// # Errors
    /// If the threshold is not in 0–1.
    pub fn with_threshold(self, threshold: f32) -> Result<Self, OodError> {
        Self::new(self.width, self.basis, threshold)
    }

    /// Returns the length of a feature vector.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the basis, `[rank, width]`, orthonormal rows.
    pub fn basis(&self) -> &[f32] {
        &self.basis
    }

    /// Returns the similarity below which an image is unknown, 0–1.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Returns the cosine of the angle to the subspace, 0–1; NaN if a feature is NaN. in: `[width]`.
    pub fn similarity(&self, features: &[f32]) -> f32 {
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
    fn similarity_depends_on_the_angle_and_not_on_the_length() {
        let plane = OodDetector::new(3, vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0], 0.9).unwrap();
        assert!((plane.similarity(&[3.0, 4.0, 0.0]) - 1.0).abs() < 1e-6);
        let at_45_degrees = plane.similarity(&[30.0, 40.0, 50.0]);
        assert!((at_45_degrees - 0.5f32.sqrt()).abs() < 1e-6, "{at_45_degrees}");
        assert!(!plane.is_known(at_45_degrees) && plane.is_known(0.9));
        assert_eq!(plane.similarity(&[0.0; 3]), 0.0);
        assert!(!plane.is_known(plane.similarity(&[f32::NAN, 1.0, 0.0])));
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
