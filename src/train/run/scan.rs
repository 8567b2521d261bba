//! Stage 3b: fits what scanning needs on the features of the fitted model: a head for windows, and the offset of each scale.
//!
//! The windows have a head of their own: trained together with whole images, they cost these 1 % of accuracy.

use std::convert::Infallible;

use half::f16;
use image::RgbImage;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::train::data::augment::Views;
use crate::train::data::image_set::{HashedImage, Origin, decode_file};
use crate::train::data::scene::{self, Geometry};
use crate::train::features::{Features, Precision, Values};
use crate::train::optim::head::HeadLearner;
use crate::train::optim::training_loop::{self, Hyperparams, Optimizer};
use crate::train::parallel;
use crate::train::run::calibrate::{fit_temperature, threshold};
use crate::train::run::extract::{ExtractedFeatures, extract_set};
use crate::train::run::fit::FittedModel;
use crate::train::run::load::{Datasets, Pretrained};
use crate::train::run::{Progress, RunContext, TrainError};
use crate::vision::backbone::ComputeDevice;
use crate::vision::classifier::ClassifierParams;
use crate::vision::scan::{SCALES, Scanner};
use crate::vision::{BackboneError, Head, LastConvWeights, ScanBudget, ScanParams};

/// Windows whose feature maps are in memory at once.
const CHUNK_WINDOWS: usize = 3072;
/// Windows of a validation scene; the first one is used, and another one makes the cache entry that of a training scene.
const VAL_WINDOWS: usize = 2;
/// Share of the frames without a flower that a scale accepts, if it can: of the folder of backgrounds that is mistaken least, since other
/// folders may show flowers that look alike.
const FALSE_ALARMS: f32 = 0.004;
/// Frames without a flower of each source.
const EMPTY_FRAMES: usize = 256;
/// Most frames with a flower that a scale rejects for that, as a multiple of the share of the validation images.
const REJECT_MAX: f32 = 3.0;
/// Sizes of a flower that each scale is for, as shares of a frame's height.
const FLOWER_SHARES: [[f32; 2]; SCALES] = [[0.65, 1.0], [0.28, 0.65]];

/// Fits the head and the unknown classes for windows on the scenes and on all training images; `None` if there are no scenes. The
/// offsets are zero: [`fit_offsets`].
pub(super) fn fit_heads(
    context: RunContext<'_>,
    pretrained: &Pretrained,
    datasets: &Datasets,
    features: &ExtractedFeatures,
    fitted: &FittedModel,
) -> Result<Option<ScanParams>, TrainError> {
    if datasets.scenes.train.is_empty() {
        return Ok(None);
    }
    let (known, classes) =
        (pretrained.labels.names().len(), pretrained.labels.names().len() + pretrained.unknown_classes);
    let seed = context.settings.hyperparams.seed;
    let val_scenes = scene::scenes(&datasets.val.kept, &datasets.scenes.calibration_backgrounds, seed);
    let last_conv = fitted.last_conv.as_ref();
    let mut train = pooled(context, &features.train, last_conv);
    let windows = extract_windows(context, pretrained, &datasets.scenes.train, context.settings.views, last_conv)?;
    train.values.extend(windows.values);
    train.images.extend(windows.images);
    let val = extract_windows(context, pretrained, &val_scenes, VAL_WINDOWS, last_conv)?;
    let hyperparams = Hyperparams {
        epochs: 20,
        patience: 0,
        batch: 128,
        optimizer: Optimizer::Adam,
        learning_rate: 1e-3,
        weight_decay: 0.3,
        ..context.settings.hyperparams.clone()
    };
    let mut learner = HeadLearner::new(&train, &val, classes, &hyperparams);
    training_loop::fit(&mut learner, &hyperparams, |_, _| Ok::<(), TrainError>(()))?;
    let (mut weight, mut bias) = learner.into_params();
    let (unknown_weight, unknown_bias) = (weight.split_off(known * train.width), bias.split_off(known));
    let rows: Vec<Vec<f32>> = val.rows().map(|row| row.to_vec()).collect();
    Ok(Some(ScanParams {
        head: fit_temperature(weight, bias, &rows, &val.classes())?,
        unknown: Head::new(train.width, unknown_weight, unknown_bias, 1.0)?,
        offsets: [0.0; SCALES],
    }))
}

/// Extracts the features of the first `count` windows of each scene.
fn extract_windows(
    context: RunContext<'_>,
    pretrained: &Pretrained,
    scenes: &[HashedImage],
    count: usize,
    last_conv: Option<&LastConvWeights>,
) -> Result<Features, BackboneError> {
    let views = Views { count, seed: context.settings.hyperparams.seed };
    let (mut all, size) = (Features::default(), (CHUNK_WINDOWS / count).max(1));
    for (chunk, scenes_of) in scenes.chunks(size).enumerate() {
        let (before, total) = (chunk * size, scenes.len());
        let progress = |done| (context.progress)(Progress::Features { done: before + done, total });
        let (maps, _) = extract_set(context, pretrained, scenes_of, views, Precision::Half, &progress)?;
        let features = pooled(context, &maps, last_conv);
        (all.width, all.views) = (features.width, features.views);
        all.values.extend(features.values);
        all.images.extend(features.images);
    }
    Ok(all)
}

