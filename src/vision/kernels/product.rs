//! 1×1 convolutions: a matrix product over pixels with bias, residual and clip in one pass.
//!
//! The weights lie in panels of as many outputs as a few vectors hold, packed once; a tile of pixels × one panel stays in registers
//! while it goes through the inputs. The first convolution is one too: a pixel's patch is a few pieces of the picture's rows.

use std::ops::Range;

use super::lanes::Lanes;

/// What follows the sum, in this order: bias, residual, clip.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Clip {
    pub low: f32,
    pub high: f32,
}

impl Clip {
    pub const NONE: Clip = Clip { low: f32::NEG_INFINITY, high: f32::INFINITY };
}

/// A 1×1 convolution's weights, packed for panels of `panel` outputs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Product {
    pub inputs: usize,
    pub outputs: usize,
    pub clip: Clip,
    panels: Panels,
    /// `[panels, inputs, panel]`, zeros behind the last output; the last panel is as narrow as it can be.
    weights: Vec<f32>,
    /// `[panels × panel]`
    bias: Vec<f32>,
}

/// How wide panels are, for one set of instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Panels {
    /// Numbers in a vector, and vectors in a panel: 2 or 4.
    pub lanes: usize,
    pub vectors: usize,
    /// There are vectors half as long, and a panel may be three of them.
    pub halves: bool,
}

/// How a panel is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    One,
    Two,
    ThreeHalves,
    All,
}

impl Panels {
    fn wide(self) -> usize {
        self.lanes * self.vectors
    }

    /// The narrowest panel for so many outputs.
    fn shape(self, outputs: usize) -> Shape {
        let halves = (2 * outputs).div_ceil(self.lanes);
        match halves {
            0..=2 => Shape::One,
            3 if self.halves => Shape::ThreeHalves,
            3 | 4 => Shape::Two,
            _ => Shape::All,
        }
    }

    fn wide_for(self, outputs: usize) -> usize {
        match self.shape(outputs) {
            Shape::One => self.lanes,
            Shape::Two => 2 * self.lanes,
            Shape::ThreeHalves => 3 * self.lanes / 2,
            Shape::All => self.wide(),
        }
    }
}

/// How a pixel's inputs lie: `pieces` pieces of the same length, the beginnings of two `apart` numbers from each other; the next
/// pixel's begin `step` numbers later.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    pub step: usize,
    pub pieces: usize,
    pub apart: usize,
}

/// Where pixels go: rows of `width` pixels, the beginnings of two pixels `step` numbers from each other, those of two rows `row`; a
/// pixel's vectors lie `apart` numbers from each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub width: usize,
    pub step: usize,
    pub row: usize,
    pub apart: usize,
}

impl Product {
    /// in: weights `[outputs, inputs]`, bias `[outputs]`.
    pub fn new(weights: &[f32], bias: &[f32], clip: Clip, panels: Panels) -> Self {
        let (outputs, inputs) = (bias.len(), weights.len() / bias.len());
        assert_eq!(weights.len(), outputs * inputs, "a rectangle of weights");
        let wide = panels.wide();
        let (mut packed, mut padded) = (Vec::new(), Vec::new());
        for (rows, bias) in weights.chunks(wide * inputs).zip(bias.chunks(wide)) {
            let wide = panels.wide_for(bias.len());
            let begin = packed.len();
            packed.resize(begin + inputs * wide, 0.0);
            for (output, row) in rows.chunks_exact(inputs).enumerate() {
                for (input, weight) in row.iter().enumerate() {
                    packed[begin + input * wide + output] = *weight;
                }
            }
            padded.extend_from_slice(bias);
            padded.resize(padded.len() - bias.len() + wide, 0.0);
        }
        Product { inputs, outputs, clip, panels, weights: packed, bias: padded }
    }
}

