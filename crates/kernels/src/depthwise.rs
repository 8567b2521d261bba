//! Depthwise convolutions with bias and clip, on blocks of as many channels as a vector holds.

use std::ops::Range;
use std::sync::Arc;

use crate::layers::Clip;
use crate::simd::SimdF32;

/// The packed weights of a depthwise convolution with a `kernel`×`kernel` kernel.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Depthwise {
    pub channel_blocks: usize,
    pub kernel: usize,
    pub stride: usize,
    pub clip: Clip,
    /// `[channel_blocks, kernel × kernel, lanes]`, zeros after the last channel.
    weights: Arc<[f32]>,
    /// `[channel_blocks, lanes]`
    bias: Arc<[f32]>,
}

impl Depthwise {
    /// Packs weights `[channels, kernel, kernel]` and bias `[channels]`.
    pub fn new(weights: &[f32], bias: &[f32], kernel: usize, stride: usize, clip: Clip, lanes: usize) -> Self {
        let channel_blocks = bias.len().div_ceil(lanes);
        let length = Self::packed_len(bias.len(), kernel, lanes).expect("the packed length fits usize");
        let mut packed = vec![0.0; length - channel_blocks * lanes];
        for (channel, taps) in weights.chunks_exact(kernel * kernel).enumerate() {
            for (tap, value) in taps.iter().enumerate() {
                packed[(channel / lanes * kernel * kernel + tap) * lanes + channel % lanes] = *value;
            }
        }
        let mut bias = bias.to_vec();
        bias.resize(channel_blocks * lanes, 0.0);
        Depthwise { channel_blocks, kernel, stride, clip, weights: packed.into(), bias: bias.into() }
    }

    /// Returns the f32 values that the packed weights and bias take, or `None` if that overflows.
    pub fn packed_len(channels: usize, kernel: usize, lanes: usize) -> Option<usize> {
        let taps = kernel.checked_mul(kernel)?;
        channels.checked_next_multiple_of(lanes)?.checked_mul(taps.checked_add(1)?)
    }
}

/// Arguments of one call, for the channel blocks `channel_blocks`: `rows` rows of output, `[blocks, rows, width, lanes]`, from an input
/// with its padding, `[input rows, blocks, padded_width, lanes]`.
pub(crate) struct DepthwiseArgs<'a> {
    pub depthwise: &'a Depthwise,
    pub channel_blocks: Range<usize>,
    pub input: &'a [f32],
    pub padded_width: usize,
    pub rows: usize,
    pub width: usize,
    pub out: &'a mut [f32],
}

/// Returns the product, or `None` if it overflows.
fn checked_product<const N: usize>(factors: [usize; N]) -> Option<usize> {
    factors.into_iter().try_fold(1_usize, usize::checked_mul)
}

impl DepthwiseArgs<'_> {
    /// Checks that every pointer that [`run`] derives stays within the slices.
    ///
    /// # Panics
    /// If one does not, or if a size overflows.
    fn check(&self, lanes: usize) {
        const OVERFLOW: &str = "a size overflows";
        let Depthwise { channel_blocks, kernel, stride, .. } = *self.depthwise;
        let blocks = self.channel_blocks.len();
        assert!(blocks > 0 && self.rows > 0 && self.width > 0 && kernel > 0, "nothing to compute");
        assert!(self.channel_blocks.end <= channel_blocks, "no such channel blocks");
        let span = |outputs: usize| (outputs - 1).checked_mul(stride).and_then(|first| first.checked_add(kernel));
        let (input_rows, input_width) = (span(self.rows).expect(OVERFLOW), span(self.width).expect(OVERFLOW));
        assert!(self.padded_width >= input_width, "the rows of the input are too short");
        let input = checked_product([input_rows, blocks, self.padded_width, lanes]).expect(OVERFLOW);
        assert!(self.input.len() >= input, "the input is too short");
        let out = checked_product([blocks, self.rows, self.width, lanes]).expect(OVERFLOW);
        assert!(self.out.len() >= out, "the output is too short");
        let weights = checked_product([channel_blocks, kernel, kernel, lanes]).expect(OVERFLOW);
        let packed = self.depthwise.weights.len() == weights && self.depthwise.bias.len() == channel_blocks * lanes;
        assert!(packed, "the weights are packed for another instruction set");
    }
}

