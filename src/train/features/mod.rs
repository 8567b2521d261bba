//! What the backbone says of every photograph, and of other views of it, computed on all cores.

pub mod cache;
pub mod device;
pub mod pool;

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
use crate::train::data::photographs::{Finding, Photograph};
use crate::train::features::cache::Cache;
use crate::vision::backbone::{Session, channels_last};
use crate::vision::preprocess::{self, Preprocess, Preprocessor};
use crate::vision::{Backbone, BackboneError, Network, decode};

/// Another version may decode or compute otherwise, and so may another kind of processor.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A photograph with a shorter side shows nothing that could be learned.
pub const SIDE_MIN: u32 = 32;

/// Features, or maps, of a set of photographs, in the order of the set.
#[derive(Debug, Clone, Default)]
pub struct Features {
    /// Numbers in one row.
    pub width: usize,
    /// Rows of each photograph; the first is of the photograph as it is.
    pub views: usize,
    /// `[views, width]` of each photograph.
    pub values: Vec<Values>,
    pub images: Vec<Photograph>,
    /// What could not be decoded.
    pub left_out: Vec<Finding>,
}

/// Numbers in one of two precisions.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    Single(Vec<f32>),
    Half(Vec<f16>),
}

impl Features {
    pub fn len(&self) -> usize {
        self.images.len()
    }

    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    pub fn class(&self, i: usize) -> usize {
        self.images[i].class
    }

    pub fn classes(&self) -> Vec<usize> {
        self.images.iter().map(|image| image.class).collect()
    }

    /// A view of photograph `i`, `[width]`.
    pub fn row(&self, i: usize, view: usize) -> Cow<'_, [f32]> {
        let range = view * self.width..(view + 1) * self.width;
        match &self.values[i] {
            Values::Single(values) => Cow::Borrowed(&values[range]),
            Values::Half(values) => Cow::Owned(values[range].to_f32_vec()),
        }
    }

    /// Each photograph as it is.
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

/// How exact the numbers are kept: single for what is measured, half for maps that are learned from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    Single,
    Half,
}

impl Precision {
    pub fn bytes(self) -> usize {
        match self {
            Precision::Single => 4,
            Precision::Half => 2,
        }
    }
}

/// What is computed of a photograph.
pub struct Extractor<'a> {
    pub network: &'a Network,
    pub backbone: &'a Backbone,
    /// Channels where the backbone gives a map; none where it gives features.
    pub map: Option<usize>,
    pub preprocess: &'a Preprocess,
    pub precision: Precision,
    pub views: Views,
    /// Where what was computed is kept; nothing is kept where it is none.
    pub cache: Option<&'a Path>,
    pub threads: usize,
}

/// What went wrong with the cache, if anything; training goes on without it.
pub type CacheTrouble = Option<io::Error>;

impl Extractor<'_> {
    /// Decodes each photograph that is not cached, once, and runs the backbone on its views. `progress` is told
    /// how many are done.
    pub fn run(
        &self,
        images: &[Photograph],
        progress: &(dyn Fn(usize) + Sync),
    ) -> Result<(Features, CacheTrouble), BackboneError> {
        let (cache, trouble) = match self.cache.map(|root| Cache::open(root, &self.kind())).transpose() {
            Ok(cache) => (cache, None),
            Err(error) => (None, Some(error)),
        };
        let trouble = Mutex::new(trouble);
        let work = |worker: &mut Option<Worker>, i: usize| {
            let cached = cache.as_ref().and_then(|cache| cache.read(&images[i].content));
            let row_bytes = self.backbone.width() * self.precision.bytes();
            let mut bytes = cached.unwrap_or_default();
            // A file of more views serves for fewer, and one of fewer is added to.
            bytes.truncate(self.views.count.min(bytes.len() / row_bytes) * row_bytes);
            let have = bytes.len() / row_bytes;
            if have == self.views.count {
                return Ok(Ok(Values::from_bytes(&bytes, self.precision)));
            }
            let worker = match worker {
                Some(worker) => worker,
                None => worker.insert(Worker::new(self)?),
            };
            let pixels = match read(&images[i].path) {
                Ok(pixels) => pixels,
                Err(problem) => return Ok(Err(problem)),
            };
            for view in have..self.views.count {
                bytes.extend(self.row(worker, &pixels, &images[i], view)?.to_bytes());
            }
            if let Some(Err(error)) = cache.as_ref().map(|cache| cache.write(&images[i].content, &bytes)) {
                trouble.lock().expect("nothing panics with the lock held").get_or_insert(error);
            }
            Ok(Ok(Values::from_bytes(&bytes, self.precision)))
        };
        let extracted = pool::map(images.len(), self.threads, "features", || Ok(None), work, progress)?;
        let mut features = Features { width: self.backbone.width(), views: self.views.count, ..Features::default() };
        for (image, one) in images.iter().zip(extracted) {
            match one {
                Ok(values) => {
                    features.values.push(values);
                    features.images.push(image.clone());
                }
                Err(problem) => features.left_out.push(Finding { file: image.path.clone(), problem }),
            }
        }
        Ok((features, trouble.into_inner().expect("nothing panics with the lock held")))
    }

    /// Names everything that decides the numbers beside the photograph. The number of views is not part of it.
    fn kind(&self) -> String {
        let preprocess = serde_json::to_string(self.preprocess).expect("a preprocessing can be written as JSON");
        let tensor = if self.map.is_some() { "map" } else { "features" };
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

    fn row(
        &self,
        worker: &mut Worker,
        pixels: &RgbImage,
        image: &Photograph,
        view: usize,
    ) -> Result<Values, BackboneError> {
        let Worker { session, preprocessor, input } = worker;
        if view == 0 {
            preprocessor.run(pixels, input);
        } else {
            preprocessor.run(&self.views.view(pixels, &image.content, view, self.preprocess.size), input);
        }
        let row = session.features(input)?;
        let row = match self.map {
            Some(channels) => channels_last(row, channels),
            None => row.to_vec(),
        };
        Ok(match self.precision {
            Precision::Single => Values::Single(row),
            Precision::Half => Values::Half(row.into_iter().map(f16::from_f32).collect()),
        })
    }
}

