//! From RGB pixels to the backbone's input.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use serde::{Deserialize, Serialize};

/// How pixels become numbers. A bundle carries it: a head that was trained with one preprocessing
/// is of no use with another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocess {
    /// Width and height of the input, in pixels.
    pub size: u32,
    pub fit: Fit,
    pub filter: Filter,
    /// A channel's value x, 0–255, becomes `(x / scale − mean) / std`.
    pub scale: f32,
    pub mean: [f32; 3],
    pub std: [f32; 3],
    pub layout: TensorLayout,
}

/// Raise it when the same settings give other numbers: features that were kept are computed anew then.
pub const VERSION: u32 = 1;
/// Wider inputs are no network's for a camera.
const SIZE_MAX: u32 = 1024;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreprocessError {
    #[error("preprocess.size {0}, expected 1 to {SIZE_MAX}")]
    Size(u32),
    #[error("preprocess: expected finite numbers, scale and std above 0")]
    Numbers,
}

/// How a picture that is not square becomes square.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fit {
    /// Stretched, as Keras's `target_size` does: nothing is cut off.
    Squash,
}

/// How a pixel of the input is weighed from the picture's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// A triangle as wide as the scale asks, so that no pixel is left out.
    Triangle,
}

/// Order of the input tensor's axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TensorLayout {
    /// Channels first, as PyTorch has it.
    Nchw,
    /// Channels last, as TensorFlow has it.
    Nhwc,
}

impl TensorLayout {
    /// The axes by name.
    pub fn axes(self) -> &'static str {
        match self {
            TensorLayout::Nchw => "batch × channels × height × width",
            TensorLayout::Nhwc => "batch × height × width × channels",
        }
    }
}

impl Preprocess {
    /// What Keras's MobileNetV2 was trained with: `x / 127.5 − 1`
    /// (`keras.applications.mobilenet_v2.preprocess_input`).
    pub fn mobilenet_v2() -> Self {
        Preprocess {
            size: 224,
            fit: Fit::Squash,
            filter: Filter::Triangle,
            scale: 255.0,
            mean: [0.5; 3],
            std: [0.5; 3],
            layout: TensorLayout::Nchw,
        }
    }

    /// What torchvision's networks were trained with (`torchvision.models`, the weights' transforms).
    pub fn torchvision(size: u32) -> Self {
        let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
        Preprocess { size, mean, std, ..Self::mobilenet_v2() }
    }

    /// Refuses what no network was ever trained with, before anything is allocated by it.
    pub fn check(&self) -> Result<(), PreprocessError> {
        if !(1..=SIZE_MAX).contains(&self.size) {
            return Err(PreprocessError::Size(self.size));
        }
        let positive = |value: f32| value.is_finite() && value > 0.0;
        if !positive(self.scale) || !self.std.into_iter().all(positive) || !self.mean.into_iter().all(f32::is_finite) {
            return Err(PreprocessError::Numbers);
        }
        Ok(())
    }

    /// Numbers in one input.
    pub fn input_len(&self) -> usize {
        3 * self.size as usize * self.size as usize
    }
}

/// The work of a [`Preprocess`], with its buffers.
pub struct Preprocessor {
    spec: Preprocess,
    resizer: Resizer,
    /// size×size×3.
    resized: Vec<u8>,
}

impl Preprocessor {
    pub fn new(spec: Preprocess) -> Self {
        let resized = vec![0; spec.input_len()];
        Preprocessor { spec, resizer: Resizer::new(), resized }
    }

    pub fn spec(&self) -> &Preprocess {
        &self.spec
    }

    /// in: H×W×3 u8 RGB, any size; out: `[3, size, size]` f32, or `[size, size, 3]` where the layout is NHWC,
    /// `(x / scale − mean) / std`.
    ///
    /// # Panics
    /// Where `out` is not [`Preprocess::input_len`] long.
    pub fn run(&mut self, image: &RgbImage, out: &mut [f32]) {
        self.resize(image);
        self.normalise(out);
    }

    /// The first half of [`Preprocessor::run`]. out: size×size×3 u8 RGB, which stay here.
    pub fn resize(&mut self, image: &RgbImage) -> &[u8] {
        let size = self.spec.size;
        if image.dimensions() == (size, size) {
            self.resized.copy_from_slice(image.as_raw());
            return &self.resized;
        }
        // Typed: the resizer's code for every other kind of pixel stays out of the program, 3 MB.
        let source = TypedImageRef::<U8x3>::from_buffer(image.width(), image.height(), image.as_raw())
            .expect("an RgbImage holds three bytes a pixel");
        let mut resized = TypedImage::<U8x3>::from_buffer(size, size, &mut self.resized).expect("so does this one");
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
        self.resizer.resize_typed(&source, &mut resized, &options).expect("a bilinear filter takes any sizes");
        &self.resized
    }

