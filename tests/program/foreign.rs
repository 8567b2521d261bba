//! Compares the program built for another architecture, run by an emulator, with the native one: `make arm64-smoke`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::tools::{bloomcast, json, of_class, photographs};

/// The largest allowed difference of two probabilities: the order of summation differs between the architectures.
const TOLERANCE: f64 = 1e-3;

#[test]
fn emulated_program_returns_the_same_predictions() {
    let Ok(program) = std::env::var("BLOOMCAST_FOREIGN") else {
        // `writeln!` to standard error bypasses the capture of the test's output.
        let _ = writeln!(
            std::io::stderr(),
            "\nskipped: emulated_program_returns_the_same_predictions: no BLOOMCAST_FOREIGN"
        );
        return;
    };
    let Some(flowers) = photographs("emulated_program_returns_the_same_predictions") else { return };
    let classes = ["daisy", "dandelion", "roses", "sunflowers", "tulips"];
    let mut images: Vec<PathBuf> = classes.iter().flat_map(|class| of_class(&flowers, class, 4)).collect();
    images.extend(non_flowers(&flowers));
    let mut arguments = program.split_whitespace();
    let mut emulator = Command::new(arguments.next().expect("a program"));
    emulator.args(arguments);

    let native = json(bloomcast().args(["classify", "--json"]).args(&images));
    let emulated = json(emulator.args(["classify", "--json"]).args(&images));
    let (native, emulated) = (native.as_array().unwrap(), emulated.as_array().unwrap());
    assert_eq!((native.len(), emulated.len()), (images.len(), images.len()));
    let mut worst = 0_f64;
    for (expected, found) in native.iter().zip(emulated) {
        assert_eq!(
            (&expected["file"], &expected["class"]),
            (&found["file"], &found["class"]),
            "{expected} and {found}"
        );
        for class in classes {
            worst = worst.max((probability(expected, class) - probability(found, class)).abs());
        }
    }
    println!("{} photographs: the same classes, probabilities differ by at most {worst:.1e}", images.len());
    assert!(worst <= TOLERANCE, "{worst}");
}

/// Returns up to four photographs without flowers, if the folder exists.
fn non_flowers(flowers: &Path) -> Vec<PathBuf> {
    let Ok(entries) = flowers.join("../../others").read_dir() else { return Vec::new() };
    let mut images: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    images.retain(|path| path.extension().is_some_and(|extension| extension == "jpg"));
    images.sort();
    images.truncate(4);
    images
}

fn probability(prediction: &Value, class: &str) -> f64 {
    let top = prediction["top"].as_array().unwrap().iter();
    top.filter(|entry| entry["class"] == class).map(|entry| entry["confidence"].as_f64().unwrap()).next().unwrap_or(0.0)
}
