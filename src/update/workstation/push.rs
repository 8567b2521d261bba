//! Pushes a model to one or more devices, optionally to a few of them (canaries) first.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::mqtt::client::{Client, ClientError};
use crate::mqtt::{BrokerAccess, Topics};
use crate::update::workstation::delivery::{Delivery, DeliveryOutcome, DeliveryStatus, PushPayload};

/// The most devices that receive chunks at the same time.
const CONCURRENT_MAX: usize = 8;
/// The longest wait for a message between two calls of [`Delivery::tick`].
const TICK: Duration = Duration::from_millis(50);
/// Wait before each attempt to reconnect.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(500);
/// The longest time without a broker.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// Options of a push.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// Number of devices that receive the model first. The others follow once these have confirmed it; after a failure no
    /// further delivery starts. `None` sends to all devices, even after a failure.
    pub canary: Option<usize>,
    /// Checks each device and sends nothing.
    pub dry_run: bool,
}

/// Result of a push for one device; an entry of `devices` in `push --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeviceResult {
    /// Name of the device.
    pub device: String,
    /// Final status.
    #[serde(rename = "ending")]
    pub status: DeliveryStatus,
    /// Explanation of the status; may be empty.
    pub reason: String,
    /// Time from the start of the delivery to its end, in seconds.
    pub seconds: f64,
}

/// Results of a push, in the order of the given devices; the document of `push --json`. `Display` writes a table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PushReport {
    /// Name and version of the model.
    pub model: String,
    /// One result per device.
    pub devices: Vec<DeviceResult>,
}

impl PushReport {
    /// Returns whether [`DeliveryStatus::is_good`] holds for every device.
    pub fn is_good(&self) -> bool {
        self.devices.iter().all(|result| result.status.is_good())
    }
}

impl fmt::Display for PushReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.devices.iter().map(|result| result.device.len()).max().unwrap_or(0).max("device".len());
        writeln!(f, "{:width$}  {:11}  {:>7}  {}", "device", "model", "seconds", self.model)?;
        for DeviceResult { device, status, reason, seconds } in &self.devices {
            writeln!(f, "{}", format!("{device:width$}  {:11}  {seconds:7.1}  {reason}", status.text()).trim_end())?;
        }
        Ok(())
    }
}

/// Called after each tick with each device's name and its [`Delivery::progress`].
pub type ProgressFn<'a> = &'a dyn Fn(&[(&str, (String, u32, u32))]);

/// Sends a model to the devices with these topics and waits for their results. If the connection breaks and cannot be restored
/// within 60 s, each unfinished delivery ends with [`DeliveryStatus::NoAnswer`].
///
/// # Errors
/// If the first connection to the broker or its subscription fails.
pub fn push(
    access: &BrokerAccess,
    devices: Vec<Topics>,
    payload: &PushPayload,
    options: &PushOptions,
    on_progress: ProgressFn,
) -> Result<PushReport, ClientError> {
    let mut run = PushRun::connect(access, devices, payload, on_progress)?;
    run.wait_until(|delivery| !delivery.is_probing());
    if options.dry_run {
        for delivery in run.deliveries.iter_mut().filter(|delivery| delivery.is_ready()) {
            delivery.finish(DeliveryStatus::Fits, "nothing was sent");
        }
    }
    let ready: Vec<usize> = (0..run.deliveries.len()).filter(|i| run.deliveries[*i].is_ready()).collect();
    let (canaries, others) = ready.split_at(options.canary.unwrap_or(0).min(ready.len()));
    for batch in [canaries].into_iter().filter(|batch| !batch.is_empty()).chain(others.chunks(CONCURRENT_MAX)) {
        run.deliver(batch, options.canary.is_some());
    }
    Ok(run.report())
}

/// The deliveries of a push and their common connection.
struct PushRun<'a> {
    access: &'a BrokerAccess,
    client: Client,
    filters: Vec<String>,
    deliveries: Vec<Delivery>,
    /// Start of each delivery.
    started: Vec<Instant>,
    /// End of each delivery.
    finished: Vec<Option<Instant>>,
    payload: &'a PushPayload,
    on_progress: ProgressFn<'a>,
}

impl<'a> PushRun<'a> {
    fn connect(
        access: &'a BrokerAccess,
        devices: Vec<Topics>,
        payload: &'a PushPayload,
        on_progress: ProgressFn<'a>,
    ) -> Result<Self, ClientError> {
        let filters: Vec<String> = devices.iter().flat_map(Delivery::filters).collect();
        let client = Client::connect(access, &filters)?;
        let now = Instant::now();
        let deliveries: Vec<Delivery> = devices.into_iter().map(|topics| Delivery::new(topics, payload, now)).collect();
        let (started, finished) = (vec![now; deliveries.len()], vec![None; deliveries.len()]);
        Ok(PushRun { access, client, filters, deliveries, started, finished, payload, on_progress })
    }

