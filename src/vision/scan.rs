//! Scanning: a frame is judged by overlapping windows at two scales, so that a flower that fills only a part of it is found.
//!
//! The frame is resized, its shape kept, to a coarse canvas, whose shorter side is that of the network's input, and to a fine one of
//! twice that. The layers before the pooling run once over a canvas; the mean of the activations over as many positions as the
//! network's own map has is the feature vector of a window. So the windows of a canvas cost hardly more than the canvas. A window's
//! features are about those of the same crop: its borders see the pixels beside it where a crop has zeros.
//!
//! The fine canvas is not computed for each frame: [`ScanBudget`]. In between, its windows keep their last result.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use image::RgbImage;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::backbone::Session;
use super::classifier::{ClassifierParams, Prediction, StageTimes};
use super::head::{argmax, log_sum_exp, softmax_in_place};
use super::{BackboneError, CompiledBackbone, Head, Preprocessor};
use crate::vision::transform::Region;

/// Number of scales: coarse and fine.
pub const SCALES: usize = 2;
/// The shorter side of each canvas, as a multiple of the network's input.
const FACTORS: [u32; SCALES] = [1, 2];
/// Largest ratio of a canvas' sides; longer frames are squeezed.
const ASPECT_MAX: f32 = 4.0;
/// The fine canvas is used for frames whose shorter side has at least this share of its own: enlarging shows nothing new.
const DETAIL_MIN: f32 = 0.75;
/// The fine canvas is computed for at least one of so many frames, also where the coarse one takes the whole budget.
const FRAMES_MAX: f32 = 30.0;
/// The most windows of a canvas that are judged after their log-odds.
const CANDIDATES: usize = 4;
/// Windows that overlap by more are the same flower: intersection over union.
const OVERLAP_MAX: f32 = 0.3;
/// Positions of a window whose evidence is at least this share of the largest belong to the flower.
const EVIDENCE_MIN: f32 = 0.35;

/// The part of a frame that is judged at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum View {
    /// The whole frame, stretched to the network's input.
    Whole,
    /// Overlapping windows of the frame, at two scales.
    Scan,
}

/// The parameters of scanning: windows have a head of their own, since a flower fills them less than a photograph.
#[derive(Debug, Clone, PartialEq)]
pub struct ScanParams {
    /// The head for windows.
    pub head: Head,
    /// The unknown classes of windows; the temperature is not used.
    pub unknown: Head,
    /// What is taken from the similarity of the best window of the coarse and of the fine canvas, before it is compared with the
    /// threshold for the whole image.
    pub offsets: [f32; SCALES],
}

/// A class that was found in a part of a frame.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Detection {
    /// Index of the class.
    pub class: usize,
    /// Its probability, 0–1, calibrated.
    pub confidence: f32,
    /// The part of the frame.
    pub region: Region,
}

/// Limits the mean cost of a frame: a token bucket. The unit is the cost of one whole image of the network's own input size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScanBudget {
    /// Mean cost of a frame. The coarse canvas is computed for each frame, the fine one whenever the budget allows.
    pub mean: f32,
}

/// A scanner for one model.
pub struct Scanner {
    backbone: CompiledBackbone,
    /// The model for windows.
    model: ClassifierParams,
    offsets: [f32; SCALES],
    budget: ScanBudget,
    /// Cost that may be spent now.
    tokens: f32,
    /// Side of the network's input, in pixels.
    size: u32,
    /// Side of a window, in positions.
    window: usize,
    scales: [Scale; SCALES],
    /// Whether the fine windows are those of the last frame.
    is_current: bool,
    /// Whether the fine windows show a class for the first time.
    is_unconfirmed: bool,
    buffers: Buffers,
}

/// A canvas and its best windows.
#[derive(Default)]
struct Scale {
    canvas: Option<Canvas>,
    windows: [Window; CANDIDATES],
    /// Number of windows that were judged.
    count: usize,
}

impl Scale {
    /// Returns the judged windows, the most similar to the training images first.
    fn found(&self) -> &[Window] {
        &self.windows[..self.count]
    }
}

/// The network for one size of input.
struct Canvas {
    /// Height and width in pixels.
    sides: [u32; 2],
    /// Height and width of the map, in positions.
    map: [usize; 2],
    session: Session,
    preprocessor: Preprocessor,
    input: Vec<f32>,
}

