//! The manifest of a bundle: its metadata, and the hashes of its members.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::system::hash::sha256_hex;
use crate::vision::labels::NAME_BYTES_MAX;
use crate::vision::preprocess::PreprocessError;
use crate::vision::scan::SCALES;
use crate::vision::{Labels, Preprocess};

/// Name of the member with the manifest.
pub const NAME: &str = "manifest.json";
/// Name of the member with the manifest's signature.
pub const SIGNATURE: &str = "manifest.json.sig";
/// Largest manifest, in bytes; one with the most and longest class names is smaller.
pub const BYTES_MAX: usize = 256 << 10;
/// The newest version of the format. This program reads all versions from 1, and writes the oldest one that has what a model needs.
pub const FORMAT: u32 = 2;
/// The feature of a model with unknown classes: [`OodMeasure::CosineAndClasses`].
const UNKNOWN_CLASSES: &str = "unknown-classes";
/// The features that this program supports.
const FEATURES: [&str; 1] = [UNKNOWN_CLASSES];

/// The metadata of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format, 1 to [`FORMAT`].
    pub format: u32,
    /// Features that a reader must support; a reader of format 2 ignores fields that it does not know. Empty in format 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
    /// Name of the model, as [`check_name`] allows it.
    pub name: String,
    /// Increases with every model. By default the time of training, `YYYYMMDDhhmmss` in UTC.
    pub version: u64,
    /// Time of training, RFC 3339, UTC.
    pub created_at: String,
    /// Names of the classes, in the order of the head's outputs.
    pub classes: Labels,
    /// The network that the model was trained on.
    pub backbone: BackboneRef,
    /// Preprocessing that the head was trained with.
    pub preprocess: Preprocess,
    /// Divisor of the logits, above 0; fitted on the validation set.
    pub temperature: f32,
    /// Parameters of the out-of-distribution detection.
    pub unknown: OodParams,
    /// Parameters of scanning; a model with them scans frames by default. A reader that does not know them looks at whole frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scan: Option<ScanRef>,
    /// The dataset of the training.
    pub dataset: DatasetRef,
    /// Metrics on the validation set.
    pub metrics: Metrics,
    /// Seed of the training's random numbers.
    pub seed: u64,
    /// Name and version of the program that trained the model.
    pub program: String,
    /// All members of the bundle except the manifest and its signature.
    pub members: BTreeMap<String, Member>,
}

/// The identity of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name of the model.
    pub name: String,
    /// Version of the model.
    pub version: u64,
    /// SHA-256 of the bundle file, 64 lower-case hexadecimal digits.
    pub sha256: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

/// The network that a model was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackboneRef {
    /// Name of the network, as [`check_name`] allows it.
    pub name: String,
    /// SHA-256 of the ONNX file, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// Name of the feature tensor, the head's input.
    pub feature: String,
    /// Length of a feature vector.
    pub width: usize,
}

/// The out-of-distribution detection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OodParams {
    /// Similarity measure.
    #[serde(flatten)]
    pub rule: OodMeasure,
    /// Similarity below which an image is unknown.
    pub threshold: f32,
    /// Fraction of the validation images that the threshold rejects, 0–1.
    pub rejected_share: f32,
}

/// The similarity measure of the out-of-distribution detection.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "kebab-case")]
pub enum OodMeasure {
    /// The cosine of the angle between the features and the subspace of the classes.
    CosineSubspace,
    /// The cosine, reduced by the log-odds of learned unknown classes; from format 2 on.
    CosineAndClasses {
        /// Weight of the log-odds, above 0, at most 1.
        log_odds_weight: f32,
        /// Threshold for the cosine alone, 0–1; a bundle of format 1 has it.
        cosine_threshold: f32,
    },
}

/// The parameters of scanning besides its weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ScanRef {
    /// Divisor of the logits of a window, above 0.
    pub temperature: f32,
    /// [`ScanParams::offsets`](crate::vision::ScanParams::offsets).
    pub offsets: [f32; SCALES],
}

/// The dataset of the training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetRef {
    /// SHA-256 over the classes and the contents of the files, in order.
    pub sha256: String,
    /// Number of images in the training set.
    pub train_images: usize,
    /// Number of images in the validation set.
    pub val_images: usize,
}

/// The metrics of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Top-1 accuracy, 0–1, without rejection of unknown images.
    pub accuracy: f64,
    /// Mean cross-entropy after the temperature, in nats.
    pub loss: f64,
    /// Expected calibration error after the temperature, 0–1.
    pub ece: f64,
}

/// Hash and size of a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// SHA-256 of the content, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// Size of the content, in bytes.
    pub bytes: usize,
}

impl Member {
    fn from_content(content: &[u8]) -> Self {
        Member { sha256: sha256_hex(content), bytes: content.len() }
    }
}

/// An error of the manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The JSON is invalid, or a field is missing, unknown or of another type.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// The format is newer than [`FORMAT`], or 0; its version.
    #[error("format {0}, this program reads 1 to {FORMAT}")]
    Format(u32),
    /// The model needs a feature that this program does not support, or that its format does not have; its name.
    #[error("requires {0:?}, which this program does not support; update it")]
    Unsupported(String),
    /// A manifest of format 1 has a field that the format does not have; its path.
    #[error("unknown field `{0}`")]
    UnknownField(String),
    /// The name of the model or of the network is invalid.
    #[error("{key}: expected {source}")]
    Name {
        /// Key of the field.
        key: &'static str,
        /// The expected form.
        source: InvalidName,
    },
    /// A parameter of the preprocessing is out of range.
    #[error("{0}")]
    Preprocess(#[from] PreprocessError),
    /// An offset of scanning is not in −100–100; its value.
    #[error("scan.offsets: {0}, expected -100 to 100")]
    ScanOffset(f32),
}

