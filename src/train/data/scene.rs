//! Scenes: training images pasted on images of none of the classes, and these images alone, as the windows of a scanned frame show
//! them.
//!
//! A canvas is larger than the network's input. The map of the frozen layers is computed once for it, and windows are cut out of the
//! map, so that their features are those of a scanned frame. A canvas depends on the content hash of its scene, which names both
//! images and the seed, on its index, and on the sizes of the network.

use image::imageops::{self, FilterType};
use image::{GrayImage, Luma, Rgb, RgbImage};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::train::data::augment::{self, uniform};
use crate::train::data::conditions;
use crate::train::data::generated::derived_hash;
use crate::train::data::image_set::{ContentHash, HashedImage, Origin};
use crate::train::optim::training_loop::random_below;

/// Raise it when the same images and seed give another canvas.
const VERSION: u32 = 1;
/// Positions of a canvas' map besides those of a window.
const MARGIN: usize = 4;
/// Windows that are cut out of a canvas with a flower, and out of one without.
const FLOWER_WINDOWS: usize = 2;
const BACKGROUND_WINDOWS: usize = 3;
/// Side of a pasted image, as a share of a window.
const FLOWER_SIZE: [f32; 2] = [0.35, 1.15];
/// Smallest share of a pasted image's sides that is kept.
const FLOWER_CROP_MIN: f32 = 0.8;
/// Sharpest and most blurred edge of a mask, as a share of its side.
const EDGE: [f32; 2] = [0.01, 0.1];
/// Width and height of a frame, in strides of the fine canvas: about 16:9.
const FRAME_ASPECT: f32 = 25.0 / 14.0;

/// The sizes of a network's input and map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Width and height of the network's input, in pixels.
    pub size: u32,
    /// Width and height of its map, in positions.
    pub window: usize,
}

/// A composed image, with the windows to cut out of its map.
pub struct Canvas {
    /// Its pixels.
    pub image: RgbImage,
    /// First row and column of each window, in positions of the map.
    pub windows: Vec<[usize; 2]>,
}

impl Geometry {
    /// Returns the positions of a canvas' map, a side.
    pub fn canvas_positions(self) -> usize {
        self.window + MARGIN
    }

    /// Returns the side of a canvas, in pixels.
    pub fn canvas_size(self) -> u32 {
        self.size + MARGIN as u32 * self.stride()
    }

    fn stride(self) -> u32 {
        self.size / self.window as u32
    }
}

/// Returns a scene for each of `images` on one of `backgrounds`, which come from several sources; each source is taken equally often.
pub fn scenes(images: &[HashedImage], backgrounds: &[Vec<HashedImage>], seed: u64) -> Vec<HashedImage> {
    let scene = |image: &HashedImage| {
        let background = choose(backgrounds, &derived_hash("background of", VERSION, seed, &[&image.content_hash]));
        HashedImage {
            content_hash: derived_hash("scene", VERSION, seed, &[&image.content_hash, &background.content_hash]),
            origin: Origin::Scene { background: background.path.as_path().into() },
            ..image.clone()
        }
    };
    images.iter().map(scene).collect()
}

/// Splits images by their content alone: about four in five for scenes to train with, the others for scenes to calibrate with.
pub fn hold_out(images: Vec<HashedImage>) -> (Vec<HashedImage>, Vec<HashedImage>) {
    images.into_iter().partition(|image| image.content_hash[29] % 5 != 0)
}

/// Returns `count` scenes without any of the classes, each on one of `backgrounds`, whose class they have.
pub fn empty_scenes(count: usize, backgrounds: &[Vec<HashedImage>], seed: u64) -> Vec<HashedImage> {
    let scene = |i: usize| {
        let background = choose(backgrounds, &derived_hash("background", VERSION, seed, &[&i.to_le_bytes()]));
        let content_hash = derived_hash("empty scene", VERSION, seed, &[&i.to_le_bytes(), &background.content_hash]);
        HashedImage { content_hash, origin: Origin::EmptyScene, ..background.clone() }
    };
    (0..count).map(scene).collect()
}

/// Chooses a source, and one of its images.
fn choose<'a>(backgrounds: &'a [Vec<HashedImage>], hash: &ContentHash) -> &'a HashedImage {
    let rng = &mut ChaCha8Rng::from_seed(*hash);
    let source = &backgrounds[random_below(rng, backgrounds.len())];
    &source[random_below(rng, source.len())]
}

