//! The model that decides: loaded from wherever the device has it, or from what is left where that is damaged.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::warn;

use crate::bundle::manifest::FORMAT;
use crate::bundle::{ArchiveError, BACKBONE, Bundle, BundleError, Identity, Manifest, SelfTest, TAIL};
use crate::config::Config;
use crate::mqtt::message::SCHEMA;
use crate::system::hash::sha256_hex;
use crate::update::device::store::{ModelSlot, Phase, State, Store, StoreError, Trial};
use crate::update::protocol::{ModelStatus, NetworkRef, Source, identity};
use crate::vision::backbone::{self, MOBILENET_V2, MOBILENET_V2_NAME};
use crate::vision::kernels::Team;
use crate::vision::{Backbone, BackboneError, Classifier};

/// A model that was loaded, and what there is to know of it.
#[derive(Clone)]
pub struct Model {
    pub manifest: Manifest,
    pub sha256: String,
    /// The id of the key that signed it.
    pub signed_by: Option<String>,
    pub source: Source,
    pub backbone: Backbone,
}

/// A model ready to decide. Of its file nothing is kept.
pub struct Loaded {
    pub model: Model,
    pub classifier: Classifier,
    pub self_test: Option<SelfTest>,
}

/// Why a model of the device is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("model.bundle: {0}")]
    Named(BundleError),
    #[error("model.backbone: {0}")]
    Network(BackboneError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{0} made the program panic; its message stands in the log")]
    Panicked(String),
}

impl ModelError {
    /// Whether the model is gone for good, rather than of no use as things are.
    fn is_damage(&self) -> bool {
        match self {
            ModelError::Store(StoreError::Damaged { .. }) => true,
            ModelError::Store(StoreError::Archive { source: ArchiveError::Io(error), .. }) => {
                error.kind() == io::ErrorKind::NotFound
            }
            ModelError::Store(StoreError::Archive { .. }) => true,
            ModelError::Bundle(error) => matches!(error, BundleError::Archive { .. } | BundleError::Content { .. }),
            _ => false,
        }
    }
}

impl Model {
    pub fn identity(&self) -> Identity {
        identity(&self.manifest, &self.sha256)
    }

    /// Whether another model looks at the same numbers, and has them from the same place: only its head differs.
    pub fn gives_the_features_of(&self, other: &Manifest) -> bool {
        let same_member = |name| self.manifest.members.get(name) == other.members.get(name);
        self.manifest.backbone == other.backbone
            && self.manifest.preprocess == other.preprocess
            && [TAIL, BACKBONE].into_iter().all(same_member)
    }
}

impl Loaded {
    /// `shelf` has the network; `like`: a model whose network is used again where it is the same.
    pub fn new(
        mut bundle: Bundle,
        source: Source,
        shelf: &ModelLoader,
        like: Option<&Model>,
    ) -> Result<Self, ModelError> {
        let same = like.filter(|like| like.gives_the_features_of(bundle.manifest()));
        let backbone = match same {
            Some(like) => like.backbone.clone(),
            None => bundle.backbone(&bundle.network(shelf.backbone.as_deref())?.with_team(shelf.team.clone()))?,
        };
        let classifier = Classifier::new(&backbone, bundle.classifier_params())?;
        let self_test = bundle.take_self_test();
        let model = Model {
            manifest: bundle.manifest().clone(),
            sha256: bundle.sha256().to_owned(),
            signed_by: bundle.signer().map(crate::bundle::PublicKey::id),
            source,
            backbone,
        };
        Ok(Loaded { model, classifier, self_test })
    }
}

/// Where a device has its models.
#[derive(Debug, Clone)]
pub struct ModelLoader {
    /// A bundle that the configuration names; it alone decides then.
    pub bundle: Option<PathBuf>,
    /// The ONNX file of the network; the one inside the program where none is named.
    pub backbone: Option<PathBuf>,
    /// None where the configuration names a bundle, or no store.
    pub store: Option<Store>,
    /// The threads that compute its networks; none: the caller's alone.
    pub team: Option<Arc<Team>>,
}

