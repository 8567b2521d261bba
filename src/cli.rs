//! The commands, one function each, no logic.
//!
//! Exit codes: 0 done; 1 failed; 2 usage; 78 bad configuration.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use bloomcast::bench::Bench;
use bloomcast::bundle::Bundle;
use bloomcast::config::{Config, LogLevel};
use bloomcast::daemon::Daemon;
use bloomcast::train::dataset::Dataset;
use bloomcast::train::session::Progress;
use bloomcast::train::sgd::Sgd;
use bloomcast::train::{self, Training, Val, features, inspect};
use bloomcast::vision::{Backbone, Classifier, decode};
use clap::{Args, Parser, Subcommand, value_parser};
use serde::Serialize;
use serde_json::json;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Watches a camera, names the flower it sees, and says so over MQTT.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Watch the camera and publish (the daemon)
    Run(ConfigArgs),
    /// Check the configuration, the model and the camera: exit 0, or 78 with the reason
    Check(ConfigArgs),
    /// See it work: a broker inside, replayed photographs, events on the terminal
    #[cfg(feature = "demo")]
    Demo(DemoArgs),
    /// Name the flower on each image
    Classify(ClassifyArgs),
    /// Train a model on a folder of photographs, one folder a class
    Train(TrainArgs),
    /// Look at photographs before learning from them
    #[command(subcommand)]
    Dataset(DatasetCommand),
    /// Loss, accuracy, per-class figures and confusion of a model on photographs
    Evaluate(EvaluateArgs),
    /// Time a frame, stage by stage, on this machine
    Bench(BenchArgs),
}

