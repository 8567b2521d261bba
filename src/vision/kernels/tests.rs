//! Every operator against tract's own result, for each set of instructions that this processor has.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::ops::cnn::{Conv, KernelFormat, PaddingSpec, PoolSpec};
use tract_onnx::tract_core::ops::nn::{DataFormat, Reduce, Reducer};
use tract_onnx::tract_core::ops::{binary, math};

use super::*;

/// Numbers between −1 and 1.
fn numbers(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0).collect()
}

/// A network that is built layer by layer.
struct Built {
    model: TypedModel,
    rng: ChaCha8Rng,
    format: DataFormat,
    at: OutletId,
    count: usize,
}

impl Built {
    fn new(format: DataFormat, height: usize, width: usize, channels: usize) -> Self {
        Self::of_pictures(1, format, height, width, channels)
    }

    fn of_pictures(pictures: usize, format: DataFormat, height: usize, width: usize, channels: usize) -> Self {
        let mut model = TypedModel::default();
        let shape = format.from_n_c_hw(pictures, channels, [height, width]).unwrap().shape;
        let at = model.add_source("input", f32::fact(&shape)).unwrap();
        Built { model, rng: ChaCha8Rng::seed_from_u64(7), format, at, count: 0 }
    }

    fn name(&mut self) -> String {
        self.count += 1;
        format!("n{}", self.count)
    }

    fn shape(&self) -> Vec<usize> {
        self.model.outlet_fact(self.at).unwrap().shape.as_concrete().unwrap().to_vec()
    }

    fn channels(&self) -> usize {
        self.shape()[if self.format == DataFormat::NHWC { 3 } else { 1 }]
    }

    fn constant(&mut self, shape: &[usize], values: &[f32]) -> OutletId {
        let name = self.name();
        self.model.add_const(name, Tensor::from_shape(shape, values).unwrap()).unwrap()
    }

    fn conv(mut self, outputs: usize, group: usize, side: usize, stride: usize, pads: [usize; 4]) -> Self {
        let inputs = self.channels();
        let kernel = [outputs, inputs / group, side, side];
        let length = kernel.iter().product();
        let scale = (kernel[1] * side * side) as f32;
        let weights: Vec<f32> = numbers(&mut self.rng, length).iter().map(|w| w * 2.0 / scale.sqrt()).collect();
        let bias = numbers(&mut self.rng, outputs);
        let (kernel, bias) = (self.constant(&kernel, &weights), self.constant(&[outputs], &bias));
        let [top, left, bottom, right] = pads;
        let op = Conv {
            pool_spec: PoolSpec {
                data_format: self.format,
                kernel_shape: tvec!(side, side),
                padding: PaddingSpec::Explicit(tvec!(top, left), tvec!(bottom, right)),
                dilations: None,
                strides: Some(tvec!(stride, stride)),
                input_channels: inputs,
                output_channels: outputs,
            },
            kernel_fmt: KernelFormat::OIHW,
            group,
            q_params: None,
        };
        let name = self.name();
        self.at = self.model.wire_node(name, op, &[self.at, kernel, bias]).unwrap()[0];
        self
    }

    fn flat(self, outputs: usize) -> Self {
        self.conv(outputs, 1, 1, 1, [0; 4])
    }

    fn deep(self, side: usize, stride: usize, pads: [usize; 4]) -> Self {
        let channels = self.channels();
        self.conv(channels, channels, side, stride, pads)
    }

    fn binary(mut self, op: binary::TypedBinOp, other: OutletId) -> Self {
        let name = self.name();
        self.at = self.model.wire_node(name, op, &[self.at, other]).unwrap()[0];
        self
    }

    fn relu6(mut self) -> Self {
        let (low, high) = (self.constant(&[1, 1, 1, 1], &[0.0]), self.constant(&[1, 1, 1, 1], &[6.0]));
        self.binary(math::max(), low).binary(math::min(), high)
    }

    fn plus(self, other: OutletId) -> Self {
        self.binary(math::add(), other)
    }

