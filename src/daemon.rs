//! The daemon: the only file that starts the stages' threads and makes the channels between them.
//!
//! `camera` (a thread) → mailbox → `vision` (a thread: decode, classify, decide) → outbox and state →
//! `mqtt` (the thread that called [`Daemon::run`]). Each stage ends when the one before it has ended, so
//! that what was decided is still said.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::bundle::{Bundle, BundleError};
use crate::camera::latest::{self, News, Taken};
use crate::camera::rpicam::{self, Rpicam};
use crate::camera::{self, CameraError, Frame, FrameSource, Next, Pace, replay};
use crate::config::{Config, ConfigError, Source};
use crate::decide::{Decider, Decision, Flicker};
use crate::health::Counters;
use crate::mqtt::{Link, LinkSettings, Outbox, Setting, discovery, message, topics::Topics};
use crate::vision::decode;
use crate::vision::{Backbone, BackboneError, Classifier, Prediction, Stages};

/// Settings from afar that wait for the vision thread.
const ORDERS_MAX: usize = 16;
/// How often the vision thread looks for settings while no frame comes.
const IDLE: Duration = Duration::from_millis(200);

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

/// A frame that was classified, for whoever wants to look on.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The file a replayed frame came from.
    pub origin: Option<PathBuf>,
    pub captured_at: SystemTime,
    pub prediction: Prediction,
    pub stages: Stages,
}

/// Called with each frame that was classified, on the vision thread.
pub type Observer = Box<dyn FnMut(Seen) + Send>;

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
        let (bundle, backbone) = load_model(&config)?;
        let classifier = bundle.classifier(&backbone)?;
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
        let (watching, watched) = oneshot::channel::<()>();

        let mut voice = Voice {
            decider: self.decider,
            sender,
            outbox: outbox.clone(),
            counters: self.counters.clone(),
            paused: false,
        };
        let blind = voice.decider.blind(SystemTime::now(), false);
        let (state, newest_state) = watch::channel(voice.sender.state(&blind.sight, false));
        let mut vision = Vision {
            mailbox,
            classifier: self.classifier,
            voice,
            state,
            orders: ordered,
            pace: self.pace.clone(),
            observer,
        };
        let link = Link {
            settings: self.link,
            topics: self.topics,
            fixed,
            state: newest_state,
            outbox,
            orders,
            counters: self.counters.clone(),
        };

        let (mut source, rules, counters) = (self.source, self.config.supervisor(&self.pace), self.counters.clone());
        let camera = spawn("camera", move || camera::watch(source.as_mut(), &rules, &frames, &counters))?;
        let (end_vision, ended) = watch::channel(false);
        let vision = spawn("vision", move || {
            vision.watch(&ended);
            drop(watching);
        })?;

        let log_interval = Duration::from_secs(self.config.log.counters_interval_s);
        let (end_link, link_ended) = watch::channel(false);
        runtime()?.block_on(async {
            let link = tokio::spawn(link.run(link_ended));
            tokio::select! {
                () = stop => info!("stopping"),
                // The vision thread is gone, and with it its end of the channel.
                _ = watched => info!("the camera has no more frames"),
                () = log_counters(&self.counters, log_interval) => {}
            }
            end_vision.send_replace(true);
            let joined = tokio::task::spawn_blocking(move || (camera.join().is_ok(), vision.join().is_ok())).await;
            end_link.send_replace(true);
            if link.await.is_err() {
                return Err(DaemonError::Panicked("mqtt"));
            }
            match joined {
                Ok((true, true)) => Ok(()),
                Ok((false, _)) => Err(DaemonError::Panicked("camera")),
                _ => Err(DaemonError::Panicked("vision")),
            }
        })?;
        info!("{}", self.counters);
        Ok(self.counters)
    }
}

