//! The models on a device's disk: which decides, which decided before, which is on trial.
//!
//! ```text
//! state.json                who decides
//! slots/<sha256>.bloom      the models it names, and no others
//! ```
//!
//! A model is written before it is named, and what is not named any more is removed last; `state.json` is
//! replaced by a rename. Power may go at any moment: there is the old state or the new one, and every model
//! that it names is whole.

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
/// The longest state is far smaller.
const STATE_BYTES_MAX: u64 = 64 << 10;
/// Models that were taken back and are remembered as such.
const TAKEN_BACK_MAX: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the store {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the store's {path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("the store's {path}: {source}")]
    Archive { path: PathBuf, source: ArchiveError },
    #[error("the store's {path} is of schema {schema}, this program reads {SCHEMA}")]
    Schema { path: PathBuf, schema: u32 },
    #[error("there is no model before this one")]
    NoPrevious,
    #[error("this model is not on trial: the store was changed by hand")]
    NoTrial,
}

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelSlot {
    BuiltIn,
    Slot(Identity),
}

/// How far a trial is, which tells a crash from a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It has not decided yet, or was stopped in order.
    Waiting,
    /// It decides. Who finds it so at the start knows that it did not end in order.
    Running,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    pub slot: Identity,
    pub phase: Phase,
}

/// What the store says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub schema: u32,
    /// Grows with each change; an order that names it cannot be given twice.
    pub generation: u64,
    /// The model that was confirmed last.
    pub current: ModelSlot,
    /// What a rollback goes back to.
    pub previous: Option<ModelSlot>,
    /// Decides in the place of `current` until it is confirmed or fails.
    pub trial: Option<Trial>,
    /// SHA-256 of models that somebody took back, or that failed their trial.
    pub taken_back: Vec<String>,
    /// The highest version that was ever confirmed here.
    pub newest: u64,
    /// Why the model that decides is not the one that was installed last.
    pub trouble: Option<String>,
}

impl Default for State {
    fn default() -> Self {
        State {
            schema: SCHEMA,
            generation: 0,
            current: ModelSlot::BuiltIn,
            previous: None,
            trial: None,
            taken_back: Vec::new(),
            newest: 0,
            trouble: None,
        }
    }
}

impl State {
    /// What decides while all is well.
    pub fn deciding(&self) -> ModelSlot {
        self.trial.as_ref().map_or_else(|| self.current.clone(), |trial| ModelSlot::Slot(trial.slot.clone()))
    }

    /// `place` decides from now on, and `trouble` says why the model that was current does not.
    pub fn settle(&mut self, place: ModelSlot, trouble: String) {
        (self.current, self.previous, self.trouble) = (place, None, Some(trouble));
    }

    fn remember(&mut self, taken_back: String) {
        self.taken_back.retain(|sha256| *sha256 != taken_back);
        self.taken_back.push(taken_back);
        let forgotten = self.taken_back.len().saturating_sub(TAKEN_BACK_MAX);
        self.taken_back.drain(..forgotten);
    }

    fn trial_of(&mut self, sha256: &str) -> Result<&mut Trial, StoreError> {
        self.trial.as_mut().filter(|trial| trial.slot.sha256 == sha256).ok_or(StoreError::NoTrial)
    }

    fn slots(&self) -> impl Iterator<Item = &Identity> {
        let places = std::iter::once(&self.current).chain(&self.previous);
        let stored = places.filter_map(|place| match place {
            ModelSlot::BuiltIn => None,
            ModelSlot::Slot(slot) => Some(slot),
        });
        stored.chain(self.trial.as_ref().map(|trial| &trial.slot))
    }
}

/// A folder with models. Each change reads, changes and writes the state under a lock, so that a command and the daemon
/// may both work on it.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
    changes: bool,
}

impl Store {
    /// `folder` is made when something is put into it.
    pub fn new(folder: &Path) -> Self {
        Store { folder: folder.into(), changes: true }
    }

    /// The same, for looking only: a change is computed, and not made.
    pub fn for_looking(folder: &Path) -> Self {
        Store { folder: folder.into(), changes: false }
    }

