//! Finds MobileNet's pattern in a graph of tract's, by its structure, and puts a [`Chain`] in its place.

use std::collections::HashMap;
use std::sync::Arc;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::cast::Cast;
use tract_onnx::tract_core::ops::cnn::{Conv, KernelFormat};
use tract_onnx::tract_core::ops::konst::Const;
use tract_onnx::tract_core::ops::math::{Add, Div, Max, Min, Mul};
use tract_onnx::tract_core::ops::nn::{DataFormat, Reduce, Reducer};

use super::Instructions;
use super::account::{self, Part};
use super::chain::{Chain, Workspace};
use super::depthwise::Depthwise;
use super::layers::{Block, First, Layer, Padding, Rows, Size, Stage};
use super::product::{Clip, Product};
use super::team::Team;

/// What became of a graph.
pub(in super::super) enum Taken {
    /// There is nothing in it for us.
    Nothing,
    /// Our operator stands in it.
    Part,
    /// All of it is ours: nothing is left for tract to run.
    Whole(Whole),
}

/// Puts our operator in the place of the longest run of layers that it can compute; in none's where the processor lacks the
/// instructions.
pub(in super::super) fn replace(
    model: &mut TypedModel,
    instructions: Instructions,
    team: Option<Arc<Team>>,
) -> TractResult<Taken> {
    if !instructions.are_there() {
        return Ok(Taken::Nothing);
    }
    let Some(found) = Search::new(model, instructions).run()? else { return Ok(Taken::Nothing) };
    let shape = model.outlet_fact(found.to)?.shape.as_concrete().context("a shape that is known")?.into();
    let chain = Arc::new(found.chain);
    let one = model.input_fact(0)?.shape.as_concrete().is_some_and(|shape| shape.first() == Some(&1));
    if one && found.from == model.inputs[0] && only_axes_lie_between(model, found.to, model.outputs[0]) {
        return Ok(Taken::Whole(Whole { chain, team, work: Workspace::default() }));
    }
    let op = Kernels { chain, shape, team };
    let mut patch = TypedModelPatch::default();
    let input = patch.tap_model(model, found.from)?;
    let output = patch.wire_node("kernels", op, &[input])?[0];
    patch.shunt_outside(model, found.to, output)?;
    patch.apply(model)?;
    Ok(Taken::Part)
}

/// Whether `to` is `from` but for axes of a single place.
fn only_axes_lie_between(model: &TypedModel, from: OutletId, to: OutletId) -> bool {
    let node = model.node(to.node);
    from == to
        || matches!(node.op_as::<AxisOp>(), Some(AxisOp::Rm(_) | AxisOp::Add(_)))
            && only_axes_lie_between(model, from, node.inputs[0])
}

/// A whole network as a chain, and what it works in.
#[derive(Debug, Clone)]
pub(in super::super) struct Whole {
    chain: Arc<Chain>,
    team: Option<Arc<Team>>,
    work: Workspace,
}

impl Whole {
    /// in and out: as the network has it, without the batch. Nothing is allocated from the second call on.
    pub fn run(&mut self, input: &[f32], out: &mut [f32]) {
        self.chain.run(input, out, &mut self.work, self.team.as_deref());
    }

    /// Its stages with the times of the last run.
    pub fn parts(&self) -> Vec<Part> {
        account::parts(&self.chain, &self.work.times)
    }
}

/// A chain and the wires that it lies between.
struct Found {
    chain: Chain,
    from: OutletId,
    to: OutletId,
}

/// A convolution with what follows it, or the mean.
#[derive(Debug)]
struct Piece {
    kind: Kind,
    from: OutletId,
    /// What it gives, and what it gave before a clip or a residual was taken in.
    gives: Vec<OutletId>,
    nodes: Vec<usize>,
    residual: Option<OutletId>,
}

#[derive(Debug)]
enum Kind {
    Conv(Convolution),
    Mean { factor: f32 },
}

#[derive(Debug, Clone)]
struct Convolution {
    /// `[outputs, side, side, inputs / group]`
    weights: Vec<f32>,
    bias: Vec<f32>,
    depthwise: bool,
    side: usize,
    stride: usize,
    padding: Padding,
    clip: Clip,
}

impl Convolution {
    /// As many outputs, those behind the last one zero.
    fn with_outputs(&self, outputs: usize) -> Self {
        let mut wide = self.clone();
        wide.weights.resize(self.weights.len() / self.bias.len() * outputs, 0.0);
        wide.bias.resize(outputs, 0.0);
        wide
    }

