//! A training run: photographs in, a bundle and what there is to say of it out.

pub mod outcome;
pub mod settings;
pub mod write;

use std::convert::Infallible;
use std::mem::take;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use humantime::format_rfc3339_millis;

use crate::bundle::archive::FILE_BYTES_MAX;
use crate::bundle::manifest::FORMAT;
use crate::bundle::{BackboneRef, DatasetRef, Manifest, Metrics, Unknown, UnknownRule};
use crate::system::memory;
use crate::train::data::augment::Views;
use crate::train::data::dataset::{Dataset, DatasetError, fingerprint};
use crate::train::data::photographs::{Finding, Photograph, Photographs};
use crate::train::evaluate::EvaluatedSet;
use crate::train::features::device;
use crate::train::features::pool;
use crate::train::features::{CacheTrouble, Extractor, Features, Precision};
use crate::train::optim::head::HeadLearner;
use crate::train::optim::last_conv::LastConvLearner;
use crate::train::optim::ood;
use crate::train::optim::sgd::{self, Epoch, ParamGroup};
use crate::train::optim::temperature;
use crate::train::run::outcome::{Parameters, RunOptions, Trained};
use crate::train::run::settings::{FineTune, Settings, SettingsError};
use crate::train::run::write::{RunWriter, RunWriterError};
use crate::vision::classifier::ClassifierParams;
use crate::vision::head::{HeadError, argmax, linear};
use crate::vision::last_conv::LastConvError;
use crate::vision::ood::OodError;
use crate::vision::{
    Backbone, BackboneError, Head, Labels, LastConvWeights, Network, OodDetector, Prediction, Preprocess,
};

/// Directions of the subspace that tells flowers from other things: with fewer, more of the other
/// things pass; with more, the bundle grows and nothing is gained.
const RANK: usize = 128;
/// What a bundle holds beside a network that it carries is smaller.
const ROOM: u64 = 16 << 20;

