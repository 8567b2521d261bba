//! The update agent: receives offered models, admits them, activates them on trial, and answers. It runs in a thread of its own, so
//! that neither frames nor the broker's connection wait for it.

use std::collections::VecDeque;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TrySendError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::UpdateOptions;
use super::admission::{Admitted, Candidate, Checks, Refusal, UpgradeRefused, admit, check_upgrade};
use super::model::{LoadedModel, ModelMetadata};
use super::model_loader::{ActiveModel, ModelLoader, NoStore, persist_or_keep};
use super::store::{Phase, State, StoreError};
use super::trial::{Trial, TrialOutcome};
use crate::bundle::signature::KeyError;
use crate::bundle::{Identity, Keyring};
use crate::mqtt::message::{SCHEMA, json, time};
use crate::mqtt::{Command, ModelAnnouncement, Outbox, Topics};
use crate::system::{LogLimiter, systemd};
use crate::update::protocol::{Action, Answer, CommandError, ModelSource, Offer, RollbackRequest, UpdateStatus};
use crate::update::transfer::{ChunkResult, OfferError, Transfer};
use crate::vision::Classifier;
use crate::vision_stage::{FrameObserver, FrameReport, Swap};

/// Interval at which the stop flag and the trial are checked while no command arrives.
const IDLE: Duration = Duration::from_millis(100);
/// Commands that wait; a chunk that finds no room is requested again.
const COMMANDS_MAX: usize = 32;
/// Frame reports that wait.
const REPORTS_MAX: usize = 64;
/// Answers that are kept, to be repeated when a workstation asks again.
const ANSWERS_MAX: usize = 8;
/// The longest reason in an answer, in characters.
const REASON_CHARS_MAX: usize = 500;
/// Bytes by which a status message may grow: a reason in `fallback_reason`.
const STATUS_MARGIN: usize = 1024;

/// The state of a device's updates.
pub struct UpdateAgent {
    options: UpdateOptions,
    topics: Topics,
    loader: ModelLoader,
    agent_outbox: Outbox,
    swaps: SyncSender<Swap>,
    /// The active model.
    model: ModelMetadata,
    /// The store's state that this agent wrote or read last.
    state: State,
    commands: mpsc::Receiver<Command>,
    announcement: watch::Sender<ModelAnnouncement>,
    transfer: Option<Transfer>,
    trial: Option<ActiveTrial>,
    /// The newest answers.
    answered: VecDeque<Answer>,
    /// Set when the program is about to stop.
    stop: watch::Receiver<bool>,
    /// Limits the log lines about malformed messages.
    malformed: LogLimiter,
}

/// The channels that the agent writes to.
pub struct AgentOutputs {
    /// The retained messages about the active model.
    pub announcement: watch::Sender<ModelAnnouncement>,
    /// Answers and progress, until the broker acknowledges them.
    pub agent_outbox: Outbox,
    /// Models for the vision thread.
    pub swaps: SyncSender<Swap>,
}

/// The ends of the agent's channels that other stages use.
pub struct AgentHandles {
    /// Takes the agent's commands.
    pub commands: SyncSender<Command>,
    /// The retained messages about the active model.
    pub announcement: watch::Receiver<ModelAnnouncement>,
    /// Observes the frames of the first model, if it is on trial.
    pub trial_observer: Option<FrameObserver>,
}

struct ActiveTrial {
    trial: Trial,
    /// The transfer that began it.
    transfer: Option<Uuid>,
    /// Reports of the vision thread, which sends them while this receiver exists.
    reports: mpsc::Receiver<FrameReport>,
}

