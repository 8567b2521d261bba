//! Stage 4: calibrates the fitted model on the validation set, and evaluates it on the validation and test sets.

use std::convert::Infallible;
use std::mem::take;
use std::time::Duration;

use crate::bundle::DatasetRef;
use crate::train::data::augment::Views;
use crate::train::data::dataset::fingerprint;
use crate::train::data::image_set::{HashedImage, ImageSet, Origin};
use crate::train::evaluate::{EvaluatedSet, KindAcceptance};
use crate::train::features::{Features, Precision};
use crate::train::optim::{ood, temperature};
use crate::train::parallel;
use crate::train::run::extract::{ExtractedFeatures, extract_set};
use crate::train::run::fit::FittedModel;
use crate::train::run::load::{Datasets, Pretrained};
use crate::train::run::outcome::{Parameters, Trained};
use crate::train::run::scan;
use crate::train::run::settings::FineTune;
use crate::train::run::{Progress, RunContext, TrainError};
use crate::vision::classifier::ClassifierParams;
use crate::vision::head::{argmax, linear};
use crate::vision::ood::OodError;
use crate::vision::{Head, Labels, LastConvWeights, OnnxBackbone, OodDetector, Prediction, ScanParams, UnknownClasses};

/// Directions of the OOD detector's subspace. With fewer, it accepts more out-of-distribution images; more only enlarge the
/// bundle.
const RANK: usize = 128;

/// Weight of the log-odds of the unknown classes in the similarity. Measured with images of thirteen other species, seven of them in
/// the training: a larger weight rejects more of them, and more images of the classes that another collection has.
const LOG_ODDS_WEIGHT: f32 = 0.04;

/// Fits the temperature and the threshold of the OOD detector on the validation set, and evaluates the result on it.
pub(super) fn calibrate(
    context: RunContext<'_>,
    pretrained: &Pretrained,
    datasets: &Datasets,
    features: ExtractedFeatures,
    fitted: FittedModel,
    scan: Option<ScanParams>,
) -> Result<Trained, TrainError> {
    let FittedModel { last_conv, mut head_weight, mut head_bias, history } = fitted;
    let ExtractedFeatures { mut train, val, val_unknown, skipped } = features;
    let known = pretrained.labels.names().len();
    let unknown_bias = head_bias.split_off(known);
    let unknown_weight = head_weight.split_off(head_weight.len() / (known + unknown_bias.len()) * known);
    let unknown = Head::new(unknown_weight.len() / unknown_bias.len(), unknown_weight, unknown_bias, 1.0)?;
    let unknown_images = train.truncate(train.classes().iter().filter(|class| **class < known).count());
    let train_rows = final_features(context, &train, last_conv.as_ref());
    let val_rows = final_features(context, &val, last_conv.as_ref());
    let val_classes = val.classes();
    let val_unknown_rows = final_features(context, &val_unknown, last_conv.as_ref());
    let head = fit_temperature(head_weight, head_bias, &val_rows, &val_classes)?;
    let ood = fit_ood_detector(context, &head, unknown, &train_rows, &val_rows)?;
    let (labels, preprocess) = (pretrained.labels.clone(), context.settings.preprocess());
    let params = ClassifierParams { labels, head, ood, preprocess };
    let val = evaluate(&params, &val_rows, val.images);
    let accepted = |i: usize| params.predict(&val_unknown_rows[i]).known;
    let unknown_kinds = KindAcceptance::count(&datasets.unknown_kinds, &val_unknown.classes(), accepted);
    let self_test_features = choose_self_test_features(&val_rows, &val.predictions, &val_classes);
    let rejected_cross_fitted = cross_fitted_rejection(&val, context.settings.reject);
    let scan = scan.map(|scan| scan::fit_offsets(context, pretrained, datasets, scan, &params, last_conv.as_ref()));
    let scan = scan.transpose()?;
    let ClassifierParams { labels, head, ood, .. } = params;
    Ok(Trained {
        scan,
        parameters: count_parameters(context.settings.fine_tune, &pretrained.network, &head),
        dataset: describe_dataset(&labels, &train.images, &unknown_images, &val.images),
        train_images: images_per_class(&labels, &train.classes()),
        labels,
        unknown_kinds,
        rejected_cross_fitted,
        val,
        test: None,
        history,
        head,
        ood,
        last_conv,
        self_test_features,
        skipped,
        elapsed: Duration::ZERO,
    })
}

