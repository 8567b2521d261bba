//! The weights of a model as safetensors, all f32: `weight`, `bias` and `subspace` of the head, `unknown_weight` and `unknown_bias` of its
//! unknown classes, the same with `scan_` for the windows of a scanned frame, `weight` and `bias` of a fine-tuned last convolution.

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

use super::{Manifest, OodMeasure, ScanRef};
use crate::vision::head::HeadError;
use crate::vision::last_conv::LastConvError;
use crate::vision::ood::OodError;
use crate::vision::{Head, LastConvWeights, OodDetector, ScanParams, UnknownClasses};

/// An error of the tensors in a member of a bundle.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    /// The member is not valid safetensors, or lacks a tensor.
    #[error("{0}")]
    Format(#[from] safetensors::SafeTensorError),
    /// A tensor has another shape or data type than expected.
    #[error("tensor `{name}` is {got:?} {dtype:?}, expected {expected} F32")]
    Shape {
        /// Name of the tensor.
        name: &'static str,
        /// Actual shape.
        got: Vec<usize>,
        /// Actual data type.
        dtype: Dtype,
        /// Expected shape.
        expected: String,
    },
    /// The parameters of the head are invalid.
    #[error("{0}")]
    Head(#[from] HeadError),
    /// The parameters of the out-of-distribution detection are invalid.
    #[error("{0}")]
    Ood(#[from] OodError),
    /// The weights of the last convolution are invalid.
    #[error("{0}")]
    LastConv(#[from] LastConvError),
    /// The self-test has too few or too many inputs, a too large image, or does not fit the head.
    #[error(
        "expected 1 to 16 feature vectors of {width} values, 1 to 4 images and an output of {classes} classes for each"
    )]
    SelfTest {
        /// Number of the head's classes.
        classes: usize,
        /// Length of the head's feature vector.
        width: usize,
    },
    /// The model has parameters of scanning, but no unknown classes, by which windows are chosen.
    #[error("parameters of scanning without unknown classes")]
    ScanWithoutUnknownClasses,
    /// A value of the self-test is not finite.
    #[error("has a value that is not finite")]
    NotFinite,
}

/// Reads the head and the detector of unknown images: `weight` `[classes, width]`, `bias` `[classes]`, `subspace` `[rank, width]`, and
/// of a model with unknown classes `unknown_weight` `[unknown classes, width]` and `unknown_bias`; width, temperature and threshold are
/// those of the manifest.
///
/// # Errors
/// If a tensor is missing, or has another type or shape, or a value is invalid.
pub fn head_from_bytes(manifest: &Manifest, bytes: &[u8]) -> Result<(Head, OodDetector), TensorError> {
    let tensors = SafeTensors::deserialize(bytes)?;
    let width = manifest.backbone.width;
    let matrix_of_width = |name| matrix_of_width(&tensors, name, width);
    let head = Head::new(width, matrix_of_width("weight")?, vector(&tensors, "bias")?, manifest.temperature)?;
    let (basis, params) = (matrix_of_width("subspace")?, &manifest.unknown);
    let ood = match params.rule {
        OodMeasure::CosineSubspace => OodDetector::new(width, basis, params.threshold)?,
        OodMeasure::CosineAndClasses { log_odds_weight, cosine_threshold } => {
            let unknown = Head::new(width, matrix_of_width("unknown_weight")?, vector(&tensors, "unknown_bias")?, 1.0)?;
            let unknown = UnknownClasses { head: unknown, log_odds_weight, cosine_threshold };
            OodDetector::new(width, basis, 0.0)?.with_unknown_classes(unknown, params.threshold)?
        }
    };
    Ok((head, ood))
}

/// Reads the heads for windows, if the manifest has the parameters of scanning: `scan_weight`, `scan_bias`, `scan_unknown_weight` and
/// `scan_unknown_bias`, of the shapes that those of whole images have.
///
/// # Errors
/// As [`head_from_bytes`].
pub fn scan_from_bytes(manifest: &Manifest, bytes: &[u8], classes: usize) -> Result<Option<ScanParams>, TensorError> {
    let Some(ScanRef { temperature, offsets }) = manifest.scan else { return Ok(None) };
    if manifest.unknown.rule == OodMeasure::CosineSubspace {
        return Err(TensorError::ScanWithoutUnknownClasses);
    }
    let tensors = SafeTensors::deserialize(bytes)?;
    let width = manifest.backbone.width;
    let head = |weight: &'static str, bias, temperature| {
        let weight = matrix_of_width(&tensors, weight, width)?;
        Ok::<_, TensorError>(Head::new(width, weight, vector(&tensors, bias)?, temperature)?)
    };
    let scan_head = head("scan_weight", "scan_bias", temperature)?;
    if scan_head.classes() != classes {
        return Err(wrong_shape("scan_weight", &tensors.tensor("scan_weight")?, format!("{classes} × {width}")));
    }
    let unknown = head("scan_unknown_weight", "scan_unknown_bias", 1.0)?;
    Ok(Some(ScanParams { head: scan_head, unknown, offsets }))
}