#[derive(Debug, Args)]
struct ConfigArgs {
    /// The settings; what it leaves out keeps its default
    #[arg(long)]
    config: Option<PathBuf>,
    /// A setting that wins over the file and the environment, like camera.device=/dev/video2
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[cfg(feature = "demo")]
#[derive(Debug, Args)]
struct DemoArgs {
    /// Photographs, one folder a class; found or fetched where none are named
    #[arg(long)]
    frames: Option<PathBuf>,
    /// The broker's port on this machine; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Photographs of each class
    #[arg(long, default_value_t = 20)]
    per_class: usize,
    /// Time between two photographs
    #[arg(long, default_value_t = 100)]
    interval_ms: u64,
}

#[derive(Debug, Args)]
struct ClassifyArgs {
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// A .bloom file; the one inside the program where none is named
    #[arg(long)]
    model: Option<PathBuf>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct TrainArgs {
    /// Photographs to learn from, one folder a class
    dataset: PathBuf,
    /// Photographs to measure on, the same classes; a share of the dataset where none are named
    #[arg(long, conflicts_with = "val_fraction")]
    val: Option<PathBuf>,
    /// That share; a photograph's content alone decides whether it belongs to it
    #[arg(long, default_value_t = 0.2, value_parser = share)]
    val_fraction: f32,
    /// Where the run is written: model.bloom and metrics.json
    #[arg(long)]
    out: PathBuf,
    /// The model's name
    #[arg(long, default_value = "flowers")]
    name: String,
    #[arg(long, default_value_t = Sgd::default().epochs as u64, value_parser = value_parser!(u64).range(1..=100_000))]
    epochs: u64,
    #[arg(long, default_value_t = Sgd::default().batch as u64, value_parser = value_parser!(u64).range(1..=100_000))]
    batch: u64,
    #[arg(long, default_value_t = Sgd::default().learning_rate, value_parser = not_negative)]
    learning_rate: f32,
    #[arg(long, default_value_t = Sgd::default().momentum, value_parser = share)]
    momentum: f32,
    #[arg(long, default_value_t = Sgd::default().weight_decay, value_parser = not_negative)]
    weight_decay: f32,
    #[arg(long, default_value_t = Sgd::default().label_smoothing, value_parser = share)]
    label_smoothing: f32,
    #[arg(long, default_value_t = Sgd::default().seed)]
    seed: u64,
    /// Share of the validation photographs that may be rejected as unknown
    #[arg(long, default_value_t = 0.01, value_parser = share)]
    reject: f32,
    /// Threads; all cores where none are named
    #[arg(long)]
    threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum DatasetCommand {
    /// Find broken, tiny and doubled images, and those that look the same in both sets: exit 1 where there are any
    Check(DatasetCheckArgs),
}

#[derive(Debug, Args)]
struct DatasetCheckArgs {
    /// Photographs to learn from, one folder a class
    dataset: PathBuf,
    /// Photographs to measure on
    #[arg(long)]
    val: Option<PathBuf>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct EvaluateArgs {
    /// Photographs, one folder a class
    dataset: PathBuf,
    /// A .bloom file; the one inside the program where none is named
    #[arg(long)]
    model: Option<PathBuf>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct BenchArgs {
    /// A .bloom file; the one inside the program where none is named
    #[arg(long)]
    model: Option<PathBuf>,
    /// Frames that are timed
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u64).range(1..=1_000_000))]
    runs: u64,
    /// A photograph to time instead of the one drawn for it, 640×480
    #[arg(long)]
    image: Option<PathBuf>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

/// An error and the exit code that goes with it.
pub struct Failure {
    pub code: u8,
    pub error: anyhow::Error,
}

/// Bad configuration (sysexits.h, EX_CONFIG).
const CONFIG: u8 = 78;

impl Failure {
    fn config(error: impl Into<anyhow::Error>) -> Self {
        Failure { code: CONFIG, error: error.into() }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure { code: 1, error: error.into() }
    }
}

impl Cli {
    pub fn run(self) -> Result<(), Failure> {
        match self.command {
            Command::Run(args) => run(&args),
            Command::Check(args) => check(&args),
            #[cfg(feature = "demo")]
            Command::Demo(args) => demo(args),
            Command::Classify(args) => classify(&args),
            Command::Train(args) => train(args),
            Command::Dataset(DatasetCommand::Check(args)) => dataset_check(&args),
            Command::Evaluate(args) => evaluate(&args),
            Command::Bench(args) => bench(&args),
        }
    }
}

fn run(args: &ConfigArgs) -> Result<(), Failure> {
    let config = Config::load(args.config.as_deref(), &args.set).map_err(Failure::config)?;
    log_to_stderr(config.log.level);
    let daemon = Daemon::prepare(config).map_err(Failure::config)?;
    tracing::info!("ready: the model {} knows {}", daemon.model(), daemon.labels().names().join(", "));
    daemon.run(terminated(), Box::new(|_| {}))?;
    Ok(())
}

fn check(args: &ConfigArgs) -> Result<(), Failure> {
    let config = Config::load(args.config.as_deref(), &args.set).map_err(Failure::config)?;
    let mut daemon = Daemon::prepare(config).map_err(Failure::config)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "configuration: good")?;
    writeln!(out, "model: {}, {}", daemon.model(), daemon.labels().names().join(", "))?;
    daemon.try_camera().map_err(Failure::config)?;
    writeln!(out, "camera: gives frames")?;
    Ok(())
}

#[cfg(feature = "demo")]
fn demo(args: DemoArgs) -> Result<(), Failure> {
    let options = bloomcast::demo::Options {
        frames: args.frames,
        port: args.port,
        per_class: args.per_class,
        interval_ms: args.interval_ms,
    };
    log_to_stderr(LogLevel::Error);
    Ok(bloomcast::demo::run(&options, &mut std::io::stdout())?)
}

fn classify(args: &ClassifyArgs) -> Result<(), Failure> {
    let mut classifier = classifier(args.model.as_deref())?;
    let mut out = std::io::stdout().lock();
    let (mut answers, mut failed) = (Vec::new(), 0);
    for path in &args.images {
        let answer =
            decode::file(path).map_err(anyhow::Error::from).and_then(|image| Ok(classifier.classify(&image)?.0));
        let prediction = match answer {
            Ok(prediction) => prediction,
            Err(error) => {
                failed += 1;
                eprintln!("error: {}: {error}", path.display());
                continue;
            }
        };
        let labels = classifier.labels();
        let (class, confidence) = (labels.name(prediction.class()), prediction.confidence());
        if args.json {
            let mut top: Vec<_> = labels.names().iter().zip(&prediction.probabilities).collect();
            top.sort_by(|a, b| b.1.total_cmp(a.1));
            let top: Vec<_> = top.iter().map(|(class, p)| json!({ "class": class, "confidence": p })).collect();
            answers
                .push(json!({ "file": path.to_string_lossy(), "class": class, "confidence": confidence, "top": top }));
        } else {
            writeln!(out, "{}: {class} ({:.1} %)", path.display(), confidence * 100.0)?;
        }
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&answers)?)?;
    }
    match failed {
        0 => Ok(()),
        n => Err(anyhow!("{n} of {} images could not be classified", args.images.len()).into()),
    }
}

