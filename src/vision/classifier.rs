//! Classification of whole images: from RGB pixels to a [`Prediction`].

use std::ops::AddAssign;
use std::time::{Duration, Instant};

use bloomcast_kernels::LayerProfile;
use image::{RgbImage, imageops};

use super::backbone::Session;
use super::head::{argmax, softmax_in_place};
use super::quality::QualityMeter;
use super::scan::{Detection, ScanBudget, ScanParams, Scanner, View};
use super::{BackboneError, CompiledBackbone, FrameDiff, Head, Labels, OodDetector, Preprocess, Preprocessor, Quality};

/// The classification of one image.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prediction {
    /// `[classes]`, 0–1, calibrated, summing to 1; in the order of the labels.
    pub probabilities: Vec<f32>,
    /// Similarity to the training images: [`OodDetector::similarity`].
    pub similarity: f32,
    /// False if the image is out of the distribution of the classes.
    pub known: bool,
    /// Where classes were found in a scanned image, the most similar to the training images first; empty if it was judged as a whole.
    pub found: Vec<Detection>,
}

impl Prediction {
    /// Returns the index of the best class; `None` if the image is unknown.
    pub fn class(&self) -> Option<usize> {
        self.known.then(|| argmax(&self.probabilities))
    }

    /// Returns the probability of [`Self::class`], 0–1; 1 if the image is unknown.
    pub fn confidence(&self) -> f32 {
        match self.class() {
            Some(class) => self.probabilities[class],
            None => 1.0,
        }
    }
}

/// The time that each stage took for a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Wall-clock time of decoding; zero if the caller decodes and does not set it.
    pub decode: Duration,
    /// Wall-clock time of preprocessing.
    pub preprocess: Duration,
    /// Wall-clock time of the backbone.
    pub backbone: Duration,
    /// Wall-clock time of the head and of out-of-distribution detection.
    pub head: Duration,
    /// Processor time of the backbone for one image of its own input size, summed over its threads; unlike [`Self::backbone`] it
    /// does not depend on the load of the machine, and neither on the sizes at which a frame was scanned.
    pub cpu_time: Duration,
}

impl StageTimes {
    /// Returns the wall-clock time of the whole frame.
    pub fn frame(&self) -> Duration {
        self.decode + self.preprocess + self.backbone + self.head
    }
}

impl AddAssign for StageTimes {
    fn add_assign(&mut self, other: Self) {
        self.decode += other.decode;
        self.preprocess += other.preprocess;
        self.backbone += other.backbone;
        self.head += other.head;
        self.cpu_time += other.cpu_time;
    }
}

/// Finds the frames that are not classified.
#[derive(Debug)]
pub struct FrameFilter {
    /// Finds frames that equal the one before.
    pub diff: FrameDiff,
    /// Finds frames that cannot be judged.
    pub quality: QualityMeter,
}

/// The result of [`Classifier::classify_frame`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameResult {
    /// The frame was classified: [`Classifier::last_prediction`].
    Classified(StageTimes),
    /// The frame equals the one before, whose prediction is still [`Classifier::last_prediction`].
    Unchanged,
    /// The frame cannot be judged, for this reason, which is not [`Quality::Ok`].
    Unfit(Quality),
}

/// The parameters of a classifier without its backbone.
#[derive(Debug, Clone)]
pub struct ClassifierParams {
    /// Names of the classes, in the order of the head's outputs.
    pub labels: Labels,
    /// The classification head.
    pub head: Head,
    /// The out-of-distribution detector.
    pub ood: OodDetector,
    /// Preprocessing that the head was trained with.
    pub preprocess: Preprocess,
}

/// A backbone with the parameters that were trained on it.
///
/// ```
/// use bloomcast::bundle::Bundle;
/// use bloomcast::vision::{decode, test_pattern};
///
/// let mut classifier = Bundle::built_in()?.classifier(None)?;
/// let image = decode::encoded(&test_pattern::jpeg(640, 480))?;
/// let (prediction, times) = classifier.classify(&image)?;
/// assert_eq!(prediction.probabilities.len(), 5);
/// assert!((prediction.probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-5);
/// assert!(times.backbone > times.head);
/// println!("{}", classifier.labels().name(classifier.last_prediction().class()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Classifier {
    session: Session,
    preprocessor: Preprocessor,
    params: ClassifierParams,
    input: Vec<f32>,
    prediction: Prediction,
    scanner: Option<Scanner>,
}

