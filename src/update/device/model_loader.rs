//! Loads the active model: from the configured bundle, from the store, or the built-in one; and falls back where a model is
//! damaged.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bloomcast_kernels::{Isa, ThreadPool};
use tracing::warn;

use super::admission::{Candidate, Checks, Refusal, admit};
use super::model::{DeviceBackbone, LoadedModel, ModelMetadata};
use super::store::{ModelSlot, Phase, State, Store, StoreError, StoredTrial};
use crate::bundle::manifest::FORMAT;
use crate::bundle::{ArchiveError, BACKBONE, BUILT_IN, BundleError, Identity, Manifest, ViewOptions, archive};
use crate::mqtt::message::SCHEMA;
use crate::system::hash::sha256_hex;
use crate::update::protocol::{ModelSource, ModelStatus, NetworkRef};
use crate::vision::BackboneError;
use crate::vision::backbone::{self, MOBILENET_V2, MOBILENET_V2_NAME};

/// An error of loading the device's model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The configured bundle cannot be loaded or is not admitted.
    #[error("model.bundle: {0}")]
    ConfiguredBundle(Refusal),
    /// The configured backbone cannot be loaded.
    #[error("model.backbone: {0}")]
    ConfiguredBackbone(BackboneError),
    /// The model is not admitted.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Reason why a device has no store.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoStore {
    /// A bundle is configured, which is always active.
    #[error("model.bundle names the model of this device; clear it to install others")]
    ConfiguredBundle,
    /// No store is configured.
    #[error("model.store is empty: this device does not store models")]
    NotConfigured,
}

impl ModelError {
    /// Returns whether the model's file is damaged or missing, rather than unusable under the present configuration.
    fn is_damage(&self) -> bool {
        match self {
            ModelError::Store(StoreError::Damaged { .. }) => true,
            ModelError::Store(StoreError::Archive { source: ArchiveError::Io(error), .. }) => {
                error.kind() == io::ErrorKind::NotFound
            }
            ModelError::Store(StoreError::Archive { .. }) => true,
            ModelError::Refused(Refusal::Bundle(error)) => {
                matches!(error, BundleError::Archive { .. } | BundleError::Content { .. })
            }
            _ => false,
        }
    }
}

/// The paths of a device's models, from the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelFiles {
    /// A bundle that is always active; the store is not used then.
    pub bundle: Option<PathBuf>,
    /// The backbone's ONNX file; `None` for the built-in one.
    pub backbone: Option<PathBuf>,
    /// The store's folder; `None` if no store is configured.
    pub store: Option<PathBuf>,
}

/// Loads a device's models.
#[derive(Debug, Clone)]
pub struct ModelLoader {
    bundle: Option<PathBuf>,
    backbone: DeviceBackbone,
    store: Option<Store>,
}

/// The model that is active at the start.
pub struct ActiveModel {
    /// The model.
    pub loaded: LoadedModel,
    /// The store's state.
    pub state: State,
    /// Whether it is on trial.
    pub on_trial: bool,
    /// Models whose trial a crash interrupted, with the reason of their rollback.
    pub rolled_back: Vec<(Identity, String)>,
}

/// A trial that cannot be continued at the start.
#[derive(Debug, thiserror::Error)]
enum TrialError {
    #[error("the daemon was killed or crashed during the trial")]
    Crashed,
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<StoreError> for TrialError {
    fn from(error: StoreError) -> Self {
        TrialError::Model(error.into())
    }
}

impl ModelLoader {
    /// Creates a loader with one thread. `open` opens the store: [`Store::new`] or [`Store::read_only`].
    pub fn new(files: &ModelFiles, kernels: Option<Isa>, open: fn(&Path) -> Store) -> Self {
        let ModelFiles { bundle, backbone, store } = files.clone();
        let store = store.filter(|_| bundle.is_none()).map(|folder| open(&folder));
        ModelLoader {
            bundle,
            backbone: DeviceBackbone { file: backbone, kernels, thread_pool: None, view: ViewOptions::default() },
            store,
        }
    }

    /// Returns the loader with a pool whose threads compute backbones; `None` uses the caller's thread alone.
    pub fn with_thread_pool(mut self, thread_pool: Option<Arc<ThreadPool>>) -> Self {
        self.backbone.thread_pool = thread_pool;
        self
    }

    /// Returns the loader with another view of its models.
    pub fn with_view(mut self, view: ViewOptions) -> Self {
        self.backbone.view = view;
        self
    }