    /// Delivers to the devices with these indices. With `stop_on_failure`, starts nothing if a delivery has failed before.
    fn deliver(&mut self, batch: &[usize], stop_on_failure: bool) {
        let failed = self.deliveries.iter().find(|delivery| delivery.has_failed());
        if let Some(failed) = failed.filter(|_| stop_on_failure) {
            let reason = format!("{} failed", failed.topics.device());
            batch.iter().for_each(|i| self.deliveries[*i].finish(DeliveryStatus::NotStarted, reason.clone()));
            return;
        }
        for i in batch {
            self.started[*i] = Instant::now();
            self.deliveries[*i].start(self.payload, Instant::now());
        }
        self.wait_until(|delivery| delivery.is_ready() || delivery.outcome().is_some());
    }

    /// Handles messages and ticks until `done` holds for every delivery.
    fn wait_until(&mut self, done: impl Fn(&Delivery) -> bool) {
        while !self.deliveries.iter().all(&done) {
            self.receive();
            let now = Instant::now();
            for (delivery, finished) in self.deliveries.iter_mut().zip(&mut self.finished) {
                delivery.tick(self.payload, now, &mut |topic, payload| self.client.publish(topic, payload));
                if delivery.outcome().is_some() {
                    finished.get_or_insert(now);
                }
            }
            let progress = self.deliveries.iter().map(|one| (one.topics.device().as_str(), one.progress()));
            (self.on_progress)(&progress.collect::<Vec<_>>());
        }
    }

    /// Waits up to [`TICK`] for a message and passes it to its delivery; reconnects if the connection is broken.
    fn receive(&mut self) {
        match self.client.next(TICK) {
            Ok(None) => {}
            Ok(Some(message)) => {
                let now = Instant::now();
                let is_recipient = |delivery: &&mut Delivery| {
                    let below = message.topic.strip_prefix(delivery.topics.root());
                    below.is_some_and(|below| below.starts_with('/'))
                };
                if let Some(delivery) = self.deliveries.iter_mut().find(is_recipient) {
                    delivery.handle(&message.topic, &message.payload, self.payload, now);
                }
            }
            Err(_) => match reconnect(self.access, &self.filters) {
                Ok(client) => {
                    self.client = client;
                    let now = Instant::now();
                    self.deliveries.iter_mut().for_each(|delivery| delivery.reconnected(now));
                }
                // Finished deliveries keep their outcome.
                Err(error) => {
                    let unfinished = self.deliveries.iter_mut().filter(|delivery| delivery.outcome().is_none());
                    unfinished.for_each(|delivery| delivery.finish(DeliveryStatus::NoAnswer, error.to_string()));
                }
            },
        }
    }

    fn report(self) -> PushReport {
        let now = Instant::now();
        let results = self.deliveries.iter().enumerate().map(|(i, delivery)| {
            let DeliveryOutcome { status, reason } = delivery.outcome().cloned().expect("every delivery is finished");
            let seconds = self.finished[i].unwrap_or(now).duration_since(self.started[i]).as_secs_f64();
            DeviceResult { device: delivery.topics.device().to_string(), status, reason, seconds }
        });
        PushReport { model: self.payload.model.to_string(), devices: results.collect() }
    }
}

/// Connects again, with retries for up to [`RECONNECT_TIMEOUT`]. It waits for [`RECONNECT_INTERVAL`] before each attempt, even the
/// first, because the broker may have closed the connection on purpose.
///
/// # Errors
/// The error of the last attempt.
pub(super) fn reconnect(access: &BrokerAccess, filters: &[String]) -> Result<Client, ClientError> {
    let started = Instant::now();
    loop {
        std::thread::sleep(RECONNECT_INTERVAL);
        match Client::connect(access, filters) {
            Err(_) if started.elapsed() < RECONNECT_TIMEOUT => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs read this JSON; its names are stable.
    #[test]
    fn report_keeps_its_json_names() {
        let json = |status| {
            let result = DeviceResult { device: "pi".into(), status, reason: "why".into(), seconds: 0.5 };
            serde_json::to_string(&PushReport { model: "m 1".into(), devices: vec![result] }).unwrap()
        };
        for (status, name) in [
            (DeliveryStatus::Confirmed, "confirmed"),
            (DeliveryStatus::Fits, "fit"),
            (DeliveryStatus::Refused, "refused"),
            (DeliveryStatus::RolledBack, "rolled-back"),
            (DeliveryStatus::Offline, "offline"),
            (DeliveryStatus::NoAnswer, "silent"),
            (DeliveryStatus::NotStarted, "stopped"),
        ] {
            let ending = format!(r#""ending":"{name}""#);
            let devices = format!(r#"[{{"device":"pi",{ending},"reason":"why","seconds":0.5}}]"#);
            assert_eq!(json(status), format!(r#"{{"model":"m 1","devices":{devices}}}"#));
        }
    }
}
