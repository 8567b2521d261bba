//! A device watches a camera, classifies the flower and publishes it over MQTT; a workstation trains the model and deploys it
//! to devices.
//!
//! ```text
//! camera ──Frame──▶ vision ──Prediction──▶ decide ──Event, Observation──▶ mqtt ──▶ broker
//!                     ▲ swap                                               │
//!                     └──────────────── update agent ◀────── commands ─────┘
//! workstation: train ──bundle──▶ push ──MQTT──▶ update agent
//! ```
//!
//! A module imports only modules before it in this order:
//!
//! - [`system`]: hashing, paths, memory, counters, systemd; [`frame`]: pictures; [`chart`]: SVG charts.
//! - [`camera`] keeps the newest frame and counts the frames that it replaces.
//! - [`vision`] turns pixels into features and predictions; the trainer calls the same functions.
//! - [`decide`] turns predictions into events and observations; it has no clock and no I/O besides log lines.
//! - [`vision_stage`] is the thread from frames to decisions.
//! - [`bundle`] is the file format of a model.
//! - [`mqtt`] encodes and delivers; no stage waits for it, and events wait in its outbox for the broker.
//! - [`update`] deploys models to devices and rolls them back.
//! - [`config`] holds the parsed configuration.
//! - [`zoo`] lists published backbones, `fetch` downloads files, [`mod@bench`] times a frame, [`train`] trains and evaluates
//!   models; these four may import each other.
//! - [`daemon`] starts the threads of the stages and joins them; `demo` runs it on photographs or drawings.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod bench;
pub mod bundle;
pub mod camera;
pub mod chart;
pub mod config;
pub mod daemon;
pub mod decide;
#[cfg(feature = "demo")]
pub mod demo;
#[cfg(feature = "fetch")]
pub mod fetch;
pub mod frame;
pub mod mqtt;
pub mod system;
pub mod train;
pub mod update;
pub mod vision;
pub mod vision_stage;
pub mod zoo;