/// A difference between the members of a bundle and the manifest's list.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// The manifest does not list a member; its name.
    #[error("{NAME} does not list the member {0}")]
    Unlisted(String),
    /// A member has another size or hash than listed.
    #[error(
        "{name} was altered: {} bytes with sha256 {}, {NAME} lists {} bytes with {}",
        .found.bytes, .found.sha256, .listed.bytes, .listed.sha256
    )]
    Altered {
        /// Name of the member.
        name: String,
        /// Actual hash and size.
        found: Member,
        /// Hash and size in the manifest.
        listed: Member,
    },
    /// A listed member is not in the bundle; its name.
    #[error("{NAME} lists the member {0}, which is missing")]
    Missing(String),
}

/// An error of the name of a model or a network; its text is the expected form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("1 to {NAME_BYTES_MAX} bytes without control characters")]
pub struct InvalidName;

/// Validates the name of a model or a network.
///
/// # Errors
/// If the name is empty, longer than [`NAME_BYTES_MAX`], or has control characters.
pub fn check_name(name: &str) -> Result<(), InvalidName> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(InvalidName);
    }
    Ok(())
}

impl Manifest {
    /// Parses and validates a manifest. Checks the format first, so that the error for a newer bundle names its format.
    ///
    /// # Errors
    /// If the JSON is invalid, the format is another, or a field has an invalid value.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_slice(bytes)?;
        if !(1..=FORMAT).contains(&format) {
            return Err(ManifestError::Format(format));
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        let unsupported = manifest.requires.iter().find(|feature| !FEATURES.contains(&feature.as_str()));
        let undeclared = manifest.features().iter().find(|feature| !manifest.requires.iter().any(|it| it == *feature));
        if let Some(feature) = unsupported.map(String::as_str).or(undeclared.copied()) {
            return Err(ManifestError::Unsupported(feature.into()));
        }
        if format == 1 {
            if let Some(feature) = manifest.requires.first() {
                return Err(ManifestError::Unsupported(feature.clone()));
            }
            let known = serde_json::to_value(Manifest { scan: None, ..manifest.clone() })?;
            if let Some(field) = unknown_field(&serde_json::from_slice(bytes)?, &known) {
                return Err(ManifestError::UnknownField(field));
            }
        }
        for (key, name) in [("name", &manifest.name), ("backbone.name", &manifest.backbone.name)] {
            check_name(name).map_err(|source| ManifestError::Name { key, source })?;
        }
        manifest.preprocess.check()?;
        let offsets = manifest.scan.iter().flat_map(|scan| scan.offsets);
        match offsets.into_iter().find(|offset| !(-100.0..=100.0).contains(offset)) {
            Some(offset) => Err(ManifestError::ScanOffset(offset)),
            None => Ok(manifest),
        }
    }

    /// Sets the oldest format that has what the model needs, and its required features.
    pub fn set_format(&mut self) {
        self.requires = self.features().iter().map(|feature| (*feature).to_owned()).collect();
        self.format = if self.requires.is_empty() { 1 } else { FORMAT };
    }

    /// Returns the features that the model needs.
    fn features(&self) -> &'static [&'static str] {
        match self.unknown.rule {
            OodMeasure::CosineSubspace => &[],
            OodMeasure::CosineAndClasses { .. } => &[UNKNOWN_CLASSES],
        }
    }

    /// Returns the manifest as indented JSON with a final newline.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("a manifest is serializable");
        json.push(b'\n');
        json
    }

    /// Replaces the list of members.
    pub(super) fn set_members(&mut self, members: &[(&str, &[u8])]) {
        self.members = members.iter().map(|(name, content)| ((*name).into(), Member::from_content(content))).collect();
    }

    /// Compares the members with the list.
    ///
    /// # Errors
    /// If a member is not listed, has another size or hash than listed, or is missing.
    pub(super) fn check_members<'a>(
        &self,
        members: impl Iterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<(), MemberError> {
        let mut missing: Vec<&String> = self.members.keys().collect();
        for (name, content) in members {
            let found = Member::from_content(content);
            match self.members.get(name) {
                None => return Err(MemberError::Unlisted(name.into())),
                Some(listed) if *listed != found => {
                    return Err(MemberError::Altered { name: name.into(), found, listed: listed.clone() });
                }
                Some(_) => missing.retain(|listed| *listed != name),
            }
        }
        missing.first().map_or(Ok(()), |name| Err(MemberError::Missing((*name).clone())))
    }
}

/// Returns the path of a field of `json` that `known` does not have; `None` if there is none.
fn unknown_field(json: &serde_json::Value, known: &serde_json::Value) -> Option<String> {
    let (json, known) = (json.as_object()?, known.as_object()?);
    json.iter().find_map(|(name, value)| match known.get(name) {
        None => Some(name.clone()),
        Some(known) => unknown_field(value, known).map(|inner| format!("{name}.{inner}")),
    })
}
