//! Whether a JPEG has the data of all of its blocks. Decoders fill what is missing with grey and report no error, also where a
//! lost packet of a camera's stream left a hole and the end marker is there.
//!
//! The entropy-coded data is read as in ITU-T T.81, annexes F and G, without keeping coefficients.

use super::JpegError;
use super::structure::{Component, FrameHeader, Scan, Structure};

/// Bits of a code that are looked up at once.
const LOOKUP_BITS: u32 = 9;
/// The longest code.
const CODE_BITS_MAX: u32 = 16;

/// Checks that every scan has the data of all of its blocks, and that the scans cover every component.
///
/// # Errors
/// [`JpegError::Truncated`] if data is missing; [`JpegError::Invalid`] if a code has no symbol or a table is missing.
pub(super) fn check(structure: &Structure<'_>) -> Result<(), JpegError> {
    let mut blocks = Blocks::new(&structure.frame);
    for scan in &structure.scans {
        blocks.read(scan)?;
    }
    if blocks.covered.iter().all(|covered| *covered) { Ok(()) } else { Err(JpegError::Truncated) }
}

/// A fault of entropy-coded data; small, as each symbol may return it.
#[derive(Debug, Clone, Copy)]
enum Damage {
    /// It ends before the last block.
    Missing,
    /// A code has no symbol, or a block is outside of the frame.
    Code,
    /// A table is not defined.
    Table,
}

impl From<Damage> for JpegError {
    fn from(damage: Damage) -> Self {
        match damage {
            Damage::Missing => JpegError::Truncated,
            Damage::Code => JpegError::Invalid("entropy-coded data"),
            Damage::Table => JpegError::Invalid("a Huffman table is missing"),
        }
    }
}

/// The blocks of a frame.
struct Blocks<'a> {
    frame: &'a FrameHeader,
    /// MCUs of an interleaved scan, a row and a column.
    mcus: (u32, u32),
    /// Largest sampling factors.
    sampling_max: (u32, u32),
    /// Of a progressive frame: for each component and block, which coefficients are not zero, a bit each.
    nonzero: Vec<Vec<u64>>,
    /// Whether a scan had the DC coefficients of each component.
    covered: Vec<bool>,
}

impl<'a> Blocks<'a> {
    fn new(frame: &'a FrameHeader) -> Self {
        let largest = |factor: fn(&Component) -> u32| frame.components.iter().map(factor).max().unwrap_or(1);
        let sampling_max = (largest(|c| c.horizontal), largest(|c| c.vertical));
        let mcus = (frame.width.div_ceil(8 * sampling_max.0), frame.height.div_ceil(8 * sampling_max.1));
        let blocks = |c: &Component| (mcus.0 * c.horizontal) as usize * (mcus.1 * c.vertical) as usize;
        let nonzero = match frame.progressive {
            true => frame.components.iter().map(|component| vec![0; blocks(component)]).collect(),
            false => Vec::new(),
        };
        Blocks { frame, mcus, sampling_max, nonzero, covered: vec![false; frame.components.len()] }
    }

    /// Reads the data of a scan.
    fn read(&mut self, scan: &Scan<'_>) -> Result<(), Damage> {
        if self.frame.progressive {
            self.read_progressive(scan)?;
        } else {
            self.read_sequential(scan)?;
        }
        if !self.frame.progressive || scan.band.0 == 0 {
            scan.components.iter().for_each(|(index, ..)| self.covered[*index] = true);
        }
        Ok(())
    }

    fn read_sequential(&self, scan: &Scan<'_>) -> Result<(), Damage> {
        let tables = Tables::new(scan);
        let blocks = |index: usize| {
            let component = self.frame.components[index];
            if scan.components.len() == 1 { 1 } else { component.horizontal * component.vertical }
        };
        let component =
            |(index, dc, ac): &(usize, usize, usize)| Ok((blocks(*index), tables.dc(*dc)?, tables.ac(*ac)?));
        let components: Vec<_> = scan.components.iter().map(component).collect::<Result<_, Damage>>()?;
        let mut reader = BitReader::new(scan.data);
        let (columns, rows) = self.units(scan);
        let (mut until_restart, units) = (scan.restart_interval, u64::from(columns) * u64::from(rows));
        for unit in 0..units {
            for (blocks, dc, ac) in &components {
                for _ in 0..*blocks {
                    let bits = reader.symbol(dc)?;
                    reader.skip(bits.into())?;
                    sequential_ac(&mut reader, ac)?;
                }
            }
            until_restart = until_restart.wrapping_sub(1);
            if until_restart == 0 && unit + 1 < units {
                reader.restart()?;
                until_restart = scan.restart_interval;
            }
        }
        Ok(())
    }

