//! Checks the shapes and the memory of a network, and packs its layers.

use std::cmp::max;

use crate::depthwise::Depthwise;
use crate::error::{KernelError, VALUES_MAX};
use crate::gemm::PackedGemm;
use crate::inverted_residual::InvertedResidual;
use crate::layers::{
    BlockGeometry, CompiledLayer, Conv2d, DenseConv, FeatureMapShape, Layer, PackedLayer, Padding, PatchConv,
};
use crate::simd::Isa;

/// The f32 values that a network and its workspace take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct MemoryPlan {
    /// Packed weights and biases.
    pub weights: usize,
    /// The input with its padding.
    pub input: usize,
    /// The largest feature map; there are two buffers of it.
    pub feature_map: usize,
    /// The largest feature map between depthwise convolution and projection that threads share.
    pub shared: usize,
    /// The largest buffer of one thread before the depthwise convolution.
    pub expanded: usize,
    /// The largest buffer of one thread after the depthwise convolution.
    pub convolved: usize,
    /// Threads that share an image.
    pub threads: usize,
}

impl MemoryPlan {
    /// Returns the values of the workspace, or `None` if that overflows.
    pub fn workspace(&self) -> Option<usize> {
        let scratch = self.expanded.checked_add(self.convolved)?.checked_mul(self.threads)?;
        let feature_maps = self.feature_map.checked_mul(2)?;
        self.input.checked_add(feature_maps)?.checked_add(self.shared)?.checked_add(scratch)
    }

    fn total(&self) -> Option<usize> {
        self.workspace()?.checked_add(self.weights)
    }
}

/// Packs layers one after the other.
struct Compiler {
    isa: Isa,
    memory: MemoryPlan,
    /// Index of the layer.
    layer: usize,
}

/// Returns the packed layers and the memory that they take with `threads` threads.
///
/// # Errors
/// As [`crate::CompiledNet::new`].
pub(crate) fn compile(
    input: FeatureMapShape,
    layers: &[Layer],
    isa: Isa,
    threads: usize,
) -> Result<(Vec<CompiledLayer>, MemoryPlan), KernelError> {
    if !isa.is_supported() {
        return Err(KernelError::UnsupportedIsa(isa));
    }
    if [input.height, input.width, input.channels].contains(&0) {
        return Err(KernelError::EmptyInput(input));
    }
    let mut compiler = Compiler { isa, memory: MemoryPlan { threads, ..MemoryPlan::default() }, layer: 0 };
    let padded = padded_input(input, first_padding(layers.first().ok_or(KernelError::NoLayers)?));
    compiler.reserve(padded, "padded input", |memory, values| memory.input = values)?;
    let mut compiled: Vec<CompiledLayer> = Vec::with_capacity(layers.len());
    for (index, layer) in layers.iter().enumerate() {
        compiler.layer = index;
        let from = compiled.last().map_or(input, |previous| previous.to);
        compiled.push(compiler.compile_layer(layer, from)?);
    }
    Ok((compiled, compiler.memory))
}

/// Returns the layers of a compiled net for an input of another height and width, and the memory that they take. They share the packed
/// weights, of which `memory` has the size.
///
/// # Errors
/// As [`crate::CompiledNet::resized`].
pub(crate) fn resize(
    layers: &[CompiledLayer],
    input: FeatureMapShape,
    isa: Isa,
    memory: MemoryPlan,
) -> Result<(Vec<CompiledLayer>, MemoryPlan), KernelError> {
    if [input.height, input.width].contains(&0) {
        return Err(KernelError::EmptyInput(input));
    }
    let MemoryPlan { weights, threads, .. } = memory;
    let mut compiler = Compiler { isa, memory: MemoryPlan { weights, threads, ..MemoryPlan::default() }, layer: 0 };
    compiler.reserve(padded_input(input, layers[0].packed.input_padding()), "padded input", |memory, values| {
        memory.input = values;
    })?;
    let mut resized: Vec<CompiledLayer> = Vec::with_capacity(layers.len());
    for (index, layer) in layers.iter().enumerate() {
        compiler.layer = index;
        let from = resized.last().map_or(input, |previous| previous.to);
        resized.push(compiler.resize_layer(layer, from)?);
    }
    Ok((resized, compiler.memory))
}

