//! Models that are pushed, refused, tried, confirmed, taken back: real brokers, real daemons, real signals.

use std::collections::BTreeMap;
use std::fs;
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
use super::tools::{PATIENCE, Process, bloomcast, clear, failure, list, output, photographs};

/// Someone with a key, and models to sign.
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

    /// The folder that devices find the public key in.
    fn keys(&self) -> String {
        format!("model.trusted_keys={}", self.dir.path().display())
    }

    fn key_file(&self) -> PathBuf {
        self.dir.path().join("trainer.key")
    }

    /// The built-in model, `newer` versions newer, with this change.
    fn bytes(&self, newer: u64, change: impl FnOnce(&mut Manifest, &mut Contents)) -> Vec<u8> {
        sign("made", &made(newer, change), &self.key).unwrap()
    }

    fn file(&self, newer: u64, change: impl FnOnce(&mut Manifest, &mut Contents)) -> PathBuf {
        let path = self.dir.path().join(format!("m{newer}.bloom"));
        fs::write(&path, self.bytes(newer, change)).unwrap();
        path
    }
}

fn made(newer: u64, change: impl FnOnce(&mut Manifest, &mut Contents)) -> Vec<u8> {
    let built_in = Bundle::built_in().unwrap();
    let (mut manifest, mut parts) = (built_in.manifest().clone(), built_in.contents().clone());
    manifest.version += newer;
    change(&mut manifest, &mut parts);
    Bundle::new(manifest, parts).to_bytes()
}

fn same(_: &mut Manifest, _: &mut Contents) {}

/// Other weights, which the self-test knows nothing of.
fn broken(manifest: &mut Manifest, parts: &mut Contents) {
    let head = &parts.head;
    let bias: Vec<f32> = head.bias().iter().rev().copied().collect();
    let weight: Vec<f32> = head.weight().iter().map(|w| w * 0.9).collect();
    parts.head = Head::new(head.width(), weight, bias, manifest.temperature).unwrap();
}

/// The built-in model with a weight that is no number; its hashes are right.
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

/// A tar that would leave its folder, were it unpacked there.
fn with_a_trick() -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..16].copy_from_slice(b"../../etc/passwd");
    header.set_size(1);
    header.set_cksum();
    let mut tar = tar::Builder::new(Vec::new());
    tar.append(&header, b"x".as_slice()).unwrap();
    tar.into_inner().unwrap()
}

/// Where a device replays from, and its store; both outlive the process.
struct Device {
    name: &'static str,
    port: u16,
    settings: Vec<String>,
    _images: tempfile::TempDir,
    state: tempfile::TempDir,
}

impl Device {
    fn new(name: &'static str, port: u16, folder: &Path, trainer: &Trainer) -> Self {
        let (images_dir, images) = list(&clear(folder, "daisy", 4));
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

    /// A daemon that the broker says is online: whoever pushes to it finds it there.
    fn start(&self) -> Process {
        let daemon = self.connected();
        Listener::connect(self.port).wait(&format!("/{}/status", self.name), |status| status == "online");
        daemon
    }

    fn store(&self) -> PathBuf {
        self.state.path().join("store")
    }

    /// What lies in the store, by name.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        for folder in [self.store(), self.store().join("slots")] {
            let Ok(entries) = fs::read_dir(folder) else { continue };
            files.extend(entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()));
        }
        files.retain(|name| name != "slots" && name != "state.json");
        files
    }

    /// What is retained on its `…/model`, which is of this life once it says that it is online.
    fn note(&self) -> Value {
        let listener = Listener::connect(self.port);
        let (mut online, mut note) = (false, None);
        while !online || note.is_none() {
            let message = listener.next().unwrap();
            match message.topic.strip_prefix(&format!("bloomcast/{}/", self.name)) {
                Some("status") => online = message.payload == b"online",
                Some("model") => note = Some(serde_json::from_slice(&message.payload).unwrap()),
                _ => {}
            }
        }
        note.unwrap()
    }
}

fn topics(device: &str) -> Topics {
    Topics::new("bloomcast", "homeassistant", DeviceName::new(device).unwrap())
}

/// The program's own `push`.
fn push_command(port: u16, bundle: &Path, trainer: &Trainer, arguments: &[&str]) -> Command {
    let mut command = bloomcast();
    command.arg("push").arg(bundle).args(["--json", "--set", &format!("mqtt.port={port}")]);
    command.arg("--key").arg(trainer.key_file()).args(arguments);
    command
}

