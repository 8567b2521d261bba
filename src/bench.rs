//! The benchmark of `bloomcast bench`: the time of each stage of a frame on this machine.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use bloomcast_kernels::{Isa, LayerProfile, ThreadPool, peak_macs_per_second};
use serde::Serialize;

use crate::bundle::{Bundle, BundleError};
use crate::vision::decode::{self, DecodeError};
use crate::vision::{BackboneError, Classifier, StageTimes, test_pattern};

/// Frames before the first timed one, which warm up the caches and the processor's clock.
const WARM_UP: usize = 5;

/// An error of the benchmark.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The network of the bundle cannot be loaded.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The backbone cannot be run.
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    /// The threads of the kernels cannot be started.
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
    /// The image cannot be read or decoded.
    #[error("{file}: {source}")]
    Image {
        /// Path of the image, or `test pattern`.
        file: String,
        /// The cause.
        source: DecodeError,
    },
}

/// The result of a benchmark; its JSON is the output of `bloomcast bench --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchReport {
    /// Number of threads that compute a frame.
    pub threads: usize,
    /// Name of the kernels' instruction set; `tract` if tract computes all layers.
    pub kernels: &'static str,
    /// Times of the stages of a frame.
    pub stages: StageReport,
    /// Repeated runs of the backbone without other work in between.
    pub backbone_alone: TimingStats,
    /// The layers of the backbone; empty unless the kernels compute all of them.
    #[serde(rename = "parts")]
    pub layers: Vec<LayerReport>,
    /// Peak of the kernels on one core with all data in registers and the L1 cache, in 1e9 multiply-adds per second.
    pub peak_gmacs: Option<f64>,
}

/// The time of a layer of the backbone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// Name of the layer, as in [`LayerProfile::name`].
    pub what: String,
    /// Number of multiply-adds per frame.
    pub multiply_adds: u64,
    /// Median time, in milliseconds.
    pub median_ms: f64,
    /// Fraction of the peak of as many cores as there are threads, 0–1.
    pub share_of_peak: f64,
}

/// The times of the stages of a frame.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageReport {
    /// Decoding of the image.
    pub decode: TimingStats,
    /// Preprocessing.
    pub preprocess: TimingStats,
    /// The backbone.
    pub backbone: TimingStats,
    /// The head and out-of-distribution detection.
    pub head: TimingStats,
    /// The whole frame, as in [`StageTimes::frame`].
    pub frame: TimingStats,
}

/// Statistics of repeated measurements of a time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TimingStats {
    /// Median, in milliseconds.
    pub median_ms: f64,
    /// 99th percentile, in milliseconds.
    pub p99_ms: f64,
    /// Number of measurements.
    pub runs: usize,
}

impl TimingStats {
    /// Computes the median and the 99th percentile by nearest rank; both are 0 if there are no times.
    pub fn from_times(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let percentile_ms = |fraction: f64| {
            let rank = (fraction * times.len() as f64).ceil() as usize;
            times.get(rank.saturating_sub(1)).map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        TimingStats { median_ms: percentile_ms(0.5), p99_ms: percentile_ms(0.99), runs: times.len() }
    }
}

impl StageReport {
    /// Computes the statistics of each stage over the frames.
    pub fn from_frames(frames: &[StageTimes]) -> Self {
        let stats = |stage: fn(&StageTimes) -> Duration| TimingStats::from_times(frames.iter().map(stage).collect());
        StageReport {
            decode: stats(|times| times.decode),
            preprocess: stats(|times| times.preprocess),
            backbone: stats(|times| times.backbone),
            head: stats(|times| times.head),
            frame: stats(StageTimes::frame),
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
        for (name, stats) in stages {
            writeln!(f, "{name:12} {:10.3} {:10.3}", stats.median_ms, stats.p99_ms)?;
        }
        Ok(())
    }
}

impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} frames, threads: {}, kernels: {}\n", self.stages.frame.runs, self.threads, self.kernels)?;
        self.stages.fmt(f)?;
        let TimingStats { median_ms, p99_ms, .. } = self.backbone_alone;
        writeln!(f, "\nbackbone alone: median {median_ms:.3} ms, p99 {p99_ms:.3} ms")?;
        let Some(peak) = self.peak_gmacs.filter(|_| !self.layers.is_empty()) else { return Ok(()) };
        writeln!(f, "\n{:58} {:>9} {:>10} {:>9}", "layer", "M MACs", "median ms", "of peak")?;
        for LayerReport { what, multiply_adds, median_ms, share_of_peak } in &self.layers {
            let (millions, share) = (*multiply_adds as f64 / 1e6, share_of_peak * 100.0);
            writeln!(f, "{what:58} {millions:9.2} {median_ms:10.3} {share:7.0} %")?;
        }
        writeln!(f, "peak: {peak:.1} GMAC/s per core, with all data in the L1 cache")
    }
}

