//! The kernels against tract on whole networks and real photographs, and how the program is told which to use.

use std::path::PathBuf;

use bloomcast::bundle::Bundle;
use bloomcast::vision::kernels::{Instructions, Team};
use bloomcast::vision::preprocess::TensorLayout;
use bloomcast::vision::{Classifier, Network, Preprocess, decode};
use serde_json::Value;

use super::backbones::network;
use super::tools::{bloomcast, json, photographs};

/// How far a probability may lie from tract's.
const TOLERANCE: f32 = 1e-4;

#[test]
fn on_every_photograph_the_kernels_say_what_tract_says() {
    let Some(folder) = photographs("on_every_photograph_the_kernels_say_what_tract_says") else { return };
    let mut images: Vec<PathBuf> = Vec::new();
    for class in folder.read_dir().unwrap() {
        images.extend(class.unwrap().path().read_dir().unwrap().map(|entry| entry.unwrap().path()));
    }
    images.sort();
    let bundle = Bundle::built_in().unwrap();
    let network = bundle.network(None).unwrap();
    let classifier = |kernels: Option<Instructions>, threads: usize| {
        let backbone = bundle.backbone(&network.with_kernels(kernels).with_team(Team::of(threads).unwrap())).unwrap();
        assert_eq!(backbone.kernels(), kernels);
        Classifier::new(&backbone, bundle.classifier_params()).unwrap()
    };
    let mut tract = classifier(None, 1);
    let there = Instructions::ALL.into_iter().filter(|instructions| instructions.are_there());
    let mut ours: Vec<(String, Classifier)> = there
        .flat_map(|instructions| [1, 2].map(|threads| (instructions, threads)))
        .map(|(kernels, threads)| (format!("{kernels:?}, {threads}"), classifier(Some(kernels), threads)))
        .collect();
    let mut worst = 0.0_f32;
    for image in &images {
        let picture = decode::file(image).unwrap();
        let expected = tract.classify(&picture).unwrap().0.clone();
        for (name, classifier) in &mut ours {
            let found = classifier.classify(&picture).unwrap().0;
            assert_eq!(found.class(), expected.class(), "{}: {name}", image.display());
            let apart = |(a, b): (&f32, &f32)| (a - b).abs();
            let apart = found.probabilities.iter().zip(&expected.probabilities).map(apart).fold(0.0, f32::max);
            worst = worst.max(apart).max((found.similarity - expected.similarity).abs());
            assert!(apart <= TOLERANCE, "{}: {name}: {apart}", image.display());
        }
    }
    println!("{} photographs: the same class, at most {worst:.1e} apart", images.len());
    assert!(worst <= TOLERANCE, "{worst}");
}

#[test]
fn other_networks_profit_where_they_have_the_pattern_and_run_as_before_where_not() {
    let test = "other_networks_profit_where_they_have_the_pattern_and_run_as_before_where_not";
    let cases = [
        ("efficientnet_lite0.onnx", TensorLayout::Nchw, true),
        ("efficientnet_lite0_channels_last.onnx", TensorLayout::Nhwc, true),
        ("light_resnet50.onnx", TensorLayout::Nchw, false),
    ];
    for (file, layout, has_it) in cases {
        let Some(path) = network(&format!("{test} ({file})"), file) else { continue };
        let preprocess = Preprocess { layout, ..Preprocess::mobilenet_v2() };
        let network = Network::from_file(&path, &preprocess, None).unwrap();
        let input: Vec<f32> = (0..preprocess.input_len()).map(|at| (at as f32 * 0.37).sin()).collect();
        let features = |kernels: Option<Instructions>| {
            let backbone = network.with_kernels(kernels).features(None).unwrap();
            let ours = backbone.kernels().is_some();
            (backbone.session().unwrap().features(&input).unwrap().to_vec(), ours)
        };
        let (expected, _) = features(None);
        let largest = expected.iter().fold(f32::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
        for instructions in Instructions::ALL.into_iter().filter(|instructions| instructions.are_there()) {
            let (found, ours) = features(Some(instructions));
            assert_eq!(ours, has_it, "{file}: {instructions:?}");
            let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
            assert!(apart <= TOLERANCE, "{file}: {instructions:?}: {apart}");
        }
    }
}

#[test]
fn the_environment_says_which_kernels() {
    let kernels = |asked: &str| -> Value {
        json(bloomcast().args(["bench", "--json", "--runs", "1"]).env("BLOOMCAST_KERNELS", asked))["kernels"].clone()
    };
    assert_eq!((kernels("tract"), kernels("plain")), ("tract".into(), "plain".into()));
    assert_ne!(kernels(""), "tract");
    assert_eq!(kernels("mmx"), kernels(""), "kernels that are not there are not used");
}