/// Returns the padding that the input buffer includes: that of a first layer with a dense kernel larger than 1×1.
fn first_padding(layer: &Layer) -> Padding {
    match layer {
        Layer::Conv { conv, .. } | Layer::InvertedResidual { expand: Some(conv), .. } if conv.kernel > 1 => {
            conv.padding
        }
        _ => Padding::NONE,
    }
}

fn padded_input(FeatureMapShape { height, width, channels }: FeatureMapShape, padding: Padding) -> Option<usize> {
    let Padding { top, left, bottom, right } = padding;
    let height = height.checked_add(top)?.checked_add(bottom)?;
    let width = width.checked_add(left)?.checked_add(right)?;
    FeatureMapShape { height, width, channels }.checked_len()
}

impl Compiler {
    /// Adds values to the plan.
    ///
    /// # Errors
    /// If there are more than [`VALUES_MAX`] then, or if `values` is `None`, a size that overflows.
    fn reserve(
        &mut self,
        values: Option<usize>,
        quantity: &'static str,
        add: impl FnOnce(&mut MemoryPlan, usize),
    ) -> Result<(), KernelError> {
        let too_large = KernelError::TooLarge { layer: self.layer, quantity };
        match values {
            Some(values) if values <= VALUES_MAX => add(&mut self.memory, values),
            _ => return Err(too_large),
        }
        match self.memory.total() {
            Some(total) if total <= VALUES_MAX => Ok(()),
            _ => Err(too_large),
        }
    }

    fn compile_layer(&mut self, layer: &Layer, from: FeatureMapShape) -> Result<CompiledLayer, KernelError> {
        let (packed, to) = match layer {
            Layer::Conv { conv, residual } => {
                let to = self.dense_output(conv, from)?;
                self.reserve_feature_map(to)?;
                if *residual && (conv.kernel > 1 || to != from) {
                    return Err(KernelError::InvalidResidual { layer: self.layer });
                }
                let conv = self.dense(conv, from.channels, to.channels)?;
                (PackedLayer::Conv { conv, residual: *residual }, to)
            }
            Layer::InvertedResidual { expand, depthwise, project, residual } => {
                let (block, to) =
                    self.inverted_residual(expand.as_ref(), depthwise, project.as_ref(), *residual, from)?;
                (PackedLayer::InvertedResidual(Box::new(block)), to)
            }
            Layer::GlobalSum { factor } => {
                let to = FeatureMapShape { height: 1, width: 1, channels: from.channels };
                self.reserve_feature_map(to)?;
                (PackedLayer::GlobalSum { factor: *factor }, to)
            }
        };
        Ok(CompiledLayer { packed, from, to })
    }

    fn resize_layer(&mut self, layer: &CompiledLayer, from: FeatureMapShape) -> Result<CompiledLayer, KernelError> {
        let mut packed = layer.packed.clone();
        let to = match &mut packed {
            PackedLayer::Conv { conv, .. } => self.dense_sides(conv, from, layer.to.channels)?,
            PackedLayer::InvertedResidual(block) => self.resize_block(block, from)?,
            PackedLayer::GlobalSum { .. } => return Err(KernelError::FixedSize { layer: self.layer }),
        };
        self.reserve_feature_map(to)?;
        Ok(CompiledLayer { packed, from, to })
    }

    /// Sets the geometry of a block for the input `from`, and returns the shape of its output.
    fn resize_block(
        &mut self,
        block: &mut InvertedResidual,
        from: FeatureMapShape,
    ) -> Result<FeatureMapShape, KernelError> {
        let BlockGeometry { kernel, stride, padding, expanded, convolved, .. } = block.geometry;
        block.geometry.expanded = match &block.expand {
            Some(conv) => self.dense_sides(conv, from, expanded.channels)?,
            None => from,
        };
        block.geometry.convolved = self.sides(block.geometry.expanded, kernel, stride, padding, convolved.channels)?;
        self.reserve_scratch(&block.geometry)?;
        let channels = block.project.as_ref().map_or(convolved.channels, |project| project.outputs);
        let to = FeatureMapShape { channels, ..block.geometry.convolved };
        if block.residual && to != from {
            return Err(KernelError::InvalidResidual { layer: self.layer });
        }
        Ok(to)
    }