    /// As many inputs, those behind the last one without weight.
    fn with_inputs(&self, inputs: usize) -> Self {
        let mut weights = vec![0.0; self.bias.len() * inputs];
        let own = self.weights.len() / self.bias.len();
        for (wide, row) in weights.chunks_exact_mut(inputs).zip(self.weights.chunks_exact(own)) {
            wide[..own].copy_from_slice(row);
        }
        Convolution { weights, ..self.clone() }
    }
}

impl Piece {
    fn gives(&self) -> OutletId {
        *self.gives.last().expect("a piece gives something")
    }
}

struct Search<'a> {
    model: &'a TypedModel,
    instructions: Instructions,
    format: Option<DataFormat>,
    pieces: Vec<Piece>,
    /// Who gives a wire.
    giver: HashMap<OutletId, usize>,
}

impl<'a> Search<'a> {
    fn new(model: &'a TypedModel, instructions: Instructions) -> Self {
        Search { model, instructions, format: None, pieces: Vec::new(), giver: HashMap::new() }
    }

    fn run(mut self) -> TractResult<Option<Found>> {
        for id in self.model.eval_order()? {
            let node = self.model.node(id);
            self.conv(node)?;
            self.clip(node)?;
            self.residual(node)?;
            self.mean(node)?;
        }
        // A chain is a chain, and nobody outside needs what lies within it.
        let chained = self.pieces.windows(2).take_while(|pair| pair[1].from == pair[0].gives()).count() + 1;
        self.pieces.truncate(chained);
        while !self.pieces.is_empty() && !self.is_closed() {
            self.pieces.pop();
        }
        let depthwise = |piece: &Piece| matches!(&piece.kind, Kind::Conv(conv) if conv.depthwise);
        if !self.pieces.iter().any(depthwise) {
            return Ok(None);
        }
        let (from, to) = (self.pieces[0].from, self.pieces[self.pieces.len() - 1].gives());
        let Some(stages) = self.stages()? else { return Ok(None) };
        let chain = Chain { stages, planes: self.format == Some(DataFormat::NCHW), instructions: self.instructions };
        Ok(Some(Found { chain, from, to }))
    }

    /// No wire within leaves the run but the last.
    fn is_closed(&self) -> bool {
        let nodes: Vec<usize> = self.pieces.iter().flat_map(|piece| piece.nodes.iter().copied()).collect();
        let last = self.pieces.last().map(Piece::gives);
        self.pieces.iter().flat_map(|piece| &piece.gives).filter(|wire| Some(**wire) != last).all(|wire| {
            !self.model.outputs.contains(wire)
                && self.model.outlet_successors(*wire).iter().all(|inlet| nodes.contains(&inlet.node))
        })
    }

    fn conv(&mut self, node: &TypedNode) -> TractResult<()> {
        let Some(op) = node.op_as::<Conv>() else { return Ok(()) };
        let from = node.inputs[0];
        if !self.pieces.is_empty() && !self.giver.contains_key(&from) {
            return Ok(());
        }
        let Some(conv) = convolution(self.model, node, op)? else { return Ok(()) };
        // A product over patches is good for a picture's few channels, and for what enters the run.
        if conv.side > 1 && !conv.depthwise && !self.pieces.is_empty() {
            return Ok(());
        }
        if *self.format.get_or_insert(op.pool_spec.data_format) != op.pool_spec.data_format {
            return Ok(());
        }
        self.giver.insert(node.id.into(), self.pieces.len());
        self.pieces.push(Piece {
            kind: Kind::Conv(conv),
            from,
            gives: vec![node.id.into()],
            nodes: vec![node.id],
            residual: None,
        });
        Ok(())
    }

    /// The piece that gives a wire which only this node takes.
    fn only_for(&self, wire: OutletId) -> Option<usize> {
        let piece = *self.giver.get(&wire)?;
        let alone = self.model.outlet_successors(wire).len() == 1 && self.pieces[piece].gives() == wire;
        alone.then_some(piece)
    }

    fn take_in(&mut self, piece: usize, node: usize) {
        self.pieces[piece].gives.push(node.into());
        self.pieces[piece].nodes.push(node);
        self.giver.insert(node.into(), piece);
    }

    /// `max(x, number)` and `min(x, number)`
    fn clip(&mut self, node: &TypedNode) -> TractResult<()> {
        let Some(op) = node.op_as::<TypedBinOp>() else { return Ok(()) };
        let (max, min) = (op.0.downcast_ref::<Max>().is_some(), op.0.downcast_ref::<Min>().is_some());
        if !max && !min {
            return Ok(());
        }
        let Some((wire, bound)) = self.wire_and_number(node)? else { return Ok(()) };
        let Some(piece) = self.only_for(wire) else { return Ok(()) };
        let Kind::Conv(conv) = &mut self.pieces[piece].kind else { return Ok(()) };
        let Clip { low, high } = conv.clip;
        conv.clip = match max {
            true => Clip { low: low.max(bound), high: high.max(bound) },
            false => Clip { low: low.min(bound), high: high.min(bound) },
        };
        self.take_in(piece, node.id);
        Ok(())
    }

