//! The daemon: the only file that starts the stages' threads and makes the channels between them.
//!
//! `camera` (a thread) → mailbox → `vision` (a thread: decode, classify, decide) → outbox and state →
//! `mqtt` (the thread that called [`Daemon::run`]). Each stage ends when the one before it has ended, so
//! that what was decided is still said. Beside the street, `fleet` (a thread) takes new models from `mqtt`
//! and hands them to `vision`.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use tokio::runtime::Runtime;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::{error, info, warn};

use crate::bundle::Keyring;
use crate::bundle::signature::KeyError;
use crate::camera::latest;
use crate::camera::rpicam::{self, Rpicam};
use crate::camera::{self, CameraError, FrameSource, Next, Pace, replay};
use crate::config::{Config, ConfigError, Source};
use crate::decide::Decider;
use crate::mqtt::outbox::Limits;
use crate::mqtt::{ConnectionOptions, Link, Outbox, message, topics::Topics};
use crate::system::{Counters, Heartbeat, systemd};
use crate::update::device::Store;
use crate::update::device::agent::{Ends, Receiver, Setup};
use crate::update::device::model_loader::{ActiveModel, ModelError, ModelLoader};
use crate::update::device::store::State;
use crate::vision::kernels::Team;
use crate::vision::{BackboneError, FrameDiff, Labels, decode};
use crate::vision_stage::{Habits, Observer, Orders, Voice, Watcher};

