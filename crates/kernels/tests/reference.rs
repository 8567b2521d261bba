//! Networks against a naive implementation, for each supported instruction set and one to three threads.

use std::sync::Arc;

use bloomcast_kernels::{Clip, CompiledNet, Conv2d, FeatureMapShape, Isa, Layer, Padding, ThreadPool, Workspace};

#[path = "../src/test_util.rs"]
mod test_util;

use test_util::{Random, assert_close, supported_isas};

/// A feature map in f64, `[height, width, channels]`.
#[derive(Clone)]
struct FeatureMap {
    shape: FeatureMapShape,
    values: Vec<f64>,
}

impl FeatureMap {
    /// Returns a value, 0 in the padding.
    fn at(&self, y: Option<usize>, x: Option<usize>, channel: usize) -> f64 {
        let FeatureMapShape { height, width, channels } = self.shape;
        match (y, x) {
            (Some(y), Some(x)) if y < height && x < width => self.values[(y * width + x) * channels + channel],
            _ => 0.0,
        }
    }
}

fn convolve(from: &FeatureMap, conv: &Conv2d, depthwise: bool, residual: Option<&FeatureMap>) -> FeatureMap {
    let Conv2d { kernel, stride, padding, .. } = *conv;
    let height = (from.shape.height + padding.top + padding.bottom - kernel) / stride + 1;
    let width = (from.shape.width + padding.left + padding.right - kernel) / stride + 1;
    let shape = FeatureMapShape { height, width, channels: conv.bias.len() };
    let inputs = if depthwise { 1 } else { from.shape.channels };
    let mut values = Vec::new();
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
        for output in 0..shape.channels {
            let mut sum = f64::from(conv.bias[output]);
            for (down, right) in (0..kernel).flat_map(|down| (0..kernel).map(move |right| (down, right))) {
                let from_y = (y * stride + down).checked_sub(padding.top);
                let from_x = (x * stride + right).checked_sub(padding.left);
                for input in 0..inputs {
                    let weight = conv.weights[((output * kernel + down) * kernel + right) * inputs + input];
                    let channel = if depthwise { output } else { input };
                    sum += f64::from(weight) * from.at(from_y, from_x, channel);
                }
            }
            sum += residual.map_or(0.0, |residual| residual.values[values.len()]);
            values.push(sum.max(f64::from(conv.clip.low)).min(f64::from(conv.clip.high)));
        }
    }
    FeatureMap { shape, values }
}

fn reference(layer: &Layer, from: &FeatureMap) -> FeatureMap {
    match layer {
        Layer::Conv { conv, residual } => convolve(from, conv, false, residual.then_some(from)),
        Layer::InvertedResidual { expand, depthwise, project, residual } => {
            let expanded = expand.as_ref().map_or(from.clone(), |conv| convolve(from, conv, false, None));
            let convolved = convolve(&expanded, depthwise, true, None);
            project
                .as_ref()
                .map_or(convolved.clone(), |conv| convolve(&convolved, conv, false, residual.then_some(from)))
        }
        Layer::GlobalSum { factor } => {
            let channels = from.shape.channels;
            let sum = |channel| from.values.iter().skip(channel).step_by(channels).sum::<f64>() * f64::from(*factor);
            let shape = FeatureMapShape { height: 1, width: 1, channels };
            FeatureMap { shape, values: (0..channels).map(sum).collect() }
        }
    }
}

/// Returns values in the order of the net's input and output.
fn to_layout(map: &FeatureMap, channels_first: bool) -> Vec<f32> {
    let channels = map.shape.channels;
    let values = || map.values.iter().map(|value| *value as f32);
    match channels_first {
        false => values().collect(),
        true => (0..channels).flat_map(|channel| values().skip(channel).step_by(channels)).collect(),
    }
}