/// One thread's session and buffers.
struct Worker {
    session: Session,
    preprocessor: Preprocessor,
    input: Vec<f32>,
}

impl Worker {
    fn new(of: &Extractor<'_>) -> Result<Self, BackboneError> {
        Ok(Worker {
            session: of.backbone.session()?,
            preprocessor: Preprocessor::new(of.preprocess.clone()),
            input: vec![0.0; of.preprocess.input_len()],
        })
    }
}

/// A photograph's pixels; or why it is of no use.
pub fn read(path: &Path) -> Result<RgbImage, String> {
    let pixels = decode::file(path).map_err(|e| e.to_string())?;
    let (width, height) = pixels.dimensions();
    if width.min(height) < SIDE_MIN {
        return Err(format!("{width}×{height} pixels, fewer than {SIDE_MIN} a side"));
    }
    Ok(pixels)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use image::ImageFormat;

    use super::*;
    use crate::vision::decode::tests::{encode, gradient};

    #[test]
    fn views_are_added_to_those_that_are_kept_and_every_way_gives_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let photograph =
            |name: &str, content: u8| Photograph { path: dir.path().join(name), class: 0, content: [content; 32] };
        fs::write(dir.path().join("a.png"), encode(&gradient(60, 40), ImageFormat::Png)).unwrap();
        fs::write(dir.path().join("b.png"), encode(&gradient(40, 90), ImageFormat::Png)).unwrap();
        fs::write(dir.path().join("cut.png"), &encode(&gradient(40, 90), ImageFormat::Png)[..60]).unwrap();
        fs::write(dir.path().join("tiny.png"), encode(&gradient(90, 31), ImageFormat::Png)).unwrap();
        let images =
            [photograph("a.png", 1), photograph("cut.png", 2), photograph("tiny.png", 3), photograph("b.png", 4)];
        let (network, preprocess) = (Network::built_in().unwrap(), Preprocess::mobilenet_v2());
        let backbone = network.feature_maps().unwrap();
        let cache = dir.path().join("cache");
        let run = |count: usize, cache: Option<&Path>, precision: Precision| {
            let views = Views { count, seed: 7 };
            let (network, backbone, preprocess) = (&network, &backbone, &preprocess);
            let extractor =
                Extractor { network, backbone, map: Some(320), preprocess, precision, views, cache, threads: 2 };
            let (features, trouble) = extractor.run(&images, &|_| {}).unwrap();
            assert!(trouble.is_none());
            features
        };
        let whole = run(3, None, Precision::Half);
        let names: Vec<_> = whole.left_out.iter().map(|f| f.file.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!((whole.len(), names), (2, vec!["cut.png", "tiny.png"]));
        assert_ne!(whole.row(0, 0), whole.row(0, 1));
        let two = run(2, Some(&cache), Precision::Half);
        assert_eq!((two.row(1, 0), two.row(1, 1)), (whole.row(1, 0), whole.row(1, 1)));
        assert_eq!(run(3, Some(&cache), Precision::Half).values, whole.values, "one view is added");
        assert_eq!(run(3, Some(&cache), Precision::Half).values, whole.values, "all is read");
        let single = run(1, Some(&cache), Precision::Single);
        let off = single.row(0, 0).iter().zip(whole.row(0, 0).iter()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off > 0.0 && off < 0.01, "half the digits, the same numbers: {off}");
    }

    #[test]
    fn a_cache_that_cannot_be_written_stops_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.png"), encode(&gradient(60, 40), ImageFormat::Png)).unwrap();
        fs::write(dir.path().join("cache"), "a file where a folder should be").unwrap();
        let (network, preprocess) = (Network::built_in().unwrap(), Preprocess::mobilenet_v2());
        let extractor = Extractor {
            network: &network,
            backbone: &network.features(None).unwrap(),
            map: None,
            preprocess: &preprocess,
            precision: Precision::Single,
            views: Views::ONE,
            cache: Some(&dir.path().join("cache")),
            threads: 1,
        };
        let image = Photograph { path: dir.path().join("a.png"), class: 0, content: [1; 32] };
        let (features, trouble) = extractor.run(&[image], &|_| {}).unwrap();
        assert!(features.len() == 1 && trouble.is_some());
    }
}
