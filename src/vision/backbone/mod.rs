//! The frozen network that turns a picture into features; with what stands in this folder the only
//! place that names tract.

mod onnx_info;

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tract_onnx::pb::ModelProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::runtime::{DefaultRuntime, Runnable, Runtime, State, runtime_for_name};

// What is only named here is linked, and with it the runtime that it registers.
#[cfg(feature = "cuda")]
use tract_cuda as _;

pub use onnx_info::{LastConv, ModelInfo};

use super::clock;
use super::kernels::{self, Instructions, Part, Taken, Team, Whole};
use super::last_conv::LastConvWeights;
use super::preprocess::{Preprocess, TensorLayout};
use crate::system::hash::sha256_hex;

/// MobileNetV2 1.0/224, made by `models/build_backbone.py`; `models/README.md` tells where its
/// weights come from.
pub static MOBILENET_V2: &[u8] = include_bytes!("../../../models/mobilenet_v2_1.0_224.onnx");
/// The name a bundle knows it by.
pub const MOBILENET_V2_NAME: &str = "mobilenet_v2_1.0_224";
/// The output that says by its name that a head is to look at it: the pooled vector before the
/// classification layer.
pub const FEATURES: &str = "features";

/// A larger file is no network for a camera.
pub const FILE_BYTES_MAX: u64 = 512 << 20;

#[derive(Debug, thiserror::Error)]
pub enum BackboneError {
    #[error("backbone {name}: {reason}")]
    Load { name: String, reason: String },
    #[error("backbone {name}: cannot run: {reason}")]
    Run { name: String, reason: String },
}

/// What runs a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    Cpu,
    /// The first NVIDIA GPU, through tract's CUDA runtime; only in a program built with the feature `cuda`.
    Cuda,
}

/// A network as its ONNX file tells it, before anything of it runs.
#[derive(Clone)]
pub struct Network {
    name: String,
    sha256: String,
    onnx: Arc<Cow<'static, [u8]>>,
    model: Arc<ModelProto>,
    info: ModelInfo,
    input: [usize; 4],
    device: Device,
    kernels: Option<Instructions>,
    team: Option<Arc<Team>>,
}

/// A [`Network`] up to one of its tensors, optimised once; any number of [`Session`]s may run it.
#[derive(Clone)]
pub struct Backbone {
    name: String,
    /// Shape of the tensor, without the batch.
    shape: Vec<usize>,
    input: [usize; 4],
    plan: Plan,
    kernels: Option<Instructions>,
}

/// What runs it.
#[derive(Clone)]
enum Plan {
    Tract(Arc<dyn Runnable>),
    /// Our kernels alone.
    Kernels(Whole),
}

struct Loaded {
    plan: Plan,
    /// Of the output, without the batch.
    shape: Vec<usize>,
    kernels: Option<Instructions>,
}

/// One thread's working memory for a [`Backbone`].
pub struct Session {
    name: String,
    input: [usize; 4],
    runner: Runner,
    features: Vec<f32>,
    worked: Duration,
}

enum Runner {
    Tract(Box<dyn State>),
    Kernels(Whole),
}

impl Network {
    /// The network inside this program.
    pub fn built_in() -> Result<Self, BackboneError> {
        Self::from_bytes(MOBILENET_V2_NAME, MOBILENET_V2.into(), &Preprocess::mobilenet_v2(), None)
    }

    /// An ONNX file; named by the file, without its ending.
    pub fn from_file(path: &Path, preprocess: &Preprocess, feature: Option<&str>) -> Result<Self, BackboneError> {
        let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy();
        Self::from_bytes(&name, read_file(path)?.into(), preprocess, feature)
    }

    /// in: an ONNX model with one input, a square picture with its channels first or last, f32, and a tensor
    /// `[N, width]` in front of its classification layer; [`ModelInfo::of`] finds it where `feature` is none.
    pub fn from_bytes(
        name: &str,
        onnx: Cow<'static, [u8]>,
        preprocess: &Preprocess,
        feature: Option<&str>,
    ) -> Result<Self, BackboneError> {
        let sha256 = sha256_hex(&onnx);
        Self::from_hashed(name, sha256, onnx, preprocess, feature)
    }

