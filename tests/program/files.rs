//! `classify` with readable, broken and missing files.

use std::fs;
use std::process::Stdio;

use super::tools::{bloomcast, failure, output};

#[test]
fn classify_reports_each_unreadable_image_and_classifies_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    image::RgbImage::from_pixel(300, 200, image::Rgb([200, 180, 30])).save(path("good.jpg")).unwrap();
    let jpeg = fs::read(path("good.jpg")).unwrap();
    fs::write(path("cut.jpg"), &jpeg[..jpeg.len() - 40]).unwrap();
    fs::write(path("text.jpg"), "no picture").unwrap();
    fs::write(path("empty.png"), []).unwrap();
    fs::File::create(path("giant.jpg")).unwrap().set_len(4 << 30).unwrap();
    let names = ["cut.jpg", "text.jpg", "empty.png", "giant.jpg", "none.jpg", "good.jpg"];
    let result = output(bloomcast().args(["classify", "--json"]).args(names.map(path)));
    assert_eq!(result.status.code(), Some(1));
    let predictions: serde_json::Value = serde_json::from_slice(&result.stdout).unwrap();
    let predictions = predictions.as_array().unwrap();
    let files: Vec<&str> = predictions.iter().map(|one| one["file"].as_str().unwrap()).collect();
    assert_eq!(files, names.map(|name| path(name).display().to_string()), "an entry for each file, in their order");
    assert_eq!(predictions[0]["error"], "the JPEG is truncated: image data is missing");
    assert!(predictions[5]["class"].is_string() && predictions[5].get("error").is_none());
    let text = String::from_utf8(result.stderr).unwrap();
    for expected in [
        "cut.jpg: the JPEG is truncated: image data is missing",
        "text.jpg: unknown format, expected JPEG, PNG or WebP",
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
fn classify_succeeds_when_standard_output_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("i.png");
    image::RgbImage::new(40, 40).save(&image).unwrap();
    let mut command = bloomcast();
    let mut child = command.arg("classify").arg(&image).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The pipe is closed before the program has loaded the network and writes its output.
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn classify_rejects_a_file_that_is_not_a_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let (image, model) = (dir.path().join("i.png"), dir.path().join("m.bloom"));
    image::RgbImage::new(8, 8).save(&image).unwrap();
    fs::write(&model, "x").unwrap();
    let (code, text) = failure(bloomcast().arg("classify").arg(&image).arg("--model").arg(&model));
    assert_eq!(code, 1);
    assert!(text.contains(&format!("model {}: not a bundle", model.display())), "{text}");
    assert_eq!(failure(bloomcast().arg("classify")).0, 2, "a usage error without an image");
}
