//! Model updates: push, refusal, trial, confirmation and rollback, with real brokers, daemons and signals.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bloomcast::bundle::signature::PrivateKey;
use bloomcast::bundle::{Bundle, Contents, Identity, Manifest, archive, assemble, sign, tensors};
use bloomcast::mqtt::access::{BrokerAccess, Credentials};
use bloomcast::mqtt::client::Client;
use bloomcast::mqtt::topics::{DeviceName, Topics};
use bloomcast::system::hash::sha256_hex;
use bloomcast::update::device::Store;
use bloomcast::update::device::store::ModelSlot;
use bloomcast::update::protocol::{Offer, identity};
use bloomcast::update::workstation::delivery::{DeliveryStatus, PushPayload};
use bloomcast::update::workstation::push::{self, PushOptions, PushReport};
use bloomcast::vision::{Head, Labels};
use serde_json::{Value, json};

use super::broker::Mosquitto;
use super::mqtt::Listener;
use super::tools::{Process, TIMEOUT, bloomcast, drawn_flowers, failure, of_class, output, replay_list, wait_until};

/// A signing key, and the folder with its public key and the bundles that it signs.
struct Trainer {
    dir: tempfile::TempDir,
    key: PrivateKey,
}

impl Trainer {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("trainer.key");
        assert!(output(bloomcast().arg("keygen").arg("--out").arg(&key)).status.success());
        Trainer { key: PrivateKey::read(&key).unwrap(), dir }
    }

    /// Returns the setting that makes a device trust this key.
    fn keys(&self) -> String {
        format!("model.trusted_keys={}", self.dir.path().display())
    }

    fn key_file(&self) -> PathBuf {
        self.dir.path().join("trainer.key")
    }

    /// Returns the signed built-in model with this change; its version is higher by `version_increment`.
    fn bytes(&self, version_increment: u64, change: impl FnOnce(&mut Manifest, &mut Contents)) -> Vec<u8> {
        sign("made", &unsigned_bundle(version_increment, change), &self.key).unwrap()
    }

    fn file(&self, version_increment: u64, change: impl FnOnce(&mut Manifest, &mut Contents)) -> PathBuf {
        let path = self.dir.path().join(format!("m{version_increment}.bloom"));
        fs::write(&path, self.bytes(version_increment, change)).unwrap();
        path
    }
}

/// Returns the built-in model with this change, unsigned; its version is higher by `version_increment`.
fn unsigned_bundle(version_increment: u64, change: impl FnOnce(&mut Manifest, &mut Contents)) -> Vec<u8> {
    let built_in = Bundle::built_in().unwrap();
    let (mut manifest, mut contents) = (built_in.manifest().clone(), built_in.contents().clone());
    manifest.version += version_increment;
    change(&mut manifest, &mut contents);
    Bundle::new(manifest, contents).to_bytes()
}

fn unchanged(_: &mut Manifest, _: &mut Contents) {}

/// Changes the weights but not the self-test, which fails.
fn fails_self_test(manifest: &mut Manifest, contents: &mut Contents) {
    let head = &contents.head;
    let bias: Vec<f32> = head.bias().iter().rev().copied().collect();
    let weight: Vec<f32> = head.weight().iter().map(|w| w * 0.9).collect();
    contents.head = Head::new(head.width(), weight, bias, manifest.temperature).unwrap();
}

/// Returns the built-in model with a weight that is NaN; its hashes are correct.
fn with_nan() -> Vec<u8> {
    let built_in = Bundle::built_in().unwrap();
    let mut manifest = built_in.manifest().clone();
    manifest.version += 1;
    let (head, subspace) = (&built_in.contents().head, &built_in.contents().ood);
    let mut weight = head.weight().to_vec();
    weight[77] = f32::NAN;
    let head = tensors::to_bytes(&[
        ("weight", vec![head.classes(), head.width()], &weight),
        ("bias", vec![head.classes()], head.bias()),
        ("subspace", vec![subspace.basis().len() / head.width(), head.width()], subspace.basis()),
    ]);
    assemble(&manifest, &[("head.safetensors", &head)])
}

/// Returns a tar whose member has a path outside the folder that it is unpacked to.
fn with_path_traversal() -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..16].copy_from_slice(b"../../etc/passwd");
    header.set_size(1);
    header.set_cksum();
    let mut tar = tar::Builder::new(Vec::new());
    tar.append(&header, b"x".as_slice()).unwrap();
    tar.into_inner().unwrap()
}

/// A device's settings, replay list and store; they outlive the daemon's process.
struct Device {
    name: &'static str,
    port: u16,
    settings: Vec<String>,
    _images: tempfile::TempDir,
    state: tempfile::TempDir,
}

impl Device {
    fn new(name: &'static str, port: u16, trainer: &Trainer) -> Self {
        let (images_dir, images) = replay_list(&of_class(&drawn_flowers().folder, "daisy", 4));
        let state = tempfile::tempdir().unwrap();
        let settings = vec![
            format!("device.name={name}"),
            format!("mqtt.port={port}"),
            "camera.source=replay".into(),
            format!("camera.replay.path={}", images.display()),
            "camera.interval_ms=60".into(),
            "mqtt.reconnect_ms_min=100".into(),
            "mqtt.reconnect_ms_max=200".into(),
            format!("model.store={}", state.path().join("store").display()),
            trainer.keys(),
            "model.trial_frames=5".into(),
        ];
        Device { name, port, settings, _images: images_dir, state }
    }

