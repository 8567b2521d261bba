//! Whole-program tests: the real binary as a process, real brokers, real photographs, real signals.
//!
//! Photographs are looked for in `../shared/flowers/val`, other networks in `target/backbones`; where they are not, a test
//! that needs them says so on a line of its own that begins with `skipped:`.

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
