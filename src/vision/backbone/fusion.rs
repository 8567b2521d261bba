//! Operator fusion: finds the layers of a tract graph that the kernels compute, by their structure, and replaces them with one operator.

use std::collections::{HashMap, HashSet};
use std::iter::Peekable;
use std::sync::Arc;
use std::vec;

use bloomcast_kernels::{Clip, CompiledNet, Conv2d, FeatureMapShape, Isa, Layer, Padding, ThreadPool, Workspace};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::cast::Cast;
use tract_onnx::tract_core::ops::cnn::{Conv, KernelFormat};
use tract_onnx::tract_core::ops::konst::Const;
use tract_onnx::tract_core::ops::math::{Add, Div, Max, Min, Mul};
use tract_onnx::tract_core::ops::nn::{DataFormat, Reduce, Reducer};

/// The result of [`fuse`].
pub(super) enum Fusion {
    /// The graph has no layers for the kernels.
    None,
    /// One operator in the graph replaces a sequence of its layers.
    Partial,
    /// The kernels compute the whole graph; tract has nothing left to run.
    Whole(CompiledNet),
}

/// Replaces the longest sequence of layers that the kernels can compute. Changes nothing if the processor lacks `isa`.
///
/// # Errors
/// If the graph has inconsistent shapes, or a size that overflows or exceeds [`bloomcast_kernels::VALUES_MAX`].
pub(super) fn fuse(model: &mut TypedModel, isa: Isa, pool: Option<Arc<ThreadPool>>) -> TractResult<Fusion> {
    if !isa.is_supported() {
        return Ok(Fusion::None);
    }
    let Some(sequence) = PatternMatcher::new(model).find_sequence()? else { return Ok(Fusion::None) };
    let FusedSequence { input, layers, channels_first, from, to } = sequence;
    let net = CompiledNet::new(input, &layers, channels_first, isa, pool)
        .with_context(|| format!("cannot compile {} fused layers for {}", layers.len(), isa.name()))?;
    let shape: TVec<usize> = model.outlet_fact(to)?.shape.as_concrete().context("a concrete output shape")?.into();
    let batch = shape.first().copied().unwrap_or(0);
    let lengths = (net.output_shape().checked_len(), shape.iter().skip(1).product::<usize>());
    ensure!(lengths.0 == Some(lengths.1), "the kernels compute {:?}, tract expects {shape:?}", net.output_shape());
    if batch == 1 && from == model.inputs[0] && only_unit_axes_between(model, to, model.outputs[0]) {
        return Ok(Fusion::Whole(net));
    }
    let op = KernelsOp { net: Arc::new(net), shape };
    let mut patch = TypedModelPatch::default();
    let input = patch.tap_model(model, from)?;
    let output = patch.wire_node("kernels", op, &[input])?[0];
    patch.shunt_outside(model, to, output)?;
    patch.apply(model)?;
    Ok(Fusion::Partial)
}

/// Returns whether only operators that add or remove axes of length 1 lie between two outlets.
fn only_unit_axes_between(model: &TypedModel, from: OutletId, to: OutletId) -> bool {
    let node = model.node(to.node);
    from == to
        || matches!(node.op_as::<AxisOp>(), Some(AxisOp::Rm(_) | AxisOp::Add(_)))
            && only_unit_axes_between(model, from, node.inputs[0])
}

/// Layers for the kernels, and the outlets between which they lie in the graph.
struct FusedSequence {
    input: FeatureMapShape,
    layers: Vec<Layer>,
    channels_first: bool,
    from: OutletId,
    to: OutletId,
}

/// A convolution with its activation and residual, or the mean over all pixels.
#[derive(Debug)]
struct FusedOp {
    kind: OpKind,
    from: OutletId,
    /// Outlets of its nodes in order; the last is its output.
    outlets: Vec<OutletId>,
    nodes: Vec<usize>,
    residual: Option<OutletId>,
}

#[derive(Debug)]
enum OpKind {
    Conv { conv: Conv2d, depthwise: bool },
    Mean { factor: f32 },
}

impl FusedOp {
    fn new(kind: OpKind, from: OutletId, node: usize) -> Self {
        FusedOp { kind, from, outlets: vec![node.into()], nodes: vec![node], residual: None }
    }

    fn output(&self) -> OutletId {
        *self.outlets.last().expect("an operator has an output")
    }

    fn is_depthwise(&self) -> bool {
        matches!(self.kind, OpKind::Conv { depthwise: true, .. })
    }

