//! The demo: a broker inside the process, photographs that are replayed through the daemon, and a subscriber that prints the
//! events. Without photographs, the demo draws flowers and trains a model on them.

pub mod broker;
pub mod drawing;
mod drawn;
mod photographs;
mod screen;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::bundle::signature::KeyError;
use crate::bundle::{Bundle, BundleError};
use crate::config::{Config, ConfigError};
use crate::daemon::{Daemon, DaemonError, StoppedDaemon};
use crate::mqtt::BrokerAccess;
use crate::mqtt::client::{Client, ClientError};
use crate::mqtt::message::OFFLINE;
use crate::system::Counters;
use crate::train::TrainError;
use crate::update::device::admission::Refusal;
use crate::vision::UNKNOWN;
use crate::vision_stage::ClassifiedFrame;
use photographs::Photographs;

/// The longest wait for a message; after it, the end of the daemon is checked.
const GRACE: Duration = Duration::from_secs(2);
const DEVICE: &str = "demo";

/// An error of the demo.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The photographs cannot be read or downloaded, or their list cannot be written.
    #[error(transparent)]
    Photographs(#[from] photographs::PhotographsError),
    /// The broker cannot be started.
    #[error("the demo's broker: {0}")]
    Broker(#[from] broker::BrokerError),
    /// The subscriber cannot connect, or its connection is closed.
    #[error("the demo's subscriber: {0}")]
    Subscriber(#[from] ClientError),
    /// A setting of the demo's daemon is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A drawing cannot be written.
    #[error("cannot write a drawing: {0}")]
    Drawing(#[from] image::ImageError),
    /// The training on the drawings fails.
    #[error("training: {0}")]
    Train(#[from] TrainError),
    /// The key cannot be generated.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The bundle cannot be signed.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The pushed model is not confirmed; the reason.
    #[error("the model was not confirmed: {0}")]
    Push(String),
    /// The daemon cannot be prepared, or fails.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// A file of the demo or the output cannot be written, or the daemon's thread cannot be started.
    #[error("a temporary file of the demo, its output or its thread: {0}")]
    Output(#[from] io::Error),
    /// The classes of the events differ from the replayed folders; both sequences.
    #[error("the events do not match the replayed classes: {0}")]
    Sequence(String),
}

/// Options of the demo.
#[derive(Debug, Clone)]
pub struct Options {
    /// A folder of photographs, with or without a folder for each class.
    pub frames: Option<PathBuf>,
    /// Port of the broker on 127.0.0.1; 0 chooses a free one.
    pub port: u16,
    /// Largest number of photographs of each class.
    pub per_class: usize,
    /// Interval between two photographs or drawings, in milliseconds.
    pub interval_ms: u64,
    /// An existing, empty folder for temporary files.
    pub folder: PathBuf,
    /// Downloads photographs if there are none.
    pub fetch: bool,
    /// Seed of the drawings; `None` chooses one.
    pub seed: Option<u64>,
}

/// A received event.
struct Event {
    class: String,
    previous: String,
    confidence: f64,
    received_at: SystemTime,
    /// Capture time of the frame that caused it, with a resolution of milliseconds.
    captured_at: SystemTime,
}

/// The results of a demo.
struct Outcome {
    events: Vec<Event>,
    classified: Vec<ClassifiedFrame>,
    counters: Arc<Counters>,
    elapsed: Duration,
}

/// Replays the photographs, or drawings if there are no photographs, and prints the received events.
///
/// # Errors
/// If the photographs cannot be read, the broker, the daemon or the subscriber fails, `out` cannot be written, or the events do not
/// follow the folders that were replayed.
pub fn run(options: &Options, out: &mut dyn Write) -> Result<(), DemoError> {
    let photographs = Photographs::find(options.frames.as_deref(), options.per_class, options.fetch, out)?;
    let Some(photographs) = photographs else { return drawn::run(options, out) };
    let labels =
        Bundle::built_in().map_err(|e| DaemonError::Model(Refusal::from(e).into()))?.manifest().classes.clone();
    let photographs = photographs.match_labels(labels.names());
    let port = broker::start(options.port)?;
    let list = photographs.write_list(&options.folder)?;
    let mut settings = settings(port, &list, options.interval_ms);
    settings.push("model.store=".into());
    let daemon = Daemon::prepare(Config::from_settings(&settings)?)?;
    screen::header(out, port, &photographs, &daemon.model())?;

    let mut subscriber = Client::connect(&BrokerAccess::local(port), &[format!("bloomcast/{DEVICE}/#")])?;
    let began = Instant::now();
    let (running, classified_frames) = spawn(daemon)?;
    let events = listen(&mut subscriber, &running, &mut |event| screen::event(out, event))?;
    let counters = running.join().map_err(|_| DaemonError::Panicked("daemon"))??.close();
    let outcome =
        Outcome { events, classified: classified_frames.iter().collect(), counters, elapsed: began.elapsed() };
    screen::summary(out, &photographs, &outcome, &labels)?;
    follows(&photographs, &outcome.events)
}

/// Runs a daemon in a thread until its source ends. Returns the thread and the frames that the daemon classifies.
#[expect(clippy::type_complexity, reason = "a thread's result and a channel")]
fn spawn(
    daemon: Daemon,
) -> io::Result<(thread::JoinHandle<Result<StoppedDaemon, DaemonError>>, mpsc::Receiver<ClassifiedFrame>)> {
    let (classified, classified_frames) = mpsc::channel();
    let running = thread::Builder::new()
        .name("daemon".into())
        .spawn(move || daemon.run(std::future::pending(), Box::new(move |frame| drop(classified.send(frame)))))?;
    Ok((running, classified_frames))
}

/// Returns the settings of the daemon, without those of the store.
fn settings(port: u16, images: &Path, interval_ms: u64) -> Vec<String> {
    vec![
        format!("device.name={DEVICE}"),
        "camera.name=replay".into(),
        "camera.source=replay".into(),
        "camera.replay.looped=false".into(),
        format!("camera.replay.path={}", images.display()),
        format!("camera.interval_ms={interval_ms}"),
        format!("decide.smoothing_ms={}", 4 * interval_ms),
        format!("decide.enter_dwell_ms={}", 2 * interval_ms),
        format!("decide.leave_dwell_ms={}", 8 * interval_ms),
        format!("mqtt.port={port}"),
    ]
}

/// Receives events until the device publishes `offline`; `print` is called for each.
fn listen<T>(
    subscriber: &mut Client,
    daemon: &thread::JoinHandle<T>,
    print: &mut dyn FnMut(&Event) -> io::Result<()>,
) -> Result<Vec<Event>, DemoError> {
    let mut events = Vec::new();
    loop {
        let Some(message) = subscriber.next(GRACE)? else {
            // No message will follow once the daemon has ended.
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
            print(&event)?;
            events.push(event);
        }
    }
}

impl Event {
    /// Time from the capture of the frame to the subscriber.
    fn latency(&self) -> Duration {
        self.received_at.duration_since(self.captured_at).unwrap_or_default()
    }

    /// The latency without the time of the backbone, if the frame is found.
    fn overhead(&self, classified: &[ClassifiedFrame]) -> Option<Duration> {
        let decisive = |frame: &&ClassifiedFrame| {
            frame.captured_at.duration_since(self.captured_at).is_ok_and(|later| later < Duration::from_millis(1))
        };
        classified.iter().find(decisive).map(|frame| self.latency().saturating_sub(frame.stages.backbone))
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

/// Checks that the classes of the events are the replayed folders, in order; `unknown` may lie between them.
fn follows(photographs: &Photographs, events: &[Event]) -> Result<(), DemoError> {
    let published: Vec<&str> =
        events.iter().map(|event| event.class.as_str()).filter(|class| *class != UNKNOWN).collect();
    if photographs.classes.is_empty() || published == photographs.classes {
        return Ok(());
    }
    let sequence = |classes: &[&str]| classes.join(" → ");
    let replayed: Vec<&str> = photographs.classes.iter().map(String::as_str).collect();
    Err(DemoError::Sequence(format!("{} were replayed, {} were published", sequence(&replayed), sequence(&published))))
}
