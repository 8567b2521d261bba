//! The tests on the real photographs in `../shared/flowers/val`. Where these are missing, each prints a line that begins with
//! `skipped:`; else a line that begins with `photographs:` and the number that it has seen, which `make test` adds up.

use std::path::PathBuf;

use bloomcast::bundle::Bundle;
use bloomcast::demo::drawing;
use bloomcast::vision::{Classifier, Region, decode};
use bloomcast_kernels::{Isa, ThreadPool};

use super::tools::{
    KERNEL_TOLERANCE, bloomcast, confident_photographs, free_port, json, of_class, output, photographs, report,
};

#[test]
fn classify_prints_predictions_in_argument_order() {
    let Some(folder) = photographs("classify_prints_predictions_in_argument_order") else { return };
    let classes = ["tulips", "daisy", "sunflowers"];
    let images: Vec<_> = classes.iter().flat_map(|class| of_class(&folder, class, 5)).collect();
    let predictions = json(bloomcast().args(["classify", "--json"]).args(&images));
    let predictions = predictions.as_array().unwrap();
    assert_eq!(predictions.len(), images.len());
    let mut correct = 0;
    for (prediction, image) in predictions.iter().zip(&images) {
        assert_eq!(prediction["file"].as_str().unwrap(), image.to_str().unwrap());
        assert_eq!(prediction["top"].as_array().unwrap().len(), 5);
        assert!((0.0..=1.0).contains(&prediction["confidence"].as_f64().unwrap()));
        correct += usize::from(image.parent().unwrap().file_name().unwrap().to_str() == prediction["class"].as_str());
    }
    assert!(correct >= 12, "{correct} of 15 correct: {predictions:?}");
    report(&format!("photographs: classify_prints_predictions_in_argument_order: {}", images.len()));
}

#[test]
fn kernels_classify_every_photograph_as_tract_does() {
    let Some(folder) = photographs("kernels_classify_every_photograph_as_tract_does") else { return };
    let mut images: Vec<PathBuf> = Vec::new();
    for class in folder.read_dir().unwrap() {
        images.extend(class.unwrap().path().read_dir().unwrap().map(|entry| entry.unwrap().path()));
    }
    images.sort();
    assert!(images.len() >= 500, "{} photographs in {}", images.len(), folder.display());
    let bundle = Bundle::built_in().unwrap();
    let network = bundle.onnx_backbone(None).unwrap();
    let classifier = |kernels: Option<Isa>, threads: usize| {
        let backbone = bundle
            .compile_backbone(
                &network.with_kernels(kernels).with_thread_pool(ThreadPool::with_threads(threads).unwrap()),
            )
            .unwrap();
        assert_eq!(backbone.kernels(), kernels);
        Classifier::new(&backbone, bundle.classifier_params()).unwrap()
    };
    let mut tract = classifier(None, 1);
    let supported = Isa::ALL.into_iter().filter(|isa| isa.is_supported());
    let mut classifiers: Vec<(String, Classifier)> = supported
        .flat_map(|isa| [1, 2].map(|threads| (isa, threads)))
        .map(|(kernels, threads)| (format!("{kernels:?}, {threads}"), classifier(Some(kernels), threads)))
        .collect();
    let mut worst = 0.0_f32;
    for image in &images {
        let photograph = decode::file(image).unwrap();
        let expected = tract.classify(&photograph).unwrap().0.clone();
        for (name, classifier) in &mut classifiers {
            let found = classifier.classify(&photograph).unwrap().0;
            assert_eq!(found.class(), expected.class(), "{}: {name}", image.display());
            let absolute = |(a, b): (&f32, &f32)| (a - b).abs();
            let difference = found.probabilities.iter().zip(&expected.probabilities).map(absolute).fold(0.0, f32::max);
            worst = worst.max(difference).max((found.similarity - expected.similarity).abs());
            assert!(difference <= KERNEL_TOLERANCE, "{}: {name}: {difference}", image.display());
        }
    }
    println!("{} photographs: the same class, differences of at most {worst:.1e}", images.len());
    assert!(worst <= KERNEL_TOLERANCE, "{worst}");
    report(&format!("photographs: kernels_classify_every_photograph_as_tract_does: {}", images.len()));
}

