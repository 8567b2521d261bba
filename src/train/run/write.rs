//! Stage 5: writes the run's folder. The settings are written first and the bundle last, so a folder with a bundle holds a
//! finished run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use humantime::format_rfc3339_millis;
use serde::{Deserialize, Serialize};

use crate::bundle::manifest::FORMAT;
use crate::bundle::selftest::SelfTestError;
use crate::bundle::tensors;
use crate::bundle::{
    BackboneRef, Bundle, BundleError, Contents, Manifest, Metrics, OodMeasure, OodParams, ScanRef, SelfTest,
};
use crate::train::evaluate::{Evaluation, KindAcceptance};
use crate::train::optim::training_loop::{Epoch, ParamGroup};
use crate::train::report::tensorboard::{self, EventWriter};
use crate::train::report::tensorboard_images;
use crate::train::report::{self, Gallery};
use crate::train::run::options::RunOptions;
use crate::train::run::outcome::{Parameters, Trained};
use crate::train::run::settings::{Recipe, Settings};
use crate::vision::backbone::ComputeDevice;
use crate::vision::{BackboneError, Classifier, OnnxBackbone, UnknownClasses, test_pattern};

/// The bundle in the folder of a run.
pub const MODEL: &str = "model.bloom";
/// The metrics, as JSON ([`RunMetrics`]).
pub const METRICS: &str = "metrics.json";
/// The settings, as TOML ([`Settings`]).
pub const CONFIG: &str = "config.toml";
/// The report, as HTML.
pub const REPORT: &str = "report.html";
/// The folder of the checkpoint with the best validation loss.
const CHECKPOINTS: &str = "checkpoints";
/// Widths and heights of the test patterns in the self-test, in pixels: landscape and portrait. Generated images keep the
/// users' photographs out of the bundle.
const SELF_TEST_SIZES: [(u32, u32); 2] = [(320, 240), (97, 131)];

/// Error of writing a run's folder.
#[derive(Debug, thiserror::Error)]
pub enum RunWriterError {
    /// A file or folder cannot be read, written or removed.
    #[error("{path}: {reason}")]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// The I/O error.
        reason: String,
    },
    /// The folder holds a finished run that may not be overwritten; its path.
    #[error("{0}: holds a finished run; choose another folder, or replace it with --overwrite")]
    FinishedRun(PathBuf),
    /// The folder holds a file that is not part of a run.
    #[error("{folder}: holds {file}, which is not part of a run; choose another folder")]
    UnknownFile {
        /// Path of the folder.
        folder: PathBuf,
        /// Name of the file, without folder.
        file: PathBuf,
    },
    /// The network cannot run.
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    /// The bundle cannot be made or written.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The self-test of the bundle cannot be recorded.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
}

/// The content of `metrics.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunMetrics {
    /// The model's name.
    pub name: String,
    /// The recipe of the settings.
    pub recipe: Recipe,
    /// Seed of all random choices of the run.
    pub seed: u64,
    /// Duration of the run, up to the writing of its results.
    pub seconds: f64,
    /// The device that extracted the features.
    pub device: ComputeDevice,
    /// Number of training images.
    pub train_images: usize,
    /// Parameter counts of the model.
    pub parameters: Parameters,
    /// The epoch, from 1, whose parameters are kept.
    pub best_epoch: usize,
    /// Fingerprint of the validation set, in hexadecimal.
    pub val_sha256: String,
    /// Metrics on the validation set.
    pub val: Evaluation,
    /// Metrics on the test set, if there is one.
    pub test: Option<Evaluation>,
    /// Validation images of none of the classes that the model takes for one, for each kind.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unknown_kinds: Vec<KindAcceptance>,
    /// Metrics of each finished epoch, in order.
    pub epochs: Vec<Epoch>,
}

/// Writes the folder of a run.
pub struct RunWriter {
    folder: PathBuf,
    settings: Settings,
    threads: usize,
    created_at: SystemTime,
    events: EventWriter,
}

impl RunWriter {
    /// Checks that a run can be written to `folder`.
    ///
    /// # Errors
    /// Fails if the folder holds a finished run and `overwrite` is false, or if it holds files that are not part of a run.
    pub fn check(folder: &Path, overwrite: bool) -> Result<(), RunWriterError> {
        if folder.join(MODEL).exists() && !overwrite {
            return Err(RunWriterError::FinishedRun(folder.into()));
        }
        let is_run_file = |name: &str| [CONFIG, CHECKPOINTS].contains(&name) || is_result(name);
        if folder.exists() {
            for entry in with_path(folder, fs::read_dir(folder))? {
                let name = with_path(folder, entry)?.file_name();
                if !is_run_file(&name.to_string_lossy()) {
                    return Err(RunWriterError::UnknownFile { folder: folder.into(), file: name.into() });
                }
            }
        }
        Ok(())
    }

