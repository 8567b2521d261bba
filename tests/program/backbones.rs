//! Other backbones than the built-in one: the files that `make backbones` and `make backbones-keras` put into `target/backbones`.
//! `make test-backbones` and `make test-backbones-keras` run these tests.

use std::fs;
use std::path::{Path, PathBuf};

use bloomcast::vision::preprocess::TensorLayout;
use bloomcast::vision::{OnnxBackbone, Preprocess};
use bloomcast_kernels::Isa;

use super::tools::{KERNEL_TOLERANCE, bloomcast, drawn_flowers, failure, json, of_class, output};
use super::workstation::dataset;

/// Returns the path of a network from `make backbones` or `make backbones-keras`.
fn network(file: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/backbones").join(file);
    let make = if file.starts_with("keras") { "make backbones-keras" } else { "make backbones" };
    assert!(path.is_file(), "no target/backbones/{file}; `{make}` makes it");
    path
}

/// Checks what `backbone inspect` prints of a network: feature tensor, number of features, layout of the feature map, and whether
/// its last convolution can be fine-tuned.
fn check_inspection(file: &str, feature: &str, width: usize, layout: &str, fine_tunes: bool) {
    let inspect = ["backbone", "inspect", "--json", "--preprocess", "keras", "--backbone"];
    let found = json(bloomcast().args(inspect).arg(network(file)));
    assert_eq!(found["width"], width, "{file}");
    assert!(found["feature"].as_str().unwrap().contains(feature), "{found}");
    assert!(found["layout"].as_str().unwrap().contains(layout), "{found}");
    assert_eq!(found["last_conv"].is_array(), fine_tunes, "{found}");
}

#[test]
#[ignore = "make test-backbones"]
fn backbone_inspect_finds_the_feature_tensor_and_layout() {
    check_inspection("efficientnet_lite0.onnx", "flatten", 1280, "channels × height", true);
    check_inspection("efficientnet_lite0_channels_last.onnx", "flatten", 1280, "width × channels", true);
    check_inspection("light_resnet50.onnx", "r173", 2048, "channels × height", false);
}

#[test]
#[ignore = "make test-backbones-keras"]
fn keras_backbone_inspect_finds_the_feature_tensor_and_layout() {
    for file in ["keras_resnet50.onnx", "keras_inception_v3.onnx", "keras_xception.onnx"] {
        check_inspection(file, "Mean_Squeeze", 2048, "width × channels", false);
    }
}

#[test]
fn backbone_inspect_describes_the_built_in_backbone() {
    let found = json(bloomcast().args(["backbone", "inspect", "--json"]));
    assert_eq!((&found["parameters"], &found["last_conv"][1]), (&2_257_984.into(), &320.into()));
}

#[test]
#[ignore = "make test-backbones"]
fn a_model_for_another_backbone_needs_that_backbone_unless_embedded() {
    let folder = drawn_flowers().folder.clone();
    let efficientnet = network("efficientnet_lite0.onnx");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    dataset(&folder, &path("train"), 0, 20);
    dataset(&folder, &path("val"), 20, 8);
    let train = |out: &str, flags: &[&str]| {
        let mut command = bloomcast();
        command.arg("train").arg(path("train")).arg("--val").arg(path("val")).arg("--out").arg(path(out));
        command
            .args(["--augment", "1", "--epochs", "20", "--no-cache"])
            .args(flags)
            .arg("--backbone")
            .arg(&efficientnet);
        let result = output(&mut command);
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        path(out).join("model.bloom")
    };
    let frozen = train("frozen", &["--recipe", "frozen"]);
    let embedded = train("embedded", &["--recipe", "last-conv", "--embed-backbone"]);
    let image = of_class(&path("val"), "roses", 1).remove(0);
    let classify = |model: &Path| {
        let mut command = bloomcast();
        command.args(["classify", "--json"]).arg(&image).arg("--model").arg(model);
        command
    };
    // The program's built-in backbone is another network.
    let (code, text) = failure(&mut classify(&frozen));
    let expected =
        "was trained on the backbone efficientnet_lite0 (sha256 e17627873684…), this one is mobilenet_v2_1.0_224";
    assert!(code == 1 && text.contains(expected), "{text}");
    let bundle = format!("model.bundle={}", frozen.display());
    let camera = format!("camera.replay.path={}", image.display());
    let run = ["run", "--set", "camera.source=replay", "--set", &camera, "--set", &bundle];
    let (code, text) = failure(bloomcast().args(run));
    assert!(code == 78 && text.contains(expected), "{code} {text}");
    assert_eq!(json(classify(&frozen).arg("--backbone").arg(&efficientnet)).as_array().unwrap().len(), 1);
    assert_eq!(json(&mut classify(&embedded)).as_array().unwrap().len(), 1);
    let evaluate = |model: &Path, flags: &[&Path]| {
        let mut command = bloomcast();
        command.arg("evaluate").arg(path("val")).arg("--json").arg("--model").arg(model);
        if let [file] = flags {
            command.arg("--backbone").arg(file);
        }
        json(&mut command)["accuracy"].as_f64().unwrap()
    };
    assert!(evaluate(&frozen, &[&efficientnet]) > 0.7);
    assert!(evaluate(&embedded, &[]) > 0.7);
}

