//! A run of MobileNet's layers as one piece: maps with their channels last, blocks on strips of rows, threads across them.

use std::ops::Range;
use std::time::{Duration, Instant};

use rayon::ThreadPool;

use super::Instructions;
use super::depthwise::{self, Depthwise};
use super::product::{self, Place, Product, Reach};

/// A map's sides; its numbers lie as `[height, width, channels]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
}

impl Size {
    pub fn numbers(self) -> usize {
        self.height * self.row()
    }

    fn row(self) -> usize {
        self.width * self.channels
    }
}

/// The zeros around a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Padding {
    pub top: usize,
    pub left: usize,
    pub bottom: usize,
    pub right: usize,
}

impl Padding {
    pub const NONE: Padding = Padding { top: 0, left: 0, bottom: 0, right: 0 };
}

/// A convolution of few channels, looked at as a product over patches; its input has its padding around it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct First {
    /// Its inputs are a patch's numbers, `[side, side, channels]`.
    pub product: Product,
    pub side: usize,
    pub stride: usize,
    pub padding: Padding,
}

/// What makes rows of one map out of another, each pixel for itself or from a patch.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Rows {
    Product(Product),
    First(First),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Block {
    /// Expands the input; without it the depthwise convolution looks at the input itself.
    pub expand: Option<Rows>,
    pub depthwise: Depthwise,
    pub padding: Padding,
    /// Its inputs are whole planes, zeros behind the last channel; those of the expansion's outputs too.
    pub project: Option<Product>,
    /// The input is added to the projection.
    pub residual: bool,
    /// Between expansion and depthwise convolution, without padding; and behind that.
    pub inner: Size,
    pub after: Size,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Layer {
    Rows {
        rows: Rows,
        residual: bool,
    },
    Block(Box<Block>),
    /// The mean over all places, with this factor.
    Mean {
        factor: f32,
    },
}

/// One layer and its maps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stage {
    pub layer: Layer,
    pub from: Size,
    pub to: Size,
}

/// Stages, each on what the one before gave.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chain {
    pub stages: Vec<Stage>,
    /// Outside, maps lie channel by channel.
    pub planes: bool,
    pub instructions: Instructions,
}

/// One thread's buffers.
#[derive(Debug, Clone, Default)]
struct Scratch {
    /// Rows before the depthwise convolution, with padding.
    inner: Vec<f32>,
    after: Vec<f32>,
}

/// What a run works in; it grows to its size in the first one.
#[derive(Debug, Clone, Default)]
pub(super) struct Workspace {
    /// The input with zeros around it, which no later map overwrites.
    picture: Vec<f32>,
    from: Vec<f32>,
    to: Vec<f32>,
    scratch: Vec<Scratch>,
    /// What each stage of the last run took.
    pub times: Vec<Duration>,
}

/// Numbers that a strip's rows may take: they stay in a second-level cache of half a megabyte.
const STRIP: usize = 96 << 10;

/// Between a block's expansion and its projection a map lies in planes of as many channels as a vector holds, `lanes`; before the
/// depthwise convolution with its padding, `[rows, planes, across, lanes]`, behind it `[planes, rows, width, lanes]`.
impl Block {
    /// Pixels in a row of the padded map that the depthwise convolution looks at, and numbers.
    fn across(&self) -> usize {
        self.inner.width + self.padding.left + self.padding.right
    }

    fn line(&self, lanes: usize) -> usize {
        self.across() * self.depthwise.planes * lanes
    }

    /// Numbers in a row behind the depthwise convolution.
    fn row(&self, lanes: usize) -> usize {
        self.after.width * self.depthwise.planes * lanes
    }

    /// Its rows.
    fn down(&self) -> usize {
        self.inner.height + self.padding.top + self.padding.bottom
    }
}

/// So many numbers of a buffer, which grows where it is too small; what stands in them is of no account.
fn room(buffer: &mut Vec<f32>, numbers: usize) -> &mut [f32] {
    if buffer.len() < numbers {
        buffer.resize(numbers, 0.0);
    }
    &mut buffer[..numbers]
}

impl Chain {
    pub fn from(&self) -> Size {
        self.stages[0].from
    }

    pub fn to(&self) -> Size {
        self.stages[self.stages.len() - 1].to
    }

    fn lanes(&self) -> usize {
        self.instructions.panels().lanes
    }

    fn place(&self, size: Size) -> Place {
        Place { width: size.width, step: size.channels, row: size.row(), apart: self.lanes() }
    }

    /// The zeros around the input that the first convolution looks at.
    fn border(&self) -> Padding {
        let rows = match &self.stages[0].layer {
            Layer::Rows { rows, .. } => Some(rows),
            Layer::Block(block) => block.expand.as_ref(),
            Layer::Mean { .. } => None,
        };
        match rows {
            Some(Rows::First(first)) => first.padding,
            _ => Padding::NONE,
        }
    }

