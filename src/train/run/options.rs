//! The options of a run that do not select what is trained.

use std::path::PathBuf;
use std::time::SystemTime;

use crate::train::features::compute_device::ComputeDeviceChoice;

/// The options of a run besides its [`Settings`](crate::train::Settings). The device may change the last digits of the
/// trained parameters; `created_at` is written into the bundle.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// Output folder of the run.
    pub out: PathBuf,
    /// Whether a finished run in `out` is replaced.
    pub overwrite: bool,
    /// Root folder of the feature cache; `None` disables caching.
    pub cache: Option<PathBuf>,
    /// Number of threads, at least 1.
    pub threads: usize,
    /// The device that extracts the features.
    pub device: ComputeDeviceChoice,
    /// Creation time of the bundle; the model version is derived from it.
    pub created_at: SystemTime,
}
