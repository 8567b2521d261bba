//! A device watches a camera, names the flower it sees, and says so over MQTT; the same program
//! teaches that params on a workstation.
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
//! - [`update`] brings new models to devices, and takes them back.
//! - [`vision_stage`] is the stage from frames to decisions, a thread of its own.
//! - [`daemon`] is the only file that starts the stages' threads and joins them.

#![deny(unsafe_code)]

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
