//! Inspection of an ONNX graph without running it: the input and its layout, the input of the classification layer, and the
//! last convolution.

use std::collections::{HashMap, HashSet};

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::dimension::Value as Dim;
use tract_onnx::pb::type_proto::Value as Type;
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto};

use super::FEATURES;
use crate::vision::last_conv::{LastConvWeights, RELU6_MAX};
use crate::vision::preprocess::TensorLayout;

/// The properties of an ONNX model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// Name of the input tensor.
    pub input: String,
    /// Order of the axes of the input tensor.
    pub layout: TensorLayout,
    /// Width and height of the input, in pixels; `None` if they are dynamic.
    pub size: Option<u32>,
    /// Name of the feature tensor, the head's input.
    pub feature: String,
    /// Parameters up to that tensor. The bias of a convolution counts four times: it is a folded batch normalisation with
    /// four parameters per channel.
    pub parameters: usize,
    /// The last convolution; `None` if the graph does not end in one that can be fine-tuned.
    pub last_conv: Option<LastConv>,
}

/// A 1×1 convolution that is followed by ReLU6, global average pooling and the features.
#[derive(Debug, Clone, PartialEq)]
pub struct LastConv {
    /// Name of its input tensor, the feature map.
    pub input: String,
    /// Name of the tensor after ReLU6, the input of the pooling.
    pub activations: String,
    /// Its weights and biases.
    pub weights: LastConvWeights,
    weight_name: String,
    bias_name: String,
}

/// An error of an ONNX model.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OnnxError {
    /// The file is not a valid ONNX protobuf; the parser's message.
    #[error("{0}")]
    Parse(String),
    /// The model has no graph.
    #[error("not an ONNX model: no graph")]
    NoGraph,
    /// The graph has no input, or more than one; the number of inputs.
    #[error("{0} inputs, expected one")]
    InputCount(usize),
    /// The input is not a tensor; its name.
    #[error("input `{0}` is not a tensor")]
    InputType(String),
    /// The input is not one square image with three channels.
    #[error("input `{name}` has shape {shape:?}, expected [N, 3, size, size] or [N, size, size, 3]")]
    InputShape {
        /// Name of the input.
        name: String,
        /// Shape of the input; `None` is a dynamic dimension.
        shape: Vec<Option<i64>>,
    },
    /// No node computes the requested feature tensor; its name.
    #[error("no tensor `{0}`")]
    NoTensor(String),
    /// No feature tensor is requested, and the graph has no default one.
    #[error("no output `{FEATURES}`, Gemm or MatMul; name the feature tensor")]
    NoFeature,
}

impl ModelInfo {
    /// Inspects a model. `feature` is the name of the feature tensor; by default the output `features`, or else the input of
    /// the last Gemm or MatMul.
    ///
    /// # Errors
    /// If the model has no graph, not exactly one square image with three channels as its input, or no such feature tensor.
    pub fn from_model(model: &ModelProto, feature: Option<&str>) -> Result<Self, OnnxError> {
        let graph = Graph::new(model)?;
        let (input, layout, size) = graph.input()?;
        let feature = match feature {
            Some(name) if graph.producers.contains_key(name) => name.to_owned(),
            Some(name) => return Err(OnnxError::NoTensor(name.into())),
            None => graph.feature().ok_or(OnnxError::NoFeature)?,
        };
        let ancestors = graph.ancestors(&feature);
        let parameters = graph.parameters(&ancestors);
        let last_conv = graph.last_conv(&feature);
        Ok(ModelInfo { input, layout, size, feature, parameters, last_conv })
    }
}

impl LastConv {
    /// Replaces the weights of this convolution in the model that it was found in.
    ///
    /// # Panics
    /// If `model` is another model without these tensors.
    pub fn replace(&self, model: &mut ModelProto, weights: &LastConvWeights) {
        let graph = model.graph.as_mut().expect("the model has a graph");
        for (name, values) in [(&self.weight_name, weights.weight()), (&self.bias_name, weights.bias())] {
            let tensor = graph.initializer.iter_mut().find(|tensor| tensor.name == *name);
            let tensor = tensor.expect("the model has the initializer");
            tensor.float_data.clear();
            tensor.raw_data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        }
    }
}

