//! What the frozen backbone says of every photograph, computed on all cores.

use std::collections::HashMap;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::dataset::Labelled;
use super::pool;
use crate::vision::{Backbone, BackboneError, Preprocess, Preprocessor, decode};

/// A photograph with a shorter side shows nothing that could be learned.
pub const SIDE_MIN: u32 = 32;

/// Features and labels of a set of photographs, in the order of the set.
#[derive(Debug, Clone, Default)]
pub struct Features {
    /// Numbers in one vector.
    pub width: usize,
    /// `[images, width]`, a photograph a row.
    pub values: Vec<f32>,
    /// The class of each row.
    pub classes: Vec<usize>,
    /// SHA-256 of each row's file.
    pub contents: Vec<[u8; 32]>,
    /// Each row's file.
    pub paths: Vec<PathBuf>,
    /// What is not used, and why.
    pub left_out: Vec<(PathBuf, String)>,
}

impl Features {
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// The vector of photograph `i`, `[width]`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.width..(i + 1) * self.width]
    }

    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.width)
    }

    fn push(&mut self, row: &[f32], class: usize, content: [u8; 32], path: PathBuf) {
        self.values.extend_from_slice(row);
        self.classes.push(class);
        self.contents.push(content);
        self.paths.push(path);
    }

    /// Some of the rows, in the order given; nothing is left out of them.
    fn subset(&self, rows: impl Iterator<Item = usize>) -> Self {
        let mut subset = Features { width: self.width, ..Features::default() };
        for i in rows {
            subset.push(self.row(i), self.classes[i], self.contents[i], self.paths[i].clone());
        }
        subset
    }

    /// Leaves out what stands there more than once: of equal files of one class all but the first, of equal
    /// files of different classes all, and what stands in `other` as well.
    pub fn without_doubles(self, other: Option<&Features>) -> Self {
        let mut of_content: HashMap<&[u8; 32], Vec<usize>> = HashMap::new();
        for (i, content) in self.contents.iter().enumerate() {
            of_content.entry(content).or_default().push(i);
        }
        let elsewhere: HashMap<&[u8; 32], &PathBuf> =
            other.map(|other| other.contents.iter().zip(&other.paths).collect()).unwrap_or_default();
        let double = |i: usize| -> Option<String> {
            if let Some(path) = elsewhere.get(&self.contents[i]) {
                return Some(format!("the same file as {}", path.display()));
            }
            let equal = &of_content[&self.contents[i]];
            if let Some(rival) = equal.iter().find(|rival| self.classes[**rival] != self.classes[i]) {
                return Some(format!("the same file as {}, of another class", self.paths[*rival].display()));
            }
            (equal[0] != i).then(|| format!("the same file as {}", self.paths[equal[0]].display()))
        };
        let doubles: Vec<Option<String>> = (0..self.len()).map(double).collect();
        let mut kept = self.subset((0..self.len()).filter(|i| doubles[*i].is_none()));
        let named = self.paths.into_iter().zip(doubles).filter_map(|(path, reason)| Some((path, reason?)));
        kept.left_out = self.left_out.into_iter().chain(named).collect();
        kept
    }

    /// Splits off about the given share, 0–1, for validation. A photograph's content alone decides where it
    /// belongs: adding others moves none, and each class gives its share.
    pub fn split(self, share: f64) -> (Self, Self) {
        let in_val = |i: &usize| place(&self.contents[*i]) < share;
        let (val, train): (Vec<usize>, Vec<usize>) = (0..self.len()).partition(in_val);
        let train = Features { left_out: self.left_out.clone(), ..self.subset(train.into_iter()) };
        (train, self.subset(val.into_iter()))
    }
}

/// A number from 0 to 1 that follows from a file's content.
fn place(content: &[u8; 32]) -> f64 {
    let [a, b, c, d, e, f, ..] = *content;
    // 48 bits, which f64 holds exactly.
    u64::from_be_bytes([0, 0, a, b, c, d, e, f]) as f64 / (1u64 << 48) as f64
}

