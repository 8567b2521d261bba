//! Stage 3: fits the head, and the last convolution if it is fine-tuned.

use crate::train::optim::head::HeadLearner;
use crate::train::optim::last_conv::LastConvLearner;
use crate::train::optim::training_loop::{self, Epoch, ParamGroup};
use crate::train::run::extract::ExtractedFeatures;
use crate::train::run::load::Pretrained;
use crate::train::run::settings::FineTune;
use crate::train::run::write::RunWriter;
use crate::train::run::{Progress, RunContext, TrainError};
use crate::vision::LastConvWeights;

/// The parameters of the best epoch, and the metrics of all epochs.
pub(super) struct FittedModel {
    /// The fine-tuned last convolution; `None` if it is frozen.
    pub last_conv: Option<LastConvWeights>,
    /// `[classes, width]`; the unknown classes come last.
    pub head_weight: Vec<f32>,
    /// `[classes]`
    pub head_bias: Vec<f32>,
    pub history: Vec<Epoch>,
}

/// Trains on the extracted features; `writer` logs each epoch.
pub(super) fn fit(
    context: RunContext<'_>,
    pretrained: &Pretrained,
    features: &ExtractedFeatures,
    writer: &mut RunWriter,
) -> Result<FittedModel, TrainError> {
    let classes = pretrained.labels.names().len() + pretrained.unknown_classes;
    let hyperparams = &context.settings.hyperparams;
    let mut on_epoch = |epoch: &Epoch, groups: &[ParamGroup]| {
        (context.progress)(Progress::Epoch { epoch: *epoch, total: hyperparams.epochs });
        writer.epoch(epoch, groups)
    };
    match context.settings.fine_tune {
        FineTune::None => {
            let mut learner = HeadLearner::new(&features.train, &features.val, classes, hyperparams);
            let history = expect_finite(training_loop::fit(&mut learner, hyperparams, &mut on_epoch)?)?;
            let (head_weight, head_bias) = learner.into_params();
            Ok(FittedModel { last_conv: None, head_weight, head_bias, history })
        }
        FineTune::LastConv => {
            let weights = &pretrained.network.last_conv()?.weights;
            let threads = context.options.threads;
            let mut learner =
                LastConvLearner::new(&features.train, &features.val, weights, classes, hyperparams, threads);
            let history = expect_finite(training_loop::fit(&mut learner, hyperparams, &mut on_epoch)?)?;
            let (last_conv, head_weight, head_bias) = learner.params()?;
            Ok(FittedModel { last_conv: Some(last_conv), head_weight, head_bias, history })
        }
    }
}

/// Fails if the training ended because the validation loss was not finite.
fn expect_finite(history: Vec<Epoch>) -> Result<Vec<Epoch>, TrainError> {
    match history.last() {
        Some(last) if !last.val.loss.is_finite() => Err(TrainError::NonFiniteLoss(last.epoch)),
        _ => Ok(history),
    }
}
