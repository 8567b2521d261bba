//! The topics on which discovery was published, kept in a file: after a change of prefix or name, or when discovery is switched
//! off, Home Assistant keeps the device until the old topic is emptied, also if the program was restarted meanwhile.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tracing::warn;

use super::topics::check_prefix;

/// Name of the file in the folder of the models.
const FILE: &str = "discovery-topics";
/// The most topics that are remembered.
const TOPICS_MAX: usize = 64;

/// The topics on which discovery was published and not emptied since.
#[derive(Debug, Default)]
pub struct DiscoveryRecord {
    file: Option<PathBuf>,
    topics: Vec<String>,
}

impl DiscoveryRecord {
    /// Reads the record from a folder; without one, it is kept in memory.
    pub fn read(folder: Option<&Path>) -> Self {
        let file = folder.map(|folder| folder.join(FILE));
        let text = file.as_ref().and_then(|file| match fs::read_to_string(file) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                warn!("{}: {error}; earlier discovery messages may stay", file.display());
                None
            }
        });
        let text = text.unwrap_or_default();
        let topics =
            text.lines().filter(|topic| check_prefix(topic).is_ok()).take(TOPICS_MAX).map(str::to_owned).collect();
        DiscoveryRecord { file, topics }
    }

    /// Returns these topics as the record of a folder, with those of its file.
    pub fn at(self, folder: Option<&Path>) -> Self {
        let mut record = Self::read(folder);
        self.topics.iter().for_each(|topic| record.add(topic));
        record
    }

    /// Returns the topics that are to be emptied, all but `present`.
    pub(super) fn outdated(&self, present: Option<&str>) -> Vec<String> {
        self.topics.iter().filter(|topic| Some(topic.as_str()) != present).cloned().collect()
    }

    /// Adds a topic, before discovery is published on it.
    pub(super) fn add(&mut self, topic: &str) {
        if !self.topics.iter().any(|known| known == topic) {
            self.topics.push(topic.to_owned());
            self.write();
        }
    }

    /// Removes the topics that have been emptied, all but `present`.
    pub(super) fn keep(&mut self, present: Option<&str>) {
        let before = self.topics.len();
        self.topics.retain(|topic| Some(topic.as_str()) == present);
        if self.topics.len() != before {
            self.write();
        }
    }

    fn write(&self) {
        let Some(file) = &self.file else { return };
        let beside = file.with_extension("new");
        let text: String = self.topics.iter().flat_map(|topic| [topic, "\n"]).collect();
        let folder = file.parent().unwrap_or(Path::new(""));
        let write = |mut file: fs::File| file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
        let written = fs::create_dir_all(folder).and_then(|()| fs::File::create(&beside)).and_then(write);
        if let Err(error) = written.and_then(|()| fs::rename(&beside, file)) {
            warn!("{}: {error}; the present discovery topic is not remembered", file.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_remembered_until_they_are_emptied() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("store");
        let mut record = DiscoveryRecord::read(Some(&folder));
        record.add("a/device/pi/config");
        record.add("a/device/pi/config");
        let mut record = DiscoveryRecord::read(Some(&folder));
        assert_eq!(record.outdated(Some("a/device/pi/config")), [""; 0]);
        assert_eq!(record.outdated(None), ["a/device/pi/config"]);
        record.add("b/device/pi/config");
        assert_eq!(record.outdated(Some("b/device/pi/config")), ["a/device/pi/config"]);
        record.keep(Some("b/device/pi/config"));
        assert_eq!(DiscoveryRecord::read(Some(&folder)).outdated(None), ["b/device/pi/config"]);
        fs::write(folder.join(FILE), "#\nb/device/pi/config\n").unwrap();
        assert_eq!(DiscoveryRecord::read(Some(&folder)).outdated(None), ["b/device/pi/config"], "no wildcard");
        let mut in_memory = DiscoveryRecord::read(None);
        in_memory.add("a");
        assert_eq!(in_memory.outdated(None), ["a"]);
    }
}