    /// A projection plus what went into its block.
    fn residual(&mut self, node: &TypedNode) -> TractResult<()> {
        let Some(op) = node.op_as::<TypedBinOp>() else { return Ok(()) };
        if op.0.downcast_ref::<Add>().is_none() {
            return Ok(());
        }
        let (a, b) = (node.inputs[0], node.inputs[1]);
        for (wire, other) in [(a, b), (b, a)] {
            let Some(piece) = self.only_for(wire) else { continue };
            let known = self.giver.get(&other).is_some_and(|giver| *giver < piece);
            let same = self.model.outlet_fact(wire)?.shape == self.model.outlet_fact(other)?.shape;
            let Piece { kind: Kind::Conv(conv), residual, .. } = &mut self.pieces[piece] else { continue };
            if known && same && residual.is_none() && conv.clip == Clip::NONE && !conv.depthwise && conv.side == 1 {
                *residual = Some(other);
                self.take_in(piece, node.id);
                return Ok(());
            }
        }
        Ok(())
    }

    /// The sum over height and width, and a division or multiplication behind it.
    fn mean(&mut self, node: &TypedNode) -> TractResult<()> {
        if let Some(op) = node.op_as::<Reduce>() {
            let axes: &[usize] = if self.format == Some(DataFormat::NHWC) { &[1, 2] } else { &[2, 3] };
            if op.reducer == Reducer::Sum && op.axes[..] == *axes && self.giver.contains_key(&node.inputs[0]) {
                self.giver.insert(node.id.into(), self.pieces.len());
                let (kind, from) = (Kind::Mean { factor: 1.0 }, node.inputs[0]);
                self.pieces.push(Piece {
                    kind,
                    from,
                    gives: vec![node.id.into()],
                    nodes: vec![node.id],
                    residual: None,
                });
            }
        } else if let Some(op) = node.op_as::<TypedBinOp>() {
            let (div, mul) = (op.0.downcast_ref::<Div>().is_some(), op.0.downcast_ref::<Mul>().is_some());
            let Some((wire, number)) = self.wire_and_number(node)? else { return Ok(()) };
            if !(mul || div && node.inputs[0] == wire) {
                return Ok(());
            }
            let Some(piece) = self.only_for(wire) else { return Ok(()) };
            if let Kind::Mean { factor } = &mut self.pieces[piece].kind {
                *factor *= if mul { number } else { 1.0 / number };
                self.take_in(piece, node.id);
            }
        }
        Ok(())
    }

    /// The inputs of a node that has a wire and a single number.
    fn wire_and_number(&self, node: &TypedNode) -> TractResult<Option<(OutletId, f32)>> {
        for (wire, other) in [(0, 1), (1, 0)] {
            if let Some(tensor) = constant(self.model, node.inputs[other])? {
                let numbers = tensor.to_plain_array_view::<f32>()?;
                let first = numbers.iter().next().copied();
                let same = numbers.iter().all(|number| Some(*number) == first);
                return Ok(first.filter(|_| same).map(|number| (node.inputs[wire], number)));
            }
        }
        Ok(None)
    }

    /// The sides of a wire's map.
    fn size(&self, wire: OutletId) -> TractResult<Option<Size>> {
        let shape = &self.model.outlet_fact(wire)?.shape;
        Ok(match (shape.as_concrete(), self.format) {
            (Some([_, height, width, channels]), Some(DataFormat::NHWC)) => {
                Some(Size { height: *height, width: *width, channels: *channels })
            }
            (Some([_, channels, height, width]), Some(DataFormat::NCHW)) => {
                Some(Size { height: *height, width: *width, channels: *channels })
            }
            _ => None,
        })
    }

