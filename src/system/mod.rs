//! The process and the machine it runs on: hashes, the user's folders, memory, counters, heartbeats, systemd.

pub mod counters;
pub mod hash;
pub mod heartbeat;
pub mod memory;
pub mod paths;
pub mod systemd;

pub use counters::Counters;
pub use heartbeat::Heartbeat;