    fn with(mut self, settings: &[&str]) -> Self {
        self.settings.extend(settings.iter().map(|setting| (*setting).to_owned()));
        self
    }

    fn command(&self, name: &str) -> Command {
        let mut command = bloomcast();
        command.arg(name).args(self.settings.iter().flat_map(|setting| ["--set", setting]));
        command
    }

    fn connected(&self) -> Process {
        let daemon = Process::start(&mut self.command("run"));
        daemon.line("connected to");
        daemon
    }

    /// Starts a daemon and waits until its status on the broker is `online`, which a push requires.
    fn start(&self) -> Process {
        let daemon = self.connected();
        Listener::connect(self.port).wait(&format!("/{}/status", self.name), |status| status == "online");
        daemon
    }

    fn store(&self) -> PathBuf {
        self.state.path().join("store")
    }

    /// Returns the names of the store's files, but for `state.json`.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        for folder in [self.store(), self.store().join("slots")] {
            let Ok(entries) = fs::read_dir(folder) else { continue };
            files.extend(entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()));
        }
        files.retain(|name| !["slots", "state.json", "discovery-topics"].contains(&name.as_str()));
        files
    }

    /// Returns the message retained on `…/model`, which the current process published once the status is `online`.
    fn model_status(&self) -> Value {
        let listener = Listener::connect(self.port);
        let (mut online, mut model_status) = (false, None);
        while !online || model_status.is_none() {
            let message = listener.next().unwrap();
            match message.topic.strip_prefix(&format!("bloomcast/{}/", self.name)) {
                Some("status") => online = message.payload == b"online",
                Some("model") => model_status = Some(serde_json::from_slice(&message.payload).unwrap()),
                _ => {}
            }
        }
        model_status.unwrap()
    }
}

fn topics(device: &str) -> Topics {
    Topics::new("bloomcast", "homeassistant", DeviceName::new(device).unwrap())
}

/// Returns the command `bloomcast push`.
fn push_command(port: u16, bundle: &Path, trainer: &Trainer, arguments: &[&str]) -> Command {
    let mut command = bloomcast();
    command.arg("push").arg(bundle).args(["--json", "--set", &format!("mqtt.port={port}")]);
    command.arg("--key").arg(trainer.key_file()).args(arguments);
    command
}

/// Runs a push; returns each device's delivery status and reason, and whether the exit code is 0.
fn delivery_statuses(command: &mut Command) -> (BTreeMap<String, (String, String)>, bool) {
    let output = output(command);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("no JSON; {}", String::from_utf8_lossy(&output.stderr)));
    let rows = report["devices"].as_array().unwrap().iter();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let rows = rows.map(|row| (text(row, "device"), (text(row, "ending"), text(row, "reason"))));
    (rows.collect(), output.status.success())
}

/// Pushes bytes that the command `push` would not send.
fn push_bytes(port: u16, device: &str, bytes: &[u8], claim: impl FnOnce(&mut Manifest, &mut Identity)) -> PushReport {
    let mut manifest = Bundle::built_in().unwrap().manifest().clone();
    manifest.version += 1;
    let mut model = identity(&manifest, &sha256_hex(bytes));
    claim(&mut manifest, &mut model);
    let payload =
        PushPayload { bytes: bytes.to_vec(), manifest, model, packet_bytes_max: 65_536, force: false, key: None };
    let devices = vec![topics(device)];
    push::push(&BrokerAccess::local(port), devices, &payload, &PushOptions::default(), &|_| {}).unwrap()
}

#[test]
fn the_new_model_is_announced_before_the_first_state_that_names_it() {
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &trainer);
    let _daemon = device.start();
    let version = Bundle::built_in().unwrap().manifest().version;
    let listener = Listener::connect(broker.port);
    let file = trainer.file(1, unchanged);
    let (statuses, _) = delivery_statuses(&mut push_command(broker.port, &file, &trainer, &["--device", "pi"]));
    assert_eq!(statuses["pi"].0, "confirmed", "{statuses:?}");
    let (mut announced, mut observed) = (0, 0);
    while observed != version + 1 {
        let message = listener.next().unwrap();
        let value = || serde_json::from_slice::<Value>(&message.payload).unwrap();
        match message.topic.as_str() {
            "bloomcast/pi/model" => announced = value()["version"].as_u64().unwrap(),
            "bloomcast/pi/state" => {
                observed = value()["model"].as_u64().unwrap();
                assert!(observed == version || announced == observed, "{observed} is observed, {announced} announced");
            }
            _ => {}
        }
    }
    assert_eq!(announced, version + 1);
}

fn refusal(report: &PushReport) -> String {
    assert_eq!(report.devices[0].status, DeliveryStatus::Refused, "{report}");
    report.devices[0].reason.clone()
}

