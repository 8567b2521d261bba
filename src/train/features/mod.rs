//! Feature extraction: the frozen backbone's output for every view of every image, computed on all cores.

pub mod cache;
pub mod compute_device;

use std::borrow::Cow;
use std::env::consts::ARCH;
use std::io;
use std::path::Path;
use std::sync::Mutex;

use half::f16;
use half::slice::HalfFloatSliceExt;
use image::RgbImage;

use crate::system::hash::sha256_hex;
use crate::train::data::augment::{self, Views};
use crate::train::data::dataset::DatasetProblem;
use crate::train::data::image_set::{HashedImage, ImageError, Origin, decode_file};
use crate::train::data::scene::{self, Geometry};
use crate::train::features::cache::FeatureCache;
use crate::train::parallel;
use crate::vision::backbone::{Session, channels_last};
use crate::vision::preprocess::{self, Preprocess, Preprocessor};
use crate::vision::{BackboneError, CompiledBackbone, LastConvWeights, OnnxBackbone};

/// Part of the cache key: another version may decode or compute differently.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Feature vectors, or feature maps `[height · width, channels]`, of a set of images, in the order of the set.
#[derive(Debug, Clone, Default)]
pub struct Features {
    /// Values in one row.
    pub width: usize,
    /// Rows of each image, one per view; row 0 is the original image.
    pub views: usize,
    /// `[views, width]` for each image.
    pub values: Vec<Values>,
    /// The images that have features.
    pub images: Vec<HashedImage>,
    /// Images that could not be decoded.
    pub skipped: Vec<DatasetProblem>,
}

/// Values in one of two precisions.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Values in single precision.
    Single(Vec<f32>),
    /// Values in half precision.
    Half(Vec<f16>),
}

impl Features {
    /// Returns the number of images.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Removes all images but the first `len` and returns them.
    pub fn truncate(&mut self, len: usize) -> Vec<HashedImage> {
        self.values.truncate(len);
        self.images.split_off(len)
    }

    /// Returns whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// Returns the class of image `i`.
    ///
    /// # Panics
    /// Panics if there is no such image.
    pub fn class(&self, i: usize) -> usize {
        self.images[i].class
    }

    /// Returns the class of each image.
    pub fn classes(&self) -> Vec<usize> {
        self.images.iter().map(|image| image.class).collect()
    }

    /// Returns the row of view `view` of image `i`: `[width]`.
    ///
    /// # Panics
    /// Panics if there is no such image or view.
    pub fn row(&self, i: usize, view: usize) -> Cow<'_, [f32]> {
        let range = view * self.width..(view + 1) * self.width;
        match &self.values[i] {
            Values::Single(values) => Cow::Borrowed(&values[range]),
            Values::Half(values) => Cow::Owned(values[range].to_f32_vec()),
        }
    }

    /// Returns the row of each original image.
    pub fn rows(&self) -> impl Iterator<Item = Cow<'_, [f32]>> {
        (0..self.len()).map(|i| self.row(i, 0))
    }
}

impl Values {
    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Values::Single(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Values::Half(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    fn from_bytes(bytes: &[u8], precision: Precision) -> Self {
        match precision {
            Precision::Single => {
                Values::Single(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
            }
            Precision::Half => Values::Half(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect()),
        }
    }
}

/// Precision of stored values: single for feature vectors and validation sets, half for the feature maps of a training set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit floating point, IEEE 754 binary32.
    Single,
    /// 16-bit floating point, IEEE 754 binary16.
    Half,
}

impl Precision {
    /// Returns the bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Precision::Single => 4,
            Precision::Half => 2,
        }
    }
}

/// Extracts the features of images.
pub struct Extractor<'a> {
    /// The network that `backbone` is a part of; its SHA-256 and device are part of the cache key.
    pub network: &'a OnnxBackbone,
    /// The frozen layers.
    pub backbone: &'a CompiledBackbone,
    /// Number of channels if the backbone returns a feature map `[channels, height, width]`; `None` if it returns a feature
    /// vector.
    pub map_channels: Option<usize>,
    /// The preprocessing of the images.
    pub preprocess: &'a Preprocess,
    /// Precision of the returned and cached values.
    pub precision: Precision,
    /// The views of each image.
    pub views: Views,
    /// Root folder of the [`FeatureCache`]; `None` disables caching.
    pub cache: Option<&'a Path>,
    /// Computes the features of scenes; `None` if there are none.
    pub canvas: Option<CanvasNetwork<'a>>,
    /// Number of threads, at least 1.
    pub threads: usize,
}

