//! The commands of a workstation: train, evaluate, compare, dataset.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use bloomcast::train::compare::Comparison;
use bloomcast::train::data::dataset::Dataset;
use bloomcast::train::data::inspect;
use bloomcast::train::data::photographs::Finding;
use bloomcast::train::features::device::Choice;
use bloomcast::train::optim::sgd::{Optimiser, Schedule};
use bloomcast::train::run::outcome::RunOptions;
use bloomcast::train::run::settings::{DEFAULT_VAL_FRACTION, FineTune};
use bloomcast::train::{self, Recipe, Settings};
use clap::{Args, Subcommand, value_parser};

use super::backbone::BackboneArgs;
#[cfg(feature = "fetch")]
use super::fetching::DatasetFetchArgs;
use super::progress::Bars;
use super::{Failure, ModelArgs, cores, show};

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Photographs to learn from, one folder a class
    #[arg(required_unless_present = "config")]
    dataset: Option<PathBuf>,
    /// Where the run is written: model.bloom, report.html, metrics.json, config.toml, TensorBoard's events
    #[arg(long)]
    out: PathBuf,
    /// Repeat the run that wrote this config.toml; other flags win over it
    #[arg(long, conflicts_with = "recipe")]
    config: Option<PathBuf>,
    /// What is trained, and how
    #[arg(long, value_enum, default_value_t = Recipe::BEST)]
    recipe: Recipe,
    /// Photographs to measure on, the same classes; a share of the dataset where none are named
    #[arg(long, conflicts_with = "val_fraction")]
    val: Option<PathBuf>,
    /// That share; a photograph's content alone decides whether it belongs to it [default: 0.2]
    #[arg(long)]
    val_fraction: Option<f64>,
    /// Photographs that are looked at once, when all is decided
    #[arg(long)]
    test: Option<PathBuf>,
    /// The model's name [default: flowers]
    #[arg(long)]
    name: Option<String>,
    /// Share of the validation photographs that may be rejected as unknown [default: 0.03]
    #[arg(long)]
    reject: Option<f32>,
    /// Replace a run that stands in --out
    #[arg(long)]
    overwrite: bool,
    /// Threads; all cores where none are named
    #[arg(long, value_parser = value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// What computes the features
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    learning: LearningArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Learning (defaults come from the recipe)")]
struct LearningArgs {
    /// What of the network is trained beside the head
    #[arg(long, value_enum)]
    fine_tune: Option<FineTune>,
    /// Views of each photograph: as it is, mirrored, others by chance
    #[arg(long, value_name = "VIEWS")]
    augment: Option<usize>,
    #[arg(long)]
    epochs: Option<usize>,
    /// Epochs without a better validation loss after which training ends; 0 trains them all
    #[arg(long)]
    patience: Option<usize>,
    #[arg(long)]
    batch: Option<usize>,
    #[arg(long, value_enum)]
    optimiser: Option<Optimiser>,
    #[arg(long)]
    learning_rate: Option<f32>,
    #[arg(long, value_enum)]
    schedule: Option<Schedule>,
    /// Epochs in which the learning rate grows from nothing
    #[arg(long)]
    warm_up: Option<usize>,
    #[arg(long)]
    step_epochs: Option<usize>,
    #[arg(long)]
    step_factor: Option<f32>,
    #[arg(long)]
    momentum: Option<f32>,
    #[arg(long)]
    nesterov: Option<bool>,
    #[arg(long)]
    weight_decay: Option<f32>,
    #[arg(long)]
    label_smoothing: Option<f32>,
    /// Count a photograph of a rare class more, so that all classes count the same
    #[arg(long)]
    balance: Option<bool>,
    /// Share of the features that a step does not see; of a fine-tuned convolution only
    #[arg(long)]
    dropout: Option<f32>,
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    #[command(flatten)]
    backbone: BackboneArgs,
    /// Let the bundle carry the network, for devices that do not have it
    #[arg(long)]
    embed_backbone: bool,
}

