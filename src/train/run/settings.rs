//! The settings of a run, as `config.toml` holds them, and the named recipes.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bundle::manifest::check_name;
use crate::system::hash::sha256_hex;
use crate::train::data::dataset::Dataset;
use crate::train::optim::training_loop::{Hyperparams, Optimizer, Schedule};
use crate::vision::backbone;
use crate::vision::{BackboneError, Preprocess};
use crate::zoo;

/// Largest number of views of an image.
pub const VIEWS_MAX: usize = 64;

/// Fraction of the dataset that is split off for validation by default.
pub const DEFAULT_VAL_FRACTION: f64 = 0.2;

/// Everything besides the images that the result of a run depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The model's name.
    pub name: String,
    /// The recipe that the settings are based on.
    pub recipe: Recipe,
    /// Training images, one folder per class.
    pub dataset: PathBuf,
    /// Validation images of the same classes; `None` splits off `val_fraction` of the dataset.
    pub val: Option<PathBuf>,
    /// Fraction of the dataset that is split off for validation, above 0 and below 1. The assignment depends on the content
    /// of an image alone.
    pub val_fraction: f64,
    /// More training images, of some or all of the classes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<PathBuf>,
    /// Folders of images of none of the classes, besides the folder `unknown` of the dataset.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<PathBuf>,
    /// Test images of the same classes, evaluated once after training.
    pub test: Option<PathBuf>,
    /// Which layers are trained besides the head.
    pub fine_tune: FineTune,
    /// Views of each training image, 1–64: the original, the horizontal flip, and random augmentations.
    pub views: usize,
    /// Fraction of the validation images that the OOD threshold rejects as unknown, 0–1.
    pub reject: f32,
    /// Whether the bundle contains the backbone.
    pub embed_backbone: bool,
    /// The backbone; `None` selects the built-in one.
    pub backbone: Option<BackboneFile>,
    /// Hyperparameters of the training loop.
    #[serde(rename = "sgd")]
    pub hyperparams: Hyperparams,
}

/// A backbone in an ONNX file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneFile {
    /// Path of the ONNX file.
    pub file: PathBuf,
    /// The tensor with the features; `None` selects the input of the last matrix product.
    pub feature: Option<String>,
    /// Input size, layout and normalization of the images.
    pub preprocess: Preprocess,
}

/// The normalization of pixel values that a backbone was trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreprocessPreset {
    /// `x / 127.5 − 1`: Keras's MobileNetV2, InceptionV3 and Xception.
    Keras,
    /// `(x / 255 − mean) / std` with the ImageNet mean and std: torchvision's networks.
    Torchvision,
}

/// The layers that are trained besides the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FineTune {
    /// The head only.
    None,
    /// The last convolution with its batch normalization, and the head.
    LastConv,
}

/// Named settings: the four runs of the flower classification tutorial that the trainer reproduces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// The head only, on the original images.
    Frozen,
    /// The head only, with data augmentation.
    Augmentation,
    /// The last convolution and the head, with data augmentation.
    LastConv,
    /// [`Recipe::LastConv`] with a small learning rate.
    LastConvSlow,
}

/// Error of rejected settings.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read or parsed, or has unknown or missing keys.
    #[error("{path}: {reason}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// The error of the file system or of the TOML parser.
        reason: String,
    },
    /// A value is out of range.
    #[error("{key}: {given}, expected {expected}")]
    Value {
        /// Key in `config.toml`; `path` for a path that is not UTF-8.
        key: &'static str,
        /// The value, or the reason why it is invalid.
        given: String,
        /// The valid values.
        expected: String,
    },
}

impl BackboneFile {
    /// Finds the backbone `named`: a path, or the name of a network in the zoo that was fetched to `folder`. The
    /// normalization is `preset`, or that of the zoo's entry with the file's SHA-256; the input size is the one in the file,
    /// or `size` (pixels), or the default of the normalization.
    ///
    /// # Errors
    /// Fails if the file is missing or is not a usable network, if its normalization is not known, or if `size` contradicts
    /// the file.
    pub fn find(
        named: &str,
        feature: Option<String>,
        preset: Option<PreprocessPreset>,
        size: Option<u32>,
        folder: Option<&Path>,
    ) -> Result<Self, BackboneError> {
        let failed = |reason: String| BackboneError::Load { name: named.into(), reason };
        let file = match (zoo::named(named), folder) {
            (Some(entry), Some(folder)) => entry.path_in(folder),
            _ => named.into(),
        };
        if zoo::named(named).is_some() && !file.is_file() {
            return Err(failed(format!("{} does not exist; run `bloomcast backbone fetch {named}`", file.display())));
        }
        let onnx = backbone::read_file(&file)?;
        let info = backbone::inspect(named, &onnx, feature.as_deref())?;
        let known = zoo::with_sha256(&sha256_hex(&onnx)).map(|entry| entry.preprocess);
        let preset = preset.map(|preset| match preset {
            PreprocessPreset::Keras => Preprocess::mobilenet_v2(),
            PreprocessPreset::Torchvision => Preprocess::torchvision(224),
        });
        let preprocess = preset
            .or(known)
            .ok_or_else(|| failed("its SHA-256 is not listed; set its normalization with --preprocess".into()))?;
        if let (Some(fixed), Some(requested)) = (info.size, size)
            && fixed != requested
        {
            return Err(failed(format!("the file fixes the input size to {fixed} pixels, expected {requested}")));
        }
        let size = info.size.or(size).unwrap_or(preprocess.size);
        let preprocess = Preprocess { size, layout: info.layout, ..preprocess };
        preprocess.check().map_err(|e| failed(e.to_string()))?;
        Ok(BackboneFile { file, feature, preprocess })
    }
}

