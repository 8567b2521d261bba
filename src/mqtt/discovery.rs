//! Home Assistant's MQTT device discovery: one retained message with all entities of the device (Home Assistant 2024.11 and
//! later).

use serde_json::{Value, json};

use super::message::{OFFLINE, ONLINE};
use super::topics::Topics;
use crate::vision::{Labels, Quality, UNKNOWN};

/// Options of Home Assistant's discovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscoveryOptions {
    /// Whether it is published.
    pub enabled: bool,
    /// The topic on which Home Assistant publishes `online` when it has started.
    pub status_topic: String,
}

/// Returns the payload of [`Topics::discovery`].
pub fn discovery_payload(topics: &Topics, labels: &Labels) -> Vec<u8> {
    let device = topics.device().as_str();
    let id = |component: &str| format!("bloomcast_{device}_{component}");
    let available = json!([{
        "topic": topics.status(), "payload_available": ONLINE, "payload_not_available": OFFLINE,
    }]);
    let mut options: Vec<&str> = labels.names().iter().map(String::as_str).collect();
    options.push(UNKNOWN);
    let message: Value = json!({
        "device": {
            "identifiers": [format!("bloomcast_{device}")],
            "name": device,
            "manufacturer": "bloomcast",
            "model": "flower camera",
            "sw_version": env!("CARGO_PKG_VERSION"),
        },
        "origin": { "name": "bloomcast", "sw_version": env!("CARGO_PKG_VERSION") },
        "components": {
            "class": {
                "platform": "sensor",
                "unique_id": id("class"),
                "name": "Flower",
                "icon": "mdi:flower",
                "device_class": "enum",
                "options": options,
                "state_topic": topics.state(),
                "value_template": "{{ value_json.class }}",
                "json_attributes_topic": topics.state(),
                "availability": available,
            },
            "confidence": {
                "platform": "sensor",
                "unique_id": id("confidence"),
                "name": "Confidence",
                "icon": "mdi:percent",
                "unit_of_measurement": "%",
                "state_class": "measurement",
                "suggested_display_precision": 0,
                "state_topic": topics.state(),
                "value_template": "{{ (value_json.confidence * 100) | round(1) }}",
                "availability": available,
            },
            "camera": {
                "platform": "binary_sensor",
                "unique_id": id("camera"),
                "name": "Camera",
                "device_class": "connectivity",
                "entity_category": "diagnostic",
                "state_topic": topics.state(),
                "value_template": "{{ 'ON' if value_json.camera_ok else 'OFF' }}",
                "availability": available,
            },
            "quality": {
                "platform": "sensor",
                "unique_id": id("quality"),
                "name": "Picture quality",
                "icon": "mdi:image-check",
                "device_class": "enum",
                "options": Quality::ALL.map(Quality::name),
                "entity_category": "diagnostic",
                "state_topic": topics.state(),
                "value_template": "{{ value_json.quality }}",
                "availability": available,
            },
            // Without availability: it is "off" while the device is gone.
            "connectivity": {
                "platform": "binary_sensor",
                "unique_id": id("connectivity"),
                "name": "Connection",
                "device_class": "connectivity",
                "entity_category": "diagnostic",
                "state_topic": topics.status(),
                "payload_on": ONLINE,
                "payload_off": OFFLINE,
            },
        },
        "qos": 1,
    });
    message.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::topics::DeviceName;
    use super::*;

    #[test]
    fn the_device_has_its_entities_with_topics_and_options() {
        let topics = Topics::new("bloomcast", "homeassistant", DeviceName::new("pi").unwrap());
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        let message: Value = serde_json::from_slice(&discovery_payload(&topics, &labels)).unwrap();
        let components = message["components"].as_object().unwrap();
        assert_eq!(components.len(), 5);
        let mut ids: Vec<_> = components.values().map(|c| c["unique_id"].as_str().unwrap()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 5, "ids are unique");
        assert_eq!(components["class"]["options"], json!(["daisy", "tulips", "unknown"]));
        assert_eq!(components["quality"]["options"], json!(["ok", "dark", "blank", "blurred"]));
        assert_eq!(components["class"]["state_topic"], "bloomcast/pi/state");
        assert_eq!(components["class"]["availability"][0]["topic"], "bloomcast/pi/status");
        assert!(components["connectivity"].get("availability").is_none());
        // 0.9491 · 100 = 94.91000000000001
        assert_eq!(components["confidence"]["value_template"], "{{ (value_json.confidence * 100) | round(1) }}");
        assert_eq!(message["device"]["identifiers"][0], "bloomcast_pi");
    }
}
