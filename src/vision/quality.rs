//! Image quality: frames that are too dark, blank or blurred to be judged, by statistics of the resized image.
//!
//! The statistics are those of the mean colors of square cells, which average the noise of the sensor out.

use std::fmt;

/// Cells of a row and of a column, if the image has a multiple of it in pixels.
const CELLS: usize = 56;
/// Quantile of the cells' gray levels that is the brightness.
const BRIGHTNESS_QUANTILE: f32 = 0.95;
/// Quantile of the differences of neighboring cells that is the edge of the sharpness.
const EDGE_QUANTILE: f32 = 0.99;

/// The quality of a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Quality {
    /// It can be classified.
    #[default]
    Ok,
    /// It is too dark, as at night or with a covered lens.
    Dark,
    /// It has one color, as with a covered lens or without a signal.
    Blank,
    /// It is too blurred, as out of focus.
    Blurred,
}

impl Quality {
    /// All values, in the order in which they are checked after `Ok`.
    pub const ALL: [Quality; 4] = [Quality::Ok, Quality::Dark, Quality::Blank, Quality::Blurred];

    /// Returns the name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Quality::Ok => "ok",
            Quality::Dark => "dark",
            Quality::Blank => "blank",
            Quality::Blurred => "blurred",
        }
    }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Limits below which a frame is not classified; 0 disables a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct QualityLimits {
    /// Brightness of the brightest parts, in gray levels, 0–255: the 95th percentile of the cells.
    pub dark: f32,
    /// Standard deviation of the cells in the channel in which it is largest, in gray levels.
    pub blank: f32,
    /// Sharpness of the sharpest edges: the 99th percentile of the differences of neighboring cells, divided by the standard
    /// deviation of all cells.
    pub blurred: f32,
}

/// Measured statistics of an image; [`QualityLimits`] has their definitions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Statistics {
    /// Compared with [`QualityLimits::dark`].
    pub brightness: f32,
    /// Compared with [`QualityLimits::blank`].
    pub deviation: f32,
    /// Compared with [`QualityLimits::blurred`].
    pub sharpness: f32,
}

/// Measures images; its buffers are reused.
#[derive(Debug, Default)]
pub struct QualityMeter {
    limits: QualityLimits,
    /// Mean color of each cell, row by row.
    cells: Vec<[f32; 3]>,
    gray: Vec<f32>,
    sorted: Vec<f32>,
}

impl QualityMeter {
    /// Creates a meter with these limits.
    pub fn new(limits: QualityLimits) -> Self {
        QualityMeter { limits, ..Self::default() }
    }

    /// Returns the quality of an image. in: size×size×3 u8 RGB.
    pub fn assess(&mut self, pixels: &[u8]) -> Quality {
        let limits = self.limits;
        if limits == QualityLimits::default() {
            return Quality::Ok;
        }
        let measured = self.measure(pixels);
        if measured.brightness < limits.dark {
            Quality::Dark
        } else if measured.deviation < limits.blank {
            Quality::Blank
        } else if measured.sharpness < limits.blurred {
            Quality::Blurred
        } else {
            Quality::Ok
        }
    }

    /// Measures an image. in: size×size×3 u8 RGB.
    ///
    /// # Panics
    /// If the image has no pixels.
    pub fn measure(&mut self, pixels: &[u8]) -> Statistics {
        let cells_per_row = self.average_cells(pixels);
        // BT.601.
        let gray = |[r, g, b]: &[f32; 3]| 0.299 * r + 0.587 * g + 0.114 * b;
        self.gray.clear();
        self.gray.extend(self.cells.iter().map(gray));
        let deviation =
            (0..3).map(|channel| standard_deviation(self.cells.iter().map(|cell| cell[channel]))).fold(0.0, f32::max);
        let gray_deviation = standard_deviation(self.gray.iter().copied());
        self.sorted.clone_from(&self.gray);
        let brightness = quantile(&mut self.sorted, BRIGHTNESS_QUANTILE);
        self.sorted.clear();
        for (y, row) in self.gray.chunks_exact(cells_per_row).enumerate() {
            self.sorted.extend(row.windows(2).map(|pair| (pair[0] - pair[1]).abs()));
            let below = self.gray.chunks_exact(cells_per_row).nth(y + 1).unwrap_or_default();
            self.sorted.extend(row.iter().zip(below).map(|(a, b)| (a - b).abs()));
        }
        let edge = if self.sorted.is_empty() { 0.0 } else { quantile(&mut self.sorted, EDGE_QUANTILE) };
        let sharpness = if gray_deviation > 0.0 { edge / gray_deviation } else { 0.0 };
        Statistics { brightness, deviation, sharpness }
    }

