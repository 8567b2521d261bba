//! The backbone: the pretrained network that computes the features of an image. Only the modules in this folder use tract.

mod fusion;
mod kernel_choice;
mod onnx_info;

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bloomcast_kernels::{CompiledNet, Isa, LayerProfile, ThreadPool, Workspace, thread_cpu_time};
use serde::{Deserialize, Serialize};
use tract_onnx::pb::ModelProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::runtime::{DefaultRuntime, Runnable, Runtime, State, runtime_for_name};

// The import links the crate, and with it the runtime that it registers.
#[cfg(feature = "cuda")]
use tract_cuda as _;

pub use kernel_choice::{KernelChoice, UnknownKernels, UnsupportedKernels};
pub use onnx_info::{LastConv, ModelInfo, OnnxError};

use self::fusion::Fusion;
use super::last_conv::LastConvWeights;
use super::preprocess::{Preprocess, TensorLayout};
use crate::system::hash::sha256_hex;

/// The ONNX file of MobileNetV2 1.0/224, written by `models/build_backbone.py`; `models/README.md` names the source of its
/// weights.
pub static MOBILENET_V2: &[u8] = include_bytes!("../../../models/mobilenet_v2_1.0_224.onnx");
/// The name of [`MOBILENET_V2`] in a bundle's manifest.
pub const MOBILENET_V2_NAME: &str = "mobilenet_v2_1.0_224";
/// The conventional name of the output that is the head's input: the pooled vector in front of the classification layer.
pub const FEATURES: &str = "features";

/// Largest ONNX file, in bytes.
pub const FILE_BYTES_MAX: u64 = 512 << 20;

/// An error of loading or running a backbone.
#[derive(Debug, thiserror::Error)]
pub enum BackboneError {
    /// The ONNX file cannot be read.
    #[error("backbone {name}: {source}")]
    Read {
        /// Path of the file.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// The ONNX file is larger than [`FILE_BYTES_MAX`].
    #[error("backbone {name}: larger than the {FILE_BYTES_MAX} bytes allowed")]
    FileTooLarge {
        /// Path of the file.
        name: String,
    },
    /// The file is not a valid ONNX model, or has no usable input or feature tensor.
    #[error("backbone {name}: {source}")]
    Onnx {
        /// Name of the network.
        name: String,
        /// The cause.
        source: OnnxError,
    },
    /// The network expects another order of the input's axes than the preprocessing gives.
    #[error("backbone {name}: input layout is {actual}, expected {expected}")]
    InputLayout {
        /// Name of the network.
        name: String,
        /// Axes of the network's input.
        actual: &'static str,
        /// Axes that the preprocessing gives.
        expected: &'static str,
    },
    /// The network expects another input size than the preprocessing gives.
    #[error("backbone {name}: input size is {actual} pixels, expected {expected}")]
    InputSize {
        /// Name of the network.
        name: String,
        /// Width and height of the network's input, in pixels.
        actual: u32,
        /// Width and height that the preprocessing gives, in pixels.
        expected: u32,
    },
    /// The positions of the last feature map do not divide the input into equal squares.
    #[error(
        "backbone {name}: cannot scan: its feature map of {map} positions a side does not divide its input of {size} pixels"
    )]
    MapDoesNotDivideInput {
        /// Name of the network.
        name: String,
        /// Width and height of the network's input, in pixels.
        size: u32,
        /// Height of the feature map.
        map: usize,
    },
    /// The feature tensor has more than one axis longer than 1.
    #[error("backbone {name}: tensor `{tensor}` has shape {shape:?}, expected one vector")]
    NotAVector {
        /// Name of the network.
        name: String,
        /// Name of the feature tensor.
        tensor: String,
        /// Shape of the tensor, without the batch axis.
        shape: Vec<usize>,
    },
    /// The input of the last convolution is not `[channels, height, width]`.
    #[error("backbone {name}: tensor `{tensor}` has shape {shape:?}, expected a feature map of {channels} channels")]
    NotAFeatureMap {
        /// Name of the network.
        name: String,
        /// Name of the tensor.
        tensor: String,
        /// Shape of the tensor, without the batch axis.
        shape: Vec<usize>,
        /// Input channels of the last convolution.
        channels: usize,
    },
    /// The network does not end in a 1×1 convolution, ReLU6 and global average pooling.
    #[error(
        "backbone {name}: has no last convolution that can be fine-tuned: expected a 1×1 convolution, ReLU6 and global average pooling before the features"
    )]
    NoLastConv {
        /// Name of the network.
        name: String,
    },
    /// The fine-tuned last convolution has another shape than the network's own. Shapes are `[outputs, inputs]`.
    #[error("backbone {name}: its last convolution has the shape {own:?}, the fine-tuned one {fine_tuned:?}")]
    LastConvShape {
        /// Name of the network.
        name: String,
        /// Shape of the network's convolution.
        own: [usize; 2],
        /// Shape of the fine-tuned convolution.
        fine_tuned: [usize; 2],
    },
    /// The runtime cannot load or compile the network.
    #[error("backbone {name}: {reason}")]
    Load {
        /// Name of the network.
        name: String,
        /// Message of the runtime.
        reason: String,
    },
    /// The runtime fails to create its state or to run the network.
    #[error("backbone {name}: cannot run: {reason}")]
    Run {
        /// Name of the network.
        name: String,
        /// Message of the runtime.
        reason: String,
    },
}

