//! Frames and pictures: what the camera and the vision stage share.

pub mod files;
pub mod jpeg;

use std::path::PathBuf;
use std::time::SystemTime;

/// A picture and the time at which it was captured.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Wall-clock time of the capture, not of the reading or the decoding.
    pub captured_at: SystemTime,
    /// The picture as the source gave it.
    pub picture: Picture,
    /// The file that a replayed frame was read from; `None` for a camera's frame.
    pub origin: Option<PathBuf>,
}

/// A picture as its source gave it; the vision stage decodes the frames that it classifies.
#[derive(Debug, Clone)]
pub enum Picture {
    /// A whole JPEG, PNG or WebP file.
    Encoded(Vec<u8>),
    /// Uncompressed pixels.
    Raw(RawPicture),
}

/// Packed pixels, row after row.
#[derive(Debug, Clone)]
pub struct RawPicture {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Bytes from the start of a row to the start of the next one: at least `width × bytes a pixel`, the rest is padding.
    pub stride: usize,
    /// Layout of a pixel.
    pub layout: Layout,
    /// At least `(height − 1) × stride + width × bytes a pixel` bytes; padding behind the last row may be there or not.
    pub bytes: Vec<u8>,
}

impl RawPicture {
    /// Creates a picture whose rows follow each other without padding.
    pub fn packed(width: u32, height: u32, layout: Layout, bytes: Vec<u8>) -> Self {
        RawPicture { width, height, stride: width as usize * layout.bytes_per_pixel(), layout, bytes }
    }

    /// Bytes of the pixels of one row, without padding.
    pub fn row_bytes(&self) -> usize {
        self.width as usize * self.layout.bytes_per_pixel()
    }

    /// The fewest bytes that hold the picture: `(height − 1) × stride + row_bytes`; `None` if that overflows.
    pub fn bytes_min(&self) -> Option<usize> {
        (self.height as usize).checked_sub(1)?.checked_mul(self.stride)?.checked_add(self.row_bytes())
    }
}

/// Layout of the pixels of a [`RawPicture`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// 4:2:2, two pixels in four bytes: Y0 U Y1 V; BT.601, studio range.
    Yuyv,
    /// Three bytes a pixel: red, green, blue.
    Rgb,
    /// Three bytes a pixel: blue, green, red.
    Bgr,
}

impl Layout {
    /// Bytes of one pixel.
    pub const fn bytes_per_pixel(self) -> usize {
        match self {
            Layout::Yuyv => 2,
            Layout::Rgb | Layout::Bgr => 3,
        }
    }
}
