//! The daemon as a child process with real brokers.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bloomcast::bundle::Bundle;
use serde_json::Value;

use super::broker::{Mosquitto, Rumqttd};
use super::mqtt::{Listener, PersistentSubscriber, publish};
use super::tools::{
    Process, TIMEOUT, bloomcast, confident_drawings, drawn_flowers, failure, free_port, output, replay_list, wait_until,
};

/// Writes a replay list of eight drawings each of two classes; its repetition keeps causing events.
pub fn alternating_drawings() -> (tempfile::TempDir, std::path::PathBuf) {
    replay_list(&[confident_drawings("daisy", 8), confident_drawings("sunflowers", 8)].concat())
}

/// Returns the command that runs a daemon named `pi` with these settings.
pub fn run_command<'a>(port: u16, settings: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = bloomcast();
    command.args(["run", "--set", "device.name=pi", "--set", &format!("mqtt.port={port}")]);
    command.args(settings.into_iter().flat_map(|setting| ["--set", setting]));
    command
}

/// Returns the command that runs a daemon with the drawn flowers' model that replays `images` with a short interval and short dwell times.
pub fn replay_command(port: u16, images: &Path, settings: &[&str]) -> Command {
    let images = format!("camera.replay.path={}", images.display());
    let bundle = format!("model.bundle={}", drawn_flowers().bundle.display());
    let common = [
        &bundle,
        "camera.source=replay",
        &images,
        "camera.interval_ms=60",
        "decide.smoothing_ms=120",
        "decide.enter_dwell_ms=60",
        "decide.leave_dwell_ms=400",
        "mqtt.reconnect_ms_min=200",
        "mqtt.reconnect_ms_max=400",
    ];
    run_command(port, common.into_iter().chain(settings.iter().copied()))
}

/// Returns the ids of the events that the daemon logged.
fn logged_ids(daemon: &Process) -> Vec<String> {
    let log = daemon.log();
    let lines = log.lines().filter_map(|line| line.split_once(" event "));
    lines.map(|(_, rest)| rest.split(':').next().unwrap().to_owned()).collect()
}

#[test]
fn publishes_everything_and_sigterm_publishes_offline() {
    let broker = Mosquitto::started(None);
    let (_dir, images) = alternating_drawings();
    let mut daemon = Process::start(&mut replay_command(broker.port, &images, &["camera.name=window"]));
    daemon.line("connected to 127.0.0.1");

    // A subscriber that connects later receives the retained messages.
    daemon.lines_with(" event ", 1);
    let late = Listener::connect(broker.port);
    let (mut state, mut status, mut model, mut discovery) = (None, None, None, None);
    while state.is_none() || status.is_none() || model.is_none() || discovery.is_none() {
        let message = late.next().unwrap();
        let slot = match message.topic.as_str() {
            "bloomcast/pi/state" => &mut state,
            "bloomcast/pi/status" => &mut status,
            "bloomcast/pi/model" => &mut model,
            "homeassistant/device/pi/config" => &mut discovery,
            "bloomcast/pi/event" | "bloomcast/pi/settings" => continue,
            other => panic!("a message on {other}"),
        };
        *slot = Some(String::from_utf8(message.payload).unwrap());
    }
    assert_eq!(status.unwrap(), "online");
    let json = |text: Option<String>| -> Value { serde_json::from_str(&text.unwrap()).unwrap() };
    let (state, model, discovery) = (json(state), json(model), json(discovery));
    assert_eq!((&state["schema"], &state["device"], &state["camera"]), (&1.into(), &"pi".into(), &"window".into()));
    assert_eq!(state["camera_ok"], true);
    let bundle = Bundle::read(&drawn_flowers().bundle).unwrap();
    assert_eq!(model["version"], bundle.manifest().version);
    assert_eq!(model["sha256"], bundle.sha256());
    assert_eq!(state["model"], model["version"]);
    assert_eq!(discovery["components"]["class"]["state_topic"], "bloomcast/pi/state");

    let event = late.wait("/event", |event| event["class"] == "daisy");
    assert!(matches!(event["previous"].as_str(), Some("sunflowers" | "unknown")), "{event}");
    assert_eq!(event["top"][0]["class"], "daisy");
    assert!(event["confidence"].as_f64().unwrap() >= 0.7);
    assert_eq!(event["id"].as_str().unwrap().as_bytes()[14], b'7', "a UUID of version 7");
    late.wait("/state", |state| state["class"] == "sunflowers");

    daemon.signal("TERM");
    let status = daemon.wait_for_exit(Duration::from_secs(2));
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
    assert_eq!(late.wait("/status", |_| true), "offline");
}

#[test]
fn last_will_publishes_offline_after_a_kill() {
    let broker = Mosquitto::started(None);
    let listener = Listener::connect(broker.port);
    let (_dir, images) = alternating_drawings();
    let mut daemon = Process::start(&mut replay_command(broker.port, &images, &[]));
    listener.wait("/status", |status| status == "online");
    daemon.kill();
    listener.wait("/status", |status| status == "offline");
}