#[test]
fn push_stops_after_the_canary_refuses_the_model() {
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let names = ["pi1", "pi2", "pi3", "pi4"];
    let devices = names.map(|name| Device::new(name, broker.port, &trainer));
    let mut daemons: Vec<Process> = devices.iter().map(Device::start).collect();
    daemons.pop().unwrap().kill();
    let listener = Listener::connect(broker.port);
    listener.wait("/pi4/status", |status| status == "offline");
    let to = ["--canary", "1", "--device", "pi1", "--device", "pi2", "--device", "pi3", "--device", "pi4"];

    let good = trainer.file(1, unchanged);
    let (statuses, succeeded) = delivery_statuses(&mut push_command(broker.port, &good, &trainer, &to));
    assert!(!succeeded, "one device is offline");
    for name in &names[..3] {
        assert_eq!(statuses[*name].0, "confirmed", "{statuses:?}");
    }
    assert_eq!(statuses["pi4"].0, "offline");
    // In the broker's order, the canary's confirmation precedes every other device's offer.
    let mut received = Vec::new();
    while received.iter().filter(|(_, kind)| kind == "confirmed").count() < 3 {
        let message = listener.next().unwrap();
        let device = message.topic.split('/').nth(1).unwrap().to_owned();
        if message.topic.ends_with("/model/offer") {
            received.push((device, "offer".to_owned()));
        } else if message.topic.ends_with("/model/answer") {
            let answer: Value = serde_json::from_slice(&message.payload).unwrap();
            received.push((device, answer["answer"].as_str().unwrap().to_owned()));
        }
        // On a busy machine a message may be sent twice.
        received.dedup();
    }
    let expected = [("pi1", "offer"), ("pi1", "accepted"), ("pi1", "confirmed")];
    assert_eq!(received[..3], expected.map(|(device, kind)| (device.to_owned(), kind.to_owned())));
    let version = Bundle::built_in().unwrap().manifest().version;
    for device in &devices[..3] {
        let model_status = device.model_status();
        assert_eq!(
            (&model_status["version"], &model_status["trial"], &model_status["source"]),
            (&json!(version + 1), &json!(false), &json!("store"))
        );
        assert_eq!(model_status["previous"], "built-in");
    }

    let bad = trainer.file(2, fails_self_test);
    let (statuses, _) = delivery_statuses(&mut push_command(broker.port, &bad, &trainer, &to));
    assert_eq!(statuses["pi1"].0, "refused");
    assert!(statuses["pi1"].1.contains("the self-test's feature vector 0: the result is"), "{statuses:?}");
    assert_eq!((statuses["pi2"].0.as_str(), statuses["pi3"].0.as_str()), ("stopped", "stopped"));
    for device in &devices[..3] {
        assert_eq!(device.model_status()["version"], version + 1);
        assert_eq!(device.files().len(), 1, "nothing is left behind: {:?}", device.files());
    }
    let offers = |process: &Process| process.log().matches("receiving ").count();
    assert_eq!(daemons.iter().map(offers).collect::<Vec<_>>(), [2, 1, 1]);
}

#[test]
fn refuses_invalid_bundles_and_keeps_the_current_model() {
    let (broker, trainer, untrusted) = (Mosquitto::started(None), Trainer::new(), Trainer::new());
    let device = Device::new("pi", broker.port, &trainer).with(&["decide.classes.roses.enter=0.8"]);
    let mut daemon = device.start();
    let port = broker.port;
    let reason = |bytes: &[u8]| refusal(&push_bytes(port, "pi", bytes, |_, _| {}));

    assert_eq!(reason(&unsigned_bundle(1, unchanged)), "the signature is missing");
    assert!(reason(&untrusted.bytes(1, unchanged)).contains("which is not trusted; trusted: trainer ("));
    let good = trainer.bytes(1, unchanged);
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    assert!(reason(&flipped).contains("was altered"));
    assert!(reason(&good[..good.len() / 2]).starts_with("model offered: not a bundle"));
    let untested = |_: &mut Manifest, contents: &mut Contents| contents.self_test = None;
    assert!(reason(&trainer.bytes(1, untested)).contains("contains no self-test"));
    assert!(reason(&with_nan()).contains("not finite"));
    assert!(reason(&trainer.bytes(1, fails_self_test)).contains("the self-test's feature vector"));
    let renamed_class = |manifest: &mut Manifest, _: &mut Contents| {
        let names = manifest.classes.names().iter().map(|name| name.replace("roses", "iris")).collect();
        manifest.classes = Labels::new(names).unwrap();
    };
    let unknown_class = reason(&trainer.bytes(1, renamed_class));
    assert_eq!(
        unknown_class,
        "decide.classes: the model has no class \"roses\"; its classes are daisy, dandelion, iris, sunflowers, tulips"
    );
    let other_network = |manifest: &mut Manifest, _: &mut Contents| manifest.backbone.sha256 = "0".repeat(64);
    assert!(reason(&trainer.bytes(1, other_network)).contains("was trained on the backbone"));
    let other_preprocessing = |manifest: &mut Manifest, _: &mut Contents| manifest.preprocess.std = [0.4; 3];
    assert!(reason(&trainer.bytes(1, other_preprocessing)).contains("the self-test's image 0"));
    assert!(reason(&with_path_traversal()).contains("../../etc/passwd: not the name of a plain file"));
    let giant_manifest = archive::pack([("manifest.json", vec![b' '; 1 << 20].as_slice())]);
    assert!(reason(&giant_manifest).contains("manifest.json: 1048576 bytes, expected at most"));

    // The bytes differ from the offer.
    let older = refusal(&push_bytes(port, "pi", &trainer.bytes(0, |m, _| m.version -= 1), |_, _| {}));
    assert!(older.contains("but the offer names"), "{older}");
    let older = push_bytes(port, "pi", &trainer.bytes(0, |m, _| m.version -= 1), |_, model| model.version -= 2);
    assert!(refusal(&older).contains("is not newer than"), "{older}");
    let altered = push_bytes(port, "pi", &good, |_, model| model.sha256 = "ab".repeat(32));
    assert!(refusal(&altered).contains("is not what was offered"), "{altered}");
    let large = vec![7; (16 << 20) + 1];
    assert!(reason(&large).contains("model.offer_bytes_max allows 16777216"));

    assert_eq!(device.model_status()["version"], Bundle::built_in().unwrap().manifest().version);
    assert!(device.files().is_empty() && !device.store().join("state.json").exists(), "{:?}", device.files());
    assert!(daemon.is_running() && !daemon.log().contains("panicked"), "{}", daemon.log());
    assert_eq!(push_bytes(port, "pi", &good, |_, _| {}).devices[0].status, DeliveryStatus::Confirmed);
}