/// Decodes each photograph once and runs the backbone on it, on `threads` threads. `progress` is told
/// how many are done.
pub fn extract(
    backbone: &Backbone,
    preprocess: &Preprocess,
    images: &[Labelled],
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Features, BackboneError> {
    let init = || {
        let preprocessor = Preprocessor::new(preprocess.clone());
        Ok((backbone.session()?, preprocessor, vec![0.0; preprocess.input_len()]))
    };
    let extracted = pool::map(
        images.len(),
        threads,
        "features",
        init,
        |(session, preprocessor, input), i| {
            let (pixels, content) = match read(&images[i]) {
                Ok(read) => read,
                Err(reason) => return Ok(Err(reason)),
            };
            preprocessor.run(&pixels, input);
            Ok(Ok((session.features(input)?, content)))
        },
        progress,
    )?;
    let mut features = Features { width: backbone.width(), ..Features::default() };
    for (image, one) in images.iter().zip(extracted) {
        match one {
            Ok((row, content)) => features.push(&row, image.class, content, image.path.clone()),
            Err(reason) => features.left_out.push((image.path.clone(), reason)),
        }
    }
    Ok(features)
}

/// A photograph's pixels and the SHA-256 of its file; or why it is of no use.
pub fn read(image: &Labelled) -> Result<(image::RgbImage, [u8; 32]), String> {
    let bytes = decode::read_file(&image.path).map_err(|e| e.to_string())?;
    let pixels = decode::encoded(&bytes).map_err(|e| e.to_string())?;
    let (width, height) = pixels.dimensions();
    if width.min(height) < SIDE_MIN {
        return Err(format!("{width}×{height} pixels, fewer than {SIDE_MIN} a side"));
    }
    Ok((pixels, Sha256::digest(&bytes).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(rows: &[(u8, usize)]) -> Features {
        let mut features = Features { width: 1, ..Features::default() };
        for (i, (content, class)) in rows.iter().enumerate() {
            features.push(&[f32::from(*content)], *class, Sha256::digest([*content]).into(), format!("{i}.jpg").into());
        }
        features
    }

    fn names(features: &Features) -> Vec<String> {
        features.paths.iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn doubles_are_left_out_and_named() {
        let set = features(&[(1, 0), (1, 0), (2, 0), (2, 1), (3, 1)]).without_doubles(None);
        assert_eq!(names(&set), ["0.jpg", "4.jpg"]);
        assert_eq!(set.values, [1.0, 3.0]);
        let reasons: Vec<_> = set.left_out.iter().map(|(path, why)| format!("{}: {why}", path.display())).collect();
        assert_eq!(
            reasons,
            [
                "1.jpg: the same file as 0.jpg",
                "2.jpg: the same file as 3.jpg, of another class",
                "3.jpg: the same file as 2.jpg, of another class",
            ]
        );
        let val = features(&[(3, 1)]);
        assert_eq!(names(&set.without_doubles(Some(&val))), ["0.jpg"], "what is measured on is not learned from");
    }

    #[test]
    fn a_split_is_about_the_share_and_adding_moves_nothing() {
        let rows: Vec<(u8, usize)> = (0..=200).map(|i| (i, usize::from(i % 2))).collect();
        let (train, val) = features(&rows).split(0.2);
        assert_eq!(train.len() + val.len(), 201);
        assert!((25..=55).contains(&val.len()), "{} of 201", val.len());
        let more: Vec<(u8, usize)> = (0..=250).map(|i| (i, usize::from(i % 2))).collect();
        let (_, more_val) = features(&more).split(0.2);
        assert!(val.contents.iter().all(|content| more_val.contents.contains(content)));
        assert!(more_val.contents[..val.len()] == val.contents, "and in the same order");
        let (all, none) = features(&rows).split(0.0);
        assert_eq!((all.len(), none.len()), (201, 0));
    }
}
