//! Other networks that are known by name: where they are published, and how their input is made.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::vision::Preprocess;

const ZOO: &str = include_str!("../models/zoo.toml");

/// A network that somebody publishes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    pub name: String,
    pub about: String,
    /// Its file's name.
    pub file: String,
    /// In hexadecimal.
    pub sha256: String,
    pub bytes: u64,
    pub licence: String,
    /// Where it can be fetched, tried in order; none where it has to be made.
    pub urls: Vec<String>,
    pub preprocess: Preprocess,
}

#[derive(Deserialize)]
struct Zoo {
    backbone: Vec<Published>,
}

/// Where fetched networks lie, in the user's cache.
pub fn folder() -> Option<PathBuf> {
    crate::system::paths::user_cache().map(|cache| cache.join("backbones"))
}

pub fn all() -> Vec<Published> {
    let zoo: Zoo = toml::from_str(ZOO).expect("the zoo inside the program is good; a test reads it");
    zoo.backbone
}

pub fn named(name: &str) -> Option<Published> {
    all().into_iter().find(|published| published.name == name)
}

pub fn with_sha256(sha256: &str) -> Option<Published> {
    all().into_iter().find(|published| published.sha256 == sha256)
}

impl Published {
    /// Where a fetched one lies.
    pub fn place(&self, folder: &Path) -> PathBuf {
        folder.join(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_whole() {
        assert!(all().len() >= 5);
        for published in all() {
            published.preprocess.check().unwrap();
            assert_eq!(published.sha256.len(), 64, "{}", published.name);
            assert!(published.bytes > 1 << 20 && published.file.ends_with(".onnx"));
            assert_eq!(named(&published.name).as_ref(), Some(&published));
            assert_eq!(with_sha256(&published.sha256), Some(published));
        }
        assert_eq!(named("none"), None);
    }
}
