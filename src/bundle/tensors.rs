//! The numbers of a model as safetensors: `weight`, `bias` and `subspace` of the head, `weight` and
//! `bias` of a tail, all f32.

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use super::Manifest;
use crate::vision::head::HeadError;
use crate::vision::last_conv::LastConvError;
use crate::vision::ood::OodError;
use crate::vision::{Head, LastConvWeights, OodDetector};

#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    #[error("{0}")]
    Format(#[from] safetensors::SafeTensorError),
    #[error("{name} is {got:?} {dtype:?}, expected {expected} F32")]
    Shape { name: &'static str, got: Vec<usize>, dtype: Dtype, expected: String },
    #[error("{0}")]
    Head(#[from] HeadError),
    #[error("{0}")]
    OodDetector(#[from] OodError),
    #[error("{0}")]
    LastConvWeights(#[from] LastConvError),
    #[error("expected 1 to 16 vectors of {width} features, 1 to 4 pictures and an answer of {classes} classes each")]
    SelfTest { classes: usize, width: usize },
    #[error("holds a number that is not finite")]
    NotFinite,
}

/// `weight` `[classes, width]`, `bias` `[classes]`, `subspace` `[rank, width]`.
pub fn head_from_bytes(manifest: &Manifest, bytes: &[u8]) -> Result<(Head, OodDetector), TensorError> {
    let tensors = SafeTensors::deserialize(bytes)?;
    let width = manifest.backbone.width;
    let of_width = |name: &'static str| match matrix(&tensors, name)? {
        (columns, values) if columns == width => Ok(values),
        _ => Err(shape(name, &tensors.tensor(name)?, format!("n × {width}"))),
    };
    let head = Head::new(width, of_width("weight")?, vector(&tensors, "bias")?, manifest.temperature)?;
    let subspace = OodDetector::new(width, of_width("subspace")?, manifest.unknown.threshold)?;
    Ok((head, subspace))
}

pub fn head_to_bytes(head: &Head, subspace: &OodDetector) -> Vec<u8> {
    let width = head.width();
    to_bytes(&[
        ("weight", vec![head.classes(), width], head.weight()),
        ("bias", vec![head.classes()], head.bias()),
        ("subspace", vec![subspace.basis().len() / width, width], subspace.basis()),
    ])
}

/// `weight` `[outputs, inputs]`, `bias` `[outputs]`.
pub fn last_conv_from_bytes(bytes: &[u8]) -> Result<LastConvWeights, TensorError> {
    let tensors = SafeTensors::deserialize(bytes)?;
    let (inputs, weight) = matrix(&tensors, "weight")?;
    Ok(LastConvWeights::new(inputs, weight, vector(&tensors, "bias")?)?)
}

pub fn last_conv_to_bytes(tail: &LastConvWeights) -> Vec<u8> {
    to_bytes(&[
        ("weight", vec![tail.outputs(), tail.inputs()], tail.weight()),
        ("bias", vec![tail.outputs()], tail.bias()),
    ])
}

/// Columns and values of a tensor with two axes.
pub(super) fn matrix(tensors: &SafeTensors<'_>, name: &'static str) -> Result<(usize, Vec<f32>), TensorError> {
    let tensor = tensors.tensor(name)?;
    match *tensor.shape() {
        [_, columns] if tensor.dtype() == Dtype::F32 => Ok((columns, floats(tensor.data()))),
        _ => Err(shape(name, &tensor, "n × m".into())),
    }
}

pub(super) fn vector(tensors: &SafeTensors<'_>, name: &'static str) -> Result<Vec<f32>, TensorError> {
    let tensor = tensors.tensor(name)?;
    match tensor.shape() {
        [_] if tensor.dtype() == Dtype::F32 => Ok(floats(tensor.data())),
        _ => Err(shape(name, &tensor, "n".into())),
    }
}

fn shape(name: &'static str, tensor: &TensorView<'_>, expected: String) -> TensorError {
    TensorError::Shape { name, got: tensor.shape().to_vec(), dtype: tensor.dtype(), expected }
}

/// Tensors by name, with their shapes.
pub fn to_bytes(tensors: &[(&str, Vec<usize>, &[f32])]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, _, values)| little_endian(values)).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (*name, view.expect("the shape was made from the numbers"))
    });
    serialize(views, None).expect("small tensors can be written")
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

pub(super) fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
