//! New models on devices: the workstation offers one and sends it in pieces, the device lets it prove itself,
//! lets it decide on trial, and answers.
//!
//! ```text
//! workstation                          device
//! gate ── offer ─────────────────────▶ receive: version, busy?
//! delivery ── chunks ────────────────▶ transfer
//!          ◀───────────── progress ──
//!                                      signature, proof (self-test, speed, memory), store, swap
//!          ◀─── accepted | refused ──
//!                                      trial: errors, panics, speed
//!          ◀ confirmed | rolled-back ─
//! ```
//!
//! Nothing that comes over MQTT is believed that no trusted key has signed: neither a model nor an order to
//! take one back or to go to an older one.

pub mod device;
pub mod protocol;
pub mod transfer;
pub mod workstation;
