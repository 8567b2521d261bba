//! What a run writes into its folder, as it goes: the settings first, the bundle last, so that a bundle that
//! is there belongs to a run that is finished.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView, serialize};
use serde::{Deserialize, Serialize};

use super::evaluate::Evaluation;
use super::session::{Parameters, Surroundings, Trained};
use super::settings::{Recipe, Settings};
use super::sgd::{Epoch, Group};
use crate::bundle::{Bundle, BundleError, Manifest, Parts};
use crate::vision::Network;

pub const MODEL: &str = "model.bloom";
pub const METRICS: &str = "metrics.json";
pub const CONFIG: &str = "config.toml";
const CHECKPOINTS: &str = "checkpoints";

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{path}: {reason}")]
    Io { path: PathBuf, reason: String },
    #[error("{0}: holds a finished run; name another folder, or --overwrite it")]
    There(PathBuf),
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
    pub val: Evaluation,
    pub test: Option<Evaluation>,
    pub epochs: Vec<Epoch>,
}

/// The folder of a run.
pub struct Record {
    folder: PathBuf,
    settings: Settings,
}

impl Record {
    /// Makes the folder, clears what an unfinished run left there, and writes the settings.
    pub fn begin(settings: &Settings, surroundings: &Surroundings) -> Result<Self, RecordError> {
        let folder = surroundings.out.clone();
        if folder.join(MODEL).exists() && !surroundings.overwrite {
            return Err(RecordError::There(folder));
        }
        let record = Record { folder, settings: settings.clone() };
        record.io(&record.folder, fs::create_dir_all(&record.folder))?;
        for name in [MODEL, METRICS] {
            record.remove(&record.folder.join(name))?;
        }
        let checkpoints = record.folder.join(CHECKPOINTS);
        record.io(&checkpoints, fs::create_dir_all(&checkpoints))?;
        record.remove_checkpoints(None)?;
        record.write(CONFIG, settings.to_toml().as_bytes())?;
        Ok(record)
    }

    /// Keeps the numbers of an epoch that is the best so far, and drops those of the one before.
    pub fn epoch(&mut self, epoch: &Epoch, groups: &[Group]) -> Result<(), RecordError> {
        if epoch.best {
            let name = format!("epoch-{:03}-val-loss-{:.4}.safetensors", epoch.epoch, epoch.val.loss);
            let path = Path::new(CHECKPOINTS).join(&name);
            self.write(&path.to_string_lossy(), &checkpoint(groups))?;
            self.remove_checkpoints(Some(&name))?;
        }
        Ok(())
    }

    /// Writes what there is to say of the run, and then the bundle.
    pub fn finish(self, network: &Network, manifest: Manifest, trained: &Trained) -> Result<(), RecordError> {
        let figures = RunFigures {
            name: self.settings.name.clone(),
            recipe: self.settings.recipe,
            seed: self.settings.sgd.seed,
            seconds: trained.time.as_secs_f64(),
            train_images: trained.train_images.iter().sum(),
            parameters: trained.parameters,
            best_epoch: trained.history.iter().rev().find(|epoch| epoch.best).map_or(0, |epoch| epoch.epoch),
            val: trained.val.evaluation.clone(),
            test: trained.test.as_ref().map(|test| test.evaluation.clone()),
            epochs: trained.history.clone(),
        };
        let json = serde_json::to_string_pretty(&figures).expect("figures can be written as JSON");
        self.write(METRICS, (json + "\n").as_bytes())?;
        let parts = Parts {
            head: trained.head.clone(),
            subspace: trained.subspace.clone(),
            tail: trained.tail.clone(),
            backbone: self.settings.embed_backbone.then(|| network.onnx().to_vec()),
        };
        Ok(Bundle::new(manifest, parts).write(&self.folder.join(MODEL))?)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), RecordError> {
        let path = self.folder.join(name);
        self.io(&path, fs::write(&path, bytes))
    }

    fn remove(&self, path: &Path) -> Result<(), RecordError> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => self.io(path, Err(error)),
            _ => Ok(()),
        }
    }

    /// Removes every checkpoint but the one named.
    fn remove_checkpoints(&self, kept: Option<&str>) -> Result<(), RecordError> {
        let folder = self.folder.join(CHECKPOINTS);
        for entry in self.io(&folder, fs::read_dir(&folder))? {
            let path = self.io(&folder, entry)?.path();
            if path.file_name().and_then(|name| name.to_str()) != kept {
                self.remove(&path)?;
            }
        }
        Ok(())
    }

    fn io<T>(&self, path: &Path, result: std::io::Result<T>) -> Result<T, RecordError> {
        result.map_err(|e| RecordError::Io { path: path.into(), reason: e.to_string() })
    }
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