/// A judged window.
#[derive(Debug, Clone, Default)]
struct Window {
    /// `[classes]`
    probabilities: Vec<f32>,
    /// Less the offset of its scale.
    similarity: f32,
    /// The part of the frame that was judged.
    window: Option<Region>,
    /// The part of it with the evidence for the best class.
    region: Option<Region>,
}

impl Window {
    /// Orders by similarity, the largest first; one that is not a number comes last.
    fn best_first(&self, other: &Self) -> Ordering {
        let order = |window: &Self| if window.similarity.is_nan() { f32::NEG_INFINITY } else { window.similarity };
        order(other).total_cmp(&order(self))
    }
}

/// Values of one canvas; the buffers are kept.
#[derive(Default)]
struct Buffers {
    /// Sums over a window's width, of one channel.
    row_sums: Vec<f32>,
    /// `[channels, windows]`
    pooled: Vec<f32>,
    /// `[classes and unknown classes, windows]`
    logits: Vec<f32>,
    /// Log-odds of the unknown classes: `[windows]`.
    log_odds: Vec<f32>,
    /// Evidence for a class at each position of a window.
    evidence: Vec<f32>,
    /// `[channels]`
    features: Vec<f32>,
}

impl ScanBudget {
    /// The default of `model.scan_budget`.
    pub const DEFAULT: Self = ScanBudget { mean: 4.0 };
}

impl Scanner {
    /// Creates a scanner for `model`, the parameters for whole images. Networks for canvases are compiled when a frame of a new shape
    /// comes.
    ///
    /// # Errors
    /// If the network's features are not the mean of a last convolution, or its map does not divide its input.
    ///
    /// # Panics
    /// If the heads for windows have another width than the model's features.
    pub fn new(
        backbone: &CompiledBackbone,
        model: &ClassifierParams,
        params: ScanParams,
        budget: ScanBudget,
    ) -> Result<Self, BackboneError> {
        let size = model.preprocess.size;
        let ood = model.ood.with_unknown_head(params.unknown);
        assert_eq!(params.head.width(), ood.width(), "width of the head for windows and of the features");
        let own = backbone.activations([size as usize; 2])?;
        let window = own.shape()[1];
        if !(size as usize).is_multiple_of(window) || own.shape()[2] != window {
            return Err(BackboneError::MapDoesNotDivideInput { name: backbone.name().into(), size, map: window });
        }
        Ok(Scanner {
            backbone: backbone.clone(),
            model: ClassifierParams { head: params.head, ood, ..model.clone() },
            offsets: params.offsets,
            budget,
            tokens: 0.0,
            size,
            window,
            scales: Default::default(),
            is_current: false,
            is_unconfirmed: false,
            buffers: Buffers::default(),
        })
    }

    /// Returns whether a frame shows more detail than the network's input, so that scanning it tells more than the whole image.
    pub fn suits(&self, (width, height): (u32, u32)) -> bool {
        width.min(height) as f32 >= DETAIL_MIN * FACTORS[1] as f32 * self.size as f32
    }

    /// Returns whether both scales belong to the last frame.
    pub fn is_current(&self) -> bool {
        self.is_current
    }

    /// Scans a frame of a sequence, within the budget. A class that the fine windows show for the first time is confirmed with the next
    /// frame, at the cost of later visits: one frame alone would count as several. in: H×W×3 u8 RGB.
    ///
    /// # Errors
    /// If a network fails.
    pub fn scan_next(&mut self, frame: &RgbImage, prediction: &mut Prediction) -> Result<StageTimes, BackboneError> {
        let [coarse, fine] = FACTORS.map(|factor| self.cost(factor, frame.dimensions()));
        let sides = self.canvas_sides(FACTORS[1], frame.dimensions());
        if self.scales[1].canvas.as_ref().is_none_or(|canvas| canvas.sides != sides) {
            self.reset();
        }
        self.tokens = match self.scales[1].found() {
            [] => fine,
            _ => (self.tokens + (self.budget.mean - coarse).max(fine / FRAMES_MAX)).min(fine + self.budget.mean),
        };
        let (mut times, mut cost) = (self.visit(0, frame)?, coarse);
        self.is_current = self.tokens >= fine || self.is_unconfirmed;
        if self.is_current {
            let before = self.fine_class();
            self.tokens -= fine;
            times += self.visit(1, frame)?;
            cost += fine;
            self.is_unconfirmed = !self.is_unconfirmed && self.fine_class().is_some() && self.fine_class() != before;
        }
        self.combine(prediction);
        Ok(StageTimes { cpu_time: times.cpu_time.div_f32(cost), ..times })
    }

