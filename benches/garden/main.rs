//! Measures a model before other flowers, other things, empty scenes and under the conditions of a camera, as a device judges frames
//! by default: with the view of the model. Single pictures are scanned at both scales; [`stream`] has the cost and the events of streams.
//!
//! `cargo bench --bench garden -- [--model FILE] [--seed N] [--photographs DIR] [--only PART]`; the parts are known, other,
//! scenes, conditions and streams. The photographs are not part of the project; the folder
//! holds `flowers/val`, `garden/known_val`, `garden/other_val` and `others`, whose second half by name is used. No photograph of a scene
//! is one of the training of the built-in model.

mod scenes;
mod stream;

use std::convert::Infallible;
use std::path::{Path, PathBuf};

use bloomcast::bundle::{Bundle, ViewOptions};
use bloomcast::config::Config;
use bloomcast::train::parallel;
use bloomcast::vision::quality::QualityMeter;
use bloomcast::vision::{Classifier, Preprocessor, Quality, Region, View, decode};
use image::RgbImage;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use scenes::{CONDITIONS, nothing, scene, under};

/// Sizes of a flower in a scene, as a share of the frame's height.
pub const SIZES: [f32; 4] = [1.0, 0.6, 0.4, 0.25];

/// Additions to the threshold of unknown, for the curve of false alarms and recall in scenes.
const STRICTER: [f32; 7] = [-0.04, -0.02, 0.0, 0.02, 0.04, 0.06, 0.1];

struct Options {
    model: Option<PathBuf>,
    seed: u64,
    photographs: PathBuf,
    /// The part that is measured; `None` for all.
    only: Option<String>,
}

/// A photograph and the class that its folder names.
pub struct Photograph {
    path: PathBuf,
    class: String,
}

/// The class of a frame, or `unknown`; without the threshold of unknown in `best`.
struct Judged {
    class: String,
    best: String,
    /// Where the class was found.
    place: Option<Region>,
    /// How much the similarity is above the threshold; below 0, the frame is unknown.
    margin: f32,
}

fn main() {
    let options = options();
    let Options { photographs, seed, .. } = &options;
    let flowers = list(&photographs.join("flowers/val"));
    if flowers.is_empty() {
        // `cargo bench` runs all benchmarks, also where there are no photographs.
        println!("skipped: no photographs in {}; see --photographs", photographs.display());
        return;
    }
    let bundle = match &options.model {
        Some(path) => Bundle::read(path).unwrap(),
        None => Bundle::built_in().unwrap(),
    };
    let garden = Garden { bundle, seed: *seed, view: None };
    let others = list(&photographs.join("others"));
    let things = &others[others.len() / 2..];
    let (known, other) = (list(&photographs.join("garden/known_val")), list(&photographs.join("garden/other_val")));
    let name = &garden.bundle.manifest().name;
    println!("{name}, view {:?}, seed {seed}; the interval is that of Wilson with 95 %\n", garden.bundle.view());
    let whole = Garden { view: Some(View::Whole), ..garden.clone() };
    let wanted = |part: &str| options.only.as_deref().is_none_or(|only| only == part);
    if wanted("known") {
        whole.known(&flowers, "flowers/val, whole view");
        garden.known(&flowers, "flowers/val");
        garden.known(&known, "garden/known_val");
    }
    if wanted("other") {
        garden.other_species(&other);
        garden.things(things);
        garden.nothing();
    }
    if wanted("scenes") {
        garden.scenes(&flowers, things);
    }
    if wanted("conditions") {
        garden.conditions(&flowers);
    }
    if wanted("streams") {
        stream::run(&garden, &flowers, things);
    }
}

fn options() -> Options {
    let mut options = Options { model: None, seed: 1, photographs: "../shared".into(), only: None };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{flag} needs a value"));
        match flag.as_str() {
            "--model" => options.model = Some(value().into()),
            "--seed" => options.seed = value().parse().expect("--seed is a whole number"),
            "--only" => options.only = Some(value()),
            "--photographs" => options.photographs = value().into(),
            // Added by cargo.
            "--bench" => {}
            _ => panic!("unknown flag {flag}"),
        }
    }
    options
}

