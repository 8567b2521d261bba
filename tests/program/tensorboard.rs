//! Reads a run's event file with TensorBoard's own reader: `make test-tensorboard`.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::tools::{drawn_flowers, json};

#[test]
#[ignore = "make test-tensorboard"]
fn tensorboard_reads_the_metrics_of_every_epoch_and_the_images() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/tensorboard/bin/python");
    assert!(python.is_file(), "no target/tensorboard; `make test-tensorboard` makes it");
    let run = drawn_flowers().bundle.parent().unwrap();
    let metrics: Value = serde_json::from_slice(&std::fs::read(run.join("metrics.json")).unwrap()).unwrap();
    let found = json(Command::new(python).arg(root.join("tests/program/read_events.py")).arg(run));

    let epochs = metrics["epochs"].as_array().unwrap();
    assert!(epochs.len() > 1, "{epochs:?}");
    let accuracy: Vec<Value> =
        epochs.iter().map(|epoch| serde_json::json!([epoch["epoch"], epoch["val"]["accuracy"]])).collect();
    let scalars = found["scalars"]["accuracy/val"].as_array().unwrap();
    assert_eq!(scalars.len(), accuracy.len(), "{scalars:?}");
    for (read, written) in scalars.iter().zip(&accuracy) {
        assert_eq!(read[0], written[0]);
        let difference = read[1].as_f64().unwrap() - written[1].as_f64().unwrap();
        assert!(difference.abs() < 1e-6, "{read} instead of {written}");
    }
    for tag in ["confusion", "predictions"] {
        let image = &found["images"][tag][0];
        assert_eq!(image[0], metrics["best_epoch"], "{tag}");
        assert!(image[1].as_u64().unwrap() > 100 && image[2].as_u64().unwrap() > 100, "{tag}: {image}");
    }
}
