//! Training runs on a few real photographs: their outputs, the cache of features, killed and failed runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bloomcast::bundle::Bundle;
use bloomcast::demo::drawing;
use bloomcast::vision::{Region, View};
use serde_json::Value;

use super::broker::Mosquitto;
use super::daemon::run_command;
use super::mqtt::Listener;
use super::tools::{Process, TIMEOUT, bloomcast, drawn_flowers, failure, json, of_class, output, wait_until};
use super::workstation::dataset;

/// Copies training and validation photographs into `dir`.
fn small_datasets(folder: &Path, dir: &Path) {
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
    let result = output(command);
    let text = String::from_utf8(result.stderr).unwrap();
    assert!(result.status.success(), "{text}");
    String::from_utf8(result.stdout).unwrap()
}

const LAST_CONV: [&str; 6] = ["--recipe", "last-conv", "--augment", "2", "--epochs", "6"];

#[test]
fn fine_tuning_writes_all_outputs_and_its_config_reproduces_the_bundle() {
    let folder = drawn_flowers().folder.clone();
    let dir = tempfile::tempdir().unwrap();
    small_datasets(&folder, dir.path());
    dataset(&folder, &dir.path().join("test"), 20, 4);
    // An image with another label: with right predictions alone, the loss may be 0.
    fs::copy(of_class(&folder, "roses", 30).pop().unwrap(), dir.path().join("test/daisy/mislabeled.jpg")).unwrap();
    let test = dir.path().join("test").display().to_string();
    let stdout = succeed(&mut train(dir.path(), "run", &[&LAST_CONV[..], &["--test", &test]].concat()));
    // Three classes: 2,257,984 + 3 × 1280 + 3; 409,600 + 2 × 1280 + the head.
    assert!(stdout.contains("2,261,827 parameters, 416,003 trained, 1,845,824 frozen"), "{stdout}");
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
    // The gallery of all 18, up to two class activation maps a class, and the misclassified photographs.
    assert!(report.matches("data:image/jpeg").count() >= 18 + 3, "photographs in the report");

    // The classifier of the device gives the metrics of the trainer.
    let model = run.join("model.bloom");
    let found = json(bloomcast().arg("evaluate").arg(dir.path().join("val")).arg("--json").arg("--model").arg(&model));
    assert_eq!(found["confusion"], metrics["val"]["confusion"]);
    let difference = found["loss"].as_f64().unwrap() - metrics["val"]["loss"].as_f64().unwrap();
    assert!(difference.abs() < 1e-4, "the loss differs by {difference}");
    let found = json(bloomcast().arg("evaluate").arg(&test).arg("--json").arg("--model").arg(&model));
    assert_eq!(found["confusion"], metrics["test"]["confusion"]);
    let mirrored = json(bloomcast().arg("evaluate").arg(&test).args(["--json", "--mirror", "--model"]).arg(&model));
    assert!(mirrored["loss"] != found["loss"] && mirrored["accuracy"].as_f64().unwrap() > 0.5, "{mirrored}");

    let reproduced = dir.path().join("again");
    let config = run.join("config.toml");
    succeed(
        bloomcast()
            .arg("train")
            .arg("--config")
            .arg(&config)
            .arg("--out")
            .arg(&reproduced)
            .arg("--no-cache")
            .args(["--threads", "1"])
            .env("SOURCE_DATE_EPOCH", "1767323045"),
    );
    assert!(fs::read(reproduced.join("model.bloom")).unwrap() == fs::read(&model).unwrap(), "the same bytes");
    let compared = json(bloomcast().args(["compare", "--json"]).arg(&run).arg(&reproduced));
    assert_eq!((compared["runs"].as_array().unwrap().len(), &compared["same_photographs"]), (2, &true.into()));
}

#[test]
fn a_finished_run_is_replaced_only_with_overwrite() {
    let folder = drawn_flowers().folder.clone();
    let dir = tempfile::tempdir().unwrap();
    small_datasets(&folder, dir.path());
    succeed(&mut train(dir.path(), "run", &["--recipe", "frozen"]));
    let before = fs::read(dir.path().join("run/model.bloom")).unwrap();
    let (code, text) = failure(&mut train(dir.path(), "run", &["--recipe", "frozen", "--seed", "2"]));
    assert!(code == 1 && text.contains("run: holds a finished run"), "{text}");
    assert!(fs::read(dir.path().join("run/model.bloom")).unwrap() == before);
    succeed(&mut train(dir.path(), "run", &["--recipe", "frozen", "--seed", "2", "--overwrite"]));
    assert!(fs::read(dir.path().join("run/model.bloom")).unwrap() != before);
}

