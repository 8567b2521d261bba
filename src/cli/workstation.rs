//! The commands of a workstation: `train`, `evaluate`, `compare` and `dataset`.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use bloomcast::system::paths::printable;
use bloomcast::train::compare::Comparison;
use bloomcast::train::data::dataset::{Dataset, DatasetProblem};
use bloomcast::train::data::inspect;
use bloomcast::train::evaluate::{Evaluated, Evaluation, KindAcceptance};
use bloomcast::train::features::compute_device::ComputeDeviceChoice;
use bloomcast::train::optim::training_loop::{Optimizer, Schedule};
use bloomcast::train::run::settings::{DEFAULT_VAL_FRACTION, FineTune};
use bloomcast::train::{self, Recipe, RunOptions, Settings};
use clap::{Args, Subcommand, ValueEnum, value_parser};
use serde::Serialize;

use super::backbone::BackboneArgs;
#[cfg(feature = "fetch")]
use super::fetching::DatasetFetchArgs;
use super::progress::Bars;
use super::{Failure, ModelArgs, cores, show};

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Training images, one folder per class
    #[arg(required_unless_present = "config")]
    dataset: Option<PathBuf>,
    /// Output folder: model.bloom, report.html, metrics.json, config.toml, checkpoints and TensorBoard events
    #[arg(long)]
    out: PathBuf,
    /// Repeat the run that wrote this config.toml; other flags override it
    #[arg(long, conflicts_with = "recipe")]
    config: Option<PathBuf>,
    /// Which layers are trained, and the default hyperparameters
    #[arg(long, value_enum, default_value_t = RecipeArg::BEST)]
    recipe: RecipeArg,
    /// More training images, of some or all of the classes; repeatable
    #[arg(long)]
    also: Vec<PathBuf>,
    /// Images of none of the classes, besides the folder unknown of the dataset: each folder in it is a kind; repeatable
    #[arg(long)]
    unknown: Vec<PathBuf>,
    /// Validation images of the same classes [default: a fraction of the dataset]
    #[arg(long, conflicts_with = "val_fraction")]
    val: Option<PathBuf>,
    /// Fraction of the dataset to split off for validation, by a hash of each image's content [default: 0.2]
    #[arg(long)]
    val_fraction: Option<f64>,
    /// Test images of the same classes, evaluated once after training
    #[arg(long)]
    test: Option<PathBuf>,
    /// Name of the model [default: flowers]
    #[arg(long)]
    name: Option<String>,
    /// Fraction of the validation images to reject as unknown [default: 0.04]
    #[arg(long)]
    reject: Option<f32>,
    /// Replace a finished run in --out
    #[arg(long)]
    overwrite: bool,
    /// Number of threads [default: one per core]
    #[arg(long, value_parser = value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Device that extracts the features
    #[arg(long, value_enum, default_value_t)]
    device: DeviceArg,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    training: TrainingArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Training (defaults come from the recipe)")]
struct TrainingArgs {
    /// Layers to train besides the head
    #[arg(long, value_enum)]
    fine_tune: Option<FineTuneArg>,
    /// Views of each image: the original, its horizontal flip, and random augmentations
    #[arg(long, value_name = "VIEWS")]
    augment: Option<usize>,
    /// Largest number of epochs
    #[arg(long)]
    epochs: Option<usize>,
    /// Stop after this many epochs without a lower validation loss; 0 disables early stopping
    #[arg(long)]
    patience: Option<usize>,
    /// Images per mini-batch
    #[arg(long)]
    batch: Option<usize>,
    /// Optimizer
    #[arg(long, value_enum)]
    optimiser: Option<OptimizerArg>,
    /// Peak learning rate
    #[arg(long)]
    learning_rate: Option<f32>,
    /// Learning rate schedule
    #[arg(long, value_enum)]
    schedule: Option<ScheduleArg>,
    /// Epochs in which the learning rate rises linearly from 0
    #[arg(long)]
    warm_up: Option<usize>,
    /// Epochs between two steps of the step schedule
    #[arg(long)]
    step_epochs: Option<usize>,
    /// Factor of the learning rate at each step of the step schedule
    #[arg(long)]
    step_factor: Option<f32>,
    /// Momentum of SGD
    #[arg(long)]
    momentum: Option<f32>,
    /// Use Nesterov momentum with SGD
    #[arg(long)]
    nesterov: Option<bool>,
    /// Weight decay; decoupled with Adam
    #[arg(long)]
    weight_decay: Option<f32>,
    /// Label smoothing, 0 to 1
    #[arg(long)]
    label_smoothing: Option<f32>,
    /// Weight the classes inversely to their frequency
    #[arg(long)]
    balance: Option<bool>,
    /// Dropout rate of the features, with --fine-tune last-conv
    #[arg(long)]
    dropout: Option<f32>,
    /// Seed of all random choices
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    #[command(flatten)]
    backbone: BackboneArgs,
    /// Include the backbone in the bundle, for devices that do not have it
    #[arg(long)]
    embed_backbone: bool,
}

