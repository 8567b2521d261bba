//! Random conditions of a camera, for augmented views: light, colors, focus, motion, noise, compression and mounting.

use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::{Rgb, RgbImage, imageops};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use crate::train::data::augment::uniform;
use crate::train::optim::training_loop::random_below;
use crate::vision::decode;

/// A condition of a camera.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Noise,
    Dark,
    Dim,
    Overexposed,
    Warm,
    Cool,
    LowContrast,
    Defocused,
    Moving,
    Compressed,
    Gray,
    QuarterTurn,
    UpsideDown,
}

/// The conditions with the weights of their choice: those that cost the most accuracy are drawn more often.
const WEIGHTED: [(Condition, usize); 13] = [
    (Condition::Gray, 3),
    (Condition::Defocused, 2),
    (Condition::Moving, 2),
    (Condition::Dim, 2),
    (Condition::Noise, 1),
    (Condition::Dark, 1),
    (Condition::Overexposed, 1),
    (Condition::Warm, 1),
    (Condition::Cool, 1),
    (Condition::LowContrast, 1),
    (Condition::Compressed, 1),
    (Condition::QuarterTurn, 1),
    (Condition::UpsideDown, 1),
];

/// Applies one condition, or two of three times in ten. The image is square, about 224 pixels a side.
pub fn apply(mut image: RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
    let count = 1 + usize::from(random_below(rng, 10) < 3);
    for _ in 0..count {
        image = draw(rng).apply(image, rng);
    }
    image
}

/// Applies one condition that leaves everything where it is.
pub fn apply_upright(image: RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
    loop {
        let condition = draw(rng);
        if !matches!(condition, Condition::QuarterTurn | Condition::UpsideDown) {
            return condition.apply(image, rng);
        }
    }
}

fn draw(rng: &mut ChaCha8Rng) -> Condition {
    let total = WEIGHTED.iter().map(|(_, weight)| weight).sum();
    let mut at = random_below(rng, total);
    for (condition, weight) in WEIGHTED {
        match at.checked_sub(weight) {
            Some(rest) => at = rest,
            None => return condition,
        }
    }
    unreachable!("the weights sum to the total")
}

impl Condition {
    fn apply(self, mut image: RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
        match self {
            Condition::Noise => add_noise(&mut image, uniform(rng, 8.0, 30.0), rng),
            Condition::Dark => {
                let (light, gamma) = (uniform(rng, 90.0, 200.0), uniform(rng, 1.4, 2.4));
                map(&mut image, |value| light * (value / 255.0).powf(gamma));
            }
            Condition::Dim => {
                let light = uniform(rng, 0.15, 0.5);
                map(&mut image, |value| light * value);
                add_noise(&mut image, uniform(rng, 3.0, 10.0), rng);
            }
            Condition::Overexposed => {
                let (gain, offset) = (uniform(rng, 1.25, 1.9), uniform(rng, 0.0, 35.0));
                map(&mut image, |value| gain * value + offset);
            }
            Condition::Warm => scale_channels(&mut image, [uniform(rng, 1.05, 1.35), 1.0, uniform(rng, 0.55, 0.9)]),
            Condition::Cool => scale_channels(&mut image, [uniform(rng, 0.6, 0.9), 0.95, uniform(rng, 1.05, 1.4)]),
            Condition::LowContrast => {
                let (gain, mean) = (uniform(rng, 0.3, 0.7), uniform(rng, 100.0, 160.0));
                map(&mut image, |value| gain * (value - 128.0) + mean);
            }
            Condition::Defocused => return imageops::fast_blur(&image, uniform(rng, 0.8, 4.0)),
            Condition::Moving => {
                let (pixels, is_horizontal) = (4 + random_below(rng, 10), random_below(rng, 10) < 7);
                return blur_in_motion(&image, pixels as u32, is_horizontal);
            }
            Condition::Compressed => return compress(&image, 7 + random_below(rng, 23) as u8),
            Condition::Gray => {
                for pixel in image.pixels_mut() {
                    let [r, g, b] = pixel.0.map(f32::from);
                    // BT.601.
                    pixel.0 = [(0.299 * r + 0.587 * g + 0.114 * b) as u8; 3];
                }
            }
            Condition::QuarterTurn if random_below(rng, 2) == 0 => return imageops::rotate90(&image),
            Condition::QuarterTurn => return imageops::rotate270(&image),
            Condition::UpsideDown => return imageops::rotate180(&image),
        }
        image
    }
}

