//! What a model must answer wherever it runs: a few feature vectors and pictures, with what the trainer's machine made
//! of them. A device lets a new model answer them before it lets it decide.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use super::tensors::{TensorError, little_endian, matrix, vector};
use crate::vision::classifier::ClassifierParams;
use crate::vision::{BackboneError, Classifier, Prediction, decode};

/// How far an answer may be from the trainer's: another processor adds in another order.
const TOLERANCE: f32 = 2e-3;
/// More is no self-test.
const FEATURES_MAX: usize = 16;
const IMAGES_MAX: usize = 4;
const IMAGE_BYTES_MAX: usize = 1 << 20;

/// Inputs and answers. The answers to the features come first.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTest {
    /// `[width]` each.
    features: Vec<Vec<f32>>,
    /// Whole JPEG files.
    images: Vec<Vec<u8>>,
    answers: Vec<Answer>,
}

/// What a model says, before anything is taken for unknown.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// `[classes]`
    pub probabilities: Vec<f32>,
    pub similarity: f32,
}

#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    #[error("the self-test's {input}: it gives {got}, the trainer's machine gave {expected}")]
    Wrong { input: String, got: String, expected: String },
    #[error("the self-test's {input}: {reason}")]
    Image { input: String, reason: String },
    #[error(transparent)]
    Backbone(#[from] BackboneError),
}

impl From<Prediction> for Answer {
    fn from(prediction: Prediction) -> Self {
        Answer { probabilities: prediction.probabilities, similarity: prediction.similarity }
    }
}

impl Answer {
    fn is_near(&self, other: &Answer) -> bool {
        // Written so that what is no number is not near.
        let near = |a: f32, b: f32| (a - b).abs() <= TOLERANCE;
        self.probabilities.iter().zip(&other.probabilities).all(|(a, b)| near(*a, *b))
            && near(self.similarity, other.similarity)
    }

    fn shown(&self) -> String {
        let best = crate::vision::head::argmax(&self.probabilities);
        format!("class {best} with {:.4}, similarity {:.4}", self.probabilities[best], self.similarity)
    }
}

impl SelfTest {
    /// # Panics
    /// Where there are not as many answers as inputs.
    pub fn new(features: Vec<Vec<f32>>, images: Vec<Vec<u8>>, answers: Vec<Answer>) -> Self {
        assert_eq!(answers.len(), features.len() + images.len(), "an answer an input");
        SelfTest { features, images, answers }
    }

    /// Lets a model answer for the first time. Of the features, as many as a self-test may hold.
    pub fn ask(
        classifier: &mut Classifier,
        mut features: Vec<Vec<f32>>,
        images: Vec<Vec<u8>>,
    ) -> Result<Self, SelfTestError> {
        features.truncate(FEATURES_MAX);
        let mut test = SelfTest { features, images, answers: Vec::new() };
        test.answers = test.answered_by(classifier)?;
        Ok(test)
    }

    /// Features and pictures, to ask another model.
    pub fn into_inputs(self) -> (Vec<Vec<f32>>, Vec<Vec<u8>>) {
        (self.features, self.images)
    }

    /// Lets a model answer, and compares.
    pub fn check(&self, classifier: &mut Classifier) -> Result<(), SelfTestError> {
        for (i, (got, expected)) in self.answered_by(classifier)?.iter().zip(&self.answers).enumerate() {
            if !got.is_near(expected) {
                return Err(SelfTestError::Wrong {
                    input: self.input(i),
                    got: got.shown(),
                    expected: expected.shown(),
                });
            }
        }
        Ok(())
    }

    fn answered_by(&self, classifier: &mut Classifier) -> Result<Vec<Answer>, SelfTestError> {
        let params: &ClassifierParams = classifier.classifier_params();
        let mut answers: Vec<Answer> = self.features.iter().map(|row| params.predict(row).into()).collect();
        for bytes in &self.images {
            let input = self.input(answers.len());
            let image = decode::encoded(bytes).map_err(|e| SelfTestError::Image { input, reason: e.to_string() })?;
            answers.push(classifier.classify(&image)?.0.clone().into());
        }
        Ok(answers)
    }

    /// The name of the `i`th input.
    fn input(&self, i: usize) -> String {
        match i.checked_sub(self.features.len()) {
            None => format!("feature vector {i}"),
            Some(i) => format!("picture {i}"),
        }
    }

