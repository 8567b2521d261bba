//! What an ONNX file holds, read from its graph before anything runs: the input and its layout, the
//! tensor that feeds the classification layer, the last convolution.

use std::collections::{HashMap, HashSet};

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::dimension::Value as Dim;
use tract_onnx::pb::type_proto::Value as Type;
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto};

use super::FEATURES;
use crate::vision::last_conv::{CEILING, LastConvWeights};
use crate::vision::preprocess::TensorLayout;

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    pub input: String,
    pub layout: TensorLayout,
    /// Width and height in pixels, where the file fixes them.
    pub size: Option<u32>,
    /// The tensor whose values a head looks at.
    pub feature: String,
    /// Numbers that were learned up to that tensor. A convolution's bias is a batch normalisation that was
    /// folded in, and counts as the four numbers a channel that it was.
    pub parameters: usize,
    pub last_conv: Option<LastConv>,
}

/// A 1×1 convolution, ReLU6 and a mean over all places, in front of the features.
#[derive(Debug, Clone, PartialEq)]
pub struct LastConv {
    /// The tensor that enters it.
    pub input: String,
    pub weights: LastConvWeights,
    weight_name: String,
    bias_name: String,
}

impl ModelInfo {
    /// `feature` names the tensor to use; found by itself where it is none: the output `features`, else
    /// what feeds the last matrix product.
    pub fn of(model: &ModelProto, feature: Option<&str>) -> Result<Self, String> {
        let graph = Graph::of(model)?;
        let (input, layout, size) = graph.input()?;
        let feature = match feature {
            Some(name) if graph.producers.contains_key(name) => name.to_owned(),
            Some(name) => return Err(format!("no tensor is called `{name}`")),
            None => graph.feature().ok_or("no matrix product is found; name the tensor that a head looks at")?,
        };
        let needed = graph.before(&feature);
        let parameters = graph.parameters(&needed);
        let last_conv = graph.last_conv(&feature);
        Ok(ModelInfo { input, layout, size, feature, parameters, last_conv })
    }
}

impl LastConv {
    /// Puts the numbers of `tail` into the model, in place of its own.
    pub fn replace(&self, model: &mut ModelProto, tail: &LastConvWeights) {
        let graph = model.graph.as_mut().expect("the graph was read");
        for (name, values) in [(&self.weight_name, tail.weight()), (&self.bias_name, tail.bias())] {
            let tensor = graph.initializer.iter_mut().find(|tensor| tensor.name == *name).expect("it was read");
            tensor.float_data.clear();
            tensor.raw_data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        }
    }
}

/// A graph, and who makes each tensor.
struct Graph<'a> {
    graph: &'a GraphProto,
    producers: HashMap<&'a str, &'a NodeProto>,
    weights: HashMap<&'a str, &'a TensorProto>,
}

impl<'a> Graph<'a> {
    fn of(model: &'a ModelProto) -> Result<Self, String> {
        let graph = model.graph.as_ref().ok_or("holds no graph")?;
        let mut producers = HashMap::new();
        for node in &graph.node {
            producers.extend(node.output.iter().map(|output| (output.as_str(), node)));
        }
        let weights = graph.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        Ok(Graph { graph, producers, weights })
    }