/// Pixels that are computed side by side, each in a register. The widths of MobileNet's feature maps at 224 pixels are multiples of it.
const PIXELS_PER_STEP: usize = 7;

/// Computes the convolution.
///
/// # Safety
/// The processor supports the instruction set of `V`, and the caller is compiled for it.
///
/// # Panics
/// If the arguments exceed their slices, or kernel and stride are not supported.
#[inline(always)]
pub(crate) unsafe fn run<V: SimdF32>(args: &mut DepthwiseArgs<'_>) {
    args.check(V::LANES);
    // SAFETY: `check` has passed, the caller guarantees the instruction set, and each arm has the kernel and stride of `args`.
    unsafe {
        match (args.depthwise.kernel, args.depthwise.stride) {
            (3, 1) => run_sized::<V, 3, 1>(args),
            (3, 2) => run_sized::<V, 3, 2>(args),
            (5, 1) => run_sized::<V, 5, 1>(args),
            (5, 2) => run_sized::<V, 5, 2>(args),
            (kernel, stride) => unreachable!("a {kernel}×{kernel} kernel at a stride of {stride}"),
        }
    }
}

/// Computes block after block: the rows that a block needs stay in the first-level cache.
///
/// # Safety
/// As [`run`]; `args.check()` has passed, and the convolution has this kernel and stride.
#[inline(always)]
unsafe fn run_sized<V: SimdF32, const KERNEL: usize, const STRIDE: usize>(args: &mut DepthwiseArgs<'_>) {
    for block in 0..args.channel_blocks.len() {
        for row in 0..args.rows {
            for x in (0..args.width).step_by(PIXELS_PER_STEP) {
                // SAFETY: block, row and pixels lie within those of the arguments; the rest is this function's contract.
                unsafe {
                    match args.width - x {
                        1 => compute_pixels::<V, KERNEL, STRIDE, 1>(args, block, row, x),
                        2 => compute_pixels::<V, KERNEL, STRIDE, 2>(args, block, row, x),
                        3 => compute_pixels::<V, KERNEL, STRIDE, 3>(args, block, row, x),
                        4 => compute_pixels::<V, KERNEL, STRIDE, 4>(args, block, row, x),
                        5 => compute_pixels::<V, KERNEL, STRIDE, 5>(args, block, row, x),
                        6 => compute_pixels::<V, KERNEL, STRIDE, 6>(args, block, row, x),
                        _ => compute_pixels::<V, KERNEL, STRIDE, PIXELS_PER_STEP>(args, block, row, x),
                    }
                }
            }
        }
    }
}

