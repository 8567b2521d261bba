//! The commands of a device: run, check, demo, classify, bench.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use bloomcast::bench::Bench;
use bloomcast::bundle::ViewOptions;
use bloomcast::config::{Config, ConfigError, LogLevel};
use bloomcast::daemon::{self, Daemon, DaemonError, StopReason};
use bloomcast::system::paths::printable;
use bloomcast::system::systemd;
use bloomcast::vision::{Detection, Prediction, View, decode};
use bloomcast_kernels::{THREADS_MAX, default_threads};
use clap::{Args, ValueEnum, value_parser};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use super::{Failure, KernelsArg, ModelArgs, bundle, show};

#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// The configuration file; a setting that it lacks keeps its default
    #[arg(long)]
    config: Option<PathBuf>,
    /// Override a setting of the file and the environment, for example camera.device=/dev/video2
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Check the settings and the model only
    #[arg(long)]
    no_camera: bool,
}

#[cfg(feature = "demo")]
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Folder of photographs, one subfolder per class [default: ../shared/flowers/val or an earlier download, else drawings]
    #[arg(long)]
    frames: Option<PathBuf>,
    /// Port of the demo's broker on 127.0.0.1; 0 chooses a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Photographs per class
    #[arg(long, default_value_t = 20)]
    per_class: usize,
    /// Interval between two photographs or drawings, in milliseconds
    #[arg(long, default_value_t = 100)]
    interval_ms: u64,
    /// Download TensorFlow's flower_photos (218 MiB) if there are no photographs
    #[arg(long)]
    fetch: bool,
    /// Seed of the drawings [default: a random one, which is printed]
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Args)]
pub struct ClassifyArgs {
    /// Images: JPEG, PNG or WebP
    #[arg(required = true)]
    images: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// What is looked at: the whole image, or overlapping windows of it [default: as the model was trained]
    #[arg(long, value_enum, conflicts_with = "mirror")]
    view: Option<ViewArg>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// The part of an image that is judged at once.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ViewArg {
    /// The image, stretched to the network's input
    Whole,
    /// Overlapping windows at two scales, if the image is large enough
    Scan,
}

impl From<ViewArg> for View {
    fn from(view: ViewArg) -> Self {
        match view {
            ViewArg::Whole => View::Whole,
            ViewArg::Scan => View::Scan,
        }
    }
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A model bundle (.bloom) [default: the built-in model]
    #[arg(long)]
    model: Option<PathBuf>,
    /// The ONNX file of the model's backbone, if neither the program nor the bundle has it
    #[arg(long)]
    backbone: Option<PathBuf>,
    /// Frames to time
    #[arg(long, default_value_t = 200, value_parser = value_parser!(u64).range(1..=1_000_000))]
    runs: u64,
    /// Threads that compute one frame [default: the number of cores minus one]
    #[arg(long, value_parser = value_parser!(u16).range(1..=THREADS_MAX as i64))]
    threads: Option<u16>,
    #[command(flatten)]
    kernels: KernelsArg,
    /// An image to time [default: a test pattern of 640×480]
    #[arg(long)]
    image: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl ConfigArgs {
    /// Loads the configuration and the broker's credentials; prints the warnings.
    pub fn load_with_credentials(&self) -> Result<Config, Failure> {
        self.load()?.with_credentials().map_err(Failure::config)
    }

    fn read(&self) -> Result<Config, ConfigError> {
        Config::load(self.config.as_deref(), &self.set)
    }

    /// Loads the configuration without the broker's credentials; prints its warnings.
    pub fn load(&self) -> Result<Config, Failure> {
        let config = self.read().map_err(Failure::config)?;
        config.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
        Ok(config)
    }
}

pub fn run(args: &ConfigArgs) -> Result<(), Failure> {
    let config = args.read().and_then(Config::with_credentials);
    let config = config.map_err(Failure::config)?;
    log_to_stderr(config.log.level);
    log_warnings(&config, None);
    let runtime = daemon::runtime()?;
    let running = config.clone();
    // Before the model is loaded: no signal is missed from now on.
    let mut signals = runtime.block_on(async { Signals::new() }).context("cannot wait for signals")?;
    daemon::run_with_reloads(&runtime, config, async || signals.next(args, &running).await).map_err(failure)?;
    // A drop would wait for a pending name lookup.
    runtime.shutdown_background();
    Ok(())
}

/// Exit code 78 for an error that a configuration change can fix.
fn failure(error: DaemonError) -> Failure {
    if error.is_configuration() { Failure::config(error) } else { error.into() }
}

pub fn check(args: &CheckArgs) -> Result<(), Failure> {
    let config = args.config.load_with_credentials()?;
    config.device_warning.iter().for_each(|warning| eprintln!("warning: {warning}"));
    let mut daemon = Daemon::check(config).map_err(failure)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "configuration: valid")?;
    writeln!(out, "model: {}, {}", daemon.model(), daemon.labels().names().join(", "))?;
    if let Some(reason) = daemon.fallback_reason() {
        eprintln!("warning: it is not the model that was installed last: {reason}");
    }
    if !args.no_camera {
        daemon.try_camera().map_err(Failure::config)?;
        writeln!(out, "camera: delivers frames")?;
    }
    Ok(())
}

/// Removes a folder in which another thread may still create files.
#[cfg(feature = "demo")]
fn remove_used(folder: &Path) {
    const ATTEMPTS: usize = 50;
    for _ in 0..ATTEMPTS {
        if !folder.exists() {
            return;
        }
        // An error means that a file was created meanwhile.
        let _ = std::fs::remove_dir_all(folder);
    }
}

/// Exit code after a signal: the one that a shell reports for SIGINT.
#[cfg(feature = "demo")]
const INTERRUPTED: u8 = 130;

