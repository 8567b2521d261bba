//! The segments of a JPEG, as in ITU-T T.81, annex B: its frame, its tables and its scans.

use super::JpegError;

/// The most components of a frame that are decoded.
const COMPONENTS_MAX: usize = 4;
/// The most scans of a frame: a progressive JPEG of four components has some dozens.
const SCANS_MAX: usize = 100;

/// The parts of a JPEG.
#[derive(Debug)]
pub(super) struct Structure<'a> {
    pub frame: FrameHeader,
    pub scans: Vec<Scan<'a>>,
    /// Whether a Huffman table is defined before the first scan.
    pub has_tables: bool,
    /// Bytes up to and with the end marker, or to the end of the last scan's data where there is none.
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
        let mut parser = Parser {
            bytes,
            at: 2,
            data_end: 0,
            frame: None,
            scans: Vec::new(),
            tables: Default::default(),
            restart: 0,
        };
        let has_end = match parser.segments() {
            // A trailer behind an image without end marker may look like segments.
            Err(_) if !parser.scans.is_empty() => false,
            has_end => has_end?,
        };
        let Parser { at, data_end, frame, scans, .. } = parser;
        let frame = frame.ok_or(JpegError::NoImage)?;
        let first = scans.first().ok_or(JpegError::NoImage)?;
        let has_tables = first.tables.iter().flatten().any(Option::is_some);
        Ok(Structure { frame, scans, has_tables, length: if has_end { at } else { data_end }, has_end })
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
    /// End of the last scan's data.
    data_end: usize,
    frame: Option<FrameHeader>,
    scans: Vec<Scan<'a>>,
    tables: [[Option<&'a [u8]>; 4]; 2],
    restart: u32,
}

impl<'a> Parser<'a> {
    /// Reads the segments, up to the last scan of a sequential frame; returns whether an end marker follows.
    fn segments(&mut self) -> Result<bool, JpegError> {
        loop {
            let marker = self.next_marker().ok_or(JpegError::Truncated)?;
            match marker {
                0xD9 => return Ok(true),
                // Another picture begins.
                0xD8 => return Err(JpegError::NoImage),
                0x01 | 0xD0..=0xD7 => continue,
                _ => {}
            }
            let segment = self.segment().ok_or(JpegError::Truncated)?;
            match marker {
                0xC0..=0xC2 if self.frame.is_some() => return Err(JpegError::Invalid("two frames")),
                0xC0..=0xC2 => self.frame = Some(frame_header(marker == 0xC2, segment)?),
                0xC3 => return Err(JpegError::Unsupported("lossless coding")),
                0xC5..=0xC7 => return Err(JpegError::Unsupported("hierarchical coding")),
                0xC9..=0xCB | 0xCD..=0xCF => return Err(JpegError::Unsupported("arithmetic coding")),
                0xC4 => self.huffman_tables(segment)?,
                0xDD => self.restart = segment.get(..2).map_or(0, |n| u32::from(u16::from_be_bytes([n[0], n[1]]))),
                0xDA => {
                    self.scan(segment)?;
                    self.data_end = self.at;
                    if self.is_sequential_and_complete() {
                        return Ok(self.next_marker() == Some(0xD9));
                    }
                }
                _ => {}
            }
        }
    }

    fn is_sequential_and_complete(&self) -> bool {
        let has_scan = |component: usize| {
            self.scans.iter().any(|scan| scan.components.iter().any(|(index, ..)| *index == component))
        };
        self.frame.as_ref().is_some_and(|frame| !frame.progressive && (0..frame.components.len()).all(has_scan))
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
            let (dc, ac) = (usize::from(pair[1] >> 4), usize::from(pair[1] & 15));
            if dc.max(ac) < 4 { Ok((index, dc, ac)) } else { Err(invalid()) }
        };
        let components: Vec<_> = components.chunks_exact(2).map(component).collect::<Result<_, JpegError>>()?;
        let band = (u32::from(first), u32::from(last));
        // A progressive scan has the DC coefficients, or AC coefficients of one component: annex G.1.1.1.1.
        let is_band = band == (0, 0) || (0 < band.0 && band.0 <= band.1 && band.1 < 64 && components.len() == 1);
        let is_double =
            |(i, one): (usize, &(usize, usize, usize))| components[..i].iter().any(|other| other.0 == one.0);
        if components.is_empty()
            || components.iter().enumerate().any(is_double)
            || self.scans.len() == SCANS_MAX
            || (frame.progressive && !is_band)
        {
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
    let [precision, h1, h0, w1, w0, count, components @ ..] = segment else {
        return Err(JpegError::Invalid("frame header"));
    };
    if *precision != 8 {
        return Err(JpegError::Unsupported("more than 8 bits a sample"));
    }
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