/// Compares the net with the reference, in both layouts.
fn check(random: &mut Random, input: FeatureMapShape, layers: &[Layer]) {
    let values = random.values(input.checked_len().unwrap()).into_iter().map(f64::from).collect();
    let from = FeatureMap { shape: input, values };
    let to = layers.iter().fold(from.clone(), |from, layer| reference(layer, &from));
    let pools: Vec<Option<Arc<ThreadPool>>> = (1..=3).map(|n| ThreadPool::with_threads(n).unwrap()).collect();
    for channels_first in [false, true] {
        let (image, expected) = (to_layout(&from, channels_first), to_layout(&to, channels_first));
        for isa in supported_isas() {
            for (n, pool) in pools.iter().enumerate() {
                let net = CompiledNet::new(input, layers, channels_first, isa, pool.clone()).unwrap();
                assert_eq!(net.output_shape(), to.shape);
                let mut workspace = Workspace::default();
                // Twice: values that the first run leaves in the workspace must not affect the second.
                for _ in 0..2 {
                    let mut found = vec![f32::NAN; expected.len()];
                    net.run(&image, &mut found, &mut workspace);
                    assert_close(&found, &expected, &format!("{isa:?}, {} threads, {input:?}, {layers:.0?}", n + 1));
                }
                assert_eq!(net.profile(&workspace).len(), layers.len());
            }
        }
    }
}

fn conv(random: &mut Random, outputs: usize, inputs: usize, kernel: usize, stride: usize, padding: Padding) -> Conv2d {
    let scale = 2.0 / ((inputs * kernel * kernel) as f32).sqrt();
    let weights = random.values(outputs * inputs * kernel * kernel).iter().map(|weight| weight * scale).collect();
    let clip = if random.flip() { Clip::RELU6 } else { Clip::NONE };
    Conv2d { weights, bias: random.values(outputs), kernel, stride, padding, clip }
}

fn pointwise(random: &mut Random, outputs: usize, inputs: usize) -> Conv2d {
    conv(random, outputs, inputs, 1, 1, Padding::NONE)
}

fn padding(random: &mut Random, kernel: usize) -> Padding {
    let mut side = || random.between(0, kernel - 1);
    Padding { top: side(), left: side(), bottom: side(), right: side() }
}

fn depthwise(random: &mut Random, channels: usize) -> Conv2d {
    let (kernel, stride) = (if random.flip() { 3 } else { 5 }, random.between(1, 2));
    let padding = padding(random, kernel);
    conv(random, channels, 1, kernel, stride, padding)
}

/// A block that keeps its shape, with a residual.
fn residual_block(random: &mut Random, channels: usize, expanded: usize) -> Layer {
    let kernel = if random.flip() { 3 } else { 5 };
    let around = kernel / 2;
    let padding = Padding { top: around, left: around, bottom: around, right: around };
    // Without an expansion, the depthwise convolution has the input's channels.
    let expand = random.flip().then(|| pointwise(random, expanded, channels));
    let expanded = if expand.is_some() { expanded } else { channels };
    Layer::InvertedResidual {
        expand,
        depthwise: conv(random, expanded, 1, kernel, 1, padding),
        project: Some(pointwise(random, channels, expanded)),
        residual: true,
    }
}

#[test]
fn depthwise_convolutions() {
    let mut random = Random::from_printed_seed();
    for _ in 0..40 {
        let input = FeatureMapShape {
            height: random.between(5, 20),
            width: random.between(5, 30),
            channels: random.between(1, 70),
        };
        let depthwise = depthwise(&mut random, input.channels);
        let layer = Layer::InvertedResidual { expand: None, depthwise, project: None, residual: false };
        check(&mut random, input, &[layer]);
    }
}

#[test]
fn pointwise_convolutions() {
    let mut random = Random::from_printed_seed();
    for _ in 0..30 {
        let (height, width) = (random.between(1, 20), random.between(1, 20));
        let channels = random.between(1, 60);
        let residual = random.flip();
        let outputs = if residual { channels } else { random.between(1, 90) };
        let layer = Layer::Conv { conv: pointwise(&mut random, outputs, channels), residual };
        check(&mut random, FeatureMapShape { height, width, channels }, &[layer]);
    }
}

