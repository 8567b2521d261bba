//! A trained model in one file, `.bloom`: what it is, what it was made for, and its numbers.
//!
//! A tar of `manifest.json`, `manifest.json.sig`, `head.safetensors`, and where they belong to it
//! `tail.safetensors`, a fine-tuned last convolution, `backbone.onnx`, the network it was made for, and
//! `selftest.safetensors`, what it must answer wherever it runs. The manifest names every other member with
//! its size and SHA-256, and the signature vouches for the manifest: no byte is without somebody who vouches
//! for it.

pub mod archive;
pub mod manifest;
pub mod selftest;
pub mod signature;
pub mod tensors;

use std::borrow::Cow;
use std::path::Path;

pub use archive::ArchiveError;
pub use manifest::{BackboneRef, DatasetRef, Identity, Manifest, Metrics, Unknown, UnknownRule};
pub use selftest::SelfTest;
pub use signature::{Keyring, PrivateKey, PublicKey};

use signature::Signed;

use crate::system::hash::sha256_hex;
use crate::vision::backbone;
use crate::vision::classifier::ClassifierParams;
use crate::vision::{Backbone, BackboneError, Classifier, Head, LastConvWeights, Network, OodDetector};

/// The model inside this program: five flowers.
pub static BUILT_IN: &[u8] = include_bytes!("../../models/flowers.bloom");

const HEAD: &str = "head.safetensors";
pub const TAIL: &str = "tail.safetensors";
pub const BACKBONE: &str = "backbone.onnx";
const SELF_TEST: &str = "selftest.safetensors";
/// The members, in the only order in which they may stand: another would be another file with the same signature.
const ORDER: [&str; 6] = [manifest::NAME, manifest::SIGNATURE, HEAD, TAIL, BACKBONE, SELF_TEST];

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("model {file}: {source}")]
    Archive { file: String, source: ArchiveError },
    #[error("model {file}: {reason}")]
    Content { file: String, reason: String },
    #[error("model {file} was made for the backbone {wanted}, this one is {given}")]
    OtherBackbone { file: String, wanted: String, given: String },
    #[error(transparent)]
    Backbone(#[from] BackboneError),
}

/// A model that was read and checked, or was just trained.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Where it came from, for messages.
    file: String,
    sha256: String,
    manifest: Manifest,
    /// The key that vouches for it, trusted or not.
    signer: Option<PublicKey>,
    parts: Parts,
}

/// What a bundle holds beside its manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Parts {
    pub head: Head,
    pub ood: OodDetector,
    /// A fine-tuned last convolution; the backbone's own where there is none.
    pub last_conv: Option<LastConvWeights>,
    /// The ONNX file of a backbone that devices do not have.
    pub backbone: Option<Vec<u8>>,
    pub self_test: Option<SelfTest>,
}

impl Bundle {
    /// Puts a trained model together; `manifest.members` is filled in when it is written.
    pub fn new(manifest: Manifest, parts: Parts) -> Self {
        Bundle { file: "just trained".into(), sha256: String::new(), manifest, signer: None, parts }
    }

    /// The model inside this program.
    pub fn built_in() -> Result<Self, BundleError> {
        Self::from_bytes("built-in", BUILT_IN)
    }

    pub fn read(path: &Path) -> Result<Self, BundleError> {
        let file = path.display().to_string();
        let bytes = archive::read_file(path).map_err(|source| BundleError::Archive { file: file.clone(), source })?;
        Self::from_bytes(&file, &bytes)
    }