    /// Creates the folder, removes the files of an earlier run, and writes the settings.
    ///
    /// # Errors
    /// Fails if a file cannot be removed or written.
    ///
    /// # Panics
    /// Panics if a path in `settings` is not UTF-8; [`Settings::check`] rejects that.
    pub fn begin(settings: &Settings, options: &RunOptions) -> Result<Self, RunWriterError> {
        let folder = options.out.clone();
        let checkpoints = folder.join(CHECKPOINTS);
        with_path(&checkpoints, fs::create_dir_all(&checkpoints))?;
        remove(&folder, is_result)?;
        remove(&checkpoints, is_checkpoint)?;
        let config = folder.join(CONFIG);
        with_path(&config, fs::write(&config, settings.to_toml()))?;
        let events = with_path(&folder, EventWriter::create(&folder, options.created_at))?;
        let (threads, created_at) = (options.threads, options.created_at);
        Ok(RunWriter { folder, settings: settings.clone(), threads, created_at, events })
    }

    /// Logs the metrics of an epoch. If it is the best so far, writes a checkpoint of its parameters and removes the previous
    /// one.
    ///
    /// # Errors
    /// Fails if a file cannot be written or removed.
    pub fn epoch(&mut self, epoch: &Epoch, groups: &[ParamGroup]) -> Result<(), RunWriterError> {
        let scalars = [
            ("loss/train", f64::from(epoch.train_loss)),
            ("loss/val", epoch.val.loss),
            ("accuracy/val", epoch.val.accuracy),
            ("learning_rate", f64::from(epoch.learning_rate)),
        ];
        let written = self.events.write_scalars(epoch.epoch, &scalars);
        with_path(self.events.path(), written)?;
        if epoch.best {
            let name = format!("epoch-{:03}-val-loss-{:.4}.safetensors", epoch.epoch, epoch.val.loss);
            let tensors: Vec<_> = groups.iter().map(|g| (g.name, vec![g.values.len()], g.values.as_slice())).collect();
            self.write(&format!("{CHECKPOINTS}/{name}"), &tensors::to_bytes(&tensors))?;
            remove(&self.folder.join(CHECKPOINTS), |other| is_checkpoint(other) && other != name)?;
        }
        Ok(())
    }

    /// Writes the metrics, the report, the images for TensorBoard, and finally the bundle with its self-test.
    ///
    /// # Errors
    /// Fails if a file cannot be written, or if the network fails.
    ///
    /// # Panics
    /// Panics if a thread cannot be started.
    pub fn finish(mut self, network: &OnnxBackbone, trained: &Trained) -> Result<(), RunWriterError> {
        let metrics = RunMetrics {
            name: self.settings.name.clone(),
            recipe: self.settings.recipe,
            seed: self.settings.hyperparams.seed,
            seconds: trained.elapsed.as_secs_f64(),
            device: network.device(),
            train_images: trained.train_images.iter().sum(),
            parameters: trained.parameters,
            best_epoch: trained.best_epoch(),
            val_sha256: trained.val.fingerprint(&trained.labels),
            val: trained.val.evaluation.clone(),
            test: trained.test.as_ref().map(|test| test.evaluation.clone()),
            unknown_kinds: trained.unknown_kinds.clone(),
            epochs: trained.history.clone(),
        };
        let json = serde_json::to_string_pretty(&metrics).expect("metrics serialize to JSON");
        self.write(METRICS, (json + "\n").as_bytes())?;
        let gallery = Gallery::load(&self.settings, network, trained, self.threads)?;
        self.write(REPORT, report::html(&self.settings, network, trained, &gallery).as_bytes())?;
        let written = self.write_images(trained, &gallery);
        with_path(self.events.path(), written)?;
        self.write_bundle(network, trained)
    }

    fn write_bundle(&self, network: &OnnxBackbone, trained: &Trained) -> Result<(), RunWriterError> {
        let parts = Contents {
            head: trained.head.clone(),
            ood: trained.ood.clone(),
            scan: trained.scan.clone(),
            last_conv: trained.last_conv.clone(),
            backbone: self.settings.embed_backbone.then(|| network.onnx().to_vec()),
            self_test: None,
        };
        let mut bundle = Bundle::new(manifest(&self.settings, self.created_at, network, trained), parts);
        // The expected outputs are those of a CPU, as on the devices, also if a GPU extracted the features.
        let mut classifier =
            Classifier::new(&bundle.compile_backbone(&network.on(ComputeDevice::Cpu))?, bundle.classifier_params())?;
        let images = SELF_TEST_SIZES.map(|(width, height)| test_pattern::jpeg(width, height)).to_vec();
        bundle.set_self_test(SelfTest::record(&mut classifier, trained.self_test_features.clone(), images)?);
        Ok(bundle.write(&self.folder.join(MODEL))?)
    }