#[test]
fn rollback_and_downgrade_require_a_signed_command() {
    let (broker, trainer, untrusted) = (Mosquitto::started(None), Trainer::new(), Trainer::new());
    let device = Device::new("pi", broker.port, &trainer);
    let _daemon = device.start();
    let version = Bundle::built_in().unwrap().manifest().version;
    let rollback = |trainer: &Trainer| {
        let mut command = bloomcast();
        command.args(["rollback", "--device", "pi", "--set", &format!("mqtt.port={}", broker.port), "--key"]);
        command.arg(trainer.key_file());
        command
    };
    let push = |bundle: &Path, arguments: &[&str]| {
        let arguments = [arguments, &["--device", "pi"]].concat();
        delivery_statuses(&mut push_command(broker.port, bundle, &trainer, &arguments)).0["pi"].clone()
    };

    let (code, text) = failure(&mut rollback(&trainer));
    assert_eq!((code, text.contains("there is no previous model")), (1, true), "{text}");
    let (first, second) = (trainer.file(1, unchanged), trainer.file(2, unchanged));
    assert_eq!(push(&first, &[]).0, "confirmed");
    assert_eq!(push(&second, &["--dry-run"]).0, "fit");
    assert_eq!(device.model_status()["version"], version + 1, "a dry run sends nothing");
    assert_eq!(push(&second, &[]).0, "confirmed");
    assert_eq!(push(&second, &[]), ("confirmed".into(), "the model is already active".into()));
    assert_eq!(device.model_status()["previous"], format!("flowers {}", version + 1));

    let (_, text) = failure(&mut rollback(&untrusted));
    assert!(
        text.contains("refused: the signed command: the signature is by the key") && text.contains("not trusted"),
        "{text}"
    );
    let listener = Listener::connect(broker.port);
    let rolled_back = output(&mut rollback(&trainer));
    assert!(rolled_back.status.success(), "{}", String::from_utf8_lossy(&rolled_back.stderr));
    assert_eq!(String::from_utf8(rolled_back.stdout).unwrap(), format!("pi: flowers {} is rolled back\n", version + 2));
    assert_eq!(device.model_status()["version"], version + 1);
    assert_eq!(device.files().len(), 1);
    // The same command is replayed.
    let payload = loop {
        let message = listener.next().unwrap();
        if message.topic == "bloomcast/pi/model/rollback" {
            break message.payload;
        }
    };
    let mut replayed_command: Value = serde_json::from_slice(&payload).unwrap();
    replayed_command["transfer"] = json!("0192f3c4-0000-7000-8000-000000000000");
    let client = Client::connect(&BrokerAccess::local(broker.port), &["bloomcast/pi/model/answer".into()]).unwrap();
    assert!(client.publish("bloomcast/pi/model/rollback", serde_json::to_vec(&replayed_command).unwrap()));
    let answer = listener.wait("/pi/model/answer", |answer| answer["transfer"] == replayed_command["transfer"]);
    assert!(answer["reason"].as_str().unwrap().contains("the signed command is for generation"), "{answer}");

    // A model that was rolled back, or an older one, needs --force.
    let (status, reason) = push(&second, &[]);
    assert_eq!(
        (status.as_str(), reason.contains("was rolled back on this device, or failed its trial; --force")),
        ("refused", true),
        "{reason}"
    );
    let older = trainer.file(0, |manifest, _| manifest.version -= 1);
    let (status, reason) = push(&older, &[]);
    assert_eq!((status.as_str(), reason.contains("is not newer than the device's")), ("refused", true), "{reason}");
    assert_eq!(push(&older, &["--force"]).0, "confirmed");
    assert_eq!(device.model_status()["version"], version - 1);
    let replay = push_bytes(broker.port, "pi", &fs::read(&older).unwrap(), |_, model| model.version = version - 1);
    assert_eq!(replay.devices[0].reason, "the model is already active");
    assert_eq!(push(&second, &["--force"]).0, "confirmed");
    assert_eq!(device.model_status()["version"], version + 2);
}

