//! The images of a dataset by their content: duplicates and the train/validation split.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::RgbImage;
use sha2::{Digest, Sha256};

use crate::system::paths::printable;
use crate::train::data::dataset::{Dataset, DatasetProblem};
use crate::train::data::generated;
use crate::train::parallel;
use crate::vision::decode::{self, DecodeError};

/// Smallest side of an image that is used for training or evaluation, in pixels.
pub const SIDE_MIN: u32 = 32;

/// SHA-256 of a file's bytes.
pub type ContentHash = [u8; 32];

/// An image, its class and its content hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashedImage {
    /// Path of the file.
    pub path: PathBuf,
    /// Index of the class in the labels.
    pub class: usize,
    /// SHA-256 of the file's bytes; of a generated image, a hash of what it is made of.
    pub content_hash: ContentHash,
    /// The source of its pixels.
    pub origin: Origin,
}

/// The source of an image's pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The file.
    File,
    /// [`generated::nothing`].
    Nothing,
    /// The file, by [`generated::degraded`].
    Degraded,
    /// The file, by [`generated::part`].
    Part,
    /// The file, pasted on another one: [`scene::canvas`](crate::train::data::scene::canvas).
    Scene {
        /// The other file.
        background: Arc<Path>,
    },
    /// The file, of none of the classes, as windows of a scanned frame show it.
    EmptyScene,
}

/// Error of an image that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read or decoded.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A side is shorter than [`SIDE_MIN`].
    #[error("{width}×{height} pixels, fewer than {SIDE_MIN} a side")]
    TooSmall {
        /// Width of the image, in pixels.
        width: u32,
        /// Height of the image, in pixels.
        height: u32,
    },
}

impl HashedImage {
    /// Decodes the file, or generates the image; of a scene, decodes the file alone. out: H×W×3 u8 RGB.
    ///
    /// # Errors
    /// Fails if the file cannot be read or decoded, or if a side is shorter than [`SIDE_MIN`].
    pub fn decode(&self) -> Result<RgbImage, ImageError> {
        if self.origin == Origin::Nothing {
            return Ok(generated::nothing(&self.content_hash));
        }
        let pixels = decode_file(&self.path)?;
        Ok(match self.origin {
            Origin::Degraded => generated::degraded(&pixels, &self.content_hash),
            Origin::Part => generated::part(&pixels, &self.content_hash),
            Origin::File | Origin::Nothing | Origin::Scene { .. } | Origin::EmptyScene => pixels,
        })
    }
}

/// Decodes a file. out: H×W×3 u8 RGB.
///
/// # Errors
/// Fails if the file cannot be read or decoded, or if a side is shorter than [`SIDE_MIN`].
pub fn decode_file(path: &Path) -> Result<RgbImage, ImageError> {
    let pixels = decode::file(path)?;
    let (width, height) = pixels.dimensions();
    if width.min(height) < SIDE_MIN {
        return Err(ImageError::TooSmall { width, height });
    }
    Ok(pixels)
}

/// The usable images of a dataset, and the skipped ones with the reason.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageSet {
    /// In the order of the dataset.
    pub kept: Vec<HashedImage>,
    /// Files that are not used, such as unreadable ones and duplicates.
    pub skipped: Vec<DatasetProblem>,
}

impl ImageSet {
    /// Reads and hashes every file once, on `threads` threads. Files that the dataset ignores, cannot be read, are empty, or are larger than
    /// [`decode::FILE_BYTES_MAX`] are skipped. `progress` is called with the number of files read.
    ///
    /// # Panics
    /// Panics if a thread cannot be started.
    pub fn read(dataset: &Dataset, threads: usize, progress: &(dyn Fn(usize) + Sync)) -> Self {
        let hash = |(): &mut (), i: usize| -> Result<Result<ContentHash, DecodeError>, Infallible> {
            let bytes = decode::read_file(&dataset.images[i].path).and_then(|bytes| match bytes.is_empty() {
                true => Err(DecodeError::Empty),
                false => Ok(bytes),
            });
            Ok(bytes.map(|bytes| Sha256::digest(bytes).into()))
        };
        let Ok(hashes) = parallel::map(dataset.images.len(), threads, "read", || Ok(()), hash, progress);
        let mut set = ImageSet { kept: Vec::new(), skipped: dataset.ignored.clone() };
        for (image, hash) in dataset.images.iter().zip(hashes) {
            let path = image.path.clone();
            match hash {
                Ok(content_hash) => {
                    let (class, origin) = (image.class, Origin::File);
                    set.kept.push(HashedImage { path, class, content_hash, origin });
                }
                Err(error) => set.skipped.push(DatasetProblem { file: path, problem: error.to_string() }),
            }
        }
        set
    }

