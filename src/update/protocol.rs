//! What workstation and device say to each other. Whoever reads ignores fields that it does not know.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::bundle::manifest::check_name;
use crate::bundle::signature::{Keyring, PrivateKey, Signed};
use crate::bundle::{Identity, Manifest, Metrics};
use crate::config::Config;
use crate::mqtt::message::SCHEMA;
use crate::update::device::store::State;

/// Where the model that decides came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    BuiltIn,
    /// `model.bundle` of the configuration.
    File,
    Store,
}

/// A network that a device has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRef {
    pub name: String,
    pub sha256: String,
}

/// The model that decides; retained on `…/model`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    pub schema: u32,
    #[serde(flatten)]
    pub model: Identity,
    pub classes: Vec<String>,
    /// The network it was made for.
    pub backbone: String,
    /// The bundles that the device reads.
    pub format: u32,
    /// What a model must be made for that does not carry its own.
    pub network: NetworkRef,
    /// What it was taught with and measured on.
    pub dataset: String,
    pub metrics: Metrics,
    /// The id of the key that signed it.
    pub signed_by: Option<String>,
    pub source: Source,
    /// It decides, and is not confirmed.
    pub trial: bool,
    /// What a rollback goes back to.
    pub previous: Option<String>,
    /// An order that is signed for it cannot be given a second time.
    pub generation: u64,
    /// Why it is not the model that was installed last.
    pub trouble: Option<String>,
}

/// A model is to be sent, in pieces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub schema: u32,
    pub transfer: Uuid,
    #[serde(flatten)]
    pub model: Identity,
    pub bytes: u64,
    /// In each piece but the last.
    pub chunk_bytes: u32,
    /// Allows a model that is not newer, or was taken back.
    pub force: Option<SignedOrder>,
}

impl Offer {
    /// Refuses what no workstation sends.
    pub fn read(payload: &[u8]) -> Result<Self, String> {
        let offer: Self = serde_json::from_slice(payload).map_err(|e| e.to_string())?;
        expect_schema(offer.schema)?;
        check_name(&offer.model.name).map_err(|expected| format!("name: expected {expected}"))?;
        let sha256 = &offer.model.sha256;
        if sha256.len() != 64 || !sha256.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return Err("sha256: expected 64 hexadecimal digits".into());
        }
        Ok(offer)
    }

    pub fn chunks(&self) -> u32 {
        u32::try_from(self.bytes.div_ceil(u64::from(self.chunk_bytes.max(1)))).unwrap_or(u32::MAX)
    }
}

/// The model before is to decide again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollback {
    pub schema: u32,
    /// Comes back in the answer.
    pub transfer: Uuid,
    pub order: SignedOrder,
}

impl Rollback {
    pub fn read(payload: &[u8]) -> Result<Self, String> {
        let rollback: Self = serde_json::from_slice(payload).map_err(|e| e.to_string())?;
        expect_schema(rollback.schema).map(|()| rollback)
    }
}

fn expect_schema(schema: u32) -> Result<(), String> {
    if schema == SCHEMA { Ok(()) } else { Err(format!("schema {schema}, this program reads {SCHEMA}")) }
}

/// How much of a model has come; also said when a piece is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub schema: u32,
    pub transfer: Uuid,
    /// The piece that is waited for.
    pub next: u32,
    pub chunks: u32,
    /// What was sent from there on did not come, or may not have.
    pub again: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateStatus {
    /// It proved itself and decides on trial.
    Accepted,
    /// It never decided.
    Refused,
    /// It came through its trial.
    Confirmed,
    /// It decided, and does no more.
    RolledBack,
}

impl fmt::Display for UpdateStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            UpdateStatus::Accepted => "accepted",
            UpdateStatus::Refused => "refused",
            UpdateStatus::Confirmed => "confirmed",
            UpdateStatus::RolledBack => "rolled back",
        })
    }
}