/// Returns the windows that are cut out of each canvas of an image.
pub fn windows_per_canvas(origin: &Origin) -> usize {
    if matches!(origin, Origin::Scene { .. }) { FLOWER_WINDOWS } else { BACKGROUND_WINDOWS }
}

/// Returns canvas `index` of an image: its flower on `background`, or, without one, a part of the image itself.
pub fn canvas(
    image: &RgbImage,
    background: Option<&RgbImage>,
    hash: &ContentHash,
    index: usize,
    sizes: Geometry,
) -> Canvas {
    let rng = &mut ChaCha8Rng::from_seed(*hash);
    rng.set_stream(index as u64);
    match background {
        Some(background) => flower_canvas(image, background, rng, sizes),
        None => {
            let image = with_condition(part(image, rng, sizes.canvas_size()), rng);
            let any = |rng: &mut ChaCha8Rng| [random_below(rng, MARGIN + 1), random_below(rng, MARGIN + 1)];
            Canvas { image, windows: (0..BACKGROUND_WINDOWS).map(|_| any(rng)).collect() }
        }
    }
}

fn flower_canvas(image: &RgbImage, background: &RgbImage, rng: &mut ChaCha8Rng, sizes: Geometry) -> Canvas {
    let canvas_size = sizes.canvas_size();
    let mut canvas = part(background, rng, canvas_size);
    let side = (sizes.size as f32 * uniform(rng, FLOWER_SIZE[0], FLOWER_SIZE[1])) as u32;
    let side = side.clamp(1, canvas_size);
    let mut flower = augment::transformed(image, rng, FLOWER_CROP_MIN, side);
    // Flower and background are equally sharp.
    if random_below(rng, 10) < 3 {
        let blur = uniform(rng, 0.4, 1.4);
        (flower, canvas) = (imageops::fast_blur(&flower, blur), imageops::fast_blur(&canvas, blur));
    }
    let at = [0; 2].map(|_: u32| random_below(rng, (canvas_size - side + 1) as usize) as u32);
    let mask = mask(&flower, rng);
    paste(&mut canvas, &flower, &mask, at);
    let image = with_condition(canvas, rng);
    // A window is centered on the flower as nearly as the positions allow, and a little beside it.
    let centered = |from: u32, jitter: f32| {
        let center = (from as f32 + side as f32 / 2.0) / sizes.stride() as f32 - sizes.window as f32 / 2.0;
        (center + jitter).round().clamp(0.0, MARGIN as f32) as usize
    };
    let mut window = |_| {
        let jitter = 0.6_f32.max(0.35 * (sizes.window as f32 - side as f32 / sizes.stride() as f32));
        let [left, top] = at;
        [centered(top, uniform(rng, -jitter, jitter)), centered(left, uniform(rng, -jitter, jitter))]
    };
    let windows = (0..FLOWER_WINDOWS).map(&mut window).collect();
    Canvas { image, windows }
}

/// Returns a frame of about 16:9 with the flower on it, `share` of its height, as a camera sees it; for calibration. Its height is
/// twice the network's input.
pub fn frame(image: &RgbImage, background: &RgbImage, share: f32, hash: &ContentHash, sizes: Geometry) -> RgbImage {
    let rng = &mut ChaCha8Rng::from_seed(*hash);
    let mut frame = empty_frame(background, rng, sizes);
    let side = (share * frame.height() as f32) as u32;
    let flower = imageops::resize(image, side, side, FilterType::CatmullRom);
    let at = [frame.width() - side, frame.height() - side].map(|rest| random_below(rng, rest as usize + 1) as u32);
    paste(&mut frame, &flower, &mask(&flower, rng), at);
    frame
}

/// Returns a frame as [`frame`] does, without a flower.
pub fn empty_frame(background: &RgbImage, rng: &mut ChaCha8Rng, sizes: Geometry) -> RgbImage {
    let height = 2 * sizes.size;
    let width = (height as f32 * FRAME_ASPECT) as u32;
    let scale = (width as f32 / background.width() as f32).max(height as f32 / background.height() as f32);
    let covering = |side: u32, least: u32| ((side as f32 * scale).ceil() as u32).max(least);
    let (full_width, full_height) = (covering(background.width(), width), covering(background.height(), height));
    let full = imageops::resize(background, full_width, full_height, FilterType::CatmullRom);
    let [left, top] =
        [full_width - width, full_height - height].map(|rest| random_below(rng, rest as usize + 1) as u32);
    imageops::crop_imm(&full, left, top, width, height).to_image()
}

