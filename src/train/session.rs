//! A training run: photographs in, a bundle and its figures out.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use humantime::format_rfc3339_millis;

use super::calibrate;
use super::dataset::{Dataset, DatasetError, fingerprint};
use super::evaluate::Evaluation;
use super::features::{Features, extract};
use super::sgd::{self, Layer, Sgd};
use super::subspace;
use crate::bundle::manifest::FORMAT;
use crate::bundle::{BackboneRef, Bundle, BundleError, DatasetRef, Manifest, Metrics, Unknown, UnknownRule};
use crate::vision::backbone::FEATURES;
use crate::vision::classifier::Skill;
use crate::vision::head::HeadError;
use crate::vision::subspace::SubspaceError;
use crate::vision::{Backbone, BackboneError, Head, Labels, Preprocess, Subspace};

/// Directions of the subspace that tells flowers from other things: with fewer, more of the other
/// things pass; with more, the bundle grows and nothing is gained.
const RANK: usize = 128;

/// What a run measures on.
#[derive(Debug, Clone)]
pub enum Val {
    Folder(PathBuf),
    /// A share of the dataset, 0–1, told apart by the photographs' contents.
    Fraction(f64),
}

/// What a run is asked for.
#[derive(Debug, Clone)]
pub struct Training {
    pub dataset: PathBuf,
    pub val: Val,
    pub out: PathBuf,
    pub name: String,
    pub sgd: Sgd,
    /// Share of the validation photographs that the unknown rule may reject, 0–1.
    pub reject: f32,
    pub threads: usize,
    /// When the run is said to have happened; its version follows from it.
    pub created_at: SystemTime,
}

/// What a run gave.
#[derive(Debug)]
pub struct Trained {
    pub bundle: Bundle,
    pub evaluation: Evaluation,
    pub train_images: usize,
    /// What could not be decoded, and why.
    pub left_out: Vec<(PathBuf, String)>,
}

