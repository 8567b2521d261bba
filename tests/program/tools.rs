//! Helpers of the tests: child processes that end with their test, waits with a timeout, drawings and photographs.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use bloomcast::bundle::Bundle;
use bloomcast::demo::drawing;
use bloomcast::train::features::compute_device::ComputeDeviceChoice;
use bloomcast::train::{Recipe, RunOptions};
use bloomcast::vision::decode;
use serde_json::Value;

/// The timeout of a wait, long enough for a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The largest allowed difference of a probability, or of a feature relative to the largest one, between the kernels and tract.
pub const KERNEL_TOLERANCE: f32 = 1e-4;

pub fn bloomcast() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bloomcast"));
    // The tests have their own cache folder, and connections to this machine bypass a proxy.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).env("NO_PROXY", "127.0.0.1").env_remove("ALL_PROXY");
    // The caller's settings and the models installed on this machine must not affect a test.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BLOOMCAST__")) {
        command.env_remove(name);
    }
    command.env("BLOOMCAST__MODEL__STORE", "").env("BLOOMCAST__MODEL__TRUSTED_KEYS", "");
    command
}

/// A child process that is killed when it is dropped; its standard error is kept line by line.
pub struct Process {
    child: Child,
    lines: Arc<(Mutex<Vec<String>>, Condvar)>,
}

impl Process {
    pub fn start(command: &mut Command) -> Self {
        Process::start_with_output(command, Stdio::null())
    }

    pub fn start_with_output(command: &mut Command, output: impl Into<Stdio>) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}; `make setup` installs what the tests need"));
        let lines: Arc<(Mutex<Vec<String>>, Condvar)> = Arc::default();
        let (stderr, log) = (child.stderr.take().unwrap(), lines.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                log.0.lock().unwrap().push(line);
                log.1.notify_all();
            }
        });
        Process { child, lines }
    }

    /// Waits for a line of the log that contains `text` and returns it.
    pub fn line(&self, text: &str) -> String {
        self.lines_with(text, 1).remove(0)
    }

    /// Waits until `count` lines of the log contain `text`; returns all that do.
    pub fn lines_with(&self, text: &str, count: usize) -> Vec<String> {
        let deadline = Instant::now() + TIMEOUT;
        let mut lines = self.lines.0.lock().unwrap();
        loop {
            let found: Vec<String> = lines.iter().filter(|line| line.contains(text)).cloned().collect();
            if found.len() >= count {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} of {count} lines with {text:?} in:\n{}", found.len(), lines.join("\n"));
            lines = self.lines.1.wait_timeout(lines, left).unwrap().0;
        }
    }

    pub fn log(&self) -> String {
        self.lines.0.lock().unwrap().join("\n")
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.id().to_string()]).status();
        assert!(status.unwrap().success(), "kill -{name}");
    }

    /// Waits at most `timeout` for the process to exit and returns its status.
    pub fn wait_for_exit(&mut self, timeout: Duration) -> ExitStatus {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "still runs after {timeout:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn kill(&mut self) {
        self.signal("KILL");
        self.wait_for_exit(TIMEOUT);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to completion; kills it and panics after a timeout.
pub fn output(command: &mut Command) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = child.id();
    let (finished, finish) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let timed_out = finish.recv_timeout(5 * TIMEOUT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if timed_out {
            Command::new("kill").args(["-KILL", &id.to_string()]).status().unwrap();
        }
        timed_out
    });
    let output = child.wait_with_output().unwrap();
    drop(finished);
    assert!(!watchdog.join().unwrap(), "{command:?} timed out");
    output
}

/// Runs a command that must fail; returns its exit code and standard error.
pub fn failure(command: &mut Command) -> (i32, String) {
    let output = output(command);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code().expect("an exit code, not a signal"), text)
}

