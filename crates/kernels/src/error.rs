//! Errors.

use crate::layers::FeatureMapShape;
use crate::simd::Isa;

/// The most f32 values of a [`crate::CompiledNet`] and one [`crate::Workspace`] of it together: packed weights, feature maps, padding
/// and the buffers of all threads.
///
/// ResNet50 at 1024 pixels, far above what a camera's classifier needs, has 26 million weights, two feature maps of 512 × 512 × 64 =
/// 17 million values and a padded input of 3 million: 63 million values. The limit is four times that on a 64-bit processor, 1 GiB,
/// and the power of two above it on a 32-bit one, 256 MiB.
pub const VALUES_MAX: usize = if usize::BITS >= 64 { 1 << 28 } else { 1 << 26 };

/// A network that cannot be compiled. Layers count from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The processor does not support the instruction set.
    #[error("this processor lacks {}", .0.name())]
    UnsupportedIsa(Isa),
    /// There is no layer.
    #[error("the network has no layers")]
    NoLayers,
    /// A dimension of the input is zero.
    #[error(
        "the input is {}×{}×{} (height, width, channels), expected at least 1×1×1",
        .0.height, .0.width, .0.channels
    )]
    EmptyInput(FeatureMapShape),
    /// A size overflows or the network would take more memory than [`VALUES_MAX`] allows.
    #[error("layer {layer}: with its {quantity} the network exceeds {VALUES_MAX} f32 values")]
    TooLarge {
        /// Index of the layer.
        layer: usize,
        /// The size that exceeds the limit.
        quantity: &'static str,
    },
    /// Weights or a bias do not have the length that the shapes demand.
    #[error("layer {layer}: {tensor}: expected {expected} values, found {found}")]
    WrongLength {
        /// Index of the layer.
        layer: usize,
        /// The tensor.
        tensor: &'static str,
        /// The length that the shapes demand.
        expected: usize,
        /// The length of the tensor.
        found: usize,
    },
    /// There is no kernel for the convolution.
    #[error("layer {layer}: a kernel of {kernel}×{kernel} at a stride of {stride}, expected {expected}")]
    UnsupportedConv {
        /// Index of the layer.
        layer: usize,
        /// Side of the kernel.
        kernel: usize,
        /// Stride.
        stride: usize,
        /// The supported convolutions.
        expected: &'static str,
    },
    /// The kernel is larger than its input with the padding.
    #[error("layer {layer}: a kernel of {kernel}×{kernel} exceeds its padded input")]
    KernelExceedsInput {
        /// Index of the layer.
        layer: usize,
        /// Side of the kernel.
        kernel: usize,
    },
    /// The input of the layer cannot be added to its output.
    #[error("layer {layer}: a residual needs a 1×1 convolution that gives the shape of the layer's input")]
    InvalidResidual {
        /// Index of the layer.
        layer: usize,
    },
    /// The layer's weights depend on the size of its input.
    #[error("layer {layer}: computes a mean over all pixels, which has a fixed size")]
    FixedSize {
        /// Index of the layer.
        layer: usize,
    },
}