/// The frozen layers for the canvas of a scene.
#[derive(Clone)]
pub struct CanvasNetwork<'a> {
    /// The layers before the last convolution, for an input of [`Geometry::canvas_size`].
    pub backbone: CompiledBackbone,
    /// The sizes of the network's input and map.
    pub sizes: Geometry,
    /// Computes feature vectors from the map, if these and not maps are extracted.
    pub last_conv: Option<&'a LastConvWeights>,
}

/// Error of an image without features.
#[derive(Debug, thiserror::Error)]
enum ExtractError {
    /// The image is skipped.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The extraction ends.
    #[error(transparent)]
    Backbone(#[from] BackboneError),
}

impl Extractor<'_> {
    /// Extracts the features of `images`. Each image that is not cached is decoded once, and the backbone runs on each of
    /// its views. `progress` is called with the number of finished images. The second value is the first error of the
    /// cache, if any; extraction continues without caching.
    ///
    /// # Errors
    /// Fails if the backbone fails. Images that cannot be decoded are listed in [`Features::skipped`].
    ///
    /// # Panics
    /// Panics if a thread cannot be started.
    pub fn run(
        &self,
        images: &[HashedImage],
        progress: &(dyn Fn(usize) + Sync),
    ) -> Result<(Features, Option<io::Error>), BackboneError> {
        let cache = self.cache.map(|root| FeatureCache::open(root, &self.cache_key()));
        let (cache, cache_error) = match cache.transpose() {
            Ok(cache) => (cache, None),
            Err(error) => (None, Some(error)),
        };
        let cache_error = Mutex::new(cache_error);
        let on_cache_error = |error: io::Error| {
            cache_error.lock().expect("no code panics with the lock held").get_or_insert(error);
        };
        let work = |worker: &mut Option<Worker>, i: usize| {
            let result = self.extract(worker, &images[i], cache.as_ref(), &on_cache_error);
            match result {
                Ok(values) => Ok(Ok(values)),
                Err(ExtractError::Image(error)) => Ok(Err(error)),
                Err(ExtractError::Backbone(error)) => Err(error),
            }
        };
        let extracted = parallel::map(images.len(), self.threads, "features", || Ok(None), work, progress)?;
        let mut features = Features { width: self.backbone.width(), views: self.views.count, ..Features::default() };
        for (image, result) in images.iter().zip(extracted) {
            match result {
                Ok(values) => {
                    features.values.push(values);
                    features.images.push(image.clone());
                }
                // A generated image that needs the file is not named as well.
                Err(_) if image.origin != Origin::File => {}
                Err(error) => {
                    features.skipped.push(DatasetProblem { file: image.path.clone(), problem: error.to_string() });
                }
            }
        }
        Ok((features, cache_error.into_inner().expect("no code panics with the lock held")))
    }

    /// Returns the values of all views of an image: the cached ones, and those that the worker computes and caches. The
    /// worker is made on first use.
    fn extract(
        &self,
        worker: &mut Option<Worker>,
        image: &HashedImage,
        cache: Option<&FeatureCache>,
        on_cache_error: &dyn Fn(io::Error),
    ) -> Result<Values, ExtractError> {
        let row_bytes = self.backbone.width() * self.precision.bytes();
        let mut bytes = cache.and_then(|cache| cache.read(&image.content_hash)).unwrap_or_default();
        // A file with more views than needed is used as is; one with fewer is extended.
        bytes.truncate(self.views.count.min(bytes.len() / row_bytes) * row_bytes);
        let cached_views = bytes.len() / row_bytes;
        if cached_views == self.views.count {
            return Ok(Values::from_bytes(&bytes, self.precision));
        }
        let worker = match worker {
            Some(worker) => worker,
            None => worker.insert(Worker::new(self)?),
        };
        let pixels = image.decode()?;
        let values = match &image.origin {
            Origin::Scene { background } => {
                self.extract_scene(worker, &pixels, Some(&decode_file(background)?), image, cached_views)?
            }
            Origin::EmptyScene => self.extract_scene(worker, &pixels, None, image, cached_views)?,
            _ => {
                let views =
                    (cached_views..self.views.count).map(|view| self.extract_view(worker, &pixels, image, view));
                views.collect::<Result<Vec<_>, _>>()?
            }
        };
        values.into_iter().for_each(|row| bytes.extend(self.stored(row).to_bytes()));
        if let Some(Err(error)) = cache.map(|cache| cache.write(&image.content_hash, &bytes)) {
            on_cache_error(error);
        }
        Ok(Values::from_bytes(&bytes, self.precision))
    }