/// Replaces each value; the results are cut off at 0 and 255.
pub fn map(image: &mut RgbImage, value: impl Fn(f32) -> f32) {
    image.iter_mut().for_each(|old| *old = value(f32::from(*old)) as u8);
}

fn scale_channels(image: &mut RgbImage, gains: [f32; 3]) {
    for pixel in image.pixels_mut() {
        for (value, gain) in pixel.0.iter_mut().zip(gains) {
            *value = (f32::from(*value) * gain) as u8;
        }
    }
}

/// Adds noise of this standard deviation, in gray levels.
pub fn add_noise(image: &mut RgbImage, deviation: f32, rng: &mut ChaCha8Rng) {
    image.iter_mut().for_each(|value| *value = (f32::from(*value) + deviation * normal(rng)).round() as u8);
}

/// Returns a value that is about normally distributed: the sum of four uniform ones, scaled to the standard deviation 1.
pub fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let bits = rng.next_u64();
    let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xFFFF).sum();
    (sum as f32 / 65_536.0 - 2.0) * 3.0f32.sqrt()
}

/// Replaces each pixel by the mean of a line of `pixels` pixels around it.
fn blur_in_motion(image: &RgbImage, pixels: u32, is_horizontal: bool) -> RgbImage {
    let (width, height) = image.dimensions();
    RgbImage::from_fn(width, height, |x, y| {
        let mut sums = [0u32; 3];
        for step in 0..pixels {
            let along = |at: u32, length: u32| (at + step).saturating_sub(pixels / 2).min(length - 1);
            let (x, y) = if is_horizontal { (along(x, width), y) } else { (x, along(y, height)) };
            let pixel = image.get_pixel(x, y).0;
            sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += u32::from(value));
        }
        Rgb(sums.map(|sum| (sum / pixels) as u8))
    })
}

/// Compresses as JPEG of this quality, 1–100.
fn compress(image: &RgbImage, quality: u8) -> RgbImage {
    let mut jpeg = Vec::new();
    let encoder = JpegEncoder::new_with_quality(Cursor::new(&mut jpeg), quality);
    image.write_with_encoder(encoder).expect("an image in memory can be encoded");
    decode::encoded(&jpeg).expect("the encoder writes a valid JPEG")
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::SeedableRng;

    use super::*;
    use crate::vision::decode::tests::gradient;

    #[test]
    fn every_condition_changes_the_image_and_is_reproducible() {
        let image = gradient(64, 64);
        for (condition, _) in WEIGHTED {
            let apply = |seed| condition.apply(image.clone(), &mut ChaCha8Rng::seed_from_u64(seed));
            assert_ne!(apply(1), image, "{condition:?}");
            assert_eq!(apply(1), apply(1), "{condition:?}");
            assert_eq!(apply(1).dimensions(), (64, 64), "{condition:?}");
        }
    }

    #[test]
    fn all_conditions_are_drawn() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0; 13];
        for _ in 0..1700 {
            let drawn = draw(&mut rng);
            counts[WEIGHTED.iter().position(|(condition, _)| *condition == drawn).unwrap()] += 1;
        }
        assert!(counts[0] > 250 && counts.iter().all(|count| *count > 60), "{counts:?}");
    }

    #[test]
    fn motion_averages_along_a_line_and_noise_has_its_deviation() {
        let mut line = RgbImage::new(9, 1);
        line.put_pixel(4, 0, Rgb([90; 3]));
        let blurred: Vec<u8> = blur_in_motion(&line, 3, true).pixels().map(|pixel| pixel.0[0]).collect();
        assert_eq!(blurred, [0, 0, 0, 30, 30, 30, 0, 0, 0]);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let values: Vec<f32> = (0..10_000).map(|_| normal(&mut rng)).collect();
        let (mean, square) =
            (values.iter().sum::<f32>() / 1e4, values.iter().map(|value| value * value).sum::<f32>() / 1e4);
        assert!(mean.abs() < 0.05 && (square - 1.0).abs() < 0.05, "{mean} {square}");
    }
}
