//! The photographs of a dataset by their contents: which stand there twice, and which are held back to
//! measure on.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::train::data::dataset::Dataset;
use crate::train::features::pool;
use crate::vision::decode::{self, DecodeError};

/// SHA-256 of a file.
pub type Content = [u8; 32];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Photograph {
    pub path: PathBuf,
    /// The place of its class among the labels.
    pub class: usize,
    pub content: Content,
}

/// A file that is not used, or should not be, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub file: PathBuf,
    pub problem: String,
}

/// What can be learned from, and what was left out of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Photographs {
    /// In the order of the dataset.
    pub kept: Vec<Photograph>,
    pub left_out: Vec<Finding>,
}

impl Photographs {
    /// Reads every file once. Those that cannot be read, or are larger than a photograph is, are left out.
    pub fn read(dataset: &Dataset, threads: usize, progress: &(dyn Fn(usize) + Sync)) -> Self {
        let hash = |(): &mut (), i: usize| -> Result<Result<Content, String>, Infallible> {
            let bytes = decode::read_file(&dataset.images[i].path).and_then(|bytes| match bytes.is_empty() {
                true => Err(DecodeError::Empty),
                false => Ok(bytes),
            });
            Ok(bytes.map(|bytes| Sha256::digest(bytes).into()).map_err(|e| e.to_string()))
        };
        let Ok(contents) = pool::map(dataset.images.len(), threads, "read", || Ok(()), hash, progress);
        let mut read = Photographs::default();
        for (image, content) in dataset.images.iter().zip(contents) {
            match content {
                Ok(content) => {
                    read.kept.push(Photograph { path: image.path.clone(), class: image.class, content });
                }
                Err(problem) => read.left_out.push(Finding { file: image.path.clone(), problem }),
            }
        }
        read
    }

    /// Leaves out what stands there more than once: of equal files of one class all but the first, of equal
    /// files of different classes all, and what stands in `other` as well.
    pub fn dedup(self, other: Option<&Photographs>) -> Self {
        let mut of_content: HashMap<Content, Vec<&Photograph>> = HashMap::new();
        for photograph in &self.kept {
            of_content.entry(photograph.content).or_default().push(photograph);
        }
        let elsewhere: HashMap<Content, &Photograph> =
            other.map(|other| other.kept.iter().map(|there| (there.content, there)).collect()).unwrap_or_default();
        let double = |photograph: &Photograph| -> Option<String> {
            let same = |other: &Photograph| format!("the same file as {}", other.path.display());
            if let Some(there) = elsewhere.get(&photograph.content) {
                return Some(same(there));
            }
            let equal = &of_content[&photograph.content];
            if let Some(rival) = equal.iter().find(|rival| rival.class != photograph.class) {
                return Some(format!("{}, of another class", same(rival)));
            }
            (equal[0].path != photograph.path).then(|| same(equal[0]))
        };
        let problems: Vec<Option<String>> = self.kept.iter().map(double).collect();
        let mut without = Photographs { kept: Vec::new(), left_out: self.left_out };
        for (photograph, problem) in self.kept.into_iter().zip(problems) {
            match problem {
                None => without.kept.push(photograph),
                Some(problem) => without.left_out.push(Finding { file: photograph.path, problem }),
            }
        }
        without
    }

    /// Splits off about the given share, 0–1, of each class for validation, and of a class of two or more at least one and
    /// never all. A photograph's content alone decides where it belongs, so that adding others moves none; only where one
    /// stood there in want of a better may it go back.
    pub fn split(self, share: f64) -> (Self, Self) {
        let mut of_class: HashMap<usize, Vec<f64>> = HashMap::new();
        for photograph in &self.kept {
            of_class.entry(photograph.class).or_default().push(place(&photograph.content));
        }
        let limits: HashMap<usize, f64> =
            of_class.into_iter().map(|(class, places)| (class, limit(places, share))).collect();
        let in_val = |photograph: &Photograph| place(&photograph.content) < limits[&photograph.class];
        let (val, train) = self.kept.into_iter().partition(in_val);
        (Photographs { kept: train, left_out: self.left_out }, Photographs { kept: val, left_out: Vec::new() })
    }
}

/// The place below which a class's photographs are for validation: `share`, or what leaves one on either side.
fn limit(mut places: Vec<f64>, share: f64) -> f64 {
    places.sort_by(f64::total_cmp);
    match places[..] {
        [first, second, ..] if share <= first => second,
        [.., last] if places.len() > 1 && share > last => last,
        _ => share,
    }
}

/// A number from 0 to 1 that follows from a file's content.
fn place(content: &Content) -> f64 {
    let [a, b, c, d, e, f, ..] = *content;
    // 48 bits, which f64 holds exactly.
    u64::from_be_bytes([0, 0, a, b, c, d, e, f]) as f64 / (1u64 << 48) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn photographs(rows: &[(u8, usize)]) -> Photographs {
        let one = |(i, (content, class)): (usize, &(u8, usize))| Photograph {
            path: format!("{i}.jpg").into(),
            class: *class,
            content: Sha256::digest([*content]).into(),
        };
        Photographs { kept: rows.iter().enumerate().map(one).collect(), left_out: Vec::new() }
    }

    #[test]
    fn doubles_are_left_out_and_named() {
        let set = photographs(&[(1, 0), (2, 0), (1, 0), (3, 0), (3, 1), (4, 1)]);
        let other = photographs(&[(2, 0)]);
        let kept = set.dedup(Some(&other));
        let paths: Vec<_> = kept.kept.iter().map(|p| p.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["0.jpg", "5.jpg"]);
        let problems: Vec<_> = kept.left_out.iter().map(|f| format!("{}: {}", f.file.display(), f.problem)).collect();
        assert_eq!(
            problems,
            [
                "1.jpg: the same file as 0.jpg",
                "2.jpg: the same file as 0.jpg",
                "3.jpg: the same file as 4.jpg, of another class",
                "4.jpg: the same file as 3.jpg, of another class",
            ]
        );
    }

    #[test]
    fn the_split_follows_contents_alone() {
        let rows: Vec<(u8, usize)> = (0..=200).map(|i| (i, usize::from(i % 2))).collect();
        let (train, val) = photographs(&rows).split(0.2);
        assert_eq!(train.kept.len() + val.kept.len(), 201);
        assert!((25..=55).contains(&val.kept.len()), "{} of 201", val.kept.len());
        let more: Vec<(u8, usize)> = (0..=250).map(|i| (i, usize::from(i % 2))).collect();
        let (_, more_val) = photographs(&more).split(0.2);
        assert_eq!(more_val.kept[..val.kept.len()], val.kept, "the same, in the same order");
    }

    #[test]
    fn a_small_class_gives_one_and_keeps_one() {
        for (class_size, share) in [(2, 0.2), (3, 0.01), (4, 0.99), (8, 0.2)] {
            let rows: Vec<(u8, usize)> = (0..30 * class_size).map(|i| (i as u8, i / class_size)).collect();
            let (train, val) = photographs(&rows).split(share);
            for class in 0..30 {
                let of = |set: &Photographs| set.kept.iter().filter(|p| p.class == class).count();
                assert!(of(&train) >= 1 && of(&val) >= 1, "class {class} of {class_size} at {share}");
            }
        }
        let (train, val) = photographs(&[(1, 0)]).split(0.2);
        assert_eq!(train.kept.len() + val.kept.len(), 1, "of one there is no half");
    }
}
