//! The photographs that the report shows, with what the model makes of them and where it looked.

use std::convert::Infallible;

use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::train::data::photographs::Photograph;
use crate::train::evaluate::EvaluatedSet;
use crate::train::features;
use crate::train::features::pool;
use crate::train::optim::sgd;
use crate::train::run::outcome::Trained;
use crate::vision::backbone::{Session, channels_last};
use crate::vision::head::argmax;
use crate::vision::{BackboneError, Head, Labels, LastConvWeights, Network, Prediction, Preprocess, Preprocessor};

/// The longer side of a thumbnail, in pixels.
const SIDE: u32 = 220;
/// How strongly the places are coloured, 0–1.
const PAINT: f32 = 0.6;

/// A photograph beside what it was taken for.
#[derive(Debug, Clone)]
pub struct GalleryImage {
    pub file: String,
    pub truth: String,
    /// The best class, rejected as unknown or not.
    pub taken_for: String,
    /// Of the best class, 0–1.
    pub confidence: f32,
    pub known: bool,
    pub thumbnail: RgbImage,
}

impl GalleryImage {
    pub fn right(&self) -> bool {
        self.truth == self.taken_for
    }

    /// What was seen; and what it is, where that was wrong.
    pub fn title_lines(&self) -> [String; 2] {
        let truth = if self.right() { String::new() } else { format!("({})", self.truth) };
        [format!("{} {:.0} %", self.taken_for, self.confidence * 100.0), truth]
    }
}

/// The places of `count` photographs, by chance; in the order of the set.
pub fn by_chance(measured: &EvaluatedSet, count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..measured.photographs.len()).collect();
    sgd::shuffle(&mut order, &mut ChaCha8Rng::seed_from_u64(seed));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// The places of the photographs that were wrong, the surest first.
pub fn worst(measured: &EvaluatedSet, count: usize) -> Vec<usize> {
    surest(measured, count, |photograph, best| photograph.class != best)
}

/// The places of the surest that were right, `count` of each class.
pub fn best_of_each(measured: &EvaluatedSet, classes: usize, count: usize) -> Vec<usize> {
    let of_class = |class| surest(measured, count, move |photograph, best| photograph.class == class && best == class);
    (0..classes).flat_map(of_class).collect()
}

fn surest(measured: &EvaluatedSet, count: usize, wanted: impl Fn(&Photograph, usize) -> bool) -> Vec<usize> {
    let best = |i: usize| argmax(&measured.predictions[i].probabilities);
    let sure = |i: usize| measured.predictions[i].probabilities[best(i)];
    let mut places: Vec<usize> =
        (0..measured.photographs.len()).filter(|i| wanted(&measured.photographs[*i], best(*i))).collect();
    places.sort_by(|a, b| sure(*b).total_cmp(&sure(*a)));
    places.truncate(count);
    places
}

/// Thumbnails of the photographs at `places`. One that can no longer be read is left out.
pub fn load(labels: &Labels, measured: &EvaluatedSet, places: &[usize], threads: usize) -> Vec<GalleryImage> {
    let load = |(): &mut (), n: usize| {
        let (photograph, prediction) = (&measured.photographs[places[n]], &measured.predictions[places[n]]);
        let pixels = features::read(&photograph.path).ok();
        Ok::<_, Infallible>(pixels.map(|pixels| shown(labels, photograph, prediction, &pixels)))
    };
    let Ok(shown) = pool::map(places.len(), threads, "report", || Ok(()), load, &|_| {});
    shown.into_iter().flatten().collect()
}

fn shown(labels: &Labels, photograph: &Photograph, prediction: &Prediction, pixels: &RgbImage) -> GalleryImage {
    let best = argmax(&prediction.probabilities);
    GalleryImage {
        file: photograph.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        truth: labels.name(Some(photograph.class)).into(),
        taken_for: labels.name(Some(best)).into(),
        confidence: prediction.probabilities[best],
        known: prediction.known,
        thumbnail: thumbnail(pixels),
    }
}

fn thumbnail(pixels: &RgbImage) -> RgbImage {
    let (width, height) = pixels.dimensions();
    let scale = SIDE as f32 / width.max(height) as f32;
    let side = |length: u32| ((length as f32 * scale) as u32).max(1);
    imageops::resize(pixels, side(width), side(height), FilterType::Triangle)
}

/// Finds where a class was seen. A head on pooled features says it exactly: the logit is the mean over the
/// places of what each place adds.
pub struct CamPainter<'a> {
    network: &'a Network,
    tail: &'a LastConvWeights,
    head: &'a Head,
    preprocess: &'a Preprocess,
}

