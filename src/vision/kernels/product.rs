//! 1×1 convolutions: a matrix product over pixels with bias, residual and clip in one pass.
//!
//! The weights lie in panels of as many outputs as two (NEON: four) vectors hold, packed once; a tile of pixels × one panel stays in
//! registers while it goes through the inputs.

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
    panel: usize,
    /// `[panels, inputs, panel]`, zeros behind the last output.
    weights: Vec<f32>,
    /// `[panels × panel]`
    bias: Vec<f32>,
}

/// Where pixels go: rows of `width` pixels, the beginnings of two rows `row` numbers apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub width: usize,
    pub row: usize,
}

impl Product {
    /// in: weights `[outputs, inputs]`, bias `[outputs]`.
    pub fn new(weights: &[f32], bias: &[f32], clip: Clip, panel: usize) -> Self {
        let (outputs, inputs) = (bias.len(), weights.len() / bias.len());
        assert_eq!(weights.len(), outputs * inputs, "a rectangle of weights");
        let panels = outputs.div_ceil(panel);
        let mut packed = vec![0.0; panels * inputs * panel];
        for (output, row) in weights.chunks_exact(inputs).enumerate() {
            let at = output / panel * inputs * panel + output % panel;
            for (input, weight) in row.iter().enumerate() {
                packed[at + input * panel] = *weight;
            }
        }
        let mut padded = vec![0.0; panels * panel];
        padded[..outputs].copy_from_slice(bias);
        Product { inputs, outputs, clip, panel, weights: packed, bias: padded }
    }
}

/// One call: `pixels` of `input` one after the other, `[pixels, inputs]`; the residual, where there is one, `[pixels, outputs]`.
pub(super) struct Job<'a> {
    pub product: &'a Product,
    pub input: &'a [f32],
    pub pixels: usize,
    pub residual: Option<&'a [f32]>,
    pub out: &'a mut [f32],
    pub place: Place,
}

impl Job<'_> {
    /// Everything that the pointers below will touch lies within the slices.
    fn check(&self) {
        let Product { inputs, outputs, panel, .. } = *self.product;
        assert!(self.pixels > 0 && self.input.len() >= self.pixels * inputs, "the input holds the pixels");
        assert!(self.out.len() >= self.place.at(self.pixels - 1, outputs) + outputs, "the output has room for them");
        assert!(self.place.row >= self.place.width * outputs, "rows do not overlap");
        assert!(self.residual.is_none_or(|residual| residual.len() >= self.pixels * outputs), "so does the residual");
        let panels = outputs.div_ceil(panel);
        assert!(self.product.weights.len() == panels * inputs * panel && self.product.bias.len() == panels * panel);
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

/// Runs a job with tiles of at most `ROWS` pixels and panels of `VECTORS` vectors.
///
/// # Safety
/// The processor has the instructions of `V`, and the caller is compiled for them.
#[inline(always)]
pub(super) unsafe fn run<V: Lanes, const ROWS: usize, const VECTORS: usize>(job: &mut Job<'_>) {
    job.check();
    assert_eq!(job.product.panel, VECTORS * V::N, "packed for these instructions");
    let tiles = job.pixels.div_ceil(ROWS);
    for panel in 0..job.product.outputs.div_ceil(job.product.panel) {
        // Tiles of the same height but for one pixel: a last one of a single pixel would cost as much as a whole one.
        let (height, higher) = (job.pixels / tiles, job.pixels % tiles);
        let mut pixel = 0;
        for tile in 0..tiles {
            let rows = height + usize::from(tile < higher);
            // SAFETY: `check` has held, and rows ≤ ROWS tiles cover the pixels once; the instructions are the caller's promise.
            unsafe {
                match rows {
                    1 => one::<V, 1, VECTORS>(job, panel, pixel),
                    2 => one::<V, 2, VECTORS>(job, panel, pixel),
                    3 => one::<V, 3, VECTORS>(job, panel, pixel),
                    4 => one::<V, 4, VECTORS>(job, panel, pixel),
                    5 => one::<V, 5, VECTORS>(job, panel, pixel),
                    6 => one::<V, 6, VECTORS>(job, panel, pixel),
                    7 if ROWS > 6 => one::<V, 7, VECTORS>(job, panel, pixel),
                    8 if ROWS > 6 => one::<V, 8, VECTORS>(job, panel, pixel),
                    9 if ROWS > 8 => one::<V, 9, VECTORS>(job, panel, pixel),
                    10 if ROWS > 8 => one::<V, 10, VECTORS>(job, panel, pixel),
                    11 if ROWS > 8 => one::<V, 11, VECTORS>(job, panel, pixel),
                    12 if ROWS > 8 => one::<V, 12, VECTORS>(job, panel, pixel),
                    _ => unreachable!("a tile has 1 to {ROWS} pixels"),
                }
            }
            pixel += rows;
        }
    }
}

/// One panel for `ROWS` pixels from `pixel` on.
///
/// # Safety
/// As [`run`]; `job.check()` has held and `pixel + ROWS ≤ job.pixels`.
#[inline(always)]
unsafe fn one<V: Lanes, const ROWS: usize, const VECTORS: usize>(job: &mut Job<'_>, panel: usize, pixel: usize) {
    let Product { inputs, outputs, clip, panel: wide, .. } = *job.product;
    let first = panel * wide;
    let valid = (outputs - first).min(wide);
    // SAFETY: the panel lies within weights and bias, the pixels within the input, both by `check`.
    unsafe {
        let bias = job.product.bias.as_ptr().add(first);
        let mut weights = job.product.weights.as_ptr().add(first * inputs);
        let mut input = job.input.as_ptr().add(pixel * inputs);
        let mut sums: [[V; VECTORS]; ROWS] = [std::array::from_fn(|vector| V::load(bias.add(vector * V::N))); ROWS];
        for _ in 0..inputs {
            let row: [V; VECTORS] = std::array::from_fn(|vector| V::load(weights.add(vector * V::N)));
            for (pixel, sums) in sums.iter_mut().enumerate() {
                let value = V::splat(*input.add(pixel * inputs));
                for vector in 0..VECTORS {
                    sums[vector] = sums[vector].plus(value, row[vector]);
                }
            }
            input = input.add(1);
            weights = weights.add(wide);
        }
        let (low, high) = (V::splat(clip.low), V::splat(clip.high));
        for (nth, sums) in sums.into_iter().enumerate() {
            let at = job.place.at(pixel + nth, outputs) + first;
            let residual = job.residual.map(|residual| residual.as_ptr().add((pixel + nth) * outputs + first));
            let out = job.out.as_mut_ptr().add(at);
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