#[test]
fn extracts_only_new_photographs_and_replaces_a_truncated_cache_file() {
    let folder = drawn_flowers().folder.clone();
    let dir = tempfile::tempdir().unwrap();
    small_datasets(&folder, dir.path());
    succeed(&mut train(dir.path(), "one", &["--recipe", "frozen"]));
    let mut folders: Vec<_> = fs::read_dir(dir.path().join("cache")).unwrap().map(|e| e.unwrap().path()).collect();
    folders.sort();
    let names: Vec<_> = folders.iter().map(|folder| folder.file_name().unwrap().to_str().unwrap()).collect();
    assert!(matches!(names[..], [features, "perceptual-hash-2"] if features.starts_with("features-")), "{names:?}");
    let files = || {
        let mut files: Vec<_> = fs::read_dir(&folders[0]).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    };
    let modified = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    let before: Vec<_> = files().iter().map(|path| modified(path)).collect();
    assert!(before.len() > 70, "60 images, and generated ones: {}", before.len());
    let truncated = &files()[7];
    let content = fs::read(truncated).unwrap();
    fs::write(truncated, &content[..content.len() / 2]).unwrap();
    let added = of_class(&folder, "daisy", 30).pop().unwrap();
    fs::copy(&added, dir.path().join("train/daisy/new.jpg")).unwrap();
    succeed(&mut train(dir.path(), "two", &["--recipe", "frozen"]));
    assert_eq!(fs::read(truncated).unwrap(), content, "extracted again");
    // The new image, and perhaps a degraded version of it.
    let new = files().len() - before.len();
    assert!((1..=2).contains(&new), "{new}");
    let untouched = files().iter().filter(|path| before.contains(&modified(path))).count();
    assert_eq!(untouched, before.len() - 1, "the other files are unchanged");
    fs::remove_file(dir.path().join("train/daisy/new.jpg")).unwrap();
    succeed(&mut train(dir.path(), "three", &["--recipe", "frozen"]));
    let model = |run: &str| fs::read(dir.path().join(run).join("model.bloom")).unwrap();
    assert!(model("three") == model("one"), "the same bytes with cached features");
}

#[test]
fn a_killed_run_leaves_no_bundle_and_its_folder_can_be_used_again() {
    let folder = drawn_flowers().folder.clone();
    let dir = tempfile::tempdir().unwrap();
    small_datasets(&folder, dir.path());
    let run = dir.path().join("run");
    let mut process = Process::start(&mut train(dir.path(), "run", &["--recipe", "frozen", "--epochs", "100000"]));
    let checkpoints = run.join("checkpoints");
    wait_until("a checkpoint", || fs::read_dir(&checkpoints).is_ok_and(|mut entries| entries.next().is_some()));
    process.kill();
    assert!(!run.join("model.bloom").exists() && !run.join("metrics.json").exists());
    let (code, text) = failure(bloomcast().arg("compare").arg(&run));
    assert!(code == 1 && text.contains("metrics.json: No such file"), "{text}");
    succeed(&mut train(dir.path(), "run", &["--recipe", "frozen", "--epochs", "3"]));
    assert!(run.join("model.bloom").exists());
    assert_eq!(fs::read_dir(&checkpoints).unwrap().count(), 1, "the checkpoints of the killed run are removed");
    // --overwrite removes the bundle of a finished run before it trains.
    let flags = ["--recipe", "frozen", "--epochs", "100000", "--overwrite"];
    let mut process = Process::start(&mut train(dir.path(), "run", &flags));
    wait_until("the old bundle to go", || !run.join("model.bloom").exists());
    process.kill();
    assert!(!run.join("model.bloom").exists());
    // A folder with other files is not changed.
    fs::write(run.join("thesis.txt"), "a year's work").unwrap();
    let (code, text) = failure(&mut train(dir.path(), "run", &["--recipe", "frozen", "--overwrite"]));
    assert!(code == 1 && text.contains("run: holds thesis.txt, which is not part of a run"), "{text}");
}

/// The shell's limit on the size of files simulates a full disk.
#[test]
fn a_full_disk_fails_the_run_and_leaves_no_bundle() {
    let folder = drawn_flowers().folder.clone();
    let dir = tempfile::tempdir().unwrap();
    small_datasets(&folder, dir.path());
    let limited = |out: &str, kilobytes: u32, flags: &[&str]| {
        let inner = train(dir.path(), out, flags);
        let mut shell = Command::new("bash");
        let script = format!("trap '' XFSZ; ulimit -f {kilobytes}; exec \"$@\"");
        shell.args(["-c", &script, "bash"]).arg(inner.get_program()).args(inner.get_args());
        shell
    };
    // The report is larger than 60 KiB, a file of the cache is not.
    let (code, text) = failure(&mut limited("run", 60, &["--recipe", "frozen"]));
    assert!(code == 1 && text.contains("report.html: File too large"), "{code} {text}");
    assert!(!dir.path().join("run/model.bloom").exists());
    // Without a writable cache the command warns and trains until it writes a checkpoint.
    let (code, text) = failure(&mut limited("other", 2, &["--recipe", "frozen", "--seed", "3", "--augment", "2"]));
    assert!(code == 1 && text.contains("val-loss-"), "the write of a checkpoint fails: {code} {text}");
    assert!(text.contains("warning: features are not cached: File too large"), "{text}");
    assert!(!dir.path().join("other/model.bloom").exists());
}

