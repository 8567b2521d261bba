//! A synthetic test image, for benchmarks and self-tests without a photograph.

use std::io::Cursor;

use image::{ImageFormat, Rgb, RgbImage};

/// Returns a JPEG file with edges, gradients and noise, about as expensive to decode as a photograph. `width`, `height`: in
/// pixels.
///
/// # Panics
/// If `width` or `height` is 0 or above 65,535, the largest in a JPEG.
pub fn jpeg(width: u32, height: u32) -> Vec<u8> {
    let (center_x, center_y) = (width as f32 / 2.0, height as f32 / 2.0);
    let image = RgbImage::from_fn(width, height, |x, y| {
        let wave = (x as f32 / 23.0).sin() * (y as f32 / 31.0).cos();
        let petals = ((x as f32 - center_x).atan2(y as f32 - center_y) * 8.0).sin();
        let noise = (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(2_246_822_519)) >> 28;
        let level = |base: f32, amplitude: f32| (base + amplitude * wave + noise as f32).clamp(0.0, 255.0) as u8;
        if petals > 0.3 {
            Rgb([level(210.0, 40.0), level(190.0, 50.0), level(40.0, 30.0)])
        } else {
            Rgb([level(50.0, 40.0), level(110.0, 60.0), level(45.0, 30.0)])
        }
    });
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Jpeg).expect("writing to memory cannot fail");
    bytes.into_inner()
}

#[cfg(test)]
mod tests {
    use super::super::decode;
    use super::*;

    #[test]
    fn can_be_decoded() {
        assert_eq!(decode::encoded(&jpeg(64, 48)).unwrap().dimensions(), (64, 48));
    }
}