#[test]
fn first_convolutions() {
    let mut random = Random::from_printed_seed();
    for _ in 0..30 {
        let (height, width, channels) = (random.between(7, 30), random.between(7, 30), random.between(1, 4));
        let (kernel, stride, outputs) = (random.between(2, 7), random.between(1, 3), random.between(1, 40));
        let padding = padding(&mut random, kernel);
        let first = conv(&mut random, outputs, channels, kernel, stride, padding);
        check(
            &mut random,
            FeatureMapShape { height, width, channels },
            &[Layer::Conv { conv: first, residual: false }],
        );
    }
}

#[test]
fn inverted_residuals() {
    let mut random = Random::from_printed_seed();
    for _ in 0..25 {
        let (height, width, channels) = (random.between(5, 30), random.between(5, 30), random.between(1, 30));
        let input = FeatureMapShape { height, width, channels };
        let (expanded, outputs) = (random.between(1, 100), random.between(1, 40));
        let expand = pointwise(&mut random, expanded, channels);
        let depthwise = depthwise(&mut random, expanded);
        let project = Some(pointwise(&mut random, outputs, expanded));
        let block = Layer::InvertedResidual { expand: Some(expand), depthwise, project, residual: false };
        check(&mut random, input, &[block]);
        let block = residual_block(&mut random, channels, expanded);
        check(&mut random, input, &[block]);
    }
}

#[test]
fn blocks_of_several_strips() {
    let mut random = Random::from_printed_seed();
    let input = FeatureMapShape { height: 64, width: 61, channels: 8 };
    let block = residual_block(&mut random, 8, 80);
    check(&mut random, input, &[block]);
}

#[test]
fn whole_networks() {
    let mut random = Random::from_printed_seed();
    for _ in 0..8 {
        let (height, width) = (random.between(16, 60), random.between(16, 60));
        let first = random.between(4, 30);
        let around = Padding { top: 1, left: 1, bottom: 1, right: 1 };
        let below = Padding { top: 0, left: 0, bottom: 1, right: 1 };
        let channels = random.between(4, 24);
        let wide = random.between(8, 90);
        let features = random.between(8, 90);
        let layers = [
            Layer::InvertedResidual {
                expand: Some(conv(&mut random, first, 3, 3, 2, below)),
                depthwise: conv(&mut random, first, 1, 3, 1, around),
                project: Some(pointwise(&mut random, channels, first)),
                residual: false,
            },
            residual_block(&mut random, channels, wide),
            Layer::InvertedResidual {
                expand: Some(pointwise(&mut random, wide, channels)),
                depthwise: conv(&mut random, wide, 1, 3, 2, around),
                project: Some(pointwise(&mut random, channels, wide)),
                residual: false,
            },
            residual_block(&mut random, channels, wide),
            Layer::Conv { conv: pointwise(&mut random, features, channels), residual: false },
            Layer::GlobalSum { factor: 0.01 },
        ];
        check(&mut random, FeatureMapShape { height, width, channels: 3 }, &layers);
    }
}

#[test]
fn the_profile_counts_the_multiply_accumulates() {
    let mut random = Random::from_printed_seed();
    let input = FeatureMapShape { height: 8, width: 6, channels: 4 };
    let around = Padding { top: 1, left: 1, bottom: 1, right: 1 };
    let block = Layer::InvertedResidual {
        expand: Some(pointwise(&mut random, 10, 4)),
        depthwise: conv(&mut random, 10, 1, 3, 1, around),
        project: Some(pointwise(&mut random, 5, 10)),
        residual: false,
    };
    let layers = [block, Layer::GlobalSum { factor: 1.0 / 48.0 }];
    let net = CompiledNet::new(input, &layers, false, Isa::best(), None).unwrap();
    let mut workspace = Workspace::default();
    assert!(net.profile(&workspace).is_empty());
    net.run(&random.values(8 * 6 * 4), &mut [0.0; 5], &mut workspace);
    let profile = net.profile(&workspace);
    assert_eq!(profile[0].name, "1×1 4 → 10, 3×3 depthwise, 1×1 → 5, 6×8");
    assert_eq!(profile[0].macs, 48 * (4 * 10 + 9 * 10 + 10 * 5));
    assert_eq!((profile[1].name.as_str(), profile[1].macs), ("mean, 1×1", 48 * 5));
}
