//! The models on a device's disk: the current one, the previous one, the one on trial.
//!
//! ```text
//! state.json                which model is active
//! slots/<sha256>.bloom      the models it names, and no others
//! ```
//!
//! A model is written and flushed before the state refers to it, and removed after the state no longer does; `state.json` is
//! replaced by a rename. After a power cut at any moment the old state or the new one exists, and every model that it refers
//! to is complete.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bundle::Identity;
use crate::bundle::archive::{self, ArchiveError};
use crate::system::hash::sha256_hex;

const STATE: &str = "state.json";
const SLOTS: &str = "slots";
const SCHEMA: u32 = 1;
/// The largest state file that is read, in bytes.
const STATE_BYTES_MAX: u64 = 64 << 10;
/// Models that are remembered as rolled back.
const ROLLED_BACK_MAX: usize = 16;

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("the store {path}: {source}")]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The state is not valid, or a model has another SHA-256 than its name.
    #[error("the store's {path} is damaged: {reason}")]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// The difference to the expected content.
        reason: String,
    },
    /// The state or a model's file cannot be read or written.
    #[error("the store's {path}: {source}")]
    Archive {
        /// Path of the file.
        path: PathBuf,
        /// The cause.
        source: ArchiveError,
    },
    /// Another version of the program wrote the state.
    #[error("the store's {path} is of schema {schema}, this program reads {SCHEMA}")]
    Schema {
        /// Path of the state file.
        path: PathBuf,
        /// Schema number of the file.
        schema: u32,
    },
    /// A rollback is requested, and there is no previous model.
    #[error("there is no previous model")]
    NoPrevious,
    /// No model, or another one, is on trial.
    #[error("this model is not on trial: the store was changed by hand")]
    NoTrial,
}

/// The place of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelSlot {
    /// The program itself.
    BuiltIn,
    /// A file in `slots/`.
    Slot(Identity),
}

/// The phase of a trial; it distinguishes a crash from an orderly stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Not started, or interrupted by an orderly stop.
    Waiting,
    /// The model is active. Finding this phase at the start means that the daemon crashed.
    Running,
}

/// The model on trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredTrial {
    /// The model.
    pub slot: Identity,
    /// Phase of the trial.
    pub phase: Phase,
}

/// The content of `state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Schema number of the file.
    pub schema: u32,
    /// Incremented with each change; a signed command is valid for one generation.
    pub generation: u64,
    /// The model that was confirmed last, active unless another is on trial.
    pub current: ModelSlot,
    /// The model that a rollback activates.
    pub previous: Option<ModelSlot>,
    /// Active in place of `current` until it is confirmed or fails.
    pub trial: Option<StoredTrial>,
    /// SHA-256 of models that were rolled back or failed their trial, oldest first.
    #[serde(rename = "taken_back")]
    pub rolled_back: Vec<String>,
    /// The highest version that was confirmed on this device.
    #[serde(rename = "newest")]
    pub highest_confirmed_version: u64,
    /// The reason why the active model is not the one that was installed last.
    #[serde(rename = "trouble")]
    pub fallback_reason: Option<String>,
}

impl Default for State {
    fn default() -> Self {
        State {
            schema: SCHEMA,
            generation: 0,
            current: ModelSlot::BuiltIn,
            previous: None,
            trial: None,
            rolled_back: Vec::new(),
            highest_confirmed_version: 0,
            fallback_reason: None,
        }
    }
}

impl State {
    /// Returns the model that should be active: the one on trial, or else the current one.
    pub fn active(&self) -> ModelSlot {
        self.trial.as_ref().map_or_else(|| self.current.clone(), |trial| ModelSlot::Slot(trial.slot.clone()))
    }

    /// Makes `slot` the current model; `fallback_reason` is the reason why the current one cannot be used.
    pub fn fall_back(&mut self, slot: ModelSlot, fallback_reason: String) {
        (self.current, self.previous, self.fallback_reason) = (slot, None, Some(fallback_reason));
    }

    fn remember_rolled_back(&mut self, rolled_back: String) {
        self.rolled_back.retain(|sha256| *sha256 != rolled_back);
        self.rolled_back.push(rolled_back);
        let excess = self.rolled_back.len().saturating_sub(ROLLED_BACK_MAX);
        self.rolled_back.drain(..excess);
    }

