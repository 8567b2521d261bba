//! Installation by hand: admits a bundle and puts it on trial at the next start or reload of the daemon.

use super::UpdateOptions;
use super::admission::{self, Candidate, Checks, Refusal, UpgradeRefused, check_upgrade};
use super::model_loader::{ModelError, ModelLoader, NoStore};
use super::store::{Phase, Store, StoreError};
use crate::bundle::Identity;
use crate::update::protocol::ModelSource;

/// An error of installing a bundle.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The device has no store.
    #[error(transparent)]
    NoStore(#[from] NoStore),
    /// The active model, beside which the new one is validated, cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The bundle is the active model.
    #[error("{0} is active already")]
    AlreadyActive(Identity),
    /// The model is not newer than the active one, or was rolled back.
    #[error("{0}; --force installs it anyway")]
    UpgradeRefused(#[from] UpgradeRefused),
    /// The model is not admitted.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Options of an installation.
#[derive(Debug, Clone, Copy)]
pub struct InstallOptions {
    /// Whether a trusted key must have signed the bundle.
    pub signature_required: bool,
    /// Whether to accept a model that is not newer, or was rolled back.
    pub force: bool,
}

/// Installs a bundle into `store`. `loader` reads the same store without changing it. Returns the model's identity.
///
/// # Errors
/// If the active model cannot be loaded, or the new one is active already, is not newer or was rolled back without
/// [`InstallOptions::force`], is not admitted, or cannot be stored.
pub fn install(
    file: &str,
    bytes: &[u8],
    store: &Store,
    loader: &ModelLoader,
    update: &UpdateOptions,
    options: InstallOptions,
) -> Result<Identity, InstallError> {
    let active = loader.load_at_start()?;
    let present = active.loaded.model;
    let accept = |model: &Identity| {
        if *model == present.identity() {
            return Err(InstallError::AlreadyActive(model.clone()));
        }
        if !options.force {
            check_upgrade(model, &present.identity(), &active.state)?;
        }
        Ok(())
    };
    let candidate = Candidate { file, bytes, source: ModelSource::Store };
    let signature_required = options.signature_required;
    let checks = Checks::Full { options: update, active: &present, signature_required };
    let model = admission::admit(&candidate, loader.backbone(), &checks, accept)?.loaded.model.identity();
    store.start_trial(model.clone(), bytes, Phase::Waiting)?;
    Ok(model)
}
