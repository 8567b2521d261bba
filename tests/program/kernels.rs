//! Compares the kernels with tract on whole networks; tests their selection by flag and setting.

use bloomcast::vision::preprocess::TensorLayout;
use bloomcast::vision::{OnnxBackbone, Preprocess};
use bloomcast_kernels::Isa;

use super::backbones::network;
use super::tools::{bloomcast, failure, json, output};

/// The largest allowed difference of a probability, or of a feature relative to the largest one, from tract's.
pub const TOLERANCE: f32 = 1e-4;

#[test]
fn kernels_compute_other_networks_with_inverted_residuals_as_tract_does() {
    let test = "kernels_compute_other_networks_with_inverted_residuals_as_tract_does";
    let cases = [
        ("efficientnet_lite0.onnx", TensorLayout::Nchw, true),
        ("efficientnet_lite0_channels_last.onnx", TensorLayout::Nhwc, true),
        ("light_resnet50.onnx", TensorLayout::Nchw, false),
    ];
    for (file, layout, supported) in cases {
        let Some(path) = network(&format!("{test} ({file})"), file) else { continue };
        let preprocess = Preprocess { layout, ..Preprocess::mobilenet_v2() };
        let network = OnnxBackbone::from_file(&path, &preprocess, None).unwrap();
        let input: Vec<f32> = (0..preprocess.input_len()).map(|index| (index as f32 * 0.37).sin()).collect();
        let features = |kernels: Option<Isa>| {
            let backbone = network.with_kernels(kernels).compile_features(None).unwrap();
            let uses_kernels = backbone.kernels().is_some();
            (backbone.session().unwrap().run(&input).unwrap().to_vec(), uses_kernels)
        };
        let (expected, _) = features(None);
        let largest = expected.iter().fold(f32::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            let (found, uses_kernels) = features(Some(isa));
            assert_eq!(uses_kernels, supported, "{file}: {isa:?}");
            let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
            assert!(difference <= TOLERANCE, "{file}: {isa:?}: {difference}");
        }
    }
}

#[test]
fn kernels_flag_selects_the_kernels() {
    let bench = |kernels: &str| {
        let mut command = bloomcast();
        command.args(["bench", "--json", "--runs", "1", "--kernels", kernels]);
        command
    };
    for name in ["tract", "portable", Isa::best().name()] {
        assert_eq!(json(&mut bench(name))["kernels"], name);
    }
    assert_eq!(json(&mut bench("auto"))["kernels"], Isa::best().name());
    let removed = output(bench("auto").env("BLOOMCAST_KERNELS", "tract"));
    let warning = "warning: the environment variable BLOOMCAST_KERNELS is ignored; use --kernels\n";
    assert_eq!(String::from_utf8_lossy(&removed.stderr), warning);
}

#[test]
fn every_command_refuses_unknown_and_unsupported_kernels() {
    let image = tempfile::Builder::new().suffix(".jpg").tempfile().unwrap();
    std::fs::write(image.path(), bloomcast::vision::test_pattern::jpeg(64, 64)).unwrap();
    let unsupported = Isa::ALL.into_iter().find(|isa| !isa.is_supported()).expect("x86 has no NEON, ARM no AVX");
    let expected = format!("lacks {}; \"auto\" would select {}", unsupported.name(), Isa::best().name());
    let commands: [&[&str]; 3] = [&["bench"], &["classify", image.path().to_str().unwrap()], &["evaluate", "."]];
    for arguments in commands {
        let (code, text) = failure(bloomcast().args(arguments).args(["--kernels", "sse9"]));
        let names = "possible values: auto, avx512, avx2, neon, portable, tract";
        assert_eq!((code, text.contains(names)), (2, true), "{text}");
        let (code, text) = failure(bloomcast().args(arguments).args(["--kernels", unsupported.name()]));
        assert_eq!((code, text.contains(&expected)), (2, true), "{text}");
    }
    let unsupported = format!("model.kernels={}", unsupported.name());
    for arguments in [["check", "--no-camera"].as_slice(), &["run"]] {
        let (code, text) = failure(bloomcast().args(arguments).args(["--set", "model.kernels=sse9"]));
        let names = "expected one of auto, avx512, avx2, neon, portable, tract";
        assert_eq!((code, text.contains(names)), (78, true), "{text}");
        let (code, text) = failure(bloomcast().args(arguments).args(["--set", &unsupported]));
        assert_eq!((code, text.contains(&expected)), (78, true), "{text}");
    }
}