    /// `features` `[n, width]`, `image.0` … `[bytes]`, `probabilities` `[n + images, classes]`, `similarity`
    /// `[n + images]`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let width = self.features.first().map_or(0, Vec::len);
        let classes = self.answers.first().map_or(0, |answer| answer.probabilities.len());
        let probabilities: Vec<f32> = self.answers.iter().flat_map(|answer| answer.probabilities.clone()).collect();
        let similarity: Vec<f32> = self.answers.iter().map(|answer| answer.similarity).collect();
        let floats = [
            ("features", vec![self.features.len(), width], little_endian(&self.features.concat())),
            ("probabilities", vec![self.answers.len(), classes], little_endian(&probabilities)),
            ("similarity", vec![self.answers.len()], little_endian(&similarity)),
        ];
        let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes).expect("the shape is the content's");
        let floats = floats
            .iter()
            .map(|(name, shape, bytes)| ((*name).to_owned(), view(Dtype::F32, shape.clone(), bytes.as_slice())));
        let images = self.images.iter().enumerate();
        let images = images.map(|(i, bytes)| (format!("image.{i}"), view(Dtype::U8, vec![bytes.len()], bytes)));
        let tensors: HashMap<String, TensorView<'_>> = floats.chain(images).collect();
        serialize(tensors, None).expect("small tensors can be written")
    }

    /// Refuses what does not fit a head of `classes` × `width`.
    pub fn from_bytes(bytes: &[u8], classes: usize, width: usize) -> Result<Self, TensorError> {
        let tensors = SafeTensors::deserialize(bytes)?;
        let (columns, features) = matrix(&tensors, "features")?;
        let count = features.len() / columns.max(1);
        let mut images = Vec::new();
        for i in 0..=IMAGES_MAX {
            let Ok(image) = tensors.tensor(&format!("image.{i}")) else { break };
            images.push(image.data().to_vec());
        }
        let (answer_columns, probabilities) = matrix(&tensors, "probabilities")?;
        let similarity = vector(&tensors, "similarity")?;
        let answers = count + images.len();
        let fits = columns == width
            && answer_columns == classes
            && (1..=FEATURES_MAX).contains(&count)
            && (1..=IMAGES_MAX).contains(&images.len())
            && tensors.len() == 3 + images.len()
            && images.iter().all(|image| image.len() <= IMAGE_BYTES_MAX)
            && probabilities.len() == answers * classes
            && similarity.len() == answers;
        if !fits {
            return Err(TensorError::SelfTest { classes, width });
        }
        if !features.iter().chain(&probabilities).chain(&similarity).all(|number| number.is_finite()) {
            return Err(TensorError::NotFinite);
        }
        let probabilities = probabilities.chunks_exact(classes).map(<[f32]>::to_vec);
        let answers =
            probabilities.zip(similarity).map(|(probabilities, similarity)| Answer { probabilities, similarity });
        Ok(SelfTest {
            features: features.chunks_exact(width).map(<[f32]>::to_vec).collect(),
            images,
            answers: answers.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test() -> SelfTest {
        let answer = |p| Answer { probabilities: vec![p, 1.0 - p], similarity: 0.5 };
        SelfTest::new(
            vec![vec![0.25; 3], vec![1.0; 3]],
            vec![b"a picture".to_vec()],
            [0.1, 0.2, 0.3].map(answer).into(),
        )
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(SelfTest::from_bytes(&test().to_bytes(), 2, 3).unwrap(), test());
    }

    #[test]
    fn what_does_not_fit_the_head_is_refused() {
        let refused = |change: fn(&mut SelfTest)| {
            let mut test = test();
            change(&mut test);
            SelfTest::from_bytes(&test.to_bytes(), 2, 3).unwrap_err().to_string()
        };
        let shape = "expected 1 to 16 vectors of 3 features, 1 to 4 pictures and an answer of 2 classes each";
        assert_eq!(refused(|test| test.images.clear()), shape);
        assert_eq!(refused(|test| test.images = vec![vec![0]; 5]), shape);
        assert_eq!(refused(|test| test.features = vec![vec![0.0; 4]; 2]), shape);
        assert_eq!(refused(|test| drop(test.answers.pop())), shape);
        assert_eq!(refused(|test| test.images[0] = vec![0; IMAGE_BYTES_MAX + 1]), shape);
        assert_eq!(refused(|test| test.features[1][2] = f32::NAN), "holds a number that is not finite");
    }

    #[test]
    fn near_is_within_the_tolerance_and_a_number() {
        let answer = |p: f32, similarity| Answer { probabilities: vec![p, 1.0 - p], similarity };
        assert!(answer(0.5, 0.5).is_near(&answer(0.501, 0.499)));
        assert!(!answer(0.5, 0.5).is_near(&answer(0.503, 0.5)));
        assert!(!answer(0.5, f32::NAN).is_near(&answer(0.5, 0.5)));
    }
}
