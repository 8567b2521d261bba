//! What a run writes into its folder, as it goes: the settings first, the bundle last, so that a bundle that
//! is there belongs to a run that is finished.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView, serialize};
use serde::{Deserialize, Serialize};

use super::evaluate::Evaluation;
use super::picture;
use super::report::{self, Gallery};
use super::session::{Parameters, Surroundings, Trained};
use super::settings::{Recipe, Settings};
use super::sgd::{Epoch, Group};
use super::tensorboard::{self, Events};
use crate::bundle::{Bundle, BundleError, Manifest, Parts};
use crate::vision::{BackboneError, Network};

pub const MODEL: &str = "model.bloom";
pub const METRICS: &str = "metrics.json";
pub const CONFIG: &str = "config.toml";
pub const REPORT: &str = "report.html";
const CHECKPOINTS: &str = "checkpoints";

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{path}: {reason}")]
    Io { path: PathBuf, reason: String },
    #[error("{0}: holds a finished run; name another folder, or --overwrite it")]
    There(PathBuf),
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// The figures of a finished run, as `metrics.json` holds them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunFigures {
    pub name: String,
    pub recipe: Recipe,
    pub seed: u64,
    pub seconds: f64,
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
pub struct Record {
    folder: PathBuf,
    settings: Settings,
    threads: usize,
    events: Events,
}

impl Record {
    /// Makes the folder, clears what an unfinished run left there, and writes the settings.
    pub fn begin(settings: &Settings, surroundings: &Surroundings) -> Result<Self, RecordError> {
        let folder = surroundings.out.clone();
        if folder.join(MODEL).exists() && !surroundings.overwrite {
            return Err(RecordError::There(folder));
        }
        let checkpoints = folder.join(CHECKPOINTS);
        at(&checkpoints, fs::create_dir_all(&checkpoints))?;
        let stale = |name: &str| [MODEL, METRICS, REPORT].contains(&name) || name.starts_with(tensorboard::PREFIX);
        remove(&folder, stale)?;
        remove(&checkpoints, |_| true)?;
        let events = at(&folder, Events::create(&folder, surroundings.created_at))?;
        let record = Record { folder, settings: settings.clone(), threads: surroundings.threads, events };
        record.write(CONFIG, settings.to_toml().as_bytes())?;
        Ok(record)
    }

    /// Notes an epoch; keeps its numbers where it is the best so far, and drops those of the one before.
    pub fn epoch(&mut self, epoch: &Epoch, groups: &[Group]) -> Result<(), RecordError> {
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
            self.write(&format!("{CHECKPOINTS}/{name}"), &checkpoint(groups))?;
            remove(&self.folder.join(CHECKPOINTS), |there| there != name)?;
        }
        Ok(())
    }

    /// Writes what there is to say of the run, and then the bundle.
    pub fn finish(mut self, network: &Network, manifest: Manifest, trained: &Trained) -> Result<(), RecordError> {
        let figures = RunFigures {
            name: self.settings.name.clone(),
            recipe: self.settings.recipe,
            seed: self.settings.sgd.seed,
            seconds: trained.time.as_secs_f64(),
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
        let parts = Parts {
            head: trained.head.clone(),
            subspace: trained.subspace.clone(),
            tail: trained.tail.clone(),
            backbone: self.settings.embed_backbone.then(|| network.onnx().to_vec()),
        };
        Ok(Bundle::new(manifest, parts).write(&self.folder.join(MODEL))?)
    }

    /// The pictures for TensorBoard.
    fn draw(&mut self, trained: &Trained, gallery: &Gallery) -> io::Result<()> {
        let step = trained.best_epoch();
        let confusion = picture::confusion(&trained.labels, &trained.val.evaluation.confusion);
        self.events.image(step, "confusion", &confusion)?;
        self.events.image(step, "predictions", &picture::sheet(&gallery.sheet, report::SHEET_COLUMNS))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), RecordError> {
        let path = self.folder.join(name);
        at(&path, fs::write(&path, bytes))
    }
}

/// Removes the files of a folder whose names are `unwanted`.
fn remove(folder: &Path, unwanted: impl Fn(&str) -> bool) -> Result<(), RecordError> {
    for entry in at(folder, fs::read_dir(folder))? {
        let path = at(folder, entry)?.path();
        if path.file_name().is_some_and(|name| unwanted(&name.to_string_lossy())) {
            at(&path, fs::remove_file(&path))?;
        }
    }
    Ok(())
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, RecordError> {
    result.map_err(|e| RecordError::Io { path: path.into(), reason: e.to_string() })
}

fn checkpoint(groups: &[Group]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> =
        groups.iter().map(|group| group.values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = groups.iter().zip(&bytes).map(|(group, bytes)| {
        let view = TensorView::new(Dtype::F32, vec![group.values.len()], bytes);
        (group.name, view.expect("the shape was made from the numbers"))
    });
    serialize(views, None).expect("plain tensors can be written")
}
