//! `report.html`: the metrics, charts and example images of a run in one self-contained file.

mod class_activation_maps;
mod gallery;
pub mod tensorboard;
pub mod tensorboard_images;

use std::fmt::Write;
use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;

pub use gallery::{Gallery, GalleryImage};

use crate::chart;
use crate::train::evaluate::{EvaluatedSet, Evaluation, KindAcceptance, reliability};
use crate::train::optim::training_loop::Epoch;
use crate::train::run::outcome::{Trained, with_separators};
use crate::train::run::settings::Settings;
use crate::vision::head::softmax;
use crate::vision::{OnnxBackbone, Prediction};

const STYLE: &str = include_str!("style.css");
/// Columns of a contact sheet.
pub const SHEET_COLUMNS: u32 = 6;
/// Largest number of classes with a confusion matrix; with more classes the report lists the most frequent confusions.
const MATRIX_CLASSES_MAX: usize = 24;
const CONFUSIONS_MAX: usize = 30;
/// Quality of the thumbnails, 1–100.
const JPEG_QUALITY: u8 = 82;

/// Returns the HTML page. It loads nothing from the network.
///
/// # Panics
/// Panics if a path in `settings` is not UTF-8; [`Settings::check`] rejects that.
pub fn html(settings: &Settings, network: &OnnxBackbone, trained: &Trained, gallery: &Gallery) -> String {
    let name = escaped(&settings.name);
    let sections = [
        header(settings, network, trained),
        curves(trained),
        confusion(&trained.val.evaluation, trained.labels.names()),
        calibration(&trained.val, trained.head.temperature()),
        unknown(trained),
        test(trained),
        images("Random validation images", SAMPLE_NOTE, &gallery.sample, "sheet"),
        images("Misclassified images", ERRORS_NOTE, &gallery.errors, "sheet"),
        class_activation_maps(gallery.cams.as_deref()),
        dataset(trained),
        format!(
            "<h2>Settings</h2>\n<p>The content of <code>config.toml</code>; <code>bloomcast train --config config.toml \
             --out …</code> repeats the run.</p>\n<pre>{}</pre>\n",
            escaped(&settings.to_toml())
        ),
    ];
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width\">\n<title>{name}: training report</title>\n<style>\n{STYLE}</style>\n</head>\n\
         <body>\n<main>\n{}</main>\n</body>\n</html>\n",
        sections.concat()
    )
}

const SAMPLE_NOTE: &str = "A random sample. Blue: correct. Red: wrong, followed by the true class.";
const ERRORS_NOTE: &str = "The most confident errors first. They point to wrong labels or to weaknesses of the model.";

/// The settings, the sizes and the metrics at a glance.
fn header(settings: &Settings, network: &OnnxBackbone, trained: &Trained) -> String {
    let (evaluation, parameters) = (&trained.val.evaluation, trained.parameters);
    let cell = |value: String, label: &str| format!("<div><b>{value}</b><span>{label}</span></div>\n");
    let cells = [
        cell(format!("{:.1} %", evaluation.accuracy * 100.0), "accuracy"),
        cell(format!("{:.4}", evaluation.loss), "loss (cross-entropy, nats)"),
        cell(format!("{:.4}", evaluation.ece), "expected calibration error"),
        cell(format!("{:.1} %", evaluation.unknown * 100.0), "rejected as unknown"),
        cell(trained.dataset.train_images.to_string(), "training images"),
        cell(format!("{:.0} s", trained.elapsed.as_secs_f64()), "duration"),
    ];
    format!(
        "<h1>{}</h1>\n<p class=\"soft\">Recipe {}, seed {}, on {}: {} parameters, {} trained, {} frozen. Evaluated on {} \
         validation images, which also select the best epoch, the temperature and the threshold of <i>unknown</i>.</p>\n\
         <div class=\"figures\">\n{}</div>\n",
        escaped(&settings.name),
        settings.recipe.name(),
        settings.hyperparams.seed,
        escaped(network.name()),
        with_separators(parameters.total),
        with_separators(parameters.trained),
        with_separators(parameters.total - parameters.trained),
        evaluation.images,
        cells.concat()
    )
}

