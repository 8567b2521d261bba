//! Finds the end of a JPEG: splits a motion-JPEG stream into pictures, drops the stale bytes that cameras leave after the
//! end marker, and detects truncated pictures.
//!
//! Markers and segments as in ITU-T T.81, annex B. Segments are skipped by their lengths, so that the end marker of a
//! thumbnail in an APP segment does not end the picture that contains it.

/// Marker code of the start of an image, ITU-T T.81, table B.1.
const SOI: u8 = 0xD8;
/// Marker code of the end of an image.
const EOI: u8 = 0xD9;
/// Marker code of the start of a scan.
const SOS: u8 = 0xDA;

/// Extent of the JPEG at the start of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// The picture is the first n bytes, including its end marker.
    Whole(usize),
    /// The buffer ends before the picture does.
    Short,
    /// The buffer does not start with a JPEG.
    NotJpeg,
}

/// An incremental scan for the end of a JPEG.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scanner {
    /// Offset of the first byte that was not scanned.
    at: usize,
    /// Whether `at` is within entropy-coded data, where only markers are searched for.
    in_scan: bool,
}

impl Scanner {
    /// Continues the scan where the last call stopped; `bytes` must start with the bytes of that call.
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
                // A marker is FF and a byte that is not stuffing (00), fill (FF) or a restart marker (D0–D7).
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
                // Another picture starts before the end marker of this one.
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

/// Returns the extent of the JPEG that starts at the first byte.
pub fn extent(bytes: &[u8]) -> Extent {
    Scanner::default().advance(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SOI, an APP1 segment with a thumbnail that has its own end marker, SOS, data, EOI.
    const PICTURE: &[u8] = &[
        0xFF, 0xD8, 0xFF, 0xE1, 0, 6, 0xFF, 0xD8, 0xFF, 0xD9, 0xFF, 0xDA, 0, 3, 1, 0x12, 0xFF, 0x00, 0xFF, 0xD3, 0x34,
        0xFF, 0xD9,
    ];

    #[test]
    fn finds_the_end_after_thumbnails_stuffing_and_restart_markers() {
        let mut buffer = PICTURE.to_vec();
        buffer.extend([0, 0, 0xFF, 0xD9, 7]);
        assert_eq!(extent(&buffer), Extent::Whole(PICTURE.len()));
    }

    #[test]
    fn a_truncated_picture_is_short_at_every_length_and_its_scan_can_continue() {
        for cut in 0..PICTURE.len() {
            let mut scanner = Scanner::default();
            assert_eq!(scanner.advance(&PICTURE[..cut]), Extent::Short, "cut at {cut}");
            assert_eq!(scanner.advance(PICTURE), Extent::Whole(PICTURE.len()), "cut at {cut}");
        }
    }

    #[test]
    fn rejects_bytes_that_are_not_a_jpeg() {
        assert_eq!(extent(b"\x89PNG"), Extent::NotJpeg);
        assert_eq!(extent(&[0xFF, 0xD8, 0x00, 0x11]), Extent::NotJpeg);
        assert_eq!(extent(&[0xFF, 0xD8, 0xFF, 0xE0, 0, 1, 0]), Extent::NotJpeg);
        assert_eq!(extent(&[&PICTURE[..16], PICTURE].concat()), Extent::NotJpeg, "truncated by the next picture");
    }
}
