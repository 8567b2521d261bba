//! The daemon: starts the threads of the stages, makes the channels between them, joins them.
//!
//! `camera` (a thread) → mailbox → `vision` (a thread: decode, classify, decide) → event queue and newest observation → `mqtt`
//! (the thread that called [`Daemon::run`]). Each stage ends when the one before it has ended, so that every decided event is
//! published. Beside them, `update` (a thread) receives models from `mqtt` and hands them to `vision`.

use std::future::Future;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use bloomcast_kernels::ThreadPool;
use tokio::runtime::Runtime;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tracing::{error, info, warn};

use crate::bundle::Keyring;
use crate::bundle::signature::KeyError;
use crate::camera::{self, CameraError, FrameSource, NextFrame, Pace, latest};
use crate::config::{Config, ConfigError};
use crate::decide::{Decider, UnknownClass};
use crate::mqtt::device_client::{self, Announcements, DeviceClient, KeptConnection, StoppedClient};
use crate::mqtt::events::forward_events;
use crate::mqtt::message::Encoder;
use crate::mqtt::outbox::{Outbox, OutboxLimits};
use crate::mqtt::{DiscoveryRecord, ModelAnnouncement};
use crate::system::{Counters, Heartbeat, LogLimiter, systemd};
use crate::update::device::agent::{AgentHandles, AgentOutputs, announce};
use crate::update::device::model_loader::ModelError;
use crate::update::device::store::State;
use crate::update::device::{ActiveModel, ModelLoader, Store, UpdateAgent};
use crate::vision::quality::QualityMeter;
use crate::vision::{BackboneError, FrameDiff, FrameFilter, Labels, View, decode};
use crate::vision_stage::{ActiveSettings, Commands, OnClassified, Publisher, VisionOptions, VisionStage};

/// Settings that wait for the vision thread.
const SETTINGS_MAX: usize = 16;
/// Events that wait for the broker's thread, which moves them to the outbox at once.
const EVENTS_MAX: usize = 256;
/// The longest wait for the end of the vision thread, which may be classifying a frame.
const VISION_TIMEOUT: Duration = Duration::from_millis(800);
/// The longest wait for the end of the camera's thread.
const CAMERA_TIMEOUT: Duration = Duration::from_millis(300);
/// The longest wait for the end of the update agent's thread, which may be validating a model.
const UPDATE_TIMEOUT: Duration = Duration::from_millis(300);
/// The longest wait for the event forwarder. Bounded because a vision thread that does not end keeps the sender open.
const FORWARDER_TIMEOUT: Duration = Duration::from_millis(100);
/// Limits of the update agent's answers that wait for the broker.
const AGENT_OUTBOX_LIMITS: OutboxLimits = OutboxLimits { entries_max: 64, bytes_max: 256 << 10 };