#[test]
fn refuses_a_second_push_as_busy() {
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &trainer);
    let daemon = device.start();
    let bundle = Bundle::from_bytes("m", &trainer.bytes(1, unchanged)).unwrap();
    let offer = Offer {
        schema: 1,
        transfer: uuid::Uuid::nil(),
        model: identity(bundle.manifest(), bundle.sha256()),
        bytes: 1_000_000,
        chunk_bytes: 1000,
        force: None,
    };
    let first = Client::connect(&BrokerAccess::local(broker.port), &["bloomcast/pi/model/progress".into()]).unwrap();
    assert!(first.publish("bloomcast/pi/model/offer", serde_json::to_vec(&offer).unwrap()));
    daemon.line("receiving flowers");
    let second = trainer.file(2, unchanged);
    let (statuses, _) = delivery_statuses(&mut push_command(broker.port, &second, &trainer, &["--device", "pi"]));
    assert_eq!(statuses["pi"].0, "refused");
    assert!(
        statuses["pi"].1.starts_with("busy: flowers ") && statuses["pi"].1.ends_with(" is being received"),
        "{statuses:?}"
    );
}

#[test]
fn push_resumes_after_the_broker_is_killed() {
    let (mut broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &trainer);
    let daemon = device.start();
    let bundle = trainer.file(1, unchanged);
    let packets = ["--device", "pi", "--set", "mqtt.packet_bytes_max=4096"];
    let mut command = push_command(broker.port, &bundle, &trainer, &packets);
    std::thread::scope(|scope| {
        let listener = Listener::connect(broker.port);
        let pushing = scope.spawn(|| delivery_statuses(&mut command));
        let next = |progress: &Value| progress["next"].as_u64().unwrap();
        listener.wait("/pi/model/progress", |progress| next(progress) >= 20);
        // The device is stopped, so that the transfer cannot end before the broker is killed.
        daemon.signal("STOP");
        broker.kill();
        daemon.signal("CONT");
        daemon.line("reconnecting in");
        broker.start();
        let listener = Listener::connect(broker.port);
        let resumed = listener.wait("/pi/model/progress", |progress| progress["again"] == true);
        assert!(
            next(&resumed) >= 20 && next(&resumed) < resumed["chunks"].as_u64().unwrap(),
            "in the middle: {resumed}"
        );
        let (statuses, succeeded) = pushing.join().unwrap();
        assert!(succeeded && statuses["pi"].0 == "confirmed", "{statuses:?}");
    });
    assert_eq!(daemon.log().matches("receiving flowers").count(), 1, "the transfer is resumed");
}

#[test]
fn push_adapts_its_chunks_to_the_brokers_message_limit() {
    let trainer = Trainer::new();
    // With the first limit the broker closes the connection, with the second it acknowledges a message and drops it.
    for limit in ["max_packet_size 20000", "message_size_limit 20000"] {
        let broker = Mosquitto::with_limit(limit);
        let device = Device::new("pi", broker.port, &trainer);
        let daemon = device.start();
        let bundle = trainer.file(1, unchanged);
        let (statuses, succeeded) =
            delivery_statuses(&mut push_command(broker.port, &bundle, &trainer, &["--device", "pi"]));
        assert!(succeeded, "{limit}: {statuses:?}\n{}", daemon.log());
    }
}

#[test]
fn push_to_a_configured_group_prints_a_table_of_results() {
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &trainer);
    let _daemon = device.start();
    let config = trainer.dir.path().join("trainer.toml");
    let text = format!("[mqtt]\nport = {}\n\n[fleet.groups]\ngarden = [\"pi\", \"greenhouse\"]\n", broker.port);
    fs::write(&config, text).unwrap();
    let mut command = bloomcast();
    command
        .arg("push")
        .arg(trainer.file(1, unchanged))
        .args(["--group", "garden", "--device", "pi", "--config"])
        .arg(&config);
    let result = output(&mut command);
    assert_eq!(result.status.code(), Some(1), "greenhouse never connected");
    let table = String::from_utf8(result.stdout).unwrap();
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((lines.len(), lines[0][0], lines[1][..2].to_vec()), (3, "device", vec!["pi", "confirmed"]), "{table}");
    assert_eq!(lines[2][..2], ["greenhouse", "offline"], "{table}");
    assert!(table.contains("nothing is retained on bloomcast/greenhouse/status"), "{table}");
    let error = String::from_utf8(result.stderr).unwrap();
    assert_eq!(error, "error: not every device accepted the model\n");
}

#[test]
fn a_trial_continues_after_sigterm_and_is_rolled_back_after_a_kill() {
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &trainer).with(&["model.trial_frames=1000"]);
    let version = Bundle::built_in().unwrap().manifest().version;
    let mut daemon = device.start();
    let (port, bundle) = (broker.port, trainer.file(1, unchanged));
    let mut command = push_command(port, &bundle, &trainer, &["--device", "pi"]);
    let pushing = std::thread::spawn(move || delivery_statuses(&mut command));
    daemon.line("is accepted");
    // It is announced with the first frame that it classified.
    wait_until("the model on trial", || device.model_status()["version"] == json!(version + 1));
    assert_eq!(device.model_status()["trial"], json!(true));

    // A reload without a change does not interrupt it.
    daemon.signal("HUP");
    daemon.line("the configuration and the model are unchanged: nothing to reload");

    // After SIGTERM the trial continues; after SIGKILL the previous model is active again.
    daemon.signal("TERM");
    assert!(daemon.wait_for_exit(TIMEOUT).success(), "{}", daemon.log());
    let mut daemon = device.start();
    daemon.line("is active on trial");
    assert_eq!(device.model_status()["trial"], true);
    let listener = Listener::connect(port);
    daemon.kill();
    let daemon = device.start();
    let answer = listener.wait("/pi/model/answer", |answer| answer["answer"] == "rolled-back");
    assert_eq!(answer["version"], version + 1);
    assert_eq!(answer["reason"], "the daemon was killed or crashed during the trial");
    let model_status = device.model_status();
    assert_eq!((&model_status["version"], &model_status["trial"]), (&json!(version), &json!(false)));
    assert!(
        model_status["trouble"].as_str().unwrap().contains("is rolled back: the daemon was killed or crashed"),
        "{model_status}"
    );
    assert!(device.files().is_empty(), "{:?}", device.files());
    let (statuses, _) = pushing.join().unwrap();
    assert_eq!(statuses["pi"].0, "rolled-back", "{statuses:?}");
    drop(daemon);
}

