//! A model that comes in pieces: only the next one, of the transfer that was agreed on, is taken.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::mqtt::link::{INCOMING_BYTES_MAX, PUBLISH_OVERHEAD};
use crate::mqtt::message::SCHEMA;
use crate::system::hash::sha256_hex;
use crate::update::protocol::{Offer, Progress};

/// A sender that was silent for so long makes place for another.
const PATIENCE: Duration = Duration::from_secs(15);
/// Pieces between two messages of progress.
pub const PROGRESS_EVERY: u32 = 4;
/// A piece's payload begins with the transfer's id.
const ID_BYTES: usize = 16;
/// Smaller pieces cost more than they bring.
pub const CHUNK_BYTES_MIN: u32 = 256;
/// Larger ones might not fit a device's connection.
const CHUNK_BYTES_MAX: u32 = INCOMING_BYTES_MAX as u32 / 2;

/// What a piece led to.
#[derive(Debug, PartialEq, Eq)]
pub enum ChunkResult {
    /// Nothing is to be said.
    Quiet,
    /// The sender should know where we are.
    Progress,
    /// One is missing.
    Gap,
    /// It was the last one, and the whole is what was offered.
    Whole(Vec<u8>),
    /// It was the last one, and the whole is something else.
    Altered,
}

pub struct Transfer {
    pub offer: Offer,
    bytes: Vec<u8>,
    next: u32,
    /// The piece beyond the next that was last complained of.
    gap: Option<u32>,
    heard: Instant,
}

impl Transfer {
    /// Nothing is allocated by what the offer claims.
    pub fn new(offer: Offer, bytes_max: u64, now: Instant) -> Result<Self, String> {
        if !(1..=bytes_max).contains(&offer.bytes) {
            return Err(format!("{} bytes, model.offer_bytes_max allows {bytes_max}", offer.bytes));
        }
        if !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&offer.chunk_bytes) {
            let expected = format!("{CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}");
            return Err(format!("pieces of {} bytes, expected {expected}", offer.chunk_bytes));
        }
        Ok(Transfer { offer, bytes: Vec::new(), next: 0, gap: None, heard: now })
    }

    /// The sender has not been heard of for a long time.
    pub fn is_abandoned(&self, now: Instant) -> bool {
        now.duration_since(self.heard) > PATIENCE
    }

    /// The sender is there.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.gap = None;
    }

    /// `again`: what was sent may not have come.
    pub fn progress(&self, again: bool) -> Progress {
        let Offer { transfer, .. } = self.offer;
        Progress { schema: SCHEMA, transfer, next: self.next, chunks: self.offer.chunks(), again }
    }

    /// `payload`: the transfer's id and the piece. What is doubled, or of another transfer, is left out; behind a gap the
    /// sender is told once where we are.
    pub fn take(&mut self, number: u32, payload: &[u8], now: Instant) -> ChunkResult {
        let Some((id, piece)) = payload.split_at_checked(ID_BYTES) else { return ChunkResult::Quiet };
        if id != self.offer.transfer.as_bytes() {
            return ChunkResult::Quiet;
        }
        self.heard = now;
        let expected = u64::from(self.offer.chunk_bytes).min(self.offer.bytes - self.bytes.len() as u64);
        if number != self.next || piece.len() as u64 != expected {
            if number > self.next && self.gap.is_none() {
                self.gap = Some(number);
                return ChunkResult::Gap;
            }
            return ChunkResult::Quiet;
        }
        self.bytes.extend_from_slice(piece);
        self.next += 1;
        self.gap = None;
        if self.bytes.len() as u64 == self.offer.bytes {
            let bytes = std::mem::take(&mut self.bytes);
            return if sha256_hex(&bytes) == self.offer.model.sha256 {
                ChunkResult::Whole(bytes)
            } else {
                ChunkResult::Altered
            };
        }
        if self.next.is_multiple_of(PROGRESS_EVERY) { ChunkResult::Progress } else { ChunkResult::Quiet }
    }
}

