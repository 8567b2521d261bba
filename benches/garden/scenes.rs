//! Frames of a garden: flowers before other things, conditions of a camera, and pictures of nothing.

use std::io::Cursor;

use bloomcast::vision::Region;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};
use image::{GrayImage, Luma, Rgb, RgbImage};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

/// Width and height of a frame, in pixels.
const FRAME: (u32, u32) = (1280, 720);
/// Side of an image under a condition, in pixels.
const CONDITION_SIDE: u32 = 448;

/// The conditions of a camera, with the strengths in [`under`].
pub const CONDITIONS: [&str; 13] = [
    "noise", "dark", "dim", "over", "warm", "cool", "contrast", "defocus", "motion", "jpeg", "gray", "quarter",
    "upside",
];

fn uniform(rng: &mut ChaCha8Rng, low: f32, high: f32) -> f32 {
    low + (high - low) * (rng.next_u32() >> 8) as f32 / (1 << 24) as f32
}

/// Adds about normally distributed noise.
pub fn add_noise(image: &mut RgbImage, deviation: f32, rng: &mut ChaCha8Rng) {
    for value in image.iter_mut() {
        let sum: f32 = (0..6).map(|_| uniform(rng, -0.5, 0.5)).sum();
        *value = (f32::from(*value) + deviation * sum * std::f32::consts::SQRT_2) as u8;
    }
}

fn map(image: &mut RgbImage, value: impl Fn(f32) -> f32) {
    image.iter_mut().for_each(|old| *old = value(f32::from(*old)) as u8);
}

/// Returns a scene of 1280×720 pixels: `background` fills it, and the flower covers the given share of its height, behind a mask of one of
/// three kinds. The second value is the place of the flower.
pub fn scene(
    background: &RgbImage,
    flower: Option<(RgbImage, f32)>,
    rng: &mut ChaCha8Rng,
) -> (RgbImage, Option<Region>) {
    let (width, height) = FRAME;
    let scale = (width as f32 / background.width() as f32).max(height as f32 / background.height() as f32);
    let covering = |side: u32, least: u32| ((side as f32 * scale).ceil() as u32).max(least);
    let (full_width, full_height) = (covering(background.width(), width), covering(background.height(), height));
    let full = imageops::resize(background, full_width, full_height, FilterType::CatmullRom);
    let left = uniform(rng, 0.0, (full_width - width + 1) as f32) as u32;
    let top = uniform(rng, 0.0, (full_height - height + 1) as f32) as u32;
    let mut frame = imageops::crop_imm(&full, left, top, width, height).to_image();
    let mut place = None;
    if let Some((flower, size)) = flower {
        let side = (size * height as f32) as u32;
        let flower = imageops::resize(&flower, side, side, FilterType::CatmullRom);
        let mask = mask(side, rng);
        let left = uniform(rng, 0.0, (width - side + 1) as f32) as u32;
        let top = uniform(rng, 0.0, (height - side + 1) as f32) as u32;
        let bounds = [left as f32 / width as f32, top as f32 / height as f32];
        let sides = [side as f32 / width as f32, side as f32 / height as f32];
        place = Some(Region::new([bounds[0], bounds[1], sides[0], sides[1]]).unwrap());
        for (x, y, Luma([share])) in mask.enumerate_pixels() {
            let (below, above) = (*frame.get_pixel(left + x, top + y), *flower.get_pixel(x, y));
            let share = f32::from(*share) / 255.0;
            let mix = |c: usize| f32::from(below.0[c]) * (1.0 - share) + f32::from(above.0[c]) * share;
            frame.put_pixel(left + x, top + y, Rgb([0, 1, 2].map(|c| mix(c) as u8)));
        }
    }
    (frame, place)
}

/// A star with rounded corners, a superellipse, or a rectangle without a corner; with a soft edge.
fn mask(side: u32, rng: &mut ChaCha8Rng) -> GrayImage {
    let kind = rng.next_u32() % 3;
    let (phase, lobes) = (uniform(rng, 0.0, std::f32::consts::TAU), 5.0 + (rng.next_u32() % 8) as f32);
    let mask = GrayImage::from_fn(side, side, |x, y| {
        let (x, y) = (x as f32 / side as f32 * 2.0 - 1.0, y as f32 / side as f32 * 2.0 - 1.0);
        let inside = match kind {
            0 => x.hypot(y) < 0.88 + 0.1 * (lobes * y.atan2(x) + phase).sin(),
            1 => x.abs().powi(4) + y.abs().powi(4) < 0.9,
            _ => x.abs().max(y.abs()) < 0.97 && x * phase.cos() + y * phase.sin() < 1.05,
        };
        Luma([if inside { 255 } else { 0 }])
    });
    imageops::fast_blur(&mask, (side as f32 * 0.01).max(0.5))
}

