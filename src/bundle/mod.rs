//! Model bundles: a trained model in one `.bloom` file.
//!
//! A bundle is a tar of `manifest.json`, `manifest.json.sig`, `head.safetensors`, and optionally `tail.safetensors` (a
//! fine-tuned last convolution), `backbone.onnx` (the network that the model was trained on) and `selftest.safetensors`
//! (inputs with the expected outputs). The manifest lists all other members with size and SHA-256, and the signature
//! covers the manifest, so that every byte of a signed bundle is authenticated.

pub mod archive;
pub mod manifest;
pub mod selftest;
pub mod signature;
pub mod tensors;

use std::borrow::Cow;
use std::path::Path;

pub use archive::ArchiveError;
pub use manifest::{BackboneRef, DatasetRef, Identity, Manifest, Metrics, OodMeasure, OodParams, ScanRef};
pub use selftest::SelfTest;
pub use signature::{Keyring, PrivateKey, PublicKey};

use archive::Members;
use manifest::{ManifestError, MemberError};
use selftest::SelfTestError;
use signature::{DetachedSignature, SignatureError};
use tensors::TensorError;

use crate::system::hash::sha256_hex;
use crate::vision::backbone;
use crate::vision::classifier::ClassifierParams;
use crate::vision::{
    BackboneError, Classifier, CompiledBackbone, Head, LastConvWeights, OnnxBackbone, OodDetector, ScanBudget,
    ScanParams, View,
};

/// The bundle inside this program: a model of five flowers.
pub static BUILT_IN: &[u8] = include_bytes!("../../models/flowers.bloom");

const HEAD: &str = "head.safetensors";
/// Name of the member with the fine-tuned last convolution. The name in the file is historical and stable.
pub const LAST_CONV: &str = "tail.safetensors";
/// Name of the member with the ONNX file of the backbone.
pub const BACKBONE: &str = "backbone.onnx";
const SELF_TEST: &str = "selftest.safetensors";
/// The members in their required order; with another order there would be two files with the same signature.
const ORDER: [&str; 6] = [manifest::NAME, manifest::SIGNATURE, HEAD, LAST_CONV, BACKBONE, SELF_TEST];

/// An error of a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file cannot be read or written, or its container is invalid.
    #[error("model {file}: {source}")]
    Archive {
        /// Path or name of the bundle.
        file: String,
        /// The cause.
        source: ArchiveError,
    },
    /// The container is valid, its contents are not.
    #[error("model {file}: {source}")]
    Content {
        /// Path or name of the bundle.
        file: String,
        /// The cause.
        source: Box<ContentError>,
    },
    /// The available network is not the one that the model was trained on.
    #[error("model {file} was trained on the backbone {expected}, this one is {actual}")]
    OtherBackbone {
        /// Path or name of the bundle.
        file: String,
        /// Name and SHA-256 of the network that the model was trained on.
        expected: String,
        /// Name and SHA-256 of the available network.
        actual: String,
    },
    /// The self-test cannot be recorded again.
    #[error("model {file}: {source}")]
    SelfTest {
        /// Path or name of the bundle.
        file: String,
        /// The cause.
        source: Box<SelfTestError>,
    },
    /// The view is to be a scan, for which the model was not trained.
    #[error(
        "model {file}: was not trained to scan frames: set model.view or --view to \"whole\", or train it with images in unknown/"
    )]
    CannotScan {
        /// Path or name of the bundle.
        file: String,
    },
    /// The network cannot be loaded or compiled.
    #[error(transparent)]
    Backbone(#[from] BackboneError),
}