/// Writes the heads and the detector, as [`head_from_bytes`] and [`scan_from_bytes`] read them.
pub fn head_to_bytes(head: &Head, ood: &OodDetector, scan: Option<&ScanParams>) -> Vec<u8> {
    let width = head.width();
    let mut tensors = vec![
        ("weight", vec![head.classes(), width], head.weight()),
        ("bias", vec![head.classes()], head.bias()),
        ("subspace", vec![ood.basis().len() / width, width], ood.basis()),
    ];
    if let Some(UnknownClasses { head, .. }) = ood.unknown_classes() {
        tensors.push(("unknown_weight", vec![head.classes(), width], head.weight()));
        tensors.push(("unknown_bias", vec![head.classes()], head.bias()));
    }
    if let Some(ScanParams { head, unknown, .. }) = scan {
        tensors.push(("scan_weight", vec![head.classes(), width], head.weight()));
        tensors.push(("scan_bias", vec![head.classes()], head.bias()));
        tensors.push(("scan_unknown_weight", vec![unknown.classes(), width], unknown.weight()));
        tensors.push(("scan_unknown_bias", vec![unknown.classes()], unknown.bias()));
    }
    to_bytes(&tensors)
}

/// Reads a last convolution: `weight` `[outputs, inputs]`, `bias` `[outputs]`.
///
/// # Errors
/// As [`head_from_bytes`].
pub fn last_conv_from_bytes(bytes: &[u8]) -> Result<LastConvWeights, TensorError> {
    let tensors = SafeTensors::deserialize(bytes)?;
    let (inputs, weight) = matrix(&tensors, "weight")?;
    Ok(LastConvWeights::new(inputs, weight, vector(&tensors, "bias")?)?)
}

/// Writes a last convolution, as [`last_conv_from_bytes`] reads it.
pub fn last_conv_to_bytes(last_conv: &LastConvWeights) -> Vec<u8> {
    to_bytes(&[
        ("weight", vec![last_conv.outputs(), last_conv.inputs()], last_conv.weight()),
        ("bias", vec![last_conv.outputs()], last_conv.bias()),
    ])
}

/// Returns the values of a tensor with two axes, the second of which is as long as a feature vector.
fn matrix_of_width(tensors: &SafeTensors<'_>, name: &'static str, width: usize) -> Result<Vec<f32>, TensorError> {
    match matrix(tensors, name)? {
        (columns, values) if columns == width => Ok(values),
        _ => Err(wrong_shape(name, &tensors.tensor(name)?, format!("n × {width}"))),
    }
}

/// Returns the columns and the values of a tensor with two axes.
pub(super) fn matrix(tensors: &SafeTensors<'_>, name: &'static str) -> Result<(usize, Vec<f32>), TensorError> {
    let tensor = tensors.tensor(name)?;
    match *tensor.shape() {
        [_, columns] if tensor.dtype() == Dtype::F32 => Ok((columns, floats(tensor.data()))),
        _ => Err(wrong_shape(name, &tensor, "n × m".into())),
    }
}

/// Returns the values of a tensor with one axis.
pub(super) fn vector(tensors: &SafeTensors<'_>, name: &'static str) -> Result<Vec<f32>, TensorError> {
    let tensor = tensors.tensor(name)?;
    match tensor.shape() {
        [_] if tensor.dtype() == Dtype::F32 => Ok(floats(tensor.data())),
        _ => Err(wrong_shape(name, &tensor, "n".into())),
    }
}

fn wrong_shape(name: &'static str, tensor: &TensorView<'_>, expected: String) -> TensorError {
    TensorError::Shape { name, got: tensor.shape().to_vec(), dtype: tensor.dtype(), expected }
}

/// Writes f32 tensors: name, shape and values of each.
///
/// # Panics
/// If a shape does not fit its values.
pub fn to_bytes(tensors: &[(&str, Vec<usize>, &[f32])]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, _, values)| little_endian(values)).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (*name, view.expect("the shape fits the values"))
    });
    serialize(views, None).expect("tensors in memory can be serialized")
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

pub(super) fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
