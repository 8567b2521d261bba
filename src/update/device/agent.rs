//! The device's side: takes what is offered, lets it prove itself, swaps it in, watches its trial, answers. A thread of
//! its own, so that neither the frames nor the broker wait for it.

use std::collections::VecDeque;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TrySendError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::admission::{self, Proven, Trust};
use crate::bundle::{Identity, Keyring};
use crate::config::Config;
use crate::decide::Rules;
use crate::mqtt::message::{SCHEMA, json, time};
use crate::mqtt::topics::Topics;
use crate::mqtt::{About, Mail, Outbox, discovery};
use crate::system::systemd;
use crate::update::device::model_loader::{ActiveModel, Loaded, Model, ModelLoader, persist_or_keep};
use crate::update::device::store::{Phase, State, Store};
use crate::update::device::trial::{Outcome, Trial};
use crate::update::protocol::{Action, Answer, Offer, Rollback, TrialLimits, UpdateStatus, identity, objection};
use crate::update::transfer::{ChunkResult, Transfer};
use crate::vision::Classifier;
use crate::vision_stage::{Report, Swap, Witness};

/// How often a stop and the end of a trial are looked for while nothing comes.
const IDLE: Duration = Duration::from_millis(100);
/// Messages that wait; a piece that finds no room is asked for again.
const INBOX_MAX: usize = 32;
/// Reports that wait.
const REPORTS_MAX: usize = 64;
/// Answers that are remembered.
const TOLD_MAX: usize = 8;
const REASON_CHARS_MAX: usize = 500;
/// What a note may grow by: a reason why something is not as it should be.
const NOTE_ROOM: usize = 1024;

/// What the device's side works with.
pub struct Setup {
    pub config: Config,
    pub topics: Topics,
    pub shelf: ModelLoader,
    pub answers: Outbox,
    pub swaps: SyncSender<Swap>,
}

/// The other ends.
pub struct Ends {
    pub inbox: SyncSender<Mail>,
    pub about: watch::Sender<About>,
    /// Of the model at the start, where it is on trial.
    pub witness: Option<Witness>,
}

pub struct Receiver {
    setup: Setup,
    /// What decides, and what the store says of it.
    model: Model,
    state: State,
    inbox: mpsc::Receiver<Mail>,
    about: watch::Sender<About>,
    transfer: Option<Transfer>,
    trial: Option<OnTrial>,
    /// What was answered lately, for whoever asks again.
    told: VecDeque<Answer>,
    /// The program is about to end.
    stop: watch::Receiver<bool>,
}

struct OnTrial {
    trial: Trial,
    /// Who asked for it.
    transfer: Option<Uuid>,
    /// How it fares; as long as this end is there, the vision thread tells.
    reports: mpsc::Receiver<Report>,
}

/// A request that is turned down, and why.
type Refused = String;

impl Receiver {
    /// Begins with what decides at the start; its classifier is the vision thread's.
    pub fn new(setup: Setup, deciding: ActiveModel, stop: watch::Receiver<bool>) -> (Self, Classifier, Ends) {
        let ActiveModel { loaded: Loaded { model, classifier, .. }, state, trial, news } = deciding;
        let (sender, inbox) = mpsc::sync_channel(INBOX_MAX);
        let (about, _) = watch::channel(About::new());
        let mut this = Receiver {
            setup,
            model,
            state,
            inbox,
            about: about.clone(),
            transfer: None,
            trial: None,
            told: VecDeque::new(),
            stop,
        };
        for (model, reason) in news {
            this.answer(UpdateStatus::RolledBack, Some(reason), model, None);
        }
        let witness = trial.then(|| {
            info!("{} decides, on trial", this.model.identity());
            this.begin_trial(None, None)
        });
        about.send_replace(this.describe(&this.model));
        (this, classifier, Ends { inbox: sender, about, witness })
    }