fn train(args: TrainArgs) -> Result<(), Failure> {
    let training = Training {
        dataset: args.dataset,
        val: args.val.map_or(Val::Fraction(args.val_fraction.into()), Val::Folder),
        out: args.out.clone(),
        name: args.name,
        sgd: Sgd {
            epochs: args.epochs as usize,
            batch: args.batch as usize,
            learning_rate: args.learning_rate,
            momentum: args.momentum,
            weight_decay: args.weight_decay,
            label_smoothing: args.label_smoothing,
            seed: args.seed,
        },
        reject: args.reject,
        threads: args.threads.unwrap_or_else(cores),
        created_at: created_at()?,
    };
    let trained = train::train(&training, &show_progress)?;
    name_left_out(&trained.left_out);
    let mut out = std::io::stdout().lock();
    write!(out, "{}", trained.evaluation)?;
    writeln!(out, "{}: trained on {} photographs", args.out.join("model.bloom").display(), trained.train_images)?;
    Ok(())
}

fn dataset_check(args: &DatasetCheckArgs) -> Result<(), Failure> {
    let dataset = Dataset::read(&args.dataset)?;
    let val = args.val.as_deref().map(Dataset::read).transpose()?;
    if let (Some(val), Some(path)) = (&val, &args.val) {
        val.expect_classes(&dataset.classes, path)?;
    }
    let of = dataset.images.len() + val.as_ref().map_or(0, |val| val.images.len());
    let progress = |done| show_progress(Progress::Features { done, of });
    let found = inspect::inspect(&dataset, val.as_ref(), cores(), &progress);
    show(&found, args.json)?;
    match found.findings.len() {
        0 => Ok(()),
        n => Err(anyhow!("{n} of {} images need a look", found.images).into()),
    }
}

fn evaluate(args: &EvaluateArgs) -> Result<(), Failure> {
    let bundle = bundle(args.model.as_deref())?;
    let backbone = Backbone::built_in()?;
    bundle.expect(&backbone)?;
    let dataset = Dataset::read(&args.dataset)?;
    dataset.expect_classes(&bundle.manifest().classes, &args.dataset)?;
    let of = dataset.images.len();
    let progress = |done| show_progress(Progress::Features { done, of });
    let features = features::extract(&backbone, &bundle.manifest().preprocess, &dataset.images, cores(), &progress)?;
    name_left_out(&features.left_out);
    if features.is_empty() {
        return Err(anyhow!("{}: no image could be decoded", args.dataset.display()).into());
    }
    show(&train::session::evaluate(&bundle.skill(), &features), args.json)
}

fn bench(args: &BenchArgs) -> Result<(), Failure> {
    let mut bench = Bench::new(&bundle(args.model.as_deref())?)?;
    let report = bench.run(args.image.as_deref(), args.runs as usize)?;
    show(&report, args.json)
}

fn name_left_out(left_out: &[(PathBuf, String)]) {
    for (path, reason) in left_out {
        eprintln!("left out: {}: {reason}", path.display());
    }
}

/// A result for people, or as the one JSON document on standard output.
fn show(result: &(impl Serialize + Display), json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(result)?)?;
    } else {
        write!(out, "{result}")?;
    }
    Ok(())
}

fn bundle(model: Option<&Path>) -> anyhow::Result<Bundle> {
    Ok(match model {
        Some(path) => Bundle::read(path)?,
        None => Bundle::built_in()?,
    })
}

fn classifier(model: Option<&Path>) -> anyhow::Result<Classifier> {
    Ok(bundle(model)?.classifier(&Backbone::built_in()?)?)
}

fn share(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "expected a number from 0 to 1".into())
}

fn not_negative(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a number, 0 or above".into())
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
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

/// One line that moves, and only on a terminal.
fn show_progress(progress: Progress) {
    let mut err = std::io::stderr();
    if !err.is_terminal() {
        return;
    }
    let (line, last) = match progress {
        Progress::Features { done, of } => (format!("images {done}/{of}"), done == of),
        Progress::Epoch { epoch, of, loss } => (format!("epoch {epoch}/{of}, loss {loss:.4}"), epoch == of),
    };
    // A terminal that is gone is no reason to stop.
    let _ = write!(err, "\r\x1b[K{line}{}", if last { "\n" } else { "" });
}

fn log_to_stderr(level: LogLevel) {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    let terminal = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(terminal).with_target(false);
    // What libraries say of themselves helps nobody: our own lines name what is wrong.
    let ours = Targets::new().with_target("bloomcast", level);
    tracing_subscriber::registry().with(lines.with_filter(ours)).init();
}

/// Ready at SIGTERM or SIGINT.
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        tracing::error!("cannot wait for signals; stop with SIGKILL");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
