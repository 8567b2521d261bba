//! Training: from a folder of photographs to a bundle.

pub mod compare;
pub mod data;
pub mod evaluate;
pub mod features;
pub mod optim;
pub mod report;
pub mod run;

pub use run::outcome::Trained;
pub use run::settings::{Recipe, Settings};
pub use run::{TrainError, train};