/// An error of the contents of a bundle, whose container is valid.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// The signature is invalid or does not match the manifest.
    #[error("{member}: {0}", member = manifest::SIGNATURE)]
    Signature(#[from] SignatureError),
    /// The manifest is invalid.
    #[error("{member}: {0}", member = manifest::NAME)]
    Manifest(#[from] ManifestError),
    /// The members differ from the manifest's list.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// A safetensors member is invalid.
    #[error("{member}: {source}")]
    Tensors {
        /// Name of the member.
        member: &'static str,
        /// The cause.
        source: TensorError,
    },
    /// The fine-tuned last convolution does not have as many outputs as the head has inputs.
    #[error("{LAST_CONV} has {outputs} outputs, {HEAD} expects {width} features")]
    LastConvWidth {
        /// Output channels of the convolution.
        outputs: usize,
        /// Length of the head's feature vector.
        width: usize,
    },
    /// The backbone does not have as many features as the head has inputs.
    #[error("the backbone has {outputs} features, {HEAD} expects {width}")]
    BackboneWidth {
        /// Number of features of the backbone.
        outputs: usize,
        /// Length of the head's feature vector.
        width: usize,
    },
    /// The head does not have as many classes as the manifest has class names.
    #[error("{HEAD} has {classes} classes, {member} names {names}", member = manifest::NAME)]
    Classes {
        /// Number of the head's classes.
        classes: usize,
        /// Number of class names in the manifest.
        names: usize,
    },
    /// The backbone in the bundle is not the one that the model was trained on.
    #[error("{BACKBONE} has the sha256 {actual:.12}…, expected {expected:.12}… of the backbone in the manifest")]
    OtherBackbone {
        /// SHA-256 of the backbone in the bundle, 64 lower-case hexadecimal digits.
        actual: String,
        /// SHA-256 of the backbone in the manifest, 64 lower-case hexadecimal digits.
        expected: String,
    },
}

/// A model: a validated bundle, or one that was just trained.
///
/// ```
/// use bloomcast::bundle::Bundle;
///
/// let bundle = Bundle::built_in()?;
/// assert_eq!(bundle.manifest().classes.names(), ["daisy", "dandelion", "roses", "sunflowers", "tulips"]);
/// assert_eq!(bundle.contents().head.classes(), 5);
/// # Ok::<(), bloomcast::bundle::BundleError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Name of the file, for messages.
    file: String,
    sha256: String,
    manifest: Manifest,
    signer: Option<PublicKey>,
    contents: Contents,
}

/// The contents of a bundle besides its manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    /// The classification head.
    pub head: Head,
    /// The out-of-distribution detector.
    pub ood: OodDetector,
    /// The parameters of scanning; `None` if the model looks at whole frames.
    pub scan: Option<ScanParams>,
    /// A fine-tuned last convolution; `None` for the backbone's own.
    pub last_conv: Option<LastConvWeights>,
    /// The ONNX file of the backbone; `None` if devices have it.
    pub backbone: Option<Vec<u8>>,
    /// The self-test; `None` if the bundle has no such member.
    pub self_test: Option<SelfTest>,
}

/// How a model looks at frames, other than it was trained for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ViewOptions {
    /// The view; `None` for the model's own.
    pub view: Option<View>,
    /// Limits the cost of scanning.
    pub scan_budget: ScanBudget,
}

impl Default for ViewOptions {
    fn default() -> Self {
        ViewOptions { view: None, scan_budget: ScanBudget::DEFAULT }
    }
}

/// An error of reading a bundle, without the name of its file.
enum ReadError {
    Archive(ArchiveError),
    Content(ContentError),
}

impl Bundle {
    /// Creates a bundle of a trained model. [`Bundle::to_bytes`] fills in `manifest.members`.
    pub fn new(manifest: Manifest, contents: Contents) -> Self {
        Bundle { file: "just trained".into(), sha256: String::new(), manifest, signer: None, contents }
    }

    /// Reads [`BUILT_IN`].
    ///
    /// # Errors
    /// As [`Bundle::from_bytes`].
    pub fn built_in() -> Result<Self, BundleError> {
        Self::from_bytes("built-in", BUILT_IN)
    }

    /// Reads a bundle file.
    ///
    /// # Errors
    /// If the file cannot be read or is too large, and as [`Bundle::from_bytes`].
    pub fn read(path: &Path) -> Result<Self, BundleError> {
        let file = path.display().to_string();
        let bytes = archive::read_file(path).map_err(|source| BundleError::Archive { file: file.clone(), source })?;
        Self::from_bytes(&file, &bytes)
    }

    /// Reads and validates the bytes of a bundle file; `file` is its name in messages. Verifies the signature if there is
    /// one, but not whether its key is trusted; see [`Bundle::signer`].
    ///
    /// # Errors
    /// If the tar is not canonical, a member is unknown, missing, altered or invalid, the members do not fit each other, or
    /// the signature does not match.
    pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<Self, BundleError> {
        let read = || -> Result<Self, ReadError> {
            let mut members = archive::unpack(bytes)?;
            expect_order(&members)?;
            let signer = verify_signature(&mut members)?;
            let manifest = members.require_at_most(manifest::NAME, manifest::BYTES_MAX)?;
            let manifest = Manifest::from_json(&manifest).map_err(ContentError::from)?;
            manifest.check_members(members.iter()).map_err(ContentError::from)?;
            let contents = Contents::read(&manifest, &mut members)?;
            Ok(Bundle { file: file.into(), sha256: sha256_hex(bytes), manifest, signer, contents })
        };
        read().map_err(|error| error.in_file(file))
    }

