//! Stage 1: loads the training and validation sets, the network and the backbone; lists the test set.

use std::convert::Infallible;
use std::path::{Path, PathBuf};

use unicode_normalization::UnicodeNormalization;

use crate::bundle::archive::FILE_BYTES_MAX;
use crate::system::paths::printable;
use crate::train::data::dataset::{Dataset, DatasetError, DatasetProblem};
use crate::train::data::generated;
use crate::train::data::image_set::{HashedImage, ImageSet};
use crate::train::data::scene::{self, Geometry};
use crate::train::data::similarity::{self, PerceptualHash};
use crate::train::features::cache::FeatureCache;
use crate::train::features::compute_device::{self, Selected};
use crate::train::parallel;
use crate::train::run::settings::FineTune;
use crate::train::run::{Progress, RunContext, TrainError};
use crate::vision::{CompiledBackbone, Labels, OnnxBackbone};

/// Upper bound on the size of a bundle's members besides an embedded network, in bytes.
const OTHER_MEMBERS_MAX: u64 = 16 << 20;

/// Scenes without a class for each one with a class: most of a frame shows none.
const EMPTY_SCENES: usize = 2;

/// Cache key of the perceptual hashes. Raise its number when an image gets another hash.
const HASH_CACHE: &str = "perceptual-hash-2";

/// The pretrained network, and the classes to train it for.
pub(super) struct Pretrained {
    pub labels: Labels,
    /// Number of unknown classes, which follow the model's classes in the head: one of the dataset's images of none of the classes,
    /// if there are any, and one of generated images.
    pub unknown_classes: usize,
    pub network: OnnxBackbone,
    /// The frozen layers: up to the features, or up to the last convolution if that is fine-tuned.
    pub backbone: CompiledBackbone,
    /// The layers up to the last convolution for the canvas of a scene, and the sizes; `None` if no scenes are made.
    pub canvas: Option<(CompiledBackbone, Geometry)>,
}

/// The scenes of a run, and the images of none of the classes that they are made of, by the folder that they were given in.
#[derive(Default)]
pub(super) struct Scenes {
    /// Scenes to train with: one for each training image of a class, and [`EMPTY_SCENES`] times as many without a class.
    pub train: Vec<HashedImage>,
    /// The backgrounds of scenes to calibrate with. No training scene is made of them, but the classes were trained with them as
    /// whole images.
    pub calibration_backgrounds: Vec<Vec<HashedImage>>,
}

/// The datasets of a run, all with the same classes. The training and validation sets have no image in common.
pub(super) struct Datasets {
    /// The images of the model's classes, and after them those of the unknown classes.
    pub train: ImageSet,
    /// Images of the model's classes.
    pub val: ImageSet,
    /// Images of none of the classes; each has the index of its kind as its class.
    pub val_unknown: Vec<HashedImage>,
    /// Names of the kinds.
    pub unknown_kinds: Vec<String>,
    /// Scenes for the head of windows; none if the model is to judge whole frames.
    pub scenes: Scenes,
    /// The listed files; [`evaluate_test_set`](super::calibrate::evaluate_test_set) reads, hashes and extracts them after training.
    pub test: Option<Dataset>,
}

/// Loads everything that a run reads, and checks that every class has training and validation images. Of the test set only the
/// files are listed; see [`Datasets::test`].
pub(super) fn load(context: RunContext<'_>) -> Result<(Pretrained, Datasets), TrainError> {
    let settings = context.settings;
    let mut dataset = Dataset::read(&settings.dataset)?;
    settings.also.iter().try_for_each(|folder| dataset.add(folder))?;
    settings.unknown.iter().try_for_each(|folder| dataset.add_unknown(folder))?;
    let unknown_classes = 1 + usize::from(!dataset.unknown_kinds.is_empty());
    let mut pretrained = load_network(context, dataset.classes.clone(), unknown_classes)?;
    if settings.makes_scenes(&dataset) {
        pretrained.canvas = canvas_network(context, &pretrained.network);
    }
    let labels = &pretrained.labels;
    let test = settings.test.as_deref().map(|path| read_with_classes(path, labels)).transpose()?;
    let val = settings.val.as_deref().map(|path| read_with_classes(path, labels)).transpose()?;
    let val = val.map(|val| val.with_kinds_of(&mut dataset));
    let (mut train, mut val) = load_image_sets(context, &dataset, val.as_ref(), labels)?;
    let known = labels.names().len();
    let mut val_unknown = val.take(|image| image.class >= known);
    val_unknown.iter_mut().for_each(|image| image.class -= known);
    let mut unknown = train.take(|image| image.class >= known);
    unknown.iter_mut().for_each(|image| image.class = known);
    let seed = settings.hyperparams.seed;
    let scenes = match pretrained.canvas {
        Some(_) => make_scenes(context, &train.kept, &unknown),
        None => Scenes::default(),
    };
    unknown.extend(generated::parts(&unknown, seed));
    train.kept.extend(unknown);
    train.kept.extend(generated::images(&train.kept, seed, known + unknown_classes - 1));
    let unknown_kinds = dataset.unknown_kinds;
    Ok((pretrained, Datasets { train, val, val_unknown, unknown_kinds, scenes, test }))
}

