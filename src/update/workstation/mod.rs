//! The workstation's side of an update.

pub mod delivery;
pub mod preflight;
pub mod push;
pub mod rollback;
