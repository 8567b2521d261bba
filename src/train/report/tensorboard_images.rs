//! Pictures of a run for TensorBoard, which shows no page of ours: the confusion matrix, and a sheet of
//! photographs with what they were taken for.

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

/// Pixels a side of a matrix's cell, less where the matrix would be too wide with all its classes.
const CELL: u32 = 64;
const MATRIX: u32 = 2560;
/// A smaller cell has no room for a number, and a row of them none for a name.
const CELL_WITH_NUMBER: u32 = 32;
const CELL_WITH_NAME: u32 = 12;
/// Pixels a side of a photograph, and of the room for names.
const PHOTOGRAPH: u32 = 150;
const TITLE: u32 = 16;
const NAMES: u32 = 110;

const INK: Rgb888 = Rgb888::new(30, 34, 40);
const RIGHT: Rgb888 = Rgb888::new(30, 90, 200);
const WRONG: Rgb888 = Rgb888::new(200, 30, 30);

/// Counts, `[true][taken for]`: the darker a cell, the larger its share of its row.
pub fn confusion(labels: &Labels, counts: &[Vec<usize>]) -> RgbImage {
    let cell = (MATRIX / counts.len() as u32).clamp(1, CELL);
    let side = cell * counts.len() as u32;
    let mut canvas = Canvas(RgbImage::from_pixel(side + NAMES, side + 2 * TITLE, Rgb([255; 3])));
    for (row, (counts, name)) in counts.iter().zip(labels.names()).enumerate() {
        let of = counts.iter().sum::<usize>().max(1) as f32;
        let y = 2 * TITLE + row as u32 * cell;
        if cell >= CELL_WITH_NAME {
            canvas.write(&shortened(name, NAMES - 6), (NAMES - 6, y + cell / 2), INK, Alignment::Right);
        }
        if cell >= CELL_WITH_NUMBER {
            let x = NAMES + row as u32 * cell + cell / 2;
            canvas.write(&shortened(name, cell), (x, TITLE), INK, Alignment::Center);
        }
        for (column, count) in counts.iter().enumerate() {
            let share = *count as f32 / of;
            let shade = |full: f32| (255.0 - share * (255.0 - full)) as u8;
            let colour = Rgb([shade(20.0), shade(80.0), shade(160.0)]);
            let x = NAMES + column as u32 * cell;
            let gap = u32::from(cell > 2);
            fill(&mut canvas.0, (x + gap, y + gap), (cell - 2 * gap, cell - 2 * gap), colour);
            if cell >= CELL_WITH_NUMBER {
                let ink = if share > 0.5 { Rgb888::WHITE } else { INK };
                canvas.write(&count.to_string(), (x + cell / 2, y + cell / 2), ink, Alignment::Center);
            }
        }
    }
    canvas.0
}

/// Photographs in rows of `columns`, blue titles where right, red ones with the true class where wrong.
pub fn sheet(shown: &[GalleryImage], columns: u32) -> RgbImage {
    let rows = (shown.len() as u32).div_ceil(columns).max(1);
    let (wide, high) = (PHOTOGRAPH + 8, PHOTOGRAPH + 2 * TITLE + 8);
    let mut canvas = Canvas(RgbImage::from_pixel(columns * wide, rows * high, Rgb([255; 3])));
    for (i, one) in shown.iter().enumerate() {
        let (x, y) = (i as u32 % columns * wide + 4, i as u32 / columns * high + 4);
        let ink = if one.right() { RIGHT } else { WRONG };
        for (line, text) in one.title_lines().iter().enumerate() {
            let at = (x + PHOTOGRAPH / 2, y + TITLE / 2 + line as u32 * TITLE);
            canvas.write(&shortened(text, PHOTOGRAPH), at, ink, Alignment::Center);
        }
        let small = imageops::resize(&one.thumbnail, PHOTOGRAPH, PHOTOGRAPH, FilterType::Triangle);
        imageops::replace(&mut canvas.0, &small, i64::from(x), i64::from(y + 2 * TITLE));
    }
    canvas.0
}

/// No more letters of six pixels than fit.
fn shortened(text: &str, pixels: u32) -> String {
    text.chars().take((pixels / FONT_6X10.character_size.width) as usize).collect()
}

fn fill(image: &mut RgbImage, (left, top): (u32, u32), (wide, high): (u32, u32), colour: Rgb<u8>) {
    for y in top..top + high {
        for x in left..left + wide {
            image.put_pixel(x, y, colour);
        }
    }
}

/// Pixels that letters can be drawn on.
struct Canvas(RgbImage);

impl Canvas {
    fn write(&mut self, text: &str, (x, y): (u32, u32), ink: Rgb888, alignment: Alignment) {
        let number = text.chars().all(|c| c.is_ascii_digit());
        let font = if number { &FONT_9X15_BOLD } else { &FONT_6X10 };
        let style = TextStyleBuilder::new().alignment(alignment).baseline(Baseline::Middle).build();
        let at = Point::new(x as i32, y as i32);
        let Ok(_) = Text::with_text_style(text, at, MonoTextStyle::new(font, ink), style).draw(self);
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
        for Pixel(Point { x, y }, colour) in pixels {
            let place = u32::try_from(x).ok().zip(u32::try_from(y).ok());
            // What lies outside is cut off.
            if let Some(pixel) = place.and_then(|(x, y)| self.0.get_pixel_mut_checked(x, y)) {
                *pixel = Rgb([colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_has_a_cell_a_pair_and_dark_where_most_are() {
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        let image = confusion(&labels, &[vec![9, 1], vec![0, 10]]);
        let corner =
            |row: u32, column: u32| image.get_pixel(NAMES + column * CELL + 3, 2 * TITLE + row * CELL + 3).0[0];
        assert!(corner(0, 0) < 60 && corner(1, 1) < 30 && corner(0, 1) > 200);
        assert_eq!(corner(1, 0), 255);
        let many = Labels::new((0..1000).map(|i| format!("class {i}")).collect()).unwrap();
        let wide = confusion(&many, &vec![vec![1; 1000]; 1000]);
        assert!(wide.width() < 3000, "a thousand classes are no reason for a gigapixel: {}", wide.width());
        let dark = image.pixels().filter(|pixel| pixel.0 == [30, 34, 40]).count();
        assert!(dark > 100, "the names and numbers are written: {dark}");
    }
}
