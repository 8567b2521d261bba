//! Benchmarks of the training stages: `cargo bench --bench train`. The synthetic sets have the size of the training and
//! validation sets of TensorFlow's `flower_photos`; the time does not depend on the content.

use std::convert::Infallible;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use bloomcast::bench::Bench;
use bloomcast::bundle::Bundle;
use bloomcast::train::data::augment::Views;
use bloomcast::train::data::image_set::{HashedImage, Origin};
use bloomcast::train::features::compute_device::ComputeDeviceChoice;
use bloomcast::train::features::{Extractor, Features, Precision, Values};
use bloomcast::train::optim::head::HeadLearner;
use bloomcast::train::optim::last_conv::LastConvLearner;
use bloomcast::train::optim::training_loop::{self, Hyperparams, Learner};
use bloomcast::train::{Recipe, RunOptions, train};
use bloomcast::vision::test_pattern;
use bloomcast::vision::{OnnxBackbone, Preprocess};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::f16;

const TRAIN_IMAGES: usize = 2569;
const VAL_IMAGES: usize = 550;
const CLASSES: usize = 5;
/// The feature map before MobileNetV2's last convolution: 320 channels, 7×7 positions.
const CHANNELS: usize = 320;
const POSITIONS: usize = 49;

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn photograph(path: &Path, i: usize) -> HashedImage {
    let mut content_hash = [0; 32];
    content_hash[..8].copy_from_slice(&i.to_le_bytes());
    HashedImage { path: path.into(), class: i % CLASSES, content_hash, origin: Origin::File }
}

/// Returns pseudorandom features in 0–1.
fn synthetic_features(count: usize, width: usize, views: usize, precision: Precision) -> Features {
    let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 16) as f32 / 65_536.0;
    let mut features = Features { width, views, ..Features::default() };
    for i in 0..count {
        let values = (0..width * views).map(|n| value(i * width * views + n));
        features.values.push(match precision {
            Precision::Single => Values::Single(values.collect()),
            Precision::Half => Values::Half(values.map(f16::from_f32).collect()),
        });
        features.images.push(photograph(Path::new("none"), i));
    }
    features
}

fn extraction(c: &mut Criterion) {
    let folder = std::env::temp_dir().join(format!("bloomcast-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("pattern.jpg");
    std::fs::write(&path, test_pattern::jpeg(640, 480)).unwrap();
    let photographs: Vec<HashedImage> = (0..200).map(|i| photograph(&path, i)).collect();
    let (network, preprocess) = (OnnxBackbone::built_in().unwrap(), Preprocess::mobilenet_v2());
    let backbone = network.compile_features(None).unwrap();
    let mut group = c.benchmark_group("extraction");
    group.sample_size(10).measurement_time(Duration::from_secs(40)).throughput(Throughput::Elements(200));
    let extractor = |threads| Extractor {
        network: &network,
        backbone: &backbone,
        map_channels: None,
        preprocess: &preprocess,
        precision: Precision::Single,
        views: Views::ONE,
        cache: None,
        canvas: None,
        threads,
    };
    for threads in [1, threads()] {
        let run = || extractor(threads).run(&photographs, &|_| {}).unwrap();
        group.bench_function(format!("200 images of 640×480, threads: {threads}"), |b| b.iter(run));
    }
    group.finish();
    // The efficiency relative to `bloomcast bench` on one thread.
    let frame = Bench::new(&Bundle::built_in().unwrap(), None, Some(bloomcast_kernels::Isa::best()), 1)
        .unwrap()
        .run(Some(&path), 100)
        .unwrap();
    let single = 1e3 / frame.stages.frame.median_ms;
    let started = Instant::now();
    extractor(threads()).run(&photographs, &|_| {}).unwrap();
    let rate = photographs.len() as f64 / started.elapsed().as_secs_f64();
    let efficiency = rate / (threads() as f64 * single);
    println!(
        "{rate:.1} images/s on {} threads, {single:.1} frames/s on one thread: parallel efficiency {efficiency:.2}",
        threads()
    );
    std::fs::remove_dir_all(folder).unwrap();
}

/// A whole run with cached features: hashing, reading the cache, 100 epochs, calibration, report, bundle.
fn cached_run(c: &mut Criterion) {
    let photographs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/flowers");
    if !photographs.is_dir() {
        println!("skipped: cached run: no images in ../shared/flowers");
        return;
    }
    let folder = std::env::temp_dir().join(format!("bloomcast-bench-run-{}", std::process::id()));
    let mut settings = Recipe::Frozen.settings(photographs.join("train"));
    settings.val = Some(photographs.join("val"));
    settings.hyperparams.epochs = 100;
    let options = RunOptions {
        out: folder.join("run"),
        overwrite: true,
        cache: Some(folder.join("cache")),
        threads: threads(),
        device: ComputeDeviceChoice::Cpu,
        created_at: SystemTime::UNIX_EPOCH,
    };
    let run = || train(&settings, &options, &|_| {}).unwrap();
    run();
    let mut group = c.benchmark_group("run");
    group.sample_size(10);
    group.bench_function("frozen, 100 epochs, cached features", |b| b.iter(run));
    group.finish();
    std::fs::remove_dir_all(folder).unwrap();
}

fn fit(learner: &mut dyn Learner, settings: &Hyperparams) {
    training_loop::fit(learner, settings, |_, _| Ok::<(), Infallible>(())).unwrap();
}

fn fitting(c: &mut Criterion) {
    let sgd = |recipe: Recipe, epochs: usize| Hyperparams { epochs, ..recipe.settings("none".into()).hyperparams };
    let mut group = c.benchmark_group("fit");
    group.sample_size(10);
    let (train, val) = (
        synthetic_features(TRAIN_IMAGES, 1280, 1, Precision::Single),
        synthetic_features(VAL_IMAGES, 1280, 1, Precision::Single),
    );
    let settings = sgd(Recipe::Frozen, 100);
    group.bench_function("head, 100 epochs", |b| {
        b.iter(|| fit(&mut HeadLearner::new(&train, &val, CLASSES, &settings), &settings));
    });
    let width = CHANNELS * POSITIONS;
    let (train, val) = (
        synthetic_features(TRAIN_IMAGES, width, 6, Precision::Half),
        synthetic_features(VAL_IMAGES, width, 1, Precision::Single),
    );
    let settings = sgd(Recipe::LastConv, 1);
    let network = OnnxBackbone::built_in().unwrap();
    let pretrained = &network.last_conv().unwrap().weights;
    group.bench_function("last convolution, 1 epoch", |b| {
        b.iter(|| fit(&mut LastConvLearner::new(&train, &val, pretrained, CLASSES, &settings, threads()), &settings));
    });
    group.finish();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or(" unknown");
    println!("peak memory with the feature maps of {TRAIN_IMAGES} images, six views each:{peak}");
}

criterion_group!(benches, extraction, fitting, cached_run);
criterion_main!(benches);