/// The device that runs a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ComputeDevice {
    /// The processor.
    Cpu,
    /// The first NVIDIA GPU, with tract's CUDA runtime; requires the cargo feature `cuda`.
    Cuda,
}

/// A parsed ONNX model; [`OnnxBackbone::compile_features`] and [`OnnxBackbone::compile_feature_maps`] compile it.
///
/// ```
/// use bloomcast::vision::{OnnxBackbone, Preprocess, Preprocessor, decode, test_pattern};
///
/// let backbone = OnnxBackbone::built_in()?.compile_features(None)?;
/// assert_eq!(backbone.width(), 1280);
/// let mut preprocessor = Preprocessor::new(Preprocess::mobilenet_v2());
/// let mut input = vec![0.0; preprocessor.spec().input_len()];
/// preprocessor.run(&decode::encoded(&test_pattern::jpeg(640, 480))?, &mut input);
/// let mut session = backbone.session()?;
/// assert_eq!(session.run(&input)?.len(), 1280);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct OnnxBackbone {
    name: String,
    sha256: String,
    onnx: Arc<Cow<'static, [u8]>>,
    model: Arc<ModelProto>,
    info: ModelInfo,
    input: [usize; 4],
    device: ComputeDevice,
    kernels: Option<Isa>,
    pool: Option<Arc<ThreadPool>>,
}

/// A [`OnnxBackbone`] compiled up to one of its tensors; any number of [`Session`]s run it.
#[derive(Clone)]
pub struct CompiledBackbone {
    name: String,
    /// Shape of the output tensor, without the batch axis.
    shape: Vec<usize>,
    input: [usize; 4],
    plan: Plan,
    kernels: Option<Isa>,
    pool: Option<Arc<ThreadPool>>,
    activations: Option<Activations>,
}

/// The layers up to the activations of the last convolution, which can be compiled for inputs of other sizes.
#[derive(Clone)]
enum Activations {
    Kernels(CompiledNet),
    Onnx(Arc<OnnxLayers>),
}

/// Layers that tract compiles again for each size of the input.
struct OnnxLayers {
    network: OnnxBackbone,
    /// With the weights of the last convolution.
    model: ModelProto,
    /// Name of the tensor.
    output: String,
}

/// The compiled network.
#[derive(Clone)]
enum Plan {
    Tract(Arc<dyn Runnable>),
    /// The kernels compute the whole network.
    Kernels(CompiledNet),
}