/// An error of the daemon.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The processor lacks the configured kernels.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The active model cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Thresholds are configured for a class that the model does not have.
    #[error("decide.classes: {0}")]
    Classes(#[from] UnknownClass),
    /// The trusted keys cannot be read.
    #[error("model.trusted_keys: {0}")]
    Keys(#[from] KeyError),
    /// The backbone failed.
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    /// The camera's settings are wrong, or it gives no frames.
    #[error("camera: {0}")]
    Camera(#[from] CameraError),
    /// A thread cannot be started.
    #[error("cannot start the thread {name}: {source}")]
    Thread {
        /// Name of the thread.
        name: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// A thread panicked; its name.
    #[error("the thread {0} panicked; see the message above")]
    Panicked(&'static str),
}

impl DaemonError {
    /// Returns whether a changed configuration can correct the error; false for an error of a thread.
    pub fn is_configuration(&self) -> bool {
        match self {
            DaemonError::Thread { .. } | DaemonError::Panicked(_) => false,
            DaemonError::Config(_)
            | DaemonError::Model(_)
            | DaemonError::Classes(_)
            | DaemonError::Keys(_)
            | DaemonError::Backbone(_)
            | DaemonError::Camera(_) => true,
        }
    }
}

/// The reason why a daemon stops.
#[derive(Debug, Clone)]
pub enum StopReason {
    /// The program ends.
    Stop,
    /// A daemon with this configuration, which was checked, takes its place.
    Reload(Box<Config>),
}

/// A daemon that has stopped, with the state that its successor continues.
pub struct StoppedDaemon {
    /// The reason why it stopped.
    pub reason: StopReason,
    counters: Arc<Counters>,
    /// Events that the broker has not acknowledged.
    outbox: Outbox,
    /// Answers of the update agent that the broker has not acknowledged.
    agent_outbox: Outbox,
    /// The decision state; `None` if the vision thread did not end in time.
    decider: Option<Decider>,
    /// The connection, if the next daemon has the same options of the connection.
    connection: Option<KeptConnection>,
    /// The topics on which discovery was published.
    discovery_record: DiscoveryRecord,
}

impl StoppedDaemon {
    /// Logs the lost messages and the counters; returns the counters.
    pub fn close(self) -> Arc<Counters> {
        if !self.outbox.is_empty() {
            error!("{} events were not acknowledged by the broker and are lost", self.outbox.len());
            self.counters.events_lost.add(self.outbox.len() as u64);
        }
        if !self.agent_outbox.is_empty() {
            warn!("{} answers about models were not acknowledged by the broker and are lost", self.agent_outbox.len());
        }
        info!("{}", self.counters);
        self.counters
    }
}

/// A daemon whose configuration, model and camera settings were checked.
///
/// # Examples
/// ```
/// use bloomcast::config::Config;
/// use bloomcast::daemon::Daemon;
/// use bloomcast::vision::test_pattern;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // One image as the camera, no store, and no broker at this port: the outbox keeps the events.
/// let dir = tempfile::tempdir()?;
/// std::fs::write(dir.path().join("frame.jpg"), test_pattern::jpeg(320, 240))?;
/// let settings = [
///     "camera.source=replay".to_owned(),
///     format!("camera.replay.path={}", dir.path().display()),
///     "camera.replay.looped=false".to_owned(),
///     "model.store=".to_owned(),
///     "mqtt.port=1".to_owned(),
/// ];
/// let daemon = Daemon::prepare(Config::from_settings(&settings)?)?;
/// assert!(daemon.model().starts_with("flowers "));
///
/// // It stops by itself after the last image.
/// let stopped = daemon.run(std::future::pending(), Box::new(|frame| println!("{:?}", frame.class)))?;
/// assert_eq!(stopped.close().classified.get(), 1);
/// # Ok(())
/// # }
/// ```
pub struct Daemon {
    config: Config,
    loader: ModelLoader,
    active: ActiveModel,
    decider: Decider,
    source: Box<dyn FrameSource>,
    pace: Pace,
    counters: Arc<Counters>,
    outbox: Outbox,
    agent_outbox: Outbox,
    /// The messages about the active model.
    announcement: watch::Sender<ModelAnnouncement>,
    connection: Option<KeptConnection>,
    discovery_record: DiscoveryRecord,
}

impl Daemon {
    /// Loads the active model and checks the configuration, without opening the camera or a connection to the broker. The store
    /// is changed as a start requires: a trial begins or, after a crash, is rolled back. The configuration needs the broker's
    /// credentials if the broker requires them: [`Config::with_credentials`].
    ///
    /// # Errors
    /// If the model, the keys or the camera's settings cannot be used, or threads cannot be started.
    pub fn prepare(config: Config) -> Result<Self, DaemonError> {
        Self::with_store(config, Store::new)
    }

    /// As [`Daemon::prepare`], without changing the store.
    ///
    /// # Errors
    /// As [`Daemon::prepare`].
    pub fn check(config: Config) -> Result<Self, DaemonError> {
        Self::with_store(config, Store::read_only)
    }

    fn with_store(config: Config, open: fn(&Path) -> Store) -> Result<Self, DaemonError> {
        Keyring::read(&config.update.trusted_keys)?;
        let pace = Pace::new(config.camera.interval_ms);
        let source = config.camera.source.create(&pace)?;
        let isa = config.isa()?;
        let thread_pool = ThreadPool::with_threads(config.threads);
        let thread_pool = thread_pool.map_err(|source| DaemonError::Thread { name: "kernels", source })?;
        // Last: an error in the configuration must not end a model's trial.
        let loader = ModelLoader::new(&config.models, isa, open).with_thread_pool(thread_pool).with_view(config.view);
        let active = loader.load_at_start()?;
        let labels = active.loaded.classifier.labels().clone();
        // A device with a used store may switch between models: thresholds for classes of another one are not an error.
        let rules = match active.state == State::default() {
            true => config.update.policy.rules(&labels)?,
            false => config.update.policy.rules_for_known(&labels),
        };
        let decider = Decider::new(rules, labels, active.loaded.model.manifest.version, SystemTime::now());
        let (outbox, agent_outbox) = (Outbox::new(config.outbox), Outbox::new(AGENT_OUTBOX_LIMITS));
        let announcement = watch::Sender::new(announce(&loader, &active.loaded.model, &active.state));
        let discovery_record = DiscoveryRecord::read(config.models.store.as_deref());
        Ok(Daemon {
            config,
            loader,
            active,
            decider,
            source,
            pace,
            counters: Arc::default(),
            outbox,
            agent_outbox,
            announcement,
            connection: None,
            discovery_record,
        })
    }

    /// Continues a daemon that has stopped: its connection, its counters, its unacknowledged messages, a pause and, if the
    /// classes are the same, its observation.
    pub fn resume(mut self, stopped: StoppedDaemon) -> Self {
        let StoppedDaemon { counters, outbox, agent_outbox, decider, connection, discovery_record, .. } = stopped;
        // Messages may be in flight on the connection: the outboxes stay as they are.
        self.outbox = outbox;
        self.agent_outbox = agent_outbox;
        let lost = self.outbox.set_limits(self.config.outbox);
        if lost > 0 {
            error!("{lost} events lost: mqtt.outbox_entries_max or outbox_bytes_max is smaller now");
            counters.events_lost.add(lost as u64);
        }
        (self.connection, self.discovery_record) =
            (connection, discovery_record.at(self.config.models.store.as_deref()));
        self.counters = counters;
        match decider {
            Some(mut decider) if decider.labels() == self.labels() => {
                *decider.rules_mut() = self.decider.rules_mut().clone();
                decider.set_model(self.active.loaded.model.manifest.version);
                self.decider = decider;
            }
            // The observation of other classes ends; a pause continues.
            Some(decider) if decider.paused() => drop(self.decider.set_paused(true, SystemTime::now())),
            _ => {}
        }
        self
    }

    /// Returns the daemon with another frame source than the configured one.
    pub fn with_source(mut self, source: Box<dyn FrameSource>) -> Self {
        self.source = source;
        self
    }

    /// Returns the name and version of the active model.
    pub fn model(&self) -> String {
        self.active.loaded.model.identity().to_string()
    }

    /// Returns the reason why the active model is not the one that was installed last; `None` if it is.
    pub fn fallback_reason(&self) -> Option<&str> {
        self.active.state.fallback_reason.as_deref()
    }

    /// Returns how the active model classifies frames.
    pub fn view(&self) -> View {
        self.active.loaded.classifier.view()
    }

    /// Returns the classes of the active model.
    pub fn labels(&self) -> &Labels {
        self.active.loaded.classifier.labels()
    }

    /// Waits for one frame, at most `camera.stall_ms`, and classifies it.
    ///
    /// # Errors
    /// If the camera gives no frame that can be classified.
    pub fn try_camera(&mut self) -> Result<(), DaemonError> {
        self.source.open()?;
        let stall = self.config.camera.stall;
        let began = Instant::now();
        let frame = loop {
            let left = stall.saturating_sub(began.elapsed());
            match self.source.next(left)? {
                NextFrame::Frame(frame) => break frame,
                NextFrame::Pending if left.is_zero() => return Err(CameraError::Stalled(stall.as_millis()).into()),
                NextFrame::Pending => {}
                NextFrame::Broken(reason) => return Err(CameraError::Broken(reason).into()),
                NextFrame::Ended => return Err(CameraError::Ended.into()),
            }
        };
        self.source.close();
        let picture = decode::picture(&frame.picture).map_err(|e| CameraError::Broken(e.to_string()))?;
        let picture = self.config.camera.transform.apply(picture);
        self.active.loaded.classifier.classify_by_view(&picture)?;
        Ok(())
    }

    /// Runs until `stop` is ready or the camera has no more frames. `on_classified` is called for each classified frame.
    ///
    /// # Errors
    /// If a thread cannot be started, or panics.
    pub fn run(
        self,
        stop: impl Future<Output = StopReason>,
        on_classified: OnClassified,
    ) -> Result<StoppedDaemon, DaemonError> {
        let runtime = runtime()?;
        let stopped = self.run_on(&runtime, stop, on_classified);
        // A drop would wait for a pending name lookup.
        runtime.shutdown_background();
        stopped
    }

    /// As [`Daemon::run`], on a runtime that outlives the daemon.
    ///
    /// # Errors
    /// As [`Daemon::run`].
    pub fn run_on(
        mut self,
        runtime: &Runtime,
        stop: impl Future<Output = StopReason>,
        on_classified: OnClassified,
    ) -> Result<StoppedDaemon, DaemonError> {
        let (counters, outbox, agent_outbox) = (self.counters.clone(), self.outbox.clone(), self.agent_outbox.clone());
        let log_interval = self.config.log.counters_interval;
        let model = self.model();
        let heartbeats = [Heartbeat::new("camera"), Heartbeat::new("vision")];
        let kept = self.connection.take();
        let config = self.config.clone();
        let (stages, client, forwarder, decider) = self.start(on_classified, &heartbeats)?;
        systemd::notify_ready(&format!("{model} is active"));
        let monitors = async {
            tokio::join!(log_counters(&counters, log_interval), systemd::feed_watchdog(&heartbeats));
        };
        let client = |stopped| client.run(kept, stopped);
        let (reason, StoppedClient { connection, discovery_record }) =
            runtime.block_on(run_stages(stages, client, &config, forwarder, stop, monitors))?;
        let decider = decider.try_recv().ok();
        Ok(StoppedDaemon { reason, counters, outbox, agent_outbox, decider, connection, discovery_record })
    }

    /// Makes the channels and starts the threads. Returns them with the MQTT client and the event forwarder, which the caller runs,
    /// and the receiver of the decision state.
    fn start(
        self,
        on_classified: OnClassified,
        heartbeats: &[Heartbeat; 2],
    ) -> Result<(StageThreads, DeviceClient, EventForwarder, mpsc::Receiver<Decider>), DaemonError> {
        let Daemon { config, loader, active, mut decider, mut source, pace, counters, .. } = self;
        let Daemon { outbox, agent_outbox, announcement, discovery_record, .. } = self;
        let [camera_heartbeat, vision_heartbeat] = heartbeats.clone();
        let Config { camera, connection, topics, update, discovery, .. } = config;
        let (settings_sender, settings) = mpsc::sync_channel(SETTINGS_MAX);
        let (swap_sender, swaps) = mpsc::sync_channel(1);
        let (frames, mailbox) = latest::mailbox();
        let (stop, stopped) = watch::channel(false);
        let (agent, classifier, AgentHandles { commands, announcement: newest_announcement, trial_observer }) =
            UpdateAgent::new(
                update,
                topics.clone(),
                loader,
                active,
                AgentOutputs { announcement, agent_outbox: agent_outbox.clone(), swaps: swap_sender },
                stopped.clone(),
            );
        let (publisher, events, state) = Publisher::new(&mut decider, EVENTS_MAX, counters.clone());
        let supervisor = camera.supervisor(&pace);
        let filter = FrameFilter {
            diff: FrameDiff::new(camera.still_threshold),
            quality: QualityMeter::new(camera.quality_limits),
        };
        let transform = camera.transform;
        let options = VisionOptions { pace: pace.clone(), lost_after: camera.stall, transform, filter };
        let (in_force, active_settings) = watch::channel(ActiveSettings::new(&decider, &pace));
        let vision_commands = Commands { settings, swaps, trial_observer, active_settings: in_force };
        let vision = VisionStage::new(mailbox, classifier, decider, publisher, vision_commands, options, on_classified);
        let encoder = Encoder { device: topics.device().to_string(), camera: camera.name };
        let forwarder = forward_events(events, encoder.clone(), topics.event(), outbox.clone(), counters.clone());
        let client = DeviceClient {
            options: connection,
            topics,
            encoder,
            discovery,
            discovery_record,
            announcements: Announcements::new(newest_announcement),
            state,
            active_settings,
            outbox,
            agent_outbox,
            settings: settings_sender,
            commands: Box::new(move |command| commands.try_send(command).is_ok()),
            counters: counters.clone(),
            refused: LogLimiter::new("messages refused"),
        };
        let camera = StageThread::spawn("camera", move || {
            camera::supervise(source.as_mut(), &supervisor, &frames, &counters, &camera_heartbeat);
        })?;
        let update = StageThread::spawn("update", move || agent.run())?;
        let (decider_sender, last_decider) = mpsc::sync_channel(1);
        let vision = StageThread::spawn("vision", move || {
            let decider = vision.run(&stopped, &vision_heartbeat);
            // The receiver is gone if this thread took too long to end.
            let _ = decider_sender.send(decider);
        })?;
        Ok((StageThreads { camera, vision, update, stop }, client, Box::pin(forwarder), last_decider))
    }
}

/// A future that moves events from the vision stage to the outbox: [`forward_events`].
type EventForwarder = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs daemons one after the other, each with the configuration that `next` gives when it asks for a reload. A daemon that
/// cannot be prepared again is replaced by one with the configuration before.
///
/// # Errors
/// If the first daemon cannot be prepared, or a running one fails.
pub fn run_with_reloads(
    runtime: &Runtime,
    mut config: Config,
    mut next: impl AsyncFnMut() -> StopReason,
) -> Result<Arc<Counters>, DaemonError> {
    let mut daemon = Daemon::prepare(config.clone())?;
    match config.isa()? {
        Some(isa) => info!("kernels: {}, threads: {}", isa.name(), config.threads),
        None => info!("kernels: tract"),
    }
    loop {
        info!("ready: the model {} has the classes {}", daemon.model(), daemon.labels().names().join(", "));
        info!("frames are {}", if daemon.view() == View::Scan { "scanned" } else { "classified as a whole" });
        let running = daemon.announcement.subscribe();
        let stop = async {
            loop {
                match next().await {
                    StopReason::Reload(changed) if is_running(&changed, &config, &running).await => {
                        info!("the configuration and the model are unchanged: nothing to reload");
                        systemd::notify_ready("nothing to reload");
                    }
                    reason => break reason,
                }
            }
        };
        let stopped = daemon.run_on(runtime, stop, Box::new(|_| {}))?;
        let StopReason::Reload(changed) = &stopped.reason else { return Ok(stopped.close()) };
        let prepared = match Daemon::prepare((**changed).clone()) {
            Ok(prepared) => {
                config = (**changed).clone();
                Ok(prepared)
            }
            Err(error) => {
                error!("configuration reload failed, keeping the current configuration: {error}");
                Daemon::prepare(config.clone())
            }
        };
        daemon = match prepared {
            Ok(prepared) => prepared.resume(stopped),
            Err(error) => {
                stopped.close();
                return Err(error);
            }
        };
    }
}

/// Returns whether a daemon of the changed configuration would be like the running one: the same settings, model and store.
async fn is_running(changed: &Config, running: &Config, model: &watch::Receiver<ModelAnnouncement>) -> bool {
    if changed != running {
        return false;
    }
    let config = changed.clone();
    // In a thread of its own: loading the model must not block the connection to the broker.
    let checked =
        tokio::task::spawn_blocking(move || Daemon::check(config).map(|daemon| daemon.announcement.borrow().clone()));
    checked.await.is_ok_and(|checked| checked.is_ok_and(|checked| checked == *model.borrow()))
}

/// The threads before the MQTT client.
struct StageThreads {
    camera: StageThread,
    vision: StageThread,
    update: StageThread,
    stop: watch::Sender<bool>,
}

/// Runs the MQTT client until there is a reason to stop, then ends one stage after the other. No stage can delay the client's
/// shutdown for long. The client keeps its connection for a configuration that has the same options of it.
async fn run_stages<C: Future<Output = StoppedClient> + Send + 'static>(
    mut stages: StageThreads,
    client: impl FnOnce(watch::Receiver<device_client::Stop>) -> C,
    config: &Config,
    forwarder: EventForwarder,
    stop: impl Future<Output = StopReason>,
    monitors: impl Future<Output = ()>,
) -> Result<(StopReason, StoppedClient), DaemonError> {
    let (stop_client, client_stopped) = watch::channel(device_client::Stop::No);
    let mut forwarder = tokio::spawn(forwarder);
    let mut client = tokio::spawn(client(client_stopped));
    let reason = tokio::select! {
        reason = stop => reason,
        () = stages.vision.ended() => StopReason::Stop,
        // It ends by itself only if it panicked, which its join reports.
        () = stages.update.ended() => StopReason::Stop,
        () = monitors => StopReason::Stop,
        // It ends by itself only if it panicked.
        _ = &mut client => return Err(DaemonError::Panicked("mqtt")),
    };
    match reason {
        StopReason::Stop => {
            info!("stopping");
            systemd::notify_stopping();
        }
        StopReason::Reload(_) => info!("reloading the configuration"),
    }
    let hands_over = matches!(&reason, StopReason::Reload(changed) if changed.has_connection_of(config));
    if hands_over {
        // First: what the broker sends from now on waits for the next client, whose stages can take it.
        stop_client.send_replace(device_client::Stop::HandOver);
    }
    stages.stop.send_replace(true);
    let vision = stages.vision.join(VISION_TIMEOUT).await;
    let camera = stages.camera.join(CAMERA_TIMEOUT).await;
    let update = stages.update.join(UPDATE_TIMEOUT).await;
    // A vision thread that is left running may still send events: they reach the outbox until the client has stopped.
    let drained = timeout(FORWARDER_TIMEOUT, &mut forwarder).await;
    if !hands_over {
        stop_client.send_replace(device_client::Stop::Disconnect);
    }
    let client = client.await.map_err(|_| DaemonError::Panicked("mqtt"));
    match drained {
        Ok(ended) => ended.map_err(|_| DaemonError::Panicked("mqtt"))?,
        Err(_) => forwarder.abort(),
    }
    vision.and(camera).and(update).and(client).map(|client| (reason, client))
}

/// A thread whose end can be awaited.
struct StageThread {
    name: &'static str,
    thread: thread::JoinHandle<()>,
    done: oneshot::Receiver<()>,
}

impl StageThread {
    fn spawn(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<Self, DaemonError> {
        let (running, done) = oneshot::channel::<()>();
        let work = move || {
            // Dropped when the work ends, also by a panic.
            let _running = running;
            work();
        };
        let thread = thread::Builder::new().name(name.into()).spawn(work);
        Ok(StageThread { name, thread: thread.map_err(|source| DaemonError::Thread { name, source })?, done })
    }

    async fn ended(&mut self) {
        // An error means that the sender was dropped: the thread has ended.
        let _ = (&mut self.done).await;
    }

    /// Waits for the thread's end; a thread that takes longer than `patience` is left running.
    async fn join(mut self, patience: Duration) -> Result<(), DaemonError> {
        if !self.done.is_terminated() && timeout(patience, self.ended()).await.is_err() {
            warn!("the thread {} does not end; it is left running", self.name);
            return Ok(());
        }
        self.thread.join().map_err(|_| DaemonError::Panicked(self.name))
    }
}

/// Creates the runtime of a daemon: one thread, the caller's.
///
/// # Errors
/// If the system cannot create the runtime's event queue (epoll).
pub fn runtime() -> Result<Runtime, DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|source| DaemonError::Thread { name: "mqtt", source })
}

/// Logs the counters at an interval and shows them in `systemctl status`; never returns.
async fn log_counters(counters: &Counters, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        info!("{counters}");
        systemd::notify_status(&counters.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::test_pattern;

    fn config(folder: &Path, more: &[&str]) -> Config {
        let mut settings = vec![
            "camera.source=replay".into(),
            format!("camera.replay.path={}", folder.display()),
            "model.store=".into(),
            "mqtt.port=1".into(),
        ];
        settings.extend(more.iter().map(|setting| (*setting).to_owned()));
        Config::from_settings(&settings).unwrap()
    }

    #[test]
    fn a_reload_that_cannot_be_prepared_keeps_the_configuration() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.jpg"), test_pattern::jpeg(64, 64)).unwrap();
        let runtime = runtime().unwrap();
        let missing = Box::new(config(folder.path(), &["model.bundle=missing.bloom"]));
        assert!(Daemon::prepare((*missing).clone()).err().unwrap().is_configuration());
        let mut reasons = [StopReason::Reload(missing), StopReason::Stop].into_iter();
        let next = async || reasons.next().expect("the daemon runs twice");
        run_with_reloads(&runtime, config(folder.path(), &[]), next).unwrap();
        assert!(reasons.next().is_none(), "the daemon ran again, with the configuration before");
        runtime.shutdown_background();
    }

    #[test]
    fn an_error_of_a_thread_is_not_a_configuration_error() {
        assert!(!DaemonError::Panicked("vision").is_configuration());
        let source = std::io::Error::other("no memory");
        assert!(!DaemonError::Thread { name: "camera", source }.is_configuration());
    }
}
