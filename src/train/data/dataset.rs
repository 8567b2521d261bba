//! A dataset on disk: one folder of images per class.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::frame::picture_files::is_picture;
use crate::system::hash::hex;
use crate::vision::Labels;
use crate::vision::labels::LabelsError;

/// The image files of a dataset and their classes.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Names of the class folders, sorted.
    pub classes: Labels,
    /// Sorted by class, then by path.
    pub images: Vec<LabeledImage>,
}

/// An image file and its class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabeledImage {
    /// Path of the file.
    pub path: PathBuf,
    /// Index of the class in [`Dataset::classes`].
    pub class: usize,
}

/// Error of a rejected dataset folder.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// A folder cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Path of the folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The folder names are not valid [`Labels`].
    #[error("{path}: {source}")]
    Classes {
        /// Path of the dataset.
        path: PathBuf,
        /// The cause.
        source: LabelsError,
    },
    /// A class has no images; its folder.
    #[error("{0}: no images of this class")]
    EmptyClass(PathBuf),
    /// The classes differ from the expected ones, or are in another order.
    #[error("{path}: the classes are {found:?}, expected {expected:?}")]
    OtherClasses {
        /// Path of the dataset.
        path: PathBuf,
        /// Class names of the dataset, in order.
        found: Vec<String>,
        /// Expected class names, in order.
        expected: Vec<String>,
    },
}

impl Dataset {
    /// Lists the images below `path`. Each folder is a class with the folder's name; hidden folders are ignored.
    ///
    /// # Errors
    /// Fails if a folder cannot be read, if the class names are not valid [`Labels`], or if a class has no images.
    pub fn read(path: &Path) -> Result<Self, DatasetError> {
        let failed = |source| DatasetError::Io { path: path.into(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.path().is_dir() && !name.starts_with('.') {
                names.push(name);
            }
        }
        names.sort();
        let classes = Labels::new(names).map_err(|source| DatasetError::Classes { path: path.into(), source })?;
        let mut images = Vec::new();
        for (class, name) in classes.names().iter().enumerate() {
            images.extend(class_images(&path.join(name))?.into_iter().map(|path| LabeledImage { path, class }));
        }
        Ok(Dataset { classes, images })
    }

    /// Checks that the classes equal `labels`, in the same order. `path` names the dataset in the error.
    ///
    /// # Errors
    /// Returns [`DatasetError::OtherClasses`] if they differ.
    pub fn expect_classes(&self, labels: &Labels, path: &Path) -> Result<(), DatasetError> {
        if self.classes == *labels {
            return Ok(());
        }
        Err(DatasetError::OtherClasses {
            path: path.into(),
            found: self.classes.names().to_vec(),
            expected: labels.names().to_vec(),
        })
    }
}

/// Returns the sorted image files of one class folder.
fn class_images(folder: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let failed = |source| DatasetError::Io { path: folder.into(), source };
    let mut images = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if is_picture(&path) && path.is_file() {
            images.push(path);
        }
    }
    if images.is_empty() {
        return Err(DatasetError::EmptyClass(folder.into()));
    }
    images.sort();
    Ok(images)
}

/// Returns the SHA-256, in hexadecimal, over the class names and the sorted pairs of class index and content hash.
/// It does not depend on file names or on the order of `images`.
pub fn fingerprint<'a>(classes: &Labels, images: impl Iterator<Item = (usize, &'a [u8; 32])>) -> String {
    let mut hash = Sha256::new();
    for name in classes.names() {
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
    }
    let mut images: Vec<_> = images.collect();
    images.sort_unstable();
    for (class, content_hash) in images {
        hash.update((class as u64).to_le_bytes());
        hash.update(content_hash);
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        dir
    }

    #[test]
    fn reads_folders_as_classes_sorted_by_name() {
        let dir =
            folder(&["tulips/b.jpg", "tulips/a.PNG", "tulips/LICENSE.txt", "daisy/c.webp", ".cache/x.jpg", "top.jpg"]);
        let dataset = Dataset::read(dir.path()).unwrap();
        assert_eq!(dataset.classes.names(), ["daisy", "tulips"]);
        let found: Vec<_> =
            dataset.images.iter().map(|i| (i.path.file_name().unwrap().to_str().unwrap(), i.class)).collect();
        assert_eq!(found, [("c.webp", 0), ("a.PNG", 1), ("b.jpg", 1)]);
    }

    #[test]
    fn names_the_missing_folder_or_class() {
        let dir = folder(&["daisy/c.jpg", "empty/readme.txt"]);
        let error = Dataset::read(dir.path()).unwrap_err().to_string();
        assert!(error.ends_with("empty: no images of this class"), "{error}");
        let dir = folder(&["daisy/c.jpg"]);
        let error = Dataset::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("1 classes, expected 2 to 1000"), "{error}");
        assert!(Dataset::read(&dir.path().join("none")).unwrap_err().to_string().contains("none: "));
        let dir = folder(&["daisy/c.jpg", "roses/d.jpg"]);
        let labels = Labels::new(vec!["daisy".into(), "tulips".into()]).unwrap();
        assert!(Dataset::read(dir.path()).unwrap().expect_classes(&labels, dir.path()).is_err());
    }

    #[test]
    fn fingerprint_depends_on_contents_and_classes_only() {
        let labels = Labels::new(vec!["a".into(), "b".into()]).unwrap();
        let (x, y) = ([1u8; 32], [2u8; 32]);
        let hash = |images: &[(usize, &[u8; 32])]| fingerprint(&labels, images.iter().copied());
        assert_eq!(hash(&[(0, &x), (1, &y)]), hash(&[(0, &x), (1, &y)]));
        assert_eq!(hash(&[(0, &x), (1, &y)]), hash(&[(1, &y), (0, &x)]), "independent of the order");
        assert_ne!(hash(&[(0, &x), (1, &y)]), hash(&[(1, &x), (0, &y)]));
        assert_ne!(hash(&[(0, &x)]), hash(&[(0, &y)]));
    }
}