struct Loaded {
    plan: Plan,
    /// Shape of the output tensor, without the batch axis.
    shape: Vec<usize>,
    kernels: Option<Isa>,
}

/// The state of one thread that runs a [`CompiledBackbone`]: its buffers and the time of the last run.
pub struct Session {
    name: String,
    input: [usize; 4],
    runner: Runner,
    features: Vec<f32>,
    pool: Option<Arc<ThreadPool>>,
    cpu_time: Duration,
}

enum Runner {
    Tract(Box<dyn State>),
    Kernels { net: CompiledNet, workspace: Box<Workspace> },
}

impl OnnxBackbone {
    /// Loads [`MOBILENET_V2`], which is part of the program.
    ///
    /// # Errors
    /// As [`Self::from_bytes`].
    pub fn built_in() -> Result<Self, BackboneError> {
        Self::from_bytes(MOBILENET_V2_NAME, MOBILENET_V2.into(), &Preprocess::mobilenet_v2(), None)
    }

    /// Loads an ONNX file. Its name is the file's name without the extension.
    ///
    /// # Errors
    /// If the file cannot be read or is larger than [`FILE_BYTES_MAX`], and as [`Self::from_bytes`].
    pub fn from_file(path: &Path, preprocess: &Preprocess, feature: Option<&str>) -> Result<Self, BackboneError> {
        let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy();
        Self::from_bytes(&name, read_file(path)?.into(), preprocess, feature)
    }

    /// Parses an ONNX model. in: one input, f32, `[N, 3, size, size]` or `[N, size, size, 3]`; the tensor `feature`, `[N, width]`,
    /// is the head's input, by default the one that [`ModelInfo::from_model`] finds. `name` is used in messages.
    ///
    /// # Errors
    /// If the file is not a valid model, has no such input or tensor, or expects another layout or size than `preprocess` gives.
    pub fn from_bytes(
        name: &str,
        onnx: Cow<'static, [u8]>,
        preprocess: &Preprocess,
        feature: Option<&str>,
    ) -> Result<Self, BackboneError> {
        let sha256 = sha256_hex(&onnx);
        Self::from_hashed(name, sha256, onnx, preprocess, feature)
    }

