//! The settings as the configuration file has them; [`super::Config`] holds their parsed values.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::camera::PixelFormat;
use crate::vision::backbone::KernelChoice;
use crate::vision::transform::Flip;

/// The tables of `systemd/bloomcast.toml`, where each setting has its default and its reason.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tables {
    pub device: DeviceTable,
    pub camera: CameraTable,
    pub model: ModelTable,
    pub decide: DecideTable,
    pub mqtt: MqttTable,
    pub fleet: FleetTable,
    pub log: LogTable,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeviceTable {
    pub name: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CameraTable {
    pub name: String,
    pub source: Source,
    pub interval_ms: u64,
    pub still_threshold: f32,
    pub rotate: u16,
    pub flip: Flip,
    pub region: [f32; 4],
    pub dark: f32,
    pub blank: f32,
    pub blurred: f32,
    pub stall_ms: u64,
    pub reopen_ms_min: u64,
    pub reopen_ms_max: u64,
    pub frame_bytes_max: u64,
    pub device: String,
    pub width: u32,
    pub height: u32,
    pub fps: u32,
    pub format: PixelFormat,
    pub rpicam: RpicamTable,
    pub replay: ReplayTable,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Source {
    V4l2,
    Rpicam,
    Replay,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RpicamTable {
    pub command: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReplayTable {
    pub path: PathBuf,
    pub looped: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelTable {
    pub bundle: PathBuf,
    pub backbone: PathBuf,
    pub store: PathBuf,
    pub trusted_keys: PathBuf,
    pub offer_bytes_max: u64,
    pub threads: u16,
    pub kernels: KernelChoice,
    pub view: ViewChoice,
    pub scan_budget: f32,
    pub slowdown_max: f64,
    pub trial_frames: u32,
    pub trial_s_max: u64,
}

/// `model.view`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ViewChoice {
    /// As the model was trained.
    Auto,
    Whole,
    Scan,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FleetTable {
    /// Device names by group.
    #[serde(default)]
    pub groups: BTreeMap<String, Vec<String>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DecideTable {
    pub smoothing_ms: u64,
    pub enter_dwell_ms: u64,
    pub leave_dwell_ms: u64,
    pub state_interval_ms: u64,
    pub enter: f32,
    pub leave: f32,
    /// Thresholds that replace `enter` and `leave` for one class, by class name.
    #[serde(default)]
    pub classes: BTreeMap<String, ClassThresholds>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ClassThresholds {
    pub enter: Option<f32>,
    pub leave: Option<f32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MqttTable {
    pub host: String,
    pub port: u16,
    pub base: String,
    pub credentials_file: PathBuf,
    pub connect_timeout_s: u64,
    pub keep_alive_s: u64,
    pub reconnect_ms_min: u64,
    pub reconnect_ms_max: u64,
    pub packet_bytes_max: usize,
    pub inflight_max: u16,
    pub outbox_entries_max: usize,
    pub outbox_bytes_max: usize,
    pub shutdown_timeout_ms: u64,
    pub discovery: DiscoveryTable,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DiscoveryTable {
    pub enabled: bool,
    pub prefix: String,
    pub status_topic: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogTable {
    pub level: super::LogLevel,
    pub counters_interval_s: u64,
}
