//! The daemon: the only file that starts the stages' threads and makes the channels between them.
//!
//! `camera` (a thread) → mailbox → `vision` (a thread: decode, classify, decide) → outbox and state →
//! `mqtt` (the thread that called [`Daemon::run`]). Each stage ends when the one before it has ended, so
//! that what was decided is still said.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::bundle::{Bundle, BundleError};
use crate::camera::latest;
use crate::camera::rpicam::{self, Rpicam};
use crate::camera::{self, CameraError, FrameSource, Next, Pace, replay};
use crate::config::{Config, ConfigError, Source};
use crate::decide::Decider;
use crate::health::Counters;
use crate::mqtt::{Link, LinkSettings, Outbox, discovery, message, topics::Topics};
use crate::vision::decode;
use crate::vision::{BackboneError, Classifier};
use crate::watcher::{Observer, Voice, Watcher};

/// Settings from afar that wait for the vision thread.
const ORDERS_MAX: usize = 16;
/// How long a stop waits for the vision thread, which may be at a frame, and then for the camera's.
const VISION_END: Duration = Duration::from_millis(800);
const CAMERA_END: Duration = Duration::from_millis(300);

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("model.bundle: {0}")]
    Bundle(#[from] BundleError),
    #[error("model.backbone: {0}")]
    Backbone(#[from] BackboneError),
    #[error("camera: {0}")]
    Camera(#[from] CameraError),
    #[error("cannot start the thread {name}: {source}")]
    Thread { name: &'static str, source: std::io::Error },
    #[error("the thread {0} panicked; its message stands above")]
    Panicked(&'static str),
}

/// A daemon whose configuration, model and camera settings were found good.
pub struct Daemon {
    config: Config,
    topics: Topics,
    link: LinkSettings,
    bundle: Bundle,
    classifier: Classifier,
    decider: Decider,
    source: Box<dyn FrameSource>,
    pace: Pace,
    counters: Arc<Counters>,
}

impl Daemon {
    /// Loads the model and checks what can be checked without the camera and the broker.
    pub fn prepare(config: Config) -> Result<Self, DaemonError> {
        let (bundle, classifier) = load_model(&config)?;
        let rules = config.rules(classifier.labels())?;
        let pace = Pace::new(config.camera.interval_ms);
        Ok(Daemon {
            topics: config.topics()?,
            link: config.link()?,
            source: source(&config, &pace)?,
            decider: Decider::new(rules, SystemTime::now()),
            bundle,
            classifier,
            config,
            pace,
            counters: Arc::default(),
        })
    }

    /// The model's name and version.
    pub fn model(&self) -> String {
        let manifest = self.bundle.manifest();
        format!("{} {}", manifest.name, manifest.version)
    }

    pub fn labels(&self) -> &crate::vision::Labels {
        self.classifier.labels()
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
        self.classifier.classify(&picture)?;
        Ok(())
    }

    /// Watches, decides and publishes until `stop` is ready or the camera has no more frames. Gives the
    /// final counts.
    pub fn run(self, stop: impl Future<Output = ()>, observer: Observer) -> Result<Arc<Counters>, DaemonError> {
        let counters = self.counters.clone();
        let log_interval = Duration::from_secs(self.config.log.counters_interval_s);
        let (stages, link) = self.start(observer)?;
        let runtime = runtime()?;
        let ended = runtime.block_on(conduct(stages, link, stop, log_counters(&counters, log_interval)));
        // Not dropped: that would wait for a name that is being looked up.
        runtime.shutdown_background();
        info!("{counters}");
        ended.map(|()| counters)
    }

    /// Makes the channels and starts the threads; the link is for the caller to run.
    fn start(self, observer: Observer) -> Result<(Stages, Link), DaemonError> {
        let labels = self.classifier.labels().clone();
        let sender = message::Sender {
            device: self.topics.device().to_string(),
            camera: self.config.camera.name.clone(),
            labels: labels.clone(),
            model: self.bundle.manifest().version,
        };
        let mut fixed = vec![(self.topics.model(), message::model(&self.bundle))];
        if self.config.mqtt.discovery.enabled {
            fixed.insert(0, (self.topics.discovery(), discovery::device(&self.topics, &labels)));
        }
        let outbox = Outbox::new(self.config.outbox());
        let (orders, ordered) = mpsc::sync_channel(ORDERS_MAX);
        let (frames, mailbox) = latest::mailbox();
        let rules = self.config.supervisor(&self.pace);
        let patience = Duration::from_millis(self.config.camera.stall_ms);
        let voice = Voice::new(self.decider, sender, outbox.clone(), self.counters.clone());
        let (mut watcher, state) =
            Watcher::new(mailbox, self.classifier, voice, ordered, self.pace, patience, observer);
        let link = Link {
            settings: self.link,
            topics: self.topics,
            fixed,
            state,
            outbox,
            orders,
            counters: self.counters.clone(),
        };
        let (mut source, counters) = (self.source, self.counters);
        let camera = Stage::spawn("camera", move || camera::watch(source.as_mut(), &rules, &frames, &counters))?;
        let (stop, stopped) = watch::channel(false);
        let vision = Stage::spawn("vision", move || watcher.watch(&stopped))?;
        Ok((Stages { camera, vision, stop }, link))
    }
}

/// The threads before the link.
struct Stages {
    camera: Stage,
    vision: Stage,
    stop: watch::Sender<bool>,
}

/// Lets the link talk until there is a reason to stop, then ends one stage after the other, none of
/// which can hold up the farewell for long.
async fn conduct(
    mut stages: Stages,
    link: Link,
    stop: impl Future<Output = ()>,
    log: impl Future<Output = ()>,
) -> Result<(), DaemonError> {
    let (end_link, link_ended) = watch::channel(false);
    let mut link = tokio::spawn(link.run(link_ended));
    tokio::select! {
        () = stop => info!("stopping"),
        () = stages.vision.ended() => {}
        () = log => {}
        // It ends by itself only where it panicked.
        _ = &mut link => return Err(DaemonError::Panicked("mqtt")),
    }
    stages.stop.send_replace(true);
    let vision = stages.vision.join(VISION_END).await;
    let camera = stages.camera.join(CAMERA_END).await;
    end_link.send_replace(true);
    link.await.map_err(|_| DaemonError::Panicked("mqtt"))?;
    vision.and(camera)
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

/// The model that the configuration names, and the model at work.
fn load_model(config: &Config) -> Result<(Bundle, Classifier), DaemonError> {
    fn named(path: &Path) -> Option<&Path> {
        (!path.as_os_str().is_empty()).then_some(path)
    }
    let bundle = named(&config.model.bundle).map_or_else(Bundle::built_in, Bundle::read)?;
    let file = named(&config.model.backbone);
    let classifier = bundle.classifier(file).map_err(|error| match (error, file) {
        (BundleError::Backbone(error), Some(_)) => DaemonError::Backbone(error),
        (error, _) => DaemonError::Bundle(error),
    })?;
    Ok((bundle, classifier))
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

fn runtime() -> Result<tokio::runtime::Runtime, DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|source| DaemonError::Thread { name: "mqtt", source })
}

/// Logs the counters at an interval, for ever.
async fn log_counters(counters: &Counters, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        info!("{counters}");
    }
}