    fn read_progressive(&mut self, scan: &Scan<'_>) -> Result<(), Damage> {
        let tables = Tables::new(scan);
        let mut reader = BitReader::new(scan.data);
        let mut decoder = BlockDecoder { scan, eob_run: 0 };
        let (columns, rows) = self.units(scan);
        for unit in 0..u64::from(columns) * u64::from(rows) {
            if scan.restart_interval > 0 && unit > 0 && unit.is_multiple_of(scan.restart_interval.into()) {
                reader.restart()?;
                decoder.eob_run = 0;
            }
            let (column, row) = ((unit % u64::from(columns)) as u32, (unit / u64::from(columns)) as u32);
            for (index, dc, ac) in &scan.components {
                let component = self.frame.components[*index];
                let (width, height) =
                    if scan.components.len() == 1 { (1, 1) } else { (component.horizontal, component.vertical) };
                for block in 0..width * height {
                    let (x, y) = (column * width + block % width, row * height + block / width);
                    let place = (y * self.mcus.0 * component.horizontal + x) as usize;
                    let nonzero = self.nonzero[*index].get_mut(place).ok_or(Damage::Code)?;
                    decoder.block(&mut reader, &tables, (*dc, *ac), nonzero)?;
                }
            }
        }
        Ok(())
    }

    /// Returns the MCUs of a scan, a row and a column: blocks, if it has one component.
    fn units(&self, scan: &Scan<'_>) -> (u32, u32) {
        let [(index, ..)] = scan.components[..] else { return self.mcus };
        let component = self.frame.components[index];
        let blocks = |pixels: u32, factor: u32, largest: u32| (pixels * factor).div_ceil(8 * largest);
        (
            blocks(self.frame.width, component.horizontal, self.sampling_max.0),
            blocks(self.frame.height, component.vertical, self.sampling_max.1),
        )
    }
}

/// The Huffman tables of a scan.
struct Tables<'a> {
    dc: Vec<Option<HuffmanTable<'a>>>,
    ac: Vec<Option<HuffmanTable<'a>>>,
}

impl<'a> Tables<'a> {
    /// Builds the tables that the scan's components name.
    fn new(scan: &Scan<'a>) -> Self {
        let build = |class: usize, is_named: &dyn Fn(usize) -> bool| {
            let named = scan.tables[class].iter().enumerate().map(|(i, table)| table.filter(|_| is_named(i)));
            named.map(|table| table.map(HuffmanTable::new)).collect()
        };
        Tables {
            dc: build(0, &|i| scan.components.iter().any(|(_, dc, _)| *dc == i)),
            ac: build(1, &|i| scan.components.iter().any(|(.., ac)| *ac == i)),
        }
    }

    fn dc(&self, table: usize) -> Result<&HuffmanTable<'a>, Damage> {
        self.dc[table].as_ref().ok_or(Damage::Table)
    }

    fn ac(&self, table: usize) -> Result<&HuffmanTable<'a>, Damage> {
        self.ac[table].as_ref().ok_or(Damage::Table)
    }
}

/// Reads the coefficients of one block of a progressive scan after the other.
struct BlockDecoder<'a> {
    scan: &'a Scan<'a>,
    /// Blocks that have no further coefficients of this band.
    eob_run: u32,
}