/// Loss and accuracy over the epochs.
fn curves(trained: &Trained) -> String {
    let points = |metric: fn(&Epoch) -> f64| trained.history.iter().map(|e| (e.epoch as f64, metric(e))).collect();
    let best = trained.best_epoch();
    let loss = chart::lines(
        "loss over epochs",
        &[
            chart::Line { name: "training", class: "train", points: points(|e| f64::from(e.train_loss)) },
            chart::Line { name: "validation", class: "val", points: points(|e| e.val.loss) },
        ],
        best,
    );
    let accuracy = chart::lines(
        "accuracy over epochs",
        &[chart::Line { name: "validation", class: "val", points: points(|e| e.val.accuracy) }],
        best,
    );
    format!(
        "<h2>Training curves</h2>\n<p>The training loss includes label smoothing, data augmentation and dropout, so it may lie \
         above the validation loss.</p>\n<div class=\"pair\">\n\
         <div class=\"panel\"><h3>Loss</h3>{loss}</div>\n<div class=\"panel\"><h3>Accuracy</h3>{accuracy}</div>\n</div>\n"
    )
}

/// The confusion matrix, or a list of confusions, and the metrics of each class.
fn confusion(evaluation: &Evaluation, names: &[String]) -> String {
    let (title, panel) = match names.len() {
        ..=MATRIX_CLASSES_MAX => ("Rows: true class. Columns: predicted class.", matrix(evaluation, names)),
        _ => ("Most frequent confusions", confusions(evaluation, names)),
    };
    format!(
        "<h2>Confusion matrix</h2>\n<div class=\"pair\">\n<div class=\"panel\"><h3>{title}</h3>{panel}</div>\n\
         <div class=\"panel\"><h3>Metrics of each class</h3>{}</div>\n</div>\n",
        class_table(evaluation)
    )
}

fn matrix(evaluation: &Evaluation, names: &[String]) -> String {
    let heads: String = names.iter().map(|name| format!("<th>{}</th>", escaped(name))).collect();
    let mut matrix = format!("<table class=\"matrix\"><tr><th></th>{heads}</tr>\n");
    for (row, (counts, name)) in evaluation.confusion.iter().zip(names).enumerate() {
        let total = counts.iter().sum::<usize>().max(1) as f64;
        let cell = |(column, count): (usize, &usize)| {
            let fraction = *count as f64 / total;
            let (color, opacity) = match row == column {
                true => ("blue", fraction * 70.0),
                false => ("red", (fraction * 250.0).min(70.0)),
            };
            let class = if *count == 0 { " class=\"off\"" } else { "" };
            format!(
                "<td{class} style=\"background: color-mix(in srgb, var(--{color}) {opacity:.0}%, transparent)\" \
                 title=\"{:.1} %\">{count}</td>",
                fraction * 100.0
            )
        };
        let cells: String = counts.iter().enumerate().map(cell).collect();
        writeln!(matrix, "<tr><th>{}</th>{cells}</tr>", escaped(name)).expect("a String takes any text");
    }
    matrix + "</table>"
}

/// The largest counts off the diagonal.
fn confusions(evaluation: &Evaluation, names: &[String]) -> String {
    let off_diagonal = |(row, counts): (usize, &Vec<usize>)| -> Vec<(usize, usize, usize)> {
        counts.iter().enumerate().filter(|(column, _)| *column != row).map(|(column, n)| (*n, row, column)).collect()
    };
    let mut all: Vec<_> =
        evaluation.confusion.iter().enumerate().flat_map(off_diagonal).filter(|(n, ..)| *n > 0).collect();
    all.sort_by_key(|(n, ..)| std::cmp::Reverse(*n));
    let mut table = String::from("<table><tr><th>true</th><th>predicted</th><th>images</th></tr>\n");
    for (count, row, column) in all.into_iter().take(CONFUSIONS_MAX) {
        let (truth, predicted) = (escaped(&names[row]), escaped(&names[column]));
        writeln!(table, "<tr><td>{truth}</td><td>{predicted}</td><td>{count}</td></tr>")
            .expect("a String takes any text");
    }
    table + "</table>"
}