    /// in: one picture as [`Chain::from`] says, or in planes; out: as [`Chain::to`] says, or in planes.
    pub fn run(&self, input: &[f32], out: &mut [f32], work: &mut Workspace, pool: Option<&ThreadPool>) {
        let threads = pool.map_or(1, ThreadPool::current_num_threads);
        work.scratch.resize_with(threads, Scratch::default);
        let Workspace { picture, from, to, scratch, times } = work;
        times.clear();
        enter(self.from(), input, self.planes, self.border(), picture);
        let mut go = || {
            for (nth, stage) in self.stages.iter().enumerate() {
                let began = Instant::now();
                let input = if nth == 0 { &picture[..] } else { &from[..stage.from.numbers()] };
                self.stage(stage, input, room(to, stage.to.numbers()), scratch);
                std::mem::swap(from, to);
                times.push(began.elapsed());
            }
        };
        match pool {
            Some(pool) => pool.install(go),
            None => go(),
        }
        leave(self.to(), from, self.planes, out);
    }

    fn stage(&self, stage: &Stage, from: &[f32], to: &mut [f32], scratch: &mut [Scratch]) {
        match &stage.layer {
            Layer::Rows { rows, residual } => {
                let residual = residual.then_some(from);
                spread(0..stage.to.height, stage.to.row(), to, scratch, &|range, to, _| {
                    let place = self.place(stage.to);
                    self.rows(rows, stage.from, from, range, residual, to, place);
                });
            }
            Layer::Block(block) => {
                let (lanes, height) = (self.lanes(), stage.to.height);
                if block.down() * block.line(lanes) + height * block.row(lanes) <= STRIP {
                    self.whole(block, stage, from, to, scratch);
                } else {
                    spread(0..stage.to.height, stage.to.row(), to, scratch, &|range, to, scratch| {
                        self.strips(block, stage, from, range, to, scratch);
                    });
                }
            }
            Layer::Mean { factor } => mean(from, stage.from.channels, *factor, to),
        }
    }

    /// Rows `range` of what `rows` makes of the map `input`; `to` begins with the first of them.
    #[expect(clippy::too_many_arguments, reason = "a map, its place, and what is asked of it")]
    fn rows(
        &self,
        rows: &Rows,
        from: Size,
        input: &[f32],
        range: Range<usize>,
        residual: Option<&[f32]>,
        to: &mut [f32],
        place: Place,
    ) {
        match rows {
            Rows::Product(product) => {
                let input = &input[range.start * from.row()..range.end * from.row()];
                let residual = residual.map(|map| &map[range.start * place.width * product.outputs..]);
                let (pixels, reach) = (range.len() * from.width, Reach { step: product.inputs, pieces: 1, apart: 0 });
                self.instructions.product(&mut product::Job {
                    product,
                    input,
                    reach,
                    pixels,
                    residual,
                    out: to,
                    place,
                });
            }
            Rows::First(first) => {
                let Padding { left, right, .. } = first.padding;
                let line = (from.width + left + right) * from.channels;
                let (product, pixels) = (&first.product, place.width);
                let reach = Reach { step: first.stride * from.channels, pieces: first.side, apart: line };
                for (nth, row) in range.enumerate() {
                    let (input, out) = (&input[row * first.stride * line..], &mut to[nth * place.row..]);
                    let residual = None;
                    self.instructions.product(&mut product::Job {
                        product,
                        input,
                        reach,
                        pixels,
                        residual,
                        out,
                        place,
                    });
                }
            }
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
        let Depthwise { side, stride, .. } = block.depthwise;
        let line = block.line(self.lanes());
        let rows = (STRIP / (stride * line + block.row(self.lanes()))).max(1);
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
            self.inner(block, stage.from, from, need.start + kept..need.end, &mut inner[kept * line..]);
            have = need;
            let to = &mut to[(first - range.start) * stage.to.row()..];
            self.behind(block, from, strip, inner, &mut scratch.after, to);
        }
    }

    /// A block whose maps all stay in the cache, layer after layer: no thread computes a row twice.
    fn whole(&self, block: &Block, stage: &Stage, from: &[f32], to: &mut [f32], scratch: &mut [Scratch]) {
        let (line, rows) = (block.line(self.lanes()), block.down());
        let mut buffer = std::mem::take(&mut scratch[0].inner);
        let inner = room(&mut buffer, rows * line);
        spread(0..rows, line, inner, scratch, &|range, inner, _| {
            self.inner(block, stage.from, from, range, inner);
        });
        let Depthwise { stride, .. } = block.depthwise;
        spread(0..stage.to.height, stage.to.row(), to, scratch, &|range, to, scratch| {
            let inner = &inner[range.start * stride * line..];
            self.behind(block, from, range, inner, &mut scratch.after, to);
        });
        scratch[0].inner = buffer;
    }

