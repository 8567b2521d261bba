//! The workstation's side: a model to one device or to many, a few of them first.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::mqtt::access::BrokerAccess;
use crate::mqtt::client::{Client, ClientError};
use crate::mqtt::topics::Topics;
use crate::update::workstation::delivery::{Delivery, DeliveryStatus, Outcome, PushPayload};

/// Devices that are sent to at a time.
const AT_A_TIME: usize = 8;
/// How often what is due is looked for while no message comes.
const TICK: Duration = Duration::from_millis(50);
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(500);
/// How long the broker may be away.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a push goes.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// So many devices first, and the others only once these have confirmed. After a failure no other is begun.
    pub canary: Option<usize>,
    /// Looks, and sends nothing.
    pub dry_run: bool,
}

/// A device and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub device: String,
    pub ending: DeliveryStatus,
    pub reason: String,
    pub seconds: f64,
}

/// What became of each device, in the order in which they were named.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub model: String,
    pub devices: Vec<Row>,
}

impl Report {
    pub fn is_good(&self) -> bool {
        self.devices.iter().all(|row| row.ending.is_good())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.devices.iter().map(|row| row.device.len()).max().unwrap_or(0).max("device".len());
        writeln!(f, "{:width$}  {:11}  {:>7}  {}", "device", "model", "seconds", self.model)?;
        for Row { device, ending, reason, seconds } in &self.devices {
            writeln!(f, "{}", format!("{device:width$}  {:11}  {seconds:7.1}  {reason}", ending.word()).trim_end())?;
        }
        Ok(())
    }
}

/// How far it is: for each device what it is at, and how many pieces of how many have arrived.
pub type Watch<'a> = &'a dyn Fn(&[(&str, (String, u32, u32))]);

/// Sends a model to the devices with these topics, and waits for what they say. An error where the broker cannot be reached.
pub fn push(
    access: &BrokerAccess,
    devices: Vec<Topics>,
    parcel: &PushPayload,
    plan: &PushOptions,
    watch: Watch,
) -> Result<Report, ClientError> {
    let filters: Vec<String> = devices.iter().flat_map(Delivery::filters).collect();
    let client = Client::connect(access, &filters)?;
    let now = Instant::now();
    let deliveries: Vec<Delivery> = devices.into_iter().map(|topics| Delivery::new(topics, parcel, now)).collect();
    let (began, ended) = (vec![now; deliveries.len()], vec![None; deliveries.len()]);
    let mut round = Round { client, access, filters, began, ended, deliveries, parcel, watch };
    round.until(|delivery| !delivery.is_looking());
    if plan.dry_run {
        for delivery in round.deliveries.iter_mut().filter(|delivery| delivery.is_ready()) {
            delivery.end(DeliveryStatus::Fit, "nothing was sent");
        }
    }
    let ready: Vec<usize> = (0..round.deliveries.len()).filter(|i| round.deliveries[*i].is_ready()).collect();
    let (first, rest) = ready.split_at(plan.canary.unwrap_or(0).min(ready.len()));
    for wave in [first].into_iter().filter(|wave| !wave.is_empty()).chain(rest.chunks(AT_A_TIME)) {
        let failed = round.deliveries.iter().find(|delivery| delivery.has_failed());
        if let Some(failed) = failed.filter(|_| plan.canary.is_some()) {
            let reason = format!("{} failed", failed.topics.device());
            wave.iter().for_each(|i| round.deliveries[*i].end(DeliveryStatus::Stopped, reason.clone()));
            continue;
        }
        for i in wave {
            round.began[*i] = Instant::now();
            round.deliveries[*i].begin(parcel, Instant::now());
        }
        round.until(|delivery| delivery.is_ready() || delivery.outcome().is_some());
    }
    Ok(round.report())
}

/// The devices, and the connection on which they are spoken to.
struct Round<'a> {
    access: &'a BrokerAccess,
    client: Client,
    filters: Vec<String>,
    deliveries: Vec<Delivery>,
    began: Vec<Instant>,
    ended: Vec<Option<Instant>>,
    parcel: &'a PushPayload,
    watch: Watch<'a>,
}

impl Round<'_> {
    /// Goes on until all are `done`.
    fn until(&mut self, done: impl Fn(&Delivery) -> bool) {
        while !self.deliveries.iter().all(&done) {
            self.hear();
            let now = Instant::now();
            for (delivery, ended) in self.deliveries.iter_mut().zip(&mut self.ended) {
                delivery.step(self.parcel, now, &mut |topic, payload| self.client.publish(topic, payload));
                if delivery.outcome().is_some() {
                    ended.get_or_insert(now);
                }
            }
            let shown = self.deliveries.iter().map(|one| (one.topics.device().as_str(), one.shown()));
            (self.watch)(&shown.collect::<Vec<_>>());
        }
    }

    fn hear(&mut self) {
        match self.client.next(TICK) {
            Ok(None) => {}
            Ok(Some(message)) => {
                let now = Instant::now();
                let ours = |delivery: &&mut Delivery| {
                    let below = message.topic.strip_prefix(delivery.topics.root());
                    below.is_some_and(|below| below.starts_with('/'))
                };
                if let Some(delivery) = self.deliveries.iter_mut().find(ours) {
                    delivery.hear(&message.topic, &message.payload, self.parcel, now);
                }
            }
            Err(_) => match reconnected(self.access, &self.filters) {
                Ok(client) => {
                    self.client = client;
                    let now = Instant::now();
                    self.deliveries.iter_mut().for_each(|delivery| delivery.connected(now));
                }
                // What the others said stands.
                Err(error) => {
                    let unfinished = self.deliveries.iter_mut().filter(|delivery| delivery.outcome().is_none());
                    unfinished.for_each(|delivery| delivery.end(DeliveryStatus::Silent, error.to_string()));
                }
            },
        }
    }

    fn report(self) -> Report {
        let now = Instant::now();
        let rows = self.deliveries.iter().enumerate().map(|(i, delivery)| {
            let Outcome { ending, reason } = delivery.outcome().cloned().expect("all are done");
            let seconds = self.ended[i].unwrap_or(now).duration_since(self.began[i]).as_secs_f64();
            Row { device: delivery.topics.device().to_string(), ending, reason, seconds }
        });
        Report { model: self.parcel.model.to_string(), devices: rows.collect() }
    }
}

/// Tries for a while, and never at once: the broker may have had its reason.
pub(super) fn reconnected(access: &BrokerAccess, filters: &[String]) -> Result<Client, ClientError> {
    let began = Instant::now();
    loop {
        std::thread::sleep(PAUSE);
        match Client::connect(access, filters) {
            Err(_) if began.elapsed() < PATIENCE => {}
            connected => return connected,
        }
    }
}
