//! Teaching: from a folder of photographs to a bundle.

pub mod augment;
pub mod cache;
pub mod calibrate;
pub mod compare;
pub mod dataset;
pub mod device;
pub mod evaluate;
pub mod features;
pub mod head;
pub mod inspect;
pub mod photographs;
mod picture;
pub mod pool;
pub mod record;
pub mod report;
pub mod run;
pub mod session;
pub mod settings;
pub mod sgd;
pub mod subspace;
pub mod tail;
pub mod tensorboard;

pub use run::Trained;
pub use session::{TrainError, train};
pub use settings::{Recipe, Settings};