impl BlockDecoder<'_> {
    fn block(
        &mut self,
        reader: &mut BitReader<'_>,
        tables: &Tables<'_>,
        (dc, ac): (usize, usize),
        nonzero: &mut u64,
    ) -> Result<(), Damage> {
        match (self.scan.band.0, self.scan.approximation.0) {
            (0, 0) => {
                let bits = reader.symbol(tables.dc(dc)?)?;
                reader.skip(bits.into())
            }
            (0, _) => reader.skip(1),
            (_, 0) => self.first_ac(reader, tables.ac(ac)?, nonzero),
            (_, _) => self.refine_ac(reader, tables.ac(ac)?, nonzero),
        }
    }

    /// The first scan of a band, annex G.1.2.2.
    fn first_ac(
        &mut self,
        reader: &mut BitReader<'_>,
        table: &HuffmanTable<'_>,
        nonzero: &mut u64,
    ) -> Result<(), Damage> {
        if self.eob_run > 0 {
            self.eob_run -= 1;
            return Ok(());
        }
        let (mut k, last) = self.scan.band;
        while k <= last {
            let symbol = reader.symbol(table)?;
            let (run, bits) = (u32::from(symbol >> 4), u32::from(symbol & 15));
            match (run, bits) {
                (15, 0) => k += 16,
                (run, 0) => {
                    self.eob_run = (1 << run) - 1 + reader.bits(run)?;
                    break;
                }
                _ => {
                    k += run;
                    *nonzero |= 1u64.checked_shl(k).unwrap_or(0);
                    reader.skip(bits)?;
                    k += 1;
                }
            }
        }
        Ok(())
    }

    /// A later scan of a band, annex G.1.2.3: one bit for each coefficient that is not zero, and new coefficients.
    fn refine_ac(
        &mut self,
        reader: &mut BitReader<'_>,
        table: &HuffmanTable<'_>,
        nonzero: &mut u64,
    ) -> Result<(), Damage> {
        let (mut k, last) = self.scan.band;
        while self.eob_run == 0 && k <= last {
            let symbol = reader.symbol(table)?;
            let (mut run, bits) = (u32::from(symbol >> 4), u32::from(symbol & 15));
            if bits == 0 && run < 15 {
                self.eob_run = (1 << run) + reader.bits(run)?;
                break;
            }
            reader.skip(bits.min(1))?;
            while k <= last {
                if *nonzero >> k & 1 == 1 {
                    reader.skip(1)?;
                } else if run == 0 {
                    break;
                } else {
                    run -= 1;
                }
                k += 1;
            }
            if bits > 0 && k <= last {
                *nonzero |= 1 << k;
            }
            k += 1;
        }
        if self.eob_run > 0 {
            let rest = (*nonzero & (u64::MAX >> (63 - last))).checked_shr(k).unwrap_or(0);
            (0..rest.count_ones()).try_for_each(|_| reader.skip(1))?;
            self.eob_run -= 1;
        }
        Ok(())
    }
}

/// The AC coefficients of a block of a sequential scan, annex F.2.2.2. Most of a camera frame's time is spent here.
#[inline(always)]
fn sequential_ac(reader: &mut BitReader<'_>, table: &HuffmanTable<'_>) -> Result<(), Damage> {
    let mut k = 1;
    while k < 64 {
        reader.fill_for(2 * CODE_BITS_MAX);
        let (bits, coefficients) = table.steps[(reader.buffer >> (64 - LOOKUP_BITS)) as usize];
        if bits > 0 {
            reader.skip(bits.into())?;
            k += u32::from(coefficients);
        } else {
            let symbol = reader.symbol(table)?;
            reader.skip((symbol & 15).into())?;
            k += u32::from(step(symbol));
        }
    }
    Ok(())
}

/// Returns the coefficients that a run and its value, an end of block or a run of 16 zeros cover.
fn step(symbol: u8) -> u8 {
    match (symbol >> 4, symbol & 15) {
        (15, 0) => 16,
        (_, 0) => 64,
        (run, _) => run + 1,
    }
}

/// A Huffman table, annex C.
struct HuffmanTable<'a> {
    symbols: &'a [u8],
    /// By the next [`LOOKUP_BITS`] bits: length of the code and its symbol; length 0 for a longer code.
    lookup: [(u8, u8); 1 << LOOKUP_BITS],
    /// The same for the AC coefficients of a sequential scan: bits of the code and the value after it, and what [`step`] returns.
    steps: [(u8, u8); 1 << LOOKUP_BITS],
    /// By length: the first code that is too large for it, aligned to 16 bits.
    limits: [u32; CODE_BITS_MAX as usize + 1],
    /// By length: index of the symbol of code 0, which may be negative.
    offsets: [i32; CODE_BITS_MAX as usize + 1],
}

impl<'a> HuffmanTable<'a> {
    /// Returns the table of a DHT segment's counts and symbols.
    fn new(table: &'a [u8]) -> Self {
        let (counts, symbols) = table.split_at(CODE_BITS_MAX as usize);
        let mut this = HuffmanTable {
            symbols,
            lookup: [(0, 0); 1 << LOOKUP_BITS],
            steps: [(0, 0); 1 << LOOKUP_BITS],
            limits: [0; CODE_BITS_MAX as usize + 1],
            offsets: [0; CODE_BITS_MAX as usize + 1],
        };
        let (mut code, mut index) = (0u32, 0usize);
        for (length, count) in (1..=CODE_BITS_MAX).zip(counts) {
            this.offsets[length as usize] = index as i32 - code as i32;
            for _ in 0..*count {
                if length <= LOOKUP_BITS {
                    let shift = LOOKUP_BITS - length;
                    let entries = (code << shift) as usize..((code + 1) << shift) as usize;
                    let symbol = symbols[index];
                    // A hostile table has more codes than there are.
                    if entries.end <= this.lookup.len() {
                        this.lookup[entries.clone()].fill((length as u8, symbol));
                        this.steps[entries].fill((length as u8 + (symbol & 15), step(symbol)));
                    }
                }
                (code, index) = (code + 1, index + 1);
            }
            this.limits[length as usize] = code << (CODE_BITS_MAX - length);
            code <<= 1;
        }
        this
    }