/// A row for each class: number of images, precision, recall and F1.
fn class_table(evaluation: &Evaluation) -> String {
    let mut table =
        String::from("<table><tr><th>class</th><th>images</th><th>precision</th><th>recall</th><th>F1</th></tr>\n");
    for class in &evaluation.classes {
        writeln!(
            table,
            "<tr><td>{}</td><td>{}</td><td>{:.3}</td><td>{:.3}</td><td>{:.3}</td></tr>",
            escaped(&class.class),
            class.support,
            class.precision,
            class.recall,
            class.f1
        )
        .expect("a String takes any text");
    }
    table + "</table>"
}

/// Reliability diagrams before and after temperature scaling.
fn calibration(val: &EvaluatedSet, temperature: f32) -> String {
    let classes: Vec<usize> = val.images.iter().map(|image| image.class).collect();
    let before: Vec<Prediction> = val.predictions.iter().map(|after| without_temperature(after, temperature)).collect();
    let panel = |title: &str, predictions: &[Prediction]| {
        let (bins, error) = reliability(predictions, &classes);
        let chart = chart::reliability(title, &bins);
        format!("<div class=\"panel\"><h3>{title}: calibration error {error:.4}</h3>{chart}</div>\n")
    };
    format!(
        "<h2>Calibration</h2>\n<p>Of the images with a confidence of 80 %, 80 % should be correct: the bars should end on the \
         line. The fitted temperature is {temperature:.3}.</p>\n\
         <div class=\"pair\">\n{}{}</div>\n",
        panel("Before temperature scaling", &before),
        panel("After temperature scaling", &val.predictions)
    )
}

/// Undoes temperature scaling: the scaled logits are the logarithms of the probabilities up to a constant.
fn without_temperature(after: &Prediction, temperature: f32) -> Prediction {
    let logits: Vec<f32> = after.probabilities.iter().map(|p| p.max(f32::MIN_POSITIVE).ln() * temperature).collect();
    Prediction { probabilities: softmax(&logits, 1.0), ..after.clone() }
}

/// The similarities to the subspace of the OOD detector, and its threshold.
fn unknown(trained: &Trained) -> String {
    let similarities: Vec<f32> = trained.val.predictions.iter().map(|prediction| prediction.similarity).collect();
    let threshold = trained.ood.threshold();
    format!(
        "<h2>Out-of-distribution detection</h2>\n<p>An image is <i>unknown</i> if its similarity to the training images is below the \
         threshold, for any confidence: the cosine of its features to their subspace, less the weighted log-odds of the unknown \
         classes. The threshold {threshold:.4} rejects {:.1} % of the validation images; fitted on other images, it rejects \
         {:.1} %.</p>\n{}<div class=\"panel chart\">{}</div>\n",
        trained.val.evaluation.unknown * 100.0,
        trained.rejected_cross_fitted * 100.0,
        unknown_kinds(trained),
        chart::histogram("similarities", &similarities, threshold)
    )
}

/// The validation images of none of the classes, by kind; empty if there are none.
fn unknown_kinds(trained: &Trained) -> String {
    if trained.unknown_kinds.is_empty() {
        return String::new();
    }
    let row = |kind: &KindAcceptance| {
        format!("<tr><th>{}</th><td>{}</td><td>{}</td></tr>\n", escaped(&kind.kind), kind.images, kind.accepted)
    };
    let rows: String = trained.unknown_kinds.iter().map(row).collect();
    format!(
        "<table><tr><th>images of none of the classes</th><th>images</th><th>taken for one</th></tr>\n{rows}</table>\n"
    )
}

/// The metrics on the test set.
fn test(trained: &Trained) -> String {
    let Some(test) = &trained.test else { return String::new() };
    let evaluation = &test.evaluation;
    format!(
        "<h2>Test set</h2>\n<p>{} images that were not used for training or model selection: accuracy {:.4}, loss {:.4}, \
         expected calibration error {:.4}, {:.1} % rejected as unknown.</p>\n<div class=\"panel\">{}</div>\n",
        evaluation.images,
        evaluation.accuracy,
        evaluation.loss,
        evaluation.ece,
        evaluation.unknown * 100.0,
        class_table(evaluation)
    )
}

