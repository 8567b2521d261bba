//! The commands: arguments to options, one library call each, output.
//!
//! Exit codes: 0 done; 1 failed; 2 usage; 78 bad configuration.

mod backbone;
mod device;
#[cfg(feature = "fetch")]
mod fetching;
mod fleet;
mod manpages;
mod progress;
mod workstation;

use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::anyhow;
use bloomcast::bundle::Bundle;
use bloomcast::vision::OnnxBackbone;
use bloomcast::vision::backbone::KernelChoice;
use bloomcast_kernels::Isa;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use backbone::BackboneCommand;
#[cfg(feature = "demo")]
use device::DemoArgs;
use device::{BenchArgs, CheckArgs, ClassifyArgs, ConfigArgs};
use fleet::{InstallArgs, KeygenArgs, PushArgs, RollbackArgs, SignArgs, VerifyArgs};
use manpages::ManpagesArgs;
use workstation::{CompareArgs, DatasetCommand, EvaluateArgs, TrainArgs};

/// Watches a camera, classifies the flower, and publishes it over MQTT.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon: watch the camera, classify, publish
    Run(ConfigArgs),
    /// Check the configuration, the model and the camera: exit 0, or 78 for an invalid configuration
    Check(CheckArgs),
    /// Run a demonstration: a broker inside, replayed photographs or drawings, events on the terminal
    #[cfg(feature = "demo")]
    Demo(DemoArgs),
    /// Classify images
    Classify(ClassifyArgs),
    /// Train a model on a folder of photographs, one folder a class
    Train(Box<TrainArgs>),
    /// Check a dataset of photographs, or download one
    #[command(subcommand)]
    Dataset(DatasetCommand),
    /// List, download or inspect backbone networks
    #[command(subcommand)]
    Backbone(BackboneCommand),
    /// Compare finished training runs, best first
    Compare(CompareArgs),
    /// Evaluate a model on labelled photographs: loss, accuracy, metrics per class, confusion matrix
    Evaluate(EvaluateArgs),
    /// Measure the time of a frame, stage by stage
    Bench(BenchArgs),
    /// Generate a key pair for signing models
    Keygen(KeygenArgs),
    /// Sign a model bundle
    Sign(SignArgs),
    /// Verify a bundle's signature and contents
    Verify(VerifyArgs),
    /// Install a model in this device's store
    Install(InstallArgs),
    /// Push a model to devices and wait until each has confirmed it
    Push(PushArgs),
    /// Roll back to the previous model, here or on devices
    Rollback(RollbackArgs),
    /// Write man pages and shell completions
    #[command(hide = true, alias = "papers")]
    Manpages(ManpagesArgs),
}

/// An error and its exit code.
pub struct Failure {
    pub code: u8,
    pub error: anyhow::Error,
}

/// Bad configuration (sysexits.h, EX_CONFIG).
const CONFIG: u8 = 78;

impl Failure {
    /// An error in the command line.
    fn usage(error: impl Into<anyhow::Error>) -> Self {
        Failure { code: 2, error: error.into() }
    }

    /// Whether the reader of standard output is gone.
    pub fn is_broken_pipe(&self) -> bool {
        let error = self.error.downcast_ref::<std::io::Error>();
        error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    }

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
            Command::Run(args) => device::run(&args),
            Command::Check(args) => device::check(&args),
            #[cfg(feature = "demo")]
            Command::Demo(args) => device::demo(args),
            Command::Classify(args) => device::classify(&args),
            Command::Train(args) => workstation::train(*args),
            Command::Dataset(DatasetCommand::Check(args)) => workstation::dataset_check(&args),
            #[cfg(feature = "fetch")]
            Command::Dataset(DatasetCommand::Fetch(args)) => fetching::dataset(args),
            Command::Backbone(BackboneCommand::List) => backbone::list(),
            #[cfg(feature = "fetch")]
            Command::Backbone(BackboneCommand::Fetch(args)) => fetching::backbone(args),
            Command::Backbone(BackboneCommand::Inspect(args)) => backbone::inspect(args),
            Command::Compare(args) => workstation::compare(&args),
            Command::Evaluate(args) => workstation::evaluate(&args),
            Command::Bench(args) => device::bench(&args),
            Command::Keygen(args) => fleet::keygen(&args),
            Command::Sign(args) => fleet::sign(&args),
            Command::Verify(args) => fleet::verify(&args),
            Command::Install(args) => fleet::install(&args),
            Command::Push(args) => fleet::push_bundle(&args),
            Command::Rollback(args) => fleet::rollback(&args),
            Command::Manpages(args) => manpages::manpages(&args),
        }
    }
}

/// Prints a result as text, or as one JSON document.
fn show(result: &(impl Serialize + Display), json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(result)?)?;
    } else {
        write!(out, "{result}")?;
    }
    Ok(())
}

/// A model and how it classifies.
#[derive(Debug, Args)]
struct ModelArgs {
    /// A model bundle (.bloom) [default: the built-in model]
    #[arg(long)]
    model: Option<PathBuf>,
    /// The ONNX file of the model's backbone, if neither the program nor the bundle has it
    #[arg(long)]
    backbone: Option<PathBuf>,
    /// Classify the mirrored image as well and average both
    #[arg(long)]
    mirror: bool,
    #[command(flatten)]
    kernels: KernelsArg,
}

#[derive(Debug, Args)]
struct KernelsArg {
    /// Kernels that compute the backbone
    #[arg(long, default_value_t, value_parser = PossibleValuesParser::new(KernelChoice::NAMES).try_map(|name| name.parse::<KernelChoice>()))]
    kernels: KernelChoice,
}

impl KernelsArg {
    /// Returns the chosen kernels; `None` for tract's operators.
    fn resolve(&self) -> Result<Option<Isa>, Failure> {
        if std::env::var_os("BLOOMCAST_KERNELS").is_some() {
            eprintln!("warning: the environment variable BLOOMCAST_KERNELS is ignored; use --kernels");
        }
        let kernels = self.kernels;
        kernels.resolve().map_err(|error| Failure::usage(anyhow!("--kernels {kernels}: {error}")))
    }
}

impl ModelArgs {
    fn bundle(&self) -> anyhow::Result<Bundle> {
        bundle(self.model.as_deref())
    }

    /// The backbone network of a bundle, with the chosen kernels.
    fn network(&self, bundle: &Bundle) -> Result<OnnxBackbone, Failure> {
        Ok(bundle.onnx_backbone(self.backbone.as_deref())?.with_kernels(self.kernels.resolve()?))
    }
}

fn bundle(model: Option<&Path>) -> anyhow::Result<Bundle> {
    Ok(match model {
        Some(path) => Bundle::read(path)?,
        None => Bundle::built_in()?,
    })
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}