    /// Returns the shape of the output of a packed dense convolution with `channels` channels.
    fn dense_sides(
        &self,
        conv: &DenseConv,
        from: FeatureMapShape,
        channels: usize,
    ) -> Result<FeatureMapShape, KernelError> {
        match conv {
            DenseConv::Pointwise(_) => Ok(FeatureMapShape { channels, ..from }),
            DenseConv::Patch(PatchConv { kernel, stride, padding, .. }) => {
                self.sides(from, *kernel, *stride, *padding, channels)
            }
        }
    }

    fn inverted_residual(
        &mut self,
        expand: Option<&Conv2d>,
        depthwise: &Conv2d,
        project: Option<&Conv2d>,
        residual: bool,
        from: FeatureMapShape,
    ) -> Result<(InvertedResidual, FeatureMapShape), KernelError> {
        let lanes = self.isa.lanes();
        let expanded = expand.map_or(Ok(from), |conv| self.dense_output(conv, from))?;
        let convolved = self.depthwise_output(depthwise, expanded)?;
        let to = project.map_or(Ok(convolved), |conv| self.pointwise_output(conv, convolved))?;
        let patches = expand.is_some_and(|conv| conv.kernel > 1);
        if residual && (project.is_none() || patches || to != from) {
            return Err(KernelError::InvalidResidual { layer: self.layer });
        }
        self.reserve_feature_map(to)?;
        let (kernel, stride, padding) = (depthwise.kernel, depthwise.stride, depthwise.padding);
        let channel_blocks = expanded.channels.div_ceil(lanes);
        let geometry = BlockGeometry { lanes, kernel, stride, channel_blocks, padding, expanded, convolved };
        self.reserve_scratch(&geometry)?;
        let channels = channel_blocks * lanes;
        let expand = expand.map(|conv| self.dense(conv, from.channels, channels)).transpose()?;
        let packed = Depthwise::packed_len(expanded.channels, kernel, lanes);
        self.reserve(packed, "depthwise weights", |memory, values| memory.weights += values)?;
        let depthwise = Depthwise::new(&depthwise.weights, &depthwise.bias, kernel, stride, depthwise.clip, lanes);
        let project = project.map(|conv| self.gemm(conv, [to.channels, channels])).transpose()?;
        Ok((InvertedResidual { expand, depthwise, project, residual, geometry }, to))
    }

    fn reserve_feature_map(&mut self, shape: FeatureMapShape) -> Result<(), KernelError> {
        self.reserve(shape.checked_len(), "feature map", |memory, values| {
            memory.feature_map = max(memory.feature_map, values);
        })
    }

    fn reserve_scratch(&mut self, geometry: &BlockGeometry) -> Result<(), KernelError> {
        let scratch = InvertedResidual::scratch(geometry, self.memory.threads, self.isa.panel_layout().vectors);
        let too_large = KernelError::TooLarge { layer: self.layer, quantity: "expanded feature map" };
        let scratch = scratch.ok_or(too_large)?;
        self.reserve(Some(scratch.expanded), "expanded feature map", |memory, values| {
            memory.expanded = max(memory.expanded, values);
        })?;
        self.reserve(Some(scratch.convolved), "depthwise feature map", |memory, values| {
            memory.convolved = max(memory.convolved, values);
        })?;
        self.reserve(Some(scratch.shared), "depthwise feature map", |memory, values| {
            memory.shared = max(memory.shared, values);
        })
    }

    /// Packs a dense convolution with `inputs` channels, padded with zero filters to `outputs`.
    fn dense(&mut self, conv: &Conv2d, inputs: usize, outputs: usize) -> Result<DenseConv, KernelError> {
        let Conv2d { kernel, stride, padding, .. } = *conv;
        let gemm = self.gemm(conv, [outputs, kernel * kernel * inputs])?;
        Ok(match kernel {
            1 => DenseConv::Pointwise(gemm),
            _ => DenseConv::Patch(PatchConv { gemm, kernel, stride, padding }),
        })
    }