/// What a run is doing.
#[derive(Debug, Clone, Copy)]
pub enum Progress {
    /// Photographs whose features are known, of how many.
    Features { done: usize, of: usize },
    /// An epoch is over; its mean cross-entropy in nats.
    Epoch { epoch: usize, of: usize, loss: f32 },
}

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error("{path}: of the class {class} no image is left to {purpose}")]
    NothingLeft { path: PathBuf, class: String, purpose: &'static str },
    #[error("training gave no usable head: {0}; a smaller learning rate may help")]
    Diverged(#[from] HeadError),
    #[error("training gave no usable subspace: {0}")]
    Subspace(#[from] SubspaceError),
    #[error("{path}: {reason}")]
    Write { path: PathBuf, reason: String },
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// Trains a head on frozen features and writes `OUT/model.bloom` and `OUT/metrics.json`.
pub fn train(training: &Training, progress: &(dyn Fn(Progress) + Sync)) -> Result<Trained, TrainError> {
    let dataset = Dataset::read(&training.dataset)?;
    let writable = |e: std::io::Error| TrainError::Write { path: training.out.clone(), reason: e.to_string() };
    fs::create_dir_all(&training.out).map_err(writable)?;
    let (backbone, preprocess) = (Backbone::built_in()?, Preprocess::mobilenet_v2());
    let (train_features, val_features) = features(training, &dataset, &backbone, &preprocess, progress)?;

    let classes = dataset.classes.names().len();
    let layer = sgd::fit(&train_features, classes, &training.sgd, &mut |epoch, loss| {
        progress(Progress::Epoch { epoch, of: training.sgd.epochs, loss });
    });
    let skill = Skill {
        head: calibrated(layer, &val_features)?,
        subspace: subspace(training, &train_features, &val_features)?,
        labels: dataset.classes,
        preprocess,
    };
    let evaluation = evaluate(&skill, &val_features);
    let manifest = manifest(training, &backbone, &skill, &evaluation, [&train_features, &val_features]);
    let bundle = Bundle::new(manifest, skill.head, skill.subspace);
    write_run(training, &bundle, &evaluation)?;
    let train_images = train_features.len();
    let left_out = [train_features.left_out, val_features.left_out].concat();
    Ok(Trained { bundle, evaluation, train_images, left_out })
}

/// Of the photographs to learn from, and of those to measure on; none stands in both.
fn features(
    training: &Training,
    dataset: &Dataset,
    backbone: &Backbone,
    preprocess: &Preprocess,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(Features, Features), TrainError> {
    let extract_of = |set: &Dataset, before: usize, of: usize| {
        let tell = |done| progress(Progress::Features { done: before + done, of });
        Ok::<_, TrainError>(extract(backbone, preprocess, &set.images, training.threads, &tell)?.without_doubles(None))
    };
    let (train, val, val_path) = match &training.val {
        Val::Folder(path) => {
            let set = Dataset::read(path)?;
            set.expect_classes(&dataset.classes, path)?;
            let of = dataset.images.len() + set.images.len();
            let (train, val) = (extract_of(dataset, 0, of)?, extract_of(&set, dataset.images.len(), of)?);
            (train.without_doubles(Some(&val)), val, path)
        }
        Val::Fraction(share) => {
            let (train, val) = extract_of(dataset, 0, dataset.images.len())?.split(*share);
            (train, val, &training.dataset)
        }
    };
    every_class_is_there(&train, &dataset.classes, &training.dataset, "learn from")?;
    every_class_is_there(&val, &dataset.classes, val_path, "measure on")?;
    Ok((train, val))
}

/// The figures of a skill on photographs whose features are known.
pub fn evaluate(skill: &Skill, features: &Features) -> Evaluation {
    let predictions: Vec<_> = features.rows().map(|row| skill.judge(row)).collect();
    Evaluation::new(&skill.labels, &predictions, &features.classes)
}

fn every_class_is_there(
    features: &Features,
    labels: &Labels,
    path: &Path,
    purpose: &'static str,
) -> Result<(), TrainError> {
    for (class, name) in labels.names().iter().enumerate() {
        if !features.classes.contains(&class) {
            return Err(TrainError::NothingLeft { path: path.into(), class: name.clone(), purpose });
        }
    }
    Ok(())
}

fn calibrated(layer: Layer, val: &Features) -> Result<Head, HeadError> {
    let logits: Vec<Vec<f32>> = val.rows().map(|row| layer.logits(row)).collect();
    Head::new(layer.width, layer.weight, layer.bias, calibrate::temperature(&logits, &val.classes))
}

/// The training set's subspace, with the threshold that rejects the asked share of the validation set.
fn subspace(training: &Training, train: &Features, val: &Features) -> Result<Subspace, SubspaceError> {
    let basis = subspace::span(train.rows(), train.width, RANK, training.sgd.seed);
    let open = Subspace::new(train.width, basis, 0.0)?;
    let mut similarities: Vec<f32> = val.rows().map(|row| open.similarity(row)).collect();
    similarities.sort_by(f32::total_cmp);
    let rejected = (training.reject * similarities.len() as f32) as usize;
    let threshold = similarities[rejected.min(similarities.len() - 1)];
    open.with_threshold(threshold)
}

fn manifest(
    training: &Training,
    backbone: &Backbone,
    skill: &Skill,
    evaluation: &Evaluation,
    sets: [&Features; 2],
) -> Manifest {
    let [train, val] = sets;
    let contents = sets.into_iter().flat_map(|set| set.classes.iter().copied().zip(&set.contents));
    let created_at = format_rfc3339_millis(training.created_at).to_string();
    Manifest {
        format: FORMAT,
        name: training.name.clone(),
        version: version(&created_at),
        created_at,
        classes: skill.labels.clone(),
        backbone: BackboneRef {
            name: backbone.name().into(),
            sha256: backbone.sha256().into(),
            feature: FEATURES.into(),
            width: backbone.width(),
        },
        preprocess: skill.preprocess.clone(),
        temperature: skill.head.temperature(),
        unknown: Unknown {
            rule: UnknownRule::CosineSubspace,
            threshold: skill.subspace.threshold(),
            rejected_share: training.reject,
        },
        dataset: DatasetRef {
            sha256: fingerprint(&skill.labels, contents),
            train_images: train.len(),
            val_images: val.len(),
        },
        metrics: Metrics { accuracy: evaluation.accuracy, loss: evaluation.loss, ece: evaluation.ece },
        seed: training.sgd.seed,
        program: format!("bloomcast {}", env!("CARGO_PKG_VERSION")),
        members: Default::default(),
    }
}

/// `2026-01-02T03:04:05.678Z` → 20260102030405
fn version(created_at: &str) -> u64 {
    let digits = created_at.bytes().filter(u8::is_ascii_digit).take(14);
    digits.fold(0, |number, digit| number * 10 + u64::from(digit - b'0'))
}

/// The figures first: a bundle that is there belongs to a run that is finished.
fn write_run(training: &Training, bundle: &Bundle, evaluation: &Evaluation) -> Result<(), TrainError> {
    let metrics = training.out.join("metrics.json");
    let json = serde_json::to_string_pretty(evaluation).expect("figures can be written as JSON");
    fs::write(&metrics, json + "\n").map_err(|e| TrainError::Write { path: metrics, reason: e.to_string() })?;
    Ok(bundle.write(&training.out.join("model.bloom"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_times_and_grow() {
        assert_eq!(version("2026-01-02T03:04:05.678Z"), 20_260_102_030_405);
        assert!(version("2026-01-02T03:04:05.678Z") < version("2026-10-02T03:04:05.000Z"));
    }
}
