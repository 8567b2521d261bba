//! The JSON of the device's messages, schema 1. A field is never removed or renamed within a schema number.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use humantime::format_rfc3339_millis;
use serde::Serialize;
use uuid::Uuid;

use crate::decide::{self, Observation};
use crate::vision::labels::ClassName;
use crate::vision::{Region, UNKNOWN};
use crate::vision_stage::ActiveSettings;

/// The schema number of every message.
pub const SCHEMA: u32 = 1;

/// Payload of `…/status` while the device is connected.
pub const ONLINE: &str = "online";
/// Payload of `…/status` after it has disconnected; also its last will.
pub const OFFLINE: &str = "offline";

/// Encodes a device's observations and events.
#[derive(Debug, Clone)]
pub struct Encoder {
    /// Name of the device.
    pub device: String,
    /// Name of the camera.
    pub camera: String,
}

/// An entry of `top`.
#[derive(Debug, Serialize)]
struct Ranked<'a> {
    class: &'a str,
    confidence: f32,
}

/// An entry of `found`.
#[derive(Debug, Serialize)]
struct Found<'a> {
    class: &'a str,
    confidence: f32,
    /// Left, top, width and height, as shares of the frame.
    #[serde(rename = "box")]
    bounds: [f32; 4],
}

/// Payload of `…/state`.
#[derive(Debug, Serialize)]
struct State<'a> {
    schema: u32,
    device: &'a str,
    camera: &'a str,
    class: &'a str,
    confidence: f32,
    top: Vec<Ranked<'a>>,
    #[serde(rename = "box")]
    bounds: Option<[f32; 4]>,
    found: Vec<Found<'a>>,
    since: String,
    captured_at: String,
    camera_ok: bool,
    quality: &'a str,
    paused: bool,
    model: u64,
}

/// Payload of `…/event`.
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
    #[serde(rename = "box")]
    bounds: Option<[f32; 4]>,
    found: Vec<Found<'a>>,
    captured_at: String,
    model: u64,
}

/// Payload of `…/settings`.
#[derive(Debug, Serialize)]
struct SettingsMessage<'a> {
    schema: u32,
    pause: bool,
    interval_ms: u64,
    smoothing_ms: u64,
    enter: f32,
    leave: f32,
    enter_dwell_ms: u64,
    leave_dwell_ms: u64,
    /// Thresholds of the classes that have their own.
    classes: BTreeMap<&'a str, Hysteresis>,
}

/// The thresholds of a class.
#[derive(Debug, Serialize)]
struct Hysteresis {
    enter: f32,
    leave: f32,
}

impl Encoder {
    /// Returns the payload of `…/state`.
    pub fn state(&self, observation: &Observation) -> Vec<u8> {
        json(&State {
            schema: SCHEMA,
            device: &self.device,
            camera: &self.camera,
            class: name(observation.class.as_ref()),
            confidence: rounded(observation.confidence),
            top: ranked(&observation.top),
            bounds: decide::region_of(&observation.found, observation.class.as_ref()).map(bounds),
            found: found(&observation.found),
            since: time(observation.since),
            captured_at: time(observation.captured_at),
            camera_ok: observation.camera_ok,
            quality: observation.quality.name(),
            paused: observation.paused,
            model: observation.model,
        })
    }

    /// Returns the payload of `…/settings`.
    pub fn settings(settings: &ActiveSettings) -> Vec<u8> {
        let ms = |duration: Duration| duration.as_millis() as u64;
        let own = settings.class_thresholds.iter();
        let own = own.map(|(class, own)| (&**class, Hysteresis { enter: own.enter, leave: own.leave }));
        json(&SettingsMessage {
            schema: SCHEMA,
            pause: settings.paused,
            interval_ms: ms(settings.interval),
            smoothing_ms: ms(settings.smoothing),
            enter: settings.thresholds.enter,
            leave: settings.thresholds.leave,
            enter_dwell_ms: ms(settings.enter_dwell),
            leave_dwell_ms: ms(settings.leave_dwell),
            classes: own.collect(),
        })
    }

    /// Returns the payload of `…/event`; `id` is a UUIDv7, which sorts by time.
    pub fn event(&self, id: Uuid, event: &decide::Event) -> Vec<u8> {
        json(&Event {
            schema: SCHEMA,
            id: id.to_string(),
            device: &self.device,
            camera: &self.camera,
            class: name(event.class.as_ref()),
            previous: name(event.previous.as_ref()),
            confidence: rounded(event.confidence),
            top: ranked(&event.top),
            bounds: decide::region_of(&event.found, event.class.as_ref()).map(bounds),
            found: found(&event.found),
            captured_at: time(event.captured_at),
            model: event.model,
        })
    }
}

fn name(class: Option<&ClassName>) -> &str {
    class.map_or(UNKNOWN, |class| class)
}

