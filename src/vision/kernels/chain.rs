//! A run of MobileNet's layers as one piece: maps with their channels last, stage after stage.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::Instructions;
use super::layers::{First, Layer, Padding, Rows, Size, Stage};
use super::product::{self, Place, Product, Reach};
use super::team::Team;
use super::threads::{Scratch, Threads, room};

/// Stages, each on what the one before gave.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chain {
    pub stages: Vec<Stage>,
    /// Outside, maps lie channel by channel.
    pub planes: bool,
    pub instructions: Instructions,
}

/// What a run works in; it grows to its size in the first one.
#[derive(Debug, Clone, Default)]
pub(super) struct Workspace {
    /// The input with zeros around it, which no later map overwrites.
    picture: Vec<f32>,
    from: Vec<f32>,
    to: Vec<f32>,
    /// A block's map between depthwise convolution and projection, where the threads share it.
    between: Vec<f32>,
    scratch: Vec<Scratch>,
    /// What each stage of the last run took.
    pub times: Vec<Duration>,
}

impl Chain {
    pub fn from(&self) -> Size {
        self.stages[0].from
    }

    pub fn to(&self) -> Size {
        self.stages[self.stages.len() - 1].to
    }

    pub fn lanes(&self) -> usize {
        self.instructions.panels().lanes
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
    pub fn run(&self, input: &[f32], out: &mut [f32], work: &mut Workspace, team: Option<&Team>) {
        team.inspect(|team| team.wake());
        let Workspace { picture, from, to, between, scratch, times } = work;
        scratch.resize_with(team.map_or(1, Team::threads), Scratch::default);
        let mut threads = Threads { team, scratch };
        times.clear();
        enter(self.from(), input, self.planes, self.border(), picture);
        for (nth, stage) in self.stages.iter().enumerate() {
            let began = Instant::now();
            let input = if nth == 0 { &picture[..] } else { &from[..stage.from.numbers()] };
            self.stage(stage, input, room(to, stage.to.numbers()), between, &mut threads);
            std::mem::swap(from, to);
            times.push(began.elapsed());
        }
        leave(self.to(), from, self.planes, out);
    }

    fn stage(&self, stage: &Stage, from: &[f32], to: &mut [f32], between: &mut Vec<f32>, threads: &mut Threads<'_>) {
        let Stage { to: size, .. } = *stage;
        match &stage.layer {
            Layer::Rows { rows: Rows::Product(product), residual } => {
                let reach = Reach { step: product.inputs, pieces: 1, apart: 0 };
                let residual = residual.then_some(from);
                self.pixels(product, from, reach, size.height * size.width, residual, to, threads);
            }
            Layer::Rows { rows, .. } => threads.spread(size.height, size.row(), to, &|range, to, _| {
                let place = Place { width: size.width, step: size.channels, row: size.row(), apart: self.lanes() };
                self.rows(rows, stage.from, from, range, 0..size.channels, to, place);
            }),
            Layer::Block(block) => self.block(block, stage, from, to, between, threads),
            Layer::Mean { factor } => mean(from, stage.from.channels, *factor, to),
        }
    }

    /// A product over pixels that give pixels one after the other.
    #[expect(clippy::too_many_arguments, reason = "a map, where it lies, and what is asked of it")]
    pub fn pixels(
        &self,
        product: &Product,
        input: &[f32],
        reach: Reach,
        pixels: usize,
        residual: Option<&[f32]>,
        to: &mut [f32],
        threads: &mut Threads<'_>,
    ) {
        let step = product.outputs;
        threads.spread(pixels, step, to, &|range, out, _| {
            let (pixels, outputs, input) = (range.len(), 0..step, &input[range.start * reach.step..]);
            let residual = residual.map(|map| &map[range.start * step..]);
            let place = Place { width: pixels, step, row: pixels * step, apart: self.lanes() };
            self.instructions.product(&mut product::Job {
                product,
                outputs,
                input,
                reach,
                pixels,
                residual,
                out,
                place,
            });
        });
    }

    /// Rows `range` and channels `outputs` of what `rows` makes of the map `input`; `to` begins with the first of them.
    #[expect(clippy::too_many_arguments, reason = "the same")]
    pub fn rows(
        &self,
        rows: &Rows,
        from: Size,
        input: &[f32],
        range: Range<usize>,
        outputs: Range<usize>,
        to: &mut [f32],
        place: Place,
    ) {
        let run = |product, input, reach, pixels, out: &mut [f32]| {
            let (outputs, residual) = (outputs.clone(), None);
            let mut job = product::Job { product, outputs, input, reach, pixels, residual, out, place };
            self.instructions.product(&mut job);
        };
        match rows {
            Rows::Product(product) => {
                let reach = Reach { step: product.inputs, pieces: 1, apart: 0 };
                run(product, &input[range.start * from.row()..], reach, range.len() * from.width, to);
            }
            Rows::First(First { product, side, stride, padding }) => {
                let line = (from.width + padding.left + padding.right) * from.channels;
                let reach = Reach { step: stride * from.channels, pieces: *side, apart: line };
                for (nth, row) in range.enumerate() {
                    run(product, &input[row * stride * line..], reach, place.width, &mut to[nth * place.row..]);
                }
            }
        }
    }
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
