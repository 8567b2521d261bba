//! Evaluation of a model on labeled images: accuracy, loss, calibration error, metrics per class and confusion matrix.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::bundle::{Bundle, BundleError};
use crate::system::paths::without_controls;
use crate::train::data::augment::Views;
use crate::train::data::dataset::{Dataset, DatasetProblem, fingerprint};
use crate::train::data::image_set::{HashedImage, ImageSet};
use crate::train::features::{Extractor, Precision};
use crate::vision::head::argmax;
use crate::vision::{Labels, OnnxBackbone, Prediction};

/// Number of equal-width confidence bins of the calibration error (Guo et al., 2017, use 15).
const BINS: usize = 15;

/// The most classes whose confusion matrix is printed: a line has five characters for each.
const MATRIX_CLASSES_MAX: usize = 10;
/// The most confusions that are printed by name.
const CONFUSIONS_MAX: usize = 10;

/// The metrics of a model on labeled images. Accuracy, loss and calibration error include the images that the OOD detector
/// rejects.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Number of images.
    pub images: usize,
    /// Fraction of images whose top class is correct, 0–1.
    pub accuracy: f64,
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Expected calibration error, 0–1, over 15 bins.
    pub ece: f64,
    /// Fraction of images rejected as unknown, 0–1.
    pub unknown: f64,
    /// Metrics of each class, in the order of the labels.
    pub classes: Vec<ClassMetrics>,
    /// Counts `[true class][predicted class]`.
    pub confusion: Vec<Vec<usize>>,
}

/// The metrics of one class; precision, recall and F1 are 0–1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassMetrics {
    /// Name of the class.
    pub class: String,
    /// Number of images of this class.
    pub support: usize,
    /// Fraction of the images predicted as this class that belong to it; 0 if no image is predicted as it.
    pub precision: f64,
    /// Fraction of the images of this class that are predicted as it; 0 if the class has no images.
    pub recall: f64,
    /// Harmonic mean of precision and recall; 0 if no image is correct.
    pub f1: f64,
}

/// Images of none of the classes, of one kind, and how many of them a model takes for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindAcceptance {
    /// Name of the kind.
    pub kind: String,
    /// Number of images.
    pub images: usize,
    /// Number of images that are not `unknown` to the model.
    pub accepted: usize,
}

impl KindAcceptance {
    /// Counts the accepted images of each of the `kinds` that has images; `kind_of` is the kind of each image.
    pub fn count(kinds: &[String], kind_of: &[usize], accepted: impl Fn(usize) -> bool) -> Vec<Self> {
        let count = |(kind, name): (usize, &String)| {
            let images: Vec<usize> = (0..kind_of.len()).filter(|i| kind_of[*i] == kind).collect();
            let accepted = images.iter().filter(|i| accepted(**i)).count();
            KindAcceptance { kind: name.clone(), images: images.len(), accepted }
        };
        kinds.iter().enumerate().map(count).filter(|kind| kind.images > 0).collect()
    }

    /// Writes a table of the kinds; nothing if there are none.
    ///
    /// # Errors
    /// Fails if `f` fails.
    pub fn write(f: &mut impl fmt::Write, kinds: &[Self]) -> fmt::Result {
        if kinds.is_empty() {
            return Ok(());
        }
        writeln!(f, "images of none of the classes   images   taken for one")?;
        for KindAcceptance { kind, images, accepted } in kinds {
            let kind = without_controls(kind);
            writeln!(f, "{kind:30} {images:7} {accepted:8} {:5.1} %", ratio(*accepted, *images) * 100.0)?;
        }
        writeln!(f)
    }
}

/// The result of [`evaluate`].
#[derive(Debug, Clone)]
pub struct Evaluated {
    /// The images of the classes.
    pub set: EvaluatedSet,
    /// The images of none of the classes.
    pub unknown_kinds: Vec<KindAcceptance>,
    /// Files that are not used.
    pub skipped: Vec<DatasetProblem>,
}

/// Labeled images with a model's predictions and their evaluation, in the same order.
#[derive(Debug, Clone)]
pub struct EvaluatedSet {
    /// The images with their true classes.
    pub images: Vec<HashedImage>,
    /// The prediction for each image.
    pub predictions: Vec<Prediction>,
    /// The metrics of the predictions.
    pub evaluation: Evaluation,
}

impl EvaluatedSet {
    /// Evaluates `predictions`, one for each of `images`.
    ///
    /// # Panics
    /// Panics if a true or a top class is not an index into `labels`, or if a prediction has too few probabilities.
    pub fn new(labels: &Labels, images: Vec<HashedImage>, predictions: Vec<Prediction>) -> Self {
        let classes: Vec<usize> = images.iter().map(|image| image.class).collect();
        let evaluation = Evaluation::new(labels, &predictions, &classes);
        EvaluatedSet { images, predictions, evaluation }
    }