    /// Returns whether it can be the projection of a block with this input: a 1×1 convolution whose residual, if any, is the input.
    fn is_projection(&self, input: OutletId) -> bool {
        matches!(&self.kind, OpKind::Conv { conv, depthwise: false } if conv.kernel == 1)
            && self.residual.is_none_or(|residual| residual == input)
    }
}

/// Goes through a graph in the order of evaluation and collects the operators that the kernels can compute.
struct PatternMatcher<'a> {
    model: &'a TypedModel,
    format: Option<DataFormat>,
    ops: Vec<FusedOp>,
    /// The index of the operator that computes an outlet.
    producer: HashMap<OutletId, usize>,
}

impl<'a> PatternMatcher<'a> {
    fn new(model: &'a TypedModel) -> Self {
        PatternMatcher { model, format: None, ops: Vec::new(), producer: HashMap::new() }
    }

    fn find_sequence(mut self) -> TractResult<Option<FusedSequence>> {
        for id in self.model.eval_order()? {
            let node = self.model.node(id);
            self.match_conv(node)?;
            self.match_clip(node)?;
            self.match_residual(node)?;
            self.match_mean(node)?;
        }
        self.truncate_to_closed_sequence();
        if !self.ops.iter().any(FusedOp::is_depthwise) {
            return Ok(None);
        }
        let (from, to) = (self.ops[0].from, self.ops[self.ops.len() - 1].output());
        let Some(input) = self.shape(from)? else { return Ok(None) };
        let Some(layers) = self.layers() else { return Ok(None) };
        let channels_first = self.format == Some(DataFormat::NCHW);
        Ok(Some(FusedSequence { input, layers, channels_first, from, to }))
    }

    /// Keeps the longest prefix that is a chain and whose intermediate outputs have no other users.
    fn truncate_to_closed_sequence(&mut self) {
        let chained = self.ops.windows(2).take_while(|pair| pair[1].from == pair[0].output()).count() + 1;
        self.ops.truncate(chained);
        while !self.ops.is_empty() && !self.is_closed() {
            self.ops.pop();
        }
    }

    /// Returns whether only the last outlet of the operators is used outside of them.
    fn is_closed(&self) -> bool {
        let nodes: HashSet<usize> = self.ops.iter().flat_map(|op| op.nodes.iter().copied()).collect();
        let last = self.ops.last().map(FusedOp::output);
        self.ops.iter().flat_map(|op| &op.outlets).filter(|outlet| Some(**outlet) != last).all(|outlet| {
            !self.model.outputs.contains(outlet)
                && self.model.outlet_successors(*outlet).iter().all(|inlet| nodes.contains(&inlet.node))
        })
    }

    fn push(&mut self, kind: OpKind, node: &TypedNode) {
        self.producer.insert(node.id.into(), self.ops.len());
        self.ops.push(FusedOp::new(kind, node.inputs[0], node.id));
    }

    /// Fuses a node with the operator that computes its input.
    fn fuse_into(&mut self, op: usize, node: usize) {
        self.ops[op].outlets.push(node.into());
        self.ops[op].nodes.push(node);
        self.producer.insert(node.into(), op);
    }

    /// Returns the operator whose output is an outlet that only one node uses.
    fn sole_producer(&self, outlet: OutletId) -> Option<usize> {
        let op = *self.producer.get(&outlet)?;
        let sole = self.model.outlet_successors(outlet).len() == 1 && self.ops[op].output() == outlet;
        sole.then_some(op)
    }

    fn match_conv(&mut self, node: &TypedNode) -> TractResult<()> {
        let Some(op) = node.op_as::<Conv>() else { return Ok(()) };
        if !self.ops.is_empty() && !self.producer.contains_key(&node.inputs[0]) {
            return Ok(());
        }
        let Some((conv, depthwise)) = supported_conv(self.model, node, op)? else { return Ok(()) };
        // A matrix product over patches is fast for the few channels of an image, and only the input of a sequence has padding.
        if conv.kernel > 1 && !depthwise && !self.ops.is_empty() {
            return Ok(());
        }
        if *self.format.get_or_insert(op.pool_spec.data_format) != op.pool_spec.data_format {
            return Ok(());
        }
        self.push(OpKind::Conv { conv, depthwise }, node);
        Ok(())
    }

