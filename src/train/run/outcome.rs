//! The result of a training run.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bundle::DatasetRef;
use crate::train::data::dataset::DatasetProblem;
use crate::train::evaluate::{EvaluatedSet, KindAcceptance};
use crate::train::optim::training_loop::Epoch;
use crate::vision::{Head, Labels, LastConvWeights, OodDetector, ScanParams};

/// A trained and calibrated model with its evaluation.
#[derive(Debug)]
pub struct Trained {
    /// Class names.
    pub labels: Labels,
    /// Parameter counts.
    pub parameters: Parameters,
    /// Number of training images of each class.
    pub train_images: Vec<usize>,
    /// Fingerprint and sizes of the training and validation sets.
    pub dataset: DatasetRef,
    /// Validation images of none of the classes that the model takes for one, for each kind.
    pub unknown_kinds: Vec<KindAcceptance>,
    /// Fraction of the validation images that a threshold rejects which was fitted on other ones, 0–1.
    pub rejected_cross_fitted: f64,
    /// Evaluation on the validation set.
    pub val: EvaluatedSet,
    /// Evaluation on the test set, if there is one.
    pub test: Option<EvaluatedSet>,
    /// Metrics of each finished epoch, in order.
    pub history: Vec<Epoch>,
    /// The head, with the fitted temperature.
    pub head: Head,
    /// The OOD detector, with the fitted threshold.
    pub ood: OodDetector,
    /// The parameters of scanning; `None` if the model looks at whole frames.
    pub scan: Option<ScanParams>,
    /// The last convolution, if it is fine-tuned.
    pub last_conv: Option<LastConvWeights>,
    /// Feature vectors for the self-test of the bundle, at least one: `[width]` each.
    pub self_test_features: Vec<Vec<f32>>,
    /// Image files that are not used.
    pub skipped: Vec<DatasetProblem>,
    /// Duration of the run, up to the writing of its results.
    pub elapsed: Duration,
}

/// Parameter counts of the backbone with the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    /// Number of all parameters.
    pub total: usize,
    /// Number of trained parameters; the others are frozen.
    pub trained: usize,
}

impl Trained {
    /// Returns the epoch, from 1, whose parameters are kept.
    pub fn best_epoch(&self) -> usize {
        self.history.iter().rev().find(|epoch| epoch.best).map_or(0, |epoch| epoch.epoch)
    }
}

impl fmt::Display for Trained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parameters { total, trained } = self.parameters;
        let (images, seconds) = (self.dataset.train_images, self.elapsed.as_secs_f64());
        let [total, trained, frozen] = [total, trained, total - trained].map(with_separators);
        writeln!(f, "{total} parameters, {trained} trained, {frozen} frozen")?;
        writeln!(f, "trained on {images} images in {seconds:.1} s; evaluation on the validation set:\n")?;
        self.val.evaluation.fmt(f)?;
        let rejected = self.rejected_cross_fitted * 100.0;
        writeln!(f, "{rejected:.1} % rejected as unknown with a threshold that was fitted on other images\n")?;
        KindAcceptance::write(f, &self.unknown_kinds)?;
        writeln!(f, "the model {}\n", if self.scan.is_some() { "scans frames" } else { "classifies whole frames" })?;
        if let Some(test) = &self.test {
            writeln!(f, "evaluation on the test set:\n")?;
            test.evaluation.fmt(f)?;
        }
        Ok(())
    }
}

/// Formats with thousands separators: 2264389 → 2,264,389.
pub fn with_separators(value: usize) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_thousands_separators() {
        assert_eq!([5, 418_565, 2_264_389].map(with_separators), ["5", "418,565", "2,264,389"]);
    }
}
