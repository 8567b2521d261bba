//! Whole training runs on a few real photographs: what they write, what a killed one leaves, what is kept for the next.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::tools::{Process, bloomcast, failure, json, of_class, output, photographs, wait_until};
use super::workstation::dataset;

/// Photographs to learn from and to measure on, in `dir`.
fn small_sets(folder: &Path, dir: &Path) {
    dataset(folder, &dir.join("train"), 0, 14);
    dataset(folder, &dir.join("val"), 14, 6);
}

fn train(dir: &Path, out: &str, flags: &[&str]) -> Command {
    let mut command = bloomcast();
    command.arg("train").arg(dir.join("train")).arg("--val").arg(dir.join("val")).arg("--out").arg(dir.join(out));
    command.arg("--cache").arg(dir.join("cache")).args(flags).env("SOURCE_DATE_EPOCH", "1767323045");
    command
}

fn succeed(command: &mut Command) -> String {
    let done = output(command);
    let text = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{text}");
    String::from_utf8(done.stdout).unwrap()
}

const LAST_CONV: [&str; 6] = ["--recipe", "last-conv", "--augment", "2", "--epochs", "6"];

#[test]
fn a_fine_tuned_run_writes_all_it_promises_and_its_config_repeats_it() {
    let Some(folder) = photographs("a_fine_tuned_run_writes_all_it_promises_and_its_config_repeats_it") else { return };
    let dir = tempfile::tempdir().unwrap();
    small_sets(&folder, dir.path());
    dataset(&folder, &dir.path().join("test"), 20, 4);
    let test = dir.path().join("test").display().to_string();
    let said = succeed(&mut train(dir.path(), "run", &[&LAST_CONV[..], &["--test", &test]].concat()));
    // Three classes: 2,257,984 + 3 × 1280 + 3; 409,600 + 2 × 1280 + the head.
    assert!(said.contains("2,261,827 parameters, 416,003 trained, 1,845,824 frozen"), "{said}");
    let run = dir.path().join("run");
    let names: Vec<String> =
        fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    for expected in ["model.bloom", "metrics.json", "config.toml", "report.html", "checkpoints"] {
        assert!(names.iter().any(|name| name == expected), "{expected} in {names:?}");
    }
    assert!(names.iter().any(|name| name.starts_with("events.out.tfevents.")), "{names:?}");
    let checkpoints: Vec<_> = fs::read_dir(run.join("checkpoints")).unwrap().collect();
    let metrics: Value = serde_json::from_slice(&fs::read(run.join("metrics.json")).unwrap()).unwrap();
    let best = &metrics["epochs"][metrics["best_epoch"].as_u64().unwrap() as usize - 1];
    let name = checkpoints[0].as_ref().unwrap().file_name().into_string().unwrap();
    let expected = format!("val-loss-{:.4}.safetensors", best["val"]["loss"].as_f64().unwrap());
    assert!(checkpoints.len() == 1 && name.ends_with(&expected), "{name}, expected {expected}");
    let report = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(!report.contains("http://") && !report.contains("https://"), "the report needs no network");
    // Of 18: the sheet; two of each class painted, or fewer where fewer were right; the mistakes.
    assert!(report.matches("data:image/jpeg").count() >= 18 + 3, "photographs in the report");

    // The device's way gives what the trainer measured.
    let model = run.join("model.bloom");
    let found = json(bloomcast().arg("evaluate").arg(dir.path().join("val")).arg("--json").arg("--model").arg(&model));
    assert_eq!(found["confusion"], metrics["val"]["confusion"]);
    let off = found["loss"].as_f64().unwrap() - metrics["val"]["loss"].as_f64().unwrap();
    assert!(off.abs() < 1e-4, "the loss differs by {off}");
    let found = json(bloomcast().arg("evaluate").arg(&test).arg("--json").arg("--model").arg(&model));
    assert_eq!(found["confusion"], metrics["test"]["confusion"]);
    let mirrored = json(bloomcast().arg("evaluate").arg(&test).args(["--json", "--mirror", "--model"]).arg(&model));
    assert!(mirrored["loss"] != found["loss"] && mirrored["accuracy"].as_f64().unwrap() > 0.5, "{mirrored}");

    let again = dir.path().join("again");
    let config = run.join("config.toml");
    succeed(
        bloomcast()
            .arg("train")
            .arg("--config")
            .arg(&config)
            .arg("--out")
            .arg(&again)
            .arg("--no-cache")
            .args(["--threads", "1"])
            .env("SOURCE_DATE_EPOCH", "1767323045"),
    );
    assert!(fs::read(again.join("model.bloom")).unwrap() == fs::read(&model).unwrap(), "the same bytes");
    let compared = json(bloomcast().args(["compare", "--json"]).arg(&run).arg(&again));
    assert_eq!((compared["runs"].as_array().unwrap().len(), &compared["same_photographs"]), (2, &true.into()));
}

#[test]
fn a_finished_run_is_not_overwritten_unless_asked_to() {
    let Some(folder) = photographs("a_finished_run_is_not_overwritten_unless_asked_to") else { return };
    let dir = tempfile::tempdir().unwrap();
    small_sets(&folder, dir.path());
    succeed(&mut train(dir.path(), "run", &["--recipe", "frozen"]));
    let before = fs::read(dir.path().join("run/model.bloom")).unwrap();
    let (code, text) = failure(&mut train(dir.path(), "run", &["--recipe", "frozen", "--seed", "2"]));
    assert!(code == 1 && text.contains("run: holds a finished run"), "{text}");
    assert!(fs::read(dir.path().join("run/model.bloom")).unwrap() == before);
    succeed(&mut train(dir.path(), "run", &["--recipe", "frozen", "--seed", "2", "--overwrite"]));
    assert!(fs::read(dir.path().join("run/model.bloom")).unwrap() != before);
}

