//! The demo without photographs: draws flowers, trains a model on them, pushes it to the running daemon, and prints the events
//! of a drawn stream with the truth beside them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use fastrand::Rng;
use image::RgbImage;

use super::drawing::{self, KINDS, Kind, SIDE};
use super::{DEVICE, DemoError, GRACE, Options, broker, screen};
use crate::bundle::{self, Bundle, PrivateKey};
use crate::camera::{CameraError, FrameSource, NextFrame};
use crate::config::Config;
use crate::daemon::{Daemon, DaemonError};
use crate::frame::{Frame, Layout, Picture, RawPicture};
use crate::mqtt::client::Client;
use crate::mqtt::message::ONLINE;
use crate::mqtt::{BrokerAccess, Topics};
use crate::train::features::compute_device::ComputeDeviceChoice;
use crate::train::{Recipe, RunOptions, Trained, train};
use crate::update::protocol::identity;
use crate::update::workstation::delivery::{DeliveryStatus, PushPayload};
use crate::update::workstation::push::{PushOptions, push};
use crate::vision::UNKNOWN;
use crate::vision_stage::ClassifiedFrame;

/// Training drawings of each kind.
const DRAWINGS: usize = 24;
const EPOCHS: usize = 30;
/// Frames of each flower or scene of the stream.
const FRAMES: usize = 15;
/// A scene without a flower follows this many flowers.
const SCENE_EVERY: usize = 4;

/// Runs the demo on drawings and prints each step.
///
/// # Errors
/// If a drawing cannot be written, the training, the broker, the daemon, the subscriber or the push fails, or `out` cannot be
/// written.
pub fn run(options: &Options, out: &mut dyn Write) -> Result<(), DemoError> {
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let mut rng = Rng::with_seed(seed);
    let folder = options.folder.as_path();
    writeln!(out, "There are no photographs here, so the demo draws flowers (--seed {seed} draws the")?;
    writeln!(out, "same ones). They show how the program works, not how well it recognizes real")?;
    writeln!(out, "flowers: for that, see --frames and --fetch.\n")?;

    let (bundle, signed, key) = trained_bundle(folder, &mut rng, out)?;
    let port = broker::start(options.port)?;
    let access = BrokerAccess::local(port);
    let config = config(port, folder, options.interval_ms)?;
    let topics = config.topics.clone();
    let daemon = Daemon::prepare(config)?;
    let stream = Stream::new(&mut rng, options.interval_ms);
    let (started, truths) = (stream.started.clone(), stream.truths.clone());
    writeln!(out, "3 start   the daemon, model {}; broker 127.0.0.1:{port}", daemon.model())?;
    let mut subscriber = Client::connect(&access, &[format!("bloomcast/{DEVICE}/#")])?;
    let (running, classified_frames) = super::spawn(daemon.with_source(Box::new(stream)))?;
    if !is_online(&mut subscriber, &running)? {
        running.join().map_err(|_| DaemonError::Panicked("daemon"))??;
        return Err(DemoError::Push("the daemon ended".into()));
    }
    let labels = bundle.manifest().classes.clone();
    deliver(&access, topics, &bundle, signed, key, out)?;

    writeln!(out, "5 watch   mosquitto_sub -p {port} -v -t '#'   shows the same\n")?;
    screen::columns(out, "truth")?;
    started.store(true, Ordering::Relaxed);
    let events = super::listen(&mut subscriber, &running, &mut |event| {
        screen::event_with_truth(out, event, truth_at(&truths, event.captured_at))
    })?;
    let counters = running.join().map_err(|_| DaemonError::Panicked("daemon"))??.close();
    let published = events.iter().filter(|event| truth_at(&truths, event.captured_at) == event.class).count();
    let classified: Vec<ClassifiedFrame> = classified_frames.iter().collect();
    let (correct, total) = screen::correct(&classified, &labels, Path::to_str);
    writeln!(
        out,
        "\n{published} of {} events are right; {correct} of {total} frames classified correctly",
        events.len()
    )?;
    writeln!(
        out,
        "{} frames, {} overwritten by newer ones, {} broken; {} of {} events acknowledged",
        counters.captured.get(),
        counters.dropped.get(),
        counters.broken.get(),
        counters.acknowledged.get(),
        counters.events.get()
    )?;
    Ok(())
}

