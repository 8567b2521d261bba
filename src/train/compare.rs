//! Finished runs side by side, best first.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::train::run::write::{METRICS, MODEL, RunFigures};

/// Runs in the order of their loss on the validation photographs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    pub runs: Vec<Run>,
    /// Whether all were measured on the same photographs: if not, their figures say little of each other.
    pub same_photographs: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    pub folder: PathBuf,
    pub bundle_bytes: u64,
    pub figures: RunFigures,
}

#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct CompareError {
    path: PathBuf,
    reason: String,
}

impl Comparison {
    /// Reads the figures that finished runs left in their folders.
    pub fn of(folders: &[PathBuf]) -> Result<Self, CompareError> {
        let mut runs = folders.iter().map(|folder| Run::read(folder)).collect::<Result<Vec<_>, _>>()?;
        runs.sort_by(|a, b| a.figures.val.loss.total_cmp(&b.figures.val.loss));
        let same_photographs = runs.iter().all(|run| run.figures.val_sha256 == runs[0].figures.val_sha256);
        Ok(Comparison { runs, same_photographs })
    }
}

impl Run {
    fn read(folder: &Path) -> Result<Self, CompareError> {
        let (metrics, model) = (folder.join(METRICS), folder.join(MODEL));
        let failed = |path: &Path, reason: String| CompareError { path: path.into(), reason };
        let text = fs::read_to_string(&metrics).map_err(|e| failed(&metrics, e.to_string()))?;
        let figures = serde_json::from_str(&text).map_err(|e| failed(&metrics, e.to_string()))?;
        let bundle = fs::metadata(&model).map_err(|e| failed(&model, e.to_string()))?;
        Ok(Run { folder: folder.into(), bundle_bytes: bundle.len(), figures })
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wide =
            self.runs.iter().map(|run| run.folder.display().to_string().chars().count()).max().unwrap_or(0).max(3);
        let classes = self.runs.first().map_or(&[][..], |run| &run.figures.val.classes);
        write!(
            f,
            "{:wide$} {:14} {:>7} {:>8} {:>7} {:>8} {:>7} ",
            "run", "recipe", "loss", "accuracy", "ece", "seconds", "MB"
        )?;
        let names: Vec<String> = classes.iter().map(|class| format!("{:>10.10}", class.class)).collect();
        writeln!(f, "{}", names.join(" "))?;
        for run in &self.runs {
            let (figures, val) = (&run.figures, &run.figures.val);
            write!(
                f,
                "{:wide$} {:14} {:7.4} {:8.4} {:7.4} {:8.1} {:7.2} ",
                run.folder.display(),
                figures.recipe.name(),
                val.loss,
                val.accuracy,
                val.ece,
                figures.seconds,
                run.bundle_bytes as f64 / 1e6
            )?;
            let same_classes =
                val.classes.iter().map(|class| &class.class).eq(classes.iter().map(|class| &class.class));
            let recalls: Vec<String> =
                val.classes.iter().filter(|_| same_classes).map(|class| format!("{:10.3}", class.recall)).collect();
            writeln!(f, "{}", recalls.join(" "))?;
        }
        if !self.same_photographs {
            writeln!(f, "not all were measured on the same photographs: their figures say little of each other")?;
        }
        writeln!(f, "best first, by loss; under each class its recall")
    }
}
