//! How the daemon fares: what it counts, whether its stages live, what systemd is told of it, and what memory is left.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tracing::{debug, error};

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
    /// Frames that were like the last one that was classified, and were not classified again.
    pub still: Counter,
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
            "captured={} dropped={} broken={} classified={} still={} camera_failures={} events={} acknowledged={} events_lost={} connections={}",
            self.captured.get(),
            self.dropped.get(),
            self.broken.get(),
            self.classified.get(),
            self.still.get(),
            self.camera_failures.get(),
            self.events.get(),
            self.acknowledged.get(),
            self.events_lost.get(),
            self.connections.get(),
        )
    }
}

/// One stage's sign of life: a clone of it beats, and whoever keeps it sees when that was.
#[derive(Debug, Clone)]
pub struct Pulse {
    stage: &'static str,
    began: Instant,
    /// Milliseconds from there to the last beat.
    last: Arc<AtomicU64>,
}

impl Pulse {
    pub fn of(stage: &'static str) -> Self {
        Pulse { stage, began: Instant::now(), last: Arc::default() }
    }

    pub fn beat(&self) {
        self.last.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// How long it has not beaten.
    fn silent(&self) -> Duration {
        self.began.elapsed().saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)))
    }
}

/// Tells systemd, where it asked to be told. That it cannot be is no reason to stop.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("systemd cannot be told: {error}");
    }
}

/// The model is loaded, and the stages run: whoever waits for this service may go on.
pub fn tell_ready(model: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(&format!("{model} decides"))]);
}

/// What `systemctl status` shows.
pub fn tell_status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// A changed configuration is about to be taken; [`tell_ready`] ends it.
pub fn tell_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => debug!("no time: {error}"),
    }
}

pub fn tell_stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Feeds systemd's watchdog for as long as each stage lives; pending for ever where there is none. That the connection to the
/// broker lives is shown by whoever polls this: both run on one thread.
pub async fn feed_watchdog(pulses: &[Pulse]) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    loop {
        tokio::time::sleep(limit / 4).await;
        match stalled(pulses, limit / 2) {
            None => tell(&[NotifyState::Watchdog]),
            Some((stage, silent)) => {
                error!("the thread {stage} has made no progress for {} s: the watchdog is not fed", silent.as_secs());
            }
        }
    }
}

/// A stage that has been silent for longer than that.
fn stalled(pulses: &[Pulse], longest: Duration) -> Option<(&'static str, Duration)> {
    let silent = pulses.iter().map(|pulse| (pulse.stage, pulse.silent()));
    silent.max_by_key(|(_, silent)| *silent).filter(|(_, silent)| *silent > longest)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stage_that_has_been_silent_longest_is_named() {
        let pulses = [Pulse::of("camera"), Pulse::of("vision")];
        assert_eq!(stalled(&pulses, Duration::from_secs(60)), None);
        std::thread::sleep(Duration::from_millis(20));
        pulses[0].clone().beat();
        let (stage, silent) = stalled(&pulses, Duration::from_millis(15)).unwrap();
        assert!(stage == "vision" && silent >= Duration::from_millis(20));
        pulses[1].beat();
        assert_eq!(stalled(&pulses, Duration::from_secs(60)), None);
    }
}