#[test]
fn a_validation_image_that_looks_like_a_training_image_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    small_datasets(&drawn_flowers().folder, dir.path());
    let original = of_class(&dir.path().join("train"), "daisy", 1).remove(0);
    let image = image::open(original).unwrap().to_rgb8();
    image.save(dir.path().join("val/daisy/saved-again.png")).unwrap();
    image.save(dir.path().join("val/roses/mislabeled.webp")).unwrap();
    let result = output(&mut train(dir.path(), "run", &["--recipe", "frozen"]));
    let text = String::from_utf8(result.stderr).unwrap();
    assert!(result.status.success(), "{text}");
    assert!(text.contains("val/daisy/saved-again.png: looks like "), "{text}");
    assert!(text.contains("val/roses/mislabeled.webp: conflicting labels: looks like "), "{text}");
    let metrics: Value = serde_json::from_slice(&fs::read(dir.path().join("run/metrics.json")).unwrap()).unwrap();
    assert_eq!(metrics["val"]["images"], 18);
}

#[test]
fn images_of_none_of_the_classes_train_unknown_and_are_counted_by_kind() {
    let dir = tempfile::tempdir().unwrap();
    small_datasets(&drawn_flowers().folder, dir.path());
    let stripes = |folder: &str, range: std::ops::Range<u32>| {
        let folder = dir.path().join(folder);
        fs::create_dir_all(&folder).unwrap();
        for i in range {
            let color = image::Rgb([40 * (i % 6) as u8, 200, 30 * (i % 8) as u8]);
            let image = image::RgbImage::from_fn(96, 96, |x, y| {
                if (x + (y * i) / 7) / (5 + i % 7) % 2 == 0 { color } else { image::Rgb([250, 240, 230]) }
            });
            image.save(folder.join(format!("{i}.png"))).unwrap();
        }
    };
    stripes("train/unknown/stripes", 0..20);
    stripes("val/unknown/stripes", 20..28);
    stripes("more/loose", 30..34);
    let text = succeed(&mut train(dir.path(), "run", &["--recipe", "frozen"]));
    assert!(text.contains("images of none of the classes") && text.contains("stripes"), "{text}");
    let metrics: Value = serde_json::from_slice(&fs::read(dir.path().join("run/metrics.json")).unwrap()).unwrap();
    let kinds = &metrics["unknown_kinds"];
    assert_eq!((kinds[0]["kind"].as_str(), kinds[0]["images"].as_u64()), (Some("stripes"), Some(8)), "{metrics}");
    assert!(kinds[0]["accepted"].as_u64().unwrap() <= 1, "{kinds}");
    assert_eq!((&metrics["train_images"], &metrics["val"]["images"]), (&42.into(), &18.into()));
    assert!(fs::read_to_string(dir.path().join("run/report.html")).unwrap().contains("<th>stripes</th>"));

    let mut evaluate = bloomcast();
    evaluate
        .args(["evaluate", "--json", "--model"])
        .arg(dir.path().join("run/model.bloom"))
        .arg(dir.path().join("val"));
    let evaluated = json(evaluate.arg("--unknown").arg(dir.path().join("more")));
    let kinds = evaluated["unknown_kinds"].as_array().unwrap().iter().map(|kind| kind["kind"].as_str().unwrap());
    assert_eq!((kinds.collect::<Vec<_>>(), &evaluated["images"]), (vec!["stripes", "loose"], &18.into()));
    let mut check = bloomcast();
    check.args(["dataset", "check", "--json"]).arg(dir.path().join("train")).arg("--val").arg(dir.path().join("val"));
    let checked: Value = serde_json::from_slice(&output(&mut check).stdout).unwrap();
    let classes = checked["classes"].as_array().unwrap();
    assert_eq!(classes.last().unwrap(), &serde_json::json!({"class": "unknown/stripes", "images": 28}));
}