    fn mean(mut self) -> Self {
        let shape = self.shape();
        let axes: TVec<usize> = if self.format == DataFormat::NHWC { tvec!(1, 2) } else { tvec!(2, 3) };
        let places: usize = axes.iter().map(|axis| shape[*axis]).product();
        let name = self.name();
        let op = Reduce { axes, reducer: Reducer::Sum };
        self.at = self.model.wire_node(name, op, &[self.at]).unwrap()[0];
        let places = self.constant(&[1, 1, 1, 1], &[places as f32]);
        self.binary(math::div(), places)
    }

    /// Our result lies within 1e-5 of tract's, relative to the largest number, with every set of instructions and one to
    /// three threads.
    fn holds(mut self) {
        self.model.select_output_outlets(&[self.at]).unwrap();
        let shape = self.model.input_fact(0).unwrap().shape.as_concrete().unwrap().to_vec();
        let input = Tensor::from_shape(&shape, &numbers(&mut self.rng, shape.iter().product())).unwrap();
        let expected = result(self.model.clone(), &input);
        let largest = expected.iter().fold(1.0_f32, |largest, value| largest.max(value.abs()));
        for instructions in Instructions::ALL.into_iter().filter(|instructions| instructions.are_there()) {
            for threads in 1..=3 {
                let team = Team::of(threads).unwrap();
                let mut model = self.model.clone();
                let Taken::Whole(mut whole) = replace(&mut model, instructions, team).unwrap() else {
                    panic!("{shape:?}: the pattern is not recognised");
                };
                let mut found = vec![f32::NAN; expected.len()];
                // Twice: what the first run leaves behind must not be seen by the second.
                let input = input.to_plain_array_view::<f32>().unwrap();
                for _ in 0..2 {
                    whole.run(input.as_slice().unwrap(), &mut found);
                }
                assert_eq!(found.len(), expected.len());
                for (at, (a, b)) in found.iter().zip(&expected).enumerate() {
                    let apart = (a - b).abs() / largest;
                    assert!(apart <= 1e-5, "{shape:?} {instructions:?} {threads}: number {at} is {a}, tract's {b}");
                }
            }
        }
    }
}

fn result(model: TypedModel, input: &Tensor) -> Vec<f32> {
    let plan = model.into_optimized().unwrap().into_runnable().unwrap();
    // Twice: what the first run leaves behind must not be seen by the second.
    let mut state = plan.spawn().unwrap();
    state.run(tvec!(input.clone().into())).unwrap();
    let outputs = state.run(tvec!(input.clone().into())).unwrap();
    outputs[0].to_plain_array_view::<f32>().unwrap().iter().copied().collect()
}

const AROUND: [usize; 4] = [1; 4];
/// As Keras pads at a stride of two.
const BELOW: [usize; 4] = [0, 0, 1, 1];

#[test]
fn depthwise_convolutions_of_odd_sizes_and_channels() {
    for format in [DataFormat::NCHW, DataFormat::NHWC] {
        for (height, width, channels) in [(1, 1, 3), (5, 7, 16), (9, 4, 24), (13, 11, 37), (3, 30, 144)] {
            for (side, stride, pads) in [
                (3, 1, AROUND),
                (3, 2, AROUND),
                (3, 2, BELOW),
                (5, 1, [2; 4]),
                (5, 2, [1, 2, 2, 1]),
                (3, 1, [2, 0, 1, 3]),
            ] {
                let [top, left, bottom, right] = pads;
                if height + top + bottom < side || width + left + right < side {
                    continue;
                }
                Built::new(format, height, width, channels).deep(side, stride, pads).relu6().holds();
            }
        }
    }
}

#[test]
fn a_block_with_its_residual() {
    for format in [DataFormat::NCHW, DataFormat::NHWC] {
        for (height, width, channels, wide) in [(7, 7, 8, 48), (14, 9, 24, 144), (3, 5, 17, 101), (40, 40, 24, 144)] {
            let built = Built::new(format, height, width, 3).conv(channels, 1, 3, 1, AROUND).relu6();
            let entry = built.at;
            let block = built.flat(wide).relu6().deep(3, 1, AROUND).relu6().flat(channels);
            block.plus(entry).holds();
        }
    }
}