/// A graph with an index of its tensors.
struct Graph<'a> {
    graph: &'a GraphProto,
    /// The node that computes each tensor.
    producers: HashMap<&'a str, &'a NodeProto>,
    initializers: HashMap<&'a str, &'a TensorProto>,
}

impl<'a> Graph<'a> {
    fn new(model: &'a ModelProto) -> Result<Self, OnnxError> {
        let graph = model.graph.as_ref().ok_or(OnnxError::NoGraph)?;
        let mut producers = HashMap::new();
        for node in &graph.node {
            producers.extend(node.output.iter().map(|output| (output.as_str(), node)));
        }
        let initializers = graph.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        Ok(Graph { graph, producers, initializers })
    }

    /// Returns the name, layout and size of the only input that is not an initializer.
    fn input(&self) -> Result<(String, TensorLayout, Option<u32>), OnnxError> {
        let inputs: Vec<_> =
            self.graph.input.iter().filter(|input| !self.initializers.contains_key(input.name.as_str())).collect();
        let [input] = inputs[..] else {
            return Err(OnnxError::InputCount(inputs.len()));
        };
        let Some(Type::TensorType(tensor)) = input.r#type.as_ref().and_then(|t| t.value.as_ref()) else {
            return Err(OnnxError::InputType(input.name.clone()));
        };
        let shape: Vec<Option<i64>> = tensor
            .shape
            .iter()
            .flat_map(|shape| &shape.dim)
            .map(|dim| match dim.value {
                Some(Dim::DimValue(n)) if n > 0 => Some(n),
                _ => None,
            })
            .collect();
        let (layout, height, width) = match shape[..] {
            [_, Some(3), height, width] => (TensorLayout::Nchw, height, width),
            [_, height, width, Some(3)] => (TensorLayout::Nhwc, height, width),
            _ => return Err(OnnxError::InputShape { name: input.name.clone(), shape }),
        };
        if height != width {
            return Err(OnnxError::InputShape { name: input.name.clone(), shape });
        }
        Ok((input.name.clone(), layout, width.and_then(|n| n.try_into().ok())))
    }

    /// Returns the name of the default feature tensor.
    fn feature(&self) -> Option<String> {
        if self.graph.output.iter().any(|output| output.name == FEATURES) {
            return Some(FEATURES.into());
        }
        // The nodes of a graph are in topological order.
        let classification =
            self.graph.node.iter().rev().find(|node| matches!(node.op_type.as_str(), "Gemm" | "MatMul"))?;
        classification.input.first().cloned()
    }

    /// Returns all nodes that `tensor` depends on.
    fn ancestors(&self, tensor: &str) -> Vec<&'a NodeProto> {
        let (mut pending, mut visited, mut nodes) = (vec![tensor.to_owned()], HashSet::new(), Vec::new());
        while let Some(tensor) = pending.pop() {
            if let Some(node) = self.producers.get(tensor.as_str())
                && visited.insert(node.output.clone())
            {
                nodes.push(*node);
                pending.extend(node.input.iter().cloned());
            }
        }
        nodes
    }

    /// Returns the number of parameters of these nodes; see [`ModelInfo::parameters`].
    fn parameters(&self, nodes: &[&NodeProto]) -> usize {
        let mut counted = HashSet::new();
        let mut sum = 0;
        for node in nodes {
            let has_parameters = matches!(node.op_type.as_str(), "Conv" | "Gemm" | "MatMul" | "BatchNormalization");
            for (index, name) in node.input.iter().enumerate().filter(|_| has_parameters) {
                if let Some(tensor) = self.initializers.get(name.as_str())
                    && counted.insert(name)
                {
                    let count = tensor.dims.iter().product::<i64>().max(0) as usize;
                    sum += if node.op_type == "Conv" && index == 2 { 4 * count } else { count };
                }
            }
        }
        sum
    }

    /// Matches Conv → Clip → mean, and operators that only reshape, backwards from the features.
    fn last_conv(&self, feature: &str) -> Option<LastConv> {
        let mut node = *self.producers.get(feature)?;
        while matches!(node.op_type.as_str(), "Flatten" | "Squeeze" | "Reshape" | "Identity" | "Dropout") {
            node = self.producers.get(node.input.first()?.as_str())?;
        }
        let is_global_mean = match node.op_type.as_str() {
            "GlobalAveragePool" => true,
            "ReduceMean" => ints(node, "axes").is_some_and(|axes| axes == [2, 3] || axes == [-2, -1]),
            _ => false,
        };
        let clip = *self.producers.get(node.input.first()?.as_str())?;
        let conv = *self.producers.get(clip.input.first()?.as_str())?;
        let limit = |index: usize, name: &str| match clip.input.get(index) {
            Some(tensor) => self.scalar(tensor),
            None => clip.attribute.iter().find(|a| a.name == name).map(|a| a.f),
        };
        let relu6 = clip.op_type == "Clip" && limit(1, "min") == Some(0.0) && limit(2, "max") == Some(RELU6_MAX);
        if !is_global_mean || !relu6 || conv.op_type != "Conv" {
            return None;
        }
        let [input, weight_name, bias_name] = &conv.input[..] else { return None };
        let (weight, bias) = (self.initializers.get(weight_name.as_str())?, self.initializers.get(bias_name.as_str())?);
        let unit_stride_without_padding = ints(conv, "strides").is_none_or(|strides| strides == [1, 1])
            && ints(conv, "pads").is_none_or(|pads| pads.iter().all(|pad| *pad == 0));
        let [_, inputs, 1, 1] = weight.dims[..] else { return None };
        let grouped = conv.attribute.iter().any(|a| a.name == "group" && a.i != 1);
        // Weights that another node shares cannot be replaced.
        let uses =
            |name: &String| self.graph.node.iter().flat_map(|node| &node.input).filter(|input| *input == name).count();
        if !unit_stride_without_padding || grouped || uses(weight_name) != 1 || uses(bias_name) != 1 {
            return None;
        }
        let weights = LastConvWeights::new(inputs.try_into().ok()?, floats(weight)?, floats(bias)?).ok()?;
        Some(LastConv {
            input: input.clone(),
            activations: clip.output.first()?.clone(),
            weights,
            weight_name: weight_name.clone(),
            bias_name: bias_name.clone(),
        })
    }

    /// Returns the first value of an initializer or of a Constant node.
    fn scalar(&self, name: &str) -> Option<f32> {
        let constant = || self.producers.get(name)?.attribute.iter().find_map(|a| a.t.as_ref());
        let tensor = self.initializers.get(name).copied().or_else(constant)?;
        floats(tensor)?.first().copied()
    }
}

