//! The programs in `examples/` that show the use of the library.

use std::path::{Path, PathBuf};
use std::process::Command;

use bloomcast::mqtt::BrokerAccess;
use bloomcast::mqtt::client::Client;
use serde_json::Value;

use super::broker::Mosquitto;
use super::tools::{TIMEOUT, bloomcast, confident_drawings, drawn_flowers, json, of_class, output};

/// Returns the command of an example, which Cargo builds with the tests.
fn example(name: &str) -> Command {
    let folder = Path::new(env!("CARGO_BIN_EXE_bloomcast")).with_file_name("examples");
    Command::new(folder.join(name))
}

#[test]
fn classify_file_prints_the_class_and_every_probability() {
    let drawn = drawn_flowers();
    let image = confident_drawings("roses", 1).remove(0);
    let result = output(example("classify_file").arg(&image).arg(&drawn.bundle));
    let text = String::from_utf8(result.stdout).unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines[0], lines.len()), ("roses", 6), "{text}");
    let probability: f32 = lines[3].strip_prefix("roses").unwrap().trim().parse().unwrap();
    assert!(probability > 0.9, "{text}");
}

#[test]
fn train_model_writes_a_bundle_that_the_program_uses() {
    let drawn = drawn_flowers();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    super::workstation::dataset(&drawn.folder, &path("photos"), 0, 10);
    let result = output(example("train_model").args([path("photos"), path("run")]));
    let text = String::from_utf8(result.stdout).unwrap();
    assert!(text.contains(" validation images: accuracy "), "{text}{}", String::from_utf8_lossy(&result.stderr));
    let images: Vec<PathBuf> = of_class(&drawn.folder, "sunflowers", 20).split_off(10);
    let found = json(bloomcast().args(["classify", "--json", "--model"]).arg(path("run/model.bloom")).args(&images));
    let found: Vec<&Value> = found.as_array().unwrap().iter().filter(|image| image["class"] == "sunflowers").collect();
    assert!(found.len() >= 8, "{found:?}");
}

#[test]
fn own_source_publishes_the_frames_of_the_program() {
    let broker = Mosquitto::started(None);
    let mut listener = Client::connect(&BrokerAccess::local(broker.port), &["bloomcast/example/#".into()]).unwrap();
    let result = output(example("own_source").arg(broker.port.to_string()));
    let text = String::from_utf8(result.stdout).unwrap();
    assert!(text.contains("captured=10 ") && text.contains(" broken=0 "), "{text}");
    let mut topics = Vec::new();
    while let Some(message) = listener.next(TIMEOUT).unwrap() {
        topics.push(message.topic);
        if message.payload == b"offline" {
            break;
        }
    }
    for topic in ["bloomcast/example/state", "bloomcast/example/model", "bloomcast/example/status"] {
        assert!(topics.iter().any(|received| received == topic), "{topic}: {topics:?}");
    }
}