    /// Returns the backbone that models are loaded on.
    pub fn backbone(&self) -> &DeviceBackbone {
        &self.backbone
    }

    /// Returns the store.
    ///
    /// # Errors
    /// If the device has no store.
    pub fn store(&self) -> Result<&Store, NoStore> {
        self.store.as_ref().ok_or(match self.bundle {
            Some(_) => NoStore::ConfiguredBundle,
            None => NoStore::NotConfigured,
        })
    }

    /// Loads the active model: one that waits for its trial, else the current one, else the previous one, else the built-in
    /// one. A trial that a crash interrupted is rolled back; with a store that is only read, a trial counts as one that runs.
    ///
    /// # Errors
    /// If the configured or the built-in model cannot be loaded.
    pub fn load_at_start(&self) -> Result<ActiveModel, ModelError> {
        let Some(store) = &self.store else {
            return Ok(ActiveModel::new(self.default_model()?, State::default()));
        };
        let mut state = match store.state() {
            Ok(state) => state,
            Err(error @ StoreError::Damaged { .. }) => {
                let fallback_reason = error.to_string();
                warn!("{fallback_reason}");
                let written = store.fall_back(ModelSlot::BuiltIn, fallback_reason.clone());
                persist_or_keep(written, State::default(), |state| state.fallback_reason = Some(fallback_reason))
            }
            // The error may be temporary: the state file is not changed.
            Err(error) => {
                warn!("{error}; the built-in model is active");
                let state = State { fallback_reason: Some(error.to_string()), ..State::default() };
                return Ok(ActiveModel::new(self.default_model()?, state));
            }
        };
        if let Err(error) = store.clean_up() {
            warn!("files of an interrupted change cannot be removed: {error}");
        }
        let mut rolled_back = Vec::new();
        if let Some(trial) = state.trial.clone() {
            match self.continue_trial(store, &state, &trial) {
                Ok((loaded, state)) => return Ok(ActiveModel { on_trial: true, ..ActiveModel::new(loaded, state) }),
                Err(error) => {
                    let reason = error.to_string();
                    let written = store.fail_trial(&trial.slot.sha256, &reason);
                    rolled_back.push((trial.slot, reason));
                    state = persist_or_keep(written, state, |state| state.trial = None);
                }
            }
        }
        Ok(ActiveModel { rolled_back, ..self.load_current(store, state, None)? })
    }

    /// Loads the current model of `state`, in which no model is on trial; falls back to the previous or the built-in one. The
    /// backbone of `reuse` is used again if it is the same.
    ///
    /// # Errors
    /// The built-in model cannot be loaded.
    pub fn load_current(
        &self,
        store: &Store,
        state: State,
        reuse: Option<&ModelMetadata>,
    ) -> Result<ActiveModel, ModelError> {
        let (fallback_reason, damaged) = match self.load(store, &state.current, reuse) {
            Ok(loaded) => return Ok(ActiveModel::new(loaded, state)),
            Err(error) if state.current == ModelSlot::BuiltIn => return Err(error),
            Err(error) => (error.to_string(), error.is_damage()),
        };
        warn!("the current model cannot be loaded: {fallback_reason}");
        let previous = state.previous.as_ref().filter(|slot| **slot != ModelSlot::BuiltIn).and_then(|slot| {
            let loaded = self.load(store, slot, reuse);
            let loaded = loaded.map_err(|error| warn!("the previous model cannot be loaded: {error}"));
            Some((loaded.ok()?, slot.clone()))
        });
        let (loaded, slot) = match previous {
            Some(previous) => previous,
            None => (self.default_model()?, ModelSlot::BuiltIn),
        };
        let state = match damaged {
            true => persist_or_keep(store.fall_back(slot.clone(), fallback_reason.clone()), state, |state| {
                state.fall_back(slot, fallback_reason);
            }),
            // The model may be usable at another time or under another configuration: the state stays.
            false => State { fallback_reason: Some(fallback_reason), ..state },
        };
        Ok(ActiveModel::new(loaded, state))
    }

    fn continue_trial(
        &self,
        store: &Store,
        state: &State,
        trial: &StoredTrial,
    ) -> Result<(LoadedModel, State), TrialError> {
        let state = match trial.phase {
            // Recorded before the model is loaded: if loading ends the process, the next start finds the phase.
            Phase::Waiting => store.set_phase(&trial.slot.sha256, Phase::Running)?,
            // The daemon that owns the store may be running the trial.
            Phase::Running if store.is_read_only() => state.clone(),
            Phase::Running => return Err(TrialError::Crashed),
        };
        Ok((self.load(store, &ModelSlot::Slot(trial.slot.clone()), None)?, state))
    }

