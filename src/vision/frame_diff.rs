//! Detection of unchanged frames by frame differencing.

/// Width and height of a block, in pixels of the resized image.
const BLOCK: usize = 16;

/// Compares images with the last one that was classified.
#[derive(Debug)]
pub struct FrameDiff {
    /// Grey levels, 0–255; 0 disables the comparison.
    threshold: f32,
    /// The reference image, size×size×3 u8 RGB; empty if there is none.
    reference: Vec<u8>,
}

impl FrameDiff {
    /// Creates a detector without a reference image. `threshold`: the largest mean difference of a block that counts as
    /// unchanged, in grey levels, 0–255; at 0 every image counts as changed.
    pub fn new(threshold: f32) -> Self {
        FrameDiff { threshold, reference: Vec::new() }
    }

    /// Returns whether the mean absolute difference to the reference image is within the threshold in every block; if not,
    /// the image becomes the new reference. Blocks detect a flower that enters at a corner, which a mean over the
    /// whole image would lose in the noise of the rest. in: size×size×3 u8 RGB.
    pub fn is_unchanged(&mut self, pixels: &[u8]) -> bool {
        if self.threshold <= 0.0 {
            return false;
        }
        let unchanged = self.reference.len() == pixels.len() && self.largest_difference(pixels) <= self.threshold;
        if !unchanged {
            self.reference.clear();
            self.reference.extend_from_slice(pixels);
        }
        unchanged
    }

    /// Discards the reference image: the next image counts as changed.
    pub fn reset(&mut self) {
        self.reference.clear();
    }

    /// Returns the largest mean absolute difference of all blocks, in grey levels.
    fn largest_difference(&self, pixels: &[u8]) -> f32 {
        let row_bytes = 3 * (pixels.len() / 3).isqrt();
        let mut largest = 0.0_f32;
        for (a, b) in self.reference.chunks(BLOCK * row_bytes).zip(pixels.chunks(BLOCK * row_bytes)) {
            for left in (0..row_bytes).step_by(3 * BLOCK) {
                let block = left..(left + 3 * BLOCK).min(row_bytes);
                let rows = a.chunks_exact(row_bytes).zip(b.chunks_exact(row_bytes));
                let sum: u32 = rows.map(|(a, b)| absolute_difference(&a[block.clone()], &b[block.clone()])).sum();
                largest = largest.max(sum as f32 / (block.len() * a.len() / row_bytes) as f32);
            }
        }
        largest
    }
}

/// Returns the sum of the absolute differences.
fn absolute_difference(a: &[u8], b: &[u8]) -> u32 {
    a.iter().zip(b).map(|(a, b)| u32::from(a.abs_diff(*b))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 40;

    fn noise(seed: usize) -> Vec<u8> {
        (0..SIZE * SIZE * 3).map(|n| 100 + ((n * 7919 + seed * 104_729) % 5) as u8).collect()
    }

    #[test]
    fn noise_is_unchanged_and_a_changed_corner_is_not() {
        let mut frame_diff = FrameDiff::new(4.0);
        assert!(!frame_diff.is_unchanged(&noise(0)), "there is no reference yet");
        assert!(frame_diff.is_unchanged(&noise(1)) && frame_diff.is_unchanged(&noise(2)));
        // The last block, which is smaller than the others: 8×8 pixels.
        let mut corner = noise(3);
        for y in 32..SIZE {
            corner[(y * SIZE + 32) * 3..(y + 1) * SIZE * 3].fill(120);
        }
        assert!(!frame_diff.is_unchanged(&corner), "2 % of the image");
        assert!(frame_diff.is_unchanged(&corner));
        assert!(!frame_diff.is_unchanged(&noise(4)), "the corner changes back");
    }

    #[test]
    fn a_slow_change_is_detected_once_it_exceeds_the_threshold() {
        let mut frame_diff = FrameDiff::new(4.0);
        let uniform = |level: u8| vec![level; SIZE * SIZE * 3];
        let changed: Vec<u8> = (0..20).filter(|level| !frame_diff.is_unchanged(&uniform(*level))).collect();
        assert_eq!(changed, [0, 5, 10, 15], "each is compared with the last that was classified");
    }

    #[test]
    fn every_image_is_changed_if_disabled_or_after_a_reset_or_at_another_size() {
        let mut disabled = FrameDiff::new(0.0);
        assert!(!disabled.is_unchanged(&noise(0)) && !disabled.is_unchanged(&noise(0)));
        let mut frame_diff = FrameDiff::new(255.0);
        assert!(
            !frame_diff.is_unchanged(&noise(0))
                && frame_diff.is_unchanged(&noise(0))
                && !frame_diff.is_unchanged(&noise(0)[..27])
        );
        frame_diff.reset();
        assert!(!frame_diff.is_unchanged(&noise(0)[..27]));
    }
}