/// What a run is doing.
#[derive(Debug, Clone)]
pub enum Progress {
    /// Something does not go as asked for; the run goes on.
    Warning(String),
    /// Files whose content is known, of how many.
    Read {
        done: usize,
        of: usize,
    },
    /// Photographs whose features are known, of how many.
    Features {
        done: usize,
        of: usize,
    },
    Epoch {
        epoch: Epoch,
        of: usize,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error("{path}: of the class {class} no image is left to {purpose}{why}")]
    NothingLeft { path: PathBuf, class: String, purpose: &'static str, why: String },
    #[error("{name}: {bytes} bytes, too large for a bundle to carry")]
    TooLargeToEmbed { name: String, bytes: usize },
    #[error(
        "what the network says of the photographs takes {needed} MiB, {free} are free: fewer views (--augment) take less"
    )]
    NoRoom { needed: u64, free: u64 },
    #[error("the loss was no number in epoch {0}: a smaller learning rate may help")]
    NoNumber(usize),
    #[error("training gave no usable head: {0}; a smaller learning rate may help")]
    Diverged(#[from] HeadError),
    #[error("training gave no usable convolution: {0}; a smaller learning rate may help")]
    LastConvDiverged(#[from] LastConvError),
    #[error("training gave no usable subspace: {0}")]
    OodDetector(#[from] OodError),
    #[error(transparent)]
    RunWriter(#[from] RunWriterError),
}

/// Trains, measures, and writes the run's folder, the bundle last. What can be known to be wrong is said before anything
/// is computed or removed.
pub fn train(
    settings: &Settings,
    surroundings: &RunOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Trained, TrainError> {
    let began = Instant::now();
    settings.check()?;
    RunWriter::check(&surroundings.out, surroundings.overwrite)?;
    let dataset = Dataset::read(&settings.dataset)?;
    let session = Session::new(settings, surroundings, progress, dataset.classes.clone())?;
    let test = settings.test.as_deref().map(|path| session.dataset_like(path)).transpose()?;
    let sets = session.sets(&dataset)?;
    let known = Photographs { kept: [&sets.train.kept[..], &sets.val.kept].concat(), left_out: Vec::new() };
    let mut record = RunWriter::begin(settings, surroundings)?;
    let seen = session.seen(sets)?;
    let (learned, history) = session.learn(&seen, &mut record)?;
    let mut trained = session.judge(seen, learned, history)?;
    if let Some(test) = &test {
        trained.test = Some(session.test(test, &known, &mut trained)?);
    }
    trained.time = began.elapsed();
    let manifest = session.manifest(&trained);
    record.finish(&session.network, manifest, &trained)?;
    Ok(trained)
}

struct Session<'a> {
    settings: &'a Settings,
    surroundings: &'a RunOptions,
    progress: &'a (dyn Fn(Progress) + Sync),
    labels: Labels,
    network: Network,
    /// What gives the features; or the maps that enter the last convolution, where that is trained.
    backbone: Backbone,
}

/// What to learn from and what to measure on.
struct Sets {
    train: Photographs,
    val: Photographs,
}

/// The same as the frozen part of the network sees it.
struct Seen {
    train: Features,
    val: Features,
    left_out: Vec<Finding>,
}

/// What training gave.
struct Learned {
    last_conv: Option<LastConvWeights>,
    /// `[classes, width]` and `[classes]`.
    head: (Vec<f32>, Vec<f32>),
}

impl<'a> Session<'a> {
    fn new(
        settings: &'a Settings,
        surroundings: &'a RunOptions,
        progress: &'a (dyn Fn(Progress) + Sync),
        labels: Labels,
    ) -> Result<Self, TrainError> {
        let network = match &settings.backbone {
            None => Network::built_in()?,
            Some(named) => Network::from_file(&named.file, &named.preprocess, named.feature.as_deref())?,
        };
        if settings.embed_backbone && network.onnx().len() as u64 > FILE_BYTES_MAX - ROOM {
            return Err(TrainError::TooLargeToEmbed { name: network.name().into(), bytes: network.onnx().len() });
        }
        let make = |network: &Network| match settings.fine_tune {
            FineTune::None => network.features(None),
            FineTune::LastConv => network.feature_maps(),
        };
        let (network, backbone, cpu_because) = device::choose(network, surroundings.device, &make)?;
        if let Some(why) = cpu_because {
            progress(Progress::Warning(why));
        }
        Ok(Session { settings, surroundings, progress, labels, network, backbone })
    }

    fn preprocess(&self) -> Preprocess {
        self.settings.preprocess()
    }

    /// The photographs; none stands in both sets, and every class in each.
    fn sets(&self, dataset: &Dataset) -> Result<Sets, TrainError> {
        let read = |set: &Dataset| {
            let of = set.images.len();
            let told = |done| (self.progress)(Progress::Read { done, of });
            Photographs::read(set, self.surroundings.threads, &told).dedup(None)
        };
        let sets = match &self.settings.val {
            Some(path) => {
                let val = read(&self.dataset_like(path)?);
                Sets { train: read(dataset).dedup(Some(&val)), val }
            }
            None => {
                let (train, val) = read(dataset).split(self.settings.val_fraction);
                Sets { train, val }
            }
        };
        let left_out = [&sets.train.left_out[..], &sets.val.left_out].concat();
        self.every_class_is_in(&sets.train.kept, &self.settings.dataset, "learn from", &left_out)?;
        self.every_class_is_in(&sets.val.kept, self.val_path(), "measure on", &left_out)?;
        Ok(sets)
    }

    fn val_path(&self) -> &Path {
        self.settings.val.as_ref().unwrap_or(&self.settings.dataset)
    }

    /// A dataset with the same classes.
    fn dataset_like(&self, path: &Path) -> Result<Dataset, DatasetError> {
        let dataset = Dataset::read(path)?;
        dataset.expect_classes(&self.labels, path)?;
        Ok(dataset)
    }

    fn seen(&self, Sets { train, val }: Sets) -> Result<Seen, TrainError> {
        let views = Views { count: self.settings.views, seed: self.settings.sgd.seed };
        let precision = match self.settings.fine_tune {
            FineTune::None => Precision::Single,
            FineTune::LastConv => Precision::Half,
        };
        self.expect_room(
            train.kept.len() * views.count * precision.bytes() + val.kept.len() * Precision::Single.bytes(),
        )?;
        let of = train.kept.len() + val.kept.len();
        let (mut train_seen, trouble) = self.extract(&train.kept, views, precision, (0, of))?;
        let (mut val_seen, val_trouble) =
            self.extract(&val.kept, Views::ONE, Precision::Single, (train.kept.len(), of))?;
        let left_out = [train.left_out, take(&mut train_seen.left_out), val.left_out, take(&mut val_seen.left_out)];
        let left_out = left_out.concat();
        self.every_class_is_in(&train_seen.images, &self.settings.dataset, "learn from", &left_out)?;
        self.every_class_is_in(&val_seen.images, self.val_path(), "measure on", &left_out)?;
        if let Some(error) = trouble.or(val_trouble) {
            (self.progress)(Progress::Warning(format!("features could not be kept for the next run: {error}")));
        }
        Ok(Seen { train: train_seen, val: val_seen, left_out })
    }

    /// Refuses what would not fit into memory, before hours are spent on it. `per_number`: bytes for each number that
    /// the backbone gives.
    fn expect_room(&self, per_number: usize) -> Result<(), TrainError> {
        let needed = (per_number * self.backbone.width()) as u64;
        match memory::available() {
            Some(free) if needed > free => Err(TrainError::NoRoom { needed: needed >> 20, free: free >> 20 }),
            _ => Ok(()),
        }
    }

    /// What the backbone gives. `told`: how many were done before, and how many there are.
    fn extract(
        &self,
        images: &[Photograph],
        views: Views,
        precision: Precision,
        told: (usize, usize),
    ) -> Result<(Features, CacheTrouble), BackboneError> {
        let map = match self.settings.fine_tune {
            FineTune::None => None,
            FineTune::LastConv => Some(self.network.last_conv()?.weights.inputs()),
        };
        let extractor = Extractor {
            network: &self.network,
            backbone: &self.backbone,
            map,
            preprocess: &self.preprocess(),
            precision,
            views,
            cache: self.surroundings.cache.as_deref(),
            threads: self.surroundings.threads,
        };
        extractor.run(images, &|done| (self.progress)(Progress::Features { done: told.0 + done, of: told.1 }))
    }

    fn every_class_is_in(
        &self,
        set: &[Photograph],
        path: &Path,
        purpose: &'static str,
        left_out: &[Finding],
    ) -> Result<(), TrainError> {
        let is_there = |class: &usize| set.iter().any(|photograph| photograph.class == *class);
        let Some(missing) = (0..self.labels.names().len()).find(|class| !is_there(class)) else {
            return Ok(());
        };
        let class = self.labels.name(Some(missing)).to_owned();
        let why = match left_out.iter().find(|finding| finding.file.parent() == Some(&path.join(&class))) {
            Some(finding) => format!("; for one, {}: {}", finding.file.display(), finding.problem),
            None if self.settings.val.is_none() => "; more photographs, another --val-fraction or --val help".into(),
            None => String::new(),
        };
        Err(TrainError::NothingLeft { path: path.into(), class, purpose, why })
    }

    fn learn(&self, seen: &Seen, record: &mut RunWriter) -> Result<(Learned, Vec<Epoch>), TrainError> {
        let (classes, sgd) = (self.labels.names().len(), &self.settings.sgd);
        let mut told = |epoch: &Epoch, groups: &[ParamGroup]| {
            (self.progress)(Progress::Epoch { epoch: *epoch, of: sgd.epochs });
            record.epoch(epoch, groups)
        };
        match self.settings.fine_tune {
            FineTune::None => {
                let mut learner = HeadLearner::new(&seen.train, &seen.val, classes, sgd);
                let history = finite(sgd::fit(&mut learner, sgd, &mut told)?)?;
                Ok((Learned { last_conv: None, head: learner.into_numbers() }, history))
            }
            FineTune::LastConv => {
                let own = &self.network.last_conv()?.weights;
                let mut learner =
                    LastConvLearner::new(&seen.train, &seen.val, own, classes, sgd, self.surroundings.threads);
                let history = finite(sgd::fit(&mut learner, sgd, &mut told)?)?;
                let (tail, weight, bias) = learner.numbers()?;
                Ok((Learned { last_conv: Some(tail), head: (weight, bias) }, history))
            }
        }
    }

    /// Calibrates on the validation set, finds what is unknown, and measures.
    fn judge(&self, seen: Seen, learned: Learned, history: Vec<Epoch>) -> Result<Trained, TrainError> {
        let train = self.features_of(&seen.train, learned.last_conv.as_ref());
        let val = self.features_of(&seen.val, learned.last_conv.as_ref());
        let width = train.first().map_or(0, Vec::len);
        let (weight, bias) = learned.head;
        let logits: Vec<Vec<f32>> = val.iter().map(|row| linear(&weight, &bias, row)).collect();
        let head = Head::new(width, weight, bias, temperature::temperature(&logits, &seen.val.classes()))?;
        let subspace = self.subspace(&train, &val)?;
        let params = self.params(&head, &subspace);
        let predictions: Vec<Prediction> = val.iter().map(|row| params.predict(row)).collect();
        let examples = examples(&val, &predictions, &seen.val.classes());
        let val = EvaluatedSet::new(&self.labels, seen.val.images, predictions);
        let classes = seen.train.classes();
        let of_class = |class| classes.iter().filter(|other| **other == class).count();
        let contents = seen.train.images.iter().chain(&val.photographs).map(|image| (image.class, &image.content));
        let dataset = DatasetRef {
            sha256: fingerprint(&self.labels, contents),
            train_images: seen.train.len(),
            val_images: val.photographs.len(),
        };
        Ok(Trained {
            labels: self.labels.clone(),
            parameters: self.parameters(&head),
            dataset,
            train_images: (0..self.labels.names().len()).map(of_class).collect(),
            val,
            test: None,
            history,
            head,
            ood: subspace,
            last_conv: learned.last_conv,
            examples,
            left_out: seen.left_out,
            time: Duration::ZERO,
        })
    }

    fn params(&self, head: &Head, subspace: &OodDetector) -> ClassifierParams {
        ClassifierParams {
            labels: self.labels.clone(),
            head: head.clone(),
            ood: subspace.clone(),
            preprocess: self.preprocess(),
        }
    }

    /// The features of each photograph as it is.
    fn features_of(&self, seen: &Features, tail: Option<&LastConvWeights>) -> Vec<Vec<f32>> {
        let features = |(): &mut (), i: usize| {
            let row = seen.row(i, 0);
            Ok::<_, Infallible>(tail.map_or_else(|| row.to_vec(), |tail| tail.features(&row)))
        };
        let Ok(features) = pool::map(seen.len(), self.surroundings.threads, "tail", || Ok(()), features, &|_| {});
        features
    }

    /// The training set's subspace, with the threshold that rejects the asked share of the validation set.
    fn subspace(&self, train: &[Vec<f32>], val: &[Vec<f32>]) -> Result<OodDetector, OodError> {
        let width = train.first().map_or(0, Vec::len);
        // A subspace that is nearly all there is tells nothing apart.
        let rank = RANK.min(width / 2).max(1);
        let basis = ood::span(train.iter().map(Vec::as_slice), width, rank, self.settings.sgd.seed);
        let open = OodDetector::new(width, basis, 0.0)?;
        let mut similarities: Vec<f32> = val.iter().map(|row| open.similarity(row)).collect();
        similarities.sort_by(f32::total_cmp);
        open.with_threshold(threshold(&similarities, self.settings.reject))
    }

    /// Looks at the test photographs, once. Those that were learned from or measured on are left out.
    fn test(&self, dataset: &Dataset, known: &Photographs, trained: &mut Trained) -> Result<EvaluatedSet, TrainError> {
        let photographs = Photographs::read(dataset, self.surroundings.threads, &|_| {});
        let photographs = photographs.dedup(None).dedup(Some(known));
        let of = photographs.kept.len();
        let (mut seen, _) = self.extract(&photographs.kept, Views::ONE, Precision::Single, (0, of))?;
        let left_out = [photographs.left_out, take(&mut seen.left_out)].concat();
        let path = self.settings.test.as_deref().unwrap_or(Path::new(""));
        self.every_class_is_in(&seen.images, path, "test on", &left_out)?;
        trained.left_out.extend(left_out);
        let features = self.features_of(&seen, trained.last_conv.as_ref());
        let params = self.params(&trained.head, &trained.ood);
        let predictions = features.iter().map(|row| params.predict(row)).collect();
        Ok(EvaluatedSet::new(&self.labels, seen.images, predictions))
    }

    fn parameters(&self, head: &Head) -> Parameters {
        let head = head.weight().len() + head.bias().len();
        let tail = match (self.settings.fine_tune, &self.network.info().last_conv) {
            // Its normalisation has a gain and a shift a channel.
            (FineTune::LastConv, Some(conv)) => conv.weights.weight().len() + 2 * conv.weights.outputs(),
            _ => 0,
        };
        Parameters { total: self.network.info().parameters + head, trained: tail + head }
    }

    fn manifest(&self, trained: &Trained) -> Manifest {
        let evaluation = &trained.val.evaluation;
        let created_at = format_rfc3339_millis(self.surroundings.created_at).to_string();
        Manifest {
            format: FORMAT,
            name: self.settings.name.clone(),
            version: version(&created_at),
            created_at,
            classes: self.labels.clone(),
            backbone: BackboneRef {
                name: self.network.name().into(),
                sha256: self.network.sha256().into(),
                feature: self.network.info().feature.clone(),
                width: trained.head.width(),
            },
            preprocess: self.preprocess(),
            temperature: trained.head.temperature(),
            unknown: Unknown {
                rule: UnknownRule::CosineSubspace,
                threshold: trained.ood.threshold(),
                rejected_share: evaluation.unknown as f32,
            },
            dataset: trained.dataset.clone(),
            metrics: Metrics { accuracy: evaluation.accuracy, loss: evaluation.loss, ece: evaluation.ece },
            seed: self.settings.sgd.seed,
            program: format!("bloomcast {}", env!("CARGO_PKG_VERSION")),
            members: Default::default(),
        }
    }
}

/// Between the similarities of the last photograph that is rejected and the first that is not, so that another machine's
/// rounding moves none across. in: sorted, at least one.
fn threshold(similarities: &[f32], reject: f32) -> f32 {
    let rejected = ((reject * similarities.len() as f32) as usize).min(similarities.len() - 1);
    let first = similarities[rejected];
    let last = rejected.checked_sub(1).map_or(first * 0.98, |last| similarities[last]);
    f32::midpoint(last, first)
}

/// The features of the photograph of each class that is named right, and least surely: it tells a change first. in: `[width]`
/// each, what each was taken for, what each is.
fn examples(features: &[Vec<f32>], predictions: &[Prediction], classes: &[usize]) -> Vec<Vec<f32>> {
    let least_sure = |class: usize| {
        let right = |i: &usize| classes[*i] == class && argmax(&predictions[*i].probabilities) == class;
        let sure = |i: &usize| predictions[*i].probabilities[class];
        (0..features.len()).filter(right).min_by(|a, b| sure(a).total_cmp(&sure(b)))
    };
    let count = predictions.first().map_or(0, |prediction| prediction.probabilities.len());
    let chosen: Vec<usize> = (0..count).filter_map(least_sure).collect();
    // A model that names nothing right still has to answer as it did.
    let chosen = if chosen.is_empty() { vec![0] } else { chosen };
    chosen.into_iter().map(|i| features[i].clone()).collect()
}

/// A loss that is no number ends a training, and what it gave is of no use.
fn finite(history: Vec<Epoch>) -> Result<Vec<Epoch>, TrainError> {
    match history.last() {
        Some(last) if !last.val.loss.is_finite() => Err(TrainError::NoNumber(last.epoch)),
        _ => Ok(history),
    }
}

/// `2026-01-02T03:04:05.678Z` → 20260102030405
fn version(created_at: &str) -> u64 {
    let digits = created_at.bytes().filter(u8::is_ascii_digit).take(14);
    digits.fold(0, |number, digit| number * 10 + u64::from(digit - b'0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_stands_between_two_photographs() {
        let sorted = [0.5, 0.75, 0.8, 0.9];
        assert_eq!(threshold(&sorted, 0.25), 0.625);
        assert_eq!(threshold(&sorted, 0.5), 0.775);
        assert!((0.48..0.5).contains(&threshold(&sorted, 0.0)) && (0.8..0.9).contains(&threshold(&sorted, 1.0)));
    }

    #[test]
    fn versions_are_times_and_grow() {
        assert_eq!(version("2026-01-02T03:04:05.678Z"), 20_260_102_030_405);
        assert!(version("2026-01-02T03:04:05.678Z") < version("2026-10-02T03:04:05.000Z"));
    }
}