impl Classifier {
    /// Creates a classifier and allocates its buffers.
    ///
    /// # Errors
    /// If the backbone cannot start a session.
    ///
    /// # Panics
    /// If the head or the subspace has another width than the features of the backbone.
    pub fn new(backbone: &CompiledBackbone, params: ClassifierParams) -> Result<Self, BackboneError> {
        assert_eq!(params.head.width(), backbone.width(), "width of the head and of the backbone's features");
        assert_eq!(params.ood.width(), backbone.width(), "width of the subspace and of the backbone's features");
        Ok(Classifier {
            session: backbone.session()?,
            input: vec![0.0; params.preprocess.input_len()],
            preprocessor: Preprocessor::new(params.preprocess.clone()),
            params,
            prediction: Prediction::default(),
            scanner: None,
        })
    }

    /// Returns the classifier with a scanner: images that show more detail than the network's input are scanned.
    ///
    /// # Errors
    /// If the backbone cannot scan.
    pub fn with_scanner(
        self,
        backbone: &CompiledBackbone,
        params: ScanParams,
        budget: ScanBudget,
    ) -> Result<Self, BackboneError> {
        let scanner = Some(Scanner::new(backbone, &self.params, params, budget)?);
        Ok(Classifier { scanner, ..self })
    }

    /// Returns how images are looked at.
    pub fn view(&self) -> View {
        if self.scanner.is_some() { View::Scan } else { View::Whole }
    }

    /// Returns the names of the classes.
    pub fn labels(&self) -> &Labels {
        &self.params.labels
    }

    /// Returns the parameters.
    pub fn params(&self) -> &ClassifierParams {
        &self.params
    }

    /// Classifies an image and its mirror image and returns the mean prediction (test-time augmentation). in: H×W×3 u8 RGB,
    /// any size.
    ///
    /// # Errors
    /// If the backbone fails.
    pub fn classify_with_mirror(&mut self, image: &RgbImage) -> Result<Prediction, BackboneError> {
        let mut features = |image: &RgbImage| {
            self.preprocessor.run(image, &mut self.input);
            Ok::<_, BackboneError>(self.session.run(&self.input)?.to_vec())
        };
        let views = [features(image)?, features(&imageops::flip_horizontal(image))?];
        Ok(self.params.predict_views(views.iter()))
    }

    /// Classifies an image by its view: scans it at both scales if there is a scanner and the image is large enough, else as
    /// [`Self::classify`].
    ///
    /// # Errors
    /// If the backbone fails.
    pub fn classify_by_view(&mut self, image: &RgbImage) -> Result<(&Prediction, StageTimes), BackboneError> {
        let scanner = self.scanner.as_mut().filter(|scanner| scanner.suits(image.dimensions()));
        let Some(scanner) = scanner else { return self.classify(image) };
        let times = scanner.scan(image, &mut self.prediction)?;
        Ok((&self.prediction, times))
    }

    /// Classifies an image as a whole. in: H×W×3 u8 RGB, any size. The time of decoding in the result is zero.
    ///
    /// # Errors
    /// If the backbone fails.
    pub fn classify(&mut self, image: &RgbImage) -> Result<(&Prediction, StageTimes), BackboneError> {
        let started = Instant::now();
        self.preprocessor.resize(image);
        self.classify_resized(started)
    }

