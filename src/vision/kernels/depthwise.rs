//! Depthwise convolutions: each channel for itself, with bias and clip, vectors across the channels.

use super::lanes::Lanes;
use super::product::Clip;

/// A depthwise convolution of `side`×`side` taps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Depthwise {
    pub channels: usize,
    pub side: usize,
    pub stride: usize,
    pub clip: Clip,
    /// `[side × side, channels]`
    pub taps: Vec<f32>,
    /// `[channels]`
    pub bias: Vec<f32>,
}

/// One call: `rows` rows of output, `[rows, width, channels]`, from an input that has its padding around it, rows of `across` pixels.
pub(super) struct Job<'a> {
    pub depthwise: &'a Depthwise,
    pub input: &'a [f32],
    pub across: usize,
    pub rows: usize,
    pub width: usize,
    pub out: &'a mut [f32],
}

impl Job<'_> {
    fn check(&self) {
        let Depthwise { channels, side, stride, .. } = *self.depthwise;
        assert!(self.rows > 0 && self.width > 0 && side > 0, "there is something to do");
        let down = (self.rows - 1) * stride + side;
        assert!(self.across >= (self.width - 1) * stride + side, "a row of the input is wide enough");
        assert!(self.input.len() >= down * self.across * channels, "the input has rows enough");
        assert!(self.out.len() >= self.rows * self.width * channels, "the output has room");
        assert!(self.depthwise.taps.len() == side * side * channels && self.depthwise.bias.len() == channels);
    }
}

/// Pixels that are computed side by side, each in a register. Maps of MobileNet at 224 pixels are multiples of it.
const BESIDE: usize = 7;

/// Runs a job, vectors of `V` as far as the channels go, the rest one by one.
///
/// # Safety
/// The processor has the instructions of `V`, and the caller is compiled for them.
#[inline(always)]
pub(super) unsafe fn run<V: Lanes>(job: &mut Job<'_>) {
    job.check();
    // SAFETY: `check` has held; the instructions are the caller's promise.
    unsafe {
        match (job.depthwise.side, job.depthwise.stride) {
            (3, 1) => sided::<V, 3, 1>(job),
            (3, 2) => sided::<V, 3, 2>(job),
            (5, 1) => sided::<V, 5, 1>(job),
            (5, 2) => sided::<V, 5, 2>(job),
            (side, stride) => unreachable!("{side}×{side} taps at a stride of {stride} are left to tract"),
        }
    }
}

/// # Safety
/// As [`run`], `job.check()` has held, and the job is of this side and stride.
#[inline(always)]
unsafe fn sided<V: Lanes, const SIDE: usize, const STRIDE: usize>(job: &mut Job<'_>) {
    let channels = job.depthwise.channels;
    let whole = channels / V::N * V::N;
    for row in 0..job.rows {
        for channel in (0..whole).step_by(V::N) {
            let mut x = 0;
            // SAFETY: the channels and the pixels are within the job's.
            unsafe {
                while x + BESIDE <= job.width {
                    some::<V, SIDE, STRIDE, BESIDE>(job, row, x, channel);
                    x += BESIDE;
                }
                match job.width - x {
                    0 => {}
                    1 => some::<V, SIDE, STRIDE, 1>(job, row, x, channel),
                    2 => some::<V, SIDE, STRIDE, 2>(job, row, x, channel),
                    3 => some::<V, SIDE, STRIDE, 3>(job, row, x, channel),
                    4 => some::<V, SIDE, STRIDE, 4>(job, row, x, channel),
                    5 => some::<V, SIDE, STRIDE, 5>(job, row, x, channel),
                    _ => some::<V, SIDE, STRIDE, 6>(job, row, x, channel),
                }
            }
        }
        for channel in whole..channels {
            for x in 0..job.width {
                // SAFETY: the same.
                unsafe { some::<f32, SIDE, STRIDE, 1>(job, row, x, channel) }
            }
        }
    }
}

/// `PIXELS` pixels from `x` on, the channels of one vector.
///
/// # Safety
/// As [`sided`]; `x + PIXELS ≤ width`, `channel + V::N ≤ channels`.
#[inline(always)]
unsafe fn some<V: Lanes, const SIDE: usize, const STRIDE: usize, const PIXELS: usize>(
    job: &mut Job<'_>,
    row: usize,
    x: usize,
    channel: usize,
) {
    let Depthwise { channels, clip, ref taps, ref bias, .. } = *job.depthwise;
    // SAFETY: by `check` every place below lies within its slice.
    unsafe {
        let taps = taps.as_ptr().add(channel);
        let input = job.input.as_ptr().add((row * STRIDE * job.across + x * STRIDE) * channels + channel);
        let mut sums = [V::load(bias.as_ptr().add(channel)); PIXELS];
        for down in 0..SIDE {
            let line = input.add(down * job.across * channels);
            for right in 0..SIDE {
                let tap = V::load(taps.add((down * SIDE + right) * channels));
                for (pixel, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.plus(V::load(line.add((pixel * STRIDE + right) * channels)), tap);
                }
            }
        }
        let (low, high) = (V::splat(clip.low), V::splat(clip.high));
        let out = job.out.as_mut_ptr().add((row * job.width + x) * channels + channel);
        for (pixel, sum) in sums.into_iter().enumerate() {
            sum.clip(low, high).store(out.add(pixel * channels));
        }
    }
}
