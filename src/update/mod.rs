//! Model updates: the workstation offers a model and sends it in chunks; the device validates it, activates it on trial,
//! and answers.
//!
//! ```text
//! workstation                             device
//! preflight ── offer ───────────────────▶ agent: version, no other transfer
//! delivery ─── chunks ──────────────────▶ transfer
//!           ◀─────────────── progress ──
//!                                         admission (signature, memory, self-test, processor time), store, swap
//!           ◀───── accepted | refused ──
//!                                         trial: errors, panics, processor time
//!           ◀─ confirmed | rolled-back ──
//! ```
//!
//! The device accepts a model, and a command to roll back or to install an older model, only if a trusted key signed it.

pub mod device;
pub mod protocol;
pub mod transfer;
pub mod workstation;
