//! How long a frame takes on this machine, stage by stage.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::bundle::{Bundle, BundleError};
use crate::vision::decode::{self, DecodeError};
use crate::vision::kernels::{self, Instructions, Part, Team};
use crate::vision::{BackboneError, Classifier, Stages, test_pattern};

/// Frames before the first that counts: caches and clocks are warm then.
const WARM_UP: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
    #[error("{file}: {source}")]
    Image { file: String, source: DecodeError },
}

/// The stages of a frame, each with its figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub threads: usize,
    /// What runs the backbone's layers.
    pub kernels: &'static str,
    pub stages: StageReport,
    /// The backbone again and again, with nothing in between.
    pub backbone_alone: Figures,
    /// Its stages, where kernels of ours compute all of it.
    pub parts: Vec<PartReport>,
    /// Multiply-adds a second that the kernels reach on one core with all in its registers and first-level cache, 1e9.
    pub peak_gmacs: Option<f64>,
}

/// A stage of the backbone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PartReport {
    pub what: String,
    pub multiply_adds: u64,
    pub median_ms: f64,
    /// Of the peak of so many cores as there are threads.
    pub share_of_peak: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageReport {
    pub decode: Figures,
    pub preprocess: Figures,
    pub backbone: Figures,
    pub head: Figures,
    pub frame: Figures,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    pub median_ms: f64,
    pub p99_ms: f64,
    pub runs: usize,
}

impl Figures {
    /// Of at least one time; the p99 is the smallest that at most one in a hundred exceeds.
    pub fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |share: f64| {
            let rank = (share * times.len() as f64).ceil() as usize;
            times.get(rank.saturating_sub(1)).map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        Figures { median_ms: at(0.5), p99_ms: at(0.99), runs: times.len() }
    }
}

impl StageReport {
    pub fn of(frames: &[Stages]) -> Self {
        let figures = |stage: fn(&Stages) -> Duration| Figures::of(frames.iter().map(stage).collect());
        StageReport {
            decode: figures(|s| s.decode),
            preprocess: figures(|s| s.preprocess),
            backbone: figures(|s| s.backbone),
            head: figures(|s| s.head),
            frame: figures(Stages::frame),
        }
    }
}

impl fmt::Display for StageReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:12} {:>10} {:>10}", "stage", "median ms", "p99 ms")?;
        let stages = [
            ("decode", &self.decode),
            ("preprocess", &self.preprocess),
            ("backbone", &self.backbone),
            ("head", &self.head),
            ("frame", &self.frame),
        ];
        for (name, figures) in stages {
            writeln!(f, "{name:12} {:10.3} {:10.3}", figures.median_ms, figures.p99_ms)?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} frames, threads: {}, kernels: {}\n", self.stages.frame.runs, self.threads, self.kernels)?;
        self.stages.fmt(f)?;
        let Figures { median_ms, p99_ms, .. } = self.backbone_alone;
        writeln!(f, "\nthe backbone alone, again and again: {median_ms:.3} ms, p99 {p99_ms:.3} ms")?;
        let Some(peak) = self.peak_gmacs.filter(|_| !self.parts.is_empty()) else { return Ok(()) };
        writeln!(f, "\n{:58} {:>9} {:>10} {:>9}", "its parts", "million ×+", "median ms", "of peak")?;
        for PartReport { what, multiply_adds, median_ms, share_of_peak } in &self.parts {
            let (millions, share) = (*multiply_adds as f64 / 1e6, share_of_peak * 100.0);
            writeln!(f, "{what:58} {millions:9.2} {median_ms:10.3} {share:7.0} %")?;
        }
        writeln!(f, "peak: {peak:.1} thousand million multiply-adds a second and core, in the first-level cache")
    }
}

impl PartReport {
    /// Of at least one run; `peak` in multiply-adds a second.
    fn all(runs: &[Vec<Part>], peak: f64) -> Vec<Self> {
        let part = |(nth, part): (usize, &Part)| {
            let Figures { median_ms, .. } = Figures::of(runs.iter().map(|run| run[nth].took).collect());
            let share_of_peak = part.multiply_adds as f64 / (median_ms / 1e3) / peak;
            PartReport { what: part.what.clone(), multiply_adds: part.multiply_adds, median_ms, share_of_peak }
        };
        runs[0].iter().enumerate().map(part).collect()
    }
}

/// A classifier to be timed.
pub struct Bench {
    classifier: Classifier,
    threads: usize,
    kernels: Option<Instructions>,
}

impl Bench {
    /// `backbone`: the ONNX file that the model was made for, where neither the program nor the model has it.
    pub fn new(bundle: &Bundle, backbone: Option<&Path>, threads: usize) -> Result<Self, BenchError> {
        let team = Team::of(threads).map_err(BenchError::Threads)?;
        let backbone = bundle.backbone(&bundle.network(backbone)?.with_team(team))?;
        let (classifier, kernels) = (Classifier::new(&backbone, bundle.classifier_params())?, backbone.kernels());
        // tract computes a frame with one.
        let threads = if kernels.is_some() { threads } else { 1 };
        Ok(Bench { classifier, threads, kernels })
    }

    /// Decodes and classifies one picture `runs` times: `image`, or a drawn one of 640×480.
    pub fn run(&mut self, image: Option<&Path>, runs: usize) -> Result<Report, BenchError> {
        let named = |source| BenchError::Image {
            file: image.map_or("the drawn picture".into(), |path| path.display().to_string()),
            source,
        };
        let jpeg = match image {
            Some(path) => decode::read_file(path).map_err(named)?,
            None => test_pattern::jpeg(640, 480),
        };
        let mut frames = Vec::with_capacity(runs);
        for run in 0..WARM_UP + runs.max(1) {
            let began = Instant::now();
            let picture = decode::encoded(&jpeg).map_err(named)?;
            let decode = began.elapsed();
            let (_, stages) = self.classifier.classify(&picture)?;
            if run >= WARM_UP {
                frames.push(Stages { decode, ..stages });
            }
        }
        let (mut alone, mut parts) = (Vec::new(), Vec::new());
        for _ in 0..runs.max(1) {
            alone.push(self.classifier.backbone_alone()?);
            parts.push(self.classifier.parts());
        }
        let peak = self.kernels.map(kernels::peak);
        Ok(Report {
            threads: self.threads,
            kernels: kernels::named(self.kernels),
            stages: StageReport::of(&frames),
            backbone_alone: Figures::of(alone),
            parts: PartReport::all(&parts, peak.unwrap_or(f64::INFINITY) * self.threads as f64),
            peak_gmacs: peak.map(|peak| peak / 1e9),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_the_ranks() {
        let times = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!(Figures::of(times), Figures { median_ms: 100.0, p99_ms: 198.0, runs: 200 });
        assert_eq!(Figures::of(vec![Duration::from_millis(3)]), Figures { median_ms: 3.0, p99_ms: 3.0, runs: 1 });
    }
}