/// The model and the network it stands on, as the configuration says.
pub fn load_model(config: &Config) -> Result<(Bundle, Backbone), DaemonError> {
    let path = &config.model.bundle;
    let bundle = if path.as_os_str().is_empty() { Bundle::built_in()? } else { Bundle::read(path)? };
    let path = &config.model.backbone;
    let backbone = if path.as_os_str().is_empty() {
        Backbone::built_in()?
    } else {
        Backbone::from_file(path, &bundle.manifest().preprocess)?
    };
    Ok((bundle, backbone))
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

fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<thread::JoinHandle<()>, DaemonError> {
    thread::Builder::new().name(name.into()).spawn(work).map_err(|source| DaemonError::Thread { name, source })
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

/// The thread from frames to decisions.
struct Vision {
    mailbox: latest::Receiver,
    classifier: Classifier,
    voice: Voice,
    state: watch::Sender<Vec<u8>>,
    orders: mpsc::Receiver<Setting>,
    pace: Pace,
    observer: Observer,
}

impl Vision {
    /// Works until the camera has ended or `stop` is set.
    fn watch(&mut self, stop: &watch::Receiver<bool>) {
        while !*stop.borrow() {
            self.obey();
            match self.mailbox.take(IDLE) {
                Taken::News(News::Frame(_)) if self.voice.paused => {}
                Taken::News(News::Frame(frame)) => self.look(frame),
                Taken::News(News::Lost { at, .. }) => {
                    let decision = self.voice.decider.blind(at, false);
                    self.say(&decision);
                }
                Taken::Nothing => {}
                Taken::Ended => return,
            }
        }
    }

    fn look(&mut self, frame: Frame) {
        let began = Instant::now();
        let picture = match decode::picture(&frame.picture) {
            Ok(picture) => picture,
            Err(error) => {
                self.voice.counters.broken.add(1);
                let from = frame.origin.map_or(String::new(), |path| format!("{}: ", path.display()));
                warn!("{from}a frame is broken and skipped: {error}");
                return;
            }
        };
        let decoded = began.elapsed();
        let (prediction, stages) = match self.classifier.classify(&picture) {
            Ok(classified) => classified,
            Err(error) => return error!("a frame could not be classified: {error}"),
        };
        self.voice.counters.classified.add(1);
        let decision = self.voice.decider.seen(&prediction, frame.captured_at);
        self.say(&decision);
        (self.observer)(Seen {
            origin: frame.origin,
            captured_at: frame.captured_at,
            prediction,
            stages: Stages { decode: decoded, ..stages },
        });
    }

    fn say(&mut self, decision: &Decision) {
        if let Some(state) = self.voice.say(decision) {
            self.state.send_replace(state);
        }
    }

    /// Does what was asked from afar.
    fn obey(&mut self) {
        while let Ok(setting) = self.orders.try_recv() {
            match self.apply(setting) {
                Ok(()) => info!("set from afar: {setting:?}"),
                Err(flicker) => warn!("the setting {setting:?} is left out: {flicker}"),
            }
        }
    }

    fn apply(&mut self, setting: Setting) -> Result<(), Flicker> {
        let rules = self.voice.decider.rules_mut();
        match setting {
            Setting::Enter(enter) => rules.set_enter(enter)?,
            Setting::Leave(leave) => rules.set_leave(leave)?,
            Setting::SmoothingMs(ms) => rules.smoothing = Duration::from_millis(ms),
            Setting::EnterDwellMs(ms) => rules.enter_dwell = Duration::from_millis(ms),
            Setting::LeaveDwellMs(ms) => rules.leave_dwell = Duration::from_millis(ms),
            Setting::IntervalMs(ms) => self.pace.set(ms),
            Setting::Pause(paused) => {
                self.voice.paused = paused;
                let decision = self.voice.decider.blind(SystemTime::now(), true);
                self.say(&Decision { tell: true, ..decision });
            }
        }
        Ok(())
    }
}

/// Turns decisions into messages.
struct Voice {
    decider: Decider,
    sender: message::Sender,
    outbox: Outbox,
    counters: Arc<Counters>,
    paused: bool,
}

impl Voice {
    /// Puts the event of a change into the outbox; gives the state where it is worth telling.
    fn say(&mut self, decision: &Decision) -> Option<Vec<u8>> {
        if let Some(previous) = decision.previous {
            let id = Uuid::now_v7();
            let labels = &self.sender.labels;
            info!(
                "event {id}: {} → {}, confidence {:.2}",
                labels.name(previous),
                labels.name(decision.sight.class),
                decision.sight.confidence
            );
            self.counters.events.add(1);
            let lost = self.outbox.push(self.sender.event(id, &decision.sight, previous));
            if !lost.is_empty() {
                self.counters.events_lost.add(lost.len() as u64);
                error!("the outbox is full: {} events are lost, oldest first; see mqtt.outbox_entries_max", lost.len());
            }
        }
        decision.tell.then(|| self.sender.state(&decision.sight, self.paused))
    }
}