/// What became of each device, and whether the exit code says that all is well.
fn endings(command: &mut Command) -> (BTreeMap<String, (String, String)>, bool) {
    let output = output(command);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("no JSON; {}", String::from_utf8_lossy(&output.stderr)));
    let rows = report["devices"].as_array().unwrap().iter();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let rows = rows.map(|row| (text(row, "device"), (text(row, "ending"), text(row, "reason"))));
    (rows.collect(), output.status.success())
}

/// Pushes bytes that the program's own `push` would not even send.
fn push_bytes(port: u16, device: &str, bytes: &[u8], claim: impl FnOnce(&mut Manifest, &mut Identity)) -> PushReport {
    let mut manifest = Bundle::built_in().unwrap().manifest().clone();
    manifest.version += 1;
    let mut model = identity(&manifest, &sha256_hex(bytes));
    claim(&mut manifest, &mut model);
    let parcel =
        PushPayload { bytes: bytes.to_vec(), manifest, model, packet_bytes_max: 65_536, force: false, key: None };
    let devices = vec![topics(device)];
    push::push(&BrokerAccess::local(port), devices, &parcel, &PushOptions::default(), &|_| {}).unwrap()
}

fn refusal(report: &PushReport) -> String {
    assert_eq!(report.devices[0].status, DeliveryStatus::Refused, "{report}");
    report.devices[0].reason.clone()
}

#[test]
fn a_canary_goes_first_and_what_it_refuses_reaches_no_other() {
    let Some(folder) = photographs("a_canary_goes_first_and_what_it_refuses_reaches_no_other") else { return };
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let names = ["pi1", "pi2", "pi3", "pi4"];
    let devices = names.map(|name| Device::new(name, broker.port, &folder, &trainer));
    let mut daemons: Vec<Process> = devices.iter().map(Device::start).collect();
    daemons.pop().unwrap().kill();
    let listener = Listener::connect(broker.port);
    listener.wait("/pi4/status", |status| status == "offline");
    let to = ["--canary", "1", "--device", "pi1", "--device", "pi2", "--device", "pi3", "--device", "pi4"];

    let good = trainer.file(1, same);
    let (ends, all) = endings(&mut push_command(broker.port, &good, &trainer, &to));
    assert!(!all, "one device is offline");
    for name in &names[..3] {
        assert_eq!(ends[*name].0, "confirmed", "{ends:?}");
    }
    assert_eq!(ends["pi4"].0, "offline");
    // In the order in which the broker passed it on: the canary's last word before anybody else's offer.
    let mut heard = Vec::new();
    while heard.iter().filter(|(_, what)| what == "confirmed").count() < 3 {
        let message = listener.next().unwrap();
        let device = message.topic.split('/').nth(1).unwrap().to_owned();
        if message.topic.ends_with("/model/offer") {
            heard.push((device, "offer".to_owned()));
        } else if message.topic.ends_with("/model/answer") {
            let answer: Value = serde_json::from_slice(&message.payload).unwrap();
            heard.push((device, answer["answer"].as_str().unwrap().to_owned()));
        }
        // On a busy machine somebody may ask twice.
        heard.dedup();
    }
    let expected = [("pi1", "offer"), ("pi1", "accepted"), ("pi1", "confirmed")];
    assert_eq!(heard[..3], expected.map(|(device, what)| (device.to_owned(), what.to_owned())));
    let version = Bundle::built_in().unwrap().manifest().version;
    for device in &devices[..3] {
        let note = device.note();
        assert_eq!(
            (&note["version"], &note["trial"], &note["source"]),
            (&json!(version + 1), &json!(false), &json!("store"))
        );
        assert_eq!(note["previous"], "built-in");
    }

    let bad = trainer.file(2, broken);
    let (ends, _) = endings(&mut push_command(broker.port, &bad, &trainer, &to));
    assert_eq!(ends["pi1"].0, "refused");
    assert!(ends["pi1"].1.contains("the self-test's feature vector 0: it gives"), "{ends:?}");
    assert_eq!((ends["pi2"].0.as_str(), ends["pi3"].0.as_str()), ("stopped", "stopped"));
    for device in &devices[..3] {
        assert_eq!(device.note()["version"], version + 1);
        assert_eq!(device.files().len(), 1, "nothing is left behind: {:?}", device.files());
    }
    let offers = |process: &Process| process.log().matches("receiving ").count();
    assert_eq!(daemons.iter().map(offers).collect::<Vec<_>>(), [2, 1, 1]);
}