#[test]
fn loses_no_event_while_mosquitto_is_down_killed_and_restarted() {
    let mut broker = Mosquitto::prepare(None);
    let (_dir, images) = alternating_drawings();
    let mut daemon = Process::start(&mut replay_command(broker.port, &images, &[]));
    daemon.line("reconnecting in");
    daemon.lines_with(" event ", 2);

    // The subscriber's session must exist before the daemon reconnects: a broker drops events without a subscriber.
    daemon.signal("STOP");
    broker.start();
    let subscriber = PersistentSubscriber::subscribe(broker.port, "bloomcast/pi/event");
    wait_for_subscription(broker.port, &subscriber);
    daemon.signal("CONT");
    daemon.line("connected to");
    wait_until("the first events", || subscriber.ids().len() >= 4);

    broker.kill();
    daemon.lines_with("reconnecting in", 3);
    let before = logged_ids(&daemon).len();
    daemon.lines_with(" event ", before + 2);
    broker.start();
    daemon.lines_with("connected to", 2);
    let later = logged_ids(&daemon).len() + 2;
    daemon.lines_with(" event ", later);
    daemon.signal("TERM");
    assert!(daemon.wait_for_exit(Duration::from_secs(2)).success(), "{}", daemon.log());

    let logged = logged_ids(&daemon);
    wait_until("the last events", || subscriber.ids().len() > logged.len());
    assert_eq!(subscriber.ids()[1..], logged, "every event, once, in order");
    let counts = daemon.line(" captured=");
    assert!(counts.contains(&format!("events={0} acknowledged={0} events_lost=0", logged.len())), "{counts}");
}