    /// Takes a frame that equals the one before and is not scanned: its cost may be spent later.
    pub fn skip_frame(&mut self) {
        self.tokens += self.budget.mean;
    }

    /// Returns the class of the best fine window, if that is known.
    fn fine_class(&self) -> Option<usize> {
        let best = self.scales[1].found().first()?;
        self.model.ood.is_known(best.similarity).then(|| argmax(&best.probabilities))
    }

    /// Scans a single image at both scales. in: H×W×3 u8 RGB.
    ///
    /// # Errors
    /// If a network fails.
    pub fn scan(&mut self, image: &RgbImage, prediction: &mut Prediction) -> Result<StageTimes, BackboneError> {
        let mut times = StageTimes::default();
        let mut cost = 0.0;
        for (scale, factor) in FACTORS.into_iter().enumerate() {
            times += self.visit(scale, image)?;
            cost += self.cost(factor, image.dimensions());
        }
        self.is_current = true;
        self.combine(prediction);
        Ok(StageTimes { cpu_time: times.cpu_time.div_f32(cost), ..times })
    }

    /// Scans an image at one scale, and returns the similarity of the best window, and its class.
    ///
    /// # Errors
    /// If the network fails.
    pub fn best_at(&mut self, scale: usize, image: &RgbImage) -> Result<(f32, usize), BackboneError> {
        self.visit(scale, image)?;
        let best = self.scales[scale].found().first().expect("a canvas has at least one window");
        Ok((best.similarity, argmax(&best.probabilities)))
    }

    /// Forgets what was found on earlier frames; the next one is scanned at both scales.
    pub fn reset(&mut self) {
        self.scales.iter_mut().for_each(|scale| scale.count = 0);
        (self.is_current, self.is_unconfirmed) = (false, false);
    }

    /// Returns the cost of a canvas for frames of this size.
    fn cost(&self, factor: u32, dimensions: (u32, u32)) -> f32 {
        let [height, width] = self.canvas_sides(factor, dimensions);
        (height * width) as f32 / (self.size * self.size) as f32
    }

    /// Returns height and width of a canvas, in pixels: whole strides, the shape of the frame about kept.
    fn canvas_sides(&self, factor: u32, (width, height): (u32, u32)) -> [u32; 2] {
        let (short, stride) = (factor * self.size, self.size / self.window as u32);
        let long =
            |ratio: f32| ((short as f32 * ratio.min(ASPECT_MAX) / stride as f32).round() as u32 * stride).max(short);
        if width >= height {
            [short, long(width as f32 / height as f32)]
        } else {
            [long(height as f32 / width as f32), short]
        }
    }

    /// Judges the windows of a frame at one scale.
    fn visit(&mut self, scale: usize, frame: &RgbImage) -> Result<StageTimes, BackboneError> {
        let started = Instant::now();
        let sides = self.canvas_sides(FACTORS[scale], frame.dimensions());
        if self.scales[scale].canvas.as_ref().is_none_or(|canvas| canvas.sides != sides) {
            self.scales[scale].canvas = Some(Canvas::new(&self.backbone, sides, &self.model)?);
        }
        let Scale { canvas, windows, count } = &mut self.scales[scale];
        *count = 0;
        let canvas = canvas.as_mut().expect("it was just made");
        canvas.preprocessor.run(frame, &mut canvas.input);
        let preprocessed = Instant::now();
        let activations = canvas.session.run(&canvas.input)?;
        let computed = Instant::now();
        let grid = WindowGrid { map: canvas.map, side: self.window };
        self.buffers.judge(grid, activations, &self.model);
        for next in 0..CANDIDATES {
            let (found, free) = windows.split_at_mut(next);
            let Some(at) = self.buffers.best_window(grid, found) else { break };
            self.buffers.window(grid, at, activations, &self.model, &mut free[0]);
            free[0].similarity -= self.offsets[scale];
            *count += 1;
        }
        windows[..*count].sort_by(Window::best_first);
        Ok(StageTimes {
            decode: Duration::ZERO,
            preprocess: preprocessed - started,
            backbone: computed - preprocessed,
            head: computed.elapsed(),
            cpu_time: canvas.session.cpu_time(),
        })
    }