/// Returns a frame of 1280×720 with a drawing of `class` that covers `share` of its height, and the place of the drawing.
fn garden_frame(class: &str, share: f32, rng: &mut fastrand::Rng) -> (image::RgbImage, Region) {
    let (width, height, filter) = (1280, 720, image::imageops::FilterType::Triangle);
    let mut frame = image::imageops::resize(&drawing::scene(rng), width, height, filter);
    let (_, kind) = drawing::five_flowers().into_iter().find(|(name, _)| *name == class).unwrap();
    let side = (share * height as f32) as u32;
    let flower = image::imageops::resize(&drawing::flower(kind, rng), side, side, filter);
    let (left, top) = (rng.u32(0..=width - side), rng.u32(0..=height - side));
    image::imageops::overlay(&mut frame, &flower, left.into(), top.into());
    let (w, h) = (width as f32, height as f32);
    let bounds = [left as f32 / w, top as f32 / h, side as f32 / w, side as f32 / h];
    (frame, Region::new(bounds).unwrap())
}

#[test]
fn a_model_of_scenes_scans_frames_and_says_where_a_flower_is() {
    let dir = tempfile::tempdir().unwrap();
    small_datasets(&drawn_flowers().folder, dir.path());
    let mut rng = fastrand::Rng::with_seed(5);
    fs::create_dir(dir.path().join("train/unknown")).unwrap();
    for i in 0..40 {
        drawing::scene(&mut rng).save(dir.path().join(format!("train/unknown/{i}.png"))).unwrap();
    }
    let flags = ["--recipe", "last-conv", "--augment", "3", "--epochs", "8"];
    succeed(&mut train(dir.path(), "run", &flags));
    // The second run reads all features from the cache.
    succeed(&mut train(dir.path(), "again", &flags));
    let bundle = |run: &str| fs::read(dir.path().join(run).join("model.bloom")).unwrap();
    assert_eq!(bundle("run"), bundle("again"), "the cached features are those that were computed");
    let model = dir.path().join("run/model.bloom");
    assert_eq!(Bundle::read(&model).unwrap().view(), View::Scan);

    let classes = ["daisy", "roses", "tulips"];
    let frames: Vec<(PathBuf, &str, Region)> = (0..9)
        .map(|i| {
            let class = classes[i % 3];
            let (frame, place) = garden_frame(class, [0.9, 0.6, 0.45][i / 3], &mut rng);
            let path = dir.path().join(format!("frame-{i}.png"));
            frame.save(&path).unwrap();
            (path, class, place)
        })
        .collect();
    let classify = |view: &[&str]| {
        let mut command = bloomcast();
        command.args(["classify", "--json", "--model"]).arg(&model).args(view);
        json(command.args(frames.iter().map(|(path, ..)| path)))
    };
    let scanned = classify(&[]);
    let mut right = 0;
    for (answer, (path, class, place)) in scanned.as_array().unwrap().iter().zip(&frames) {
        assert_eq!(answer["box"], answer["found"][0]["box"], "{answer}");
        if answer["class"] != *class {
            continue;
        }
        let bounds: [f32; 4] = serde_json::from_value(answer["box"].clone()).unwrap();
        let overlap = Region::new(bounds).unwrap().intersection_over_union(place);
        assert!(overlap > 0.1, "{}: {answer}, {place:?}", path.display());
        right += 1;
    }
    assert!(right >= 6, "{right} of 9: {scanned}");
    let whole = classify(&["--view", "whole"]);
    assert!(whole.as_array().unwrap().iter().all(|answer| answer["box"].is_null()), "{whole}");
    // A model that was not trained on scenes.
    let mut other = bloomcast();
    other.args(["classify", "--view", "scan", "--model"]).arg(&drawn_flowers().bundle).arg(&frames[0].0);
    let (code, error) = failure(&mut other);
    assert!(code == 1 && error.contains("was not trained to scan frames"), "{code}: {error}");

    // The daemon publishes the place, in shares of the whole frame, of which it looks at the right part.
    let (path, class, place) = frames
        .iter()
        .zip(scanned.as_array().unwrap())
        .find(|((_, class, _), answer)| answer["class"] == *class)
        .map(|(frame, _)| frame)
        .unwrap();
    let broker = Mosquitto::started(None);
    let listener = Listener::connect(broker.port);
    let settings = [
        format!("model.bundle={}", model.display()),
        "camera.source=replay".into(),
        format!("camera.replay.path={}", path.display()),
        "camera.interval_ms=100".into(),
        "decide.smoothing_ms=0".into(),
        "decide.enter_dwell_ms=0".into(),
        "decide.enter=0.1".into(),
        "decide.leave=0.1".into(),
    ];
    let mut daemon = Process::start(&mut run_command(broker.port, settings.iter().map(String::as_str)));
    let event = listener.wait("/event", |event| event["class"] == *class);
    let bounds: [f32; 4] = serde_json::from_value(event["box"].clone()).unwrap();
    assert!(Region::new(bounds).unwrap().intersection_over_union(place) > 0.1, "{event}, {place:?}");
    assert_eq!(event["found"][0]["class"], *class);
    daemon.signal("TERM");
    assert!(daemon.wait_for_exit(TIMEOUT).success(), "{}", daemon.log());
}
