//! Where a JPEG ends: for cutting a motion-JPEG stream into pictures, for dropping the rubbish that
//! cameras leave behind the end marker, and for noticing a picture that was cut short.
//!
//! Markers as in ITU-T T.81, annex B. A segment's length is followed, so that a thumbnail inside
//! an APP segment does not end the picture that carries it.

const SOI: u8 = 0xD8;
const EOI: u8 = 0xD9;
const SOS: u8 = 0xDA;

/// What a scan found so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// The picture is `bytes[..n]`, end marker included.
    Whole(usize),
    /// The picture goes on behind these bytes.
    Short,
    /// These bytes are no JPEG.
    NotJpeg,
}

/// A scan that can go on when more bytes have come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scanner {
    /// Everything before this offset was looked at.
    at: usize,
    /// Within entropy-coded data, where only markers matter.
    in_scan: bool,
}

impl Scanner {
    /// Looks on from where the last call stopped; `bytes` must begin with the same picture.
    pub fn advance(&mut self, bytes: &[u8]) -> Extent {
        if self.at == 0 {
            match bytes {
                [0xFF, SOI, ..] => self.at = 2,
                [] | [0xFF] => return Extent::Short,
                _ => return Extent::NotJpeg,
            }
        }
        loop {
            if self.in_scan {
                // A marker is FF and a byte that is neither stuffing (00), fill (FF) nor restart (D0–D7).
                let rest = &bytes[self.at..];
                let marker = rest.windows(2).position(|w| w[0] == 0xFF && !matches!(w[1], 0x00 | 0xFF | 0xD0..=0xD7));
                match marker {
                    Some(offset) => self.at += offset,
                    None => {
                        self.at += rest.len().saturating_sub(1);
                        return Extent::Short;
                    }
                }
                self.in_scan = false;
            }
            match bytes[self.at..] {
                [] | [0xFF] => return Extent::Short,
                [0xFF, 0xFF, ..] => self.at += 1,
                // Another picture begins before this one ended.
                [0xFF, SOI, ..] => return Extent::NotJpeg,
                [0xFF, EOI, ..] => return Extent::Whole(self.at + 2),
                [0xFF, 0x01 | 0xD0..=0xD7, ..] => self.at += 2,
                [0xFF, marker @ 0xC0..=0xFF, high, low, ..] => {
                    let length = usize::from(u16::from_be_bytes([high, low]));
                    if length < 2 {
                        return Extent::NotJpeg;
                    }
                    if bytes.len() < self.at + 2 + length {
                        return Extent::Short;
                    }
                    self.at += 2 + length;
                    self.in_scan = marker == SOS;
                }
                [0xFF, 0xC0..=0xFF, ..] => return Extent::Short,
                _ => return Extent::NotJpeg,
            }
        }
    }
}

/// Where the JPEG that starts at the first byte ends.
pub fn extent(bytes: &[u8]) -> Extent {
    Scanner::default().advance(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SOI, an APP1 segment that holds a thumbnail with its own end marker, SOS, data, EOI.
    const PICTURE: &[u8] = &[
        0xFF, 0xD8, 0xFF, 0xE1, 0, 6, 0xFF, 0xD8, 0xFF, 0xD9, 0xFF, 0xDA, 0, 3, 1, 0x12, 0xFF, 0x00, 0xFF, 0xD3, 0x34,
        0xFF, 0xD9,
    ];

    #[test]
    fn the_end_is_found_behind_thumbnails_stuffing_and_restarts() {
        let mut buffer = PICTURE.to_vec();
        buffer.extend([0, 0, 0xFF, 0xD9, 7]);
        assert_eq!(extent(&buffer), Extent::Whole(PICTURE.len()));
    }

    #[test]
    fn every_cut_is_short_and_a_scan_resumed_after_it_ends_at_the_same_place() {
        for cut in 0..PICTURE.len() {
            let mut scanner = Scanner::default();
            assert_eq!(scanner.advance(&PICTURE[..cut]), Extent::Short, "cut at {cut}");
            assert_eq!(scanner.advance(PICTURE), Extent::Whole(PICTURE.len()), "cut at {cut}");
        }
    }

    #[test]
    fn other_bytes_are_no_jpeg() {
        assert_eq!(extent(b"\x89PNG"), Extent::NotJpeg);
        assert_eq!(extent(&[0xFF, 0xD8, 0x00, 0x11]), Extent::NotJpeg);
        assert_eq!(extent(&[0xFF, 0xD8, 0xFF, 0xE0, 0, 1, 0]), Extent::NotJpeg);
        assert_eq!(extent(&[&PICTURE[..16], PICTURE].concat()), Extent::NotJpeg, "cut short by the next one");
    }
}