    /// Returns length and symbol of the code at the start of 16 bits; `None` if there is no such code.
    #[inline(always)]
    fn find(&self, bits: u32) -> Option<(u32, u8)> {
        let (length, symbol) = self.lookup[(bits >> (CODE_BITS_MAX - LOOKUP_BITS)) as usize];
        if length > 0 { Some((length.into(), symbol)) } else { self.find_longer(bits) }
    }

    /// The same for a code of more than [`LOOKUP_BITS`].
    #[inline(never)]
    fn find_longer(&self, bits: u32) -> Option<(u32, u8)> {
        let length = (LOOKUP_BITS + 1..=CODE_BITS_MAX).find(|length| bits < self.limits[*length as usize])?;
        let code = bits >> (CODE_BITS_MAX - length);
        let index = usize::try_from(code as i32 + self.offsets[length as usize]).ok()?;
        Some((length, *self.symbols.get(index)?))
    }
}

/// Reads bits of entropy-coded data, most significant first, up to a marker or the end.
#[derive(Clone, Copy)]
struct BitReader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The next bits, aligned to the top.
    buffer: u64,
    /// Valid bits in the buffer; zeros follow.
    bits: u32,
}

impl<'a> BitReader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        BitReader { bytes, at: 0, buffer: 0, bits: 0 }
    }

    /// Fills the buffer, unless it has this many bits, at least 1.
    #[inline(always)]
    fn fill_for(&mut self, bits: u32) {
        if self.bits >= bits {
            return;
        }
        // Eight bytes at once where none is FF.
        if let Some(&bytes) = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk) {
            let word = u64::from_be_bytes(bytes);
            // A byte of the inverted word is zero where the byte is FF.
            let inverted = !word;
            if inverted.wrapping_sub(0x0101_0101_0101_0101) & !inverted & 0x8080_8080_8080_8080 == 0 {
                let count = (64 - self.bits) / 8;
                self.buffer |= word >> self.bits;
                self.at += count as usize;
                self.bits += 8 * count;
                // Bits of a byte that was not taken.
                self.buffer &= u64::MAX.checked_shl(64 - self.bits).unwrap_or(0);
                return;
            }
        }
        // By value, so that the fields stay in registers.
        *self = self.filled_by_bytes();
    }

    #[cold]
    #[inline(never)]
    fn filled_by_bytes(mut self) -> Self {
        while self.bits <= 56 {
            let (byte, length) = match self.bytes[self.at..] {
                [0xFF, 0x00, ..] => (0xFF, 2),
                [] | [0xFF, ..] => break,
                [byte, ..] => (byte, 1),
            };
            self.at += length;
            self.buffer |= u64::from(byte) << (56 - self.bits);
            self.bits += 8;
        }
        self
    }

    /// Skips at most twice [`CODE_BITS_MAX`] bits.
    #[inline(always)]
    fn skip(&mut self, count: u32) -> Result<(), Damage> {
        if count > 2 * CODE_BITS_MAX {
            return Err(Damage::Code);
        }
        self.fill_for(count);
        if self.bits < count {
            return Err(Damage::Missing);
        }
        self.buffer <<= count;
        self.bits -= count;
        Ok(())
    }

    fn bits(&mut self, count: u32) -> Result<u32, Damage> {
        self.fill_for(count);
        let value = if count == 0 { 0 } else { (self.buffer >> (64 - count)) as u32 };
        self.skip(count)?;
        Ok(value)
    }

    #[inline(always)]
    fn symbol(&mut self, table: &HuffmanTable<'_>) -> Result<u8, Damage> {
        self.fill_for(CODE_BITS_MAX);
        match table.find((self.buffer >> 48) as u32) {
            Some((length, symbol)) => self.skip(length).map(|()| symbol),
            // The zeros after the end may be no code.
            None if self.bits < CODE_BITS_MAX => Err(Damage::Missing),
            None => Err(Damage::Code),
        }
    }

    /// Moves behind the next restart marker.
    fn restart(&mut self) -> Result<(), Damage> {
        (self.buffer, self.bits) = (0, 0);
        let rest = &self.bytes[self.at..];
        let marker = rest.windows(2).position(|pair| pair[0] == 0xFF && matches!(pair[1], 0xD0..=0xD7));
        self.at += marker.ok_or(Damage::Missing)? + 2;
        Ok(())
    }
}
