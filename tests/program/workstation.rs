//! Commands of the workstation: training, evaluation, benchmark, packaging.

use std::fs;
use std::path::Path;

use bloomcast::demo::drawing;

use super::tools::{bloomcast, drawn_flowers, failure, json, of_class, output};

const CLASSES: [&str; 3] = ["daisy", "roses", "sunflowers"];

/// Copies `count` photographs of each class to `to`, after skipping the first `skip`.
pub fn dataset(from: &Path, to: &Path, skip: usize, count: usize) {
    copy_classes(from, to, CLASSES, skip, count);
}

fn copy_classes(from: &Path, to: &Path, classes: impl IntoIterator<Item = &'static str>, skip: usize, count: usize) {
    for class in classes {
        fs::create_dir_all(to.join(class)).unwrap();
        for image in of_class(from, class, skip + count).split_off(skip) {
            fs::copy(&image, to.join(class).join(image.file_name().unwrap())).unwrap();
        }
    }
}

#[test]
fn training_is_reproducible_and_its_bundle_classifies() {
    let folder = drawn_flowers().folder.clone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    dataset(&folder, &path("train"), 0, 24);
    dataset(&folder, &path("val"), 24, 8);
    fs::write(path("train/roses/cut.jpg"), &fs::read(of_class(&folder, "roses", 1).remove(0)).unwrap()[..900]).unwrap();
    let train = |out: &str, threads: &str| {
        let run = output(
            bloomcast()
                .arg("train")
                .arg(path("train"))
                .arg("--val")
                .arg(path("val"))
                .arg("--out")
                .arg(path(out))
                .args(["--recipe", "frozen", "--no-cache", "--threads", threads, "--name", "garden"])
                .env("SOURCE_DATE_EPOCH", "1767323045"),
        );
        let text = String::from_utf8(run.stderr).unwrap();
        assert!(run.status.success(), "{text}");
        assert!(text.contains("cut.jpg: the JPEG is truncated"), "{text}");
        fs::read(path(out).join("model.bloom")).unwrap()
    };
    assert!(train("one", "1") == train("two", "2"), "the same bytes on one thread and on two");

    let model = path("one/model.bloom");
    let evaluation = json(bloomcast().arg("evaluate").arg(path("val")).arg("--json").arg("--model").arg(&model));
    let metrics: serde_json::Value = serde_json::from_slice(&fs::read(path("one/metrics.json")).unwrap()).unwrap();
    assert_eq!(evaluation, metrics["val"], "the metrics of the run equal those of evaluate");
    assert_eq!(evaluation["images"], 24);
    assert!(evaluation["accuracy"].as_f64().unwrap() > 0.7, "{evaluation}");
    let total: u64 = evaluation["confusion"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row.as_array().unwrap())
        .map(|n| n.as_u64().unwrap())
        .sum();
    assert_eq!(total, 24);
    let predictions = json(bloomcast().args(["classify", "--json"]).arg("--model").arg(&model).args(of_class(
        &path("val"),
        "roses",
        1,
    )));
    let classes: Vec<_> =
        predictions[0]["top"].as_array().unwrap().iter().map(|t| t["class"].as_str().unwrap()).collect();
    assert!(classes.len() == 3 && CLASSES.iter().all(|class| classes.contains(class)), "{classes:?}");
}

#[test]
fn train_rejects_an_unusable_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir_all(path("one/daisy")).unwrap();
    fs::create_dir_all(path("two/daisy")).unwrap();
    fs::create_dir_all(path("two/roses")).unwrap();
    let train = |dataset: &str| {
        failure(
            bloomcast().arg("train").arg(path(dataset)).arg("--val").arg(path(dataset)).arg("--out").arg(path("run")),
        )
    };
    for (dataset, expected) in [
        ("none", "none: No such file or directory"),
        ("one", "one: 1 classes, expected 2 to 1000"),
        ("two", "two/daisy: no images of this class"),
    ] {
        let (code, text) = train(dataset);
        assert!(code == 1 && text.contains(expected), "{code} {text}");
    }
    for class in ["daisy", "roses"] {
        fs::write(path("two").join(class).join("broken.jpg"), "x").unwrap();
    }
    let (code, text) = train("two");
    assert!(code == 1 && text.contains("two: no image of the class daisy is left for training"), "{code} {text}");
    assert!(!path("run/model.bloom").exists(), "no bundle is written");
}