/// Settings from afar that wait for the vision thread.
const ORDERS_MAX: usize = 16;
/// How long a stop waits for the vision thread, which may be at a frame, and then for the camera's.
const VISION_END: Duration = Duration::from_millis(800);
const CAMERA_END: Duration = Duration::from_millis(300);
/// The model thread may be at a proof.
const FLEET_END: Duration = Duration::from_millis(300);
/// Answers to whoever sends models, which wait while the broker is away.
const ANSWERS: Limits = Limits { entries_max: 64, bytes_max: 256 << 10 };

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("model.trusted_keys: {0}")]
    Keys(#[from] KeyError),
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error("camera: {0}")]
    Camera(#[from] CameraError),
    #[error("cannot start the thread {name}: {source}")]
    Thread { name: &'static str, source: std::io::Error },
    #[error("the thread {0} panicked; its message stands above")]
    Panicked(&'static str),
}

/// What a daemon is asked to end for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// For good.
    Stop,
    /// For another with a changed configuration, in the same process.
    Reload,
}

/// What is left of a daemon that has ended.
pub struct Remains {
    pub end: End,
    counters: Arc<Counters>,
    /// Events, and answers about models, that the broker has not acknowledged.
    outbox: Outbox,
    answers: Outbox,
    /// What is seen, in the classes of the model that decided last.
    seen: Option<(Labels, Decider)>,
}

impl Remains {
    /// Nobody comes after it: tells what is lost, and gives the final counts.
    pub fn close(self) -> Arc<Counters> {
        if !self.outbox.is_empty() {
            error!("{} events were not acknowledged by the broker and are lost", self.outbox.len());
            self.counters.events_lost.add(self.outbox.len() as u64);
        }
        if !self.answers.is_empty() {
            warn!("{} answers about models were not acknowledged by the broker and are lost", self.answers.len());
        }
        info!("{}", self.counters);
        self.counters
    }
}

/// A daemon whose configuration, model and camera settings were found good.
pub struct Daemon {
    config: Config,
    topics: Topics,
    link: ConnectionOptions,
    shelf: ModelLoader,
    deciding: ActiveModel,
    decider: Decider,
    source: Box<dyn FrameSource>,
    pace: Pace,
    counters: Arc<Counters>,
    outbox: Outbox,
    answers: Outbox,
}

impl Daemon {
    /// Loads the model and checks what can be checked without the camera and the broker. What the store needs, is done.
    pub fn prepare(config: Config) -> Result<Self, DaemonError> {
        Self::with_store(config, Store::new)
    }

    /// The same, and changes nothing.
    pub fn examine(config: Config) -> Result<Self, DaemonError> {
        Self::with_store(config, Store::for_looking)
    }

    fn with_store(config: Config, open: fn(&Path) -> Store) -> Result<Self, DaemonError> {
        Keyring::read(&config.model.trusted_keys)?;
        let pace = Pace::new(config.camera.interval_ms);
        let (topics, link, source) = (config.topics()?, config.link()?, source(&config, &pace)?);
        // Last: a model on trial must not pay for a mistake in the configuration.
        let team = Team::of(config.threads()).map_err(|source| DaemonError::Thread { name: "kernels", source })?;
        let shelf = ModelLoader { team, ..ModelLoader::of(&config, open) };
        let deciding = shelf.deciding()?;
        let labels = deciding.loaded.classifier.labels();
        let rules = match deciding.state == State::default() {
            true => config.rules(labels)?,
            false => config.rules_of_known(labels),
        };
        let decider = Decider::new(rules, SystemTime::now());
        let (outbox, answers) = (Outbox::new(config.outbox()), Outbox::new(ANSWERS));
        let counters = Arc::default();
        Ok(Daemon { config, topics, link, shelf, deciding, decider, source, pace, counters, outbox, answers })
    }

    /// Goes on where another has ended: nothing that was decided is lost, or decided twice.
    pub fn resume(mut self, remains: Remains) -> Self {
        let Remains { counters, outbox, answers, seen, .. } = remains;
        self.answers.adopt(&answers);
        let lost = self.outbox.adopt(&outbox);
        if lost > 0 {
            error!("{lost} events are lost: mqtt.outbox_entries_max or outbox_bytes_max is smaller now");
            counters.events_lost.add(lost as u64);
        }
        self.counters = counters;
        if let Some((_, mut decider)) = seen.filter(|(labels, _)| labels == self.labels()) {
            *decider.rules_mut() = self.decider.rules_mut().clone();
            self.decider = decider;
        }
        self
    }

    /// The model's name and version.
    pub fn model(&self) -> String {
        self.deciding.loaded.model.identity().to_string()
    }

    pub fn labels(&self) -> &Labels {
        self.deciding.loaded.classifier.labels()
    }

    /// Waits for one frame from the camera and classifies it, within the stall time.
    pub fn try_camera(&mut self) -> Result<(), DaemonError> {
        self.source.open()?;
        let stall = Duration::from_millis(self.config.camera.stall_ms);
        let began = Instant::now();
        let frame = loop {
            let left = stall.saturating_sub(began.elapsed());
            match self.source.next(left)? {
                Next::Frame(frame) => break frame,
                Next::Pending if left.is_zero() => return Err(CameraError::Stalled(stall.as_millis()).into()),
                Next::Pending => {}
                Next::Broken(reason) => return Err(CameraError::Broken(reason).into()),
                Next::Ended => return Err(CameraError::Ended.into()),
            }
        };
        self.source.close();
        let picture = decode::picture(&frame.picture).map_err(|e| CameraError::Broken(e.to_string()))?;
        self.deciding.loaded.classifier.classify(&picture)?;
        Ok(())
    }

    /// Watches, decides and publishes until `stop` is ready or the camera has no more frames.
    pub fn run(self, stop: impl Future<Output = End>, observer: Observer) -> Result<Remains, DaemonError> {
        let runtime = runtime()?;
        let remains = self.run_on(&runtime, stop, observer);
        // Not dropped: that would wait for a name that is being looked up.
        runtime.shutdown_background();
        remains
    }

    /// The same, where the runtime outlives the daemon.
    pub fn run_on(
        self,
        runtime: &Runtime,
        stop: impl Future<Output = End>,
        observer: Observer,
    ) -> Result<Remains, DaemonError> {
        let (counters, outbox, answers) = (self.counters.clone(), self.outbox.clone(), self.answers.clone());
        let log_interval = Duration::from_secs(self.config.log.counters_interval_s);
        let model = self.model();
        let heartbeats = [Heartbeat::new("camera"), Heartbeat::new("vision")];
        let (stages, link, seen) = self.start(observer, &heartbeats)?;
        systemd::notify_ready(&model);
        let watching = async {
            tokio::join!(log_counters(&counters, log_interval), systemd::feed_watchdog(&heartbeats));
        };
        let ended = runtime.block_on(conduct(stages, link, stop, watching));
        ended.map(|end| Remains { end, counters, outbox, answers, seen: seen.try_recv().ok() })
    }

    /// Makes the channels and starts the threads; the link is for the caller to run.
    fn start(self, observer: Observer, heartbeats: &[Heartbeat; 2]) -> Result<(Stages, Link, Seen), DaemonError> {
        let [camera_heartbeat, vision_heartbeat] = heartbeats.clone();
        let labels = self.deciding.loaded.classifier.labels().clone();
        let sender = message::Sender {
            device: self.topics.device().to_string(),
            camera: self.config.camera.name.clone(),
            labels,
            model: self.deciding.loaded.model.manifest.version,
        };
        let (outbox, answers) = (self.outbox, self.answers);
        let (orders, settings) = mpsc::sync_channel(ORDERS_MAX);
        let (swaps, swapped) = mpsc::sync_channel(1);
        let (frames, mailbox) = latest::mailbox();
        let rules = self.config.supervisor(&self.pace);
        let (pace, stall_ms) = (self.pace, self.config.camera.stall_ms);
        let still = FrameDiff::new(self.config.camera.still_threshold);
        let habits = Habits { pace, patience: Duration::from_millis(stall_ms), still };
        let (topics, counters) = (self.topics, self.counters);
        let setup =
            Setup { config: self.config, topics: topics.clone(), shelf: self.shelf, answers: answers.clone(), swaps };
        let (stop, stopped) = watch::channel(false);
        let (receiver, classifier, Ends { inbox, about, witness }) =
            Receiver::new(setup, self.deciding, stopped.clone());
        let voice = Voice::new(self.decider, sender, topics.event(), outbox.clone(), counters.clone());
        let said = about.subscribe();
        let ordered = Orders { settings, swaps: swapped, about, witness };
        let (mut watcher, state) = Watcher::new(mailbox, classifier, voice, ordered, habits, observer);
        let link = Link {
            settings: self.link,
            topics,
            about: said,
            state,
            outbox,
            answers,
            orders,
            mail: Box::new(move |mail| inbox.try_send(mail).is_ok()),
            counters: counters.clone(),
        };
        let mut source = self.source;
        let camera = Stage::spawn("camera", move || {
            camera::watch(source.as_mut(), &rules, &frames, &counters, &camera_heartbeat);
        })?;
        let fleet = Stage::spawn("fleet", move || receiver.run())?;
        let (left, seen) = mpsc::sync_channel(1);
        let vision = Stage::spawn("vision", move || {
            watcher.watch(&stopped, &vision_heartbeat);
            // Nobody waits for it where it took too long to end.
            let _ = left.send(watcher.into_seen());
        })?;
        Ok((Stages { camera, vision, fleet, stop }, link, seen))
    }
}

/// Gives what was seen last, once the vision thread has ended.
type Seen = mpsc::Receiver<(Labels, Decider)>;

/// The threads before the link.
struct Stages {
    camera: Stage,
    vision: Stage,
    fleet: Stage,
    stop: watch::Sender<bool>,
}

/// Lets the link talk until there is a reason to stop, then ends one stage after the other, none of
/// which can hold up the farewell for long.
async fn conduct(
    mut stages: Stages,
    link: Link,
    stop: impl Future<Output = End>,
    watching: impl Future<Output = ()>,
) -> Result<End, DaemonError> {
    let (end_link, link_ended) = watch::channel(false);
    let mut link = tokio::spawn(link.run(link_ended));
    let end = tokio::select! {
        end = stop => end,
        () = stages.vision.ended() => End::Stop,
        // It ends by itself only where it panicked, which is told when it is joined.
        () = stages.fleet.ended() => End::Stop,
        () = watching => End::Stop,
        // It ends by itself only where it panicked.
        _ = &mut link => return Err(DaemonError::Panicked("mqtt")),
    };
    match end {
        End::Stop => {
            info!("stopping");
            systemd::notify_stopping();
        }
        End::Reload => info!("the configuration has changed: beginning anew"),
    }
    stages.stop.send_replace(true);
    let vision = stages.vision.join(VISION_END).await;
    let camera = stages.camera.join(CAMERA_END).await;
    let fleet = stages.fleet.join(FLEET_END).await;
    end_link.send_replace(true);
    link.await.map_err(|_| DaemonError::Panicked("mqtt"))?;
    vision.and(camera).and(fleet).map(|()| end)
}

/// A thread whose end can be waited for.
struct Stage {
    name: &'static str,
    thread: thread::JoinHandle<()>,
    done: oneshot::Receiver<()>,
}

impl Stage {
    fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<Self, DaemonError> {
        let (working, done) = oneshot::channel::<()>();
        let work = move || {
            // Dropped when the work is over, and when it panics.
            let _working = working;
            work();
        };
        let thread = thread::Builder::new().name(name.into()).spawn(work);
        Ok(Stage { name, thread: thread.map_err(|source| DaemonError::Thread { name, source })?, done })
    }

    async fn ended(&mut self) {
        // An error means that the other end was dropped, which is the news.
        let _ = (&mut self.done).await;
    }

    /// Waits for its end; what takes longer is left behind.
    async fn join(mut self, patience: Duration) -> Result<(), DaemonError> {
        if !self.done.is_terminated() && timeout(patience, self.ended()).await.is_err() {
            warn!("the thread {} does not end; left behind", self.name);
            return Ok(());
        }
        self.thread.join().map_err(|_| DaemonError::Panicked(self.name))
    }
}

fn source(config: &Config, pace: &Pace) -> Result<Box<dyn FrameSource>, CameraError> {
    let camera = &config.camera;
    match camera.source {
        #[cfg(feature = "camera")]
        Source::V4l2 => {
            let wanted = camera::v4l2::Wanted {
                width: camera.width,
                height: camera.height,
                fps: camera.fps,
                format: camera.format,
            };
            Ok(Box::new(camera::v4l2::V4l2::new(camera.device.clone(), wanted)))
        }
        #[cfg(not(feature = "camera"))]
        Source::V4l2 => Err(CameraError::NotBuilt),
        Source::Rpicam => Ok(Box::new(Rpicam::new(rpicam::Wanted {
            command: camera.rpicam.command.clone(),
            width: camera.width,
            height: camera.height,
            fps: camera.fps,
            frame_bytes_max: camera.frame_bytes_max as usize,
        }))),
        Source::Replay => {
            let images = replay::images(&camera.replay.path)?;
            let looped = camera.replay.looped;
            Ok(Box::new(replay::Replay::new(images, pace.clone(), looped, camera.frame_bytes_max)))
        }
    }
}

/// What a daemon runs on: one thread, the caller's.
pub fn runtime() -> Result<Runtime, DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|source| DaemonError::Thread { name: "mqtt", source })
}

/// Tells the counters at an interval, for ever: the log, and `systemctl status`.
async fn log_counters(counters: &Counters, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        info!("{counters}");
        systemd::notify_status(&counters.to_string());
    }
}
