//! Drawn pictures for the demo where no photographs are available: twelve kinds of flowers, and scenes without a flower. Each
//! picture is determined by a random generator, so that a seed reproduces it.

use std::fs;
use std::path::Path;

use fastrand::Rng;
use image::{ImageResult, Rgb, RgbImage};

/// Width and height of a picture, in pixels.
pub const SIDE: u32 = 256;

/// A color with channels 0–1.
type Color = [f32; 3];

/// The form of a flower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Five pointed petals.
    Star,
    /// Many narrow petals around a large center.
    Wheel,
    /// Four broad, rounded petals.
    Cup,
    /// Many small blossoms.
    Cluster,
}

/// A kind of drawn flower: a form in a color.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kind {
    /// Its name, which is its class.
    pub name: &'static str,
    form: Form,
    petals: Color,
    center: Color,
}

const fn kind(name: &'static str, form: Form, petals: Color, center: Color) -> Kind {
    Kind { name, form, petals, center }
}

const WHITE: Color = [0.95, 0.94, 0.9];
const YELLOW: Color = [0.98, 0.8, 0.1];
const RED: Color = [0.85, 0.1, 0.15];
const VIOLET: Color = [0.5, 0.25, 0.8];
const BROWN: Color = [0.3, 0.17, 0.08];

/// The kinds, sorted by name.
pub const KINDS: [Kind; 12] = [
    kind("red-cluster", Form::Cluster, RED, YELLOW),
    kind("red-cup", Form::Cup, RED, BROWN),
    kind("red-star", Form::Star, RED, YELLOW),
    kind("violet-cluster", Form::Cluster, VIOLET, WHITE),
    kind("violet-star", Form::Star, VIOLET, YELLOW),
    kind("violet-wheel", Form::Wheel, VIOLET, YELLOW),
    kind("white-cluster", Form::Cluster, WHITE, YELLOW),
    kind("white-cup", Form::Cup, WHITE, YELLOW),
    kind("white-wheel", Form::Wheel, WHITE, YELLOW),
    kind("yellow-cup", Form::Cup, YELLOW, BROWN),
    kind("yellow-star", Form::Star, YELLOW, BROWN),
    kind("yellow-wheel", Form::Wheel, YELLOW, BROWN),
];

/// Returns five kinds to draw in place of photographs of the built-in model's classes, with the names of these classes.
pub fn five_flowers() -> [(&'static str, &'static Kind); 5] {
    let kinds = [
        ("daisy", "white-wheel"),
        ("dandelion", "yellow-star"),
        ("roses", "red-cluster"),
        ("sunflowers", "yellow-wheel"),
        ("tulips", "red-cup"),
    ];
    kinds.map(|(class, name)| (class, KINDS.iter().find(|kind| kind.name == name).expect("a name in KINDS")))
}

/// A flower's place in a picture.
struct Pose {
    /// Center, in pixels.
    center: (f32, f32),
    /// Length of a petal, in pixels.
    radius: f32,
    /// Rotation, in radians.
    rotation: f32,
    /// Ratio of the visible height to the width: below 1 the flower is seen at an angle.
    squash: f32,
    /// Small blossoms of a cluster: offset from the center and radius, relative to `radius`.
    blossoms: Vec<(f32, f32, f32)>,
}

/// Draws a flower on a meadow.
pub fn flower(kind: &Kind, rng: &mut Rng) -> RgbImage {
    let mut picture = scene(rng);
    let pose = Pose::random(rng);
    let light = between(rng, 0.75, 1.1);
    stem(&mut picture, &pose, light);
    let petals = kind.petals.map(|channel| channel + between(rng, -0.06, 0.06));
    for (x, y, pixel) in picture.enumerate_pixels_mut() {
        if let Some(color) = pose.color(kind, petals, x as f32, y as f32) {
            *pixel = to_rgb(color, light * between(rng, 0.96, 1.04));
        }
    }
    picture
}

/// Writes `count` drawings of each kind to `folder`, which exists, in a new subfolder with the name of its class.
///
/// # Errors
/// If a subfolder or a file cannot be written.
pub fn dataset<'a>(
    folder: &Path,
    classes: impl IntoIterator<Item = (&'a str, &'a Kind)>,
    count: usize,
    rng: &mut Rng,
) -> ImageResult<()> {
    for (class, kind) in classes {
        fs::create_dir(folder.join(class))?;
        for i in 0..count {
            flower(kind, rng).save(folder.join(class).join(format!("{i:02}.jpg")))?;
        }
    }
    Ok(())
}

/// Draws a meadow, a wall or a sky without a flower.
pub fn scene(rng: &mut Rng) -> RgbImage {
    let grounds: [(Color, Color); 4] = [
        ([0.18, 0.35, 0.12], [0.35, 0.5, 0.2]),
        ([0.4, 0.32, 0.22], [0.25, 0.4, 0.15]),
        ([0.55, 0.68, 0.85], [0.25, 0.42, 0.18]),
        ([0.5, 0.48, 0.45], [0.35, 0.33, 0.3]),
    ];
    let (top, bottom) = grounds[rng.usize(..grounds.len())];
    let light = between(rng, 0.6, 1.05);
    let mut picture = RgbImage::from_fn(SIDE, SIDE, |_, y| {
        let share = y as f32 / SIDE as f32;
        to_rgb(std::array::from_fn(|i| top[i] * (1.0 - share) + bottom[i] * share), light * between(rng, 0.9, 1.1))
    });
    // Leaves and stones: ellipses in shades of the ground.
    for _ in 0..rng.usize(20..60) {
        let (x, y) = (between(rng, 0.0, SIDE as f32), between(rng, 0.0, SIDE as f32));
        let (length, width) = (between(rng, 6.0, 40.0), between(rng, 2.0, 12.0));
        let (sine, cosine) = between(rng, 0.0, std::f32::consts::PI).sin_cos();
        let shade = between(rng, 0.6, 1.3) * light;
        let color = if rng.bool() { top } else { bottom };
        let reach = length as i32 + 1;
        for (dx, dy) in (-reach..=reach).flat_map(|dx| (-reach..=reach).map(move |dy| (dx as f32, dy as f32))) {
            let (along, across) = ((dx * cosine + dy * sine) / length, (dy * cosine - dx * sine) / width);
            if along * along + across * across <= 1.0 {
                put(&mut picture, x + dx, y + dy, to_rgb(color, shade));
            }
        }
    }
    picture
}