    /// The same, where the file's SHA-256 is known already.
    pub fn from_hashed(
        name: &str,
        sha256: String,
        onnx: Cow<'static, [u8]>,
        preprocess: &Preprocess,
        feature: Option<&str>,
    ) -> Result<Self, BackboneError> {
        let failed = |reason: String| BackboneError::Load { name: name.into(), reason };
        let model = parse(&onnx).map_err(failed)?;
        let info = ModelInfo::of(&model, feature).map_err(failed)?;
        if info.layout != preprocess.layout {
            let (is, not) = (info.layout.axes(), preprocess.layout.axes());
            return Err(failed(format!("its input is {is}, not {not}")));
        }
        if let Some(size) = info.size.filter(|size| *size != preprocess.size) {
            return Err(failed(format!("looks at {size} pixels, not {}", preprocess.size)));
        }
        let size = preprocess.size as usize;
        let input = match preprocess.layout {
            TensorLayout::Nchw => [1, 3, size, size],
            TensorLayout::Nhwc => [1, size, size, 3],
        };
        let (onnx, model) = (Arc::new(onnx), Arc::new(model));
        let (device, kernels, team) = (Device::Cpu, kernels::chosen(), None);
        Ok(Network { name: name.into(), sha256, onnx, model, info, input, device, kernels, team })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// SHA-256 of the ONNX file, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The ONNX file.
    pub fn onnx(&self) -> &[u8] {
        &self.onnx
    }

    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Width and height of the input, in pixels.
    pub fn input_size(&self) -> usize {
        self.input[2]
    }

    /// The same network, run by another device.
    pub fn on(&self, device: Device) -> Self {
        Network { device, ..self.clone() }
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// The same network, with these kernels of ours for the layers that they can compute; none: tract's own.
    pub fn with_kernels(&self, kernels: Option<Instructions>) -> Self {
        Network { kernels, ..self.clone() }
    }

    /// The same network, a picture of which is computed by several threads, as far as our kernels compute it.
    pub fn with_team(&self, team: Option<Arc<Team>>) -> Self {
        Network { team, ..self.clone() }
    }

    /// Pictures in, features out; with `tail` in place of the network's own last convolution, where there is one.
    pub fn features(&self, tail: Option<&LastConvWeights>) -> Result<Backbone, BackboneError> {
        let mut model = Cow::Borrowed(&*self.model);
        if let Some(tail) = tail {
            let own = self.last_conv()?;
            if (own.weights.inputs(), own.weights.outputs()) != (tail.inputs(), tail.outputs()) {
                return Err(self.failed(format!(
                    "its last convolution is {} × {}, the fine-tuned one is {} × {}",
                    own.weights.outputs(),
                    own.weights.inputs(),
                    tail.outputs(),
                    tail.inputs()
                )));
            }
            own.replace(model.to_mut(), tail);
        }
        let backbone = self.cut(&model, &self.info.feature)?;
        if backbone.shape.iter().filter(|n| **n != 1).count() > 1 {
            let shape = &backbone.shape;
            return Err(self.failed(format!("`{}` is {shape:?}, expected one vector", self.info.feature)));
        }
        Ok(backbone)
    }

    /// Pictures in, the map that enters the last convolution out: `[channels, height, width]`.
    pub fn trunk(&self) -> Result<Backbone, BackboneError> {
        let own = self.last_conv()?;
        let trunk = self.cut(&self.model, &own.input)?;
        match trunk.shape[..] {
            [channels, height, width] if channels == own.weights.inputs() && height * width > 0 => Ok(trunk),
            _ => Err(self.failed(format!("`{}` is {:?}, expected a map", own.input, trunk.shape))),
        }
    }

    /// The convolution that can be fine-tuned.
    pub fn last_conv(&self) -> Result<&LastConv, BackboneError> {
        self.info.last_conv.as_ref().ok_or_else(|| {
            let expected = "expected a 1×1 convolution, ReLU6 and a mean over all places before the features";
            self.failed(format!("has no last convolution that can be fine-tuned: {expected}"))
        })
    }

    fn cut(&self, model: &ModelProto, output: &str) -> Result<Backbone, BackboneError> {
        let loaded = self.load(model, output).map_err(|e| self.failed(format!("{e:#}")))?;
        let Loaded { plan, shape, kernels } = loaded;
        Ok(Backbone { name: self.name.clone(), shape, input: self.input, plan, kernels })
    }

    /// Both tract, on a file that lies, and its CUDA runtime,
    /// without the toolkit's headers, may panic: that is an error here.
    fn load(&self, model: &ModelProto, output: &str) -> TractResult<Loaded> {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.prepare(model, output)))
            .map_err(|_| TractError::msg("it made the runtime panic; its message stands above"))?
    }

