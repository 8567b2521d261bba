//! The configuration: the defaults inside the program, under a file, under `BLOOMCAST__…` variables, under flags. It is
//! validated and parsed once.
//!
//! `systemd/bloomcast.toml` has every setting with its default and its reason. The error for an unknown key has its name and
//! line.

mod key;
mod layers;
mod tables;

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bloomcast_kernels::{Isa, default_threads};
use serde::Deserialize;

use crate::bundle::ViewOptions;
use crate::camera::rpicam::RpicamOptions;
use crate::camera::{CaptureOptions, Pace, SourceOptions, SupervisorOptions};
use crate::decide::{Policy, Thresholds};
use crate::mqtt::access::{Address, Credentials};
use crate::mqtt::discovery::DiscoveryOptions;
use crate::mqtt::outbox::OutboxLimits;
use crate::mqtt::topics::check_prefix;
use crate::mqtt::{BrokerAccess, ConnectionOptions, DeviceName, Topics};
use crate::update::device::{ModelFiles, UpdateOptions};
use crate::update::protocol::TrialLimits;
use crate::vision::backbone::{KernelChoice, UnsupportedKernels};
use crate::vision::quality::QualityLimits;
use crate::vision::transform::{Region, Rotation};
use crate::vision::{ScanBudget, Transform, View};
use key::Key;
use layers::Places;
use tables::{Source, Tables, ViewChoice};

/// Every setting with its default and its reason.
pub const DEFAULTS: &str = include_str!("../../systemd/bloomcast.toml");

/// The port of MQTT, and the default of `mqtt.port`, which the installed file has.
const DEFAULT_PORT: u16 = 1883;

/// An error in the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("{path}: {reason}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// A key does not exist.
    #[error("{place}: unknown setting `{key}`{hint}")]
    Unknown {
        /// File and line, variable or flag.
        place: String,
        /// The unknown key.
        key: String,
        /// The most similar key, as a suffix of the message; may be empty.
        hint: String,
    },
    /// A file is not valid TOML.
    #[error("{place}: {reason}")]
    Syntax {
        /// File and line.
        place: String,
        /// The cause.
        reason: String,
    },
    /// A flag is not a setting; its text and the expected form.
    #[error("{0}")]
    Value(String),
    /// A value has the wrong type or is outside of its range.
    #[error("{place}{key} = {value}: {reason}")]
    Invalid {
        /// File and line, variable or flag, as a prefix of the message; empty for a default.
        place: String,
        /// Key of the setting.
        key: String,
        /// The value as text.
        value: String,
        /// The expected range or form.
        reason: String,
    },
}

impl ConfigError {
    fn invalid(key: &str, value: &dyn fmt::Display, reason: impl Into<String>) -> Self {
        ConfigError::Invalid { place: String::new(), key: key.into(), value: value.to_string(), reason: reason.into() }
    }
}

/// The configuration, parsed and valid.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The camera.
    pub camera: CameraConfig,
    /// The paths of the device's models.
    pub models: ModelFiles,
    /// The kernels that compute a backbone; [`Config::isa`] resolves them on this machine.
    pub kernels: KernelChoice,
    /// How models look at frames.
    pub view: ViewOptions,
    /// Threads that compute a frame, 1 to [`bloomcast_kernels::THREADS_MAX`].
    pub threads: usize,
    /// Options of updates; they hold the decision rules.
    pub update: UpdateOptions,
    /// The device's topics.
    pub topics: Topics,
    /// The connection to the broker.
    pub connection: ConnectionOptions,
    /// Home Assistant's discovery.
    pub discovery: DiscoveryOptions,
    /// Limits of the events that wait for the broker.
    pub outbox: OutboxLimits,
    /// Groups of devices, for `push --group`.
    pub groups: BTreeMap<String, Vec<DeviceName>>,
    /// The log.
    pub log: LogConfig,
    /// The file of the broker's credentials, if one is configured.
    pub credentials_file: Option<PathBuf>,
    /// Warnings to be logged once: settings under an old name, environment variables that are ignored.
    pub warnings: Vec<String>,
    /// A warning for a device: its name differs from the host's.
    pub device_warning: Option<String>,
}

/// The configuration of the camera.
#[derive(Debug, Clone, PartialEq)]
pub struct CameraConfig {
    /// Name in messages.
    pub name: String,
    /// Source of the frames.
    pub source: SourceOptions,
    /// Interval between two classified frames, in milliseconds; 0 classifies every frame.
    pub interval_ms: u64,
    /// Difference up to which a frame equals the previous one, in grey levels; 0 classifies every frame.
    pub still_threshold: f32,
    /// Rotation, mirroring and cropping of each frame.
    pub transform: Transform,
    /// Limits below which a frame is not classified.
    pub quality_limits: QualityLimits,
    /// A camera without a frame for this long is reopened.
    pub stall: Duration,
    /// The first wait before it is reopened.
    pub reopen_min: Duration,
    /// The longest wait before it is reopened.
    pub reopen_max: Duration,
}

