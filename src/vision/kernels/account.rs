//! What the stages of a chain are and cost, and what a processor can do at best.

use std::time::{Duration, Instant};

use super::Instructions;
use super::chain::Chain;
use super::layers::{Block, Layer, Rows, Size, Stage};
use super::product::{Clip, Job, Panels, Place, Product, Reach};

/// A stage of a network, as `bench` tells it.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    pub what: String,
    /// Multiplications with an addition, for one picture.
    pub multiply_adds: u64,
    /// Of the last picture.
    pub took: Duration,
}

/// The stages of a chain with the times of its last run.
pub(super) fn parts(chain: &Chain, times: &[Duration]) -> Vec<Part> {
    let part = |(stage, took): (&Stage, &Duration)| {
        let (what, multiply_adds) = account(stage);
        let Size { height, width, .. } = stage.to;
        Part { what: format!("{what}, {width}×{height}"), multiply_adds: multiply_adds as u64, took: *took }
    };
    chain.stages.iter().zip(times).map(part).collect()
}

fn account(stage: &Stage) -> (String, usize) {
    let places = |size: Size| size.height * size.width;
    let (from, to) = (stage.from.channels, stage.to.channels);
    match &stage.layer {
        Layer::Mean { .. } => ("mean".into(), stage.from.numbers()),
        Layer::Rows { rows, .. } => (format!("{} {from} → {to}", side(rows)), taps(rows) * to * places(stage.to)),
        Layer::Block(block) => {
            let Block { expand, depthwise, project, inner, after, .. } = &**block;
            let mut what = String::new();
            let mut cost = after.numbers() * depthwise.side * depthwise.side;
            if let Some(rows) = expand {
                what = format!("{} {from} → {}, ", side(rows), inner.channels);
                cost += taps(rows) * inner.numbers();
            }
            what += &format!("{0}×{0} each", depthwise.side);
            if project.is_some() {
                what += &format!(", 1×1 → {to}");
                cost += after.channels * stage.to.numbers();
            }
            (what, cost)
        }
    }
}

fn side(rows: &Rows) -> String {
    let side = match rows {
        Rows::Product(_) => 1,
        Rows::First(first) => first.side,
    };
    format!("{side}×{side}")
}

/// Numbers that one output is made of.
fn taps(rows: &Rows) -> usize {
    match rows {
        Rows::Product(product) => product.inputs,
        Rows::First(first) => first.product.inputs,
    }
}

/// Multiply-adds a second of one core where everything stays in registers and the first-level cache: the best of many measurements of
/// a small product.
///
/// # Panics
/// Where the processor lacks the instructions.
pub fn peak(instructions: Instructions) -> f64 {
    const INPUTS: usize = 128;
    const PIXELS: usize = 84;
    const TRIES: usize = 1000;
    assert!(instructions.are_there(), "this processor has no {}", instructions.name());
    let Panels { lanes, vectors, .. } = instructions.panels();
    let outputs = lanes * vectors;
    let product = Product::new(&vec![1.0; outputs * INPUTS], &vec![0.0; outputs], Clip::NONE, instructions.panels());
    let (input, mut out) = (vec![1.0; INPUTS], vec![0.0; PIXELS * outputs]);
    let mut best = Duration::MAX;
    for _ in 0..TRIES {
        let began = Instant::now();
        instructions.product(&mut Job {
            product: &product,
            outputs: 0..outputs,
            input: &input,
            reach: Reach { step: 0, pieces: 1, apart: 0 },
            pixels: PIXELS,
            residual: None,
            out: &mut out,
            place: Place { width: PIXELS, step: outputs, row: PIXELS * outputs, apart: lanes },
        });
        best = best.min(began.elapsed());
    }
    (PIXELS * outputs * INPUTS) as f64 / best.as_secs_f64()
}
