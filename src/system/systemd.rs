//! Notifications to systemd (`sd_notify(3)`): ready, reloading, stopping, status, watchdog. Each does nothing where systemd
//! does not ask for it.

use sd_notify::NotifyState;
use tracing::{debug, error};

use super::heartbeat::{Heartbeat, stalled};

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("cannot notify systemd: {error}");
    }
}

/// Reports that the service is ready (`READY=1`), with a status line.
pub fn notify_ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Sets the line that `systemctl status` shows.
pub fn notify_status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// Reports that the configuration is being reloaded; [`notify_ready`] ends the reload.
pub fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => debug!("cannot read the monotonic clock: {error}"),
    }
}

/// Reports that the service stops.
pub fn notify_stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Feeds systemd's watchdog while every stage's heartbeat is younger than half of the watchdog's time; never returns. The
/// caller polls this on the thread of the broker's connection, so that a blocked connection stops it too.
pub async fn feed_watchdog(heartbeats: &[Heartbeat]) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    loop {
        tokio::time::sleep(limit / 4).await;
        match stalled(heartbeats, limit / 2) {
            None => notify(&[NotifyState::Watchdog]),
            Some((stage, age)) => {
                error!("the thread {stage} has made no progress for {} s: the watchdog is not notified", age.as_secs());
            }
        }
    }
}
