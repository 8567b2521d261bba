//! Measures a model before other flowers, other things, empty scenes and under the conditions of a camera, as a device judges frames
//! by default.
//!
//! `cargo bench --bench garden -- [--model FILE] [--seed N] [--photographs DIR]`. The photographs are not part of the project; the folder
//! holds `flowers/val`, `garden/known_val`, `garden/other_val` and `others`, whose second half by name is used. No photograph of a scene
//! is one of the training of the built-in model.

mod scenes;

use std::convert::Infallible;
use std::path::{Path, PathBuf};

use bloomcast::bundle::Bundle;
use bloomcast::config::Config;
use bloomcast::train::parallel;
use bloomcast::vision::quality::QualityMeter;
use bloomcast::vision::{Classifier, FrameDiff, FrameFilter, FrameResult, decode};
use image::RgbImage;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use scenes::{CONDITIONS, nothing, scene, under};

/// Sizes of a flower in a scene, as a share of the frame's height.
const SIZES: [f32; 4] = [1.0, 0.6, 0.4, 0.25];

struct Options {
    model: Option<PathBuf>,
    seed: u64,
    photographs: PathBuf,
}

/// A photograph and the class that its folder names.
struct Photograph {
    path: PathBuf,
    class: String,
}

/// The class of a frame, or `unknown`; without the threshold of unknown in `best`.
struct Judged {
    class: String,
    best: String,
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
    let garden = Garden { bundle, seed: *seed };
    let others = list(&photographs.join("others"));
    let things = &others[others.len() / 2..];
    let (known, other) = (list(&photographs.join("garden/known_val")), list(&photographs.join("garden/other_val")));
    println!("{}, seed {seed}; the interval is that of Wilson with 95 %\n", garden.bundle.manifest().name);
    garden.known(&flowers, "flowers/val");
    garden.known(&known, "garden/known_val");
    garden.other_species(&other);
    garden.things(things);
    garden.nothing();
    garden.scenes(&flowers, things);
    garden.conditions(&flowers);
}

fn options() -> Options {
    let mut options = Options { model: None, seed: 1, photographs: "../shared".into() };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{flag} needs a value"));
        match flag.as_str() {
            "--model" => options.model = Some(value().into()),
            "--seed" => options.seed = value().parse().expect("--seed is a whole number"),
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

struct Garden {
    bundle: Bundle,
    seed: u64,
}

impl Garden {
    /// Judges `count` frames as the device does by default. `frame` makes each from a random number generator of its own.
    fn judge(&self, count: usize, frame: impl Fn(usize, &mut ChaCha8Rng) -> RgbImage + Sync) -> Vec<Judged> {
        let limits = Config::from_settings(&[]).unwrap().camera.quality_limits;
        let init = || -> Result<(Classifier, FrameFilter), Infallible> {
            let filter = FrameFilter { diff: FrameDiff::new(0.0), quality: QualityMeter::new(limits) };
            Ok((self.bundle.classifier(None).unwrap(), filter))
        };
        let work = |(classifier, filter): &mut (Classifier, FrameFilter), i: usize| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(i as u64);
            let image = frame(i, &mut rng);
            let class = match classifier.classify_frame(&image, filter).unwrap() {
                FrameResult::Unfit(_) => {
                    // For the best class.
                    classifier.classify(&image).unwrap();
                    None
                }
                _ => classifier.last_prediction().class(),
            };
            let best = bloomcast::vision::head::argmax(&classifier.last_prediction().probabilities);
            let name = |class| classifier.labels().name(class).to_owned();
            Ok(Judged { class: name(class), best: name(Some(best)) })
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let Ok(judged) = parallel::map(count, threads, "judge", init, work, &|_| {});
        judged
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

    fn scenes(&self, flowers: &[Photograph], grounds: &[Photograph]) {
        let frame = |i: usize, size: Option<f32>, rng: &mut ChaCha8Rng| {
            let flower = size.map(|size| (open(&flowers[(7 * i) % flowers.len()]), size));
            scene(&open(&grounds[i % grounds.len()]), flower, rng)
        };
        let empty = self.judge(grounds.len(), |i, rng| frame(i, None, rng));
        print("empty scenes: called a class", empty.len() - unknown(&empty), empty.len());
        for size in SIZES {
            let count = 2 * grounds.len();
            let judged = self.judge(count, |i, rng| frame(i, Some(size), rng));
            let class = |i: usize| &flowers[(7 * i) % flowers.len()].class;
            let right = (0..count).filter(|i| judged[*i].class == *class(*i)).count();
            let wrong = count - right - unknown(&judged);
            print(&format!("scenes, flower of {size} of the height: named right"), right, count);
            print("  named wrong", wrong, count);
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

fn open(photograph: &Photograph) -> RgbImage {
    decode::file(&photograph.path).unwrap()
}

fn unknown(judged: &[Judged]) -> usize {
    judged.iter().filter(|judged| judged.class == "unknown").count()
}

/// Prints a share with its confidence interval (Wilson, 1927).
fn print(name: &str, count: usize, total: usize) {
    const Z: f64 = 1.96;
    let (n, p) = (total as f64, count as f64 / total as f64);
    let center = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let (low, high) = ((center - half).max(0.0), (center + half).min(1.0));
    println!("{name:52} {p:.3}  {low:.3}–{high:.3}  {count}/{total}");
}