    /// Rows `range` of the padded map that the depthwise convolution looks at.
    fn inner(&self, block: &Block, size: Size, from: &[f32], range: Range<usize>, inner: &mut [f32]) {
        let Padding { top, left, right, .. } = block.padding;
        let (lanes, across) = (self.lanes(), block.across());
        let line = block.line(lanes);
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
        match &block.expand {
            Some(expand) => self.rows(expand, size, from, rows, None, to, place),
            None => {
                for (row, to) in rows.zip(to.chunks_mut(line)) {
                    let pixels = from[row * size.row()..].chunks_exact(size.channels).take(size.width);
                    for (x, pixel) in pixels.enumerate() {
                        for (channels, to) in pixel.chunks(lanes).zip(to.chunks_mut(place.apart)) {
                            to[x * lanes..][..channels.len()].copy_from_slice(channels);
                        }
                    }
                }
            }
        }
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
        let (lanes, across, rows, width) = (self.lanes(), block.across(), range.len(), block.after.width);
        let (pixels, depthwise) = (rows * width, &block.depthwise);
        let after = room(after, rows * block.row(lanes));
        self.instructions.depthwise(&mut depthwise::Job { depthwise, input: inner, across, rows, width, out: after });
        let Some(product) = &block.project else {
            for (plane, values) in after.chunks_exact(pixels * lanes).enumerate() {
                for (pixel, values) in to.chunks_exact_mut(block.after.channels).zip(values.chunks_exact(lanes)) {
                    let channels = pixel[plane * lanes..].iter_mut();
                    channels.zip(values).for_each(|(to, value)| *to = *value);
                }
            }
            return;
        };
        let step = product.outputs;
        let place = Place { width, step, row: width * step, apart: lanes };
        let residual = block.residual.then(|| &from[range.start * place.row..range.end * place.row]);
        let reach = Reach { step: lanes, pieces: depthwise.planes, apart: pixels * lanes };
        self.instructions.product(&mut product::Job { product, input: after, reach, pixels, residual, out: to, place });
    }
}

/// Cuts rows among the threads, one scratch each.
fn spread(
    rows: Range<usize>,
    row: usize,
    to: &mut [f32],
    scratch: &mut [Scratch],
    work: &(impl Fn(Range<usize>, &mut [f32], &mut Scratch) + Sync),
) {
    if rows.is_empty() {
        return;
    }
    let [one] = scratch else {
        let half = scratch.len() / 2;
        let middle = rows.start + (rows.len() * half).div_ceil(scratch.len());
        let (upper, lower) = to.split_at_mut((middle - rows.start) * row);
        let (left, right) = scratch.split_at_mut(half);
        rayon::join(
            || spread(rows.start..middle, row, upper, left, work),
            || spread(middle..rows.end, row, lower, right, work),
        );
        return;
    };
    work(rows, to, one);
}

/// in: `[places, channels]`; out: `[channels]`.
fn mean(from: &[f32], channels: usize, factor: f32, to: &mut [f32]) {
    to.fill(0.0);
    for place in from.chunks_exact(channels) {
        for (sum, value) in to.iter_mut().zip(place) {
            *sum += value;
        }
    }
    to.iter_mut().for_each(|sum| *sum *= factor);
}

/// Planes become pixels, with zeros around them.
fn enter(size: Size, input: &[f32], planes: bool, border: Padding, to: &mut Vec<f32>) {
    let Padding { top, left, bottom, right } = border;
    let line = (size.width + left + right) * size.channels;
    // What lies around stays zero from the first run on.
    to.resize((size.height + top + bottom) * line, 0.0);
    let places = size.height * size.width;
    for (row, line) in to[top * line..].chunks_exact_mut(line).take(size.height).enumerate() {
        let pixels = &mut line[left * size.channels..][..size.row()];
        if !planes {
            pixels.copy_from_slice(&input[row * size.row()..][..size.row()]);
            continue;
        }
        let plane = |channel: usize| &input[channel * places + row * size.width..][..size.width];
        if size.channels == 3 {
            let colours = plane(0).iter().zip(plane(1)).zip(plane(2));
            for (pixel, ((red, green), blue)) in pixels.chunks_exact_mut(3).zip(colours) {
                pixel.copy_from_slice(&[*red, *green, *blue]);
            }
        } else {
            for channel in 0..size.channels {
                for (pixel, value) in pixels.chunks_exact_mut(size.channels).zip(plane(channel)) {
                    pixel[channel] = *value;
                }
            }
        }
    }
}

/// Pixels become planes.
fn leave(size: Size, from: &[f32], planes: bool, out: &mut [f32]) {
    let places = size.height * size.width;
    if !planes || places == 1 {
        return out.copy_from_slice(&from[..size.numbers()]);
    }
    for (channel, plane) in out.chunks_exact_mut(places).enumerate() {
        for (value, pixel) in plane.iter_mut().zip(from.chunks_exact(size.channels)) {
            *value = pixel[channel];
        }
    }
}