#[derive(Debug, Args)]
struct CacheArgs {
    /// Folder of the feature cache [default: bloomcast/features in the user's cache folder]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Disable the feature cache
    #[arg(long, conflicts_with = "cache")]
    no_cache: bool,
}

#[derive(Debug, Subcommand)]
pub enum DatasetCommand {
    /// Check for files that are not read, broken and small images, duplicates, near-duplicates and conflicting labels; exit 1 if any
    Check(DatasetCheckArgs),
    /// Download TensorFlow's flower_photos: 3,670 images of five classes, 218 MiB
    #[cfg(feature = "fetch")]
    Fetch(DatasetFetchArgs),
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Folders of finished runs
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct DatasetCheckArgs {
    /// Training images, one folder per class
    dataset: PathBuf,
    /// Validation images of the same classes [default: a fraction of the dataset]
    #[arg(long, conflicts_with = "val_fraction")]
    val: Option<PathBuf>,
    /// More training images, as for train; repeatable
    #[arg(long)]
    also: Vec<PathBuf>,
    /// Images of none of the classes, as for train; repeatable
    #[arg(long)]
    unknown: Vec<PathBuf>,
    /// Fraction of the dataset to split off for validation, as in `train`
    #[arg(long, default_value_t = DEFAULT_VAL_FRACTION)]
    val_fraction: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// Labeled images, one folder per class
    dataset: PathBuf,
    /// Images of none of the classes, besides the folder unknown of the dataset: each folder in it is a kind; repeatable
    #[arg(long)]
    unknown: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Values of `--recipe`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum RecipeArg {
    /// The head only, on the original images: seconds
    Frozen,
    /// The head only, with data augmentation
    Augmentation,
    /// The last convolution and the head, with data augmentation: the best results
    LastConv,
    /// As last-conv, with a small learning rate
    LastConvSlow,
}

impl RecipeArg {
    /// [`Recipe::BEST`]
    const BEST: Self = match Recipe::BEST {
        Recipe::Frozen => RecipeArg::Frozen,
        Recipe::Augmentation => RecipeArg::Augmentation,
        Recipe::LastConv => RecipeArg::LastConv,
        Recipe::LastConvSlow => RecipeArg::LastConvSlow,
    };
}

impl From<RecipeArg> for Recipe {
    fn from(arg: RecipeArg) -> Self {
        match arg {
            RecipeArg::Frozen => Recipe::Frozen,
            RecipeArg::Augmentation => Recipe::Augmentation,
            RecipeArg::LastConv => Recipe::LastConv,
            RecipeArg::LastConvSlow => Recipe::LastConvSlow,
        }
    }
}

/// Values of `--device`.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum DeviceArg {
    /// A GPU if the program is built with CUDA and a GPU works; the CPU otherwise
    #[default]
    Auto,
    Cpu,
    /// A GPU; the CPU, with a warning, if no GPU works
    Gpu,
}

impl From<DeviceArg> for ComputeDeviceChoice {
    fn from(arg: DeviceArg) -> Self {
        match arg {
            DeviceArg::Auto => ComputeDeviceChoice::Auto,
            DeviceArg::Cpu => ComputeDeviceChoice::Cpu,
            DeviceArg::Gpu => ComputeDeviceChoice::Gpu,
        }
    }
}

/// Values of `--fine-tune`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum FineTuneArg {
    /// The head only
    None,
    /// The last convolution with its batch normalization, and the head
    LastConv,
}

impl From<FineTuneArg> for FineTune {
    fn from(arg: FineTuneArg) -> Self {
        match arg {
            FineTuneArg::None => FineTune::None,
            FineTuneArg::LastConv => FineTune::LastConv,
        }
    }
}

/// Values of `--optimiser`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum OptimizerArg {
    /// Stochastic gradient descent with momentum
    Sgd,
    /// Adam with decoupled weight decay
    Adam,
}

impl From<OptimizerArg> for Optimizer {
    fn from(arg: OptimizerArg) -> Self {
        match arg {
            OptimizerArg::Sgd => Optimizer::Sgd,
            OptimizerArg::Adam => Optimizer::Adam,
        }
    }
}