/// Returns the photographs in a folder and its folders, sorted by path.
fn list(folder: &Path) -> Vec<Photograph> {
    let mut photographs = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            photographs.extend(list(&path));
        } else if path.extension().is_some_and(|extension| extension == "jpg") {
            let class = folder.file_name().unwrap().to_string_lossy().into_owned();
            photographs.push(Photograph { path, class });
        }
    }
    photographs.sort_by(|a, b| a.path.cmp(&b.path));
    photographs
}

#[derive(Clone)]
pub struct Garden {
    bundle: Bundle,
    seed: u64,
    /// `None`: that of the model.
    view: Option<View>,
}

impl Garden {
    /// Judges `count` frames as the device does by default. `frame` makes each from a random number generator of its own.
    fn judge(&self, count: usize, frame: impl Fn(usize, &mut ChaCha8Rng) -> RgbImage + Sync) -> Vec<Judged> {
        let limits = Config::from_settings(&[]).unwrap().camera.quality_limits;
        let backbone = self.bundle.compile_backbone(&self.bundle.onnx_backbone(None).unwrap()).unwrap();
        let options = ViewOptions { view: self.view, ..ViewOptions::default() };
        let preprocess = &self.bundle.manifest().preprocess;
        let init = || -> Result<(Classifier, Preprocessor, QualityMeter), Infallible> {
            let classifier = self.bundle.classifier_on(&backbone, options).unwrap();
            Ok((classifier, Preprocessor::new(preprocess.clone()), QualityMeter::new(limits)))
        };
        let work = |(classifier, preprocessor, quality): &mut (Classifier, Preprocessor, QualityMeter), i: usize| {
            let image = frame(i, &mut self.rng(i));
            let is_fit = quality.assess(preprocessor.resize(&image)) == Quality::Ok;
            let prediction = classifier.classify_by_view(&image).unwrap().0.clone();
            let best = bloomcast::vision::head::argmax(&prediction.probabilities);
            let name = |class| classifier.labels().name(class).to_owned();
            let class = prediction.class().filter(|_| is_fit);
            let place = prediction.found.first().map(|found| found.region);
            let margin = prediction.similarity - self.bundle.contents().ood.threshold();
            Ok(Judged { class: name(class), best: name(Some(best)), place, margin })
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let Ok(judged) = parallel::map(count, threads, "judge", init, work, &|_| {});
        judged
    }

    /// Returns the random number generator of frame `i`.
    fn rng(&self, i: usize) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(i as u64);
        rng
    }

    fn known(&self, photographs: &[Photograph], name: &str) {
        let judged = self.judge(photographs.len(), |i, _| open(&photographs[i]));
        let pairs = || judged.iter().zip(photographs);
        print(&format!("{name}: best class right"), pairs().filter(|(j, p)| j.best == p.class).count(), judged.len());
        print(&format!("{name}: named right"), pairs().filter(|(j, p)| j.class == p.class).count(), judged.len());
        print(&format!("{name}: rejected"), unknown(&judged), judged.len());
    }

    fn other_species(&self, photographs: &[Photograph]) {
        let judged = self.judge(photographs.len(), |i, _| open(&photographs[i]));
        print("other species: called a class", judged.len() - unknown(&judged), judged.len());
        let mut species: Vec<&str> = photographs.iter().map(|photograph| photograph.class.as_str()).collect();
        species.dedup();
        for species in species {
            let of = judged.iter().zip(photographs).filter(|(_, photograph)| photograph.class == species);
            let of: Vec<&Judged> = of.map(|(judged, _)| judged).collect();
            let called = of.iter().filter(|judged| judged.class != "unknown").count();
            print(&format!("  {species}"), called, of.len());
        }
    }

    /// Four parts of each thing by day, and the thing in little light, out of focus and mostly lost.
    fn things(&self, things: &[Photograph]) {
        let report = |name: &str, judged: &[Judged]| {
            print(&format!("other things, {name}: called a class"), judged.len() - unknown(judged), judged.len());
        };
        report("by day", &self.judge(4 * things.len(), |i, rng| scenes::part(&open(&things[i / 4]), i % 4, rng)));
        for (name, light) in [("5 % light", 0.05), ("2 % light", 0.02)] {
            report(name, &self.judge(things.len(), |i, _| scenes::darkened(&open(&things[i]), light)));
        }
        report("radius 40 of 640", &self.judge(things.len(), |i, _| scenes::defocused(&open(&things[i]))));
        report("90 % lost", &self.judge(things.len(), |i, _| scenes::lost(&open(&things[i]))));
    }