    fn trial_mut(&mut self, sha256: &str) -> Result<&mut StoredTrial, StoreError> {
        self.trial.as_mut().filter(|trial| trial.slot.sha256 == sha256).ok_or(StoreError::NoTrial)
    }

    fn slots(&self) -> impl Iterator<Item = &Identity> {
        let slots = std::iter::once(&self.current).chain(&self.previous);
        let stored = slots.filter_map(|slot| match slot {
            ModelSlot::BuiltIn => None,
            ModelSlot::Slot(slot) => Some(slot),
        });
        stored.chain(self.trial.as_ref().map(|trial| &trial.slot))
    }
}

/// A folder with models. Each change reads and writes the state under a file lock, so that a command and the daemon can use it
/// at the same time.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
    read_only: bool,
}

impl Store {
    /// Opens a store; the folder is created with the first model.
    pub fn new(folder: &Path) -> Self {
        Store { folder: folder.into(), read_only: false }
    }

    /// Opens a store for reading: a change returns the state that would result and writes nothing.
    pub fn read_only(folder: &Path) -> Self {
        Store { folder: folder.into(), read_only: true }
    }

    /// Returns whether changes are not written.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Reads the state; [`State::default`] if the file does not exist.
    ///
    /// # Errors
    /// If it cannot be read, is damaged, or another version of the program wrote it.
    pub fn state(&self) -> Result<State, StoreError> {
        let path = self.folder.join(STATE);
        let size = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::default()),
            size => size.map_err(|source| StoreError::Io { path: path.clone(), source })?.len(),
        };
        let damaged = |reason: String| StoreError::Damaged { path: path.clone(), reason };
        if size > STATE_BYTES_MAX {
            return Err(damaged(format!("{size} bytes, expected at most {STATE_BYTES_MAX}")));
        }
        let bytes = fs::read(&path).map_err(|source| StoreError::Io { path: path.clone(), source })?;
        let state: State = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if state.schema != SCHEMA {
            return Err(StoreError::Schema { path, schema: state.schema });
        }
        let named = |slot: &Identity| slot.sha256.len() == 64 && slot.sha256.bytes().all(|b| b.is_ascii_hexdigit());
        if !state.slots().all(named) {
            return Err(damaged("a slot's name is not a SHA-256".into()));
        }
        Ok(state)
    }

    /// Reads a model's file.
    ///
    /// # Errors
    /// If it cannot be read, or has another SHA-256.
    pub fn read(&self, slot: &Identity) -> Result<Vec<u8>, StoreError> {
        let path = self.slot_file(slot);
        let bytes = archive::read_file(&path).map_err(|source| StoreError::Archive { path: path.clone(), source })?;
        match sha256_hex(&bytes) {
            found if found == slot.sha256 => Ok(bytes),
            found => Err(StoreError::Damaged { path, reason: format!("its sha256 is {found}") }),
        }
    }

    /// Returns the path of a model's file.
    pub fn slot_file(&self, slot: &Identity) -> PathBuf {
        self.folder.join(SLOTS).join(format!("{}.bloom", slot.sha256))
    }

    /// Writes a model and puts it on trial, in place of one that is on trial.
    ///
    /// # Errors
    /// If the model or the state cannot be written; the store is then unchanged.
    pub fn start_trial(&self, slot: Identity, bytes: &[u8], phase: Phase) -> Result<State, StoreError> {
        self.create_folders()?;
        let _lock = self.lock()?;
        let mut state = self.state()?;
        let path = self.slot_file(&slot);
        let written = match self.read_only {
            true => Ok(()),
            false => archive::write_atomically(&path, bytes).map_err(|source| StoreError::Archive { path, source }),
        };
        let before = state.clone();
        state.trial = Some(StoredTrial { slot, phase });
        let put = written.and_then(|()| self.write(state));
        if put.is_err() {
            // The error that is returned has the reason.
            let _ = self.remove_unreferenced(&before);
        }
        put
    }

    /// Records the phase of a trial.
    ///
    /// # Errors
    /// The model is not on trial, or the state cannot be written.
    pub fn set_phase(&self, sha256: &str, phase: Phase) -> Result<State, StoreError> {
        self.change(|state| {
            state.trial_mut(sha256)?.phase = phase;
            Ok(())
        })
    }

    /// Makes the model on trial the current one.
    ///
    /// # Errors
    /// The model is not on trial, or the state cannot be written.
    pub fn confirm(&self, sha256: &str) -> Result<State, StoreError> {
        self.change(|state| {
            let slot = state.trial_mut(sha256)?.slot.clone();
            state.rolled_back.retain(|rolled_back| rolled_back != sha256);
            state.highest_confirmed_version = state.highest_confirmed_version.max(slot.version);
            let before = std::mem::replace(&mut state.current, ModelSlot::Slot(slot));
            (state.previous, state.trial, state.fallback_reason) = (Some(before), None, None);
            Ok(())
        })
    }

    /// Ends the trial of a model that failed, and remembers it as rolled back.
    ///
    /// # Errors
    /// The model is not on trial, or the state cannot be written.
    pub fn fail_trial(&self, sha256: &str, reason: &str) -> Result<State, StoreError> {
        self.change(|state| {
            let fallback_reason = format!("{} is rolled back: {reason}", state.trial_mut(sha256)?.slot);
            state.fallback_reason = Some(fallback_reason);
            state.trial = None;
            state.remember_rolled_back(sha256.to_owned());
            Ok(())
        })
    }

    /// Rolls back: from a trial to the current model, else to the previous one; remembers the model that was rolled back.
    ///
    /// # Errors
    /// There is no previous model, or the state cannot be written.
    pub fn roll_back(&self) -> Result<State, StoreError> {
        self.change(|state| {
            let rolled_back = match state.trial.take() {
                Some(trial) => ModelSlot::Slot(trial.slot),
                None => {
                    let previous = state.previous.take().ok_or(StoreError::NoPrevious)?;
                    std::mem::replace(&mut state.current, previous)
                }
            };
            if let ModelSlot::Slot(slot) = rolled_back {
                state.remember_rolled_back(slot.sha256);
            }
            state.fallback_reason = None;
            Ok(())
        })
    }

    /// Makes `slot` the current model because the current one cannot be used, for the reason `fallback_reason`.
    ///
    /// # Errors
    /// The state cannot be written.
    pub fn fall_back(&self, slot: ModelSlot, fallback_reason: String) -> Result<State, StoreError> {
        self.create_folders()?;
        self.change_from(
            |store| Ok(store.state().unwrap_or_default()),
            |state| {
                state.fall_back(slot, fallback_reason);
                Ok(())
            },
        )
    }

    /// Removes files that an interrupted change left behind.
    ///
    /// # Errors
    /// A file cannot be removed; or the state cannot be read, and nothing is removed.
    pub fn clean_up(&self) -> Result<(), StoreError> {
        match self.lock()? {
            Some(_lock) => self.remove_unreferenced(&self.state()?),
            None => Ok(()),
        }
    }

    fn change(&self, change: impl FnOnce(&mut State) -> Result<(), StoreError>) -> Result<State, StoreError> {
        self.change_from(Self::state, change)
    }

    fn change_from(
        &self,
        read: impl FnOnce(&Self) -> Result<State, StoreError>,
        change: impl FnOnce(&mut State) -> Result<(), StoreError>,
    ) -> Result<State, StoreError> {
        let _lock = self.lock()?;
        let mut state = read(self)?;
        change(&mut state)?;
        self.write(state)
    }

    /// Writes the state with the next generation; the caller holds the lock.
    fn write(&self, mut state: State) -> Result<State, StoreError> {
        // A new store starts at a random generation: a command signed for an earlier store of this device stays invalid.
        state.generation = match state.generation {
            0 => fastrand::u64(1..1 << 40),
            generation => generation + 1,
        };
        if !self.read_only {
            let path = self.folder.join(STATE);
            let mut json = serde_json::to_vec_pretty(&state).expect("a state can be written as JSON");
            json.push(b'\n');
            archive::write_atomically(&path, &json).map_err(|source| StoreError::Archive { path, source })?;
            // A file that cannot be removed is removed the next time.
            let _ = self.remove_unreferenced(&state);
        }
        Ok(state)
    }

    /// Locks the folder until the returned file is dropped.
    fn lock(&self) -> Result<Option<File>, StoreError> {
        if self.read_only || !self.folder.is_dir() {
            return Ok(None);
        }
        let failed = |source| StoreError::Io { path: self.folder.clone(), source };
        let folder = File::open(&self.folder).map_err(failed)?;
        folder.lock().map_err(failed)?;
        Ok(Some(folder))
    }

    fn create_folders(&self) -> Result<(), StoreError> {
        let slots = self.folder.join(SLOTS);
        if self.read_only || slots.is_dir() {
            return Ok(());
        }
        let failed = |source| StoreError::Io { path: slots.clone(), source };
        fs::create_dir_all(&slots).map_err(failed)?;
        // `install` may run as root: the daemon, who owns the folder, must be able to write here. A process that may not change
        // the owner is the daemon itself.
        let owner = fs::metadata(&self.folder).map_err(failed)?;
        let _ = chown(&slots, Some(owner.uid()), Some(owner.gid()));
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(failed)
    }

    /// Removes the files that the state does not refer to; a file that cannot be removed does not stop the removal of the others.
    fn remove_unreferenced(&self, state: &State) -> Result<(), StoreError> {
        let referenced: Vec<PathBuf> = state.slots().map(|slot| self.slot_file(slot)).collect();
        let partial = self.folder.join(STATE).with_added_extension(archive::PART);
        let entries = fs::read_dir(self.folder.join(SLOTS)).into_iter().flatten();
        let unreferenced =
            entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| !referenced.contains(path));
        let mut removed = Ok(());
        for path in unreferenced.chain(partial.exists().then_some(partial)) {
            if let Err(source) = fs::remove_file(&path) {
                removed = Err(StoreError::Io { path, source });
            }
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(bytes: &[u8], version: u64) -> Identity {
        Identity { sha256: sha256_hex(bytes), name: "m".into(), version }
    }

    /// Returns a store with `versions` installed and confirmed in turn; a model's bytes are its version.
    fn store(versions: &[u8]) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(&dir.path().join("store"));
        for version in versions {
            install(&store, *version);
            store.confirm(&name(*version)).unwrap();
        }
        (dir, store)
    }

    fn install(store: &Store, version: u8) -> State {
        store.start_trial(slot(&[version], version.into()), &[version], Phase::Waiting).unwrap()
    }

    fn name(version: u8) -> String {
        sha256_hex(&[version])
    }

    fn version(slot: &ModelSlot) -> u64 {
        match slot {
            ModelSlot::BuiltIn => 0,
            ModelSlot::Slot(slot) => slot.version,
        }
    }

    fn files(store: &Store) -> usize {
        fs::read_dir(store.folder.join(SLOTS)).unwrap().count()
    }

    #[test]
    fn a_model_on_trial_is_active_and_becomes_current_once_confirmed() {
        let (_dir, store) = store(&[]);
        assert_eq!(store.state().unwrap(), State::default());
        let on_trial = install(&store, 1);
        assert_eq!((version(&on_trial.active()), version(&on_trial.current)), (1, 0));
        assert!(matches!(store.confirm(&name(2)), Err(StoreError::NoTrial)), "another one is on trial");
        let confirmed = store.confirm(&name(1)).unwrap();
        assert_eq!((version(&confirmed.active()), confirmed.previous.as_ref().map(version)), (1, Some(0)));
        assert!(confirmed.generation > on_trial.generation);
        assert!(matches!(store.confirm(&name(1)), Err(StoreError::NoTrial)));
        install(&store, 2);
        assert_eq!(version(&store.fail_trial(&name(2), "slow").unwrap().active()), 1);
        assert_eq!(files(&store), 1, "the failed model is removed");
        let state = store.state().unwrap();
        assert_eq!(state.fallback_reason.as_deref(), Some("m 2 is rolled back: slow"));
        assert_eq!((state.rolled_back, state.highest_confirmed_version), (vec![name(2)], 1));
    }

    #[test]
    fn a_rollback_activates_the_previous_model_and_is_remembered() {
        let (_dir, store) = store(&[1, 2, 3]);
        assert_eq!(files(&store), 2, "the current and the previous model");
        let back = store.roll_back().unwrap();
        assert_eq!((version(&back.current), back.previous.clone()), (2, None));
        assert_eq!(back.rolled_back, [name(3)]);
        assert_eq!(files(&store), 1);
        assert!(matches!(store.roll_back(), Err(StoreError::NoPrevious)));
        install(&store, 4);
        assert_eq!(version(&store.roll_back().unwrap().active()), 2, "from a trial to the current model");
        install(&store, 3);
        assert!(!store.confirm(&name(3)).unwrap().rolled_back.contains(&name(3)));
    }

    #[test]
    fn names_a_damaged_model_or_state_and_falls_back() {
        let (_dir, store) = store(&[1, 2]);
        let state = store.state().unwrap();
        let ModelSlot::Slot(current) = &state.current else { panic!("installed") };
        assert_eq!(store.read(current).unwrap(), [2]);
        fs::write(store.slot_file(current), "x").unwrap();
        assert!(store.read(current).unwrap_err().to_string().contains("is damaged: its sha256 is"));
        let settled = store.fall_back(state.previous.unwrap(), "the disk".into()).unwrap();
        assert_eq!(
            (version(&settled.current), settled.previous, settled.fallback_reason),
            (1, None, Some("the disk".into()))
        );
        assert_eq!(files(&store), 1);

        fs::write(store.folder.join(STATE), "{").unwrap();
        assert!(matches!(store.state(), Err(StoreError::Damaged { .. })));
        assert!(store.confirm(&name(2)).is_err() && store.clean_up().is_err());
        assert_eq!(files(&store), 1, "nothing is removed while the state cannot be read");
        let settled = store.fall_back(ModelSlot::BuiltIn, "the state".into()).unwrap();
        assert!(settled.generation != 1, "a command signed for an earlier store stays invalid");
        assert_eq!((version(&settled.active()), files(&store)), (0, 0));
    }

    #[test]
    fn removes_files_of_an_interrupted_change() {
        let (_dir, store) = store(&[1]);
        fs::write(store.folder.join(SLOTS).join("orphan.bloom"), "x").unwrap();
        fs::write(store.folder.join(SLOTS).join("half.bloom.part"), "x").unwrap();
        fs::write(store.folder.join("state.json.part"), "{").unwrap();
        fs::create_dir(store.folder.join(SLOTS).join("folder.bloom")).unwrap();
        fs::write(store.folder.join("mine.bloom"), "another file").unwrap();
        assert!(store.clean_up().is_err(), "a folder is not a file");
        fs::remove_dir(store.folder.join(SLOTS).join("folder.bloom")).unwrap();
        store.clean_up().unwrap();
        assert_eq!(files(&store), 1);
        assert_eq!(fs::read_dir(&store.folder).unwrap().count(), 3);
    }

    #[test]
    fn a_read_only_store_changes_nothing() {
        let (_dir, store) = store(&[1, 2]);
        let before = store.state().unwrap();
        let reader = Store::read_only(&store.folder);
        assert_eq!(version(&reader.roll_back().unwrap().current), 1);
        reader.fall_back(ModelSlot::BuiltIn, "trouble".into()).unwrap();
        reader.clean_up().unwrap();
        assert_eq!(store.state().unwrap(), before);
        assert_eq!(files(&store), 2);
    }

    #[test]
    fn a_slot_name_with_a_path_is_damage() {
        let (_dir, store) = store(&[1]);
        let state = fs::read_to_string(store.folder.join(STATE)).unwrap();
        fs::write(store.folder.join(STATE), state.replace(&slot(&[1], 1).sha256, "../../etc/passwd")).unwrap();
        assert!(store.state().unwrap_err().to_string().contains("not a SHA-256"));
    }

    /// `state.json` is read by other versions of the program: its names are stable.
    #[test]
    fn the_state_keeps_its_names_on_disk() {
        let json = serde_json::to_value(State::default()).unwrap();
        let names: Vec<&String> = json.as_object().unwrap().keys().collect();
        let expected = ["current", "generation", "newest", "previous", "schema", "taken_back", "trial", "trouble"];
        assert_eq!(names, expected);
    }

    #[test]
    fn keeps_the_state_of_a_newer_program() {
        let (_dir, store) = store(&[1]);
        let path = store.folder.join(STATE);
        let newer = fs::read_to_string(&path).unwrap().replace("\"schema\": 1", "\"schema\": 2");
        fs::write(&path, &newer).unwrap();
        assert!(matches!(store.state(), Err(StoreError::Schema { schema: 2, .. })));
        assert!(store.confirm(&name(1)).is_err() && store.clean_up().is_err());
        assert_eq!((fs::read_to_string(&path).unwrap(), files(&store)), (newer, 1));
    }
}
