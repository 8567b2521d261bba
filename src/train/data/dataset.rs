//! A dataset on disk: one folder of images per class, and optionally images of none of the classes.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use unicode_normalization::UnicodeNormalization;

use crate::frame::picture_files::{EXTENSIONS, is_picture};
use crate::system::hash::hex;
use crate::system::paths::printable;
use crate::vision::labels::LabelsError;
use crate::vision::{Labels, UNKNOWN};

/// The image files of a dataset and their classes.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Names of the class folders, sorted.
    pub classes: Labels,
    /// Kinds of images of none of the classes: names of the folders in [`UNKNOWN`] and of added folders.
    pub unknown_kinds: Vec<String>,
    /// Sorted by class, then by path; images of none of the classes come last.
    pub images: Vec<LabeledImage>,
    /// Files and folders that are not read and may have been meant as images, sorted by path.
    pub ignored: Vec<DatasetProblem>,
}

/// A file with a problem: one that is not read, an unreadable or too small image, a duplicate or a near-duplicate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetProblem {
    /// Path of the file; of a name that is not UTF-8, the text nearest to it.
    pub file: PathBuf,
    /// The reason, as shown to the user.
    pub problem: String,
}

/// An image file and its class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabeledImage {
    /// Path of the file.
    pub path: PathBuf,
    /// Index of the class in [`Dataset::classes`]; of an image of none of the classes, their number plus the index of its kind.
    pub class: usize,
}