/// Publishes events with the id `0` until the subscriber receives one, so that its subscription is active.
fn wait_for_subscription(port: u16, subscriber: &PersistentSubscriber) {
    wait_until("the subscription", || {
        publish(port, "bloomcast/pi/event", r#"{"id":"0"}"#);
        !subscriber.ids().is_empty()
    });
}

#[test]
fn loses_no_event_while_rumqttd_is_down_killed_and_restarted() {
    let mut broker = Rumqttd::prepare();
    let (_dir, images) = alternating_drawings();
    let mut daemon = Process::start(&mut replay_command(broker.port, &images, &[]));
    daemon.line("reconnecting in");
    let mut received: Vec<String> = Vec::new();
    let receive = |listener: &Listener, received: &mut Vec<String>, wanted: usize| {
        while received.len() < wanted {
            let message = listener.next().unwrap();
            if message.topic == "bloomcast/pi/event" {
                let event: Value = serde_json::from_slice(&message.payload).unwrap();
                let id = event["id"].as_str().unwrap().to_owned();
                if !received.contains(&id) {
                    received.push(id);
                }
            }
        }
    };
    // This broker keeps no sessions: the subscriber connects first, while the daemon is stopped.
    for round in 1..=2 {
        daemon.signal("STOP");
        broker.start();
        let listener = Listener::connect_with_retry(broker.port);
        daemon.signal("CONT");
        daemon.lines_with("connected to", round);
        let wanted = received.len() + 4;
        receive(&listener, &mut received, wanted);
        if round == 1 {
            // The broker is killed when every logged event has been received: nothing is in flight while the daemon is
            // stopped, and this broker loses the messages that it has accepted.
            daemon.signal("STOP");
            let logged = logged_ids(&daemon).len();
            receive(&listener, &mut received, logged);
            broker.kill();
            daemon.signal("CONT");
            daemon.lines_with("reconnecting in", 3);
            daemon.lines_with(" event ", logged_ids(&daemon).len() + 2);
        } else {
            daemon.signal("TERM");
            assert!(daemon.wait_for_exit(Duration::from_secs(2)).success(), "{}", daemon.log());
            receive(&listener, &mut received, logged_ids(&daemon).len());
        }
    }
    assert_eq!(received, logged_ids(&daemon), "every event, in order");
}

#[test]
fn a_full_outbox_drops_the_oldest_events_and_logs_it() {
    let mut broker = Mosquitto::prepare(None);
    let (_dir, images) = alternating_drawings();
    let daemon = Process::start(&mut replay_command(broker.port, &images, &["mqtt.outbox_entries_max=2"]));
    daemon.lines_with("outbox full: 1 oldest events lost", 2);
    broker.start();
    let listener = Listener::connect_with_retry(broker.port);
    let first = listener.wait("/event", |_| true);
    let (first, logged) = (first["id"].as_str().unwrap().to_owned(), logged_ids(&daemon));
    let index = logged.iter().position(|id| *id == first).expect("an event that was logged");
    assert!(index >= 2, "the first two events were dropped, number {index} was delivered first");
}

#[test]
fn logs_a_wrong_password_and_connects_with_the_right_one() {
    let broker = Mosquitto::started(Some("right"));
    let (dir, images) = alternating_drawings();
    let credentials = dir.path().join("credentials");
    let setting = format!("mqtt.credentials_file={}", credentials.display());
    std::fs::write(&credentials, "pi\nwrong\n").unwrap();
    let mut refused = Process::start(&mut replay_command(broker.port, &images, &[&setting]));
    refused.line("the broker refuses the user name or password; see mqtt.credentials_file");
    assert!(refused.is_running());
    assert!(!refused.log().contains("wrong\n"), "the password is not logged");
    drop(refused);
    std::fs::write(&credentials, "pi\nright\n").unwrap();
    Process::start(&mut replay_command(broker.port, &images, &[&setting])).line("connected to");
}

#[test]
fn applies_settings_over_mqtt_and_rejects_invalid_ones() {
    let broker = Mosquitto::started(None);
    let (_dir, images) = alternating_drawings();
    let listener = Listener::connect(broker.port);
    let daemon = Process::start(&mut replay_command(broker.port, &images, &[]));
    listener.wait("/event", |_| true);
    publish(broker.port, "bloomcast/pi/set/pause", "true");
    listener.wait("/state", |state| state["paused"] == true && state["class"] == "unknown");
    let events = logged_ids(&daemon).len();
    publish(broker.port, "bloomcast/pi/set/pause", "true");
    publish(broker.port, "bloomcast/pi/set/enter", "0.2");
    daemon.line("setting enter = 0.2 rejected: leave must not be above enter");
    publish(broker.port, "bloomcast/pi/set/enter", "lots");
    daemon.line("bloomcast/pi/set/enter: \"lots\": expected a number above 0, at most 1");
    publish(broker.port, "bloomcast/pi/set/colour", "red");
    daemon.line("bloomcast/pi/set/colour: no such setting");
    assert_eq!(logged_ids(&daemon).len(), events, "no event while paused");
    publish(broker.port, "bloomcast/pi/set/pause", "false");
    listener.wait("/state", |state| state["paused"] == false && state["class"] != "unknown");
}

#[test]
fn exits_after_the_replay_when_all_events_are_acknowledged() {
    let broker = Mosquitto::started(None);
    let (_dir, images) = alternating_drawings();
    let mut daemon = Process::start(&mut replay_command(broker.port, &images, &["camera.replay.looped=false"]));
    assert!(daemon.wait_for_exit(super::tools::TIMEOUT).success(), "{}", daemon.log());
    let counts = daemon.line(" captured=");
    assert!(counts.contains("captured=16 "), "{counts}");
    let logged = logged_ids(&daemon).len();
    assert!(counts.contains(&format!("events={logged} acknowledged={logged} events_lost=0")), "{counts}");
}

#[test]
fn reconnects_at_exit_to_deliver_queued_events() {
    let mut broker = Mosquitto::prepare(None);
    let (_dir, images) = alternating_drawings();
    // The delay before the daemon reconnects is longer than the replay.
    let settings = ["camera.replay.looped=false", "mqtt.reconnect_ms_min=20000", "mqtt.reconnect_ms_max=20000"];
    let mut daemon = Process::start(&mut replay_command(broker.port, &images, &settings));
    daemon.line("reconnecting in");
    broker.start();
    assert!(daemon.wait_for_exit(super::tools::TIMEOUT).success(), "{}", daemon.log());
    let (counts, logged) = (daemon.line(" captured="), logged_ids(&daemon).len());
    assert!(logged > 0 && counts.contains(&format!("acknowledged={logged} events_lost=0")), "{counts}");
}

#[test]
fn an_unresponsive_broker_does_not_delay_the_exit() {
    let broker = Mosquitto::started(None);
    let (_dir, images) = alternating_drawings();
    let mut daemon = Process::start(&mut replay_command(broker.port, &images, &[]));
    daemon.line("connected to");
    broker.signal("STOP");
    // From here on the broker acknowledges no event.
    let events = logged_ids(&daemon).len() + 1;
    daemon.lines_with(" event ", events);
    daemon.signal("TERM");
    assert_eq!(daemon.wait_for_exit(Duration::from_secs(2)).code(), Some(0), "{}", daemon.log());
    daemon.line("the broker did not acknowledge everything within 1000 ms");
    daemon.line("events were not acknowledged by the broker and are lost");
}

#[test]
fn events_in_flight_when_the_broker_is_killed_are_published_again() {
    let mut broker = Mosquitto::started(None);
    let (_dir, images) = alternating_drawings();
    let subscriber = PersistentSubscriber::subscribe(broker.port, "bloomcast/+/event");
    wait_for_subscription(broker.port, &subscriber);
    let mut daemon = Process::start(&mut replay_command(broker.port, &images, &["mqtt.reconnect_ms_max=500"]));
    daemon.line("connected to");
    broker.signal("STOP");
    // The broker takes these and acknowledges none.
    let events = logged_ids(&daemon).len() + 2;
    daemon.lines_with(" event ", events);
    broker.kill();
    broker.start();
    daemon.lines_with("connected to", 2);
    daemon.signal("TERM");
    assert!(daemon.wait_for_exit(TIMEOUT).success(), "{}", daemon.log());
    let logged = logged_ids(&daemon);
    let missing = || {
        let received = subscriber.ids();
        logged.iter().filter(|id| !received.contains(id)).count()
    };
    wait_until("every event", || missing() == 0);
    let counts = daemon.line(" captured=");
    assert!(counts.contains(" events_lost=0 "), "{counts}");
}

#[test]
fn counts_and_skips_broken_and_oversized_images() {
    let broker = Mosquitto::started(None);
    let good = confident_drawings("daisy", 3);
    let dir = tempfile::tempdir().unwrap();
    let jpeg = std::fs::read(&good[0]).unwrap();
    std::fs::write(dir.path().join("1-cut.jpg"), &jpeg[..jpeg.len() / 2]).unwrap();
    std::fs::write(dir.path().join("2-empty.jpg"), []).unwrap();
    std::fs::write(dir.path().join("3-text.png"), "no picture").unwrap();
    // A sparse file of 4 GiB.
    let giant = std::fs::File::create(dir.path().join("4-giant.jpg")).unwrap();
    giant.set_len(4 << 30).unwrap();
    for (i, image) in good.iter().enumerate() {
        std::fs::copy(image, dir.path().join(format!("{}-good.jpg", 5 + i))).unwrap();
    }
    let mut daemon = Process::start(&mut replay_command(broker.port, dir.path(), &["camera.replay.looped=false"]));
    assert!(daemon.wait_for_exit(super::tools::TIMEOUT).success(), "{}", daemon.log());
    daemon.line("1-cut.jpg: broken frame skipped: the JPEG is truncated: image data is missing");
    daemon.line("2-empty.jpg: broken frame skipped: empty file");
    daemon.line("3-text.png: broken frame skipped");
    daemon.line("4-giant.jpg: 4294967296 bytes, more than the 16777216 allowed; skipped");
    let counts = daemon.line(" captured=");
    assert!(counts.contains("broken=4 classified=3 still=0 unfit=0 camera_failures=0 "), "{counts}");
    assert!(!daemon.log().contains("panicked"));
}

#[test]
fn a_repeated_broken_frame_is_logged_once() {
    let broker = Mosquitto::started(None);
    let good = confident_drawings("daisy", 1).remove(0);
    let dir = tempfile::tempdir().unwrap();
    let jpeg = std::fs::read(&good).unwrap();
    std::fs::write(dir.path().join("cut.jpg"), &jpeg[..jpeg.len() / 2]).unwrap();
    std::fs::copy(&good, dir.path().join("good.jpg")).unwrap();
    let settings = ["camera.interval_ms=5", "log.counters_interval_s=1"];
    let mut daemon = Process::start(&mut replay_command(broker.port, dir.path(), &settings));
    daemon.lines_with(" captured=", 2);
    daemon.signal("TERM");
    assert!(daemon.wait_for_exit(TIMEOUT).success(), "{}", daemon.log());
    let (log, counts) = (daemon.log(), daemon.lines_with(" captured=", 3).remove(2));
    assert!(!counts.contains("broken=1 ") && !counts.contains("broken=0 "), "several broken frames: {counts}");
    assert_eq!(log.matches("cut.jpg: broken frame skipped").count(), 1, "{log}");
}

#[test]
fn configuration_errors_name_the_cause_and_exit_with_78() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let typo = file("typo.toml", "[camera]\nsource = \"replay\"\n\n[mqtt]\nhots = \"broker\"\n");
    let invalid = file("rubbish.bloom", "not a bundle");
    let other_backbone = dir.path().join("other.bloom");
    let built_in = Bundle::built_in().unwrap();
    let mut manifest = built_in.manifest().clone();
    manifest.backbone.sha256 = "0".repeat(64);
    manifest.backbone.name = "resnet50".into();
    Bundle::new(manifest, built_in.contents().clone()).write(&other_backbone).unwrap();
    let (other_backbone, empty) =
        (other_backbone.display().to_string(), dir.path().join("empty").display().to_string());
    std::fs::create_dir(&empty).unwrap();
    let missing = dir.path().join("none").display().to_string();

    let replay = |path: &str| format!("camera.source=replay camera.replay.path={path}");
    let cases = [
        (format!("--config {typo}"), format!("{typo}:5: unknown setting `mqtt.hots`, did you mean `mqtt.host`?")),
        (format!("--config {missing}"), format!("{missing}: No such file or directory")),
        (format!("model.bundle={missing}"), format!("model.bundle: model {missing}: No such file or directory")),
        (format!("model.bundle={invalid}"), format!("model.bundle: model {invalid}: not a bundle")),
        (
            format!("model.bundle={other_backbone}"),
            "was trained on the backbone resnet50 (sha256 000000000000…)".into(),
        ),
        (format!("model.backbone={missing}"), format!("model.backbone: backbone {missing}: No such file")),
        (replay(&empty), format!("camera: {empty}: no images here")),
        (replay(&missing), format!("camera: {missing}: No such file or directory")),
        (format!("mqtt.credentials_file={missing}"), format!("{missing}: No such file or directory")),
        ("mqtt.port=70000".into(), "mqtt.port".into()),
        (
            "decide.classes.cactus.enter=0.9".into(),
            "decide.classes: the model has no class \"cactus\"; its classes are daisy".into(),
        ),
    ];
    for (arguments, expected) in cases {
        for command in ["run", "check"] {
            let mut program = bloomcast();
            program.arg(command);
            match arguments.strip_prefix("--config ") {
                Some(file) => program.args(["--config", file]),
                None => program.args(arguments.split(' ').flat_map(|setting| ["--set", setting])),
            };
            let (code, text) = failure(&mut program);
            assert_eq!(code, 78, "{arguments}: {text}");
            assert!(text.starts_with("error: ") && text.contains(&expected), "{arguments}: {text}");
            assert_eq!(text.trim_end().lines().count(), 1, "one line: {text}");
        }
    }
}