    /// Matches `max(x, constant)` and `min(x, constant)`.
    fn match_clip(&mut self, node: &TypedNode) -> TractResult<()> {
        let Some(op) = node.op_as::<TypedBinOp>() else { return Ok(()) };
        let (max, min) = (op.0.downcast_ref::<Max>().is_some(), op.0.downcast_ref::<Min>().is_some());
        if !max && !min {
            return Ok(());
        }
        let Some((outlet, bound)) = self.outlet_and_scalar(node)? else { return Ok(()) };
        let Some(index) = self.sole_producer(outlet) else { return Ok(()) };
        let OpKind::Conv { conv, .. } = &mut self.ops[index].kind else { return Ok(()) };
        let Clip { low, high } = conv.clip;
        conv.clip = match max {
            true => Clip { low: low.max(bound), high: high.max(bound) },
            false => Clip { low: low.min(bound), high: high.min(bound) },
        };
        self.fuse_into(index, node.id);
        Ok(())
    }

    /// Matches the sum of a projection and the input of its block.
    fn match_residual(&mut self, node: &TypedNode) -> TractResult<()> {
        let Some(op) = node.op_as::<TypedBinOp>() else { return Ok(()) };
        if op.0.downcast_ref::<Add>().is_none() {
            return Ok(());
        }
        let (a, b) = (node.inputs[0], node.inputs[1]);
        for (outlet, other) in [(a, b), (b, a)] {
            let Some(index) = self.sole_producer(outlet) else { continue };
            let precedes = self.producer.get(&other).is_some_and(|producer| *producer < index);
            let same = self.model.outlet_fact(outlet)?.shape == self.model.outlet_fact(other)?.shape;
            let FusedOp { kind: OpKind::Conv { conv, depthwise: false }, residual, .. } = &mut self.ops[index] else {
                continue;
            };
            if precedes && same && residual.is_none() && conv.clip == Clip::NONE && conv.kernel == 1 {
                *residual = Some(other);
                self.fuse_into(index, node.id);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Matches the sum over height and width, and a division or multiplication by a constant after it.
    fn match_mean(&mut self, node: &TypedNode) -> TractResult<()> {
        if let Some(op) = node.op_as::<Reduce>() {
            let axes: &[usize] = if self.format == Some(DataFormat::NHWC) { &[1, 2] } else { &[2, 3] };
            if op.reducer == Reducer::Sum && op.axes[..] == *axes && self.producer.contains_key(&node.inputs[0]) {
                self.push(OpKind::Mean { factor: 1.0 }, node);
            }
        } else if let Some(op) = node.op_as::<TypedBinOp>() {
            let (div, mul) = (op.0.downcast_ref::<Div>().is_some(), op.0.downcast_ref::<Mul>().is_some());
            let Some((outlet, scalar)) = self.outlet_and_scalar(node)? else { return Ok(()) };
            if !(mul || div && node.inputs[0] == outlet) {
                return Ok(());
            }
            let Some(index) = self.sole_producer(outlet) else { return Ok(()) };
            if let OpKind::Mean { factor } = &mut self.ops[index].kind {
                *factor *= if mul { scalar } else { 1.0 / scalar };
                self.fuse_into(index, node.id);
            }
        }
        Ok(())
    }

    /// Returns the inputs of a node whose one input is a constant with the same value everywhere.
    fn outlet_and_scalar(&self, node: &TypedNode) -> TractResult<Option<(OutletId, f32)>> {
        for (outlet, other) in [(0, 1), (1, 0)] {
            if let Some(tensor) = f32_constant(self.model, node.inputs[other])? {
                let values = tensor.to_plain_array_view::<f32>()?;
                let first = values.iter().next().copied();
                let same = values.iter().all(|value| Some(*value) == first);
                return Ok(first.filter(|_| same).map(|value| (node.inputs[outlet], value)));
            }
        }
        Ok(None)
    }

    /// Returns the shape of a feature map without the batch, if it is known.
    fn shape(&self, outlet: OutletId) -> TractResult<Option<FeatureMapShape>> {
        let shape = &self.model.outlet_fact(outlet)?.shape;
        Ok(match (shape.as_concrete(), self.format) {
            (Some(&[_, height, width, channels]), Some(DataFormat::NHWC))
            | (Some(&[_, channels, height, width]), Some(DataFormat::NCHW)) => {
                Some(FeatureMapShape { height, width, channels })
            }
            _ => None,
        })
    }

    /// Returns the operators as layers, or `None` if a residual does not fit. The weights move out of the operators.
    fn layers(&mut self) -> Option<Vec<Layer>> {
        let mut layers = Vec::new();
        let mut rest = std::mem::take(&mut self.ops).into_iter().peekable();
        while let Some(FusedOp { kind, from, residual, .. }) = rest.next() {
            layers.push(match kind {
                OpKind::Mean { factor } => Layer::GlobalSum { factor },
                OpKind::Conv { conv, depthwise: true } => inverted_residual(from, None, conv, &mut rest),
                OpKind::Conv { conv, depthwise: false } => {
                    match rest.next_if(|next| residual.is_none() && next.is_depthwise()) {
                        Some(FusedOp { kind: OpKind::Conv { conv: depthwise, .. }, .. }) => {
                            inverted_residual(from, Some(conv), depthwise, &mut rest)
                        }
                        _ if residual.is_none_or(|residual| residual == from) => {
                            Layer::Conv { conv, residual: residual.is_some() }
                        }
                        _ => return None,
                    }
                }
            });
        }
        Some(layers)
    }
}

/// Returns the block with the input `from`: `expand`, `depthwise`, and a projection if one follows.
fn inverted_residual(
    from: OutletId,
    expand: Option<Conv2d>,
    depthwise: Conv2d,
    rest: &mut Peekable<vec::IntoIter<FusedOp>>,
) -> Layer {
    match rest.next_if(|op| op.is_projection(from)) {
        Some(FusedOp { kind: OpKind::Conv { conv: project, .. }, residual, .. }) => {
            Layer::InvertedResidual { expand, depthwise, project: Some(project), residual: residual.is_some() }
        }
        _ => Layer::InvertedResidual { expand, depthwise, project: None, residual: false },
    }
}

/// Returns a convolution that the kernels support, and whether it is depthwise; `None` for any other.
fn supported_conv(model: &TypedModel, node: &TypedNode, op: &Conv) -> TractResult<Option<(Conv2d, bool)>> {
    let spec = &op.pool_spec;
    let fact = model.outlet_fact(node.inputs[0])?;
    if fact.datum_type != f32::datum_type() || op.q_params.is_some() {
        return Ok(None);
    }
    let square = |lengths: &[usize]| lengths.len() == 2 && lengths[0] == lengths[1];
    if !square(&spec.kernel_shape) || !square(&spec.strides()) || spec.dilations().iter().any(|step| *step != 1) {
        return Ok(None);
    }
    let Some(padding) = padding(fact, op) else { return Ok(None) };
    let (kernel, stride) = (spec.kernel_shape[0], spec.stride(0));
    let (inputs, outputs) = (spec.input_channels, spec.output_channels);
    let depthwise = op.group == inputs && inputs == outputs && op.group > 1;
    let supported = match (depthwise, op.group, kernel) {
        (true, _, 3 | 5) => matches!(stride, 1 | 2),
        (false, 1, 1) => stride == 1 && padding == Padding::NONE,
        (false, 1, 3 | 5) => inputs <= 4,
        _ => false,
    };
    if !supported {
        return Ok(None);
    }
    let (weights, bias) = (f32_constant(model, node.inputs[1])?, f32_constant(model, node.inputs[2])?);
    let (Some(weights), Some(bias)) = (weights, bias) else { return Ok(None) };
    let (Some(weights), Some(bias)) = (ohwi_weights(&weights, op, depthwise)?, conv_bias(&bias, outputs)?) else {
        return Ok(None);
    };
    Ok(Some((Conv2d { weights, bias, kernel, stride, padding, clip: Clip::NONE }, depthwise)))
}

/// Returns the padding of a convolution on an input of known size; `None` if it is not known, or if the output's size is not that of the
/// kernels.
fn padding(fact: &TypedFact, op: &Conv) -> Option<Padding> {
    let spec = &op.pool_spec;
    let [_, shape @ ..] = fact.shape.as_concrete()? else { return None };
    let sides = match (spec.data_format, shape) {
        (DataFormat::NCHW, [_, sides @ ..]) | (DataFormat::NHWC, [sides @ .., _]) if sides.len() == 2 => sides,
        _ => return None,
    };
    let pads = spec.computed_padding(sides);
    for (axis, pad) in pads.iter().enumerate() {
        let padded = sides[axis].checked_add(pad.pad_before)?.checked_add(pad.pad_after)?;
        let output = padded.checked_sub(spec.kernel_shape[axis])?.checked_div(spec.stride(axis))? + 1;
        if pad.convoluted != output {
            return None;
        }
    }
    Some(Padding {
        top: pads[0].pad_before,
        left: pads[1].pad_before,
        bottom: pads[0].pad_after,
        right: pads[1].pad_after,
    })
}

/// Returns the weights as `[outputs, kernel, kernel, inputs / groups]`, or `None` if the tensor has another shape.
fn ohwi_weights(tensor: &Tensor, op: &Conv, depthwise: bool) -> TractResult<Option<Vec<f32>>> {
    let spec = &op.pool_spec;
    let (kernel, outputs, inputs) = (spec.kernel_shape[0], spec.output_channels, spec.input_channels / op.group);
    let shape = match op.kernel_fmt {
        KernelFormat::OIHW => [outputs, inputs, kernel, kernel],
        // In this format the inputs of the groups lie beside each other.
        KernelFormat::HWIO if depthwise => [kernel, kernel, outputs, 1],
        KernelFormat::HWIO => [kernel, kernel, inputs, outputs],
        KernelFormat::OHWI => [outputs, kernel, kernel, inputs],
    };
    let values = tensor.to_plain_array_view::<f32>()?;
    if values.shape() != shape {
        return Ok(None);
    }
    let mut weights = Vec::with_capacity(values.len());
    for output in 0..outputs {
        for (down, right) in (0..kernel).flat_map(|down| (0..kernel).map(move |right| (down, right))) {
            for input in 0..inputs {
                weights.push(match op.kernel_fmt {
                    KernelFormat::OIHW => values[[output, input, down, right]],
                    KernelFormat::HWIO if depthwise => values[[down, right, output, 0]],
                    KernelFormat::HWIO => values[[down, right, input, output]],
                    KernelFormat::OHWI => values[[output, down, right, input]],
                });
            }
        }
    }
    Ok(Some(weights))
}

/// Returns the bias as `[outputs]`, also from a single value, or `None` if it has another length.
fn conv_bias(tensor: &Tensor, outputs: usize) -> TractResult<Option<Vec<f32>>> {
    let bias: Vec<f32> = tensor.to_plain_array_view::<f32>()?.iter().copied().collect();
    Ok(match bias[..] {
        [same] => Some(vec![same; outputs]),
        _ => (bias.len() == outputs).then_some(bias),
    })
}

/// Returns the value of an outlet if it is constant and f32.
fn f32_constant(model: &TypedModel, outlet: OutletId) -> TractResult<Option<Arc<Tensor>>> {
    Ok(constant(model, outlet)?.filter(|tensor| tensor.datum_type() == f32::datum_type()))
}

/// Returns the value of an outlet if it is constant.
fn constant(model: &TypedModel, outlet: OutletId) -> TractResult<Option<Arc<Tensor>>> {
    if let Some(value) = &model.outlet_fact(outlet)?.konst {
        return Ok(Some(value.clone()));
    }
    let node = model.node(outlet.node);
    if let Some(op) = node.op_as::<Const>() {
        return Ok(Some(op.val().clone()));
    }
    match node.op_as::<Cast>() {
        Some(cast) => constant(model, node.inputs[0])?
            .map(|tensor| Ok(tensor.cast_to_dt(cast.to)?.into_owned().into_arc_tensor()))
            .transpose(),
        None => Ok(None),
    }
}

/// The operator in tract's graph that replaces a sequence of layers.
#[derive(Debug, Clone)]
struct KernelsOp {
    net: Arc<CompiledNet>,
    shape: TVec<usize>,
}

impl PartialEq for KernelsOp {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.net, &other.net)
    }
}

impl Eq for KernelsOp {}

impl Op for KernelsOp {
    fn name(&self) -> StaticName {
        "Kernels".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(vec![format!("{} layers, {}", self.net.layer_count(), self.net.isa().name())])
    }

