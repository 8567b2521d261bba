//! The inverted residual block of MobileNetV2: expansion, depthwise convolution, projection and residual in one pass.
//!
//! Between expansion and projection a feature map is stored in blocks of as many channels as a vector holds, `lanes`: before the
//! depthwise convolution with its padding, `[rows, channel_blocks, padded_width, lanes]`, after it
//! `[channel_blocks, rows, width, lanes]`. The block is computed in strips of rows, which stay in the second-level cache; or, if several
//! threads share a small feature map, each thread computes channel blocks of its own.

use std::ops::Range;

use crate::compiled_net::CompiledNet;
use crate::depthwise::{Depthwise, DepthwiseArgs};
use crate::gemm::{InputStrides, OutputStrides, PackedGemm, PanelLayout};
use crate::layers::{BlockGeometry, CompiledLayer, DenseConv, FeatureMapShape, Padding};
use crate::partition::{Scratch, Workers, grown};

/// Values in the rows of a strip, at most: they stay in a second-level cache of half a megabyte.
const STRIP_VALUES: usize = 128 << 10;
/// If a thread's share of the expanded feature map and the whole convolved feature map together are at most this many values, the threads
/// split channels, not rows.
const SHARED_VALUES: usize = 192 << 10;

/// A packed inverted residual block.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct InvertedResidual {
    /// Expands the input; without it the input itself is convolved. Its outputs fill whole channel blocks, zeros after the last channel.
    pub expand: Option<DenseConv>,
    pub depthwise: Depthwise,
    /// Its inputs are whole channel blocks, with zero weights after the last channel.
    pub project: Option<PackedGemm>,
    /// Adds the input to the projection.
    pub residual: bool,
    pub geometry: BlockGeometry,
}

/// The values in the buffers of a block, at most.
pub(crate) struct ScratchSize {
    /// Of each thread, before the depthwise convolution.
    pub expanded: usize,
    /// Of each thread, after the depthwise convolution.
    pub convolved: usize,
    /// Of all threads together, after the depthwise convolution.
    pub shared: usize,
}

impl InvertedResidual {
    /// Returns the sizes of the buffers with `threads` threads, or `None` if a size that is computed at run time overflows. `vectors`:
    /// channel blocks in a panel.
    pub fn scratch(geometry: &BlockGeometry, threads: usize, vectors: usize) -> Option<ScratchSize> {
        let BlockGeometry { lanes, kernel, stride, channel_blocks, padding, expanded, convolved } = *geometry;
        let padded_width = expanded.width.checked_add(padding.left)?.checked_add(padding.right)?;
        let padded_height = expanded.height.checked_add(padding.top)?.checked_add(padding.bottom)?;
        let channels = channel_blocks.checked_mul(lanes)?;
        let (line, row) = (padded_width.checked_mul(channels)?, convolved.width.checked_mul(channels)?);
        // These sums bound all that `divides_channels` and `strip_rows` compute.
        let whole = padded_height.checked_mul(line)?;
        let convolved_len = convolved.height.checked_mul(row)?;
        whole.checked_add(convolved_len)?;
        stride.checked_mul(line)?.checked_add(row)?;
        if divides_channels(geometry, threads) {
            let panels = channel_blocks.div_ceil(vectors).div_ceil(threads);
            let blocks = panels.checked_mul(vectors)?.min(channel_blocks);
            let expanded = padded_height * padded_width * blocks * lanes;
            return Some(ScratchSize { expanded, convolved: 0, shared: convolved_len });
        }
        let rows = strip_rows(geometry).min(convolved.height.div_ceil(threads));
        let expanded = (rows - 1).checked_mul(stride)?.checked_add(kernel)?.checked_mul(line)?;
        Some(ScratchSize { expanded, convolved: rows.checked_mul(row)?, shared: 0 })
    }
}

/// Returns whether the threads divide channel blocks and not rows.
fn divides_channels(geometry: &BlockGeometry, threads: usize) -> bool {
    let (line, row) = (geometry.expanded_row_len(), geometry.convolved_row_len());
    let shared = geometry.padded_height() * line / threads + geometry.convolved.height * row;
    threads > 1 && shared <= SHARED_VALUES
}