#[test]
fn check_accepts_a_valid_configuration_and_rejects_a_missing_camera() {
    let replay = format!("camera.replay.path={}", drawn_flowers().folder.display());
    let good = output(bloomcast().args(["check", "--set", "camera.source=replay", "--set", &replay]));
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
    let text = String::from_utf8(good.stdout).unwrap();
    assert!(text.contains("daisy, dandelion, roses, sunflowers, tulips") && text.contains("camera: delivers frames"));

    let absent = ["check", "--set", "camera.device=/dev/video-none"];
    assert!(output(bloomcast().args(absent).arg("--no-camera")).status.success());
    let (code, text) = failure(bloomcast().args(absent));
    assert_eq!(code, 78);
    assert!(text.contains("camera: /dev/video-none: cannot open the camera: No such file"), "{text}");
    let rpicam = ["check", "--set", "camera.source=rpicam", "--set", "camera.rpicam.command=rpicam-none"];
    let (code, text) = failure(bloomcast().args(rpicam));
    assert_eq!(code, 78);
    assert!(text.contains("camera: rpicam-none: cannot start: No such file"), "{text}");
}

#[test]
fn publishes_a_missing_camera_once_and_retries() {
    let broker = Mosquitto::started(None);
    let listener = Listener::connect(broker.port);
    let settings = ["camera.device=/dev/video-none", "camera.reopen_ms_min=20"];
    let daemon = Process::start(&mut run_command(broker.port, settings));
    let state = listener.wait("/state", |_| true);
    assert_eq!((&state["class"], &state["camera_ok"]), (&"unknown".into(), &false.into()));
    listener.wait("/status", |status| status == "online");
    daemon.lines_with("/dev/video-none: cannot open the camera", 3);
    assert!(listener.receives_nothing_for(Duration::from_millis(50)), "an unchanged state is published once");
}

