//! The workstation's side of an update: pushes models to devices and requests rollbacks.

pub mod delivery;
pub mod preflight;
pub mod push;
pub mod rollback;
