//! From pixels to a named flower. The only place that turns pixels into numbers: the daemon and the
//! trainer call the same functions, so that what is trained is what runs.

pub mod backbone;
pub mod classifier;
pub mod clock;
pub mod decode;
pub mod frame_diff;
pub mod head;
pub mod kernels;
pub mod labels;
pub mod last_conv;
pub mod ood;
pub mod preprocess;
pub mod test_pattern;

pub use backbone::{Backbone, BackboneError, Network};
pub use classifier::{Classifier, Prediction, Stages};
pub use frame_diff::FrameDiff;
pub use head::Head;
pub use labels::{Labels, UNKNOWN};
pub use last_conv::LastConvWeights;
pub use ood::OodDetector;
pub use preprocess::{Preprocess, Preprocessor};