/// Returns the feature vectors of all views, in half precision; `last_conv` is applied to feature maps.
fn pooled(context: RunContext<'_>, maps: &Features, last_conv: Option<&LastConvWeights>) -> Features {
    let values = |(): &mut (), i: usize| {
        let rows = (0..maps.views).flat_map(|view| {
            let row = maps.row(i, view);
            last_conv.map_or_else(|| row.to_vec(), |last_conv| last_conv.features(&row))
        });
        Ok::<_, Infallible>(Values::Half(rows.map(f16::from_f32).collect()))
    };
    let Ok(values) = parallel::map(maps.len(), context.options.threads, "last-conv", || Ok(()), values, &|_| {});
    let width = last_conv.map_or(maps.width, LastConvWeights::outputs);
    Features { width, views: maps.views, values, images: maps.images.clone(), skipped: Vec::new() }
}

/// Fits the offset of each scale. The threshold rejects as many frames that are made of the validation images, with a flower in the
/// sizes that the scale is for, as of the validation images themselves; more, up to [`REJECT_MAX`] times as many, if it would accept
/// more than [`FALSE_ALARMS`] of the frames without a flower. It is never below the threshold for whole images: the classes were trained
/// with the backgrounds as whole images, so that these frames pass too rarely.
pub(super) fn fit_offsets(
    context: RunContext<'_>,
    pretrained: &Pretrained,
    datasets: &Datasets,
    scan: ScanParams,
    params: &ClassifierParams,
    last_conv: Option<&LastConvWeights>,
) -> Result<ScanParams, TrainError> {
    let Some((_, sizes)) = pretrained.canvas else { return Ok(scan) };
    let backbone = pretrained.network.on(ComputeDevice::Cpu).compile_features(last_conv)?;
    let backgrounds = &datasets.scenes.calibration_backgrounds;
    let scenes = scene::scenes(&datasets.val.kept, backgrounds, context.settings.hyperparams.seed);
    let frames = CalibrationFrames { context, sizes, scenes, empty: backgrounds };
    let scanner = || Scanner::new(&backbone, params, scan.clone(), ScanBudget::DEFAULT);
    let mut offsets = [0.0; SCALES];
    for (scale, offset) in offsets.iter_mut().enumerate() {
        let known = frames.similarities(frames.scenes.len(), scale, &scanner, &|i| frames.scene(i, scale))?;
        if known.is_empty() {
            continue;
        }
        let reject = context.settings.reject;
        let [least, most] = [reject, REJECT_MAX * reject].map(|reject| threshold(&known, reject));
        let mut for_empty = most;
        for source in 0..backgrounds.len() {
            let empty = frames.similarities(EMPTY_FRAMES, scale, &scanner, &|i| frames.empty(source, i))?;
            if !empty.is_empty() {
                for_empty = for_empty.min(threshold(&empty, 1.0 - FALSE_ALARMS));
            }
        }
        *offset = (for_empty.max(least) - params.ood.threshold()).max(0.0);
    }
    Ok(ScanParams { offsets, ..scan })
}

/// The frames that the offsets are fitted on.
struct CalibrationFrames<'a> {
    context: RunContext<'a>,
    sizes: Geometry,
    scenes: Vec<HashedImage>,
    /// Images without a class, by their source.
    empty: &'a [Vec<HashedImage>],
}

impl CalibrationFrames<'_> {
    /// Returns scene `i` with a flower of a size for `scale`; `None` if an image cannot be decoded.
    fn scene(&self, i: usize, scale: usize) -> Option<RgbImage> {
        let scene = &self.scenes[i];
        let Origin::Scene { background } = &scene.origin else { return None };
        let (image, background) = (decode_file(&scene.path).ok()?, decode_file(background).ok()?);
        let share = scene::flower_share(FLOWER_SHARES[scale], &scene.content_hash);
        Some(scene::frame(&image, &background, share, &scene.content_hash, self.sizes))
    }

    /// Returns frame `i` without a flower of a source.
    fn empty(&self, source: usize, i: usize) -> Option<RgbImage> {
        let image = &self.empty[source][i % self.empty[source].len()];
        let mut rng = ChaCha8Rng::from_seed(image.content_hash);
        rng.set_stream(i as u64);
        Some(scene::empty_frame(&decode_file(&image.path).ok()?, &mut rng, self.sizes))
    }

    /// Scans frames at one scale and returns the similarities of their best windows, sorted.
    fn similarities(
        &self,
        count: usize,
        scale: usize,
        scanner: &(dyn Fn() -> Result<Scanner, BackboneError> + Sync),
        frame: &(dyn Fn(usize) -> Option<RgbImage> + Sync),
    ) -> Result<Vec<f32>, BackboneError> {
        let work = |scanner: &mut Scanner, i: usize| {
            let best = frame(i).map(|frame| scanner.best_at(scale, &frame));
            Ok::<_, BackboneError>(best.transpose()?.map(|(similarity, _)| similarity))
        };
        let progress = |done| (self.context.progress)(Progress::Scanned { done, total: count });
        let similarities = parallel::map(count, self.context.options.threads, "scan", scanner, work, &progress)?;
        let mut sorted: Vec<f32> = similarities.into_iter().flatten().collect();
        sorted.sort_by(f32::total_cmp);
        Ok(sorted)
    }
}