impl<'a> CamPainter<'a> {
    /// None where the network does not end in a convolution and a mean.
    pub fn new(network: &'a Network, trained: &'a Trained, preprocess: &'a Preprocess) -> Option<Self> {
        let own = &network.info().last_conv.as_ref()?.weights;
        Some(CamPainter { network, tail: trained.last_conv.as_ref().unwrap_or(own), head: &trained.head, preprocess })
    }

    /// The photographs at `places` with their thumbnails painted where their best class was seen.
    pub fn paint(
        &self,
        labels: &Labels,
        measured: &EvaluatedSet,
        places: &[usize],
        threads: usize,
    ) -> Result<Vec<GalleryImage>, BackboneError> {
        let trunk = self.network.feature_maps()?;
        let init = || {
            Ok((trunk.session()?, Preprocessor::new(self.preprocess.clone()), vec![0.0; self.preprocess.input_len()]))
        };
        let paint = |(session, preprocessor, input): &mut (Session, Preprocessor, Vec<f32>), n: usize| {
            let (photograph, prediction) = (&measured.photographs[places[n]], &measured.predictions[places[n]]);
            let Ok(pixels) = features::read(&photograph.path) else { return Ok(None) };
            preprocessor.run(&pixels, input);
            let map = channels_last(session.features(input)?, self.tail.inputs());
            let seen = self.seen(&self.tail.activations(&map), argmax(&prediction.probabilities));
            let mut shown = shown(labels, photograph, prediction, &pixels);
            paint(&mut shown.thumbnail, &seen);
            Ok(Some(shown))
        };
        let painted = pool::map(places.len(), threads, "report", init, paint, &|_| {})?;
        Ok(painted.into_iter().flatten().collect())
    }

    /// What each place adds to a class's logit, more than to the mean of all: `[places]`. in: `[places, width]`.
    fn seen(&self, activations: &[f32], class: usize) -> Vec<f32> {
        let width = self.head.width();
        let rows: Vec<&[f32]> = self.head.weight().chunks_exact(width).collect();
        let mean = |i: usize| rows.iter().map(|row| row[i]).sum::<f32>() / rows.len() as f32;
        let weight: Vec<f32> = (0..width).map(|i| rows[class][i] - mean(i)).collect();
        activations.chunks_exact(width).map(|place| crate::vision::head::dot(place, &weight)).collect()
    }
}

/// Dark where nothing spoke for the class, warm where most did. `seen`: a square of places.
fn paint(image: &mut RgbImage, seen: &[f32]) {
    let side = (seen.len() as f64).sqrt() as usize;
    let most = seen.iter().copied().fold(f32::EPSILON, f32::max);
    let (width, height) = image.dimensions();
    for (x, y, pixel) in image.enumerate_pixels_mut() {
        let at = |place: u32, length: u32| ((place as f32 + 0.5) / length as f32 * side as f32 - 0.5).max(0.0);
        let strength = (between(seen, side, at(x, width), at(y, height)) / most).clamp(0.0, 1.0);
        let warm = [255.0, 60.0 + 160.0 * strength, 20.0];
        let Rgb(channels) = pixel;
        for (channel, warm) in channels.iter_mut().zip(warm) {
            let dimmed = f32::from(*channel) * (1.0 - PAINT * (1.0 - strength));
            *channel = (dimmed + (warm - dimmed) * PAINT * strength * strength) as u8;
        }
    }
}

/// Bilinear, in a square of `side` places.
fn between(seen: &[f32], side: usize, x: f32, y: f32) -> f32 {
    let (left, top) = ((x as usize).min(side - 1), (y as usize).min(side - 1));
    let (right, bottom) = ((left + 1).min(side - 1), (top + 1).min(side - 1));
    let (dx, dy) = ((x - left as f32).min(1.0), (y - top as f32).min(1.0));
    let row = |row: usize| seen[row * side + left] * (1.0 - dx) + seen[row * side + right] * dx;
    row(top) * (1.0 - dy) + row(bottom) * dy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paint_is_warm_where_the_class_was_seen() {
        let mut image = RgbImage::from_pixel(40, 20, Rgb([100; 3]));
        paint(&mut image, &[0.0, 0.0, 0.0, 1.0]);
        let (dark, warm) = (image.get_pixel(2, 2).0, image.get_pixel(37, 17).0);
        assert!(warm[0] > 150 && warm[0] > warm[2] + 80, "{warm:?}");
        assert!(dark.iter().all(|channel| *channel < 60), "{dark:?}");
    }

    #[test]
    fn a_thumbnail_keeps_its_shape() {
        assert_eq!(thumbnail(&RgbImage::new(440, 110)).dimensions(), (220, 55));
        assert_eq!(thumbnail(&RgbImage::new(1, 900)).dimensions(), (1, 220));
    }
}