    /// Writes the best window of both scales, and the classes of all windows that are known and do not overlap a better one.
    fn combine(&self, prediction: &mut Prediction) {
        let ood = &self.model.ood;
        let mut windows: SmallVec<[&Window; SCALES * CANDIDATES]> = self.scales.iter().flat_map(Scale::found).collect();
        windows.sort_by(|a, b| a.best_first(b));
        let best = windows.first().expect("the coarse canvas has at least one window");
        prediction.probabilities.clone_from(&best.probabilities);
        prediction.similarity = best.similarity;
        prediction.known = ood.is_known(best.similarity);
        prediction.found.clear();
        for window in windows.iter().filter(|window| ood.is_known(window.similarity)) {
            let region = window.region.expect("a judged window has a region");
            if prediction.found.iter().all(|other| other.region.intersection_over_union(&region) <= OVERLAP_MAX) {
                let class = argmax(&window.probabilities);
                prediction.found.push(Detection { class, confidence: window.probabilities[class], region });
            }
        }
    }
}

impl Canvas {
    fn new(backbone: &CompiledBackbone, sides: [u32; 2], model: &ClassifierParams) -> Result<Self, BackboneError> {
        let network = backbone.activations(sides.map(|side| side as usize))?;
        let preprocessor = Preprocessor::for_input(model.preprocess.clone(), sides);
        let map = [network.shape()[1], network.shape()[2]];
        let input = vec![0.0; preprocessor.input_len()];
        Ok(Canvas { sides, map, session: network.session()?, preprocessor, input })
    }
}

/// The windows of a map, one for each position that a window can begin at.
#[derive(Clone, Copy)]
struct WindowGrid {
    /// Height and width of the map.
    map: [usize; 2],
    /// Height and width of a window.
    side: usize,
}

impl WindowGrid {
    /// Returns the rows and columns of windows.
    fn count(&self) -> [usize; 2] {
        self.map.map(|length| length - self.side + 1)
    }

    /// Returns the part of the frame that positions `rows` and `columns` lie in.
    fn region(&self, [top, left]: [usize; 2], [rows, columns]: [usize; 2]) -> Region {
        let [height, width] = self.map.map(|length| length as f32);
        let (left, top) = (left as f32 / width, top as f32 / height);
        let (width, height) = ((columns as f32 / width).min(1.0 - left), (rows as f32 / height).min(1.0 - top));
        Region::new([left, top, width, height]).expect("a window lies within the map")
    }
}

impl Buffers {
    /// Computes the features and the log-odds of all windows. activations: `[channels, height, width]`.
    fn judge(&mut self, grid: WindowGrid, activations: &[f32], model: &ClassifierParams) {
        let [rows, columns] = grid.count();
        let windows = rows * columns;
        let positions = grid.map[0] * grid.map[1];
        self.pooled.resize(activations.len() / positions * windows, 0.0);
        for (plane, pooled) in activations.chunks_exact(positions).zip(self.pooled.chunks_exact_mut(windows)) {
            pool(grid, plane, &mut self.row_sums, pooled);
        }
        let unknown = model.ood.unknown_classes().map(|unknown| &unknown.head);
        let heads = std::iter::once(&model.head).chain(unknown);
        self.logits.clear();
        for head in heads.clone() {
            for (weight, bias) in head.weight().chunks_exact(head.width()).zip(head.bias()) {
                let start = self.logits.len();
                self.logits.resize(start + windows, *bias);
                let logits = &mut self.logits[start..];
                for (weight, pooled) in weight.iter().zip(self.pooled.chunks_exact(windows)) {
                    logits.iter_mut().zip(pooled).for_each(|(logit, value)| *logit += weight * value);
                }
            }
        }
        let known = model.head.classes();
        let classes = self.logits.len() / windows;
        let logits = &self.logits;
        let odds = |window: usize| {
            let of =
                |classes: std::ops::Range<usize>| log_sum_exp(classes.map(|class| logits[class * windows + window]));
            if classes > known { of(known..classes) - of(0..known) } else { 0.0 }
        };
        self.log_odds.clear();
        self.log_odds.extend((0..windows).map(odds));
    }

