//! The part of a frame that is looked at, upright: rotation, mirroring and cropping, before everything else.

use image::{RgbImage, imageops};
use serde::Deserialize;

/// A rotation by quarter turns, clockwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Rotation {
    /// As the camera delivers it.
    #[default]
    None,
    /// By 90°.
    Quarter,
    /// By 180°.
    Half,
    /// By 270°.
    ThreeQuarters,
}

impl Rotation {
    /// Returns the rotation by an angle in degrees: 0, 90, 180 or 270.
    pub fn from_degrees(degrees: u16) -> Option<Self> {
        Some(match degrees {
            0 => Rotation::None,
            90 => Rotation::Quarter,
            180 => Rotation::Half,
            270 => Rotation::ThreeQuarters,
            _ => return None,
        })
    }
}

/// A mirroring of the rotated frame (`camera.flip`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flip {
    /// Not mirrored.
    #[default]
    None,
    /// Left and right are exchanged.
    Horizontal,
    /// Top and bottom are exchanged.
    Vertical,
}

/// A part of a frame, in fractions of its width and height.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Region {
    left: f32,
    top: f32,
    width: f32,
    height: f32,
}

/// A region that is empty or not within the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected left, top, width and height of a part of the frame, as fractions: width and height above 0, left + width and top + height at most 1"
)]
pub struct InvalidRegion;

impl Region {
    /// The whole frame.
    pub const WHOLE: Self = Region { left: 0.0, top: 0.0, width: 1.0, height: 1.0 };

    /// Creates a region of left, top, width and height, each 0–1.
    ///
    /// # Errors
    /// If the region is empty or not within the frame.
    pub fn new([left, top, width, height]: [f32; 4]) -> Result<Self, InvalidRegion> {
        // A sum like 0.9 + 0.1 may be above 1 by rounding.
        let is_within = |start: f32, length: f32| start >= 0.0 && length > 0.0 && start + length <= 1.000_001;
        if !(is_within(left, width) && is_within(top, height)) {
            return Err(InvalidRegion);
        }
        Ok(Region { left, top, width, height })
    }

    /// Returns left, top, width and height, each 0–1.
    pub fn bounds(&self) -> [f32; 4] {
        [self.left, self.top, self.width, self.height]
    }

    /// Returns this part of `outer` as a part of the whole.
    pub fn within(&self, outer: &Self) -> Self {
        Region {
            left: outer.left + self.left * outer.width,
            top: outer.top + self.top * outer.height,
            width: self.width * outer.width,
            height: self.height * outer.height,
        }
    }

    /// Returns the area that both have in common, divided by the area of both together, 0–1.
    pub fn intersection_over_union(&self, other: &Self) -> f32 {
        let overlap =
            |a: f32, a_length: f32, b: f32, b_length: f32| ((a + a_length).min(b + b_length) - a.max(b)).max(0.0);
        let both = overlap(self.left, self.width, other.left, other.width)
            * overlap(self.top, self.height, other.top, other.height);
        both / (self.width * self.height + other.width * other.height - both)
    }

    /// Returns left, top, width and height in pixels, at least one pixel a side.
    fn pixels(&self, (width, height): (u32, u32)) -> [u32; 4] {
        let span = |start: f32, length: f32, pixels: u32| {
            let first = ((start * pixels as f32).round() as u32).min(pixels - 1);
            let end = (((start + length) * pixels as f32).round() as u32).clamp(first + 1, pixels);
            (first, end - first)
        };
        let ((left, width), (top, height)) = (span(self.left, self.width, width), span(self.top, self.height, height));
        [left, top, width, height]
    }
}

/// Rotation, then mirroring, then cropping.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transform {
    /// The rotation that makes the frame upright.
    pub rotation: Rotation,
    /// The mirroring of the rotated frame.
    pub flip: Flip,
    /// The part of the rotated and mirrored frame that is kept.
    pub region: Region,
}

impl Default for Transform {
    fn default() -> Self {
        Transform { rotation: Rotation::None, flip: Flip::None, region: Region::WHOLE }
    }
}

impl Transform {
    /// Returns the transformed image; without a transformation, the image itself. in, out: H×W×3 u8 RGB, at least one pixel.
    pub fn apply(&self, image: RgbImage) -> RgbImage {
        let mut image = match self.rotation {
            Rotation::None => image,
            Rotation::Quarter => imageops::rotate90(&image),
            Rotation::Half => imageops::rotate180(&image),
            Rotation::ThreeQuarters => imageops::rotate270(&image),
        };
        match self.flip {
            Flip::None => {}
            Flip::Horizontal => imageops::flip_horizontal_in_place(&mut image),
            Flip::Vertical => imageops::flip_vertical_in_place(&mut image),
        }
        if self.region == Region::WHOLE {
            return image;
        }
        let [left, top, width, height] = self.region.pixels(image.dimensions());
        imageops::crop_imm(&image, left, top, width, height).to_image()
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    /// 4×2 pixels with the values 0–7.
    fn frame() -> RgbImage {
        RgbImage::from_fn(4, 2, |x, y| Rgb([(y * 4 + x) as u8; 3]))
    }

    fn values(transform: Transform) -> (u32, Vec<u8>) {
        let image = transform.apply(frame());
        (image.width(), image.pixels().map(|pixel| pixel.0[0]).collect())
    }

    #[test]
    fn rotates_clockwise_then_mirrors_then_crops() {
        let none = Transform::default();
        assert_eq!(values(none), (4, vec![0, 1, 2, 3, 4, 5, 6, 7]));
        let quarter = Transform { rotation: Rotation::from_degrees(90).unwrap(), ..none };
        assert_eq!(values(quarter), (2, vec![4, 0, 5, 1, 6, 2, 7, 3]));
        let half = Transform { rotation: Rotation::from_degrees(180).unwrap(), ..none };
        assert_eq!(values(half), (4, vec![7, 6, 5, 4, 3, 2, 1, 0]));
        let three_quarters = Transform { rotation: Rotation::from_degrees(270).unwrap(), ..none };
        assert_eq!(values(three_quarters), (2, vec![3, 7, 2, 6, 1, 5, 0, 4]));
        let mirrored = Transform { flip: Flip::Horizontal, ..quarter };
        assert_eq!(values(mirrored), (2, vec![0, 4, 1, 5, 2, 6, 3, 7]));
        let upper_right = Transform { region: Region::new([0.5, 0.0, 0.5, 0.25]).unwrap(), ..mirrored };
        assert_eq!(values(upper_right), (1, vec![4]));
        assert_eq!(values(Transform { flip: Flip::Vertical, ..none }), (4, vec![4, 5, 6, 7, 0, 1, 2, 3]));
        assert_eq!(Rotation::from_degrees(45), None);
    }

    #[test]
    fn a_region_lies_within_the_frame_and_has_at_least_one_pixel() {
        for invalid in [[0.5, 0.0, 0.6, 1.0], [0.0, 0.0, 0.0, 1.0], [-0.1, 0.0, 0.5, 1.0], [0.0, f32::NAN, 1.0, 1.0]] {
            assert_eq!(Region::new(invalid), Err(InvalidRegion), "{invalid:?}");
        }
        let tiny = Region::new([0.999, 0.999, 0.001, 0.001]).unwrap();
        assert_eq!(tiny.pixels((640, 480)), [639, 479, 1, 1]);
        assert_eq!(Region::new([0.9, 0.1, 0.1, 0.9]).unwrap().pixels((10, 10)), [9, 1, 1, 9]);
    }
}
