//! Other networks: `backbone list` and `inspect`, and the flags that name one.

use std::fmt;
use std::io::Write;

use bloomcast::train::run::settings::{BackboneFile, Scale};
use bloomcast::vision::Network;
use bloomcast::vision::backbone::ModelInfo;
use bloomcast::zoo;
use clap::{Args, Subcommand};
use serde::Serialize;

#[cfg(feature = "fetch")]
use super::fetching::BackboneFetchArgs;
use super::{Failure, show};

#[derive(Debug, Subcommand)]
pub enum BackboneCommand {
    /// The networks that are known by name
    List,
    /// Download one of them and check its hash
    #[cfg(feature = "fetch")]
    Fetch(BackboneFetchArgs),
    /// Say what an ONNX file holds: its input, the tensor a head looks at, its last convolution
    Inspect(BackboneInspectArgs),
}

#[derive(Debug, Args)]
pub struct BackboneInspectArgs {
    #[command(flatten)]
    backbone: BackboneArgs,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

/// A network, and what its file does not say.
#[derive(Debug, Args)]
pub struct BackboneArgs {
    /// An ONNX classifier, or a fetched one by its name [default: the one inside the program]
    #[arg(long, value_name = "FILE|NAME")]
    backbone: Option<String>,
    /// The tensor that a head looks at [default: what feeds its last matrix product]
    #[arg(long, requires = "backbone")]
    feature: Option<String>,
    /// How its input is made, where it is not known by its hash
    #[arg(long, value_enum, requires = "backbone")]
    preprocess: Option<Scale>,
    /// Width and height of its input, where neither the file nor its hash says it
    #[arg(long, requires = "backbone")]
    size: Option<u32>,
}

impl BackboneArgs {
    /// The file that is named, with its preprocessing.
    pub fn file(self) -> anyhow::Result<Option<BackboneFile>> {
        let Some(named) = self.backbone else { return Ok(None) };
        let found = BackboneFile::find(&named, self.feature, self.preprocess, self.size, zoo::folder().as_deref())?;
        Ok(Some(BackboneFile { file: std::path::absolute(found.file)?, ..found }))
    }
}

pub fn list() -> Result<(), Failure> {
    let folder = zoo::folder();
    let mut out = std::io::stdout().lock();
    for published in zoo::all() {
        let there = folder.as_deref().is_some_and(|folder| published.place(folder).is_file());
        let state = match (there, published.urls.is_empty()) {
            (true, _) => "here",
            (false, false) => "to be fetched",
            (false, true) => "to be made",
        };
        let (name, size, mb) = (&published.name, published.preprocess.size, published.bytes as f64 / 1e6);
        writeln!(out, "{name:26} {size:4} px {mb:6.1} MB  {state:14} {}  ({})", published.about, published.licence)?;
    }
    Ok(())
}

/// What `backbone inspect` says.
#[derive(Debug, Serialize)]
struct Found {
    name: String,
    sha256: String,
    /// Its name among those that are known.
    known_as: Option<String>,
    input: String,
    layout: &'static str,
    size: u32,
    feature: String,
    width: usize,
    parameters: usize,
    /// `[outputs, inputs]` of the convolution that can be fine-tuned.
    last_conv: Option<[usize; 2]>,
}

pub fn inspect(mut args: BackboneInspectArgs) -> Result<(), Failure> {
    // What is found does not depend on how pixels become numbers.
    args.backbone.preprocess.get_or_insert(Scale::Keras);
    let network = match args.backbone.file()? {
        Some(named) => Network::from_file(&named.file, &named.preprocess, named.feature.as_deref())?,
        None => Network::built_in()?,
    };
    let width = network.features(None)?.width();
    let ModelInfo { input, feature, parameters, last_conv, .. } = network.info().clone();
    let found = Found {
        name: network.name().into(),
        sha256: network.sha256().into(),
        known_as: zoo::with_sha256(network.sha256()).map(|published| published.name),
        input,
        layout: network.info().layout.axes(),
        size: network.input_size() as u32,
        feature,
        width,
        parameters,
        last_conv: last_conv.map(|conv| [conv.weights.outputs(), conv.weights.inputs()]),
    };
    show(&found, args.json)
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, sha256 {}", self.name, self.sha256)?;
        writeln!(f, "input     `{}`, {}, {} pixels", self.input, self.layout, self.size)?;
        writeln!(f, "features  `{}`, {} numbers, after {} parameters", self.feature, self.width, self.parameters)?;
        match self.last_conv {
            Some([outputs, inputs]) => writeln!(f, "last convolution  {outputs} × {inputs}, can be fine-tuned"),
            None => writeln!(f, "last convolution  none that can be fine-tuned"),
        }
    }
}