    /// Works until the program is about to end.
    pub fn run(mut self) {
        while !*self.stop.borrow() {
            match self.inbox.recv_timeout(IDLE) {
                Ok(mail) => self.read(mail),
                Err(RecvTimeoutError::Timeout) => {}
                // The link is gone, and with it whoever could ask for anything.
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.watch_trial();
            let now = Instant::now();
            self.transfer.take_if(|transfer| transfer.is_abandoned(now));
        }
        self.pause_trial();
    }

    fn watch_trial(&mut self) {
        let Some(OnTrial { trial, reports, .. }) = &mut self.trial else { return };
        let now = Instant::now();
        let outcome = reports.try_iter().find_map(|report| trial.hear(report, now)).or_else(|| trial.at(now));
        self.end_trial(outcome);
    }

    fn read(&mut self, mail: Mail) {
        match mail {
            Mail::Connected => self.tell_progress(true),
            Mail::Chunk(number, payload) => self.take(number, &payload),
            Mail::Offer(payload) => match Offer::read(&payload) {
                Ok(offer) => {
                    let (model, transfer) = (offer.model.clone(), offer.transfer);
                    if let Err(reason) = self.consider(offer) {
                        self.answer(UpdateStatus::Refused, Some(reason), model, Some(transfer));
                    }
                }
                Err(error) => warn!("{}: no offer: {error}", self.setup.topics.offer()),
            },
            Mail::Rollback(payload) => match Rollback::read(&payload) {
                Ok(order) => {
                    if let Err(reason) = self.take_back(&order) {
                        self.answer(UpdateStatus::Refused, Some(reason), self.model.identity(), Some(order.transfer));
                    }
                }
                Err(error) => warn!("{}: no order: {error}", self.setup.topics.rollback()),
            },
        }
    }

    /// An offer: begins a transfer, or says how it stands.
    fn consider(&mut self, offer: Offer) -> Result<(), Refused> {
        let now = Instant::now();
        self.store()?;
        if self.said_again(offer.transfer) {
            return Ok(());
        }
        if let Some(open) = &mut self.transfer {
            if open.offer == offer {
                open.heard(now);
                self.tell_progress(true);
                return Ok(());
            }
            // The same sender may go on in smaller pieces.
            if open.offer.transfer != offer.transfer && !open.is_abandoned(now) {
                return Err(format!("busy: {} is being received", open.offer.model));
            }
        }
        if offer.model.sha256 == self.model.sha256 {
            let verdict = if self.trial.is_some() { UpdateStatus::Accepted } else { UpdateStatus::Confirmed };
            let reason = Some("it decides already".into());
            self.answer(verdict, reason, self.model.identity(), Some(offer.transfer));
            return Ok(());
        }
        if self.trial.is_some() {
            return Err(format!("busy: {} is on trial", self.model.identity()));
        }
        self.expect_untouched()?;
        self.expect_wanted(&offer, &offer.model)?;
        let transfer = Transfer::new(offer, self.setup.config.model.offer_bytes_max, now)?;
        info!("receiving {}: {} bytes", transfer.offer.model, transfer.offer.bytes);
        self.transfer = Some(transfer);
        self.tell_progress(true);
        Ok(())
    }

    /// Says again what was said to whoever asks again.
    fn said_again(&self, transfer: Uuid) -> bool {
        let told = self.told.iter().rev().find(|told| told.transfer == Some(transfer));
        told.map(|told| self.say(told)).is_some()
    }

    /// Refuses to work on a store that does not say what this program does.
    fn expect_untouched(&self) -> Result<(), Refused> {
        let known = |state: &State| State { trouble: None, ..state.clone() };
        match known(&self.store()?.state().map_err(|e| e.to_string())?) == known(&self.state) {
            true => Ok(()),
            false => {
                Err("the store was changed by hand, or could not be written: reload or restart the daemon first".into())
            }
        }
    }

    fn store(&self) -> Result<&Store, Refused> {
        self.setup.shelf.store.as_ref().ok_or_else(|| match self.setup.shelf.bundle {
            Some(_) => "model.bundle names the model of this device, and no other is taken".to_owned(),
            None => "model.store is empty: this device keeps no models".to_owned(),
        })
    }

    fn trusted(&self) -> Result<Keyring, Refused> {
        let keys =
            Keyring::read(&self.setup.config.model.trusted_keys).map_err(|e| format!("model.trusted_keys: {e}"))?;
        match keys.is_empty() {
            true => {
                Err("no key is trusted here: put one into model.trusted_keys, or `bloomcast install --trust`".into())
            }
            false => Ok(keys),
        }
    }

    /// Refuses a model that is not newer, or was taken back, unless a signed order is there. `model`: as the offer claims it
    /// first, as its manifest says it later.
    fn expect_wanted(&self, offer: &Offer, model: &Identity) -> Result<(), Refused> {
        let trusted = self.trusted()?;
        let Some(reason) = objection(model, &self.model.identity(), &self.state) else { return Ok(()) };
        match &offer.force {
            None => Err(format!("{reason}; --force takes it nevertheless")),
            Some(order) => order
                .check(&trusted, Action::Force, self.setup.topics.root(), self.state.generation, &model.sha256)
                .map_err(|e| format!("{reason}, and {e}")),
        }
    }

    fn take(&mut self, number: u32, payload: &[u8]) {
        let Some(transfer) = &mut self.transfer else { return };
        let whole = match transfer.take(number, payload, Instant::now()) {
            ChunkResult::Quiet => return,
            ChunkResult::Progress => return self.tell_progress(false),
            ChunkResult::Gap => return self.tell_progress(true),
            ChunkResult::Whole(bytes) => Ok(bytes),
            ChunkResult::Altered => Err("what came is not what was offered: its sha256 is another".to_owned()),
        };
        // All is there; what follows takes its time.
        self.tell_progress(false);
        let Some(Transfer { offer, .. }) = self.transfer.take() else { return };
        if let Err(reason) = whole.and_then(|bytes| self.install(&offer, &bytes)) {
            self.answer(UpdateStatus::Refused, Some(reason), offer.model, Some(offer.transfer));
        }
    }

    /// Lets a model that has come prove itself, and puts it on trial.
    fn install(&mut self, offer: &Offer, bytes: &[u8]) -> Result<(), Refused> {
        let (config, shelf) = (&self.setup.config, &self.setup.shelf);
        let bundle = admission::vouched("offered", bytes, &Trust::Keys, config).map_err(|e| e.to_string())?;
        let model = identity(bundle.manifest(), bundle.sha256());
        if model != offer.model {
            return Err(format!("it is {model}, and was offered as {}", offer.model));
        }
        self.expect_wanted(offer, &model)?;
        info!("{model} has come whole and is signed; it has to prove itself");
        let Proven { loaded, rules, limit } =
            admission::prove(bundle, config, shelf, &self.model).map_err(|e| e.to_string())?;
        self.expect_said(&loaded.model)?;
        info!("{model} has proved itself");
        if *self.stop.borrow() {
            return Err("the program is about to end".into());
        }
        self.expect_untouched()?;
        self.state = self.store()?.try_out(model.clone(), bytes, Phase::Running).map_err(|e| e.to_string())?;
        let witness = self.begin_trial(Some(offer.transfer), Some(limit));
        self.swap(loaded, rules, Some(witness));
        self.answer(UpdateStatus::Accepted, None, model, Some(offer.transfer));
        Ok(())
    }

    /// Refuses a model that could not be told of: what is retained would be about another.
    fn expect_said(&self, model: &Model) -> Result<(), Refused> {
        let max = self.setup.config.mqtt.packet_bytes_max;
        let bytes = |(topic, payload): &(String, Vec<u8>)| topic.len() + payload.len() + NOTE_ROOM;
        match self.describe(model).iter().map(bytes).max() {
            Some(bytes) if bytes > max => {
                Err(format!("what there is to say of it takes {bytes} bytes, mqtt.packet_bytes_max is {max}"))
            }
            _ => Ok(()),
        }
    }

    /// Gives who looks on.
    fn begin_trial(&mut self, transfer: Option<Uuid>, limit: Option<Duration>) -> Witness {
        let (sender, reports) = mpsc::sync_channel(REPORTS_MAX);
        let trial = Trial::begin(TrialLimits::of(&self.setup.config), limit, Instant::now());
        self.trial = Some(OnTrial { trial, transfer, reports });
        // Where there is no room, the next frame tells.
        Box::new(move |report| !matches!(sender.try_send(report), Err(TrySendError::Disconnected(_))))
    }

    fn end_trial(&mut self, outcome: Option<Outcome>) {
        let Some(outcome) = outcome else { return };
        // Until the end of this, the model is watched.
        let Some(OnTrial { transfer, reports: _watched, .. }) = self.trial.take() else { return };
        let model = self.model.identity();
        let confirmed = match outcome {
            Outcome::Confirmed => {
                self.store().and_then(|store| store.confirm(&model.sha256).map_err(|e| e.to_string()))
            }
            Outcome::Failed(reason) => Err(reason),
        };
        match confirmed {
            Ok(state) => {
                self.state = state;
                self.about.send_replace(self.describe(&self.model));
                self.answer(UpdateStatus::Confirmed, None, model, transfer);
            }
            Err(reason) => {
                warn!("{model} has failed: {reason}");
                let before = self.state.clone();
                let abandoned = self.store().map(|store| store.abandon(&model.sha256, &reason));
                if let Ok(abandoned) = abandoned {
                    self.go_back(persist_or_keep(abandoned, before, |state| state.trial = None));
                }
                self.answer(UpdateStatus::RolledBack, Some(reason), model, transfer);
            }
        }
    }

    /// The program ends in order: the trial goes on with the next start.
    fn pause_trial(&self) {
        if self.trial.is_some()
            && let Ok(store) = self.store()
            && let Err(error) = store.set_phase(&self.model.sha256, Phase::Waiting)
        {
            warn!("{} will be rolled back at the next start: {error}", self.model.identity());
        }
    }

    /// An order to take the model back.
    fn take_back(&mut self, rollback: &Rollback) -> Result<(), Refused> {
        if self.said_again(rollback.transfer) {
            return Ok(());
        }
        self.expect_untouched()?;
        let (store, trusted) = (self.store()?, self.trusted()?);
        let model = self.model.identity();
        let (device, generation) = (self.setup.topics.root(), self.state.generation);
        rollback.order.check(&trusted, Action::Rollback, device, generation, &model.sha256)?;
        let state = store.take_back().map_err(|e| e.to_string())?;
        let _watched = self.trial.take();
        self.go_back(state);
        self.answer(UpdateStatus::RolledBack, Some("it was asked for".into()), model, Some(rollback.transfer));
        Ok(())
    }

    /// Lets decide what decides by `state`, or what is left where that is damaged.
    fn go_back(&mut self, state: State) {
        let Ok(store) = self.store() else { return };
        match self.setup.shelf.settle(store, state, Some(&self.model)) {
            Ok(ActiveModel { loaded, state, .. }) => {
                self.state = state;
                let rules = self.setup.config.rules_of_known(loaded.classifier.labels());
                self.swap(loaded, rules, None);
            }
            // Not even the model inside the program can be loaded: there is no memory left, or the like.
            Err(error) => error!("{} decides on until the next start: {error}", self.model.identity()),
        }
    }

    /// Returns once the model decides, or the program is about to end.
    fn swap(&mut self, Loaded { model, classifier, .. }: Loaded, rules: Rules, witness: Option<Witness>) {
        let (sender, replaced) = mpsc::sync_channel(1);
        let swap = Swap {
            classifier,
            version: model.manifest.version,
            thresholds: rules.thresholds,
            about: self.describe(&model),
            witness,
            replaced: sender,
        };
        if self.setup.swaps.send(swap).is_ok() && replaced.recv().is_ok() {
            info!("{} decides in the place of {}", model.identity(), self.model.identity());
            systemd::notify_status(&format!("{} decides", model.identity()));
        }
        self.model = model;
    }

    /// The retained messages about a model.
    fn describe(&self, model: &Model) -> About {
        let Setup { config, topics, shelf, .. } = &self.setup;
        let mut about = About::new();
        if config.mqtt.discovery.enabled {
            about.push((topics.discovery(), discovery::device(topics, &model.manifest.classes)));
        }
        about.push((topics.model(), json(&shelf.note(model, &self.state))));
        about
    }

    fn tell_progress(&self, again: bool) {
        if let Some(transfer) = &self.transfer {
            self.setup.answers.push(self.setup.topics.progress(), json(&transfer.progress(again)));
        }
    }

    fn answer(&mut self, answer: UpdateStatus, reason: Option<String>, model: Identity, transfer: Option<Uuid>) {
        let reason = reason.map(shortened);
        let because = reason.as_deref().map_or(String::new(), |reason| format!(": {reason}"));
        match answer {
            UpdateStatus::Accepted | UpdateStatus::Confirmed => info!("{model} is {answer}{because}"),
            UpdateStatus::Refused | UpdateStatus::RolledBack => warn!("{model} is {answer}{because}"),
        }
        let answer = Answer {
            schema: SCHEMA,
            device: self.setup.topics.device().to_string(),
            transfer,
            answer,
            reason,
            model,
            trial: (answer == UpdateStatus::Accepted).then(|| TrialLimits::of(&self.setup.config)),
            at: time(SystemTime::now()),
        };
        self.say(&answer);
        self.told.push_back(answer);
        if self.told.len() > TOLD_MAX {
            self.told.pop_front();
        }
    }

    fn say(&self, answer: &Answer) {
        // The oldest make place: whoever they were for has long asked again.
        self.setup.answers.push(self.setup.topics.answer(), json(answer));
    }
}

/// A reason is for people; what came over the network must not make it longer than they read.
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