    /// in: a whole `.bloom` file; `file` is its name in messages. A signature that is there must fit, whoever made it.
    pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<Self, BundleError> {
        let archive = |source| BundleError::Archive { file: file.into(), source };
        let content = |reason: String| BundleError::Content { file: file.into(), reason };
        let mut members = archive::unpack(bytes).map_err(archive)?;
        expect_order(&members).map_err(archive)?;
        let signer = signer(&members).map_err(|e| content(format!("{}: {e}", manifest::SIGNATURE)))?;
        members.take(manifest::SIGNATURE);
        let manifest = members.require_small(manifest::NAME, manifest::BYTES_MAX).map_err(archive)?;
        let manifest = Manifest::from_json(&manifest).map_err(|e| content(format!("{}: {e}", manifest::NAME)))?;
        manifest.check_members(members.iter()).map_err(content)?;
        let head = members.require(HEAD).map_err(archive)?;
        let (tail, backbone) = (members.take(TAIL), members.take(BACKBONE));
        let self_test = members.take(SELF_TEST);
        let (head, ood) = tensors::head_from_bytes(&manifest, &head).map_err(|e| content(format!("{HEAD}: {e}")))?;
        let tail = tail.map(|tail| tensors::last_conv_from_bytes(&tail)).transpose();
        let tail = tail.map_err(|e| content(format!("{TAIL}: {e}")))?;
        if let Some(tail) = tail.as_ref().filter(|tail| tail.outputs() != head.width()) {
            return Err(content(format!("{TAIL} gives {} features, {HEAD} takes {}", tail.outputs(), head.width())));
        }
        if head.classes() != manifest.classes.names().len() {
            let (rows, names) = (head.classes(), manifest.classes.names().len());
            return Err(content(format!("{HEAD} has {rows} classes, {} names {names}", manifest::NAME)));
        }
        if let Some(carried) =
            manifest.members.get(BACKBONE).filter(|carried| carried.sha256 != manifest.backbone.sha256)
        {
            let (carried, wanted) = (&carried.sha256, &manifest.backbone.sha256);
            return Err(content(format!(
                "{BACKBONE} is not the network it was made for: {carried:.12}…, not {wanted:.12}…"
            )));
        }
        let self_test = self_test.map(|test| SelfTest::from_bytes(&test, head.classes(), head.width())).transpose();
        let self_test = self_test.map_err(|e| content(format!("{SELF_TEST}: {e}")))?;
        let parts = Parts { head, ood, last_conv: tail, backbone, self_test };
        Ok(Bundle { file: file.into(), sha256: sha256_hex(bytes), manifest, signer, parts })
    }

    /// The whole file's bytes; unsigned, since a signature is for what was signed.
    pub fn to_bytes(&self) -> Vec<u8> {
        let head = tensors::head_to_bytes(&self.parts.head, &self.parts.ood);
        let tail = self.parts.last_conv.as_ref().map(tensors::last_conv_to_bytes);
        let self_test = self.parts.self_test.as_ref().map(SelfTest::to_bytes);
        let optional =
            [(TAIL, tail.as_deref()), (BACKBONE, self.parts.backbone.as_deref()), (SELF_TEST, self_test.as_deref())];
        let optional = optional.into_iter().filter_map(|(name, content)| Some((name, content?)));
        let members: Vec<(&str, &[u8])> = std::iter::once((HEAD, head.as_slice())).chain(optional).collect();
        assemble(&self.manifest, &members)
    }

    /// Writes the file whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), BundleError> {
        archive::write_file(path, &self.to_bytes())
            .map_err(|source| BundleError::Archive { file: path.display().to_string(), source })
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The key that signed it, trusted or not.
    pub fn signer(&self) -> Option<&PublicKey> {
        self.signer.as_ref()
    }

    /// Gives it what it must answer wherever it runs.
    pub fn set_self_test(&mut self, self_test: SelfTest) {
        self.parts.self_test = Some(self_test);
    }

    /// Takes it out, since it is asked once.
    pub fn take_self_test(&mut self) -> Option<SelfTest> {
        self.parts.self_test.take()
    }

    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// SHA-256 of the file it was read from, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The model at work: on the network it carries, else on that in `file`, else on the one inside the program;
    /// refused where it was made for another.
    pub fn classifier(&self, file: Option<&Path>) -> Result<Classifier, BundleError> {
        Ok(Classifier::new(&self.backbone(&self.network(file)?)?, self.classifier_params())?)
    }

    /// What gives the features that the head looks at.
    pub fn backbone(&self, network: &Network) -> Result<Backbone, BundleError> {
        let backbone = network.features(self.parts.last_conv.as_ref())?;
        if backbone.width() != self.parts.head.width() {
            let (wide, wanted) = (backbone.width(), self.parts.head.width());
            return Err(self.content(format!("{HEAD} takes {wanted} features, the backbone gives {wide}")));
        }
        Ok(backbone)
    }