    fn gemm(&mut self, conv: &Conv2d, shape: [usize; 2]) -> Result<PackedGemm, KernelError> {
        let layout = self.isa.panel_layout();
        let packed = PackedGemm::packed_len(shape, layout);
        self.reserve(packed, "weights", |memory, values| memory.weights += values)?;
        Ok(PackedGemm::new(&conv.weights, &conv.bias, shape, conv.clip, layout))
    }

    /// Returns the output shape of a dense convolution.
    fn dense_output(&self, conv: &Conv2d, from: FeatureMapShape) -> Result<FeatureMapShape, KernelError> {
        if self.layer > 0 || conv.kernel == 1 {
            return self.pointwise_output(conv, from);
        }
        let too_large = KernelError::TooLarge { layer: self.layer, quantity: "stride" };
        conv.stride.checked_mul(from.channels).ok_or(too_large)?;
        self.conv_output(conv, from, from.channels, "a kernel and a stride of at least 1")
    }

    fn pointwise_output(&self, conv: &Conv2d, from: FeatureMapShape) -> Result<FeatureMapShape, KernelError> {
        let expected = "1×1 at a stride of 1 without padding";
        if (conv.kernel, conv.stride, conv.padding) != (1, 1, Padding::NONE) {
            return Err(self.unsupported(conv, expected));
        }
        self.conv_output(conv, from, from.channels, expected)
    }

    fn depthwise_output(&self, conv: &Conv2d, from: FeatureMapShape) -> Result<FeatureMapShape, KernelError> {
        let expected = "3×3 or 5×5 at a stride of 1 or 2";
        if !matches!((conv.kernel, conv.stride), (3 | 5, 1 | 2)) {
            return Err(self.unsupported(conv, expected));
        }
        let to = self.conv_output(conv, from, 1, expected)?;
        self.expect_length("depthwise bias", Some(from.channels), to.channels)?;
        Ok(to)
    }

    /// Returns the output shape of a convolution whose outputs depend on `inputs` channels each.
    fn conv_output(
        &self,
        conv: &Conv2d,
        from: FeatureMapShape,
        inputs: usize,
        expected: &'static str,
    ) -> Result<FeatureMapShape, KernelError> {
        let Conv2d { kernel, stride, padding, ref weights, ref bias, .. } = *conv;
        if kernel == 0 || stride == 0 {
            return Err(self.unsupported(conv, expected));
        }
        let channels = bias.len();
        if channels == 0 {
            return Err(KernelError::WrongLength { layer: self.layer, tensor: "bias", expected: 1, found: 0 });
        }
        let taps = kernel.checked_mul(kernel).and_then(|taps| taps.checked_mul(inputs));
        self.expect_length("weights", taps.and_then(|taps| taps.checked_mul(channels)), weights.len())?;
        self.sides(from, kernel, stride, padding, channels)
    }

    /// Returns the shape of the output of a convolution with `channels` channels; kernel and stride are at least 1.
    fn sides(
        &self,
        from: FeatureMapShape,
        kernel: usize,
        stride: usize,
        padding: Padding,
        channels: usize,
    ) -> Result<FeatureMapShape, KernelError> {
        let side = |length: usize, before: usize, after: usize| {
            let padded = length.checked_add(before).and_then(|length| length.checked_add(after));
            let too_large = KernelError::TooLarge { layer: self.layer, quantity: "padding" };
            let exceeds = KernelError::KernelExceedsInput { layer: self.layer, kernel };
            Ok(padded.ok_or(too_large)?.checked_sub(kernel).ok_or(exceeds)? / stride + 1)
        };
        let height = side(from.height, padding.top, padding.bottom)?;
        let width = side(from.width, padding.left, padding.right)?;
        Ok(FeatureMapShape { height, width, channels })
    }

    fn expect_length(&self, tensor: &'static str, expected: Option<usize>, found: usize) -> Result<(), KernelError> {
        let layer = self.layer;
        let expected = expected.ok_or(KernelError::TooLarge { layer, quantity: tensor })?;
        match expected == found {
            true => Ok(()),
            false => Err(KernelError::WrongLength { layer, tensor, expected, found }),
        }
    }

    fn unsupported(&self, conv: &Conv2d, expected: &'static str) -> KernelError {
        let Conv2d { kernel, stride, .. } = *conv;
        KernelError::UnsupportedConv { layer: self.layer, kernel, stride, expected }
    }
}