/// Returns the whole image for part 0, and a random square of 40 to 90 % of its shorter side for others.
pub fn part(image: &RgbImage, part: usize, rng: &mut ChaCha8Rng) -> RgbImage {
    if part == 0 {
        return image.clone();
    }
    let (width, height) = image.dimensions();
    let side = (uniform(rng, 0.4, 0.9) * width.min(height) as f32) as u32;
    let left = uniform(rng, 0.0, (width - side) as f32) as u32;
    let top = uniform(rng, 0.0, (height - side) as f32) as u32;
    imageops::crop_imm(image, left, top, side, side).to_image()
}

/// Returns the image in this share of its light.
pub fn darkened(image: &RgbImage, light: f32) -> RgbImage {
    let mut image = image.clone();
    map(&mut image, |value| light * value);
    image
}

/// Returns the image enlarged to 640 pixels a side, blurred with a standard deviation of 40.
pub fn defocused(image: &RgbImage) -> RgbImage {
    imageops::fast_blur(&imageops::resize(image, 640, 640, FilterType::CatmullRom), 40.0)
}

/// Returns the image with its lower nine tenths gray.
pub fn lost(image: &RgbImage) -> RgbImage {
    let height = image.height();
    RgbImage::from_fn(
        image.width(),
        height,
        |x, y| {
            if y < height / 10 { *image.get_pixel(x, y) } else { Rgb([128; 3]) }
        },
    )
}

/// Returns a picture of one color, a gradient, or noise, of 640×480 pixels.
pub fn nothing(kind: &str, i: usize, rng: &mut ChaCha8Rng) -> RgbImage {
    const COLORS: [[u8; 3]; 10] = [
        [0; 3],
        [255; 3],
        [128; 3],
        [220, 20, 20],
        [20, 200, 30],
        [20, 30, 210],
        [240, 220, 20],
        [200, 20, 200],
        [20, 200, 200],
        [120, 70, 20],
    ];
    let (width, height) = (640, 480);
    match kind {
        "ten colors" => RgbImage::from_pixel(width, height, Rgb(COLORS[i])),
        "gradients" => {
            let [from, to] = [0, 1].map(|_| [0, 1, 2].map(|_| uniform(rng, 0.0, 256.0)));
            let horizontal = uniform(rng, 0.0, 1.0);
            RgbImage::from_fn(width, height, |x, y| {
                let share = horizontal * x as f32 / width as f32 + (1.0 - horizontal) * y as f32 / height as f32;
                Rgb([0, 1, 2].map(|c: usize| (from[c] * (1.0 - share) + to[c] * share) as u8))
            })
        }
        _ => {
            let grain = 1 << (i % 5);
            let mut noise = RgbImage::from_pixel(width / grain, height / grain, Rgb([128; 3]));
            add_noise(&mut noise, uniform(rng, 20.0, 90.0), rng);
            imageops::resize(&noise, width, height, FilterType::Triangle)
        }
    }
}

/// Returns the image, enlarged to 448 pixels a side, under a condition of a camera.
pub fn under(condition: &str, image: &RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
    let mut image = imageops::resize(image, CONDITION_SIDE, CONDITION_SIDE, FilterType::CatmullRom);
    match condition {
        "noise" => add_noise(&mut image, 25.0, rng),
        "dark" => map(&mut image, |value| 127.0 * (value / 255.0).powf(2.2)),
        "dim" => {
            map(&mut image, |value| 0.25 * value);
            add_noise(&mut image, 8.0, rng);
        }
        "over" => map(&mut image, |value| 1.6 * value + 20.0),
        "warm" | "cool" => {
            let gains = if condition == "warm" { [1.25, 1.0, 0.65] } else { [0.7, 0.95, 1.3] };
            for pixel in image.pixels_mut() {
                pixel.0.iter_mut().zip(gains).for_each(|(value, gain)| *value = (f32::from(*value) * gain) as u8);
            }
        }
        "contrast" => map(&mut image, |value| 0.4 * (value - 128.0) + 140.0),
        "defocus" => return imageops::blur(&image, 6.0),
        "motion" => return motion(&image, 21),
        "jpeg" => {
            let mut jpeg = Vec::new();
            image.write_with_encoder(JpegEncoder::new_with_quality(Cursor::new(&mut jpeg), 10)).unwrap();
            return bloomcast::vision::decode::encoded(&jpeg).unwrap();
        }
        "gray" => {
            for pixel in image.pixels_mut() {
                let [r, g, b] = pixel.0.map(f32::from);
                pixel.0 = [(0.299 * r + 0.587 * g + 0.114 * b) as u8; 3];
            }
        }
        "quarter" => return imageops::rotate90(&image),
        "upside" => return imageops::rotate180(&image),
        _ => panic!("there is no condition {condition}"),
    }
    image
}

/// Returns the mean of `pixels` neighbors in a row.
fn motion(image: &RgbImage, pixels: u32) -> RgbImage {
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let at = |step: u32| image.get_pixel((x + step).saturating_sub(pixels / 2).min(image.width() - 1), y).0;
        let sum = (0..pixels).map(at).fold([0u32; 3], |sum, pixel| [0, 1, 2].map(|c| sum[c] + u32::from(pixel[c])));
        Rgb(sum.map(|sum| (sum / pixels) as u8))
    })
}
