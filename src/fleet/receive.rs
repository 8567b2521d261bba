//! The device's side: takes what is offered, lets it prove itself, swaps it in, watches its trial, answers. A thread of
//! its own, so that neither the frames nor the broker wait for it.

use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tracing::{info, warn};
use uuid::Uuid;

use super::message::{Action, Answer, Identity, Offer, Rollback, Verdict, identity};
use super::model::{Deciding, Loaded, Model, Shelf, noted};
use super::proof::{self, Proven, Trust};
use super::transfer::{Taken, Transfer};
use super::trial::{Outcome, Trial};
use crate::bundle::Keyring;
use crate::bundle::store::{Phase, Slot, State, Store};
use crate::config::Config;
use crate::decide::Rules;
use crate::mqtt::link::INCOMING_BYTES_MAX;
use crate::mqtt::message::{SCHEMA, json, time};
use crate::mqtt::topics::Topics;
use crate::mqtt::{About, Mail, Outbox, discovery};
use crate::vision::Classifier;
use crate::watcher::{Report, Swap, Witness};

/// How often a stop and the end of a trial are looked for while nothing comes.
const IDLE: Duration = Duration::from_millis(100);
/// Messages that wait; a piece that finds no room is asked for again.
const INBOX_MAX: usize = 32;
/// A larger piece would not fit the connection.
const CHUNK_BYTES_MAX: u32 = INCOMING_BYTES_MAX as u32 / 2;

/// What comes to this thread.
pub enum Input {
    Mail(Mail),
    Report(Report),
}

/// What the device's side works with.
pub struct Setup {
    pub config: Config,
    pub topics: Topics,
    pub shelf: Shelf,
    pub answers: Outbox,
    pub swaps: SyncSender<Swap>,
}

/// The other ends.
pub struct Ends {
    pub inbox: SyncSender<Input>,
    pub about: watch::Sender<About>,
    /// Of the model at the start, where it is on trial.
    pub witness: Option<Witness>,
}

pub struct Receiver {
    setup: Setup,
    /// What decides, and what the store says of it.
    model: Model,
    state: State,
    inbox: (SyncSender<Input>, mpsc::Receiver<Input>),
    about: watch::Sender<About>,
    transfer: Option<Transfer>,
    trial: Option<OnTrial>,
    /// What was answered last, for whoever asks again.
    last: Option<Answer>,
}

struct OnTrial {
    trial: Trial,
    /// Who asked for it.
    transfer: Option<Uuid>,
    /// As long as it is there, the vision thread reports.
    listening: Arc<()>,
}

/// A request that is turned down, and why.
type Refused = String;

impl Receiver {
    /// Begins with what decides at the start; its classifier is the vision thread's.
    pub fn new(setup: Setup, deciding: Deciding) -> (Self, Classifier, Ends) {
        let Deciding { loaded: Loaded { model, classifier, .. }, state, trial, news } = deciding;
        let (sender, receiver) = mpsc::sync_channel(INBOX_MAX);
        let (about, _) = watch::channel(About::new());
        let mut this = Receiver {
            setup,
            model,
            state,
            inbox: (sender.clone(), receiver),
            about: about.clone(),
            transfer: None,
            trial: None,
            last: None,
        };
        for (model, reason) in news {
            this.answer(Verdict::RolledBack, Some(reason), model, None);
        }
        let witness = trial.then(|| {
            info!("{} decides, on trial", this.model.identity());
            this.begin_trial(None, None)
        });
        about.send_replace(this.describe(&this.model));
        (this, classifier, Ends { inbox: sender, about, witness })
    }

