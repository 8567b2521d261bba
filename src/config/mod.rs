//! What the daemon is told: the defaults inside the program, under a file, under `BLOOMCAST__…`
//! variables, under flags; validated once.
//!
//! Every setting stands in `systemd/bloomcast.toml` with its default and its reason. A key that is not
//! there is refused, by its name and line.

mod layers;

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tracing::warn;

use crate::bundle::archive;
use crate::camera::{Pace, PixelFormat, Supervisor};
use crate::decide::{Rules, Thresholds};
use crate::mqtt::access::{BrokerAccess, Credentials};
use crate::mqtt::link::ConnectionOptions;
use crate::mqtt::outbox::Limits;
use crate::mqtt::topics::{DeviceName, Topics, check_prefix};
use crate::vision::Labels;
use crate::vision::decode::{FILE_BYTES_MAX, SIDE_MAX};
use crate::vision::kernels::{THREADS_MAX, all_but_one};

/// Every setting with its default and its reason.
pub const DEFAULTS: &str = include_str!("../../systemd/bloomcast.toml");

/// An hour; nothing here is waited for so long.
const MS_MAX: u64 = 3_600_000;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{path}: {reason}")]
    Read { path: PathBuf, reason: String },
    #[error("{place}: unknown setting `{key}`{hint}")]
    Unknown { place: String, key: String, hint: String },
    #[error("{place}: {reason}")]
    Syntax { place: String, reason: String },
    #[error("{0}")]
    Value(String),
    #[error("{key} = {value}: {reason}")]
    Invalid { key: &'static str, value: String, reason: String },
}