    /// Returns the cache key: everything besides the image content that the values depend on. The number of views is not
    /// part of it.
    fn cache_key(&self) -> String {
        let preprocess = serde_json::to_string(self.preprocess).expect("a preprocessing serializes to JSON");
        let tensor = if self.map_channels.is_some() { "map" } else { "features" };
        let feature = &self.network.info().feature;
        let views = match self.views.count {
            1 => String::new(),
            _ => format!("views {} of seed {}", augment::VERSION, self.views.seed),
        };
        let all = format!(
            "{VERSION} {ARCH} {} {feature} {tensor} {preprocess} {} {:?} {:?} {views}",
            self.network.sha256(),
            preprocess::VERSION,
            self.network.device(),
            self.precision
        );
        format!("{tensor}-{:.16}", sha256_hex(all.as_bytes()))
    }

    /// Runs the backbone on one view: `[width]`, feature maps as `[height · width, channels]`.
    fn extract_view(
        &self,
        worker: &mut Worker,
        pixels: &RgbImage,
        image: &HashedImage,
        view: usize,
    ) -> Result<Vec<f32>, BackboneError> {
        let Worker { session, preprocessor, input, .. } = worker;
        if view == 0 {
            preprocessor.run(pixels, input);
        } else {
            preprocessor.run(&self.views.view(pixels, &image.content_hash, view, self.preprocess.size), input);
        }
        let row = session.run(input)?;
        Ok(match self.map_channels {
            Some(channels) => channels_last(row, channels),
            None => row.to_vec(),
        })
    }

    /// Runs the backbone on the canvases of a scene and returns the rows of its windows, from view `first` on.
    fn extract_scene(
        &self,
        worker: &mut Worker,
        pixels: &RgbImage,
        background: Option<&RgbImage>,
        image: &HashedImage,
        first: usize,
    ) -> Result<Vec<Vec<f32>>, BackboneError> {
        let network =
            self.canvas.as_ref().expect("the images of a run with scenes are extracted with a canvas network");
        let canvas_worker = match &mut worker.canvas {
            Some(worker) => worker,
            None => worker.canvas.insert(CanvasWorker::new(network, self.preprocess)?),
        };
        let windows = scene::windows_per_canvas(&image.origin);
        let mut rows = Vec::new();
        for index in first / windows..self.views.count.div_ceil(windows) {
            let canvas = scene::canvas(pixels, background, &image.content_hash, index, network.sizes);
            let map = canvas_worker.map(&canvas.image)?;
            let views = (index * windows..).zip(&canvas.windows);
            let views = views.filter(|(view, _)| (first..self.views.count).contains(view));
            rows.extend(views.map(|(_, window)| {
                let row = cut_window(map, network.sizes, *window);
                network.last_conv.map_or_else(|| row.clone(), |last_conv| last_conv.features(&row))
            }));
        }
        Ok(rows)
    }

    /// Returns a row in the precision that it is stored in.
    fn stored(&self, row: Vec<f32>) -> Values {
        match self.precision {
            Precision::Single => Values::Single(row),
            Precision::Half => Values::Half(row.into_iter().map(f16::from_f32).collect()),
        }
    }
}

/// Returns the positions of a window of a canvas' map. in: `[channels, positions, positions]`; out: `[window · window, channels]`.
fn cut_window(map: &[f32], sizes: Geometry, [top, left]: [usize; 2]) -> Vec<f32> {
    let side = sizes.canvas_positions();
    let channels = map.len() / (side * side);
    let position = |i: usize| (top + i / sizes.window) * side + left + i % sizes.window;
    let positions = (0..sizes.window * sizes.window).map(position);
    positions.flat_map(|position| (0..channels).map(move |channel| map[channel * side * side + position])).collect()
}

/// The session and buffers of one thread for canvases.
struct CanvasWorker {
    session: Session,
    preprocessor: Preprocessor,
    input: Vec<f32>,
}

impl CanvasWorker {
    fn new(network: &CanvasNetwork<'_>, preprocess: &Preprocess) -> Result<Self, BackboneError> {
        let preprocessor = Preprocessor::for_input(preprocess.clone(), [network.sizes.canvas_size(); 2]);
        let input = vec![0.0; preprocessor.input_len()];
        Ok(CanvasWorker { session: network.backbone.session()?, preprocessor, input })
    }

    /// Returns the map of a canvas, `[channels, height, width]`.
    fn map(&mut self, canvas: &RgbImage) -> Result<&[f32], BackboneError> {
        self.preprocessor.run(canvas, &mut self.input);
        self.session.run(&self.input)
    }
}

/// The session and buffers of one thread.
struct Worker {
    session: Session,
    preprocessor: Preprocessor,
    input: Vec<f32>,
    /// For scenes; made on first use.
    canvas: Option<CanvasWorker>,
}

