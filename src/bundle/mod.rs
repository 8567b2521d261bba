//! A trained model in one file, `.bloom`: what it is, what it was made for, and its numbers.
//!
//! A tar of `manifest.json` and `head.safetensors`. The manifest names every other member with its
//! size and SHA-256.

pub mod archive;
pub mod manifest;

use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};

pub use archive::ArchiveError;
pub use manifest::{BackboneRef, DatasetRef, Manifest, Metrics, Unknown, UnknownRule};

use crate::vision::backbone::{FEATURES, sha256_hex};
use crate::vision::classifier::Skill;
use crate::vision::head::HeadError;
use crate::vision::subspace::SubspaceError;
use crate::vision::{Backbone, BackboneError, Classifier, Head, Subspace};

/// The model inside this program: five flowers.
pub const BUILT_IN: &[u8] = include_bytes!("../../models/flowers.bloom");

const HEAD: &str = "head.safetensors";

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
    head: Head,
    subspace: Subspace,
}

impl Bundle {
    /// Puts a trained model together; `manifest.members` is filled in when it is written.
    pub fn new(manifest: Manifest, head: Head, subspace: Subspace) -> Self {
        Bundle { file: "just trained".into(), sha256: String::new(), manifest, head, subspace }
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

    /// in: a whole `.bloom` file; `file` is its name in messages.
    pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<Self, BundleError> {
        let archive = |source| BundleError::Archive { file: file.into(), source };
        let content = |reason: String| BundleError::Content { file: file.into(), reason };
        let mut members = archive::unpack(bytes).map_err(archive)?;
        let manifest = members.take(manifest::NAME).map_err(archive)?;
        let manifest = Manifest::from_json(&manifest).map_err(|e| content(format!("{}: {e}", manifest::NAME)))?;
        let numbers = members.take(HEAD).map_err(archive)?;
        members.expect_none().map_err(archive)?;
        manifest.check_members(&[(HEAD, &numbers)]).map_err(content)?;
        let (head, subspace) = numbers_from(&manifest, &numbers).map_err(|e| content(format!("{HEAD}: {e}")))?;
        if head.classes() != manifest.classes.names().len() {
            let (rows, names) = (head.classes(), manifest.classes.names().len());
            return Err(content(format!("{HEAD} has {rows} classes, {} names {names}", manifest::NAME)));
        }
        Ok(Bundle { file: file.into(), sha256: sha256_hex(bytes), manifest, head, subspace })
    }

    /// The whole file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let numbers = numbers_to_bytes(&self.head, &self.subspace);
        let mut manifest = self.manifest.clone();
        manifest.set_members(&[(HEAD, &numbers)]);
        archive::pack(&[(manifest::NAME, &manifest.to_json()), (HEAD, &numbers)])
    }

    /// Writes the file whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), BundleError> {
        archive::write_file(path, &self.to_bytes())
            .map_err(|source| BundleError::Archive { file: path.display().to_string(), source })
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of the file it was read from, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The model at work on `backbone`; refused where it was made for another.
    pub fn classifier(&self, backbone: &Backbone) -> Result<Classifier, BundleError> {
        self.expect(backbone)?;
        Ok(Classifier::new(backbone, self.skill())?)
    }

    /// Refuses a backbone that the model was not made for.
    pub fn expect(&self, backbone: &Backbone) -> Result<(), BundleError> {
        let wanted = &self.manifest.backbone;
        let preprocess = &self.manifest.preprocess;
        if preprocess.size as usize != backbone.input_size() || wanted.feature != FEATURES {
            return Err(BundleError::Content {
                file: self.file.clone(),
                reason: format!(
                    "made for the tensor `{}` of a network that looks at {} pixels; this one's is `{FEATURES}`, of {}",
                    wanted.feature,
                    preprocess.size,
                    backbone.input_size()
                ),
            });
        }
        if wanted.sha256 != backbone.sha256() || wanted.width != backbone.width() {
            let shown = |name: &str, sha256: &str| format!("{name} (sha256 {sha256:.12}…)");
            return Err(BundleError::OtherBackbone {
                file: self.file.clone(),
                wanted: shown(&wanted.name, &wanted.sha256),
                given: shown(backbone.name(), backbone.sha256()),
            });
        }
        Ok(())
    }

