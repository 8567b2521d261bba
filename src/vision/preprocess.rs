//! Preprocessing: from RGB pixels to the input tensor of the backbone.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;
use serde::{Deserialize, Serialize};

/// The parameters of the preprocessing. A bundle contains them, since a head is valid only for the preprocessing that it
/// was trained with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Preprocess {
    /// Width and height of the input, in pixels.
    pub size: u32,
    /// Mapping of the image to the square input.
    pub fit: Fit,
    /// Resampling filter.
    pub filter: Filter,
    /// A channel value x, 0–255, becomes `(x / scale − mean) / std`.
    pub scale: f32,
    /// Mean of each channel: red, green, blue.
    pub mean: [f32; 3],
    /// Standard deviation of each channel: red, green, blue.
    pub std: [f32; 3],
    /// Order of the axes of the input tensor.
    pub layout: TensorLayout,
}

/// Version of the implementation, a part of the feature cache's key: increment it whenever the same parameters give other
/// values.
pub const VERSION: u32 = 1;
/// Largest input size, in pixels; networks for camera images take 96 to 640.
const SIZE_MAX: u32 = 1024;

/// An error of the parameters in [`Preprocess`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreprocessError {
    /// The input size is not 1–1024 pixels; its value.
    #[error("preprocess.size {0}, expected 1 to {SIZE_MAX}")]
    Size(u32),
    /// `scale`, `mean` or `std` is not finite, or `scale` or `std` is not positive.
    #[error("preprocess: expected finite scale, mean and std, with scale and std above 0")]
    Normalisation,
}

/// The mapping of a rectangular image to the square input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fit {
    /// Stretches the image without cropping, as Keras's `target_size` does.
    Squash,
}

/// The resampling filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// Bilinear with antialiasing: a triangle whose support grows with the downscaling factor.
    Triangle,
}

/// Order of the axes of the input tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TensorLayout {
    /// Channels first, PyTorch's order.
    Nchw,
    /// Channels last, TensorFlow's order.
    Nhwc,
}

impl TensorLayout {
    /// Returns the names of the axes.
    pub fn axes(self) -> &'static str {
        match self {
            TensorLayout::Nchw => "batch × channels × height × width",
            TensorLayout::Nhwc => "batch × height × width × channels",
        }
    }
}

impl Preprocess {
    /// Returns the preprocessing of Keras's MobileNetV2: 224 pixels, `x / 127.5 − 1`
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

    /// Returns the preprocessing of torchvision's networks, with ImageNet's mean and standard deviation
    /// (`torchvision.models`, the transforms of the weights). `size`: width and height in pixels.
    pub fn torchvision(size: u32) -> Self {
        let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
        Preprocess { size, mean, std, ..Self::mobilenet_v2() }
    }

    /// Validates the parameters, before a buffer is allocated from them.
    ///
    /// # Errors
    /// If the size is not 1–1024, or `scale`, `mean` or `std` is not finite, or `scale` or `std` is not positive.
    pub fn check(&self) -> Result<(), PreprocessError> {
        if !(1..=SIZE_MAX).contains(&self.size) {
            return Err(PreprocessError::Size(self.size));
        }
        let positive = |value: f32| value.is_finite() && value > 0.0;
        if !positive(self.scale) || !self.std.into_iter().all(positive) || !self.mean.into_iter().all(f32::is_finite) {
            return Err(PreprocessError::Normalisation);
        }
        Ok(())
    }

    /// Returns the length of one input tensor: `3 · size · size`.
    pub fn input_len(&self) -> usize {
        3 * self.size as usize * self.size as usize
    }
}

/// Applies a [`Preprocess`]; owns the buffers.
pub struct Preprocessor {
    spec: Preprocess,
    width: u32,
    height: u32,
    resizer: Resizer,
    /// height×width×3 u8 RGB.
    resized: Vec<u8>,
}

impl Preprocessor {
    /// Creates a preprocessor and allocates its buffers; `spec` has to be valid, see [`Preprocess::check`].
    pub fn new(spec: Preprocess) -> Self {
        let size = spec.size;
        Self::for_input(spec, [size, size])
    }