#[test]
fn a_small_mobilenet() {
    for format in [DataFormat::NCHW, DataFormat::NHWC] {
        for (size, first) in [(32, 16), (33, 8), (97, 32)] {
            let built = Built::new(format, size, size, 3).conv(first, 1, 3, 2, BELOW).relu6();
            let built = built.deep(3, 1, AROUND).relu6().flat(10);
            let built = built.flat(60).relu6().deep(3, 2, BELOW).relu6().flat(14);
            let entry = built.at;
            let built = built.flat(84).relu6().deep(5, 1, [2; 4]).relu6().flat(14).plus(entry);
            built.flat(70).relu6().mean().holds();
        }
    }
}

#[test]
fn several_pictures_at_once() {
    for format in [DataFormat::NCHW, DataFormat::NHWC] {
        let built = Built::of_pictures(3, format, 17, 12, 3).conv(9, 1, 3, 2, BELOW).relu6().deep(3, 1, AROUND).relu6();
        let entry = built.flat(20);
        let from = entry.at;
        entry.flat(50).relu6().deep(3, 1, AROUND).relu6().flat(20).plus(from).mean().holds_partly();
    }
}

#[test]
fn a_map_that_leaves_in_the_middle_is_left_whole() {
    // What lies behind the fork is not the chain's; the fork itself may be its last wire.
    let built = Built::new(DataFormat::NCHW, 12, 12, 3).conv(8, 1, 3, 2, BELOW).relu6().deep(3, 1, AROUND).relu6();
    let fork = built.at;
    let twice = built.flat(8).relu6();
    twice.binary(math::mul(), fork).holds_partly();
}

impl Built {
    /// As [`Built::holds`], where some convolutions stay tract's.
    fn holds_partly(mut self) {
        self.model.select_output_outlets(&[self.at]).unwrap();
        let shape = self.model.input_fact(0).unwrap().shape.as_concrete().unwrap().to_vec();
        let input = Tensor::from_shape(&shape, &numbers(&mut self.rng, shape.iter().product())).unwrap();
        let expected = result(self.model.clone(), &input);
        for instructions in Instructions::ALL.into_iter().filter(|instructions| instructions.are_there()) {
            let mut model = self.model.clone();
            assert!(matches!(replace(&mut model, instructions, None).unwrap(), Taken::Part));
            let found = result(model, &input);
            let close = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0));
            assert!(close && found.len() == expected.len());
        }
    }
}

#[test]
fn what_has_no_depthwise_convolution_is_left_to_tract() {
    let mut built = Built::new(DataFormat::NCHW, 8, 8, 16).flat(32).relu6().flat(16);
    built.model.select_output_outlets(&[built.at]).unwrap();
    assert!(matches!(replace(&mut built.model, Instructions::Plain, None).unwrap(), Taken::Nothing));
    let mut dilated = Built::new(DataFormat::NCHW, 8, 8, 16).deep(3, 1, AROUND);
    let node = dilated.at.node;
    dilated.model.nodes[node].op_as_mut::<Conv>().unwrap().pool_spec.dilations = Some(tvec!(2, 2));
    dilated.model.select_output_outlets(&[dilated.at]).unwrap();
    assert!(matches!(replace(&mut dilated.model, Instructions::Plain, None).unwrap(), Taken::Nothing));
}

#[test]
fn numbers_that_are_no_f32_are_left_to_tract() {
    let mut built = Built::new(DataFormat::NCHW, 8, 8, 16).deep(3, 1, AROUND).relu6();
    let whole = built.model.add_const("whole", Tensor::from_shape(&[1], &[2_i64]).unwrap()).unwrap();
    let counted = built.model.add_source("count", i64::fact([1])).unwrap();
    let sum = built.model.wire_node("sum", math::max(), &[counted, whole]).unwrap()[0];
    built.model.select_output_outlets(&[built.at, sum]).unwrap();
    assert!(matches!(replace(&mut built.model, Instructions::Plain, None).unwrap(), Taken::Whole(_) | Taken::Part));
}
