//! Whole-program tests: the real binary as a process, real brokers, real photographs, real signals.
//!
//! The photographs are in `../shared/flowers/val`, other networks in `target/backbones`. A test whose files are missing
//! prints a line that begins with `skipped:`.

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
mod tools;
mod training;
mod workstation;
