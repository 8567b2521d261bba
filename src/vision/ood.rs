//! Telling flowers from other things: a picture whose features point out of the subspace that the
//! training photographs span is `unknown`, however sure the softmax is of its best class.
//!
//! The measure is the cosine of the angle between the feature vector and the subspace.

use super::head::dot;

/// The directions in which the classes' features point, and how near to them a picture must come.
#[derive(Debug, Clone, PartialEq)]
pub struct OodDetector {
    width: usize,
    /// `[rank, width]`, a direction a row, orthonormal.
    basis: Vec<f32>,
    /// Similarity below which a picture is unknown.
    threshold: f32,
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub enum OodError {
    #[error("{0} numbers in the subspace, expected a multiple of {1}, at most {1} rows")]
    Shape(usize, usize),
    #[error("a direction of the subspace is not of length 1")]
    Length,
    #[error("unknown threshold {0}, expected 0 to 1")]
    Threshold(f32),
}

impl OodDetector {
    /// `basis`: `[rank, width]`, a direction a row, orthonormal.
    pub fn new(width: usize, basis: Vec<f32>, threshold: f32) -> Result<Self, OodError> {
        if width == 0 || basis.is_empty() || !basis.len().is_multiple_of(width) || basis.len() / width > width {
            return Err(OodError::Shape(basis.len(), width));
        }
        let unit = |row: &[f32]| (dot(row, row) - 1.0).abs() < 1e-3;
        if !basis.chunks_exact(width).all(unit) {
            return Err(OodError::Length);
        }
        if !(0.0..=1.0).contains(&threshold) {
            return Err(OodError::Threshold(threshold));
        }
        Ok(OodDetector { width, basis, threshold })
    }

    /// The same directions with another threshold.
    pub fn with_threshold(self, threshold: f32) -> Result<Self, OodError> {
        Self::new(self.width, self.basis, threshold)
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// `[rank, width]`, a direction a row.
    pub fn basis(&self) -> &[f32] {
        &self.basis
    }

    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Cosine of the angle to the subspace, 0–1. in: `[width]`.
    pub fn similarity(&self, features: &[f32]) -> f32 {
        let length = dot(features, features);
        if length == 0.0 {
            return 0.0;
        }
        let shadow: f32 = self.basis.chunks_exact(self.width).map(|row| dot(row, features).powi(2)).sum();
        // A number that is none stays none, and is known to nobody.
        (shadow / length).sqrt().clamp(0.0, 1.0)
    }

    /// True where a picture of this similarity may be one of the classes.
    pub fn is_known(&self, similarity: f32) -> bool {
        similarity >= self.threshold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_angle_counts_and_length_does_not() {
        let plane = OodDetector::new(3, vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0], 0.9).unwrap();
        assert!((plane.similarity(&[3.0, 4.0, 0.0]) - 1.0).abs() < 1e-6);
        let steep = plane.similarity(&[30.0, 40.0, 50.0]);
        assert!((steep - 0.5f32.sqrt()).abs() < 1e-6, "{steep}");
        assert!(!plane.is_known(steep) && plane.is_known(0.9));
        assert_eq!(plane.similarity(&[0.0; 3]), 0.0);
        assert!(!plane.is_known(plane.similarity(&[f32::NAN, 1.0, 0.0])));
    }

    #[test]
    fn what_is_no_subspace_is_refused() {
        assert_eq!(OodDetector::new(2, vec![1.0; 3], 0.0), Err(OodError::Shape(3, 2)));
        assert_eq!(OodDetector::new(1, vec![1.0; 2], 0.0), Err(OodError::Shape(2, 1)));
        assert_eq!(OodDetector::new(2, vec![1.0; 2], 0.0), Err(OodError::Length));
        assert_eq!(OodDetector::new(1, vec![f32::NAN], 0.0), Err(OodError::Length));
        assert!(OodDetector::new(1, vec![1.0], f32::NAN).is_err());
    }
}