    /// The network it was made for: the one it carries, or that in `file`, or the one inside the program.
    pub fn network(&self, file: Option<&Path>) -> Result<Network, BundleError> {
        let (wanted, preprocess) = (&self.manifest.backbone, &self.manifest.preprocess);
        let feature = Some(wanted.feature.as_str());
        let given = |name: &str, sha256: &str| format!("{name} (sha256 {sha256:.12}…)");
        let (name, onnx): (String, Cow<'static, [u8]>) = match (&self.parts.backbone, file) {
            (Some(onnx), _) => (wanted.name.clone(), onnx.clone().into()),
            (None, Some(path)) => (path.display().to_string(), backbone::read_file(path)?.into()),
            (None, None) => (backbone::MOBILENET_V2_NAME.to_owned(), backbone::MOBILENET_V2.into()),
        };
        let sha256 = sha256_hex(&onnx);
        if wanted.sha256 != sha256 {
            return Err(BundleError::OtherBackbone {
                file: self.file.clone(),
                wanted: given(&wanted.name, &wanted.sha256),
                given: given(&name, &sha256),
            });
        }
        Ok(Network::from_hashed(&name, sha256, onnx, preprocess, feature)?)
    }

    fn content(&self, reason: String) -> BundleError {
        BundleError::Content { file: self.file.clone(), reason }
    }

    /// What the classifier needs of it.
    pub fn classifier_params(&self) -> ClassifierParams {
        ClassifierParams {
            labels: self.manifest.classes.clone(),
            head: self.parts.head.clone(),
            ood: self.parts.ood.clone(),
            preprocess: self.manifest.preprocess.clone(),
        }
    }
}

/// A whole file of these members, which the manifest is made to name.
pub fn assemble(manifest: &Manifest, members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut manifest = manifest.clone();
    manifest.set_members(members);
    let manifest = manifest.to_json();
    let mut members = [&[(manifest::NAME, manifest.as_slice())], members].concat();
    members.sort_by_key(|(name, _)| ORDER.iter().position(|known| known == name));
    archive::pack(members)
}

fn expect_order(members: &archive::Members) -> Result<(), ArchiveError> {
    let mut order = ORDER.iter();
    let stray = members.iter().map(|(name, _)| name).find(|name| !order.any(|next| next == name));
    stray.map_or(Ok(()), |name| Err(ArchiveError::Unexpected(name.into())))
}

/// Signs a `.bloom` file anew, whoever signed it before. in and out: a whole file; `file` is its name in messages.
pub fn sign(file: &str, bytes: &[u8], key: &PrivateKey) -> Result<Vec<u8>, BundleError> {
    Bundle::from_bytes(file, bytes)?;
    let archive = |source| BundleError::Archive { file: file.into(), source };
    let mut members = archive::unpack(bytes).map_err(archive)?;
    members.take(manifest::SIGNATURE);
    let manifest = members.require(manifest::NAME).map_err(archive)?;
    let signature = key.sign(&manifest).to_bytes();
    let vouched = [(manifest::NAME, manifest.as_slice()), (manifest::SIGNATURE, signature.as_slice())];
    Ok(archive::pack(vouched.into_iter().chain(members.iter())))
}