/// Draws a dataset, trains a model on it and signs it with a new key. Returns the bundle, its signed bytes and the key.
fn trained_bundle(
    folder: &Path,
    rng: &mut Rng,
    out: &mut dyn Write,
) -> Result<(Bundle, Vec<u8>, PrivateKey), DemoError> {
    let (photos, run) = (folder.join("drawings"), folder.join("run"));
    write!(out, "1 train   {} kinds, {DRAWINGS} drawings each … ", KINDS.len())?;
    out.flush()?;
    fs::create_dir(&photos)?;
    drawing::dataset(&photos, KINDS.iter().map(|kind| (kind.name, kind)), DRAWINGS, rng)?;
    let trained = train_on(&photos, &run)?;
    let evaluation = &trained.val.evaluation;
    let (images, seconds) = (evaluation.images, trained.elapsed.as_secs_f64());
    writeln!(out, "accuracy {:.3} on {images} others, {seconds:.1} s", evaluation.accuracy)?;

    let keys = folder.join("keys");
    fs::create_dir(&keys)?;
    let private = keys.join("trainer.key");
    PrivateKey::generate(&private)?;
    let key = PrivateKey::read(&private)?;
    let signed = bundle::sign("model.bloom", &fs::read(run.join("model.bloom"))?, &key)?;
    writeln!(out, "2 sign    {} bytes, with the new key {}", signed.len(), key.public().id())?;
    Ok((Bundle::from_bytes("model.bloom", &signed)?, signed, key))
}

fn train_on(photos: &Path, run: &Path) -> Result<Trained, DemoError> {
    let mut settings = Recipe::Frozen.settings(photos.into());
    settings.name = "drawn-flowers".into();
    settings.hyperparams.epochs = EPOCHS;
    let options = RunOptions {
        out: run.into(),
        overwrite: false,
        cache: None,
        threads: thread::available_parallelism()?.get(),
        device: ComputeDeviceChoice::Cpu,
        created_at: SystemTime::now(),
    };
    Ok(train(&settings, &options, &|_| {})?)
}

/// Returns the configuration of the daemon. Its frame source is replaced by a [`Stream`] later.
fn config(port: u16, folder: &Path, interval_ms: u64) -> Result<Config, DemoError> {
    let mut settings = super::settings(port, &folder.join("drawings"), interval_ms);
    settings.extend([
        format!("model.store={}", folder.join("store").display()),
        format!("model.trusted_keys={}", folder.join("keys").display()),
        "model.trial_frames=5".into(),
        // The machine may be busy.
        "model.slowdown_max=100".into(),
    ]);
    Ok(Config::from_settings(&settings)?)
}