/// Returns the most output rows of a strip.
fn strip_rows(geometry: &BlockGeometry) -> usize {
    let (line, row) = (geometry.expanded_row_len(), geometry.convolved_row_len());
    (STRIP_VALUES / (geometry.stride * line + row)).max(1)
}

impl CompiledNet {
    /// Computes a block. `shared`: a buffer for the feature map after the depthwise convolution, if threads share it.
    pub(crate) fn inverted_residual(
        &self,
        block: &InvertedResidual,
        layer: &CompiledLayer,
        from: &[f32],
        to: &mut [f32],
        shared: &mut Vec<f32>,
        workers: &mut Workers<'_>,
    ) {
        if divides_channels(&block.geometry, workers.count()) {
            self.by_channels(block, layer, from, to, shared, workers);
        } else {
            workers.split(layer.to.height, layer.to.row_len(), to, &|range, to, scratch| {
                self.strips(block, layer, from, range, to, scratch);
            });
        }
    }

    /// Each thread expands and convolves channel blocks of its own, then all project. No row is computed twice.
    fn by_channels(
        &self,
        block: &InvertedResidual,
        layer: &CompiledLayer,
        from: &[f32],
        to: &mut [f32],
        shared: &mut Vec<f32>,
        workers: &mut Workers<'_>,
    ) {
        let PanelLayout { lanes, vectors, .. } = self.isa().panel_layout();
        let FeatureMapShape { height: rows, width, channels } = block.geometry.convolved;
        let (blocks, pixels) = (block.geometry.channel_blocks, rows * width);
        let (padded_width, padded_height) = (block.geometry.padded_width(), block.geometry.padded_height());
        let convolved = grown(shared, blocks * pixels * lanes);
        workers.split(blocks.div_ceil(vectors), vectors * pixels * lanes, convolved, &|panels, out, scratch| {
            let blocks = panels.start * vectors..(panels.end * vectors).min(blocks);
            let expanded = grown(&mut scratch.expanded, padded_height * padded_width * blocks.len() * lanes);
            self.expand(block, layer.from, from, 0..padded_height, blocks.clone(), expanded);
            self.depthwise(block, blocks, expanded, rows, out);
        });
        match &block.project {
            Some(project) => {
                let strides = InputStrides { pixel_stride: lanes, segments: blocks, segment_stride: pixels * lanes };
                let residual = block.residual.then_some(from);
                self.pointwise(project, convolved, strides, pixels, residual, to, workers);
            }
            None => interleave(convolved, pixels, lanes, channels, to),
        }
    }

    /// Computes the output rows `range`, strip after strip. Expanded rows that two strips need are kept.
    fn strips(
        &self,
        block: &InvertedResidual,
        layer: &CompiledLayer,
        from: &[f32],
        range: Range<usize>,
        to: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let BlockGeometry { kernel, stride, channel_blocks, .. } = block.geometry;
        let line = block.geometry.expanded_row_len();
        // Strips of about equal height.
        let rows = range.len().div_ceil(range.len().div_ceil(strip_rows(&block.geometry)));
        let expanded = grown(&mut scratch.expanded, ((rows - 1) * stride + kernel) * line);
        let mut present = 0..0_usize;
        for first in range.clone().step_by(rows) {
            let strip = first..(first + rows).min(range.end);
            // In rows of the padded feature map.
            let needed = first * stride..(strip.end - 1) * stride + kernel;
            let kept = present.end.saturating_sub(needed.start).min(present.len());
            if kept > 0 {
                let begin = (needed.start - present.start) * line;
                expanded.copy_within(begin..begin + kept * line, 0);
            }
            let missing = needed.start + kept..needed.end;
            self.expand(block, layer.from, from, missing, 0..channel_blocks, &mut expanded[kept * line..]);
            present = needed;
            let to = &mut to[(first - range.start) * layer.to.row_len()..];
            self.convolve_and_project(block, from, strip, expanded, &mut scratch.convolved, to);
        }
    }

