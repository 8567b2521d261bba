//! `report.html`: one file, no network, that shows what was learned.

mod gallery;
pub mod tensorboard;
pub mod tensorboard_images;

use std::fmt::Write;
use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;

use gallery::CamPainter;
pub use gallery::GalleryImage;

use crate::chart;
use crate::train::evaluate::{EvaluatedSet, Evaluation, reliability};
use crate::train::run::outcome::{Trained, grouped};
use crate::train::run::settings::Settings;
use crate::vision::head::softmax;
use crate::vision::{BackboneError, Network, Prediction};

const STYLE: &str = include_str!("style.css");
/// The sheet of the tutorial: six columns, five rows.
const SHEET: usize = 30;
pub const SHEET_COLUMNS: u32 = 6;
const WORST: usize = 12;
const SEEN_OF_EACH: usize = 2;
const SEEN_MAX: usize = 20;
/// With more classes the most frequent mistakes are listed instead of a matrix.
const MATRIX_MAX: usize = 24;
const MISTAKES_MAX: usize = 30;
const JPEG_QUALITY: u8 = 82;

/// The photographs of the report.
pub struct Gallery {
    pub sheet: Vec<GalleryImage>,
    worst: Vec<GalleryImage>,
    /// With the places painted where the class was seen; none where the network does not tell.
    seen: Option<Vec<GalleryImage>>,
}

impl Gallery {
    pub fn choose(
        settings: &Settings,
        network: &Network,
        trained: &Trained,
        threads: usize,
    ) -> Result<Self, BackboneError> {
        let (labels, val, preprocess) = (&trained.labels, &trained.val, settings.preprocess());
        let sheet = gallery::by_chance(val, SHEET, settings.sgd.seed);
        let mut best = gallery::best_of_each(val, labels.names().len(), SEEN_OF_EACH);
        best.truncate(SEEN_MAX);
        let looker = CamPainter::new(network, trained, &preprocess);
        Ok(Gallery {
            sheet: gallery::load(labels, val, &sheet, threads),
            worst: gallery::load(labels, val, &gallery::worst(val, WORST), threads),
            seen: looker.map(|looker| looker.paint(labels, val, &best, threads)).transpose()?,
        })
    }
}

/// The whole page.
pub fn html(settings: &Settings, network: &Network, trained: &Trained, gallery: &Gallery) -> String {
    let name = escaped(&settings.name);
    let sections = [
        header(settings, network, trained),
        curves(trained),
        confusion(&trained.val.evaluation, trained.labels.names()),
        calibration(&trained.val, trained.head.temperature()),
        unknown(trained),
        test(trained),
        photographs("A look at the validation photographs", SHEET_NOTE, &gallery.sheet, "sheet"),
        photographs("The worst mistakes", WORST_NOTE, &gallery.worst, "sheet"),
        seen(gallery.seen.as_deref()),
        dataset(trained),
        format!(
            "<h2>Settings</h2>\n<p>As <code>config.toml</code> beside this page holds them; <code>bloomcast train \
            --config config.toml --out …</code> repeats the run.</p>\n<pre>{}</pre>\n",
            escaped(&settings.to_toml())
        ),
    ];
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width\">\n<title>{name}: what was learned</title>\n<style>\n{STYLE}</style>\n</head>\n\
         <body>\n<main>\n{}</main>\n</body>\n</html>\n",
        sections.concat()
    )
}

const SHEET_NOTE: &str = "By chance. Blue: named right. Red: named wrong, with what it is.";
const WORST_NOTE: &str = "Named wrong, the surest first: where the labels, or the model, should be looked at.";

fn header(settings: &Settings, network: &Network, trained: &Trained) -> String {
    let (figures, parameters) = (&trained.val.evaluation, trained.parameters);
    let cell = |value: String, what: &str| format!("<div><b>{value}</b><span>{what}</span></div>\n");
    let cells = [
        cell(format!("{:.1} %", figures.accuracy * 100.0), "accuracy of the best class"),
        cell(format!("{:.4}", figures.loss), "loss (cross-entropy, nats)"),
        cell(format!("{:.4}", figures.ece), "calibration error"),
        cell(format!("{:.1} %", figures.unknown * 100.0), "of the flowers rejected as unknown"),
        cell(trained.dataset.train_images.to_string(), "photographs learned from"),
        cell(format!("{:.0} s", trained.time.as_secs_f64()), "from start to end"),
    ];
    format!(
        "<h1>{}</h1>\n<p class=\"soft\">Recipe {}, seed {}, on {}: {} parameters, {} trained, {} frozen. EvaluatedSet on {} \
         photographs it did not learn from; they chose the best epoch, the temperature and the threshold of \
         <i>unknown</i>.</p>\n<div class=\"figures\">\n{}</div>\n",
        escaped(&settings.name),
        settings.recipe.name(),
        settings.sgd.seed,
        escaped(network.name()),
        grouped(parameters.total),
        grouped(parameters.trained),
        grouped(parameters.total - parameters.trained),
        figures.images,
        cells.concat()
    )
}