/// How long a trial takes: until so many frames were seen, or so much time has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrialLimits {
    pub frames: u32,
    pub seconds: u64,
}

impl TrialLimits {
    pub fn of(config: &Config) -> Self {
        TrialLimits { frames: config.model.trial_frames, seconds: config.model.trial_s_max }
    }
}

/// What became of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub schema: u32,
    pub device: String,
    /// The offer or order it answers; none where nobody asked.
    pub transfer: Option<Uuid>,
    pub answer: UpdateStatus,
    pub reason: Option<String>,
    #[serde(flatten)]
    pub model: Identity,
    pub trial: Option<TrialLimits>,
    /// RFC 3339, UTC.
    pub at: String,
}

/// What a signed order is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Take this model though it is not newer.
    Force,
    /// Take this model back.
    Rollback,
}

/// A signature under one order: for one device, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedOrder {
    pub generation: u64,
    /// Key and signature, in hexadecimal.
    pub signed: String,
}

impl SignedOrder {
    /// `device`: what its topics begin with; `generation`: as it stands on its `…/model`; `sha256`: the model that is to
    /// come, or to go.
    pub fn sign(key: &PrivateKey, action: Action, device: &str, generation: u64, sha256: &str) -> Self {
        SignedOrder { generation, signed: key.sign(&statement(action, device, generation, sha256)).to_text() }
    }

    /// Refuses what no trusted key has signed, or signed for something else.
    pub fn check(
        &self,
        trusted: &Keyring,
        action: Action,
        device: &str,
        generation: u64,
        sha256: &str,
    ) -> Result<(), String> {
        if self.generation != generation {
            return Err(format!("the order is for generation {}, this is {generation}", self.generation));
        }
        let signed = Signed::from_text(&self.signed).map_err(|e| format!("the order's signature: {e}"))?;
        let signer = signed.check(&statement(action, device, generation, sha256));
        let signer = signer.map_err(|e| format!("the order's signature {e}"))?;
        trusted.trust(Some(&signer)).map(drop).map_err(|e| format!("the order: {e}"))
    }
}

/// What is signed: never the same for two orders.
fn statement(action: Action, device: &str, generation: u64, sha256: &str) -> Vec<u8> {
    let action = match action {
        Action::Force => "force",
        Action::Rollback => "rollback",
    };
    format!("bloomcast order {SCHEMA}\n{action}\n{device}\n{generation}\n{sha256}\n").into_bytes()
}

/// Why a model should not decide after `present`, unless somebody insists.
pub fn objection(model: &Identity, present: &Identity, state: &State) -> Option<String> {
    if state.taken_back.contains(&model.sha256) {
        Some(format!("{model} was taken back here, or failed its trial"))
    } else if model.version <= present.version {
        Some(format!("{model} is not newer than {present}"))
    } else if model.version <= state.newest {
        Some(format!("{model} is not newer than version {}, which was confirmed here before", state.newest))
    } else {
        None
    }
}

/// Which model a manifest is of.
pub fn identity(manifest: &Manifest, sha256: &str) -> Identity {
    Identity { name: manifest.name.clone(), version: manifest.version, sha256: sha256.into() }
}

