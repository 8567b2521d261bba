//! From events to the broker. Nothing here makes a stage before it wait: events go into an outbox and
//! leave it only when the broker acknowledged them; the state is a slot whose newest value is sent. Here
//! alone rumqttc is named.

pub mod access;
pub mod client;
pub mod discovery;
pub mod link;
pub mod message;
pub mod outbox;
pub mod setting;
pub mod topics;

pub use link::{About, ConnectionOptions, Link, Mail};
pub use outbox::Outbox;
pub use setting::Setting;
