//! Retained messages: those that the device refuses, and those that it repeats, moves and removes.

use super::broker::Mosquitto;
use super::daemon::{alternating_drawings, replay_command};
use super::mqtt::{Listener, publish, publish_retained};
use super::tools::{Process, TIMEOUT};

/// More than the largest packet that the device accepts.
const TOO_LARGE: usize = 1_100_000;
const DISCOVERY: &str = "homeassistant/device/pi/config";

/// Stops the daemon; it has lost no event.
fn stop_without_loss(daemon: &mut Process) {
    daemon.signal("TERM");
    assert!(daemon.wait_for_exit(TIMEOUT).success(), "{}", daemon.log());
    let counts = daemon.line(" captured=");
    assert!(counts.contains(" events_lost=0 "), "{counts}");
}

#[test]
fn a_retained_message_that_is_too_large_does_not_keep_the_device_offline() {
    for (topic, named) in [
        ("bloomcast/pi/set/x", "subscribing to the topics one by one"),
        ("bloomcast/pi/set/pause", "a retained message on bloomcast/pi/set/pause breaks"),
        ("homeassistant/status", "a retained message on homeassistant/status breaks"),
        ("bloomcast/pi/model/chunk/7", "a retained message on bloomcast/pi/model/chunk/+ breaks"),
    ] {
        let broker = Mosquitto::started(None);
        let (_dir, images) = alternating_drawings();
        publish_retained(broker.port, topic, &vec![b'x'; TOO_LARGE]);
        let mut daemon = Process::start(&mut replay_command(broker.port, &images, &[]));
        daemon.line(named);
        // The other topics are subscribed to, the one after the other.
        let listener =
            Listener::to(broker.port, &["bloomcast/pi/settings", "bloomcast/pi/status", "bloomcast/pi/event"]);
        listener.wait("/status", |status| status == "online");
        for _ in 0..100 {
            publish(broker.port, "bloomcast/pi/set/leave_dwell_ms", "399");
            if daemon.log().contains("setting changed over MQTT: leave_dwell_ms = 399") {
                break;
            }
        }
        listener.wait("/settings", |settings| settings["leave_dwell_ms"] == 399);
        listener.wait("/event", |_| true);
        stop_without_loss(&mut daemon);
    }
}

#[test]
fn retained_settings_are_refused_and_the_settings_in_force_are_published() {
    let broker = Mosquitto::started(None);
    let (_dir, images) = alternating_drawings();
    publish_retained(broker.port, "bloomcast/pi/set/pause", b"true");
    let daemon = Process::start(&mut replay_command(broker.port, &images, &["decide.classes.daisy.enter=0.8"]));
    daemon.line("bloomcast/pi/set/pause: retained message refused: a request must not be retained");
    let listener = Listener::to(broker.port, &["bloomcast/pi/+"]);
    let settings = listener.wait("/settings", |_| true);
    assert_eq!((&settings["pause"], &settings["interval_ms"]), (&false.into(), &60.into()));
    assert_eq!(settings["classes"]["daisy"]["enter"], 0.8);
    listener.wait("/state", |state| state["class"] != "unknown");
    // As Home Assistant's templates write them.
    publish(broker.port, "bloomcast/pi/set/interval_ms", "70.0");
    listener.wait("/settings", |settings| settings["interval_ms"] == 70);
    publish(broker.port, "bloomcast/pi/set/pause", "True");
    listener.wait("/settings", |settings| settings["pause"] == true);
}

#[test]
fn everything_retained_is_published_again_when_home_assistant_starts() {
    let broker = Mosquitto::started(None);
    let (_dir, images) = alternating_drawings();
    let daemon = Process::start(&mut replay_command(broker.port, &images, &["mqtt.discovery.status_topic=ha/birth"]));
    daemon.line("connected to");
    let listener = Listener::to(broker.port, &["homeassistant/#", "bloomcast/pi/status"]);
    listener.wait(DISCOVERY, |config| config["device"]["name"] == "pi");
    // Home Assistant removes the message when a person deletes the device.
    publish_retained(broker.port, DISCOVERY, b"");
    listener.wait(DISCOVERY, |config| config == "");
    publish(broker.port, "ha/birth", "online");
    listener.wait(DISCOVERY, |config| config["device"]["name"] == "pi");
    listener.wait("/status", |status| status == "online");
}

#[test]
fn discovery_that_is_moved_or_switched_off_is_removed_from_its_old_topic() {
    let broker = Mosquitto::started(None);
    let (dir, images) = alternating_drawings();
    let store = format!("model.store={}", dir.path().join("store").display());
    let run = |more: &[&str]| {
        let settings = [&["model.bundle=", store.as_str()][..], more].concat();
        let mut daemon = Process::start(&mut replay_command(broker.port, &images, &settings));
        daemon.line("connected to");
        stop_without_loss(&mut daemon);
    };
    let retained = || [DISCOVERY, "ha/device/pi/config"].map(|topic| is_retained(broker.port, topic));
    run(&[]);
    assert_eq!(retained(), [true, false]);
    run(&["mqtt.discovery.prefix=ha"]);
    assert_eq!(retained(), [false, true]);
    run(&["mqtt.discovery.prefix=ha", "mqtt.discovery.enabled=false"]);
    assert_eq!(retained(), [false, false]);
}

#[test]
fn a_broker_with_a_small_packet_limit_gets_what_fits_and_the_largest_message_is_named() {
    let broker = Mosquitto::with_limit("max_packet_size 1500");
    let (_dir, images) = alternating_drawings();
    let daemon = Process::start(&mut replay_command(broker.port, &images, &[]));
    let line = daemon.line("the largest message that the broker did not acknowledge");
    assert!(line.contains(&format!(" bytes on {DISCOVERY}; if the broker has a limit below this")), "{line}");
    drop(daemon);
    let listener = Listener::to(broker.port, &["bloomcast/pi/+"]);
    let daemon = Process::start(&mut replay_command(broker.port, &images, &["mqtt.packet_bytes_max=1500"]));
    let line = daemon.line("mqtt.packet_bytes_max is 1500; not published");
    assert!(line.contains(&format!("{DISCOVERY}: a message of ")), "{line}");
    listener.wait("/event", |event| event["class"] == "daisy");
    listener.wait("/event", |event| event["class"] == "sunflowers");
    assert_eq!(daemon.log().matches("connected to").count(), 1, "{}", daemon.log());
}

#[test]
fn a_broker_that_answers_late_is_connected_to() {
    // The connection is queued, and its CONNACK is delayed for longer than the client's own limit of five seconds.
    let broker = Mosquitto::started(None);
    let (_dir, images) = alternating_drawings();
    broker.signal("STOP");
    let daemon = Process::start(&mut replay_command(broker.port, &images, &["log.counters_interval_s=7"]));
    daemon.line(" captured=");
    assert!(!daemon.log().contains("reconnecting in"), "{}", daemon.log());
    broker.signal("CONT");
    daemon.line("connected to");
}

/// Returns whether the broker has a retained message on a topic.
fn is_retained(port: u16, topic: &str) -> bool {
    let listener = Listener::to(port, &[topic, "marker"]);
    // It is delivered after the retained message.
    publish(port, "marker", "x");
    listener.next().unwrap().topic == topic
}