/// Makes the training scenes of images with a class and of images `unknown` without. Warns if there are too few of these.
fn make_scenes(context: RunContext<'_>, known: &[HashedImage], unknown: &[HashedImage]) -> Scenes {
    let settings = context.settings;
    let sources = by_source(unknown, &settings.unknown).into_iter().map(scene::hold_out);
    let (mut backgrounds, mut held_out): (Vec<_>, Vec<_>) = sources.unzip();
    for sources in [&mut backgrounds, &mut held_out] {
        sources.retain(|images: &Vec<HashedImage>| !images.is_empty());
    }
    if backgrounds.is_empty() || held_out.is_empty() {
        let reason = "the model will judge whole frames, not scan them: too few images of none of the classes";
        (context.progress)(Progress::Warning(reason.into()));
        return Scenes::default();
    }
    let seed = settings.hyperparams.seed;
    let scenes = scene::scenes(known, &backgrounds, seed);
    let empty = scene::empty_scenes(EMPTY_SCENES * known.len(), &backgrounds, seed);
    Scenes { train: [scenes, empty].concat(), calibration_backgrounds: held_out }
}

/// Returns the images by the folder of `sources` that they are in; those of none, which are the dataset's own, come first.
fn by_source(images: &[HashedImage], sources: &[PathBuf]) -> Vec<Vec<HashedImage>> {
    let source = |image: &HashedImage| sources.iter().position(|folder| image.path.starts_with(folder));
    let of = |wanted: Option<usize>| images.iter().filter(|image| source(image) == wanted).cloned().collect();
    let all = std::iter::once(None).chain((0..sources.len()).map(Some)).map(of);
    all.filter(|images: &Vec<HashedImage>| !images.is_empty()).collect()
}

/// Returns the layers before the last convolution for the canvas of a scene, and the sizes; `None`, with a warning, if the network
/// cannot scan.
fn canvas_network(context: RunContext<'_>, network: &OnnxBackbone) -> Option<(CompiledBackbone, Geometry)> {
    let size = network.input_size();
    let sizes = network.compile_feature_maps().map(|backbone| [backbone.shape()[1], backbone.shape()[2]]);
    let reason = match sizes {
        Ok([height, width]) if height == width && size.is_multiple_of(height) => {
            let sizes = Geometry { size: size as u32, window: height };
            match network.for_input([sizes.canvas_size() as usize; 2]).compile_feature_maps() {
                Ok(canvas) if canvas.shape()[1..] == [sizes.canvas_positions(); 2] => return Some((canvas, sizes)),
                Ok(canvas) => format!("the feature map of a larger input has the shape {:?}", canvas.shape()),
                Err(error) => error.to_string(),
            }
        }
        Ok([height, width]) => format!("its feature map has {height}×{width} positions"),
        Err(error) => error.to_string(),
    };
    (context.progress)(Progress::Warning(format!("the model will judge whole frames, not scan them: {reason}")));
    None
}

fn load_network(context: RunContext<'_>, labels: Labels, unknown_classes: usize) -> Result<Pretrained, TrainError> {
    let settings = context.settings;
    let network = match &settings.backbone {
        None => OnnxBackbone::built_in()?,
        Some(named) => OnnxBackbone::from_file(&named.file, &named.preprocess, named.feature.as_deref())?,
    };
    if settings.embed_backbone && network.onnx().len() as u64 > FILE_BYTES_MAX - OTHER_MEMBERS_MAX {
        return Err(TrainError::TooLargeToEmbed { name: network.name().into(), bytes: network.onnx().len() });
    }
    let build = |network: &OnnxBackbone| match settings.fine_tune {
        FineTune::None => network.compile_features(None),
        FineTune::LastConv => network.compile_feature_maps(),
    };
    let Selected { network, backbone, fallback } = compute_device::select(network, context.options.device, &build)?;
    if let Some(reason) = fallback {
        (context.progress)(Progress::Warning(reason.to_string()));
    }
    Ok(Pretrained { labels, unknown_classes, network, backbone, canvas: None })
}

/// Reads the dataset at `path`, which must have the classes `labels`.
fn read_with_classes(path: &Path, labels: &Labels) -> Result<Dataset, DatasetError> {
    let dataset = Dataset::read(path)?;
    dataset.expect_classes(labels, path)?;
    Ok(dataset)
}

