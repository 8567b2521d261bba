//! A block of MobileNet: expansion, depthwise convolution, projection, residual, as one piece.
//!
//! Between expansion and projection a map lies in planes of as many channels as a vector holds, `lanes`; before the depthwise
//! convolution with its padding, `[rows, planes, across, lanes]`, behind it `[planes, rows, width, lanes]`. One
//! strip of rows follows the other, so that it stays in the cache; or, where several threads share a small map, each has planes of its own.

use std::ops::Range;

use super::chain::Chain;
use super::depthwise::{self, Depthwise};
use super::layers::{Block, Padding, Size, Stage};
use super::product::{self, Place, Reach};
use super::threads::{Scratch, Threads, room};

/// Numbers that a strip's rows may take: they stay in a second-level cache of half a megabyte.
const STRIP: usize = 128 << 10;
/// Numbers of a map, and of a thread's share in the one before it, up to which each thread takes planes of it and not rows.
const SHARED: usize = 192 << 10;

impl Chain {
    /// `between`: a buffer for the map behind the depthwise convolution, where threads share it.
    pub fn block(
        &self,
        block: &Block,
        stage: &Stage,
        from: &[f32],
        to: &mut [f32],
        between: &mut Vec<f32>,
        threads: &mut Threads<'_>,
    ) {
        let (line, row) = block.lines(self.lanes());
        let shared = block.down() * line / threads.count() + block.after.height * row;
        if threads.count() > 1 && shared <= SHARED {
            self.by_planes(block, stage, from, to, between, threads);
        } else {
            threads.spread(stage.to.height, stage.to.row(), to, &|range, to, scratch| {
                self.strips(block, stage, from, range, to, scratch);
            });
        }
    }

    /// Each thread expands planes of its own and convolves them; then all project. No row is computed twice.
    fn by_planes(
        &self,
        block: &Block,
        stage: &Stage,
        from: &[f32],
        to: &mut [f32],
        between: &mut Vec<f32>,
        threads: &mut Threads<'_>,
    ) {
        let product::Panels { lanes, vectors, .. } = self.instructions.panels();
        let Size { height: rows, width, channels } = block.after;
        let (planes, pixels) = (block.depthwise.planes, rows * width);
        let after = room(between, planes * pixels * lanes);
        threads.spread(planes.div_ceil(vectors), vectors * pixels * lanes, after, &|panels, out, scratch| {
            let planes = panels.start * vectors..(panels.end * vectors).min(planes);
            let inner = room(&mut scratch.inner, block.down() * block.across() * planes.len() * lanes);
            self.inner(block, stage.from, from, 0..block.down(), planes.clone(), inner);
            self.depthwise(block, planes, inner, rows, out);
        });
        match &block.project {
            Some(project) => {
                let reach = Reach { step: lanes, pieces: planes, apart: pixels * lanes };
                let residual = block.residual.then_some(from);
                self.pixels(project, after, reach, pixels, residual, to, threads);
            }
            None => bring_together(after, pixels, lanes, channels, to),
        }
    }

    /// Rows `range` of a block, strip after strip; rows of the expansion that two strips need are kept.
    fn strips(
        &self,
        block: &Block,
        stage: &Stage,
        from: &[f32],
        range: Range<usize>,
        to: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let Depthwise { side, stride, planes, .. } = block.depthwise;
        let (line, row) = block.lines(self.lanes());
        let most = (STRIP / (stride * line + row)).max(1);
        // None is much smaller than the others.
        let rows = range.len().div_ceil(range.len().div_ceil(most));
        let inner = room(&mut scratch.inner, ((rows - 1) * stride + side) * line);
        let mut have = 0..0_usize;
        for first in range.clone().step_by(rows) {
            let strip = first..(first + rows).min(range.end);
            // In rows of the padded map.
            let need = first * stride..(strip.end - 1) * stride + side;
            let kept = have.end.saturating_sub(need.start).min(have.len());
            if kept > 0 {
                let begin = (need.start - have.start) * line;
                inner.copy_within(begin..begin + kept * line, 0);
            }
            self.inner(block, stage.from, from, need.start + kept..need.end, 0..planes, &mut inner[kept * line..]);
            have = need;
            let to = &mut to[(first - range.start) * stage.to.row()..];
            self.behind(block, from, strip, inner, &mut scratch.after, to);
        }
    }

