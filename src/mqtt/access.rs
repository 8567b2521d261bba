//! The broker's address and credentials.

use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use rumqttc::{ConnectReturnCode, ConnectionError, Event, EventLoop, MqttOptions};
use tokio::net::lookup_host;
use tokio::time::timeout;
use tracing::debug;

/// The broker's address, the credentials, and the limits of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerAccess {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// User name and password, if the broker asks for them.
    pub credentials: Option<Credentials>,
    /// The longest wait for a connection, CONNACK included; each of the broker's addresses has its share of it.
    pub connect_timeout: Duration,
    /// MQTT keep alive.
    pub keep_alive: Duration,
    /// The largest packet that is sent, in bytes.
    pub packet_bytes_max: usize,
}

/// A broker's host and, where it is written with it, its port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Host name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: Option<u16>,
}

/// A text that is not a broker's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{shown}: {reason}")]
pub struct InvalidAddress {
    /// The text in quotes, without a password.
    pub shown: String,
    /// The expected form.
    pub reason: String,
}

impl Address {
    /// Parses `broker`, `broker:1883`, `192.168.1.2`, `::1`, `[::1]:1883`, or one of them after `mqtt://`; blanks around it are
    /// skipped.
    ///
    /// # Errors
    /// If it is another URL, among them those of TLS, or cannot be a host name.
    pub fn parse(text: &str) -> Result<Self, InvalidAddress> {
        let text = text.trim();
        let (scheme, rest) = text.split_once("://").unwrap_or(("mqtt", text));
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        // Host names have no `@`; a URL may have a password before it.
        let shown = text.rsplit_once('@').map_or(format!("{text:?}"), |(_, host)| format!("\"…@{host}\""));
        let invalid = |reason: &str| InvalidAddress { shown: shown.clone(), reason: reason.into() };
        match scheme.to_ascii_lowercase().as_str() {
            "mqtt" | "tcp" => {}
            "mqtts" | "ssl" | "tls" | "wss" => return Err(invalid("connections with TLS are not supported")),
            _ => return Err(invalid("expected a host name or address, or mqtt:// before it")),
        }
        if rest.contains('@') {
            return Err(invalid("user name and password belong into the file of mqtt.credentials_file"));
        }
        let (host, port) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').unwrap_or(port))),
            None if rest.matches(':').count() == 1 => {
                rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port)))
            }
            None => (rest, None),
        };
        let port = port.map(|port| {
            port.parse()
                .ok()
                .filter(|port| *port > 0)
                .ok_or_else(|| invalid("expected a port, 1 to 65535, after the colon"))
        });
        let port = port.transpose()?;
        let is_name = |host: &str| host.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '.' | '_'));
        // An address with a zone: fe80::1%eth0.
        let is_v6 = |host: &str| host.split('%').next().is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
        if host.is_empty() || !(is_name(host) || is_v6(host)) {
            return Err(invalid("expected the broker's name or address"));
        }
        Ok(Address { host: host.into(), port })
    }
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
            connect_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(15),
            packet_bytes_max: 256 << 10,
        }
    }

    /// Returns the options of a connection with a clean session: the outbox, not the session, holds what is unacknowledged.
    /// A packet from the broker of more than `incoming_bytes_max` bytes breaks the connection.
    pub(super) fn options(&self, client_id: &str, incoming_bytes_max: usize) -> MqttOptions {
        self.options_at(&self.host, self.port, client_id, incoming_bytes_max)
    }

    fn options_at(&self, host: &str, port: u16, client_id: &str, incoming_bytes_max: usize) -> MqttOptions {
        let mut options = MqttOptions::new(client_id, host, port);
        options.set_keep_alive(self.keep_alive);
        options.set_clean_session(true);
        options.set_max_packet_size(incoming_bytes_max, self.packet_bytes_max);
        if let Some(credentials) = &self.credentials {
            options.set_credentials(&credentials.user, &credentials.password);
        }
        options
    }

    /// Connects an event loop to the first of the broker's addresses that answers; returns its first event, the CONNACK.
    ///
    /// # Errors
    /// If no address answers in its share of the time, or the broker refuses the connection.
    pub(super) async fn connect(&self, event_loop: &mut EventLoop) -> Result<Event, ConnectionError> {
        let found = timeout(self.connect_timeout, lookup_host((self.host.as_str(), self.port))).await;
        let mut addresses: Vec<SocketAddr> = found.map_err(|_| ConnectionError::NetworkTimeout)??.collect();
        addresses.dedup();
        self.connect_to(&addresses, event_loop).await
    }

    /// As [`Self::connect`], to these addresses.
    async fn connect_to(&self, addresses: &[SocketAddr], event_loop: &mut EventLoop) -> Result<Event, ConnectionError> {
        let share = self.connect_timeout / addresses.len().max(1) as u32;
        let mut failed = ConnectionError::Io(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        for address in addresses {
            let options = event_loop.mqtt_options.clone();
            // rumqttc joins host and port: `[::1%2]:1883` without its port.
            let host = address.to_string();
            let host = host.rsplit_once(':').map_or(host.as_str(), |(host, _)| host);
            let mut there = self.options_at(host, address.port(), &options.client_id(), options.max_packet_size());
            there.set_inflight(options.inflight());
            if let Some(will) = options.last_will() {
                there.set_last_will(will);
            }
            event_loop.mqtt_options = there;
            event_loop.network_options.set_connection_timeout(share.as_secs().max(1));
            match event_loop.poll().await {
                Ok(event) => return Ok(event),
                Err(error @ ConnectionError::ConnectionRefused(_)) => return Err(error),
                Err(error) => {
                    debug!("{address}: {error}");
                    failed = error;
                }
            }
        }
        Err(failed)
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
        ConnectionError::NetworkTimeout => "no answer within mqtt.connect_timeout_s".into(),
        ConnectionError::Io(error) => error.to_string(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use rumqttc::{AsyncClient, Packet};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket, TcpStream};

    use super::*;

    #[test]
    fn an_address_is_parsed_or_refused_with_the_reason() {
        let parse = |text: &str| Address::parse(text).map(|Address { host, port }| (host, port));
        let good = [
            ("broker", "broker", None),
            (" broker\n", "broker", None),
            ("broker.lan:1884", "broker.lan", Some(1884)),
            ("mqtt://broker", "broker", None),
            ("MQTT://broker:8883/", "broker", Some(8883)),
            ("tcp://10.0.0.1:1883", "10.0.0.1", Some(1883)),
            ("::1", "::1", None),
            ("[::1]:1883", "::1", Some(1883)),
            ("[fe80::1%eth0]", "fe80::1%eth0", None),
        ];
        for (text, host, port) in good {
            assert_eq!(parse(text), Ok((host.into(), port)), "{text}");
        }
        let bad = [
            ("", "expected the broker's name"),
            ("[::1", "expected the broker's name"),
            ("a b", "expected the broker's name"),
            ("broker/path", "expected the broker's name"),
            ("mqtts://broker", "TLS"),
            ("http://broker", "expected a host name or address, or mqtt://"),
            ("broker:", "expected a port"),
            ("broker:0", "expected a port"),
            ("broker:70000", "expected a port"),
            ("mqtt://me:secret@broker", "credentials_file"),
        ];
        for (text, reason) in bad {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(error.contains(reason) && !error.contains("secret"), "{text}: {error}");
        }
    }
    /// A broker that never answers, whose queue of connections is full: SYN packets are dropped.
    async fn black_hole() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
            queued.push(stream.unwrap());
        }
        (address, listener, queued)
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_leaves_time_for_the_next() {
        let (dead, _listener, _queued) = black_hole().await;
        let broker = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let alive = broker.local_addr().unwrap();
        let serve = tokio::spawn(async move {
            let (mut stream, _) = broker.accept().await.unwrap();
            stream.read_u8().await.unwrap();
            stream.write_all(&[0x20, 2, 0, 0]).await.unwrap();
            stream
        });
        let access = BrokerAccess { connect_timeout: Duration::from_secs(2), ..BrokerAccess::local(alive.port()) };
        let (_client, mut event_loop) = AsyncClient::new(access.options("pi", 1024), 8);
        let event = access.connect_to(&[dead, alive], &mut event_loop).await.unwrap();
        assert!(matches!(event, Event::Incoming(Packet::ConnAck(_))), "{event:?}");
        serve.await.unwrap();
    }
}
