//! Measures a push over loopback: the time until the model is confirmed and the longest gap between two predictions.
//!
//! Runs mosquitto and a daemon that replays five frames a second, as by default.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bloomcast::bundle::{Bundle, Contents, Manifest, PrivateKey, SelfTest, sign};
use bloomcast::config::Config;
use bloomcast::daemon::{Daemon, StopReason};
use bloomcast::mqtt::access::BrokerAccess;
use bloomcast::mqtt::topics::DeviceName;
use bloomcast::update::protocol::identity;
use bloomcast::update::workstation::delivery::PushPayload;
use bloomcast::update::workstation::push::{PushOptions, push};
use bloomcast::vision::backbone::MOBILENET_V2;
use bloomcast::vision::{Head, test_pattern};

const ROUNDS: u64 = 5;

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let (port, mut broker) = mosquitto();
    let key = dir.path().join("trainer.key");
    PrivateKey::generate(&key).unwrap();
    let key = PrivateKey::read(&key).unwrap();
    let config = config(dir.path(), port);
    let topics = config.topics.for_device(DeviceName::new("bench").unwrap());
    let (classified, predictions) = mpsc::sync_channel(100_000);
    let daemon = Daemon::prepare(config).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let daemon = std::thread::spawn(move || {
        let stop_requested = async {
            drop(stopped.await);
            StopReason::Stop
        };
        daemon.run(stop_requested, Box::new(move |_| classified.try_send(Instant::now()).unwrap())).unwrap();
    });
    predictions.recv().unwrap();

    let head: fn(&mut Manifest, &mut Contents) = |manifest, contents| {
        let (width, bias) = (contents.head.width(), contents.head.bias().to_vec());
        let weight = contents.head.weight().iter().map(|weight| weight * 0.99).collect();
        contents.head = Head::new(width, weight, bias, manifest.temperature).unwrap();
    };
    let frozen = |_: &mut Manifest, contents: &mut Contents| contents.last_conv = None;
    let embedded = |_: &mut Manifest, contents: &mut Contents| contents.backbone = Some(MOBILENET_V2.to_vec());
    println!("{:34} {:>9} {:>12} {:>12} {:>12}", "model", "bytes", "confirmed s", "worst s", "longest gap");
    let mut version = 0;
    for (name, change) in
        [("another head", head), ("another head, no convolution", frozen), ("with its own network", embedded)]
    {
        let (mut times, mut gaps, mut bytes) = (Vec::new(), Vec::new(), 0);
        for _ in 0..ROUNDS {
            version += 1;
            let payload = payload(version, change, &key);
            bytes = payload.bytes.len();
            while predictions.try_recv().is_ok() {}
            let start = Instant::now();
            let report =
                push(&BrokerAccess::local(port), vec![topics.clone()], &payload, &PushOptions::default(), &|_| {})
                    .unwrap();
            assert!(report.is_good(), "{report}");
            times.push(start.elapsed());
            let frames: Vec<Instant> = predictions.try_iter().collect();
            gaps.push(frames.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default());
        }
        times.sort_unstable();
        let (median, worst) = (times[times.len() / 2].as_secs_f64(), times[times.len() - 1].as_secs_f64());
        let gap = gaps.into_iter().max().unwrap_or_default().as_millis();
        println!("{name:34} {bytes:>9} {median:>12.2} {worst:>12.2} {gap:>9} ms");
    }
    drop(stop);
    daemon.join().unwrap();
    broker.kill().unwrap();
    broker.wait().unwrap();
}

/// Returns the built-in model with this change and a new self-test; its version is higher by `version_increment`.
fn payload(version_increment: u64, change: fn(&mut Manifest, &mut Contents), key: &PrivateKey) -> PushPayload {
    let built_in = Bundle::built_in().unwrap();
    let (mut manifest, mut contents) = (built_in.manifest().clone(), built_in.contents().clone());
    manifest.version += version_increment;
    change(&mut manifest, &mut contents);
    let (features, images) = contents.self_test.take().unwrap().into_inputs();
    let mut bundle = Bundle::new(manifest, contents);
    let mut classifier = bundle.classifier(None).unwrap();
    bundle.set_self_test(SelfTest::record(&mut classifier, features, images).unwrap());
    let bytes = sign("bench", &bundle.to_bytes(), key).unwrap();
    let signed = Bundle::from_bytes("bench", &bytes).unwrap();
    let model = identity(signed.manifest(), signed.sha256());
    PushPayload { model, manifest: signed.manifest().clone(), bytes, packet_bytes_max: 65_536, force: false, key: None }
}

fn config(dir: &Path, port: u16) -> Config {
    let image = dir.join("pattern.jpg");
    std::fs::write(&image, test_pattern::jpeg(640, 480)).unwrap();
    let list = dir.join("list.txt");
    std::fs::write(&list, image.display().to_string()).unwrap();
    let settings = [
        "device.name=bench".to_owned(),
        format!("mqtt.port={port}"),
        "camera.source=replay".into(),
        format!("camera.replay.path={}", list.display()),
        format!("model.store={}", dir.join("store").display()),
        format!("model.trusted_keys={}", dir.display()),
        "model.offer_bytes_max=33554432".into(),
    ];
    Config::from_settings(&settings).unwrap()
}

fn mosquitto() -> (u16, Child) {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let debian = Path::new("/usr/sbin/mosquitto");
    let program = if debian.is_file() { debian } else { Path::new("mosquitto") };
    let broker = Command::new(program).args(["-p", &port.to_string()]).stderr(Stdio::null()).spawn();
    let broker = broker.expect("mosquitto starts; `make setup` installs it");
    let start = Instant::now();
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "mosquitto does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    (port, broker)
}