#[test]
fn what_is_not_as_it_should_be_is_refused_and_the_old_model_decides_on() {
    let Some(folder) = photographs("what_is_not_as_it_should_be_is_refused_and_the_old_model_decides_on") else {
        return;
    };
    let (broker, trainer, stranger) = (Mosquitto::started(None), Trainer::new(), Trainer::new());
    let device = Device::new("pi", broker.port, &folder, &trainer).with(&["decide.classes.roses.enter=0.8"]);
    let mut daemon = device.start();
    let port = broker.port;
    let reason = |bytes: &[u8]| refusal(&push_bytes(port, "pi", bytes, |_, _| {}));

    assert_eq!(reason(&made(1, same)), "it is not signed");
    assert!(reason(&stranger.bytes(1, same)).contains("which is not trusted here; trusted: trainer ("));
    let good = trainer.bytes(1, same);
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    assert!(reason(&flipped).contains("was altered"));
    assert!(reason(&good[..good.len() / 2]).starts_with("model offered: not a bundle"));
    let untested = |_: &mut Manifest, parts: &mut Contents| parts.self_test = None;
    assert!(reason(&trainer.bytes(1, untested)).contains("carries no self-test"));
    assert!(reason(&with_nan()).contains("not finite"));
    assert!(reason(&trainer.bytes(1, broken)).contains("the self-test's feature vector"));
    let lost_class = |manifest: &mut Manifest, _: &mut Contents| {
        let names = manifest.classes.names().iter().map(|name| name.replace("roses", "iris")).collect();
        manifest.classes = Labels::new(names).unwrap();
    };
    let unknown_class = reason(&trainer.bytes(1, lost_class));
    assert_eq!(unknown_class, "decide.classes = roses: the model knows daisy, dandelion, iris, sunflowers, tulips");
    let other_network = |manifest: &mut Manifest, _: &mut Contents| manifest.backbone.sha256 = "0".repeat(64);
    assert!(reason(&trainer.bytes(1, other_network)).contains("was made for the backbone"));
    let other_preprocessing = |manifest: &mut Manifest, _: &mut Contents| manifest.preprocess.std = [0.4; 3];
    assert!(reason(&trainer.bytes(1, other_preprocessing)).contains("the self-test's picture 0"));
    assert!(reason(&with_a_trick()).contains("../../etc/passwd: not the name of a plain file"));
    let giant_manifest = archive::pack([("manifest.json", vec![b' '; 1 << 20].as_slice())]);
    assert!(reason(&giant_manifest).contains("manifest.json: 1048576 bytes, expected at most"));

    // What is claimed is not what comes.
    let older = refusal(&push_bytes(port, "pi", &trainer.bytes(0, |m, _| m.version -= 1), |_, _| {}));
    assert!(older.contains("and was offered as"), "{older}");
    let older = push_bytes(port, "pi", &trainer.bytes(0, |m, _| m.version -= 1), |_, model| model.version -= 2);
    assert!(refusal(&older).contains("is not newer than"), "{older}");
    let altered = push_bytes(port, "pi", &good, |_, model| model.sha256 = "ab".repeat(32));
    assert!(refusal(&altered).contains("is not what was offered"), "{altered}");
    let large = vec![7; (16 << 20) + 1];
    assert!(reason(&large).contains("model.offer_bytes_max allows 16777216"));

    assert_eq!(device.note()["version"], Bundle::built_in().unwrap().manifest().version);
    assert!(device.files().is_empty() && !device.store().join("state.json").exists(), "{:?}", device.files());
    assert!(daemon.is_running() && !daemon.log().contains("panicked"), "{}", daemon.log());
    assert_eq!(push_bytes(port, "pi", &good, |_, _| {}).devices[0].status, DeliveryStatus::Confirmed);
}

