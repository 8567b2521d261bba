//! Training, stage by stage: `cargo bench --bench train`. As many photographs as TensorFlow's five flowers have to learn
//! from; what they show does not change the time.

use std::convert::Infallible;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use bloomcast::bench::Bench;
use bloomcast::bundle::Bundle;
use bloomcast::train::data::augment::Views;
use bloomcast::train::data::photographs::Photograph;
use bloomcast::train::features::device::Choice;
use bloomcast::train::features::{Extractor, Features, Precision, Values};
use bloomcast::train::optim::head::HeadLearner;
use bloomcast::train::optim::last_conv::LastConvLearner;
use bloomcast::train::optim::sgd::{self, Learner, Sgd};
use bloomcast::train::run::outcome::RunOptions;
use bloomcast::train::{Recipe, train};
use bloomcast::vision::test_pattern;
use bloomcast::vision::{Network, Preprocess};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::f16;

const PHOTOGRAPHS: usize = 2569;
const VALIDATION: usize = 550;
const CLASSES: usize = 5;
const CHANNELS: usize = 320;
const PLACES: usize = 49;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn photograph(path: &Path, i: usize) -> Photograph {
    let mut content = [0; 32];
    content[..8].copy_from_slice(&i.to_le_bytes());
    Photograph { path: path.into(), class: i % CLASSES, content }
}

/// Rows that differ, of no photograph.
fn rows(count: usize, width: usize, views: usize, precision: Precision) -> Features {
    let number = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 16) as f32 / 65_536.0;
    let mut features = Features { width, views, ..Features::default() };
    for i in 0..count {
        let numbers = (0..width * views).map(|n| number(i * width * views + n));
        features.values.push(match precision {
            Precision::Single => Values::Single(numbers.collect()),
            Precision::Half => Values::Half(numbers.map(f16::from_f32).collect()),
        });
        features.images.push(photograph(Path::new("none"), i));
    }
    features
}

fn extraction(c: &mut Criterion) {
    let folder = std::env::temp_dir().join(format!("bloomcast-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("drawn.jpg");
    std::fs::write(&path, test_pattern::jpeg(640, 480)).unwrap();
    let photographs: Vec<Photograph> = (0..200).map(|i| photograph(&path, i)).collect();
    let (network, preprocess) = (Network::built_in().unwrap(), Preprocess::mobilenet_v2());
    let backbone = network.features(None).unwrap();
    let mut group = c.benchmark_group("extraction");
    group.sample_size(10).measurement_time(Duration::from_secs(40)).throughput(Throughput::Elements(200));
    let extractor = |threads| Extractor {
        network: &network,
        backbone: &backbone,
        map: None,
        preprocess: &preprocess,
        precision: Precision::Single,
        views: Views::ONE,
        cache: None,
        threads,
    };
    for threads in [1, threads()] {
        let run = || extractor(threads).run(&photographs, &|_| {}).unwrap();
        group.bench_function(format!("200 photographs of 640×480, threads: {threads}"), |b| b.iter(run));
    }
    group.finish();
    // Against what `bloomcast bench` says of one frame on one thread.
    let frame = Bench::new(&Bundle::built_in().unwrap(), None, Some(bloomcast_kernels::Isa::best()), 1)
        .unwrap()
        .run(Some(&path), 100)
        .unwrap();
    let single = 1e3 / frame.stages.frame.median_ms;
    let began = Instant::now();
    extractor(threads()).run(&photographs, &|_| {}).unwrap();
    let rate = photographs.len() as f64 / began.elapsed().as_secs_f64();
    let share = rate / (threads() as f64 * single);
    println!(
        "{rate:.1} photographs a second on {} threads, {single:.1} frames on one: {share:.2} of all cores",
        threads()
    );
    std::fs::remove_dir_all(folder).unwrap();
}

/// A whole run whose features are kept: hashing, reading, 100 epochs, calibration, report, bundle.
fn warm_run(c: &mut Criterion) {
    let photographs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/flowers");
    if !photographs.is_dir() {
        println!("skipped: a whole run: no photographs in ../shared/flowers");
        return;
    }
    let folder = std::env::temp_dir().join(format!("bloomcast-bench-run-{}", std::process::id()));
    let mut settings = Recipe::Frozen.settings(photographs.join("train"));
    settings.val = Some(photographs.join("val"));
    settings.sgd.epochs = 100;
    let surroundings = RunOptions {
        out: folder.join("run"),
        overwrite: true,
        cache: Some(folder.join("cache")),
        threads: threads(),
        device: Choice::Cpu,
        created_at: SystemTime::UNIX_EPOCH,
    };
    let run = || train(&settings, &surroundings, &|_| {}).unwrap();
    run();
    let mut group = c.benchmark_group("run");
    group.sample_size(10);
    group.bench_function("frozen, 100 epochs, features kept", |b| b.iter(run));
    group.finish();
    std::fs::remove_dir_all(folder).unwrap();
}

fn fit(learner: &mut dyn Learner, settings: &Sgd) {
    sgd::fit(learner, settings, |_, _| Ok::<(), Infallible>(())).unwrap();
}

fn learning(c: &mut Criterion) {
    let sgd = |recipe: Recipe, epochs: usize| Sgd { epochs, ..recipe.settings("none".into()).sgd };
    let mut group = c.benchmark_group("learning");
    group.sample_size(10);
    let (train, val) = (rows(PHOTOGRAPHS, 1280, 1, Precision::Single), rows(VALIDATION, 1280, 1, Precision::Single));
    let settings = sgd(Recipe::Frozen, 100);
    group.bench_function("head, 100 epochs", |b| {
        b.iter(|| fit(&mut HeadLearner::new(&train, &val, CLASSES, &settings), &settings));
    });
    let width = CHANNELS * PLACES;
    let (train, val) = (rows(PHOTOGRAPHS, width, 6, Precision::Half), rows(VALIDATION, width, 1, Precision::Single));
    let settings = sgd(Recipe::LastConv, 1);
    let network = Network::built_in().unwrap();
    let own = &network.last_conv().unwrap().weights;
    group.bench_function("last convolution, 1 epoch", |b| {
        b.iter(|| fit(&mut LastConvLearner::new(&train, &val, own, CLASSES, &settings, threads()), &settings));
    });
    group.finish();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or(" unknown");
    println!("peak memory with the maps of {PHOTOGRAPHS} photographs, six views each:{peak}");
}

criterion_group!(benches, extraction, learning, warm_run);
criterion_main!(benches);
