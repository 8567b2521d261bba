//! What a run is asked for, as `config.toml` holds it, and the recipes by name.

use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::bundle::manifest::check_name;
use crate::system::hash::sha256_hex;
use crate::train::optim::sgd::{Optimiser, Schedule, Sgd};
use crate::vision::backbone;
use crate::vision::{BackboneError, Preprocess};
use crate::zoo;

/// More views of a photograph than this teach nothing new.
pub const VIEWS_MAX: usize = 64;

/// Of the photographs, where no others are named to measure on.
pub const DEFAULT_VAL_FRACTION: f64 = 0.2;

/// Everything that decides what a run gives, beside the photographs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The model's name.
    pub name: String,
    pub recipe: Recipe,
    /// Photographs to learn from, a folder a class.
    pub dataset: PathBuf,
    /// Photographs to measure on, the same classes; a share of the dataset where there is none.
    pub val: Option<PathBuf>,
    /// That share, 0–1; a photograph's content alone decides whether it belongs to it.
    pub val_fraction: f64,
    /// Photographs that are looked at once, when all is decided.
    pub test: Option<PathBuf>,
    /// What of the network is trained beside the head.
    pub fine_tune: FineTune,
    /// Views of each photograph: as it is, mirrored, others by chance.
    pub views: usize,
    /// Share of the validation photographs that the unknown rule may reject, 0–1.
    pub reject: f32,
    /// Whether the bundle carries the backbone.
    pub embed_backbone: bool,
    /// The network; the one inside the program where there is none.
    pub backbone: Option<BackboneFile>,
    pub sgd: Sgd,
}

/// A network in a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneFile {
    pub file: PathBuf,
    /// The tensor that a head looks at; found by itself where there is none.
    pub feature: Option<String>,
    pub preprocess: Preprocess,
}

/// How a network's input is made of pixels.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Scale {
    /// x / 127.5 − 1: Keras's MobileNetV2, InceptionV3, Xception
    Keras,
    /// (x / 255 − mean) / deviation of ImageNet: torchvision's networks
    Torchvision,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FineTune {
    /// The head alone.
    None,
    /// The last convolution with its normalisation, and the head.
    LastConv,
}

