//! Labeled images: dataset folders, content hashes, augmented views, and checks of a dataset.

pub mod augment;
pub mod conditions;
pub mod dataset;
pub mod generated;
pub mod image_set;
pub mod inspect;
pub mod scene;
pub mod similarity;
