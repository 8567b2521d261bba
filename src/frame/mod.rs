//! Frames and pictures: what the camera and the vision stage share.

pub mod jpeg_extent;
pub mod picture_files;

use std::path::PathBuf;
use std::time::SystemTime;

/// A picture and the time at which it was captured.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Wall-clock time of the capture, not of the reading or the decoding.
    pub captured_at: SystemTime,
    /// The picture as the source gave it.
    pub picture: Picture,
    /// File of a replayed frame; `None` for a camera's frame.
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
    /// Pixels per row.
    pub width: u32,
    /// Number of rows.
    pub height: u32,
    /// Bytes from the start of a row to the start of the next one: at least `width × bytes per pixel`, the rest is padding.
    pub stride: usize,
    /// Pixel layout.
    pub layout: Layout,
    /// At least `(height − 1) × stride + width × bytes per pixel` bytes; padding after the last row is optional.
    pub bytes: Vec<u8>,
}

impl RawPicture {
    /// Creates a picture without padding between its rows.
    pub fn packed(width: u32, height: u32, layout: Layout, bytes: Vec<u8>) -> Self {
        RawPicture { width, height, stride: width as usize * layout.bytes_per_pixel(), layout, bytes }
    }

    /// Returns the number of bytes of one row, without padding.
    pub fn row_bytes(&self) -> usize {
        self.width as usize * self.layout.bytes_per_pixel()
    }

    /// Returns the minimum length of `bytes`, `(height − 1) × stride + row_bytes`; `None` if the height is 0 or it
    /// overflows.
    pub fn bytes_min(&self) -> Option<usize> {
        (self.height as usize).checked_sub(1)?.checked_mul(self.stride)?.checked_add(self.row_bytes())
    }
}

/// Layout of the pixels of a [`RawPicture`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// 4:2:2, two pixels in four bytes, Y0 U Y1 V; BT.601, limited range (`V4L2_PIX_FMT_YUYV`).
    Yuyv,
    /// Three bytes per pixel: red, green, blue.
    Rgb,
    /// Three bytes per pixel: blue, green, red.
    Bgr,
}

impl Layout {
    /// Returns the number of bytes per pixel.
    pub const fn bytes_per_pixel(self) -> usize {
        match self {
            Layout::Yuyv => 2,
            Layout::Rgb | Layout::Bgr => 3,
        }
    }
}