    /// Classifies a frame unless `filter` finds it unfit or unchanged. in: H×W×3 u8 RGB, any size.
    ///
    /// # Errors
    /// If the backbone fails.
    pub fn classify_frame(&mut self, image: &RgbImage, filter: &mut FrameFilter) -> Result<FrameResult, BackboneError> {
        let started = Instant::now();
        let Classifier { preprocessor, scanner, prediction, .. } = self;
        let resized = preprocessor.resize(image);
        let scanner = scanner.as_mut().filter(|scanner| scanner.suits(image.dimensions()));
        match filter.quality.assess(resized) {
            Quality::Ok => {}
            unfit => {
                // The next frame that can be judged is classified.
                filter.diff.reset();
                scanner.into_iter().for_each(Scanner::reset);
                return Ok(FrameResult::Unfit(unfit));
            }
        }
        // An unchanged frame whose details have not been scanned is scanned further.
        let is_complete = scanner.as_ref().is_none_or(|scanner| scanner.is_current());
        if filter.diff.is_unchanged(resized) && is_complete {
            scanner.into_iter().for_each(Scanner::skip_frame);
            return Ok(FrameResult::Unchanged);
        }
        let Some(scanner) = scanner else {
            self.reset_scan();
            return self.classify_resized(started).map(|(_, times)| FrameResult::Classified(times));
        };
        let filtered = started.elapsed();
        let mut times = scanner.scan_next(image, prediction)?;
        times.preprocess += filtered;
        Ok(FrameResult::Classified(times))
    }

    fn classify_resized(&mut self, started: Instant) -> Result<(&Prediction, StageTimes), BackboneError> {
        self.preprocessor.normalise(&mut self.input);
        let preprocessed = Instant::now();
        let features = self.session.run(&self.input)?;
        let extracted = Instant::now();
        self.params.predict_into(features, &mut self.prediction);
        let cpu_time = self.session.cpu_time();
        let times = StageTimes {
            decode: Duration::ZERO,
            preprocess: preprocessed - started,
            backbone: extracted - preprocessed,
            head: extracted.elapsed(),
            cpu_time,
        };
        Ok((&self.prediction, times))
    }

    /// Forgets earlier frames of the sequence, after a time without frames.
    pub fn reset_scan(&mut self) {
        self.scanner.iter_mut().for_each(Scanner::reset);
    }

    /// Returns the prediction of the last image; empty before the first one.
    pub fn last_prediction(&self) -> &Prediction {
        &self.prediction
    }

    /// Runs the backbone again on the last image and returns its wall-clock time.
    ///
    /// # Errors
    /// If the backbone fails.
    pub fn backbone_alone(&mut self) -> Result<Duration, BackboneError> {
        let started = Instant::now();
        self.session.run(&self.input)?;
        Ok(started.elapsed())
    }

    /// Returns the layers of the backbone with the times of its last run; empty unless the kernels compute all layers.
    pub fn layer_profiles(&self) -> Vec<LayerProfile> {
        self.session.layer_profiles()
    }
}

impl ClassifierParams {
    /// Predicts the class of one feature vector. in: `[width]`.
    ///
    /// # Panics
    /// If `features` is not `width` long.
    pub fn predict(&self, features: &[f32]) -> Prediction {
        let mut prediction = Prediction::default();
        self.predict_into(features, &mut prediction);
        prediction
    }

    /// As [`Self::predict`], into an existing prediction whose buffer is reused.
    fn predict_into(&self, features: &[f32], prediction: &mut Prediction) {
        self.head.logits_into(features, &mut prediction.probabilities);
        prediction.similarity = self.ood.similarity(features, &prediction.probabilities);
        softmax_in_place(&mut prediction.probabilities, self.head.temperature());
        prediction.known = self.ood.is_known(prediction.similarity);
        prediction.found.clear();
    }

    /// Returns the mean prediction over several views of one image. in: at least one view, `[width]` each.
    ///
    /// # Panics
    /// As [`Self::predict`].
    pub fn predict_views(&self, views: impl Iterator<Item = impl AsRef<[f32]>>) -> Prediction {
        let (mut count, mut similarity) = (0.0, 0.0);
        let mut probabilities = vec![0.0; self.labels.names().len()];
        for features in views {
            let prediction = self.predict(features.as_ref());
            count += 1.0;
            similarity += prediction.similarity;
            probabilities.iter_mut().zip(prediction.probabilities).for_each(|(sum, p)| *sum += p);
        }
        probabilities.iter_mut().for_each(|p| *p /= count);
        similarity /= count;
        Prediction { probabilities, similarity, known: self.ood.is_known(similarity), found: Vec::new() }
    }
}