    use super::*;
    use crate::bundle::{Bundle, PrivateKey, sign};
    use crate::mqtt::outbox::Limits;
    use crate::mqtt::topics::DeviceName;
    use crate::update::device::store::ModelSlot;
    use crate::update::transfer::piece;

    /// A device's side, whose vision thread and broker the test is.
    struct Device {
        inbox: SyncSender<Mail>,
        swapped: Channel<Swap>,
        answers: Outbox,
        stop: watch::Sender<bool>,
        thread: thread::JoinHandle<()>,
        /// What decides until another is swapped in.
        decides: Option<Classifier>,
        store: Store,
        key: PrivateKey,
        _dir: tempfile::TempDir,
    }

    impl Device {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let key = dir.path().join("trainer.key");
            PrivateKey::generate(&key).unwrap();
            let (keys, folder) = (dir.path().display(), dir.path().join("store"));
            let settings = [
                format!("model.trusted_keys={keys}"),
                format!("model.store={}", folder.display()),
                "model.trial_frames=3".into(),
                "model.slowdown_max=1000".into(),
            ];
            let config = Config::of_settings(&settings).unwrap();
            let topics = config.topics_of(DeviceName::new("pi").unwrap());
            let shelf = ModelLoader::of(&config, Store::new);
            let answers = Outbox::new(Limits { entries_max: 100, bytes_max: 1 << 20 });
            let (swaps, swapped) = mpsc::sync_channel(1);
            let deciding = shelf.deciding().unwrap();
            let setup = Setup { config, topics, shelf, answers: answers.clone(), swaps };
            let (stop, stopped) = watch::channel(false);
            let (receiver, classifier, Ends { inbox, .. }) = Receiver::new(setup, deciding, stopped);
            Device {
                inbox,
                swapped,
                answers,
                stop,
                thread: thread::spawn(move || receiver.run()),
                decides: Some(classifier),
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
            let bytes = Bundle::new(manifest.clone(), built_in.parts().clone()).to_bytes();
            let bytes = sign("m", &bytes, &self.key).unwrap();
            let model = identity(&manifest, Bundle::from_bytes("m", &bytes).unwrap().sha256());
            let (transfer, chunk_bytes) = (Uuid::from_u128(7), 1 << 17);
            let offer = Offer { schema: SCHEMA, transfer, model, bytes: bytes.len() as u64, chunk_bytes, force: None };
            self.inbox.send(Mail::Offer(json(&offer))).unwrap();
            for number in 0..offer.chunks() {
                let piece = piece(transfer, &bytes, chunk_bytes, number).unwrap();
                self.inbox.send(Mail::Chunk(number, piece)).unwrap();
            }
        }

