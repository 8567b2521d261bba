//! The commands of a device: run, check, demo, classify, bench.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use bloomcast::bench::Bench;
use bloomcast::config::{Config, LogLevel};
use bloomcast::daemon::{self, Daemon, End};
use bloomcast::system::systemd;
use bloomcast::vision::kernels;
use bloomcast::vision::{Prediction, decode};
use clap::{Args, value_parser};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use super::{Failure, ModelArgs, bundle, show};

#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// The settings; what it leaves out keeps its default
    #[arg(long)]
    config: Option<PathBuf>,
    /// A setting that wins over the file and the environment, like camera.device=/dev/video2
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Look at the settings and the model only: a camera may be plugged in later
    #[arg(long)]
    no_camera: bool,
}

#[cfg(feature = "demo")]
#[derive(Debug, Args)]
pub struct DemoArgs {
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
pub struct ClassifyArgs {
    #[arg(required = true)]
    images: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A .bloom file; the one inside the program where none is named
    #[arg(long)]
    model: Option<PathBuf>,
    /// The ONNX file the model was made for, where neither the program nor the model has it
    #[arg(long)]
    backbone: Option<PathBuf>,
    /// Frames that are timed
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u64).range(1..=1_000_000))]
    runs: u64,
    /// Threads that compute one frame; as many as there are cores, but for one, where none are named
    #[arg(long, value_parser = value_parser!(u16).range(1..=kernels::THREADS_MAX as i64))]
    threads: Option<u16>,
    /// A photograph to time instead of the one drawn for it, 640×480
    #[arg(long)]
    image: Option<PathBuf>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

impl ConfigArgs {
    pub fn load(&self) -> Result<Config, Failure> {
        Config::load(self.config.as_deref(), &self.set).map_err(Failure::config)
    }
}

pub fn run(args: &ConfigArgs) -> Result<(), Failure> {
    let config = args.load()?;
    log_to_stderr(config.log.level);
    let runtime = daemon::runtime()?;
    // Before the model is loaded: from now on no signal is missed.
    let mut signals = runtime.block_on(async { Signals::new() }).context("cannot wait for signals")?;
    let threads = config.threads();
    let mut daemon = Daemon::prepare(config).map_err(Failure::config)?;
    match kernels::chosen() {
        Some(kernels) => tracing::info!("kernels: {}, threads: {threads}", kernels.name()),
        None => tracing::info!("kernels: tract"),
    }
    let remains = loop {
        tracing::info!("ready: the model {} knows {}", daemon.model(), daemon.labels().names().join(", "));
        let remains = daemon.run_on(&runtime, signals.next(args), Box::new(|_| {}))?;
        if remains.end == End::Stop {
            break remains;
        }
        // It was found good a moment ago.
        daemon = Daemon::prepare(args.load()?).map_err(Failure::config)?.resume(remains);
    };
    remains.close();
    // Not dropped: that would wait for a name that is being looked up.
    runtime.shutdown_background();
    Ok(())
}

pub fn check(args: &CheckArgs) -> Result<(), Failure> {
    let mut daemon = Daemon::examine(args.config.load()?).map_err(Failure::config)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "configuration: good")?;
    writeln!(out, "model: {}, {}", daemon.model(), daemon.labels().names().join(", "))?;
    if !args.no_camera {
        daemon.try_camera().map_err(Failure::config)?;
        writeln!(out, "camera: gives frames")?;
    }
    Ok(())
}

#[cfg(feature = "demo")]
pub fn demo(args: DemoArgs) -> Result<(), Failure> {
    let options = bloomcast::demo::Options {
        frames: args.frames,
        port: args.port,
        per_class: args.per_class,
        interval_ms: args.interval_ms,
    };
    log_to_stderr(LogLevel::Error);
    Ok(bloomcast::demo::run(&options, &mut std::io::stdout())?)
}

pub fn classify(args: &ClassifyArgs) -> Result<(), Failure> {
    let mut classifier = args.model.bundle()?.classifier(args.model.backbone.as_deref())?;
    let labels = classifier.labels().clone();
    let mut look = |path: &Path| -> anyhow::Result<Prediction> {
        let image = decode::file(path)?;
        Ok(if args.model.mirror {
            classifier.classify_with_mirror(&image)?
        } else {
            classifier.classify(&image)?.0.clone()
        })
    };
    let mut out = std::io::stdout().lock();
    let (mut answers, mut failed) = (Vec::new(), 0);
    for path in &args.images {
        let prediction = match look(path) {
            Ok(prediction) => prediction,
            Err(error) => {
                failed += 1;
                eprintln!("error: {}: {error}", path.display());
                continue;
            }
        };
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

pub fn bench(args: &BenchArgs) -> Result<(), Failure> {
    let threads = args.threads.map_or_else(kernels::all_but_one, usize::from);
    let mut bench = Bench::new(&bundle(args.model.as_deref())?, args.backbone.as_deref(), threads)?;
    let report = bench.run(args.image.as_deref(), args.runs as usize)?;
    show(&report, args.json)
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

/// What the process may be told.
struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let [term, int, hup] = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        Ok(Signals { term: term?, int: int?, hup: hup? })
    }

    /// Ready at SIGTERM or SIGINT; and at SIGHUP, where the configuration is good.
    async fn next(&mut self, args: &ConfigArgs) -> End {
        loop {
            tokio::select! {
                _ = self.term.recv() => return End::Stop,
                _ = self.int.recv() => return End::Stop,
                _ = self.hup.recv() => {}
            }
            systemd::notify_reloading();
            let args = args.clone();
            // Loads the model, which the connection to the broker need not wait for.
            let found = tokio::task::spawn_blocking(move || match args.load() {
                Ok(config) => Daemon::examine(config).map(drop).map_err(|e| e.to_string()),
                Err(failure) => Err(failure.error.to_string()),
            });
            match found.await.unwrap_or_else(|e| Err(e.to_string())) {
                Ok(()) => return End::Reload,
                Err(error) => {
                    tracing::error!("the changed configuration is left out, the old one stays: {error}");
                    systemd::notify_ready("the changed configuration is wrong, see the log; the model as before");
                }
            }
        }
    }
}