impl LayerReport {
    /// Computes the reports of all layers. `runs`: at least one, with the same layers each; `peak`: in multiply-adds per second.
    fn from_runs(runs: &[Vec<LayerProfile>], peak: f64) -> Vec<Self> {
        let report = |(index, layer): (usize, &LayerProfile)| {
            let stats = TimingStats::from_times(runs.iter().map(|layers| layers[index].time).collect());
            let TimingStats { median_ms, .. } = stats;
            let share_of_peak = layer.macs as f64 / (median_ms / 1e3) / peak;
            LayerReport { what: layer.name.clone(), multiply_adds: layer.macs, median_ms, share_of_peak }
        };
        runs[0].iter().enumerate().map(report).collect()
    }
}

/// A classifier under test.
pub struct Bench {
    classifier: Classifier,
    threads: usize,
    kernels: Option<Isa>,
}

impl Bench {
    /// Loads the classifier. `backbone`: the ONNX file that the model was trained on, if neither the program nor the bundle has
    /// it; `kernels`: the kernels that compute it, `None` for tract's operators; `threads`: threads that compute one frame, at least 1.
    ///
    /// # Errors
    /// If the threads cannot be started or the network cannot be loaded.
    pub fn new(
        bundle: &Bundle,
        backbone: Option<&Path>,
        kernels: Option<Isa>,
        threads: usize,
    ) -> Result<Self, BenchError> {
        let thread_pool = ThreadPool::with_threads(threads).map_err(BenchError::Threads)?;
        let backbone = bundle
            .compile_backbone(&bundle.onnx_backbone(backbone)?.with_kernels(kernels).with_thread_pool(thread_pool))?;
        let (classifier, kernels) = (Classifier::new(&backbone, bundle.classifier_params())?, backbone.kernels());
        // tract computes a frame on one thread.
        let threads = if kernels.is_some() { threads } else { 1 };
        Ok(Bench { classifier, threads, kernels })
    }

    /// Decodes and classifies an image `runs` times, at least once: the file `image`, or else the test pattern of 640×480.
    ///
    /// # Errors
    /// If the image cannot be decoded or the backbone fails.
    pub fn run(&mut self, image: Option<&Path>, runs: usize) -> Result<BenchReport, BenchError> {
        let image_error = |source| BenchError::Image {
            file: image.map_or("test pattern".into(), |path| path.display().to_string()),
            source,
        };
        let jpeg = match image {
            Some(path) => decode::read_file(path).map_err(image_error)?,
            None => test_pattern::jpeg(640, 480),
        };
        let mut frames = Vec::with_capacity(runs);
        for run in 0..WARM_UP + runs.max(1) {
            let started = Instant::now();
            let pixels = decode::encoded(&jpeg).map_err(image_error)?;
            let decode = started.elapsed();
            let (_, times) = self.classifier.classify(&pixels)?;
            if run >= WARM_UP {
                frames.push(StageTimes { decode, ..times });
            }
        }
        let (mut alone, mut layers) = (Vec::new(), Vec::new());
        for _ in 0..runs.max(1) {
            alone.push(self.classifier.backbone_alone()?);
            layers.push(self.classifier.layer_profiles());
        }
        let peak = self.kernels.map(peak_macs_per_second);
        Ok(BenchReport {
            threads: self.threads,
            kernels: self.kernels.map_or("tract", Isa::name),
            stages: StageReport::from_frames(&frames),
            backbone_alone: TimingStats::from_times(alone),
            layers: LayerReport::from_runs(&layers, peak.unwrap_or(f64::INFINITY) * self.threads as f64),
            peak_gmacs: peak.map(|peak| peak / 1e9),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_use_the_nearest_rank() {
        let times = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!(TimingStats::from_times(times), TimingStats { median_ms: 100.0, p99_ms: 198.0, runs: 200 });
        let single = TimingStats::from_times(vec![Duration::from_millis(3)]);
        assert_eq!(single, TimingStats { median_ms: 3.0, p99_ms: 3.0, runs: 1 });
    }
}
