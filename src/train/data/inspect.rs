//! What is wrong with a folder of photographs, before anything is learned from it.

use std::convert::Infallible;
use std::fmt;

use image::imageops::{self, FilterType};
use serde::Serialize;

use crate::train::data::dataset::Dataset;
use crate::train::data::photographs::{Finding, Photographs};
use crate::train::features;
use crate::train::features::pool;

/// Two photographs whose fingerprints differ in no more bits look the same.
const NEAR_BITS_MAX: u32 = 10;
/// Bits a side: 16 × 16 comparisons of neighbours.
const SIDE: u32 = 16;

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    pub images: usize,
    pub classes: Vec<Count>,
    pub findings: Vec<Finding>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Count {
    pub class: String,
    pub images: usize,
}

/// 256 bits: whether each pixel of a 17 × 16 grey copy is darker than its right neighbour.
type Fingerprint = [u64; 4];

/// Looks at every photograph of `dataset`, and of `val`; where there is none, the share of the dataset that the trainer
/// would split off stands for it. Finds what cannot be read or is too small, what stands there twice, and what looks the
/// same in both.
pub fn inspect(
    dataset: &Dataset,
    val: Option<&Dataset>,
    val_fraction: f64,
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
) -> Inspection {
    let read = |set: &Dataset| Photographs::read(set, threads, &|_| {}).dedup(None);
    let (photographs, val_photographs) = match val.map(read) {
        Some(val) => (read(dataset).dedup(Some(&val)), val),
        None => read(dataset).split(val_fraction),
    };
    let (train, val_kept) = (photographs.kept.len(), val_photographs.kept);
    let images: Vec<_> = photographs.kept.iter().chain(&val_kept).collect();
    let look = |(): &mut (), i: usize| Ok::<_, Infallible>(features::read(&images[i].path).map(|p| fingerprint(&p)));
    let Ok(looks) = pool::map(images.len(), threads, "inspect", || Ok(()), look, progress);

    let mut findings = [photographs.left_out, val_photographs.left_out].concat();
    for (i, look) in looks.iter().enumerate() {
        let problem = match look {
            Err(problem) => Some(problem.clone()),
            Ok(mine) if i >= train => {
                near(&looks[..train], mine).map(|other| format!("looks like {}", images[other].path.display()))
            }
            Ok(_) => None,
        };
        findings.extend(problem.map(|problem| Finding { file: images[i].path.clone(), problem }));
    }
    findings.sort_by(|a, b| a.file.cmp(&b.file));
    let all = || dataset.images.iter().chain(val.iter().flat_map(|val| &val.images));
    let count = |(class, name): (usize, &String)| Count {
        class: name.clone(),
        images: all().filter(|image| image.class == class).count(),
    };
    Inspection {
        images: all().count(),
        classes: dataset.classes.names().iter().enumerate().map(count).collect(),
        findings,
    }
}

/// The one that looks most like `mine`, where one looks the same.
fn near(looks: &[Result<Fingerprint, String>], mine: &Fingerprint) -> Option<usize> {
    let differ = |other: &Fingerprint| -> u32 { mine.iter().zip(other).map(|(a, b)| (a ^ b).count_ones()).sum() };
    let others = looks.iter().enumerate().filter_map(|(at, look)| Some((at, differ(look.as_ref().ok()?))));
    others.min_by_key(|(_, bits)| *bits).filter(|(_, bits)| *bits <= NEAR_BITS_MAX).map(|(at, _)| at)
}

fn fingerprint(pixels: &image::RgbImage) -> Fingerprint {
    let grey = imageops::grayscale(pixels);
    let small = imageops::resize(&grey, SIDE + 1, SIDE, FilterType::Triangle);
    let mut bits = [0; 4];
    for y in 0..SIDE {
        for x in 0..SIDE {
            let darker = small.get_pixel(x, y).0[0] < small.get_pixel(x + 1, y).0[0];
            let place = (y * SIDE + x) as usize;
            bits[place / 64] |= u64::from(darker) << (place % 64);
        }
    }
    bits
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for count in &self.classes {
            writeln!(f, "{:24} {:6}", count.class, count.images)?;
        }
        writeln!(f, "{:24} {:6}", "all", self.images)?;
        for finding in &self.findings {
            writeln!(f, "{}: {}", finding.file.display(), finding.problem)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use image::ImageFormat;

    use super::*;
    use crate::vision::decode::tests::{encode, gradient};

    #[test]
    fn everything_that_is_wrong_is_found_and_nothing_else() {
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
        put("train/roses/b.png", &png(&flower(2)));
        put("train/roses/daisy.png", &png(&flower(1)));
        put("val/daisy/c.png", &png(&flower(3)));
        // The same picture in another file.
        put("val/roses/b.jpg", &encode(&flower(2), ImageFormat::Jpeg));
        let read = |name: &str| Dataset::read(&dir.path().join(name)).unwrap();
        let found = inspect(&read("train"), Some(&read("val")), 0.2, 2, &|_| {});
        assert_eq!(found.images, 8);
        assert_eq!(found.classes[0], Count { class: "daisy".into(), images: 5 });
        let text = found.to_string().replace(&format!("{}/", dir.path().display()), "");
        let findings: Vec<&str> = text.lines().skip(3).collect();
        assert_eq!(
            findings,
            [
                "train/daisy/a.png: the same file as train/roses/daisy.png, of another class",
                "train/daisy/again.png: the same file as train/roses/daisy.png, of another class",
                "train/daisy/cut.jpg: the JPEG is cut short: no end marker",
                "train/daisy/tiny.png: 60×20 pixels, fewer than 32 a side",
                "train/roses/daisy.png: the same file as train/daisy/a.png, of another class",
                "val/roses/b.jpg: looks like train/roses/b.png",
            ]
        );
    }
}