#[test]
fn only_a_signed_order_goes_back_or_to_an_older_model() {
    let Some(folder) = photographs("only_a_signed_order_goes_back_or_to_an_older_model") else { return };
    let (broker, trainer, stranger) = (Mosquitto::started(None), Trainer::new(), Trainer::new());
    let device = Device::new("pi", broker.port, &folder, &trainer);
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
        endings(&mut push_command(broker.port, bundle, &trainer, &arguments)).0["pi"].clone()
    };

    let (code, text) = failure(&mut rollback(&trainer));
    assert_eq!((code, text.contains("there is no previous model")), (1, true), "{text}");
    let (first, second) = (trainer.file(1, same), trainer.file(2, same));
    assert_eq!(push(&first, &[]).0, "confirmed");
    assert_eq!(push(&second, &["--dry-run"]).0, "fit");
    assert_eq!(device.note()["version"], version + 1, "a dry run sends nothing");
    assert_eq!(push(&second, &[]).0, "confirmed");
    assert_eq!(push(&second, &[]), ("confirmed".into(), "it is already active".into()));
    assert_eq!(device.note()["previous"], format!("flowers {}", version + 1));

    let (_, text) = failure(&mut rollback(&stranger));
    assert!(text.contains("refused: the order: it is signed by the key") && text.contains("not trusted"), "{text}");
    let listener = Listener::connect(broker.port);
    let back = output(&mut rollback(&trainer));
    assert!(back.status.success(), "{}", String::from_utf8_lossy(&back.stderr));
    assert_eq!(String::from_utf8(back.stdout).unwrap(), format!("pi: flowers {} is rolled back\n", version + 2));
    assert_eq!(device.note()["version"], version + 1);
    assert_eq!(device.files().len(), 1);
    // The same order once more.
    let order = loop {
        let message = listener.next().unwrap();
        if message.topic == "bloomcast/pi/model/rollback" {
            break message.payload;
        }
    };
    let mut again: Value = serde_json::from_slice(&order).unwrap();
    again["transfer"] = json!("0192f3c4-0000-7000-8000-000000000000");
    let client = Client::connect(&BrokerAccess::local(broker.port), &["bloomcast/pi/model/answer".into()]).unwrap();
    assert!(client.publish("bloomcast/pi/model/rollback", serde_json::to_vec(&again).unwrap()));
    let replayed = listener.wait("/pi/model/answer", |answer| answer["transfer"] == again["transfer"]);
    assert!(replayed["reason"].as_str().unwrap().contains("the order is for generation"), "{replayed}");

    // What was taken back does not come back by itself, and an older one neither.
    let (ending, reason) = push(&second, &[]);
    assert_eq!(
        (ending.as_str(), reason.contains("was rolled back here, or failed its trial; --force")),
        ("refused", true),
        "{reason}"
    );
    let older = trainer.file(0, |manifest, _| manifest.version -= 1);
    let (ending, reason) = push(&older, &[]);
    assert_eq!((ending.as_str(), reason.contains("is not newer than the device's")), ("refused", true), "{reason}");
    assert_eq!(push(&older, &["--force"]).0, "confirmed");
    assert_eq!(device.note()["version"], version - 1);
    let replay = push_bytes(broker.port, "pi", &fs::read(&older).unwrap(), |_, model| model.version = version - 1);
    assert_eq!(replay.devices[0].reason, "it is already active");
    assert_eq!(push(&second, &["--force"]).0, "confirmed");
    assert_eq!(device.note()["version"], version + 2);
}

#[test]
fn the_second_of_two_pushes_is_told_so() {
    let Some(folder) = photographs("the_second_of_two_pushes_is_told_so") else { return };
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &folder, &trainer);
    let daemon = device.start();
    let bundle = Bundle::from_bytes("m", &trainer.bytes(1, same)).unwrap();
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
    let second = trainer.file(2, same);
    let (ends, _) = endings(&mut push_command(broker.port, &second, &trainer, &["--device", "pi"]));
    assert_eq!(ends["pi"].0, "refused");
    assert!(ends["pi"].1.starts_with("busy: flowers ") && ends["pi"].1.ends_with(" is being received"), "{ends:?}");
}

#[test]
fn a_push_goes_on_after_the_broker_was_killed() {
    let Some(folder) = photographs("a_push_goes_on_after_the_broker_was_killed") else { return };
    let (mut broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &folder, &trainer);
    let daemon = device.start();
    let bundle = trainer.file(1, same);
    let packets = ["--device", "pi", "--set", "mqtt.packet_bytes_max=4096"];
    let mut command = push_command(broker.port, &bundle, &trainer, &packets);
    std::thread::scope(|scope| {
        let listener = Listener::connect(broker.port);
        let pushing = scope.spawn(|| endings(&mut command));
        let next = |progress: &Value| progress["next"].as_u64().unwrap();
        listener.wait("/pi/model/progress", |progress| next(progress) >= 20);
        // The device stands still, so that the transfer cannot be over before the broker is dead.
        daemon.signal("STOP");
        broker.kill();
        daemon.signal("CONT");
        daemon.line("connecting again");
        broker.start();
        let listener = Listener::connect(broker.port);
        let again = listener.wait("/pi/model/progress", |progress| progress["again"] == true);
        assert!(next(&again) >= 20 && next(&again) < again["chunks"].as_u64().unwrap(), "in the middle: {again}");
        let (ends, all) = pushing.join().unwrap();
        assert!(all && ends["pi"].0 == "confirmed", "{ends:?}");
    });
    assert_eq!(daemon.log().matches("receiving flowers").count(), 1, "it went on where it was");
}

