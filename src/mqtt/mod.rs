//! MQTT: messages, topics, and the connections to a broker. Events and answers wait in an outbox until the broker
//! acknowledges them; the state is a slot whose newest value is published. No other module uses rumqttc.

pub mod access;
pub mod client;
pub mod connection;
pub mod device_client;
pub mod discovery;
pub mod discovery_record;
pub mod events;
pub mod message;
pub mod outbox;
pub mod setting;
mod subscriptions;
pub mod topics;

pub use access::BrokerAccess;
pub use connection::ConnectionOptions;
pub use device_client::{Command, DeviceClient, ModelAnnouncement};
pub use discovery_record::DiscoveryRecord;
pub use outbox::Outbox;
pub use topics::{DeviceName, Topics};