#[cfg(feature = "demo")]
pub fn demo(args: DemoArgs) -> Result<(), Failure> {
    let runtime = daemon::runtime()?;
    let mut signals = runtime.block_on(async { Signals::new() }).context("cannot wait for signals")?;
    let folder = tempfile::TempDir::with_prefix("bloomcast-demo-").context("cannot create a temporary folder")?;
    let options = bloomcast::demo::Options {
        folder: folder.path().to_owned(),
        frames: args.frames,
        port: args.port,
        per_class: args.per_class,
        interval_ms: args.interval_ms,
        fetch: args.fetch,
        seed: args.seed,
    };
    log_to_stderr(LogLevel::Error);
    let demo = runtime.spawn_blocking(move || bloomcast::demo::run(&options, &mut std::io::stdout()));
    let finished = runtime.block_on(async {
        tokio::select! {
            finished = demo => Some(finished),
            () = signals.stop() => None,
        }
    });
    // The demo's thread is left running after a signal; the program ends.
    runtime.shutdown_background();
    // The daemon's thread may still run after a failure as well.
    remove_used(folder.path());
    match finished {
        Some(finished) => Ok(finished.context("the demo panicked")??),
        None => Err(Failure { code: INTERRUPTED, error: anyhow!("interrupted") }),
    }
}

pub fn classify(args: &ClassifyArgs) -> Result<(), Failure> {
    let bundle = args.model.bundle()?;
    let backbone = bundle.compile_backbone(&args.model.network(&bundle)?)?;
    let view = ViewOptions { view: args.view.map(View::from), ..ViewOptions::default() };
    let mut classifier = bundle.classifier_on(&backbone, view)?;
    let labels = classifier.labels().clone();
    let mut predict = |path: &Path| -> anyhow::Result<Prediction> {
        let image = decode::file(path)?;
        Ok(if args.model.mirror {
            classifier.classify_with_mirror(&image)?
        } else {
            classifier.classify_by_view(&image)?.0.clone()
        })
    };
    let mut out = std::io::stdout().lock();
    let (mut answers, mut failed) = (Vec::new(), 0);
    for path in &args.images {
        let prediction = match predict(path) {
            Ok(prediction) => prediction,
            Err(error) => {
                failed += 1;
                eprintln!("error: {}: {error}", printable(path));
                answers.push(json!({ "file": path.to_string_lossy(), "error": error.to_string() }));
                continue;
            }
        };
        let (class, confidence) = (labels.name(prediction.class()), prediction.confidence());
        if args.json {
            let mut top: Vec<_> = labels.names().iter().zip(&prediction.probabilities).collect();
            top.sort_by(|a, b| b.1.total_cmp(a.1));
            let top: Vec<_> = top.iter().map(|(class, p)| json!({ "class": class, "confidence": p })).collect();
            let found = |detection: &Detection| {
                let (class, confidence) = (labels.name(Some(detection.class)), detection.confidence);
                json!({ "class": class, "confidence": confidence, "box": detection.region.bounds() })
            };
            answers.push(json!({
                "file": path.to_string_lossy(), "class": class, "confidence": confidence, "top": top,
                "box": prediction.found.first().map(|best| best.region.bounds()),
                "found": prediction.found.iter().map(found).collect::<Vec<_>>(),
            }));
        } else {
            writeln!(out, "{}: {class} ({:.1} %)", printable(path), confidence * 100.0)?;
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
    let threads = args.threads.map_or_else(default_threads, usize::from);
    let kernels = args.kernels.resolve()?;
    let mut bench = Bench::new(&bundle(args.model.as_deref())?, args.backbone.as_deref(), kernels, threads)?;
    let report = bench.run(args.image.as_deref(), args.runs as usize)?;
    show(&report, args.json)
}

/// Logs the warnings of a configuration that the first one did not have.
fn log_warnings(config: &Config, first: Option<&Config>) {
    let all = |config: &Config| config.warnings.iter().chain(&config.device_warning).cloned().collect::<Vec<_>>();
    let logged = first.map(all).unwrap_or_default();
    all(config).iter().filter(|warning| !logged.contains(warning)).for_each(|warning| tracing::warn!("{warning}"));
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
    // Log lines of libraries are left out: the errors that this program logs name the cause.
    let ours = Targets::new().with_target("bloomcast", level);
    tracing_subscriber::registry().with(lines.with_filter(ours)).init();
}

/// The signals that the daemon handles.
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

    /// Waits for SIGTERM, SIGINT or SIGHUP.
    #[cfg(feature = "demo")]
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
            _ = self.hup.recv() => {}
        }
    }

    /// Waits for SIGTERM or SIGINT, or for a SIGHUP after which the configuration is valid. The warnings of `first` were logged.
    async fn next(&mut self, args: &ConfigArgs, first: &Config) -> StopReason {
        loop {
            tokio::select! {
                _ = self.term.recv() => return StopReason::Stop,
                _ = self.int.recv() => return StopReason::Stop,
                _ = self.hup.recv() => {}
            }
            systemd::notify_reloading();
            let args = args.clone();
            // In a thread of its own: loading the model must not block the connection to the broker.
            let checked = tokio::task::spawn_blocking(move || {
                let config = args.read().and_then(Config::with_credentials)?;
                Daemon::check(config.clone()).map(|_| config).map_err(anyhow::Error::from)
            });
            match checked.await.map_err(anyhow::Error::from).and_then(|checked| checked) {
                Ok(config) => {
                    log_warnings(&config, Some(first));
                    return StopReason::Reload(Box::new(config));
                }
                Err(error) => {
                    tracing::error!("configuration reload rejected, keeping the current configuration: {error}");
                    systemd::notify_ready("configuration reload rejected, see the log; the model is unchanged");
                }
            }
        }
    }
}
