//! 1×1 convolutions: a matrix product over pixels with bias, residual and clip in one pass.
//!
//! The weights are packed once, in panels of as many outputs as a few vectors hold. A tile of pixels × one panel stays in registers
//! while the loop goes through the inputs. The first convolution uses the same kernel: the patch of a pixel is a few segments of the
//! input's rows.

use std::ops::Range;
use std::sync::Arc;

use crate::layers::Clip;
use crate::simd::SimdF32;

/// The packed weights of a 1×1 convolution.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PackedGemm {
    pub inputs: usize,
    pub outputs: usize,
    pub clip: Clip,
    layout: PanelLayout,
    /// `[panels, inputs, panel width]`, zeros after the last output; the last panel is as narrow as possible.
    weights: Arc<[f32]>,
    /// `[panels × panel width]`
    bias: Arc<[f32]>,
}

/// The width of panels for one instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PanelLayout {
    /// Values in a vector.
    pub lanes: usize,
    /// Vectors in a panel: 2 or 4.
    pub vectors: usize,
    /// There are vectors of half the length, and a panel may consist of three of them.
    pub half_vectors: bool,
}

/// The vectors of one panel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PanelKind {
    One,
    Two,
    ThreeHalves,
    Full,
}

impl PanelLayout {
    /// Returns the outputs of a full panel.
    pub fn width(self) -> usize {
        self.lanes * self.vectors
    }

    /// Returns the narrowest panel for a number of outputs, at most [`PanelLayout::width`].
    fn kind(self, outputs: usize) -> PanelKind {
        let halves = (2 * outputs).div_ceil(self.lanes);
        match halves {
            0..=2 => PanelKind::One,
            3 if self.half_vectors => PanelKind::ThreeHalves,
            3 | 4 => PanelKind::Two,
            _ => PanelKind::Full,
        }
    }

    /// Returns the width of the narrowest panel for a number of outputs, at most [`PanelLayout::width`].
    fn width_for(self, outputs: usize) -> usize {
        match self.kind(outputs) {
            PanelKind::One => self.lanes,
            PanelKind::Two => 2 * self.lanes,
            PanelKind::ThreeHalves => 3 * self.lanes / 2,
            PanelKind::Full => self.width(),
        }
    }

    /// Returns the outputs of all panels together, or `None` if that overflows.
    fn padded_outputs(self, outputs: usize) -> Option<usize> {
        match outputs % self.width() {
            0 => Some(outputs),
            rest => (outputs - rest).checked_add(self.width_for(rest)),
        }
    }
}

/// Layout of the input: a pixel's inputs are `segments` contiguous segments of equal length.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InputStrides {
    /// Values from a pixel to the next.
    pub pixel_stride: usize,
    pub segments: usize,
    /// Values from a segment of a pixel to its next.
    pub segment_stride: usize,
}

/// Layout of the output: rows of `width` pixels; a pixel's outputs are vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OutputStrides {
    pub width: usize,
    pub pixel_stride: usize,
    pub row_stride: usize,
    /// Values from a vector of a pixel to its next.
    pub vector_stride: usize,
}

impl PackedGemm {
    /// Packs weights `[bias.len(), weights.len() / bias.len()]`, padded with zeros to `[outputs, inputs]`.
    ///
    /// # Panics
    /// If the weights are not a matrix or exceed the padded size.
    pub fn new(weights: &[f32], bias: &[f32], [outputs, inputs]: [usize; 2], clip: Clip, layout: PanelLayout) -> Self {
        let given = weights.len() / bias.len();
        assert_eq!(weights.len(), bias.len() * given, "weights are [outputs, inputs]");
        assert!(
            0 < given && given <= inputs && bias.len() <= outputs,
            "the padded size is at least that of the weights"
        );
        let length = Self::packed_len([outputs, inputs], layout).expect("the packed length fits usize");
        let (mut packed, mut packed_bias) = (Vec::with_capacity(length), Vec::new());
        for first in (0..outputs).step_by(layout.width()) {
            let panel = layout.width_for((outputs - first).min(layout.width()));
            let begin = packed.len();
            packed.resize(begin + inputs * panel, 0.0);
            packed_bias.resize(packed_bias.len() + panel, 0.0);
            for output in first..(first + panel).min(bias.len()) {
                for (input, weight) in weights[output * given..][..given].iter().enumerate() {
                    packed[begin + input * panel + output - first] = *weight;
                }
                packed_bias[output] = bias[output];
            }
        }
        PackedGemm { inputs, outputs, clip, layout, weights: packed.into(), bias: packed_bias.into() }
    }

