//! Checks of a dataset before training: unreadable and small images, duplicates and near-duplicates.

use std::convert::Infallible;
use std::fmt;

use serde::Serialize;

use crate::system::paths::printable;
use crate::train::data::dataset::{Dataset, DatasetProblem};
use crate::train::data::image_set::ImageSet;
use crate::train::data::similarity::{self, PerceptualHash};
use crate::train::parallel;
use crate::vision::UNKNOWN;

/// The result of [`inspect`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// Number of image files in all sets.
    pub images: usize,
    /// Number of image files of each class in all sets, in the order of the labels, then of each kind of images of none of the classes,
    /// as `unknown/kind`.
    pub classes: Vec<ClassCount>,
    /// Sorted by file.
    #[serde(rename = "findings")]
    pub problems: Vec<DatasetProblem>,
}

/// Number of image files of a class.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassCount {
    /// Name of the class.
    pub class: String,
    /// Number of image files.
    pub images: usize,
}

/// Decodes every image of `dataset` and `val` on `threads` threads and returns what should be fixed before training:
/// files that are not read, images that cannot be used, duplicates, images that look like another one, conflicting labels, and
/// classes with too few images to be trained. `val` has the kinds of `dataset`: [`Dataset::with_kinds_of`]. Without `val`, a
/// `val_fraction` (0–1) of the dataset is split off as [`ImageSet::split`] does. `progress` is called with the number of images decoded.
///
/// # Panics
/// Panics if a thread cannot be started.
pub fn inspect(
    dataset: &Dataset,
    val: Option<&Dataset>,
    val_fraction: f64,
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
) -> Inspection {
    let known = dataset.classes.names().len();
    let read = |set: &Dataset| ImageSet::read(set, threads, &|_| {});
    let (train, val_images) = match val.map(read) {
        Some(val) => read(dataset).separate(val, known),
        None => read(dataset).dedup(known).split(val_fraction),
    };
    let (train_len, val_kept) = (train.kept.len(), val_images.kept);
    let images: Vec<_> = train.kept.iter().chain(&val_kept).collect();
    let hash =
        |(): &mut (), i: usize| Ok::<_, Infallible>(images[i].decode().map(|pixels| PerceptualHash::new(&pixels)));
    let Ok(decoded) = parallel::map(images.len(), threads, "inspect", || Ok(()), hash, progress);

    let hashes: Vec<_> = decoded.iter().map(|hash| hash.as_ref().ok().copied()).collect();
    let compare = |(): &mut (), i: usize| {
        Ok::<_, Infallible>(hashes[i].and_then(|hash| similarity::most_similar(&hashes[..i], &hash)))
    };
    let Ok(similar) = parallel::map(images.len(), threads, "inspect", || Ok(()), compare, &|_| {});
    let mut problems = [train.skipped, val_images.skipped].concat();
    for (i, (decoded, similar)) in decoded.iter().zip(similar).enumerate() {
        let problem = match decoded {
            Err(error) => Some(error.to_string()),
            Ok(_) => similar.map(|other| similarity::problem(images[i], images[other], known)),
        };
        problems.extend(problem.map(|problem| DatasetProblem { file: images[i].path.clone(), problem }));
    }
    let usable = |range: std::ops::Range<usize>, class: usize| {
        range.filter(|i| images[*i].class == class && hashes[*i].is_some()).count()
    };
    for (class, name) in dataset.classes.names().iter().enumerate() {
        for (purpose, count) in
            [("training", usable(0..train_len, class)), ("validation", usable(train_len..images.len(), class))]
        {
            if count == 0 {
                let problem = format!("no image of this class is left for {purpose}");
                problems.push(DatasetProblem { file: name.into(), problem });
            }
        }
    }
    problems.sort_by(|a, b| a.file.cmp(&b.file));
    let all = || dataset.images.iter().chain(val.iter().flat_map(|val| &val.images));
    let kinds = dataset.unknown_kinds.iter().map(|kind| format!("{UNKNOWN}/{kind}"));
    let names = dataset.classes.names().iter().cloned().chain(kinds);
    let count = |(class, name): (usize, String)| ClassCount {
        class: name,
        images: all().filter(|image| image.class == class).count(),
    };
    Inspection { images: all().count(), classes: names.enumerate().map(count).collect(), problems }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for count in &self.classes {
            writeln!(f, "{:24} {:6}", count.class, count.images)?;
        }
        writeln!(f, "{:24} {:6}", "all", self.images)?;
        for problem in &self.problems {
            writeln!(f, "{}: {}", printable(&problem.file), problem.problem)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use image::ImageFormat;
    use image::imageops::{self, FilterType};

    use super::*;
    use crate::vision::decode::tests::{encode, gradient};

    #[test]
    fn reports_each_problem_once_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        };
        let flower = |seed: u32| {
            image::RgbImage::from_fn(90, 70, |x, y| {
                let tile = (x / 6 + 100 * (y / 6) + 10_000 * seed).wrapping_mul(2_654_435_761);
                image::Rgb([(tile >> 24) as u8; 3])
            })
        };
        let png = |image: &image::RgbImage| encode(image, ImageFormat::Png);
        put("train/daisy/a.png", &png(&flower(1)));
        put("train/daisy/again.png", &png(&flower(1)));
        put("train/daisy/cut.jpg", &encode(&gradient(60, 40), ImageFormat::Jpeg)[..200]);
        put("train/daisy/tiny.png", &png(&gradient(60, 20)));
        put("train/daisy/f.heic", b"x");
        put("train/roses/b.png", &png(&flower(2)));
        put("train/roses/daisy.png", &png(&flower(1)));
        put("val/daisy/c.png", &png(&flower(3)));
        // The same image in another format.
        put("val/roses/b.jpg", &encode(&flower(2), ImageFormat::Jpeg));
        // Resized.
        put(
            "val/daisy/e.jpg",
            &encode(&imageops::resize(&flower(2), 180, 140, FilterType::Triangle), ImageFormat::Jpeg),
        );
        let read = |name: &str| Dataset::read(&dir.path().join(name)).unwrap();
        let inspection = inspect(&read("train"), Some(&read("val")), 0.2, 2, &|_| {});
        assert_eq!(inspection.images, 9);
        assert_eq!(inspection.classes[0], ClassCount { class: "daisy".into(), images: 6 });
        let text = inspection.to_string().replace(&format!("{}/", dir.path().display()), "");
        let problems: Vec<&str> = text.lines().skip(3).collect();
        assert_eq!(
            problems,
            [
                "train/daisy/a.png: conflicting labels: the same file as train/roses/daisy.png, of another class",
                "train/daisy/again.png: conflicting labels: the same file as train/roses/daisy.png, of another class",
                "train/daisy/cut.jpg: the JPEG is truncated: image data is missing",
                "train/daisy/f.heic: not read, expected a file name with one of jpg, jpeg, jpe, jfif, png, webp",
                "train/daisy/tiny.png: 60×20 pixels, fewer than 32 a side",
                "train/roses/daisy.png: conflicting labels: the same file as train/daisy/a.png, of another class",
                "val/daisy/e.jpg: conflicting labels: looks like train/roses/b.png, of another class",
                "val/roses/b.jpg: looks like train/roses/b.png",
                "daisy: no image of this class is left for training",
            ]
        );
    }
}
