//! Free memory of the machine and of the process's control group.

use std::fs;
use std::path::Path;

/// Returns the bytes that the process may still allocate: the smaller of the machine's `MemAvailable` and the room left in
/// its control group (version 2). `None` if the system does not report them.
pub fn available() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some((kilobytes << 10).min(available_in_cgroup().unwrap_or(u64::MAX)))
}

/// Returns the bytes left below `memory.max`; `None` if the group has no limit.
fn available_in_cgroup() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let folder = Path::new("/sys/fs/cgroup").join(group);
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let used = number("memory.current")?;
    // The page cache counts towards `memory.current`; its inactive part is reclaimed on demand.
    let cached = read("memory.stat")?.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    Some(number("memory.max")?.saturating_sub(used.saturating_sub(cached.unwrap_or(0))))
}
