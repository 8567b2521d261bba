//! The messages between workstation and device. A reader ignores unknown fields.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::bundle::manifest::check_name;
use crate::bundle::signature::{DetachedSignature, Keyring, PrivateKey, SignatureError, UntrustedSigner};
use crate::bundle::{Identity, Manifest, Metrics};
use crate::mqtt::message::SCHEMA;

/// An error of parsing a message.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The message is not JSON, or a field is missing or of another type.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// The message has another schema than [`SCHEMA`]; its version.
    #[error("schema {0}, this program reads {SCHEMA}")]
    Schema(u32),
    /// The name of the model is malformed; the expected form.
    #[error("name: expected {0}")]
    Name(String),
    /// The hash of the model is malformed.
    #[error("sha256: expected 64 hexadecimal digits")]
    Sha256,
}

/// A command that is not authorised.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The command is signed for another generation of the store.
    #[error("the signed command is for generation {signed}, the present generation of the device's store is {present}")]
    Generation {
        /// Generation that the command is valid for.
        signed: u64,
        /// Present generation of the store.
        present: u64,
    },
    /// The signature is not in the expected encoding.
    #[error("the signature of the command: {0}")]
    Malformed(SignatureError),
    /// The signature is of another action, device or model.
    #[error("the signature of the command {0}")]
    Signature(SignatureError),
    /// The command is signed by a key that is not trusted.
    #[error("the signed command: {0}")]
    Untrusted(#[from] UntrustedSigner),
}

/// The origin of the active model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelSource {
    /// The program itself.
    BuiltIn,
    /// `model.bundle` of the configuration.
    File,
    /// The device's store.
    Store,
}

/// A backbone network of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRef {
    /// Its name.
    pub name: String,
    /// SHA-256 of its ONNX file, hexadecimal.
    pub sha256: String,
}

/// The active model; retained on `…/model`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Name, version and SHA-256 of the model.
    #[serde(flatten)]
    pub model: Identity,
    /// Its classes.
    pub classes: Vec<String>,
    /// Name of the backbone that it was trained on.
    pub backbone: String,
    /// The oldest bundle format that the device reads; programs that know format 1 alone look for it here.
    pub format: u32,
    /// The newest bundle format that it reads, if that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format_max: Option<u32>,
    /// The backbone that a model must be trained on unless it carries its own.
    pub network: NetworkRef,
    /// SHA-256 of the dataset that it was trained and evaluated on.
    pub dataset: String,
    /// Its metrics on the validation set.
    pub metrics: Metrics,
    /// Id of the key that signed it; `None` if it is not signed.
    pub signed_by: Option<String>,
    /// Its origin.
    pub source: ModelSource,
    /// Whether it is on trial.
    pub trial: bool,
    /// The model that a rollback activates.
    pub previous: Option<String>,
    /// Generation of the store; a command signed for it is valid once.
    pub generation: u64,
    /// The reason why it is not the model that was installed last.
    #[serde(rename = "trouble")]
    pub fallback_reason: Option<String>,
}

/// An offer of a model, which follows in chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Id of the transfer.
    pub transfer: Uuid,
    /// Name, version and SHA-256 of the model.
    #[serde(flatten)]
    pub model: Identity,
    /// Size of the bundle, in bytes.
    pub bytes: u64,
    /// Size of each chunk but the last, in bytes.
    pub chunk_bytes: u32,
    /// Permits a model that is not newer, or was rolled back.
    pub force: Option<SignedCommand>,
}

impl Offer {
    /// Parses an offer.
    ///
    /// # Errors
    /// If the payload is not JSON of this schema, or the name or SHA-256 is malformed.
    pub fn read(payload: &[u8]) -> Result<Self, ProtocolError> {
        let offer: Self = serde_json::from_slice(payload)?;
        expect_schema(offer.schema)?;
        check_name(&offer.model.name).map_err(|error| ProtocolError::Name(error.to_string()))?;
        let sha256 = &offer.model.sha256;
        if sha256.len() != 64 || !sha256.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ProtocolError::Sha256);
        }
        Ok(offer)
    }

    /// Returns the number of chunks.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.bytes.div_ceil(u64::from(self.chunk_bytes.max(1)))).unwrap_or(u32::MAX)
    }
}

/// A request to activate the previous model again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollbackRequest {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Id of the request, repeated in the answer.
    pub transfer: Uuid,
    /// Its authorisation.
    #[serde(rename = "order")]
    pub command: SignedCommand,
}

impl RollbackRequest {
    /// Parses a request.
    ///
    /// # Errors
    /// If the payload is not JSON of this schema.
    pub fn read(payload: &[u8]) -> Result<Self, ProtocolError> {
        let rollback: Self = serde_json::from_slice(payload)?;
        expect_schema(rollback.schema).map(|()| rollback)
    }
}