/// Images in a grid with the style `class`.
fn images(title: &str, note: &str, images: &[GalleryImage], class: &str) -> String {
    if images.is_empty() {
        return format!("<h2>{title}</h2>\n<p>None.</p>\n");
    }
    let figures: Vec<String> = images.iter().map(figure).collect();
    format!("<h2>{title}</h2>\n<p>{note}</p>\n<div class=\"{class}\">\n{}</div>\n", figures.concat())
}

fn figure(image: &GalleryImage) -> String {
    let class = if image.is_correct() { "right" } else { "wrong" };
    let unknown = if image.known { "" } else { " <small>unknown</small>" };
    format!(
        "<figure><figcaption class=\"{class}\" title=\"{0}\">{0}{unknown}</figcaption><img alt=\"{1}\" title=\"{1}\" \
         src=\"data:image/jpeg;base64,{2}\"></figure>\n",
        escaped(image.title_lines().join(" ").trim_end()),
        escaped(&image.file),
        STANDARD.encode(jpeg(&image.thumbnail))
    )
}

fn class_activation_maps(cams: Option<&[GalleryImage]>) -> String {
    let title = "Class activation maps";
    match cams {
        Some(cams) => images(
            title,
            "The most confident correct images of each class. Orange regions contribute to the logit of the class, compared \
             with the mean over all classes; dark regions do not. The contributions are exact, because the head is linear and \
             follows global average pooling.",
            cams,
            "sheet five",
        ),
        None => format!(
            "<h2>{title}</h2>\n<p>Not available: this network does not end in a 1×1 convolution and a mean over all \
             positions.</p>\n"
        ),
    }
}

/// The number of images of each class, and the skipped files.
fn dataset(trained: &Trained) -> String {
    let mut table = String::from("<table><tr><th>class</th><th>training</th><th>validation</th><th>test</th></tr>\n");
    let test = |class: usize| match &trained.test {
        Some(test) => test.evaluation.classes[class].support.to_string(),
        None => "–".into(),
    };
    for (class, name) in trained.labels.names().iter().enumerate() {
        let (train, val) = (trained.train_images[class], trained.val.evaluation.classes[class].support);
        writeln!(table, "<tr><td>{}</td><td>{train}</td><td>{val}</td><td>{}</td></tr>", escaped(name), test(class))
            .expect("a String takes any text");
    }
    let skipped: Vec<String> =
        trained.skipped.iter().map(|problem| format!("{}: {}\n", problem.file.display(), problem.problem)).collect();
    let list = match skipped.len() {
        0 => "<p>No files were skipped.</p>\n".into(),
        n => format!(
            "<details open><summary>{n} files were skipped</summary><pre>{}</pre></details>\n",
            escaped(&skipped.concat())
        ),
    };
    format!(
        "<h2>Dataset</h2>\n<div class=\"panel\">{table}</table></div>\n{list}<p class=\"soft\">Fingerprint of the images: \
         <code>{}</code></p>\n",
        trained.dataset.sha256
    )
}

/// Encodes a thumbnail.
fn jpeg(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).encode_image(image).expect("a thumbnail can be encoded");
    bytes.into_inner()
}

/// Escapes text for HTML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        assert_eq!(escaped("a<b> & \"c\""), "a&lt;b&gt; &amp; &quot;c&quot;");
    }

    #[test]
    fn undoes_temperature_scaling() {
        let after = Prediction {
            probabilities: softmax(&[2.0, 0.5, -1.0], 1.7),
            similarity: 1.0,
            known: true,
            found: Vec::new(),
        };
        let before = without_temperature(&after, 1.7).probabilities;
        for (got, expected) in before.iter().zip(softmax(&[2.0, 0.5, -1.0], 1.0)) {
            assert!((got - expected).abs() < 1e-5, "{got}, expected {expected}");
        }
    }
}