/// Returns the attribute `name`, a list of integers.
fn ints<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [i64]> {
    node.attribute.iter().find(|a| a.name == name).map(|a| a.ints.as_slice())
}

/// Returns the values of an f32 tensor, from `float_data` or `raw_data`.
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
    fn inspects_the_built_in_network() {
        let model = super::super::parse(MOBILENET_V2).unwrap();
        let info = ModelInfo::from_model(&model, None).unwrap();
        assert_eq!((info.input.as_str(), info.layout, info.size), ("image", TensorLayout::Nchw, Some(224)));
        assert_eq!(info.feature, "features");
        // Keras counts 2,257,984 for MobileNetV2 1.0 without its top.
        assert_eq!(info.parameters, 2_257_984);
        let last_conv = info.last_conv.unwrap();
        assert_eq!(last_conv.input, "last_conv_input");
        assert_eq!((last_conv.weights.inputs(), last_conv.weights.outputs()), (320, 1280));
        let error = ModelInfo::from_model(&model, Some("missing")).unwrap_err();
        assert_eq!(error, OnnxError::NoTensor("missing".into()));
        let earlier = ModelInfo::from_model(&model, Some("last_conv_input")).unwrap();
        assert!(earlier.last_conv.is_none() && earlier.parameters == 2_257_984 - 409_600 - 4 * 1280);
    }
}