    /// Returns the bytes of the bundle file, without a signature.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Contents { head, ood, scan, .. } = &self.contents;
        let head = tensors::head_to_bytes(head, ood, scan.as_ref());
        let last_conv = self.contents.last_conv.as_ref().map(tensors::last_conv_to_bytes);
        let self_test = self.contents.self_test.as_ref().map(SelfTest::to_bytes);
        let optional = [
            (LAST_CONV, last_conv.as_deref()),
            (BACKBONE, self.contents.backbone.as_deref()),
            (SELF_TEST, self_test.as_deref()),
        ];
        let optional = optional.into_iter().filter_map(|(name, content)| Some((name, content?)));
        let members: Vec<(&str, &[u8])> = std::iter::once((HEAD, head.as_slice())).chain(optional).collect();
        assemble(&self.manifest, &members)
    }

    /// Writes the bundle file atomically, without a signature.
    ///
    /// # Errors
    /// If writing fails or the file is too large.
    pub fn write(&self, path: &Path) -> Result<(), BundleError> {
        archive::write_atomically(path, &self.to_bytes())
            .map_err(|source| BundleError::Archive { file: path.display().to_string(), source })
    }

    /// Returns the bundle in format 1, without its signature: images are unknown by the cosine alone. A bundle of format 1 is returned
    /// as it is. `file` is the ONNX file of the network, as for [`Bundle::onnx_backbone`].
    ///
    /// # Errors
    /// If the network cannot be loaded or run for the self-test.
    pub fn to_format_1(&self, file: Option<&Path>) -> Result<Self, BundleError> {
        let mut older = self.clone();
        if self.manifest.format == 1 {
            return Ok(older);
        }
        older.contents.ood = self.contents.ood.without_unknown_classes();
        older.manifest.unknown.rule = OodMeasure::CosineSubspace;
        (older.manifest.scan, older.contents.scan) = (None, None);
        older.manifest.unknown.threshold = older.contents.ood.threshold();
        older.manifest.set_format();
        if let Some(self_test) = older.take_self_test() {
            let (features, images) = self_test.into_inputs();
            let recorded = SelfTest::record(&mut older.classifier(file)?, features, images);
            let failed = |source| BundleError::SelfTest { file: self.file.clone(), source: Box::new(source) };
            older.set_self_test(recorded.map_err(failed)?);
        }
        Ok(older)
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the key of the valid signature, trusted or not; `None` if the bundle is not signed.
    pub fn signer(&self) -> Option<&PublicKey> {
        self.signer.as_ref()
    }

    /// Replaces the self-test.
    pub fn set_self_test(&mut self, self_test: SelfTest) {
        self.contents.self_test = Some(self_test);
    }

    /// Removes the self-test and returns it, which frees its memory after use.
    pub fn take_self_test(&mut self) -> Option<SelfTest> {
        self.contents.self_test.take()
    }

    /// Returns the contents besides the manifest.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// Returns the SHA-256 of the file that the bundle was read from, in lower-case hexadecimal; empty if it was not read.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Creates a classifier on the network that [`Bundle::onnx_backbone`] selects.
    ///
    /// # Errors
    /// As [`Bundle::onnx_backbone`], [`Bundle::compile_backbone`] and [`Bundle::classifier_on`].
    pub fn classifier(&self, file: Option<&Path>) -> Result<Classifier, BundleError> {
        self.classifier_on(&self.compile_backbone(&self.onnx_backbone(file)?)?, ViewOptions::default())
    }

    /// Creates a classifier on a backbone that [`Bundle::compile_backbone`] compiled.
    ///
    /// # Errors
    /// If the model or the backbone cannot scan and `view` demands it.
    pub fn classifier_on(&self, backbone: &CompiledBackbone, view: ViewOptions) -> Result<Classifier, BundleError> {
        let classifier = Classifier::new(backbone, self.classifier_params())?;
        let wanted = view.view.unwrap_or(self.view());
        match (wanted, &self.contents.scan) {
            (View::Whole, _) => Ok(classifier),
            (View::Scan, Some(scan)) => Ok(classifier.with_scanner(backbone, scan.clone(), view.scan_budget)?),
            (View::Scan, None) => Err(BundleError::CannotScan { file: self.file.clone() }),
        }
    }

    /// Returns the view that the model was trained for.
    pub fn view(&self) -> View {
        if self.contents.scan.is_some() { View::Scan } else { View::Whole }
    }

    /// Compiles the network with the bundle's last convolution, up to the features.
    ///
    /// # Errors
    /// If the network cannot be compiled, or its features are not as long as the head expects.
    pub fn compile_backbone(&self, network: &OnnxBackbone) -> Result<CompiledBackbone, BundleError> {
        let backbone = network.compile_features(self.contents.last_conv.as_ref())?;
        let (outputs, width) = (backbone.width(), self.contents.head.width());
        if outputs != width {
            let source = Box::new(ContentError::BackboneWidth { outputs, width });
            return Err(BundleError::Content { file: self.file.clone(), source });
        }
        Ok(backbone)
    }

    /// Loads the network that the model was trained on: the one in the bundle, or else the ONNX file `file`, or else the
    /// built-in one.
    ///
    /// # Errors
    /// If the network cannot be loaded, or is not the one that the model was trained on.
    pub fn onnx_backbone(&self, file: Option<&Path>) -> Result<OnnxBackbone, BundleError> {
        let (backbone, preprocess) = (&self.manifest.backbone, &self.manifest.preprocess);
        let feature = Some(backbone.feature.as_str());
        let describe = |name: &str, sha256: &str| format!("{name} (sha256 {sha256:.12}…)");
        let (name, onnx): (String, Cow<'static, [u8]>) = match (&self.contents.backbone, file) {
            (Some(onnx), _) => (backbone.name.clone(), onnx.clone().into()),
            (None, Some(path)) => (path.display().to_string(), backbone::read_file(path)?.into()),
            (None, None) => (backbone::MOBILENET_V2_NAME.to_owned(), backbone::MOBILENET_V2.into()),
        };
        let sha256 = sha256_hex(&onnx);
        if backbone.sha256 != sha256 {
            return Err(BundleError::OtherBackbone {
                file: self.file.clone(),
                expected: describe(&backbone.name, &backbone.sha256),
                actual: describe(&name, &sha256),
            });
        }
        Ok(OnnxBackbone::from_hashed(&name, sha256, onnx, preprocess, feature)?)
    }

    /// Returns the parameters of a classifier.
    pub fn classifier_params(&self) -> ClassifierParams {
        ClassifierParams {
            labels: self.manifest.classes.clone(),
            head: self.contents.head.clone(),
            ood: self.contents.ood.clone(),
            preprocess: self.manifest.preprocess.clone(),
        }
    }
}

