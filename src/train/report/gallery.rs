//! The images that the report shows, with their predictions.

use std::convert::Infallible;

use image::RgbImage;
use image::imageops::{self, FilterType};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::train::data::image_set::HashedImage;
use crate::train::evaluate::EvaluatedSet;
use crate::train::optim::training_loop;
use crate::train::parallel;
use crate::train::report::class_activation_maps::ClassActivationMaps;
use crate::train::run::outcome::Trained;
use crate::train::run::settings::Settings;
use crate::vision::head::argmax;
use crate::vision::{BackboneError, Labels, OnnxBackbone, Prediction};

/// Images of the random sample: six columns, five rows.
const SAMPLE_LEN: usize = 30;
/// Largest number of misclassified images.
const ERRORS_MAX: usize = 12;
/// Largest numbers of class activation maps, of each class and in all.
const CAMS_PER_CLASS: usize = 2;
const CAMS_MAX: usize = 20;
/// The longer side of a thumbnail, in pixels.
const THUMBNAIL_SIDE: u32 = 220;

/// The validation images of the report.
pub struct Gallery {
    /// A random sample.
    pub sample: Vec<GalleryImage>,
    /// Misclassified images, the most confident first.
    pub errors: Vec<GalleryImage>,
    /// The most confident correct images of each class with their class activation maps; `None` if the network does not
    /// allow them.
    pub cams: Option<Vec<GalleryImage>>,
}

/// An image with its prediction.
#[derive(Debug, Clone)]
pub struct GalleryImage {
    /// File name without folder.
    pub file: String,
    /// Name of the true class.
    pub truth: String,
    /// Name of the top class, whether or not it is rejected as unknown.
    pub predicted: String,
    /// Probability of the top class, 0–1.
    pub confidence: f32,
    /// Whether the OOD detector accepts the image.
    pub known: bool,
    /// The image, resized so that its longer side has 220 pixels.
    pub thumbnail: RgbImage,
}

impl Gallery {
    /// Selects and loads the images, on `threads` threads. Images that cannot be decoded are skipped.
    ///
    /// # Errors
    /// Fails if the network cannot run.
    ///
    /// # Panics
    /// Panics if a thread cannot be started.
    pub fn load(
        settings: &Settings,
        network: &OnnxBackbone,
        trained: &Trained,
        threads: usize,
    ) -> Result<Self, BackboneError> {
        let (labels, val, preprocess) = (&trained.labels, &trained.val, settings.preprocess());
        let sample = random_sample(val, SAMPLE_LEN, settings.hyperparams.seed);
        let mut correct = most_confident_correct(val, labels.names().len(), CAMS_PER_CLASS);
        correct.truncate(CAMS_MAX);
        let cams = ClassActivationMaps::new(network, trained, &preprocess);
        Ok(Gallery {
            sample: load(labels, val, &sample, threads),
            errors: load(labels, val, &most_confident_errors(val, ERRORS_MAX), threads),
            cams: cams.map(|cams| cams.load(labels, val, &correct, threads)).transpose()?,
        })
    }
}

impl GalleryImage {
    /// Creates the image from its prediction; `pixels` is the decoded photograph.
    ///
    /// # Panics
    /// Panics if the true or the top class is not an index into `labels`, or if `prediction` has no probabilities.
    pub fn new(labels: &Labels, image: &HashedImage, prediction: &Prediction, pixels: &RgbImage) -> Self {
        let top = argmax(&prediction.probabilities);
        GalleryImage {
            file: image.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            truth: labels.name(Some(image.class)).into(),
            predicted: labels.name(Some(top)).into(),
            confidence: prediction.probabilities[top],
            known: prediction.known,
            thumbnail: thumbnail(pixels),
        }
    }

    /// Returns whether the top class is the true class.
    pub fn is_correct(&self) -> bool {
        self.truth == self.predicted
    }

    /// Returns the prediction with its confidence, and the true class if the prediction is wrong.
    pub fn title_lines(&self) -> [String; 2] {
        let truth = if self.is_correct() { String::new() } else { format!("({})", self.truth) };
        [format!("{} {:.0} %", self.predicted, self.confidence * 100.0), truth]
    }
}

/// Returns `count` random indices into the set, ascending.
fn random_sample(set: &EvaluatedSet, count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..set.images.len()).collect();
    training_loop::shuffle(&mut order, &mut ChaCha8Rng::seed_from_u64(seed));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// Returns the indices of the misclassified images, the most confident first.
fn most_confident_errors(set: &EvaluatedSet, count: usize) -> Vec<usize> {
    most_confident(set, count, |image, top| image.class != top)
}

/// Returns the indices of the most confident correct images, `count` of each class.
fn most_confident_correct(set: &EvaluatedSet, classes: usize, count: usize) -> Vec<usize> {
    let of_class = |class| most_confident(set, count, move |image, top| image.class == class && top == class);
    (0..classes).flat_map(of_class).collect()
}

/// Returns the indices of the `count` most confident images for which `filter(photograph, top class)` holds.
fn most_confident(set: &EvaluatedSet, count: usize, filter: impl Fn(&HashedImage, usize) -> bool) -> Vec<usize> {
    let top = |i: usize| argmax(&set.predictions[i].probabilities);
    let confidence = |i: usize| set.predictions[i].probabilities[top(i)];
    let mut indices: Vec<usize> = (0..set.images.len()).filter(|i| filter(&set.images[*i], top(*i))).collect();
    indices.sort_by(|a, b| confidence(*b).total_cmp(&confidence(*a)));
    indices.truncate(count);
    indices
}

/// Returns the images at `indices`; those that cannot be decoded are skipped.
fn load(labels: &Labels, set: &EvaluatedSet, indices: &[usize], threads: usize) -> Vec<GalleryImage> {
    let load = |(): &mut (), n: usize| {
        let (image, prediction) = (&set.images[indices[n]], &set.predictions[indices[n]]);
        let pixels = image.decode().ok();
        Ok::<_, Infallible>(pixels.map(|pixels| GalleryImage::new(labels, image, prediction, &pixels)))
    };
    let Ok(images) = parallel::map(indices.len(), threads, "report", || Ok(()), load, &|_| {});
    images.into_iter().flatten().collect()
}

/// Resizes an image so that its longer side has [`THUMBNAIL_SIDE`] pixels.
fn thumbnail(pixels: &RgbImage) -> RgbImage {
    let (width, height) = pixels.dimensions();
    let scale = THUMBNAIL_SIDE as f32 / width.max(height) as f32;
    let side = |length: u32| ((length as f32 * scale) as u32).max(1);
    imageops::resize(pixels, side(width), side(height), FilterType::Triangle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thumbnail_keeps_the_aspect_ratio() {
        assert_eq!(thumbnail(&RgbImage::new(440, 110)).dimensions(), (220, 55));
        assert_eq!(thumbnail(&RgbImage::new(1, 900)).dimensions(), (1, 220));
    }
}