#[test]
#[ignore = "make test-backbones"]
fn channels_first_and_channels_last_graphs_train_the_same_model() {
    let folder = drawn_flowers().folder.clone();
    let nchw = network("efficientnet_lite0.onnx");
    let nhwc = network("efficientnet_lite0_channels_last.onnx");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    dataset(&folder, &path("train"), 0, 8);
    dataset(&folder, &path("val"), 8, 4);
    let validation_metrics = |out: &str, network: &Path, flags: &[&str]| {
        let mut command = bloomcast();
        command
            .arg("train")
            .arg(path("train"))
            .arg("--val")
            .arg(path("val"))
            .arg("--no-cache")
            .arg("--out")
            .arg(path(out));
        command.args(["--recipe", "frozen", "--epochs", "5"]).args(flags).arg("--backbone").arg(network);
        let result = output(&mut command);
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        let metrics: serde_json::Value =
            serde_json::from_slice(&fs::read(path(out).join("metrics.json")).unwrap()).unwrap();
        metrics["val"].clone()
    };
    // The program recognises only one of them by its hash; --preprocess sets the same preprocessing for both.
    let (first, last) = (
        validation_metrics("first", &nchw, &["--preprocess", "keras"]),
        validation_metrics("last", &nhwc, &["--preprocess", "keras"]),
    );
    assert_eq!(first["confusion"], last["confusion"]);
    let difference = first["loss"].as_f64().unwrap() - last["loss"].as_f64().unwrap();
    assert!(difference.abs() < 1e-5, "the loss differs by {difference}");
    let (code, text) = failure(bloomcast().args(["train", "x", "--out", "y", "--backbone"]).arg(&nhwc));
    assert!(code == 1 && text.contains("set its normalization with --preprocess"), "{text}");
}

#[test]
#[ignore = "make test-backbones"]
fn rejects_fine_tuning_without_a_last_convolution_and_writes_nothing() {
    let folder = drawn_flowers().folder.clone();
    let resnet = network("light_resnet50.onnx");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    dataset(&folder, &path("train"), 0, 3);
    let mut command = bloomcast();
    command.arg("train").arg(path("train")).arg("--out").arg(path("run"));
    let (code, text) = failure(command.args(["--preprocess", "keras", "--backbone"]).arg(&resnet));
    assert!(code == 1 && text.contains("has no last convolution that can be fine-tuned"), "{text}");
    assert!(!path("run").exists());
}

#[test]
#[ignore = "make test-backbones-keras"]
fn keras_trains_a_head_on_a_backbone_without_a_last_convolution() {
    let folder = drawn_flowers().folder.clone();
    let resnet = network("keras_resnet50.onnx");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    dataset(&folder, &path("train"), 0, 3);
    dataset(&folder, &path("val"), 3, 2);
    let mut command = bloomcast();
    command.arg("train").arg(path("train")).arg("--val").arg(path("val")).arg("--out").arg(path("run"));
    command.args(["--recipe", "frozen", "--epochs", "5", "--preprocess", "keras", "--no-cache", "--backbone"]);
    let result = output(command.arg(&resnet));
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let report = fs::read_to_string(path("run/report.html")).unwrap();
    assert!(report.contains("does not end in a 1×1 convolution and a mean"));
    let mut command = bloomcast();
    command.args(["classify", "--json", "--model"]).arg(path("run/model.bloom")).arg("--backbone").arg(&resnet);
    let found = json(command.args(of_class(&path("val"), "daisy", 1)));
    assert_eq!(found[0]["top"].as_array().unwrap().len(), 3);
}

#[test]
#[ignore = "make test-backbones"]
fn kernels_compute_other_networks_with_inverted_residuals_as_tract_does() {
    let cases = [
        ("efficientnet_lite0.onnx", TensorLayout::Nchw, true),
        ("efficientnet_lite0_channels_last.onnx", TensorLayout::Nhwc, true),
        ("light_resnet50.onnx", TensorLayout::Nchw, false),
    ];
    for (file, layout, supported) in cases {
        let preprocess = Preprocess { layout, ..Preprocess::mobilenet_v2() };
        let backbone = OnnxBackbone::from_file(&network(file), &preprocess, None).unwrap();
        let input: Vec<f32> = (0..preprocess.input_len()).map(|index| (index as f32 * 0.37).sin()).collect();
        let features = |kernels: Option<Isa>| {
            let compiled = backbone.with_kernels(kernels).compile_features(None).unwrap();
            let uses_kernels = compiled.kernels().is_some();
            (compiled.session().unwrap().run(&input).unwrap().to_vec(), uses_kernels)
        };
        let (expected, _) = features(None);
        let largest = expected.iter().fold(f32::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            let (found, uses_kernels) = features(Some(isa));
            assert_eq!(uses_kernels, supported, "{file}: {isa:?}");
            let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
            assert!(difference <= KERNEL_TOLERANCE, "{file}: {isa:?}: {difference}");
        }
    }
}