/// One call: whole panels, `outputs`, of `pixels` of `input`; the residual, where there is one, lies as `[pixels, outputs]`.
pub(super) struct Job<'a> {
    pub product: &'a Product,
    pub outputs: Range<usize>,
    pub input: &'a [f32],
    pub reach: Reach,
    pub pixels: usize,
    pub residual: Option<&'a [f32]>,
    pub out: &'a mut [f32],
    pub place: Place,
}

impl Job<'_> {
    /// Everything that the pointers below will touch lies within the slices.
    fn check(&self) {
        let Product { inputs, outputs, panels, .. } = *self.product;
        let Reach { step, pieces, apart } = self.reach;
        assert!(self.pixels > 0 && pieces > 0 && inputs % pieces == 0, "there is something to do");
        let last = (self.pixels - 1) * step + (pieces - 1) * apart + inputs / pieces;
        assert!(self.input.len() >= last, "the input holds the pixels");
        let (begin, end) = (self.outputs.start, self.outputs.end);
        let whole = |output: usize| output == outputs || output.is_multiple_of(panels.wide());
        assert!(begin < end && end <= outputs && whole(begin) && whole(end), "panels that are there");
        let (wanted, vectors) = (end - begin, (end - begin).div_ceil(panels.lanes));
        let (begin, place) = (self.place.at(self.pixels - 1), self.place);
        assert!(
            self.out.len() >= begin + (vectors - 1) * place.apart + (wanted - (vectors - 1) * panels.lanes),
            "the output has room"
        );
        assert!(place.apart == panels.lanes || outputs % panels.lanes == 0, "vectors that lie apart are whole");
        assert!(place.row >= (place.width - 1) * place.step, "rows come one after the other");
        assert!(self.residual.is_none_or(|residual| residual.len() >= self.pixels * outputs), "so does the residual");
        let behind = outputs % panels.wide();
        let padded = outputs - behind + if behind > 0 { panels.wide_for(behind) } else { 0 };
        assert!(self.product.weights.len() == padded * inputs && self.product.bias.len() == padded, "all is packed");
    }
}

impl Place {
    /// Where a pixel begins.
    fn at(self, pixel: usize) -> usize {
        pixel / self.width * self.row + pixel % self.width * self.step
    }

    /// Where pixels begin, from one on.
    fn onward(self, mut row: usize, mut x: usize) -> impl Iterator<Item = usize> {
        std::iter::repeat_with(move || {
            let at = row * self.row + x * self.step;
            x += 1;
            if x == self.width {
                (row, x) = (row + 1, 0);
            }
            at
        })
    }

    /// Rows that lie close together are one.
    fn long(self) -> Self {
        if self.row == self.width * self.step { Place { width: usize::MAX, ..self } } else { self }
    }
}

/// The most vectors in a panel, and pixels in a tile.
const VECTORS_MAX: usize = 4;
const LANES_MAX: usize = 16;
const ROWS_MAX: usize = 14;

/// Runs a job with tiles of at most `ROWS` pixels and panels of at most `VECTORS` vectors.
///
/// # Safety
/// The processor has the instructions of `V`.
pub(super) unsafe fn run<V: Lanes, const ROWS: usize, const VECTORS: usize>(job: &mut Job<'_>) {
    job.check();
    let panels = Panels { lanes: V::N, vectors: VECTORS, halves: V::Half::N < V::N };
    assert_eq!(job.product.panels, panels, "packed for these instructions");
    for first in job.outputs.clone().step_by(panels.wide()) {
        let valid = (job.outputs.end - first).min(panels.wide());
        // SAFETY: `check` has held; the instructions are the caller's promise.
        unsafe {
            match panels.shape(valid) {
                Shape::One => panel::<V, ROWS, 1>(job, first, valid),
                Shape::Two => panel::<V, ROWS, 2>(job, first, valid),
                Shape::ThreeHalves => panel::<V::Half, 7, 3>(job, first, valid),
                Shape::All => panel::<V, ROWS, VECTORS>(job, first, valid),
            }
        }
    }
}

