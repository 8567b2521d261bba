//! Whole-program tests: the real binary as a process, real brokers, real signals.
//!
//! Most tests use drawn flowers and a model that is trained on them within the run. Those in `photographs.rs` need
//! `../shared/flowers/val`; without it, each prints a line that begins with `skipped:`. Tests that need other tools are ignored;
//! the reason of each names the make target that runs it.

mod backbones;
mod broker;
mod daemon;
mod examples;
mod fetching;
mod files;
mod fleet;
mod foreign;
mod http;
mod kernels;
mod mqtt;
mod photographs;
mod retained;
mod tensorboard;
mod tools;
mod training;
mod workstation;