/// Values of `--schedule`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ScheduleArg {
    Constant,
    /// Multiplied by --step-factor every --step-epochs
    Step,
    /// Cosine annealing to 0
    Cosine,
}

impl From<ScheduleArg> for Schedule {
    fn from(arg: ScheduleArg) -> Self {
        match arg {
            ScheduleArg::Constant => Schedule::Constant,
            ScheduleArg::Step => Schedule::Step,
            ScheduleArg::Cosine => Schedule::Cosine,
        }
    }
}

pub fn train(args: TrainArgs) -> Result<(), Failure> {
    let options = RunOptions {
        out: args.out.clone(),
        overwrite: args.overwrite,
        cache: args.cache.folder(),
        threads: args.threads.map_or_else(cores, usize::from),
        device: args.device.into(),
        created_at: created_at()?,
    };
    let settings = args.settings()?;
    settings.check().map_err(Failure::usage)?;
    let bars = Bars::default();
    let trained = train::train(&settings, &options, &|progress| bars.train(progress))?;
    drop(bars);
    print_skipped(&trained.skipped);
    write!(std::io::stdout().lock(), "{trained}")?;
    Ok(())
}

impl TrainArgs {
    /// Returns the settings of the recipe or the file, overridden by the flags.
    fn settings(self) -> Result<Settings, Failure> {
        let mut settings = match &self.config {
            Some(path) => Settings::read(path)?,
            None => Recipe::from(self.recipe).settings(PathBuf::new()),
        };
        set(&mut settings.dataset, absolute(self.dataset)?);
        if self.val_fraction.is_some() {
            settings.val = None;
        }
        settings.val = absolute(self.val)?.or(settings.val);
        settings.test = absolute(self.test)?.or(settings.test);
        for (folders, setting) in [(self.also, &mut settings.also), (self.unknown, &mut settings.unknown)] {
            if !folders.is_empty() {
                *setting = folders.into_iter().map(std::path::absolute).collect::<Result<_, _>>()?;
            }
        }
        set(&mut settings.val_fraction, self.val_fraction);
        set(&mut settings.name, self.name);
        set(&mut settings.reject, self.reject);
        settings.embed_backbone |= self.network.embed_backbone;
        if let Some(backbone) = self.network.backbone.file()? {
            settings.backbone = Some(backbone);
        }
        let training = self.training;
        set(&mut settings.fine_tune, training.fine_tune.map(Into::into));
        set(&mut settings.views, training.augment);
        let hyperparams = &mut settings.hyperparams;
        set(&mut hyperparams.epochs, training.epochs);
        set(&mut hyperparams.patience, training.patience);
        set(&mut hyperparams.batch, training.batch);
        set(&mut hyperparams.optimizer, training.optimiser.map(Into::into));
        set(&mut hyperparams.learning_rate, training.learning_rate);
        set(&mut hyperparams.schedule, training.schedule.map(Into::into));
        set(&mut hyperparams.warm_up, training.warm_up);
        set(&mut hyperparams.step_epochs, training.step_epochs);
        set(&mut hyperparams.step_factor, training.step_factor);
        set(&mut hyperparams.momentum, training.momentum);
        set(&mut hyperparams.nesterov, training.nesterov);
        set(&mut hyperparams.weight_decay, training.weight_decay);
        set(&mut hyperparams.label_smoothing, training.label_smoothing);
        set(&mut hyperparams.balance, training.balance);
        set(&mut hyperparams.dropout, training.dropout);
        set(&mut hyperparams.seed, training.seed);
        training.expect_used(&settings)?;
        Ok(settings)
    }
}

impl TrainingArgs {
    /// Rejects flags that have no effect with the other settings.
    fn expect_used(&self, settings: &Settings) -> Result<(), Failure> {
        let hyperparams = &settings.hyperparams;
        let momentum = self.momentum.is_some() || self.nesterov.is_some();
        let step = self.step_epochs.is_some() || self.step_factor.is_some();
        for (unused, message) in [
            (
                momentum && hyperparams.optimizer != Optimizer::Sgd,
                "--momentum and --nesterov belong to --optimiser sgd",
            ),
            (
                step && hyperparams.schedule != Schedule::Step,
                "--step-epochs and --step-factor belong to --schedule step",
            ),
            (
                self.dropout.is_some() && settings.fine_tune == FineTune::None,
                "--dropout belongs to --fine-tune last-conv",
            ),
        ] {
            if unused {
                return Err(Failure::usage(anyhow!(message)));
            }
        }
        Ok(())
    }
}

