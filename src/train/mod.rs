//! Training: from a folder of images to a model bundle.
//!
//! [`train`] runs these stages, each on the result of the one before:
//!
//! ```text
//! Settings, RunOptions
//!   │ load       datasets (hashed, duplicates skipped, split), labels, network, backbone
//!   │ extract    Features of the training and validation sets, from the backbone or the cache
//!   │ fit        head, and with `fine_tune` the last convolution; metrics of each epoch
//!   │ scan       head for the windows of scanned frames, if there are scenes
//!   │ calibrate  temperature, threshold of the OOD detector, evaluation on validation and test sets
//!   ▼ write      config.toml first, then TensorBoard events and checkpoints, metrics.json, report.html, model.bloom last
//! Trained
//! ```
//!
//! - [`data`]: dataset folders, duplicates, augmentation, dataset checks.
//! - [`features`]: feature extraction and its cache.
//! - [`optim`]: the learners, the optimizer, temperature scaling, the subspace of the OOD detector.
//! - [`run`]: settings, options and the stages.
//! - [`evaluate`] and [`compare`]: metrics of a model, and of finished runs side by side.
//! - [`report`]: the HTML report and the images for TensorBoard.

pub mod compare;
pub mod data;
pub mod evaluate;
pub mod features;
pub mod optim;
pub mod parallel;
pub mod report;
pub mod run;

pub use run::options::RunOptions;
pub use run::outcome::Trained;
pub use run::settings::{Recipe, Settings};
pub use run::{Progress, TrainError, train};