    /// The pieces as stages: an expansion, a depthwise convolution and a projection are one.
    fn stages(&mut self) -> TractResult<Option<Vec<Stage>>> {
        let mut stages = Vec::new();
        let pieces = std::mem::take(&mut self.pieces);
        let mut rest = pieces.iter().peekable();
        while let Some(piece) = rest.next() {
            let Some(from) = self.size(piece.from)? else { return Ok(None) };
            let conv = match &piece.kind {
                Kind::Mean { factor } => {
                    let to = Size { height: 1, width: 1, channels: from.channels };
                    stages.push(Stage { layer: Layer::Mean { factor: *factor }, from, to });
                    continue;
                }
                Kind::Conv(conv) => conv,
            };
            let deep = |piece: &&&Piece| matches!(&piece.kind, Kind::Conv(conv) if conv.depthwise);
            let (expand, middle) = match conv.depthwise {
                true => (None, piece),
                false => {
                    let Some(middle) = rest.next_if(|next| piece.residual.is_none() && deep(&next)) else {
                        if piece.residual.is_some_and(|residual| residual != piece.from) {
                            return Ok(None);
                        }
                        let Some(to) = self.size(piece.gives())? else { return Ok(None) };
                        let layer = Layer::Rows { rows: self.rows(conv), residual: piece.residual.is_some() };
                        stages.push(Stage { layer, from, to });
                        continue;
                    };
                    (Some(conv), middle)
                }
            };
            let Kind::Conv(taps) = &middle.kind else { return Ok(None) };
            let flat = |piece: &&&Piece| matches!(&piece.kind, Kind::Conv(conv) if !conv.depthwise && conv.side == 1);
            let project = rest.next_if(flat_or_residual(flat, piece.from));
            let end = project.unwrap_or(middle);
            let sizes = (self.size(middle.from)?, self.size(middle.gives())?, self.size(end.gives())?);
            let (Some(inner), Some(after), Some(to)) = sizes else { return Ok(None) };
            let lanes = self.instructions.panels().lanes;
            let depthwise = Depthwise::new(&taps.weights, &taps.bias, taps.side, taps.stride, taps.clip, lanes);
            let wide = depthwise.planes * lanes;
            let block = Block {
                expand: expand.map(|conv| self.rows(&conv.with_outputs(wide))),
                depthwise,
                padding: taps.padding,
                project: project.map(|piece| match &piece.kind {
                    Kind::Conv(conv) => self.product(&conv.with_inputs(wide)),
                    Kind::Mean { .. } => unreachable!("a projection is a convolution"),
                }),
                residual: project.is_some_and(|piece| piece.residual.is_some()),
                inner,
                after,
            };
            stages.push(Stage { layer: Layer::Block(Box::new(block)), from, to });
        }
        Ok(Some(stages))
    }

    fn product(&self, conv: &Convolution) -> Product {
        Product::new(&conv.weights, &conv.bias, conv.clip, self.instructions.panels())
    }

    fn rows(&self, conv: &Convolution) -> Rows {
        let product = self.product(conv);
        match conv.side {
            1 => Rows::Product(product),
            side => Rows::First(First { product, side, stride: conv.stride, padding: conv.padding }),
        }
    }
}

/// A 1×1 convolution whose residual, where it has one, is the block's own input.
fn flat_or_residual<'a>(flat: impl Fn(&&&'a Piece) -> bool, input: OutletId) -> impl FnOnce(&&'a Piece) -> bool {
    move |piece| flat(&piece) && piece.residual.is_none_or(|residual| residual == input)
}

