//! Other views of a photograph: mirrored, cropped, turned, in another light. The seed and the photograph's
//! content decide each of them, so that a view can be cached like the photograph itself.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::{Rgb, RgbImage, imageops};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::train::data::photographs::Content;

/// Part of every cached view's name: raise it when a view changes.
pub const VERSION: u32 = 1;

/// Share of the width and of the height that a crop keeps at least.
const CROP_MIN: f32 = 0.6;
/// Largest turn to either side, in radians: 12 degrees.
const TURN_MAX: f32 = 0.21;
/// Brightness and contrast change by at most this share, saturation by twice as much.
const LIGHT_MAX: f32 = 0.2;
/// Largest turn of the hue to either side, in radians: 9 degrees.
const HUE_MAX: f32 = 0.16;

/// How many views of each photograph, and the seed of their chances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Views {
    pub count: usize,
    pub seed: u64,
}

impl Views {
    /// The photograph as it is, and nothing else.
    pub const ONE: Self = Views { count: 1, seed: 0 };

    /// View `index` of a photograph beside the photograph itself, which is the first. 1: mirrored; others: by chance,
    /// `size`×`size` pixels.
    pub fn view(&self, image: &RgbImage, content: &Content, index: usize, size: u32) -> RgbImage {
        match index {
            1 => imageops::flip_horizontal(image),
            _ => by_chance(image, &mut self.chances(content, index), size),
        }
    }

    fn chances(&self, content: &Content, index: usize) -> ChaCha8Rng {
        let mut seed = *content;
        for (at, byte) in self.seed.to_le_bytes().into_iter().enumerate() {
            seed[at] ^= byte;
        }
        let mut rng = ChaCha8Rng::from_seed(seed);
        rng.set_stream(index as u64);
        rng
    }
}

fn by_chance(image: &RgbImage, rng: &mut ChaCha8Rng, size: u32) -> RgbImage {
    let (wide, high) = (between(rng, CROP_MIN, 1.0), between(rng, CROP_MIN, 1.0));
    let (left, top) = (between(rng, 0.0, 1.0 - wide), between(rng, 0.0, 1.0 - high));
    let mut view = crop(image, [left, top, wide, high], size);
    if rng.next_u32() & 1 == 1 {
        imageops::flip_horizontal_in_place(&mut view);
    }
    let mut view = turned(&view, between(rng, -TURN_MAX, TURN_MAX));
    ColorJitter::by_chance(rng).shine_on(&mut view);
    view
}

/// The part of a picture, by shares of its width and height: left, top, wide, high; squashed to a square.
fn crop(image: &RgbImage, [left, top, wide, high]: [f32; 4], size: u32) -> RgbImage {
    let (width, height) = (f64::from(image.width()), f64::from(image.height()));
    let (wide, high) = ((f64::from(wide) * width).max(1.0), (f64::from(high) * height).max(1.0));
    let (left, top) = ((f64::from(left) * width).min(width - wide), (f64::from(top) * height).min(height - high));
    let source = TypedImageRef::<U8x3>::from_buffer(image.width(), image.height(), image.as_raw())
        .expect("an RgbImage holds three bytes a pixel");
    let mut cropped = RgbImage::new(size, size);
    let mut view = TypedImage::<U8x3>::from_buffer(size, size, &mut cropped).expect("so does this one");
    let options =
        ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).crop(left, top, wide, high);
    Resizer::new().resize_typed(&source, &mut view, &options).expect("the crop lies within the picture");
    cropped
}

/// Turned about its middle by `angle` radians; what comes in at the corners is the edge mirrored.
fn turned(image: &RgbImage, angle: f32) -> RgbImage {
    let (width, height) = image.dimensions();
    let (middle_x, middle_y) = ((width - 1) as f32 / 2.0, (height - 1) as f32 / 2.0);
    let (sin, cos) = angle.sin_cos();
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = (x as f32 - middle_x, y as f32 - middle_y);
        let from_x = mirrored(cos * x - sin * y + middle_x, width);
        let from_y = mirrored(sin * x + cos * y + middle_y, height);
        between_pixels(image, from_x, from_y)
    })
}

/// A place within 0 to `length − 1`, thrown back at the ends.
fn mirrored(at: f32, length: u32) -> f32 {
    let last = (length - 1) as f32;
    (last - (last - at.abs()).abs()).clamp(0.0, last)
}

/// Bilinear.
fn between_pixels(image: &RgbImage, x: f32, y: f32) -> Rgb<u8> {
    let (left, top) = (x as u32, y as u32);
    let (right, bottom) = ((left + 1).min(image.width() - 1), (top + 1).min(image.height() - 1));
    let (dx, dy) = (x - left as f32, y - top as f32);
    let at = |x: u32, y: u32, channel: usize| f32::from(image.get_pixel(x, y).0[channel]);
    Rgb([0, 1, 2].map(|channel| {
        let above = at(left, top, channel) * (1.0 - dx) + at(right, top, channel) * dx;
        let below = at(left, bottom, channel) * (1.0 - dx) + at(right, bottom, channel) * dx;
        (above * (1.0 - dy) + below * dy + 0.5) as u8
    }))
}