/// Reads and hashes the test images, extracts their features and evaluates the model on them, if there is a test set. Images
/// that are also in the training or validation set are skipped; images of none of the classes are not evaluated.
pub(super) fn evaluate_test_set(
    context: RunContext<'_>,
    pretrained: &Pretrained,
    datasets: &Datasets,
    trained: &mut Trained,
) -> Result<(), TrainError> {
    let (Some(dataset), Some(path)) = (&datasets.test, &context.settings.test) else { return Ok(()) };
    let known = trained.labels.names().len();
    let used = [&datasets.train.kept[..], &datasets.val.kept].concat();
    let used = ImageSet { kept: used, skipped: Vec::new() };
    let mut images = ImageSet::read(dataset, context.options.threads, &|_| {});
    images.take(|image| image.class >= known);
    let images = images.separate(used, known).0;
    let total = images.kept.len();
    let progress = |done| (context.progress)(Progress::Features { done, total });
    let (mut features, _) = extract_set(context, pretrained, &images.kept, Views::ONE, Precision::Single, &progress)?;
    let skipped = [images.skipped, take(&mut features.skipped)].concat();
    context.expect_all_classes(&pretrained.labels, &features.images, path, "testing", &skipped)?;
    trained.skipped.extend(skipped);
    let rows = final_features(context, &features, trained.last_conv.as_ref());
    let params = ClassifierParams {
        labels: trained.labels.clone(),
        head: trained.head.clone(),
        ood: trained.ood.clone(),
        preprocess: context.settings.preprocess(),
    };
    trained.test = Some(evaluate(&params, &rows, features.images));
    Ok(())
}

/// Returns the feature vector of each original image: `[width]` each. `last_conv` is applied to feature maps.
fn final_features(context: RunContext<'_>, features: &Features, last_conv: Option<&LastConvWeights>) -> Vec<Vec<f32>> {
    let row = |(): &mut (), i: usize| {
        let row = features.row(i, 0);
        Ok::<_, Infallible>(last_conv.map_or_else(|| row.to_vec(), |last_conv| last_conv.features(&row)))
    };
    let Ok(rows) = parallel::map(features.len(), context.options.threads, "last-conv", || Ok(()), row, &|_| {});
    rows
}

/// Returns the head with the temperature that minimizes the validation loss.
pub(super) fn fit_temperature(
    weight: Vec<f32>,
    bias: Vec<f32>,
    val: &[Vec<f32>],
    val_classes: &[usize],
) -> Result<Head, TrainError> {
    let width = val.first().map_or(0, Vec::len);
    let logits: Vec<Vec<f32>> = val.iter().map(|row| linear(&weight, &bias, row)).collect();
    Ok(Head::new(width, weight, bias, temperature::fit(&logits, val_classes))?)
}

/// Returns the OOD detector with the subspace of the training set, and the threshold that rejects the fraction
/// [`Settings::reject`](crate::train::Settings::reject) of the validation set.
fn fit_ood_detector(
    context: RunContext<'_>,
    head: &Head,
    unknown: Head,
    train: &[Vec<f32>],
    val: &[Vec<f32>],
) -> Result<OodDetector, OodError> {
    let width = train.first().map_or(0, Vec::len);
    // A subspace of nearly all dimensions contains nearly every feature vector.
    let rank = RANK.min(width / 2).max(1);
    let rows = train.iter().map(Vec::as_slice);
    let basis = ood::principal_directions(rows, width, rank, context.settings.hyperparams.seed);
    let subspace = OodDetector::new(width, basis, 0.0)?;
    let threshold_of = |similarity: &dyn Fn(&[f32]) -> f32| {
        let mut similarities: Vec<f32> = val.iter().map(|row| similarity(row)).collect();
        similarities.sort_by(f32::total_cmp);
        threshold(&similarities, context.settings.reject)
    };
    let cosine_threshold = threshold_of(&|row| subspace.cosine(row)).max(0.0);
    let unknown = UnknownClasses { head: unknown, log_odds_weight: LOG_ODDS_WEIGHT, cosine_threshold };
    let detector = subspace.with_unknown_classes(unknown, 0.0)?;
    let similarity_threshold = threshold_of(&|row| detector.similarity(row, &head.logits(row)));
    detector.with_threshold(similarity_threshold)
}

/// Returns a threshold that rejects the fraction `reject` (0–1) of `similarities` (sorted, at least one). It is the midpoint
/// between the last rejected and the first accepted one, so that rounding on another machine changes neither.
pub(super) fn threshold(similarities: &[f32], reject: f32) -> f32 {
    let rejected = ((reject * similarities.len() as f32) as usize).min(similarities.len() - 1);
    let first_accepted = similarities[rejected];
    let last_rejected = rejected.checked_sub(1).map_or(first_accepted - 0.02, |last| similarities[last]);
    f32::midpoint(last_rejected, first_accepted)
}

