//! Compares the program built for another architecture, run by an emulator, with the native one: `make arm64-smoke` and
//! `make armhf-smoke`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use bloomcast::demo::drawing;
use serde_json::Value;

use super::tools::{bloomcast, drawn_flowers, json, of_class, photographs_folder};

/// The largest allowed difference of two probabilities: the order of summation differs between the architectures.
const TOLERANCE: f64 = 1e-3;

#[test]
#[ignore = "make arm64-smoke, make armhf-smoke"]
fn emulated_program_returns_the_same_predictions() {
    let program = std::env::var("BLOOMCAST_FOREIGN").expect("BLOOMCAST_FOREIGN: an emulator and a program");
    let dir = tempfile::tempdir().unwrap();
    let (images, model) = pictures(dir.path());
    let mut arguments = program.split_whitespace();
    let mut emulator = Command::new(arguments.next().expect("a program"));
    emulator.args(arguments);

    let native = json(bloomcast().args(["classify", "--json"]).args(&model).args(&images));
    let emulated = json(emulator.args(["classify", "--json"]).args(&model).args(&images));
    let (native, emulated) = (native.as_array().unwrap(), emulated.as_array().unwrap());
    assert_eq!((native.len(), emulated.len()), (images.len(), images.len()));
    let mut worst = 0_f64;
    for (expected, found) in native.iter().zip(emulated) {
        assert_eq!(
            (&expected["file"], &expected["class"]),
            (&found["file"], &found["class"]),
            "{expected} and {found}"
        );
        for (class, _) in drawing::five_flowers() {
            worst = worst.max((probability(expected, class) - probability(found, class)).abs());
        }
    }
    let kind = if model.is_empty() { "photographs" } else { "drawings" };
    println!("{} {kind}: the same classes, probabilities differ by at most {worst:.1e}", images.len());
    assert!(worst <= TOLERANCE, "{worst}");
}

/// Returns twenty photographs of flowers and four without any for the built-in model. Where there are no photographs, returns as
/// many drawings, and the flag that selects the model trained on such drawings.
fn pictures(dir: &Path) -> (Vec<PathBuf>, Vec<OsString>) {
    let photographs = photographs_folder();
    let folder = photographs.as_ref().unwrap_or_else(|| &drawn_flowers().folder);
    let mut images: Vec<PathBuf> =
        drawing::five_flowers().iter().flat_map(|(class, _)| of_class(folder, class, 4)).collect();
    if let Some(folder) = photographs {
        images.extend(non_flowers(&folder.join("../../others")));
        return (images, Vec::new());
    }
    for seed in 0..4 {
        let path = dir.join(format!("scene-{seed}.jpg"));
        drawing::scene(&mut fastrand::Rng::with_seed(seed)).save(&path).unwrap();
        images.push(path);
    }
    (images, vec!["--model".into(), drawn_flowers().bundle.clone().into()])
}

/// Returns four photographs without flowers.
fn non_flowers(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut images: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    images.retain(|path| path.extension().is_some_and(|extension| extension == "jpg"));
    images.sort();
    images.truncate(4);
    assert_eq!(images.len(), 4, "photographs in {}", folder.display());
    images
}

fn probability(prediction: &Value, class: &str) -> f64 {
    let top = prediction["top"].as_array().unwrap().iter();
    top.filter(|entry| entry["class"] == class).map(|entry| entry["confidence"].as_f64().unwrap()).next().unwrap_or(0.0)
}