/// Runs a command that must succeed; returns the JSON document that it prints.
pub fn json(command: &mut Command) -> Value {
    let output = output(command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON document on standard output")
}

/// Returns a port of 127.0.0.1 that is free at the time of the call.
pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Waits until a process listens on a port of 127.0.0.1.
pub fn wait_for_port(port: u16) {
    wait_until("a listener", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
}

pub fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !ready() {
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns the folder of real photographs, with a subfolder for each class, if it exists.
pub fn photographs_folder() -> Option<PathBuf> {
    Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/flowers/val")).filter(|folder| folder.is_dir())
}

/// The same; if it is missing, prints that the test is skipped.
pub fn photographs(test: &str) -> Option<PathBuf> {
    if let Some(folder) = photographs_folder() {
        return Some(folder);
    }
    report(&format!("skipped: {test}: no photographs in ../shared/flowers/val"));
    None
}

/// Prints a line for `make test`. It bypasses the capture of the test's output, and is written at once, so that no line of another
/// test falls into it.
pub fn report(line: &str) {
    let _ = std::io::stderr().write_all(format!("\n{line}\n").as_bytes());
}

/// Returns the first `count` photographs of a class.
pub fn of_class(folder: &Path, class: &str, count: usize) -> Vec<PathBuf> {
    let mut images: Vec<PathBuf> =
        std::fs::read_dir(folder.join(class)).unwrap().map(|entry| entry.unwrap().path()).collect();
    images.sort();
    images.truncate(count);
    assert_eq!(images.len(), count, "photographs of {class}");
    images
}

/// Drawings of five kinds of flowers, under the class names of the built-in model, and a bundle trained on others of them.
pub struct DrawnFlowers {
    /// Folder with a subfolder for each class.
    pub folder: PathBuf,
    /// The bundle.
    pub bundle: PathBuf,
}

/// Returns the drawings; the first call draws them and trains the model, which takes a few seconds.
pub fn drawn_flowers() -> &'static DrawnFlowers {
    static DRAWN: OnceLock<DrawnFlowers> = OnceLock::new();
    DRAWN.get_or_init(|| {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("drawn-flowers");
        let _ = std::fs::remove_dir_all(&root);
        let (train, folder, out) = (root.join("train"), root.join("flowers"), root.join("run"));
        draw(&train, 1, 24);
        draw(&folder, 2, 40);
        let mut settings = Recipe::Frozen.settings(train);
        settings.hyperparams.epochs = 30;
        let options = RunOptions {
            out: out.clone(),
            overwrite: false,
            cache: None,
            threads: 2,
            device: ComputeDeviceChoice::Cpu,
            created_at: SystemTime::now(),
        };
        bloomcast::train::train(&settings, &options, &|_| {}).unwrap();
        DrawnFlowers { folder, bundle: out.join("model.bloom") }
    })
}

/// Draws `count` flowers of each class.
fn draw(folder: &Path, seed: u64, count: usize) {
    std::fs::create_dir_all(folder).unwrap();
    drawing::dataset(folder, drawing::five_flowers(), count, &mut fastrand::Rng::with_seed(seed)).unwrap();
}

/// Returns `count` drawings of a class that the drawn flowers' model classifies correctly with a confidence above 0.9, so that
/// the tests of the daemon do not depend on the model's errors.
pub fn confident_drawings(class: &str, count: usize) -> Vec<PathBuf> {
    let DrawnFlowers { folder, bundle } = drawn_flowers();
    confident(&Bundle::read(bundle).unwrap(), of_class(folder, class, 40), class, count)
}

/// Returns `count` photographs of a class that the built-in model classifies correctly with a confidence above 0.9.
pub fn confident_photographs(folder: &Path, class: &str, count: usize) -> Vec<PathBuf> {
    confident(&Bundle::built_in().unwrap(), of_class(folder, class, 50), class, count)
}

fn confident(bundle: &Bundle, images: Vec<PathBuf>, class: &str, count: usize) -> Vec<PathBuf> {
    let mut classifier = bundle.classifier(None).unwrap();
    let expected = classifier.labels().position(class);
    let mut is_confident = |image: &PathBuf| {
        let prediction = classifier.classify(&decode::file(image).unwrap()).unwrap().0;
        prediction.class() == expected && prediction.confidence() > 0.9
    };
    let found: Vec<PathBuf> = images.into_iter().filter(|image| is_confident(image)).take(count).collect();
    assert_eq!(found.len(), count, "images of {class} with a confident prediction");
    found
}

/// Writes a list of images for the replay into a temporary folder; returns the folder and the list's path.
pub fn replay_list(images: &[PathBuf]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list.txt");
    let lines: Vec<String> = images.iter().map(|image| image.canonicalize().unwrap().display().to_string()).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    (dir, path)
}