    /// Nothing is installed where there is no state.
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
            return Err(damaged("a slot's name is no SHA-256".into()));
        }
        Ok(state)
    }

    /// The whole file of a model, as it was installed.
    pub fn read(&self, slot: &Identity) -> Result<Vec<u8>, StoreError> {
        let path = self.slot_file(slot);
        let bytes = archive::read_file(&path).map_err(|source| StoreError::Archive { path: path.clone(), source })?;
        match sha256_hex(&bytes) {
            found if found == slot.sha256 => Ok(bytes),
            found => Err(StoreError::Damaged { path, reason: format!("its sha256 is {found}") }),
        }
    }

    /// Where a model's file is.
    pub fn slot_file(&self, slot: &Identity) -> PathBuf {
        self.folder.join(SLOTS).join(format!("{}.bloom", slot.sha256))
    }

    /// Puts a model on trial in the place of one that was before it.
    pub fn try_out(&self, slot: Identity, bytes: &[u8], phase: Phase) -> Result<State, StoreError> {
        self.make_folders()?;
        let _lock = self.lock()?;
        let mut state = self.state()?;
        let path = self.slot_file(&slot);
        let written = match self.changes {
            true => archive::write_file(&path, bytes).map_err(|source| StoreError::Archive { path, source }),
            false => Ok(()),
        };
        let before = state.clone();
        state.trial = Some(Trial { slot, phase });
        let put = written.and_then(|()| self.write(state));
        if put.is_err() {
            // The reason stands in the error that is returned.
            let _ = self.sweep(&before);
        }
        put
    }

    /// Notes how far the trial of a model is.
    pub fn set_phase(&self, sha256: &str, phase: Phase) -> Result<State, StoreError> {
        self.change(|state| {
            state.trial_of(sha256)?.phase = phase;
            Ok(())
        })
    }

    /// The model on trial has proved itself.
    pub fn confirm(&self, sha256: &str) -> Result<State, StoreError> {
        self.change(|state| {
            let slot = state.trial_of(sha256)?.slot.clone();
            state.taken_back.retain(|taken_back| taken_back != sha256);
            state.newest = state.newest.max(slot.version);
            let before = std::mem::replace(&mut state.current, ModelSlot::Slot(slot));
            (state.previous, state.trial, state.trouble) = (Some(before), None, None);
            Ok(())
        })
    }

    /// The model on trial has failed, for this reason.
    pub fn abandon(&self, sha256: &str, reason: &str) -> Result<State, StoreError> {
        self.change(|state| {
            let trouble = format!("{} is rolled back: {reason}", state.trial_of(sha256)?.slot);
            state.trouble = Some(trouble);
            state.trial = None;
            state.remember(sha256.to_owned());
            Ok(())
        })
    }

    /// Goes back: from a trial to the current model, else to the one before, and remembers what was taken back.
    pub fn take_back(&self) -> Result<State, StoreError> {
        self.change(|state| {
            let bad = match state.trial.take() {
                Some(trial) => ModelSlot::Slot(trial.slot),
                None => {
                    let previous = state.previous.take().ok_or(StoreError::NoPrevious)?;
                    std::mem::replace(&mut state.current, previous)
                }
            };
            if let ModelSlot::Slot(slot) = bad {
                state.remember(slot.sha256);
            }
            state.trouble = None;
            Ok(())
        })
    }

    /// The current model is of no use: `place` decides, and `trouble` says why.
    pub fn settle(&self, place: ModelSlot, trouble: String) -> Result<State, StoreError> {
        self.make_folders()?;
        self.change_from(
            |store| Ok(store.state().unwrap_or_default()),
            |state| {
                state.settle(place, trouble);
                Ok(())
            },
        )
    }

    /// Removes what an interrupted change left behind. Where the state cannot be read, nothing: who knows what it named.
    pub fn tidy(&self) -> Result<(), StoreError> {
        match self.lock()? {
            Some(_lock) => self.sweep(&self.state()?),
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

    /// Under the lock.
    fn write(&self, mut state: State) -> Result<State, StoreError> {
        // A store that begins anew does not count what an earlier one has counted.
        state.generation = match state.generation {
            0 => fastrand::u64(1..1 << 40),
            generation => generation + 1,
        };
        if self.changes {
            let path = self.folder.join(STATE);
            let mut json = serde_json::to_vec_pretty(&state).expect("a state can be written as JSON");
            json.push(b'\n');
            archive::write_file(&path, &json).map_err(|source| StoreError::Archive { path, source })?;
            // What is left lying is removed the next time.
            let _ = self.sweep(&state);
        }
        Ok(state)
    }

    /// Until it is dropped, or the process ends.
    fn lock(&self) -> Result<Option<File>, StoreError> {
        if !self.changes || !self.folder.is_dir() {
            return Ok(None);
        }
        let failed = |source| StoreError::Io { path: self.folder.clone(), source };
        let folder = File::open(&self.folder).map_err(failed)?;
        folder.lock().map_err(failed)?;
        Ok(Some(folder))
    }

    fn make_folders(&self) -> Result<(), StoreError> {
        let slots = self.folder.join(SLOTS);
        if !self.changes || slots.is_dir() {
            return Ok(());
        }
        let failed = |source| StoreError::Io { path: slots.clone(), source };
        fs::create_dir_all(&slots).map_err(failed)?;
        // Whoever installs by hand may be root: the daemon must be able to write there, too. Where we may not give it away, it
        // is ours and we are the daemon.
        let owner = fs::metadata(&self.folder).map_err(failed)?;
        let _ = chown(&slots, Some(owner.uid()), Some(owner.gid()));
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(failed)
    }

    /// Removes what the state does not name. What cannot be removed keeps nothing else from it.
    fn sweep(&self, state: &State) -> Result<(), StoreError> {
        let named: Vec<PathBuf> = state.slots().map(|slot| self.slot_file(slot)).collect();
        let half = self.folder.join(STATE).with_added_extension(archive::PART);
        let entries = fs::read_dir(self.folder.join(SLOTS)).into_iter().flatten();
        let unnamed = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| !named.contains(path));
        let mut swept = Ok(());
        for path in unnamed.chain(half.exists().then_some(half)) {
            if let Err(source) = fs::remove_file(&path) {
                swept = Err(StoreError::Io { path, source });
            }
        }
        swept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(bytes: &[u8], version: u64) -> Identity {
        Identity { sha256: sha256_hex(bytes), name: "m".into(), version }
    }

    /// A store with `versions` installed and confirmed, one after the other; a version's bytes are its number.
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
        store.try_out(slot(&[version], version.into()), &[version], Phase::Waiting).unwrap()
    }

    fn name(version: u8) -> String {
        sha256_hex(&[version])
    }

    fn version(place: &ModelSlot) -> u64 {
        match place {
            ModelSlot::BuiltIn => 0,
            ModelSlot::Slot(slot) => slot.version,
        }
    }

    fn files(store: &Store) -> usize {
        fs::read_dir(store.folder.join(SLOTS)).unwrap().count()
    }

    #[test]
    fn a_model_decides_on_trial_and_is_current_once_confirmed() {
        let (_dir, store) = store(&[]);
        assert_eq!(store.state().unwrap(), State::default());
        let on_trial = install(&store, 1);
        assert_eq!((version(&on_trial.deciding()), version(&on_trial.current)), (1, 0));
        assert!(matches!(store.confirm(&name(2)), Err(StoreError::NoTrial)), "another one is on trial");
        let confirmed = store.confirm(&name(1)).unwrap();
        assert_eq!((version(&confirmed.deciding()), confirmed.previous.as_ref().map(version)), (1, Some(0)));
        assert!(confirmed.generation > on_trial.generation);
        assert!(matches!(store.confirm(&name(1)), Err(StoreError::NoTrial)));
        install(&store, 2);
        assert_eq!(version(&store.abandon(&name(2), "slow").unwrap().deciding()), 1);
        assert_eq!(files(&store), 1, "what failed is gone");
        let state = store.state().unwrap();
        assert_eq!(state.trouble.as_deref(), Some("m 2 is rolled back: slow"));
        assert_eq!((state.taken_back, state.newest), (vec![name(2)], 1));
    }

    #[test]
    fn a_rollback_goes_one_model_back_and_is_remembered() {
        let (_dir, store) = store(&[1, 2, 3]);
        assert_eq!(files(&store), 2, "the current model and the one before");
        let back = store.take_back().unwrap();
        assert_eq!((version(&back.current), back.previous.clone()), (2, None));
        assert_eq!(back.taken_back, [name(3)]);
        assert_eq!(files(&store), 1);
        assert!(matches!(store.take_back(), Err(StoreError::NoPrevious)));
        install(&store, 4);
        assert_eq!(version(&store.take_back().unwrap().deciding()), 2, "from a trial to the current model");
        install(&store, 3);
        assert!(!store.confirm(&name(3)).unwrap().taken_back.contains(&name(3)));
    }

    #[test]
    fn a_damaged_model_or_state_is_named_and_what_still_works_is_settled_on() {
        let (_dir, store) = store(&[1, 2]);
        let state = store.state().unwrap();
        let ModelSlot::Slot(current) = &state.current else { panic!("installed") };
        assert_eq!(store.read(current).unwrap(), [2]);
        fs::write(store.slot_file(current), "x").unwrap();
        assert!(store.read(current).unwrap_err().to_string().contains("is damaged: its sha256 is"));
        let settled = store.settle(state.previous.unwrap(), "the disk".into()).unwrap();
        assert_eq!((version(&settled.current), settled.previous, settled.trouble), (1, None, Some("the disk".into())));
        assert_eq!(files(&store), 1);

        fs::write(store.folder.join(STATE), "{").unwrap();
        assert!(matches!(store.state(), Err(StoreError::Damaged { .. })));
        assert!(store.confirm(&name(2)).is_err() && store.tidy().is_err());
        assert_eq!(files(&store), 1, "who knows what it named");
        let settled = store.settle(ModelSlot::BuiltIn, "the state".into()).unwrap();
        assert!(settled.generation != 1, "an order that was signed for an earlier life is not good again");
        assert_eq!((version(&settled.deciding()), files(&store)), (0, 0));
    }

    #[test]
    fn what_an_interrupted_change_left_behind_is_removed() {
        let (_dir, store) = store(&[1]);
        fs::write(store.folder.join(SLOTS).join("orphan.bloom"), "x").unwrap();
        fs::write(store.folder.join(SLOTS).join("half.bloom.part"), "x").unwrap();
        fs::write(store.folder.join("state.json.part"), "{").unwrap();
        fs::create_dir(store.folder.join(SLOTS).join("folder.bloom")).unwrap();
        fs::write(store.folder.join("mine.bloom"), "not ours to remove").unwrap();
        assert!(store.tidy().is_err(), "a folder is no file");
        fs::remove_dir(store.folder.join(SLOTS).join("folder.bloom")).unwrap();
        store.tidy().unwrap();
        assert_eq!(files(&store), 1);
        assert_eq!(fs::read_dir(&store.folder).unwrap().count(), 3);
    }

    #[test]
    fn who_only_looks_changes_nothing() {
        let (_dir, store) = store(&[1, 2]);
        let before = store.state().unwrap();
        let looking = Store::for_looking(&store.folder);
        assert_eq!(version(&looking.take_back().unwrap().current), 1);
        looking.settle(ModelSlot::BuiltIn, "trouble".into()).unwrap();
        looking.tidy().unwrap();
        assert_eq!(store.state().unwrap(), before);
        assert_eq!(files(&store), 2);
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_damage() {
        let (_dir, store) = store(&[1]);
        let state = fs::read_to_string(store.folder.join(STATE)).unwrap();
        fs::write(store.folder.join(STATE), state.replace(&slot(&[1], 1).sha256, "../../etc/passwd")).unwrap();
        assert!(store.state().unwrap_err().to_string().contains("no SHA-256"));
    }

    #[test]
    fn the_state_of_a_newer_program_is_left_alone() {
        let (_dir, store) = store(&[1]);
        let path = store.folder.join(STATE);
        let newer = fs::read_to_string(&path).unwrap().replace("\"schema\": 1", "\"schema\": 2");
        fs::write(&path, &newer).unwrap();
        assert!(matches!(store.state(), Err(StoreError::Schema { schema: 2, .. })));
        assert!(store.confirm(&name(1)).is_err() && store.tidy().is_err());
        assert_eq!((fs::read_to_string(&path).unwrap(), files(&store)), (newer, 1));
    }
}