    /// Returns the window with the lowest log-odds that does not overlap those `found` by more than [`OVERLAP_MAX`].
    fn best_window(&self, grid: WindowGrid, found: &[Window]) -> Option<[usize; 2]> {
        let [_, columns] = grid.count();
        let at = |window: usize| [window / columns, window % columns];
        let is_free = |window: &usize| {
            let region = grid.region(at(*window), [grid.side; 2]);
            found
                .iter()
                .all(|other| other.window.is_none_or(|other| other.intersection_over_union(&region) <= OVERLAP_MAX))
        };
        let free = (0..self.log_odds.len()).filter(is_free);
        free.min_by(|a, b| self.log_odds[*a].total_cmp(&self.log_odds[*b])).map(at)
    }

    /// Judges one window of those that [`Self::judge`] pooled.
    fn window(
        &mut self,
        grid: WindowGrid,
        at: [usize; 2],
        activations: &[f32],
        model: &ClassifierParams,
        out: &mut Window,
    ) {
        let [rows, columns] = grid.count();
        let (window, windows) = (at[0] * columns + at[1], rows * columns);
        self.features.clear();
        self.features.extend(self.pooled.iter().skip(window).step_by(windows));
        model.head.logits_into(&self.features, &mut out.probabilities);
        out.similarity = model.ood.similarity(&self.features, &out.probabilities);
        let class = argmax(&out.probabilities);
        softmax_in_place(&mut out.probabilities, model.head.temperature());
        out.window = Some(grid.region(at, [grid.side; 2]));
        let (corner, sides) = self.flower(grid, at, activations, model, class);
        out.region = Some(grid.region(corner, sides));
    }

    /// Returns the smallest rectangle of a window's positions with the strongest evidence for `class` against the unknown classes: its
    /// first row and column, and its numbers of rows and columns.
    fn flower(
        &mut self,
        grid: WindowGrid,
        [top, left]: [usize; 2],
        activations: &[f32],
        model: &ClassifierParams,
        class: usize,
    ) -> ([usize; 2], [usize; 2]) {
        let (side, [height, width]) = (grid.side, grid.map);
        let head = &model.head;
        let weights = &head.weight()[class * head.width()..][..head.width()];
        let unknown = model.ood.unknown_classes().map(|unknown| &unknown.head);
        self.evidence.clear();
        self.evidence.resize(side * side, 0.0);
        for (channel, plane) in activations.chunks_exact(height * width).enumerate() {
            let against = unknown.map_or(0.0, |unknown| {
                let rows = unknown.weight().chunks_exact(unknown.width());
                rows.map(|row| row[channel]).sum::<f32>() / unknown.classes() as f32
            });
            let weight = weights[channel] - against;
            for (row, evidence) in self.evidence.chunks_exact_mut(side).enumerate() {
                let values = &plane[(top + row) * width + left..][..side];
                evidence.iter_mut().zip(values).for_each(|(evidence, value)| *evidence += weight * value);
            }
        }
        let limit = EVIDENCE_MIN * self.evidence.iter().copied().fold(f32::EPSILON, f32::max);
        let strong = |row: usize, column: usize| self.evidence[row * side + column] >= limit;
        let rows = || (0..side).filter(|row| (0..side).any(|column| strong(*row, column)));
        let columns = || (0..side).filter(|column| (0..side).any(|row| strong(row, *column)));
        match (rows().min(), rows().max(), columns().min(), columns().max()) {
            (Some(first_row), Some(last_row), Some(first_column), Some(last_column)) => {
                ([top + first_row, left + first_column], [last_row - first_row + 1, last_column - first_column + 1])
            }
            _ => ([top, left], [side; 2]),
        }
    }
}