/// What decides, and what had to be told on the way there.
pub struct ActiveModel {
    pub loaded: Loaded,
    pub state: State,
    /// It decides on trial.
    pub trial: bool,
    /// Models that were on trial when the program ended and are rolled back, and why.
    pub news: Vec<(Identity, String)>,
}

impl ModelLoader {
    /// As the configuration has it. `open`: how the store is opened, where there is one.
    pub fn of(config: &Config, open: fn(&Path) -> Store) -> Self {
        fn named(path: &Path) -> Option<&Path> {
            (!path.as_os_str().is_empty()).then_some(path)
        }
        let model = &config.model;
        let bundle = named(&model.bundle).map(Path::to_owned);
        let store = named(&model.store).filter(|_| bundle.is_none()).map(open);
        ModelLoader { bundle, backbone: named(&model.backbone).map(Path::to_owned), store, team: None }
    }

    /// Finds what decides: a model that waits for its trial, else the current one, else the one before, else that inside the
    /// program. An error where not even that can be loaded.
    pub fn deciding(&self) -> Result<ActiveModel, ModelError> {
        let Some(store) = &self.store else {
            return Ok(ActiveModel { loaded: self.own()?, state: State::default(), trial: false, news: Vec::new() });
        };
        let mut state = match store.state() {
            Ok(state) => state,
            Err(error @ StoreError::Damaged { .. }) => {
                let trouble = error.to_string();
                warn!("{trouble}");
                let settled = store.settle(ModelSlot::BuiltIn, trouble.clone());
                persist_or_keep(settled, State::default(), |state| state.trouble = Some(trouble))
            }
            // What cannot be read today may be read tomorrow.
            Err(error) => {
                warn!("{error}; the model inside the program decides");
                let state = State { trouble: Some(error.to_string()), ..State::default() };
                return Ok(ActiveModel { loaded: self.own()?, state, trial: false, news: Vec::new() });
            }
        };
        if let Err(error) = store.tidy() {
            warn!("what an interrupted change left behind stays there: {error}");
        }
        let mut news = Vec::new();
        if let Some(trial) = state.trial.clone() {
            match self.begin_trial(store, &trial) {
                Ok((loaded, state)) => return Ok(ActiveModel { loaded, state, trial: true, news }),
                Err(reason) => {
                    let abandoned = store.abandon(&trial.slot.sha256, &reason);
                    news.push((trial.slot, reason));
                    state = persist_or_keep(abandoned, state, |state| state.trial = None);
                }
            }
        }
        Ok(ActiveModel { news, ..self.settle(store, state, None)? })
    }

    /// What decides by `state`, in which nothing is on trial. `like`: what decided until now.
    pub fn settle(&self, store: &Store, state: State, like: Option<&Model>) -> Result<ActiveModel, ModelError> {
        let decides = |loaded, state| ActiveModel { loaded, state, trial: false, news: Vec::new() };
        let (trouble, damaged) = match self.load(store, &state.current, like) {
            Ok(loaded) => return Ok(decides(loaded, state)),
            Err(error) if state.current == ModelSlot::BuiltIn => return Err(error),
            Err(error) => (error.to_string(), error.is_damage()),
        };
        warn!("the model that was installed last is of no use: {trouble}");
        let before = state.previous.as_ref().filter(|place| **place != ModelSlot::BuiltIn).and_then(|place| {
            let loaded = self.load(store, place, like).map_err(|error| warn!("nor is the one before: {error}"));
            Some((loaded.ok()?, place.clone()))
        });
        let (loaded, place) = match before {
            Some(before) => before,
            None => (self.own()?, ModelSlot::BuiltIn),
        };
        let state = match damaged {
            true => persist_or_keep(store.settle(place.clone(), trouble.clone()), state, |state| {
                state.settle(place, trouble)
            }),
            // Another time, or another configuration, may find it good.
            false => State { trouble: Some(trouble), ..state },
        };
        Ok(decides(loaded, state))
    }