/// The key that vouches for the manifest; none where nobody does, an error where the signature does not fit.
fn signer(members: &archive::Members) -> Result<Option<PublicKey>, signature::SignatureError> {
    let find = |name| members.iter().find(|(there, _)| *there == name).map(|(_, content)| content);
    let Some(signature) = find(manifest::SIGNATURE) else { return Ok(None) };
    let signed = Signed::from_bytes(signature)?;
    signed.check(find(manifest::NAME).unwrap_or_default()).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::{Labels, Preprocess};

    fn bundle() -> Bundle {
        let mut basis = vec![0.0; 8];
        basis[0] = 1.0;
        basis[5] = 1.0;
        let manifest = Manifest {
            format: manifest::FORMAT,
            name: "test".into(),
            version: 3,
            created_at: "2026-01-02T03:04:05.000Z".into(),
            classes: Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap(),
            backbone: BackboneRef { name: "b".into(), sha256: "0".repeat(64), feature: "features".into(), width: 4 },
            preprocess: Preprocess::mobilenet_v2(),
            temperature: 1.5,
            unknown: Unknown { rule: UnknownRule::CosineSubspace, threshold: 0.5, rejected_share: 0.05 },
            dataset: DatasetRef { sha256: "1".repeat(64), train_images: 10, val_images: 5 },
            metrics: Metrics { accuracy: 0.9, loss: 0.3, ece: 0.02 },
            seed: 7,
            program: "bloomcast test".into(),
            members: Default::default(),
        };
        let head = Head::new(4, vec![0.5; 8], vec![0.1, 0.2], 1.5).unwrap();
        let subspace = OodDetector::new(4, basis, 0.5).unwrap();
        Bundle::new(manifest, Parts { head, ood: subspace, last_conv: None, backbone: None, self_test: None })
    }

    /// With everything that a bundle may hold.
    fn full() -> Bundle {
        let mut full = bundle();
        full.parts.last_conv = Some(LastConvWeights::new(2, vec![0.25; 8], vec![0.5; 4]).unwrap());
        full.parts.backbone = Some(b"a network".to_vec());
        full.manifest.backbone.sha256 = sha256_hex(b"a network");
        let answer = selftest::Answer { probabilities: vec![0.5; 2], similarity: 1.0 };
        full.parts.self_test = Some(SelfTest::new(vec![vec![1.0; 4]], vec![vec![7; 9]], vec![answer.clone(), answer]));
        full
    }

    /// A key, and a ring that trusts it.
    fn key() -> (PrivateKey, Keyring) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trainer.key");
        PrivateKey::generate(&path).unwrap();
        (PrivateKey::read(&path).unwrap(), Keyring::read(dir.path()).unwrap())
    }

    #[test]
    fn what_is_written_is_read_and_written_the_same() {
        for whole in [bundle(), full()] {
            let bytes = whole.to_bytes();
            let read = Bundle::from_bytes("test", &bytes).unwrap();
            assert_eq!(read.parts, whole.parts);
            assert_eq!(read.manifest.classes, whole.manifest.classes);
            assert_eq!(read.to_bytes(), bytes);
            assert_eq!(read.sha256().len(), 64);
        }
    }

    #[test]
    fn every_changed_bit_and_every_cut_of_a_signed_bundle_is_refused() {
        let (key, ring) = key();
        let unsigned = full().to_bytes();
        let bytes = sign("test", &unsigned, &key).unwrap();
        let whole = Bundle::from_bytes("test", &bytes).unwrap();
        assert_eq!(ring.trust(whole.signer()), Ok("trainer"));
        assert_eq!(whole.parts, full().parts);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert!(Bundle::from_bytes("test", &changed).is_err(), "byte {at}, bit {bit}");
            }
        }
        for cut in 0..bytes.len() {
            assert!(Bundle::from_bytes("test", &bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_signature_is_for_one_manifest_and_can_be_replaced() {
        let ((ours, ring), (theirs, _)) = (key(), key());
        let unsigned = bundle().to_bytes();
        assert!(ring.trust(Bundle::from_bytes("test", &unsigned).unwrap().signer()).is_err());
        let stranger = sign("test", &unsigned, &theirs).unwrap();
        assert!(ring.trust(Bundle::from_bytes("test", &stranger).unwrap().signer()).is_err());
        let again = sign("test", &stranger, &ours).unwrap();
        assert_eq!(again, sign("test", &unsigned, &ours).unwrap());
        // The signature of one model under another.
        let mut other = bundle();
        other.manifest.version = 4;
        let mut members = archive::unpack(&again).unwrap();
        let signature = members.require(manifest::SIGNATURE).unwrap();
        let mut others = archive::unpack(&other.to_bytes()).unwrap();
        let (manifest, head) = (others.require(manifest::NAME).unwrap(), others.require(HEAD).unwrap());
        let mixed = [(manifest::NAME, &manifest), (manifest::SIGNATURE, &signature), (HEAD, &head)];
        let mixed = archive::pack(mixed.map(|(name, content)| (name, content.as_slice())));
        let error = Bundle::from_bytes("test", &mixed).unwrap_err().to_string();
        assert!(error.contains("manifest.json.sig: does not fit"), "{error}");
    }

    #[test]
    fn a_manifest_that_would_blind_or_break_the_daemon_is_refused() {
        let refused = |change: fn(&mut Manifest)| {
            let mut bundle = bundle();
            change(&mut bundle.manifest);
            Bundle::from_bytes("test", &bundle.to_bytes()).unwrap_err().to_string()
        };
        assert!(refused(|m| m.preprocess.size = 0).contains("preprocess.size 0"));
        assert!(refused(|m| m.preprocess.size = 4_000_000_000).contains("preprocess.size 4000000000"));
        assert!(refused(|m| m.preprocess.std[1] = 0.0).contains("scale and std above 0"));
        assert!(refused(|m| m.temperature = 0.0).contains("temperature 0"));
        assert!(refused(|m| m.unknown.threshold = 2.0).contains("threshold 2"));
        assert!(refused(|m| m.format = 2).contains("format 2, this program reads 1"));
        assert!(refused(|m| m.name = "\u{1b}[31m".into()).contains("name"));
        let mut other_size = bundle();
        other_size.manifest.preprocess.size = 160;
        other_size.manifest.backbone.sha256 = sha256_hex(backbone::MOBILENET_V2);
        let error = other_size.classifier(None).err().unwrap().to_string();
        assert!(error.contains("looks at 224 pixels, not 160"), "{error}");
        let mut narrow = other_size;
        narrow.manifest.preprocess.size = 224;
        let error = narrow.classifier(None).err().unwrap().to_string();
        assert!(error.contains("takes 4 features, the backbone gives 1280"), "{error}");
        let mut wide = full();
        wide.parts.last_conv = Some(LastConvWeights::new(1, vec![0.0; 5], vec![0.0; 5]).unwrap());
        let error = Bundle::from_bytes("test", &wide.to_bytes()).unwrap_err().to_string();
        assert!(error.contains("tail.safetensors gives 5 features, head.safetensors takes 4"), "{error}");
    }

    #[test]
    fn what_the_manifest_does_not_name_is_refused() {
        let mut members = archive::unpack(&bundle().to_bytes()).unwrap();
        let (manifest, head) = (members.require(manifest::NAME).unwrap(), members.require(HEAD).unwrap());
        let stuffed = archive::pack([(manifest::NAME, &manifest[..]), (HEAD, &head), ("extra", b"x")]);
        let error = Bundle::from_bytes("test", &stuffed).unwrap_err().to_string();
        assert!(error.contains("extra: no member of a bundle, or out of its place"), "{error}");
        let turned = archive::pack([(HEAD, &head[..]), (manifest::NAME, &manifest)]);
        let error = Bundle::from_bytes("test", &turned).unwrap_err().to_string();
        assert!(error.contains("manifest.json: no member of a bundle, or out of its place"), "{error}");
    }

    #[test]
    fn a_manifest_that_is_too_large_is_never_parsed() {
        let huge = vec![b' '; manifest::BYTES_MAX + 1];
        let error = Bundle::from_bytes("test", &archive::pack([(manifest::NAME, &huge[..])])).unwrap_err().to_string();
        assert_eq!(error, "model test: manifest.json: 262145 bytes, expected at most 262144");
        let mut many = bundle();
        many.manifest.classes = Labels::new((0..1000).map(|i| format!("{i:064}")).collect()).unwrap();
        assert!(many.manifest.to_json().len() < manifest::BYTES_MAX, "a manifest with as many classes as there may be");
    }

    #[test]
    fn a_file_is_written_whole_and_a_bad_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.bloom");
        bundle().write(&path).unwrap();
        assert_eq!(Bundle::read(&path).unwrap().manifest.version, 3);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        std::fs::write(&path, b"not a bundle").unwrap();
        let error = Bundle::read(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("model {}: ", path.display())), "{error}");
        let error = bundle().write(&dir.path().join("none/m.bloom")).unwrap_err().to_string();
        assert!(error.contains("none/m.bloom"), "{error}");
    }

    #[test]
    fn a_model_for_another_backbone_is_refused_by_name() {
        let error = bundle().classifier(None).err().unwrap().to_string();
        assert!(error.contains("made for the backbone b") && error.contains("mobilenet_v2_1.0_224"), "{error}");
    }
}
