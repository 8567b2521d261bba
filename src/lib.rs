//! A device watches a camera, names the flower it sees, and says so over MQTT; the same program
//! teaches that skill on a workstation.
//!
//! The data takes a one-way street, and the modules below stand along it in reading order:
//!
//! ```text
//! camera ──Frame──▶ vision ──Prediction──▶ decide ──Event──▶ mqtt ──▶ broker
//!                     ▲                                       │
//! train ──Bundle──▶ fleet ◀──────────── offers ───────────────┘
//! ```
//!
//! - [`camera`] keeps the newest frame only and counts what it dropped.
//! - [`vision`] is the only place that turns pixels into numbers; the trainer calls the same functions.
//! - [`decide`] is pure: predictions in, events out, no clock, no I/O.
//! - [`mqtt`] never makes a stage before it wait, and loses no event that was decided.
//! - [`fleet`] brings new models to devices, and takes them back.
//! - [`watcher`] is the stage from frames to decisions, a thread of its own.
//! - [`daemon`] is the only file that starts the stages' threads and joins them.

#![deny(unsafe_code)]

pub mod bench;
pub mod bundle;
pub mod camera;
pub mod config;
pub mod daemon;
pub mod decide;
#[cfg(feature = "demo")]
pub mod demo;
#[cfg(feature = "fetch")]
pub mod fetch;
pub mod fleet;
pub mod health;
pub mod mqtt;
pub mod train;
pub mod vision;
pub mod watcher;
pub mod zoo;

use std::path::PathBuf;

/// Where the user's programs keep what they can make again: `$XDG_CACHE_HOME/bloomcast`, else
/// `~/.cache/bloomcast`.
pub fn user_cache() -> Option<PathBuf> {
    user_folder("XDG_CACHE_HOME", ".cache")
}

/// Where they keep what they cannot: `$XDG_CONFIG_HOME/bloomcast`, else `~/.config/bloomcast`.
pub fn user_config() -> Option<PathBuf> {
    user_folder("XDG_CONFIG_HOME", ".config")
}

fn user_folder(named_by: &str, in_home: &str) -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = folder(named_by).or_else(|| folder("HOME").map(|home| home.join(in_home)));
    base.map(|base| base.join("bloomcast"))
}
