//! The vision pipeline: decoding, preprocessing, the backbone network, the head and out-of-distribution detection.
//!
//! The daemon and the trainer call the same functions, so that a model runs on the same values as it was trained on.
//!
//! In the documentation of a function, `in: …` is the shape of the slice that it reads, and `out: …` the shape of the slice that it
//! writes or returns. `[positions, width]` is row-major: the values of the first position come first.

pub mod backbone;
pub mod class_activation_map;
pub mod classifier;
pub mod decode;
pub mod frame_diff;
pub mod head;
pub mod jpeg;
pub mod labels;
pub mod last_conv;
pub mod ood;
pub mod preprocess;
pub mod quality;
pub mod scan;
pub mod test_pattern;
pub mod transform;

pub use backbone::{BackboneError, CompiledBackbone, OnnxBackbone};
pub use classifier::{Classifier, FrameFilter, FrameResult, Prediction, StageTimes};
pub use frame_diff::FrameDiff;
pub use head::Head;
pub use labels::{Labels, UNKNOWN};
pub use last_conv::LastConvWeights;
pub use ood::{OodDetector, UnknownClasses};
pub use preprocess::{Preprocess, Preprocessor};
pub use quality::Quality;
pub use scan::{Detection, ScanBudget, ScanParams, View};
pub use transform::{Region, Transform};
