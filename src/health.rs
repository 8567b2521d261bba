//! How the daemon fares: what it counts, for its log and for whoever asks, and what memory is left.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that several threads raise.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counted since the start of the daemon.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames the camera gave.
    pub captured: Counter,
    /// Frames that a newer one overwrote before anybody looked.
    pub dropped: Counter,
    /// Frames that could not be read or decoded.
    pub broken: Counter,
    /// Frames that were classified.
    pub classified: Counter,
    /// Times the camera failed and was opened again.
    pub camera_failures: Counter,
    /// Events that were decided.
    pub events: Counter,
    /// Events that the broker acknowledged.
    pub acknowledged: Counter,
    /// Events that a full outbox had to give up, oldest first.
    pub events_lost: Counter,
    /// Connections to the broker that were made.
    pub connections: Counter,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "captured={} dropped={} broken={} classified={} camera_failures={} events={} acknowledged={} events_lost={} connections={}",
            self.captured.get(),
            self.dropped.get(),
            self.broken.get(),
            self.classified.get(),
            self.camera_failures.get(),
            self.events.get(),
            self.acknowledged.get(),
            self.events_lost.get(),
            self.connections.get(),
        )
    }
}

/// What programs may still take, in bytes, where the system says it: of the machine's memory, and of what the service may
/// have (a control group, version 2).
pub fn memory_available() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some((kilobytes << 10).min(group_available().unwrap_or(u64::MAX)))
}

/// What this process's control group may still take; none where it has no limit.
fn group_available() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let folder = Path::new("/sys/fs/cgroup").join(group);
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let taken = number("memory.current")?;
    // Files that were read lie in it as well, and make place for programs.
    let files = read("memory.stat")?.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    Some(number("memory.max")?.saturating_sub(taken.saturating_sub(files.unwrap_or(0))))
}
