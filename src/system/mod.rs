//! The process and the machine it runs on: hashes, the user's folders, memory, counters, clocks, heartbeats,
//! limited log lines, systemd.

pub mod clock;
pub mod counters;
pub mod hash;
pub mod heartbeat;
pub mod log_limiter;
pub mod memory;
pub mod paths;
pub mod systemd;

pub use counters::Counters;
pub use heartbeat::Heartbeat;
pub use log_limiter::LogLimiter;
