//! A sequence of layers in packed form, and its execution.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::compile::{MemoryPlan, compile, resize};
use crate::error::KernelError;
use crate::gemm::{GemmArgs, InputStrides, OutputStrides, PackedGemm};
use crate::layers::{CompiledLayer, DenseConv, FeatureMapShape, Layer, PackedLayer, Padding, PatchConv};
use crate::partition::{Scratch, Workers, grown};
use crate::profile::{LayerProfile, profile};
use crate::simd::Isa;
use crate::thread_pool::ThreadPool;

/// A whole network, or a sequence of its layers, packed for one instruction set. A clone shares the weights.
#[derive(Debug, Clone)]
pub struct CompiledNet {
    layers: Arc<[CompiledLayer]>,
    channels_first: bool,
    isa: Isa,
    pool: Option<Arc<ThreadPool>>,
    memory: MemoryPlan,
}

/// The buffers and layer times of a run. They grow to their size in the first run; a workspace may be used with any net.
#[derive(Debug, Clone, Default)]
pub struct Workspace {
    /// The input with zeros around it, which no later feature map overwrites.
    padded_input: Vec<f32>,
    /// The shape and padding that `padded_input` has zeros for.
    padded_for: Option<(FeatureMapShape, Padding)>,
    from: Vec<f32>,
    to: Vec<f32>,
    /// The feature map between depthwise convolution and projection, if the threads share it.
    shared: Vec<f32>,
    scratch: Vec<Scratch>,
    /// Wall-clock time of each layer in the last run.
    times: Vec<Duration>,
}

impl CompiledNet {
    /// Packs `layers`, each on the output of the one before, for an input of the shape `input`.
    ///
    /// `channels_first`: input and output of the net are `[channels, height, width]`, otherwise `[height, width, channels]`. `pool`: the
    /// threads that share an image; without one, the calling thread computes it.
    ///
    /// # Errors
    /// If the processor lacks the instruction set, there is no layer, a layer has no kernel, weights do not have the length that the
    /// shapes demand, or the net with a workspace exceeds [`crate::VALUES_MAX`] values. Nothing of that size is allocated before.
    pub fn new(
        input: FeatureMapShape,
        layers: &[Layer],
        channels_first: bool,
        isa: Isa,
        pool: Option<Arc<ThreadPool>>,
    ) -> Result<Self, KernelError> {
        let threads = pool.as_ref().map_or(1, |pool| pool.threads());
        let (compiled, memory) = compile(input, layers, isa, threads)?;
        Ok(CompiledNet { layers: compiled.into(), channels_first, isa, pool, memory })
    }

    /// Returns the same layers for an input of another height and width, in pixels. They share the packed weights; the padding of each
    /// convolution stays.
    ///
    /// # Errors
    /// If a size is zero, a layer does not fit its input, there is a [`Layer::GlobalSum`], or the net with a workspace exceeds
    /// [`crate::VALUES_MAX`] values.
    pub fn resized(&self, height: usize, width: usize) -> Result<Self, KernelError> {
        let input = FeatureMapShape { height, width, ..self.input_shape() };
        let (layers, memory) = resize(&self.layers, input, self.isa, self.memory)?;
        Ok(CompiledNet { layers: layers.into(), memory, ..self.clone() })
    }

    /// Returns the layers before a last [`Layer::GlobalSum`], which share the packed weights; `None` if the last layer is another or the
    /// only one.
    pub fn before_global_sum(&self) -> Option<Self> {
        let [layers @ .., last] = &self.layers[..] else { return None };
        let is_sum = matches!(last.packed, PackedLayer::GlobalSum { .. });
        (is_sum && !layers.is_empty()).then(|| CompiledNet { layers: layers.into(), ..self.clone() })
    }

    /// Returns the shape of the input.
    pub fn input_shape(&self) -> FeatureMapShape {
        self.layers[0].from
    }

    /// Returns the shape of the output.
    pub fn output_shape(&self) -> FeatureMapShape {
        self.layers[self.layers.len() - 1].to
    }

    /// Returns whether input and output are `[channels, height, width]`.
    pub fn channels_first(&self) -> bool {
        self.channels_first
    }

