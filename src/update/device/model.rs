//! A loaded model, and the backbone of the device that it is loaded on.

use std::path::PathBuf;
use std::sync::Arc;

use bloomcast_kernels::{Isa, ThreadPool};

use crate::bundle::{BACKBONE, Bundle, BundleError, Identity, LAST_CONV, Manifest, SelfTest, ViewOptions};
use crate::update::protocol::{ModelSource, identity};
use crate::vision::{Classifier, CompiledBackbone};

/// The backbone that the device has for models that do not carry their own.
#[derive(Debug, Clone)]
pub struct DeviceBackbone {
    /// Its ONNX file; `None` for the built-in one.
    pub file: Option<PathBuf>,
    /// The kernels that compute a backbone; `None` uses tract's operators.
    pub kernels: Option<Isa>,
    /// The threads that compute a backbone; `None` uses the caller's thread alone.
    pub thread_pool: Option<Arc<ThreadPool>>,
    /// How models look at frames.
    pub view: ViewOptions,
}

/// The metadata of a loaded model, and its compiled backbone, which another model may share.
#[derive(Clone)]
pub struct ModelMetadata {
    /// Its manifest.
    pub manifest: Manifest,
    /// SHA-256 of the bundle, hexadecimal.
    pub sha256: String,
    /// Id of the key that signed it; `None` if it is not signed.
    pub signed_by: Option<String>,
    /// Its origin.
    pub source: ModelSource,
    /// Its backbone.
    pub backbone: CompiledBackbone,
}

/// A model that is ready to be activated.
pub struct LoadedModel {
    /// The model.
    pub model: ModelMetadata,
    /// Its classifier.
    pub classifier: Classifier,
    /// Its self-test, if the bundle has one.
    pub self_test: Option<SelfTest>,
}

impl ModelMetadata {
    /// Returns the name, version and SHA-256.
    pub fn identity(&self) -> Identity {
        identity(&self.manifest, &self.sha256)
    }

    /// Returns whether another model has the same backbone and preprocessing, so that only the head differs.
    pub fn has_same_features(&self, other: &Manifest) -> bool {
        let same_member = |name| self.manifest.members.get(name) == other.members.get(name);
        self.manifest.backbone == other.backbone
            && self.manifest.preprocess == other.preprocess
            && [LAST_CONV, BACKBONE].into_iter().all(same_member)
    }
}

impl LoadedModel {
    /// Loads a bundle on the device's backbone; on that of `reuse` if it is the same.
    ///
    /// # Errors
    /// If the bundle and the backbone do not fit together, or the backbone cannot be loaded.
    pub fn new(
        mut bundle: Bundle,
        source: ModelSource,
        device: &DeviceBackbone,
        reuse: Option<&ModelMetadata>,
    ) -> Result<Self, BundleError> {
        let backbone = match reuse.filter(|reuse| reuse.has_same_features(bundle.manifest())) {
            Some(reuse) => reuse.backbone.clone(),
            None => {
                let network = bundle.onnx_backbone(device.file.as_deref())?.with_kernels(device.kernels);
                bundle.compile_backbone(&network.with_thread_pool(device.thread_pool.clone()))?
            }
        };
        let classifier = bundle.classifier_on(&backbone, device.view)?;
        let self_test = bundle.take_self_test();
        let model = ModelMetadata {
            manifest: bundle.manifest().clone(),
            sha256: bundle.sha256().to_owned(),
            signed_by: bundle.signer().map(crate::bundle::PublicKey::id),
            source,
            backbone,
        };
        Ok(LoadedModel { model, classifier, self_test })
    }
}
