//! The frozen network that turns a picture into features; the only file that names tract.

use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::plan::{SimplePlan, SimpleState};

use super::preprocess::Preprocess;

/// MobileNetV2 1.0/224, made by `models/build_backbone.py`; `models/README.md` tells where its
/// weights come from.
pub const MOBILENET_V2: &[u8] = include_bytes!("../../models/mobilenet_v2_1.0_224.onnx");
/// The name a bundle knows it by.
pub const MOBILENET_V2_NAME: &str = "mobilenet_v2_1.0_224";
/// The tensor whose values a head looks at: the pooled vector before the classification layer.
pub const FEATURES: &str = "features";

#[derive(Debug, thiserror::Error)]
pub enum BackboneError {
    #[error("backbone {name}: {reason}")]
    Load { name: String, reason: String },
    #[error("backbone {name}: cannot run: {reason}")]
    Run { name: String, reason: String },
}

type Plan = SimplePlan<TypedFact, Box<dyn TypedOp>>;
type State = SimpleState<TypedFact, Box<dyn TypedOp>>;

/// A network, loaded and optimised once; any number of [`Session`]s may run it.
#[derive(Clone)]
pub struct Backbone {
    name: String,
    sha256: String,
    width: usize,
    input: [usize; 4],
    plan: Arc<Plan>,
}

/// One thread's working memory for a [`Backbone`].
pub struct Session {
    name: String,
    input: [usize; 4],
    state: State,
}

impl Backbone {
    /// The network inside this program.
    pub fn built_in() -> Result<Self, BackboneError> {
        Self::from_bytes(MOBILENET_V2_NAME, MOBILENET_V2, &Preprocess::mobilenet_v2())
    }

    /// An ONNX file whose output [`FEATURES`] is `[1, width]`; named by the file, without its ending.
    pub fn from_file(path: &Path, preprocess: &Preprocess) -> Result<Self, BackboneError> {
        let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy();
        let bytes = std::fs::read(path)
            .map_err(|e| BackboneError::Load { name: path.display().to_string(), reason: e.to_string() })?;
        Self::from_bytes(&name, &bytes, preprocess)
    }

    /// in: an ONNX model with one input `[N, 3, size, size]` f32 and an output [`FEATURES`].
    pub fn from_bytes(name: &str, onnx: &[u8], preprocess: &Preprocess) -> Result<Self, BackboneError> {
        let size = preprocess.size as usize;
        let input = [1, 3, size, size];
        let failed = |e: TractError| BackboneError::Load { name: name.into(), reason: format!("{e:#}") };
        let plan = load(onnx, input).map_err(failed)?;
        let fact = plan.model().output_fact(0).map_err(failed)?;
        let width = match fact.shape.as_concrete() {
            Some([1, width]) if fact.datum_type == f32::datum_type() => *width,
            _ => {
                let reason = format!("the tensor `{FEATURES}` is {fact:?}, expected 1 × width f32");
                return Err(BackboneError::Load { name: name.into(), reason });
            }
        };
        Ok(Backbone { name: name.into(), sha256: sha256_hex(onnx), width, input, plan })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// SHA-256 of the ONNX file, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Numbers in one feature vector.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Width and height of the input it was loaded for, in pixels.
    pub fn input_size(&self) -> usize {
        self.input[2]
    }

    pub fn session(&self) -> Result<Session, BackboneError> {
        let state =
            self.plan.spawn().map_err(|e| BackboneError::Run { name: self.name.clone(), reason: format!("{e:#}") })?;
        Ok(Session { name: self.name.clone(), input: self.input, state })
    }
}

fn load(mut onnx: &[u8], input: [usize; 4]) -> TractResult<Arc<Plan>> {
    tract_onnx::onnx()
        .model_for_read(&mut onnx)?
        .with_input_fact(0, f32::fact(input).into())?
        .with_outputs_by_name([FEATURES])?
        .into_optimized()?
        .into_runnable()
}

impl Session {
    /// in: `[3, size, size]` f32 as [`super::Preprocessor::run`] writes it; out: `[width]` f32.
    pub fn features(&mut self, input: &[f32]) -> Result<Vec<f32>, BackboneError> {
        self.try_features(input).map_err(|e| BackboneError::Run { name: self.name.clone(), reason: format!("{e:#}") })
    }

    fn try_features(&mut self, input: &[f32]) -> TractResult<Vec<f32>> {
        let tensor = Tensor::from_shape(&self.input, input)?;
        let outputs = self.state.run(tvec!(tensor.into()))?;
        Ok(outputs[0].to_plain_array_view::<f32>()?.iter().copied().collect())
    }
}

/// SHA-256 in hexadecimal, as it stands in manifests.
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use image::{Rgb, RgbImage};

    use super::super::preprocess::Preprocessor;
    use super::*;

    /// ONNX Runtime 1.32 gave these numbers for the same file and picture.
    #[test]
    fn features_are_those_of_another_runtime() {
        let backbone = Backbone::built_in().unwrap();
        assert_eq!(backbone.width(), 1280);
        let image =
            RgbImage::from_fn(224, 224, |x, y| Rgb([0, 1, 2].map(|c: u32| ((y * 7 + x * 3 + c * 50) % 256) as u8)));
        let mut input = vec![0.0; Preprocess::mobilenet_v2().input_len()];
        Preprocessor::new(Preprocess::mobilenet_v2()).run(&image, &mut input);
        let features = backbone.session().unwrap().features(&input).unwrap();
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
    fn what_is_no_network_is_named() {
        let error = Backbone::from_bytes("rubbish", b"not ONNX", &Preprocess::mobilenet_v2());
        assert!(error.err().unwrap().to_string().starts_with("backbone rubbish: "));
        let error = Backbone::from_file(Path::new("none.onnx"), &Preprocess::mobilenet_v2());
        assert!(error.err().unwrap().to_string().starts_with("backbone none.onnx: No such file"));
    }
}
