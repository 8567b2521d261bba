//! How good a model is: what it makes of photographs, loss, accuracy, calibration, and what is taken for what.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::bundle::{Bundle, BundleError};
use crate::train::data::augment::Views;
use crate::train::data::dataset::{Dataset, fingerprint};
use crate::train::data::photographs::{Finding, Photograph, Photographs};
use crate::train::features::{Extractor, Precision};
use crate::vision::head::argmax;
use crate::vision::{Labels, Network, Prediction};

/// Confidences are put into this many equal bins for the calibration error.
const BINS: usize = 15;

/// The figures of a model on labelled photographs. Accuracy, loss and calibration look at the best
/// class, rejected or not; `unknown` says how many were rejected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub images: usize,
    /// Share whose best class is right, 0–1.
    pub accuracy: f64,
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Expected calibration error, 0–1, over 15 bins.
    pub ece: f64,
    /// Share rejected as unknown, 0–1.
    pub unknown: f64,
    pub classes: Vec<ClassFigures>,
    /// `confusion[true][predicted]`, counts, in the order of the classes.
    pub confusion: Vec<Vec<usize>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassFigures {
    pub class: String,
    /// Photographs of this class.
    pub support: usize,
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
}

/// What a model makes of photographs whose classes are known.
#[derive(Debug, Clone)]
pub struct EvaluatedSet {
    pub photographs: Vec<Photograph>,
    pub predictions: Vec<Prediction>,
    pub evaluation: Evaluation,
}

impl EvaluatedSet {
    pub fn new(labels: &Labels, photographs: Vec<Photograph>, predictions: Vec<Prediction>) -> Self {
        let classes: Vec<usize> = photographs.iter().map(|photograph| photograph.class).collect();
        let evaluation = Evaluation::new(labels, &predictions, &classes);
        EvaluatedSet { photographs, predictions, evaluation }
    }

    /// Of the photographs, whatever their names.
    pub fn fingerprint(&self, labels: &Labels) -> String {
        fingerprint(labels, self.photographs.iter().map(|image| (image.class, &image.content)))
    }
}

/// What a model makes of a dataset; mirrored as well, and the mean of both, where `mirror` says so. Gives what
/// could not be used besides.
pub fn evaluate(
    bundle: &Bundle,
    network: &Network,
    dataset: &Dataset,
    mirror: bool,
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<(EvaluatedSet, Vec<Finding>), BundleError> {
    let photographs = Photographs::read(dataset, threads, &|_| {});
    let extractor = Extractor {
        network,
        backbone: &bundle.backbone(network)?,
        map: None,
        preprocess: &bundle.manifest().preprocess,
        precision: Precision::Single,
        views: Views { count: 1 + usize::from(mirror), seed: 0 },
        cache: None,
        threads,
    };
    let (features, _) = extractor.run(&photographs.kept, progress)?;
    let params = bundle.classifier_params();
    let judge = |i: usize| params.predict_views((0..features.views).map(|view| features.row(i, view)));
    let predictions = (0..features.len()).map(judge).collect();
    let left_out = [photographs.left_out, features.left_out].concat();
    Ok((EvaluatedSet::new(&params.labels, features.images, predictions), left_out))
}

impl Evaluation {
    /// `classes[i]` is what the photograph of `predictions[i]` shows.
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
        let right: usize = (0..count).map(|class| confusion[class][class]).sum();
        Evaluation {
            images,
            accuracy: ratio(right, images),
            loss: loss / images.max(1) as f64,
            ece: reliability(predictions, classes).1,
            unknown: ratio(unknown, images),
            classes: labels.names().iter().enumerate().map(|(i, name)| figures(name, i, &confusion)).collect(),
            confusion,
        }
    }
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} photographs: accuracy {:.4}, loss {:.4}, calibration error {:.4}, rejected as unknown {:.4}",
            self.images, self.accuracy, self.loss, self.ece, self.unknown
        )?;
        writeln!(f, "\n{:16} {:>7} {:>9} {:>7} {:>7}   taken for", "class", "images", "precision", "recall", "F1")?;
        for (class, row) in self.classes.iter().zip(&self.confusion) {
            let taken_for: Vec<String> = row.iter().map(|count| format!("{count:4}")).collect();
            writeln!(
                f,
                "{:16} {:7} {:9.3} {:7.3} {:7.3}   {}",
                class.class,
                class.support,
                class.precision,
                class.recall,
                class.f1,
                taken_for.join(" ")
            )?;
        }
        writeln!(f)
    }
}

fn figures(name: &str, class: usize, confusion: &[Vec<usize>]) -> ClassFigures {
    let right = confusion[class][class];
    let support = confusion[class].iter().sum();
    let (precision, recall) = (ratio(right, confusion.iter().map(|row| row[class]).sum()), ratio(right, support));
    let f1 = if right == 0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) };
    ClassFigures { class: name.into(), support, precision, recall, f1 }
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// How sure the best class is, and how often it is right, over bins of equal width: mean confidence, share that
/// is right, count; and the mean distance between the two, weighed by the counts (Naeini et al., 2015).
pub fn reliability(predictions: &[Prediction], classes: &[usize]) -> (Vec<(f64, f64, usize)>, f64) {
    let mut sums = [(0.0f64, 0usize, 0usize); BINS];
    for (prediction, class) in predictions.iter().zip(classes) {
        let best = argmax(&prediction.probabilities);
        let confidence = f64::from(prediction.probabilities[best]);
        let bin = &mut sums[((confidence * BINS as f64) as usize).min(BINS - 1)];
        *bin = (bin.0 + confidence, bin.1 + usize::from(best == *class), bin.2 + 1);
    }
    let error = sums.iter().map(|(sure, right, _)| (sure - *right as f64).abs()).sum::<f64>();
    let bin =
        |(sure, right, count): &(f64, usize, usize)| (sure / (*count).max(1) as f64, ratio(*right, *count), *count);
    (sums.iter().map(bin).collect(), error / predictions.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(probabilities: [f32; 2], known: bool) -> Prediction {
        Prediction { probabilities: probabilities.into(), similarity: 0.0, known }
    }

    #[test]
    fn figures_are_those_counted_by_hand() {
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
        // Bins of 0.8 (half right), 0.6 and 0.7 (both right).
        assert!((evaluation.ece - (0.6 + 0.4 + 0.3) / 4.0).abs() < 1e-6, "{}", evaluation.ece);
    }
}