/// Error of a rejected dataset folder.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// A folder cannot be read.
    #[error("{}: {source}", printable(path))]
    Io {
        /// Path of the folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The folder names are not valid [`Labels`].
    #[error("{}: {source}", printable(path))]
    Classes {
        /// Path of the dataset.
        path: PathBuf,
        /// The cause.
        source: LabelsError,
    },
    /// A class has no images; its folder, and a suffix that names a file that is not read.
    #[error("{path}: no images of this class{hint}", path = printable(.0), hint = .1)]
    EmptyClass(PathBuf, String),
    /// The classes differ from the expected ones, or are in another order.
    #[error("{}: the classes are {found:?}, expected {expected:?}", printable(path))]
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
    /// Lists the images below `path`. Each folder is a class with the folder's name, in Unicode's composed form (NFC); the images in
    /// its subfolders belong to it. A folder [`UNKNOWN`] holds images of none of the classes, as [`Dataset::add_unknown`] reads them.
    /// Hidden files and folders are skipped; what else is not read is in [`Dataset::ignored`].
    ///
    /// # Errors
    /// Fails if a folder cannot be read, if the class names are not valid [`Labels`], or if a class has no images.
    pub fn read(path: &Path) -> Result<Self, DatasetError> {
        let Folders { classes, unknown, mut ignored } = Folders::list(path)?;
        let names = classes.iter().map(|(name, _)| name.clone()).collect();
        let labels = Labels::new(names).map_err(|source| DatasetError::Classes { path: path.into(), source })?;
        let mut images = Vec::new();
        for (class, (_, folder)) in classes.iter().enumerate() {
            let paths = images_in(folder, &mut ignored)?;
            images.extend(paths.into_iter().map(|path| LabeledImage { path, class }));
        }
        ignored.sort_by(|a, b| a.file.cmp(&b.file));
        let mut dataset = Dataset { classes: labels, unknown_kinds: Vec::new(), images, ignored };
        if let Some(folder) = unknown {
            dataset.add_unknown(&folder)?;
        }
        Ok(dataset)
    }

    /// Adds the images of another dataset, which has some or all of the classes.
    ///
    /// # Errors
    /// If a folder cannot be read, a class is not one of this dataset's, or a class has no images.
    pub fn add(&mut self, path: &Path) -> Result<(), DatasetError> {
        let Folders { classes, unknown, mut ignored } = Folders::list(path)?;
        let other_classes = || DatasetError::OtherClasses {
            path: path.into(),
            found: classes.iter().map(|(name, _)| name.clone()).collect(),
            expected: self.classes.names().to_vec(),
        };
        if classes.is_empty() && unknown.is_none() {
            return Err(other_classes());
        }
        let mut added = Vec::new();
        for (name, folder) in &classes {
            let class = self.classes.position(name).ok_or_else(other_classes)?;
            let paths = images_in(folder, &mut ignored)?;
            added.extend(paths.into_iter().map(|path| LabeledImage { path, class }));
        }
        self.images.extend(added);
        self.ignored.extend(ignored);
        unknown.map_or(Ok(()), |folder| self.add_unknown(&folder))?;
        self.images.sort_by_key(|image| image.class);
        Ok(())
    }

    /// Adds images of none of the classes. Each folder in `folder` is a kind of its own; other images in it are a kind with its name.
    ///
    /// # Errors
    /// Fails if a folder cannot be read, or has no images.
    pub fn add_unknown(&mut self, folder: &Path) -> Result<(), DatasetError> {
        let (mut kinds, mut loose) = (Vec::new(), Vec::new());
        for entry in entries(folder)? {
            match entry.metadata() {
                _ if entry.name.to_str().is_none() => entry.ignore(NOT_UTF8, &mut self.ignored),
                Ok(metadata) if metadata.is_dir() => kinds.push(entry.path),
                Ok(metadata) if metadata.is_file() && is_picture(&entry.path) => loose.push(entry.path),
                Ok(_) => entry.ignore_unless_text(&mut self.ignored),
                Err(error) => entry.ignore(&error.to_string(), &mut self.ignored),
            }
        }
        kinds.sort();
        loose.sort();
        if kinds.is_empty() && loose.is_empty() {
            return Err(DatasetError::EmptyClass(folder.into(), String::new()));
        }
        for kind in kinds {
            let paths = images_in(&kind, &mut self.ignored)?;
            self.add_kind(&kind, paths);
        }
        if !loose.is_empty() {
            self.add_kind(folder, loose);
        }
        Ok(())
    }

    /// Adds images of a kind with the folder's name, or to the kind that has this name.
    fn add_kind(&mut self, folder: &Path, paths: Vec<PathBuf>) {
        let name: String = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().nfc().collect();
        let kind = self.unknown_kinds.iter().position(|kind| *kind == name).unwrap_or_else(|| {
            self.unknown_kinds.push(name);
            self.unknown_kinds.len() - 1
        });
        let class = self.classes.names().len() + kind;
        self.images.extend(paths.into_iter().map(|path| LabeledImage { path, class }));
    }

    /// Returns the dataset with the kinds of `other`, in the same order, and with its own others, which `other` gets as well.
    pub fn with_kinds_of(mut self, other: &mut Dataset) -> Self {
        let known = self.classes.names().len();
        let position = |name: &String| {
            other.unknown_kinds.iter().position(|kind| kind == name).unwrap_or_else(|| {
                other.unknown_kinds.push(name.clone());
                other.unknown_kinds.len() - 1
            })
        };
        let positions: Vec<usize> = self.unknown_kinds.iter().map(position).collect();
        for image in self.images.iter_mut().filter(|image| image.class >= known) {
            image.class = known + positions[image.class - known];
        }
        self.unknown_kinds.clone_from(&other.unknown_kinds);
        self
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

/// The folders of a dataset.
struct Folders {
    /// Names and paths of the classes, sorted.
    classes: Vec<(String, PathBuf)>,
    /// The folder [`UNKNOWN`].
    unknown: Option<PathBuf>,
    ignored: Vec<DatasetProblem>,
}

impl Folders {
    fn list(path: &Path) -> Result<Self, DatasetError> {
        let mut folders = Folders { classes: Vec::new(), unknown: None, ignored: Vec::new() };
        for entry in entries(path)? {
            let ignored = &mut folders.ignored;
            match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => match entry.name.to_str() {
                    Some(UNKNOWN) => folders.unknown = Some(entry.path),
                    Some(name) => folders.classes.push((name.nfc().collect(), entry.path)),
                    None => entry.ignore(NOT_UTF8, ignored),
                },
                Ok(_) if is_picture(&entry.path) => {
                    entry.ignore("an image outside of the folders of the classes", ignored);
                }
                Ok(_) => entry.ignore_unless_text(ignored),
                Err(error) => entry.ignore(&error.to_string(), ignored),
            }
        }
        folders.classes.sort();
        Ok(folders)
    }
}

/// The deepest subfolder of a class that is read.
const DEPTH_MAX: usize = 16;
/// Extensions of files that accompany images, lower case: they are not missed.
const TEXT_EXTENSIONS: [&str; 12] =
    ["txt", "md", "csv", "tsv", "json", "xml", "yaml", "yml", "html", "pdf", "db", "ini"];
const NOT_UTF8: &str = "the name is not UTF-8";

/// A file or folder of a folder; not a hidden one.
struct Entry {
    path: PathBuf,
    name: OsString,
}

impl Entry {
    /// Returns the metadata; follows symbolic links.
    fn metadata(&self) -> io::Result<fs::Metadata> {
        fs::metadata(&self.path)
    }

    fn ignore(&self, problem: &str, ignored: &mut Vec<DatasetProblem>) {
        let file = PathBuf::from(self.path.to_string_lossy().into_owned());
        ignored.push(DatasetProblem { file, problem: problem.into() });
    }

    fn ignore_unless_text(&self, ignored: &mut Vec<DatasetProblem>) {
        let extension = self.path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if !TEXT_EXTENSIONS.iter().any(|text| extension.eq_ignore_ascii_case(text)) {
            self.ignore(&format!("not read, expected a file name with one of {}", EXTENSIONS.join(", ")), ignored);
        }
    }
}

fn entries(folder: &Path) -> Result<Vec<Entry>, DatasetError> {
    let failed = |source| DatasetError::Io { path: folder.into(), source };
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(b".") {
            entries.push(Entry { path: entry.path(), name });
        }
    }
    Ok(entries)
}