/// Writes the mean of one channel over each window. plane: `[height, width]`; out: `[rows, columns]` of windows.
fn pool(grid: WindowGrid, plane: &[f32], row_sums: &mut Vec<f32>, out: &mut [f32]) {
    let (side, width) = (grid.side, grid.map[1]);
    let columns = width - side + 1;
    row_sums.clear();
    row_sums.resize(grid.map[0] * columns, 0.0);
    for (row, sums) in plane.chunks_exact(width).zip(row_sums.chunks_exact_mut(columns)) {
        for shift in 0..side {
            sums.iter_mut().zip(&row[shift..]).for_each(|(sum, value)| *sum += value);
        }
    }
    let scale = 1.0 / (side * side) as f32;
    for (row, out) in out.chunks_exact_mut(columns).enumerate() {
        out.fill(0.0);
        for sums in row_sums[row * columns..].chunks_exact(columns).take(side) {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
        out.iter_mut().for_each(|out| *out *= scale);
    }
}

#[cfg(test)]
mod tests {
    use bloomcast_kernels::Isa;

    use super::*;
    use crate::vision::decode::tests::gradient;
    use crate::vision::{
        Classifier, Labels, OnnxBackbone, OodDetector, Preprocess, UnknownClasses, decode, test_pattern,
    };

    /// Returns a model of three classes and an unknown one, with some weights.
    fn model() -> ClassifierParams {
        let weights = |rows: usize, phase: f32| (0..rows * 1280).map(|i| 0.05 * (i as f32 * phase).sin()).collect();
        let head = |rows, phase| Head::new(1280, weights(rows, phase), vec![0.0; rows], 1.0).unwrap();
        let mut basis = vec![0.0; 4 * 1280];
        (0..4).for_each(|row| basis[row * 1280 + row] = 1.0);
        let unknown = UnknownClasses { head: head(1, 0.3), log_odds_weight: 0.04, cosine_threshold: 0.0 };
        let ood = OodDetector::new(1280, basis, 0.0).unwrap().with_unknown_classes(unknown, 0.0).unwrap();
        let labels = Labels::new(["a", "b", "c"].map(String::from).to_vec()).unwrap();
        ClassifierParams { labels, head: head(3, 0.7), ood, preprocess: Preprocess::mobilenet_v2() }
    }

    /// Returns parameters with which windows are classified as whole images.
    fn whole(model: &ClassifierParams) -> ScanParams {
        let unknown = model.ood.unknown_classes().unwrap().head.clone();
        ScanParams { head: model.head.clone(), unknown, offsets: [0.0; SCALES] }
    }

    fn scanner(network: &OnnxBackbone, budget: ScanBudget) -> (Scanner, Classifier) {
        let backbone = network.compile_features(None).unwrap();
        let classifier = Classifier::new(&backbone, model()).unwrap();
        (Scanner::new(&backbone, classifier.params(), whole(classifier.params()), budget).unwrap(), classifier)
    }

    #[test]
    fn a_canvas_of_the_size_of_the_input_is_judged_as_the_whole_image() {
        let (mut scanner, mut classifier) = scanner(&OnnxBackbone::built_in().unwrap(), ScanBudget::DEFAULT);
        let image = decode::encoded(&test_pattern::jpeg(500, 500)).unwrap();
        let whole = classifier.classify(&image).unwrap().0.clone();
        let (similarity, class) = scanner.best_at(0, &image).unwrap();
        assert!((similarity - whole.similarity).abs() < 1e-4, "{similarity}, {}", whole.similarity);
        assert_eq!(class, argmax(&whole.probabilities));
        assert_eq!(scanner.scales[0].count, 1, "one window");
    }

    #[test]
    fn a_window_is_the_mean_of_its_positions() {
        let grid = WindowGrid { map: [4, 6], side: 3 };
        let plane: Vec<f32> = (0..24).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut out = vec![f32::NAN; 8];
        pool(grid, &plane, &mut Vec::new(), &mut out);
        for (window, mean) in out.into_iter().enumerate() {
            let (top, left) = (window / 4, window % 4);
            let values = (0..9).map(|i| plane[(top + i / 3) * 6 + left + i % 3]);
            assert!((mean - values.sum::<f32>() / 9.0).abs() < 1e-6, "window {window}");
        }
    }

    #[test]
    fn kernels_and_tract_find_the_same() {
        let image = decode::encoded(&test_pattern::jpeg(800, 448)).unwrap();
        let network = OnnxBackbone::built_in().unwrap();
        let scan = |kernels: Option<Isa>| {
            let (mut scanner, _) = scanner(&network.with_kernels(kernels), ScanBudget::DEFAULT);
            let mut prediction = Prediction::default();
            scanner.scan(&image, &mut prediction).unwrap();
            let windows = scanner.scales.iter().flat_map(Scale::found);
            (prediction.similarity, windows.map(|window| window.window.unwrap()).collect::<Vec<_>>())
        };
        let (similarity, windows) = scan(None);
        assert!(windows.len() > CANDIDATES, "windows of both scales");
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            let found = scan(Some(isa));
            assert!((found.0 - similarity).abs() < 1e-3, "{isa:?}");
            assert_eq!(found.1, windows, "{isa:?}");
        }
    }

    #[test]
    fn the_fine_windows_are_visited_as_often_as_the_budget_allows_and_kept_in_between() {
        let (wide, other) = (gradient(800, 448), decode::encoded(&test_pattern::jpeg(800, 448)).unwrap());
        let network = OnnxBackbone::built_in().unwrap();
        let (mut scanner, _) = scanner(&network, ScanBudget::DEFAULT);
        let [coarse, fine] = FACTORS.map(|factor| scanner.cost(factor, wide.dimensions()));
        assert_eq!((coarse, fine), (416.0 / 224.0, 4.0 * 400.0 / 224.0));
        // Nothing is known, so that no visit is repeated.
        scanner.offsets = [10.0; SCALES];
        scanner.budget.mean = coarse + fine / 4.0 + 1e-3;
        let mut prediction = Prediction::default();
        let mut visits = Vec::new();
        let mut kept = 0.0;
        for i in 0..12 {
            // The frame changes after a visit of the fine windows.
            let frame = if i == 0 { &wide } else { &other };
            scanner.scan_next(frame, &mut prediction).unwrap();
            visits.push(scanner.is_current());
            let best = scanner.scales[1].found()[0].similarity;
            if i == 0 {
                kept = best;
            }
            assert_eq!(best == kept, i < 4, "frame {i}");
        }
        let expected: Vec<bool> = (0..12).map(|i| i % 4 == 0).collect();
        assert_eq!(visits, expected);
        // A budget below the cost of the coarse canvas.
        scanner.budget.mean = 1.0;
        let mut visits = 0;
        for _ in 0..90 {
            scanner.scan_next(&other, &mut prediction).unwrap();
            visits += usize::from(scanner.is_current());
        }
        assert!((2..=4).contains(&visits), "{visits} visits in 90 frames");
    }

    #[test]
    fn a_class_that_the_fine_windows_show_first_is_confirmed_with_the_next_frame() {
        let frame = decode::encoded(&test_pattern::jpeg(800, 448)).unwrap();
        let (mut scanner, _) = scanner(&OnnxBackbone::built_in().unwrap(), ScanBudget::DEFAULT);
        // All is known.
        scanner.offsets = [-10.0; SCALES];
        let mut prediction = Prediction::default();
        let visits: Vec<bool> = (0..8)
            .map(|_| {
                scanner.scan_next(&frame, &mut prediction).unwrap();
                scanner.is_current()
            })
            .collect();
        assert_eq!(visits, [true, true, false, false, false, false, false, true]);
        assert!(prediction.known && !prediction.found.is_empty());
    }

    #[test]
    fn small_images_are_not_scanned_and_long_ones_are_squeezed() {
        let (scanner, _) = scanner(&OnnxBackbone::built_in().unwrap(), ScanBudget::DEFAULT);
        assert!(scanner.suits((1280, 720)) && scanner.suits((448, 336)));
        assert!(!scanner.suits((320, 240)) && !scanner.suits((4000, 335)));
        assert_eq!(scanner.canvas_sides(1, (1280, 720)), [224, 384]);
        assert_eq!(scanner.canvas_sides(2, (480, 640)), [608, 448]);
        assert_eq!(scanner.canvas_sides(1, (100_000, 400)), [224, 896]);
    }

    #[test]
    fn a_network_without_a_last_convolution_cannot_scan() {
        let maps = OnnxBackbone::built_in().unwrap().compile_feature_maps().unwrap();
        let model = model();
        let error = Scanner::new(&maps, &model, whole(&model), ScanBudget::DEFAULT).err().unwrap().to_string();
        assert!(error.contains("has no last convolution"), "{error}");
    }
}