    /// Computes the mean colors of the cells and returns the number of cells of a row. Pixels at the right and lower edge that do not
    /// fill a cell are left out.
    fn average_cells(&mut self, pixels: &[u8]) -> usize {
        let size = (pixels.len() / 3).isqrt();
        let side = (size / CELLS).max(1);
        let cells_per_row = size / side;
        self.cells.clear();
        self.cells.resize(cells_per_row * cells_per_row, [0.0; 3]);
        let scale = 1.0 / (side * side) as f32;
        for (y, row) in pixels.chunks_exact(3 * size).take(cells_per_row * side).enumerate() {
            let cells = &mut self.cells[y / side * cells_per_row..][..cells_per_row];
            for (cell, pixels) in cells.iter_mut().zip(row.chunks_exact(3 * side)) {
                for pixel in pixels.chunks_exact(3) {
                    for (sum, value) in cell.iter_mut().zip(pixel) {
                        *sum += f32::from(*value) * scale;
                    }
                }
            }
        }
        cells_per_row
    }
}

/// Returns the standard deviation of at least one value.
fn standard_deviation(values: impl ExactSizeIterator<Item = f32> + Clone) -> f32 {
    let count = values.len() as f32;
    let mean = values.clone().sum::<f32>() / count;
    (values.map(|value| (value - mean).powi(2)).sum::<f32>() / count).sqrt()
}

/// Returns the value that the fraction `q` (0–1) of the values does not exceed; reorders them. There is at least one.
fn quantile(values: &mut [f32], q: f32) -> f32 {
    let at = ((values.len() - 1) as f32 * q) as usize;
    *values.select_nth_unstable_by(at, f32::total_cmp).1
}

#[cfg(test)]
mod tests {
    use image::{Rgb, RgbImage, imageops};

    use super::*;

    const LIMITS: QualityLimits = QualityLimits { dark: 16.0, blank: 4.0, blurred: 0.4 };

    /// A checkerboard with cells of 20 pixels.
    fn board(dark: [u8; 3], bright: [u8; 3]) -> RgbImage {
        RgbImage::from_fn(224, 224, |x, y| Rgb(if (x / 20 + y / 20) % 2 == 0 { dark } else { bright }))
    }

    fn noise(image: &RgbImage, amplitude: u32) -> RgbImage {
        let mut image = image.clone();
        for (i, value) in image.iter_mut().enumerate() {
            let random = (i as u32).wrapping_mul(2_654_435_761) >> 16;
            *value = value.saturating_add((random % (amplitude + 1)) as u8);
        }
        image
    }

    #[test]
    fn tells_dark_blank_and_blurred_frames_also_in_noise() {
        let sharp = board([40, 60, 50], [90, 140, 120]);
        let stripes = |x| Rgb(if x / 75 % 2 == 0 { [40, 60, 50] } else { [90, 140, 120] });
        let edge = RgbImage::from_fn(224, 224, |x, _| stripes(x));
        let blurred = imageops::blur(&edge, 20.0);
        for amplitude in [0, 6] {
            let assess = |image: &RgbImage| QualityMeter::new(LIMITS).assess(&noise(image, amplitude));
            assert_eq!([assess(&sharp), assess(&edge)], [Quality::Ok; 2]);
            assert_eq!(assess(&board([1, 1, 1], [9, 8, 7])), Quality::Dark);
            assert_eq!(assess(&RgbImage::from_pixel(224, 224, Rgb([0, 90, 200]))), Quality::Blank);
            assert_eq!(assess(&blurred), Quality::Blurred);
            // Equally bright colors.
            assert_eq!(assess(&board([0, 128, 0], [251, 0, 0])), Quality::Ok);
        }
    }

    #[test]
    fn limits_of_zero_are_disabled() {
        let black = RgbImage::new(224, 224);
        let assess = |limits| QualityMeter::new(limits).assess(&black);
        assert_eq!(assess(QualityLimits { dark: 0.0, ..LIMITS }), Quality::Blank);
        assert_eq!(assess(QualityLimits { dark: 0.0, blank: 0.0, ..LIMITS }), Quality::Blurred);
        assert_eq!(assess(QualityLimits::default()), Quality::Ok);
    }

    #[test]
    fn measures_images_of_any_size() {
        let mut meter = QualityMeter::default();
        for size in [1, 2, 55, 56, 57, 224, 240] {
            let image = RgbImage::from_fn(size, size, |x, _| Rgb([if x < size / 2 { 0 } else { 200 }; 3]));
            let measured = meter.measure(&image);
            assert!(measured.brightness > 199.0 && measured.sharpness >= 0.0, "{size}: {measured:?}");
        }
    }
}