    /// Returns the number of layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Returns the instruction set of the kernels.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Computes the net for one image, `input`, and writes its output to `out`. Allocates nothing from the second call with a workspace
    /// on.
    ///
    /// # Panics
    /// If `input` or `out` does not have as many values as [`CompiledNet::input_shape`] and [`CompiledNet::output_shape`].
    pub fn run(&self, input: &[f32], out: &mut [f32], workspace: &mut Workspace) {
        assert_eq!(input.len(), self.input_shape().len(), "values of the input");
        assert_eq!(out.len(), self.output_shape().len(), "values of the output");
        let pool = self.pool.as_deref();
        pool.inspect(|pool| pool.wake());
        let padding = self.layers[0].packed.input_padding();
        let padded_for = (self.input_shape(), padding);
        if workspace.padded_for != Some(padded_for) {
            // The zeros lie elsewhere.
            workspace.padded_input.clear();
            workspace.padded_for = Some(padded_for);
        }
        let Workspace { padded_input, from, to, shared, scratch, times, .. } = workspace;
        scratch.resize_with(self.memory.threads, Scratch::default);
        let mut workers = Workers { pool, scratch };
        times.clear();
        load_input(self.input_shape(), input, self.channels_first, padding, padded_input);
        for (index, layer) in self.layers.iter().enumerate() {
            let began = Instant::now();
            let input = if index == 0 { &padded_input[..] } else { &from[..layer.from.len()] };
            self.run_layer(layer, input, grown(to, layer.to.len()), shared, &mut workers);
            std::mem::swap(from, to);
            times.push(began.elapsed());
        }
        store_output(self.output_shape(), from, self.channels_first, out);
    }

    /// Returns the cost of each layer, with the times of the last run in this workspace. Empty before the first run.
    pub fn profile(&self, workspace: &Workspace) -> Vec<LayerProfile> {
        profile(&self.layers, &workspace.times)
    }

    pub(crate) fn lanes(&self) -> usize {
        self.isa.lanes()
    }

    fn run_layer(
        &self,
        layer: &CompiledLayer,
        from: &[f32],
        to: &mut [f32],
        shared: &mut Vec<f32>,
        workers: &mut Workers<'_>,
    ) {
        let CompiledLayer { to: shape, .. } = *layer;
        match &layer.packed {
            PackedLayer::Conv { conv: DenseConv::Pointwise(gemm), residual } => {
                let strides = InputStrides { pixel_stride: gemm.inputs, segments: 1, segment_stride: 0 };
                let residual = residual.then_some(from);
                self.pointwise(gemm, from, strides, shape.height * shape.width, residual, to, workers);
            }
            PackedLayer::Conv { conv, .. } => workers.split(shape.height, shape.row_len(), to, &|range, to, _| {
                let strides = OutputStrides {
                    width: shape.width,
                    pixel_stride: shape.channels,
                    row_stride: shape.row_len(),
                    vector_stride: self.lanes(),
                };
                self.dense_rows(conv, layer.from, from, range, 0..shape.channels, to, strides);
            }),
            PackedLayer::InvertedResidual(block) => self.inverted_residual(block, layer, from, to, shared, workers),
            PackedLayer::GlobalSum { factor } => global_sum(from, layer.from.channels, *factor, to),
        }
    }

    /// Computes a 1×1 convolution whose output pixels are contiguous.
    #[expect(clippy::too_many_arguments, reason = "a feature map, its layout, and the convolution")]
    pub(crate) fn pointwise(
        &self,
        gemm: &PackedGemm,
        input: &[f32],
        input_strides: InputStrides,
        pixels: usize,
        residual: Option<&[f32]>,
        to: &mut [f32],
        workers: &mut Workers<'_>,
    ) {
        let pixel_stride = gemm.outputs;
        workers.split(pixels, pixel_stride, to, &|range, out, _| {
            let (pixels, input) = (range.len(), &input[range.start * input_strides.pixel_stride..]);
            self.isa.gemm(&mut GemmArgs {
                gemm,
                outputs: 0..gemm.outputs,
                input,
                input_strides,
                pixels,
                residual: residual.map(|values| &values[range.start * pixel_stride..]),
                out,
                output_strides: OutputStrides {
                    width: pixels,
                    pixel_stride,
                    row_stride: pixels * pixel_stride,
                    vector_stride: self.lanes(),
                },
            });
        });
    }