impl Recipe {
    /// The recipe with the best validation loss, and the default.
    pub const BEST: Self = Recipe::LastConv;

    /// Returns the name on the command line and in `config.toml`.
    pub fn name(self) -> &'static str {
        match self {
            Recipe::Frozen => "frozen",
            Recipe::Augmentation => "augmentation",
            Recipe::LastConv => "last-conv",
            Recipe::LastConvSlow => "last-conv-slow",
        }
    }

    /// Returns the settings for `dataset`. The hyperparameters were tuned on the validation set of TensorFlow's
    /// `flower_photos`; the README lists the results.
    pub fn settings(self, dataset: PathBuf) -> Settings {
        let head = Hyperparams {
            seed: 1,
            epochs: 60,
            patience: 0,
            batch: 64,
            optimizer: Optimizer::Sgd,
            learning_rate: 0.01,
            schedule: Schedule::Cosine,
            warm_up: 0,
            step_epochs: 10,
            step_factor: 0.3,
            momentum: 0.9,
            nesterov: true,
            weight_decay: 0.06,
            label_smoothing: 0.05,
            balance: false,
            dropout: 0.0,
        };
        let conv = Hyperparams {
            epochs: 40,
            optimizer: Optimizer::Adam,
            learning_rate: 2e-3,
            weight_decay: 0.7,
            dropout: 0.2,
            ..head.clone()
        };
        let (fine_tune, views, hyperparams) = match self {
            Recipe::Frozen => (FineTune::None, 1, head),
            Recipe::Augmentation => (FineTune::None, 6, head),
            Recipe::LastConv => (FineTune::LastConv, 6, conv),
            Recipe::LastConvSlow => (FineTune::LastConv, 6, Hyperparams { learning_rate: 1e-4, ..conv }),
        };
        Settings {
            name: "flowers".into(),
            recipe: self,
            dataset,
            val: None,
            val_fraction: DEFAULT_VAL_FRACTION,
            also: Vec::new(),
            unknown: Vec::new(),
            test: None,
            fine_tune,
            views,
            reject: 0.04,
            embed_backbone: false,
            backbone: None,
            hyperparams,
        }
    }
}

impl Settings {
    /// Returns whether training images are pasted into scenes: if there are images of none of the classes to paste them on, and
    /// images are augmented at all.
    pub fn makes_scenes(&self, dataset: &Dataset) -> bool {
        self.views > 1 && !dataset.unknown_kinds.is_empty()
    }

