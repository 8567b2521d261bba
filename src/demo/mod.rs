//! One command to see it work: a broker inside the process, real photographs replayed through the real
//! daemon, and a subscriber that knows no more than any other.

pub mod broker;
mod photographs;
mod screen;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::bundle::Bundle;
use crate::config::{Config, ConfigError};
use crate::daemon::{Daemon, DaemonError};
use crate::mqtt::access::BrokerAccess;
use crate::mqtt::client::{Client, ClientError};
use crate::mqtt::message::OFFLINE;
use crate::system::Counters;
use crate::vision::UNKNOWN;
use crate::vision_stage::Seen;
use photographs::Photographs;

/// How long the subscriber is listened to once the daemon has ended.
const GRACE: Duration = Duration::from_secs(2);
const DEVICE: &str = "demo";

#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error(transparent)]
    Photographs(#[from] photographs::PhotographsError),
    #[error("the demo's broker: {0}")]
    Broker(#[from] broker::BrokerError),
    #[error("the demo's subscriber: {0}")]
    Subscriber(#[from] ClientError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
    #[error("the events do not follow the photographs: {0}")]
    Sequence(String),
}

/// What the demo is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Photographs, one folder a class, or just photographs.
    pub frames: Option<PathBuf>,
    /// Of the broker on 127.0.0.1; 0 takes a free one.
    pub port: u16,
    pub per_class: usize,
    pub interval_ms: u64,
}

/// An event as the subscriber got it.
struct Event {
    class: String,
    previous: String,
    confidence: f64,
    received_at: SystemTime,
    /// When the frame was caught that decided it, to the millisecond.
    captured_at: SystemTime,
}

/// What came of it.
struct Outcome {
    events: Vec<Event>,
    seen: Vec<Seen>,
    counters: Arc<Counters>,
    elapsed: Duration,
}

/// Plays the photographs through and prints what comes out at the other end. An error where the
/// folders' names tell what is shown and the events tell something else.
pub fn run(options: &Options, out: &mut dyn Write) -> Result<(), DemoError> {
    let labels = Bundle::built_in().map_err(|e| DaemonError::Model(e.into()))?.manifest().classes.names().to_vec();
    let photographs = Photographs::find(options.frames.as_deref(), options.per_class, out)?.told_by(&labels);
    let port = broker::start(options.port)?;
    let list = photographs.write_list()?;
    let daemon = Daemon::prepare(config(port, &list, options.interval_ms)?)?;
    screen::opening(out, port, &photographs, &daemon.model())?;

    let mut subscriber = Client::connect(&BrokerAccess::local(port), &[format!("bloomcast/{DEVICE}/#")])?;
    let (seen, looked_on) = mpsc::sync_channel(photographs.images.len());
    let began = Instant::now();
    let watching = thread::Builder::new()
        .name("daemon".into())
        // The channel has room for every photograph: the daemon never waits for us.
        .spawn(move || daemon.run(std::future::pending(), Box::new(move |frame| drop(seen.try_send(frame)))))?;
    let events = listen(&mut subscriber, &watching, out)?;
    let counters = watching.join().map_err(|_| DaemonError::Panicked("daemon"))??.close();
    let outcome = Outcome { events, seen: looked_on.iter().collect(), counters, elapsed: began.elapsed() };
    screen::summary(out, &photographs, &outcome, &labels)?;
    follows(&photographs, &outcome.events)
}

fn config(port: u16, list: &tempfile::NamedTempFile, interval_ms: u64) -> Result<Config, ConfigError> {
    let settings = [
        format!("device.name={DEVICE}"),
        "camera.name=replay".into(),
        "camera.source=replay".into(),
        "camera.replay.looped=false".into(),
        format!("camera.replay.path={}", list.path().display()),
        format!("camera.interval_ms={interval_ms}"),
        format!("decide.smoothing_ms={}", 4 * interval_ms),
        format!("decide.enter_dwell_ms={}", 2 * interval_ms),
        format!("decide.leave_dwell_ms={}", 8 * interval_ms),
        format!("mqtt.port={port}"),
        "model.store=".into(),
    ];
    Config::of_settings(&settings)
}

/// Prints each event as it comes, until the device says that it is gone.
fn listen<T>(
    subscriber: &mut Client,
    daemon: &thread::JoinHandle<T>,
    out: &mut dyn Write,
) -> Result<Vec<Event>, DemoError> {
    let mut events = Vec::new();
    loop {
        let Some(message) = subscriber.next(GRACE)? else {
            // Silence is an answer only once nobody is left to speak.
            if daemon.is_finished() {
                return Ok(events);
            }
            continue;
        };
        if message.topic.ends_with("/status") && message.payload == OFFLINE.as_bytes() {
            return Ok(events);
        }
        if message.topic.ends_with("/event")
            && let Some(event) = Event::read(&message.payload, message.received_at)
        {
            screen::event(out, &event)?;
            events.push(event);
        }
    }
}

impl Event {
    /// From the capture of the frame that decided it to the subscriber.
    fn latency(&self) -> Duration {
        self.received_at.duration_since(self.captured_at).unwrap_or_default()
    }

    /// The part of the latency that the backbone did not need, where the frame is known.
    fn overhead(&self, seen: &[Seen]) -> Option<Duration> {
        let decisive = |frame: &&Seen| {
            frame.captured_at.duration_since(self.captured_at).is_ok_and(|later| later < Duration::from_millis(1))
        };
        seen.iter().find(decisive).map(|frame| self.latency().saturating_sub(frame.stages.backbone))
    }

    fn read(payload: &[u8], received_at: SystemTime) -> Option<Self> {
        let json: Value = serde_json::from_slice(payload).ok()?;
        let text = |key: &str| json[key].as_str().map(str::to_owned);
        let captured_at = humantime::parse_rfc3339(json["captured_at"].as_str()?).ok()?;
        Some(Event {
            class: text("class")?,
            previous: text("previous")?,
            confidence: json["confidence"].as_f64()?,
            received_at,
            captured_at,
        })
    }
}

/// The classes that were told, in order, are the folders that were replayed, in order; between two of
/// them nothing may be seen.
fn follows(photographs: &Photographs, events: &[Event]) -> Result<(), DemoError> {
    let told: Vec<&str> = events.iter().map(|event| event.class.as_str()).filter(|class| *class != UNKNOWN).collect();
    if photographs.classes.is_empty() || told == photographs.classes {
        return Ok(());
    }
    let sequence = |classes: &[&str]| classes.join(" → ");
    let replayed: Vec<&str> = photographs.classes.iter().map(String::as_str).collect();
    Err(DemoError::Sequence(format!("{} were replayed, {} were told", sequence(&replayed), sequence(&told))))
}