    fn load(&self, store: &Store, slot: &ModelSlot, reuse: Option<&ModelMetadata>) -> Result<LoadedModel, ModelError> {
        let ModelSlot::Slot(slot) = slot else { return self.default_model() };
        let file = store.slot_file(slot).display().to_string();
        self.read(&file, &store.read(slot)?, ModelSource::Store, reuse).map_err(ModelError::from)
    }

    /// Loads the configured bundle, else the built-in model.
    fn default_model(&self) -> Result<LoadedModel, ModelError> {
        let loaded = match &self.bundle {
            Some(path) => {
                let file = path.display().to_string();
                archive::read_file(path)
                    .map_err(|source| BundleError::Archive { file: file.clone(), source }.into())
                    .and_then(|bytes| self.read(&file, &bytes, ModelSource::File, None))
            }
            None => self.read("built-in", BUILT_IN, ModelSource::BuiltIn, None),
        };
        // Names the configured file that is at fault.
        loaded.map_err(|refusal| match refusal {
            Refusal::Bundle(BundleError::Backbone(error)) | Refusal::Backbone(error)
                if self.backbone.file.is_some() =>
            {
                ModelError::ConfiguredBackbone(error)
            }
            refusal if self.bundle.is_some() => ModelError::ConfiguredBundle(refusal),
            refusal => refusal.into(),
        })
    }

    fn read(
        &self,
        file: &str,
        bytes: &[u8],
        source: ModelSource,
        reuse: Option<&ModelMetadata>,
    ) -> Result<LoadedModel, Refusal> {
        let candidate = Candidate { file, bytes, source };
        let admitted = admit(&candidate, &self.backbone, &Checks::Integrity { reuse }, |_| Ok::<_, Refusal>(()));
        admitted.map(|admitted| admitted.loaded)
    }

    /// Returns the message about the active model.
    pub fn status(&self, model: &ModelMetadata, state: &State) -> ModelStatus {
        ModelStatus {
            schema: SCHEMA,
            model: model.identity(),
            classes: model.manifest.classes.names().to_vec(),
            backbone: model.manifest.backbone.name.clone(),
            format: 1,
            format_max: Some(FORMAT),
            network: self.network(&model.manifest),
            dataset: model.manifest.dataset.sha256.clone(),
            metrics: model.manifest.metrics.clone(),
            signed_by: model.signed_by.clone(),
            source: model.source,
            trial: state.trial.is_some(),
            previous: rollback_target(state),
            generation: state.generation,
            fallback_reason: state.fallback_reason.clone(),
        }
    }

    /// Returns the backbone that a model must be trained on unless it carries its own. `manifest` is the active model's, whose
    /// backbone was checked when it was loaded.
    fn network(&self, manifest: &Manifest) -> NetworkRef {
        if !manifest.members.contains_key(BACKBONE) {
            return NetworkRef { name: manifest.backbone.name.clone(), sha256: manifest.backbone.sha256.clone() };
        }
        match &self.backbone.file {
            None => NetworkRef { name: MOBILENET_V2_NAME.into(), sha256: sha256_hex(MOBILENET_V2) },
            Some(file) => NetworkRef {
                name: file.display().to_string(),
                // Empty if the file cannot be read: no model fits then.
                sha256: backbone::read_file(file).map_or(String::new(), |onnx| sha256_hex(&onnx)),
            },
        }
    }
}

impl ActiveModel {
    fn new(loaded: LoadedModel, state: State) -> Self {
        ActiveModel { loaded, state, on_trial: false, rolled_back: Vec::new() }
    }
}

/// Returns the name of the model that a rollback activates.
fn rollback_target(state: &State) -> Option<String> {
    let slot = if state.trial.is_some() { Some(&state.current) } else { state.previous.as_ref() };
    slot.map(|slot| match slot {
        ModelSlot::BuiltIn => "built-in".into(),
        ModelSlot::Slot(slot) => slot.to_string(),
    })
}

/// Returns the state that was written. If the state cannot be written, applies the change to `before` in memory only; it is
/// lost at restart.
pub fn persist_or_keep(written: Result<State, StoreError>, before: State, change: impl FnOnce(&mut State)) -> State {
    written.unwrap_or_else(|error| {
        warn!("the store's state cannot be written and is lost when the program ends: {error}");
        let mut state = before;
        change(&mut state);
        state
    })
}