/// The configuration of the log.
#[derive(Debug, Clone, PartialEq)]
pub struct LogConfig {
    /// The least severe level that is logged.
    pub level: LogLevel,
    /// Interval at which the counters are logged.
    pub counters_interval: Duration,
}

/// A level of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Errors.
    Error,
    /// Warnings.
    Warn,
    /// Events and changes of state.
    Info,
    /// Every packet.
    Debug,
}

impl CameraConfig {
    /// Returns the options of the camera's supervisor. A replay has a pace of its own.
    pub fn supervisor(&self, pace: &Pace) -> SupervisorOptions {
        let is_replay = matches!(self.source, SourceOptions::Replay { .. });
        SupervisorOptions {
            pace: (!is_replay).then(|| pace.clone()),
            stall: self.stall,
            reopen_min: self.reopen_min,
            reopen_max: self.reopen_max,
        }
    }
}

impl Config {
    /// Reads the layers: the defaults, `file`, the process's environment, then `overrides`, each `key=value`. The broker's
    /// credentials are not read: see [`Config::with_credentials`].
    ///
    /// # Errors
    /// If a file cannot be read, a key is unknown, or a value has the wrong type or is out of range.
    pub fn load(file: Option<&Path>, overrides: &[String]) -> Result<Self, ConfigError> {
        // A variable that is not UTF-8 is not a setting.
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self::layered(file, env::vars_os().filter_map(text), overrides)
    }

    /// Parses the defaults and `settings`, each `key=value`, without a file or the environment.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_settings(settings: &[String]) -> Result<Self, ConfigError> {
        Self::layered(None, std::iter::empty(), settings)
    }

    /// Reads the broker's credentials: those of `mqtt.credentials_file`, else those that systemd passes to the service. Commands
    /// that use no broker do not call this.
    ///
    /// # Errors
    /// If the file cannot be read or is incomplete.
    pub fn with_credentials(mut self) -> Result<Self, ConfigError> {
        self.connection.access.credentials = match &self.credentials_file {
            None => service_credentials(env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from))?,
            Some(file) => Some(credentials(file).map_err(|error| match error {
                ConfigError::Read { path, reason } => {
                    ConfigError::invalid("mqtt.credentials_file", &path.display(), reason)
                }
                error => error,
            })?),
        };
        Ok(self)
    }

    /// Returns the kernels that `model.kernels` chooses on this machine; `None` for tract's operators.
    ///
    /// # Errors
    /// If the processor lacks them.
    pub fn isa(&self) -> Result<Option<Isa>, ConfigError> {
        let invalid =
            |error: UnsupportedKernels| ConfigError::invalid("model.kernels", &self.kernels, error.to_string());
        self.kernels.resolve().map_err(invalid)
    }

    /// Whether a connection to the broker, with its subscriptions, is the same as with another configuration.
    pub fn has_connection_of(&self, other: &Config) -> bool {
        self.connection == other.connection
            && self.topics.root() == other.topics.root()
            && self.discovery == other.discovery
    }

    fn layered(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        overrides: &[String],
    ) -> Result<Self, ConfigError> {
        let (tables, places) = layers::merge::<Tables>(DEFAULTS, file, environment, overrides)?;
        let config = check_ranges(&tables).and_then(|()| Self::parse(&tables, &places));
        let mut config = config.map_err(|error| places.locate(error))?;
        config.warnings = places.into_warnings();
        Ok(config)
    }

    fn parse(tables: &Tables, places: &Places) -> Result<Self, ConfigError> {
        let Tables { camera, model, decide, mqtt, fleet, log, device } = tables;
        let ms = Duration::from_millis;
        let (topics, device_warning) = topics(&device.name, mqtt)?;
        Ok(Config {
            camera: CameraConfig {
                name: camera.name.clone(),
                source: source(camera)?,
                interval_ms: camera.interval_ms,
                still_threshold: camera.still_threshold,
                transform: transform(camera)?,
                quality_limits: QualityLimits { dark: camera.dark, blank: camera.blank, blurred: camera.blurred },
                stall: ms(camera.stall_ms),
                reopen_min: ms(camera.reopen_ms_min),
                reopen_max: ms(camera.reopen_ms_max),
            },
            models: ModelFiles {
                bundle: non_empty(&model.bundle),
                backbone: non_empty(&model.backbone),
                store: non_empty(&model.store),
            },
            kernels: model.kernels,
            view: ViewOptions {
                view: match model.view {
                    ViewChoice::Auto => None,
                    ViewChoice::Whole => Some(View::Whole),
                    ViewChoice::Scan => Some(View::Scan),
                },
                scan_budget: ScanBudget { mean: model.scan_budget },
            },
            threads: if model.threads == 0 { default_threads() } else { model.threads.into() },
            update: UpdateOptions {
                trusted_keys: model.trusted_keys.clone(),
                offer_bytes_max: model.offer_bytes_max,
                slowdown_max: model.slowdown_max,
                trial: TrialLimits { frames: model.trial_frames, seconds: model.trial_s_max },
                policy: policy(decide)?,
                discovery: mqtt.discovery.enabled,
                packet_bytes_max: mqtt.packet_bytes_max,
            },
            topics,
            connection: ConnectionOptions {
                access: access(mqtt, places)?,
                reconnect_min: ms(mqtt.reconnect_ms_min),
                reconnect_max: ms(mqtt.reconnect_ms_max),
                inflight_max: mqtt.inflight_max,
                shutdown_timeout: ms(mqtt.shutdown_timeout_ms),
            },
            discovery: discovery(&mqtt.discovery)?,
            outbox: OutboxLimits { entries_max: mqtt.outbox_entries_max, bytes_max: mqtt.outbox_bytes_max },
            credentials_file: non_empty(&mqtt.credentials_file),
            groups: groups(fleet)?,
            log: LogConfig { level: log.level, counters_interval: Duration::from_secs(log.counters_interval_s) },
            warnings: Vec::new(),
            device_warning,
        })
    }
}

