//! Class activation map (CAM; Zhou et al., "Learning Deep Features for Discriminative Localization", 2016): the contribution of
//! each position of the last feature map to the logit of a class. For a linear head on globally average-pooled features, the
//! logit is the mean of the contributions plus the bias.

use image::{Rgb, RgbImage};

use super::head::{Head, dot};

/// Opacity of the overlay, 0–1.
const OPACITY: f32 = 0.6;

/// Returns the contribution of each position to the logit of `class`, relative to the mean over all classes: `[positions]`.
/// `activations` are those of the last convolution, in: `[positions, width]`.
pub fn class_activation_map(head: &Head, activations: &[f32], class: usize) -> Vec<f32> {
    let width = head.width();
    let rows: Vec<&[f32]> = head.weight().chunks_exact(width).collect();
    let mean = |i: usize| rows.iter().map(|row| row[i]).sum::<f32>() / rows.len() as f32;
    let weight: Vec<f32> = (0..width).map(|i| rows[class][i] - mean(i)).collect();
    activations.chunks_exact(width).map(|position| dot(position, &weight)).collect()
}

/// Darkens `image` where the map is low and tints it orange where it is high. `cam` is square, row by row, and is scaled by
/// its maximum.
pub fn overlay(image: &mut RgbImage, cam: &[f32]) {
    let side = (cam.len() as f64).sqrt() as usize;
    let max = cam.iter().copied().fold(f32::EPSILON, f32::max);
    let (width, height) = image.dimensions();
    for (x, y, pixel) in image.enumerate_pixels_mut() {
        let on_map = |pixel: u32, length: u32| ((pixel as f32 + 0.5) / length as f32 * side as f32 - 0.5).max(0.0);
        let strength = (sample_bilinear(cam, side, on_map(x, width), on_map(y, height)) / max).clamp(0.0, 1.0);
        let orange = [255.0, 60.0 + 160.0 * strength, 20.0];
        let Rgb(channels) = pixel;
        for (channel, orange) in channels.iter_mut().zip(orange) {
            let dimmed = f32::from(*channel) * (1.0 - OPACITY * (1.0 - strength));
            *channel = (dimmed + (orange - dimmed) * OPACITY * strength * strength) as u8;
        }
    }
}

/// Returns the bilinear interpolation at `(x, y)` of a square map with `side` rows.
fn sample_bilinear(cam: &[f32], side: usize, x: f32, y: f32) -> f32 {
    let (left, top) = ((x as usize).min(side - 1), (y as usize).min(side - 1));
    let (right, bottom) = ((left + 1).min(side - 1), (top + 1).min(side - 1));
    let (dx, dy) = ((x - left as f32).min(1.0), (y - top as f32).min(1.0));
    let row = |row: usize| cam[row * side + left] * (1.0 - dx) + cam[row * side + right] * dx;
    row(top) * (1.0 - dy) + row(bottom) * dy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_is_orange_where_the_map_is_high_and_dark_elsewhere() {
        let mut image = RgbImage::from_pixel(40, 20, Rgb([100; 3]));
        overlay(&mut image, &[0.0, 0.0, 0.0, 1.0]);
        let (dark, warm) = (image.get_pixel(2, 2).0, image.get_pixel(37, 17).0);
        assert!(warm[0] > 150 && warm[0] > warm[2] + 80, "{warm:?}");
        assert!(dark.iter().all(|channel| *channel < 60), "{dark:?}");
    }
}