/// Photographs of 0.4 of a frame's height before drawn scenes.
#[test]
fn a_flower_in_a_part_of_the_frame_is_found() {
    let Some(folder) = photographs("a_flower_in_a_part_of_the_frame_is_found") else { return };
    let (dir, mut rng) = (tempfile::tempdir().unwrap(), fastrand::Rng::with_seed(7));
    let (width, height, side, filter) = (1280, 720, 288, image::imageops::FilterType::Triangle);
    let classes = ["daisy", "dandelion", "sunflowers"];
    let mut frames = Vec::new();
    for (i, photograph) in classes.iter().flat_map(|class| confident_photographs(&folder, class, 4)).enumerate() {
        let mut frame = image::imageops::resize(&drawing::scene(&mut rng), width, height, filter);
        let flower = image::imageops::resize(&decode::file(&photograph).unwrap(), side, side, filter);
        let (left, top) = (rng.u32(0..=width - side), rng.u32(0..=height - side));
        image::imageops::overlay(&mut frame, &flower, left.into(), top.into());
        let path = dir.path().join(format!("{i}.png"));
        frame.save(&path).unwrap();
        let [w, h] = [width, height].map(|length| length as f32);
        let bounds = [left as f32 / w, top as f32 / h, side as f32 / w, side as f32 / h];
        frames.push((path, classes[i / 4], Region::new(bounds).unwrap()));
    }
    let answers = json(bloomcast().args(["classify", "--json"]).args(frames.iter().map(|(path, ..)| path)));
    let is_found = |(answer, (_, class, place)): (&serde_json::Value, &(PathBuf, &str, Region))| {
        let Ok(bounds) = serde_json::from_value::<[f32; 4]>(answer["box"].clone()) else { return false };
        answer["class"] == *class && Region::new(bounds).unwrap().intersection_over_union(place) >= 0.3
    };
    let found = answers.as_array().unwrap().iter().zip(&frames).filter(|pair| is_found(*pair)).count();
    assert!(found >= 8, "{found} of {}: {answers}", frames.len());
    report(&format!("photographs: a_flower_in_a_part_of_the_frame_is_found: {}", frames.len()));
}

#[test]
fn demo_prints_no_accuracy_for_folders_that_are_not_classes() {
    let Some(folder) = photographs("demo_prints_no_accuracy_for_folders_that_are_not_classes") else { return };
    let dir = tempfile::tempdir().unwrap();
    for (name, class) in [("holiday", "daisy"), ("garden", "sunflowers")] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        std::fs::copy(confident_photographs(&folder, class, 1).remove(0), dir.path().join(name).join("1.jpg")).unwrap();
    }
    let demo = output(bloomcast().arg("demo").arg("--frames").arg(dir.path()));
    let text = String::from_utf8(demo.stdout).unwrap();
    assert!(demo.status.success(), "{text}{}", String::from_utf8_lossy(&demo.stderr));
    let events: Vec<&str> = text.lines().filter(|line| line.contains(" ms  ")).collect();
    assert!(events.iter().any(|line| line.contains("  sunflowers ")), "{text}");
    assert!(events.iter().any(|line| line.contains("  daisy ")), "{text}");
    assert!(!text.contains("accuracy"), "an accuracy without known classes: {text}");
    report("photographs: demo_prints_no_accuracy_for_folders_that_are_not_classes: 2");
}

#[test]
fn demo_prints_the_replayed_classes() {
    let Some(folder) = photographs("demo_prints_the_replayed_classes") else { return };
    let frames = folder.display().to_string();
    let demo = output(bloomcast().args(["demo", "--frames", &frames, "--port", &free_port().to_string()]));
    let text = String::from_utf8(demo.stdout).unwrap();
    assert!(demo.status.success(), "{text}{}", String::from_utf8_lossy(&demo.stderr));
    assert!(text.contains("replayed    daisy → dandelion → roses → sunflowers → tulips"), "{text}");
    assert!(text.contains("100 frames in"), "{text}");
    report("photographs: demo_prints_the_replayed_classes: 100");
}
