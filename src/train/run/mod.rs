//! A training run as a sequence of stages, one module each: load, extract, fit, calibrate, write.

mod calibrate;
mod extract;
mod fit;
mod load;
pub mod options;
pub mod outcome;
mod scan;
pub mod settings;
pub mod write;

use std::path::PathBuf;
use std::time::Instant;

use crate::train::data::dataset::DatasetError;
use crate::train::optim::training_loop::Epoch;
use crate::train::run::options::RunOptions;
use crate::train::run::outcome::Trained;
use crate::train::run::settings::{Settings, SettingsError};
use crate::train::run::write::{RunWriter, RunWriterError};
use crate::vision::BackboneError;
use crate::vision::head::HeadError;
use crate::vision::last_conv::LastConvError;
use crate::vision::ood::OodError;

/// The progress of a run, passed to the callback of [`train`].
#[derive(Debug, Clone)]
pub enum Progress {
    /// A message for the user; the run continues.
    Warning(String),
    /// Image files of a dataset that are read and hashed.
    Read {
        /// Number of files read so far.
        done: usize,
        /// Number of files of the dataset.
        total: usize,
    },
    /// Images that are decoded and compared with each other.
    Compared {
        /// Number of images decoded so far.
        done: usize,
        /// Number of images.
        total: usize,
    },
    /// Images whose features are extracted.
    Features {
        /// Number of images finished so far.
        done: usize,
        /// Number of images.
        total: usize,
    },
    /// Frames that are made of the validation images and scanned.
    Scanned {
        /// Number of frames scanned so far.
        done: usize,
        /// Number of frames.
        total: usize,
    },
    /// An epoch that ended, of at most `total`.
    Epoch {
        /// Metrics of the epoch.
        epoch: Epoch,
        /// Largest number of epochs.
        total: usize,
    },
}

/// Error of a run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A value of the settings is out of range.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A dataset cannot be read, or its classes differ from those of the training set.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// The network cannot be loaded or run.
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    /// A class has no usable image in a dataset after duplicates and unreadable images are skipped.
    #[error("{path}: no image of the class {class} is left for {purpose}{hint}")]
    NoImagesLeft {
        /// Path of the dataset.
        path: PathBuf,
        /// Name of the class.
        class: String,
        /// `training`, `validation` or `testing`.
        purpose: &'static str,
        /// A skipped file with the reason, or a suggestion; starts with `; ` unless it is empty.
        hint: String,
    },
    /// The network is to be embedded, but is too large for a bundle.
    #[error("{name}: {bytes} bytes, too large for a bundle")]
    TooLargeToEmbed {
        /// Name of the network.
        name: String,
        /// Size of the ONNX file, in bytes.
        bytes: usize,
    },
    /// The features of the training and validation sets do not fit into memory.
    #[error("the features need {needed} MiB of memory, {available} MiB are available; reduce the views (--augment)")]
    InsufficientMemory {
        /// Size of the features, in MiB.
        needed: u64,
        /// Available memory, in MiB.
        available: u64,
    },
    /// The validation loss is infinite or NaN; the epoch, from 1.
    #[error("the validation loss is not finite in epoch {0}; try a smaller learning rate")]
    NonFiniteLoss(usize),
    /// The trained head is invalid, for example because a weight is not finite.
    #[error("training produced an invalid head: {0}; try a smaller learning rate")]
    InvalidHead(#[from] HeadError),
    /// The fine-tuned last convolution is invalid, for example because a weight is not finite.
    #[error("training produced an invalid last convolution: {0}; try a smaller learning rate")]
    InvalidLastConv(#[from] LastConvError),
    /// The fitted OOD detector is invalid.
    #[error("training produced an invalid OOD detector: {0}")]
    InvalidOodDetector(#[from] OodError),
    /// The output folder cannot be used or written.
    #[error(transparent)]
    RunWriter(#[from] RunWriterError),
}

/// The inputs that every stage reads.
#[derive(Clone, Copy)]
struct RunContext<'a> {
    settings: &'a Settings,
    options: &'a RunOptions,
    progress: &'a (dyn Fn(Progress) + Sync),
}

/// Trains a model, evaluates it and writes the run to [`RunOptions::out`], the bundle last. `progress` is called from
/// several threads.
///
/// # Errors
/// Settings, output folder, datasets and network are checked before anything is written or removed. Later, the run fails if
/// the network fails, if the training diverges, or if a file cannot be written; then the output folder has no bundle.
///
/// # Panics
/// Panics if a thread cannot be started.
///
/// # Examples
/// ```
/// use std::time::SystemTime;
///
/// use bloomcast::bundle::Bundle;
/// use bloomcast::train::features::compute_device::ComputeDeviceChoice;
/// use bloomcast::train::{Recipe, RunOptions, train};
/// use image::{Rgb, RgbImage};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // Two classes of six striped images each, in two colors.
/// let dir = tempfile::tempdir()?;
/// for (class, color) in [("daisy", [250, 250, 240]), ("roses", [200, 20, 40])] {
///     let folder = dir.path().join("flowers").join(class);
///     std::fs::create_dir_all(&folder)?;
///     for i in 0..6 {
///         let stripes = |x: u32, y: u32| if (x + y + 5 * i) % 16 < 8 { Rgb(color) } else { Rgb([30, 90, 30]) };
///         RgbImage::from_fn(64, 64, stripes).save(folder.join(format!("{i}.jpg")))?;
///     }
/// }
/// let settings = Recipe::Frozen.settings(dir.path().join("flowers"));
/// let options = RunOptions {
///     out: dir.path().join("run"),
///     overwrite: false,
///     cache: None,
///     threads: 1,
///     device: ComputeDeviceChoice::Cpu,
///     created_at: SystemTime::UNIX_EPOCH,
/// };
/// let trained = train(&settings, &options, &|_| {})?;
/// assert_eq!(trained.dataset.train_images + trained.dataset.val_images, 12);
/// assert_eq!(trained.val.evaluation.accuracy, 1.0);
///
/// let bundle = Bundle::read(&options.out.join("model.bloom"))?;
/// assert_eq!(bundle.manifest().classes.names(), ["daisy", "roses"]);
/// # Ok(())
/// # }
/// ```
pub fn train(
    settings: &Settings,
    options: &RunOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Trained, TrainError> {
    let started = Instant::now();
    settings.check()?;
    RunWriter::check(&options.out, options.overwrite)?;
    let context = RunContext { settings, options, progress };
    let (pretrained, datasets) = load::load(context)?;
    let mut writer = RunWriter::begin(settings, options)?;
    let features = extract::extract(context, &pretrained, &datasets)?;
    let fitted = fit::fit(context, &pretrained, &features, &mut writer)?;
    let scan = scan::fit_heads(context, &pretrained, &datasets, &features, &fitted)?;
    let mut trained = calibrate::calibrate(context, &pretrained, &datasets, features, fitted, scan)?;
    calibrate::evaluate_test_set(context, &pretrained, &datasets, &mut trained)?;
    trained.elapsed = started.elapsed();
    writer.finish(&pretrained.network, &trained)?;
    Ok(trained)
}