    /// Returns the [`fingerprint`] of the images.
    pub fn fingerprint(&self, labels: &Labels) -> String {
        fingerprint(labels, self.images.iter().map(|image| (image.class, &image.content_hash)))
    }
}

/// Evaluates a model on a dataset. With `mirror`, a prediction is the mean over the
/// image and its horizontal flip. `threads` is at least 1; `progress` is called with the number of finished images.
///
/// # Errors
/// Fails if `network` does not fit the model, or cannot run.
///
/// # Panics
/// Panics if a thread cannot be started, or if `dataset` has more classes than the model; [`Dataset::expect_classes`]
/// rejects that.
pub fn evaluate(
    bundle: &Bundle,
    network: &OnnxBackbone,
    dataset: &Dataset,
    mirror: bool,
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Evaluated, BundleError> {
    let images = ImageSet::read(dataset, threads, &|_| {});
    let extractor = Extractor {
        network,
        backbone: &bundle.compile_backbone(network)?,
        map_channels: None,
        preprocess: &bundle.manifest().preprocess,
        precision: Precision::Single,
        views: Views { count: 1 + usize::from(mirror), seed: 0 },
        cache: None,
        canvas: None,
        threads,
    };
    let (features, _) = extractor.run(&images.kept, progress)?;
    let params = bundle.classifier_params();
    let predict = |i: usize| params.predict_views((0..features.views).map(|view| features.row(i, view)));
    let predictions: Vec<Prediction> = (0..features.len()).map(predict).collect();
    let skipped = [images.skipped, features.skipped].concat();
    let known = params.labels.names().len();
    let (of_classes, of_none): (Vec<_>, Vec<_>) =
        features.images.into_iter().zip(predictions).partition(|(image, _)| image.class < known);
    let kind_of: Vec<usize> = of_none.iter().map(|(image, _)| image.class - known).collect();
    let unknown_kinds = KindAcceptance::count(&dataset.unknown_kinds, &kind_of, |i| of_none[i].1.known);
    let (images, predictions) = of_classes.into_iter().unzip();
    Ok(Evaluated { set: EvaluatedSet::new(&params.labels, images, predictions), unknown_kinds, skipped })
}

impl Evaluation {
    /// Computes the metrics of `predictions`; `classes` holds the true class of each image.
    ///
    /// # Panics
    /// Panics if a true or a top class is not an index into `labels`, or if a prediction has too few probabilities.
    pub fn new(labels: &Labels, predictions: &[Prediction], classes: &[usize]) -> Self {
        let count = labels.names().len();
        let images = predictions.len();
        let mut confusion = vec![vec![0; count]; count];
        let (mut loss, mut unknown) = (0.0, 0);
        for (prediction, class) in predictions.iter().zip(classes) {
            confusion[*class][argmax(&prediction.probabilities)] += 1;
            loss -= f64::from(prediction.probabilities[*class].max(f32::MIN_POSITIVE)).ln();
            unknown += usize::from(!prediction.known);
        }
        let correct: usize = (0..count).map(|class| confusion[class][class]).sum();
        Evaluation {
            images,
            accuracy: ratio(correct, images),
            loss: loss / images.max(1) as f64,
            ece: reliability(predictions, classes).1,
            unknown: ratio(unknown, images),
            classes: labels.names().iter().enumerate().map(|(i, name)| class_metrics(name, i, &confusion)).collect(),
            confusion,
        }
    }
}

impl Evaluation {
    /// Returns the confusions of most images: true class, predicted class and count, at most ten.
    pub fn largest_confusions(&self) -> Vec<(usize, usize, usize)> {
        let rows = self.confusion.iter().enumerate();
        let all = rows
            .flat_map(|(class, row)| row.iter().enumerate().map(move |(predicted, count)| (class, predicted, *count)));
        let mut confusions: Vec<_> = all.filter(|(class, predicted, count)| class != predicted && *count > 0).collect();
        confusions.sort_by_key(|(_, _, count)| std::cmp::Reverse(*count));
        confusions.truncate(CONFUSIONS_MAX);
        confusions
    }
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} images: accuracy {:.4}, loss {:.4}, calibration error {:.4}, rejected as unknown {:.4}",
            self.images, self.accuracy, self.loss, self.ece, self.unknown
        )?;
        let with_matrix = self.classes.len() <= MATRIX_CLASSES_MAX;
        let heading = if with_matrix { "   predicted as" } else { "" };
        writeln!(f, "\n{:16} {:>7} {:>9} {:>7} {:>7}{heading}", "class", "images", "precision", "recall", "F1")?;
        for (class, row) in self.classes.iter().zip(&self.confusion) {
            let ClassMetrics { class, support, precision, recall, f1 } = class;
            write!(f, "{class:16} {support:7} {precision:9.3} {recall:7.3} {f1:7.3}")?;
            if with_matrix {
                let counts: Vec<String> = row.iter().map(|count| format!("{count:4}")).collect();
                write!(f, "   {}", counts.join(" "))?;
            }
            writeln!(f)?;
        }
        let confusions = self.largest_confusions();
        if !confusions.is_empty() {
            writeln!(f, "\nlargest confusions:")?;
        }
        for (class, predicted, count) in confusions {
            let support = self.classes[class].support;
            let [class, predicted] = [class, predicted].map(|class| &self.classes[class].class);
            writeln!(f, "{count:4} of {support:4} {class} predicted as {predicted}")?;
        }
        writeln!(f)
    }
}