    /// Returns the f32 values that the packed weights and bias take, or `None` if that overflows.
    pub fn packed_len([outputs, inputs]: [usize; 2], layout: PanelLayout) -> Option<usize> {
        layout.padded_outputs(outputs)?.checked_mul(inputs.checked_add(1)?)
    }
}

/// Arguments of one call: the outputs `outputs`, in whole panels, for `pixels` pixels of `input`. The residual is `[pixels, outputs]`
/// with all outputs of the convolution.
pub(crate) struct GemmArgs<'a> {
    pub gemm: &'a PackedGemm,
    pub outputs: Range<usize>,
    pub input: &'a [f32],
    pub input_strides: InputStrides,
    pub pixels: usize,
    pub residual: Option<&'a [f32]>,
    pub out: &'a mut [f32],
    pub output_strides: OutputStrides,
}

/// Returns the sum of the products, or `None` if it overflows.
fn checked_sum_of_products<const N: usize>(terms: [(usize, usize); N]) -> Option<usize> {
    terms.into_iter().try_fold(0_usize, |sum, (a, b)| sum.checked_add(a.checked_mul(b)?))
}

impl GemmArgs<'_> {
    /// Checks that every pointer that [`run`] derives stays within the slices.
    ///
    /// # Panics
    /// If one does not, or if a size overflows.
    fn check(&self) {
        const OVERFLOW: &str = "a size overflows";
        let PackedGemm { inputs, outputs, layout, .. } = *self.gemm;
        let InputStrides { pixel_stride, segments, segment_stride } = self.input_strides;
        assert!(self.pixels > 0 && segments > 0 && inputs.is_multiple_of(segments), "no pixels or uneven segments");
        let terms = [(self.pixels - 1, pixel_stride), (segments - 1, segment_stride), (inputs / segments, 1)];
        assert!(self.input.len() >= checked_sum_of_products(terms).expect(OVERFLOW), "the input is too short");

        let (begin, end) = (self.outputs.start, self.outputs.end);
        let at_panel = |output: usize| output == outputs || output.is_multiple_of(layout.width());
        assert!(begin < end && end <= outputs && at_panel(begin) && at_panel(end), "the outputs are not whole panels");
        let (count, vectors) = (end - begin, (end - begin).div_ceil(layout.lanes));
        let OutputStrides { width, pixel_stride, row_stride, vector_stride } = self.output_strides;
        assert!(width > 0, "rows without pixels");
        // Rows follow one another, so that the last pixel has the largest offset.
        let row_end = (width - 1).checked_mul(pixel_stride).expect(OVERFLOW);
        assert!(row_stride >= row_end, "the rows of the output overlap");
        let last = self.pixels - 1;
        let terms = [
            (last / width, row_stride),
            (last % width, pixel_stride),
            (vectors - 1, vector_stride),
            (count - (vectors - 1) * layout.lanes, 1),
        ];
        assert!(self.out.len() >= checked_sum_of_products(terms).expect(OVERFLOW), "the output is too short");
        let contiguous = vector_stride == layout.lanes;
        assert!(contiguous || outputs.is_multiple_of(layout.lanes), "separate vectors are incomplete");

        let residual = self.pixels.checked_mul(outputs).expect(OVERFLOW);
        assert!(self.residual.is_none_or(|values| values.len() >= residual), "the residual is too short");
        let padded = layout.padded_outputs(outputs).expect(OVERFLOW);
        let packed = padded.checked_mul(inputs).expect(OVERFLOW);
        assert!(self.gemm.weights.len() == packed && self.gemm.bias.len() == padded, "the weights are not packed");
    }
}

