//! From pixels to a named flower. The only place that turns pixels into numbers: the daemon and the
//! trainer call the same functions, so that what is trained is what runs.

pub mod backbone;
pub mod classifier;
pub mod clock;
pub mod decode;
pub mod drawn;
pub mod head;
pub mod kernels;
pub mod labels;
pub mod preprocess;
pub mod still;
pub mod subspace;
pub mod tail;

pub use backbone::{Backbone, BackboneError, Network};
pub use classifier::{Classifier, Prediction, Stages};
pub use head::Head;
pub use labels::{Labels, UNKNOWN};
pub use preprocess::{Preprocess, Preprocessor};
pub use still::Still;
pub use subspace::Subspace;
pub use tail::Tail;
