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
    /// The picture is the first n bytes, including its end marker, or up to the start of another picture where it has none.
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
    /// Whether the picture has a scan, so that the start of another picture can be its end.
    has_scan: bool,
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
                // Another picture starts before the end marker of this one. The decoder finds out whether the data is complete.
                [0xFF, SOI, ..] if self.has_scan => return Extent::Whole(self.at),
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
                    self.has_scan |= self.in_scan;
                }
                [0xFF, 0xC0..=0xFF, ..] => return Extent::Short,
                [0xFF, 0x02..=0xBF, ..] => return Extent::NotJpeg,
                // Stray bytes between segments, which decoders skip.
                ref stray => self.at += 1 + stray[1..].iter().position(|byte| *byte == 0xFF).unwrap_or(stray.len() - 1),
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
        assert_eq!(extent(&[0xFF, 0xD8, 0xFF, 0x11]), Extent::NotJpeg);
        assert_eq!(extent(&[0xFF, 0xD8, 0xFF, 0xE0, 0, 1, 0]), Extent::NotJpeg);
        assert_eq!(extent(&[&PICTURE[..10], PICTURE].concat()), Extent::NotJpeg, "another picture before the data");
    }

    #[test]
    fn skips_stray_bytes_between_segments() {
        for stray in [&[0][..], &[0x11, 0, 7], &[0xFF, 0, 1]] {
            let picture = [&PICTURE[..10], stray, &PICTURE[10..]].concat();
            for cut in 0..picture.len() {
                let mut scanner = Scanner::default();
                assert_eq!(scanner.advance(&picture[..cut]), Extent::Short, "{stray:?} cut at {cut}");
                assert_eq!(scanner.advance(&picture), Extent::Whole(picture.len()), "{stray:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn a_picture_without_an_end_marker_ends_where_the_next_one_starts() {
        let unended = &PICTURE[..PICTURE.len() - 2];
        assert_eq!(extent(&[unended, PICTURE].concat()), Extent::Whole(unended.len()));
    }
}