impl Worker {
    fn new(extractor: &Extractor<'_>) -> Result<Self, BackboneError> {
        Ok(Worker {
            session: extractor.backbone.session()?,
            preprocessor: Preprocessor::new(extractor.preprocess.clone()),
            input: vec![0.0; extractor.preprocess.input_len()],
            canvas: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use image::ImageFormat;

    use super::*;
    use crate::vision::decode::tests::{encode, gradient};

    /// The folders of a cache that an earlier version filled: with another key, all features would be extracted again.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn cache_keys_are_those_of_earlier_versions() {
        let (network, preprocess) = (OnnxBackbone::built_in().unwrap(), Preprocess::mobilenet_v2());
        let backbone = network.compile_feature_maps().unwrap();
        let key = |count: usize, precision: Precision| {
            let (network, backbone, preprocess) = (&network, &backbone, &preprocess);
            let views = Views { count, seed: 1 };
            let map_channels = Some(320);
            Extractor {
                network,
                backbone,
                map_channels,
                preprocess,
                precision,
                views,
                cache: None,
                canvas: None,
                threads: 1,
            }
            .cache_key()
        };
        let keys = [key(6, Precision::Half), key(1, Precision::Single)];
        assert_eq!(keys, ["map-d1aea29679c08527", "map-bd646a444bd9951e"]);
    }

    #[test]
    fn extends_cached_views_and_gives_the_same_values_with_and_without_cache() {
        let dir = tempfile::tempdir().unwrap();
        let photograph = |name: &str, hash: u8| HashedImage {
            path: dir.path().join(name),
            class: 0,
            content_hash: [hash; 32],
            origin: Origin::File,
        };
        fs::write(dir.path().join("a.png"), encode(&gradient(60, 40), ImageFormat::Png)).unwrap();
        fs::write(dir.path().join("b.png"), encode(&gradient(40, 90), ImageFormat::Png)).unwrap();
        fs::write(dir.path().join("cut.png"), &encode(&gradient(40, 90), ImageFormat::Png)[..60]).unwrap();
        fs::write(dir.path().join("tiny.png"), encode(&gradient(90, 31), ImageFormat::Png)).unwrap();
        let images =
            [photograph("a.png", 1), photograph("cut.png", 2), photograph("tiny.png", 3), photograph("b.png", 4)];
        let (network, preprocess) = (OnnxBackbone::built_in().unwrap(), Preprocess::mobilenet_v2());
        let backbone = network.compile_feature_maps().unwrap();
        let cache = dir.path().join("cache");
        let run = |count: usize, cache: Option<&Path>, precision: Precision| {
            let views = Views { count, seed: 7 };
            let (network, backbone, preprocess) = (&network, &backbone, &preprocess);
            let extractor = Extractor {
                network,
                backbone,
                map_channels: Some(320),
                preprocess,
                precision,
                views,
                cache,
                canvas: None,
                threads: 2,
            };
            let (features, cache_error) = extractor.run(&images, &|_| {}).unwrap();
            assert!(cache_error.is_none());
            features
        };
        let uncached = run(3, None, Precision::Half);
        let names: Vec<_> = uncached.skipped.iter().map(|f| f.file.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!((uncached.len(), names), (2, vec!["cut.png", "tiny.png"]));
        assert_ne!(uncached.row(0, 0), uncached.row(0, 1));
        let two = run(2, Some(&cache), Precision::Half);
        assert_eq!((two.row(1, 0), two.row(1, 1)), (uncached.row(1, 0), uncached.row(1, 1)));
        assert_eq!(run(3, Some(&cache), Precision::Half).values, uncached.values, "one view is computed");
        assert_eq!(run(3, Some(&cache), Precision::Half).values, uncached.values, "all views are cached");
        let single = run(1, Some(&cache), Precision::Single);
        let off =
            single.row(0, 0).iter().zip(uncached.row(0, 0).iter()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off > 0.0 && off < 0.01, "half precision differs by {off}");
    }

    #[test]
    fn extracts_features_if_the_cache_cannot_be_written() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.png"), encode(&gradient(60, 40), ImageFormat::Png)).unwrap();
        fs::write(dir.path().join("cache"), "a file where a folder should be").unwrap();
        let (network, preprocess) = (OnnxBackbone::built_in().unwrap(), Preprocess::mobilenet_v2());
        let extractor = Extractor {
            network: &network,
            backbone: &network.compile_features(None).unwrap(),
            map_channels: None,
            preprocess: &preprocess,
            precision: Precision::Single,
            views: Views::ONE,
            cache: Some(&dir.path().join("cache")),
            canvas: None,
            threads: 1,
        };
        let image =
            HashedImage { path: dir.path().join("a.png"), class: 0, content_hash: [1; 32], origin: Origin::File };
        let (features, cache_error) = extractor.run(&[image], &|_| {}).unwrap();
        assert!(features.len() == 1 && cache_error.is_some());
    }
}
