//! How the broker is reached.

use std::fmt;
use std::time::Duration;

use rumqttc::{ConnectReturnCode, ConnectionError, MqttOptions};

/// The broker, and what it lets us in by.
#[derive(Debug, Clone)]
pub struct BrokerAccess {
    pub host: String,
    pub port: u16,
    pub credentials: Option<Credentials>,
    pub keep_alive: Duration,
    /// A larger message is not sent.
    pub packet_bytes_max: usize,
}

/// A user's name and password; the password is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub user: String,
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

impl BrokerAccess {
    /// A broker on this machine that lets everybody in.
    pub fn local(port: u16) -> Self {
        BrokerAccess {
            host: "127.0.0.1".into(),
            port,
            credentials: None,
            keep_alive: Duration::from_secs(15),
            packet_bytes_max: 256 << 10,
        }
    }

    /// A clean session: what is under way is ours to know. `incoming_bytes_max`: a larger message breaks the connection.
    pub(super) fn options(&self, id: String, incoming_bytes_max: usize) -> MqttOptions {
        let mut options = MqttOptions::new(id, self.host.clone(), self.port);
        options.set_keep_alive(self.keep_alive);
        options.set_clean_session(true);
        options.set_max_packet_size(incoming_bytes_max, self.packet_bytes_max);
        if let Some(credentials) = &self.credentials {
            options.set_credentials(&credentials.user, &credentials.password);
        }
        options
    }
}

impl fmt::Display for BrokerAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// The error in words that help.
pub(super) fn reason(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ConnectionRefused(
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
        ) => "the broker refuses the user name or password; see mqtt.credentials_file".into(),
        ConnectionError::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}