/// Computes `PIXELS` pixels of one channel block and row, from `x` on.
///
/// # Safety
/// As [`run_sized`]; `x + PIXELS ≤ width`, `row < rows`, `block < channel_blocks.len()`.
#[inline(always)]
unsafe fn compute_pixels<V: SimdF32, const KERNEL: usize, const STRIDE: usize, const PIXELS: usize>(
    args: &mut DepthwiseArgs<'_>,
    block: usize,
    row: usize,
    x: usize,
) {
    let Depthwise { clip, ref weights, ref bias, .. } = *args.depthwise;
    let (blocks, own) = (args.channel_blocks.len(), args.channel_blocks.start + block);
    let line = args.padded_width * V::LANES;
    // SAFETY: `check` has shown that the rows and pixels of the arguments lie within their slices, and the block within the weights.
    unsafe {
        let weights = weights.as_ptr().add(own * KERNEL * KERNEL * V::LANES);
        let input = args.input.as_ptr().add((row * STRIDE * blocks + block) * line + x * STRIDE * V::LANES);
        let mut sums = [V::load(bias.as_ptr().add(own * V::LANES)); PIXELS];
        for down in 0..KERNEL {
            let input = input.add(down * blocks * line);
            for right in 0..KERNEL {
                let weight = V::load(weights.add((down * KERNEL + right) * V::LANES));
                for (pixel, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.mul_add(V::load(input.add((pixel * STRIDE + right) * V::LANES)), weight);
                }
            }
        }
        let (low, high) = (V::splat(clip.low), V::splat(clip.high));
        let out = args.out.as_mut_ptr().add(((block * args.rows + row) * args.width + x) * V::LANES);
        for (pixel, sum) in sums.into_iter().enumerate() {
            sum.clip(low, high).store(out.add(pixel * V::LANES));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::test_util::{Random, assert_close, supported_isas};

    #[test]
    fn random_convolutions_equal_the_reference() {
        let mut random = Random::from_printed_seed();
        for isa in supported_isas() {
            let lanes = isa.lanes();
            for _ in 0..60 {
                let (kernel, stride) = (if random.flip() { 3 } else { 5 }, random.between(1, 2));
                let (rows, width, channels) = (random.between(1, 9), random.between(1, 23), random.between(1, 40));
                let weights = random.values(channels * kernel * kernel);
                let bias = random.values(channels);
                let clip = if random.flip() { Clip { low: 0.0, high: 1.0 } } else { Clip::NONE };
                let depthwise = Depthwise::new(&weights, &bias, kernel, stride, clip, lanes);
                let first = random.between(0, depthwise.channel_blocks - 1);
                let channel_blocks = first..random.between(first + 1, depthwise.channel_blocks);
                let blocks = channel_blocks.len();
                let input_rows = (rows - 1) * stride + kernel;
                let padded_width = (width - 1) * stride + kernel + random.between(0, 2);
                let input = random.values(input_rows * blocks * padded_width * lanes);
                let mut out = vec![f32::NAN; blocks * rows * width * lanes];
                let (depthwise, input_, out_) = (&depthwise, &input[..], &mut out[..]);
                isa.depthwise(&mut DepthwiseArgs {
                    depthwise,
                    channel_blocks: channel_blocks.clone(),
                    input: input_,
                    padded_width,
                    rows,
                    width,
                    out: out_,
                });
                let mut expected = Vec::new();
                for block in 0..blocks {
                    for (row, x) in (0..rows).flat_map(|row| (0..width).map(move |x| (row, x))) {
                        for lane in 0..lanes {
                            let channel = (channel_blocks.start + block) * lanes + lane;
                            let mut sum = bias.get(channel).map_or(0.0, |bias| f64::from(*bias));
                            for (down, right) in
                                (0..kernel).flat_map(|down| (0..kernel).map(move |right| (down, right)))
                            {
                                let pixel =
                                    ((row * stride + down) * blocks + block) * padded_width + x * stride + right;
                                let weight = weights.get((channel * kernel + down) * kernel + right);
                                sum += f64::from(input[pixel * lanes + lane]) * weight.map_or(0.0, |w| f64::from(*w));
                            }
                            expected.push((sum as f32).max(clip.low).min(clip.high));
                        }
                    }
                }
                assert_close(&out, &expected, &format!("{isa:?} {kernel}×{kernel}/{stride} {rows}×{width}×{channels}"));
            }
        }
    }

    #[test]
    fn arguments_that_exceed_their_slices_panic() {
        for isa in supported_isas() {
            let lanes = isa.lanes();
            let depthwise = Depthwise::new(&[1.0; 9], &[0.0], 3, 1, Clip::NONE, lanes);
            let run =
                |rows: usize, width: usize, padded_width: usize, input: usize, out: usize, blocks: Range<usize>| {
                    let (input, mut out) = (vec![0.0; input * lanes], vec![0.0; out * lanes]);
                    let args = &mut DepthwiseArgs {
                        depthwise: &depthwise,
                        channel_blocks: blocks,
                        input: &input,
                        padded_width,
                        rows,
                        width,
                        out: &mut out,
                    };
                    catch_unwind(AssertUnwindSafe(|| isa.depthwise(args))).is_ok()
                };
            assert!(run(2, 3, 5, 20, 6, 0..1));
            assert!(!run(2, 3, 5, 19, 6, 0..1), "short input");
            assert!(!run(2, 3, 5, 20, 5, 0..1), "short output");
            assert!(!run(2, 3, 4, 20, 6, 0..1), "short rows");
            assert!(!run(2, 3, 5, 20, 6, 0..2), "a block that does not exist");
            assert!(!run(2, 0, 5, 20, 6, 0..1), "no pixels");
            assert!(!run(usize::MAX / 2, 3, 5, 20, 6, 0..1), "wrapping rows");
            assert!(!run(2, 3, usize::MAX / lanes + 1, 20, 6, 0..1), "wrapping width");
        }
    }
}
