//! Topic names.

use std::fmt;

/// A device's name: a level of its topics and a part of its ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceName(String);

/// The longest device name, in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// The longest topic prefix, in bytes.
pub const PREFIX_BYTES_MAX: usize = 128;

/// A name or prefix that cannot be used in topics.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// A device name is invalid.
    #[error("expected 1 to {NAME_BYTES_MAX} letters (a–z, A–Z), digits, - or _")]
    Name,
    /// A topic prefix is invalid.
    #[error(
        "expected 1 to {PREFIX_BYTES_MAX} bytes, non-empty levels, without +, #, $ at the start or control characters"
    )]
    Prefix,
}

impl DeviceName {
    /// Validates a name and creates it.
    ///
    /// # Errors
    /// If it is empty, too long, or has other characters than ASCII letters, digits, `-` and `_`.
    pub fn new(name: &str) -> Result<Self, TopicError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(allowed) {
            return Err(TopicError::Name);
        }
        Ok(DeviceName(name.into()))
    }

    /// Returns the name for a host: the part before the first dot, with `-` for other characters than those of
    /// [`DeviceName::new`]; `None` if nothing is left.
    pub fn from_host(host: &str) -> Option<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let first = host.split('.').next()?;
        let name: String = first.chars().map(|c| if allowed(c) { c } else { '-' }).take(NAME_BYTES_MAX).collect();
        DeviceName::new(&name).ok()
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks the prefix of topics: non-empty levels without wildcards.
///
/// # Errors
/// If it cannot be the beginning of a topic.
pub fn check_prefix(prefix: &str) -> Result<(), TopicError> {
    let forbidden = |c: char| c == '+' || c == '#' || c.is_control();
    let empty_level = prefix.split('/').any(str::is_empty);
    if empty_level || prefix.len() > PREFIX_BYTES_MAX || prefix.starts_with('$') || prefix.chars().any(forbidden) {
        return Err(TopicError::Prefix);
    }
    Ok(())
}

/// A request to a device, by its topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// A setting by its name.
    Set(&'a str),
    /// A model is offered.
    Offer,
    /// A chunk of it, by its number.
    Chunk(u32),
    /// The model is to be rolled back.
    Rollback,
}

/// The topics of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topics {
    base: String,
    root: String,
    discovery_prefix: String,
    device: DeviceName,
}

impl Topics {
    /// Creates the topics of a device. `base` and `discovery_prefix` are prefixes that [`check_prefix`] accepts.
    pub fn new(base: &str, discovery_prefix: &str, device: DeviceName) -> Self {
        Topics {
            base: base.into(),
            root: format!("{base}/{device}"),
            discovery_prefix: discovery_prefix.into(),
            device,
        }
    }

    /// Returns the topics of another device with the same base and discovery prefix.
    pub fn for_device(&self, device: DeviceName) -> Self {
        Topics::new(&self.base, &self.discovery_prefix, device)
    }

    /// The device.
    pub fn device(&self) -> &DeviceName {
        &self.device
    }

    /// `online` or `offline`, retained.
    pub fn status(&self) -> String {
        format!("{}/status", self.root)
    }

    /// The newest observation, retained.
    pub fn state(&self) -> String {
        format!("{}/state", self.root)
    }

    /// Events.
    pub fn event(&self) -> String {
        format!("{}/event", self.root)
    }

    /// The active model, retained.
    pub fn model(&self) -> String {
        format!("{}/model", self.root)
    }

    /// The beginning of all the topics: base and device.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Offers of a model, to the device.
    pub fn offer(&self) -> String {
        format!("{}/model/offer", self.root)
    }

    /// A chunk of an offered model, to the device.
    pub fn chunk(&self, number: u32) -> String {
        format!("{}/model/chunk/{number}", self.root)
    }

    /// Requests to roll back, to the device.
    pub fn rollback(&self) -> String {
        format!("{}/model/rollback", self.root)
    }

    /// The update agent's answers.
    pub fn answer(&self) -> String {
        format!("{}/model/answer", self.root)
    }

    /// Progress of a transfer.
    pub fn progress(&self) -> String {
        format!("{}/model/progress", self.root)
    }

    /// The settings in force, retained.
    pub fn settings(&self) -> String {
        format!("{}/settings", self.root)
    }

    /// The filters that a device subscribes to.
    pub fn request_filters(&self) -> Vec<String> {
        [vec![format!("{}/set/+", self.root)], self.model_filters()].concat()
    }

    /// The same, with a filter for each of these settings instead of one for all topics under `…/set/`.
    pub fn single_request_filters(&self, settings: &[&str]) -> Vec<String> {
        let settings = settings.iter().map(|setting| format!("{}/set/{setting}", self.root));
        settings.chain(self.model_filters()).collect()
    }

    fn model_filters(&self) -> Vec<String> {
        // The filter of several topics last: see `subscriptions`.
        vec![self.offer(), self.rollback(), format!("{}/model/chunk/+", self.root)]
    }

    /// Parses a topic of [`Topics::request_filters`]; `None` for any other.
    pub fn parse_request<'a>(&self, topic: &'a str) -> Option<Request<'a>> {
        let below = topic.strip_prefix(&self.root)?;
        match below {
            "/model/offer" => Some(Request::Offer),
            "/model/rollback" => Some(Request::Rollback),
            _ => match below.strip_prefix("/model/chunk/") {
                Some(number) => number.parse().ok().map(Request::Chunk),
                None => below.strip_prefix("/set/").map(Request::Set),
            },
        }
    }

    /// Home Assistant's device discovery, retained.
    pub fn discovery(&self) -> String {
        format!("{}/device/{}/config", self.discovery_prefix, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_prefixes_and_requests_are_checked() {
        for good in ["pi", "garden-2", "A_b"] {
            assert!(DeviceName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "a/b", "a b", "+", "ä", &"x".repeat(65)] {
            assert_eq!(DeviceName::new(bad), Err(TopicError::Name), "{bad}");
        }
        for (host, name) in [("pi", "pi"), ("pi.lan", "pi"), ("my pi.home.arpa", "my-pi"), ("gärten", "g-rten")] {
            assert_eq!(DeviceName::from_host(host).unwrap().as_str(), name);
        }
        assert_eq!((DeviceName::from_host(""), DeviceName::from_host(".lan")), (None, None));
        for bad in ["", "/a", "a//b", "a/", "a/+", "#", "$SYS", "a\u{7}"] {
            assert_eq!(check_prefix(bad), Err(TopicError::Prefix), "{bad}");
        }
        assert_eq!(check_prefix("house/bloomcast"), Ok(()));
        let topics = Topics::new("house/bloomcast", "homeassistant", DeviceName::new("pi").unwrap());
        assert_eq!(topics.state(), "house/bloomcast/pi/state");
        assert_eq!(topics.discovery(), "homeassistant/device/pi/config");
        assert_eq!(topics.parse_request("house/bloomcast/pi/set/pause"), Some(Request::Set("pause")));
        assert_eq!(topics.parse_request("house/bloomcast/other/set/pause"), None);
        assert_eq!(topics.parse_request(&topics.chunk(7)), Some(Request::Chunk(7)));
        assert_eq!(topics.parse_request("house/bloomcast/pi/model/chunk/-1"), None);
        assert_eq!(topics.parse_request(&topics.offer()), Some(Request::Offer));
        assert_eq!(topics.parse_request(&topics.rollback()), Some(Request::Rollback));
    }
}