    /// The second half, of what was resized last.
    pub fn normalise(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.spec.input_len(), "one input's length");
        normalise(&self.spec, &self.resized, out);
    }
}

/// in: size×size×3 u8; out: `[3, size, size]` or `[size, size, 3]` f32.
fn normalise(spec: &Preprocess, pixels: &[u8], out: &mut [f32]) {
    let factor = spec.std.map(|std| 1.0 / (spec.scale * std));
    let offset: [f32; 3] = std::array::from_fn(|channel| -spec.mean[channel] / spec.std[channel]);
    match spec.layout {
        TensorLayout::Nchw => {
            let plane = out.len() / 3;
            // HWC → CHW
            for (channel, plane) in out.chunks_exact_mut(plane).enumerate() {
                for (value, pixel) in plane.iter_mut().zip(pixels.chunks_exact(3)) {
                    *value = f32::from(pixel[channel]) * factor[channel] + offset[channel];
                }
            }
        }
        TensorLayout::Nhwc => {
            for (values, pixel) in out.chunks_exact_mut(3).zip(pixels.chunks_exact(3)) {
                for channel in 0..3 {
                    values[channel] = f32::from(pixel[channel]) * factor[channel] + offset[channel];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::decode::tests::gradient;
    use super::*;

    #[test]
    fn values_and_axes_are_as_stated() {
        let spec = Preprocess::mobilenet_v2();
        let mut out = vec![0.0; spec.input_len()];
        let image = RgbImage::from_fn(224, 224, |x, y| image::Rgb([x as u8, y as u8, 255]));
        Preprocessor::new(spec).run(&image, &mut out);
        let at = |c: usize, y: usize, x: usize| out[(c * 224 + y) * 224 + x];
        assert_eq!((at(0, 0, 0), at(1, 0, 0), at(2, 0, 0)), (-1.0, -1.0, 1.0));
        let close = |a: f32, b: f32| (a - b).abs() < 1e-6;
        assert!(close(at(0, 7, 50), 50.0 / 127.5 - 1.0), "red grows with x");
        assert!(close(at(1, 7, 50), 7.0 / 127.5 - 1.0), "green grows with y");
    }

    #[test]
    fn channels_last_are_the_same_numbers_in_another_order() {
        let first = Preprocess::torchvision(8);
        let last = Preprocess { layout: TensorLayout::Nhwc, ..first.clone() };
        let image = gradient(8, 8);
        let run = |spec: Preprocess| {
            let mut out = vec![0.0; spec.input_len()];
            Preprocessor::new(spec).run(&image, &mut out);
            out
        };
        let (first, last) = (run(first), run(last));
        for channel in 0..3 {
            for place in 0..64 {
                assert_eq!(first[channel * 64 + place], last[place * 3 + channel]);
            }
        }
        let red = f32::from(image.get_pixel(3, 2).0[0]);
        assert!((last[(2 * 8 + 3) * 3] - (red / 255.0 - 0.485) / 0.229).abs() < 1e-5);
    }

    #[test]
    fn what_would_panic_or_blind_is_refused() {
        let good = Preprocess::mobilenet_v2();
        assert_eq!(good.check(), Ok(()));
        for size in [0, 1025, u32::MAX] {
            assert_eq!(Preprocess { size, ..good.clone() }.check(), Err(PreprocessError::Size(size)));
        }
        for bad in [
            Preprocess { scale: 0.0, ..good.clone() },
            Preprocess { std: [1.0, 0.0, 1.0], ..good.clone() },
            Preprocess { mean: [0.0, f32::INFINITY, 0.0], ..good },
        ] {
            assert_eq!(bad.check(), Err(PreprocessError::Numbers));
        }
    }

    #[test]
    fn a_picture_that_is_not_square_is_squashed_whole() {
        let spec = Preprocess::mobilenet_v2();
        let mut preprocessor = Preprocessor::new(spec.clone());
        let (mut wide, mut square) = (vec![0.0; spec.input_len()], vec![0.0; spec.input_len()]);
        preprocessor.run(&gradient(640, 480), &mut wide);
        preprocessor.run(&gradient(896, 896), &mut square);
        let worst = wide.iter().zip(&square).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 0.03, "the same gradient at another shape differs by {worst}");
    }
}