    /// Writes the images for TensorBoard.
    fn write_images(&mut self, trained: &Trained, gallery: &Gallery) -> io::Result<()> {
        let step = trained.best_epoch();
        let confusion = tensorboard_images::confusion_matrix(&trained.labels, &trained.val.evaluation.confusion);
        self.events.write_image(step, "confusion", &confusion)?;
        let sheet = tensorboard_images::contact_sheet(&gallery.sample, report::SHEET_COLUMNS);
        self.events.write_image(step, "predictions", &sheet)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), RunWriterError> {
        let path = self.folder.join(name);
        with_path(&path, fs::write(&path, bytes))
    }
}

/// Returns the manifest of the trained model, without its members.
fn manifest(settings: &Settings, created_at: SystemTime, network: &OnnxBackbone, trained: &Trained) -> Manifest {
    let evaluation = &trained.val.evaluation;
    let created_at = format_rfc3339_millis(created_at).to_string();
    let mut manifest = Manifest {
        // Both are set below.
        format: FORMAT,
        requires: Vec::new(),
        name: settings.name.clone(),
        version: version(&created_at),
        created_at,
        classes: trained.labels.clone(),
        backbone: BackboneRef {
            name: network.name().into(),
            sha256: network.sha256().into(),
            feature: network.info().feature.clone(),
            width: trained.head.width(),
        },
        preprocess: settings.preprocess(),
        temperature: trained.head.temperature(),
        unknown: OodParams {
            rule: match trained.ood.unknown_classes() {
                None => OodMeasure::CosineSubspace,
                Some(UnknownClasses { log_odds_weight, cosine_threshold, .. }) => OodMeasure::CosineAndClasses {
                    log_odds_weight: *log_odds_weight,
                    cosine_threshold: *cosine_threshold,
                },
            },
            threshold: trained.ood.threshold(),
            rejected_share: evaluation.unknown as f32,
        },
        scan: trained.scan.as_ref().map(|scan| ScanRef { temperature: scan.head.temperature(), offsets: scan.offsets }),
        dataset: trained.dataset.clone(),
        metrics: Metrics { accuracy: evaluation.accuracy, loss: evaluation.loss, ece: evaluation.ece },
        seed: settings.hyperparams.seed,
        program: format!("bloomcast {}", env!("CARGO_PKG_VERSION")),
        members: Default::default(),
    };
    manifest.set_format();
    manifest
}

/// Returns the digits of the date and time: `2026-01-02T03:04:05.678Z` → 20260102030405.
fn version(created_at: &str) -> u64 {
    let digits = created_at.bytes().filter(u8::is_ascii_digit).take(14);
    digits.fold(0, |version, digit| version * 10 + u64::from(digit - b'0'))
}

/// Returns whether `name` is a file that a run writes besides its settings and checkpoints, or a partial bundle.
fn is_result(name: &str) -> bool {
    [METRICS, REPORT].contains(&name) || [MODEL, tensorboard::PREFIX].iter().any(|prefix| name.starts_with(prefix))
}

fn is_checkpoint(name: &str) -> bool {
    name.starts_with("epoch-") && name.ends_with(".safetensors")
}

/// Removes the files in `folder` for whose names `unwanted` returns true.
fn remove(folder: &Path, unwanted: impl Fn(&str) -> bool) -> Result<(), RunWriterError> {
    for entry in with_path(folder, fs::read_dir(folder))? {
        let path = with_path(folder, entry)?.path();
        if path.file_name().is_some_and(|name| unwanted(&name.to_string_lossy())) {
            with_path(&path, fs::remove_file(&path))?;
        }
    }
    Ok(())
}

/// Adds the path to an I/O error.
fn with_path<T>(path: &Path, result: io::Result<T>) -> Result<T, RunWriterError> {
    result.map_err(|e| RunWriterError::Io { path: path.into(), reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_timestamps_in_order() {
        assert_eq!(version("2026-01-02T03:04:05.678Z"), 20_260_102_030_405);
        assert!(version("2026-01-02T03:04:05.678Z") < version("2026-10-02T03:04:05.000Z"));
    }
}