/// Makes a path absolute, so that `config.toml` does not depend on the working directory.
fn absolute(path: Option<PathBuf>) -> std::io::Result<Option<PathBuf>> {
    path.map(std::path::absolute).transpose()
}

/// Overrides a setting with a flag, if it is given.
fn set<T>(setting: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *setting = value;
    }
}

impl CacheArgs {
    /// Returns the root folder of the cache; `None` if it is disabled.
    fn folder(&self) -> Option<PathBuf> {
        if self.no_cache {
            return None;
        }
        self.cache.clone().or_else(|| bloomcast::system::paths::user_cache().map(|cache| cache.join("features")))
    }
}

pub fn dataset_check(args: &DatasetCheckArgs) -> Result<(), Failure> {
    let mut dataset = Dataset::read(&args.dataset)?;
    args.also.iter().try_for_each(|folder| dataset.add(folder))?;
    args.unknown.iter().try_for_each(|folder| dataset.add_unknown(folder))?;
    let val = args.val.as_deref().map(Dataset::read).transpose()?;
    if let (Some(val), Some(path)) = (&val, &args.val) {
        val.expect_classes(&dataset.classes, path)?;
    }
    let val = val.map(|val| val.with_kinds_of(&mut dataset));
    let total = dataset.images.len() + val.as_ref().map_or(0, |val| val.images.len());
    let bars = Bars::default();
    let progress = |done: usize| bars.show("images", done as u64, total as u64);
    let inspection = inspect::inspect(&dataset, val.as_ref(), args.val_fraction, cores(), &progress);
    drop(bars);
    show(&inspection, args.json)?;
    match inspection.problems.len() {
        0 => Ok(()),
        n => Err(anyhow!("{n} problems in {} images", inspection.images).into()),
    }
}

pub fn compare(args: &CompareArgs) -> Result<(), Failure> {
    show(&Comparison::read(&args.runs)?, args.json)
}

pub fn evaluate(args: &EvaluateArgs) -> Result<(), Failure> {
    let bundle = args.model.bundle()?;
    let network = args.model.network(&bundle)?;
    let mut dataset = Dataset::read(&args.dataset)?;
    args.unknown.iter().try_for_each(|folder| dataset.add_unknown(folder))?;
    dataset.expect_classes(&bundle.manifest().classes, &args.dataset)?;
    let bars = Bars::default();
    let total = dataset.images.len();
    let progress = |done: usize| bars.show("images", done as u64, total as u64);
    let Evaluated { set, unknown_kinds, skipped } =
        train::evaluate::evaluate(&bundle, &network, &dataset, args.model.mirror, cores(), &progress)?;
    drop(bars);
    print_skipped(&skipped);
    if set.images.is_empty() {
        return Err(anyhow!("{}: no image could be decoded", args.dataset.display()).into());
    }
    show(&EvaluationReport { evaluation: set.evaluation, unknown_kinds }, args.json)
}

/// The output of `evaluate`.
#[derive(Serialize)]
struct EvaluationReport {
    #[serde(flatten)]
    evaluation: Evaluation,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unknown_kinds: Vec<KindAcceptance>,
}

impl fmt::Display for EvaluationReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.evaluation.fmt(f)?;
        KindAcceptance::write(f, &self.unknown_kinds)
    }
}

/// The most skipped files that are named.
const SKIPPED_SHOWN_MAX: usize = 20;

fn print_skipped(skipped: &[DatasetProblem]) {
    for problem in skipped.iter().take(SKIPPED_SHOWN_MAX) {
        eprintln!("skipped: {}: {}", printable(&problem.file), problem.problem);
    }
    if let Some(more) = skipped.len().checked_sub(SKIPPED_SHOWN_MAX).filter(|more| *more > 0) {
        eprintln!("skipped: {more} more files");
    }
}

/// Returns the current time, or that of the variable `SOURCE_DATE_EPOCH`, which makes runs reproducible
/// (<https://reproducible-builds.org/specs/source-date-epoch/>).
fn created_at() -> anyhow::Result<SystemTime> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(seconds) => {
            // The last second of the year 9999, the last year in RFC 3339.
            let parsed = seconds.parse().ok().filter(|seconds| *seconds <= 253_402_300_799);
            let parsed = parsed.ok_or_else(|| anyhow!("SOURCE_DATE_EPOCH={seconds}: expected seconds since 1970"))?;
            Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(parsed))
        }
        Err(_) => Ok(SystemTime::now()),
    }
}
