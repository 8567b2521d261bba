//! Brokers as child processes, which a test can stop and kill.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::tools::{Process, free_port, output, wait_for_port};

/// A mosquitto process on a free port. Its sessions are persistent and survive a kill.
pub struct Mosquitto {
    pub port: u16,
    dir: tempfile::TempDir,
    process: Option<Process>,
}

impl Mosquitto {
    /// Writes the configuration without starting the broker. With `password`, only the user `pi` may connect.
    pub fn prepare(password: Option<&str>) -> Self {
        match password {
            None => Self::with_access(&[], "allow_anonymous true"),
            Some(password) => Self::with_access(&[("pi", password)], "allow_anonymous false"),
        }
    }

    /// Starts a broker with `docs/mosquitto.acl` and these users; each password equals the user name.
    pub fn with_acl(users: &[&str]) -> Self {
        let acl = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/mosquitto.acl");
        let users: Vec<(&str, &str)> = users.iter().map(|user| (*user, *user)).collect();
        let mut broker = Self::with_access(&users, &format!("allow_anonymous false\nacl_file {}", acl.display()));
        broker.start();
        broker
    }

    /// Starts a broker with this line of configuration, which limits the size of messages.
    pub fn with_limit(limit: &str) -> Self {
        let mut broker = Self::with_access(&[], &format!("allow_anonymous true\n{limit}"));
        broker.start();
        broker
    }

    fn with_access(users: &[(&str, &str)], access: &str) -> Self {
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let passwords = dir.path().join("passwords");
        fs::write(&passwords, "").unwrap();
        for (user, password) in users {
            let created = output(Command::new("mosquitto_passwd").arg("-b").arg(&passwords).args([user, password]));
            assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
        }
        let passwords =
            if users.is_empty() { String::new() } else { format!("password_file {}\n", passwords.display()) };
        let config = format!(
            "listener {port} 127.0.0.1\n{access}\n{passwords}user root\npersistence true\npersistence_location {}/\nautosave_on_changes true\nautosave_interval 1\nlog_dest stderr\n",
            dir.path().display()
        );
        fs::write(dir.path().join("mosquitto.conf"), config).unwrap();
        Mosquitto { port, dir, process: None }
    }

    pub fn started(password: Option<&str>) -> Self {
        let mut broker = Self::prepare(password);
        broker.start();
        broker
    }

    pub fn start(&mut self) {
        let config = self.dir.path().join("mosquitto.conf");
        self.process = Some(Process::start(Command::new(mosquitto()).arg("-c").arg(config)));
        wait_for_port(self.port);
    }

    pub fn signal(&self, name: &str) {
        self.process.as_ref().expect("was started").signal(name);
    }

    pub fn kill(&mut self) {
        self.process.take().expect("was started").kill();
    }
}

/// Returns mosquitto's path: Debian installs it in a folder that is not in an ordinary user's `PATH`.
fn mosquitto() -> PathBuf {
    let debian = PathBuf::from("/usr/sbin/mosquitto");
    if debian.is_file() { debian } else { "mosquitto".into() }
}

/// The demo's broker (`examples/broker.rs`) as a child process.
pub struct Rumqttd {
    pub port: u16,
    process: Option<Process>,
}

impl Rumqttd {
    pub fn prepare() -> Self {
        Rumqttd { port: free_port(), process: None }
    }

    pub fn start(&mut self) {
        // target/release/deps/program-… → target/release/examples/broker
        let tests = std::env::current_exe().unwrap();
        let program = tests.parent().unwrap().parent().unwrap().join("examples/broker");
        self.process = Some(Process::start(Command::new(program).arg(self.port.to_string())));
        wait_for_port(self.port);
    }

    pub fn kill(&mut self) {
        self.process.take().expect("was started").kill();
    }
}