    /// Rows `range` of some planes of the padded map that the depthwise convolution looks at.
    fn inner(
        &self,
        block: &Block,
        size: Size,
        from: &[f32],
        range: Range<usize>,
        planes: Range<usize>,
        inner: &mut [f32],
    ) {
        let Padding { top, left, right, .. } = block.padding;
        let (lanes, across) = (self.lanes(), block.across());
        let line = across * planes.len() * lanes;
        let real = range.start.max(top)..range.end.min(top + block.inner.height);
        for (row, line) in range.clone().zip(inner.chunks_exact_mut(line)) {
            if !real.contains(&row) || block.expand.is_none() {
                line.fill(0.0);
                continue;
            }
            for plane in line.chunks_exact_mut(across * lanes) {
                plane[..left * lanes].fill(0.0);
                plane[(across - right) * lanes..].fill(0.0);
            }
        }
        if real.is_empty() {
            return;
        }
        let to = &mut inner[(real.start - range.start) * line + left * lanes..];
        let place = Place { width: block.inner.width, step: lanes, row: line, apart: across * lanes };
        let rows = real.start - top..real.end - top;
        let channels = planes.start * lanes..planes.end * lanes;
        match &block.expand {
            Some(expand) => self.rows(expand, size, from, rows, channels, to, place),
            None => {
                let channels = channels.start..channels.end.min(size.channels);
                for (row, to) in rows.zip(to.chunks_mut(line)) {
                    let pixels = from[row * size.row()..].chunks_exact(size.channels).take(size.width);
                    for (x, pixel) in pixels.enumerate() {
                        for (values, to) in pixel[channels.clone()].chunks(lanes).zip(to.chunks_mut(place.apart)) {
                            to[x * lanes..][..values.len()].copy_from_slice(values);
                        }
                    }
                }
            }
        }
    }

    fn depthwise(&self, block: &Block, planes: Range<usize>, input: &[f32], rows: usize, out: &mut [f32]) {
        let (depthwise, across, width) = (&block.depthwise, block.across(), block.after.width);
        self.instructions.depthwise(&mut depthwise::Job { depthwise, planes, input, across, rows, width, out });
    }

    /// Rows `range` of what follows the padded map: depthwise, projection, residual. `inner` begins with the first row needed.
    fn behind(
        &self,
        block: &Block,
        from: &[f32],
        range: Range<usize>,
        inner: &[f32],
        after: &mut Vec<f32>,
        to: &mut [f32],
    ) {
        let (lanes, planes) = (self.lanes(), block.depthwise.planes);
        let Size { width, channels, .. } = block.after;
        let pixels = range.len() * width;
        let after = room(after, planes * pixels * lanes);
        self.depthwise(block, 0..planes, inner, range.len(), after);
        let Some(project) = &block.project else { return bring_together(after, pixels, lanes, channels, to) };
        let reach = Reach { step: lanes, pieces: planes, apart: pixels * lanes };
        let residual = block.residual.then(|| &from[range.start * width * project.outputs..]);
        self.pixels(project, after, reach, pixels, residual, to, &mut Threads::alone());
    }
}

/// `[planes, pixels, lanes]` → `[pixels, channels]`
fn bring_together(planes: &[f32], pixels: usize, lanes: usize, channels: usize, to: &mut [f32]) {
    for (plane, values) in planes.chunks_exact(pixels * lanes).enumerate() {
        for (pixel, values) in to.chunks_exact_mut(channels).zip(values.chunks_exact(lanes)) {
            let channels = pixel[plane * lanes..].iter_mut();
            channels.zip(values).for_each(|(to, value)| *to = *value);
        }
    }
}
