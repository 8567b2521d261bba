//! The zoo: published backbones by name, with their addresses, checksums and preprocessing.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::vision::Preprocess;

const ZOO: &str = include_str!("../models/zoo.toml");

/// A published backbone, an entry of `models/zoo.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZooEntry {
    /// Name on the command line.
    pub name: String,
    /// Description in one line.
    pub about: String,
    /// File name of the ONNX file.
    pub file: String,
    /// SHA-256 of the ONNX file, in hexadecimal.
    pub sha256: String,
    /// Size of the ONNX file, bytes.
    pub bytes: u64,
    /// SPDX identifier of the licence.
    pub licence: String,
    /// Addresses of the ONNX file, tried in order; empty if it is not published as ONNX.
    pub urls: Vec<String>,
    /// Preprocessing of its input.
    pub preprocess: Preprocess,
}

#[derive(Deserialize)]
struct Zoo {
    backbone: Vec<ZooEntry>,
}

/// Returns the folder of fetched backbones in the user's cache; `None` if the user has no home directory.
pub fn folder() -> Option<PathBuf> {
    crate::system::paths::user_cache().map(|cache| cache.join("backbones"))
}

/// Returns all entries, in the order of `models/zoo.toml`.
pub fn all() -> Vec<ZooEntry> {
    let zoo: Zoo = toml::from_str(ZOO).expect("models/zoo.toml is valid; a unit test parses it");
    zoo.backbone
}

/// Returns the entry with this name.
pub fn named(name: &str) -> Option<ZooEntry> {
    all().into_iter().find(|entry| entry.name == name)
}

/// Returns the entry with this SHA-256, in lower-case hexadecimal.
pub fn with_sha256(sha256: &str) -> Option<ZooEntry> {
    all().into_iter().find(|entry| entry.sha256 == sha256)
}

impl ZooEntry {
    /// Returns the path of its ONNX file in `folder`.
    pub fn path_in(&self, folder: &Path) -> PathBuf {
        folder.join(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_valid() {
        assert!(all().len() >= 5);
        for entry in all() {
            entry.preprocess.check().unwrap();
            assert_eq!(entry.sha256.len(), 64, "{}", entry.name);
            assert!(entry.bytes > 1 << 20 && entry.file.ends_with(".onnx"));
            assert_eq!(named(&entry.name).as_ref(), Some(&entry));
            assert_eq!(with_sha256(&entry.sha256), Some(entry));
        }
        assert_eq!(named("none"), None);
    }
}
