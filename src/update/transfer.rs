//! A model in chunks: the device accepts only the next chunk of the transfer that was offered.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::mqtt::connection::{INCOMING_BYTES_MAX, PUBLISH_OVERHEAD};
use crate::mqtt::message::SCHEMA;
use crate::system::hash::sha256_hex;
use crate::update::protocol::{Offer, TransferProgress};

/// After this time without a message of its sender, a transfer may be replaced by another.
const IDLE_MAX: Duration = Duration::from_secs(15);
/// Chunks between two progress messages.
pub const PROGRESS_EVERY: u32 = 4;
/// Bytes of the transfer's id, with which a chunk's payload begins.
const ID_BYTES: usize = 16;
/// The smallest chunk, in bytes.
pub const CHUNK_BYTES_MIN: u32 = 256;
/// The largest chunk, in bytes; it fits the largest packet that a device accepts.
const CHUNK_BYTES_MAX: u32 = INCOMING_BYTES_MAX as u32 / 2;

/// The result of a chunk.
#[derive(Debug, PartialEq, Eq)]
pub enum ChunkResult {
    /// Accepted, or ignored as a duplicate; no answer is due.
    Accepted,
    /// Accepted; a progress message is due.
    Progress,
    /// A chunk before it is missing.
    Gap,
    /// The last chunk; these bytes have the offered SHA-256.
    Complete(Vec<u8>),
    /// The last chunk, but the SHA-256 differs from the offer.
    Altered,
}

/// An offer that the device does not accept.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// The bundle is empty or too large.
    #[error("{bytes} bytes, model.offer_bytes_max allows {bytes_max}")]
    Size {
        /// Offered size, in bytes.
        bytes: u64,
        /// Largest allowed size, in bytes.
        bytes_max: u64,
    },
    /// The chunks are too small or too large; their offered size, in bytes.
    #[error("chunks of {0} bytes, expected {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}")]
    ChunkSize(u32),
}

/// A transfer that is being received.
pub struct Transfer {
    /// Its offer.
    pub offer: Offer,
    bytes: Vec<u8>,
    next: u32,
    /// Number of the chunk whose arrival revealed the reported gap.
    gap: Option<u32>,
    last_message: Instant,
}

impl Transfer {
    /// Starts a transfer. It allocates nothing from the sizes in the offer. `bytes_max`: largest bundle, in bytes.
    ///
    /// # Errors
    /// If the bundle or the chunks are too large or too small.
    pub fn new(offer: Offer, bytes_max: u64, now: Instant) -> Result<Self, OfferError> {
        if !(1..=bytes_max).contains(&offer.bytes) {
            return Err(OfferError::Size { bytes: offer.bytes, bytes_max });
        }
        if !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&offer.chunk_bytes) {
            return Err(OfferError::ChunkSize(offer.chunk_bytes));
        }
        Ok(Transfer { offer, bytes: Vec::new(), next: 0, gap: None, last_message: now })
    }

    /// Returns whether the sender has sent no message for 15 s, so that another transfer may replace this one.
    pub fn is_abandoned(&self, now: Instant) -> bool {
        now.duration_since(self.last_message) > IDLE_MAX
    }

    /// Records a message of the sender.
    pub fn touch(&mut self, now: Instant) {
        self.last_message = now;
        self.gap = None;
    }

    /// Returns a progress message. `resend`: chunks may have been lost, the sender is to send from `next` on.
    pub fn progress(&self, resend: bool) -> TransferProgress {
        let Offer { transfer, .. } = self.offer;
        TransferProgress { schema: SCHEMA, transfer, next: self.next, chunks: self.offer.chunks(), resend }
    }

    /// Takes a chunk. `payload` is the transfer's id and the chunk's bytes. A duplicate or a chunk of another transfer is
    /// ignored; the first chunk after a missing one is reported as a gap.
    pub fn take(&mut self, number: u32, payload: &[u8], now: Instant) -> ChunkResult {
        let Some((id, chunk)) = payload.split_at_checked(ID_BYTES) else { return ChunkResult::Accepted };
        if id != self.offer.transfer.as_bytes() {
            return ChunkResult::Accepted;
        }
        self.last_message = now;
        let expected = u64::from(self.offer.chunk_bytes).min(self.offer.bytes - self.bytes.len() as u64);
        if number != self.next || chunk.len() as u64 != expected {
            if number > self.next && self.gap.is_none() {
                self.gap = Some(number);
                return ChunkResult::Gap;
            }
            return ChunkResult::Accepted;
        }
        self.bytes.extend_from_slice(chunk);
        self.next += 1;
        self.gap = None;
        if self.bytes.len() as u64 == self.offer.bytes {
            let bytes = std::mem::take(&mut self.bytes);
            return if sha256_hex(&bytes) == self.offer.model.sha256 {
                ChunkResult::Complete(bytes)
            } else {
                ChunkResult::Altered
            };
        }
        if self.next.is_multiple_of(PROGRESS_EVERY) { ChunkResult::Progress } else { ChunkResult::Accepted }
    }
}

