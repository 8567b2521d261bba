//! Every fused operator against tract's own result, for each instruction set that this processor supports.

use bloomcast_kernels::VALUES_MAX;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::ops::cnn::{Conv, KernelFormat, PaddingSpec, PoolSpec};
use tract_onnx::tract_core::ops::nn::{DataFormat, Reduce, Reducer};
use tract_onnx::tract_core::ops::{binary, math};

use super::*;

/// Returns values between −1 and 1.
fn random_values(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0).collect()
}

/// A network that is built layer by layer.
struct NetBuilder {
    model: TypedModel,
    rng: ChaCha8Rng,
    format: DataFormat,
    outlet: OutletId,
    count: usize,
}

impl NetBuilder {
    fn new(format: DataFormat, height: usize, width: usize, channels: usize) -> Self {
        Self::with_batch(1, format, height, width, channels)
    }

    fn with_batch(batch: usize, format: DataFormat, height: usize, width: usize, channels: usize) -> Self {
        let mut model = TypedModel::default();
        let shape = format.from_n_c_hw(batch, channels, [height, width]).unwrap().shape;
        let outlet = model.add_source("input", f32::fact(&shape)).unwrap();
        NetBuilder { model, rng: ChaCha8Rng::seed_from_u64(7), format, outlet, count: 0 }
    }

    fn name(&mut self) -> String {
        self.count += 1;
        format!("n{}", self.count)
    }

    fn shape(&self) -> Vec<usize> {
        self.model.outlet_fact(self.outlet).unwrap().shape.as_concrete().unwrap().to_vec()
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
        let weights: Vec<f32> = random_values(&mut self.rng, length).iter().map(|w| w * 2.0 / scale.sqrt()).collect();
        let bias = random_values(&mut self.rng, outputs);
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
        self.outlet = self.model.wire_node(name, op, &[self.outlet, kernel, bias]).unwrap()[0];
        self
    }

    fn pointwise(self, outputs: usize) -> Self {
        self.conv(outputs, 1, 1, 1, [0; 4])
    }

    fn depthwise(self, side: usize, stride: usize, pads: [usize; 4]) -> Self {
        let channels = self.channels();
        self.conv(channels, channels, side, stride, pads)
    }

    fn binary(mut self, op: binary::TypedBinOp, other: OutletId) -> Self {
        let name = self.name();
        self.outlet = self.model.wire_node(name, op, &[self.outlet, other]).unwrap()[0];
        self
    }

    fn relu6(mut self) -> Self {
        let (low, high) = (self.constant(&[1, 1, 1, 1], &[0.0]), self.constant(&[1, 1, 1, 1], &[6.0]));
        self.binary(math::max(), low).binary(math::min(), high)
    }

    fn add(self, other: OutletId) -> Self {
        self.binary(math::add(), other)
    }

    fn mean(mut self) -> Self {
        let shape = self.shape();
        let axes: TVec<usize> = if self.format == DataFormat::NHWC { tvec!(1, 2) } else { tvec!(2, 3) };
        let pixels: usize = axes.iter().map(|axis| shape[*axis]).product();
        let name = self.name();
        let op = Reduce { axes, reducer: Reducer::Sum };
        self.outlet = self.model.wire_node(name, op, &[self.outlet]).unwrap()[0];
        let divisor = self.constant(&[1, 1, 1, 1], &[pixels as f32]);
        self.binary(math::div(), divisor)
    }

    /// Asserts that the kernels compute the whole net and differ from tract by at most 1e-5 of the largest value (or of 1), with each
    /// supported instruction set and one to three threads.
    fn assert_whole(mut self) {
        self.model.select_output_outlets(&[self.outlet]).unwrap();
        let shape = self.model.input_fact(0).unwrap().shape.as_concrete().unwrap().to_vec();
        let input = Tensor::from_shape(&shape, &random_values(&mut self.rng, shape.iter().product())).unwrap();
        let expected = tract_output(self.model.clone(), &input);
        let largest = expected.iter().fold(1.0_f32, |largest, value| largest.max(value.abs()));
        for isa in supported_isas() {
            for threads in 1..=3 {
                let pool = ThreadPool::with_threads(threads).unwrap();
                let mut model = self.model.clone();
                let Fusion::Whole(net) = fuse(&mut model, isa, pool).unwrap() else {
                    panic!("{shape:?}: the pattern is not recognised");
                };
                let mut workspace = Workspace::default();
                let mut found = vec![f32::NAN; expected.len()];
                // Twice: values that the first run leaves in the workspace must not affect the second.
                let input = input.to_plain_array_view::<f32>().unwrap();
                for _ in 0..2 {
                    net.run(input.as_slice().unwrap(), &mut found, &mut workspace);
                }
                assert_eq!(found.len(), expected.len());
                for (at, (a, b)) in found.iter().zip(&expected).enumerate() {
                    let difference = (a - b).abs() / largest;
                    assert!(difference <= 1e-5, "{shape:?} {isa:?} {threads}: value {at} is {a}, tract's {b}");
                }
            }
        }
    }

    /// Like [`NetBuilder::assert_whole`], for a net of which tract computes some layers.
    fn assert_partial(mut self) {
        self.model.select_output_outlets(&[self.outlet]).unwrap();
        let shape = self.model.input_fact(0).unwrap().shape.as_concrete().unwrap().to_vec();
        let input = Tensor::from_shape(&shape, &random_values(&mut self.rng, shape.iter().product())).unwrap();
        let expected = tract_output(self.model.clone(), &input);
        for isa in supported_isas() {
            let mut model = self.model.clone();
            assert!(matches!(fuse(&mut model, isa, None).unwrap(), Fusion::Partial));
            let found = tract_output(model, &input);
            let close = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0));
            assert!(close && found.len() == expected.len());
        }
    }
}