impl OutputStrides {
    /// Returns the offsets of the pixels from one on.
    fn offsets_from(self, mut row: usize, mut x: usize) -> impl Iterator<Item = usize> {
        std::iter::repeat_with(move || {
            let offset = row * self.row_stride + x * self.pixel_stride;
            x += 1;
            if x == self.width {
                (row, x) = (row + 1, 0);
            }
            offset
        })
    }

    /// Returns the same layout as one row, if the rows are contiguous.
    fn merge_rows(self) -> Self {
        if self.row_stride == self.width * self.pixel_stride {
            OutputStrides { width: usize::MAX, ..self }
        } else {
            self
        }
    }
}

/// The most vectors in a panel, values in a vector and pixels in a tile, over all instruction sets.
const VECTORS_MAX: usize = 4;
const LANES_MAX: usize = 16;
const ROWS_MAX: usize = 14;

/// Computes the convolution in tiles of at most `ROWS` pixels and panels of at most `VECTORS` vectors.
///
/// # Safety
/// The processor supports the instruction set of `V`.
///
/// # Panics
/// If the arguments exceed their slices.
pub(crate) unsafe fn run<V: SimdF32, const ROWS: usize, const VECTORS: usize>(args: &mut GemmArgs<'_>) {
    args.check();
    let layout = PanelLayout { lanes: V::LANES, vectors: VECTORS, half_vectors: V::Half::LANES < V::LANES };
    assert_eq!(args.gemm.layout, layout, "the weights are packed for another instruction set");
    for first in args.outputs.clone().step_by(layout.width()) {
        let valid = (args.outputs.end - first).min(layout.width());
        // SAFETY: `check` has passed, the caller guarantees the instruction set, and `PackedGemm::new` packs the panel of `valid`
        // outputs for the same kind.
        unsafe {
            match layout.kind(valid) {
                PanelKind::One => run_panel::<V, ROWS, 1>(args, first, valid),
                PanelKind::Two => run_panel::<V, ROWS, 2>(args, first, valid),
                PanelKind::ThreeHalves => run_panel::<V::Half, 7, 3>(args, first, valid),
                PanelKind::Full => run_panel::<V, ROWS, VECTORS>(args, first, valid),
            }
        }
    }
}

/// Some pixels × one panel.
pub(crate) struct Tile {
    weights: *const f32,
    bias: *const f32,
    input: *const f32,
    input_strides: InputStrides,
    /// Inputs in a segment.
    segment_len: usize,
    /// The residual, if any, and the values of one pixel of it.
    residual: Option<(*const f32, usize)>,
    clip: Clip,
    /// Outputs of the panel that are not padding.
    valid: usize,
    out: *mut f32,
    pixel_stride: usize,
    vector_stride: usize,
}