        /// Does as the vision thread does; gives the version that decides now and who looks on.
        fn swap(&mut self) -> (u64, Option<Witness>) {
            let swap = self.swapped.recv_timeout(Duration::from_secs(60)).unwrap();
            let replaced = self.decides.replace(swap.classifier).unwrap();
            swap.replaced.send(replaced).unwrap();
            (swap.version, swap.witness)
        }

        /// Waits for an answer that is no progress.
        fn answer(&self) -> Answer {
            let deadline = Instant::now() + Duration::from_secs(60);
            while Instant::now() < deadline {
                match self.answers.take_next() {
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

    /// A model on trial that is told of these frames; gives the answer to it.
    fn tried(reports: &[Report]) -> (Answer, State) {
        let version = Bundle::built_in().unwrap().manifest().version;
        let mut device = Device::new();
        device.push();
        let (decides, witness) = device.swap();
        let mut witness = witness.expect("it is on trial");
        assert_eq!((decides, device.answer().answer), (version + 1, UpdateStatus::Accepted));
        for report in reports {
            assert!(witness(report.clone()));
        }
        let answer = match reports.iter().any(|report| matches!(report, Report::Failed(_))) || slow(reports) {
            true => {
                assert_eq!(device.swap().0, version, "the one before decides again");
                device.answer()
            }
            false => device.answer(),
        };
        let state = device.end();
        assert!(!witness(Report::Failed("late".into())), "nobody wants to know any more");
        (answer, state)
    }

    fn slow(reports: &[Report]) -> bool {
        reports.contains(&seen(3_600_000))
    }

    fn seen(ms: u64) -> Report {
        Report::Seen(Duration::from_millis(ms))
    }

    #[test]
    fn a_model_that_sees_enough_is_confirmed() {
        let (answer, state) = tried(&[seen(1), seen(2), seen(3)]);
        assert_eq!((answer.answer, answer.transfer), (UpdateStatus::Confirmed, Some(Uuid::from_u128(7))));
        assert_eq!((state.deciding(), state.newest), (state.current.clone(), answer.model.version));
        assert_ne!(state.current, ModelSlot::BuiltIn);
    }

    #[test]
    fn a_model_that_fails_or_is_slow_on_trial_goes_by_itself() {
        let cases = [
            (vec![seen(1), Report::Failed("the model panicked".into())], "the model panicked"),
            (vec![seen(3_600_000); 3], "it works 3600000 ms and more for a frame, the limit is "),
        ];
        for (reports, expected) in cases {
            let (answer, state) = tried(&reports);
            assert_eq!(answer.answer, UpdateStatus::RolledBack);
            assert!(answer.reason.unwrap().starts_with(expected));
            assert_eq!((&state.current, &state.trial), (&ModelSlot::BuiltIn, &None));
            assert_eq!(state.taken_back, [answer.model.sha256]);
            assert!(state.trouble.unwrap().contains(&format!("is rolled back: {expected}")));
        }
    }

    #[test]
    fn a_stop_in_the_middle_of_a_trial_lets_it_go_on_later() {
        let mut device = Device::new();
        device.push();
        device.swap();
        assert_eq!(device.answer().answer, UpdateStatus::Accepted);
        assert_eq!(device.end().trial.unwrap().phase, Phase::Waiting);
    }
}