/// A device whose model is one version older than this one and as good, of the same photographs.
#[cfg(test)]
pub fn older_note(manifest: &Manifest) -> ModelStatus {
    let backbone = &manifest.backbone;
    ModelStatus {
        schema: SCHEMA,
        model: Identity { version: manifest.version - 1, ..identity(manifest, "older") },
        classes: manifest.classes.names().to_vec(),
        backbone: backbone.name.clone(),
        format: crate::bundle::manifest::FORMAT,
        network: NetworkRef { name: backbone.name.clone(), sha256: backbone.sha256.clone() },
        dataset: manifest.dataset.sha256.clone(),
        metrics: manifest.metrics.clone(),
        signed_by: None,
        source: Source::BuiltIn,
        trial: false,
        previous: None,
        generation: 0,
        trouble: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_for_one_thing_on_one_device_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trainer.key");
        PrivateKey::generate(&path).unwrap();
        let (key, trusted) = (PrivateKey::read(&path).unwrap(), Keyring::read(dir.path()).unwrap());
        let order = SignedOrder::sign(&key, Action::Rollback, "bloomcast/pi", 7, "ab");
        let check = |action, device, generation, sha256| order.check(&trusted, action, device, generation, sha256);
        assert_eq!(check(Action::Rollback, "bloomcast/pi", 7, "ab"), Ok(()));
        assert!(check(Action::Force, "bloomcast/pi", 7, "ab").unwrap_err().contains("does not fit"));
        assert!(check(Action::Rollback, "bloomcast/pi2", 7, "ab").is_err());
        assert!(check(Action::Rollback, "bloomcast/pi", 8, "ab").unwrap_err().contains("generation 7, this is 8"));
        assert!(check(Action::Rollback, "bloomcast/pi", 7, "ac").is_err());
        let nobody = order.check(&Keyring::default(), Action::Rollback, "bloomcast/pi", 7, "ab");
        assert_eq!(nobody.unwrap_err(), "the order: no key is trusted here");
    }

    #[test]
    fn what_was_here_before_does_not_come_back_unasked() {
        let model = |version, sha256: &str| Identity { name: "m".into(), version, sha256: sha256.into() };
        let state = State { taken_back: vec!["bad".into()], newest: 5, ..State::default() };
        let objection = |new| objection(&new, &model(3, "present"), &state);
        assert_eq!(objection(model(6, "new")), None);
        assert_eq!(objection(model(6, "bad")).unwrap(), "m 6 was taken back here, or failed its trial");
        assert_eq!(objection(model(3, "same")).unwrap(), "m 3 is not newer than m 3");
        let before = "m 5 is not newer than version 5, which was confirmed here before";
        assert_eq!(objection(model(5, "older")).unwrap(), before);
    }

    /// The wire format is a promise: whoever changes this text changes the schema number.
    #[test]
    fn answers_and_notes_are_as_promised() {
        let model = Identity { name: "garden".into(), version: 7, sha256: "ab".into() };
        let answer = Answer {
            schema: SCHEMA,
            device: "pi".into(),
            transfer: Some(Uuid::nil()),
            answer: UpdateStatus::RolledBack,
            reason: Some("slow".into()),
            model: model.clone(),
            trial: None,
            at: "2026-01-02T03:04:05.678Z".into(),
        };
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"schema":1,"device":"pi","transfer":"00000000-0000-0000-0000-000000000000","answer":"rolled-back","reason":"slow","name":"garden","version":7,"sha256":"ab","trial":null,"at":"2026-01-02T03:04:05.678Z"}"#
        );
        let note = ModelStatus {
            schema: SCHEMA,
            model,
            classes: vec!["daisy".into(), "tulips".into()],
            backbone: "n".into(),
            format: 1,
            network: NetworkRef { name: "n".into(), sha256: "cd".into() },
            dataset: "ef".into(),
            metrics: Metrics { accuracy: 0.5, loss: 0.25, ece: 0.125 },
            signed_by: None,
            source: Source::BuiltIn,
            trial: false,
            previous: None,
            generation: 3,
            trouble: None,
        };
        let json = r#"{"schema":1,"name":"garden","version":7,"sha256":"ab","classes":["daisy","tulips"],"backbone":"n","format":1,"network":{"name":"n","sha256":"cd"},"dataset":"ef","metrics":{"accuracy":0.5,"loss":0.25,"ece":0.125},"signed_by":null,"source":"built-in","trial":false,"previous":null,"generation":3,"trouble":null}"#;
        assert_eq!(serde_json::to_string(&note).unwrap(), json);
        assert_eq!(serde_json::from_str::<ModelStatus>(json).unwrap(), note);
    }
}
