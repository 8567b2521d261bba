//! The broker's address and credentials.

use std::fmt;
use std::time::Duration;

use rumqttc::{ConnectReturnCode, ConnectionError, MqttOptions};

/// The broker's address, the credentials, and the limits of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerAccess {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// User name and password, if the broker asks for them.
    pub credentials: Option<Credentials>,
    /// MQTT keep alive.
    pub keep_alive: Duration,
    /// The largest packet that is sent, in bytes.
    pub packet_bytes_max: usize,
}

/// A user name and password; `Debug` does not print the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User name.
    pub user: String,
    /// Password.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

impl BrokerAccess {
    /// Returns the access to a broker on 127.0.0.1 that accepts anonymous clients.
    pub fn local(port: u16) -> Self {
        BrokerAccess {
            host: "127.0.0.1".into(),
            port,
            credentials: None,
            keep_alive: Duration::from_secs(15),
            packet_bytes_max: 256 << 10,
        }
    }

    /// Returns the options of a connection with a clean session: the outbox, not the session, holds what is unacknowledged.
    /// A packet from the broker of more than `incoming_bytes_max` bytes breaks the connection.
    pub(super) fn options(&self, client_id: String, incoming_bytes_max: usize) -> MqttOptions {
        let mut options = MqttOptions::new(client_id, self.host.clone(), self.port);
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

/// Returns the message for a failed connection.
pub(super) fn reason(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ConnectionRefused(
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
        ) => "the broker refuses the user name or password; see mqtt.credentials_file".into(),
        ConnectionError::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}
