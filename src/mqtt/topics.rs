//! Where messages go.

use std::fmt;

/// A device's name, which is a level of its topics and part of its ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceName(String);

pub const NAME_BYTES_MAX: usize = 64;
pub const PREFIX_BYTES_MAX: usize = 128;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    #[error("expected 1 to {NAME_BYTES_MAX} letters (a–z, A–Z), digits, - or _")]
    Name,
    #[error(
        "expected 1 to {PREFIX_BYTES_MAX} bytes, levels that are not empty, without +, #, $ at the start or control characters"
    )]
    Prefix,
}

impl DeviceName {
    pub fn new(name: &str) -> Result<Self, TopicError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
            return Err(TopicError::Name);
        }
        Ok(DeviceName(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a topic may begin with: levels that are not empty, and nothing that a broker takes for a wildcard.
pub fn check_prefix(prefix: &str) -> Result<(), TopicError> {
    let bad = |c: char| c == '+' || c == '#' || c.is_control();
    let empty_level = prefix.split('/').any(str::is_empty);
    if empty_level || prefix.len() > PREFIX_BYTES_MAX || prefix.starts_with('$') || prefix.chars().any(bad) {
        return Err(TopicError::Prefix);
    }
    Ok(())
}

/// The topics of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topics {
    root: String,
    discovery_prefix: String,
    device: DeviceName,
}

impl Topics {
    /// `base` and `discovery_prefix` as [`check_prefix`] wants them.
    pub fn new(base: &str, discovery_prefix: &str, device: DeviceName) -> Self {
        Topics { root: format!("{base}/{device}"), discovery_prefix: discovery_prefix.into(), device }
    }

    pub fn device(&self) -> &DeviceName {
        &self.device
    }

    pub fn status(&self) -> String {
        format!("{}/status", self.root)
    }

    pub fn state(&self) -> String {
        format!("{}/state", self.root)
    }

    pub fn event(&self) -> String {
        format!("{}/event", self.root)
    }

    pub fn model(&self) -> String {
        format!("{}/model", self.root)
    }

    /// The filter of all settings.
    pub fn set_all(&self) -> String {
        format!("{}/set/+", self.root)
    }

    /// The setting that a topic under `…/set/` names.
    pub fn setting_of<'a>(&self, topic: &'a str) -> Option<&'a str> {
        topic.strip_prefix(&self.root)?.strip_prefix("/set/")
    }

    pub fn discovery(&self) -> String {
        format!("{}/device/{}/config", self.discovery_prefix, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_bases_are_checked() {
        for good in ["pi", "garden-2", "A_b"] {
            assert!(DeviceName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "a/b", "a b", "+", "ä", &"x".repeat(65)] {
            assert_eq!(DeviceName::new(bad), Err(TopicError::Name), "{bad}");
        }
        for bad in ["", "/a", "a//b", "a/", "a/+", "#", "$SYS", "a\u{7}"] {
            assert_eq!(check_prefix(bad), Err(TopicError::Prefix), "{bad}");
        }
        assert_eq!(check_prefix("house/bloomcast"), Ok(()));
        let topics = Topics::new("house/bloomcast", "homeassistant", DeviceName::new("pi").unwrap());
        assert_eq!(topics.state(), "house/bloomcast/pi/state");
        assert_eq!(topics.discovery(), "homeassistant/device/pi/config");
        assert_eq!(topics.setting_of("house/bloomcast/pi/set/pause"), Some("pause"));
        assert_eq!(topics.setting_of("house/bloomcast/other/set/pause"), None);
    }
}
