//! What a bundle says of itself.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::system::hash::sha256_hex;
use crate::vision::labels::NAME_BYTES_MAX;
use crate::vision::{Labels, Preprocess};

/// The member that holds it.
pub const NAME: &str = "manifest.json";
/// The member that vouches for it.
pub const SIGNATURE: &str = "manifest.json.sig";
/// A manifest with as many and as long class names as there may be is smaller.
pub const BYTES_MAX: usize = 256 << 10;
/// The format this program writes, and the only one it reads.
pub const FORMAT: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    pub name: String,
    /// Larger is newer. By default the time of training, `YYYYMMDDhhmmss` in UTC.
    pub version: u64,
    /// RFC 3339, UTC.
    pub created_at: String,
    pub classes: Labels,
    pub backbone: BackboneRef,
    pub preprocess: Preprocess,
    /// Divides the logits; fitted on the validation set.
    pub temperature: f32,
    pub unknown: Unknown,
    pub dataset: DatasetRef,
    /// On the validation set.
    pub metrics: Metrics,
    pub seed: u64,
    /// The program that trained it, with its version.
    pub program: String,
    /// Every other member of the bundle.
    pub members: BTreeMap<String, Member>,
}

/// Which model it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub name: String,
    pub version: u64,
    /// Of the whole file, in hexadecimal.
    pub sha256: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

/// The network a model stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneRef {
    pub name: String,
    /// Of the ONNX file, in hexadecimal.
    pub sha256: String,
    /// The tensor the head looks at.
    pub feature: String,
    /// Numbers in it.
    pub width: usize,
}

/// When a picture is none of the classes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unknown {
    pub rule: UnknownRule,
    pub threshold: f32,
    /// The share of the validation set's pictures that the threshold rejects, 0–1.
    pub rejected_share: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnknownRule {
    /// The cosine of the angle to the subspace of the classes is below the threshold.
    CosineSubspace,
}

/// What it was taught with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetRef {
    /// Over the classes and the files' contents, in order.
    pub sha256: String,
    pub train_images: usize,
    pub val_images: usize,
}

/// How good it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Share of pictures whose best class is right, 0–1; nothing is rejected as unknown here.
    pub accuracy: f64,
    /// Mean cross-entropy after the temperature, in nats.
    pub loss: f64,
    /// Expected calibration error after the temperature, 0–1.
    pub ece: f64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    pub sha256: String,
    pub bytes: usize,
}

impl Member {
    fn of(content: &[u8]) -> Self {
        Member { sha256: sha256_hex(content), bytes: content.len() }
    }
}

/// Refuses what no model and no network may be called; gives what was expected.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(format!("1 to {NAME_BYTES_MAX} bytes without control characters"));
    }
    Ok(())
}

impl Manifest {
    /// Checks the format before anything else, so that a newer bundle is named as such.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if format != FORMAT {
            return Err(format!("format {format}, this program reads {FORMAT}"));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        for (key, text) in [("name", &manifest.name), ("backbone.name", &manifest.backbone.name)] {
            check_name(text).map_err(|expected| format!("{key}: expected {expected}"))?;
        }
        manifest.preprocess.check().map_err(|e| e.to_string())?;
        Ok(manifest)
    }

    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("a manifest can be written as JSON");
        json.push(b'\n');
        json
    }

    pub(super) fn set_members(&mut self, members: &[(&str, &[u8])]) {
        self.members = members.iter().map(|(name, content)| ((*name).into(), Member::of(content))).collect();
    }

    /// Every member that the manifest names is there, is what it says, and no other is there.
    pub(super) fn check_members<'a>(&self, members: impl Iterator<Item = (&'a str, &'a [u8])>) -> Result<(), String> {
        let mut left: Vec<&String> = self.members.keys().collect();
        for (name, content) in members {
            let found = Member::of(content);
            match self.members.get(name) {
                None => return Err(format!("{NAME} does not name {name}")),
                Some(member) if *member != found => {
                    return Err(format!(
                        "{name} was altered: {} bytes and sha256 {}, {NAME} says {} and {}",
                        found.bytes, found.sha256, member.bytes, member.sha256
                    ));
                }
                Some(_) => left.retain(|named| *named != name),
            }
        }
        left.first().map_or(Ok(()), |missing| Err(format!("{NAME} names {missing}, which is missing")))
    }
}
