//! What the tests stand on: processes that end with the test, waits that are bounded.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bloomcast::bundle::Bundle;
use bloomcast::vision::decode;
use serde_json::Value;

/// Long enough for a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn bloomcast() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bloomcast"));
    // What a test keeps from run to run is its own, and the network is this machine.
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).env("NO_PROXY", "127.0.0.1").env_remove("ALL_PROXY");
    // No setting of the caller's reaches a test, and no model that is installed on this machine.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BLOOMCAST__")) {
        command.env_remove(name);
    }
    command.env("BLOOMCAST__MODEL__STORE", "").env("BLOOMCAST__MODEL__TRUSTED_KEYS", "");
    command
}

/// A program that runs until the test ends it; its standard error is kept line by line.
pub struct Process {
    child: Child,
    lines: Arc<(Mutex<Vec<String>>, Condvar)>,
}

impl Process {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}; `make setup` installs what the tests need"));
        let lines: Arc<(Mutex<Vec<String>>, Condvar)> = Arc::default();
        let (stderr, kept) = (child.stderr.take().unwrap(), lines.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                kept.0.lock().unwrap().push(line);
                kept.1.notify_all();
            }
        });
        Process { child, lines }
    }

    /// Waits for a line of the log that contains `text`; gives it.
    pub fn line(&self, text: &str) -> String {
        self.lines_with(text, 1).remove(0)
    }

    /// Waits until `count` lines of the log contain `text`; gives all that do.
    pub fn lines_with(&self, text: &str, count: usize) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
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

    /// Waits for the end, at most `patience`.
    pub fn ended(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "still runs after {patience:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn kill(&mut self) {
        self.signal("KILL");
        self.ended(PATIENCE);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end, bounded in time.
pub fn output(command: &mut Command) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = child.id();
    let (ended, watched) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        let hangs = watched.recv_timeout(5 * PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if hangs {
            Command::new("kill").args(["-KILL", &id.to_string()]).status().unwrap();
        }
        hangs
    });
    let output = child.wait_with_output().unwrap();
    drop(ended);
    assert!(!guard.join().unwrap(), "{command:?} hangs");
    output
}

/// The exit code and the standard error of a command that must fail.
pub fn failure(command: &mut Command) -> (i32, String) {
    let output = output(command);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code().expect("ended by itself"), text)
}

/// The one JSON document that a command that must succeed prints.
pub fn json(command: &mut Command) -> Value {
    let output = output(command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON document on standard output")
}

/// A port of 127.0.0.1 that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Waits until somebody listens on a port of 127.0.0.1.
pub fn wait_for_port(port: u16) {
    wait_until("a listener", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
}

pub fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !ready() {
        assert!(Instant::now() < deadline, "waited for {what} in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The folder of real photographs, one folder a class; says that the test is skipped where it is not
/// there.
pub fn photographs(test: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/flowers/val");
    if folder.is_dir() {
        return Some(folder);
    }
    // Past the capture of a test's output.
    let _ = writeln!(std::io::stderr(), "\nskipped: {test}: no photographs in ../shared/flowers/val");
    None
}

/// The first `count` photographs of a class.
pub fn of_class(folder: &Path, class: &str, count: usize) -> Vec<PathBuf> {
    let mut images: Vec<PathBuf> =
        std::fs::read_dir(folder.join(class)).unwrap().map(|entry| entry.unwrap().path()).collect();
    images.sort();
    images.truncate(count);
    assert_eq!(images.len(), count, "photographs of {class}");
    images
}

/// The first `count` photographs of a class that the built-in model is sure of: what a test of the
/// daemon expects must not hang on the model's mistakes.
pub fn clear(folder: &Path, class: &str, count: usize) -> Vec<PathBuf> {
    let mut classifier = Bundle::built_in().unwrap().classifier(None).unwrap();
    let expected = classifier.labels().position(class);
    let mut sure = |image: &PathBuf| {
        let prediction = classifier.classify(&decode::file(image).unwrap()).unwrap().0;
        prediction.class() == expected && prediction.confidence() > 0.9
    };
    let clear: Vec<PathBuf> = of_class(folder, class, 50).into_iter().filter(|image| sure(image)).take(count).collect();
    assert_eq!(clear.len(), count, "clear photographs of {class}");
    clear
}

/// A list for the replay, in a folder of its own.
pub fn list(images: &[PathBuf]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list.txt");
    let lines: Vec<String> = images.iter().map(|image| image.canonicalize().unwrap().display().to_string()).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    (dir, path)
}