#[test]
fn train_splits_off_validation_photographs_and_skips_duplicates() {
    let folder = drawn_flowers().folder.clone();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    dataset(&folder, &path("photos"), 0, 20);
    let original = of_class(&folder, "daisy", 1).remove(0);
    fs::copy(&original, path("photos/daisy/zz-again.jpg")).unwrap();
    let run = output(
        bloomcast()
            .arg("train")
            .arg(path("photos"))
            .args(["--recipe", "frozen", "--no-cache", "--out"])
            .arg(path("run")),
    );
    let text = String::from_utf8(run.stderr).unwrap();
    assert!(run.status.success(), "{text}");
    assert!(text.contains("zz-again.jpg: the same file as "), "{text}");
    let metrics: serde_json::Value = serde_json::from_slice(&fs::read(path("run/metrics.json")).unwrap()).unwrap();
    let held_out = metrics["val"]["images"].as_u64().unwrap();
    assert!((4..=24).contains(&held_out), "about a fifth of 60: {held_out}");

    let check = output(bloomcast().args(["dataset", "check", "--json"]).arg(path("photos")));
    assert_eq!(check.status.code(), Some(1), "the check has a finding");
    let found: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
    assert_eq!((&found["images"], found["findings"].as_array().unwrap().len()), (&61.into(), 1));
    assert!(found["findings"][0]["file"].as_str().unwrap().ends_with("zz-again.jpg"));
    fs::remove_file(path("photos/daisy/zz-again.jpg")).unwrap();
    assert!(output(bloomcast().args(["dataset", "check"]).arg(path("photos"))).status.success());
}

#[test]
fn train_rejects_values_out_of_range_as_usage_errors() {
    for (flag, expected) in [
        ("--batch=0", "sgd.batch: 0, expected 1 to 100000"),
        ("--epochs=0", "sgd.epochs: 0, expected 1 to 100000"),
        ("--reject=nan", "reject: NaN, expected 0 to 1"),
        ("--reject=5", "reject: 5, expected 0 to 1"),
        ("--learning-rate=-1", "sgd.learning_rate: -1, expected a number above 0"),
        ("--augment=0", "views: 0, expected 1 to 64"),
        ("--momentum=0.5", "--momentum and --nesterov belong to --optimiser sgd"),
        ("--step-epochs=3", "--step-epochs and --step-factor belong to --schedule step"),
        ("--val-fraction=1", "cannot be used with"),
        ("--recipe=best", "invalid value 'best' for '--recipe"),
    ] {
        let (code, text) = failure(bloomcast().args(["train", "x", "--val", "y", "--out", "z", flag]));
        assert!(code == 2 && text.contains(expected), "{flag}: {code} {text}");
    }
    assert_eq!(failure(bloomcast().args(["bench", "--runs", "0"])).0, 2);
}

#[test]
fn bench_prints_every_stage() {
    let report = json(bloomcast().args(["bench", "--json", "--runs", "3", "--threads", "2"]));
    assert_eq!(report["threads"], 2);
    assert!(report["kernels"].is_string());
    let parts = report["parts"].as_array().unwrap();
    let sum: u64 = parts.iter().map(|part| part["multiply_adds"].as_u64().unwrap()).sum();
    assert_eq!((parts.len(), sum), (19, 299_494_272 + 1280 * 49), "MobileNetV2 1.0 at 224 pixels, and its mean");
    assert!(report["peak_gmacs"].as_f64().unwrap() > 0.0);
    assert!(parts.iter().all(|part| part["share_of_peak"].as_f64().unwrap() > 0.0));
    for stage in ["decode", "preprocess", "backbone", "head", "frame"] {
        let timing = &report["stages"][stage];
        assert_eq!(timing["runs"], 3, "{stage}");
        assert!(timing["median_ms"].as_f64().unwrap() > 0.0, "{stage}");
        assert!(timing["p99_ms"].as_f64() >= timing["median_ms"].as_f64(), "{stage}");
    }
}

#[test]
fn writes_manual_pages_and_completions() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("papers");
    assert!(output(bloomcast().arg("papers").arg(&out)).status.success());
    let read = |name: &str| fs::read_to_string(out.join(name)).unwrap();
    assert!(read("bloomcast.1").contains("bloomcast\\-push(1)") && read("bloomcast-push.1").contains("canary"));
    for name in ["bloomcast.bash", "_bloomcast", "bloomcast.fish"] {
        assert!(read(name).contains("rollback"), "{name}");
    }
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(failure(bloomcast().arg("papers").arg(&file)).1.contains(&file.display().to_string()));
}