    /// As [`Self::from_bytes`], with the SHA-256 of `onnx` already computed.
    ///
    /// # Errors
    /// As [`Self::from_bytes`].
    pub fn from_hashed(
        name: &str,
        sha256: String,
        onnx: Cow<'static, [u8]>,
        preprocess: &Preprocess,
        feature: Option<&str>,
    ) -> Result<Self, BackboneError> {
        let invalid = |source| BackboneError::Onnx { name: name.into(), source };
        let model = parse(&onnx).map_err(invalid)?;
        let info = ModelInfo::from_model(&model, feature).map_err(invalid)?;
        if info.layout != preprocess.layout {
            let (actual, expected) = (info.layout.axes(), preprocess.layout.axes());
            return Err(BackboneError::InputLayout { name: name.into(), actual, expected });
        }
        if let Some(actual) = info.size.filter(|size| *size != preprocess.size) {
            return Err(BackboneError::InputSize { name: name.into(), actual, expected: preprocess.size });
        }
        let size = preprocess.size as usize;
        let input = match preprocess.layout {
            TensorLayout::Nchw => [1, 3, size, size],
            TensorLayout::Nhwc => [1, size, size, 3],
        };
        let (onnx, model) = (Arc::new(onnx), Arc::new(model));
        let (device, kernels, pool) = (ComputeDevice::Cpu, Some(Isa::best()), None);
        Ok(OnnxBackbone { name: name.into(), sha256, onnx, model, info, input, device, kernels, pool })
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the SHA-256 of the ONNX file, in lower-case hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Returns the bytes of the ONNX file.
    pub fn onnx(&self) -> &[u8] {
        &self.onnx
    }

    /// Returns the properties of the model.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Returns the width and height of the input, in pixels.
    pub fn input_size(&self) -> usize {
        self.input[2]
    }

    /// Returns the same network for another device.
    pub fn on(&self, device: ComputeDevice) -> Self {
        OnnxBackbone { device, ..self.clone() }
    }

    /// Returns the device that runs the network.
    pub fn device(&self) -> ComputeDevice {
        self.device
    }

    /// Returns the same network with kernels for an instruction set, which compute the layers that they support; `None` means tract's
    /// own operators. A new network has the kernels of [`Isa::best`]; an instruction set that the processor lacks means tract, too.
    pub fn with_kernels(&self, kernels: Option<Isa>) -> Self {
        OnnxBackbone { kernels, ..self.clone() }
    }

    /// Returns the same network with a pool whose threads share an image in the layers that the kernels compute.
    pub fn with_thread_pool(&self, pool: Option<Arc<ThreadPool>>) -> Self {
        OnnxBackbone { pool, ..self.clone() }
    }

    /// Compiles the network up to its features. `fine_tuned` replaces the weights of the last convolution. A session computes:
    /// in: the input tensor; out: `[width]`.
    ///
    /// # Errors
    /// If the runtime cannot load the network, the features are not one vector, or `fine_tuned` does not fit the network.
    pub fn compile_features(&self, fine_tuned: Option<&LastConvWeights>) -> Result<CompiledBackbone, BackboneError> {
        let mut model = Cow::Borrowed(&*self.model);
        if let Some(fine_tuned) = fine_tuned {
            let last_conv = self.last_conv()?;
            let shape = |weights: &LastConvWeights| [weights.outputs(), weights.inputs()];
            let (own, fine_tuned_shape) = (shape(&last_conv.weights), shape(fine_tuned));
            if own != fine_tuned_shape {
                return Err(BackboneError::LastConvShape {
                    name: self.name.clone(),
                    own,
                    fine_tuned: fine_tuned_shape,
                });
            }
            last_conv.replace(model.to_mut(), fine_tuned);
        }
        let mut backbone = self.compile(&model, &self.info.feature)?;
        if backbone.shape.iter().filter(|n| **n != 1).count() > 1 {
            let (tensor, shape) = (self.info.feature.clone(), backbone.shape);
            return Err(BackboneError::NotAVector { name: self.name.clone(), tensor, shape });
        }
        let layers = match &backbone.plan {
            // The map of another net is stored channels last.
            Plan::Kernels(net) if net.channels_first() => net.before_global_sum().map(Activations::Kernels),
            _ => None,
        };
        let from_onnx = |last_conv: &LastConv| {
            let (network, output) = (self.clone(), last_conv.activations.clone());
            Activations::Onnx(Arc::new(OnnxLayers { network, model: model.into_owned(), output }))
        };
        backbone.activations = match &self.info.last_conv {
            Some(last_conv) => layers.or_else(|| Some(from_onnx(last_conv))),
            None => None,
        };
        Ok(backbone)
    }

    /// Returns the same network for inputs of another height and width, in pixels.
    pub fn for_input(&self, [height, width]: [usize; 2]) -> Self {
        let input = match self.info.layout {
            TensorLayout::Nchw => [1, 3, height, width],
            TensorLayout::Nhwc => [1, height, width, 3],
        };
        OnnxBackbone { input, ..self.clone() }
    }

    /// Compiles the network up to the input of its last convolution. A session computes: in: the input tensor; out: the
    /// feature map, `[channels, height, width]`.
    ///
    /// # Errors
    /// If the network has no such convolution, or the runtime cannot load it.
    pub fn compile_feature_maps(&self) -> Result<CompiledBackbone, BackboneError> {
        let last_conv = self.last_conv()?;
        let backbone = self.compile(&self.model, &last_conv.input)?;
        let inputs = last_conv.weights.inputs();
        match backbone.shape[..] {
            [channels, height, width] if channels == inputs && height * width > 0 => Ok(backbone),
            _ => Err(BackboneError::NotAFeatureMap {
                name: self.name.clone(),
                tensor: last_conv.input.clone(),
                shape: backbone.shape,
                channels: inputs,
            }),
        }
    }

    /// Returns the convolution that can be fine-tuned.
    ///
    /// # Errors
    /// If the network does not end in a 1×1 convolution, ReLU6 and global average pooling.
    pub fn last_conv(&self) -> Result<&LastConv, BackboneError> {
        self.info.last_conv.as_ref().ok_or_else(|| BackboneError::NoLastConv { name: self.name.clone() })
    }

    fn compile(&self, model: &ModelProto, output: &str) -> Result<CompiledBackbone, BackboneError> {
        let loaded = self
            .load(model, output)
            .map_err(|e| BackboneError::Load { name: self.name.clone(), reason: format!("{e:#}") })?;
        let Loaded { plan, shape, kernels } = loaded;
        let (name, pool) = (self.name.clone(), self.pool.clone());
        Ok(CompiledBackbone { name, shape, input: self.input, plan, kernels, pool, activations: None })
    }

    /// As [`Self::prepare`], but returns an error if tract panics: it may panic on an inconsistent file, and its CUDA runtime
    /// panics if the toolkit's headers are missing.
    fn load(&self, model: &ModelProto, output: &str) -> TractResult<Loaded> {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.prepare(model, output)))
            .map_err(|_| TractError::msg("the runtime panicked; its message is printed above"))?
    }

    fn prepare(&self, model: &ModelProto, output: &str) -> TractResult<Loaded> {
        let mut model = tract_onnx::onnx()
            .model_for_proto_model(model)?
            .with_input_fact(0, f32::fact(self.input).into())?
            .with_outputs_by_name([output])?
            .into_typed()?;
        let mut kernels = self.kernels.filter(|_| self.device == ComputeDevice::Cpu);
        let mut whole = None;
        if let Some(isa) = kernels {
            match fusion::fuse(&mut model, isa, self.pool.clone())? {
                Fusion::None => kernels = None,
                Fusion::Partial => {}
                Fusion::Whole(net) => whole = Some(net),
            }
        }
        let model = model.into_decluttered()?;
        let fact = model.output_fact(0)?.clone();
        let shape = match fact.shape.as_concrete() {
            Some([1, shape @ ..]) if fact.datum_type == f32::datum_type() && shape.iter().product::<usize>() > 0 => {
                shape.to_vec()
            }
            _ => {
                return Err(TractError::msg(format!("tensor `{output}` is {fact:?}, expected f32 with a batch of 1")));
            }
        };
        let plan = match (whole, self.device) {
            (Some(net), _) => Plan::Kernels(net),
            (None, ComputeDevice::Cpu) => Plan::Tract(Arc::from(DefaultRuntime.prepare(model)?)),
            (None, ComputeDevice::Cuda) => Plan::Tract(Arc::from(prepare_cuda(model)?)),
        };
        Ok(Loaded { plan, shape, kernels })
    }
}