/// Returns the payload of a chunk. `number` counts from 0; `None` after the last.
///
/// # Panics
/// If `chunk_bytes` is 0.
pub fn chunk(transfer: Uuid, bytes: &[u8], chunk_bytes: u32, number: u32) -> Option<Vec<u8>> {
    let chunk = bytes.chunks(chunk_bytes as usize).nth(number as usize)?;
    Some([transfer.as_bytes().as_slice(), chunk].concat())
}

/// Returns the largest chunk size, in bytes, whose message is at most `packet_bytes` bytes. `topic_bytes` is the length of
/// the longest topic.
pub fn chunk_bytes_for(packet_bytes: usize, topic_bytes: usize) -> u32 {
    let room = packet_bytes.saturating_sub(topic_bytes + ID_BYTES + PUBLISH_OVERHEAD);
    u32::try_from(room).unwrap_or(u32::MAX).clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Identity;

    const CHUNK: u32 = 256;

    fn content() -> Vec<u8> {
        (0..2600u32).map(|i| (i * 7) as u8).collect()
    }

    fn offer(bytes: &[u8]) -> Offer {
        Offer {
            schema: SCHEMA,
            transfer: Uuid::from_u128(5),
            model: Identity { name: "m".into(), version: 1, sha256: sha256_hex(bytes) },
            bytes: bytes.len() as u64,
            chunk_bytes: CHUNK,
            force: None,
        }
    }

    fn transfer(now: Instant) -> Transfer {
        Transfer::new(offer(&content()), 1 << 20, now).unwrap()
    }

    fn nth(number: u32) -> Vec<u8> {
        chunk(Uuid::from_u128(5), &content(), CHUNK, number).unwrap()
    }

    #[test]
    fn chunks_in_order_complete_the_transfer() {
        let now = Instant::now();
        let mut transfer = transfer(now);
        let last = transfer.offer.chunks() - 1;
        assert_eq!(last, 10);
        for number in 0..last {
            let expected =
                if (number + 1).is_multiple_of(PROGRESS_EVERY) { ChunkResult::Progress } else { ChunkResult::Accepted };
            assert_eq!(transfer.take(number, &nth(number), now), expected);
        }
        assert_eq!(transfer.take(last, &nth(last), now), ChunkResult::Complete(content()));
        assert_eq!(chunk(Uuid::nil(), &content(), CHUNK, last + 1), None);
    }

    #[test]
    fn ignores_duplicates_gaps_short_chunks_and_other_transfers() {
        let now = Instant::now();
        let mut transfer = transfer(now);
        assert_eq!(transfer.take(0, &nth(0), now), ChunkResult::Accepted);
        let other = chunk(Uuid::from_u128(6), &content(), CHUNK, 1).unwrap();
        for (number, payload, expected) in [
            (0, nth(0), ChunkResult::Accepted),
            (3, nth(3), ChunkResult::Gap),
            (4, nth(4), ChunkResult::Accepted),
            (1, other, ChunkResult::Accepted),
            (1, nth(1)[..100].to_vec(), ChunkResult::Accepted),
            (1, Vec::new(), ChunkResult::Accepted),
        ] {
            assert_eq!(transfer.take(number, &payload, now), expected, "{number}");
            assert_eq!(transfer.progress(true).next, 1);
        }
        for number in 1..10 {
            transfer.take(number, &nth(number), now);
        }
        assert_eq!(transfer.take(10, &nth(10), now), ChunkResult::Complete(content()));
    }

    #[test]
    fn detects_an_altered_chunk() {
        let now = Instant::now();
        let mut transfer = transfer(now);
        let mut changed = nth(2);
        changed[20] ^= 1;
        for number in 0..10 {
            transfer.take(number, &if number == 2 { changed.clone() } else { nth(number) }, now);
        }
        assert_eq!(transfer.take(10, &nth(10), now), ChunkResult::Altered);
    }

    #[test]
    fn an_idle_transfer_is_abandoned_and_bad_offers_are_refused() {
        let now = Instant::now();
        let mut waiting = transfer(now);
        let later = now + IDLE_MAX + Duration::from_millis(1);
        assert!(!waiting.is_abandoned(now) && waiting.is_abandoned(later));
        waiting.take(0, &nth(0), later);
        assert!(!waiting.is_abandoned(later));
        let refused = |change: fn(&mut Offer)| {
            let mut offer = offer(&content());
            change(&mut offer);
            Transfer::new(offer, 1 << 20, now).err().unwrap().to_string()
        };
        assert_eq!(refused(|offer| offer.bytes = 1 << 30), "1073741824 bytes, model.offer_bytes_max allows 1048576");
        assert!(refused(|offer| offer.bytes = 0).starts_with("0 bytes"));
        assert!(refused(|offer| offer.chunk_bytes = 0).starts_with("chunks of 0 bytes"));
        assert!(refused(|offer| offer.chunk_bytes = 1 << 20).contains("expected 256 to 524288"));
    }

    #[test]
    fn a_chunk_fills_a_packet() {
        assert_eq!(chunk_bytes_for(65_536, 40), 65_536 - 40 - 32);
        assert_eq!(chunk_bytes_for(100, 90), CHUNK_BYTES_MIN);
        assert_eq!(chunk_bytes_for(256 << 20, 40), CHUNK_BYTES_MAX);
    }
}
