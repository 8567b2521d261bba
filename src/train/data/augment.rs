//! Data augmentation: random views of an image (flip, crop, rotation, color jitter, conditions of a camera). A view depends only on
//! the seed, the image's content hash and the view index, so that its features can be cached like those of the image itself.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::{Rgb, RgbImage, imageops};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::train::data::conditions;
use crate::train::data::image_set::ContentHash;

/// Part of the feature cache key. Raise it when the same seed, hash and index give another view.
pub const VERSION: u32 = 2;

/// Smallest fraction of the width and of the height that a crop keeps.
const CROP_MIN: f32 = 0.6;
/// Largest rotation in either direction, in radians (12°).
const ROTATION_MAX: f32 = 0.21;
/// Largest relative change of brightness and contrast; saturation changes by up to twice as much.
const JITTER_MAX: f32 = 0.2;
/// Largest hue rotation in either direction, in radians (9°).
const HUE_MAX: f32 = 0.16;

/// The number of views of each image, and the seed of the random ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Views {
    /// Number of views of each image, at least 1; view 0 is the original.
    pub count: usize,
    /// Seed of the random views.
    pub seed: u64,
}

impl Views {
    /// The original image only.
    pub const ONE: Self = Views { count: 1, seed: 0 };

    /// Returns view `index` (at least 1; view 0 is the image itself). View 1 is the horizontal flip, at the size of the
    /// image; all others are random, `size`×`size` pixels. `hash` is the image's content hash.
    pub fn view(&self, image: &RgbImage, hash: &ContentHash, index: usize, size: u32) -> RgbImage {
        match index {
            1 => imageops::flip_horizontal(image),
            _ => random_view(image, &mut self.rng(hash, index), size),
        }
    }

    fn rng(&self, hash: &ContentHash, index: usize) -> ChaCha8Rng {
        let mut seed = *hash;
        for (at, byte) in self.seed.to_le_bytes().into_iter().enumerate() {
            seed[at] ^= byte;
        }
        let mut rng = ChaCha8Rng::from_seed(seed);
        rng.set_stream(index as u64);
        rng
    }
}

/// Transforms the image; every other view is under a condition of a camera. The order of the random draws is part of [`VERSION`].
fn random_view(image: &RgbImage, rng: &mut ChaCha8Rng, size: u32) -> RgbImage {
    let view = transformed(image, rng, CROP_MIN, size);
    if rng.next_u32() & 1 == 1 { conditions::apply(view, rng) } else { view }
}

/// Crops to at least `crop_min` of the sides, flips with probability ½, rotates and jitters the colors. out: `size`×`size` pixels.
pub fn transformed(image: &RgbImage, rng: &mut ChaCha8Rng, crop_min: f32, size: u32) -> RgbImage {
    let (width, height) = (uniform(rng, crop_min, 1.0), uniform(rng, crop_min, 1.0));
    let (left, top) = (uniform(rng, 0.0, 1.0 - width), uniform(rng, 0.0, 1.0 - height));
    let mut view = crop(image, [left, top, width, height], size);
    if rng.next_u32() & 1 == 1 {
        imageops::flip_horizontal_in_place(&mut view);
    }
    let mut view = rotate(&view, uniform(rng, -ROTATION_MAX, ROTATION_MAX));
    ColorJitter::random(rng).apply(&mut view);
    view
}

/// Resizes a part of `image` to `size`×`size` pixels. The part is left, top, width and height as fractions of the image's
/// width and height.
pub fn crop(image: &RgbImage, [left, top, width, height]: [f32; 4], size: u32) -> RgbImage {
    let (full_width, full_height) = (f64::from(image.width()), f64::from(image.height()));
    let (width, height) = ((f64::from(width) * full_width).max(1.0), (f64::from(height) * full_height).max(1.0));
    let left = (f64::from(left) * full_width).min(full_width - width);
    let top = (f64::from(top) * full_height).min(full_height - height);
    let source = TypedImageRef::<U8x3>::from_buffer(image.width(), image.height(), image.as_raw())
        .expect("an RgbImage holds three bytes a pixel");
    let mut cropped = RgbImage::new(size, size);
    let mut view =
        TypedImage::<U8x3>::from_buffer(size, size, &mut cropped).expect("an RgbImage holds three bytes a pixel");
    let options =
        ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).crop(left, top, width, height);
    Resizer::new().resize_typed(&source, &mut view, &options).expect("the crop lies within the image");
    cropped
}

/// Rotates about the center by `angle` radians, counterclockwise, with bilinear sampling and reflection padding.
fn rotate(image: &RgbImage, angle: f32) -> RgbImage {
    let (width, height) = image.dimensions();
    let (center_x, center_y) = ((width - 1) as f32 / 2.0, (height - 1) as f32 / 2.0);
    let (sin, cos) = angle.sin_cos();
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = (x as f32 - center_x, y as f32 - center_y);
        let source_x = reflect(cos * x - sin * y + center_x, width);
        let source_y = reflect(sin * x + cos * y + center_y, height);
        sample_bilinear(image, source_x, source_y)
    })
}