#[test]
fn reads_motion_jpeg_from_a_child_process_and_restarts_it() {
    let broker = Mosquitto::started(None);
    let listener = Listener::connect(broker.port);
    let image = confident_drawings("daisy", 1).remove(0).canonicalize().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("camera.sh");
    // The script writes ten frames and fails, like a camera whose cable is pulled.
    let text = format!(
        "#!/bin/sh\nfor i in 1 2 3 4 5 6 7 8 9 10; do cat '{}'; sleep 0.05; done\necho 'cable pulled' >&2\nexit 1\n",
        image.display()
    );
    write_program(&script, &text);
    let command = format!("camera.rpicam.command={}", script.display());
    let bundle = format!("model.bundle={}", drawn_flowers().bundle.display());
    let settings = [
        &bundle,
        "camera.source=rpicam",
        &command,
        "camera.interval_ms=50",
        "camera.reopen_ms_min=50",
        "decide.smoothing_ms=0",
        "decide.enter_dwell_ms=100",
    ];
    let daemon = Process::start(&mut run_command(broker.port, settings));
    for _ in 0..2 {
        listener.wait("/event", |event| event["class"] == "daisy");
        // The loss of the camera's signal changes the class to `unknown`, which is an event.
        listener.wait("/event", |event| event["class"] == "unknown" && event["previous"] == "daisy");
    }
    daemon.line("ended with exit status: 1: cable pulled; reopening");
}

/// Writes a script that can be run.
fn write_program(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    assert!(Command::new("chmod").arg("+x").arg(path).status().unwrap().success());
}