impl CompiledBackbone {
    /// Returns the number of values that a session computes.
    pub fn width(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the instruction set of the kernels that compute its layers, or `None` if tract computes all of them.
    pub fn kernels(&self) -> Option<Isa> {
        self.kernels
    }

    /// Returns the name of the network.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the shape of the output, without the batch axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Returns the layers up to the activations of the last convolution, for an input of another height and width, in pixels. A session
    /// computes: in: the input tensor of that size; out: `[width, height, width]`, the activations at each position of the map. Where
    /// the kernels compute the whole network, the packed weights are shared.
    ///
    /// # Errors
    /// If this backbone does not compute features, its network has no such convolution, or it cannot take this size.
    pub fn activations(&self, [height, width]: [usize; 2]) -> Result<Self, BackboneError> {
        let failed = |reason: String| BackboneError::Load { name: self.name.clone(), reason };
        match &self.activations {
            None => Err(BackboneError::NoLastConv { name: self.name.clone() }),
            Some(Activations::Onnx(layers)) => {
                layers.network.for_input([height, width]).compile(&layers.model, &layers.output)
            }
            Some(Activations::Kernels(net)) => {
                let net = net.resized(height, width).map_err(|error| failed(error.to_string()))?;
                let to = net.output_shape();
                let (input, shape) = ([1, 3, height, width], vec![to.channels, to.height, to.width]);
                Ok(CompiledBackbone { shape, input, plan: Plan::Kernels(net), activations: None, ..self.clone() })
            }
        }
    }

    /// Creates a session for one thread and allocates its buffers.
    ///
    /// # Errors
    /// If the runtime fails to create its state.
    pub fn session(&self) -> Result<Session, BackboneError> {
        let failed = |e| BackboneError::Run { name: self.name.clone(), reason: format!("{e:#}") };
        let runner = match &self.plan {
            Plan::Tract(plan) => Runner::Tract(plan.spawn().map_err(failed)?),
            Plan::Kernels(net) => Runner::Kernels { net: net.clone(), workspace: Box::default() },
        };
        Ok(Session {
            name: self.name.clone(),
            input: self.input,
            runner,
            features: vec![0.0; self.width()],
            pool: self.pool.clone(),
            cpu_time: Duration::ZERO,
        })
    }
}

/// Reads an ONNX file of at most [`FILE_BYTES_MAX`] bytes.
///
/// # Errors
/// If the file cannot be read or is too large.
pub fn read_file(path: &Path) -> Result<Vec<u8>, BackboneError> {
    let name = || path.display().to_string();
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|source| BackboneError::Read { name: name(), source })?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(BackboneError::FileTooLarge { name: name() });
    }
    Ok(bytes)
}