impl Contents {
    /// Reads and validates the members that the manifest lists.
    fn read(manifest: &Manifest, members: &mut Members) -> Result<Self, ReadError> {
        let head = members.require(HEAD)?;
        let (last_conv, backbone) = (members.take(LAST_CONV), members.take(BACKBONE));
        let self_test = members.take(SELF_TEST);
        let in_member = |member| move |source| ContentError::Tensors { member, source };
        let bytes = head;
        let (head, ood) = tensors::head_from_bytes(manifest, &bytes).map_err(in_member(HEAD))?;
        let scan = tensors::scan_from_bytes(manifest, &bytes, head.classes()).map_err(in_member(HEAD))?;
        let last_conv = last_conv.map(|bytes| tensors::last_conv_from_bytes(&bytes)).transpose();
        let last_conv = last_conv.map_err(in_member(LAST_CONV))?;
        check_shapes(manifest, &head, last_conv.as_ref())?;
        check_backbone(manifest)?;
        let self_test = self_test.map(|bytes| SelfTest::from_bytes(&bytes, head.classes(), head.width())).transpose();
        let self_test = self_test.map_err(in_member(SELF_TEST))?;
        Ok(Contents { head, ood, scan, last_conv, backbone, self_test })
    }
}

impl ReadError {
    fn in_file(self, file: &str) -> BundleError {
        match self {
            ReadError::Archive(source) => BundleError::Archive { file: file.into(), source },
            ReadError::Content(source) => BundleError::Content { file: file.into(), source: Box::new(source) },
        }
    }
}