/// Returns a size of a flower in a range, as a share of a frame's height, which depends on the hash alone.
pub fn flower_share([low, high]: [f32; 2], hash: &ContentHash) -> f32 {
    let rng = &mut ChaCha8Rng::from_seed(*hash);
    rng.set_stream(1);
    uniform(rng, low, high)
}

/// Returns a square part of an image, mirrored with probability ½, as `size`×`size` pixels.
fn part(image: &RgbImage, rng: &mut ChaCha8Rng, size: u32) -> RgbImage {
    let (width, height) = (image.width() as f32, image.height() as f32);
    let side = uniform(rng, 0.35, 1.0) * width.min(height);
    let (left, top) = (uniform(rng, 0.0, width - side), uniform(rng, 0.0, height - side));
    let mut part = augment::crop(image, [left / width, top / height, side / width, side / height], size);
    if rng.next_u32() & 1 == 1 {
        imageops::flip_horizontal_in_place(&mut part);
    }
    part
}

/// Returns the image, four times in ten under a condition of a camera.
fn with_condition(image: RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
    if random_below(rng, 10) < 4 { conditions::apply_upright(image, rng) } else { image }
}

fn paste(canvas: &mut RgbImage, flower: &RgbImage, mask: &GrayImage, [left, top]: [u32; 2]) {
    for (x, y, Luma([share])) in mask.enumerate_pixels() {
        let (above, share) = (flower.get_pixel(x, y).0, f32::from(*share) / 255.0);
        let Rgb(below) = canvas.get_pixel_mut(left + x, top + y);
        for (below, above) in below.iter_mut().zip(above) {
            *below = (f32::from(*below) * (1.0 - share) + f32::from(above) * share) as u8;
        }
    }
}

/// Returns a mask of one of three kinds: the whole rectangle, an ellipse, or what differs from the image's border.
fn mask(flower: &RgbImage, rng: &mut ChaCha8Rng) -> GrayImage {
    let side = flower.width();
    let edge = (uniform(rng, EDGE[0], EDGE[1]) * side as f32).max(0.5);
    match random_below(rng, 4) {
        0 => GrayImage::from_pixel(side, side, Luma([255])),
        1 => imageops::fast_blur(&foreground(flower), edge.min(0.03 * side as f32).max(0.5)),
        _ => {
            let radius = side as f32 / 2.0;
            let inner = radius - 1.3 * edge;
            let inside = |x: u32, y: u32| (x as f32 + 0.5 - radius).hypot(y as f32 + 0.5 - radius) < inner;
            let ellipse = GrayImage::from_fn(side, side, |x, y| Luma([if inside(x, y) { 255 } else { 0 }]));
            imageops::fast_blur(&ellipse, edge)
        }
    }
}