    op_as_typed_op!();
}

impl EvalOp for KernelsOp {
    not_out_of_plan!();

    fn state(&self, _: &EvalContext) -> TractResult<Option<Box<dyn OpState>>> {
        Ok(Some(Box::new(KernelsState::default())))
    }
}

impl TypedOp for KernelsOp {
    as_op!();

    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(f32::fact(&self.shape)))
    }
}

/// The buffers of a session.
#[derive(Debug, Clone, Default)]
struct KernelsState(Workspace);

impl OpState for KernelsState {
    fn eval(&mut self, _: &EvalContext, op: &dyn Op, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let op = op.downcast_ref::<KernelsOp>().context("the state of another operator")?;
        let mut out = Tensor::zero::<f32>(&op.shape)?;
        let input = inputs[0].to_plain_array_view::<f32>()?;
        let input = input.as_slice().context("expected a contiguous input")?;
        let mut view = out.to_plain_array_view_mut::<f32>()?;
        let values = view.as_slice_mut().context("expected a contiguous output")?;
        let length = |shape: FeatureMapShape| shape.checked_len().context("the shape of a compiled net fits usize");
        let images = input.chunks_exact(length(op.net.input_shape())?);
        for (image, out) in images.zip(values.chunks_exact_mut(length(op.net.output_shape())?)) {
            op.net.run(image, out, &mut self.0);
        }
        Ok(tvec!(out.into()))
    }

    fn reset_lanes(&mut self, _: &[LaneId]) -> TractResult<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "fusion_tests.rs"]
mod tests;