fn curves(trained: &Trained) -> String {
    let points = |of: fn(&crate::train::optim::sgd::Epoch) -> f64| {
        trained.history.iter().map(|e| (e.epoch as f64, of(e))).collect()
    };
    let best = trained.best_epoch();
    let loss = chart::lines(
        "loss over epochs",
        &[
            chart::Line { name: "learning", class: "train", points: points(|e| f64::from(e.train_loss)) },
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
        "<h2>How it learned</h2>\n<p>The loss on what it learns from is measured against smoothed labels and, with views by \
         chance and dropout, on harder photographs: it need not lie below the other.</p>\n<div class=\"pair\">\n\
         <div class=\"panel\"><h3>Loss</h3>{loss}</div>\n<div class=\"panel\"><h3>Accuracy</h3>{accuracy}</div>\n</div>\n"
    )
}

fn confusion(figures: &Evaluation, names: &[String]) -> String {
    let (title, panel) = match names.len() {
        ..=MATRIX_MAX => ("Rows: what it is. Columns: what it was taken for.", matrix(figures, names)),
        _ => ("Most often taken for another", mistakes(figures, names)),
    };
    format!(
        "<h2>What is taken for what</h2>\n<div class=\"pair\">\n<div class=\"panel\"><h3>{title}</h3>{panel}</div>\n\
         <div class=\"panel\"><h3>Each class</h3>{}</div>\n</div>\n",
        classes(figures)
    )
}

fn matrix(figures: &Evaluation, names: &[String]) -> String {
    let heads: String = names.iter().map(|name| format!("<th>{}</th>", escaped(name))).collect();
    let mut matrix = format!("<table class=\"matrix\"><tr><th></th>{heads}</tr>\n");
    for (row, (counts, name)) in figures.confusion.iter().zip(names).enumerate() {
        let of = counts.iter().sum::<usize>().max(1) as f64;
        let cell = |(column, count): (usize, &usize)| {
            let share = *count as f64 / of;
            let (colour, strength) = match row == column {
                true => ("blue", share * 70.0),
                false => ("red", (share * 250.0).min(70.0)),
            };
            let class = if *count == 0 { " class=\"off\"" } else { "" };
            format!(
                "<td{class} style=\"background: color-mix(in srgb, var(--{colour}) {strength:.0}%, transparent)\" \
                 title=\"{:.1} %\">{count}</td>",
                share * 100.0
            )
        };
        let cells: String = counts.iter().enumerate().map(cell).collect();
        writeln!(matrix, "<tr><th>{}</th>{cells}</tr>", escaped(name)).expect("memory takes it");
    }
    matrix + "</table>"
}

/// The largest counts beside the diagonal.
fn mistakes(figures: &Evaluation, names: &[String]) -> String {
    let cell = |(row, counts): (usize, &Vec<usize>)| -> Vec<(usize, usize, usize)> {
        counts.iter().enumerate().filter(|(column, _)| *column != row).map(|(column, n)| (*n, row, column)).collect()
    };
    let mut all: Vec<_> = figures.confusion.iter().enumerate().flat_map(cell).filter(|(n, ..)| *n > 0).collect();
    all.sort_by_key(|(n, ..)| std::cmp::Reverse(*n));
    let mut table = String::from("<table><tr><th>is</th><th>taken for</th><th>photographs</th></tr>\n");
    for (count, row, column) in all.into_iter().take(MISTAKES_MAX) {
        let (is, taken_for) = (escaped(&names[row]), escaped(&names[column]));
        writeln!(table, "<tr><td>{is}</td><td>{taken_for}</td><td>{count}</td></tr>").expect("memory takes it");
    }
    table + "</table>"
}

fn classes(figures: &Evaluation) -> String {
    let mut table = String::from(
        "<table><tr><th>class</th><th>photographs</th><th>precision</th><th>recall</th><th>F1</th></tr>\n",
    );
    for class in &figures.classes {
        writeln!(
            table,
            "<tr><td>{}</td><td>{}</td><td>{:.3}</td><td>{:.3}</td><td>{:.3}</td></tr>",
            escaped(&class.class),
            class.support,
            class.precision,
            class.recall,
            class.f1
        )
        .expect("memory takes it");
    }
    table + "</table>"
}

fn calibration(val: &EvaluatedSet, temperature: f32) -> String {
    let classes: Vec<usize> = val.photographs.iter().map(|photograph| photograph.class).collect();
    let before: Vec<Prediction> = val.predictions.iter().map(|after| without_temperature(after, temperature)).collect();
    let panel = |title: &str, predictions: &[Prediction]| {
        let (bins, error) = reliability(predictions, &classes);
        let chart = chart::reliability(title, &bins);
        format!("<div class=\"panel\"><h3>{title}: calibration error {error:.4}</h3>{chart}</div>\n")
    };
    format!(
        "<h2>How sure, and how right</h2>\n<p>Of the photographs that are named with 80 %, 80 % should be right: the bars \
         should end on the line. One temperature for all logits ({temperature:.3}) makes them as honest as it can.</p>\n\
         <div class=\"pair\">\n{}{}</div>\n",
        panel("Before the temperature", &before),
        panel("After it", &val.predictions)
    )
}

/// The temperature divided the logits, which are the logarithms of the probabilities but for a constant.
fn without_temperature(after: &Prediction, temperature: f32) -> Prediction {
    let logits: Vec<f32> = after.probabilities.iter().map(|p| p.max(f32::MIN_POSITIVE).ln() * temperature).collect();
    Prediction { probabilities: softmax(&logits, 1.0), ..after.clone() }
}

fn unknown(trained: &Trained) -> String {
    let similarities: Vec<f32> = trained.val.predictions.iter().map(|prediction| prediction.similarity).collect();
    let threshold = trained.ood.threshold();
    format!(
        "<h2>What it does not know</h2>\n<p>A picture whose features point out of the space that the flowers span is \
         <i>unknown</i>, however sure the softmax is. The threshold, {threshold:.4}, rejects {:.1} % of these flowers.</p>\n\
         <div class=\"panel chart\">{}</div>\n",
        trained.val.evaluation.unknown * 100.0,
        chart::histogram("similarities", &similarities, threshold)
    )
}

fn test(trained: &Trained) -> String {
    let Some(test) = &trained.test else { return String::new() };
    let figures = &test.evaluation;
    format!(
        "<h2>On the test photographs</h2>\n<p>{} photographs that nothing was chosen by, looked at once: accuracy \
         {:.4}, loss {:.4}, calibration error {:.4}, {:.1} % rejected as unknown.</p>\n<div class=\"panel\">{}</div>\n",
        figures.images,
        figures.accuracy,
        figures.loss,
        figures.ece,
        figures.unknown * 100.0,
        classes(figures)
    )
}

fn photographs(title: &str, note: &str, shown: &[GalleryImage], class: &str) -> String {
    if shown.is_empty() {
        return format!("<h2>{title}</h2>\n<p>None.</p>\n");
    }
    let figures: Vec<String> = shown.iter().map(figure).collect();
    format!("<h2>{title}</h2>\n<p>{note}</p>\n<div class=\"{class}\">\n{}</div>\n", figures.concat())
}

fn figure(shown: &GalleryImage) -> String {
    let class = if shown.right() { "right" } else { "wrong" };
    let unknown = if shown.known { "" } else { " <small>unknown</small>" };
    format!(
        "<figure><figcaption class=\"{class}\" title=\"{0}\">{0}{unknown}</figcaption><img alt=\"{1}\" title=\"{1}\" \
         src=\"data:image/jpeg;base64,{2}\"></figure>\n",
        escaped(shown.title_lines().join(" ").trim_end()),
        escaped(&shown.file),
        STANDARD.encode(jpeg(&shown.thumbnail))
    )
}

fn seen(seen: Option<&[GalleryImage]>) -> String {
    let title = "Where it looks";
    match seen {
        Some(seen) => photographs(
            title,
            "The surest of the classes. Warm places speak for the class, more than for the mean of all; dark ones do not. The \
             head is linear in the mean over the places, so that this is no estimate: it is what each place adds.",
            seen,
            "sheet five",
        ),
        None => format!(
            "<h2>{title}</h2>\n<p>This network does not end in a 1×1 convolution and a mean, so it does not tell.</p>\n"
        ),
    }
}

fn dataset(trained: &Trained) -> String {
    let mut table =
        String::from("<table><tr><th>class</th><th>learned from</th><th>measured on</th><th>tested on</th></tr>\n");
    let test = |class: usize| match &trained.test {
        Some(test) => test.evaluation.classes[class].support.to_string(),
        None => "–".into(),
    };
    for (class, name) in trained.labels.names().iter().enumerate() {
        let (train, val) = (trained.train_images[class], trained.val.evaluation.classes[class].support);
        writeln!(table, "<tr><td>{}</td><td>{train}</td><td>{val}</td><td>{}</td></tr>", escaped(name), test(class))
            .expect("memory takes it");
    }
    let left_out: Vec<String> =
        trained.left_out.iter().map(|finding| format!("{}: {}\n", finding.file.display(), finding.problem)).collect();
    let list = match left_out.len() {
        0 => "<p>Nothing was left out.</p>\n".into(),
        n => format!(
            "<details open><summary>{n} files were left out</summary><pre>{}</pre></details>\n",
            escaped(&left_out.concat())
        ),
    };
    format!(
        "<h2>What the dataset held</h2>\n<div class=\"panel\">{table}</table></div>\n{list}<p class=\"soft\">Fingerprint of the \
         photographs: <code>{}</code></p>\n",
        trained.dataset.sha256
    )
}

fn jpeg(image: &RgbImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).encode_image(image).expect("memory takes a small JPEG");
    bytes.into_inner()
}

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
    fn a_temperature_can_be_taken_out_again() {
        let after = Prediction { probabilities: softmax(&[2.0, 0.5, -1.0], 1.7), similarity: 1.0, known: true };
        let before = without_temperature(&after, 1.7).probabilities;
        for (got, expected) in before.iter().zip(softmax(&[2.0, 0.5, -1.0], 1.0)) {
            assert!((got - expected).abs() < 1e-5, "{got}, expected {expected}");
        }
    }
}