/// A piece as it is sent. `number`: from 0; none behind the last.
pub fn piece(transfer: Uuid, bytes: &[u8], chunk_bytes: u32, number: u32) -> Option<Vec<u8>> {
    let piece = bytes.chunks(chunk_bytes as usize).nth(number as usize)?;
    Some([transfer.as_bytes().as_slice(), piece].concat())
}

/// What a piece may hold, so that its message is no larger than `packet_bytes`. `topic_bytes`: of the longest topic.
pub fn chunk_bytes(packet_bytes: usize, topic_bytes: usize) -> u32 {
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
        piece(Uuid::from_u128(5), &content(), CHUNK, number).unwrap()
    }

    #[test]
    fn pieces_in_order_make_the_whole() {
        let now = Instant::now();
        let mut transfer = transfer(now);
        let last = transfer.offer.chunks() - 1;
        assert_eq!(last, 10);
        for number in 0..last {
            let told =
                if (number + 1).is_multiple_of(PROGRESS_EVERY) { ChunkResult::Progress } else { ChunkResult::Quiet };
            assert_eq!(transfer.take(number, &nth(number), now), told);
        }
        assert_eq!(transfer.take(last, &nth(last), now), ChunkResult::Whole(content()));
        assert_eq!(piece(Uuid::nil(), &content(), CHUNK, last + 1), None);
    }

    #[test]
    fn what_is_doubled_out_of_order_cut_or_of_another_transfer_changes_nothing() {
        let now = Instant::now();
        let mut transfer = transfer(now);
        assert_eq!(transfer.take(0, &nth(0), now), ChunkResult::Quiet);
        let other = piece(Uuid::from_u128(6), &content(), CHUNK, 1).unwrap();
        for (number, payload, expected) in [
            (0, nth(0), ChunkResult::Quiet),
            (3, nth(3), ChunkResult::Gap),
            (4, nth(4), ChunkResult::Quiet),
            (1, other, ChunkResult::Quiet),
            (1, nth(1)[..100].to_vec(), ChunkResult::Quiet),
            (1, Vec::new(), ChunkResult::Quiet),
        ] {
            assert_eq!(transfer.take(number, &payload, now), expected, "{number}");
            assert_eq!(transfer.progress(true).next, 1);
        }
        for number in 1..10 {
            transfer.take(number, &nth(number), now);
        }
        assert_eq!(transfer.take(10, &nth(10), now), ChunkResult::Whole(content()));
    }

    #[test]
    fn a_whole_that_is_another_is_altered() {
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
    fn a_silent_sender_makes_place_and_bad_offers_are_refused() {
        let now = Instant::now();
        let mut waiting = transfer(now);
        let later = now + PATIENCE + Duration::from_millis(1);
        assert!(!waiting.is_abandoned(now) && waiting.is_abandoned(later));
        waiting.take(0, &nth(0), later);
        assert!(!waiting.is_abandoned(later));
        let refused = |change: fn(&mut Offer)| {
            let mut offer = offer(&content());
            change(&mut offer);
            Transfer::new(offer, 1 << 20, now).err().unwrap()
        };
        assert_eq!(refused(|offer| offer.bytes = 1 << 30), "1073741824 bytes, model.offer_bytes_max allows 1048576");
        assert!(refused(|offer| offer.bytes = 0).starts_with("0 bytes"));
        assert!(refused(|offer| offer.chunk_bytes = 0).starts_with("pieces of 0 bytes"));
        assert!(refused(|offer| offer.chunk_bytes = 1 << 20).contains("expected 256 to 524288"));
    }

    #[test]
    fn a_piece_fills_a_packet() {
        assert_eq!(chunk_bytes(65_536, 40), 65_536 - 40 - 32);
        assert_eq!(chunk_bytes(100, 90), CHUNK_BYTES_MIN);
        assert_eq!(chunk_bytes(256 << 20, 40), CHUNK_BYTES_MAX);
    }
}