#[test]
fn installs_a_bundle_locally_and_falls_back_from_damaged_slots() {
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let no_keys = tempfile::tempdir().unwrap();
    let device =
        Device::new("pi", broker.port, &trainer).with(&[&format!("model.trusted_keys={}", no_keys.path().display())]);
    let version = Bundle::built_in().unwrap().manifest().version;
    let unsigned = trainer.dir.path().join("unsigned.bloom");
    fs::write(&unsigned, unsigned_bundle(1, unchanged)).unwrap();
    let install = |bundle: &Path, arguments: &[&str]| {
        let mut command = device.command("install");
        command.arg(bundle).args(arguments);
        command
    };

    let (code, text) = failure(&mut install(&unsigned, &[]));
    assert_eq!((code, text.contains("unsigned.bloom: the signature is missing")), (1, true), "{text}");
    let signed = trainer.file(2, unchanged);
    let (_, text) = failure(&mut install(&signed, &[]));
    assert!(text.contains("no key is trusted"), "{text}");
    let failing = trainer.file(3, fails_self_test);
    let (_, text) = failure(&mut install(&failing, &["--trust"]));
    assert!(text.contains("the self-test's feature vector 0"), "{text}");
    assert!(device.files().is_empty());
    // Installing needs no broker, hence no credentials.
    let without_credentials = ["--trust", "--set", "mqtt.credentials_file=/nonexistent"];
    assert!(output(&mut install(&unsigned, &without_credentials)).status.success());
    // `check` does not change the store, the start of the daemon does.
    let checked = output(&mut device.command("check"));
    assert!(String::from_utf8_lossy(&checked.stdout).contains(&format!("model: flowers {}", version + 1)));
    let mut daemon = device.start();
    daemon.line("is confirmed");
    let refused = push_bytes(broker.port, "pi", &fs::read(&signed).unwrap(), |m, model| {
        (m.version, model.version) = (version + 2, version + 2);
    });
    assert!(refusal(&refused).contains("no key is trusted"), "{refused}");
    assert!(output(&mut install(&signed, &["--trust"])).status.success());
    daemon.signal("TERM");
    daemon.wait_for_exit(TIMEOUT);
    let mut daemon = device.start();
    daemon.line("is confirmed");
    daemon.signal("TERM");
    daemon.wait_for_exit(TIMEOUT);

    // First the current slot is damaged, then the previous one; the built-in model remains.
    for expected in [version + 1, version] {
        let state: Value = serde_json::from_slice(&fs::read(device.store().join("state.json")).unwrap()).unwrap();
        let slot = format!("slots/{}.bloom", state["current"]["slot"]["sha256"].as_str().unwrap());
        let mut bytes = fs::read(device.store().join(&slot)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(device.store().join(&slot), bytes).unwrap();
        let mut daemon = device.start();
        let model_status = device.model_status();
        assert_eq!(model_status["version"], expected, "{}", daemon.log());
        assert!(model_status["trouble"].as_str().unwrap().contains("is damaged: its sha256 is"), "{model_status}");
        daemon.signal("TERM");
        daemon.wait_for_exit(TIMEOUT);
    }
    assert!(device.files().is_empty(), "{:?}", device.files());
    let (_, text) = failure(device.command("rollback").args(&without_credentials[1..]));
    assert!(text.contains("there is no previous model"), "{text}");
}

#[test]
fn a_device_with_a_full_disk_refuses_the_model_and_leaves_no_files() {
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &trainer);
    // The shell limits files to 1 MiB; SIGXFSZ is ignored, so that the write fails.
    let daemon = device.command("run");
    let mut limited = Command::new("bash");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$0\" \"$@\""]);
    limited.arg(daemon.get_program()).args(daemon.get_args());
    for (name, value) in daemon.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    let daemon = Process::start(&mut limited);
    daemon.line("connected to");
    let refused = push_bytes(broker.port, "pi", &trainer.bytes(1, unchanged), |_, _| {});
    assert!(refusal(&refused).contains(".bloom: File too large"), "{refused}");
    assert!(device.files().is_empty(), "{:?}", device.files());
    assert_eq!(device.model_status()["version"], Bundle::built_in().unwrap().manifest().version);
}

#[test]
fn a_device_without_a_store_refuses_models_with_the_reason() {
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let pinned = trainer.file(0, unchanged);
    let cases = [
        ("model.store=".to_owned(), "model.store is empty"),
        (format!("model.bundle={}", pinned.display()), "model.bundle names the model"),
    ];
    for (setting, expected) in cases {
        let device = Device::new("pi", broker.port, &trainer).with(&[&setting]);
        let mut daemon = device.start();
        let refused = push_bytes(broker.port, "pi", &trainer.bytes(1, unchanged), |_, _| {});
        assert!(refusal(&refused).contains(expected), "{refused}");
        let (_, text) = failure(device.command("install").arg(&pinned));
        assert!(text.contains(expected), "{text}");
        daemon.signal("TERM");
        daemon.wait_for_exit(TIMEOUT);
    }
}

