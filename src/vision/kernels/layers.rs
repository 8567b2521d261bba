//! MobileNet's layers, and the maps between them.

use super::depthwise::Depthwise;
use super::product::Product;

/// A map's sides; its numbers lie as `[height, width, channels]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
}

impl Size {
    pub fn numbers(self) -> usize {
        self.height * self.row()
    }

    pub fn row(self) -> usize {
        self.width * self.channels
    }
}

/// The zeros around a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Padding {
    pub top: usize,
    pub left: usize,
    pub bottom: usize,
    pub right: usize,
}

impl Padding {
    pub const NONE: Padding = Padding { top: 0, left: 0, bottom: 0, right: 0 };
}

/// A convolution of few channels, looked at as a product over patches; its input has its padding around it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct First {
    /// Its inputs are a patch's numbers, `[side, side, channels]`.
    pub product: Product,
    pub side: usize,
    pub stride: usize,
    pub padding: Padding,
}

/// What makes rows of one map out of another, each pixel for itself or from a patch.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Rows {
    Product(Product),
    First(First),
}

/// Expansion, depthwise convolution, projection.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Block {
    /// Expands the input; without it the depthwise convolution looks at the input itself.
    pub expand: Option<Rows>,
    pub depthwise: Depthwise,
    pub padding: Padding,
    /// Its inputs are whole planes, zeros behind the last channel; those of the expansion's outputs too.
    pub project: Option<Product>,
    /// The input is added to the projection.
    pub residual: bool,
    /// Between expansion and depthwise convolution, without padding; and behind that.
    pub inner: Size,
    pub after: Size,
}

impl Block {
    /// Pixels in a row of the padded map that the depthwise convolution looks at, and rows.
    pub fn across(&self) -> usize {
        self.inner.width + self.padding.left + self.padding.right
    }

    pub fn down(&self) -> usize {
        self.inner.height + self.padding.top + self.padding.bottom
    }

    /// Numbers in a row of it, and in a row behind the depthwise convolution.
    pub fn lines(&self, lanes: usize) -> (usize, usize) {
        let numbers = self.depthwise.planes * lanes;
        (self.across() * numbers, self.after.width * numbers)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Layer {
    Rows {
        rows: Rows,
        residual: bool,
    },
    Block(Box<Block>),
    /// The mean over all places, with this factor.
    Mean {
        factor: f32,
    },
}

/// One layer and its maps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stage {
    pub layer: Layer,
    pub from: Size,
    pub to: Size,
}