/// Waits until the daemon is online; returns `false` if it has ended.
fn is_online<T>(subscriber: &mut Client, daemon: &thread::JoinHandle<T>) -> Result<bool, DemoError> {
    while !daemon.is_finished() {
        let Some(message) = subscriber.next(GRACE)? else { continue };
        if message.topic.ends_with("/status") && message.payload == ONLINE.as_bytes() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Pushes the model to the daemon and waits until it has passed its trial.
fn deliver(
    access: &BrokerAccess,
    topics: Topics,
    bundle: &Bundle,
    bytes: Vec<u8>,
    key: PrivateKey,
    out: &mut dyn Write,
) -> Result<(), DemoError> {
    write!(out, "4 push    over MQTT, on trial for five frames … ")?;
    out.flush()?;
    let payload = PushPayload {
        model: identity(bundle.manifest(), bundle.sha256()),
        manifest: bundle.manifest().clone(),
        bytes,
        packet_bytes_max: access.packet_bytes_max,
        // It has other classes than the built-in model.
        force: true,
        key: Some(key),
    };
    let report = push(access, vec![topics], &payload, &PushOptions::default(), &|_| {})?;
    match report.devices.into_iter().next() {
        Some(device) if device.status == DeliveryStatus::Confirmed => {
            writeln!(out, "confirmed in {:.1} s", device.seconds)?;
            Ok(())
        }
        device => Err(DemoError::Push(device.map_or(String::new(), |device| device.reason))),
    }
}

/// The content of the stream over time: capture time of the first frame, name of the kind or [`UNKNOWN`].
type Truths = Arc<Mutex<Vec<(SystemTime, &'static str)>>>;

/// Returns the truth at a time, which has a resolution of milliseconds.
fn truth_at(truths: &Truths, at: SystemTime) -> &'static str {
    let truths = truths.lock().expect("no thread panics with the lock held");
    let shown = truths.iter().rfind(|(since, _)| *since <= at + Duration::from_millis(1));
    shown.map_or(UNKNOWN, |(_, truth)| truth)
}

/// A drawn camera: a scene without a flower until it is started, then each kind of flower once, in random order.
struct Stream {
    rng: Rng,
    /// For the scenes before the start, whose number depends on the time that the push takes.
    rng_before: Rng,
    interval: Duration,
    /// Flowers and scenes that remain, the next one last; `None` is a scene.
    remaining: Vec<Option<&'static Kind>>,
    /// Frames of the last remaining one that were sent.
    sent: usize,
    started: Arc<AtomicBool>,
    truths: Truths,
    last: Instant,
}

impl Stream {
    fn new(rng: &mut Rng, interval_ms: u64) -> Self {
        let mut kinds: Vec<&Kind> = KINDS.iter().collect();
        rng.shuffle(&mut kinds);
        let scene_after = |(i, kind): (usize, &'static Kind)| {
            let scene = (i % SCENE_EVERY == 0).then_some(None);
            scene.into_iter().chain([Some(kind)])
        };
        Stream {
            rng: rng.fork(),
            rng_before: rng.fork(),
            interval: Duration::from_millis(interval_ms),
            remaining: kinds.into_iter().enumerate().flat_map(scene_after).collect(),
            sent: 0,
            started: Arc::default(),
            truths: Arc::default(),
            last: Instant::now(),
        }
    }

    /// Returns the kind of the next frame after the start, or `Some(None)` for a scene; `None` at the end.
    fn next_kind(&mut self) -> Option<Option<&'static Kind>> {
        if self.sent == FRAMES {
            self.remaining.pop();
            self.sent = 0;
        }
        self.sent += 1;
        self.remaining.last().copied()
    }
}

impl FrameSource for Stream {
    fn open(&mut self) -> Result<(), CameraError> {
        Ok(())
    }

    fn next(&mut self, _timeout: Duration) -> Result<NextFrame, CameraError> {
        thread::sleep(self.interval.saturating_sub(self.last.elapsed()));
        self.last = Instant::now();
        let started = self.started.load(Ordering::Relaxed);
        let (kind, rng) = if started {
            let Some(kind) = self.next_kind() else { return Ok(NextFrame::Ended) };
            (kind, &mut self.rng)
        } else {
            (None, &mut self.rng_before)
        };
        let picture = match kind {
            Some(kind) => drawing::flower(kind, rng),
            None => drawing::scene(rng),
        };
        let captured_at = SystemTime::now();
        let truth = kind.map_or(UNKNOWN, |kind| kind.name);
        let mut truths = self.truths.lock().expect("no thread panics with the lock held");
        if truths.last().is_none_or(|(_, last)| *last != truth) {
            truths.push((captured_at, truth));
        }
        Ok(NextFrame::Frame(Frame {
            captured_at,
            picture: raw(picture),
            // The truth of a frame that was captured after the start.
            origin: started.then(|| PathBuf::from(truth)),
        }))
    }

    fn close(&mut self) {}
}

fn raw(picture: RgbImage) -> Picture {
    Picture::Raw(RawPicture::packed(SIDE, SIDE, Layout::Rgb, picture.into_raw()))
}
