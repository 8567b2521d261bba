//! What is wrong with a folder of photographs, before anything is learned from it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;

use image::imageops::{self, FilterType};
use serde::Serialize;

use super::dataset::Dataset;
use super::features::read;
use super::pool;

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

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    pub file: PathBuf,
    pub problem: String,
}

/// 256 bits: whether each pixel of a 17 × 16 grey copy is darker than its right neighbour.
type Fingerprint = [u64; 4];

/// A photograph that could be read.
struct Look {
    content: [u8; 32],
    fingerprint: Fingerprint,
}

/// Looks at every photograph of `dataset`, and of `val` where there is one. Finds what cannot be read or
/// is too small, what stands there twice, and what looks the same in both.
pub fn inspect(
    dataset: &Dataset,
    val: Option<&Dataset>,
    threads: usize,
    progress: &(dyn Fn(usize) + Sync),
) -> Inspection {
    let images: Vec<_> = dataset.images.iter().chain(val.iter().flat_map(|val| &val.images)).collect();
    let look = |(): &mut (), i: usize| -> Result<Result<Look, String>, Infallible> {
        Ok(read(images[i]).map(|(pixels, content)| Look { content, fingerprint: fingerprint(&pixels) }))
    };
    let Ok(looks) = pool::map(images.len(), threads, "inspect", || Ok(()), look, progress);

    let mut findings = Vec::new();
    let mut first: HashMap<[u8; 32], usize> = HashMap::new();
    for (i, look) in looks.iter().enumerate() {
        let problem = match look {
            Err(reason) => Some(reason.clone()),
            Ok(look) => match *first.entry(look.content).or_insert(i) {
                same if same == i => near(&looks, dataset.images.len(), i)
                    .map(|other| format!("looks like {}", images[other].path.display())),
                same if images[same].class != images[i].class => {
                    Some(format!("the same file as {}, of another class", images[same].path.display()))
                }
                same => Some(format!("the same file as {}", images[same].path.display())),
            },
        };
        findings.extend(problem.map(|problem| Finding { file: images[i].path.clone(), problem }));
    }
    let count = |(class, name): (usize, &String)| Count {
        class: name.clone(),
        images: images.iter().filter(|image| image.class == class).count(),
    };
    Inspection {
        images: images.len(),
        classes: dataset.classes.names().iter().enumerate().map(count).collect(),
        findings,
    }
}

/// For a photograph of the validation set, which begins at `val`: the one of the others that looks most
/// like it, where one looks the same.
fn near(looks: &[Result<Look, String>], val: usize, i: usize) -> Option<usize> {
    if i < val {
        return None;
    }
    let mine = looks[i].as_ref().ok()?.fingerprint;
    let differ = |other: &Look| -> u32 { mine.iter().zip(other.fingerprint).map(|(a, b)| (a ^ b).count_ones()).sum() };
    let others = looks[..val].iter().enumerate().filter_map(|(at, look)| Some((at, differ(look.as_ref().ok()?))));
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
        let found = inspect(&read("train"), Some(&read("val")), 2, &|_| {});
        assert_eq!(found.images, 8);
        assert_eq!(found.classes[0], Count { class: "daisy".into(), images: 5 });
        let text = found.to_string().replace(&format!("{}/", dir.path().display()), "");
        let findings: Vec<&str> = text.lines().skip(3).collect();
        assert_eq!(
            findings,
            [
                "train/daisy/again.png: the same file as train/daisy/a.png",
                "train/daisy/cut.jpg: the JPEG is cut short: no end marker",
                "train/daisy/tiny.png: 60×20 pixels, fewer than 32 a side",
                "train/roses/daisy.png: the same file as train/daisy/a.png, of another class",
                "val/roses/b.jpg: looks like train/roses/b.png",
            ]
        );
    }
}