    /// Works until `stop` is set.
    pub fn run(mut self, stop: &watch::Receiver<bool>) {
        while !*stop.borrow() {
            match self.inbox.1.recv_timeout(IDLE) {
                Ok(Input::Mail(mail)) => self.read(mail),
                Ok(Input::Report(report)) => {
                    let outcome = self.trial.as_mut().and_then(|on_trial| on_trial.trial.hear(report));
                    self.end_trial(outcome);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("one sender is our own"),
            }
            let now = Instant::now();
            let outcome = self.trial.as_mut().and_then(|on_trial| on_trial.trial.at(now));
            self.end_trial(outcome);
        }
        self.pause_trial();
    }

    fn read(&mut self, mail: Mail) {
        match mail {
            Mail::Connected => self.tell_progress(true),
            Mail::Chunk(number, payload) => self.take(number, &payload),
            Mail::Offer(payload) => match serde_json::from_slice::<Offer>(&payload) {
                Ok(offer) => {
                    let (model, transfer) = (offer.model.clone(), offer.transfer);
                    if let Err(reason) = self.consider(offer) {
                        self.answer(Verdict::Refused, Some(reason), model, Some(transfer));
                    }
                }
                Err(error) => warn!("{}: no offer: {error}", self.setup.topics.offer()),
            },
            Mail::Rollback(payload) => match serde_json::from_slice::<Rollback>(&payload) {
                Ok(order) => {
                    if let Err(reason) = self.take_back(&order) {
                        self.answer(Verdict::Refused, Some(reason), self.model.identity(), Some(order.transfer));
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
        if let Some(last) = self.last.as_ref().filter(|last| last.transfer == Some(offer.transfer)) {
            let again = last.clone();
            self.say(&again);
            return Ok(());
        }
        if let Some(open) = self.transfer.as_mut().filter(|open| !open.is_abandoned(now)) {
            if open.offer.transfer != offer.transfer {
                return Err(format!("busy: {} is being received", open.offer.model));
            }
            // The same again, or in smaller pieces.
            if open.offer == offer {
                open.heard(now);
                self.tell_progress(true);
                return Ok(());
            }
        }
        if offer.model.sha256 == self.model.sha256 {
            self.say_how_it_stands(offer.transfer);
            return Ok(());
        }
        if self.trial.is_some() {
            return Err(format!("busy: {} is on trial", self.model.identity()));
        }
        self.expect_untouched()?;
        self.expect_wanted(&offer, &offer.model)?;
        info!("receiving {}: {} bytes", offer.model, offer.bytes);
        let bytes_max = self.setup.config.model.offer_bytes_max;
        self.transfer = Some(Transfer::new(offer, bytes_max, CHUNK_BYTES_MAX, now)?);
        self.tell_progress(true);
        Ok(())
    }

    /// The model that is offered decides already.
    fn say_how_it_stands(&mut self, transfer: Uuid) {
        let verdict = match &mut self.trial {
            Some(on_trial) => {
                on_trial.transfer = Some(transfer);
                Verdict::Accepted
            }
            None => Verdict::Confirmed,
        };
        self.answer(verdict, Some("it decides already".into()), self.model.identity(), Some(transfer));
    }

    /// Refuses to work on what somebody else has changed.
    fn expect_untouched(&self) -> Result<(), Refused> {
        let state = self.store()?.state().map_err(|e| e.to_string())?;
        // Where it could not be written, we are behind, too, but not of another mind.
        if state.generation > self.state.generation {
            return Err("the store was changed by hand: `systemctl restart bloomcast` first".into());
        }
        Ok(())
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
        let present = self.model.identity();
        let reason = if self.state.taken_back.contains(&model.sha256) {
            format!("{model} was taken back here")
        } else if model.version <= present.version {
            format!("{model} is not newer than {present}")
        } else {
            return Ok(());
        };
        match &offer.force {
            None => Err(format!("{reason}; --force takes it nevertheless")),
            Some(order) => order
                .check(&trusted, Action::Force, self.setup.topics.root(), self.state.generation, &model.sha256)
                .map_err(|e| format!("{reason}, and {e}")),
        }
    }

    fn take(&mut self, number: u32, payload: &[u8]) {
        let Some(transfer) = &mut self.transfer else { return };
        let taken = transfer.take(number, payload, Instant::now());
        match taken {
            Taken::Quiet => {}
            Taken::Progress => self.tell_progress(false),
            Taken::Gap => self.tell_progress(true),
            Taken::Whole(_) | Taken::Altered => {
                let Some(Transfer { offer, .. }) = self.transfer.take() else { return };
                let installed = match taken {
                    Taken::Whole(bytes) => self.install(&offer, &bytes),
                    _ => Err("what came is not what was offered: its sha256 is another".into()),
                };
                if let Err(reason) = installed {
                    self.answer(Verdict::Refused, Some(reason), offer.model, Some(offer.transfer));
                }
            }
        }
    }

    /// Lets a model that has come prove itself, and puts it on trial.
    fn install(&mut self, offer: &Offer, bytes: &[u8]) -> Result<(), Refused> {
        let (config, shelf) = (&self.setup.config, &self.setup.shelf);
        let bundle = proof::vouched("offered", bytes, &Trust::Keys, config).map_err(|e| e.to_string())?;
        let model = identity(bundle.manifest(), bundle.sha256());
        if model != offer.model {
            return Err(format!("it is {model}, and was offered as {}", offer.model));
        }
        self.expect_wanted(offer, &model)?;
        info!("{model} has come whole and is signed; it has to prove itself");
        let Proven { loaded, rules, limit } =
            proof::prove(bundle, config, shelf, &self.model).map_err(|e| e.to_string())?;
        info!("{model} has proved itself");
        let slot = Slot { sha256: model.sha256.clone(), name: model.name.clone(), version: model.version };
        self.state = self.store()?.try_out(slot, bytes, Phase::Running).map_err(|e| e.to_string())?;
        let witness = self.begin_trial(Some(offer.transfer), Some(limit));
        self.swap(loaded, rules, Some(witness));
        self.answer(Verdict::Accepted, None, model, Some(offer.transfer));
        Ok(())
    }

    /// Gives who looks on.
    fn begin_trial(&mut self, transfer: Option<Uuid>, limit: Option<Duration>) -> Witness {
        let listening = Arc::new(());
        let witness = witness(&self.inbox.0, &listening);
        let trial = Trial::begin(self.setup.config.trial(), limit, Instant::now());
        self.trial = Some(OnTrial { trial, transfer, listening });
        witness
    }

    fn end_trial(&mut self, outcome: Option<Outcome>) {
        let Some(outcome) = outcome else { return };
        let Some(OnTrial { transfer, listening, .. }) = self.trial.take() else { return };
        drop(listening);
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
                self.answer(Verdict::Confirmed, None, model, transfer);
            }
            Err(reason) => {
                warn!("{model} has failed: {reason}");
                let state = self.state.clone();
                let abandoned =
                    self.store().map(|store| noted(store.abandon(&model.sha256), state, |state| state.trial = None));
                if let Ok(state) = abandoned {
                    self.go_back(state);
                }
                self.answer(Verdict::RolledBack, Some(reason), model, transfer);
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
        if let Some(last) = self.last.as_ref().filter(|last| last.transfer == Some(rollback.transfer)) {
            let again = last.clone();
            self.say(&again);
            return Ok(());
        }
        self.expect_untouched()?;
        let (store, trusted) = (self.store()?, self.trusted()?);
        let model = self.model.identity();
        let (device, generation) = (self.setup.topics.root(), self.state.generation);
        rollback.order.check(&trusted, Action::Rollback, device, generation, &model.sha256)?;
        let state = store.take_back().map_err(|e| e.to_string())?;
        self.trial = None;
        self.go_back(state);
        self.answer(Verdict::RolledBack, Some("it was asked for".into()), model, Some(rollback.transfer));
        Ok(())
    }

    /// Lets decide what decides by `state`.
    fn go_back(&mut self, state: State) {
        let Ok(store) = self.store() else { return };
        let back = self.setup.shelf.settle(store, state, Some(&self.model)).map_err(|e| e.to_string());
        let back = back.and_then(|Deciding { loaded, state, .. }| {
            let rules = self.setup.config.rules(&loaded.model.manifest.classes).map_err(|e| e.to_string())?;
            Ok((loaded, state, rules))
        });
        match back {
            Ok((loaded, state, rules)) => {
                self.state = state;
                self.swap(loaded, rules, None);
            }
            Err(error) => warn!("{} decides on until the next start: {error}", self.model.identity()),
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

    fn answer(&mut self, answer: Verdict, reason: Option<String>, model: Identity, transfer: Option<Uuid>) {
        let because = reason.as_deref().map_or(String::new(), |reason| format!(": {reason}"));
        match answer {
            Verdict::Accepted | Verdict::Confirmed => info!("{model} is {answer}{because}"),
            Verdict::Refused | Verdict::RolledBack => warn!("{model} is {answer}{because}"),
        }
        let answer = Answer {
            schema: SCHEMA,
            device: self.setup.topics.device().to_string(),
            transfer,
            answer,
            reason,
            model,
            trial: (answer == Verdict::Accepted).then(|| self.setup.config.trial()),
            at: time(SystemTime::now()),
        };
        self.say(&answer);
        self.last = Some(answer);
    }

    fn say(&self, answer: &Answer) {
        // What has to go for it was never fetched by anybody.
        self.setup.answers.push(self.setup.topics.answer(), json(answer));
    }
}

/// Tells the receiver how a model fares, as long as `listening` is there.
fn witness(inbox: &SyncSender<Input>, listening: &Arc<()>) -> Witness {
    let (inbox, listening): (_, Weak<()>) = (inbox.clone(), Arc::downgrade(listening));
    Box::new(move |report| {
        // Where there is no room, the next frame tells.
        let told = listening.upgrade().map(|_| inbox.try_send(Input::Report(report)));
        !matches!(told, None | Some(Err(TrySendError::Disconnected(_))))
    })
}
