//! Images that are no good, on the command line.

use std::fs;
use std::process::Stdio;

use super::tools::{bloomcast, failure, json, of_class, output, photographs};

#[test]
fn classify_names_flowers_in_the_order_asked() {
    let Some(folder) = photographs("classify_names_flowers_in_the_order_asked") else { return };
    let classes = ["tulips", "daisy", "sunflowers"];
    let images: Vec<_> = classes.iter().flat_map(|class| of_class(&folder, class, 5)).collect();
    let answers = json(bloomcast().args(["classify", "--json"]).args(&images));
    let answers = answers.as_array().unwrap();
    assert_eq!(answers.len(), images.len());
    let mut right = 0;
    for (answer, image) in answers.iter().zip(&images) {
        assert_eq!(answer["file"].as_str().unwrap(), image.to_str().unwrap());
        assert_eq!(answer["top"].as_array().unwrap().len(), 5);
        assert!((0.0..=1.0).contains(&answer["confidence"].as_f64().unwrap()));
        right += usize::from(image.parent().unwrap().file_name().unwrap().to_str() == answer["class"].as_str());
    }
    assert!(right >= 12, "{right} of 15 named right: {answers:?}");
}

#[test]
fn each_bad_image_is_named_and_the_good_ones_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    image::RgbImage::from_pixel(300, 200, image::Rgb([200, 180, 30])).save(path("good.jpg")).unwrap();
    let whole = fs::read(path("good.jpg")).unwrap();
    fs::write(path("cut.jpg"), &whole[..whole.len() - 40]).unwrap();
    fs::write(path("text.jpg"), "no picture").unwrap();
    fs::write(path("empty.png"), []).unwrap();
    fs::File::create(path("giant.jpg")).unwrap().set_len(4 << 30).unwrap();
    let names = ["cut.jpg", "text.jpg", "empty.png", "giant.jpg", "none.jpg", "good.jpg"];
    let result = output(bloomcast().args(["classify", "--json"]).args(names.map(path)));
    assert_eq!(result.status.code(), Some(1));
    let answers: serde_json::Value = serde_json::from_slice(&result.stdout).unwrap();
    assert_eq!(answers.as_array().unwrap().len(), 1);
    let text = String::from_utf8(result.stderr).unwrap();
    for expected in [
        "cut.jpg: the JPEG is cut short: no end marker",
        "text.jpg: The image format could not be determined",
        "empty.png: empty file",
        "giant.jpg: 4294967296 bytes, more than the 67108864 allowed",
        "none.jpg: No such file or directory",
        "5 of 6 images could not be classified",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    assert!(!text.contains("panicked"));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("i.png");
    image::RgbImage::new(40, 40).save(&image).unwrap();
    let mut command = bloomcast();
    let mut child = command.arg("classify").arg(&image).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Long before it has loaded the network and has something to write.
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success() && ended.stderr.is_empty(), "{}", String::from_utf8_lossy(&ended.stderr));
}

#[test]
fn a_model_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (image, model) = (dir.path().join("i.png"), dir.path().join("m.bloom"));
    image::RgbImage::new(8, 8).save(&image).unwrap();
    fs::write(&model, "x").unwrap();
    let (code, text) = failure(bloomcast().arg("classify").arg(&image).arg("--model").arg(&model));
    assert_eq!(code, 1);
    assert!(text.contains(&format!("model {}: not a bundle", model.display())), "{text}");
    assert_eq!(failure(bloomcast().arg("classify")).0, 2, "no image is a mistake in usage");
}