#[test]
fn keygen_sign_and_verify_on_the_command_line() {
    let (trainer, untrusted) = (Trainer::new(), Trainer::new());
    let (code, text) = failure(bloomcast().arg("keygen").arg("--out").arg(trainer.key_file()));
    assert_eq!((code, text.contains("already exists; a key is never overwritten")), (1, true), "{text}");
    for (key, form) in [("trainer.key", "-noout"), ("trainer.pub", "-pubin")] {
        let mut openssl = Command::new("openssl");
        openssl.args(["pkey", form, "-noout", "-in"]).arg(trainer.dir.path().join(key));
        let read = output(&mut openssl);
        assert!(read.status.success(), "{key}: {}", String::from_utf8_lossy(&read.stderr));
    }
    let path = trainer.dir.path().join("m.bloom");
    fs::write(&path, unsigned_bundle(1, unchanged)).unwrap();
    let verify = |trusted: &Path| {
        let mut command = bloomcast();
        command.arg("verify").arg(&path).arg("--trusted").arg(trusted);
        command
    };
    let public = trainer.dir.path().join("trainer.pub");
    assert!(failure(&mut verify(&public)).1.contains("m.bloom: the signature is missing"));
    let sign = |key: &Path| {
        let mut command = bloomcast();
        command.arg("sign").arg(&path).arg("--key").arg(key);
        command
    };
    assert!(output(&mut sign(&trainer.key_file())).status.success());
    let good = output(&mut verify(&public));
    assert!(String::from_utf8_lossy(&good.stdout).contains("m.bloom: valid, signed by trainer\nflowers "), "{good:?}");
    assert!(output(&mut verify(trainer.dir.path())).status.success(), "a folder of keys");
    assert!(failure(&mut verify(&untrusted.dir.path().join("trainer.pub"))).1.contains("is not trusted"));
    assert!(failure(&mut sign(&public)).1.contains("not a private Ed25519 key"));
    let no_key = failure(bloomcast().env("XDG_CONFIG_HOME", untrusted.dir.path()).arg("sign").arg(&path));
    assert!(no_key.1.contains("`bloomcast keygen` creates one"), "{}", no_key.1);
    let mut bytes = fs::read(&path).unwrap();
    bytes[700] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(failure(&mut verify(&public)).1.contains("manifest.json.sig: does not match"));
    let unknown = failure(bloomcast().arg("push").arg(&path).args(["--group", "garden"]));
    assert_eq!((unknown.0, unknown.1.contains("--group garden: no groups are configured")), (2, true), "{}", unknown.1);
}

#[test]
fn sign_writes_format_1_for_older_devices() {
    let (trainer, dir) = (Trainer::new(), tempfile::tempdir().unwrap());
    let (bundle, older_file) = (&drawn_flowers().bundle, dir.path().join("older.bloom"));
    let mut sign = bloomcast();
    sign.arg("sign").arg(bundle).arg("--key").arg(trainer.key_file()).args(["--format", "1", "--out"]).arg(&older_file);
    let signed = output(&mut sign);
    assert!(signed.status.success(), "{}", String::from_utf8_lossy(&signed.stderr));
    let (newer, older) = (Bundle::read(bundle).unwrap(), Bundle::read(&older_file).unwrap());
    assert_eq!((newer.manifest().format, older.manifest().format), (2, 1));
    assert_eq!(newer.manifest().requires, ["unknown-classes"]);
    assert!(older.manifest().requires.is_empty() && older.contents().ood.unknown_classes().is_none());
    // The signature and the self-test are valid.
    let settings = [
        format!("model.store={}", dir.path().join("store").display()),
        format!("model.trusted_keys={}", trainer.dir.path().display()),
    ];
    let mut install = Command::new("sh");
    install.args(["-c", "umask 077; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_bloomcast"), "install", "--force"]);
    install.arg(&older_file).args(settings.iter().flat_map(|setting| ["--set", setting]));
    let installed = output(&mut install);
    assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));
    // The daemon, another user, can read what root installs.
    let slot = fs::read_dir(dir.path().join("store/slots")).unwrap().next().unwrap().unwrap().path();
    for file in [dir.path().join("store/state.json"), slot] {
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644, "{}", file.display());
    }
}

#[test]
fn the_acl_allows_only_the_trainer_to_publish_models() {
    let (broker, trainer) = (Mosquitto::with_acl(&["pi", "trainer", "home"]), Trainer::new());
    let credentials = |user: &str| {
        let path = trainer.dir.path().join(format!("{user}.credentials"));
        fs::write(&path, format!("{user}\n{user}\n")).unwrap();
        format!("mqtt.credentials_file={}", path.display())
    };
    let device = Device::new("pi", broker.port, &trainer).with(&[&credentials("pi")]);
    let daemon = device.connected();
    let bundle = trainer.file(1, unchanged);
    let push = |user: &str| {
        let to = ["--device", "pi", "--set", &credentials(user)];
        push_command(broker.port, &bundle, &trainer, &to)
    };
    let access = BrokerAccess {
        credentials: Some(Credentials { user: "home".into(), password: "home".into() }),
        ..BrokerAccess::local(broker.port)
    };
    let mut client = Client::connect(&access, &["bloomcast/#".into()]).unwrap();
    for topic in ["model/offer", "model/rollback", "model/chunk/0", "set/pause"] {
        assert!(client.publish(&format!("bloomcast/pi/{topic}"), b"true".to_vec()));
    }
    let (statuses, succeeded) = delivery_statuses(&mut push("trainer"));
    assert!(succeeded, "{statuses:?}");
    let log = daemon.log();
    assert!(
        !log.contains("malformed offer")
            && !log.contains("malformed rollback request")
            && !log.contains("setting changed over MQTT"),
        "{log}"
    );
    let mut confirmed = false;
    while !confirmed {
        let message = client.next(TIMEOUT).unwrap().expect("an answer that every subscriber receives");
        confirmed = message.topic == "bloomcast/pi/model/answer"
            && String::from_utf8_lossy(&message.payload).contains("\"answer\":\"confirmed\"");
    }
}