fn class_metrics(name: &str, class: usize, confusion: &[Vec<usize>]) -> ClassMetrics {
    let correct = confusion[class][class];
    let support = confusion[class].iter().sum();
    let (precision, recall) = (ratio(correct, confusion.iter().map(|row| row[class]).sum()), ratio(correct, support));
    let f1 = if correct == 0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) };
    ClassMetrics { class: name.into(), support, precision, recall, f1 }
}

/// Returns `part / whole`; 0 if `whole` is 0.
fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Returns the reliability diagram and the expected calibration error (Naeini et al., 2015). The diagram has for each of 15
/// equal-width confidence bins the mean confidence, the accuracy and the number of images; the error is the mean absolute
/// difference of confidence and accuracy, weighted by the number of images. `classes` holds the true class of each image.
///
/// # Panics
/// Panics if a prediction has no probabilities.
pub fn reliability(predictions: &[Prediction], classes: &[usize]) -> (Vec<(f64, f64, usize)>, f64) {
    let mut sums = [(0.0f64, 0usize, 0usize); BINS];
    for (prediction, class) in predictions.iter().zip(classes) {
        let best = argmax(&prediction.probabilities);
        let confidence = f64::from(prediction.probabilities[best]);
        let bin = &mut sums[((confidence * BINS as f64) as usize).min(BINS - 1)];
        *bin = (bin.0 + confidence, bin.1 + usize::from(best == *class), bin.2 + 1);
    }
    let error = sums.iter().map(|(confidence, correct, _)| (confidence - *correct as f64).abs()).sum::<f64>();
    let bin = |(confidence, correct, count): &(f64, usize, usize)| {
        (confidence / (*count).max(1) as f64, ratio(*correct, *count), *count)
    };
    (sums.iter().map(bin).collect(), error / predictions.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(probabilities: [f32; 2], known: bool) -> Prediction {
        Prediction { probabilities: probabilities.into(), known, ..Prediction::default() }
    }

    #[test]
    fn metrics_match_hand_computed_values() {
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        let predictions = [
            prediction([0.8, 0.2], true),
            prediction([0.8, 0.2], true),
            prediction([0.4, 0.6], true),
            prediction([0.3, 0.7], false),
        ];
        let evaluation = Evaluation::new(&labels, &predictions, &[0, 1, 1, 1]);
        assert_eq!(evaluation.confusion, [[1, 0], [1, 2]]);
        assert_eq!((evaluation.images, evaluation.accuracy, evaluation.unknown), (4, 0.75, 0.25));
        let [daisy, tulips] = &evaluation.classes[..] else { panic!("two classes") };
        assert_eq!((daisy.support, daisy.precision, daisy.recall), (1, 0.5, 1.0));
        assert_eq!((tulips.support, tulips.precision, tulips.recall), (3, 1.0, 2.0 / 3.0));
        assert!((tulips.f1 - 0.8).abs() < 1e-12);
        let loss = -(0.8f64.ln() + 0.2f64.ln() + 0.6f64.ln() + 0.7f64.ln()) / 4.0;
        assert!((evaluation.loss - loss).abs() < 1e-6);
        // Bins of 0.8 (half correct), 0.6 and 0.7 (both correct).
        assert!((evaluation.ece - (0.6 + 0.4 + 0.3) / 4.0).abs() < 1e-6, "{}", evaluation.ece);
    }
    #[test]
    fn many_classes_are_printed_in_short_lines_with_the_largest_confusions() {
        let names: Vec<String> = (0..102).map(|class| format!("class {class}")).collect();
        let labels = Labels::new(names).unwrap();
        let prediction = |class: usize| {
            let mut probabilities = vec![0.0; 102];
            probabilities[class] = 1.0;
            Prediction { probabilities, known: true, ..Prediction::default() }
        };
        // 30 images of each of two classes, some predicted as others.
        let predicted = [vec![7; 20], vec![8; 10], vec![3; 30]].concat();
        let classes = [vec![7; 30], vec![5; 30]].concat();
        let predictions: Vec<_> = predicted.into_iter().map(prediction).collect();
        let text = Evaluation::new(&labels, &predictions, &classes).to_string();
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
        let confusions: Vec<&str> = text.split("largest confusions:\n").nth(1).unwrap().trim_end().lines().collect();
        assert_eq!(
            confusions,
            ["  30 of   30 class 5 predicted as class 3", "  10 of   30 class 7 predicted as class 8"]
        );
    }
}
