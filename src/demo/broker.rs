//! The demo's MQTT broker; the only module that imports rumqttd.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};

/// The longest wait for the broker to accept connections.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// An error at the start of the broker.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The port cannot be bound.
    #[error("port {port} of 127.0.0.1: {source}")]
    Port {
        /// The requested port.
        port: u16,
        /// The cause.
        source: std::io::Error,
    },
    /// The broker accepts no connections; its port.
    #[error("no connection accepted on port {0} of 127.0.0.1 within {timeout} s", timeout = START_TIMEOUT.as_secs())]
    NotListening(u16),
    /// The broker's thread cannot be started.
    #[error("cannot start its thread: {0}")]
    Thread(std::io::Error),
}

/// Starts a broker on 127.0.0.1, waits until it accepts connections, and returns its port; port 0 selects a free one. The
/// broker runs until the process ends.
///
/// # Errors
///
/// [`BrokerError`] if the port is in use or the broker does not start.
pub fn start(port: u16) -> Result<u16, BrokerError> {
    // rumqttd reports no error if the port is in use, so the port is bound first.
    let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|source| BrokerError::Port { port, source })?;
    let address = probe.local_addr().map_err(|source| BrokerError::Port { port, source })?;
    drop(probe);
    let broker = Broker::new(config(address));
    thread::Builder::new().name("broker".into()).spawn(move || serve(broker)).map_err(BrokerError::Thread)?;
    let started = Instant::now();
    while TcpStream::connect_timeout(&address, START_TIMEOUT).is_err() {
        if started.elapsed() > START_TIMEOUT {
            return Err(BrokerError::NotListening(address.port()));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(address.port())
}

fn serve(mut broker: Broker) {
    if let Err(error) = broker.start() {
        tracing::error!("the demo's broker ended: {error}");
    }
}

fn config(listen: SocketAddr) -> Config {
    let server = ServerSettings {
        name: "demo".into(),
        listen,
        tls: None,
        next_connection_delay_ms: 1,
        connections: ConnectionSettings {
            connection_timeout_ms: 5000,
            max_payload_size: 256 * 1024,
            max_inflight_count: 100,
            auth: None,
            external_auth: None,
            dynamic_filters: true,
        },
    };
    Config {
        router: RouterConfig {
            max_connections: 16,
            max_outgoing_packet_count: 200,
            max_segment_size: 1024 * 1024,
            max_segment_count: 4,
            ..RouterConfig::default()
        },
        v4: Some(HashMap::from([("demo".into(), server)])),
        ..Config::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_names_a_port_in_use() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = start(port).unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {port} of 127.0.0.1: ")), "{error}");
    }
}
