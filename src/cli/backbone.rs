//! The commands `backbone list` and `backbone inspect`, and the flags that select a backbone.

use std::fmt;
use std::io::Write;

use bloomcast::train::run::settings::{BackboneFile, PreprocessPreset};
use bloomcast::vision::OnnxBackbone;
use bloomcast::vision::backbone::ModelInfo;
use bloomcast::zoo;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

#[cfg(feature = "fetch")]
use super::fetching::BackboneFetchArgs;
use super::{Failure, show};

#[derive(Debug, Subcommand)]
pub enum BackboneCommand {
    /// List the networks that can be selected by name
    List,
    /// Download a listed network and check its SHA-256
    #[cfg(feature = "fetch")]
    Fetch(BackboneFetchArgs),
    /// Print the input, the features and the last convolution of an ONNX file
    Inspect(BackboneInspectArgs),
}

#[derive(Debug, Args)]
pub struct BackboneInspectArgs {
    #[command(flatten)]
    backbone: BackboneArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The flags that select a backbone.
#[derive(Debug, Args)]
pub struct BackboneArgs {
    /// ONNX file of a classifier, or the name of a downloaded one [default: the built-in MobileNetV2]
    #[arg(long, value_name = "FILE|NAME")]
    backbone: Option<String>,
    /// Tensor with the features [default: the input of the last matrix product]
    #[arg(long, requires = "backbone")]
    feature: Option<String>,
    /// Normalization of the backbone's input, if its SHA-256 is not listed
    #[arg(long, value_enum, requires = "backbone")]
    preprocess: Option<PreprocessArg>,
    /// Width and height of the backbone's input in pixels, if the file does not fix them
    #[arg(long, requires = "backbone")]
    size: Option<u32>,
}

/// Values of `--preprocess`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PreprocessArg {
    /// x / 127.5 − 1: Keras's MobileNetV2, InceptionV3, Xception
    Keras,
    /// (x / 255 − mean) / std of ImageNet: torchvision's networks
    Torchvision,
}

impl From<PreprocessArg> for PreprocessPreset {
    fn from(arg: PreprocessArg) -> Self {
        match arg {
            PreprocessArg::Keras => PreprocessPreset::Keras,
            PreprocessArg::Torchvision => PreprocessPreset::Torchvision,
        }
    }
}

impl BackboneArgs {
    /// Returns the selected file with its preprocessing; `None` for the built-in backbone.
    pub fn file(self) -> anyhow::Result<Option<BackboneFile>> {
        let Some(named) = self.backbone else { return Ok(None) };
        let preset = self.preprocess.map(Into::into);
        let found = BackboneFile::find(&named, self.feature, preset, self.size, zoo::folder().as_deref())?;
        Ok(Some(BackboneFile { file: std::path::absolute(found.file)?, ..found }))
    }
}

pub fn list() -> Result<(), Failure> {
    let folder = zoo::folder();
    let mut out = std::io::stdout().lock();
    for entry in zoo::all() {
        let exists = folder.as_deref().is_some_and(|folder| entry.path_in(folder).is_file());
        let state = match (exists, entry.urls.is_empty()) {
            (true, _) => "downloaded",
            (false, false) => "can be fetched",
            (false, true) => "no download",
        };
        let (name, size, mb) = (&entry.name, entry.preprocess.size, entry.bytes as f64 / 1e6);
        writeln!(out, "{name:26} {size:4} px {mb:6.1} MB  {state:14} {}  ({})", entry.about, entry.licence)?;
    }
    Ok(())
}

/// The output of `backbone inspect`.
#[derive(Debug, Serialize)]
struct BackboneInfo {
    name: String,
    sha256: String,
    /// Name of the listed network with this SHA-256.
    known_as: Option<String>,
    input: String,
    layout: &'static str,
    size: u32,
    feature: String,
    width: usize,
    parameters: usize,
    /// `[outputs, inputs]` of the last convolution, if it can be fine-tuned.
    last_conv: Option<[usize; 2]>,
}

pub fn inspect(mut args: BackboneInspectArgs) -> Result<(), Failure> {
    // The output does not depend on the normalization.
    args.backbone.preprocess.get_or_insert(PreprocessArg::Keras);
    let network = match args.backbone.file()? {
        Some(named) => OnnxBackbone::from_file(&named.file, &named.preprocess, named.feature.as_deref())?,
        None => OnnxBackbone::built_in()?,
    };
    let width = network.compile_features(None)?.width();
    let ModelInfo { input, feature, parameters, last_conv, .. } = network.info().clone();
    let info = BackboneInfo {
        name: network.name().into(),
        sha256: network.sha256().into(),
        known_as: zoo::with_sha256(network.sha256()).map(|entry| entry.name),
        input,
        layout: network.info().layout.axes(),
        size: network.input_size() as u32,
        feature,
        width,
        parameters,
        last_conv: last_conv.map(|conv| [conv.weights.outputs(), conv.weights.inputs()]),
    };
    show(&info, args.json)
}

impl fmt::Display for BackboneInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, sha256 {}", self.name, self.sha256)?;
        writeln!(f, "input     `{}`, {}, {} pixels", self.input, self.layout, self.size)?;
        writeln!(f, "features  `{}`, {} values, {} parameters", self.feature, self.width, self.parameters)?;
        match self.last_conv {
            Some([outputs, inputs]) => writeln!(f, "last convolution  {outputs} × {inputs}, can be fine-tuned"),
            None => writeln!(f, "last convolution  none that can be fine-tuned"),
        }
    }
}
