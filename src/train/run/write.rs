//! What a run writes into its folder, as it goes: the settings first, the bundle last, so that a bundle that
//! is there belongs to a run that is finished.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bundle::selftest::SelfTestError;
use crate::bundle::tensors;
use crate::bundle::{Bundle, BundleError, Contents, Manifest, SelfTest};
use crate::train::evaluate::Evaluation;
use crate::train::optim::sgd::{Epoch, ParamGroup};
use crate::train::report::tensorboard::{self, Events};
use crate::train::report::tensorboard_images;
use crate::train::report::{self, Gallery};
use crate::train::run::outcome::{Parameters, RunOptions, Trained};
use crate::train::run::settings::{Recipe, Settings};
use crate::vision::backbone::Device;
use crate::vision::{BackboneError, Classifier, Network, test_pattern};

pub const MODEL: &str = "model.bloom";
pub const METRICS: &str = "metrics.json";
pub const CONFIG: &str = "config.toml";
pub const REPORT: &str = "report.html";
const CHECKPOINTS: &str = "checkpoints";
/// Drawn for the self-test, so that nobody's photographs travel: wider than high, and higher than wide.
const SELF_TEST_SIZES: [(u32, u32); 2] = [(320, 240), (97, 131)];

#[derive(Debug, thiserror::Error)]
pub enum RunWriterError {
    #[error("{path}: {reason}")]
    Io { path: PathBuf, reason: String },
    #[error("{0}: holds a finished run; name another folder, or --overwrite it")]
    There(PathBuf),
    #[error("{folder}: holds {file}, which is no run's; name another folder")]
    NoRun { folder: PathBuf, file: PathBuf },
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
}

/// The figures of a finished run, as `metrics.json` holds them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunFigures {
    pub name: String,
    pub recipe: Recipe,
    pub seed: u64,
    pub seconds: f64,
    /// What computed the features.
    pub device: Device,
    pub train_images: usize,
    pub parameters: Parameters,
    /// The epoch whose numbers were kept.
    pub best_epoch: usize,
    /// Of the photographs that it was measured on.
    pub val_sha256: String,
    pub val: Evaluation,
    pub test: Option<Evaluation>,
    pub epochs: Vec<Epoch>,
}

/// The folder of a run.
pub struct RunWriter {
    folder: PathBuf,
    settings: Settings,
    threads: usize,
    events: Events,
}

impl RunWriter {
    /// Refuses a folder whose content would be lost: a finished run, or files that are no run's.
    pub fn check(folder: &Path, overwrite: bool) -> Result<(), RunWriterError> {
        if folder.join(MODEL).exists() && !overwrite {
            return Err(RunWriterError::There(folder.into()));
        }
        let is_run = |name: &str| [CONFIG, CHECKPOINTS].contains(&name) || is_result(name);
        if folder.exists() {
            for entry in at(folder, fs::read_dir(folder))? {
                let name = at(folder, entry)?.file_name();
                if !is_run(&name.to_string_lossy()) {
                    return Err(RunWriterError::NoRun { folder: folder.into(), file: name.into() });
                }
            }
        }
        Ok(())
    }

    /// Makes the folder, clears what an earlier run left there, and writes the settings.
    pub fn begin(settings: &Settings, surroundings: &RunOptions) -> Result<Self, RunWriterError> {
        let folder = surroundings.out.clone();
        let checkpoints = folder.join(CHECKPOINTS);
        at(&checkpoints, fs::create_dir_all(&checkpoints))?;
        remove(&folder, is_result)?;
        remove(&checkpoints, is_checkpoint)?;
        let config = folder.join(CONFIG);
        at(&config, fs::write(&config, settings.to_toml()))?;
        let events = at(&folder, Events::create(&folder, surroundings.created_at))?;
        Ok(RunWriter { folder, settings: settings.clone(), threads: surroundings.threads, events })
    }