/// A lens is covered, and a flower is seen again; the camera is mounted upside down, beside a wall.
#[test]
fn a_covered_lens_changes_the_quality_and_not_the_class() {
    let broker = Mosquitto::started(None);
    let listener = Listener::connect(broker.port);
    let dir = tempfile::tempdir().unwrap();
    let flower = image::open(confident_drawings("daisy", 1).remove(0)).unwrap().to_rgb8();
    let (width, height) = flower.dimensions();
    let mut frame = image::RgbImage::from_pixel(2 * width, height, image::Rgb([120, 110, 90]));
    image::imageops::overlay(&mut frame, &flower, i64::from(width), 0);
    let frames = [("seen.jpg", image::imageops::rotate180(&frame)), ("covered.jpg", image::RgbImage::new(64, 64))];
    let [seen, covered] = frames.map(|(name, frame)| {
        let path = dir.path().join(name);
        frame.save(&path).unwrap();
        path
    });
    let script = dir.path().join("camera.sh");
    // Each picture is played until the test creates a file.
    let (cover, uncover) = (dir.path().join("cover"), dir.path().join("uncover"));
    let play = |file: &Path, until: &Path| {
        format!("until [ -e '{}' ]; do cat '{}'; sleep 0.1; done\n", until.display(), file.display())
    };
    let text = format!(
        "#!/bin/sh\n{}{}{}",
        play(&seen, &cover),
        play(&covered, &uncover),
        play(&seen, &dir.path().join("never"))
    );
    write_program(&script, &text);
    let settings = [
        format!("model.bundle={}", drawn_flowers().bundle.display()),
        format!("camera.rpicam.command={}", script.display()),
        "camera.source=rpicam".into(),
        "camera.interval_ms=50".into(),
        "camera.rotate=180".into(),
        "camera.region=0.5, 0, 0.5, 1".into(),
        "decide.smoothing_ms=0".into(),
        "decide.enter_dwell_ms=100".into(),
        "decide.leave_dwell_ms=100".into(),
        "decide.state_interval_ms=0".into(),
    ];
    let mut daemon = Process::start(&mut run_command(broker.port, settings.iter().map(String::as_str)));
    listener.wait("/event", |event| event["class"] == "daisy");
    std::fs::write(&cover, "").unwrap();
    let dark = listener.wait("/state", |state| state["quality"] == "dark");
    std::fs::write(&uncover, "").unwrap();
    assert_eq!((&dark["class"], &dark["camera_ok"]), (&"daisy".into(), &true.into()));
    let seen = listener.wait("/state", |state| state["quality"] == "ok" && state["since"] == dark["since"]);
    assert_eq!(seen["class"], "daisy");
    daemon.line("frames are dark and not classified");
    daemon.line("frames can be classified again");
    daemon.signal("TERM");
    assert!(daemon.wait_for_exit(TIMEOUT).success(), "{}", daemon.log());
    let counts = daemon.line(" captured=");
    assert!(!counts.contains(" unfit=0 ") && counts.contains(" events=1 "), "{counts}");
}

/// It gets dark before a flower: frame by frame, until nothing can be judged.
#[test]
fn a_dusk_ends_dark_and_names_no_other_class() {
    let broker = Mosquitto::started(None);
    let listener = Listener::connect(broker.port);
    let dir = tempfile::tempdir().unwrap();
    let flower = image::open(confident_drawings("sunflowers", 1).remove(0)).unwrap().to_rgb8();
    let mut script = String::from("#!/bin/sh\n");
    for (i, light) in [1.0, 0.7, 0.45, 0.25, 0.12, 0.05, 0.02, 0.005].into_iter().enumerate() {
        let mut frame = flower.clone();
        frame.iter_mut().for_each(|value| *value = (f32::from(*value) * light) as u8);
        let path = dir.path().join(format!("{i}.jpg"));
        frame.save(&path).unwrap();
        script += &format!("for i in 1 2 3 4 5 6; do cat '{}'; sleep 0.1; done\n", path.display());
    }
    script += &format!("while :; do cat '{}'; sleep 0.1; done\n", dir.path().join("7.jpg").display());
    let command = dir.path().join("camera.sh");
    write_program(&command, &script);
    let settings = [
        format!("model.bundle={}", drawn_flowers().bundle.display()),
        format!("camera.rpicam.command={}", command.display()),
        "camera.source=rpicam".into(),
        "camera.interval_ms=50".into(),
        "decide.smoothing_ms=100".into(),
        "decide.enter_dwell_ms=200".into(),
        "decide.leave_dwell_ms=200".into(),
        "decide.state_interval_ms=0".into(),
    ];
    let mut daemon = Process::start(&mut run_command(broker.port, settings.iter().map(String::as_str)));
    let first = listener.wait("/event", |event| event["class"] != "unknown");
    assert_eq!((&first["class"], &first["previous"]), (&"sunflowers".into(), &"unknown".into()));
    let dark = listener.wait("/state", |state| state["quality"] == "dark");
    assert!(dark["class"] == "sunflowers" || dark["class"] == "unknown", "{dark}");
    daemon.signal("TERM");
    assert!(daemon.wait_for_exit(TIMEOUT).success(), "{}", daemon.log());
    let counts = daemon.line(" captured=");
    let events = if dark["class"] == "sunflowers" { " events=1 " } else { " events=2 " };
    assert!(counts.contains(events), "{counts}: {dark}");
}

