//! What stands in the messages. A field is never removed or renamed within a schema number.

use std::time::SystemTime;

use humantime::format_rfc3339_millis;
use serde::Serialize;
use uuid::Uuid;

use crate::decide::Sight;
use crate::vision::Labels;

pub const SCHEMA: u32 = 1;

pub const ONLINE: &str = "online";
pub const OFFLINE: &str = "offline";

/// What all messages of a daemon have in common.
#[derive(Debug, Clone)]
pub struct Sender {
    pub device: String,
    pub camera: String,
    pub labels: Labels,
    /// Version of the model.
    pub model: u64,
}

/// A class and its value.
#[derive(Debug, Serialize)]
struct Ranked<'a> {
    class: &'a str,
    confidence: f32,
}

#[derive(Debug, Serialize)]
struct State<'a> {
    schema: u32,
    device: &'a str,
    camera: &'a str,
    class: &'a str,
    confidence: f32,
    top: Vec<Ranked<'a>>,
    since: String,
    captured_at: String,
    camera_ok: bool,
    paused: bool,
    model: u64,
}

#[derive(Debug, Serialize)]
struct Event<'a> {
    schema: u32,
    id: String,
    device: &'a str,
    camera: &'a str,
    class: &'a str,
    previous: &'a str,
    confidence: f32,
    top: Vec<Ranked<'a>>,
    captured_at: String,
    model: u64,
}

impl Sender {
    /// What is seen now.
    pub fn state(&self, sight: &Sight, paused: bool) -> Vec<u8> {
        json(&State {
            schema: SCHEMA,
            device: &self.device,
            camera: &self.camera,
            class: self.labels.name(sight.class),
            confidence: rounded(sight.confidence),
            top: self.ranked(sight),
            since: time(sight.since),
            captured_at: time(sight.captured_at),
            camera_ok: sight.camera_ok,
            paused,
            model: self.model,
        })
    }

    /// What changed, with an id that sorts by time.
    pub fn event(&self, id: Uuid, sight: &Sight, previous: Option<usize>) -> Vec<u8> {
        json(&Event {
            schema: SCHEMA,
            id: id.to_string(),
            device: &self.device,
            camera: &self.camera,
            class: self.labels.name(sight.class),
            previous: self.labels.name(previous),
            confidence: rounded(sight.confidence),
            top: self.ranked(sight),
            captured_at: time(sight.captured_at),
            model: self.model,
        })
    }

    fn ranked(&self, sight: &Sight) -> Vec<Ranked<'_>> {
        let ranked = |(class, value): &(usize, f32)| Ranked {
            class: self.labels.name(Some(*class)),
            confidence: rounded(*value),
        };
        sight.top.iter().map(ranked).collect()
    }
}

/// Four digits: more would claim more than is known.
fn rounded(value: f32) -> f32 {
    (value.clamp(0.0, 1.0) * 1e4).round() / 1e4
}

/// RFC 3339, UTC, milliseconds.
pub fn time(at: SystemTime) -> String {
    format_rfc3339_millis(at).to_string()
}

pub fn json(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("a message of strings and numbers can be written as JSON")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The wire format is a promise: whoever changes this text changes the schema number.
    #[test]
    fn messages_are_as_promised() {
        let sender = Sender {
            device: "pi".into(),
            camera: "window".into(),
            labels: Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap(),
            model: 7,
        };
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let sight = Sight {
            class: Some(1),
            confidence: 0.912_345,
            top: smallvec::smallvec![(1, 0.912_345), (0, 0.05)],
            since: at(1_500),
            captured_at: at(2_000),
            camera_ok: true,
        };
        assert_eq!(
            String::from_utf8(sender.state(&sight, false)).unwrap(),
            r#"{"schema":1,"device":"pi","camera":"window","class":"tulips","confidence":0.9123,"top":[{"class":"tulips","confidence":0.9123},{"class":"daisy","confidence":0.05}],"since":"1970-01-01T00:00:01.500Z","captured_at":"1970-01-01T00:00:02.000Z","camera_ok":true,"paused":false,"model":7}"#
        );
        assert_eq!(
            String::from_utf8(sender.event(Uuid::nil(), &sight, None)).unwrap(),
            r#"{"schema":1,"id":"00000000-0000-0000-0000-000000000000","device":"pi","camera":"window","class":"tulips","previous":"unknown","confidence":0.9123,"top":[{"class":"tulips","confidence":0.9123},{"class":"daisy","confidence":0.05}],"captured_at":"1970-01-01T00:00:02.000Z","model":7}"#
        );
    }
}