#[test]
fn a_broker_that_takes_only_small_messages_gets_small_pieces() {
    let Some(folder) = photographs("a_broker_that_takes_only_small_messages_gets_small_pieces") else { return };
    let trainer = Trainer::new();
    // One breaks the connection, the other takes the message and drops it.
    for limit in ["max_packet_size 20000", "message_size_limit 20000"] {
        let broker = Mosquitto::limited(limit);
        let device = Device::new("pi", broker.port, &folder, &trainer);
        let daemon = device.start();
        let bundle = trainer.file(1, same);
        let (ends, all) = endings(&mut push_command(broker.port, &bundle, &trainer, &["--device", "pi"]));
        assert!(all, "{limit}: {ends:?}\n{}", daemon.log());
    }
}

#[test]
fn a_group_of_the_configuration_is_pushed_to_and_the_table_says_how_it_went() {
    let Some(folder) = photographs("a_group_of_the_configuration_is_pushed_to_and_the_table_says_how_it_went") else {
        return;
    };
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &folder, &trainer);
    let _daemon = device.start();
    let config = trainer.dir.path().join("trainer.toml");
    let text = format!("[mqtt]\nport = {}\n\n[fleet.groups]\ngarden = [\"pi\", \"greenhouse\"]\n", broker.port);
    fs::write(&config, text).unwrap();
    let mut command = bloomcast();
    command
        .arg("push")
        .arg(trainer.file(1, same))
        .args(["--group", "garden", "--device", "pi", "--config"])
        .arg(&config);
    let result = output(&mut command);
    assert_eq!(result.status.code(), Some(1), "greenhouse was never here");
    let table = String::from_utf8(result.stdout).unwrap();
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((lines.len(), lines[0][0], lines[1][..2].to_vec()), (3, "device", vec!["pi", "confirmed"]), "{table}");
    assert_eq!(lines[2][..2], ["greenhouse", "offline"], "{table}");
    assert!(table.contains("nothing is retained on bloomcast/greenhouse/status"), "{table}");
    let error = String::from_utf8(result.stderr).unwrap();
    assert_eq!(error, "error: not every device took the model\n");
}

#[test]
fn a_trial_that_does_not_end_in_order_is_rolled_back_and_one_that_is_stopped_goes_on() {
    let Some(folder) = photographs("a_trial_that_does_not_end_in_order_is_rolled_back_and_one_that_is_stopped_goes_on")
    else {
        return;
    };
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &folder, &trainer).with(&["model.trial_frames=1000"]);
    let version = Bundle::built_in().unwrap().manifest().version;
    let mut daemon = device.start();
    let (port, bundle) = (broker.port, trainer.file(1, same));
    let mut command = push_command(port, &bundle, &trainer, &["--device", "pi"]);
    let pushing = std::thread::spawn(move || endings(&mut command));
    daemon.line("is accepted");
    let note = device.note();
    assert_eq!((&note["version"], &note["trial"]), (&json!(version + 1), &json!(true)));

    // Stopped in order: it goes on. Killed: the old one decides again.
    daemon.signal("TERM");
    assert!(daemon.ended(PATIENCE).success(), "{}", daemon.log());
    let mut daemon = device.start();
    daemon.line("is active on trial");
    assert_eq!(device.note()["trial"], true);
    let listener = Listener::connect(port);
    daemon.kill();
    let daemon = device.start();
    let told = listener.wait("/pi/model/answer", |answer| answer["answer"] == "rolled-back");
    assert_eq!(told["version"], version + 1);
    assert_eq!(told["reason"], "the program did not end in order while it was on trial");
    let note = device.note();
    assert_eq!((&note["version"], &note["trial"]), (&json!(version), &json!(false)));
    assert!(note["trouble"].as_str().unwrap().contains("is rolled back: the program did not end in order"), "{note}");
    assert!(device.files().is_empty(), "{:?}", device.files());
    let (ends, _) = pushing.join().unwrap();
    assert_eq!(ends["pi"].0, "rolled-back", "{ends:?}");
    drop(daemon);
}