/// Computes the panel whose first output is `first`, for all pixels.
///
/// # Safety
/// As [`run`]; `args.check()` has passed, and the panel is packed for `VECTORS` vectors of `V`.
unsafe fn run_panel<V: SimdF32, const ROWS: usize, const VECTORS: usize>(
    args: &mut GemmArgs<'_>,
    first: usize,
    valid: usize,
) {
    let PackedGemm { inputs, outputs, clip, layout, .. } = *args.gemm;
    // SAFETY: `check` has shown that the panel lies within weights and bias, and the first pixel's outputs within `out`.
    let (weights, bias, out) = unsafe {
        let (weights, bias) = (args.gemm.weights.as_ptr(), args.gemm.bias.as_ptr());
        let vector = (first - args.outputs.start) / layout.lanes;
        let out = args.out.as_mut_ptr().add(vector * args.output_strides.vector_stride);
        (weights.add(first * inputs), bias.add(first), out)
    };
    // Tile heights differ by at most one pixel, because a last tile of a single pixel would cost as much as a full one.
    let tiles = args.pixels.div_ceil(ROWS);
    let (height, higher) = (args.pixels / tiles, args.pixels % tiles);
    let strides = args.output_strides.merge_rows();
    let vector_stride = if V::LANES == layout.lanes { strides.vector_stride } else { V::LANES };
    let mut staging = [0.0; ROWS_MAX * VECTORS_MAX * LANES_MAX];
    let (mut pixel, mut row, mut x) = (0, 0, 0);
    for tile in 0..tiles {
        let rows = height + usize::from(tile < higher);
        // SAFETY: tiles of at most ROWS pixels cover each pixel once, and `check` has shown that all pixels lie within input, residual
        // and output; a tile that crosses the end of a row goes to `staging`, which has room for the largest.
        unsafe {
            let input = args.input.as_ptr().add(pixel * args.input_strides.pixel_stride);
            let residual = args.residual.map(|values| (values.as_ptr().add(pixel * outputs + first), outputs));
            let (input_strides, segment_len) = (args.input_strides, inputs / args.input_strides.segments);
            let within = x + rows <= strides.width;
            let pixel_stride = strides.pixel_stride;
            let tile = Tile {
                weights,
                bias,
                input,
                input_strides,
                segment_len,
                residual,
                clip,
                valid,
                out,
                pixel_stride,
                vector_stride,
            };
            let tile = match within {
                true => Tile { out: out.add(row * strides.row_stride + x * pixel_stride), ..tile },
                false => {
                    let (pixel_stride, vector_stride) = (VECTORS * V::LANES, V::LANES);
                    Tile { out: staging.as_mut_ptr(), pixel_stride, vector_stride, ..tile }
                }
            };
            match rows {
                1 => V::compute_tile::<1, VECTORS>(&tile),
                2 => V::compute_tile::<2, VECTORS>(&tile),
                3 => V::compute_tile::<3, VECTORS>(&tile),
                4 => V::compute_tile::<4, VECTORS>(&tile),
                5 => V::compute_tile::<5, VECTORS>(&tile),
                6 => V::compute_tile::<6, VECTORS>(&tile),
                7 if ROWS > 6 => V::compute_tile::<7, VECTORS>(&tile),
                8 if ROWS > 7 => V::compute_tile::<8, VECTORS>(&tile),
                9 if ROWS > 7 => V::compute_tile::<9, VECTORS>(&tile),
                10 if ROWS > 7 => V::compute_tile::<10, VECTORS>(&tile),
                11 if ROWS > 7 => V::compute_tile::<11, VECTORS>(&tile),
                12 if ROWS > 7 => V::compute_tile::<12, VECTORS>(&tile),
                13 if ROWS > 7 => V::compute_tile::<13, VECTORS>(&tile),
                14 if ROWS > 7 => V::compute_tile::<14, VECTORS>(&tile),
                _ => unreachable!("a tile has 1 to {ROWS} pixels"),
            }
            if !within {
                scatter_tile(&tile, vector_stride, out, strides.offsets_from(row, x).take(rows));
            }
        }
        (pixel, x) = (pixel + rows, x + rows);
        (row, x) = (row + x / strides.width, x % strides.width);
    }
}

/// Copies a staged tile that belongs to several rows to `offsets` of `out`, one offset a pixel, vector by vector.
///
/// # Safety
/// The tile's output is valid for its pixels, and `out` for the offsets plus the vectors at `vector_stride`.
unsafe fn scatter_tile(tile: &Tile, vector_stride: usize, out: *mut f32, offsets: impl Iterator<Item = usize>) {
    for (pixel, offset) in offsets.enumerate() {
        for (vector, lane) in (0..tile.valid).step_by(tile.vector_stride).enumerate() {
            let values = tile.vector_stride.min(tile.valid - lane);
            // SAFETY: by the caller's contract both pointers are valid for `values`; `staging` and `out` do not overlap.
            unsafe {
                let from = tile.out.add(pixel * tile.pixel_stride + lane);
                std::ptr::copy_nonoverlapping(from, out.add(offset + vector * vector_stride), values);
            }
        }
    }
}

