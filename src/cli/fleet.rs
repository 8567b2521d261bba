//! The commands that vouch for models and bring them to devices: keygen, sign, verify, install, push, rollback.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use bloomcast::bundle::{self, Bundle, Keyring, PrivateKey, archive};
use bloomcast::config::Config;
use bloomcast::mqtt::topics::{DeviceName, Topics};
use bloomcast::update::device::Store;
use bloomcast::update::device::admission::{self, Refusal, Trust};
use bloomcast::update::device::model_loader::ModelLoader;
use bloomcast::update::device::store::{ModelSlot, Phase};
use bloomcast::update::protocol::{UpdateStatus, identity, objection};
use bloomcast::update::workstation::delivery::PushPayload;
use bloomcast::update::workstation::push::{PushOptions, push};
use bloomcast::update::workstation::rollback::rollback_device;
use clap::Args;

use super::device::ConfigArgs;
use super::progress::Devices;
use super::{Failure, show};

#[derive(Debug, Args)]
pub struct KeygenArgs {
    /// The private key; its public half is written beside it [default: ~/.config/bloomcast/trainer.key]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct KeyArg {
    /// The private key that signs [default: ~/.config/bloomcast/trainer.key]
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct SignArgs {
    bundle: PathBuf,
    #[command(flatten)]
    key: KeyArg,
    /// Where the signed bundle is written; over the unsigned one where none is named
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    bundle: PathBuf,
    /// A public key, or a folder with some [default: ~/.config/bloomcast/trainer.pub]
    #[arg(long, value_name = "PATH")]
    trusted: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct InstallArgs {
    bundle: PathBuf,
    #[command(flatten)]
    config: ConfigArgs,
    /// Vouch for it yourself: no signature is asked for
    #[arg(long)]
    trust: bool,
    /// Take it though it is not newer, or was taken back
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub struct PushArgs {
    bundle: PathBuf,
    /// A device by its name; may be given several times
    #[arg(long, value_name = "NAME", required_unless_present = "group")]
    device: Vec<String>,
    /// A group of devices of the configuration's [fleet.groups]; may be given several times
    #[arg(long, value_name = "NAME")]
    group: Vec<String>,
    #[command(flatten)]
    config: ConfigArgs,
    /// So many devices first, and the others only once these have confirmed
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    canary: Option<u16>,
    /// See whether the model fits each device, and send nothing
    #[arg(long)]
    dry_run: bool,
    /// Send a model that is a step back: not newer, worse on the same photographs, or without a class
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    key: KeyArg,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// A device by its name, over MQTT; may be given several times. This device's own store where none is named
    #[arg(long, value_name = "NAME")]
    device: Vec<String>,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    key: KeyArg,
}

/// What stands in the user's folder.
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
            return Err(anyhow!("{}: no key is there; `bloomcast keygen` makes one", path.display()));
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
    writeln!(out, "{}: keep it to yourself", path.display())?;
    writeln!(out, "{}: copy it into each device's model.trusted_keys", public.display())?;
    Ok(())
}

pub fn sign(args: &SignArgs) -> Result<(), Failure> {
    let key = args.key.read()?;
    let file = args.bundle.display().to_string();
    let signed = bundle::sign(&file, &read(&args.bundle)?, &key)?;
    let out = args.out.as_ref().unwrap_or(&args.bundle);
    archive::write_file(out, &signed).map_err(|e| anyhow!("{}: {e}", out.display()))?;
    writeln!(std::io::stdout(), "{}: signed by {}", out.display(), key.public().id())?;
    Ok(())
}

pub fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let trusted = args.trusted.clone().map_or_else(|| in_config("trainer.pub"), Ok)?;
    let ring = if trusted.is_dir() { Keyring::read(&trusted)? } else { Keyring::from_file(&trusted)? };
    let bundle = Bundle::read(&args.bundle)?;
    let name = ring.trust(bundle.signer()).map_err(|e| anyhow!("{}: {e}", args.bundle.display()))?;
    let manifest = bundle.manifest();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}: good, signed by {name}", args.bundle.display())?;
    writeln!(out, "{} {}: {}", manifest.name, manifest.version, manifest.classes.names().join(", "))?;
    Ok(())
}

pub fn install(args: &InstallArgs) -> Result<(), Failure> {
    let config = args.config.load()?;
    let store = store(&config)?;
    // Beside what decides now, which is only looked at.
    let shelf = ModelLoader::of(&config, Store::for_looking);
    let deciding = shelf.deciding()?;
    let present = deciding.loaded.model;
    let (file, bytes) = (args.bundle.display().to_string(), read(&args.bundle)?);
    let trust = if args.trust { Trust::Caller } else { Trust::Keys };
    let refused = |error: Refusal| match error {
        // It names the file itself.
        Refusal::Bundle(error) => anyhow!(error),
        error => anyhow!("{file}: {error}"),
    };
    let vouched = admission::vouched(&file, &bytes, &trust, &config).map_err(refused)?;
    let model = identity(vouched.manifest(), vouched.sha256());
    let before = present.identity();
    if model == before {
        return Err(anyhow!("{model} decides already").into());
    }
    if let Some(objection) = objection(&model, &before, &deciding.state).filter(|_| !args.force) {
        return Err(anyhow!("{objection}; --force installs it nevertheless").into());
    }
    admission::prove(vouched, &config, &shelf, &present).map_err(refused)?;
    store.try_out(model.clone(), &bytes, Phase::Waiting)?;
    writeln!(
        std::io::stdout(),
        "{model} has proved itself; it decides, on trial, once the daemon is reloaded or started"
    )?;
    Ok(())
}

