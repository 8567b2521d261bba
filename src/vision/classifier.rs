//! A whole picture in, a named flower out.

use std::time::{Duration, Instant};

use image::{RgbImage, imageops};

use super::backbone::Session;
use super::head::argmax;
use super::kernels::Part;
use super::{Backbone, BackboneError, FrameDiff, Head, Labels, OodDetector, Preprocess, Preprocessor};

/// What one picture was taken for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prediction {
    /// `[classes]`, 0–1, calibrated, summing to 1; in the order of the labels.
    pub probabilities: Vec<f32>,
    /// Cosine of the angle to the subspace of the classes, 0–1.
    pub similarity: f32,
    /// False where the features are like no class's.
    pub known: bool,
}

impl Prediction {
    /// The best class; none where the picture is unknown.
    pub fn class(&self) -> Option<usize> {
        self.known.then(|| argmax(&self.probabilities))
    }

    /// How sure [`Self::class`] is, 0–1; an unknown picture counts nothing for any class.
    pub fn confidence(&self) -> f32 {
        match self.class() {
            Some(class) => self.probabilities[class],
            None => 1.0,
        }
    }
}

/// How long each stage of a frame took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stages {
    pub decode: Duration,
    pub preprocess: Duration,
    pub backbone: Duration,
    pub head: Duration,
    /// Processor time of the backbone, of all threads: what it worked rather than waited for another program.
    pub work: Duration,
}

impl Stages {
    pub fn frame(&self) -> Duration {
        self.decode + self.preprocess + self.backbone + self.head
    }
}

/// The part of a classifier that a new model replaces.
#[derive(Debug, Clone)]
pub struct ClassifierParams {
    pub labels: Labels,
    pub head: Head,
    pub ood: OodDetector,
    pub preprocess: Preprocess,
}

/// A backbone and the params that was trained on it.
pub struct Classifier {
    session: Session,
    preprocessor: Preprocessor,
    params: ClassifierParams,
    input: Vec<f32>,
    prediction: Prediction,
}

impl Classifier {
    /// # Panics
    /// Where the params is not as wide as the backbone; [`crate::bundle::Bundle::classifier`] makes sure of it.
    pub fn new(backbone: &Backbone, params: ClassifierParams) -> Result<Self, BackboneError> {
        assert_eq!(params.head.width(), backbone.width(), "a head as wide as its backbone");
        assert_eq!(params.ood.width(), backbone.width(), "a subspace as wide as its backbone");
        Ok(Classifier {
            session: backbone.session()?,
            input: vec![0.0; params.preprocess.input_len()],
            preprocessor: Preprocessor::new(params.preprocess.clone()),
            params,
            prediction: Prediction::default(),
        })
    }

    pub fn labels(&self) -> &Labels {
        &self.params.labels
    }

    pub fn classifier_params(&self) -> &ClassifierParams {
        &self.params
    }

    /// What a picture and its mirrored self are taken for, the mean of both. in: H×W×3 u8 RGB, any size.
    pub fn classify_with_mirror(&mut self, image: &RgbImage) -> Result<Prediction, BackboneError> {
        let mut features = |image: &RgbImage| {
            self.preprocessor.run(image, &mut self.input);
            Ok::<_, BackboneError>(self.session.features(&self.input)?.to_vec())
        };
        let views = [features(image)?, features(&imageops::flip_horizontal(image))?];
        Ok(self.params.predict_views(views.iter()))
    }

    /// in: H×W×3 u8 RGB, any size. The decoding is not this function's, and its time stays zero.
    pub fn classify(&mut self, image: &RgbImage) -> Result<(&Prediction, Stages), BackboneError> {
        let started = Instant::now();
        self.preprocessor.resize(image);
        self.judge_resized(started)
    }

    /// The same, but that a picture which is the last one still is taken for the same without another look: it has no stages. [`Classifier::last`] tells for what.
    pub fn classify_if_changed(
        &mut self,
        image: &RgbImage,
        frame_diff: &mut FrameDiff,
    ) -> Result<Option<Stages>, BackboneError> {
        let started = Instant::now();
        if frame_diff.is_unchanged(self.preprocessor.resize(image)) {
            return Ok(None);
        }
        self.judge_resized(started).map(|(_, stages)| Some(stages))
    }

    fn judge_resized(&mut self, started: Instant) -> Result<(&Prediction, Stages), BackboneError> {
        self.preprocessor.normalise(&mut self.input);
        let preprocessed = Instant::now();
        let features = self.session.features(&self.input)?;
        let extracted = Instant::now();
        self.params.predict_into(features, &mut self.prediction);
        let work = self.session.worked();
        let stages = Stages {
            decode: Duration::ZERO,
            preprocess: preprocessed - started,
            backbone: extracted - preprocessed,
            head: extracted.elapsed(),
            work,
        };
        Ok((&self.prediction, stages))
    }

    /// What the last picture was taken for.
    pub fn last(&self) -> &Prediction {
        &self.prediction
    }

    /// How long the backbone takes for the last picture once more, with nothing between two runs of it.
    pub fn backbone_alone(&mut self) -> Result<Duration, BackboneError> {
        let began = Instant::now();
        self.session.features(&self.input)?;
        Ok(began.elapsed())
    }

    /// The stages of the backbone's last run, where kernels of ours compute all of it.
    pub fn parts(&self) -> Vec<Part> {
        self.session.parts()
    }
}

impl ClassifierParams {
    /// in: `[width]`, one picture's features.
    pub fn predict(&self, features: &[f32]) -> Prediction {
        let mut prediction = Prediction::default();
        self.predict_into(features, &mut prediction);
        prediction
    }

    /// The same, in the place of another prediction.
    fn predict_into(&self, features: &[f32], prediction: &mut Prediction) {
        self.head.probabilities(features, &mut prediction.probabilities);
        prediction.similarity = self.ood.similarity(features);
        prediction.known = self.ood.is_known(prediction.similarity);
    }

    /// The mean of what several views of one picture are taken for. in: at least one, `[width]`.
    pub fn predict_views(&self, views: impl Iterator<Item = impl AsRef<[f32]>>) -> Prediction {
        let (mut count, mut similarity) = (0.0, 0.0);
        let mut probabilities = vec![0.0; self.labels.names().len()];
        for features in views {
            let of_view = self.predict(features.as_ref());
            count += 1.0;
            similarity += of_view.similarity;
            probabilities.iter_mut().zip(of_view.probabilities).for_each(|(sum, p)| *sum += p);
        }
        probabilities.iter_mut().for_each(|p| *p /= count);
        similarity /= count;
        Prediction { probabilities, similarity, known: self.ood.is_known(similarity) }
    }
}
