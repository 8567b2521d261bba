//! Depthwise convolutions: each channel for itself, with bias and clip, on planes of as many channels as a vector holds.

use std::ops::Range;

use super::lanes::Lanes;
use super::product::Clip;

/// A depthwise convolution of `side`×`side` taps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Depthwise {
    pub planes: usize,
    pub side: usize,
    pub stride: usize,
    pub clip: Clip,
    /// `[planes, side × side, lanes]`, zeros behind the last channel.
    taps: Vec<f32>,
    /// `[planes, lanes]`
    bias: Vec<f32>,
}

impl Depthwise {
    /// in: taps `[channels, side, side]`, bias `[channels]`.
    pub fn new(taps: &[f32], bias: &[f32], side: usize, stride: usize, clip: Clip, lanes: usize) -> Self {
        let planes = bias.len().div_ceil(lanes);
        let mut packed = vec![0.0; planes * side * side * lanes];
        for (channel, taps) in taps.chunks_exact(side * side).enumerate() {
            for (tap, value) in taps.iter().enumerate() {
                packed[(channel / lanes * side * side + tap) * lanes + channel % lanes] = *value;
            }
        }
        let mut bias = bias.to_vec();
        bias.resize(planes * lanes, 0.0);
        Depthwise { planes, side, stride, clip, taps: packed, bias }
    }
}

/// One call for some planes: `rows` rows of output, `[planes, rows, width, lanes]`, from an input that has its padding around it,
/// `[rows, planes, across, lanes]`.
pub(super) struct Job<'a> {
    pub depthwise: &'a Depthwise,
    pub planes: Range<usize>,
    pub input: &'a [f32],
    pub across: usize,
    pub rows: usize,
    pub width: usize,
    pub out: &'a mut [f32],
}

impl Job<'_> {
    fn check(&self, lanes: usize) {
        let Depthwise { planes: all, side, stride, .. } = *self.depthwise;
        let planes = self.planes.len();
        assert!(planes > 0 && self.rows > 0 && self.width > 0 && side > 0, "there is something to do");
        assert!(self.planes.end <= all, "the planes are there");
        let down = (self.rows - 1) * stride + side;
        assert!(self.across >= (self.width - 1) * stride + side, "a row of the input is wide enough");
        assert!(self.input.len() >= down * planes * self.across * lanes, "the input has rows enough");
        assert!(self.out.len() >= planes * self.rows * self.width * lanes, "the output has room");
        let (taps, bias) = (self.depthwise.taps.len(), self.depthwise.bias.len());
        assert!(taps == all * side * side * lanes && bias == all * lanes, "packed for these instructions");
    }
}

/// Pixels that are computed side by side, each in a register. Maps of MobileNet at 224 pixels are multiples of it.
const BESIDE: usize = 7;

/// Runs a job.
///
/// # Safety
/// The processor has the instructions of `V`, and the caller is compiled for them.
#[inline(always)]
pub(super) unsafe fn run<V: Lanes>(job: &mut Job<'_>) {
    job.check(V::N);
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

/// Plane after plane: the rows of one that are looked at stay in the first-level cache.
///
/// # Safety
/// As [`run`], `job.check()` has held, and the job is of this side and stride.
#[inline(always)]
unsafe fn sided<V: Lanes, const SIDE: usize, const STRIDE: usize>(job: &mut Job<'_>) {
    for plane in 0..job.planes.len() {
        for row in 0..job.rows {
            for x in (0..job.width).step_by(BESIDE) {
                // SAFETY: the planes and the pixels are the job's.
                unsafe {
                    match job.width - x {
                        1 => some::<V, SIDE, STRIDE, 1>(job, plane, row, x),
                        2 => some::<V, SIDE, STRIDE, 2>(job, plane, row, x),
                        3 => some::<V, SIDE, STRIDE, 3>(job, plane, row, x),
                        4 => some::<V, SIDE, STRIDE, 4>(job, plane, row, x),
                        5 => some::<V, SIDE, STRIDE, 5>(job, plane, row, x),
                        6 => some::<V, SIDE, STRIDE, 6>(job, plane, row, x),
                        _ => some::<V, SIDE, STRIDE, BESIDE>(job, plane, row, x),
                    }
                }
            }
        }
    }
}

/// `PIXELS` pixels of one of the job's planes, from `x` on.
///
/// # Safety
/// As [`sided`]; `x + PIXELS ≤ width`, `plane < planes.len()`.
#[inline(always)]
unsafe fn some<V: Lanes, const SIDE: usize, const STRIDE: usize, const PIXELS: usize>(
    job: &mut Job<'_>,
    plane: usize,
    row: usize,
    x: usize,
) {
    let Depthwise { clip, ref taps, ref bias, .. } = *job.depthwise;
    let (planes, own) = (job.planes.len(), job.planes.start + plane);
    let line = job.across * V::N;
    // SAFETY: by `check` every place below lies within its slice.
    unsafe {
        let taps = taps.as_ptr().add(own * SIDE * SIDE * V::N);
        let input = job.input.as_ptr().add((row * STRIDE * planes + plane) * line + x * STRIDE * V::N);
        let mut sums = [V::load(bias.as_ptr().add(own * V::N)); PIXELS];
        for down in 0..SIDE {
            let input = input.add(down * planes * line);
            for right in 0..SIDE {
                let tap = V::load(taps.add((down * SIDE + right) * V::N));
                for (pixel, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.plus(V::load(input.add((pixel * STRIDE + right) * V::N)), tap);
                }
            }
        }
        let (low, high) = (V::splat(clip.low), V::splat(clip.high));
        let out = job.out.as_mut_ptr().add(((plane * job.rows + row) * job.width + x) * V::N);
        for (pixel, sum) in sums.into_iter().enumerate() {
            sum.clip(low, high).store(out.add(pixel * V::N));
        }
    }
}