#[test]
fn demo_reports_a_port_in_use() {
    let broker = Mosquitto::started(None);
    let dir = tempfile::tempdir().unwrap();
    image::RgbImage::new(8, 8).save(dir.path().join("black.png")).unwrap();
    let (port, frames) = (broker.port.to_string(), dir.path().display().to_string());
    let (code, text) = failure(bloomcast().args(["demo", "--port", &port, "--frames", &frames]));
    assert_eq!(code, 1);
    assert!(text.contains(&format!("port {port} of 127.0.0.1: Address already in use")), "{text}");
}

#[test]
fn demo_without_photographs_trains_on_drawings_and_pushes_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = bloomcast();
    command.current_dir(dir.path()).env("HOME", dir.path()).env("TMPDIR", dir.path()).env_remove("XDG_CACHE_HOME");
    let demo = output(command.args(["demo", "--interval-ms", "40", "--seed", "7"]));
    let text = String::from_utf8(demo.stdout).unwrap();
    assert!(demo.status.success(), "{text}{}", String::from_utf8_lossy(&demo.stderr));
    assert!(text.contains("seed 7") && text.contains("… confirmed in "), "{text}");
    let events: Vec<&str> = text.lines().filter(|line| line.contains(" ms  ")).collect();
    let right = events.iter().filter(|line| line.ends_with("right")).count();
    assert_eq!(text.lines().find(|line| line.chars().count() > 80), None, "too wide for a terminal");
    // Twelve flowers and three scenes without one.
    assert!(right >= 12 && right * 5 >= events.len() * 4, "{text}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no files are left");
}

#[test]
fn an_interrupted_demo_leaves_no_files_in_any_phase() {
    for phase in ["1 train", "2 sign", "3 start", "4 push", "confirmed", "5 watch", " ms  "] {
        let (dir, printed) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        let mut command = bloomcast();
        command.current_dir(dir.path()).env("HOME", dir.path()).env("TMPDIR", dir.path()).env_remove("XDG_CACHE_HOME");
        command.args(["demo", "--seed", "7"]);
        let mut demo = Process::start_with_output(&mut command, printed.reopen().unwrap());
        wait_until(phase, || std::fs::read_to_string(printed.path()).unwrap().contains(phase));
        assert_eq!(files(), 1, "{phase}");
        demo.signal("INT");
        assert_eq!(demo.wait_for_exit(Duration::from_secs(5)).code(), Some(130), "{phase}: {}", demo.log());
        assert_eq!(files(), 0, "{phase}: {}", demo.log());
    }
}

#[test]
fn notifies_systemd_of_readiness_watchdog_and_stop() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    systemd.set_read_timeout(Some(TIMEOUT)).unwrap();
    // The daemon is ready although it has neither a broker nor a camera.
    let mut command = run_command(free_port(), ["camera.device=/dev/video-none", "camera.reopen_ms_min=5000"]);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "2000000");
    let mut daemon = Process::start(&mut command);
    let notification = || {
        let mut message = [0; 1024];
        let bytes = systemd.recv(&mut message).unwrap_or_else(|e| panic!("{e}: {}", daemon.log()));
        String::from_utf8_lossy(&message[..bytes]).into_owned()
    };
    let ready = notification();
    assert!(ready.starts_with("READY=1\nSTATUS=flowers ") && ready.contains(" is active"), "{ready}");
    for _ in 0..4 {
        assert_eq!(notification().trim(), "WATCHDOG=1");
    }
    daemon.signal("TERM");
    let last = std::iter::repeat_with(notification).find(|message| message.trim() != "WATCHDOG=1").unwrap();
    assert_eq!(last.trim(), "STOPPING=1");
    assert!(daemon.wait_for_exit(Duration::from_secs(2)).success(), "{}", daemon.log());
}