/// All settings, valid.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub device: Device,
    pub camera: Camera,
    pub model: Model,
    pub decide: Decide,
    pub mqtt: Mqtt,
    pub fleet: Fleet,
    pub log: Log,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    pub name: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Camera {
    pub name: String,
    pub source: Source,
    pub interval_ms: u64,
    pub still_threshold: f32,
    pub stall_ms: u64,
    pub reopen_ms_min: u64,
    pub reopen_ms_max: u64,
    pub frame_bytes_max: u64,
    pub device: String,
    pub width: u32,
    pub height: u32,
    pub fps: u32,
    pub format: PixelFormat,
    pub rpicam: Rpicam,
    pub replay: Replay,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    V4l2,
    Rpicam,
    Replay,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rpicam {
    pub command: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replay {
    pub path: PathBuf,
    pub looped: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub bundle: PathBuf,
    pub backbone: PathBuf,
    pub store: PathBuf,
    pub trusted_keys: PathBuf,
    pub offer_bytes_max: u64,
    pub threads: u16,
    pub slowdown_max: f64,
    pub trial_frames: u32,
    pub trial_s_max: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// Names of devices by the name of their group.
    #[serde(default)]
    pub groups: std::collections::BTreeMap<String, Vec<String>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decide {
    pub smoothing_ms: u64,
    pub enter_dwell_ms: u64,
    pub leave_dwell_ms: u64,
    pub state_interval_ms: u64,
    pub enter: f32,
    pub leave: f32,
    /// By class name; what stands here replaces `enter` and `leave` for that class.
    #[serde(default)]
    pub classes: std::collections::BTreeMap<String, ClassThresholds>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassThresholds {
    pub enter: Option<f32>,
    pub leave: Option<f32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mqtt {
    pub host: String,
    pub port: u16,
    pub base: String,
    pub credentials_file: PathBuf,
    pub keep_alive_s: u64,
    pub reconnect_ms_min: u64,
    pub reconnect_ms_max: u64,
    pub packet_bytes_max: usize,
    pub inflight_max: u16,
    pub outbox_entries_max: usize,
    pub outbox_bytes_max: usize,
    pub farewell_ms: u64,
    pub discovery: Discovery,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Discovery {
    pub enabled: bool,
    pub prefix: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub level: LogLevel,
    pub counters_interval_s: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

impl Config {
    /// Reads the layers: `file` where there is one, the process's environment, then `overrides`,
    /// each `key=value` as a flag gave it.
    pub fn load(file: Option<&Path>, overrides: &[String]) -> Result<Self, ConfigError> {
        // A variable that is no text is none of ours.
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        Self::layered(file, std::env::vars_os().filter_map(text), overrides)
    }

    /// The defaults and `settings`, each `key=value`; nothing from outside.
    pub fn of_settings(settings: &[String]) -> Result<Self, ConfigError> {
        Self::layered(None, std::iter::empty(), settings)
    }

    fn layered(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        overrides: &[String],
    ) -> Result<Self, ConfigError> {
        let config: Config = layers::merge(DEFAULTS, file, environment, overrides)?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let invalid = |key, value: &dyn fmt::Display, reason: &str| {
            Err(ConfigError::Invalid { key, value: value.to_string(), reason: reason.into() })
        };
        self.topics()?;
        let (camera, mqtt, decide, model) = (&self.camera, &self.mqtt, &self.decide, &self.model);
        for (key, value) in [("decide.enter", decide.enter), ("decide.leave", decide.leave)] {
            if !(value > 0.0 && value <= 1.0) {
                return invalid(key, &value, "expected a number above 0, at most 1");
            }
        }
        if decide.leave > decide.enter {
            return invalid("decide.leave", &decide.leave, "expected at most decide.enter, or the class would flicker");
        }
        for class in decide.classes.keys() {
            let Thresholds { enter, leave } = self.thresholds(class);
            if !(leave > 0.0 && leave <= enter && enter <= 1.0) {
                return invalid("decide.classes", class, "expected 0 < leave ≤ enter ≤ 1");
            }
        }
        if !(model.slowdown_max >= 1.0 && model.slowdown_max <= 1000.0) {
            return invalid("model.slowdown_max", &model.slowdown_max, "expected 1 to 1000");
        }
        for (group, devices) in &self.fleet.groups {
            if devices.is_empty() {
                return invalid("fleet.groups", group, "expected at least one device");
            }
            if let Some(device) = devices.iter().find(|device| DeviceName::new(device).is_err()) {
                return invalid("fleet.groups", group, &format!("{device:?} is no device's name"));
            }
        }
        if !(0.0..=255.0).contains(&camera.still_threshold) {
            return invalid("camera.still_threshold", &camera.still_threshold, "expected 0 to 255 grey levels");
        }
        let ranges: [(&'static str, u64, u64, u64); 19] = [
            ("camera.stall_ms", camera.stall_ms, 1, MS_MAX),
            ("camera.interval_ms", camera.interval_ms, 0, MS_MAX),
            ("camera.reopen_ms_min", camera.reopen_ms_min, 1, MS_MAX),
            ("camera.frame_bytes_max", camera.frame_bytes_max, 1024, FILE_BYTES_MAX),
            ("camera.width", camera.width.into(), 1, SIDE_MAX.into()),
            ("camera.height", camera.height.into(), 1, SIDE_MAX.into()),
            ("camera.fps", camera.fps.into(), 1, 1000),
            ("model.threads", model.threads.into(), 0, THREADS_MAX as u64),
            ("model.offer_bytes_max", model.offer_bytes_max, 4096, archive::FILE_BYTES_MAX),
            ("model.trial_frames", model.trial_frames.into(), 1, 1_000_000),
            ("model.trial_s_max", model.trial_s_max, 1, 86_400),
            ("mqtt.port", mqtt.port.into(), 1, u16::MAX.into()),
            ("mqtt.keep_alive_s", mqtt.keep_alive_s, 1, u16::MAX.into()),
            ("mqtt.reconnect_ms_min", mqtt.reconnect_ms_min, 1, MS_MAX),
            ("mqtt.packet_bytes_max", mqtt.packet_bytes_max as u64, 4096, 256 << 20),
            ("mqtt.inflight_max", mqtt.inflight_max.into(), 1, 1000),
            ("mqtt.outbox_entries_max", mqtt.outbox_entries_max as u64, 1, 1_000_000),
            ("mqtt.outbox_bytes_max", mqtt.outbox_bytes_max as u64, 4096, 1 << 30),
            ("log.counters_interval_s", self.log.counters_interval_s, 1, MS_MAX),
        ];
        if let Some((key, value, min, max)) = ranges.iter().find(|(_, value, min, max)| value < min || value > max) {
            return invalid(key, value, &format!("expected {min} to {max}"));
        }
        let ordered = [
            ("camera.reopen_ms_max", self.camera.reopen_ms_min, self.camera.reopen_ms_max),
            ("mqtt.reconnect_ms_max", self.mqtt.reconnect_ms_min, self.mqtt.reconnect_ms_max),
        ];
        if let Some((key, _, max)) = ordered.iter().find(|(_, min, max)| min > max) {
            return invalid(key, max, "expected at least what the first wait is");
        }
        if self.mqtt.host.is_empty() {
            return invalid("mqtt.host", &"\"\"", "expected the broker's name or address");
        }
        if self.camera.source == Source::Replay && self.camera.replay.path.as_os_str().is_empty() {
            return invalid("camera.replay.path", &"\"\"", "expected a folder or a list of images");
        }
        Ok(())
    }

    /// Where messages go. The device's name is the host's where none is set.
    pub fn topics(&self) -> Result<Topics, ConfigError> {
        let name = match self.device.name.as_str() {
            "" => fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
            name => name.to_owned(),
        };
        let invalid =
            |key, value: &str, reason: String| ConfigError::Invalid { key, value: format!("{value:?}"), reason };
        let device = DeviceName::new(&name).map_err(|e| invalid("device.name", &name, e.to_string()))?;
        check_prefix(&self.mqtt.base).map_err(|e| invalid("mqtt.base", &self.mqtt.base, e.to_string()))?;
        let prefix = &self.mqtt.discovery.prefix;
        check_prefix(prefix).map_err(|e| invalid("mqtt.discovery.prefix", prefix, e.to_string()))?;
        Ok(Topics::new(&self.mqtt.base, prefix, device))
    }

    /// Where the messages of another device go.
    pub fn topics_of(&self, device: DeviceName) -> Topics {
        Topics::new(&self.mqtt.base, &self.mqtt.discovery.prefix, device)
    }

    /// Threads that compute a frame.
    pub fn threads(&self) -> usize {
        match self.model.threads {
            0 => all_but_one(),
            threads => threads.into(),
        }
    }

    /// The thresholds of a class.
    pub fn thresholds(&self, class: &str) -> Thresholds {
        let own = self.decide.classes.get(class);
        Thresholds {
            enter: own.and_then(|own| own.enter).unwrap_or(self.decide.enter),
            leave: own.and_then(|own| own.leave).unwrap_or(self.decide.leave),
        }
    }

    /// What is decided by, for the classes of a model. Thresholds for a class that the model does not
    /// know are a mistake.
    pub fn rules(&self, labels: &Labels) -> Result<Rules, ConfigError> {
        match self.unknown_class(labels) {
            None => Ok(self.rules_of_known(labels)),
            Some(class) => Err(ConfigError::Invalid {
                key: "decide.classes",
                value: class.into(),
                reason: format!("the model knows {}", labels.names().join(", ")),
            }),
        }
    }

    /// The same where models come and go: thresholds for a class that this one does not know wait for another.
    pub fn rules_of_known(&self, labels: &Labels) -> Rules {
        if let Some(class) = self.unknown_class(labels) {
            warn!("decide.classes = {class}: the model does not know it");
        }
        Rules {
            smoothing: Duration::from_millis(self.decide.smoothing_ms),
            enter_dwell: Duration::from_millis(self.decide.enter_dwell_ms),
            leave_dwell: Duration::from_millis(self.decide.leave_dwell_ms),
            state_interval: Duration::from_millis(self.decide.state_interval_ms),
            thresholds: labels.names().iter().map(|class| self.thresholds(class)).collect(),
        }
    }

    fn unknown_class(&self, labels: &Labels) -> Option<&str> {
        self.decide.classes.keys().map(String::as_str).find(|class| labels.position(class).is_none())
    }

    /// What the camera's supervisor goes by. A replay keeps the pace itself.
    pub fn supervisor(&self, pace: &Pace) -> Supervisor {
        Supervisor {
            pace: (self.camera.source != Source::Replay).then(|| pace.clone()),
            stall: Duration::from_millis(self.camera.stall_ms),
            reopen_min: Duration::from_millis(self.camera.reopen_ms_min),
            reopen_max: Duration::from_millis(self.camera.reopen_ms_max),
        }
    }

    /// What a device's connection to the broker goes by.
    pub fn link(&self) -> Result<ConnectionOptions, ConfigError> {
        let mqtt = &self.mqtt;
        Ok(ConnectionOptions {
            access: self.access()?,
            reconnect_min: Duration::from_millis(mqtt.reconnect_ms_min),
            reconnect_max: Duration::from_millis(mqtt.reconnect_ms_max),
            inflight_max: mqtt.inflight_max,
            farewell: Duration::from_millis(mqtt.farewell_ms),
        })
    }

    /// How the broker is reached; reads the credentials.
    pub fn access(&self) -> Result<BrokerAccess, ConfigError> {
        let mqtt = &self.mqtt;
        Ok(BrokerAccess {
            host: mqtt.host.clone(),
            port: mqtt.port,
            credentials: match mqtt.credentials_file.as_os_str().is_empty() {
                true => handed_over(env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from))?,
                false => Some(credentials(&mqtt.credentials_file)?),
            },
            keep_alive: Duration::from_secs(mqtt.keep_alive_s),
            packet_bytes_max: mqtt.packet_bytes_max,
        })
    }

    pub fn outbox(&self) -> Limits {
        Limits { entries_max: self.mqtt.outbox_entries_max, bytes_max: self.mqtt.outbox_bytes_max }
    }
}

/// What systemd hands over under the name `mqtt` (`LoadCredential=`). None where it hands over nothing, or an empty file, as
/// the package brings it.
fn handed_over(folder: Option<PathBuf>) -> Result<Option<Credentials>, ConfigError> {
    let file = folder.map(|folder| folder.join("mqtt"));
    let written = |path: &PathBuf| fs::metadata(path).is_ok_and(|file| file.len() > 0);
    file.filter(written).map(|path| credentials(&path)).transpose()
}

/// The user's name on the first line, the password on the second.
fn credentials(path: &Path) -> Result<Credentials, ConfigError> {
    let failed = |reason: String| ConfigError::Read { path: path.into(), reason };
    let text = fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
    let mut lines = text.lines();
    match (lines.next(), lines.next()) {
        (Some(user), Some(password)) if !user.is_empty() => {
            Ok(Credentials { user: user.into(), password: password.into() })
        }
        _ => Err(failed("expected the user's name on the first line and the password on the second".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, environment: &[(&str, &str)], overrides: &[&str]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b.toml");
        fs::write(&path, text).unwrap();
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let overrides: Vec<String> = overrides.iter().map(|o| (*o).to_owned()).collect();
        Config::layered(Some(&path), environment, &overrides)
            .map_err(|e| e.to_string().replace(&path.display().to_string(), "b.toml"))
    }

    #[test]
    fn the_defaults_are_valid() {
        let config = Config::layered(None, std::iter::empty(), &[]).unwrap();
        assert_eq!(config.camera.source, Source::V4l2);
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        assert_eq!(config.rules(&labels).unwrap().thresholds.len(), 2);
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file = "[camera]\nwidth = 1\nheight = 1\nfps = 1\n";
        let environment =
            [("BLOOMCAST__CAMERA__HEIGHT", "2"), ("BLOOMCAST__CAMERA__FPS", "2"), ("BLOOMCAST_KERNELS", "tract")];
        let config = load(file, &environment, &["camera.fps=3", "camera.replay.looped=false"]).unwrap();
        assert_eq!((config.camera.width, config.camera.height, config.camera.fps), (1, 2, 3));
        assert!(!config.camera.replay.looped);
    }

    #[test]
    fn groups_have_names_of_their_own() {
        let config = load("[fleet.groups]\ngarden = [\"pi\", \"greenhouse\"]\n", &[], &[]).unwrap();
        assert_eq!(config.fleet.groups["garden"], ["pi", "greenhouse"]);
    }

    #[test]
    fn thresholds_of_one_class_replace_the_common_ones() {
        let config = load("[decide.classes.roses]\nenter = 0.9\n", &[], &[]).unwrap();
        assert_eq!(config.thresholds("roses"), Thresholds { enter: 0.9, leave: 0.45 });
        assert_eq!(config.thresholds("daisy"), Thresholds { enter: 0.7, leave: 0.45 });
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        let error = config.rules(&labels).unwrap_err().to_string();
        assert_eq!(error, "decide.classes = roses: the model knows daisy, tulips");
    }

    #[test]
    fn mistakes_are_named_with_key_and_line() {
        let cases = [
            ("[camera]\n\nwidht = 640\n", "b.toml:3: unknown setting `camera.widht`, did you mean `camera.width`?"),
            ("[kamera]\nwidth = 1\n", "b.toml:1: unknown setting `kamera`, did you mean `camera`?"),
            ("zzzzzzzz = 1\n", "b.toml:1: unknown setting `zzzzzzzz`"),
            ("[mqtt]\nport = \"many\"\n", "b.toml:2: mqtt.port: invalid type: string \"many\", expected an integer"),
            ("[mqtt]\nport = 0\n", "mqtt.port = 0: expected 1 to 65535"),
            (
                "[decide]\nleave = 0.9\n",
                "decide.leave = 0.9: expected at most decide.enter, or the class would flicker",
            ),
            ("[decide]\nenter = 7\n", "decide.enter = 7: expected a number above 0, at most 1"),
            ("[decide.classes.roses]\nentre = 0.9\n", "b.toml:2: unknown setting `decide.classes.roses.entre`"),
            ("[decide.classes.roses]\nleave = 0.9\n", "decide.classes = roses: expected 0 < leave ≤ enter ≤ 1"),
            (
                "[device]\nname = \"a/b\"\n",
                "device.name = \"a/b\": expected 1 to 64 letters (a–z, A–Z), digits, - or _",
            ),
            ("[camera]\nsource = \"replay\"\n", "camera.replay.path = \"\": expected a folder or a list of images"),
            ("[fleet.groups]\ngarden = []\n", "fleet.groups = garden: expected at least one device"),
            ("[fleet.groups]\ngarden = [\"a/b\"]\n", "fleet.groups = garden: \"a/b\" is no device's name"),
            ("[model]\nslowdown_max = 0.5\n", "model.slowdown_max = 0.5: expected 1 to 1000"),
            ("[camera]\nstill_threshold = -1\n", "camera.still_threshold = -1: expected 0 to 255 grey levels"),
            ("[model]\nthreads = 65\n", "model.threads = 65: expected 0 to 64"),
            ("[decide]\nleave = 0\n", "decide.leave = 0: expected a number above 0, at most 1"),
            ("[mqtt]\ninflight_max = 65530\n", "mqtt.inflight_max = 65530: expected 1 to 1000"),
            ("[mqtt]\nkeep_alive_s = 65536\n", "mqtt.keep_alive_s = 65536: expected 1 to 65535"),
            (
                "[mqtt]\nbase = \"a/#\"\n",
                "mqtt.base = \"a/#\": expected 1 to 128 bytes, levels that are not empty, without +, #, $ at the start or control characters",
            ),
            (
                "[mqtt.discovery]\nprefix = \"/\"\n",
                "mqtt.discovery.prefix = \"/\": expected 1 to 128 bytes, levels that are not empty, without +, #, $ at the start or control characters",
            ),
            ("[camera]\nreopen_ms_max = 1\n", "camera.reopen_ms_max = 1: expected at least what the first wait is"),
        ];
        for (text, expected) in cases {
            assert_eq!(load(text, &[], &[]).unwrap_err(), expected, "{text}");
        }
        let error = load("[camera\nwidth = 1\n", &[], &[]).unwrap_err();
        assert!(error.starts_with("b.toml:1: "), "{error}");
        let error = load("[camera]\nsource = \"usb\"\n", &[], &[]).unwrap_err();
        assert!(error.starts_with("b.toml:2: camera.source: ") && error.contains("usb"), "{error}");
        let error = load("", &[("BLOOMCAST__CAMERA__WIDHT", "1")], &[]).unwrap_err();
        assert!(
            error.starts_with("the environment's BLOOMCAST__CAMERA__WIDHT: unknown setting `camera.widht`"),
            "{error}"
        );
        let error = load("[mqtt]\nport = 1\n", &[("BLOOMCAST__MQTT__PORT", "many")], &[]).unwrap_err();
        assert!(error.starts_with("the environment's BLOOMCAST__MQTT__PORT: mqtt.port: invalid type"), "{error}");
        let error = load("", &[("BLOOMCAST__MQTT__PORT", "1")], &["mqtt.port=many"]).unwrap_err();
        assert!(error.starts_with("--set mqtt.port=many: mqtt.port: invalid type"), "{error}");
        let error = load("", &[], &["camera.widht=1"]).unwrap_err();
        assert!(error.starts_with("--set camera.widht=1: unknown setting"), "{error}");
        assert!(load("", &[], &["camera.width"]).unwrap_err().contains("expected KEY=VALUE"));
        let error = Config::load(Some(Path::new("none.toml")), &[]).unwrap_err().to_string();
        assert!(error.starts_with("none.toml: No such file"), "{error}");
    }

    #[test]
    fn credentials_are_two_lines_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mqtt");
        fs::write(&path, "pi\nsecret word\n").unwrap();
        let read = credentials(&path).unwrap();
        assert_eq!((read.user.as_str(), read.password.as_str()), ("pi", "secret word"));
        assert!(!format!("{read:?}").contains("secret"));
        fs::write(&path, "pi\n").unwrap();
        assert!(credentials(&path).unwrap_err().to_string().contains("the password on the second"));
        assert!(credentials(&dir.path().join("none")).is_err());
        // From systemd: none, an empty one, one that is cut.
        let handed_over = || handed_over(Some(dir.path().into()));
        assert!(handed_over().unwrap_err().to_string().contains("the password on the second"));
        fs::write(&path, "").unwrap();
        assert_eq!(handed_over().unwrap(), None);
        fs::remove_file(&path).unwrap();
        assert_eq!(handed_over().unwrap(), None);
    }
}