    /// Computes rows `range` and channels `outputs` of a dense convolution of the feature map `input`; `to` begins with the first of
    /// them.
    #[expect(clippy::too_many_arguments, reason = "a feature map, its layout, and the convolution")]
    pub(crate) fn dense_rows(
        &self,
        conv: &DenseConv,
        from: FeatureMapShape,
        input: &[f32],
        range: Range<usize>,
        outputs: Range<usize>,
        to: &mut [f32],
        output_strides: OutputStrides,
    ) {
        let run = |gemm, input, input_strides, pixels, out: &mut [f32]| {
            let (outputs, residual) = (outputs.clone(), None);
            self.isa.gemm(&mut GemmArgs { gemm, outputs, input, input_strides, pixels, residual, out, output_strides });
        };
        match conv {
            DenseConv::Pointwise(gemm) => {
                let strides = InputStrides { pixel_stride: gemm.inputs, segments: 1, segment_stride: 0 };
                run(gemm, &input[range.start * from.row_len()..], strides, range.len() * from.width, to);
            }
            DenseConv::Patch(PatchConv { gemm, kernel, stride, padding }) => {
                let line = (from.width + padding.left + padding.right) * from.channels;
                let strides =
                    InputStrides { pixel_stride: stride * from.channels, segments: *kernel, segment_stride: line };
                for (n, row) in range.enumerate() {
                    let to = &mut to[n * output_strides.row_stride..];
                    run(gemm, &input[row * stride * line..], strides, output_strides.width, to);
                }
            }
        }
    }
}

/// Sums `[pixels, channels]` over the pixels and multiplies by `factor`, into `[channels]`.
fn global_sum(from: &[f32], channels: usize, factor: f32, to: &mut [f32]) {
    to.fill(0.0);
    for pixel in from.chunks_exact(channels) {
        for (sum, value) in to.iter_mut().zip(pixel) {
            *sum += value;
        }
    }
    to.iter_mut().for_each(|sum| *sum *= factor);
}

/// Copies the input to `to` with its channels last and zeros around it. An empty `to` becomes zero first.
fn load_input(shape: FeatureMapShape, input: &[f32], channels_first: bool, padding: Padding, to: &mut Vec<f32>) {
    let Padding { top, left, bottom, right } = padding;
    let line = (shape.width + left + right) * shape.channels;
    let len = (shape.height + top + bottom) * line;
    // The padding stays zero from the first run on.
    to.reserve_exact(len.saturating_sub(to.len()));
    to.resize(len, 0.0);
    let pixels = shape.height * shape.width;
    for (row, line) in to[top * line..].chunks_exact_mut(line).take(shape.height).enumerate() {
        let line = &mut line[left * shape.channels..][..shape.row_len()];
        if !channels_first {
            line.copy_from_slice(&input[row * shape.row_len()..][..shape.row_len()]);
            continue;
        }
        let plane = |channel: usize| &input[channel * pixels + row * shape.width..][..shape.width];
        if shape.channels == 3 {
            let colours = plane(0).iter().zip(plane(1)).zip(plane(2));
            for (pixel, ((red, green), blue)) in line.chunks_exact_mut(3).zip(colours) {
                pixel.copy_from_slice(&[*red, *green, *blue]);
            }
        } else {
            for channel in 0..shape.channels {
                for (pixel, value) in line.chunks_exact_mut(shape.channels).zip(plane(channel)) {
                    pixel[channel] = *value;
                }
            }
        }
    }
}