#[test]
fn dataset_check_names_each_problem_and_exits_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    dataset(&drawn_flowers().folder, dir.path(), 0, 4);
    assert!(output(bloomcast().args(["dataset", "check"]).arg(dir.path())).status.success());
    fs::copy(path("roses/00.jpg"), path("roses/again.jpg")).unwrap();
    let image = fs::read(path("daisy/00.jpg")).unwrap();
    fs::write(path("daisy/cut.jpg"), &image[..image.len() / 2]).unwrap();
    let result = output(bloomcast().args(["dataset", "check"]).arg(dir.path()));
    let text = String::from_utf8(result.stdout).unwrap();
    assert_eq!(result.status.code(), Some(1), "{text}");
    let expected =
        format!("{}: the same file as {}", path("roses/again.jpg").display(), path("roses/00.jpg").display());
    assert!(text.contains(&expected), "{text}");
    assert!(text.contains(&format!("{}: the JPEG is truncated", path("daisy/cut.jpg").display())), "{text}");
    let error = String::from_utf8_lossy(&result.stderr).into_owned();
    assert_eq!(error, "error: 2 problems in 14 images\n");
}

#[test]
fn evaluate_prints_the_metrics_of_a_folder() {
    let drawn = drawn_flowers();
    let dir = tempfile::tempdir().unwrap();
    let names = drawing::five_flowers().map(|(class, _)| class);
    copy_classes(&drawn.folder, dir.path(), names, 0, 6);
    let evaluate = || {
        let mut command = bloomcast();
        command.arg("evaluate").arg(dir.path()).arg("--model").arg(&drawn.bundle);
        command
    };
    let found = json(evaluate().arg("--json"));
    assert_eq!((&found["images"], found["classes"].as_array().unwrap().len()), (&30.into(), 5));
    assert!(found["accuracy"].as_f64().unwrap() > 0.9, "{found}");
    // Under each other's names, the images of two classes are wrong.
    for (from, to) in [("daisy", "other"), ("tulips", "daisy"), ("other", "tulips")] {
        fs::rename(dir.path().join(from), dir.path().join(to)).unwrap();
    }
    let found = json(evaluate().arg("--json"));
    assert!(found["accuracy"].as_f64().unwrap() < 0.7, "{found}");
    fs::rename(dir.path().join("roses"), dir.path().join("orchids")).unwrap();
    let (code, text) = failure(&mut evaluate());
    assert!(code == 1 && text.contains("orchids"), "{code} {text}");
}

#[test]
fn compare_lists_the_run_with_the_lower_loss_first() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    dataset(&drawn_flowers().folder, &path("photos"), 0, 12);
    for (run, epochs) in [("short", "1"), ("long", "20")] {
        let mut command = bloomcast();
        command.arg("train").arg(path("photos")).args(["--recipe", "frozen", "--no-cache", "--epochs", epochs]);
        let result = output(command.arg("--out").arg(path(run)));
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    }
    let runs = output(bloomcast().arg("compare").args([path("short"), path("long")]));
    let text = String::from_utf8(runs.stdout).unwrap();
    let names: Vec<&str> = text.lines().skip(1).take(2).map(|line| line.split_whitespace().next().unwrap()).collect();
    assert!(names[0].ends_with("long") && names[1].ends_with("short"), "{text}");
    let (code, text) = failure(bloomcast().arg("compare").arg(path("photos")));
    assert!(code == 1 && text.contains("metrics.json"), "{code} {text}");
}

#[test]
fn backbone_list_names_the_published_networks() {
    let result = output(bloomcast().args(["backbone", "list"]));
    let text = String::from_utf8(result.stdout).unwrap();
    for name in ["mobilenet_v2_torchvision", "resnet50_torchvision", "efficientnet_lite0"] {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name}: {text}");
    }
    let (code, text) = failure(bloomcast().args(["backbone", "fetch", "efficientnet_lite0"]));
    assert!(code != 0 && text.contains("efficientnet_lite0"), "{code} {text}");
}

#[test]
fn the_mirrored_image_is_averaged_in() {
    let drawn = drawn_flowers();
    let image = of_class(&drawn.folder, "tulips", 1).remove(0);
    let dir = tempfile::tempdir().unwrap();
    let mirrored = dir.path().join("mirrored.png");
    image::imageops::flip_horizontal(&bloomcast::vision::decode::file(&image).unwrap()).save(&mirrored).unwrap();
    let original = dir.path().join("original.png");
    bloomcast::vision::decode::file(&image).unwrap().save(&original).unwrap();
    let confidence = |flags: &[&str], image: &Path| {
        let mut command = bloomcast();
        command.args(["classify", "--json", "--model"]).arg(&drawn.bundle).args(flags);
        let found = json(command.arg(image));
        found[0]["top"][0]["confidence"].as_f64().unwrap()
    };
    let (one, other) = (confidence(&[], &original), confidence(&[], &mirrored));
    let averaged = confidence(&["--mirror"], &original);
    assert!((averaged - f64::midpoint(one, other)).abs() < 1e-4, "{averaged}, the mean of {one} and {other}");
}