/// The four runs of the tutorial that this program grew from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// The head alone, on the photographs as they are: seconds
    Frozen,
    /// The head alone, on other views of them as well
    Augmentation,
    /// The last convolution as well: the best that was found
    LastConv,
    /// The same with a small learning rate
    LastConvSlow,
}

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("{path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("{key}: {given}, expected {expected}")]
    Value { key: &'static str, given: String, expected: String },
}

impl BackboneFile {
    /// A file, or a network of the zoo by its name, fetched to `folder`. Its preprocessing is `scale`, or what the zoo says
    /// of its hash; its size is what the file fixes, or `size`, or the usual.
    pub fn find(
        named: &str,
        feature: Option<String>,
        scale: Option<Scale>,
        size: Option<u32>,
        folder: Option<&Path>,
    ) -> Result<Self, BackboneError> {
        let failed = |reason: String| BackboneError::Load { name: named.into(), reason };
        let file = match (zoo::named(named), folder) {
            (Some(published), Some(folder)) => published.place(folder),
            _ => named.into(),
        };
        if zoo::named(named).is_some() && !file.is_file() {
            return Err(failed(format!("{} is not there; `bloomcast backbone fetch {named}`", file.display())));
        }
        let onnx = backbone::read_file(&file)?;
        let info = backbone::inspect(named, &onnx, feature.as_deref())?;
        let known = zoo::with_sha256(&sha256_hex(&onnx)).map(|published| published.preprocess);
        let scaled = scale.map(|scale| match scale {
            Scale::Keras => Preprocess::mobilenet_v2(),
            Scale::Torchvision => Preprocess::torchvision(224),
        });
        let preprocess = scaled
            .or(known)
            .ok_or_else(|| failed("not known by its hash; say how its input is made with --preprocess".into()))?;
        if let (Some(fixed), Some(asked)) = (info.size, size)
            && fixed != asked
        {
            return Err(failed(format!("looks at {fixed} pixels, not {asked}")));
        }
        let size = info.size.or(size).unwrap_or(preprocess.size);
        let preprocess = Preprocess { size, layout: info.layout, ..preprocess };
        preprocess.check().map_err(|e| failed(e.to_string()))?;
        Ok(BackboneFile { file, feature, preprocess })
    }
}

impl Recipe {
    /// The best that was found, and what is done where no recipe is named.
    pub const BEST: Self = Recipe::LastConv;

    pub fn name(self) -> &'static str {
        match self {
            Recipe::Frozen => "frozen",
            Recipe::Augmentation => "augmentation",
            Recipe::LastConv => "last-conv",
            Recipe::LastConvSlow => "last-conv-slow",
        }
    }

    /// Found on the five flowers' validation set; the README tells what each reaches.
    pub fn settings(self, dataset: PathBuf) -> Settings {
        let head = Sgd {
            seed: 1,
            epochs: 60,
            patience: 0,
            batch: 64,
            optimiser: Optimiser::Sgd,
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
        let conv = Sgd {
            epochs: 40,
            optimiser: Optimiser::Adam,
            learning_rate: 2e-3,
            weight_decay: 0.7,
            dropout: 0.2,
            ..head.clone()
        };
        let (fine_tune, views, sgd) = match self {
            Recipe::Frozen => (FineTune::None, 1, head),
            Recipe::Augmentation => (FineTune::None, 6, head),
            Recipe::LastConv => (FineTune::LastConv, 6, conv),
            Recipe::LastConvSlow => (FineTune::LastConv, 6, Sgd { learning_rate: 1e-4, ..conv }),
        };
        Settings {
            name: "flowers".into(),
            recipe: self,
            dataset,
            val: None,
            val_fraction: DEFAULT_VAL_FRACTION,
            test: None,
            fine_tune,
            views,
            reject: 0.03,
            embed_backbone: false,
            backbone: None,
            sgd,
        }
    }
}

impl Settings {
    /// Reads what [`Settings::to_toml`] wrote.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let failed = |reason: String| SettingsError::File { path: path.into(), reason };
        let text = fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        toml::from_str(&text).map_err(|e| failed(e.to_string().trim_end().to_owned()))
    }

    /// How the network's input is made.
    pub fn preprocess(&self) -> Preprocess {
        self.backbone.as_ref().map_or_else(Preprocess::mobilenet_v2, |named| named.preprocess.clone())
    }

    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("settings can be written as TOML")
    }

    /// Refuses what cannot be trained with, by name.
    pub fn check(&self) -> Result<(), SettingsError> {
        let wrong = |key, given: &str, expected| Err(SettingsError::Value { key, given: given.into(), expected });
        if let Err(expected) = check_name(&self.name) {
            return wrong("name", &self.name, expected.to_string());
        }
        let paths =
            [Some(&self.dataset), self.val.as_ref(), self.test.as_ref(), self.backbone.as_ref().map(|b| &b.file)];
        if let Some(path) = paths.into_iter().flatten().find(|path| path.to_str().is_none()) {
            return wrong("path", &path.display().to_string(), "UTF-8, which config.toml can hold".into());
        }
        if let Some(named) = &self.backbone {
            if let Err(error) = named.preprocess.check() {
                return wrong("backbone.preprocess", &error.to_string(), "what a network may take".into());
            }
            let name = named.file.file_stem().unwrap_or_default().to_string_lossy();
            if let Err(expected) = check_name(&name) {
                return wrong("backbone.file", &name, format!("a file called by {expected}"));
            }
        }
        self.check_numbers()
    }

    fn check_numbers(&self) -> Result<(), SettingsError> {
        let sgd = &self.sgd;
        let share = |value: f32| (0.0..=1.0).contains(&value);
        let positive = |value: f32| value.is_finite() && value > 0.0;
        let not_negative = |value: f32| value.is_finite() && value >= 0.0;
        let checks: [(&'static str, bool, String, &'static str); 13] = [
            (
                "val_fraction",
                0.0 < self.val_fraction && self.val_fraction < 1.0,
                self.val_fraction.to_string(),
                "a share between 0 and 1",
            ),
            ("views", (1..=VIEWS_MAX).contains(&self.views), self.views.to_string(), "1 to 64"),
            ("reject", share(self.reject), self.reject.to_string(), "0 to 1"),
            ("sgd.epochs", (1..=100_000).contains(&sgd.epochs), sgd.epochs.to_string(), "1 to 100000"),
            ("sgd.batch", (1..=100_000).contains(&sgd.batch), sgd.batch.to_string(), "1 to 100000"),
            ("sgd.learning_rate", positive(sgd.learning_rate), sgd.learning_rate.to_string(), "a number above 0"),
            ("sgd.warm_up", sgd.warm_up <= sgd.epochs, sgd.warm_up.to_string(), "at most the epochs"),
            ("sgd.step_epochs", sgd.step_epochs > 0, sgd.step_epochs.to_string(), "1 or above"),
            ("sgd.step_factor", positive(sgd.step_factor), sgd.step_factor.to_string(), "a number above 0"),
            ("sgd.momentum", share(sgd.momentum), sgd.momentum.to_string(), "0 to 1"),
            ("sgd.weight_decay", not_negative(sgd.weight_decay), sgd.weight_decay.to_string(), "0 or above"),
            ("sgd.label_smoothing", share(sgd.label_smoothing), sgd.label_smoothing.to_string(), "0 to 1"),
            ("sgd.dropout", share(sgd.dropout) && sgd.dropout < 1.0, sgd.dropout.to_string(), "0 to below 1"),
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
    fn what_is_written_is_read() {
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
    fn a_wrong_setting_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        let text = Recipe::Frozen.settings("photos".into()).to_toml();
        fs::write(&path, text.replace("epochs = 60", "epoch = 60")).unwrap();
        let error = Settings::read(&path).unwrap_err().to_string();
        assert!(error.contains("config.toml") && error.contains("unknown field `epoch`"), "{error}");
        let mut settings = Recipe::Frozen.settings("photos".into());
        settings.sgd.dropout = 1.0;
        assert_eq!(settings.check().unwrap_err().to_string(), "sgd.dropout: 1, expected 0 to below 1");
        settings.sgd.dropout = 0.0;
        let named = Settings { name: "a\nb".into(), ..settings.clone() };
        let error = named.check().unwrap_err().to_string();
        assert_eq!(error, "name: a\nb, expected 1 to 64 bytes without control characters");
        settings.sgd.learning_rate = f32::NAN;
        assert_eq!(settings.check().unwrap_err().to_string(), "sgd.learning_rate: NaN, expected a number above 0");
    }
}