/// Copies `[pixels, channels]` to `out`, in the order of the net's output.
fn store_output(shape: FeatureMapShape, from: &[f32], channels_first: bool, out: &mut [f32]) {
    let pixels = shape.height * shape.width;
    if !channels_first || pixels == 1 {
        return out.copy_from_slice(&from[..shape.len()]);
    }
    for (channel, plane) in out.chunks_exact_mut(pixels).enumerate() {
        for (value, pixel) in plane.iter_mut().zip(from.chunks_exact(shape.channels)) {
            *value = pixel[channel];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::{Random, supported_isas};
    use crate::{Clip, Conv2d, VALUES_MAX};

    fn conv(outputs: usize, inputs: usize, kernel: usize, stride: usize, padding: usize) -> Conv2d {
        let padding = Padding { top: padding, left: padding, bottom: padding, right: padding };
        let weights = vec![0.1; outputs * inputs * kernel * kernel];
        Conv2d { weights, bias: vec![0.0; outputs], kernel, stride, padding, clip: Clip::NONE }
    }

    fn block(inputs: usize, expanded: usize, stride: usize) -> Layer {
        Layer::InvertedResidual {
            expand: Some(conv(expanded, inputs, 1, 1, 0)),
            depthwise: conv(expanded, 1, 3, stride, 1),
            project: Some(conv(inputs, expanded, 1, 1, 0)),
            residual: stride == 1,
        }
    }

    fn error(input: FeatureMapShape, layers: &[Layer]) -> String {
        CompiledNet::new(input, layers, false, Isa::Portable, None).unwrap_err().to_string()
    }

    #[test]
    fn a_run_allocates_no_more_than_the_plan() {
        let mut random = Random::from_printed_seed();
        for isa in supported_isas() {
            for _ in 0..20 {
                let (height, width) = (random.between(3, 90), random.between(3, 90));
                let input = FeatureMapShape { height, width, channels: 3 };
                let channels = random.between(1, 20);
                let (wide, stride) = (random.between(1, 120), random.between(1, 2));
                let first = Layer::Conv { conv: conv(channels, 3, 3, 1, 1), residual: false };
                let layers = [first, block(channels, wide, 1), block(channels, wide, stride)];
                let pool = ThreadPool::with_threads(random.between(1, 4)).unwrap();
                let net = CompiledNet::new(input, &layers, true, isa, pool).unwrap();
                let mut workspace = Workspace::default();
                let (image, mut out) = (vec![0.0; input.len()], vec![0.0; net.output_shape().len()]);
                for _ in 0..2 {
                    net.run(&image, &mut out, &mut workspace);
                }
                let Workspace { padded_input, from, to, shared, scratch, .. } = &workspace;
                assert_eq!(padded_input.capacity(), net.memory.input);
                assert!(from.capacity().max(to.capacity()) <= net.memory.feature_map);
                assert!(shared.capacity() <= net.memory.shared);
                assert!(scratch.iter().all(|scratch| scratch.expanded.capacity() <= net.memory.expanded));
                assert!(scratch.iter().all(|scratch| scratch.convolved.capacity() <= net.memory.convolved));
                assert!(net.memory.weights + net.memory.workspace().unwrap() <= VALUES_MAX);
            }
        }
    }

    #[test]
    fn a_resized_net_equals_one_that_was_compiled_for_its_size() {
        let mut random = Random::from_printed_seed();
        for isa in supported_isas() {
            let layers = [
                Layer::Conv { conv: conv(8, 3, 3, 2, 1), residual: false },
                block(8, 20, 1),
                block(8, 20, 2),
                Layer::Conv { conv: conv(5, 8, 1, 1, 0), residual: false },
            ];
            let pool = ThreadPool::with_threads(random.between(1, 3)).unwrap();
            let net = |height, width| {
                let input = FeatureMapShape { height, width, channels: 3 };
                CompiledNet::new(input, &layers, true, isa, pool.clone()).unwrap()
            };
            let (small, sides) = (net(32, 32), (random.between(8, 90), random.between(8, 90)));
            let (resized, whole) = (small.resized(sides.0, sides.1).unwrap(), net(sides.0, sides.1));
            assert_eq!((resized.input_shape(), resized.output_shape()), (whole.input_shape(), whole.output_shape()));
            assert_eq!(resized.memory, whole.memory);
            let image: Vec<f32> = (0..3 * sides.0 * sides.1).map(|i| (i as f32 * 0.37).sin()).collect();
            let [found, expected] = [&resized, &whole].map(|net| {
                let mut out = vec![0.0; net.output_shape().len()];
                net.run(&image, &mut out, &mut Workspace::default());
                out
            });
            assert_eq!(found, expected);
        }
        let input = FeatureMapShape { height: 4, width: 4, channels: 1 };
        let layers = [Layer::Conv { conv: conv(1, 1, 3, 1, 1), residual: false }, Layer::GlobalSum { factor: 1.0 }];
        let net = CompiledNet::new(input, &layers[..], false, Isa::Portable, None).unwrap();
        assert_eq!(net.resized(8, 8).unwrap_err(), KernelError::FixedSize { layer: 1 });
        let convolution = net.before_global_sum().unwrap();
        assert_eq!((convolution.layer_count(), convolution.before_global_sum().is_none()), (1, true));
        let net = CompiledNet::new(input, &layers[..1], false, Isa::Portable, None).unwrap();
        assert!(net.resized(0, 8).unwrap_err().to_string().starts_with("the input is 0×8×1"));
        assert!(matches!(net.resized(1 << 20, 1 << 20), Err(KernelError::TooLarge { layer: 0, .. })));
    }

    #[test]
    fn a_workspace_may_be_used_with_several_nets() {
        let layers = |padding| [Layer::Conv { conv: conv(2, 1, 3, 1, padding), residual: false }];
        let net = |height, width, padding| {
            let input = FeatureMapShape { height, width, channels: 1 };
            CompiledNet::new(input, &layers(padding), false, Isa::best(), None).unwrap()
        };
        let mut workspace = Workspace::default();
        for net in [net(4, 6, 1), net(6, 8, 0), net(6, 4, 1), net(4, 6, 1), net(2, 2, 2)] {
            let image = vec![1.0; net.input_shape().len()];
            let (mut found, mut expected) = (vec![0.0; net.output_shape().len()], vec![0.0; net.output_shape().len()]);
            net.run(&image, &mut found, &mut workspace);
            net.run(&image, &mut expected, &mut Workspace::default());
            assert_eq!(found, expected);
            assert_eq!(net.profile(&workspace).len(), 1);
        }
    }

    #[test]
    fn sizes_that_overflow_or_exceed_the_limit_are_errors() {
        let pixel = FeatureMapShape { height: 1, width: 1, channels: 1 };
        let pointwise = |outputs| Layer::Conv { conv: conv(outputs, 1, 1, 1, 0), residual: false };
        let limit = format!("the network exceeds {VALUES_MAX} f32 values");
        for side in [usize::MAX, usize::MAX / 2, 1 << (usize::BITS / 2), 1 << 15] {
            let input = FeatureMapShape { height: side, width: side, channels: 1 };
            assert!(error(input, &[pointwise(1)]).ends_with(&limit), "{side}");
        }
        // A padding that overflows, one that wraps around to a small size, and one that is too large.
        for padding in [usize::MAX, usize::MAX / 2 + 1, 1 << 16] {
            let layer = Layer::Conv { conv: conv(1, 1, 3, 1, padding), residual: false };
            assert!(error(pixel, &[layer]).ends_with(&limit), "{padding}");
            let depthwise = conv(1, 1, 3, 1, padding);
            let block = Layer::InvertedResidual { expand: None, depthwise, project: None, residual: false };
            assert!(error(pixel, &[block]).ends_with(&limit), "{padding}");
        }
        // A stride that makes the output small, but not the padded feature map before it.
        let depthwise = Conv2d { padding: Padding { right: usize::MAX / 8, ..Padding::NONE }, ..conv(1, 1, 3, 2, 1) };
        let layer = Layer::InvertedResidual { expand: None, depthwise, project: None, residual: false };
        assert!(error(FeatureMapShape { height: 3, width: 3, channels: 1 }, &[layer]).ends_with(&limit));
        // Weights that are few, but many with the padding of their panels.
        let input = FeatureMapShape { height: 1, width: 1, channels: VALUES_MAX / 4 };
        let weights = vec![0.0; VALUES_MAX / 4];
        let layer = Layer::Conv { conv: Conv2d { weights, ..conv(1, 1, 1, 1, 0) }, residual: false };
        assert!(error(input, &[layer]).contains("with its weights"));
        let stride = Layer::Conv { conv: conv(1, 3, 3, usize::MAX, 1), residual: false };
        assert!(error(FeatureMapShape { channels: 3, ..pixel }, &[stride]).contains("stride"));
    }

    #[test]
    fn a_network_of_the_size_of_resnet50_at_1024_pixels_fits() {
        const THREADS: usize = 8;
        let input = FeatureMapShape { height: 1024, width: 1024, channels: 3 };
        let first = || Layer::Conv { conv: conv(64, 3, 7, 2, 3), residual: false };
        let block = |stride, inputs, outputs| Layer::InvertedResidual {
            expand: None,
            depthwise: conv(inputs, 1, 3, stride, 1),
            project: Some(conv(outputs, inputs, 1, 1, 0)),
            residual: false,
        };
        let fits = |layers: &[Layer]| {
            let (_, memory) = compile(input, layers, Isa::Portable, THREADS).unwrap();
            assert!(memory.workspace().unwrap() + 26_000_000 < VALUES_MAX);
        };
        // The feature maps of ResNet50 at the end of its stages.
        fits(&[first(), block(2, 64, 256), block(2, 256, 512), block(2, 512, 1024), block(2, 1024, 2048)]);
        // Four times as many channels, for which a 32-bit processor has too little memory.
        if usize::BITS >= 64 {
            fits(&[first(), block(2, 64, 256), block(2, 256, 2048), block(2, 2048, 2048), block(1, 2048, 2048)]);
        }
    }

    #[test]
    fn layers_without_a_kernel_are_errors() {
        let input = FeatureMapShape { height: 4, width: 4, channels: 2 };
        let pointwise = |conv, residual| Layer::Conv { conv, residual };
        let good = pointwise(conv(2, 2, 1, 1, 0), true);
        assert_eq!(error(input, &[]), "the network has no layers");
        let empty = FeatureMapShape { width: 0, ..input };
        assert!(error(empty, std::slice::from_ref(&good)).starts_with("the input is 4×0×2"));
        let strided = error(input, &[good.clone(), pointwise(conv(2, 2, 1, 2, 0), false)]);
        assert_eq!(strided, "layer 1: a kernel of 1×1 at a stride of 2, expected 1×1 at a stride of 1 without padding");
        assert!(
            error(input, &[good.clone(), pointwise(conv(2, 2, 3, 1, 1), false)])
                .starts_with("layer 1: a kernel of 3×3")
        );
        assert!(error(input, &[pointwise(conv(2, 2, 0, 1, 0), false)]).contains("a kernel of 0×0"));
        assert!(error(input, &[pointwise(conv(2, 2, 7, 1, 1), false)]).contains("exceeds its padded input"));
        assert!(error(input, &[pointwise(conv(3, 2, 1, 1, 0), true)]).contains("residual"));
        assert!(error(input, &[pointwise(conv(2, 2, 3, 1, 1), true)]).contains("residual"));
        let short = Conv2d { weights: vec![0.0; 3], ..conv(2, 2, 1, 1, 0) };
        assert_eq!(error(input, &[pointwise(short, false)]), "layer 0: weights: expected 4 values, found 3");
        let no_outputs = Conv2d { weights: vec![], bias: vec![], ..conv(2, 2, 1, 1, 0) };
        assert_eq!(error(input, &[pointwise(no_outputs, false)]), "layer 0: bias: expected 1 values, found 0");
        let depthwise = |depthwise| {
            let layer = Layer::InvertedResidual { expand: None, depthwise, project: None, residual: false };
            error(input, &[layer])
        };
        assert!(depthwise(conv(2, 1, 4, 1, 0)).contains("3×3 or 5×5"));
        assert!(depthwise(conv(2, 1, 3, 3, 0)).contains("3×3 or 5×5"));
        assert!(depthwise(conv(3, 1, 3, 1, 0)).contains("depthwise bias: expected 2 values, found 3"));
        let missing = Isa::ALL.into_iter().find(|isa| !isa.is_supported()).unwrap();
        let unsupported = CompiledNet::new(input, &[good], false, missing, None).unwrap_err();
        assert_eq!(unsupported, KernelError::UnsupportedIsa(missing));
    }
}
