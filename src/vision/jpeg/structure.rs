//! The segments of a JPEG, as in ITU-T T.81, annex B: its frame, its tables and its scans.

use super::JpegError;

/// The most components of a frame that are decoded.
const COMPONENTS_MAX: usize = 4;
/// The most scans of a frame: a progressive JPEG of four components has some dozens.
const SCANS_MAX: usize = 100;

/// What a JPEG consists of.
#[derive(Debug)]
pub(super) struct Structure<'a> {
    pub frame: FrameHeader,
    pub scans: Vec<Scan<'a>>,
    /// Whether a Huffman table is defined before the first scan.
    pub has_tables: bool,
    /// Bytes up to the end marker, or to the end of the last scan's data where there is none.
    pub length: usize,
    /// Whether there is an end marker.
    pub has_end: bool,
}

/// The frame header, SOF0, SOF1 or SOF2.
#[derive(Debug, Clone)]
pub(super) struct FrameHeader {
    pub progressive: bool,
    pub width: u32,
    pub height: u32,
    pub components: Vec<Component>,
}

/// A component of the frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Component {
    pub id: u8,
    /// Sampling factors, 1 to 4.
    pub horizontal: u32,
    pub vertical: u32,
}

/// A scan: its header, the tables that are defined when it begins, and its data.
#[derive(Debug)]
pub(super) struct Scan<'a> {
    /// Index of each component, and its DC and AC tables.
    pub components: Vec<(usize, usize, usize)>,
    /// First and last coefficient, 0 to 63.
    pub band: (u32, u32),
    /// Successive approximation: bit position high and low.
    pub approximation: (u32, u32),
    /// MCUs between two restart markers; 0 for none.
    pub restart_interval: u32,
    /// DHT payloads by class (0 DC, 1 AC) and destination: 16 counts, then the symbols.
    pub tables: [[Option<&'a [u8]>; 4]; 2],
    /// The entropy-coded data, with its restart markers.
    pub data: &'a [u8],
}

impl<'a> Structure<'a> {
    /// Parses a JPEG that begins with its start marker. Bytes between two segments that are no segment are skipped, as by other
    /// decoders.
    ///
    /// # Errors
    /// If there is no frame or no scan, a segment is cut or invalid, or the coding is one that is not decoded.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, JpegError> {
        let mut parser =
            Parser { bytes, at: 2, frame: None, scans: Vec::new(), tables: Default::default(), restart: 0 };
        let has_end = parser.segments()?;
        let Parser { at, frame, scans, .. } = parser;
        let frame = frame.ok_or(JpegError::NoImage)?;
        let first = scans.first().ok_or(JpegError::NoImage)?;
        let has_tables = first.tables.iter().flatten().any(Option::is_some);
        Ok(Structure { frame, scans, has_tables, length: at, has_end })
    }

    /// Whether the components of a frame that is not progressive come in scans of their own.
    pub fn is_non_interleaved(&self) -> bool {
        !self.frame.progressive
            && self.scans.first().is_some_and(|scan| scan.components.len() < self.frame.components.len())
    }
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    frame: Option<FrameHeader>,
    scans: Vec<Scan<'a>>,
    tables: [[Option<&'a [u8]>; 4]; 2],
    restart: u32,
}

impl<'a> Parser<'a> {
    /// Reads all segments; returns whether there is an end marker.
    fn segments(&mut self) -> Result<bool, JpegError> {
        loop {
            let Some(marker) = self.next_marker() else {
                // All that is missing after a scan is the end marker.
                return if self.scans.is_empty() { Err(JpegError::Truncated) } else { Ok(false) };
            };
            match marker {
                0xD9 => return Ok(true),
                // Another picture begins.
                0xD8 => {
                    self.at -= 2;
                    return if self.scans.is_empty() { Err(JpegError::NoImage) } else { Ok(false) };
                }
                0x01 | 0xD0..=0xD7 => continue,
                _ => {}
            }
            let Some(segment) = self.segment() else {
                let trailer = !self.scans.is_empty();
                return if trailer { Ok(false) } else { Err(JpegError::Truncated) };
            };
            match marker {
                0xC0..=0xC2 => self.frame = Some(frame_header(marker == 0xC2, segment)?),
                0xC3 => return Err(JpegError::Unsupported("lossless coding")),
                0xC5..=0xC7 => return Err(JpegError::Unsupported("hierarchical coding")),
                0xC9..=0xCB | 0xCD..=0xCF => return Err(JpegError::Unsupported("arithmetic coding")),
                0xC4 => self.huffman_tables(segment)?,
                0xDD => self.restart = segment.get(..2).map_or(0, |n| u32::from(u16::from_be_bytes([n[0], n[1]]))),
                0xDA => self.scan(segment)?,
                _ => {}
            }
        }
    }

    /// Moves behind the next marker and returns its code; skips what precedes it.
    fn next_marker(&mut self) -> Option<u8> {
        let rest = self.bytes.get(self.at..)?;
        let offset = rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF))?;
        self.at += offset + 2;
        Some(rest[offset + 1])
    }

    /// Moves behind the segment and returns its content, without its length; `None` if it is cut.
    fn segment(&mut self) -> Option<&'a [u8]> {
        let rest = self.bytes.get(self.at..)?;
        let length = usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?]));
        let segment = rest.get(2..length)?;
        self.at += length;
        Some(segment)
    }

    fn huffman_tables(&mut self, mut segment: &'a [u8]) -> Result<(), JpegError> {
        while let [place, rest @ ..] = segment {
            let (class, destination) = (usize::from(place >> 4), usize::from(place & 15));
            let symbols: usize =
                rest.get(..16).ok_or(JpegError::Invalid("Huffman table"))?.iter().map(|n| usize::from(*n)).sum();
            let table = rest.get(..16 + symbols).ok_or(JpegError::Invalid("Huffman table"))?;
            let slot = self.tables.get_mut(class).and_then(|tables| tables.get_mut(destination));
            *slot.ok_or(JpegError::Invalid("Huffman table"))? = Some(table);
            segment = &rest[16 + symbols..];
        }
        Ok(())
    }

    fn scan(&mut self, header: &[u8]) -> Result<(), JpegError> {
        let frame = self.frame.as_ref().ok_or(JpegError::Invalid("scan header"))?;
        let invalid = || JpegError::Invalid("scan header");
        let count = usize::from(*header.first().ok_or_else(invalid)?);
        let (components, rest) = header[1..].split_at_checked(2 * count).ok_or_else(invalid)?;
        let [first, last, approximation, ..] = *rest else { return Err(invalid()) };
        let component = |pair: &[u8]| {
            let index = frame.components.iter().position(|component| component.id == pair[0]).ok_or_else(invalid)?;
            Ok((index, usize::from(pair[1] >> 4) & 3, usize::from(pair[1] & 15) & 3))
        };
        let components: Vec<_> = components.chunks_exact(2).map(component).collect::<Result<_, JpegError>>()?;
        let band = (u32::from(first), u32::from(last));
        let is_band = band.0 <= band.1 && band.1 < 64 && (band.0 == 0 || components.len() == 1);
        if components.is_empty() || self.scans.len() == SCANS_MAX || (frame.progressive && !is_band) {
            return Err(invalid());
        }
        let data = self.entropy_coded();
        self.scans.push(Scan {
            components,
            band,
            approximation: (u32::from(approximation >> 4), u32::from(approximation & 15)),
            restart_interval: self.restart,
            tables: self.tables,
            data,
        });
        Ok(())
    }

    /// Moves behind entropy-coded data and returns it.
    fn entropy_coded(&mut self) -> &'a [u8] {
        let rest = &self.bytes[self.at..];
        // A marker is FF and a byte that is not stuffing (00), fill (FF) or a restart marker (D0–D7).
        let is_marker = |at: &usize| rest.get(at + 1).is_some_and(|code| !matches!(code, 0x00 | 0xFF | 0xD0..=0xD7));
        let candidates = rest.iter().enumerate().filter(|(_, byte)| **byte == 0xFF).map(|(at, _)| at);
        let length = candidates.into_iter().find(is_marker).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }
}

fn frame_header(progressive: bool, segment: &[u8]) -> Result<FrameHeader, JpegError> {
    let [_precision, h1, h0, w1, w0, count, components @ ..] = segment else {
        return Err(JpegError::Invalid("frame header"));
    };
    let component = |triple: &[u8]| Component {
        id: triple[0],
        horizontal: u32::from(triple[1] >> 4),
        vertical: u32::from(triple[1] & 15),
    };
    let components: Vec<_> = components.chunks_exact(3).take(usize::from(*count)).map(component).collect();
    let is_sampled = |c: &Component| (1..=4).contains(&c.horizontal) && (1..=4).contains(&c.vertical);
    if !(1..=COMPONENTS_MAX).contains(&components.len()) || !components.iter().all(is_sampled) {
        return Err(JpegError::Invalid("frame header"));
    }
    let (width, height) = (u16::from_be_bytes([*w1, *w0]), u16::from_be_bytes([*h1, *h0]));
    Ok(FrameHeader { progressive, width: width.into(), height: height.into(), components })
}
