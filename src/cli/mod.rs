//! The commands, one function each, no logic.
//!
//! Exit codes: 0 done; 1 failed; 2 usage; 78 bad configuration.

mod backbone;
mod device;
#[cfg(feature = "fetch")]
mod fetching;
mod fleet;
mod papers;
mod progress;
mod workstation;

use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;

use bloomcast::bundle::Bundle;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use backbone::BackboneCommand;
#[cfg(feature = "demo")]
use device::DemoArgs;
use device::{BenchArgs, CheckArgs, ClassifyArgs, ConfigArgs};
use fleet::{InstallArgs, KeygenArgs, PushArgs, RollbackArgs, SignArgs, VerifyArgs};
use papers::PapersArgs;
use workstation::{CompareArgs, DatasetCommand, EvaluateArgs, TrainArgs};

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
    Check(CheckArgs),
    /// See it work: a broker inside, replayed photographs, events on the terminal
    #[cfg(feature = "demo")]
    Demo(DemoArgs),
    /// Name the flower on each image
    Classify(ClassifyArgs),
    /// Train a model on a folder of photographs, one folder a class
    Train(Box<TrainArgs>),
    /// Photographs: look at them before learning from them, or fetch some
    #[command(subcommand)]
    Dataset(DatasetCommand),
    /// Other networks whose features a head can be trained on
    #[command(subcommand)]
    Backbone(BackboneCommand),
    /// Finished runs side by side, best first
    Compare(CompareArgs),
    /// Loss, accuracy, per-class figures and confusion of a model on photographs
    Evaluate(EvaluateArgs),
    /// Time a frame, stage by stage, on this machine
    Bench(BenchArgs),
    /// Make a key that signs models, and its public half for the devices
    Keygen(KeygenArgs),
    /// Vouch for a model
    Sign(SignArgs),
    /// See who vouches for a model, and that nothing of it was altered
    Verify(VerifyArgs),
    /// Put a model into this device's store
    Install(InstallArgs),
    /// Send a model to devices, and wait until each has confirmed it
    Push(PushArgs),
    /// Let the model before decide again, here or on devices
    Rollback(RollbackArgs),
    /// Write man pages and completions, for a package
    #[command(hide = true)]
    Papers(PapersArgs),
}

/// An error and the exit code that goes with it.
pub struct Failure {
    pub code: u8,
    pub error: anyhow::Error,
}

/// Bad configuration (sysexits.h, EX_CONFIG).
const CONFIG: u8 = 78;

impl Failure {
    /// A command line that makes no sense.
    fn usage(error: impl Into<anyhow::Error>) -> Self {
        Failure { code: 2, error: error.into() }
    }

    /// Whether it is only that nobody reads on.
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
            Command::Papers(args) => papers::papers(&args),
        }
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

/// A model, and how it looks.
#[derive(Debug, Args)]
struct ModelArgs {
    /// A .bloom file; the one inside the program where none is named
    #[arg(long)]
    model: Option<PathBuf>,
    /// The ONNX file the model was made for, where neither the program nor the model has it
    #[arg(long)]
    backbone: Option<PathBuf>,
    /// Look at each image mirrored as well, and take the mean
    #[arg(long)]
    mirror: bool,
}

impl ModelArgs {
    fn bundle(&self) -> anyhow::Result<Bundle> {
        bundle(self.model.as_deref())
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