/// Reflects a coordinate at 0 and `length − 1`.
fn reflect(coordinate: f32, length: u32) -> f32 {
    let last = (length - 1) as f32;
    (last - (last - coordinate.abs()).abs()).clamp(0.0, last)
}

/// Returns the bilinear interpolation at `(x, y)`; both lie within the image.
fn sample_bilinear(image: &RgbImage, x: f32, y: f32) -> Rgb<u8> {
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

/// Brightness, contrast, saturation and hue as one affine transform of RGB values.
struct ColorJitter {
    /// `out = matrix × in + offset`, on values 0–255.
    matrix: [[f32; 3]; 3],
    offset: f32,
}

impl ColorJitter {
    fn random(rng: &mut ChaCha8Rng) -> Self {
        let brightness = uniform(rng, 1.0 - JITTER_MAX, 1.0 + JITTER_MAX);
        let contrast = uniform(rng, 1.0 - JITTER_MAX, 1.0 + JITTER_MAX);
        let saturation = uniform(rng, 1.0 - 2.0 * JITTER_MAX, 1.0 + 2.0 * JITTER_MAX);
        ColorJitter::new(brightness, contrast, saturation, uniform(rng, -HUE_MAX, HUE_MAX))
    }

    /// Brightness, contrast and saturation are factors, `hue` is an angle in radians. Hue and saturation rotate and scale
    /// the I–Q plane of the YIQ color space (NTSC, 1953).
    fn new(brightness: f32, contrast: f32, saturation: f32, hue: f32) -> Self {
        const TO_YIQ: [[f32; 3]; 3] = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]];
        const FROM_YIQ: [[f32; 3]; 3] = [[1.0, 0.956, 0.619], [1.0, -0.272, -0.647], [1.0, -1.106, 1.703]];
        let (sin, cos) = hue.sin_cos();
        let rotation =
            [[1.0, 0.0, 0.0], [0.0, saturation * cos, -saturation * sin], [0.0, saturation * sin, saturation * cos]];
        let mut matrix = matmul(&FROM_YIQ, &matmul(&rotation, &TO_YIQ));
        matrix.iter_mut().flatten().for_each(|v| *v *= brightness * contrast);
        // Contrast leaves middle gray unchanged.
        ColorJitter { matrix, offset: 127.5 * (1.0 - contrast) }
    }

    fn apply(&self, image: &mut RgbImage) {
        for pixel in image.pixels_mut() {
            let [r, g, b] = pixel.0.map(f32::from);
            let channel = |row: &[f32; 3]| row[0] * r + row[1] * g + row[2] * b + self.offset + 0.5;
            pixel.0 = [0, 1, 2].map(|i| channel(&self.matrix[i]) as u8);
        }
    }
}

fn matmul(a: &[[f32; 3]; 3], b: &[[f32; 3]; 3]) -> [[f32; 3]; 3] {
    std::array::from_fn(|row| std::array::from_fn(|column| (0..3).map(|i| a[row][i] * b[i][column]).sum()))
}

/// Returns a uniform random value in `[low, high)` with 24 random bits.
pub fn uniform(rng: &mut ChaCha8Rng, low: f32, high: f32) -> f32 {
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
    fn view_depends_on_seed_content_and_index() {
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
    fn identity_transforms_leave_the_image_unchanged() {
        let image = gradient(40, 40);
        assert!(mean_difference(&crop(&image, [0.0, 0.0, 1.0, 1.0], 40), &image) < 0.1);
        assert_eq!(rotate(&image, 0.0), image);
        let mut jittered = image.clone();
        ColorJitter::new(1.0, 1.0, 1.0, 0.0).apply(&mut jittered);
        assert!(mean_difference(&jittered, &image) < 1.0);
    }

    #[test]
    fn rotation_crop_jitter_and_reflection_match_references() {
        let image = gradient(41, 41);
        let quarter = rotate(&image, std::f32::consts::FRAC_PI_2);
        assert!(
            mean_difference(&quarter, &imageops::rotate270(&image)) < 0.6,
            "rotated in the wrong direction or not at all"
        );
        let corner = crop(&image, [0.5, 0.5, 0.5, 0.5], 41);
        assert!(corner.get_pixel(0, 0).0[1] >= 120 && corner.get_pixel(40, 40).0[1] >= 245);
        let mut gray = RgbImage::from_pixel(1, 1, Rgb([100, 100, 100]));
        ColorJitter::new(1.2, 1.0, 0.0, 0.5).apply(&mut gray);
        assert!(gray.get_pixel(0, 0).0.iter().all(|v| (119..=121).contains(v)), "{gray:?}");
        assert_eq!((reflect(-2.0, 10), reflect(11.0, 10), reflect(4.5, 10)), (2.0, 7.0, 4.5));
    }
}
