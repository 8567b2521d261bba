//! Forwards events from the vision stage to the outbox.

use std::sync::Arc;

use tokio::sync::mpsc::Receiver;
use tracing::{error, info};
use uuid::Uuid;

use super::message::Encoder;
use super::outbox::Outbox;
use crate::decide::Event;
use crate::system::Counters;
use crate::vision::UNKNOWN;

/// Gives each event an id, encodes it and puts it into the outbox, until the vision stage has dropped its sender and the queue
/// is empty. It runs beside the connection, so that events reach the outbox while the broker is away.
pub async fn forward_events(
    mut events: Receiver<Event>,
    encoder: Encoder,
    topic: String,
    outbox: Outbox,
    counters: Arc<Counters>,
) {
    while let Some(event) = events.recv().await {
        let id = Uuid::now_v7();
        let (previous, class) =
            (event.previous.as_deref().unwrap_or(UNKNOWN), event.class.as_deref().unwrap_or(UNKNOWN));
        info!("event {id}: {previous} → {class}, confidence {:.2}", event.confidence);
        let dropped = outbox.push(topic.clone(), encoder.event(id, &event));
        if !dropped.is_empty() {
            counters.events_lost.add(dropped.len() as u64);
            error!("outbox full: {} oldest events lost; see mqtt.outbox_entries_max", dropped.len());
        }
    }
}