    /// Computes rows `range` of some channel blocks of the padded feature map before the depthwise convolution.
    fn expand(
        &self,
        block: &InvertedResidual,
        shape: FeatureMapShape,
        from: &[f32],
        range: Range<usize>,
        channel_blocks: Range<usize>,
        expanded: &mut [f32],
    ) {
        let Padding { top, left, right, .. } = block.geometry.padding;
        let (lanes, padded_width) = (self.lanes(), block.geometry.padded_width());
        let line = padded_width * channel_blocks.len() * lanes;
        let unpadded = range.start.max(top)..range.end.min(top + block.geometry.expanded.height);
        for (row, line) in range.clone().zip(expanded.chunks_exact_mut(line)) {
            if !unpadded.contains(&row) || block.expand.is_none() {
                line.fill(0.0);
                continue;
            }
            for pixels in line.chunks_exact_mut(padded_width * lanes) {
                pixels[..left * lanes].fill(0.0);
                pixels[(padded_width - right) * lanes..].fill(0.0);
            }
        }
        if unpadded.is_empty() {
            return;
        }
        let to = &mut expanded[(unpadded.start - range.start) * line + left * lanes..];
        let (width, vector_stride) = (block.geometry.expanded.width, padded_width * lanes);
        let strides = OutputStrides { width, pixel_stride: lanes, row_stride: line, vector_stride };
        let rows = unpadded.start - top..unpadded.end - top;
        let channels = channel_blocks.start * lanes..channel_blocks.end * lanes;
        match &block.expand {
            Some(expand) => self.dense_rows(expand, shape, from, rows, channels, to, strides),
            None => {
                let channels = channels.start..channels.end.min(shape.channels);
                for (row, to) in rows.zip(to.chunks_mut(line)) {
                    let pixels = from[row * shape.row_len()..].chunks_exact(shape.channels).take(shape.width);
                    for (x, pixel) in pixels.enumerate() {
                        for (values, to) in pixel[channels.clone()].chunks(lanes).zip(to.chunks_mut(vector_stride)) {
                            to[x * lanes..][..values.len()].copy_from_slice(values);
                        }
                    }
                }
            }
        }
    }

    fn depthwise(
        &self,
        block: &InvertedResidual,
        channel_blocks: Range<usize>,
        input: &[f32],
        rows: usize,
        out: &mut [f32],
    ) {
        let (depthwise, padded_width) = (&block.depthwise, block.geometry.padded_width());
        let width = block.geometry.convolved.width;
        self.isa().depthwise(&mut DepthwiseArgs { depthwise, channel_blocks, input, padded_width, rows, width, out });
    }

    /// Computes the output rows `range`: depthwise convolution, projection, residual. `expanded` begins with the first row needed.
    fn convolve_and_project(
        &self,
        block: &InvertedResidual,
        from: &[f32],
        range: Range<usize>,
        expanded: &[f32],
        convolved: &mut Vec<f32>,
        to: &mut [f32],
    ) {
        let (lanes, blocks) = (self.lanes(), block.geometry.channel_blocks);
        let FeatureMapShape { width, channels, .. } = block.geometry.convolved;
        let pixels = range.len() * width;
        let convolved = grown(convolved, blocks * pixels * lanes);
        self.depthwise(block, 0..blocks, expanded, range.len(), convolved);
        let Some(project) = &block.project else { return interleave(convolved, pixels, lanes, channels, to) };
        let strides = InputStrides { pixel_stride: lanes, segments: blocks, segment_stride: pixels * lanes };
        let residual = block.residual.then(|| &from[range.start * width * project.outputs..]);
        self.pointwise(project, convolved, strides, pixels, residual, to, &mut Workers::single());
    }
}

/// Copies `[channel_blocks, pixels, lanes]` to `[pixels, channels]`.
fn interleave(blocks: &[f32], pixels: usize, lanes: usize, channels: usize, to: &mut [f32]) {
    for (block, values) in blocks.chunks_exact(pixels * lanes).enumerate() {
        for (pixel, values) in to.chunks_exact_mut(channels).zip(values.chunks_exact(lanes)) {
            let channels = pixel[block * lanes..].iter_mut();
            channels.zip(values).for_each(|(to, value)| *to = *value);
        }
    }
}
