//! Images of a run for TensorBoard: the confusion matrix, and a contact sheet with predictions.

use std::convert::Infallible;

use embedded_graphics::Drawable;
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::iso_8859_1::{FONT_6X10, FONT_9X15_BOLD};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::{DrawTarget, OriginDimensions, Pixel, Point, RgbColor, Size};
use embedded_graphics::text::{Alignment, Baseline, Text, TextStyleBuilder};
use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};

use crate::train::report::GalleryImage;
use crate::vision::Labels;

/// Largest side of a cell of the confusion matrix, in pixels.
const CELL: u32 = 64;
/// Largest side of the confusion matrix, in pixels; with many classes the cells are smaller.
const MATRIX: u32 = 2560;
/// Smallest side of a cell with a count in it and a name above its column, in pixels.
const CELL_WITH_COUNT: u32 = 32;
/// Smallest side of a cell with a name beside its row, in pixels.
const CELL_WITH_NAME: u32 = 12;
/// Side of an image on the contact sheet, in pixels.
const IMAGE: u32 = 150;
/// Height of a line of text, in pixels.
const LINE: u32 = 16;
/// Width of the class names beside the confusion matrix, in pixels.
const NAMES: u32 = 110;

const TEXT: Rgb888 = Rgb888::new(30, 34, 40);
const CORRECT: Rgb888 = Rgb888::new(30, 90, 200);
const WRONG: Rgb888 = Rgb888::new(200, 30, 30);

/// Draws a confusion matrix of counts `[true class][predicted class]`. The darker a cell, the larger its fraction of the
/// row.
///
/// # Panics
/// Panics if there are no classes.
pub fn confusion_matrix(labels: &Labels, counts: &[Vec<usize>]) -> RgbImage {
    let cell = (MATRIX / counts.len() as u32).clamp(1, CELL);
    let side = cell * counts.len() as u32;
    let mut canvas = Canvas(RgbImage::from_pixel(side + NAMES, side + 2 * LINE, Rgb([255; 3])));
    for (row, (counts, name)) in counts.iter().zip(labels.names()).enumerate() {
        let total = counts.iter().sum::<usize>().max(1) as f32;
        let y = 2 * LINE + row as u32 * cell;
        if cell >= CELL_WITH_NAME {
            canvas.write(&shortened(name, NAMES - 6), (NAMES - 6, y + cell / 2), TEXT, Alignment::Right);
        }
        if cell >= CELL_WITH_COUNT {
            let x = NAMES + row as u32 * cell + cell / 2;
            canvas.write(&shortened(name, cell), (x, LINE), TEXT, Alignment::Center);
        }
        for (column, count) in counts.iter().enumerate() {
            let fraction = *count as f32 / total;
            let shade = |full: f32| (255.0 - fraction * (255.0 - full)) as u8;
            let color = Rgb([shade(20.0), shade(80.0), shade(160.0)]);
            let x = NAMES + column as u32 * cell;
            let gap = u32::from(cell > 2);
            fill(&mut canvas.0, (x + gap, y + gap), (cell - 2 * gap, cell - 2 * gap), color);
            if cell >= CELL_WITH_COUNT {
                let color = if fraction > 0.5 { Rgb888::WHITE } else { TEXT };
                canvas.write(&count.to_string(), (x + cell / 2, y + cell / 2), color, Alignment::Center);
            }
        }
    }
    canvas.0
}

/// Draws images in rows of `columns`. The title is the prediction, blue if it is correct, otherwise red and followed by the
/// true class.
///
/// # Panics
/// Panics if `columns` is 0.
pub fn contact_sheet(images: &[GalleryImage], columns: u32) -> RgbImage {
    let rows = (images.len() as u32).div_ceil(columns).max(1);
    let (width, height) = (IMAGE + 8, IMAGE + 2 * LINE + 8);
    let mut canvas = Canvas(RgbImage::from_pixel(columns * width, rows * height, Rgb([255; 3])));
    for (i, image) in images.iter().enumerate() {
        let (x, y) = (i as u32 % columns * width + 4, i as u32 / columns * height + 4);
        let color = if image.is_correct() { CORRECT } else { WRONG };
        for (line, text) in image.title_lines().iter().enumerate() {
            let center = (x + IMAGE / 2, y + LINE / 2 + line as u32 * LINE);
            canvas.write(&shortened(text, IMAGE), center, color, Alignment::Center);
        }
        let small = imageops::resize(&image.thumbnail, IMAGE, IMAGE, FilterType::Triangle);
        imageops::replace(&mut canvas.0, &small, i64::from(x), i64::from(y + 2 * LINE));
    }
    canvas.0
}

/// Returns the characters that fit into `pixels` in the small font.
fn shortened(text: &str, pixels: u32) -> String {
    text.chars().take((pixels / FONT_6X10.character_size.width) as usize).collect()
}

fn fill(image: &mut RgbImage, (left, top): (u32, u32), (width, height): (u32, u32), color: Rgb<u8>) {
    for y in top..top + height {
        for x in left..left + width {
            image.put_pixel(x, y, color);
        }
    }
}

/// An image as a draw target of `embedded_graphics`.
struct Canvas(RgbImage);

impl Canvas {
    /// Draws text, vertically centered at `y`; digits in a larger font.
    fn write(&mut self, text: &str, (x, y): (u32, u32), color: Rgb888, alignment: Alignment) {
        let is_count = text.chars().all(|c| c.is_ascii_digit());
        let font = if is_count { &FONT_9X15_BOLD } else { &FONT_6X10 };
        let style = TextStyleBuilder::new().alignment(alignment).baseline(Baseline::Middle).build();
        let position = Point::new(x as i32, y as i32);
        let Ok(_) = Text::with_text_style(text, position, MonoTextStyle::new(font, color), style).draw(self);
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.0.width(), self.0.height())
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(Point { x, y }, color) in pixels {
            let position = u32::try_from(x).ok().zip(u32::try_from(y).ok());
            // Pixels outside the image are clipped.
            if let Some(pixel) = position.and_then(|(x, y)| self.0.get_pixel_mut_checked(x, y)) {
                *pixel = Rgb([color.r(), color.g(), color.b()]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confusion_matrix_is_dark_where_the_counts_are_high_and_limited_in_size() {
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        let image = confusion_matrix(&labels, &[vec![9, 1], vec![0, 10]]);
        let corner = |row: u32, column: u32| image.get_pixel(NAMES + column * CELL + 3, 2 * LINE + row * CELL + 3).0[0];
        assert!(corner(0, 0) < 60 && corner(1, 1) < 30 && corner(0, 1) > 200);
        assert_eq!(corner(1, 0), 255);
        let many = Labels::new((0..1000).map(|i| format!("class {i}")).collect()).unwrap();
        let large = confusion_matrix(&many, &vec![vec![1; 1000]; 1000]);
        assert!(large.width() < 3000, "the width with a thousand classes: {}", large.width());
        let dark = image.pixels().filter(|pixel| pixel.0 == [30, 34, 40]).count();
        assert!(dark > 100, "pixels of names and counts: {dark}");
    }
}