/// Returns the training and validation sets, without duplicates; no validation image looks like a training image.
fn load_image_sets(
    context: RunContext<'_>,
    dataset: &Dataset,
    val: Option<&Dataset>,
    labels: &Labels,
) -> Result<(ImageSet, ImageSet), TrainError> {
    let (settings, known) = (context.settings, labels.names().len());
    let read = |set: &Dataset| {
        let total = set.images.len();
        let progress = |done| (context.progress)(Progress::Read { done, total });
        ImageSet::read(set, context.options.threads, &progress)
    };
    let (train, val) = match val {
        Some(val) => {
            let val = read(val);
            read(dataset).separate(val, known)
        }
        None => read(dataset).dedup(known).split(settings.val_fraction),
    };
    let val = without_similar(context, &train, val, known);
    let skipped = [&train.skipped[..], &val.skipped].concat();
    context.expect_all_classes(labels, &train.kept, &settings.dataset, "training", &skipped)?;
    context.expect_all_classes(labels, &val.kept, context.val_path(), "validation", &skipped)?;
    Ok((train, val))
}

/// Leaves the images out of the validation set that look like a training image: a copy is predicted too well, and of two labels
/// that differ one is wrong. `known` is the number of the model's classes.
fn without_similar(context: RunContext<'_>, train: &ImageSet, val: ImageSet, known: usize) -> ImageSet {
    // Without a cache, the hashes are computed again by the next run.
    let cache = context.options.cache.as_deref().and_then(|root| FeatureCache::open(root, HASH_CACHE).ok());
    let images: Vec<&HashedImage> = train.kept.iter().chain(&val.kept).collect();
    let (threads, total) = (context.options.threads, images.len());
    let hash = |(): &mut (), i: usize| Ok::<_, Infallible>(perceptual_hash(images[i], cache.as_ref()));
    let progress = |done| (context.progress)(Progress::Compared { done, total });
    let Ok(hashes) = parallel::map(total, threads, "compare", || Ok(()), hash, &progress);
    let (train_hashes, val_hashes) = hashes.split_at(train.kept.len());
    let problem = |(): &mut (), i: usize| {
        let similar = val_hashes[i].and_then(|hash| similarity::most_similar(train_hashes, &hash));
        Ok::<_, Infallible>(similar.map(|other| similarity::problem(&val.kept[i], &train.kept[other], known)))
    };
    let Ok(problems) = parallel::map(val.kept.len(), threads, "compare", || Ok(()), problem, &|_| {});
    val.without(problems)
}

/// Returns the hash of an image, from the cache if it is there; `None` if the image cannot be decoded.
fn perceptual_hash(image: &HashedImage, cache: Option<&FeatureCache>) -> Option<PerceptualHash> {
    let cached = cache.and_then(|cache| PerceptualHash::from_bytes(&cache.read(&image.content_hash)?));
    if cached.is_some() {
        return cached;
    }
    let hash = PerceptualHash::new(&image.decode().ok()?);
    if let Some(cache) = cache {
        // The extraction of the features warns of a cache that cannot be written.
        let _ = cache.write(&image.content_hash, &hash.to_bytes());
    }
    Some(hash)
}

impl RunContext<'_> {
    /// Returns the folder that the validation images come from.
    pub(super) fn val_path(&self) -> &Path {
        self.settings.val.as_ref().unwrap_or(&self.settings.dataset)
    }

    /// Checks that `images` has an image of each class. `path`, `purpose` and one of the `skipped` files are named in the
    /// error.
    pub(super) fn expect_all_classes(
        &self,
        labels: &Labels,
        images: &[HashedImage],
        path: &Path,
        purpose: &'static str,
        skipped: &[DatasetProblem],
    ) -> Result<(), TrainError> {
        let has_image = |class: &usize| images.iter().any(|image| image.class == *class);
        let Some(missing) = (0..labels.names().len()).find(|class| !has_image(class)) else {
            return Ok(());
        };
        let class = labels.name(Some(missing)).to_owned();
        // The folder's name may be in another Unicode form than the class's.
        let is_of_class = |problem: &&DatasetProblem| {
            let folder = problem.file.strip_prefix(path).ok().and_then(|file| file.components().next());
            folder.is_some_and(|folder| folder.as_os_str().to_string_lossy().nfc().eq(class.chars()))
        };
        let hint = match skipped.iter().find(is_of_class) {
            Some(problem) => format!("; for example, {}: {}", printable(&problem.file), problem.problem),
            None if self.settings.val.is_none() => "; add images, or change --val-fraction or --val".into(),
            None => String::new(),
        };
        Err(TrainError::NoImagesLeft { path: path.into(), class, purpose, hint })
    }
}