/// Returns the fraction of the validation images that are rejected by the thresholds of the other half each: an estimate for images
/// that the threshold was not fitted on.
fn cross_fitted_rejection(val: &EvaluatedSet, reject: f32) -> f64 {
    let half = |of: u8| {
        let images = val.images.iter().zip(&val.predictions);
        let images = images.filter(move |(image, _)| image.content_hash[30] & 1 == of);
        let mut similarities: Vec<f32> = images.map(|(_, prediction)| prediction.similarity).collect();
        similarities.sort_by(f32::total_cmp);
        similarities
    };
    let halves = [half(0), half(1)];
    if halves.iter().any(Vec::is_empty) {
        return val.evaluation.unknown;
    }
    let below = |threshold: f32, of: &[f32]| of.iter().filter(|similarity| **similarity < threshold).count();
    let rejected = below(threshold(&halves[0], reject), &halves[1]) + below(threshold(&halves[1], reject), &halves[0]);
    rejected as f64 / val.images.len() as f64
}

/// Returns `images` with the predictions for their feature vectors `rows` (`[width]` each, in the same order), and the metrics.
fn evaluate(params: &ClassifierParams, rows: &[Vec<f32>], images: Vec<HashedImage>) -> EvaluatedSet {
    let predictions = rows.iter().map(|row| params.predict(row)).collect();
    EvaluatedSet::new(&params.labels, images, predictions)
}

/// Returns, for each class, the features of the correct image with the lowest confidence, which is the most sensitive to
/// a change of the model: `[width]` each, at least one.
fn choose_self_test_features(features: &[Vec<f32>], predictions: &[Prediction], classes: &[usize]) -> Vec<Vec<f32>> {
    let of_class = |class: usize| {
        let correct = |i: &usize| classes[*i] == class && argmax(&predictions[*i].probabilities) == class;
        let confidence = |i: &usize| predictions[*i].probabilities[class];
        (0..features.len()).filter(correct).min_by(|a, b| confidence(a).total_cmp(&confidence(b)))
    };
    let count = predictions.first().map_or(0, |prediction| prediction.probabilities.len());
    let chosen: Vec<usize> = (0..count).filter_map(of_class).collect();
    // A model without a correct prediction still needs a self-test.
    let chosen = if chosen.is_empty() { vec![0] } else { chosen };
    chosen.into_iter().map(|i| features[i].clone()).collect()
}

/// Returns the fingerprint of the training and validation sets, and their sizes without images of none of the classes (`unknown`), whose
/// files are part of the fingerprint.
fn describe_dataset(
    labels: &Labels,
    train: &[HashedImage],
    unknown: &[HashedImage],
    val: &[HashedImage],
) -> DatasetRef {
    let unknown = unknown.iter().filter(|image| image.origin == Origin::File);
    let contents = train.iter().chain(unknown).chain(val).map(|image| (image.class, &image.content_hash));
    DatasetRef { sha256: fingerprint(labels, contents), train_images: train.len(), val_images: val.len() }
}

/// Returns the number of images of each class; `classes` is the class of each image.
fn images_per_class(labels: &Labels, classes: &[usize]) -> Vec<usize> {
    let count = |class| classes.iter().filter(|other| **other == class).count();
    (0..labels.names().len()).map(count).collect()
}

fn count_parameters(fine_tune: FineTune, network: &OnnxBackbone, head: &Head) -> Parameters {
    let head = head.weight().len() + head.bias().len();
    let last_conv = match (fine_tune, &network.info().last_conv) {
        // The batch normalization has a gain and a shift per channel.
        (FineTune::LastConv, Some(conv)) => conv.weights.weight().len() + 2 * conv.weights.outputs(),
        _ => 0,
    };
    Parameters { total: network.info().parameters + head, trained: last_conv + head }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threshold_is_the_midpoint_of_two_similarities() {
        let sorted = [0.5, 0.75, 0.8, 0.9];
        assert_eq!(threshold(&sorted, 0.25), 0.625);
        assert_eq!(threshold(&sorted, 0.5), 0.775);
        assert!((0.48..0.5).contains(&threshold(&sorted, 0.0)) && (0.8..0.9).contains(&threshold(&sorted, 1.0)));
    }
}
