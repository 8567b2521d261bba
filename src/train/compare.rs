//! Comparison of finished runs.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::train::run::write::{METRICS, MODEL, RunMetrics};

/// Finished runs, by ascending validation loss.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The runs, sorted by validation loss.
    pub runs: Vec<FinishedRun>,
    /// Whether all runs have the same validation set. If not, their metrics are not comparable.
    #[serde(rename = "same_photographs")]
    pub same_validation_set: bool,
}

/// The folder of a finished run and its content.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FinishedRun {
    /// Path of the folder.
    pub folder: PathBuf,
    /// Size of the bundle, in bytes.
    pub bundle_bytes: u64,
    /// The content of `metrics.json`.
    #[serde(rename = "figures")]
    pub metrics: RunMetrics,
}

/// A file of a run cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct CompareError {
    path: PathBuf,
    reason: String,
}

impl Comparison {
    /// Reads the metrics of the runs in `folders`.
    ///
    /// # Errors
    /// Fails if a folder does not hold a finished run.
    pub fn read(folders: &[PathBuf]) -> Result<Self, CompareError> {
        let mut runs = folders.iter().map(|folder| FinishedRun::read(folder)).collect::<Result<Vec<_>, _>>()?;
        runs.sort_by(|a, b| a.metrics.val.loss.total_cmp(&b.metrics.val.loss));
        let same_validation_set = runs.iter().all(|run| run.metrics.val_sha256 == runs[0].metrics.val_sha256);
        Ok(Comparison { runs, same_validation_set })
    }
}

impl FinishedRun {
    fn read(folder: &Path) -> Result<Self, CompareError> {
        let (metrics_file, model) = (folder.join(METRICS), folder.join(MODEL));
        let failed = |path: &Path, reason: String| CompareError { path: path.into(), reason };
        let text = fs::read_to_string(&metrics_file).map_err(|e| failed(&metrics_file, e.to_string()))?;
        let metrics = serde_json::from_str(&text).map_err(|e| failed(&metrics_file, e.to_string()))?;
        let bundle = fs::metadata(&model).map_err(|e| failed(&model, e.to_string()))?;
        Ok(FinishedRun { folder: folder.into(), bundle_bytes: bundle.len(), metrics })
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width =
            self.runs.iter().map(|run| run.folder.display().to_string().chars().count()).max().unwrap_or(0).max(3);
        let classes = self.runs.first().map_or(&[][..], |run| &run.metrics.val.classes);
        write!(
            f,
            "{:width$} {:14} {:>7} {:>8} {:>7} {:>8} {:>7} ",
            "run", "recipe", "loss", "accuracy", "ece", "seconds", "MB"
        )?;
        let names: Vec<String> = classes.iter().map(|class| format!("{:>10.10}", class.class)).collect();
        writeln!(f, "{}", names.join(" "))?;
        for run in &self.runs {
            let (metrics, val) = (&run.metrics, &run.metrics.val);
            write!(
                f,
                "{:width$} {:14} {:7.4} {:8.4} {:7.4} {:8.1} {:7.2} ",
                run.folder.display(),
                metrics.recipe.name(),
                val.loss,
                val.accuracy,
                val.ece,
                metrics.seconds,
                run.bundle_bytes as f64 / 1e6
            )?;
            let same_classes =
                val.classes.iter().map(|class| &class.class).eq(classes.iter().map(|class| &class.class));
            let recalls: Vec<String> =
                val.classes.iter().filter(|_| same_classes).map(|class| format!("{:10.3}", class.recall)).collect();
            writeln!(f, "{}", recalls.join(" "))?;
        }
        if !self.same_validation_set {
            writeln!(f, "the validation sets differ: the metrics are not comparable")?;
        }
        writeln!(f, "sorted by validation loss; the class columns show the recall")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EARLIER_METRICS: &str = r#"{
        "name": "flowers", "recipe": "frozen", "seed": 1, "seconds": 0.25, "device": "cpu", "train_images": 10,
        "parameters": { "total": 2260546, "trained": 2562 },
        "best_epoch": 1, "val_sha256": "9cc20951bdeaecea4e164d428ae5054b569385a0ef4da697421d9ba8953bc34b",
        "val": {
            "images": 2, "accuracy": 1.0, "loss": 0.0625, "ece": 0.125, "unknown": 0.0,
            "classes": [{ "class": "daisy", "support": 2, "precision": 1.0, "recall": 1.0, "f1": 1.0 }],
            "confusion": [[2]]
        },
        "test": null,
        "epochs": [{
            "epoch": 1, "learning_rate": 0.5, "train_loss": 0.75, "val": { "loss": 0.5, "accuracy": 0.5 }, "best": true
        }]
    }"#;

    #[test]
    fn reads_the_metrics_of_earlier_versions_and_keeps_their_json_keys() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("metrics.json"), EARLIER_METRICS).unwrap();
        fs::write(dir.path().join("model.bloom"), [0; 7]).unwrap();
        let comparison = Comparison::read(&[dir.path().to_owned()]).unwrap();
        let json = serde_json::to_value(&comparison).unwrap();
        let figures: serde_json::Value = serde_json::from_str(EARLIER_METRICS).unwrap();
        let run = serde_json::json!({ "folder": dir.path(), "bundle_bytes": 7, "figures": figures });
        assert_eq!(json, serde_json::json!({ "runs": [run], "same_photographs": true }));
    }
}
