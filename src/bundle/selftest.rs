//! The self-test of a model: a few feature vectors and images with the outputs of the trainer's machine. A device verifies
//! that a new model gives the same outputs before the model becomes active.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use super::tensors::{TensorError, little_endian, matrix, vector};
use crate::vision::decode::{self, DecodeError};
use crate::vision::head::argmax;
use crate::vision::{BackboneError, Classifier, Prediction};

/// Largest difference to the outputs of the trainer's machine: other processors add in another order.
const TOLERANCE: f32 = 2e-3;
/// Most feature vectors of a self-test.
const FEATURES_MAX: usize = 16;
/// Most images of a self-test.
const IMAGES_MAX: usize = 4;
/// Largest image file of a self-test, in bytes.
const IMAGE_BYTES_MAX: usize = 1 << 20;

/// Inputs and expected outputs.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTest {
    /// `[width]` each.
    features: Vec<Vec<f32>>,
    /// JPEG files.
    images: Vec<Vec<u8>>,
    /// The outputs for the features, followed by those for the images.
    expected: Vec<SelfTestOutput>,
}

/// The output of a model for one input, before the threshold for unknown is applied.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTestOutput {
    /// `[classes]`, 0–1, calibrated, summing to 1.
    pub probabilities: Vec<f32>,
    /// Cosine of the angle to the subspace of the classes, 0–1.
    pub similarity: f32,
}

/// A failure of a self-test.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// An output differs from the expected one by more than the tolerance.
    #[error("the self-test's {input}: the result is {got}, expected {expected} as on the trainer's machine")]
    Mismatch {
        /// Kind and index of the input.
        input: String,
        /// Best class, its probability and the similarity on this machine.
        got: String,
        /// Best class, its probability and the similarity on the trainer's machine.
        expected: String,
    },
    /// An image cannot be decoded.
    #[error("the self-test's {input}: {source}")]
    Image {
        /// Kind and index of the input.
        input: String,
        /// The cause.
        source: DecodeError,
    },
    /// The backbone fails.
    #[error(transparent)]
    Backbone(#[from] BackboneError),
}

impl From<Prediction> for SelfTestOutput {
    fn from(prediction: Prediction) -> Self {
        SelfTestOutput { probabilities: prediction.probabilities, similarity: prediction.similarity }
    }
}

impl SelfTestOutput {
    /// Returns whether all values are within the tolerance; false if one is NaN.
    fn is_near(&self, other: &SelfTestOutput) -> bool {
        let near = |a: f32, b: f32| (a - b).abs() <= TOLERANCE;
        self.probabilities.iter().zip(&other.probabilities).all(|(a, b)| near(*a, *b))
            && near(self.similarity, other.similarity)
    }

    fn describe(&self) -> String {
        let best = argmax(&self.probabilities);
        format!("class {best} with {:.4}, similarity {:.4}", self.probabilities[best], self.similarity)
    }
}

impl SelfTest {
    /// Creates a self-test. `features`: `[width]` each; `images`: JPEG files; `expected`: the outputs for the features, followed
    /// by those for the images.
    ///
    /// # Panics
    /// If there are not as many outputs as inputs.
    pub fn new(features: Vec<Vec<f32>>, images: Vec<Vec<u8>>, expected: Vec<SelfTestOutput>) -> Self {
        assert_eq!(expected.len(), features.len() + images.len(), "one output per input");
        SelfTest { features, images, expected }
    }

    /// Creates a self-test from the outputs of `classifier`. Uses the first 16 feature vectors.
    ///
    /// # Errors
    /// If an image cannot be decoded or the backbone fails.
    pub fn record(
        classifier: &mut Classifier,
        mut features: Vec<Vec<f32>>,
        images: Vec<Vec<u8>>,
    ) -> Result<Self, SelfTestError> {
        features.truncate(FEATURES_MAX);
        let mut test = SelfTest { features, images, expected: Vec::new() };
        test.expected = test.run(classifier)?;
        Ok(test)
    }

    /// Returns the feature vectors and the images.
    pub fn into_inputs(self) -> (Vec<Vec<f32>>, Vec<Vec<u8>>) {
        (self.features, self.images)
    }

    /// Runs the self-test and compares the outputs with the expected ones.
    ///
    /// # Errors
    /// If an output differs by more than the tolerance, an image cannot be decoded, or the backbone fails.
    pub fn verify(&self, classifier: &mut Classifier) -> Result<(), SelfTestError> {
        for (i, (got, expected)) in self.run(classifier)?.iter().zip(&self.expected).enumerate() {
            if !got.is_near(expected) {
                return Err(SelfTestError::Mismatch {
                    input: self.input_name(i),
                    got: got.describe(),
                    expected: expected.describe(),
                });
            }
        }
        Ok(())
    }

    fn run(&self, classifier: &mut Classifier) -> Result<Vec<SelfTestOutput>, SelfTestError> {
        let params = classifier.params();
        let mut outputs: Vec<SelfTestOutput> = self.features.iter().map(|row| params.predict(row).into()).collect();
        for bytes in &self.images {
            let input = self.input_name(outputs.len());
            let image = decode::encoded(bytes).map_err(|source| SelfTestError::Image { input, source })?;
            outputs.push(classifier.classify(&image)?.0.clone().into());
        }
        Ok(outputs)
    }