pub fn push_bundle(args: &PushArgs) -> Result<(), Failure> {
    let config = args.config.load()?;
    let devices = devices(&args.device, &args.group, &config).map_err(Failure::usage)?;
    let (file, bytes) = (args.bundle.display().to_string(), read(&args.bundle)?);
    let bundle = Bundle::from_bytes(&file, &bytes)?;
    if bundle.signer().is_none() {
        return Err(anyhow!("{file}: it is not signed, and no device would take it; `bloomcast sign` signs it").into());
    }
    if bundle.parts().self_test.is_none() {
        return Err(anyhow!("{file}: it carries no self-test, and no device would take it; train it anew").into());
    }
    // It signs the order that a device wants to see before it goes to an older model.
    let key = args.force.then(|| args.key.read()).transpose()?;
    let parcel = PushPayload {
        model: identity(bundle.manifest(), bundle.sha256()),
        manifest: bundle.manifest().clone(),
        bytes,
        packet_bytes_max: config.mqtt.packet_bytes_max,
        force: args.force,
        key,
    };
    let plan = PushOptions { canary: args.canary.map(usize::from), dry_run: args.dry_run };
    let shown = Devices::default();
    let access = config.access().map_err(Failure::config)?;
    let report = push(&access, devices, &parcel, &plan, &|devices| shown.show(devices))?;
    drop(shown);
    let told = show(&report, args.json);
    // Comes first: that nobody reads on changes nothing about it.
    match report.is_good() {
        true => told,
        false => Err(anyhow!("not every device took the model").into()),
    }
}

pub fn rollback(args: &RollbackArgs) -> Result<(), Failure> {
    let config = args.config.load()?;
    let mut out = std::io::stdout().lock();
    if args.device.is_empty() {
        let back = match store(&config)?.take_back()?.current {
            ModelSlot::BuiltIn => "the model inside the program".to_owned(),
            ModelSlot::Slot(slot) => slot.to_string(),
        };
        writeln!(out, "{back} decides once the daemon is reloaded or started")?;
        return Ok(());
    }
    let key = args.key.read()?;
    let access = config.access().map_err(Failure::config)?;
    let devices = devices(&args.device, &[], &config).map_err(Failure::usage)?;
    let mut failed = 0;
    for topics in &devices {
        let gone = match rollback_device(&access, topics, &key) {
            Ok(answer) if answer.answer == UpdateStatus::RolledBack => Ok(answer.model),
            Ok(answer) => Err(format!("{}: refused: {}", topics.device(), answer.reason.unwrap_or_default())),
            Err(error) => Err(error.to_string()),
        };
        match gone {
            // Whether somebody reads it or not, the others are next.
            Ok(model) => drop(writeln!(out, "{}: {model} is taken back", topics.device())),
            Err(error) => {
                failed += 1;
                eprintln!("error: {error}");
            }
        }
    }
    match failed {
        0 => Ok(()),
        n => Err(anyhow!("{n} of {} devices did not go back", devices.len()).into()),
    }
}

fn read(bundle: &Path) -> anyhow::Result<Vec<u8>> {
    archive::read_file(bundle).map_err(|e| anyhow!("model {}: {e}", bundle.display()))
}

/// Of this device.
fn store(config: &Config) -> anyhow::Result<Store> {
    let ModelLoader { bundle, store, .. } = ModelLoader::of(config, Store::new);
    match (store, bundle) {
        (Some(store), _) => Ok(store),
        (None, Some(_)) => Err(anyhow!("model.bundle names the model of this device; empty it to install others")),
        (None, None) => Err(anyhow!("model.store is empty: this device keeps no models")),
    }
}

/// Each device once, in the order in which it was named.
fn devices(names: &[String], groups: &[String], config: &Config) -> anyhow::Result<Vec<Topics>> {
    let mut all: Vec<&String> = names.iter().collect();
    for group in groups {
        let known = &config.fleet.groups;
        let members = known.get(group).with_context(|| {
            let names: Vec<&str> = known.keys().map(String::as_str).collect();
            format!("--group {group}: not in [fleet.groups]; there: {}", names.join(", "))
        })?;
        all.extend(members);
    }
    let mut topics: Vec<Topics> = Vec::new();
    for name in all {
        let device = DeviceName::new(name).map_err(|e| anyhow!("--device {name:?}: {e}"))?;
        if !topics.iter().any(|there| *there.device() == device) {
            topics.push(config.topics_of(device));
        }
    }
    Ok(topics)
}
