//! A training run: what it is given beside its settings, and what it gives.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::bundle::DatasetRef;
use crate::train::data::photographs::Finding;
use crate::train::evaluate::EvaluatedSet;
use crate::train::features::device::Choice;
use crate::train::optim::sgd::Epoch;
use crate::vision::{Head, Labels, LastConvWeights, OodDetector};

/// What a run needs beside its settings. The device may change the last digits of what is learned, the rest nothing.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// Where the run is written.
    pub out: PathBuf,
    /// Whether a run that is there may be replaced.
    pub overwrite: bool,
    /// Where features are kept from run to run; nowhere where it is none.
    pub cache: Option<PathBuf>,
    pub threads: usize,
    /// What computes the features.
    pub device: Choice,
    /// When the run is said to have happened; its version follows from it.
    pub created_at: SystemTime,
}

/// What a run gave.
#[derive(Debug)]
pub struct Trained {
    pub labels: Labels,
    pub parameters: Parameters,
    /// Photographs of each class that were learned from.
    pub train_images: Vec<usize>,
    /// What was learned from and measured on.
    pub dataset: DatasetRef,
    pub val: EvaluatedSet,
    /// On photographs that had no part in it.
    pub test: Option<EvaluatedSet>,
    pub history: Vec<Epoch>,
    pub head: Head,
    pub ood: OodDetector,
    /// A fine-tuned last convolution.
    pub last_conv: Option<LastConvWeights>,
    /// Features of a photograph of each class, for the self-test.
    pub examples: Vec<Vec<f32>>,
    /// What is not used, and why.
    pub left_out: Vec<Finding>,
    pub time: Duration,
}

/// Numbers in the network and the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameters {
    pub total: usize,
    pub trained: usize,
}

impl Trained {
    /// The epoch whose numbers were kept, from 1.
    pub fn best_epoch(&self) -> usize {
        self.history.iter().rev().find(|epoch| epoch.best).map_or(0, |epoch| epoch.epoch)
    }
}

impl fmt::Display for Trained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parameters { total, trained } = self.parameters;
        let (images, seconds) = (self.dataset.train_images, self.time.as_secs_f64());
        let [total, trained, frozen] = [total, trained, total - trained].map(grouped);
        writeln!(f, "{total} parameters, {trained} trained, {frozen} frozen")?;
        writeln!(f, "learned from {images} photographs in {seconds:.1} s, measured on others:\n")?;
        self.val.evaluation.fmt(f)?;
        if let Some(test) = &self.test {
            writeln!(f, "on the test photographs, which had no part in it:\n")?;
            test.evaluation.fmt(f)?;
        }
        Ok(())
    }
}

/// 2264389 → 2,264,389
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
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
    fn numbers_are_grouped() {
        assert_eq!([5, 418_565, 2_264_389].map(grouped), ["5", "418,565", "2,264,389"]);
    }
}
