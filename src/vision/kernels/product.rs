//! 1×1 convolutions: a matrix product over pixels with bias, residual and clip in one pass.
//!
//! The weights lie in panels of as many outputs as a few vectors hold, packed once; a tile of pixels × one panel stays in registers
//! while it goes through the inputs. The first convolution is one too: a pixel's patch is a few pieces of the picture's rows.

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

/// Where pixels go: rows of `width` pixels, the beginnings of two rows `row` numbers apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub width: usize,
    pub row: usize,
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

    /// Pixels one after the other.
    pub fn close(&self) -> Reach {
        Reach { step: self.inputs, pieces: 1, apart: 0 }
    }
}

/// One call: `pixels` of `input`; the residual, where there is one, lies as `[pixels, outputs]`.
pub(super) struct Job<'a> {
    pub product: &'a Product,
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
        assert!(self.out.len() >= self.place.at(self.pixels - 1, outputs) + outputs, "the output has room for them");
        assert!(self.place.row >= self.place.width * outputs, "rows do not overlap");
        assert!(self.residual.is_none_or(|residual| residual.len() >= self.pixels * outputs), "so does the residual");
        let behind = outputs % panels.wide();
        let padded = outputs - behind + if behind > 0 { panels.wide_for(behind) } else { 0 };
        assert!(self.product.weights.len() == padded * inputs && self.product.bias.len() == padded, "all is packed");
    }
}

impl Place {
    /// Where a pixel begins.
    fn at(self, pixel: usize, outputs: usize) -> usize {
        pixel / self.width * self.row + pixel % self.width * outputs
    }
}

/// The most vectors in a panel.
const VECTORS_MAX: usize = 4;
const LANES_MAX: usize = 16;

/// Runs a job with tiles of at most `ROWS` pixels and panels of at most `VECTORS` vectors.
///
/// # Safety
/// The processor has the instructions of `V`, and the caller is compiled for them.
#[inline(always)]
pub(super) unsafe fn run<V: Lanes, const ROWS: usize, const VECTORS: usize>(job: &mut Job<'_>) {
    job.check();
    let panels = Panels { lanes: V::N, vectors: VECTORS, halves: V::Half::N < V::N };
    assert_eq!(job.product.panels, panels, "packed for these instructions");
    for first in (0..job.product.outputs).step_by(panels.wide()) {
        let valid = (job.product.outputs - first).min(panels.wide());
        // SAFETY: `check` has held; the instructions are the caller's promise.
        unsafe {
            match panels.shape(valid) {
                Shape::One => panel::<V, ROWS, 1>(job, first),
                Shape::Two => panel::<V, ROWS, 2>(job, first),
                Shape::ThreeHalves => panel::<V::Half, 7, 3>(job, first),
                Shape::All => panel::<V, ROWS, VECTORS>(job, first),
            }
        }
    }
}

/// The panel whose first output is `first`, for all pixels.
///
/// # Safety
/// As [`run`]; `job.check()` has held, and the panel is packed for `VECTORS` vectors.
#[inline(always)]
unsafe fn panel<V: Lanes, const ROWS: usize, const VECTORS: usize>(job: &mut Job<'_>, first: usize) {
    // Tiles of the same height but for one pixel: a last one of a single pixel would cost as much as a whole one.
    let tiles = job.pixels.div_ceil(ROWS);
    let (height, higher) = (job.pixels / tiles, job.pixels % tiles);
    let mut pixel = 0;
    for tile in 0..tiles {
        let rows = height + usize::from(tile < higher);
        // SAFETY: tiles of at most ROWS pixels cover the pixels once.
        unsafe {
            match rows {
                1 => one::<V, 1, VECTORS>(job, first, pixel),
                2 => one::<V, 2, VECTORS>(job, first, pixel),
                3 => one::<V, 3, VECTORS>(job, first, pixel),
                4 => one::<V, 4, VECTORS>(job, first, pixel),
                5 => one::<V, 5, VECTORS>(job, first, pixel),
                6 => one::<V, 6, VECTORS>(job, first, pixel),
                7 if ROWS > 6 => one::<V, 7, VECTORS>(job, first, pixel),
                8 if ROWS > 7 => one::<V, 8, VECTORS>(job, first, pixel),
                9 if ROWS > 7 => one::<V, 9, VECTORS>(job, first, pixel),
                10 if ROWS > 7 => one::<V, 10, VECTORS>(job, first, pixel),
                11 if ROWS > 7 => one::<V, 11, VECTORS>(job, first, pixel),
                12 if ROWS > 7 => one::<V, 12, VECTORS>(job, first, pixel),
                13 if ROWS > 7 => one::<V, 13, VECTORS>(job, first, pixel),
                14 if ROWS > 7 => one::<V, 14, VECTORS>(job, first, pixel),
                _ => unreachable!("a tile has 1 to {ROWS} pixels"),
            }
        }
        pixel += rows;
    }
}