impl From<ArchiveError> for ReadError {
    fn from(error: ArchiveError) -> Self {
        ReadError::Archive(error)
    }
}

impl From<ContentError> for ReadError {
    fn from(error: ContentError) -> Self {
        ReadError::Content(error)
    }
}

/// Returns the bytes of a bundle file with these members, after setting the manifest's list of members.
///
/// # Panics
/// As [`archive::pack`].
pub fn assemble(manifest: &Manifest, members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut manifest = manifest.clone();
    manifest.set_members(members);
    let manifest = manifest.to_json();
    let mut members = [&[(manifest::NAME, manifest.as_slice())], members].concat();
    members.sort_by_key(|(name, _)| ORDER.iter().position(|known| known == name));
    archive::pack(members)
}

/// Signs a bundle file and returns the signed one; replaces the signature if there is one. `file` is its name in messages.
///
/// # Errors
/// As [`Bundle::from_bytes`].
pub fn sign(file: &str, bytes: &[u8], key: &PrivateKey) -> Result<Vec<u8>, BundleError> {
    Bundle::from_bytes(file, bytes)?;
    let archive_error = |source| BundleError::Archive { file: file.into(), source };
    let mut members = archive::unpack(bytes).map_err(archive_error)?;
    members.take(manifest::SIGNATURE);
    let manifest = members.require(manifest::NAME).map_err(archive_error)?;
    let signature = key.sign(&manifest).to_bytes();
    let signed = [(manifest::NAME, manifest.as_slice()), (manifest::SIGNATURE, signature.as_slice())];
    Ok(archive::pack(signed.into_iter().chain(members.iter())))
}

/// Checks that all members are known and in the order of [`ORDER`].
fn expect_order(members: &Members) -> Result<(), ArchiveError> {
    let mut order = ORDER.iter();
    let unexpected = members.iter().map(|(name, _)| name).find(|name| !order.any(|next| next == name));
    unexpected.map_or(Ok(()), |name| Err(ArchiveError::Unexpected(name.into())))
}

/// Removes the signature, verifies it, and returns the signer's key; `None` if there is no signature.
fn verify_signature(members: &mut Members) -> Result<Option<PublicKey>, ContentError> {
    let Some(signature) = members.take(manifest::SIGNATURE) else { return Ok(None) };
    let signature = DetachedSignature::from_bytes(&signature)?;
    Ok(Some(signature.verify(members.get(manifest::NAME).unwrap_or_default())?))
}

/// Checks that the features of the last convolution fit the head, and the head the class names.
fn check_shapes(manifest: &Manifest, head: &Head, last_conv: Option<&LastConvWeights>) -> Result<(), ContentError> {
    let (width, classes, names) = (head.width(), head.classes(), manifest.classes.names().len());
    if let Some(outputs) = last_conv.map(LastConvWeights::outputs).filter(|outputs| *outputs != width) {
        return Err(ContentError::LastConvWidth { outputs, width });
    }
    if classes != names {
        return Err(ContentError::Classes { classes, names });
    }
    Ok(())
}

