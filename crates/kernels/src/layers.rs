//! The layers of MobileNet-like networks: as they are described, and as they are packed.

use crate::gemm::PackedGemm;
use crate::inverted_residual::InvertedResidual;

/// The bounds of an activation, as ReLU6 has: `min(max(x, low), high)`. It follows bias and residual.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    /// The lower bound.
    pub low: f32,
    /// The upper bound.
    pub high: f32,
}

impl Clip {
    /// No activation.
    pub const NONE: Clip = Clip { low: f32::NEG_INFINITY, high: f32::INFINITY };
    /// ReLU6: from 0 to 6.
    pub const RELU6: Clip = Clip { low: 0.0, high: 6.0 };
}

/// The shape of a feature map without the batch. Between layers its values are stored as `[height, width, channels]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureMapShape {
    /// Rows of pixels.
    pub height: usize,
    /// Pixels in a row.
    pub width: usize,
    /// Values of a pixel.
    pub channels: usize,
}

impl FeatureMapShape {
    /// Returns the number of values, or `None` if it overflows.
    pub fn checked_len(self) -> Option<usize> {
        self.height.checked_mul(self.width)?.checked_mul(self.channels)
    }

    /// Returns the number of values, which [`crate::CompiledNet::new`] has checked.
    pub(crate) fn len(self) -> usize {
        self.height * self.row_len()
    }

    pub(crate) fn row_len(self) -> usize {
        self.width * self.channels
    }
}

/// Rows and columns of zeros around a feature map, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Padding {
    /// Rows above.
    pub top: usize,
    /// Columns to the left.
    pub left: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the right.
    pub right: usize,
}

impl Padding {
    /// No padding.
    pub const NONE: Padding = Padding { top: 0, left: 0, bottom: 0, right: 0 };
}

/// A convolution with a square kernel, the same stride in both directions and no dilation.
#[derive(Debug, Clone, PartialEq)]
pub struct Conv2d {
    /// `[outputs, kernel, kernel, inputs]`; `[channels, kernel, kernel]` for a depthwise convolution.
    pub weights: Vec<f32>,
    /// `[outputs]`
    pub bias: Vec<f32>,
    /// Side of the kernel, in pixels.
    pub kernel: usize,
    /// Step of the kernel, in pixels.
    pub stride: usize,
    /// Zeros around the input.
    pub padding: Padding,
    /// The activation.
    pub clip: Clip,
}

/// A layer of a network, before [`crate::CompiledNet::new`] packs it.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "a network has few layers, which live only until they are packed")]
pub enum Layer {
    /// A dense convolution: 1×1 at a stride of 1 without padding, or, as the first layer, any kernel. It is fast for inputs of few
    /// channels, such as an image.
    Conv {
        /// The convolution.
        conv: Conv2d,
        /// Adds the layer's input to the output of a 1×1 convolution, before the activation.
        residual: bool,
    },
    /// Expansion, depthwise convolution and projection, as in MobileNetV2 (a depthwise separable convolution without an expansion).
    InvertedResidual {
        /// A dense convolution, as [`Layer::Conv`] takes it.
        expand: Option<Conv2d>,
        /// A depthwise convolution of 3×3 or 5×5 at a stride of 1 or 2.
        depthwise: Conv2d,
        /// A 1×1 convolution.
        project: Option<Conv2d>,
        /// Adds the layer's input to the output of the projection, before the projection's activation.
        residual: bool,
    },
    /// Sums each channel over all pixels and multiplies the sums by `factor`; 1 / (height × width) for the mean.
    GlobalSum {
        /// The factor.
        factor: f32,
    },
}

/// A convolution of few channels, computed as a matrix product over patches of an input that includes its padding.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PatchConv {
    /// Its inputs are the values of a patch, `[kernel, kernel, channels]`.
    pub gemm: PackedGemm,
    pub kernel: usize,
    pub stride: usize,
    pub padding: Padding,
}

/// A packed dense convolution.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum DenseConv {
    Pointwise(PackedGemm),
    Patch(PatchConv),
}

/// The sizes of an inverted residual block that its buffers depend on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct BlockGeometry {
    pub lanes: usize,
    pub kernel: usize,
    pub stride: usize,
    pub channel_blocks: usize,
    /// Of the depthwise convolution.
    pub padding: Padding,
    /// The feature map before the depthwise convolution, without padding.
    pub expanded: FeatureMapShape,
    /// The feature map after the depthwise convolution.
    pub convolved: FeatureMapShape,
}

/// A packed layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PackedLayer {
    Conv { conv: DenseConv, residual: bool },
    InvertedResidual(Box<InvertedResidual>),
    GlobalSum { factor: f32 },
}

/// A packed layer with the shapes of its input and output.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CompiledLayer {
    pub packed: PackedLayer,
    pub from: FeatureMapShape,
    pub to: FeatureMapShape,
}

impl PackedLayer {
    /// Returns the zeros around the input that the layer needs as the first one.
    pub fn input_padding(&self) -> Padding {
        let conv = match self {
            PackedLayer::Conv { conv, .. } => Some(conv),
            PackedLayer::InvertedResidual(block) => block.expand.as_ref(),
            PackedLayer::GlobalSum { .. } => None,
        };
        match conv {
            Some(DenseConv::Patch(conv)) => conv.padding,
            _ => Padding::NONE,
        }
    }
}

impl BlockGeometry {
    /// Returns the pixels in a row of the padded expanded feature map.
    pub fn padded_width(&self) -> usize {
        self.expanded.width + self.padding.left + self.padding.right
    }

    /// Returns the rows of the padded expanded feature map.
    pub fn padded_height(&self) -> usize {
        self.expanded.height + self.padding.top + self.padding.bottom
    }

    /// Returns the values in a row of the padded expanded feature map, in channel blocks.
    pub fn expanded_row_len(&self) -> usize {
        self.padded_width() * self.channel_blocks * self.lanes
    }

    /// Returns the values in a row after the depthwise convolution, in channel blocks.
    pub fn convolved_row_len(&self) -> usize {
        self.convolved.width * self.channel_blocks * self.lanes
    }
}