/// The convolutions that our operators compute; none for any other.
fn convolution(model: &TypedModel, node: &TypedNode, op: &Conv) -> TractResult<Option<Convolution>> {
    let spec = &op.pool_spec;
    let fact = model.outlet_fact(node.inputs[0])?;
    let Some([_, shape @ ..]) = fact.shape.as_concrete() else { return Ok(None) };
    let sides: &[usize] = match spec.data_format {
        DataFormat::NCHW => &shape[1..],
        DataFormat::NHWC => &shape[..shape.len() - 1],
        _ => return Ok(None),
    };
    let square = |numbers: &[usize]| numbers.len() == 2 && numbers[0] == numbers[1];
    let float = fact.datum_type == f32::datum_type() && op.q_params.is_none();
    if !float || sides.len() != 2 || !square(&spec.kernel_shape) || !square(&spec.strides()) {
        return Ok(None);
    }
    let (side, stride) = (spec.kernel_shape[0], spec.stride(0));
    let (inputs, outputs) = (spec.input_channels, spec.output_channels);
    let depthwise = op.group == inputs && inputs == outputs && op.group > 1;
    let pads = spec.computed_padding(sides);
    if pads.iter().any(|pad| pad.convoluted == 0) {
        return Ok(None);
    }
    let padding = Padding {
        top: pads[0].pad_before,
        left: pads[1].pad_before,
        bottom: pads[0].pad_after,
        right: pads[1].pad_after,
    };
    let fits = match (depthwise, op.group, side) {
        (true, _, 3 | 5) => matches!(stride, 1 | 2),
        (false, 1, 1) => stride == 1 && padding == Padding { top: 0, left: 0, bottom: 0, right: 0 },
        (false, 1, 3 | 5) => inputs <= 4,
        _ => false,
    };
    let (kernel, bias) = (constant(model, node.inputs[1])?, constant(model, node.inputs[2])?);
    let (true, Some(kernel), Some(bias)) = (fits && spec.dilations().iter().all(|by| *by == 1), kernel, bias) else {
        return Ok(None);
    };
    let group_inputs = inputs / op.group;
    let kernel = kernel.to_plain_array_view::<f32>()?;
    let mut weights = Vec::with_capacity(kernel.len());
    for output in 0..outputs {
        for (down, right) in (0..side).flat_map(|down| (0..side).map(move |right| (down, right))) {
            for input in 0..group_inputs {
                weights.push(match op.kernel_fmt {
                    KernelFormat::OIHW => kernel[[output, input, down, right]],
                    // In this format the groups' inputs lie beside each other.
                    KernelFormat::HWIO if depthwise => kernel[[down, right, output, 0]],
                    KernelFormat::HWIO => kernel[[down, right, input, output]],
                    KernelFormat::OHWI => kernel[[output, down, right, input]],
                });
            }
        }
    }
    let bias: Vec<f32> = bias.to_plain_array_view::<f32>()?.iter().copied().collect();
    let bias = match bias[..] {
        [same] => vec![same; outputs],
        _ if bias.len() == outputs => bias,
        _ => return Ok(None),
    };
    Ok(Some(Convolution { weights, bias, depthwise, side, stride, padding, clip: Clip::NONE }))
}

/// A wire's numbers, where they are f32 and known before anything runs.
fn constant(model: &TypedModel, wire: OutletId) -> TractResult<Option<Arc<Tensor>>> {
    Ok(known(model, wire)?.filter(|tensor| tensor.datum_type() == f32::datum_type()))
}

/// What a wire is, where that is known before anything runs.
fn known(model: &TypedModel, wire: OutletId) -> TractResult<Option<Arc<Tensor>>> {
    if let Some(known) = &model.outlet_fact(wire)?.konst {
        return Ok(Some(known.clone()));
    }
    let node = model.node(wire.node);
    if let Some(constant) = node.op_as::<Const>() {
        return Ok(Some(constant.val().clone()));
    }
    match node.op_as::<Cast>() {
        Some(cast) => known(model, node.inputs[0])?
            .map(|tensor| Ok(tensor.cast_to_dt(cast.to)?.into_owned().into_arc_tensor()))
            .transpose(),
        None => Ok(None),
    }
}

/// The operator in tract's graph.
#[derive(Debug, Clone)]
struct Kernels {
    chain: Arc<Chain>,
    shape: TVec<usize>,
    team: Option<Arc<Team>>,
}

impl PartialEq for Kernels {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.chain, &other.chain)
    }
}

impl Eq for Kernels {}

impl Op for Kernels {
    fn name(&self) -> StaticName {
        "Kernels".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(vec![format!("{} stages, {}", self.chain.stages.len(), self.chain.instructions.name())])
    }

    op_as_typed_op!();
}

impl EvalOp for Kernels {
    not_out_of_plan!();

    fn state(&self, _: &EvalContext) -> TractResult<Option<Box<dyn OpState>>> {
        Ok(Some(Box::new(Working::default())))
    }
}

impl TypedOp for Kernels {
    as_op!();

    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(f32::fact(&self.shape)))
    }
}

/// A session's buffers.
#[derive(Debug, Clone, Default)]
struct Working(Workspace);

impl OpState for Working {
    fn eval(&mut self, _: &EvalContext, op: &dyn Op, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let op = op.downcast_ref::<Kernels>().context("the state of another operator")?;
        let mut out = Tensor::zero::<f32>(&op.shape)?;
        let input = inputs[0].to_plain_array_view::<f32>()?;
        let input = input.as_slice().context("a map that lies in one piece")?;
        let mut view = out.to_plain_array_view_mut::<f32>()?;
        let numbers = view.as_slice_mut().context("a map that lies in one piece")?;
        let pictures = input.chunks_exact(op.chain.from().numbers());
        for (picture, out) in pictures.zip(numbers.chunks_exact_mut(op.chain.to().numbers())) {
            op.chain.run(picture, out, &mut self.0, op.team.as_deref());
        }
        Ok(tvec!(out.into()))
    }

    fn reset_lanes(&mut self, _: &[LaneId]) -> TractResult<()> {
        Ok(())
    }
}