/// Checks that the backbone in the bundle, if there is one, is the one that the model was trained on.
fn check_backbone(manifest: &Manifest) -> Result<(), ContentError> {
    let expected = &manifest.backbone.sha256;
    match manifest.members.get(BACKBONE) {
        Some(member) if member.sha256 != *expected => {
            Err(ContentError::OtherBackbone { actual: member.sha256.clone(), expected: expected.clone() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::{Labels, Preprocess, UnknownClasses};

    fn bundle() -> Bundle {
        let mut basis = vec![0.0; 8];
        basis[0] = 1.0;
        basis[5] = 1.0;
        let manifest = Manifest {
            format: 1,
            requires: Vec::new(),
            name: "test".into(),
            version: 3,
            created_at: "2026-01-02T03:04:05.000Z".into(),
            classes: Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap(),
            backbone: BackboneRef { name: "b".into(), sha256: "0".repeat(64), feature: "features".into(), width: 4 },
            preprocess: Preprocess::mobilenet_v2(),
            temperature: 1.5,
            unknown: OodParams { rule: OodMeasure::CosineSubspace, threshold: 0.5, rejected_share: 0.05 },
            scan: None,
            dataset: DatasetRef { sha256: "1".repeat(64), train_images: 10, val_images: 5 },
            metrics: Metrics { accuracy: 0.9, loss: 0.3, ece: 0.02 },
            seed: 7,
            program: "bloomcast test".into(),
            members: Default::default(),
        };
        let head = Head::new(4, vec![0.5; 8], vec![0.1, 0.2], 1.5).unwrap();
        let ood = OodDetector::new(4, basis, 0.5).unwrap();
        Bundle::new(manifest, Contents { head, ood, scan: None, last_conv: None, backbone: None, self_test: None })
    }

    /// Returns a bundle with all optional members.
    fn full() -> Bundle {
        let mut full = bundle();
        full.contents.last_conv = Some(LastConvWeights::new(2, vec![0.25; 8], vec![0.5; 4]).unwrap());
        full.contents.backbone = Some(b"a network".to_vec());
        full.manifest.backbone.sha256 = sha256_hex(b"a network");
        let output = selftest::SelfTestOutput { probabilities: vec![0.5; 2], similarity: 1.0 };
        full.contents.self_test =
            Some(SelfTest::new(vec![vec![1.0; 4]], vec![vec![7; 9]], vec![output.clone(), output]));
        full
    }

    /// Returns a bundle of format 2.
    fn with_unknown_classes() -> Bundle {
        let mut newer = bundle();
        let head = Head::new(4, vec![0.25; 4], vec![0.5], 1.0).unwrap();
        let unknown = UnknownClasses { head, log_odds_weight: 0.1, cosine_threshold: 0.75 };
        newer.contents.ood = newer.contents.ood.with_unknown_classes(unknown, -0.5).unwrap();
        newer.manifest.unknown = OodParams {
            rule: OodMeasure::CosineAndClasses { log_odds_weight: 0.1, cosine_threshold: 0.75 },
            threshold: -0.5,
            rejected_share: 0.05,
        };
        newer.manifest.set_format();
        newer
    }

    /// Returns a key and a keyring that trusts it.
    fn key() -> (PrivateKey, Keyring) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trainer.key");
        PrivateKey::generate(&path).unwrap();
        (PrivateKey::read(&path).unwrap(), Keyring::read(dir.path()).unwrap())
    }

    #[test]
    fn reads_what_it_writes_and_writes_the_same_bytes() {
        for bundle in [bundle(), full()] {
            let bytes = bundle.to_bytes();
            let read = Bundle::from_bytes("test", &bytes).unwrap();
            assert_eq!(read.contents, bundle.contents);
            assert_eq!(read.manifest.classes, bundle.manifest.classes);
            assert_eq!(read.to_bytes(), bytes);
            assert_eq!(read.sha256().len(), 64);
        }
    }

    #[test]
    fn rejects_every_flipped_bit_and_every_truncation_of_a_signed_bundle() {
        let (key, keyring) = key();
        let unsigned = full().to_bytes();
        let bytes = sign("test", &unsigned, &key).unwrap();
        let bundle = Bundle::from_bytes("test", &bytes).unwrap();
        assert_eq!(keyring.verify_signer(bundle.signer()), Ok("trainer"));
        assert_eq!(bundle.contents, full().contents);
        for offset in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[offset] ^= 1 << bit;
                assert!(Bundle::from_bytes("test", &changed).is_err(), "byte {offset}, bit {bit}");
            }
        }
        for len in 0..bytes.len() {
            assert!(Bundle::from_bytes("test", &bytes[..len]).is_err(), "truncated to {len} bytes");
        }
    }

    #[test]
    fn a_signature_covers_one_manifest_and_can_be_replaced() {
        let ((ours, keyring), (theirs, _)) = (key(), key());
        let unsigned = bundle().to_bytes();
        assert!(keyring.verify_signer(Bundle::from_bytes("test", &unsigned).unwrap().signer()).is_err());
        let by_unknown_key = sign("test", &unsigned, &theirs).unwrap();
        assert!(keyring.verify_signer(Bundle::from_bytes("test", &by_unknown_key).unwrap().signer()).is_err());
        let resigned = sign("test", &by_unknown_key, &ours).unwrap();
        assert_eq!(resigned, sign("test", &unsigned, &ours).unwrap());
        // The signature of one model on another.
        let mut other = bundle();
        other.manifest.version = 4;
        let mut members = archive::unpack(&resigned).unwrap();
        let signature = members.require(manifest::SIGNATURE).unwrap();
        let mut other_members = archive::unpack(&other.to_bytes()).unwrap();
        let (manifest, head) = (other_members.require(manifest::NAME).unwrap(), other_members.require(HEAD).unwrap());
        let mixed = [(manifest::NAME, &manifest), (manifest::SIGNATURE, &signature), (HEAD, &head)];
        let mixed = archive::pack(mixed.map(|(name, content)| (name, content.as_slice())));
        let error = Bundle::from_bytes("test", &mixed).unwrap_err().to_string();
        assert!(error.contains("manifest.json.sig: does not match"), "{error}");
    }

    #[test]
    fn rejects_invalid_values_in_the_manifest() {
        let error = |change: fn(&mut Manifest)| {
            let mut bundle = bundle();
            change(&mut bundle.manifest);
            Bundle::from_bytes("test", &bundle.to_bytes()).unwrap_err().to_string()
        };
        assert!(error(|m| m.preprocess.size = 0).contains("preprocess.size 0"));
        assert!(error(|m| m.preprocess.size = 4_000_000_000).contains("preprocess.size 4000000000"));
        assert!(error(|m| m.preprocess.std[1] = 0.0).contains("scale and std above 0"));
        assert!(error(|m| m.temperature = 0.0).contains("temperature 0"));
        assert!(error(|m| m.unknown.threshold = 2.0).contains("threshold 2"));
        assert!(error(|m| m.format = 3).contains("format 3, this program reads 1 to 2"));
        assert!(error(|m| m.format = 0).contains("format 0, this program reads 1 to 2"));
        assert!(error(|m| m.requires.push("views".into())).contains("requires \"views\", which this program does not"));
        let unknown = |m: &mut Manifest| {
            m.unknown.rule = OodMeasure::CosineAndClasses { log_odds_weight: 0.1, cosine_threshold: 0.5 };
        };
        assert!(error(unknown).contains("requires \"unknown-classes\""), "a feature that is not declared");
        assert!(error(|m| m.requires.push("unknown-classes".into())).contains("requires"), "format 1 has no features");
        assert!(error(|m| m.name = "\u{1b}[31m".into()).contains("name"));
        let mut other_size = bundle();
        other_size.manifest.preprocess.size = 160;
        other_size.manifest.backbone.sha256 = sha256_hex(backbone::MOBILENET_V2);
        let error = other_size.classifier(None).err().unwrap().to_string();
        assert!(error.contains("input size is 224 pixels, expected 160"), "{error}");
        let mut narrow = other_size;
        narrow.manifest.preprocess.size = 224;
        let error = narrow.classifier(None).err().unwrap().to_string();
        assert!(error.contains("the backbone has 1280 features, head.safetensors expects 4"), "{error}");
        let mut wide = full();
        wide.contents.last_conv = Some(LastConvWeights::new(1, vec![0.0; 5], vec![0.0; 5]).unwrap());
        let error = Bundle::from_bytes("test", &wide.to_bytes()).unwrap_err().to_string();
        assert!(error.contains("tail.safetensors has 5 outputs, head.safetensors expects 4 features"), "{error}");
    }

    #[test]
    fn unknown_fields_are_ignored_from_format_2_on() {
        let with_field = |format: u32| {
            let mut json: serde_json::Value = serde_json::from_slice(&bundle().manifest.to_json()).unwrap();
            json["format"] = format.into();
            json["metrics"]["later"] = 1.into();
            Manifest::from_json(&serde_json::to_vec(&json).unwrap())
        };
        assert_eq!(with_field(1).unwrap_err().to_string(), "unknown field `metrics.later`");
        assert_eq!(with_field(2).unwrap().metrics, bundle().manifest.metrics);
    }

    #[test]
    fn a_model_with_unknown_classes_has_format_2_and_can_be_written_without_them() {
        let newer = with_unknown_classes();
        let read = Bundle::from_bytes("test", &newer.to_bytes()).unwrap();
        assert_eq!((read.manifest.format, &read.contents), (2, &newer.contents));
        let older = Bundle::from_bytes("test", &read.to_format_1(None).unwrap().to_bytes()).unwrap();
        assert_eq!((older.manifest.format, older.manifest.requires.len()), (1, 0));
        assert_eq!(older.manifest.unknown.rule, OodMeasure::CosineSubspace);
        assert_eq!((older.contents.ood.threshold(), older.contents.ood.unknown_classes()), (0.75, None));
    }

    #[test]
    fn a_model_that_scans_keeps_its_heads_and_loses_them_in_format_1() {
        let mut scanning = with_unknown_classes();
        let head = |value: f32, rows: usize, temperature: f32| {
            Head::new(4, vec![value; 4 * rows], vec![value; rows], temperature).unwrap()
        };
        scanning.contents.scan =
            Some(ScanParams { head: head(0.25, 2, 0.75), unknown: head(0.125, 1, 1.0), offsets: [0.5, -0.25] });
        scanning.manifest.scan = Some(ScanRef { temperature: 0.75, offsets: [0.5, -0.25] });
        let read = Bundle::from_bytes("test", &scanning.to_bytes()).unwrap();
        assert_eq!((&read.contents, read.view()), (&scanning.contents, View::Scan));
        let older = read.to_format_1(None).unwrap();
        let older = Bundle::from_bytes("test", &older.to_bytes()).unwrap();
        assert_eq!((older.view(), older.manifest.format), (View::Whole, 1));
        // A program that does not know the field reads the model and looks at whole frames.
        assert_eq!(read.manifest.requires, ["unknown-classes"]);

        let error = |change: fn(&mut Bundle)| {
            let mut bundle = scanning.clone();
            change(&mut bundle);
            Bundle::from_bytes("test", &bundle.to_bytes()).unwrap_err().to_string()
        };
        assert!(error(|b| b.manifest.scan.as_mut().unwrap().offsets[1] = 101.0).contains("scan.offsets: 101"));
        assert!(error(|b| b.manifest.scan.as_mut().unwrap().temperature = 0.0).contains("temperature 0"));
        assert!(error(|b| b.contents.scan = None).contains("scan_weight"), "a missing tensor is named");
        let narrow = |b: &mut Bundle| {
            let head = Head::new(4, vec![0.0; 4], vec![0.0], 0.75).unwrap();
            b.contents.scan.as_mut().unwrap().head = head;
        };
        assert!(error(narrow).contains("`scan_weight` is [1, 4] F32, expected 2 × 4"));
    }

    #[test]
    fn rejects_unknown_members_and_another_order() {
        let mut members = archive::unpack(&bundle().to_bytes()).unwrap();
        let (manifest, head) = (members.require(manifest::NAME).unwrap(), members.require(HEAD).unwrap());
        let with_unknown = archive::pack([(manifest::NAME, &manifest[..]), (HEAD, &head), ("extra", b"x")]);
        let error = Bundle::from_bytes("test", &with_unknown).unwrap_err().to_string();
        assert!(error.contains("extra: unknown member, or in the wrong order"), "{error}");
        let reversed = archive::pack([(HEAD, &head[..]), (manifest::NAME, &manifest)]);
        let error = Bundle::from_bytes("test", &reversed).unwrap_err().to_string();
        assert!(error.contains("manifest.json: unknown member, or in the wrong order"), "{error}");
    }

    #[test]
    fn rejects_a_manifest_that_is_too_large_before_parsing_it() {
        let large = vec![b' '; manifest::BYTES_MAX + 1];
        let error = Bundle::from_bytes("test", &archive::pack([(manifest::NAME, &large[..])])).unwrap_err().to_string();
        assert_eq!(error, "model test: manifest.json: 262145 bytes, expected at most 262144");
        let mut many = bundle();
        many.manifest.classes = Labels::new((0..1000).map(|i| format!("{i:064}")).collect()).unwrap();
        assert!(
            many.manifest.to_json().len() < manifest::BYTES_MAX,
            "a manifest with the most and longest class names"
        );
    }

    #[test]
    fn writes_files_atomically_and_names_the_file_in_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.bloom");
        bundle().write(&path).unwrap();
        assert_eq!(Bundle::read(&path).unwrap().manifest.version, 3);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file remains");
        std::fs::write(&path, b"not a bundle").unwrap();
        let error = Bundle::read(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("model {}: ", path.display())), "{error}");
        let error = bundle().write(&dir.path().join("missing/m.bloom")).unwrap_err().to_string();
        assert!(error.contains("missing/m.bloom"), "{error}");
    }

    #[test]
    fn the_error_for_another_backbone_names_both() {
        let error = bundle().classifier(None).err().unwrap().to_string();
        assert!(error.contains("trained on the backbone b") && error.contains("mobilenet_v2_1.0_224"), "{error}");
    }
}
