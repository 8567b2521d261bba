//! The commands that sign models and deploy them to devices: keygen, sign, verify, install, push, rollback.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use bloomcast::bundle::{self, Bundle, Keyring, PrivateKey, archive};
use bloomcast::config::Config;
use bloomcast::mqtt::topics::{DeviceName, Topics};
use bloomcast::update::device::Store;
use bloomcast::update::device::admission::Refusal;
use bloomcast::update::device::local_install::{InstallError, InstallOptions, install as install_bundle};
use bloomcast::update::device::model_loader::ModelLoader;
use bloomcast::update::device::store::ModelSlot;
use bloomcast::update::protocol::{UpdateStatus, identity};
use bloomcast::update::workstation::delivery::PushPayload;
use bloomcast::update::workstation::push::{PushOptions, push};
use bloomcast::update::workstation::rollback::rollback_device;
use clap::{Args, value_parser};

use super::device::ConfigArgs;
use super::progress::Devices;
use super::{Failure, show};

#[derive(Debug, Args)]
pub struct KeygenArgs {
    /// The private key to write; the public key is written beside it [default: ~/.config/bloomcast/trainer.key]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct KeyArg {
    /// The private key [default: ~/.config/bloomcast/trainer.key]
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct SignArgs {
    /// The model bundle (.bloom)
    bundle: PathBuf,
    #[command(flatten)]
    key: KeyArg,
    /// The signed bundle to write [default: replace the bundle]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The format to write: 1 for devices with an older version of the program, which know no unknown classes [default: as it is]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1))]
    format: Option<u32>,
    /// ONNX file of the backbone, for --format with a model that was trained on another one than the built-in
    #[arg(long, value_name = "FILE", requires = "format")]
    backbone: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The model bundle (.bloom)
    bundle: PathBuf,
    /// A public key, or a folder of public keys [default: ~/.config/bloomcast/trainer.pub]
    #[arg(long, value_name = "PATH")]
    trusted: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct InstallArgs {
    /// The model bundle (.bloom)
    bundle: PathBuf,
    #[command(flatten)]
    config: ConfigArgs,
    /// Install without a trusted signature
    #[arg(long)]
    trust: bool,
    /// Install the model even if it is not newer, or was rolled back
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub struct PushArgs {
    /// The model bundle (.bloom), signed
    bundle: PathBuf,
    /// A device name; may be repeated
    #[arg(long, value_name = "NAME", required_unless_present = "group")]
    device: Vec<String>,
    /// A group of devices in the configuration's [fleet.groups]; may be repeated
    #[arg(long, value_name = "NAME")]
    group: Vec<String>,
    #[command(flatten)]
    config: ConfigArgs,
    /// Push to N devices first, and to the others once these have confirmed
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    canary: Option<u16>,
    /// Check whether the model fits each device, and send nothing
    #[arg(long)]
    dry_run: bool,
    /// Push the model even if it is not newer, is worse on the same dataset, or lacks a class
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    key: KeyArg,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// A device name, reached over MQTT; may be repeated [default: this device's own store]
    #[arg(long, value_name = "NAME")]
    device: Vec<String>,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    key: KeyArg,
}

/// Returns the path of a file in the user's configuration folder.
fn in_config(name: &str) -> anyhow::Result<PathBuf> {
    Ok(bloomcast::system::paths::user_config()
        .context("neither HOME nor XDG_CONFIG_HOME is set; name a file")?
        .join(name))
}

impl KeyArg {
    fn path(&self) -> anyhow::Result<PathBuf> {
        self.key.clone().map_or_else(|| in_config("trainer.key"), Ok)
    }

    fn read(&self) -> anyhow::Result<PrivateKey> {
        let path = self.path()?;
        if self.key.is_none() && !path.exists() {
            return Err(anyhow!("{}: no such key; `bloomcast keygen` creates one", path.display()));
        }
        Ok(PrivateKey::read(&path)?)
    }
}

pub fn keygen(args: &KeygenArgs) -> Result<(), Failure> {
    let path = args.out.clone().map_or_else(|| in_config("trainer.key"), Ok)?;
    if let Some(folder) = path.parent().filter(|_| args.out.is_none()) {
        fs::create_dir_all(folder).map_err(|e| anyhow!("{}: {e}", folder.display()))?;
    }
    let public = PrivateKey::generate(&path)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: the private key, keep it secret", path.display())?;
    writeln!(out, "{}: the public key, copy it into each device's model.trusted_keys", public.display())?;
    Ok(())
}

pub fn sign(args: &SignArgs) -> Result<(), Failure> {
    let key = args.key.read()?;
    let file = args.bundle.display().to_string();
    let mut bytes = read(&args.bundle)?;
    if args.format.is_some() {
        bytes = Bundle::from_bytes(&file, &bytes)?.to_format_1(args.backbone.as_deref())?.to_bytes();
    }
    let signed = bundle::sign(&file, &bytes, &key)?;
    let out = args.out.as_ref().unwrap_or(&args.bundle);
    archive::write_atomically(out, &signed).map_err(|e| anyhow!("{}: {e}", out.display()))?;
    writeln!(std::io::stdout(), "{}: signed by {}", out.display(), key.public().id())?;
    Ok(())
}

pub fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let trusted = args.trusted.clone().map_or_else(|| in_config("trainer.pub"), Ok)?;
    let ring = if trusted.is_dir() { Keyring::read(&trusted)? } else { Keyring::from_file(&trusted)? };
    let bundle = Bundle::read(&args.bundle)?;
    let name = ring.verify_signer(bundle.signer()).map_err(|e| anyhow!("{}: {e}", args.bundle.display()))?;
    let manifest = bundle.manifest();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: valid, signed by {name}", args.bundle.display())?;
    writeln!(out, "{} {}: {}", manifest.name, manifest.version, manifest.classes.names().join(", "))?;
    Ok(())
}

pub fn install(args: &InstallArgs) -> Result<(), Failure> {
    let config = args.config.load()?;
    let store = store(&config)?;
    let loader = ModelLoader::new(&config.models, config.isa().map_err(Failure::config)?, Store::read_only);
    let loader = loader.with_view(config.view);
    let (file, bytes) = (args.bundle.display().to_string(), read(&args.bundle)?);
    let options = InstallOptions { signature_required: !args.trust, force: args.force };
    let model = match install_bundle(&file, &bytes, &store, &loader, &config.update, options) {
        // The message of a bundle's error names the file.
        Err(InstallError::Refused(error)) if !matches!(error, Refusal::Bundle(_)) => {
            return Err(anyhow!("{file}: {error}").into());
        }
        installed => installed?,
    };
    writeln!(std::io::stdout(), "{model} is valid; it is active, on trial, once the daemon is reloaded or started")?;
    Ok(())
}

pub fn push_bundle(args: &PushArgs) -> Result<(), Failure> {
    let config = args.config.load_with_credentials()?;
    let devices = devices(&args.device, &args.group, &config).map_err(Failure::usage)?;
    let (file, bytes) = (args.bundle.display().to_string(), read(&args.bundle)?);
    let bundle = Bundle::from_bytes(&file, &bytes)?;
    if bundle.signer().is_none() {
        return Err(anyhow!("{file}: not signed; devices accept only signed bundles (see `bloomcast sign`)").into());
    }
    if bundle.contents().self_test.is_none() {
        return Err(anyhow!("{file}: the bundle contains no self-test, which devices require; train it again").into());
    }
    // Signs the command without which a device refuses an older model.
    let key = args.force.then(|| args.key.read()).transpose()?;
    let payload = PushPayload {
        model: identity(bundle.manifest(), bundle.sha256()),
        manifest: bundle.manifest().clone(),
        bytes,
        packet_bytes_max: config.connection.access.packet_bytes_max,
        force: args.force,
        key,
    };
    let options = PushOptions { canary: args.canary.map(usize::from), dry_run: args.dry_run };
    let bars = Devices::default();
    let access = config.connection.access.clone();
    let report = push(&access, devices, &payload, &options, &|devices| bars.show(devices))?;
    drop(bars);
    let printed = show(&report, args.json);
    // A device failure determines the exit code even if standard output is closed.
    match report.is_good() {
        true => printed,
        false => Err(anyhow!("not every device accepted the model").into()),
    }
}

pub fn rollback(args: &RollbackArgs) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if args.device.is_empty() {
        let config = args.config.load()?;
        let back = match store(&config)?.roll_back()?.current {
            ModelSlot::BuiltIn => "the built-in model".to_owned(),
            ModelSlot::Slot(slot) => slot.to_string(),
        };
        writeln!(out, "{back} is active once the daemon is reloaded or started")?;
        return Ok(());
    }
    let config = args.config.load_with_credentials()?;
    let key = args.key.read()?;
    let access = config.connection.access.clone();
    let devices = devices(&args.device, &[], &config).map_err(Failure::usage)?;
    let mut failed = 0;
    for topics in &devices {
        let rolled_back = match rollback_device(&access, topics, &key) {
            Ok(answer) if answer.status == UpdateStatus::RolledBack => Ok(answer.model),
            Ok(answer) => Err(anyhow!("{}: refused: {}", topics.device(), answer.reason.unwrap_or_default())),
            Err(error) => Err(error.into()),
        };
        match rolled_back {
            // Continues with the other devices even if standard output is closed.
            Ok(model) => drop(writeln!(out, "{}: {model} is rolled back", topics.device())),
            Err(error) => {
                failed += 1;
                eprintln!("error: {error}");
            }
        }
    }
    match failed {
        0 => Ok(()),
        n => Err(anyhow!("{n} of {} devices were not rolled back", devices.len()).into()),
    }
}

fn read(bundle: &Path) -> anyhow::Result<Vec<u8>> {
    archive::read_file(bundle).map_err(|e| anyhow!("model {}: {e}", bundle.display()))
}

/// Returns this device's store.
fn store(config: &Config) -> anyhow::Result<Store> {
    Ok(ModelLoader::new(&config.models, None, Store::new).store()?.clone())
}

/// Returns the topics of each device once, in the order of the arguments.
fn devices(names: &[String], groups: &[String], config: &Config) -> anyhow::Result<Vec<Topics>> {
    let named = |name: &String| DeviceName::new(name).map_err(|e| anyhow!("--device {name:?}: {e}"));
    let mut all: Vec<DeviceName> = names.iter().map(named).collect::<Result<_, _>>()?;
    for group in groups {
        let members = config.groups.get(group).with_context(|| {
            let names: Vec<&str> = config.groups.keys().map(String::as_str).collect();
            match names[..] {
                [] => format!("--group {group}: no groups are configured; --config names a file with [fleet.groups]"),
                _ => format!("--group {group}: not in [fleet.groups]; there: {}", names.join(", ")),
            }
        })?;
        all.extend(members.iter().cloned());
    }
    let mut topics: Vec<Topics> = Vec::new();
    for device in all {
        if !topics.iter().any(|known| *known.device() == device) {
            topics.push(config.topics.for_device(device));
        }
    }
    Ok(topics)
}