    fn prepare(&self, model: &ModelProto, output: &str) -> TractResult<Loaded> {
        let mut model = tract_onnx::onnx()
            .model_for_proto_model(model)?
            .with_input_fact(0, f32::fact(self.input).into())?
            .with_outputs_by_name([output])?
            .into_typed()?;
        let mut kernels = self.kernels.filter(|_| self.device == Device::Cpu);
        let mut whole = None;
        if let Some(instructions) = kernels {
            match kernels::replace(&mut model, instructions, self.team.clone())? {
                Taken::Nothing => kernels = None,
                Taken::Part => {}
                Taken::Whole(network) => whole = Some(network),
            }
        }
        let model = model.into_decluttered()?;
        let fact = model.output_fact(0)?.clone();
        let shape = match fact.shape.as_concrete() {
            Some([1, shape @ ..]) if fact.datum_type == f32::datum_type() && shape.iter().product::<usize>() > 0 => {
                shape.to_vec()
            }
            _ => {
                return Err(TractError::msg(format!(
                    "the tensor `{output}` is {fact:?}, expected f32 with a batch of 1"
                )));
            }
        };
        let plan = match (whole, self.device) {
            (Some(whole), _) => Plan::Kernels(whole),
            (None, Device::Cpu) => Plan::Tract(Arc::from(DefaultRuntime.prepare(model)?)),
            (None, Device::Cuda) => Plan::Tract(Arc::from(prepare_cuda(model)?)),
        };
        Ok(Loaded { plan, shape, kernels })
    }

    fn failed(&self, reason: String) -> BackboneError {
        BackboneError::Load { name: self.name.clone(), reason }
    }
}

impl Backbone {
    /// Numbers that a session gives.
    pub fn width(&self) -> usize {
        self.shape.iter().product()
    }

    /// What computes its layers: kernels of ours, or, where there are none, tract's.
    pub fn kernels(&self) -> Option<Instructions> {
        self.kernels
    }

    pub fn session(&self) -> Result<Session, BackboneError> {
        let failed = |e| BackboneError::Run { name: self.name.clone(), reason: format!("{e:#}") };
        let runner = match &self.plan {
            Plan::Tract(plan) => Runner::Tract(plan.spawn().map_err(failed)?),
            Plan::Kernels(whole) => Runner::Kernels(whole.clone()),
        };
        Ok(Session {
            name: self.name.clone(),
            input: self.input,
            runner,
            features: vec![0.0; self.width()],
            worked: Duration::ZERO,
        })
    }
}

/// Reads an ONNX file, no more of it than a network may have.
pub fn read_file(path: &Path) -> Result<Vec<u8>, BackboneError> {
    let failed = |reason| BackboneError::Load { name: path.display().to_string(), reason };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|e| failed(e.to_string()))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(failed(format!("larger than the {FILE_BYTES_MAX} bytes allowed")));
    }
    Ok(bytes)
}

/// What an ONNX file holds; `name` stands in the error.
pub fn inspect(name: &str, onnx: &[u8], feature: Option<&str>) -> Result<ModelInfo, BackboneError> {
    let model = parse(onnx).and_then(|model| ModelInfo::of(&model, feature));
    model.map_err(|reason| BackboneError::Load { name: name.into(), reason })
}

fn parse(mut onnx: &[u8]) -> Result<ModelProto, String> {
    tract_onnx::onnx().proto_model_for_read(&mut onnx).map_err(|e| format!("{e:#}"))
}

fn prepare_cuda(model: TypedModel) -> TractResult<Box<dyn Runnable>> {
    let runtime = runtime_for_name("cuda")?;
    runtime.ok_or_else(|| TractError::msg("this program was built without the feature `cuda`"))?.prepare(model)
}

impl Session {
    /// in: the input as [`super::Preprocessor::run`] writes it; out: what [`Network`] cut it for, without the batch.
    ///
    /// # Panics
    /// Where the input is not as long as [`Network`] has it.
    pub fn features(&mut self, input: &[f32]) -> Result<&[f32], BackboneError> {
        assert_eq!(input.len(), self.input.iter().product::<usize>(), "one picture's numbers");
        let before = clock::worked();
        match &mut self.runner {
            Runner::Kernels(whole) => whole.run(input, &mut self.features),
            Runner::Tract(state) => {
                let ran = run(state.as_mut(), &self.input, input, &mut self.features);
                ran.map_err(|e| BackboneError::Run { name: self.name.clone(), reason: format!("{e:#}") })?;
            }
        }
        self.worked = clock::worked() - before;
        Ok(&self.features)
    }

    /// Processor time that [`Session::features`] took last, of all threads that computed them.
    pub fn worked(&self) -> Duration {
        self.worked
    }

    /// The network's stages with the times of the last picture, where our kernels compute all of it.
    pub fn parts(&self) -> Vec<Part> {
        match &self.runner {
            Runner::Kernels(whole) => whole.parts(),
            Runner::Tract(_) => Vec::new(),
        }
    }
}