impl Pose {
    fn random(rng: &mut Rng) -> Self {
        let side = SIDE as f32;
        let blossoms = (0..rng.usize(22..34)).map(|_| {
            let (angle, distance) = (between(rng, 0.0, std::f32::consts::TAU), between(rng, 0.0, 1.0).sqrt());
            (0.8 * distance * angle.cos(), 0.8 * distance * angle.sin(), between(rng, 0.13, 0.2))
        });
        let blossoms = blossoms.collect();
        Pose {
            center: (side * between(rng, 0.4, 0.6), side * between(rng, 0.38, 0.58)),
            radius: side * between(rng, 0.26, 0.42),
            rotation: between(rng, 0.0, std::f32::consts::TAU),
            squash: between(rng, 0.75, 1.0),
            blossoms,
        }
    }

    /// Returns the flower's color at a pixel; `None` beside the flower.
    fn color(&self, kind: &Kind, petals: Color, x: f32, y: f32) -> Option<Color> {
        let (dx, dy) = ((x - self.center.0) / self.radius, (y - self.center.1) / (self.radius * self.squash));
        let (distance, angle) = (dx.hypot(dy), dy.atan2(dx) + self.rotation);
        if distance > 1.05 {
            return None;
        }
        if kind.form == Form::Cluster {
            let near = |(bx, by, radius): &(f32, f32, f32)| (dx - bx).hypot(dy - by) / radius;
            let nearest = self.blossoms.iter().map(near).fold(f32::INFINITY, f32::min);
            return match nearest {
                ..0.3 => Some(kind.center),
                ..1.0 => Some(petals.map(|channel| channel * (1.05 - 0.35 * nearest))),
                _ => None,
            };
        }
        // The outline of a petal around its axis, and the size of the center.
        let (count, center) = match kind.form {
            Form::Star => (5.0, 0.16),
            Form::Wheel => (17.0, 0.32),
            Form::Cup | Form::Cluster => (4.0, 0.22),
        };
        let axis = (angle * count / 2.0).cos().abs();
        let outline = match kind.form {
            Form::Star => 0.28 + 0.72 * axis.powi(2),
            Form::Wheel if axis < 0.35 => 0.3,
            Form::Wheel => 0.96,
            Form::Cup | Form::Cluster => 0.72 + 0.28 * axis.sqrt(),
        };
        if distance <= center {
            return Some(kind.center.map(|channel| channel * (1.0 - 0.5 * distance / center * 0.5)));
        }
        (distance <= outline).then(|| petals.map(|channel| channel * (0.7 + 0.2 * axis + 0.15 * distance)))
    }
}

fn stem(picture: &mut RgbImage, pose: &Pose, light: f32) {
    let (x, y) = pose.center;
    let bend = 0.1 * pose.rotation.sin();
    for step in 0..(SIDE as f32 - y).max(0.0) as i32 {
        for width in -3..=3 {
            let x = x + bend * step as f32 + width as f32;
            put(picture, x, y + step as f32, to_rgb([0.2, 0.45, 0.15], light));
        }
    }
}

fn put(picture: &mut RgbImage, x: f32, y: f32, color: Rgb<u8>) {
    if let Some(pixel) = (x >= 0.0 && y >= 0.0).then(|| picture.get_pixel_mut_checked(x as u32, y as u32)).flatten() {
        *pixel = color;
    }
}

fn to_rgb(color: Color, light: f32) -> Rgb<u8> {
    Rgb(color.map(|channel| (channel * light * 255.0).clamp(0.0, 255.0) as u8))
}

/// Returns a random number, at least `low` and below `high`.
fn between(rng: &mut Rng, low: f32, high: f32) -> f32 {
    low + (high - low) * rng.f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_reproduces_a_picture_and_another_one_gives_another() {
        for kind in &KINDS {
            let draw = |seed| flower(kind, &mut Rng::with_seed(seed));
            assert_eq!(draw(1), draw(1));
            assert_ne!(draw(1), draw(2));
        }
        let draw = |seed| scene(&mut Rng::with_seed(seed));
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn a_flower_covers_a_part_of_the_scene_behind_it() {
        for (seed, kind) in (0..).zip(&KINDS) {
            let (scene, flower) = (scene(&mut Rng::with_seed(seed)), flower(kind, &mut Rng::with_seed(seed)));
            let covered = scene.pixels().zip(flower.pixels()).filter(|(behind, before)| behind != before).count();
            let share = covered as f32 / (SIDE * SIDE) as f32;
            assert!(share > 0.05 && share < 0.6, "{}: {share}", kind.name);
        }
    }
}
