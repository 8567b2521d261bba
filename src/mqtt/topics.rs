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

/// What a device is asked for, by the topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order<'a> {
    /// A setting by its name.
    Set(&'a str),
    Offer,
    /// By its number.
    Chunk(u32),
    Rollback,
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

    /// What the topics begin with.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// A new model is offered.
    pub fn offer(&self) -> String {
        format!("{}/model/offer", self.root)
    }

    /// A piece of it.
    pub fn chunk(&self, number: u32) -> String {
        format!("{}/model/chunk/{number}", self.root)
    }

    /// Asks for the model before.
    pub fn rollback(&self) -> String {
        format!("{}/model/rollback", self.root)
    }

    /// What became of an offer or of a model.
    pub fn answer(&self) -> String {
        format!("{}/model/answer", self.root)
    }

    /// How much of a new model is there.
    pub fn progress(&self) -> String {
        format!("{}/model/progress", self.root)
    }

    /// The filters of all that a device listens to.
    pub fn orders(&self) -> [String; 4] {
        [format!("{}/set/+", self.root), self.offer(), format!("{}/model/chunk/+", self.root), self.rollback()]
    }

    /// What a message on one of [`Self::orders`] is.
    pub fn order<'a>(&self, topic: &'a str) -> Option<Order<'a>> {
        let below = topic.strip_prefix(&self.root)?;
        match below {
            "/model/offer" => Some(Order::Offer),
            "/model/rollback" => Some(Order::Rollback),
            _ => match below.strip_prefix("/model/chunk/") {
                Some(number) => number.parse().ok().map(Order::Chunk),
                None => below.strip_prefix("/set/").map(Order::Set),
            },
        }
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
        assert_eq!(topics.order("house/bloomcast/pi/set/pause"), Some(Order::Set("pause")));
        assert_eq!(topics.order("house/bloomcast/other/set/pause"), None);
        assert_eq!(topics.order(&topics.chunk(7)), Some(Order::Chunk(7)));
        assert_eq!(topics.order("house/bloomcast/pi/model/chunk/-1"), None);
        assert_eq!(topics.order(&topics.offer()), Some(Order::Offer));
        assert_eq!(topics.order(&topics.rollback()), Some(Order::Rollback));
    }
}