fn run(state: &mut dyn State, shape: &[usize; 4], input: &[f32], features: &mut Vec<f32>) -> TractResult<()> {
    let tensor = Tensor::from_shape(shape, input)?;
    let outputs = state.run(tvec!(tensor.into()))?;
    features.clear();
    features.extend(outputs[0].to_plain_array_view::<f32>()?.iter());
    Ok(())
}

/// CHW → HWC: a map's channels side by side at each place. in: `[channels, places]`; out: `[places, channels]`.
pub fn channels_last(map: &[f32], channels: usize) -> Vec<f32> {
    let places = map.len() / channels;
    let mut out = vec![0.0; map.len()];
    for (channel, plane) in map.chunks_exact(places).enumerate() {
        for (place, value) in plane.iter().enumerate() {
            out[place * channels + channel] = *value;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use image::{Rgb, RgbImage};

    use super::super::preprocess::Preprocessor;
    use super::*;

    fn input() -> Vec<f32> {
        let image =
            RgbImage::from_fn(224, 224, |x, y| Rgb([0, 1, 2].map(|c: u32| ((y * 7 + x * 3 + c * 50) % 256) as u8)));
        let mut input = vec![0.0; Preprocess::mobilenet_v2().input_len()];
        Preprocessor::new(Preprocess::mobilenet_v2()).run(&image, &mut input);
        input
    }

    /// ONNX Runtime 1.32 gave these numbers for the same file and picture.
    #[test]
    fn features_are_those_of_another_runtime() {
        let backbone = Network::built_in().unwrap().features(None).unwrap();
        assert_eq!(backbone.width(), 1280);
        let mut session = backbone.session().unwrap();
        let features = session.features(&input()).unwrap();
        let expected = [0.0, 4.224136, 3.443482, 0.0, 0.004023, 0.0, 0.033327, 0.0];
        for (i, (got, expected)) in features.iter().zip(expected).enumerate() {
            assert!((got - expected).abs() < 1e-3, "feature {i}: {got}, expected {expected}");
        }
        let sum: f32 = features.iter().sum();
        let norm = features.iter().map(|v| v * v).sum::<f32>().sqrt();
        assert!((sum - 495.414_6).abs() < 1e-2, "sum {sum}");
        assert!((norm - 36.819_35).abs() < 1e-3, "norm {norm}");
    }

    #[test]
    fn the_trunk_and_a_tail_give_what_the_whole_network_gives() {
        let network = Network::built_in().unwrap();
        let trunk = network.trunk().unwrap();
        assert_eq!(trunk.width(), 320 * 7 * 7);
        let map = channels_last(trunk.session().unwrap().features(&input()).unwrap(), 320);
        let own = &network.last_conv().unwrap().weights;
        // Another convolution: one that looks at its channels the other way round, with half the weights.
        let weight: Vec<f32> = own.weight().iter().rev().map(|w| w / 2.0).collect();
        let other = LastConvWeights::new(320, weight, own.bias().to_vec()).unwrap();
        for (tail, whole) in [(own, network.features(None)), (&other, network.features(Some(&other)))] {
            let mut session = whole.unwrap().session().unwrap();
            let expected = session.features(&input()).unwrap();
            let worst = tail.features(&map).iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4, "differs by {worst}");
        }
        let narrow = LastConvWeights::new(2, vec![0.0; 4], vec![0.0; 2]).unwrap();
        let error = network.features(Some(&narrow)).err().unwrap().to_string();
        assert!(error.contains("1280 × 320, the fine-tuned one is 2 × 2"), "{error}");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_device_that_is_not_there_is_named() {
        let error = Network::built_in().unwrap().on(Device::Cuda).features(None).err().unwrap().to_string();
        assert!(error.ends_with("built without the feature `cuda`"), "{error}");
    }

    #[test]
    fn what_is_no_network_is_named() {
        let preprocess = Preprocess::mobilenet_v2();
        let error = Network::from_bytes("rubbish", b"not ONNX".as_slice().into(), &preprocess, None);
        assert!(error.err().unwrap().to_string().starts_with("backbone rubbish: "));
        let error = Network::from_file(Path::new("none.onnx"), &preprocess, None);
        assert!(error.err().unwrap().to_string().starts_with("backbone none.onnx: No such file"));
        let other_size = Preprocess { size: 160, ..preprocess };
        let error = Network::from_bytes("x", MOBILENET_V2.into(), &other_size, None).err().unwrap().to_string();
        assert_eq!(error, "backbone x: looks at 224 pixels, not 160");
    }
}