/// Some pixels × one panel.
pub(super) struct Tile {
    weights: *const f32,
    bias: *const f32,
    input: *const f32,
    reach: Reach,
    /// Inputs in a piece.
    deep: usize,
    /// Where there is one, with the numbers in a pixel of it.
    residual: Option<(*const f32, usize)>,
    clip: Clip,
    /// Outputs that are there.
    valid: usize,
    out: *mut f32,
    /// From pixel to pixel there, and from vector to vector.
    next: usize,
    apart: usize,
}

/// The panel whose first output is `first`, for all pixels.
///
/// # Safety
/// As [`run`]; `job.check()` has held, and the panel is packed for `VECTORS` vectors.
unsafe fn panel<V: Lanes, const ROWS: usize, const VECTORS: usize>(job: &mut Job<'_>, first: usize, valid: usize) {
    let Product { inputs, outputs, clip, panels, .. } = *job.product;
    // SAFETY: the panel lies within weights and bias, the pixels within input and output, all by `check`.
    let (weights, bias, out) = unsafe {
        let (weights, bias) = (job.product.weights.as_ptr(), job.product.bias.as_ptr());
        let out = job.out.as_mut_ptr().add((first - job.outputs.start) / panels.lanes * job.place.apart);
        (weights.add(first * inputs), bias.add(first), out)
    };
    // Tiles of the same height but for one pixel: a last one of a single pixel would cost as much as a whole one.
    let tiles = job.pixels.div_ceil(ROWS);
    let (height, higher) = (job.pixels / tiles, job.pixels % tiles);
    let place = job.place.long();
    let apart = if V::N == panels.lanes { place.apart } else { V::N };
    let mut aside = [0.0; ROWS_MAX * VECTORS_MAX * LANES_MAX];
    let (mut pixel, mut row, mut x) = (0, 0, 0);
    for tile in 0..tiles {
        let rows = height + usize::from(tile < higher);
        // SAFETY: tiles of at most ROWS pixels cover the pixels once; `aside` has room for the largest.
        unsafe {
            let input = job.input.as_ptr().add(pixel * job.reach.step);
            let residual = job.residual.map(|map| (map.as_ptr().add(pixel * outputs + first), outputs));
            let (reach, deep) = (job.reach, inputs / job.reach.pieces);
            let within = x + rows <= place.width;
            let tile = Tile { weights, bias, input, reach, deep, residual, clip, valid, out, next: place.step, apart };
            let tile = match within {
                true => Tile { out: out.add(row * place.row + x * place.step), ..tile },
                false => Tile { out: aside.as_mut_ptr(), next: VECTORS * V::N, apart: V::N, ..tile },
            };
            match rows {
                1 => V::tile::<1, VECTORS>(&tile),
                2 => V::tile::<2, VECTORS>(&tile),
                3 => V::tile::<3, VECTORS>(&tile),
                4 => V::tile::<4, VECTORS>(&tile),
                5 => V::tile::<5, VECTORS>(&tile),
                6 => V::tile::<6, VECTORS>(&tile),
                7 if ROWS > 6 => V::tile::<7, VECTORS>(&tile),
                8 if ROWS > 7 => V::tile::<8, VECTORS>(&tile),
                9 if ROWS > 7 => V::tile::<9, VECTORS>(&tile),
                10 if ROWS > 7 => V::tile::<10, VECTORS>(&tile),
                11 if ROWS > 7 => V::tile::<11, VECTORS>(&tile),
                12 if ROWS > 7 => V::tile::<12, VECTORS>(&tile),
                13 if ROWS > 7 => V::tile::<13, VECTORS>(&tile),
                14 if ROWS > 7 => V::tile::<14, VECTORS>(&tile),
                _ => unreachable!("a tile has 1 to {ROWS} pixels"),
            }
            if !within {
                bring(&tile, apart, out, place.onward(row, x).take(rows));
            }
        }
        (pixel, x) = (pixel + rows, x + rows);
        (row, x) = (row + x / place.width, x % place.width);
    }
}