    /// Notes an epoch; keeps its numbers where it is the best so far, and drops those of the one before.
    pub fn epoch(&mut self, epoch: &Epoch, groups: &[ParamGroup]) -> Result<(), RunWriterError> {
        let scalars = [
            ("loss/train", f64::from(epoch.train_loss)),
            ("loss/val", epoch.val.loss),
            ("accuracy/val", epoch.val.accuracy),
            ("learning_rate", f64::from(epoch.learning_rate)),
        ];
        let noted = self.events.scalars(epoch.epoch, &scalars);
        at(self.events.path(), noted)?;
        if epoch.best {
            let name = format!("epoch-{:03}-val-loss-{:.4}.safetensors", epoch.epoch, epoch.val.loss);
            let tensors: Vec<_> = groups.iter().map(|g| (g.name, vec![g.values.len()], g.values.as_slice())).collect();
            self.write(&format!("{CHECKPOINTS}/{name}"), &tensors::to_bytes(&tensors))?;
            remove(&self.folder.join(CHECKPOINTS), |there| is_checkpoint(there) && there != name)?;
        }
        Ok(())
    }

    /// Writes what there is to say of the run, and then the bundle.
    pub fn finish(mut self, network: &Network, manifest: Manifest, trained: &Trained) -> Result<(), RunWriterError> {
        let figures = RunFigures {
            name: self.settings.name.clone(),
            recipe: self.settings.recipe,
            seed: self.settings.sgd.seed,
            seconds: trained.time.as_secs_f64(),
            device: network.device(),
            train_images: trained.train_images.iter().sum(),
            parameters: trained.parameters,
            best_epoch: trained.best_epoch(),
            val_sha256: trained.val.fingerprint(&trained.labels),
            val: trained.val.evaluation.clone(),
            test: trained.test.as_ref().map(|test| test.evaluation.clone()),
            epochs: trained.history.clone(),
        };
        let json = serde_json::to_string_pretty(&figures).expect("figures can be written as JSON");
        self.write(METRICS, (json + "\n").as_bytes())?;
        let gallery = Gallery::choose(&self.settings, network, trained, self.threads)?;
        self.write(REPORT, report::html(&self.settings, network, trained, &gallery).as_bytes())?;
        let drawn = self.draw(trained, &gallery);
        at(self.events.path(), drawn)?;
        let parts = Contents {
            head: trained.head.clone(),
            ood: trained.ood.clone(),
            last_conv: trained.last_conv.clone(),
            backbone: self.settings.embed_backbone.then(|| network.onnx().to_vec()),
            self_test: None,
        };
        let mut bundle = Bundle::new(manifest, parts);
        // As the devices will answer, whatever computed the features.
        let mut classifier = Classifier::new(&bundle.backbone(&network.on(Device::Cpu))?, bundle.classifier_params())?;
        let images = SELF_TEST_SIZES.map(|(width, height)| test_pattern::jpeg(width, height)).to_vec();
        bundle.set_self_test(SelfTest::record(&mut classifier, trained.examples.clone(), images)?);
        Ok(bundle.write(&self.folder.join(MODEL))?)
    }

    /// The pictures for TensorBoard.
    fn draw(&mut self, trained: &Trained, gallery: &Gallery) -> io::Result<()> {
        let step = trained.best_epoch();
        let confusion = tensorboard_images::confusion(&trained.labels, &trained.val.evaluation.confusion);
        self.events.image(step, "confusion", &confusion)?;
        self.events.image(step, "predictions", &tensorboard_images::sheet(&gallery.sheet, report::SHEET_COLUMNS))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), RunWriterError> {
        let path = self.folder.join(name);
        at(&path, fs::write(&path, bytes))
    }
}

/// What a run writes beside its settings and checkpoints; the bundle may stand there in part.
fn is_result(name: &str) -> bool {
    [METRICS, REPORT].contains(&name) || [MODEL, tensorboard::PREFIX].iter().any(|begin| name.starts_with(begin))
}

fn is_checkpoint(name: &str) -> bool {
    name.starts_with("epoch-") && name.ends_with(".safetensors")
}

/// Removes the files of a folder whose names are `unwanted`.
fn remove(folder: &Path, unwanted: impl Fn(&str) -> bool) -> Result<(), RunWriterError> {
    for entry in at(folder, fs::read_dir(folder))? {
        let path = at(folder, entry)?.path();
        if path.file_name().is_some_and(|name| unwanted(&name.to_string_lossy())) {
            at(&path, fs::remove_file(&path))?;
        }
    }
    Ok(())
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, RunWriterError> {
    result.map_err(|e| RunWriterError::Io { path: path.into(), reason: e.to_string() })
}
