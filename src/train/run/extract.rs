//! Stage 2: extracts the features of the training and validation sets.

use std::io;
use std::mem::take;

use crate::system::memory;
use crate::train::data::augment::Views;
use crate::train::data::dataset::DatasetProblem;
use crate::train::data::image_set::HashedImage;
use crate::train::features::{CanvasNetwork, Extractor, Features, Precision};
use crate::train::run::load::{Datasets, Pretrained};
use crate::train::run::settings::FineTune;
use crate::train::run::{Progress, RunContext, TrainError};
use crate::vision::BackboneError;

/// The output of the frozen layers for both sets: feature vectors, or the feature maps before the last convolution.
pub(super) struct ExtractedFeatures {
    pub train: Features,
    pub val: Features,
    /// Of the validation images of none of the classes; the class of an image is its kind.
    pub val_unknown: Features,
    /// All image files that are not used so far.
    pub skipped: Vec<DatasetProblem>,
}

/// Extracts the features of both sets, with augmented views of the training set, and checks that every class still has
/// images. Fails early if the features do not fit into memory.
pub(super) fn extract(
    context: RunContext<'_>,
    pretrained: &Pretrained,
    datasets: &Datasets,
) -> Result<ExtractedFeatures, TrainError> {
    let (settings, labels) = (context.settings, &pretrained.labels);
    let Datasets { train, val, val_unknown, .. } = datasets;
    let views = Views { count: settings.views, seed: settings.hyperparams.seed };
    let precision = match settings.fine_tune {
        FineTune::None => Precision::Single,
        FineTune::LastConv => Precision::Half,
    };
    let bytes = train.kept.len() * views.count * precision.bytes()
        + (val.kept.len() + val_unknown.len()) * Precision::Single.bytes();
    // The windows of scenes are kept as feature vectors.
    let last_conv = pretrained.network.info().last_conv.as_ref();
    let window_bytes = last_conv.map_or(0, |conv| conv.weights.outputs() * Precision::Half.bytes());
    let scene_bytes = datasets.scenes.train.len() * views.count * window_bytes;
    expect_memory((bytes * pretrained.backbone.width() + scene_bytes) as u64)?;
    let total = train.kept.len() + val.kept.len() + val_unknown.len();
    let progress =
        |before: usize| move |done: usize| (context.progress)(Progress::Features { done: before + done, total });
    let (mut train_features, cache_error) =
        extract_set(context, pretrained, &train.kept, views, precision, &progress(0))?;
    let (mut val_features, val_cache_error) =
        extract_set(context, pretrained, &val.kept, Views::ONE, Precision::Single, &progress(train.kept.len()))?;
    let before = train.kept.len() + val.kept.len();
    let (mut val_unknown, unknown_cache_error) =
        extract_set(context, pretrained, val_unknown, Views::ONE, Precision::Single, &progress(before))?;
    let skipped = [
        train.skipped.clone(),
        take(&mut train_features.skipped),
        val.skipped.clone(),
        take(&mut val_features.skipped),
        take(&mut val_unknown.skipped),
    ]
    .concat();
    context.expect_all_classes(labels, &train_features.images, &settings.dataset, "training", &skipped)?;
    context.expect_all_classes(labels, &val_features.images, context.val_path(), "validation", &skipped)?;
    if let Some(error) = cache_error.or(val_cache_error).or(unknown_cache_error) {
        (context.progress)(Progress::Warning(format!("features are not cached: {error}")));
    }
    Ok(ExtractedFeatures { train: train_features, val: val_features, val_unknown, skipped })
}

/// Fails if fewer than `bytes` of memory are available.
fn expect_memory(bytes: u64) -> Result<(), TrainError> {
    match memory::available() {
        Some(available) if bytes > available => {
            Err(TrainError::InsufficientMemory { needed: bytes >> 20, available: available >> 20 })
        }
        _ => Ok(()),
    }
}

/// Extracts the features of `images`. The second value is the first error of the cache, if any.
pub(super) fn extract_set(
    context: RunContext<'_>,
    pretrained: &Pretrained,
    images: &[HashedImage],
    views: Views,
    precision: Precision,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<(Features, Option<io::Error>), BackboneError> {
    let map_channels = match context.settings.fine_tune {
        FineTune::None => None,
        FineTune::LastConv => Some(pretrained.network.last_conv()?.weights.inputs()),
    };
    let last_conv = match context.settings.fine_tune {
        FineTune::None if pretrained.canvas.is_some() => Some(&pretrained.network.last_conv()?.weights),
        _ => None,
    };
    let canvas = pretrained.canvas.clone().map(|(backbone, sizes)| CanvasNetwork { backbone, sizes, last_conv });
    let extractor = Extractor {
        network: &pretrained.network,
        backbone: &pretrained.backbone,
        map_channels,
        preprocess: &context.settings.preprocess(),
        precision,
        views,
        cache: context.options.cache.as_deref(),
        canvas,
        threads: context.options.threads,
    };
    extractor.run(images, progress)
}
