//! The device's side of an update: receives offered models, admits them, stores them, activates them on trial.

pub mod admission;
pub mod agent;
pub mod local_install;
pub mod model;
pub mod model_loader;
pub mod store;
pub mod trial;

use std::path::PathBuf;

pub use agent::UpdateAgent;
pub use model::ModelMetadata;
pub use model_loader::{ActiveModel, ModelFiles, ModelLoader};
pub use store::Store;

use super::protocol::TrialLimits;
use crate::decide::Policy;

/// Options of the update agent and of `install`.
#[derive(Debug, Clone, PartialEq)]
pub struct UpdateOptions {
    /// The folder of trusted public keys; empty trusts no key.
    pub trusted_keys: PathBuf,
    /// The largest bundle that is received, in bytes.
    pub offer_bytes_max: u64,
    /// Largest ratio of a new model's processor time per frame to that of the active model.
    pub slowdown_max: f64,
    /// Limits of a trial.
    pub trial: TrialLimits,
    /// The decision rules.
    pub policy: Policy,
    /// Whether Home Assistant's discovery is published.
    pub discovery: bool,
    /// The largest packet that is published, in bytes.
    pub packet_bytes_max: usize,
}