fn expect_schema(schema: u32) -> Result<(), ProtocolError> {
    if schema == SCHEMA { Ok(()) } else { Err(ProtocolError::Schema(schema)) }
}

/// Progress of a transfer; also sent when a chunk is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferProgress {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Id of the transfer.
    pub transfer: Uuid,
    /// The next chunk that the device expects.
    pub next: u32,
    /// Number of chunks.
    pub chunks: u32,
    /// Whether chunks from `next` on must be sent again.
    #[serde(rename = "again")]
    pub resend: bool,
}

/// The state of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateStatus {
    /// The model passed validation and is active on trial.
    Accepted,
    /// The model was not activated.
    Refused,
    /// The model passed its trial.
    Confirmed,
    /// The model was active and was replaced by the previous one.
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

/// The end of a trial: after this many frames or this time, whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrialLimits {
    /// Number of classified frames.
    pub frames: u32,
    /// Time since the start of the trial, in seconds.
    pub seconds: u64,
}

/// An answer of the update agent, on `…/model/answer`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Name of the device.
    pub device: String,
    /// Id of the offer or request that it answers; `None` for an answer without a request.
    pub transfer: Option<Uuid>,
    /// The state of the update.
    #[serde(rename = "answer")]
    pub status: UpdateStatus,
    /// Reason of a refusal or a rollback.
    pub reason: Option<String>,
    /// Name, version and SHA-256 of the model.
    #[serde(flatten)]
    pub model: Identity,
    /// Limits of the trial that begins.
    pub trial: Option<TrialLimits>,
    /// Time of the answer, RFC 3339, UTC.
    pub at: String,
}

/// The action that a command authorises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Accept this model although it is not newer, or was rolled back.
    Force,
    /// Roll this model back.
    Rollback,
}

/// A signed command: for one action on one device in one generation of its store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedCommand {
    /// The generation that it is valid for.
    pub generation: u64,
    /// Key and signature, hexadecimal.
    pub signed: String,
}

impl SignedCommand {
    /// Signs a command. `device` is the beginning of its topics, `generation` that of its `…/model`, `sha256` the model to
    /// accept or to roll back.
    pub fn sign(key: &PrivateKey, action: Action, device: &str, generation: u64, sha256: &str) -> Self {
        SignedCommand { generation, signed: key.sign(&signed_text(action, device, generation, sha256)).to_hex() }
    }

    /// Verifies the command.
    ///
    /// # Errors
    /// If it is for another generation, action, device or model, or not signed by a trusted key.
    pub fn check(
        &self,
        trusted: &Keyring,
        action: Action,
        device: &str,
        generation: u64,
        sha256: &str,
    ) -> Result<(), CommandError> {
        if self.generation != generation {
            return Err(CommandError::Generation { signed: self.generation, present: generation });
        }
        let signed = DetachedSignature::from_hex(&self.signed).map_err(CommandError::Malformed)?;
        let signer =
            signed.verify(&signed_text(action, device, generation, sha256)).map_err(CommandError::Signature)?;
        Ok(trusted.verify_signer(Some(&signer)).map(drop)?)
    }
}

/// Returns the text that is signed; it differs for any two commands.
fn signed_text(action: Action, device: &str, generation: u64, sha256: &str) -> Vec<u8> {
    let action = match action {
        Action::Force => "force",
        Action::Rollback => "rollback",
    };
    format!("bloomcast order {SCHEMA}\n{action}\n{device}\n{generation}\n{sha256}\n").into_bytes()
}

/// Returns the identity of the model of a manifest. `sha256` is that of the whole bundle.
pub fn identity(manifest: &Manifest, sha256: &str) -> Identity {
    Identity { name: manifest.name.clone(), version: manifest.version, sha256: sha256.into() }
}

