//! Whole-program tests: the real binary as a process, real brokers, real photographs, real signals.
//!
//! Photographs are looked for in `../shared/flowers/val`; where they are not, a test that needs them
//! says so on a line of its own that begins with `skipped:`.

mod broker;
mod daemon;
mod files;
mod mqtt;
mod tools;
mod workstation;