/// Returns what differs most in color from the border of an image and lies near its middle; the whole image if that is too little or
/// nearly everything.
fn foreground(image: &RgbImage) -> GrayImage {
    let side = image.width();
    let border = (side / 12).max(1);
    let is_border = |x: u32, y: u32| x.min(y) < border || x.max(y) >= side - border;
    let outside: Vec<[f32; 3]> =
        image.enumerate_pixels().filter(|(x, y, _)| is_border(*x, *y)).map(|(_, _, Rgb(c))| c.map(f32::from)).collect();
    let count = outside.len() as f32;
    let mean = [0, 1, 2].map(|c: usize| outside.iter().map(|color| color[c]).sum::<f32>() / count);
    let variance =
        [0, 1, 2].map(|c: usize| outside.iter().map(|color| (color[c] - mean[c]).powi(2)).sum::<f32>() / count + 100.0);
    let difference = |(x, y, Rgb(color)): (u32, u32, &Rgb<u8>)| {
        let distance: f32 = (0..3).map(|c| (f32::from(color[c]) - mean[c]).powi(2) / variance[c]).sum();
        let [dx, dy] = [x, y].map(|at| (at as f32 + 0.5) / side as f32 - 0.5);
        distance * (-(dx * dx + dy * dy) / 0.16).exp()
    };
    let differences: Vec<f32> = image.enumerate_pixels().map(difference).collect();
    let limit = differences.iter().sum::<f32>() / differences.len() as f32;
    let kept = differences.iter().filter(|difference| **difference > limit).count();
    let share = kept as f32 / differences.len() as f32;
    let is_plausible = (0.1..0.8).contains(&share);
    let value = |x: u32, y: u32| !is_plausible || differences[(y * side + x) as usize] > limit;
    GrayImage::from_fn(side, side, |x, y| Luma([if value(x, y) { 255 } else { 0 }]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::decode::tests::gradient;

    const SIZES: Geometry = Geometry { size: 64, window: 8 };

    #[test]
    fn a_canvas_depends_on_hash_and_index_and_its_windows_lie_on_the_map() {
        let (flower, background) = (RgbImage::from_pixel(60, 40, Rgb([250, 10, 10])), gradient(90, 70));
        let canvas = |background: Option<&RgbImage>, seed: u8, index: usize| {
            let Canvas { image, windows } = canvas(&flower, background, &[seed; 32], index, SIZES);
            assert_eq!(image.dimensions(), (96, 96));
            assert!(windows.iter().flatten().all(|position| *position <= MARGIN), "{windows:?}");
            (image, windows)
        };
        assert_eq!(SIZES.canvas_positions(), 12);
        for background in [Some(&background), None] {
            assert_eq!(canvas(background, 1, 0), canvas(background, 1, 0));
        }
        assert_ne!(canvas(Some(&background), 1, 0), canvas(Some(&background), 1, 1));
        assert_ne!(canvas(Some(&background), 1, 0), canvas(Some(&background), 2, 0));
    }

    #[test]
    fn a_mask_of_what_differs_from_the_border_is_the_flower() {
        let (red, green) = (Rgb([220, 20, 30]), Rgb([30, 120, 40]));
        let is_flower = |x: u32, y: u32| (x as f32 - 30.0).hypot(y as f32 - 32.0) < 18.0;
        let image = RgbImage::from_fn(64, 64, |x, y| if is_flower(x, y) { red } else { green });
        let mask = foreground(&image);
        let right =
            mask.enumerate_pixels().filter(|(x, y, Luma([value]))| (*value == 255) == is_flower(*x, *y)).count();
        assert!(right > 64 * 64 * 97 / 100, "{right} of 4096 pixels");
        let whole = foreground(&RgbImage::from_pixel(64, 64, green));
        assert!(whole.pixels().all(|Luma([value])| *value == 255));
    }

    #[test]
    fn a_frame_shows_the_flower_in_its_size() {
        let flower = RgbImage::from_pixel(64, 64, Rgb([250, 0, 0]));
        let background = RgbImage::from_pixel(64, 64, Rgb([0, 0, 250]));
        let frame = frame(&flower, &background, 0.5, &[3; 32], SIZES);
        assert_eq!(frame.dimensions(), (228, 128));
        let red = frame.pixels().filter(|pixel| pixel.0[0] > 125).count();
        assert!((64 * 64 / 2..=64 * 64).contains(&red), "{red} pixels");
    }

    #[test]
    fn scenes_take_each_source_of_grounds_equally_often() {
        let image = |name: &str, n: u8, class: usize| HashedImage {
            path: format!("{name}/{n}").into(),
            class,
            content_hash: [n; 32],
            origin: Origin::File,
        };
        let many: Vec<HashedImage> = (0..90).map(|n| image("many", n, 2)).collect();
        let backgrounds = [many, vec![image("few", 100, 2)]];
        let flowers: Vec<HashedImage> = (0..200).map(|n| image("flowers", n, 1)).collect();
        let all = scenes(&flowers, &backgrounds, 1);
        let on_few = |scene: &&HashedImage| matches!(&scene.origin, Origin::Scene { background } if background.starts_with("few"));
        let count = all.iter().filter(on_few).count();
        assert!((70..130).contains(&count), "{count} of 200");
        assert!(all.iter().all(|scene| scene.class == 1 && scene.content_hash != [1; 32]));
        assert_eq!(all, scenes(&flowers, &backgrounds, 1));
        let empty = empty_scenes(10, &backgrounds, 1);
        assert!(empty.iter().all(|scene| scene.class == 2 && scene.origin == Origin::EmptyScene));
    }
}