/// Returns the status of a device whose model is one version older and equally good on the same dataset.
#[cfg(test)]
pub fn older_status(manifest: &Manifest) -> ModelStatus {
    let backbone = &manifest.backbone;
    ModelStatus {
        schema: SCHEMA,
        model: Identity { version: manifest.version - 1, ..identity(manifest, "older") },
        classes: manifest.classes.names().to_vec(),
        backbone: backbone.name.clone(),
        format: 1,
        format_max: Some(crate::bundle::manifest::FORMAT),
        network: NetworkRef { name: backbone.name.clone(), sha256: backbone.sha256.clone() },
        dataset: manifest.dataset.sha256.clone(),
        metrics: manifest.metrics.clone(),
        signed_by: None,
        source: ModelSource::BuiltIn,
        trial: false,
        previous: None,
        generation: 0,
        fallback_reason: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_valid_for_one_action_on_one_device_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trainer.key");
        PrivateKey::generate(&path).unwrap();
        let (key, trusted) = (PrivateKey::read(&path).unwrap(), Keyring::read(dir.path()).unwrap());
        let command = SignedCommand::sign(&key, Action::Rollback, "bloomcast/pi", 7, "ab");
        let check = |action, device, generation, sha256| command.check(&trusted, action, device, generation, sha256);
        assert!(check(Action::Rollback, "bloomcast/pi", 7, "ab").is_ok());
        assert!(check(Action::Force, "bloomcast/pi", 7, "ab").unwrap_err().to_string().contains("does not match"));
        assert!(check(Action::Rollback, "bloomcast/pi2", 7, "ab").is_err());
        assert!(
            check(Action::Rollback, "bloomcast/pi", 8, "ab")
                .unwrap_err()
                .to_string()
                .contains("generation 7, the present generation of the device's store is 8")
        );
        assert!(check(Action::Rollback, "bloomcast/pi", 7, "ac").is_err());
        let untrusted = command.check(&Keyring::default(), Action::Rollback, "bloomcast/pi", 7, "ab");
        assert_eq!(
            untrusted.unwrap_err().to_string(),
            "the signed command: no key is trusted: the folder of trusted keys has no *.pub file"
        );
    }

    fn expect_json<T>(value: &T, json: &str)
    where
        T: Serialize + serde::de::DeserializeOwned + PartialEq + fmt::Debug,
    {
        assert_eq!(serde_json::to_string(value).unwrap(), json);
        assert_eq!(serde_json::from_str::<T>(json).unwrap(), *value);
    }

    /// The wire format is stable: a change of these texts needs another schema number.
    #[test]
    fn offers_requests_and_progress_keep_their_schema() {
        let command = SignedCommand { generation: 3, signed: "cd".into() };
        let transfer = Uuid::nil();
        let offer = Offer {
            schema: SCHEMA,
            transfer,
            model: Identity { name: "garden".into(), version: 7, sha256: "ab".into() },
            bytes: 5000,
            chunk_bytes: 4096,
            force: Some(command.clone()),
        };
        expect_json(
            &offer,
            r#"{"schema":1,"transfer":"00000000-0000-0000-0000-000000000000","name":"garden","version":7,"sha256":"ab","bytes":5000,"chunk_bytes":4096,"force":{"generation":3,"signed":"cd"}}"#,
        );
        expect_json(
            &RollbackRequest { schema: SCHEMA, transfer, command },
            r#"{"schema":1,"transfer":"00000000-0000-0000-0000-000000000000","order":{"generation":3,"signed":"cd"}}"#,
        );
        expect_json(
            &TransferProgress { schema: SCHEMA, transfer, next: 1, chunks: 2, resend: true },
            r#"{"schema":1,"transfer":"00000000-0000-0000-0000-000000000000","next":1,"chunks":2,"again":true}"#,
        );
    }

    /// As [`offers_requests_and_progress_keep_their_schema`].
    #[test]
    fn answers_and_statuses_keep_their_schema() {
        let model = Identity { name: "garden".into(), version: 7, sha256: "ab".into() };
        let answer = Answer {
            schema: SCHEMA,
            device: "pi".into(),
            transfer: Some(Uuid::nil()),
            status: UpdateStatus::RolledBack,
            reason: Some("slow".into()),
            model: model.clone(),
            trial: None,
            at: "2026-01-02T03:04:05.678Z".into(),
        };
        expect_json(
            &answer,
            r#"{"schema":1,"device":"pi","transfer":"00000000-0000-0000-0000-000000000000","answer":"rolled-back","reason":"slow","name":"garden","version":7,"sha256":"ab","trial":null,"at":"2026-01-02T03:04:05.678Z"}"#,
        );
        let status = ModelStatus {
            schema: SCHEMA,
            model,
            classes: vec!["daisy".into(), "tulips".into()],
            backbone: "n".into(),
            format: 1,
            format_max: None,
            network: NetworkRef { name: "n".into(), sha256: "cd".into() },
            dataset: "ef".into(),
            metrics: Metrics { accuracy: 0.5, loss: 0.25, ece: 0.125 },
            signed_by: None,
            source: ModelSource::BuiltIn,
            trial: false,
            previous: None,
            generation: 3,
            fallback_reason: None,
        };
        let json = r#"{"schema":1,"name":"garden","version":7,"sha256":"ab","classes":["daisy","tulips"],"backbone":"n","format":1,"network":{"name":"n","sha256":"cd"},"dataset":"ef","metrics":{"accuracy":0.5,"loss":0.25,"ece":0.125},"signed_by":null,"source":"built-in","trial":false,"previous":null,"generation":3,"trouble":null}"#;
        expect_json(&status, json);
    }
}