/// Returns the image files in a folder and in its subfolders, sorted; at least one.
fn images_in(folder: &Path, ignored: &mut Vec<DatasetProblem>) -> Result<Vec<PathBuf>, DatasetError> {
    let (mut paths, ignored_before) = (Vec::new(), ignored.len());
    collect(folder, 0, &mut paths, ignored)?;
    if paths.is_empty() {
        let example = ignored.get(ignored_before);
        let hint = |example: &DatasetProblem| format!("; {}: {}", printable(&example.file), example.problem);
        return Err(DatasetError::EmptyClass(folder.into(), example.map_or(String::new(), hint)));
    }
    paths.sort();
    Ok(paths)
}

/// Appends the image files in a folder of a class and in its subfolders.
fn collect(
    folder: &Path,
    depth: usize,
    images: &mut Vec<PathBuf>,
    ignored: &mut Vec<DatasetProblem>,
) -> Result<(), DatasetError> {
    for entry in entries(folder)? {
        match entry.metadata() {
            Err(error) => entry.ignore(&error.to_string(), ignored),
            Ok(metadata) if metadata.is_dir() => {
                if entry.path.is_symlink() || depth == DEPTH_MAX {
                    entry.ignore("a linked or too deep subfolder is not read", ignored);
                } else {
                    collect(&entry.path, depth + 1, images, ignored)?;
                }
            }
            Ok(_) if entry.name.to_str().is_none() => entry.ignore(NOT_UTF8, ignored),
            Ok(metadata) if metadata.is_file() && is_picture(&entry.path) => images.push(entry.path),
            Ok(_) => entry.ignore_unless_text(ignored),
        }
    }
    Ok(())
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

    /// Returns the name of a class or kind.
    fn class_name(dataset: &Dataset, class: usize) -> &str {
        let names = dataset.classes.names();
        names.get(class).unwrap_or_else(|| &dataset.unknown_kinds[class - names.len()])
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
    fn reads_subfolders_and_names_what_is_not_read() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;

        let dir = folder(&[
            "daisy/a.jfif",
            "daisy/b.JPE",
            "daisy/2024/spring/c.jpg",
            "daisy/d.heic",
            "daisy/e.gif",
            "daisy/notes.txt",
            "daisy/.DS_Store",
            "ga\u{308}nse/f.jpg",
            "LICENSE.txt",
            "top.jpg",
        ]);
        std::os::unix::fs::symlink("/nowhere.jpg", dir.path().join("daisy/g.jpg")).unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("daisy/loop")).unwrap();
        fs::write(dir.path().join("daisy").join(OsStr::from_bytes(b"h\xFF.jpg")), "x").unwrap();
        let dataset = Dataset::read(dir.path()).unwrap();
        assert_eq!(dataset.classes.names(), ["daisy", "gänse"]);
        let short = |path: &Path| path.strip_prefix(dir.path()).unwrap().display().to_string();
        let found: Vec<_> = dataset.images.iter().map(|image| short(&image.path)).collect();
        assert_eq!(found, ["daisy/2024/spring/c.jpg", "daisy/a.jfif", "daisy/b.JPE", "ga\u{308}nse/f.jpg"]);
        let ignored: Vec<_> =
            dataset.ignored.iter().map(|ignored| format!("{}: {}", short(&ignored.file), ignored.problem)).collect();
        let not_read = "not read, expected a file name with one of jpg, jpeg, jpe, jfif, png, webp";
        assert_eq!(
            ignored,
            [
                format!("daisy/d.heic: {not_read}"),
                format!("daisy/e.gif: {not_read}"),
                "daisy/g.jpg: No such file or directory (os error 2)".into(),
                "daisy/h\u{fffd}.jpg: the name is not UTF-8".into(),
                "daisy/loop: a linked or too deep subfolder is not read".into(),
                "top.jpg: an image outside of the folders of the classes".into(),
            ]
        );
    }

    #[test]
    fn reads_images_of_none_of_the_classes_and_other_datasets() {
        let dir = folder(&[
            "a/daisy/1.jpg",
            "a/tulips/2.jpg",
            "a/unknown/bees/3.jpg",
            "a/unknown/4.jpg",
            "b/tulips/5.jpg",
            "b/roses/6.jpg",
            "c/tulips/7.jpg",
            "c/daisy/8.jpg",
            "c/unknown/grass/9.jpg",
            "d/tulips/12.jpg",
            "more/bees/10.jpg",
            "more/cats/x/11.jpg",
            "empty/readme.txt",
        ]);
        let mut dataset = Dataset::read(&dir.path().join("a")).unwrap();
        assert_eq!(
            (dataset.classes.names(), &dataset.unknown_kinds[..]),
            (&["daisy".into(), "tulips".into()][..], &["bees".into(), "unknown".into()][..])
        );
        dataset.add(&dir.path().join("c")).unwrap();
        dataset.add(&dir.path().join("d")).unwrap();
        dataset.add_unknown(&dir.path().join("more")).unwrap();
        assert_eq!(dataset.unknown_kinds, ["bees", "unknown", "grass", "cats"]);
        let mut found: Vec<(&str, &str)> = dataset
            .images
            .iter()
            .map(|image| (image.path.file_stem().unwrap().to_str().unwrap(), class_name(&dataset, image.class)))
            .collect();
        found.sort_by_key(|(name, _)| name.parse::<u32>().unwrap());
        let expected = ["daisy", "tulips", "bees", "unknown", "tulips", "daisy", "grass", "bees", "cats", "tulips"];
        assert_eq!(found.iter().map(|(_, class)| *class).collect::<Vec<_>>(), expected);
        let error = dataset.add(&dir.path().join("b")).unwrap_err().to_string();
        assert!(error.contains("the classes are [\"roses\", \"tulips\"], expected [\"daisy\", \"tulips\"]"), "{error}");
        let error = dataset.add_unknown(&dir.path().join("empty")).unwrap_err().to_string();
        assert!(error.ends_with("empty: no images of this class"), "{error}");
        // The kinds of a validation set get the indices of those of the training set.
        let val = Dataset::read(&dir.path().join("c")).unwrap().with_kinds_of(&mut dataset);
        assert_eq!(class_name(&val, val.images.last().unwrap().class), "grass");
    }

    #[test]
    fn names_the_missing_folder_or_class() {
        let dir = folder(&["daisy/c.jpg", "empty/readme.txt"]);
        let error = Dataset::read(dir.path()).unwrap_err().to_string();
        assert!(error.ends_with("empty: no images of this class"), "{error}");
        let dir = folder(&["daisy/c.jpg", "heic/a.heic"]);
        let error = Dataset::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("heic: no images of this class; ") && error.contains("a.heic: not read"), "{error}");
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