/// One panel for `ROWS` pixels from `pixel` on.
///
/// # Safety
/// As [`panel`], and `pixel + ROWS ≤ job.pixels`.
#[inline(always)]
unsafe fn one<V: Lanes, const ROWS: usize, const VECTORS: usize>(job: &mut Job<'_>, first: usize, pixel: usize) {
    let Product { inputs, outputs, clip, .. } = *job.product;
    let Reach { step, pieces, apart } = job.reach;
    let wide = VECTORS * V::N;
    let valid = (outputs - first).min(wide);
    // SAFETY: the panel lies within weights and bias, the pixels within the input, both by `check`.
    unsafe {
        let bias = job.product.bias.as_ptr().add(first);
        let mut weights = job.product.weights.as_ptr().add(first * inputs);
        let mut sums: [[V; VECTORS]; ROWS] = [std::array::from_fn(|vector| V::load(bias.add(vector * V::N))); ROWS];
        for piece in 0..pieces {
            let mut input = job.input.as_ptr().add(pixel * step + piece * apart);
            for _ in 0..inputs / pieces {
                let row: [V; VECTORS] = std::array::from_fn(|vector| V::load(weights.add(vector * V::N)));
                for (pixel, sums) in sums.iter_mut().enumerate() {
                    let value = V::splat(*input.add(pixel * step));
                    for vector in 0..VECTORS {
                        sums[vector] = sums[vector].plus(value, row[vector]);
                    }
                }
                input = input.add(1);
                weights = weights.add(wide);
            }
        }
        let (low, high) = (V::splat(clip.low), V::splat(clip.high));
        let (begin, left) = (job.place.at(pixel, outputs), job.place.width - pixel % job.place.width);
        for (nth, sums) in sums.into_iter().enumerate() {
            // A division for the tile, and one for each pixel in another row than its first.
            let at = if nth < left { begin + nth * outputs } else { job.place.at(pixel + nth, outputs) };
            let residual = job.residual.map(|residual| residual.as_ptr().add((pixel + nth) * outputs + first));
            let out = job.out.as_mut_ptr().add(at + first);
            if valid == wide {
                for (vector, mut sum) in sums.into_iter().enumerate() {
                    if let Some(residual) = residual {
                        sum = sum.add(V::load(residual.add(vector * V::N)));
                    }
                    sum.clip(low, high).store(out.add(vector * V::N));
                }
            } else {
                let mut some = [0.0_f32; VECTORS_MAX * LANES_MAX];
                for (vector, sum) in sums.into_iter().enumerate() {
                    sum.store(some.as_mut_ptr().add(vector * V::N));
                }
                for (lane, value) in some[..valid].iter().enumerate() {
                    let residual = residual.map_or(0.0, |residual| *residual.add(lane));
                    *out.add(lane) = (value + residual).max(clip.low).min(clip.high);
                }
            }
        }
    }
}