    /// Creates a preprocessor for an input of another height and width, in pixels.
    pub fn for_input(spec: Preprocess, [height, width]: [u32; 2]) -> Self {
        let resized = vec![0; 3 * height as usize * width as usize];
        Preprocessor { spec, width, height, resizer: Resizer::new(), resized }
    }

    /// Returns the length of the input tensor.
    pub fn input_len(&self) -> usize {
        self.resized.len()
    }

    /// Returns the parameters.
    pub fn spec(&self) -> &Preprocess {
        &self.spec
    }

    /// Resizes and normalises an image. in: H×W×3 u8 RGB, any size; out: `[3, height, width]` f32, or `[height, width, 3]` if the
    /// layout is NHWC, `(x / scale − mean) / std`.
    ///
    /// # Panics
    /// If `out` is not [`Preprocessor::input_len`] long.
    pub fn run(&mut self, image: &RgbImage, out: &mut [f32]) {
        self.resize(image);
        self.normalise(out);
    }

    /// Resizes an image into the internal buffer, the first half of [`Preprocessor::run`]. in: H×W×3 u8 RGB, any size;
    /// out: height×width×3 u8 RGB.
    pub fn resize(&mut self, image: &RgbImage) -> &[u8] {
        let (width, height) = (self.width, self.height);
        if image.dimensions() == (width, height) {
            self.resized.copy_from_slice(image.as_raw());
            return &self.resized;
        }
        // The typed API: the code for all other pixel types is not linked, which saves 3 MB.
        let source = TypedImageRef::<U8x3>::from_buffer(image.width(), image.height(), image.as_raw())
            .expect("an RgbImage has three bytes per pixel");
        let mut resized = TypedImage::<U8x3>::from_buffer(width, height, &mut self.resized)
            .expect("the buffer has three bytes per pixel");
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
        self.resizer.resize_typed(&source, &mut resized, &options).expect("a bilinear filter supports all sizes");
        &self.resized
    }

    /// Normalises the last resized image, the second half of [`Preprocessor::run`]. out: as there.
    ///
    /// # Panics
    /// If `out` is not [`Preprocessor::input_len`] long.
    pub fn normalise(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.input_len(), "length of the input tensor");
        normalise(&self.spec, &self.resized, out);
    }
}

/// Computes `(x / scale − mean) / std`. in: height×width×3 u8 RGB; out: `[3, height, width]` or `[height, width, 3]` f32.
fn normalise(spec: &Preprocess, pixels: &[u8], out: &mut [f32]) {
    let factor = spec.std.map(|std| 1.0 / (spec.scale * std));
    let offset: [f32; 3] = std::array::from_fn(|channel| -spec.mean[channel] / spec.std[channel]);
    match spec.layout {
        TensorLayout::Nchw => {
            let plane_len = out.len() / 3;
            // HWC → CHW
            for (channel, plane) in out.chunks_exact_mut(plane_len).enumerate() {
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
    fn output_has_the_documented_values_and_axes() {
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
    fn channels_last_has_the_same_values_in_another_order() {
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
            for position in 0..64 {
                assert_eq!(first[channel * 64 + position], last[position * 3 + channel]);
            }
        }
        let red = f32::from(image.get_pixel(3, 2).0[0]);
        assert!((last[(2 * 8 + 3) * 3] - (red / 255.0 - 0.485) / 0.229).abs() < 1e-5);
    }

    #[test]
    fn rejects_invalid_parameters() {
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
            assert_eq!(bad.check(), Err(PreprocessError::Normalisation));
        }
    }

    #[test]
    fn stretches_a_rectangular_image_without_cropping() {
        let spec = Preprocess::mobilenet_v2();
        let mut preprocessor = Preprocessor::new(spec.clone());
        let (mut wide, mut square) = (vec![0.0; spec.input_len()], vec![0.0; spec.input_len()]);
        preprocessor.run(&gradient(640, 480), &mut wide);
        preprocessor.run(&gradient(896, 896), &mut square);
        let worst = wide.iter().zip(&square).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 0.03, "the same gradient at another aspect ratio differs by {worst}");
    }
}
