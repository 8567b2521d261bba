//! Whole-program tests: the real binary as a process, real brokers, real signals.
//!
//! Most tests use drawn flowers and a model that is trained on them within the run. Those in `photographs.rs` and `foreign.rs` need
//! `../shared/flowers/val`, some in `backbones.rs` other networks in `target/backbones`. A test whose files are missing prints a
//! line that begins with `skipped:`.

mod backbones;
mod broker;
mod daemon;
mod fetching;
mod files;
mod fleet;
mod foreign;
mod http;
mod kernels;
mod mqtt;
mod photographs;
mod tools;
mod training;
mod workstation;
