//! Images that the trainer makes itself, of none of the classes: pictures of nothing (one color, gradients, noise, patches), training
//! images that are too dark, too blurred or mostly lost to show what they showed, and parts of images of none of the classes.
//!
//! An image depends on its content hash alone, which depends on the seed and on the image that it is made of.

use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

use crate::train::data::augment::uniform;
use crate::train::data::conditions::{add_noise, map, normal};
use crate::train::data::image_set::{ContentHash, HashedImage, Origin};
use crate::train::optim::training_loop::random_below;

/// Raise it when the same hash gives another image.
const VERSION: u32 = 1;
/// Width and height, in pixels.
const SIZE: u32 = 224;
/// One picture of nothing for this many training images, within the limits below.
const IMAGES_PER_NOTHING: usize = 10;
const NOTHING_MIN: usize = 10;
const NOTHING_MAX: usize = 300;
/// One degraded image for this many training images.
const IMAGES_PER_DEGRADED: usize = 5;

/// Returns a part of each image of none of the classes, which shows none of them either; the class stays.
pub fn parts(unknown: &[HashedImage], seed: u64) -> Vec<HashedImage> {
    let part = |image: &HashedImage| HashedImage {
        content_hash: derived_hash("part", VERSION, seed, &[&image.content_hash]),
        origin: Origin::Part,
        ..image.clone()
    };
    unknown.iter().map(part).collect()
}

/// Returns the generated images for these training images; `class` is their class.
pub fn images(train: &[HashedImage], seed: u64, class: usize) -> Vec<HashedImage> {
    let nothing = (train.len() / IMAGES_PER_NOTHING).clamp(NOTHING_MIN, NOTHING_MAX);
    let nothing = (0..nothing).map(|i| HashedImage {
        path: format!("generated/{i}").into(),
        class,
        content_hash: derived_hash("nothing", VERSION, seed, &[&i.to_le_bytes()]),
        origin: Origin::Nothing,
    });
    // Whether an image is taken depends on its content alone.
    let taken = train.iter().filter(|image| usize::from(image.content_hash[31]) % IMAGES_PER_DEGRADED == 0);
    let degraded = taken.map(|image| HashedImage {
        path: image.path.clone(),
        class,
        content_hash: derived_hash("degraded", VERSION, seed, &[&image.content_hash]),
        origin: Origin::Degraded,
    });
    nothing.chain(degraded).collect()
}

/// Returns the content hash of an image that is made of others: of its kind, the version of what makes it, the seed, and the parts
/// `of` which it is made.
pub fn derived_hash(kind: &str, version: u32, seed: u64, of: &[&[u8]]) -> ContentHash {
    let mut hash = Sha256::new();
    hash.update(format!("{kind} {version} {seed} "));
    of.iter().for_each(|part| hash.update(part));
    hash.finalize().into()
}

/// Returns a picture of nothing. out: 224×224×3 u8 RGB.
pub fn nothing(hash: &ContentHash) -> RgbImage {
    let rng = &mut ChaCha8Rng::from_seed(*hash);
    match random_below(rng, 4) {
        0 => {
            let color = random_color(rng);
            with_some_noise(RgbImage::from_pixel(SIZE, SIZE, color), rng)
        }
        1 => {
            let gradient = gradient(rng);
            with_some_noise(gradient, rng)
        }
        2 => noise(rng),
        _ => patches(rng),
    }
}

/// Returns a square part of an image, a quarter to two thirds of its shorter side. in, out: H×W×3 u8 RGB.
pub fn part(image: &RgbImage, hash: &ContentHash) -> RgbImage {
    let rng = &mut ChaCha8Rng::from_seed(*hash);
    let (width, height) = image.dimensions();
    let side = ((uniform(rng, 0.25, 0.67) * width.min(height) as f32) as u32).max(1);
    let left = random_below(rng, (width - side + 1) as usize) as u32;
    let top = random_below(rng, (height - side + 1) as usize) as u32;
    imageops::crop_imm(image, left, top, side, side).to_image()
}

/// Returns a version of an image that does not show any more what the image shows. in: H×W×3 u8 RGB; out: 224×224×3 u8 RGB.
pub fn degraded(image: &RgbImage, hash: &ContentHash) -> RgbImage {
    let rng = &mut ChaCha8Rng::from_seed(*hash);
    let mut image = imageops::resize(image, SIZE, SIZE, FilterType::Triangle);
    match random_below(rng, 3) {
        0 => {
            let light = uniform(rng, 0.005, 0.05);
            map(&mut image, |value| value * light);
            with_some_noise(image, rng)
        }
        1 => imageops::fast_blur(&image, uniform(rng, 10.0, 22.0)),
        _ => {
            let kept = (uniform(rng, 0.02, 0.15) * SIZE as f32) as u32;
            let gray = [0, 16, 64, 128, 128, 128][random_below(rng, 6)];
            let repeats = random_below(rng, 10) < 3;
            for y in kept..SIZE {
                for x in 0..SIZE {
                    let value = if repeats { *image.get_pixel(x, kept - 1) } else { Rgb([gray; 3]) };
                    image.put_pixel(x, y, value);
                }
            }
            image
        }
    }
}

