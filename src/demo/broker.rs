//! The broker inside the demo; the only file that names rumqttd.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};

/// How long the broker may take to listen.
const START: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error("port {port} of 127.0.0.1: {source}")]
    Port { port: u16, source: std::io::Error },
    #[error("does not listen on port {0}")]
    Deaf(u16),
    #[error("cannot start its thread: {0}")]
    Thread(std::io::Error),
}

/// Starts a broker on 127.0.0.1 and waits until it listens; gives its port. It cannot be stopped and
/// ends with the process.
pub fn start(port: u16) -> Result<u16, BrokerError> {
    // The broker itself says nothing when the port is taken: it is tried first.
    let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|source| BrokerError::Port { port, source })?;
    let address = probe.local_addr().map_err(|source| BrokerError::Port { port, source })?;
    drop(probe);
    let broker = Broker::new(config(address));
    thread::Builder::new().name("broker".into()).spawn(move || serve(broker)).map_err(BrokerError::Thread)?;
    let began = Instant::now();
    while TcpStream::connect_timeout(&address, START).is_err() {
        if began.elapsed() > START {
            return Err(BrokerError::Deaf(address.port()));
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
    fn a_taken_port_is_named() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = start(port).unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {port} of 127.0.0.1: ")), "{error}");
    }
}