fn supported_isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_supported())
}

/// Returns the output of a net that tract runs.
fn tract_output(model: TypedModel, input: &Tensor) -> Vec<f32> {
    let plan = model.into_optimized().unwrap().into_runnable().unwrap();
    // Twice: values that the first run leaves in the state must not affect the second.
    let mut state = plan.spawn().unwrap();
    state.run(tvec!(input.clone().into())).unwrap();
    let outputs = state.run(tvec!(input.clone().into())).unwrap();
    outputs[0].to_plain_array_view::<f32>().unwrap().iter().copied().collect()
}

const AROUND: [usize; 4] = [1; 4];
/// Keras's padding at a stride of two.
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
                NetBuilder::new(format, height, width, channels).depthwise(side, stride, pads).relu6().assert_whole();
            }
        }
    }
}

#[test]
fn inverted_residuals() {
    for format in [DataFormat::NCHW, DataFormat::NHWC] {
        for (height, width, channels, expanded) in [(7, 7, 8, 48), (14, 9, 24, 144), (3, 5, 17, 101), (40, 40, 24, 144)]
        {
            let net = NetBuilder::new(format, height, width, 3).conv(channels, 1, 3, 1, AROUND).relu6();
            let entry = net.outlet;
            let block = net.pointwise(expanded).relu6().depthwise(3, 1, AROUND).relu6().pointwise(channels);
            block.add(entry).assert_whole();
        }
    }
}

#[test]
fn a_small_mobilenet() {
    for format in [DataFormat::NCHW, DataFormat::NHWC] {
        for (size, first) in [(32, 16), (33, 8), (97, 32)] {
            let net = NetBuilder::new(format, size, size, 3).conv(first, 1, 3, 2, BELOW).relu6();
            let net = net.depthwise(3, 1, AROUND).relu6().pointwise(10);
            let net = net.pointwise(60).relu6().depthwise(3, 2, BELOW).relu6().pointwise(14);
            let entry = net.outlet;
            let net = net.pointwise(84).relu6().depthwise(5, 1, [2; 4]).relu6().pointwise(14).add(entry);
            net.pointwise(70).relu6().mean().assert_whole();
        }
    }
}

#[test]
fn a_batch_of_several_images() {
    for format in [DataFormat::NCHW, DataFormat::NHWC] {
        let net = NetBuilder::with_batch(3, format, 17, 12, 3)
            .conv(9, 1, 3, 2, BELOW)
            .relu6()
            .depthwise(3, 1, AROUND)
            .relu6();
        let entry = net.pointwise(20);
        let from = entry.outlet;
        entry.pointwise(50).relu6().depthwise(3, 1, AROUND).relu6().pointwise(20).add(from).mean().assert_partial();
    }
}

#[test]
fn a_feature_map_that_is_used_outside_ends_the_sequence() {
    // The layers after the fork are tract's; the fork itself may be the last outlet of the sequence.
    let net =
        NetBuilder::new(DataFormat::NCHW, 12, 12, 3).conv(8, 1, 3, 2, BELOW).relu6().depthwise(3, 1, AROUND).relu6();
    let fork = net.outlet;
    let twice = net.pointwise(8).relu6();
    twice.binary(math::mul(), fork).assert_partial();
}

#[test]
fn a_net_without_a_supported_depthwise_convolution_is_left_to_tract() {
    let mut net = NetBuilder::new(DataFormat::NCHW, 8, 8, 16).pointwise(32).relu6().pointwise(16);
    net.model.select_output_outlets(&[net.outlet]).unwrap();
    assert!(matches!(fuse(&mut net.model, Isa::Portable, None).unwrap(), Fusion::None));
    let mut dilated = NetBuilder::new(DataFormat::NCHW, 8, 8, 16).depthwise(3, 1, AROUND);
    let node = dilated.outlet.node;
    dilated.model.nodes[node].op_as_mut::<Conv>().unwrap().pool_spec.dilations = Some(tvec!(2, 2));
    dilated.model.select_output_outlets(&[dilated.outlet]).unwrap();
    assert!(matches!(fuse(&mut dilated.model, Isa::Portable, None).unwrap(), Fusion::None));
}

#[test]
fn constants_that_are_not_f32_are_left_to_tract() {
    let mut net = NetBuilder::new(DataFormat::NCHW, 8, 8, 16).depthwise(3, 1, AROUND).relu6();
    let two = net.model.add_const("two", Tensor::from_shape(&[1], &[2_i64]).unwrap()).unwrap();
    let count = net.model.add_source("count", i64::fact([1])).unwrap();
    let sum = net.model.wire_node("sum", math::max(), &[count, two]).unwrap()[0];
    net.model.select_output_outlets(&[net.outlet, sum]).unwrap();
    assert!(matches!(fuse(&mut net.model, Isa::Portable, None).unwrap(), Fusion::Whole(_) | Fusion::Partial));
}

#[test]
fn a_net_that_exceeds_the_memory_limit_is_refused() {
    for (height, width, pads) in [(8, 8, [0, 0, VALUES_MAX, 0]), (VALUES_MAX / 4, 8, AROUND)] {
        let mut net = NetBuilder::new(DataFormat::NHWC, height, width, 3).depthwise(3, 1, pads);
        net.model.select_output_outlets(&[net.outlet]).unwrap();
        let error = fuse(&mut net.model, Isa::Portable, None).err().expect("the net is too large");
        let error = format!("{error:#}");
        assert!(error.contains(&format!("exceeds {VALUES_MAX} f32 values")), "{error}");
    }
}