fn random_color(rng: &mut ChaCha8Rng) -> Rgb<u8> {
    let mut value = || random_below(rng, 256) as u8;
    let color = [value(), value(), value()];
    // Gray, as a covered lens or a camera without a signal.
    if random_below(rng, 5) < 2 { Rgb([color[0]; 3]) } else { Rgb(color) }
}

/// A linear or radial gradient of two colors.
fn gradient(rng: &mut ChaCha8Rng) -> RgbImage {
    let (from, to) = (random_color(rng).0, random_color(rng).0);
    let (sin, cos) = uniform(rng, 0.0, std::f32::consts::TAU).sin_cos();
    let center = (random_below(rng, 3) == 0).then(|| [uniform(rng, 0.0, 1.0), uniform(rng, 0.0, 1.0)]);
    RgbImage::from_fn(SIZE, SIZE, |x, y| {
        let (x, y) = (x as f32 / SIZE as f32, y as f32 / SIZE as f32);
        let share = match center {
            Some([left, top]) => (x - left).hypot(y - top) / std::f32::consts::SQRT_2,
            None => ((x - 0.5) * cos + (y - 0.5) * sin) / std::f32::consts::SQRT_2 + 0.5,
        };
        let mix = |channel: usize| f32::from(from[channel]) * (1.0 - share) + f32::from(to[channel]) * share;
        Rgb([0, 1, 2].map(|channel| mix(channel) as u8))
    })
}

/// Noise of a random grain, colored or gray.
fn noise(rng: &mut ChaCha8Rng) -> RgbImage {
    let grains = SIZE >> random_below(rng, 6);
    let (mean, deviation) = (uniform(rng, 30.0, 225.0), uniform(rng, 10.0, 90.0));
    let is_gray = random_below(rng, 5) < 2;
    let image = RgbImage::from_fn(grains, grains, |_, _| {
        let mut value = || (mean + deviation * normal(rng)) as u8;
        let color = [value(), value(), value()];
        Rgb(if is_gray { [color[0]; 3] } else { color })
    });
    let filter = [FilterType::Nearest, FilterType::Triangle, FilterType::CatmullRom][random_below(rng, 3)];
    imageops::resize(&image, SIZE, SIZE, filter)
}

/// Rectangles of a few colors, sharp or blurred.
fn patches(rng: &mut ChaCha8Rng) -> RgbImage {
    let mut image = RgbImage::from_pixel(SIZE, SIZE, random_color(rng));
    for _ in 0..=random_below(rng, 5) {
        let color = random_color(rng);
        let mut range = || {
            let (a, b) = (random_below(rng, SIZE as usize) as u32, random_below(rng, SIZE as usize) as u32);
            a.min(b)..a.max(b)
        };
        let (columns, rows) = (range(), range());
        for y in rows {
            columns.clone().for_each(|x| image.put_pixel(x, y, color));
        }
    }
    if random_below(rng, 2) == 0 { imageops::fast_blur(&image, uniform(rng, 2.0, 20.0)) } else { image }
}

/// Adds the noise of a sensor to every other image.
fn with_some_noise(mut image: RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
    if random_below(rng, 2) == 0 {
        add_noise(&mut image, uniform(rng, 0.5, 6.0), rng);
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::decode::tests::gradient as test_image;

    #[test]
    fn images_depend_on_seed_and_content() {
        let file = |i: u8| HashedImage {
            path: i.to_string().into(),
            class: 0,
            content_hash: Sha256::digest([i]).into(),
            origin: Origin::File,
        };
        let train: Vec<HashedImage> = (0..=199).map(file).collect();
        let made = images(&train, 1, 7);
        assert_eq!(made, images(&train, 1, 7));
        assert!(made.iter().all(|image| image.class == 7 && image.origin != Origin::File));
        let degraded = made.iter().filter(|image| image.origin == Origin::Degraded).count();
        assert!(
            (20..=70).contains(&degraded) && made.len() == degraded + train.len() / IMAGES_PER_NOTHING,
            "{degraded}"
        );
        let hashes = |seed| images(&train, seed, 7).iter().map(|image| image.content_hash).collect::<Vec<_>>();
        assert!(hashes(1).iter().all(|hash| !hashes(2).contains(hash)));
    }

    #[test]
    fn every_hash_gives_another_image_of_the_size() {
        let source = test_image(90, 60);
        for i in 0..60u8 {
            let (hash, other) = ([i; 32], [i + 60; 32]);
            assert_eq!(nothing(&hash), nothing(&hash));
            assert_ne!(nothing(&hash), nothing(&other), "{i}");
            assert_eq!(nothing(&hash).dimensions(), (SIZE, SIZE));
            assert_eq!(degraded(&source, &hash).dimensions(), (SIZE, SIZE));
            let part = part(&source, &hash);
            assert!(part.width() == part.height() && (15..=40).contains(&part.width()), "{}", part.width());
        }
    }
}