#[test]
fn only_what_is_new_is_extracted_and_a_cut_file_is_made_again() {
    let Some(folder) = photographs("only_what_is_new_is_extracted_and_a_cut_file_is_made_again") else { return };
    let dir = tempfile::tempdir().unwrap();
    small_sets(&folder, dir.path());
    succeed(&mut train(dir.path(), "one", &["--recipe", "frozen"]));
    let kinds: Vec<_> = fs::read_dir(dir.path().join("cache")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(kinds.len(), 1);
    let files = || {
        let mut files: Vec<_> = fs::read_dir(&kinds[0]).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    };
    let written = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let before: Vec<_> = files().iter().map(|path| written(path)).collect();
    assert_eq!(before.len(), 60);
    let cut = &files()[7];
    let whole = fs::read(cut).unwrap();
    fs::write(cut, &whole[..whole.len() / 2]).unwrap();
    let fresh = of_class(&folder, "daisy", 30).pop().unwrap();
    fs::copy(&fresh, dir.path().join("train/daisy/new.jpg")).unwrap();
    succeed(&mut train(dir.path(), "two", &["--recipe", "frozen"]));
    assert_eq!(fs::read(cut).unwrap(), whole, "made again");
    assert_eq!(files().len(), 61);
    let untouched = files().iter().filter(|path| before.contains(&written(path))).count();
    assert_eq!(untouched, 59, "the others are as they were");
    fs::remove_file(dir.path().join("train/daisy/new.jpg")).unwrap();
    succeed(&mut train(dir.path(), "three", &["--recipe", "frozen"]));
    let model = |run: &str| fs::read(dir.path().join(run).join("model.bloom")).unwrap();
    assert!(model("three") == model("one"), "from the cache come the same bytes");
}

#[test]
fn a_killed_run_leaves_no_bundle_and_its_folder_can_be_used_again() {
    let Some(folder) = photographs("a_killed_run_leaves_no_bundle_and_its_folder_can_be_used_again") else { return };
    let dir = tempfile::tempdir().unwrap();
    small_sets(&folder, dir.path());
    let run = dir.path().join("run");
    let mut process = Process::start(&mut train(dir.path(), "run", &["--recipe", "frozen", "--epochs", "100000"]));
    let checkpoints = run.join("checkpoints");
    wait_until("a checkpoint", || fs::read_dir(&checkpoints).is_ok_and(|mut there| there.next().is_some()));
    process.kill();
    assert!(!run.join("model.bloom").exists() && !run.join("metrics.json").exists());
    let (code, text) = failure(bloomcast().arg("compare").arg(&run));
    assert!(code == 1 && text.contains("metrics.json: No such file"), "{text}");
    succeed(&mut train(dir.path(), "run", &["--recipe", "frozen", "--epochs", "3"]));
    assert!(run.join("model.bloom").exists());
    assert_eq!(fs::read_dir(&checkpoints).unwrap().count(), 1, "those of the killed run are gone");
    // A finished run that is being replaced is gone from the start.
    let flags = ["--recipe", "frozen", "--epochs", "100000", "--overwrite"];
    let mut process = Process::start(&mut train(dir.path(), "run", &flags));
    wait_until("the old bundle to go", || !run.join("model.bloom").exists());
    process.kill();
    assert!(!run.join("model.bloom").exists());
    // A folder with other things in it is not touched.
    fs::write(run.join("thesis.txt"), "a year's work").unwrap();
    let (code, text) = failure(&mut train(dir.path(), "run", &["--recipe", "frozen", "--overwrite"]));
    assert!(code == 1 && text.contains("run: holds thesis.txt, which is not part of a run"), "{text}");
}

/// The shell's limit on a file's size stands for a full disk: the system refuses to write more.
#[test]
fn a_full_disk_is_said_and_leaves_no_bundle() {
    let Some(folder) = photographs("a_full_disk_is_said_and_leaves_no_bundle") else { return };
    let dir = tempfile::tempdir().unwrap();
    small_sets(&folder, dir.path());
    let limited = |out: &str, kilobytes: u32, flags: &[&str]| {
        let inner = train(dir.path(), out, flags);
        let mut shell = Command::new("bash");
        let script = format!("trap '' XFSZ; ulimit -f {kilobytes}; exec \"$@\"");
        shell.args(["-c", &script, "bash"]).arg(inner.get_program()).args(inner.get_args());
        shell
    };
    // The report is larger than that, the features of a photograph are not.
    let (code, text) = failure(&mut limited("run", 60, &["--recipe", "frozen"]));
    assert!(code == 1 && text.contains("report.html: File too large"), "{code} {text}");
    assert!(!dir.path().join("run/model.bloom").exists());
    // Where nothing can be kept, it is said, and training goes on to where it has to write.
    let (code, text) = failure(&mut limited("other", 2, &["--recipe", "frozen", "--seed", "3", "--augment", "2"]));
    assert!(code == 1 && text.contains("val-loss-"), "a checkpoint is what it stops at: {code} {text}");
    assert!(text.contains("warning: features are not cached: File too large"), "{text}");
    assert!(!dir.path().join("other/model.bloom").exists());
}