    /// Returns the name of an input for messages.
    fn input_name(&self, i: usize) -> String {
        match i.checked_sub(self.features.len()) {
            None => format!("feature vector {i}"),
            Some(i) => format!("image {i}"),
        }
    }

    /// Writes safetensors: `features` `[n, width]` f32, `image.0` … `[bytes]` u8, `probabilities` `[n + images, classes]` f32,
    /// `similarity` `[n + images]` f32.
    pub fn to_bytes(&self) -> Vec<u8> {
        let width = self.features.first().map_or(0, Vec::len);
        let classes = self.expected.first().map_or(0, |output| output.probabilities.len());
        let probabilities: Vec<f32> = self.expected.iter().flat_map(|output| output.probabilities.clone()).collect();
        let similarity: Vec<f32> = self.expected.iter().map(|output| output.similarity).collect();
        let floats = [
            ("features", vec![self.features.len(), width], little_endian(&self.features.concat())),
            ("probabilities", vec![self.expected.len(), classes], little_endian(&probabilities)),
            ("similarity", vec![self.expected.len()], little_endian(&similarity)),
        ];
        let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes).expect("the shape fits the values");
        let floats = floats
            .iter()
            .map(|(name, shape, bytes)| ((*name).to_owned(), view(Dtype::F32, shape.clone(), bytes.as_slice())));
        let images = self.images.iter().enumerate();
        let images = images.map(|(i, bytes)| (format!("image.{i}"), view(Dtype::U8, vec![bytes.len()], bytes)));
        let tensors: HashMap<String, TensorView<'_>> = floats.chain(images).collect();
        serialize(tensors, None).expect("tensors in memory can be serialized")
    }

    /// Reads a self-test, as [`Self::to_bytes`] writes it, for a head of `classes` × `width`.
    ///
    /// # Errors
    /// If a tensor is missing or has another type or shape, there are too few or too many inputs, an image is too large, or a
    /// value is not finite.
    pub fn from_bytes(bytes: &[u8], classes: usize, width: usize) -> Result<Self, TensorError> {
        let tensors = SafeTensors::deserialize(bytes)?;
        let (columns, features) = matrix(&tensors, "features")?;
        let count = features.len() / columns.max(1);
        let mut images = Vec::new();
        for i in 0..=IMAGES_MAX {
            let Ok(image) = tensors.tensor(&format!("image.{i}")) else { break };
            images.push(image.data().to_vec());
        }
        let (output_columns, probabilities) = matrix(&tensors, "probabilities")?;
        let similarity = vector(&tensors, "similarity")?;
        let outputs = count + images.len();
        let fits = columns == width
            && output_columns == classes
            && (1..=FEATURES_MAX).contains(&count)
            && (1..=IMAGES_MAX).contains(&images.len())
            && tensors.len() == 3 + images.len()
            && images.iter().all(|image| image.len() <= IMAGE_BYTES_MAX)
            && probabilities.len() == outputs * classes
            && similarity.len() == outputs;
        if !fits {
            return Err(TensorError::SelfTest { classes, width });
        }
        if !features.iter().chain(&probabilities).chain(&similarity).all(|value| value.is_finite()) {
            return Err(TensorError::NotFinite);
        }
        let probabilities = probabilities.chunks_exact(classes).map(<[f32]>::to_vec);
        let expected = probabilities
            .zip(similarity)
            .map(|(probabilities, similarity)| SelfTestOutput { probabilities, similarity });
        Ok(SelfTest {
            features: features.chunks_exact(width).map(<[f32]>::to_vec).collect(),
            images,
            expected: expected.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test() -> SelfTest {
        let output = |p| SelfTestOutput { probabilities: vec![p, 1.0 - p], similarity: 0.5 };
        SelfTest::new(vec![vec![0.25; 3], vec![1.0; 3]], vec![b"an image".to_vec()], [0.1, 0.2, 0.3].map(output).into())
    }

    #[test]
    fn reads_what_it_writes() {
        assert_eq!(SelfTest::from_bytes(&test().to_bytes(), 2, 3).unwrap(), test());
    }

    #[test]
    fn rejects_a_self_test_that_does_not_fit_the_head() {
        let error = |change: fn(&mut SelfTest)| {
            let mut test = test();
            change(&mut test);
            SelfTest::from_bytes(&test.to_bytes(), 2, 3).unwrap_err().to_string()
        };
        let shape = "expected 1 to 16 feature vectors of 3 values, 1 to 4 images and an output of 2 classes for each";
        assert_eq!(error(|test| test.images.clear()), shape);
        assert_eq!(error(|test| test.images = vec![vec![0]; 5]), shape);
        assert_eq!(error(|test| test.features = vec![vec![0.0; 4]; 2]), shape);
        assert_eq!(error(|test| drop(test.expected.pop())), shape);
        assert_eq!(error(|test| test.images[0] = vec![0; IMAGE_BYTES_MAX + 1]), shape);
        assert_eq!(error(|test| test.features[1][2] = f32::NAN), "has a value that is not finite");
    }

    #[test]
    fn is_near_requires_finite_values_within_the_tolerance() {
        let output = |p: f32, similarity| SelfTestOutput { probabilities: vec![p, 1.0 - p], similarity };
        assert!(output(0.5, 0.5).is_near(&output(0.501, 0.499)));
        assert!(!output(0.5, 0.5).is_near(&output(0.503, 0.5)));
        assert!(!output(0.5, f32::NAN).is_near(&output(0.5, 0.5)));
    }
}