    /// The one input that is no weight: its name, the place of its three channels, its size.
    fn input(&self) -> Result<(String, TensorLayout, Option<u32>), String> {
        let inputs: Vec<_> =
            self.graph.input.iter().filter(|input| !self.weights.contains_key(input.name.as_str())).collect();
        let [input] = inputs[..] else {
            return Err(format!("{} inputs, expected one", inputs.len()));
        };
        let Some(Type::TensorType(tensor)) = input.r#type.as_ref().and_then(|t| t.value.as_ref()) else {
            return Err(format!("the input `{}` is no tensor", input.name));
        };
        let dims: Vec<Option<i64>> = tensor
            .shape
            .iter()
            .flat_map(|shape| &shape.dim)
            .map(|dim| match dim.value {
                Some(Dim::DimValue(n)) if n > 0 => Some(n),
                _ => None,
            })
            .collect();
        let (layout, height, width) = match dims[..] {
            [_, Some(3), height, width] => (TensorLayout::Nchw, height, width),
            [_, height, width, Some(3)] => (TensorLayout::Nhwc, height, width),
            _ => return Err(format!("the input `{}` is {dims:?}, expected a picture with three channels", input.name)),
        };
        if height != width {
            return Err(format!("the input `{}` is {dims:?}, expected a square", input.name));
        }
        Ok((input.name.clone(), layout, width.and_then(|n| n.try_into().ok())))
    }

    fn feature(&self) -> Option<String> {
        if self.graph.output.iter().any(|output| output.name == FEATURES) {
            return Some(FEATURES.into());
        }
        // A graph lists what comes first before what needs it.
        let product = self.graph.node.iter().rev().find(|node| matches!(node.op_type.as_str(), "Gemm" | "MatMul"))?;
        product.input.first().cloned()
    }

    /// Every node that `tensor` depends on.
    fn before(&self, tensor: &str) -> Vec<&'a NodeProto> {
        let (mut open, mut seen, mut nodes) = (vec![tensor.to_owned()], HashSet::new(), Vec::new());
        while let Some(tensor) = open.pop() {
            if let Some(node) = self.producers.get(tensor.as_str())
                && seen.insert(node.output.clone())
            {
                nodes.push(*node);
                open.extend(node.input.iter().cloned());
            }
        }
        nodes
    }

    fn parameters(&self, nodes: &[&NodeProto]) -> usize {
        let mut counted = HashSet::new();
        let mut sum = 0;
        for node in nodes {
            let learned = matches!(node.op_type.as_str(), "Conv" | "Gemm" | "MatMul" | "BatchNormalization");
            for (place, name) in node.input.iter().enumerate().filter(|_| learned) {
                if let Some(tensor) = self.weights.get(name.as_str())
                    && counted.insert(name)
                {
                    let count = tensor.dims.iter().product::<i64>().max(0) as usize;
                    sum += if node.op_type == "Conv" && place == 2 { 4 * count } else { count };
                }
            }
        }
        sum
    }

    /// Walks back from the features as long as every step is what a tail does.
    fn last_conv(&self, feature: &str) -> Option<LastConv> {
        let mut node = *self.producers.get(feature)?;
        while matches!(node.op_type.as_str(), "Flatten" | "Squeeze" | "Reshape" | "Identity" | "Dropout") {
            node = self.producers.get(node.input.first()?.as_str())?;
        }
        let over_all_places = match node.op_type.as_str() {
            "GlobalAveragePool" => true,
            "ReduceMean" => ints(node, "axes").is_some_and(|axes| axes == [2, 3] || axes == [-2, -1]),
            _ => false,
        };
        let clip = *self.producers.get(node.input.first()?.as_str())?;
        let conv = *self.producers.get(clip.input.first()?.as_str())?;
        let limit = |place: usize, name: &str| match clip.input.get(place) {
            Some(tensor) => self.scalar(tensor),
            None => clip.attribute.iter().find(|a| a.name == name).map(|a| a.f),
        };
        let relu6 = clip.op_type == "Clip" && limit(1, "min") == Some(0.0) && limit(2, "max") == Some(CEILING);
        if !over_all_places || !relu6 || conv.op_type != "Conv" {
            return None;
        }
        let [input, weight_name, bias_name] = &conv.input[..] else { return None };
        let (weight, bias) = (self.weights.get(weight_name.as_str())?, self.weights.get(bias_name.as_str())?);
        let plain = ints(conv, "strides").is_none_or(|strides| strides == [1, 1])
            && ints(conv, "pads").is_none_or(|pads| pads.iter().all(|pad| *pad == 0));
        let [_, inputs, 1, 1] = weight.dims[..] else { return None };
        let grouped = conv.attribute.iter().any(|a| a.name == "group" && a.i != 1);
        // Numbers that another node uses as well cannot be replaced.
        let uses =
            |name: &String| self.graph.node.iter().flat_map(|node| &node.input).filter(|input| *input == name).count();
        if !plain || grouped || uses(weight_name) != 1 || uses(bias_name) != 1 {
            return None;
        }
        let weights = LastConvWeights::new(inputs.try_into().ok()?, floats(weight)?, floats(bias)?).ok()?;
        Some(LastConv { input: input.clone(), weights, weight_name: weight_name.clone(), bias_name: bias_name.clone() })
    }

    /// The one number of a weight or a constant.
    fn scalar(&self, name: &str) -> Option<f32> {
        let constant = || self.producers.get(name)?.attribute.iter().find_map(|a| a.t.as_ref());
        let tensor = self.weights.get(name).copied().or_else(constant)?;
        floats(tensor)?.first().copied()
    }
}

fn ints<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [i64]> {
    node.attribute.iter().find(|a| a.name == name).map(|a| a.ints.as_slice())
}

/// f32 numbers, as either of the two fields holds them.
fn floats(tensor: &TensorProto) -> Option<Vec<f32>> {
    if tensor.data_type != DataType::Float as i32 {
        return None;
    }
    if !tensor.float_data.is_empty() {
        return Some(tensor.float_data.clone());
    }
    Some(tensor.raw_data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

#[cfg(test)]
mod tests {
    use super::super::MOBILENET_V2;
    use super::*;

    #[test]
    fn the_built_in_network_is_understood() {
        let model = super::super::parse(MOBILENET_V2).unwrap();
        let info = ModelInfo::of(&model, None).unwrap();
        assert_eq!((info.input.as_str(), info.layout, info.size), ("image", TensorLayout::Nchw, Some(224)));
        assert_eq!(info.feature, "features");
        // Keras counts 2,257,984 for MobileNetV2 1.0 without its top.
        assert_eq!(info.parameters, 2_257_984);
        let last_conv = info.last_conv.unwrap();
        assert_eq!(last_conv.input, "last_conv_input");
        assert_eq!((last_conv.weights.inputs(), last_conv.weights.outputs()), (320, 1280));
        let error = ModelInfo::of(&model, Some("none")).unwrap_err();
        assert_eq!(error, "no tensor is called `none`");
        let earlier = ModelInfo::of(&model, Some("last_conv_input")).unwrap();
        assert!(earlier.last_conv.is_none() && earlier.parameters == 2_257_984 - 409_600 - 4 * 1280);
    }
}