fn discovery(discovery: &tables::DiscoveryTable) -> Result<DiscoveryOptions, ConfigError> {
    let tables::DiscoveryTable { enabled, status_topic, .. } = discovery.clone();
    check_prefix(&status_topic).map_err(|e| {
        ConfigError::invalid("mqtt.discovery.status_topic", &format!("{status_topic:?}"), e.to_string())
    })?;
    Ok(DiscoveryOptions { enabled, status_topic })
}

/// Returns the path; `None` if the setting is empty.
fn non_empty(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

/// Checks the numbers with a fraction, and the order of values; [`key`] has the ranges of whole numbers.
fn check_ranges(tables: &Tables) -> Result<(), ConfigError> {
    let Tables { camera, model, mqtt, .. } = tables;
    if !(model.slowdown_max >= 1.0 && model.slowdown_max <= 1000.0) {
        return Err(ConfigError::invalid("model.slowdown_max", &model.slowdown_max, "expected 1 to 1000"));
    }
    if !(model.scan_budget >= 1.0 && model.scan_budget <= 100.0) {
        return Err(ConfigError::invalid("model.scan_budget", &model.scan_budget, "expected 1 to 100"));
    }
    let gray_levels = [
        ("camera.still_threshold", camera.still_threshold),
        ("camera.dark", camera.dark),
        ("camera.blank", camera.blank),
    ];
    if let Some((key, value)) = gray_levels.iter().find(|(_, value)| !(0.0..=255.0).contains(value)) {
        return Err(ConfigError::invalid(key, value, "expected 0 to 255 gray levels"));
    }
    if !(0.0..=10.0).contains(&camera.blurred) {
        return Err(ConfigError::invalid("camera.blurred", &camera.blurred, "expected 0 to 10"));
    }
    let ordered = [
        ("camera.reopen_ms_max", camera.reopen_ms_min, camera.reopen_ms_max),
        ("mqtt.reconnect_ms_max", mqtt.reconnect_ms_min, mqtt.reconnect_ms_max),
    ];
    if let Some((key, min, max)) = ordered.iter().find(|(_, min, max)| min > max) {
        return Err(ConfigError::invalid(key, max, format!("expected at least {min}, the first wait")));
    }
    Ok(())
}

fn transform(camera: &tables::CameraTable) -> Result<Transform, ConfigError> {
    let rotation = Rotation::from_degrees(camera.rotate)
        .ok_or_else(|| ConfigError::invalid("camera.rotate", &camera.rotate, "expected 0, 90, 180 or 270"))?;
    let region = Region::new(camera.region)
        .map_err(|e| ConfigError::invalid("camera.region", &format!("{:?}", camera.region), e.to_string()))?;
    Ok(Transform { rotation, flip: camera.flip, region })
}

/// Returns the device's topics, and a warning where its name is made of the host's and differs from it.
fn topics(name: &str, mqtt: &tables::MqttTable) -> Result<(Topics, Option<String>), ConfigError> {
    let invalid = |key, value: &str, reason: String| ConfigError::invalid(key, &format!("{value:?}"), reason);
    let (device, warning) = match name {
        "" => {
            let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            device_of_host(host.trim())?
        }
        name => (DeviceName::new(name).map_err(|e| invalid("device.name", name, e.to_string()))?, None),
    };
    check_prefix(&mqtt.base).map_err(|e| invalid("mqtt.base", &mqtt.base, e.to_string()))?;
    let prefix = &mqtt.discovery.prefix;
    check_prefix(prefix).map_err(|e| invalid("mqtt.discovery.prefix", prefix, e.to_string()))?;
    Ok((Topics::new(&mqtt.base, prefix, device), warning))
}

/// Returns the device name of a host, and a warning where it differs from the host's name.
fn device_of_host(host: &str) -> Result<(DeviceName, Option<String>), ConfigError> {
    let reason = format!("empty, and no device name can be made of the host name {host:?}; set a name");
    let device = DeviceName::from_host(host).ok_or_else(|| ConfigError::invalid("device.name", &"\"\"", reason))?;
    let warning = format!("device.name is empty; the host name {host:?} gives the device name \"{device}\"");
    let is_same = device.as_str() == host;
    Ok((device, (!is_same).then_some(warning)))
}

fn source(camera: &tables::CameraTable) -> Result<SourceOptions, ConfigError> {
    let (width, height, fps) = (camera.width, camera.height, camera.fps);
    Ok(match camera.source {
        Source::V4l2 => SourceOptions::V4l2 {
            device: camera.device.clone(),
            capture: CaptureOptions { width, height, fps, format: camera.format },
        },
        Source::Rpicam => SourceOptions::Rpicam(RpicamOptions {
            command: camera.rpicam.command.clone(),
            width,
            height,
            fps,
            frame_bytes_max: camera.frame_bytes_max as usize,
        }),
        Source::Replay => {
            let reason = "expected a folder or a list of images";
            let path = non_empty(&camera.replay.path);
            SourceOptions::Replay {
                path: path.ok_or_else(|| ConfigError::invalid("camera.replay.path", &"\"\"", reason))?,
                looped: camera.replay.looped,
                file_bytes_max: camera.frame_bytes_max,
            }
        }
    })
}

fn policy(decide: &tables::DecideTable) -> Result<Policy, ConfigError> {
    for (key, value) in [("decide.enter", decide.enter), ("decide.leave", decide.leave)] {
        if !(value > 0.0 && value <= 1.0) {
            return Err(ConfigError::invalid(key, &value, "expected a number above 0, at most 1"));
        }
    }
    if decide.leave > decide.enter {
        let reason = "expected at most decide.enter: the class would oscillate";
        return Err(ConfigError::invalid("decide.leave", &decide.leave, reason));
    }
    let mut class_thresholds = BTreeMap::new();
    for (class, own) in &decide.classes {
        let (enter, leave) = (own.enter.unwrap_or(decide.enter), own.leave.unwrap_or(decide.leave));
        if !(leave > 0.0 && leave <= enter && enter <= 1.0) {
            return Err(ConfigError::invalid("decide.classes", class, "expected 0 < leave ≤ enter ≤ 1"));
        }
        class_thresholds.insert(class.clone(), Thresholds { enter, leave });
    }
    Ok(Policy {
        smoothing: Duration::from_millis(decide.smoothing_ms),
        enter_dwell: Duration::from_millis(decide.enter_dwell_ms),
        leave_dwell: Duration::from_millis(decide.leave_dwell_ms),
        state_interval: Duration::from_millis(decide.state_interval_ms),
        thresholds: Thresholds { enter: decide.enter, leave: decide.leave },
        class_thresholds,
    })
}

fn groups(fleet: &tables::FleetTable) -> Result<BTreeMap<String, Vec<DeviceName>>, ConfigError> {
    let mut groups = BTreeMap::new();
    for (group, names) in &fleet.groups {
        if names.is_empty() {
            return Err(ConfigError::invalid("fleet.groups", group, "expected at least one device"));
        }
        let device = |name: &String| {
            let reason = |e| format!("{name:?} is not a device name: {e}");
            DeviceName::new(name).map_err(|e| ConfigError::invalid("fleet.groups", group, reason(e)))
        };
        groups.insert(group.clone(), names.iter().map(device).collect::<Result<_, _>>()?);
    }
    Ok(groups)
}

/// Returns the broker's address, without credentials. The port of `mqtt.host` replaces the default port and one of an inner layer.
fn access(mqtt: &tables::MqttTable, places: &Places) -> Result<BrokerAccess, ConfigError> {
    let Address { host, port } =
        Address::parse(&mqtt.host).map_err(|e| ConfigError::invalid("mqtt.host", &e.shown, e.reason))?;
    let is_outer = places.is_in_same_or_outer_layer(&Key::parse("mqtt.port"), &Key::parse("mqtt.host"));
    if let Some(port) = port.filter(|port| is_outer && ![*port, DEFAULT_PORT].contains(&mqtt.port)) {
        let reason = format!("mqtt.host has another port, {port}");
        return Err(ConfigError::invalid("mqtt.port", &mqtt.port, reason));
    }
    Ok(BrokerAccess {
        host,
        port: port.unwrap_or(mqtt.port),
        credentials: None,
        keep_alive: Duration::from_secs(mqtt.keep_alive_s),
        packet_bytes_max: mqtt.packet_bytes_max,
        connect_timeout: Duration::from_secs(mqtt.connect_timeout_s),
    })
}

/// Reads the credentials that systemd passes under the name `mqtt` (`LoadCredential=`); `None` if there are none, or the file is
/// blank: the package installs it empty, and the unit's default is an empty line.
fn service_credentials(folder: Option<PathBuf>) -> Result<Option<Credentials>, ConfigError> {
    let file = folder.map(|folder| folder.join("mqtt"));
    // What is not a text is an error of its own.
    let is_filled =
        |path: &PathBuf| path.exists() && fs::read_to_string(path).map_or(true, |text| !text.trim().is_empty());
    file.filter(is_filled).map(|path| credentials(&path)).transpose()
}

/// Reads a user name from the first line and a password from the second; a byte-order mark is skipped.
fn credentials(path: &Path) -> Result<Credentials, ConfigError> {
    let failed = |reason: String| ConfigError::Read { path: path.into(), reason };
    let text = fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
    let mut lines = text.strip_prefix('\u{feff}').unwrap_or(&text).lines();
    match (lines.next(), lines.next()) {
        (Some(user), Some(password)) if !user.is_empty() => {
            Ok(Credentials { user: user.into(), password: password.into() })
        }
        _ => Err(failed("expected the user name on the first line and the password on the second".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::Labels;

    fn labels() -> Labels {
        Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap()
    }

    fn load(text: &str, environment: &[(&str, &str)], overrides: &[&str]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.toml");
        fs::write(&path, text).unwrap();
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_owned()).collect();
        let short = |text: String| text.replace(&path.display().to_string(), "b.toml");
        let mut config = Config::layered(Some(&path), environment, &overrides).map_err(|e| short(e.to_string()))?;
        config.warnings = config.warnings.into_iter().map(short).collect();
        Ok(config)
    }

    #[test]
    fn the_defaults_are_valid() {
        let config = Config::layered(None, std::iter::empty(), &[]).unwrap();
        assert!(matches!(config.camera.source, SourceOptions::V4l2 { .. }));
        assert_eq!(config.update.policy.rules(&labels()).unwrap().thresholds.len(), 2);
        assert_eq!(config.warnings, [""; 0]);
        assert_eq!(config.isa().unwrap(), Some(Isa::best()));
    }

    #[test]
    fn flags_override_the_environment_which_overrides_the_file() {
        let file = "[camera]\nwidth = 1\nheight = 1\nfps = 1\n";
        let environment = [("BLOOMCAST__CAMERA__HEIGHT", "2"), ("BLOOMCAST__CAMERA__FPS", "2"), ("BLOOMCAST_X", "y")];
        let config = load(file, &environment, &["camera.fps=3"]).unwrap();
        let SourceOptions::V4l2 { capture: CaptureOptions { width, height, fps, .. }, .. } = config.camera.source
        else {
            panic!("the default source");
        };
        assert_eq!((width, height, fps), (1, 2, 3));
        let replay = ["camera.source=replay", "camera.replay.path=x", "camera.replay.looped=false"];
        let config = load("", &[], &replay).unwrap();
        assert!(matches!(config.camera.source, SourceOptions::Replay { looped: false, .. }));
    }

    #[test]
    fn group_names_are_free() {
        let config = load("[fleet.groups]\ngarden = [\"pi\", \"greenhouse\"]\n", &[], &[]).unwrap();
        let devices: Vec<&str> = config.groups["garden"].iter().map(DeviceName::as_str).collect();
        assert_eq!(devices, ["pi", "greenhouse"]);
    }

    #[test]
    fn thresholds_of_a_class_replace_the_common_ones() {
        let config = load("[decide.classes.roses]\nenter = 0.9\n", &[], &[]).unwrap();
        let policy = config.update.policy;
        assert_eq!(policy.class_thresholds["roses"], Thresholds { enter: 0.9, leave: 0.45 });
        assert_eq!(policy.thresholds, Thresholds { enter: 0.7, leave: 0.45 });
        assert!(policy.rules(&labels()).is_err());
    }

    #[test]
    fn thresholds_are_of_a_class_with_dots_or_umlauts() {
        let file =
            "[decide.classes.\"Rosa sp.\"]\nenter = 0.9\n[decide.classes.\"Ga\u{308}nseblümchen\"]\nleave = 0.3\n";
        let config = load(
            file,
            &[("BLOOMCAST__DECIDE__CLASSES__TULIPS__ENTER", "0.8")],
            &["decide.classes.\"Rosa sp.\".leave=0.6", "decide.classes.Gänseblümchen.enter=0.5"],
        )
        .unwrap();
        let labels = ["Gänseblümchen", "Rosa sp.", "Tulips", "daisy"].map(String::from);
        let rules = config.update.policy.rules(&Labels::new(labels.into()).unwrap()).unwrap();
        let own: Vec<_> = rules.thresholds.iter().map(|class| (class.enter, class.leave)).collect();
        assert_eq!(own, [(0.5, 0.3), (0.9, 0.6), (0.8, 0.45), (0.7, 0.45)]);
        // Over an entry of the file.
        let file = "[decide.classes.roses]\nenter = 0.9\nleave = 0.6\n";
        let config = load(file, &[("BLOOMCAST__DECIDE__CLASSES__ROSES__ENTER", "0.8")], &[]).unwrap();
        let thresholds = Thresholds { enter: 0.8, leave: 0.6 };
        assert_eq!(config.update.policy.class_thresholds, [("roses".to_owned(), thresholds)].into());
    }

    #[test]
    fn choices_are_accepted_in_any_case_and_hosts_as_urls() {
        let file = "[log]\nlevel = \"INFO\"\n[camera]\nformat = \"YUYV\"\n[model]\nkernels = \"Tract\"\n\
            [mqtt]\nhost = \" mqtt://broker.lan:1884 \"\n";
        let config = load(file, &[], &["camera.source=V4L2"]).unwrap();
        assert_eq!((config.log.level, config.kernels), (LogLevel::Info, KernelChoice::Tract));
        let access = config.connection.access;
        assert_eq!((access.host.as_str(), access.port), ("broker.lan", 1884));
        // The installed file has the default port; an outer layer replaces an inner one.
        for (file, flags) in
            [("port = 1884", &[][..]), ("port = 1883", &[]), ("port = 1885", &["mqtt.host=broker:1884"])]
        {
            let config = load(&format!("[mqtt]\nhost = \"broker:1884\"\n{file}\n"), &[], flags).unwrap();
            assert_eq!(config.connection.access.to_string(), "broker:1884", "{file}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        let config = load("\u{feff}[camera]\nname = \"window\"\n", &[], &[]).unwrap();
        assert_eq!(config.camera.name, "window");
    }

    #[test]
    fn a_host_name_with_a_dot_gives_a_device_name_and_a_warning() {
        let (device, warning) = device_of_host("pi.lan").unwrap();
        let expected = "device.name is empty; the host name \"pi.lan\" gives the device name \"pi\"";
        assert_eq!((device.as_str(), warning.as_deref()), ("pi", Some(expected)));
        assert_eq!(device_of_host("pi").unwrap().1, None);
        let error = device_of_host("").unwrap_err().to_string();
        assert!(error.starts_with("device.name = \"\": empty, and no device name"), "{error}");
    }

    #[test]
    fn a_variable_with_one_underscore_is_reported() {
        let expected = |name: &str, instead: &str| {
            format!(
                "the environment variable {name} is ignored; two underscores separate the parts of a name: {instead}"
            )
        };
        for (name, instead) in [
            ("BLOOMCAST_MQTT_HOST", "BLOOMCAST__MQTT__HOST"),
            ("BLOOMCAST_MQTT_KEEP_ALIVE_S", "BLOOMCAST__MQTT__KEEP_ALIVE_S"),
            ("BLOOMCAST_HOST", "BLOOMCAST__TABLE__KEY"),
        ] {
            assert_eq!(load("", &[(name, "1")], &[]).unwrap().warnings, [expected(name, instead)]);
        }
    }

    #[test]
    fn a_removed_environment_variable_is_reported() {
        let config = load("", &[("BLOOMCAST_KERNELS", "avx2")], &[]).unwrap();
        let warning =
            "the environment variable BLOOMCAST_KERNELS is ignored; use model.kernels or BLOOMCAST__MODEL__KERNELS";
        assert_eq!(config.warnings, [warning]);
        assert_eq!(config.kernels, KernelChoice::Auto);
    }

    #[test]
    fn an_old_key_works_and_is_reported_once() {
        let timeout = |config: &Config| config.connection.shutdown_timeout.as_millis();
        let warning = "mqtt.farewell_ms is now called mqtt.shutdown_timeout_ms; the old name still works";
        let file = "[mqtt]\nport = 1\nfarewell_ms = 70\n";
        let config = load(file, &[], &[]).unwrap();
        assert_eq!((timeout(&config), config.warnings), (70, vec![format!("b.toml:3: {warning}")]));
        let config = load(file, &[("BLOOMCAST__MQTT__FAREWELL_MS", "80")], &[]).unwrap();
        assert_eq!((timeout(&config), config.warnings.len()), (80, 2));
        let config = load(file, &[], &["mqtt.farewell_ms=90"]).unwrap();
        assert_eq!(timeout(&config), 90);
        let environment = [("BLOOMCAST__MQTT__SHUTDOWN_TIMEOUT_MS", "60"), ("BLOOMCAST__MQTT__FAREWELL_MS", "80")];
        for environment in [environment, [environment[1], environment[0]]] {
            assert_eq!(timeout(&load("", &environment, &[]).unwrap()), 60);
        }
        let flags = ["mqtt.shutdown_timeout_ms=60", "mqtt.farewell_ms=80"];
        for flags in [flags, [flags[1], flags[0]]] {
            assert_eq!(timeout(&load("", &[], &flags).unwrap()), 60);
        }
        let config = load("[mqtt]\nfarewell_ms = 70\nshutdown_timeout_ms = 60\n", &[], &[]).unwrap();
        assert_eq!(timeout(&config), 60, "the new name wins within a layer");
        let error = load("[mqtt]\nfarewell_ms = \"long\"\n", &[], &[]).unwrap_err();
        assert_eq!(error, "b.toml:2: mqtt.farewell_ms = \"long\": expected a whole number, 0 to 3600000");
    }

    #[test]
    fn unknown_and_unsupported_kernels_are_refused_with_the_choices() {
        let error = load("[model]\nkernels = \"sse9\"\n", &[], &[]).unwrap_err();
        let expected = "expected one of auto, avx512, avx2, neon, portable, tract";
        assert_eq!(error, format!("b.toml:2: model.kernels = \"sse9\": {expected}"));
        assert_eq!(load("", &[], &["model.kernels=tract"]).unwrap().isa().unwrap(), None);
        let unsupported = Isa::ALL.into_iter().find(|isa| !isa.is_supported()).expect("x86 has no NEON, ARM no AVX");
        let config = load("", &[], &[&format!("model.kernels={}", unsupported.name())]).unwrap();
        let error = config.isa().unwrap_err().to_string();
        let (name, best) = (unsupported.name(), Isa::best().name());
        let reason = format!("this processor lacks {name}; \"auto\" would select {best}");
        assert_eq!(error, format!("model.kernels = {name}: {reason}"));
    }

    #[test]
    fn names_errors_with_key_and_line() {
        let cases = [
            ("[camera]\n\nwidht = 640\n", "b.toml:3: unknown setting `camera.widht`, did you mean `camera.width`?"),
            ("[kamera]\nwidth = 1\n", "b.toml:1: unknown setting `kamera`, did you mean `camera`?"),
            ("zzzzzzzz = 1\n", "b.toml:1: unknown setting `zzzzzzzz`"),
            ("[mqtt]\nport = \"many\"\n", "b.toml:2: mqtt.port = \"many\": expected a whole number, 1 to 65535"),
            ("[mqtt]\nport = 1883.7\n", "b.toml:2: mqtt.port = 1883.7: expected a whole number, 1 to 65535"),
            ("[mqtt]\nport = 70000\n", "b.toml:2: mqtt.port = 70000: expected 1 to 65535"),
            (
                "[camera]\ninterval_ms = 0.2 # s\n",
                "b.toml:2: camera.interval_ms = 0.2: expected a whole number, 0 to 3600000",
            ),
            ("[decide]\nenter = true\n", "b.toml:2: decide.enter = true: expected a number"),
            ("[decide]\nenter = \"0.7\"\n", "b.toml:2: decide.enter = \"0.7\": expected a number"),
            ("[mqtt.discovery]\nenabled = 1\n", "b.toml:2: mqtt.discovery.enabled = 1: expected true or false"),
            ("[device]\nname = 7\n", "b.toml:2: device.name = 7: expected a text in quotes"),
            ("camera = 3\n", "b.toml:1: camera = 3: expected a table"),
            ("[[camera]]\nwidth = 3\n", "b.toml:1: camera = [[camera]]: expected a table"),
            ("[mqtt.host]\nname = \"a\"\n", "b.toml:1: mqtt.host = [mqtt.host]: expected a text in quotes"),
            (
                "[fleet.groups]\ngarden = \"pi\"\n",
                "b.toml:2: fleet.groups.garden = \"pi\": expected a list of texts in quotes",
            ),
            ("[log]\nlevel = \"loud\"\n", "b.toml:2: log.level = \"loud\": expected one of error, warn, info, debug"),
            ("[camera]\nsource = \"usb\"\n", "b.toml:2: camera.source = \"usb\": expected one of v4l2, rpicam, replay"),
            (
                "[mqtt]\nhost = \"mqtts://broker\"\n",
                "b.toml:2: mqtt.host = \"mqtts://broker\": connections with TLS are not supported",
            ),
            (
                "[mqtt]\nhost = \"broker:1884\"\nport = 1885\n",
                "b.toml:3: mqtt.port = 1885: mqtt.host has another port, 1884",
            ),
            ("[mqtt]\nport = 0\n", "b.toml:2: mqtt.port = 0: expected 1 to 65535"),
            (
                "[decide]\nleave = 0.9\n",
                "b.toml:2: decide.leave = 0.9: expected at most decide.enter: the class would oscillate",
            ),
            ("[decide]\nenter = 7\n", "b.toml:2: decide.enter = 7: expected a number above 0, at most 1"),
            ("[decide.classes.roses]\nentre = 0.9\n", "b.toml:2: unknown setting `decide.classes.roses.entre`"),
            (
                "[decide.classes.roses]\nleave = 0.9\n",
                "b.toml:1: decide.classes = roses: expected 0 < leave ≤ enter ≤ 1",
            ),
            (
                "[device]\nname = \"a/b\"\n",
                "b.toml:2: device.name = \"a/b\": expected 1 to 64 letters (a–z, A–Z), digits, - or _",
            ),
            ("[camera]\nsource = \"replay\"\n", "camera.replay.path = \"\": expected a folder or a list of images"),
            ("[fleet.groups]\ngarden = []\n", "b.toml:2: fleet.groups = garden: expected at least one device"),
            (
                "[fleet.groups]\ngarden = [\"a/b\"]\n",
                "b.toml:2: fleet.groups = garden: \"a/b\" is not a device name: expected 1 to 64 letters (a–z, A–Z), digits, - or _",
            ),
            ("[model]\nslowdown_max = 0.5\n", "b.toml:2: model.slowdown_max = 0.5: expected 1 to 1000"),
            ("[model]\nscan_budget = 0.5\n", "b.toml:2: model.scan_budget = 0.5: expected 1 to 100"),
            ("[model]\nview = \"windows\"\n", "b.toml:2: model.view = \"windows\": expected one of auto, whole, scan"),
            (
                "[camera]\nstill_threshold = -1\n",
                "b.toml:2: camera.still_threshold = -1: expected 0 to 255 gray levels",
            ),
            ("[model]\nthreads = 65\n", "b.toml:2: model.threads = 65: expected 0 to 64"),
            ("[decide]\nleave = 0\n", "b.toml:2: decide.leave = 0: expected a number above 0, at most 1"),
            ("[mqtt]\ninflight_max = 65530\n", "b.toml:2: mqtt.inflight_max = 65530: expected 1 to 1000"),
            ("[mqtt]\nkeep_alive_s = 65536\n", "b.toml:2: mqtt.keep_alive_s = 65536: expected 1 to 65535"),
            (
                "[mqtt]\nbase = \"a/#\"\n",
                "b.toml:2: mqtt.base = \"a/#\": expected 1 to 128 bytes, non-empty levels, without +, #, $ at the start or control characters",
            ),
            (
                "[mqtt.discovery]\nprefix = \"/\"\n",
                "b.toml:2: mqtt.discovery.prefix = \"/\": expected 1 to 128 bytes, non-empty levels, without +, #, $ at the start or control characters",
            ),
            (
                "[camera]\nreopen_ms_max = 1\n",
                "b.toml:2: camera.reopen_ms_max = 1: expected at least 500, the first wait",
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(load(text, &[], &[]).unwrap_err(), expected, "{text}");
        }
        let error = load("[camera\nwidth = 1\n", &[], &[]).unwrap_err();
        assert!(error.starts_with("b.toml:1: "), "{error}");
    }

    #[test]
    fn names_errors_of_variables_and_flags() {
        let error = load("", &[("BLOOMCAST__CAMERA__WIDHT", "1")], &[]).unwrap_err();
        assert!(
            error.starts_with("the environment's BLOOMCAST__CAMERA__WIDHT: unknown setting `camera.widht`"),
            "{error}"
        );
        let error = load("[mqtt]\nport = 1\n", &[("BLOOMCAST__MQTT__PORT", "many")], &[]).unwrap_err();
        assert!(
            error.starts_with("the environment's BLOOMCAST__MQTT__PORT: mqtt.port = \"many\": expected"),
            "{error}"
        );
        let error = load("", &[("BLOOMCAST__MQTT__PORT", "1")], &["mqtt.port=many"]).unwrap_err();
        assert!(error.starts_with("--set: mqtt.port = \"many\": expected"), "{error}");
        let error = load("", &[], &["camera.interval_ms=0.2"]).unwrap_err();
        assert!(error.contains("camera.interval_ms = \"0.2\": expected a whole number"), "{error}");
        let error = load("", &[], &["camera.widht=1"]).unwrap_err();
        assert!(error.starts_with("--set: unknown setting `camera.widht`"), "{error}");
        let error = load("", &[], &["mqtt.host=mqtt://me:secret@broker"]).unwrap_err();
        assert!(error.contains("credentials_file") && !error.contains("secret"), "{error}");
        assert!(load("", &[], &["camera.width"]).unwrap_err().contains("expected KEY=VALUE"));
        let error = Config::load(Some(Path::new("none.toml")), &[]).unwrap_err().to_string();
        assert!(error.starts_with("none.toml: No such file"), "{error}");
    }

    #[test]
    fn credentials_are_two_lines_and_never_printed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mqtt");
        fs::write(&path, "pi\nsecret word\n").unwrap();
        let read = credentials(&path).unwrap();
        assert_eq!((read.user.as_str(), read.password.as_str()), ("pi", "secret word"));
        assert!(!format!("{read:?}").contains("secret"));
        fs::write(&path, "\u{feff}pi\r\nsecret word\r\n").unwrap();
        assert_eq!(credentials(&path).unwrap(), read, "as editors on Windows write");
        fs::write(&path, "pi\n").unwrap();
        assert!(credentials(&path).unwrap_err().to_string().contains("the password on the second"));
        assert!(credentials(&dir.path().join("none")).is_err());
        // From systemd: incomplete, empty, missing.
        let passed = || service_credentials(Some(dir.path().into()));
        assert!(passed().unwrap_err().to_string().contains("the password on the second"));
        for blank in ["", "\n"] {
            fs::write(&path, blank).unwrap();
            assert_eq!(passed().unwrap(), None);
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(passed().unwrap(), None);
    }
}