    /// What the classifier needs of it.
    pub fn skill(&self) -> Skill {
        Skill {
            labels: self.manifest.classes.clone(),
            head: self.head.clone(),
            subspace: self.subspace.clone(),
            preprocess: self.manifest.preprocess.clone(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum NumbersError {
    #[error("{0}")]
    Format(#[from] safetensors::SafeTensorError),
    #[error("{name} is {got:?} {dtype:?}, expected {expected} F32")]
    Shape { name: &'static str, got: Vec<usize>, dtype: Dtype, expected: String },
    #[error("{0}")]
    Head(#[from] HeadError),
    #[error("{0}")]
    Subspace(#[from] SubspaceError),
}

/// `weight` `[classes, width]`, `bias` `[classes]`, `subspace` `[rank, width]`, all f32.
fn numbers_from(manifest: &Manifest, bytes: &[u8]) -> Result<(Head, Subspace), NumbersError> {
    let tensors = SafeTensors::deserialize(bytes)?;
    let width = manifest.backbone.width;
    let matrix = |name: &'static str| -> Result<Vec<f32>, NumbersError> {
        let tensor = tensors.tensor(name)?;
        match *tensor.shape() {
            [_, columns] if columns == width && tensor.dtype() == Dtype::F32 => Ok(floats(tensor.data())),
            _ => Err(shape(name, &tensor, format!("n × {width}"))),
        }
    };
    let bias = tensors.tensor("bias")?;
    if bias.shape().len() != 1 || bias.dtype() != Dtype::F32 {
        return Err(shape("bias", &bias, "n".into()));
    }
    let head = Head::new(width, matrix("weight")?, floats(bias.data()), manifest.temperature)?;
    let subspace = Subspace::new(width, matrix("subspace")?, manifest.unknown.threshold)?;
    Ok((head, subspace))
}

fn shape(name: &'static str, tensor: &TensorView<'_>, expected: String) -> NumbersError {
    NumbersError::Shape { name, got: tensor.shape().to_vec(), dtype: tensor.dtype(), expected }
}

fn numbers_to_bytes(head: &Head, subspace: &Subspace) -> Vec<u8> {
    let width = head.width();
    let tensors = [
        ("weight", vec![head.classes(), width], little_endian(head.weight())),
        ("bias", vec![head.classes()], little_endian(head.bias())),
        ("subspace", vec![subspace.basis().len() / width, width], little_endian(subspace.basis())),
    ];
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (*name, view.expect("the shape was made from the numbers"))
    });
    serialize(views, None).expect("three small tensors can be written")
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
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
        Bundle::new(manifest, head, Subspace::new(4, basis, 0.5).unwrap())
    }

    #[test]
    fn what_is_written_is_read_and_written_the_same() {
        let bytes = bundle().to_bytes();
        let read = Bundle::from_bytes("test", &bytes).unwrap();
        assert_eq!(read.head, bundle().head);
        assert_eq!(read.subspace, bundle().subspace);
        assert_eq!(read.manifest.classes, bundle().manifest.classes);
        assert_eq!(read.to_bytes(), bytes);
        assert_eq!(read.sha256().len(), 64);
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_refused_or_harmless() {
        let whole = bundle();
        let bytes = whole.to_bytes();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            // Nothing vouches for the manifest itself yet; the numbers are hashed.
            if let Ok(read) = Bundle::from_bytes("test", &changed) {
                assert_eq!(read.head.weight(), whole.head.weight(), "byte {at}");
                assert_eq!(read.subspace.basis(), whole.subspace.basis(), "byte {at}");
            }
        }
        for cut in (0..bytes.len()).step_by(97) {
            if let Ok(read) = Bundle::from_bytes("test", &bytes[..cut]) {
                assert_eq!(read.head, whole.head, "cut at {cut}");
            }
        }
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
        let error = other_size.classifier(&Backbone::built_in().unwrap()).err().unwrap().to_string();
        assert!(error.contains("looks at 160 pixels"), "{error}");
    }

    #[test]
    fn what_the_manifest_does_not_name_is_refused() {
        let mut members = archive::unpack(&bundle().to_bytes()).unwrap();
        let (manifest, head) = (members.take(manifest::NAME).unwrap(), members.take(HEAD).unwrap());
        let stuffed = archive::pack(&[(manifest::NAME, &manifest), (HEAD, &head), ("extra", b"x")]);
        let error = Bundle::from_bytes("test", &stuffed).unwrap_err().to_string();
        assert!(error.contains("extra: not a member of a bundle"), "{error}");
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
        let backbone = Backbone::built_in().unwrap();
        let error = bundle().classifier(&backbone).err().unwrap().to_string();
        assert!(error.contains("made for the backbone b") && error.contains("mobilenet_v2_1.0_224"), "{error}");
    }
}