#[test]
fn reload_applies_a_valid_configuration_without_losing_events_and_rejects_an_invalid_one() {
    let mut broker = Mosquitto::started(None);
    let (dir, images) = alternating_drawings();
    let (config, port) = (dir.path().join("bloomcast.toml"), broker.port);
    let bundle = &drawn_flowers().bundle;
    let write = |name: &str, more: &str| {
        let text = format!(
            "[device]\nname = \"{name}\"\n[camera]\nsource = \"replay\"\ninterval_ms = 60\n[camera.replay]\npath = {images:?}\n\
             [model]\nbundle = {bundle:?}\n[decide]\nsmoothing_ms = 120\nenter_dwell_ms = 60\nleave_dwell_ms = 400\n\
             [mqtt]\nport = {port}\nreconnect_ms_min = 200\nreconnect_ms_max = 400\n{more}"
        );
        std::fs::write(&config, text).unwrap();
    };
    write("pi", "");
    let subscriber = PersistentSubscriber::subscribe(port, "bloomcast/+/event");
    wait_for_subscription(port, &subscriber);
    let socket = dir.path().join("notify");
    let systemd = UnixDatagram::bind(&socket).unwrap();
    systemd.set_read_timeout(Some(TIMEOUT)).unwrap();
    let notification = || {
        let mut message = [0; 1024];
        let bytes = systemd.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..bytes]).into_owned()
    };
    let mut daemon = Process::start(bloomcast().args(["run", "--config"]).arg(&config).env("NOTIFY_SOCKET", &socket));
    daemon.lines_with(" event ", 2);
    assert!(notification().starts_with("READY=1"));

    write("pi", "hots = \"broker\"\n");
    daemon.signal("HUP");
    let line = daemon.line("configuration reload rejected, keeping the current configuration");
    assert!(line.contains("bloomcast.toml:") && line.contains("did you mean `mqtt.host`?"), "{line}");
    assert!(notification().starts_with("RELOADING=1") && notification().starts_with("READY=1"));

    // Events are queued while the broker is down, a reload changes the device's name, and then the broker restarts.
    broker.kill();
    let before = logged_ids(&daemon).len();
    daemon.lines_with(" event ", before + 2);
    write("window", "");
    daemon.signal("HUP");
    daemon.lines_with("ready: the model", 2);
    assert!(notification().starts_with("RELOADING=1") && notification().starts_with("READY=1"));
    broker.start();
    daemon.line("as window");

    let listener = Listener::connect(port);
    // It is published after the subscriptions.
    listener.wait("window/status", |status| status == "online");
    publish(port, "bloomcast/window/set/pause", "true");
    listener.wait("window/state", |state| state["paused"] == true);
    // Nothing has changed.
    daemon.signal("HUP");
    daemon.line("the configuration and the model are unchanged: nothing to reload");
    // A change of other settings keeps the connection and the pause.
    write("window", "[log]\ncounters_interval_s = 299\n");
    daemon.signal("HUP");
    daemon.lines_with("ready: the model", 3);
    publish(port, "bloomcast/window/set/enter", "0.75");
    let mut seen = Vec::new();
    while !seen
        .iter()
        .any(|(topic, payload): &(String, String)| topic.ends_with("/settings") && payload.contains("0.75"))
    {
        let message = listener.next().unwrap();
        seen.push((message.topic, String::from_utf8(message.payload).unwrap()));
    }
    assert!(!seen.iter().any(|(topic, _)| topic.ends_with("/status")), "the connection stays: {seen:?}");
    assert!(!seen.iter().any(|(_, payload)| payload.contains("\"paused\":false")), "the pause stays: {seen:?}");
    publish(port, "bloomcast/window/set/pause", "false");

    let later = logged_ids(&daemon).len() + 2;
    daemon.lines_with(" event ", later);
    daemon.signal("TERM");
    assert!(daemon.wait_for_exit(Duration::from_secs(3)).success(), "{}", daemon.log());
    let logged = logged_ids(&daemon);
    wait_until("the last events", || subscriber.ids().len() > logged.len());
    assert_eq!(subscriber.ids()[1..], logged, "every event, once, in order");
    let counts = daemon.line(" captured=");
    assert!(counts.contains(&format!("events={0} acknowledged={0} events_lost=0", logged.len())), "{counts}");
    // The class is kept over a reload: each event starts from the class of the event before it.
    let log = daemon.log();
    let changes: Vec<&str> = log.lines().filter(|line| line.contains(" event ")).collect();
    let classes = changes.iter().map(|line| line.split(": ").nth(1).unwrap().split(',').next().unwrap());
    let classes: Vec<(&str, &str)> = classes.map(|change| change.split_once(" → ").unwrap()).collect();
    assert!(classes.windows(2).all(|pair| pair[0].1 == pair[1].0), "{classes:?}");
}

#[test]
fn an_unchanged_scene_is_not_classified_again_and_gives_the_same_events() {
    let broker = Mosquitto::started(None);
    let [daisy, sunflower] = ["daisy", "sunflowers"].map(|class| vec![confident_drawings(class, 1).remove(0); 20]);
    let (_dir, images) = replay_list(&[daisy, sunflower].concat());
    let replay_with = |threshold: &str| {
        let listener = Listener::connect(broker.port);
        let settings = ["camera.replay.looped=false", threshold];
        let mut daemon = Process::start(&mut replay_command(broker.port, &images, &settings));
        assert!(daemon.wait_for_exit(TIMEOUT).success(), "{}", daemon.log());
        let counts = daemon.line(" captured=");
        let published = ["daisy", "sunflowers"].map(|class| listener.wait("/event", |event| event["class"] == class));
        let count = |name: &str| -> u64 {
            let value = counts.split_whitespace().find_map(|count| count.strip_prefix(name)?.strip_prefix('='));
            value.unwrap().parse().unwrap()
        };
        assert_eq!(count("classified") + count("still") + count("dropped"), 40, "{counts}");
        (count("classified"), count("events"), published.map(|event| event["previous"].clone()))
    };
    let (all_classified, events, previous) = replay_with("camera.still_threshold=0");
    let (classified, same_events, same_previous) = replay_with("camera.still_threshold=2");
    assert!(all_classified > 20, "{all_classified} frames classified with the threshold 0");
    assert_eq!((classified, same_events, same_previous), (2, events, previous));
}