/// Brings a tile that lies in several rows to its places, pixel by pixel and vector by vector.
///
/// # Safety
/// The tile lies aside, `wide` numbers a pixel; `out` is good for the places.
unsafe fn bring(tile: &Tile, apart: usize, out: *mut f32, places: impl Iterator<Item = usize>) {
    for (nth, at) in places.enumerate() {
        for (vector, lane) in (0..tile.valid).step_by(tile.apart).enumerate() {
            let numbers = tile.apart.min(tile.valid - lane);
            // SAFETY: the caller's promise.
            unsafe {
                let from = tile.out.add(nth * tile.next + lane);
                std::ptr::copy_nonoverlapping(from, out.add(at + vector * apart), numbers);
            }
        }
    }
}

/// Inputs that weights are asked for before they are needed: they come from the third-level cache once a frame, which takes a tile of
/// a dozen pixels as long as some ten inputs.
const AHEAD: usize = 32;

/// Computes a tile, whose sums stay in registers.
///
/// # Safety
/// The caller is compiled for the instructions of `V`; the tile's pointers are good for `ROWS` pixels and `VECTORS` vectors.
#[inline(always)]
pub(super) unsafe fn tile<V: Lanes, const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
    let Reach { step, pieces, apart } = tile.reach;
    // SAFETY: the caller's promise.
    unsafe {
        let mut weights = tile.weights;
        let mut sums: [[V; VECTORS]; ROWS] =
            [std::array::from_fn(|vector| V::load(tile.bias.add(vector * V::N))); ROWS];
        for piece in 0..pieces {
            let mut input = tile.input.add(piece * apart);
            for _ in 0..tile.deep {
                for line in (0..VECTORS * V::N).step_by(16) {
                    V::prefetch(weights.wrapping_add(AHEAD * VECTORS * V::N + line));
                }
                let row: [V; VECTORS] = std::array::from_fn(|vector| V::load(weights.add(vector * V::N)));
                for (pixel, sums) in sums.iter_mut().enumerate() {
                    let value = V::splat(*input.add(pixel * step));
                    for vector in 0..VECTORS {
                        sums[vector] = sums[vector].plus(value, row[vector]);
                    }
                }
                input = input.add(1);
                weights = weights.add(VECTORS * V::N);
            }
        }
        if tile.valid < VECTORS * V::N {
            return some(sums, tile);
        }
        if let Some((residual, outputs)) = tile.residual {
            for (nth, sums) in sums.iter_mut().enumerate() {
                for (vector, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add(V::load(residual.add(nth * outputs + vector * V::N)));
                }
            }
        }
        let (low, high) = (V::splat(tile.clip.low), V::splat(tile.clip.high));
        for (nth, sums) in sums.iter().enumerate() {
            for (vector, sum) in sums.iter().enumerate() {
                sum.clip(low, high).store(tile.out.add(nth * tile.next + vector * tile.apart));
            }
        }
    }
}

/// What follows the sums of a panel that is not full, number by number.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn some<V: Lanes, const ROWS: usize, const VECTORS: usize>(sums: [[V; VECTORS]; ROWS], tile: &Tile) {
    let mut some = [0.0_f32; VECTORS_MAX * LANES_MAX];
    for (nth, sums) in sums.into_iter().enumerate() {
        // SAFETY: `some` holds the widest panel; the rest by the caller's promise.
        unsafe {
            for (vector, sum) in sums.into_iter().enumerate() {
                sum.store(some.as_mut_ptr().add(vector * V::N));
            }
            for (lane, value) in some[..tile.valid].iter().enumerate() {
                let residual = tile.residual.map_or(0.0, |(residual, outputs)| *residual.add(nth * outputs + lane));
                let place = nth * tile.next + lane / V::N * tile.apart + lane % V::N;
                *tile.out.add(place) = (value + residual).max(tile.clip.low).min(tile.clip.high);
            }
        }
    }
}
