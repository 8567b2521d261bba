//! The program for another processor, run by an emulator, against the one for this: `make arm64-smoke`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::tools::{bloomcast, json, of_class, photographs};

/// How far two probabilities may lie from each other: sums are taken in another order there.
const TOLERANCE: f64 = 1e-3;

#[test]
fn another_processor_gives_the_same_answers() {
    let Ok(foreign) = std::env::var("BLOOMCAST_FOREIGN") else {
        // Past the capture of a test's output.
        let _ =
            writeln!(std::io::stderr(), "\nskipped: another_processor_gives_the_same_answers: no BLOOMCAST_FOREIGN");
        return;
    };
    let Some(flowers) = photographs("another_processor_gives_the_same_answers") else { return };
    let classes = ["daisy", "dandelion", "roses", "sunflowers", "tulips"];
    let mut images: Vec<PathBuf> = classes.iter().flat_map(|class| of_class(&flowers, class, 4)).collect();
    images.extend(others(&flowers));
    let mut words = foreign.split_whitespace();
    let mut emulated = Command::new(words.next().expect("a program"));
    emulated.args(words);

    let here = json(bloomcast().args(["classify", "--json"]).args(&images));
    let there = json(emulated.args(["classify", "--json"]).args(&images));
    let (here, there) = (here.as_array().unwrap(), there.as_array().unwrap());
    assert_eq!((here.len(), there.len()), (images.len(), images.len()));
    let mut worst = 0_f64;
    for (a, b) in here.iter().zip(there) {
        assert_eq!((&a["file"], &a["class"]), (&b["file"], &b["class"]), "{a} and {b}");
        for class in classes {
            worst = worst.max((probability(a, class) - probability(b, class)).abs());
        }
    }
    println!("{} photographs: the same classes, probabilities at most {worst:.1e} apart", images.len());
    assert!(worst <= TOLERANCE, "{worst}");
}

/// Photographs of other things, where they are at hand.
fn others(flowers: &Path) -> Vec<PathBuf> {
    let Ok(entries) = flowers.join("../../others").read_dir() else { return Vec::new() };
    let mut others: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    others.retain(|path| path.extension().is_some_and(|extension| extension == "jpg"));
    others.sort();
    others.truncate(4);
    others
}

fn probability(answer: &Value, class: &str) -> f64 {
    let top = answer["top"].as_array().unwrap().iter();
    top.filter(|entry| entry["class"] == class).map(|entry| entry["confidence"].as_f64().unwrap()).next().unwrap_or(0.0)
}