/// The daemon's log line at the start of each step of an update (transfer, verification, write, trial, confirmed), in order, and
/// the longest time in milliseconds from that line to a kill, which is about how long the step takes.
const STEPS: [(&str, u64); 5] = [
    ("receiving flowers", 60),
    ("its signature verified", 60),
    ("is valid", 20),
    ("is accepted", 300),
    ("is confirmed", 20),
];
const KILLS: usize = 200;

#[test]
fn a_valid_model_is_active_after_a_kill_at_any_step() {
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &trainer).with(&["model.trial_frames=3"]);
    let store = Store::new(&device.store());
    let filters = ["status", "model", "state"].map(|topic| format!("bloomcast/pi/{topic}"));
    let mut listener = Client::connect(&BrokerAccess::local(broker.port), &filters).unwrap();
    let mut active = Bundle::built_in().unwrap().manifest().version;
    let (mut newest, mut kills_after) = (active, [0; STEPS.len()]);
    let seed = std::env::var("PROGRAM_TEST_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("seed of the delays: {seed}");
    let mut delays = fastrand::Rng::with_seed(seed);
    for kill in 0..=KILLS {
        let mut daemon = device.start();
        let model_status = wait_for_active_model(&mut listener);
        let (version, log) = (model_status["version"].as_u64().unwrap(), daemon.log());
        assert!(version == active || version == newest, "{version}, not {active} or {newest}: {log}");
        let killed_on_trial = "is rolled back: the daemon was killed or crashed during the trial";
        assert!(
            model_status["trouble"].as_str().is_none_or(|trouble| trouble.ends_with(killed_on_trial)),
            "{model_status}\n{log}"
        );
        assert!(!model_status["trial"].as_bool().unwrap(), "{model_status}\n{log}");
        let state = store.state().unwrap();
        let model_slots = [Some(state.current.clone()), state.previous.clone()];
        let slots: Vec<Identity> = model_slots.into_iter().flatten().filter_map(slot_identity).collect();
        assert!(slots.iter().all(|slot| store.read(slot).is_ok()), "every slot is valid: {state:?}");
        assert_eq!(slot_identity(state.current).map_or(active, |slot| slot.version), version);
        assert_eq!(device.files().len(), slots.len(), "no other files: {:?}", device.files());
        active = version;
        if kill == KILLS {
            break;
        }
        newest += 1;
        let bundle = trainer.file(newest - Bundle::built_in().unwrap().manifest().version, unchanged);
        let mut pushing = Process::start(&mut push_command(broker.port, &bundle, &trainer, &["--device", "pi"]));
        // The kill comes at a random time between this step and the next.
        let (step, within_ms) = STEPS[kill % STEPS.len()];
        daemon.line(step);
        std::thread::sleep(Duration::from_micros(delays.u64(0..within_ms * 1000)));
        daemon.kill();
        pushing.kill();
        fs::remove_file(bundle).unwrap();
        let log = daemon.log();
        let last = STEPS.iter().rposition(|(step, _)| log.contains(step)).unwrap();
        kills_after[last] += 1;
        if last == STEPS.len() - 1 {
            active = newest;
        }
    }
    assert!(kills_after.iter().all(|kills| *kills >= KILLS / 20), "kills after each step: {kills_after:?}");
}

/// Waits until the daemon is online and classifies with the model on `…/model`; returns that message.
fn wait_for_active_model(listener: &mut Client) -> Value {
    let deadline = Instant::now() + TIMEOUT;
    let (mut online, mut model_status, mut state) = (false, Value::Null, Value::Null);
    while Instant::now() < deadline {
        let Some(message) = listener.next(Duration::from_millis(100)).unwrap() else { continue };
        match message.topic.as_str() {
            "bloomcast/pi/model" => model_status = serde_json::from_slice(&message.payload).unwrap(),
            "bloomcast/pi/state" => state = serde_json::from_slice(&message.payload).unwrap(),
            // The last will: earlier messages are of the previous process.
            _ if message.payload == b"offline" => (online, model_status, state) = (false, Value::Null, Value::Null),
            _ => online = true,
        }
        if online && state["camera_ok"] == true && state["model"] == model_status["version"] {
            return model_status;
        }
    }
    panic!("no model is active; last message: {model_status}");
}

fn slot_identity(slot: ModelSlot) -> Option<Identity> {
    match slot {
        ModelSlot::BuiltIn => None,
        ModelSlot::Slot(slot) => Some(slot),
    }
}