    /// Skips duplicates, as [`ImageSet::separate`] does within one set.
    pub fn dedup(self, known: usize) -> Self {
        self.separate(ImageSet::default(), known).0
    }

    /// Returns a training set and a validation set without duplicates. Of equal files of one class in a set, the first is kept; a
    /// file that is in both sets is kept in the validation set; of equal files with conflicting labels, none is kept. `known` is the
    /// number of the model's classes: images of none of them have no conflict with each other.
    pub fn separate(self, val: ImageSet, known: usize) -> (Self, Self) {
        let train_len = self.kept.len();
        let all: Vec<&HashedImage> = self.kept.iter().chain(&val.kept).collect();
        let mut by_content: HashMap<ContentHash, Vec<usize>> = HashMap::new();
        for (i, image) in all.iter().enumerate() {
            by_content.entry(image.content_hash).or_default().push(i);
        }
        let is_val = |i: usize| i >= train_len;
        let duplicate = |i: usize| -> Option<String> {
            let equal = &by_content[&all[i].content_hash];
            let same = |other: usize| format!("the same file as {}", printable(&all[other].path));
            let label = |i: usize| all[i].class.min(known);
            if let Some(mislabeled) = equal.iter().find(|other| label(**other) != label(i)) {
                return Some(format!("conflicting labels: {}, of another class", same(*mislabeled)));
            }
            let original = equal.iter().find(|other| is_val(**other)).filter(|_| !is_val(i));
            let original = original.or_else(|| equal.iter().find(|other| is_val(**other) == is_val(i)));
            original.filter(|original| **original != i).map(|original| same(*original))
        };
        let mut problems: Vec<Option<String>> = (0..all.len()).map(duplicate).collect();
        let val_problems = problems.split_off(train_len);
        (self.without(problems), val.without(val_problems))
    }

    /// Removes the images for which `unwanted` is true and returns them; the skipped files stay.
    pub fn take(&mut self, unwanted: impl Fn(&HashedImage) -> bool) -> Vec<HashedImage> {
        self.kept.extract_if(.., |image| unwanted(image)).collect()
    }

    /// Skips the images that have a problem; `problems` has an entry for each kept image.
    pub fn without(self, problems: Vec<Option<String>>) -> Self {
        let mut unique = ImageSet { kept: Vec::new(), skipped: self.skipped };
        for (image, problem) in self.kept.into_iter().zip(problems) {
            match problem {
                None => unique.kept.push(image),
                Some(problem) => unique.skipped.push(DatasetProblem { file: image.path, problem }),
            }
        }
        unique
    }

    /// Splits into (train, validation). About `fraction` (0–1) of each class goes to the validation set; of a class with
    /// two or more images, at least one goes to each set. The assignment depends on an image's content hash alone, so
    /// adding images does not move others, except an image that was moved to keep a set from being empty.
    pub fn split(self, fraction: f64) -> (Self, Self) {
        let mut by_class: HashMap<usize, Vec<f64>> = HashMap::new();
        for image in &self.kept {
            by_class.entry(image.class).or_default().push(split_key(&image.content_hash));
        }
        let limits: HashMap<usize, f64> =
            by_class.into_iter().map(|(class, keys)| (class, split_limit(keys, fraction))).collect();
        let in_val = |image: &HashedImage| split_key(&image.content_hash) < limits[&image.class];
        let (val, train) = self.kept.into_iter().partition(in_val);
        (ImageSet { kept: train, skipped: self.skipped }, ImageSet { kept: val, skipped: Vec::new() })
    }
}