/// A request that the agent refuses.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("busy: {0} is being received")]
    Receiving(Identity),
    #[error("busy: {0} is on trial")]
    OnTrial(Identity),
    #[error(transparent)]
    NoStore(#[from] NoStore),
    #[error("the store was changed by hand, or could not be written: reload or restart the daemon first")]
    StoreChanged,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("model.trusted_keys: {0}")]
    Keys(#[from] KeyError),
    #[error(
        "no key is trusted on this device: add a public key to model.trusted_keys, or install locally with `bloomcast install --trust`"
    )]
    NoTrustedKeys,
    #[error("{0}; --force installs it anyway")]
    UpgradeRefused(#[from] UpgradeRefused),
    #[error("{0}, and {1}")]
    ForceRefused(UpgradeRefused, CommandError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Offer(#[from] OfferError),
    #[error("the received bundle is not what was offered: its sha256 differs")]
    Altered,
    #[error("the bundle contains {model}, but the offer names {offered}")]
    OtherModel { model: String, offered: String },
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the messages about the model need {bytes} bytes, mqtt.packet_bytes_max is {bytes_max}")]
    StatusTooLarge { bytes: usize, bytes_max: usize },
    #[error("the program is about to stop")]
    Stopping,
}

impl UpdateAgent {
    /// Creates the agent of a device whose active model is `active`; returns the model's classifier for the vision thread.
    pub fn new(
        options: UpdateOptions,
        topics: Topics,
        loader: ModelLoader,
        active: ActiveModel,
        outputs: AgentOutputs,
        stop: watch::Receiver<bool>,
    ) -> (Self, Classifier, AgentHandles) {
        let ActiveModel { loaded: LoadedModel { model, classifier, .. }, state, on_trial, rolled_back } = active;
        let (command_sender, commands) = mpsc::sync_channel(COMMANDS_MAX);
        let AgentOutputs { announcement, agent_outbox, swaps } = outputs;
        let newest = announcement.subscribe();
        let (transfer, trial, answered) = (None, None, VecDeque::new());
        let mut agent = UpdateAgent {
            options,
            topics,
            loader,
            agent_outbox,
            swaps,
            model,
            state,
            commands,
            announcement,
            transfer,
            trial,
            answered,
            stop,
            malformed: LogLimiter::new("malformed messages"),
        };
        for (model, reason) in rolled_back {
            agent.answer(UpdateStatus::RolledBack, Some(reason), model, None);
        }
        let trial_observer = on_trial.then(|| {
            info!("{} is active on trial", agent.model.identity());
            agent.start_trial(None, None)
        });
        (agent, classifier, AgentHandles { commands: command_sender, announcement: newest, trial_observer })
    }

    /// Runs until the program is about to stop.
    pub fn run(mut self) {
        while !*self.stop.borrow() {
            match self.commands.recv_timeout(IDLE) {
                Ok(command) => self.handle(command),
                Err(RecvTimeoutError::Timeout) => {}
                // The MQTT client and all command senders were dropped.
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.check_trial();
            self.malformed.flush();
            let now = Instant::now();
            self.transfer.take_if(|transfer| transfer.is_abandoned(now));
        }
        self.suspend_trial();
    }

    fn check_trial(&mut self) {
        let Some(ActiveTrial { trial, reports, .. }) = &mut self.trial else { return };
        let now = Instant::now();
        let outcome = reports.try_iter().find_map(|report| trial.report(report, now)).or_else(|| trial.check_time(now));
        if let Some(outcome) = outcome {
            self.end_trial(outcome);
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Connected => self.send_progress(true),
            Command::Chunk(number, payload) => self.receive_chunk(number, &payload),
            Command::Offer(payload) => match Offer::read(&payload) {
                Ok(offer) => {
                    let (model, transfer) = (offer.model.clone(), offer.transfer);
                    if let Err(error) = self.consider(offer) {
                        self.answer(UpdateStatus::Refused, Some(error.to_string()), model, Some(transfer));
                    }
                }
                Err(error) => self.malformed.warn(format!("{}: malformed offer: {error}", self.topics.offer())),
            },
            Command::Rollback(payload) => match RollbackRequest::read(&payload) {
                Ok(request) => {
                    if let Err(error) = self.roll_back(&request) {
                        let (model, transfer) = (self.model.identity(), Some(request.transfer));
                        let reason = shortened(error.to_string());
                        warn!("rollback of {model} refused: {reason}");
                        self.send_new_answer(UpdateStatus::Refused, Some(reason), model, transfer);
                    }
                }
                Err(error) => {
                    self.malformed.warn(format!("{}: malformed rollback request: {error}", self.topics.rollback()));
                }
            },
        }
    }

    /// Starts a transfer for an offer, or answers with its progress.
    fn consider(&mut self, offer: Offer) -> Result<(), RequestError> {
        let now = Instant::now();
        self.loader.store()?;
        if self.answer_again(offer.transfer) {
            return Ok(());
        }
        if let Some(current) = &mut self.transfer {
            if current.offer == offer {
                current.touch(now);
                self.send_progress(true);
                return Ok(());
            }
            // The same sender may continue with smaller chunks.
            if current.offer.transfer != offer.transfer && !current.is_abandoned(now) {
                return Err(RequestError::Receiving(current.offer.model.clone()));
            }
        }
        if offer.model.sha256 == self.model.sha256 {
            let status = if self.trial.is_some() { UpdateStatus::Accepted } else { UpdateStatus::Confirmed };
            let reason = Some("the model is already active".into());
            self.answer(status, reason, self.model.identity(), Some(offer.transfer));
            return Ok(());
        }
        if self.trial.is_some() {
            return Err(RequestError::OnTrial(self.model.identity()));
        }
        self.expect_unchanged_store()?;
        self.expect_upgrade(&offer, &offer.model)?;
        let transfer = Transfer::new(offer, self.options.offer_bytes_max, now)?;
        info!("receiving {}: {} bytes", transfer.offer.model, transfer.offer.bytes);
        self.transfer = Some(transfer);
        self.send_progress(true);
        Ok(())
    }

    /// Repeats the answer to a transfer that was answered before; returns whether there is one.
    fn answer_again(&self, transfer: Uuid) -> bool {
        let answer = self.answered.iter().rev().find(|answer| answer.transfer == Some(transfer));
        answer.map(|answer| self.send_answer(answer)).is_some()
    }

    /// Refuses to work on a store whose state is not the one that this agent wrote last.
    fn expect_unchanged_store(&self) -> Result<(), RequestError> {
        let compared = |state: &State| State { fallback_reason: None, ..state.clone() };
        match compared(&self.loader.store()?.state()?) == compared(&self.state) {
            true => Ok(()),
            false => Err(RequestError::StoreChanged),
        }
    }

    fn trusted_keys(&self) -> Result<Keyring, RequestError> {
        let keys = Keyring::read(&self.options.trusted_keys)?;
        if keys.is_empty() { Err(RequestError::NoTrustedKeys) } else { Ok(keys) }
    }

    /// Refuses a model that is not newer, or was rolled back, unless the offer has a signed command to force it. `model` is
    /// the offer's claim before the transfer, the manifest's afterwards.
    fn expect_upgrade(&self, offer: &Offer, model: &Identity) -> Result<(), RequestError> {
        let trusted = self.trusted_keys()?;
        let Err(downgrade) = check_upgrade(model, &self.model.identity(), &self.state) else { return Ok(()) };
        let Some(command) = &offer.force else { return Err(downgrade.into()) };
        let checked = command.check(&trusted, Action::Force, self.topics.root(), self.state.generation, &model.sha256);
        checked.map_err(|error| RequestError::ForceRefused(downgrade, error))
    }

    fn receive_chunk(&mut self, number: u32, payload: &[u8]) {
        let Some(transfer) = &mut self.transfer else { return };
        let bundle = match transfer.take(number, payload, Instant::now()) {
            ChunkResult::Accepted => return,
            ChunkResult::Progress => return self.send_progress(false),
            ChunkResult::Gap => return self.send_progress(true),
            ChunkResult::Complete(bytes) => Ok(bytes),
            ChunkResult::Altered => Err(RequestError::Altered),
        };
        // Sent before the validation, which may take minutes.
        self.send_progress(false);
        let Some(Transfer { offer, .. }) = self.transfer.take() else { return };
        if let Err(error) = bundle.and_then(|bytes| self.activate_received(&offer, &bytes)) {
            self.answer(UpdateStatus::Refused, Some(error.to_string()), offer.model, Some(offer.transfer));
        }
    }

    /// Admits a received model and activates it on trial.
    fn activate_received(&mut self, offer: &Offer, bytes: &[u8]) -> Result<(), RequestError> {
        let candidate = Candidate { file: "offered", bytes, source: ModelSource::Store };
        let checks = Checks::Full { options: &self.options, active: &self.model, signature_required: true };
        let Admitted { loaded, cpu_time_max } = admit(&candidate, self.loader.backbone(), &checks, |model| {
            if *model != offer.model {
                return Err(RequestError::OtherModel { model: model.to_string(), offered: offer.model.to_string() });
            }
            self.expect_upgrade(offer, model)?;
            info!("{model} is received and its signature verified; validating it");
            Ok(())
        })?;
        let model = loaded.model.identity();
        self.expect_status_fits(&loaded.model)?;
        info!("{model} is valid");
        if *self.stop.borrow() {
            return Err(RequestError::Stopping);
        }
        self.expect_unchanged_store()?;
        self.state = self.loader.store()?.start_trial(model.clone(), bytes, Phase::Running)?;
        let trial_observer = self.start_trial(Some(offer.transfer), cpu_time_max);
        self.swap(loaded, Some(trial_observer));
        self.answer(UpdateStatus::Accepted, None, model, Some(offer.transfer));
        Ok(())
    }

    /// Refuses a model whose retained messages would be too large to publish: those of another model would stay.
    fn expect_status_fits(&self, model: &ModelMetadata) -> Result<(), RequestError> {
        let bytes_max = self.options.packet_bytes_max;
        let messages = announce(&self.loader, model, &self.state).messages(&self.topics, self.options.discovery);
        let bytes = messages.iter().map(|(topic, payload)| topic.len() + payload.len() + STATUS_MARGIN).max();
        match bytes {
            Some(bytes) if bytes > bytes_max => Err(RequestError::StatusTooLarge { bytes, bytes_max }),
            _ => Ok(()),
        }
    }

    /// Starts a trial; returns the observer of its frames.
    fn start_trial(&mut self, transfer: Option<Uuid>, cpu_time_max: Option<Duration>) -> FrameObserver {
        let (sender, reports) = mpsc::sync_channel(REPORTS_MAX);
        let trial = Trial::start(self.options.trial, cpu_time_max, Instant::now());
        self.trial = Some(ActiveTrial { trial, transfer, reports });
        // A report that finds no room is dropped: the next frame has another.
        Box::new(move |report| !matches!(sender.try_send(report), Err(TrySendError::Disconnected(_))))
    }

    fn end_trial(&mut self, outcome: TrialOutcome) {
        // The receiver lives to the end of this function: until then the vision thread keeps the observer.
        let Some(ActiveTrial { transfer, reports: _reports, .. }) = self.trial.take() else { return };
        let model = self.model.identity();
        let confirmed = match outcome {
            TrialOutcome::Confirmed => self.confirm(&model).map_err(TrialFailure::from),
            TrialOutcome::Failed(reason) => Err(TrialFailure::Frames(reason)),
        };
        match confirmed {
            Ok(state) => {
                self.state = state;
                self.announcement.send_replace(announce(&self.loader, &self.model, &self.state));
                self.answer(UpdateStatus::Confirmed, None, model, transfer);
            }
            Err(failure) => {
                let reason = failure.to_string();
                warn!("{model} failed its trial: {reason}");
                let before = self.state.clone();
                if let Ok(store) = self.loader.store() {
                    let written = store.fail_trial(&model.sha256, &reason);
                    self.activate_current(persist_or_keep(written, before, |state| state.trial = None));
                }
                self.answer(UpdateStatus::RolledBack, Some(reason), model, transfer);
            }
        }
    }

    fn confirm(&self, model: &Identity) -> Result<State, RequestError> {
        Ok(self.loader.store()?.confirm(&model.sha256)?)
    }

    /// Records that the program stops in order: the trial continues at the next start.
    fn suspend_trial(&self) {
        if self.trial.is_some()
            && let Ok(store) = self.loader.store()
            && let Err(error) = store.set_phase(&self.model.sha256, Phase::Waiting)
        {
            warn!("{} will be rolled back at the next start: {error}", self.model.identity());
        }
    }

    /// Handles a signed request to roll back.
    fn roll_back(&mut self, request: &RollbackRequest) -> Result<(), RequestError> {
        if self.answer_again(request.transfer) {
            return Ok(());
        }
        self.expect_unchanged_store()?;
        let (store, trusted) = (self.loader.store()?, self.trusted_keys()?);
        let model = self.model.identity();
        let (device, generation) = (self.topics.root(), self.state.generation);
        request.command.check(&trusted, Action::Rollback, device, generation, &model.sha256)?;
        let state = store.roll_back()?;
        let _trial = self.trial.take();
        self.activate_current(state);
        let reason = Some("a rollback was requested".into());
        self.answer(UpdateStatus::RolledBack, reason, model, Some(request.transfer));
        Ok(())
    }

    /// Activates the current model of `state`, or the one that it falls back to.
    fn activate_current(&mut self, state: State) {
        let Ok(store) = self.loader.store() else { return };
        match self.loader.load_current(store, state, Some(&self.model)) {
            Ok(ActiveModel { loaded, state, .. }) => {
                self.state = state;
                self.swap(loaded, None);
            }
            // The built-in model cannot be loaded either, for example because memory is exhausted.
            Err(error) => error!("{} stays active until the next start: {error}", self.model.identity()),
        }
    }

    /// Hands a model to the vision thread; returns once it is active or the program is about to stop.
    fn swap(&mut self, LoadedModel { model, classifier, .. }: LoadedModel, trial_observer: Option<FrameObserver>) {
        let rules = self.options.policy.rules_for_known(classifier.labels());
        let (sender, replaced) = mpsc::sync_channel(1);
        let (version, thresholds, common) = (model.manifest.version, rules.thresholds, rules.common);
        let swap = Swap { classifier, version, thresholds, common, trial_observer, replaced: sender };
        // Before the swap: it is published before the first observation of the model.
        self.announcement.send_replace(announce(&self.loader, &model, &self.state));
        if self.swaps.send(swap).is_ok() && replaced.recv().is_ok() {
            info!("{} is active in place of {}", model.identity(), self.model.identity());
            systemd::notify_status(&format!("{} is active", model.identity()));
        }
        self.model = model;
    }

    fn send_progress(&self, resend: bool) {
        if let Some(transfer) = &self.transfer {
            self.agent_outbox.push(self.topics.progress(), json(&transfer.progress(resend)));
        }
    }

    /// Logs and sends an answer about a model.
    fn answer(&mut self, status: UpdateStatus, reason: Option<String>, model: Identity, transfer: Option<Uuid>) {
        let reason = reason.map(shortened);
        let because = reason.as_deref().map_or(String::new(), |reason| format!(": {reason}"));
        match status {
            UpdateStatus::Accepted | UpdateStatus::Confirmed => info!("{model} is {status}{because}"),
            UpdateStatus::Refused | UpdateStatus::RolledBack => warn!("{model} is {status}{because}"),
        }
        self.send_new_answer(status, reason, model, transfer);
    }

    fn send_new_answer(
        &mut self,
        status: UpdateStatus,
        reason: Option<String>,
        model: Identity,
        transfer: Option<Uuid>,
    ) {
        let answer = Answer {
            schema: SCHEMA,
            device: self.topics.device().to_string(),
            transfer,
            status,
            reason,
            model,
            trial: (status == UpdateStatus::Accepted).then_some(self.options.trial),
            at: time(SystemTime::now()),
        };
        self.send_answer(&answer);
        self.answered.push_back(answer);
        if self.answered.len() > ANSWERS_MAX {
            self.answered.pop_front();
        }
    }

    fn send_answer(&self, answer: &Answer) {
        // A full outbox drops the oldest answers; a workstation that waits for one asks again.
        self.agent_outbox.push(self.topics.answer(), json(answer));
    }
}

/// Returns the retained messages about a model.
pub fn announce(loader: &ModelLoader, model: &ModelMetadata, state: &State) -> ModelAnnouncement {
    ModelAnnouncement {
        version: model.manifest.version,
        classes: model.manifest.classes.clone(),
        status: json(&loader.status(model, state)),
    }
}

/// Reason why a model did not pass its trial.
#[derive(Debug, thiserror::Error)]
enum TrialFailure {
    /// A frame failed or was slow.
    #[error("{0}")]
    Frames(String),
    /// The confirmation cannot be recorded.
    #[error(transparent)]
    Confirm(#[from] RequestError),
}

/// Cuts a reason, which may contain text from the network, to [`REASON_CHARS_MAX`] characters.
fn shortened(reason: String) -> String {
    match reason.char_indices().nth(REASON_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &reason[..end]),
        None => reason,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Receiver as Channel;
    use std::thread;

    use super::super::model_loader::ModelFiles;
    use super::super::store::{ModelSlot, Store};
    use super::*;
    use crate::bundle::{Bundle, PrivateKey, sign};
    use crate::decide::{Policy, Thresholds};
    use crate::mqtt::DeviceName;
    use crate::mqtt::outbox::OutboxLimits;
    use crate::update::protocol::{TrialLimits, identity};
    use crate::update::transfer::chunk;

    /// An update agent; the test plays the vision thread and the broker.
    struct Device {
        commands: SyncSender<Command>,
        swapped: Channel<Swap>,
        agent_outbox: Outbox,
        stop: watch::Sender<bool>,
        thread: thread::JoinHandle<()>,
        /// The active model.
        active: Option<Classifier>,
        store: Store,
        key: PrivateKey,
        _dir: tempfile::TempDir,
    }

    impl Device {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let key = dir.path().join("trainer.key");
            PrivateKey::generate(&key).unwrap();
            let folder = dir.path().join("store");
            let options = UpdateOptions {
                trusted_keys: dir.path().into(),
                offer_bytes_max: 16 << 20,
                slowdown_max: 1000.0,
                trial: TrialLimits { frames: 3, seconds: 3600 },
                policy: Policy {
                    smoothing: Duration::ZERO,
                    enter_dwell: Duration::ZERO,
                    leave_dwell: Duration::ZERO,
                    state_interval: Duration::ZERO,
                    thresholds: Thresholds { enter: 0.7, leave: 0.5 },
                    class_thresholds: Default::default(),
                },
                discovery: true,
                packet_bytes_max: 256 << 10,
            };
            let topics = Topics::new("bloomcast", "homeassistant", DeviceName::new("pi").unwrap());
            let files = ModelFiles { store: Some(folder.clone()), ..ModelFiles::default() };
            let loader = ModelLoader::new(&files, None, Store::new);
            let agent_outbox = Outbox::new(OutboxLimits { entries_max: 100, bytes_max: 1 << 20 });
            let (swaps, swapped) = mpsc::sync_channel(1);
            let active = loader.load_at_start().unwrap();
            let (stop, stopped) = watch::channel(false);
            let announcement = watch::Sender::new(announce(&loader, &active.loaded.model, &active.state));
            let outputs = AgentOutputs { announcement, agent_outbox: agent_outbox.clone(), swaps };
            let (agent, classifier, AgentHandles { commands, .. }) =
                UpdateAgent::new(options, topics, loader, active, outputs, stopped);
            Device {
                commands,
                swapped,
                agent_outbox,
                stop,
                thread: thread::spawn(move || agent.run()),
                active: Some(classifier),
                store: Store::new(&folder),
                key: PrivateKey::read(&key).unwrap(),
                _dir: dir,
            }
        }

        /// Offers the built-in model, a version newer, and sends it.
        fn push(&self) {
            let built_in = Bundle::built_in().unwrap();
            let mut manifest = built_in.manifest().clone();
            manifest.version += 1;
            let bytes = Bundle::new(manifest.clone(), built_in.contents().clone()).to_bytes();
            let bytes = sign("m", &bytes, &self.key).unwrap();
            let model = identity(&manifest, Bundle::from_bytes("m", &bytes).unwrap().sha256());
            let (transfer, chunk_bytes) = (Uuid::from_u128(7), 1 << 17);
            let offer = Offer { schema: SCHEMA, transfer, model, bytes: bytes.len() as u64, chunk_bytes, force: None };
            self.commands.send(Command::Offer(json(&offer))).unwrap();
            for number in 0..offer.chunks() {
                let chunk = chunk(transfer, &bytes, chunk_bytes, number).unwrap();
                self.commands.send(Command::Chunk(number, chunk)).unwrap();
            }
        }

        /// Swaps as the vision thread does; returns the version of the active model and the observer of its frames.
        fn swap(&mut self) -> (u64, Option<FrameObserver>) {
            let swap = self.swapped.recv_timeout(Duration::from_secs(60)).unwrap();
            let replaced = self.active.replace(swap.classifier).unwrap();
            swap.replaced.send(replaced).unwrap();
            (swap.version, swap.trial_observer)
        }

        /// Waits for the next answer; progress messages are skipped.
        fn answer(&self) -> Answer {
            let deadline = Instant::now() + Duration::from_secs(60);
            while Instant::now() < deadline {
                match self.agent_outbox.take_next() {
                    Some(entry) if entry.topic.ends_with("/answer") => {
                        return serde_json::from_slice(&entry.payload).unwrap();
                    }
                    Some(_) => {}
                    None => thread::sleep(Duration::from_millis(5)),
                }
            }
            panic!("no answer");
        }

        fn end(self) -> State {
            self.stop.send_replace(true);
            self.thread.join().unwrap();
            self.store.state().unwrap()
        }
    }

    /// Returns the answer to a model on trial with these frames, and the state of the store.
    fn try_model(reports: &[FrameReport]) -> (Answer, State) {
        let version = Bundle::built_in().unwrap().manifest().version;
        let mut device = Device::new();
        device.push();
        let (active, trial_observer) = device.swap();
        let mut observe = trial_observer.expect("it is on trial");
        assert_eq!((active, device.answer().status), (version + 1, UpdateStatus::Accepted));
        for report in reports {
            assert!(observe(report.clone()));
        }
        let answer = match reports.iter().any(|report| matches!(report, FrameReport::Failed(_))) || slow(reports) {
            true => {
                assert_eq!(device.swap().0, version, "the previous model is active again");
                device.answer()
            }
            false => device.answer(),
        };
        let state = device.end();
        assert!(!observe(FrameReport::Failed("late".into())), "the trial is over");
        (answer, state)
    }

    fn slow(reports: &[FrameReport]) -> bool {
        reports.contains(&classified(3_600_000))
    }

    fn classified(ms: u64) -> FrameReport {
        FrameReport::Classified(Duration::from_millis(ms))
    }

    #[test]
    fn confirms_a_model_after_enough_frames() {
        let (answer, state) = try_model(&[classified(1), classified(2), classified(3)]);
        assert_eq!((answer.status, answer.transfer), (UpdateStatus::Confirmed, Some(Uuid::from_u128(7))));
        assert_eq!((state.active(), state.highest_confirmed_version), (state.current.clone(), answer.model.version));
        assert_ne!(state.current, ModelSlot::BuiltIn);
    }

    #[test]
    fn rolls_back_a_model_that_fails_or_is_slow_on_trial() {
        let cases = [
            (vec![classified(1), FrameReport::Failed("the model panicked".into())], "the model panicked"),
            (vec![classified(3_600_000); 3], "the backbone takes at least 3600000 ms per frame, the limit is "),
        ];
        for (reports, expected) in cases {
            let (answer, state) = try_model(&reports);
            assert_eq!(answer.status, UpdateStatus::RolledBack);
            assert!(answer.reason.unwrap().starts_with(expected));
            assert_eq!((&state.current, &state.trial), (&ModelSlot::BuiltIn, &None));
            assert_eq!(state.rolled_back, [answer.model.sha256]);
            assert!(state.fallback_reason.unwrap().contains(&format!("is rolled back: {expected}")));
        }
    }

    #[test]
    fn a_stop_during_a_trial_suspends_it() {
        let mut device = Device::new();
        device.push();
        device.swap();
        assert_eq!(device.answer().status, UpdateStatus::Accepted);
        assert_eq!(device.end().trial.unwrap().phase, Phase::Waiting);
    }
}