    /// Reads a file that [`Settings::to_toml`] wrote.
    ///
    /// # Errors
    /// Fails if the file cannot be read or parsed, or has unknown or missing keys.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let failed = |reason: String| SettingsError::File { path: path.into(), reason };
        let text = fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        toml::from_str(&text).map_err(|e| failed(e.to_string().trim_end().to_owned()))
    }

    /// Returns the preprocessing of the backbone.
    pub fn preprocess(&self) -> Preprocess {
        self.backbone.as_ref().map_or_else(Preprocess::mobilenet_v2, |named| named.preprocess.clone())
    }

    /// Returns the content of `config.toml`.
    ///
    /// # Panics
    /// Panics if a path is not UTF-8; [`Settings::check`] rejects that.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("settings with UTF-8 paths serialize to TOML")
    }

    /// Checks all values.
    ///
    /// # Errors
    /// Names the first key whose value is out of range.
    pub fn check(&self) -> Result<(), SettingsError> {
        let invalid = |key, given: &str, expected| Err(SettingsError::Value { key, given: given.into(), expected });
        if let Err(expected) = check_name(&self.name) {
            return invalid("name", &self.name, expected.to_string());
        }
        let paths =
            [Some(&self.dataset), self.val.as_ref(), self.test.as_ref(), self.backbone.as_ref().map(|b| &b.file)];
        let paths = paths.into_iter().flatten().chain(&self.also).chain(&self.unknown);
        if let Some(path) = { paths }.find(|path| path.to_str().is_none()) {
            return invalid("path", &path.display().to_string(), "UTF-8".into());
        }
        if let Some(named) = &self.backbone {
            if let Err(error) = named.preprocess.check() {
                return invalid("backbone.preprocess", &error.to_string(), "a valid preprocessing".into());
            }
            let name = named.file.file_stem().unwrap_or_default().to_string_lossy();
            if let Err(expected) = check_name(&name) {
                return invalid("backbone.file", &name, format!("a file name of {expected}"));
            }
        }
        self.check_ranges()
    }

    fn check_ranges(&self) -> Result<(), SettingsError> {
        let sgd = &self.hyperparams;
        let unit = |value: f32| (0.0..=1.0).contains(&value);
        let positive = |value: f32| value.is_finite() && value > 0.0;
        let not_negative = |value: f32| value.is_finite() && value >= 0.0;
        let checks: [(&'static str, bool, String, &'static str); 13] = [
            (
                "val_fraction",
                0.0 < self.val_fraction && self.val_fraction < 1.0,
                self.val_fraction.to_string(),
                "a fraction between 0 and 1",
            ),
            ("views", (1..=VIEWS_MAX).contains(&self.views), self.views.to_string(), "1 to 64"),
            ("reject", unit(self.reject), self.reject.to_string(), "0 to 1"),
            ("sgd.epochs", (1..=100_000).contains(&sgd.epochs), sgd.epochs.to_string(), "1 to 100000"),
            ("sgd.batch", (1..=100_000).contains(&sgd.batch), sgd.batch.to_string(), "1 to 100000"),
            ("sgd.learning_rate", positive(sgd.learning_rate), sgd.learning_rate.to_string(), "a number above 0"),
            ("sgd.warm_up", sgd.warm_up <= sgd.epochs, sgd.warm_up.to_string(), "at most the epochs"),
            ("sgd.step_epochs", sgd.step_epochs > 0, sgd.step_epochs.to_string(), "1 or above"),
            ("sgd.step_factor", positive(sgd.step_factor), sgd.step_factor.to_string(), "a number above 0"),
            ("sgd.momentum", unit(sgd.momentum), sgd.momentum.to_string(), "0 to 1"),
            ("sgd.weight_decay", not_negative(sgd.weight_decay), sgd.weight_decay.to_string(), "0 or above"),
            ("sgd.label_smoothing", unit(sgd.label_smoothing), sgd.label_smoothing.to_string(), "0 to 1"),
            ("sgd.dropout", unit(sgd.dropout) && sgd.dropout < 1.0, sgd.dropout.to_string(), "0 to below 1"),
        ];
        match checks.into_iter().find(|(_, good, ..)| !good) {
            None => Ok(()),
            Some((key, _, given, expected)) => Err(SettingsError::Value { key, given, expected: expected.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_through_toml() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        for recipe in [Recipe::Frozen, Recipe::Augmentation, Recipe::LastConv, Recipe::LastConvSlow] {
            let mut settings = recipe.settings("photos".into());
            settings.check().unwrap();
            settings.test = Some("others".into());
            let preprocess = Preprocess::torchvision(299);
            settings.backbone = Some(BackboneFile { file: "x.onnx".into(), feature: Some("f".into()), preprocess });
            fs::write(&path, settings.to_toml()).unwrap();
            assert_eq!(Settings::read(&path).unwrap(), settings);
        }
    }

    #[test]
    fn reads_the_settings_of_earlier_versions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        let text = r#"
            name = "flowers"
            recipe = "last-conv"
            dataset = "photos"
            val_fraction = 0.2
            fine_tune = "last-conv"
            views = 6
            reject = 0.03
            embed_backbone = false

            [sgd]
            seed = 1
            epochs = 2
            patience = 0
            batch = 64
            optimiser = "adam"
            learning_rate = 0.01
            schedule = "step"
            warm_up = 1
            step_epochs = 10
            step_factor = 0.3
            momentum = 0.9
            nesterov = true
            weight_decay = 0.06
            label_smoothing = 0.05
            balance = false
            dropout = 0.0
        "#;
        fs::write(&path, text).unwrap();
        let settings = Settings::read(&path).unwrap();
        assert_eq!((settings.recipe, settings.fine_tune, settings.views), (Recipe::LastConv, FineTune::LastConv, 6));
        assert_eq!((settings.hyperparams.optimizer, settings.hyperparams.schedule), (Optimizer::Adam, Schedule::Step));
        let lines = |text: &str| -> Vec<String> { text.lines().map(|line| line.trim().into()).collect() };
        assert_eq!(lines(&settings.to_toml()), lines(text.trim()), "the same keys and values");
    }

    #[test]
    fn names_the_invalid_setting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        let text = Recipe::Frozen.settings("photos".into()).to_toml();
        fs::write(&path, text.replace("epochs = 60", "epoch = 60")).unwrap();
        let error = Settings::read(&path).unwrap_err().to_string();
        assert!(error.contains("config.toml") && error.contains("unknown field `epoch`"), "{error}");
        let mut settings = Recipe::Frozen.settings("photos".into());
        settings.hyperparams.dropout = 1.0;
        assert_eq!(settings.check().unwrap_err().to_string(), "sgd.dropout: 1, expected 0 to below 1");
        settings.hyperparams.dropout = 0.0;
        let named = Settings { name: "a\nb".into(), ..settings.clone() };
        let error = named.check().unwrap_err().to_string();
        assert_eq!(error, "name: a\nb, expected 1 to 64 bytes without control characters");
        settings.hyperparams.learning_rate = f32::NAN;
        assert_eq!(settings.check().unwrap_err().to_string(), "sgd.learning_rate: NaN, expected a number above 0");
    }
}