/// Returns the properties of an ONNX model without compiling it. `name` is used in messages; `feature` as in
/// [`OnnxBackbone::from_bytes`].
///
/// # Errors
/// If the file is not a valid model, or has no such input or tensor.
pub fn inspect(name: &str, onnx: &[u8], feature: Option<&str>) -> Result<ModelInfo, BackboneError> {
    let info = parse(onnx).and_then(|model| ModelInfo::from_model(&model, feature));
    info.map_err(|source| BackboneError::Onnx { name: name.into(), source })
}

fn parse(mut onnx: &[u8]) -> Result<ModelProto, OnnxError> {
    tract_onnx::onnx().proto_model_for_read(&mut onnx).map_err(|e| OnnxError::Parse(format!("{e:#}")))
}

fn prepare_cuda(model: TypedModel) -> TractResult<Box<dyn Runnable>> {
    let runtime = runtime_for_name("cuda")?;
    runtime.ok_or_else(|| TractError::msg("this program was built without the feature `cuda`"))?.prepare(model)
}

impl Session {
    /// Runs the network. in: the input tensor as [`super::Preprocessor::run`] writes it; out: the output tensor of the
    /// [`CompiledBackbone`], without the batch axis.
    ///
    /// # Errors
    /// If the runtime fails.
    ///
    /// # Panics
    /// If `input` has another length than the network's input.
    pub fn run(&mut self, input: &[f32]) -> Result<&[f32], BackboneError> {
        assert_eq!(input.len(), self.input.iter().product::<usize>(), "length of the input tensor");
        let before = thread_cpu_time();
        match &mut self.runner {
            Runner::Kernels { net, workspace } => net.run(input, &mut self.features, workspace),
            Runner::Tract(state) => {
                let ran = run(state.as_mut(), &self.input, input, &mut self.features);
                ran.map_err(|e| BackboneError::Run { name: self.name.clone(), reason: format!("{e:#}") })?;
            }
        }
        let own = thread_cpu_time().saturating_sub(before);
        self.cpu_time = self.pool.as_ref().map_or(own, |pool| pool.take_cpu_time().plus_own(own));
        Ok(&self.features)
    }

