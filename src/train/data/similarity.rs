//! Images that look the same, such as re-encoded and resized copies of one photograph.

use image::RgbImage;
use image::imageops::{self, FilterType};

use crate::system::paths::printable;
use crate::train::data::image_set::HashedImage;

/// Largest Hamming distance of the bits of two images that look the same, of 256.
const DISTANCE_MAX: u32 = 18;
/// Largest difference of a cell's mean color in two images that look the same, in each channel. Copies of 350 photographs at half the
/// size, as JPEG of quality 50 and 20, at 200×200 and at 160 % differ by at most 10; photographs of a fixed camera with another flower by
/// more.
const COLOR_MAX: u8 = 12;
/// Cells a row and a column whose colors are compared.
const CELLS: u32 = 8;
/// Values of the mean colors.
const COLORS: usize = (3 * CELLS * CELLS) as usize;
/// Comparisons a row and a column of a hash.
const SIDE: u32 = 16;

/// A difference hash (dHash) and the mean colors of 8×8 cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerceptualHash {
    /// Bit `y · 16 + x` is set if pixel `(x, y)` of a 17×16 gray copy is darker than its right neighbor.
    bits: [u64; 4],
    /// Mean of each channel in each cell.
    colors: [u8; COLORS],
}

impl PerceptualHash {
    /// Bytes of a hash.
    pub const BYTES: usize = 32 + COLORS;

    /// Computes the hash of an image. in: H×W×3 u8 RGB, any size.
    pub fn new(pixels: &RgbImage) -> Self {
        let small = imageops::resize(pixels, SIDE + 1, SIDE, FilterType::Triangle);
        let gray = imageops::grayscale(&small);
        let mut bits = [0; 4];
        for y in 0..SIDE {
            for x in 0..SIDE {
                let darker = gray.get_pixel(x, y).0[0] < gray.get_pixel(x + 1, y).0[0];
                let bit = (y * SIDE + x) as usize;
                bits[bit / 64] |= u64::from(darker) << (bit % 64);
            }
        }
        let cells = imageops::resize(pixels, CELLS, CELLS, FilterType::Triangle);
        PerceptualHash { bits, colors: cells.into_raw().try_into().expect("three values a cell") }
    }

    /// Returns the hash as bytes: the bits, least significant byte first, and the colors.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let (bits, colors) = bytes.split_at_mut(32);
        for (bytes, word) in bits.chunks_exact_mut(8).zip(self.bits) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        colors.copy_from_slice(&self.colors);
        bytes
    }

    /// Returns the hash of [`Self::to_bytes`]; `None` if the length differs.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (words, colors) = bytes.split_at_checked(32)?;
        let mut bits = [0; 4];
        for (word, bytes) in bits.iter_mut().zip(words.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
        Some(PerceptualHash { bits, colors: colors.try_into().ok()? })
    }

    /// Returns the Hamming distance of the bits, 0–256, if the images may look the same.
    fn distance(&self, other: &Self) -> Option<u32> {
        let same_colors = self.colors.iter().zip(other.colors).all(|(a, b)| a.abs_diff(b) <= COLOR_MAX);
        let bits = self.bits.iter().zip(other.bits).map(|(a, b)| (a ^ b).count_ones()).sum();
        (same_colors && bits <= DISTANCE_MAX).then_some(bits)
    }
}

/// Returns the index of the image that looks most like that of `hash`: the first with the smallest distance. `None` stands for an
/// image without a hash.
pub fn most_similar(hashes: &[Option<PerceptualHash>], hash: &PerceptualHash) -> Option<usize> {
    let distances = hashes.iter().enumerate().filter_map(|(i, other)| Some((i, hash.distance(other.as_ref()?)?)));
    distances.min_by_key(|(_, bits)| *bits).map(|(i, _)| i)
}

/// Returns the problem of an image that looks like another one. `known` is the number of the model's classes.
pub fn problem(image: &HashedImage, other: &HashedImage, known: usize) -> String {
    let looks_like = format!("looks like {}", printable(&other.path));
    if image.class.min(known) == other.class.min(known) {
        looks_like
    } else {
        format!("conflicting labels: {looks_like}, of another class")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::decode::tests::gradient;

    #[test]
    fn bytes_hold_every_bit() {
        let bits = std::array::from_fn(|i| 0x0123_4567_89ab_cdef_u64.rotate_left(i as u32 * 7));
        let hash = PerceptualHash { bits, colors: std::array::from_fn(|i| i as u8) };
        assert_eq!(PerceptualHash::from_bytes(&hash.to_bytes()), Some(hash));
        assert_eq!(PerceptualHash::from_bytes(&[0; 223]), None);
    }

    #[test]
    fn finds_the_most_similar_of_the_images_that_look_the_same() {
        let rising = gradient(60, 40);
        let mut tinted = rising.clone();
        tinted.pixels_mut().for_each(|pixel| pixel.0[2] = 200);
        // Something small in the foreground.
        let mut changed = rising.clone();
        (10..20).for_each(|y| (40..50).for_each(|x| changed.put_pixel(x, y, image::Rgb([255, 0, 0]))));
        let copy = imageops::resize(&rising, 90, 60, FilterType::Triangle);
        let others = [RgbImage::new(40, 40), imageops::flip_horizontal(&rising), tinted, changed];
        let hash = PerceptualHash::new(&rising);
        let mut hashes: Vec<_> = others.iter().map(|other| Some(PerceptualHash::new(other))).collect();
        hashes.push(None);
        assert_eq!(most_similar(&hashes, &hash), None);
        hashes.push(Some(PerceptualHash::new(&copy)));
        assert_eq!(most_similar(&hashes, &hash), Some(5));
        hashes.push(Some(hash));
        let exact = hash.distance(&PerceptualHash::new(&copy)) != Some(0);
        assert_eq!(most_similar(&hashes, &hash), Some(if exact { 6 } else { 5 }));
    }
}