/// Brightness, contrast, saturation and hue as one change of colours.
struct ColorJitter {
    /// `out = matrix × in + offset`, 0–255.
    matrix: [[f32; 3]; 3],
    offset: f32,
}

impl ColorJitter {
    fn by_chance(rng: &mut ChaCha8Rng) -> Self {
        let brightness = between(rng, 1.0 - LIGHT_MAX, 1.0 + LIGHT_MAX);
        let contrast = between(rng, 1.0 - LIGHT_MAX, 1.0 + LIGHT_MAX);
        let saturation = between(rng, 1.0 - 2.0 * LIGHT_MAX, 1.0 + 2.0 * LIGHT_MAX);
        ColorJitter::new(brightness, contrast, saturation, between(rng, -HUE_MAX, HUE_MAX))
    }

    /// Hue and saturation turn and stretch the plane of colours about the grey axis, in YIQ (the NTSC's
    /// colour space of 1953).
    fn new(brightness: f32, contrast: f32, saturation: f32, hue: f32) -> Self {
        const TO_YIQ: [[f32; 3]; 3] = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]];
        const FROM_YIQ: [[f32; 3]; 3] = [[1.0, 0.956, 0.619], [1.0, -0.272, -0.647], [1.0, -1.106, 1.703]];
        let (sin, cos) = hue.sin_cos();
        let colour =
            [[1.0, 0.0, 0.0], [0.0, saturation * cos, -saturation * sin], [0.0, saturation * sin, saturation * cos]];
        let mut matrix = times(&FROM_YIQ, &times(&colour, &TO_YIQ));
        matrix.iter_mut().flatten().for_each(|v| *v *= brightness * contrast);
        // Contrast leaves the middle grey where it is.
        ColorJitter { matrix, offset: 127.5 * (1.0 - contrast) }
    }

    fn shine_on(&self, image: &mut RgbImage) {
        for pixel in image.pixels_mut() {
            let [r, g, b] = pixel.0.map(f32::from);
            let channel = |row: &[f32; 3]| row[0] * r + row[1] * g + row[2] * b + self.offset + 0.5;
            pixel.0 = [0, 1, 2].map(|i| channel(&self.matrix[i]) as u8);
        }
    }
}

fn times(a: &[[f32; 3]; 3], b: &[[f32; 3]; 3]) -> [[f32; 3]; 3] {
    std::array::from_fn(|row| std::array::from_fn(|column| (0..3).map(|i| a[row][i] * b[i][column]).sum()))
}

/// A number from `low` to `high`, with 24 bits of chance.
fn between(rng: &mut ChaCha8Rng, low: f32, high: f32) -> f32 {
    low + (high - low) * (rng.next_u32() >> 8) as f32 / (1 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::decode::tests::gradient;

    fn mean_difference(a: &RgbImage, b: &RgbImage) -> f64 {
        assert_eq!(a.dimensions(), b.dimensions());
        let sum: u64 = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        sum as f64 / a.as_raw().len() as f64
    }

    #[test]
    fn the_seed_the_content_and_the_number_decide_a_view() {
        let image = gradient(90, 60);
        let views = Views { count: 6, seed: 1 };
        let view = |views: Views, content: u8, index: usize| views.view(&image, &[content; 32], index, 32);
        assert_eq!(view(views, 1, 1), imageops::flip_horizontal(&image));
        assert_eq!(view(views, 1, 2), view(views, 1, 2));
        assert_eq!(view(views, 1, 2).dimensions(), (32, 32));
        assert_ne!(view(views, 1, 2), view(views, 1, 3));
        assert_ne!(view(views, 1, 2), view(views, 2, 2));
        assert_ne!(view(views, 1, 2), view(Views { seed: 2, ..views }, 1, 2));
    }

    #[test]
    fn nothing_changed_changes_nothing() {
        let image = gradient(40, 40);
        assert!(mean_difference(&crop(&image, [0.0, 0.0, 1.0, 1.0], 40), &image) < 0.1);
        assert_eq!(turned(&image, 0.0), image);
        let mut lit = image.clone();
        ColorJitter::new(1.0, 1.0, 1.0, 0.0).shine_on(&mut lit);
        assert!(mean_difference(&lit, &image) < 1.0);
    }

    #[test]
    fn a_quarter_turn_a_crop_and_a_light_are_what_they_say() {
        let image = gradient(41, 41);
        let quarter = turned(&image, std::f32::consts::FRAC_PI_2);
        assert!(mean_difference(&quarter, &imageops::rotate270(&image)) < 0.6, "turned the wrong way or not at all");
        let corner = crop(&image, [0.5, 0.5, 0.5, 0.5], 41);
        assert!(corner.get_pixel(0, 0).0[1] >= 120 && corner.get_pixel(40, 40).0[1] >= 245);
        let mut grey = RgbImage::from_pixel(1, 1, Rgb([100, 100, 100]));
        ColorJitter::new(1.2, 1.0, 0.0, 0.5).shine_on(&mut grey);
        assert!(grey.get_pixel(0, 0).0.iter().all(|v| (119..=121).contains(v)), "{grey:?}");
        assert_eq!((mirrored(-2.0, 10), mirrored(11.0, 10), mirrored(4.5, 10)), (2.0, 7.0, 4.5));
    }
}