    /// Returns the processor time that the last call of [`Session::run`] took, on all threads.
    pub fn cpu_time(&self) -> Duration {
        self.cpu_time
    }

    /// Returns the cost of each layer, with the times of the last image, if the kernels compute the whole network; otherwise empty.
    pub fn layer_profiles(&self) -> Vec<LayerProfile> {
        match &self.runner {
            Runner::Kernels { net, workspace } => net.profile(workspace),
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

/// Transposes a feature map from CHW to HWC. in: `[channels, positions]`; out: `[positions, channels]`.
///
/// # Panics
/// If `feature_map` has fewer values than channels.
pub fn channels_last(feature_map: &[f32], channels: usize) -> Vec<f32> {
    let positions = feature_map.len() / channels;
    let mut out = vec![0.0; feature_map.len()];
    for (channel, plane) in feature_map.chunks_exact(positions).enumerate() {
        for (position, value) in plane.iter().enumerate() {
            out[position * channels + channel] = *value;
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

    /// The expected values are those of ONNX Runtime 1.32 for the same file and image.
    #[test]
    fn features_equal_those_of_onnx_runtime() {
        let backbone = OnnxBackbone::built_in().unwrap().compile_features(None).unwrap();
        assert_eq!(backbone.width(), 1280);
        let mut session = backbone.session().unwrap();
        let features = session.run(&input()).unwrap();
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
    fn feature_maps_and_the_last_convolution_equal_the_whole_network() {
        let network = OnnxBackbone::built_in().unwrap();
        let backbone = network.compile_feature_maps().unwrap();
        assert_eq!(backbone.width(), 320 * 7 * 7);
        let feature_map = channels_last(backbone.session().unwrap().run(&input()).unwrap(), 320);
        let own = &network.last_conv().unwrap().weights;
        // Other weights: in reverse order and halved.
        let weight: Vec<f32> = own.weight().iter().rev().map(|w| w / 2.0).collect();
        let other = LastConvWeights::new(320, weight, own.bias().to_vec()).unwrap();
        for (last_conv, whole) in
            [(own, network.compile_features(None)), (&other, network.compile_features(Some(&other)))]
        {
            let mut session = whole.unwrap().session().unwrap();
            let expected = session.run(&input()).unwrap();
            let worst =
                last_conv.features(&feature_map).iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4, "differs by {worst}");
        }
        let narrow = LastConvWeights::new(2, vec![0.0; 4], vec![0.0; 2]).unwrap();
        let error = network.compile_features(Some(&narrow)).err().unwrap().to_string();
        assert!(error.contains("[1280, 320], the fine-tuned one [2, 2]"), "{error}");
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn an_unavailable_device_is_an_error() {
        let error =
            OnnxBackbone::built_in().unwrap().on(ComputeDevice::Cuda).compile_features(None).err().unwrap().to_string();
        assert!(error.ends_with("built without the feature `cuda`"), "{error}");
    }

    #[test]
    fn errors_name_the_file_and_the_cause() {
        let preprocess = Preprocess::mobilenet_v2();
        let error = OnnxBackbone::from_bytes("invalid", b"not ONNX".as_slice().into(), &preprocess, None);
        assert!(error.err().unwrap().to_string().starts_with("backbone invalid: "));
        let error = OnnxBackbone::from_file(Path::new("none.onnx"), &preprocess, None);
        assert!(error.err().unwrap().to_string().starts_with("backbone none.onnx: No such file"));
        let other_size = Preprocess { size: 160, ..preprocess };
        let error = OnnxBackbone::from_bytes("x", MOBILENET_V2.into(), &other_size, None).err().unwrap().to_string();
        assert_eq!(error, "backbone x: input size is 224 pixels, expected 160");
    }
}