    fn begin_trial(&self, store: &Store, trial: &Trial) -> Result<(Loaded, State), String> {
        if trial.phase == Phase::Running {
            return Err("the program did not end in order while it was on trial".into());
        }
        // Noted before it is loaded: should that end the program, the next start knows.
        let state = store.set_phase(&trial.slot.sha256, Phase::Running).map_err(|e| e.to_string())?;
        let loaded = self.load(store, &ModelSlot::Slot(trial.slot.clone()), None).map_err(|e| e.to_string())?;
        Ok((loaded, state))
    }

    fn load(&self, store: &Store, place: &ModelSlot, like: Option<&Model>) -> Result<Loaded, ModelError> {
        let ModelSlot::Slot(slot) = place else { return self.own() };
        let file = store.slot_file(slot).display().to_string();
        let load = || Loaded::new(Bundle::from_bytes(&file, &store.read(slot)?)?, Source::Store, self, like);
        catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(|_| Err(ModelError::Panicked(file.clone())))
    }

    /// The model that needs no store.
    fn own(&self) -> Result<Loaded, ModelError> {
        let loaded = match &self.bundle {
            Some(file) => {
                Bundle::read(file).map_err(ModelError::from).and_then(|b| Loaded::new(b, Source::File, self, None))
            }
            None => Loaded::new(Bundle::built_in()?, Source::BuiltIn, self, None),
        };
        // What the configuration names is at fault.
        loaded.map_err(|error| match error {
            ModelError::Bundle(BundleError::Backbone(error)) if self.backbone.is_some() => ModelError::Network(error),
            ModelError::Bundle(error) if self.bundle.is_some() => ModelError::Named(error),
            error => error,
        })
    }

    /// What is said of the model that decides.
    pub fn note(&self, model: &Model, state: &State) -> ModelStatus {
        ModelStatus {
            schema: SCHEMA,
            model: model.identity(),
            classes: model.manifest.classes.names().to_vec(),
            backbone: model.manifest.backbone.name.clone(),
            format: FORMAT,
            network: self.network(&model.manifest),
            dataset: model.manifest.dataset.sha256.clone(),
            metrics: model.manifest.metrics.clone(),
            signed_by: model.signed_by.clone(),
            source: model.source,
            trial: state.trial.is_some(),
            previous: before(state),
            generation: state.generation,
            trouble: state.trouble.clone(),
        }
    }

    /// The network that a model must be made for which does not carry its own. `manifest`: of the model that decides, whose
    /// network was checked when it was loaded.
    fn network(&self, manifest: &Manifest) -> NetworkRef {
        if !manifest.members.contains_key(BACKBONE) {
            return NetworkRef { name: manifest.backbone.name.clone(), sha256: manifest.backbone.sha256.clone() };
        }
        match &self.backbone {
            None => NetworkRef { name: MOBILENET_V2_NAME.into(), sha256: sha256_hex(MOBILENET_V2) },
            Some(file) => NetworkRef {
                name: file.display().to_string(),
                // One that cannot be read is none.
                sha256: backbone::read_file(file).map_or(String::new(), |onnx| sha256_hex(&onnx)),
            },
        }
    }
}

/// What a rollback goes back to, by name.
fn before(state: &State) -> Option<String> {
    let place = if state.trial.is_some() { Some(&state.current) } else { state.previous.as_ref() };
    place.map(|place| match place {
        ModelSlot::BuiltIn => "built-in".into(),
        ModelSlot::Slot(slot) => slot.to_string(),
    })
}

/// The state as it was written; or, where it could not be, as it is to be until the program ends.
pub fn persist_or_keep(written: Result<State, StoreError>, before: State, change: impl FnOnce(&mut State)) -> State {
    written.unwrap_or_else(|error| {
        warn!("cannot be noted, and is forgotten with the end of the program: {error}");
        let mut state = before;
        change(&mut state);
        state
    })
}
