//! Tells whether a camera frame_diff sees what it saw.

/// Width and height of a block, in pixels of what the network looks at.
const BLOCK: usize = 16;

/// The last picture that was classified, and how far another may lie from it and be the same.
#[derive(Debug)]
pub struct FrameDiff {
    /// Grey levels, 0–255; 0: no picture is the same.
    threshold: f32,
    /// size×size×3.
    last: Vec<u8>,
}

impl FrameDiff {
    pub fn new(threshold: f32) -> Self {
        FrameDiff { threshold, last: Vec::new() }
    }

    /// Whether the picture is the last one, as far as the threshold goes: in no block of it do the values differ by more in the mean.
    /// A flower that comes into a corner is seen in its blocks, where a mean over the whole picture would drown it in the noise of the
    /// rest. A picture that is another one is the last from now on. in: size×size×3 u8 RGB.
    pub fn is_unchanged(&mut self, pixels: &[u8]) -> bool {
        if self.threshold <= 0.0 {
            return false;
        }
        let same = self.last.len() == pixels.len() && self.largest_difference(pixels) <= self.threshold;
        if !same {
            self.last.clear();
            self.last.extend_from_slice(pixels);
        }
        same
    }

    /// The next picture is another one, whatever it shows.
    pub fn forget(&mut self) {
        self.last.clear();
    }

    /// The mean difference in the block where it is largest.
    fn largest_difference(&self, pixels: &[u8]) -> f32 {
        let line = 3 * (pixels.len() / 3).isqrt();
        let mut largest = 0.0_f32;
        for (a, b) in self.last.chunks(BLOCK * line).zip(pixels.chunks(BLOCK * line)) {
            for left in (0..line).step_by(3 * BLOCK) {
                let block = left..(left + 3 * BLOCK).min(line);
                let rows = a.chunks_exact(line).zip(b.chunks_exact(line));
                let sum: u32 = rows.map(|(a, b)| difference(&a[block.clone()], &b[block.clone()])).sum();
                largest = largest.max(sum as f32 / (block.len() * a.len() / line) as f32);
            }
        }
        largest
    }
}

fn difference(a: &[u8], b: &[u8]) -> u32 {
    a.iter().zip(b).map(|(a, b)| u32::from(a.abs_diff(*b))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 40;

    fn noisy(seed: usize) -> Vec<u8> {
        (0..SIZE * SIZE * 3).map(|n| 100 + ((n * 7919 + seed * 104_729) % 5) as u8).collect()
    }

    #[test]
    fn noise_is_still_and_a_corner_that_changes_is_not() {
        let mut frame_diff = FrameDiff::new(4.0);
        assert!(!frame_diff.is_unchanged(&noisy(0)), "the first is no other's");
        assert!(frame_diff.is_unchanged(&noisy(1)) && frame_diff.is_unchanged(&noisy(2)));
        // The last block, which is smaller than the others: 8×8 pixels.
        let mut corner = noisy(3);
        for y in 32..SIZE {
            corner[(y * SIZE + 32) * 3..(y + 1) * SIZE * 3].fill(120);
        }
        assert!(!frame_diff.is_unchanged(&corner), "2 % of the picture");
        assert!(frame_diff.is_unchanged(&corner));
        assert!(!frame_diff.is_unchanged(&noisy(4)), "it goes again");
    }

    #[test]
    fn what_changes_slowly_is_seen_in_the_end() {
        let mut frame_diff = FrameDiff::new(4.0);
        let at = |level: u8| vec![level; SIZE * SIZE * 3];
        let seen: Vec<u8> = (0..20).filter(|level| !frame_diff.is_unchanged(&at(*level))).collect();
        assert_eq!(seen, [0, 5, 10, 15], "each is compared with the last that was classified");
    }

    #[test]
    fn nothing_is_still_where_it_is_off_or_forgotten_or_of_another_size() {
        let mut off = FrameDiff::new(0.0);
        assert!(!off.is_unchanged(&noisy(0)) && !off.is_unchanged(&noisy(0)));
        let mut frame_diff = FrameDiff::new(255.0);
        assert!(
            !frame_diff.is_unchanged(&noisy(0))
                && frame_diff.is_unchanged(&noisy(0))
                && !frame_diff.is_unchanged(&noisy(0)[..27])
        );
        frame_diff.forget();
        assert!(!frame_diff.is_unchanged(&noisy(0)[..27]));
    }
}