#[derive(Debug, Args)]
struct CacheArgs {
    /// Where features are kept from run to run [default: bloomcast/features in the user's cache]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Keep no features
    #[arg(long, conflicts_with = "cache")]
    no_cache: bool,
}

#[derive(Debug, Subcommand)]
pub enum DatasetCommand {
    /// Find broken, tiny and doubled images, and those that look the same in both sets: exit 1 where there are any
    Check(DatasetCheckArgs),
    /// Download and unpack TensorFlow's five flowers: 3,670 photographs, 218 MiB
    #[cfg(feature = "fetch")]
    Fetch(DatasetFetchArgs),
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Folders of finished runs
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct DatasetCheckArgs {
    /// Photographs to learn from, one folder a class
    dataset: PathBuf,
    /// Photographs to measure on; a share of the dataset where none are named
    #[arg(long, conflicts_with = "val_fraction")]
    val: Option<PathBuf>,
    /// That share, as `train` splits it off
    #[arg(long, default_value_t = DEFAULT_VAL_FRACTION)]
    val_fraction: f64,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// Photographs, one folder a class
    dataset: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

pub fn train(args: TrainArgs) -> Result<(), Failure> {
    let surroundings = RunOptions {
        out: args.out.clone(),
        overwrite: args.overwrite,
        cache: args.cache.folder(),
        threads: args.threads.map_or_else(cores, usize::from),
        device: args.device,
        created_at: created_at()?,
    };
    let settings = args.settings()?;
    settings.check().map_err(Failure::usage)?;
    let bars = Bars::default();
    let trained = train::train(&settings, &surroundings, &|progress| bars.train(progress))?;
    drop(bars);
    name_left_out(&trained.left_out);
    write!(std::io::stdout().lock(), "{trained}")?;
    Ok(())
}

impl TrainArgs {
    /// The recipe, or the file; and over it what the flags say.
    fn settings(self) -> Result<Settings, Failure> {
        let mut settings = match &self.config {
            Some(path) => Settings::read(path)?,
            None => self.recipe.settings(PathBuf::new()),
        };
        set(&mut settings.dataset, absolute(self.dataset)?);
        if self.val_fraction.is_some() {
            settings.val = None;
        }
        settings.val = absolute(self.val)?.or(settings.val);
        settings.test = absolute(self.test)?.or(settings.test);
        set(&mut settings.val_fraction, self.val_fraction);
        set(&mut settings.name, self.name);
        set(&mut settings.reject, self.reject);
        settings.embed_backbone |= self.network.embed_backbone;
        if let Some(backbone) = self.network.backbone.file()? {
            settings.backbone = Some(backbone);
        }
        let learning = self.learning;
        set(&mut settings.fine_tune, learning.fine_tune);
        set(&mut settings.views, learning.augment);
        let sgd = &mut settings.sgd;
        set(&mut sgd.epochs, learning.epochs);
        set(&mut sgd.patience, learning.patience);
        set(&mut sgd.batch, learning.batch);
        set(&mut sgd.optimiser, learning.optimiser);
        set(&mut sgd.learning_rate, learning.learning_rate);
        set(&mut sgd.schedule, learning.schedule);
        set(&mut sgd.warm_up, learning.warm_up);
        set(&mut sgd.step_epochs, learning.step_epochs);
        set(&mut sgd.step_factor, learning.step_factor);
        set(&mut sgd.momentum, learning.momentum);
        set(&mut sgd.nesterov, learning.nesterov);
        set(&mut sgd.weight_decay, learning.weight_decay);
        set(&mut sgd.label_smoothing, learning.label_smoothing);
        set(&mut sgd.balance, learning.balance);
        set(&mut sgd.dropout, learning.dropout);
        set(&mut sgd.seed, learning.seed);
        learning.expect_used(&settings)?;
        Ok(settings)
    }
}

impl LearningArgs {
    /// Refuses a flag that the run would not look at.
    fn expect_used(&self, settings: &Settings) -> Result<(), Failure> {
        let sgd = &settings.sgd;
        let momentum = self.momentum.is_some() || self.nesterov.is_some();
        let step = self.step_epochs.is_some() || self.step_factor.is_some();
        for (unused, what) in [
            (momentum && sgd.optimiser != Optimiser::Sgd, "--momentum and --nesterov belong to --optimiser sgd"),
            (step && sgd.schedule != Schedule::Step, "--step-epochs and --step-factor belong to --schedule step"),
            (
                self.dropout.is_some() && settings.fine_tune == FineTune::None,
                "--dropout belongs to --fine-tune last-conv",
            ),
        ] {
            if unused {
                return Err(Failure::usage(anyhow!(what)));
            }
        }
        Ok(())
    }
}

/// So that `config.toml` means the same wherever it is read.
fn absolute(path: Option<PathBuf>) -> std::io::Result<Option<PathBuf>> {
    path.map(std::path::absolute).transpose()
}

fn set<T>(to: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *to = given;
    }
}

impl CacheArgs {
    fn folder(&self) -> Option<PathBuf> {
        if self.no_cache {
            return None;
        }
        self.cache.clone().or_else(|| bloomcast::system::paths::user_cache().map(|cache| cache.join("features")))
    }
}

pub fn dataset_check(args: &DatasetCheckArgs) -> Result<(), Failure> {
    let dataset = Dataset::read(&args.dataset)?;
    let val = args.val.as_deref().map(Dataset::read).transpose()?;
    if let (Some(val), Some(path)) = (&val, &args.val) {
        val.expect_classes(&dataset.classes, path)?;
    }
    let of = dataset.images.len() + val.as_ref().map_or(0, |val| val.images.len());
    let bars = Bars::default();
    let told = |done: usize| bars.show("photographs", done as u64, of as u64);
    let found = inspect::inspect(&dataset, val.as_ref(), args.val_fraction, cores(), &told);
    drop(bars);
    show(&found, args.json)?;
    match found.findings.len() {
        0 => Ok(()),
        n => Err(anyhow!("{n} of {} images need a look", found.images).into()),
    }
}

pub fn compare(args: &CompareArgs) -> Result<(), Failure> {
    show(&Comparison::of(&args.runs)?, args.json)
}

pub fn evaluate(args: &EvaluateArgs) -> Result<(), Failure> {
    let bundle = args.model.bundle()?;
    let network = args.model.network(&bundle)?;
    let dataset = Dataset::read(&args.dataset)?;
    dataset.expect_classes(&bundle.manifest().classes, &args.dataset)?;
    let bars = Bars::default();
    let of = dataset.images.len();
    let told = |done: usize| bars.show("photographs", done as u64, of as u64);
    let (measured, left_out) =
        train::evaluate::evaluate(&bundle, &network, &dataset, args.model.mirror, cores(), &told)?;
    drop(bars);
    name_left_out(&left_out);
    if measured.photographs.is_empty() {
        return Err(anyhow!("{}: no image could be decoded", args.dataset.display()).into());
    }
    show(&measured.evaluation, args.json)
}

fn name_left_out(left_out: &[Finding]) {
    for finding in left_out {
        eprintln!("left out: {}: {}", finding.file.display(), finding.problem);
    }
}

/// Now; or what `SOURCE_DATE_EPOCH` says, so that a run can be repeated to the byte.
fn created_at() -> anyhow::Result<SystemTime> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(seconds) => {
            // Up to the year 9999, the last that RFC 3339 can write.
            let parsed = seconds.parse().ok().filter(|seconds| *seconds <= 253_402_300_799);
            let parsed = parsed.ok_or_else(|| anyhow!("SOURCE_DATE_EPOCH={seconds}: expected seconds since 1970"))?;
            Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(parsed))
        }
        Err(_) => Ok(SystemTime::now()),
    }
}