/// Inputs by which weights are prefetched: they come from the third-level cache once a frame, which takes a tile of a dozen pixels as
/// long as about ten inputs.
const PREFETCH_INPUTS: usize = 32;

/// Computes a tile, whose sums stay in registers.
///
/// # Safety
/// The caller is compiled for the instruction set of `V`; the tile's pointers are valid for `ROWS` pixels and `VECTORS` vectors.
#[inline(always)]
pub(crate) unsafe fn compute_tile<V: SimdF32, const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
    let InputStrides { pixel_stride, segments, segment_stride } = tile.input_strides;
    // SAFETY: by the caller's contract all loads and stores lie within the tile; prefetches need no valid address.
    unsafe {
        let mut weights = tile.weights;
        let mut sums: [[V; VECTORS]; ROWS] =
            [std::array::from_fn(|vector| V::load(tile.bias.add(vector * V::LANES))); ROWS];
        for segment in 0..segments {
            let mut input = tile.input.add(segment * segment_stride);
            for _ in 0..tile.segment_len {
                for line in (0..VECTORS * V::LANES).step_by(16) {
                    V::prefetch(weights.wrapping_add(PREFETCH_INPUTS * VECTORS * V::LANES + line));
                }
                let row: [V; VECTORS] = std::array::from_fn(|vector| V::load(weights.add(vector * V::LANES)));
                for (pixel, sums) in sums.iter_mut().enumerate() {
                    let value = V::splat(*input.add(pixel * pixel_stride));
                    for vector in 0..VECTORS {
                        sums[vector] = sums[vector].mul_add(value, row[vector]);
                    }
                }
                input = input.add(1);
                weights = weights.add(VECTORS * V::LANES);
            }
        }
        if tile.valid < VECTORS * V::LANES {
            return store_partial_panel(sums, tile);
        }
        if let Some((residual, outputs)) = tile.residual {
            for (pixel, sums) in sums.iter_mut().enumerate() {
                for (vector, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.add(V::load(residual.add(pixel * outputs + vector * V::LANES)));
                }
            }
        }
        let (low, high) = (V::splat(tile.clip.low), V::splat(tile.clip.high));
        for (pixel, sums) in sums.iter().enumerate() {
            for (vector, sum) in sums.iter().enumerate() {
                sum.clip(low, high).store(tile.out.add(pixel * tile.pixel_stride + vector * tile.vector_stride));
            }
        }
    }
}