#[test]
fn a_model_is_installed_by_hand_and_a_damaged_one_gives_way() {
    let Some(folder) = photographs("a_model_is_installed_by_hand_and_a_damaged_one_gives_way") else { return };
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let no_keys = tempfile::tempdir().unwrap();
    let device = Device::new("pi", broker.port, &folder, &trainer)
        .with(&[&format!("model.trusted_keys={}", no_keys.path().display())]);
    let version = Bundle::built_in().unwrap().manifest().version;
    let unsigned = trainer.dir.path().join("unsigned.bloom");
    fs::write(&unsigned, made(1, same)).unwrap();
    let install = |bundle: &Path, arguments: &[&str]| {
        let mut command = device.command("install");
        command.arg(bundle).args(arguments);
        command
    };

    let (code, text) = failure(&mut install(&unsigned, &[]));
    assert_eq!((code, text.contains("unsigned.bloom: it is not signed")), (1, true), "{text}");
    let signed = trainer.file(2, same);
    let (_, text) = failure(&mut install(&signed, &[]));
    assert!(text.contains("no key is trusted here"), "{text}");
    let broken = trainer.file(3, broken);
    let (_, text) = failure(&mut install(&broken, &["--trust"]));
    assert!(text.contains("the self-test's feature vector 0"), "{text}");
    assert!(device.files().is_empty());
    assert!(output(&mut install(&unsigned, &["--trust"])).status.success());
    // A check changes nothing, the start of the daemon does.
    let checked = output(&mut device.command("check"));
    assert!(String::from_utf8_lossy(&checked.stdout).contains(&format!("model: flowers {}", version + 1)));
    let mut daemon = device.start();
    daemon.line("is confirmed");
    let refused = push_bytes(broker.port, "pi", &fs::read(&signed).unwrap(), |m, model| {
        (m.version, model.version) = (version + 2, version + 2);
    });
    assert!(refusal(&refused).contains("no key is trusted here"), "{refused}");
    assert!(output(&mut install(&signed, &["--trust"])).status.success());
    daemon.signal("TERM");
    daemon.ended(PATIENCE);
    let mut daemon = device.start();
    daemon.line("is confirmed");
    daemon.signal("TERM");
    daemon.ended(PATIENCE);

    // Current, previous, and then what cannot be damaged.
    for expected in [version + 1, version] {
        let state: Value = serde_json::from_slice(&fs::read(device.store().join("state.json")).unwrap()).unwrap();
        let slot = format!("slots/{}.bloom", state["current"]["slot"]["sha256"].as_str().unwrap());
        let mut bytes = fs::read(device.store().join(&slot)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(device.store().join(&slot), bytes).unwrap();
        let mut daemon = device.start();
        let note = device.note();
        assert_eq!(note["version"], expected, "{}", daemon.log());
        assert!(note["trouble"].as_str().unwrap().contains("is damaged: its sha256 is"), "{note}");
        daemon.signal("TERM");
        daemon.ended(PATIENCE);
    }
    assert!(device.files().is_empty(), "{:?}", device.files());
    let (_, text) = failure(&mut device.command("rollback"));
    assert!(text.contains("there is no previous model"), "{text}");
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_behind() {
    let Some(folder) = photographs("a_full_disk_is_said_and_leaves_nothing_behind") else { return };
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &folder, &trainer);
    // No file may grow beyond a megabyte; the signal that says so is ignored, and the write fails.
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
    let refused = push_bytes(broker.port, "pi", &trainer.bytes(1, same), |_, _| {});
    assert!(refusal(&refused).contains(".bloom: File too large"), "{refused}");
    assert!(device.files().is_empty(), "{:?}", device.files());
    assert_eq!(device.note()["version"], Bundle::built_in().unwrap().manifest().version);
}

#[test]
fn a_device_that_keeps_no_models_says_why() {
    let Some(folder) = photographs("a_device_that_keeps_no_models_says_why") else { return };
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let pinned = trainer.file(0, same);
    let cases = [
        ("model.store=".to_owned(), "model.store is empty"),
        (format!("model.bundle={}", pinned.display()), "model.bundle names the model"),
    ];
    for (setting, expected) in cases {
        let device = Device::new("pi", broker.port, &folder, &trainer).with(&[&setting]);
        let mut daemon = device.start();
        let refused = push_bytes(broker.port, "pi", &trainer.bytes(1, same), |_, _| {});
        assert!(refusal(&refused).contains(expected), "{refused}");
        let (_, text) = failure(device.command("install").arg(&pinned));
        assert!(text.contains(expected), "{text}");
        daemon.signal("TERM");
        daemon.ended(PATIENCE);
    }
}

#[test]
fn keys_and_signatures_on_the_command_line() {
    let (trainer, stranger) = (Trainer::new(), Trainer::new());
    let (code, text) = failure(bloomcast().arg("keygen").arg("--out").arg(trainer.key_file()));
    assert_eq!((code, text.contains("already exists; a key is never overwritten")), (1, true), "{text}");
    for (key, form) in [("trainer.key", "-noout"), ("trainer.pub", "-pubin")] {
        let mut openssl = Command::new("openssl");
        openssl.args(["pkey", form, "-noout", "-in"]).arg(trainer.dir.path().join(key));
        let read = output(&mut openssl);
        assert!(read.status.success(), "{key}: {}", String::from_utf8_lossy(&read.stderr));
    }
    let path = trainer.dir.path().join("m.bloom");
    fs::write(&path, made(1, same)).unwrap();
    let verify = |trusted: &Path| {
        let mut command = bloomcast();
        command.arg("verify").arg(&path).arg("--trusted").arg(trusted);
        command
    };
    let public = trainer.dir.path().join("trainer.pub");
    assert!(failure(&mut verify(&public)).1.contains("m.bloom: it is not signed"));
    let sign = |key: &Path| {
        let mut command = bloomcast();
        command.arg("sign").arg(&path).arg("--key").arg(key);
        command
    };
    assert!(output(&mut sign(&trainer.key_file())).status.success());
    let good = output(&mut verify(&public));
    assert!(String::from_utf8_lossy(&good.stdout).contains("m.bloom: good, signed by trainer\nflowers "), "{good:?}");
    assert!(output(&mut verify(trainer.dir.path())).status.success(), "a folder of keys");
    assert!(failure(&mut verify(&stranger.dir.path().join("trainer.pub"))).1.contains("is not trusted here"));
    assert!(failure(&mut sign(&public)).1.contains("not a private Ed25519 key"));
    let no_key = failure(bloomcast().env("XDG_CONFIG_HOME", stranger.dir.path()).arg("sign").arg(&path));
    assert!(no_key.1.contains("`bloomcast keygen` makes one"), "{}", no_key.1);
    let mut bytes = fs::read(&path).unwrap();
    bytes[700] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(failure(&mut verify(&public)).1.contains("manifest.json.sig: does not fit"));
    let unknown = failure(bloomcast().arg("push").arg(&path).args(["--group", "garden"]));
    assert_eq!((unknown.0, unknown.1.contains("--group garden: not in [fleet.groups]")), (2, true), "{}", unknown.1);
}

#[test]
fn only_the_trainer_may_send_models_where_the_acl_is_ours() {
    let Some(folder) = photographs("only_the_trainer_may_send_models_where_the_acl_is_ours") else { return };
    let (broker, trainer) = (Mosquitto::guarded(&["pi", "trainer", "home"]), Trainer::new());
    let credentials = |user: &str| {
        let path = trainer.dir.path().join(format!("{user}.credentials"));
        fs::write(&path, format!("{user}\n{user}\n")).unwrap();
        format!("mqtt.credentials_file={}", path.display())
    };
    let device = Device::new("pi", broker.port, &folder, &trainer).with(&[&credentials("pi")]);
    let daemon = device.connected();
    let bundle = trainer.file(1, same);
    let push = |user: &str| {
        let to = ["--device", "pi", "--set", &credentials(user)];
        push_command(broker.port, &bundle, &trainer, &to)
    };
    let access = BrokerAccess {
        credentials: Some(Credentials { user: "home".into(), password: "home".into() }),
        ..BrokerAccess::local(broker.port)
    };
    let mut home = Client::connect(&access, &["bloomcast/#".into()]).unwrap();
    for topic in ["model/offer", "model/rollback", "model/chunk/0", "set/pause"] {
        assert!(home.publish(&format!("bloomcast/pi/{topic}"), b"true".to_vec()));
    }
    let (ends, all) = endings(&mut push("trainer"));
    assert!(all, "{ends:?}");
    let log = daemon.log();
    assert!(
        !log.contains("malformed offer")
            && !log.contains("malformed rollback request")
            && !log.contains("setting changed over MQTT"),
        "{log}"
    );
    let mut confirmed = false;
    while !confirmed {
        let message = home.next(PATIENCE).unwrap().expect("who looks on is told");
        confirmed = message.topic == "bloomcast/pi/model/answer"
            && String::from_utf8_lossy(&message.payload).contains("\"answer\":\"confirmed\"");
    }
}

/// Lines of the daemon's log, one a step of an install, in order; and within how many milliseconds after it a kill comes, which
/// is about how long the step takes: it receives, proves, writes, is on trial, has confirmed.
const STEPS: [(&str, u64); 5] = [
    ("receiving flowers", 60),
    ("has come whole", 60),
    ("has proved itself", 20),
    ("is accepted", 300),
    ("is confirmed", 20),
];
const KILLS: usize = 200;

#[test]
fn whenever_the_power_goes_one_whole_model_decides() {
    let Some(folder) = photographs("whenever_the_power_goes_one_whole_model_decides") else { return };
    let (broker, trainer) = (Mosquitto::started(None), Trainer::new());
    let device = Device::new("pi", broker.port, &folder, &trainer).with(&["model.trial_frames=3"]);
    let store = Store::new(&device.store());
    let heard = ["status", "model", "state"].map(|topic| format!("bloomcast/pi/{topic}"));
    let mut listener = Client::connect(&BrokerAccess::local(broker.port), &heard).unwrap();
    let mut decides = Bundle::built_in().unwrap().manifest().version;
    let (mut newest, mut reached) = (decides, [0; STEPS.len()]);
    for kill in 0..=KILLS {
        let mut daemon = device.start();
        let note = one_model(&mut listener);
        let (version, log) = (note["version"].as_u64().unwrap(), daemon.log());
        assert!(version == decides || version == newest, "{version}, not {decides} or {newest}: {log}");
        let died_on_trial = "is rolled back: the program did not end in order while it was on trial";
        assert!(note["trouble"].as_str().is_none_or(|trouble| trouble.ends_with(died_on_trial)), "{note}\n{log}");
        assert!(!note["trial"].as_bool().unwrap(), "{note}\n{log}");
        let state = store.state().unwrap();
        let places = [Some(state.current.clone()), state.previous.clone()];
        let slots: Vec<Identity> = places.into_iter().flatten().filter_map(slot).collect();
        assert!(slots.iter().all(|slot| store.read(slot).is_ok()), "every model is whole: {state:?}");
        assert_eq!(slot(state.current).map_or(decides, |slot| slot.version), version);
        assert_eq!(device.files().len(), slots.len(), "nothing else is there: {:?}", device.files());
        decides = version;
        if kill == KILLS {
            break;
        }
        newest += 1;
        let bundle = trainer.file(newest - Bundle::built_in().unwrap().manifest().version, same);
        let mut pushing = Process::start(&mut push_command(broker.port, &bundle, &trainer, &["--device", "pi"]));
        // Up to a step, and then somewhere between it and the next.
        let (step, within_ms) = STEPS[kill % STEPS.len()];
        daemon.line(step);
        std::thread::sleep(Duration::from_micros(fastrand::u64(0..within_ms * 1000)));
        daemon.kill();
        pushing.kill();
        fs::remove_file(bundle).unwrap();
        let log = daemon.log();
        let last = STEPS.iter().rposition(|(step, _)| log.contains(step)).unwrap();
        reached[last] += 1;
        if last == STEPS.len() - 1 {
            decides = newest;
        }
    }
    assert!(reached.iter().all(|kills| *kills >= KILLS / 20), "kills after each step: {reached:?}");
}

/// Waits until the daemon says which model decides, and that it does; gives what it says of it.
fn one_model(listener: &mut Client) -> Value {
    let deadline = Instant::now() + PATIENCE;
    let (mut online, mut note, mut state) = (false, Value::Null, Value::Null);
    while Instant::now() < deadline {
        let Some(message) = listener.next(Duration::from_millis(100)).unwrap() else { continue };
        match message.topic.as_str() {
            "bloomcast/pi/model" => note = serde_json::from_slice(&message.payload).unwrap(),
            "bloomcast/pi/state" => state = serde_json::from_slice(&message.payload).unwrap(),
            // The last will: what was said before is of the life before.
            _ if message.payload == b"offline" => (online, note, state) = (false, Value::Null, Value::Null),
            _ => online = true,
        }
        if online && state["camera_ok"] == true && state["model"] == note["version"] {
            return note;
        }
    }
    panic!("no model decides; the last that was told: {note}");
}

fn slot(place: ModelSlot) -> Option<Identity> {
    match place {
        ModelSlot::BuiltIn => None,
        ModelSlot::Slot(slot) => Some(slot),
    }
}