/// Returns the key below which the images of a class belong to the validation set: `fraction`, or a value that leaves
/// at least one image on each side.
fn split_limit(mut keys: Vec<f64>, fraction: f64) -> f64 {
    keys.sort_by(f64::total_cmp);
    match keys[..] {
        [first, second, ..] if fraction <= first => second,
        [.., last] if keys.len() > 1 && fraction > last => last,
        _ => fraction,
    }
}

/// Returns a value in `[0, 1)`, uniform over content hashes.
fn split_key(hash: &ContentHash) -> f64 {
    let [a, b, c, d, e, f, ..] = *hash;
    // 48 bits, which f64 holds exactly.
    u64::from_be_bytes([0, 0, a, b, c, d, e, f]) as f64 / (1u64 << 48) as f64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn image_set(rows: &[(u8, usize)]) -> ImageSet {
        let image = |(i, (content, class)): (usize, &(u8, usize))| HashedImage {
            path: format!("{i}.jpg").into(),
            class: *class,
            content_hash: Sha256::digest([*content]).into(),
            origin: Origin::File,
        };
        ImageSet { kept: rows.iter().enumerate().map(image).collect(), skipped: Vec::new() }
    }

    fn files(set: &ImageSet) -> Vec<&str> {
        set.kept.iter().map(|image| image.path.to_str().unwrap()).collect()
    }

    fn problems(set: &ImageSet) -> Vec<String> {
        set.skipped.iter().map(|skipped| format!("{}: {}", skipped.file.display(), skipped.problem)).collect()
    }

    #[test]
    fn skips_and_names_duplicates() {
        let train = image_set(&[(1, 0), (2, 0), (1, 0), (3, 0), (3, 1), (4, 1), (5, 0)]);
        let mut val = image_set(&[(2, 0), (5, 1), (6, 1), (6, 1)]);
        val.kept.iter_mut().for_each(|image| image.path = Path::new("val").join(&image.path));
        let (train, val) = train.separate(val, 2);
        assert_eq!((files(&train), files(&val)), (vec!["0.jpg", "5.jpg"], vec!["val/0.jpg", "val/2.jpg"]));
        assert_eq!(
            problems(&train),
            [
                "1.jpg: the same file as val/0.jpg",
                "2.jpg: the same file as 0.jpg",
                "3.jpg: conflicting labels: the same file as 4.jpg, of another class",
                "4.jpg: conflicting labels: the same file as 3.jpg, of another class",
                "6.jpg: conflicting labels: the same file as val/1.jpg, of another class",
            ]
        );
        assert_eq!(
            problems(&val),
            [
                "val/1.jpg: conflicting labels: the same file as 6.jpg, of another class",
                "val/3.jpg: the same file as val/2.jpg",
            ]
        );
    }

    #[test]
    fn split_depends_on_contents_only() {
        let rows: Vec<(u8, usize)> = (0..=200).map(|i| (i, usize::from(i % 2))).collect();
        let (train, val) = image_set(&rows).split(0.2);
        assert_eq!(train.kept.len() + val.kept.len(), 201);
        assert!((25..=55).contains(&val.kept.len()), "{} of 201", val.kept.len());
        let more: Vec<(u8, usize)> = (0..=250).map(|i| (i, usize::from(i % 2))).collect();
        let (_, more_val) = image_set(&more).split(0.2);
        assert_eq!(more_val.kept[..val.kept.len()], val.kept, "the same, in the same order");
    }

    #[test]
    fn split_leaves_one_image_of_a_small_class_in_each_set() {
        for (class_size, fraction) in [(2, 0.2), (3, 0.01), (4, 0.99), (8, 0.2)] {
            let rows: Vec<(u8, usize)> = (0..30 * class_size).map(|i| (i as u8, i / class_size)).collect();
            let (train, val) = image_set(&rows).split(fraction);
            for class in 0..30 {
                let count = |set: &ImageSet| set.kept.iter().filter(|p| p.class == class).count();
                assert!(count(&train) >= 1 && count(&val) >= 1, "class {class} of {class_size} at {fraction}");
            }
        }
        let (train, val) = image_set(&[(1, 0)]).split(0.2);
        assert_eq!(train.kept.len() + val.kept.len(), 1, "a single image is in one of the sets");
    }
}
