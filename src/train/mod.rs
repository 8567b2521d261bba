//! Teaching: from a folder of photographs to a bundle.

pub mod calibrate;
pub mod dataset;
pub mod evaluate;
pub mod features;
pub mod inspect;
pub mod pool;
pub mod session;
pub mod sgd;
pub mod subspace;

pub use session::{TrainError, Training, Val, train};