/// Adds the residual to the sums of a panel that is not full, clips and stores them, value by value.
///
/// # Safety
/// As [`compute_tile`].
#[inline(always)]
unsafe fn store_partial_panel<V: SimdF32, const ROWS: usize, const VECTORS: usize>(
    sums: [[V; VECTORS]; ROWS],
    tile: &Tile,
) {
    let mut values = [0.0_f32; VECTORS_MAX * LANES_MAX];
    for (pixel, sums) in sums.into_iter().enumerate() {
        // SAFETY: `values` holds the widest panel; residual and output are valid for the first `valid` outputs by the caller's contract.
        unsafe {
            for (vector, sum) in sums.into_iter().enumerate() {
                sum.store(values.as_mut_ptr().add(vector * V::LANES));
            }
            for (lane, value) in values[..tile.valid].iter().enumerate() {
                let residual = tile.residual.map_or(0.0, |(residual, outputs)| *residual.add(pixel * outputs + lane));
                let offset = pixel * tile.pixel_stride + lane / V::LANES * tile.vector_stride + lane % V::LANES;
                *tile.out.add(offset) = (value + residual).max(tile.clip.low).min(tile.clip.high);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::simd::Isa;
    use crate::test_util::{Random, assert_close, supported_isas};

    /// Returns clip(weights × input + bias + residual) as `[pixels, outputs]`, in f64.
    fn reference(
        [weights, bias, input]: [&[f32]; 3],
        strides: InputStrides,
        pixels: usize,
        residual: Option<&[f32]>,
        clip: Clip,
    ) -> Vec<f32> {
        let (outputs, inputs) = (bias.len(), weights.len() / bias.len());
        let segment_len = inputs / strides.segments;
        let mut out = Vec::new();
        for pixel in 0..pixels {
            for output in 0..outputs {
                let mut sum = f64::from(bias[output]);
                for i in 0..inputs {
                    let (segment, within) = (i / segment_len, i % segment_len);
                    let value = input[pixel * strides.pixel_stride + segment * strides.segment_stride + within];
                    sum += f64::from(weights[output * inputs + i]) * f64::from(value);
                }
                sum += residual.map_or(0.0, |residual| f64::from(residual[pixel * outputs + output]));
                out.push((sum as f32).max(clip.low).min(clip.high));
            }
        }
        out
    }

    #[test]
    fn random_products_equal_the_reference() {
        let mut random = Random::from_printed_seed();
        for _ in 0..150 {
            let (pixels, outputs) = (random.between(1, 40), random.between(1, 70));
            let (segments, segment_len) = (random.between(1, 4), random.between(1, 12));
            let inputs = segments * segment_len;
            let (weights, bias) = (random.values(outputs * inputs), random.values(outputs));
            let pixel_stride = random.between(1, 2 * segment_len);
            let segment_stride = random.between(segment_len, 50);
            let input_strides = InputStrides { pixel_stride, segments, segment_stride };
            let input = random.values((pixels - 1) * pixel_stride + (segments - 1) * segment_stride + segment_len);
            let residual = random.flip().then(|| random.values(pixels * outputs));
            let clip = if random.flip() { Clip { low: -0.5, high: 0.7 } } else { Clip::NONE };
            let expected = reference([&weights, &bias, &input], input_strides, pixels, residual.as_deref(), clip);
            let width = random.between(1, pixels);
            for isa in supported_isas() {
                let layout = isa.panel_layout();
                let gemm = PackedGemm::new(&weights, &bias, [outputs, inputs], clip, layout);
                let gap = random.between(0, 3);
                let pixel_stride = outputs + gap;
                let row_stride = width * pixel_stride + random.between(0, 5);
                let output_strides = OutputStrides { width, pixel_stride, row_stride, vector_stride: layout.lanes };
                let length = (pixels - 1) / width * row_stride + (pixels - 1) % width * pixel_stride + outputs;
                let mut out = vec![f32::NAN; length];
                isa.gemm(&mut GemmArgs {
                    gemm: &gemm,
                    outputs: 0..outputs,
                    input: &input,
                    input_strides,
                    pixels,
                    residual: residual.as_deref(),
                    out: &mut out,
                    output_strides,
                });
                let mut written = vec![false; length];
                let mut found = Vec::new();
                for pixel in 0..pixels {
                    let offset = pixel / width * row_stride + pixel % width * pixel_stride;
                    found.extend_from_slice(&out[offset..][..outputs]);
                    written[offset..][..outputs].fill(true);
                }
                assert_close(&found, &expected, &format!("{isa:?} {pixels} × {outputs} × {inputs}"));
                let untouched = out.iter().zip(&written).all(|(value, written)| *written || value.is_nan());
                assert!(untouched, "{isa:?}: values between the pixels are overwritten");
            }
        }
    }

    #[test]
    fn outputs_in_channel_blocks_and_parts_equal_the_reference() {
        let mut random = Random::from_printed_seed();
        for isa in supported_isas() {
            let layout = isa.panel_layout();
            for _ in 0..30 {
                let (pixels, inputs) = (random.between(1, 30), random.between(1, 20));
                let given = random.between(1, 3 * layout.width());
                let blocks = given.div_ceil(layout.lanes);
                let outputs = blocks * layout.lanes;
                let (weights, bias, input) =
                    (random.values(given * inputs), random.values(given), random.values(pixels * inputs));
                let input_strides = InputStrides { pixel_stride: inputs, segments: 1, segment_stride: 0 };
                let expected = reference([&weights, &bias, &input], input_strides, pixels, None, Clip::NONE);
                let gemm = PackedGemm::new(&weights, &bias, [outputs, inputs], Clip::NONE, layout);
                let block_len = pixels * layout.lanes;
                let output_strides = OutputStrides {
                    width: pixels,
                    pixel_stride: layout.lanes,
                    row_stride: block_len,
                    vector_stride: block_len,
                };
                let mut out = vec![f32::NAN; blocks * block_len];
                for first in (0..outputs).step_by(layout.width()) {
                    isa.gemm(&mut GemmArgs {
                        gemm: &gemm,
                        outputs: first..(first + layout.width()).min(outputs),
                        input: &input,
                        input_strides,
                        pixels,
                        residual: None,
                        out: &mut out[first / layout.lanes * block_len..],
                        output_strides,
                    });
                }
                let mut found = Vec::new();
                for pixel in 0..pixels {
                    for output in 0..outputs {
                        let (block, lane) = (output / layout.lanes, output % layout.lanes);
                        let value = out[block * block_len + pixel * layout.lanes + lane];
                        if output < given { found.push(value) } else { assert_eq!(value, 0.0, "{isa:?}: padding") }
                    }
                }
                assert_close(&found, &expected, &format!("{isa:?} {pixels} × {given} × {inputs}"));
            }
        }
    }

    #[test]
    fn arguments_that_exceed_their_slices_panic() {
        let valid = (4, 3 * 5, 4 * 6, 5, 6, 4 * 6);
        let run = |isa: Isa,
                   (pixels, input, out, pixel_stride, out_stride, residual): (
            usize,
            usize,
            usize,
            usize,
            usize,
            usize,
        )| {
            let gemm = PackedGemm::new(&[1.0; 30], &[0.0; 6], [6, 5], Clip::NONE, isa.panel_layout());
            let (input, mut out, residual) = (vec![0.0; input + 5], vec![0.0; out], vec![0.0; residual]);
            let lanes = isa.lanes();
            catch_unwind(AssertUnwindSafe(|| {
                isa.gemm(&mut GemmArgs {
                    gemm: &gemm,
                    outputs: 0..6,
                    input: &input,
                    input_strides: InputStrides { pixel_stride, segments: 1, segment_stride: 0 },
                    pixels,
                    residual: Some(&residual),
                    out: &mut out,
                    output_strides: OutputStrides {
                        width: pixels,
                        pixel_stride: out_stride,
                        row_stride: pixels.wrapping_mul(out_stride),
                        vector_stride: lanes,
                    },
                });
            }))
            .is_ok()
        };
        let (pixels, input, out, pixel_stride, out_stride, residual) = valid;
        for isa in supported_isas() {
            assert!(run(isa, valid));
            assert!(!run(isa, (0, input, out, pixel_stride, out_stride, residual)), "no pixels");
            assert!(!run(isa, (pixels, input - 1, out, pixel_stride, out_stride, residual)), "short input");
            assert!(!run(isa, (pixels, input, out - 1, pixel_stride, out_stride, residual)), "short output");
            assert!(!run(isa, (pixels, input, out, pixel_stride, out_stride, residual - 1)), "short residual");
            // Strides whose products wrap around to small values.
            assert!(!run(isa, (pixels, input, out, usize::MAX / 3 + 1, out_stride, residual)), "wrapping input");
            assert!(!run(isa, (pixels, input, out, pixel_stride, usize::MAX / 3 + 1, residual)), "wrapping output");
        }
    }
}