    fn nothing(&self) {
        for (name, count) in [("ten colors", 10), ("gradients", 50), ("noise", 50)] {
            let judged = self.judge(count, |i, rng| nothing(name, i, rng));
            print(&format!("{name}: called a class"), count - unknown(&judged), count);
        }
    }

    fn scenes(&self, flowers: &[Photograph], backgrounds: &[Photograph]) {
        let frame = |i: usize, size: Option<f32>, rng: &mut ChaCha8Rng| {
            let flower = size.map(|size| (open(&flowers[(7 * i) % flowers.len()]), size));
            scene(&open(&backgrounds[i % backgrounds.len()]), flower, rng)
        };
        let empty = self.judge(backgrounds.len(), |i, rng| frame(i, None, rng).0);
        print("empty scenes: called a class", empty.len() - unknown(&empty), empty.len());
        let mut curve = STRICTER.map(|more| (share(empty.len(), |i| empty[i].margin >= more), Vec::new()));
        for size in SIZES {
            let count = 2 * backgrounds.len();
            let judged = self.judge(count, |i, rng| frame(i, Some(size), rng).0);
            let class = |i: usize| &flowers[(7 * i) % flowers.len()].class;
            let right = (0..count).filter(|i| judged[*i].class == *class(*i)).count();
            let wrong = count - right - unknown(&judged);
            print(&format!("scenes, flower of {size} of the height: named right"), right, count);
            print("  named wrong", wrong, count);
            for (more, (_, rights)) in STRICTER.into_iter().zip(&mut curve) {
                rights.push(share(count, |i| judged[i].best == *class(i) && judged[i].margin >= more));
            }
            if judged.iter().any(|judged| judged.place.is_some()) {
                // The same scene again, for the place of the flower.
                let place = |i: usize| frame(i, Some(size), &mut self.rng(i)).1.unwrap();
                let named: Vec<usize> = (0..count).filter(|i| judged[*i].class == *class(*i)).collect();
                let overlap = |i: usize| judged[i].place.map_or(0.0, |found| found.intersection_over_union(&place(i)));
                let placed = named.iter().filter(|i| overlap(**i) >= 0.3).count();
                print("  of these, box with an overlap of at least 0.3", placed, named.len());
            }
        }
        for (more, (empty, rights)) in STRICTER.into_iter().zip(curve) {
            let rights: Vec<String> = rights.iter().map(|right| format!("{right:.3}")).collect();
            println!("threshold {more:+.2}: empty scenes {empty:.3}, named right {}", rights.join(" / "));
        }
    }

    fn conditions(&self, flowers: &[Photograph]) {
        let mut accuracies = Vec::new();
        for condition in CONDITIONS {
            let judged = self.judge(flowers.len(), |i, rng| under(condition, &open(&flowers[i]), rng));
            let right = judged.iter().zip(flowers).filter(|(judged, flower)| judged.best == flower.class).count();
            print(&format!("condition {condition}: best class right"), right, judged.len());
            accuracies.push(right as f64 / judged.len() as f64);
        }
        let mean = accuracies.iter().sum::<f64>() / accuracies.len() as f64;
        let worst = accuracies.iter().copied().fold(1.0, f64::min);
        println!("conditions: mean {mean:.3}, worst {worst:.3}");
    }
}

pub fn open(photograph: &Photograph) -> RgbImage {
    decode::file(&photograph.path).unwrap()
}

fn unknown(judged: &[Judged]) -> usize {
    judged.iter().filter(|judged| judged.class == "unknown").count()
}

/// Returns the share of `count` frames for which `is` is true.
fn share(count: usize, is: impl Fn(usize) -> bool) -> f64 {
    (0..count).filter(|i| is(*i)).count() as f64 / count as f64
}

/// Prints a share with its confidence interval (Wilson, 1927).
pub fn print(name: &str, count: usize, total: usize) {
    const Z: f64 = 1.96;
    let (n, p) = (total as f64, count as f64 / total as f64);
    let center = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let (low, high) = ((center - half).max(0.0), (center + half).min(1.0));
    println!("{name:52} {p:.3}  {low:.3}–{high:.3}  {count}/{total}");
}