fn ranked(top: &[decide::Ranked]) -> Vec<Ranked<'_>> {
    top.iter().map(|entry| Ranked { class: &entry.class, confidence: rounded(entry.confidence) }).collect()
}

fn found(found: &decide::AllFound) -> Vec<Found<'_>> {
    let entries = found.iter();
    entries
        .map(|decide::Found { class, confidence, region }| Found {
            class,
            confidence: rounded(*confidence),
            bounds: bounds(*region),
        })
        .collect()
}

fn bounds(region: Region) -> [f32; 4] {
    region.bounds().map(rounded)
}

/// Rounds to four digits, which exceeds the calibration's precision.
fn rounded(value: f32) -> f32 {
    (value.clamp(0.0, 1.0) * 1e4).round() / 1e4
}

/// Returns a time as RFC 3339, UTC, milliseconds.
pub fn time(at: SystemTime) -> String {
    format_rfc3339_millis(at).to_string()
}

/// Returns a message as JSON.
///
/// # Panics
/// If it has a map with keys that are not strings, which no message has.
pub fn json(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("a message of strings and numbers can be written as JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::Thresholds;
    use crate::vision::{Labels, Quality};

    /// The wire format is stable: a change of these texts needs another schema number.
    #[test]
    fn messages_keep_their_schema() {
        let encoder = Encoder { device: "pi".into(), camera: "window".into() };
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        let ranked = |class: usize, confidence| decide::Ranked { class: labels.class_name(class), confidence };
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let (class, confidence) = (Some(labels.class_name(1)), 0.912_345);
        let top: decide::Top = smallvec::smallvec![ranked(1, 0.912_345), ranked(0, 0.05)];
        let place = |class: usize, bounds| decide::Found {
            class: labels.class_name(class),
            confidence: 0.75,
            region: Region::new(bounds).unwrap(),
        };
        let found: decide::AllFound =
            smallvec::smallvec![place(0, [0.0, 0.5, 0.25, 0.5]), place(1, [0.123_456, 0.25, 0.5, 0.5])];
        let observation = Observation {
            class: class.clone(),
            confidence,
            top: top.clone(),
            found: found.clone(),
            since: at(1_500),
            captured_at: at(2_000),
            camera_ok: true,
            quality: Quality::Dark,
            paused: false,
            model: 7,
        };
        let event = decide::Event { class, previous: None, confidence, top, found, captured_at: at(2_000), model: 7 };
        assert_eq!(
            String::from_utf8(encoder.state(&observation)).unwrap(),
            r#"{"schema":1,"device":"pi","camera":"window","class":"tulips","confidence":0.9123,"top":[{"class":"tulips","confidence":0.9123},{"class":"daisy","confidence":0.05}],"box":[0.1235,0.25,0.5,0.5],"found":[{"class":"daisy","confidence":0.75,"box":[0.0,0.5,0.25,0.5]},{"class":"tulips","confidence":0.75,"box":[0.1235,0.25,0.5,0.5]}],"since":"1970-01-01T00:00:01.500Z","captured_at":"1970-01-01T00:00:02.000Z","camera_ok":true,"quality":"dark","paused":false,"model":7}"#
        );
        assert_eq!(
            String::from_utf8(encoder.event(Uuid::nil(), &event)).unwrap(),
            r#"{"schema":1,"id":"00000000-0000-0000-0000-000000000000","device":"pi","camera":"window","class":"tulips","previous":"unknown","confidence":0.9123,"top":[{"class":"tulips","confidence":0.9123},{"class":"daisy","confidence":0.05}],"box":[0.1235,0.25,0.5,0.5],"found":[{"class":"daisy","confidence":0.75,"box":[0.0,0.5,0.25,0.5]},{"class":"tulips","confidence":0.75,"box":[0.1235,0.25,0.5,0.5]}],"captured_at":"1970-01-01T00:00:02.000Z","model":7}"#
        );
    }
    #[test]
    fn settings_are_in_the_units_of_their_names() {
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        let settings = ActiveSettings {
            paused: false,
            interval: Duration::from_millis(200),
            smoothing: Duration::from_millis(400),
            enter_dwell: Duration::from_millis(600),
            leave_dwell: Duration::from_millis(1200),
            thresholds: Thresholds { enter: 0.7, leave: 0.45 },
            class_thresholds: vec![(labels.class_name(1), Thresholds { enter: 0.9, leave: 0.5 })],
        };
        assert_eq!(
            String::from_utf8(Encoder::settings(&settings)).unwrap(),
            r#"{"schema":1,"pause":false,"interval_ms":200,"smoothing_ms":400,"enter":0.7,"leave":0.45,"enter_dwell_ms":600,"leave_dwell_ms":1200,"classes":{"tulips":{"enter":0.9,"leave":0.5}}}"#
        );
    }
}
