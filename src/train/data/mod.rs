//! Labelled photographs: folders, contents, augmented views, and what is wrong with a dataset.

pub mod augment;
pub mod dataset;
pub mod inspect;
pub mod photographs;
