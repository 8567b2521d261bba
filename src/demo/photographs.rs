//! Photographs for the demo: from a named folder, a known local one, or a download.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::camera::{CameraError, replay};
use crate::fetch::{FetchError, flower_photos};

/// Folder beside the repository, one subfolder a class.
const LOCAL_FOLDER: &str = "../shared/flowers/val";
/// Folder of the download in the user's cache.
const FLOWER_PHOTOS: &str = "flower_photos";
/// Repetitions of each photograph of a folder without classes, enough for the decider to publish an event.
const REPEATS: usize = 8;

/// An error of reading, downloading or listing photographs.
#[derive(Debug, thiserror::Error)]
pub enum PhotographsError {
    /// The folder that the user named cannot be read.
    #[error("--frames: {0}")]
    Named(CameraError),
    /// The user asked for a download, which failed.
    #[error("--fetch: flower_photos: {0}")]
    Fetch(FlowerPhotosError),
    /// The temporary list of photographs cannot be written.
    #[error("cannot write the list of photographs: {0}")]
    List(io::Error),
}

/// `flower_photos` cannot be fetched or read.
#[derive(Debug, thiserror::Error)]
pub enum FlowerPhotosError {
    /// The user has no home directory for a cache.
    #[error("no home directory")]
    NoHome,
    /// The progress cannot be printed.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
    /// The archive cannot be downloaded or unpacked.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The unpacked folder cannot be read.
    #[error(transparent)]
    Read(#[from] CameraError),
}

/// The photographs to replay, in order.
pub struct Photographs {
    /// Folder that they were found in.
    pub folder: PathBuf,
    /// Classes by the names of the subfolders; empty if the photographs are not sorted into classes.
    pub classes: Vec<String>,
    /// Paths of the photographs.
    pub images: Vec<PathBuf>,
}

impl Photographs {
    /// Finds photographs in `folder`, or in a default folder; at most `per_class` of each class. `None` if there are none and
    /// no `folder` is named; with `download`, TensorFlow's flower_photos are downloaded then. Prints to `out` before a download.
    ///
    /// # Errors
    ///
    /// [`PhotographsError`] if the named folder cannot be read or the download fails.
    pub fn find(
        folder: Option<&Path>,
        per_class: usize,
        download: bool,
        out: &mut dyn Write,
    ) -> Result<Option<Self>, PhotographsError> {
        if let Some(folder) = folder {
            return Self::read(folder, per_class).map(Some).map_err(PhotographsError::Named);
        }
        if let Ok(photographs) = Self::read(Path::new(LOCAL_FOLDER), per_class) {
            return Ok(Some(photographs));
        }
        if download {
            let folder = fetch(out).map_err(PhotographsError::Fetch)?;
            let read = Self::read(&folder, per_class);
            return read.map(Some).map_err(|error| PhotographsError::Fetch(error.into()));
        }
        let downloaded = crate::system::paths::user_cache().map(|cache| cache.join(FLOWER_PHOTOS));
        Ok(downloaded.and_then(|folder| Self::read(&folder, per_class).ok()))
    }

    /// Reads the subfolders with images as classes if there are at least two; otherwise takes every image below `folder`.
    fn read(folder: &Path, per_class: usize) -> Result<Self, CameraError> {
        let all = replay::images(folder)?;
        let class_of = |image: &Path| -> Option<String> {
            let parent = image.parent()?;
            (parent.parent()? == folder).then(|| parent.file_name().map(|n| n.to_string_lossy().into_owned()))?
        };
        let mut classes: Vec<String> = all.iter().filter_map(|image| class_of(image)).collect();
        classes.dedup();
        if classes.len() < 2 {
            return Ok(Photographs { folder: folder.into(), classes: Vec::new(), images: repeated(&all) });
        }
        let mut images = Vec::new();
        for class in &classes {
            let of_class: Vec<&PathBuf> = all.iter().filter(|image| class_of(image).as_ref() == Some(class)).collect();
            let count = per_class.clamp(1, of_class.len());
            // At even steps through the whole folder.
            images.extend((0..count).map(|i| of_class[i * of_class.len() / count].clone()));
        }
        Ok(Photographs { folder: folder.into(), classes, images })
    }

    /// Clears the classes unless each of them is one of the model's `labels`; the photographs are then repeated.
    pub fn match_labels(mut self, labels: &[String]) -> Self {
        if !self.classes.is_empty() && !self.classes.iter().all(|class| labels.contains(class)) {
            self.classes.clear();
            self.images = repeated(&self.images);
        }
        self
    }

    /// Returns the class of a photograph, by the name of its folder; `None` if it has none.
    pub fn true_class<'a>(&self, image: &'a Path) -> Option<&'a str> {
        let name = image.parent()?.file_name()?.to_str()?;
        self.classes.iter().any(|class| class == name).then_some(name)
    }

    /// Writes the list that [`replay::images`] reads to `folder`; returns its path.
    ///
    /// # Errors
    ///
    /// [`PhotographsError::List`] if the file cannot be written or a photograph no longer exists.
    pub fn write_list(&self, folder: &Path) -> Result<PathBuf, PhotographsError> {
        let mut list = String::new();
        for image in &self.images {
            // The replay resolves relative paths against the folder of the list.
            let image = image.canonicalize().map_err(PhotographsError::List)?;
            list += &format!("{}\n", image.display());
        }
        let path = folder.join("photographs.txt");
        fs::write(&path, list).map_err(PhotographsError::List)?;
        Ok(path)
    }
}

/// Repeats each photograph [`REPEATS`] times in a row.
fn repeated(images: &[PathBuf]) -> Vec<PathBuf> {
    images.iter().flat_map(|image| std::iter::repeat_n(image.clone(), REPEATS)).collect()
}

/// Fetches TensorFlow's flower_photos to the user's cache, unless it is there, and returns its folder.
fn fetch(out: &mut dyn Write) -> Result<PathBuf, FlowerPhotosError> {
    let cache = crate::system::paths::user_cache().ok_or(FlowerPhotosError::NoHome)?;
    let folder = cache.join(FLOWER_PHOTOS);
    if !folder.exists() {
        writeln!(out, "fetching flower_photos (218 MiB) to {} …", cache.display())?;
    }
    flower_photos::fetch(&flower_photos::archive(), &folder, &|_, _| {})?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            fs::create_dir_all(dir.path().join(file).parent().unwrap()).unwrap();
            fs::write(dir.path().join(file), file).unwrap();
        }
        dir
    }

    #[test]
    fn takes_the_same_share_of_each_class_folder() {
        let dir = folder(&["a/1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg", "b/1.jpg"]);
        let photographs = Photographs::find(Some(dir.path()), 2, false, &mut Vec::new()).unwrap().unwrap();
        assert_eq!(photographs.classes, ["a", "b"]);
        let names: Vec<_> =
            photographs.images.iter().map(|p| p.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a/1.jpg", "a/3.jpg", "b/1.jpg"]);
        assert_eq!(photographs.true_class(&photographs.images[2]), Some("b"));
        let matched = |labels: [&str; 2]| {
            let photographs = Photographs::find(Some(dir.path()), 2, false, &mut Vec::new()).unwrap().unwrap();
            let photographs = photographs.match_labels(&labels.map(str::to_owned));
            (photographs.classes.len(), photographs.images.len())
        };
        assert_eq!(matched(["b", "a"]), (2, 3));
        assert_eq!(matched(["b", "c"]), (0, 3 * REPEATS), "photographs without classes are repeated");
        let list = fs::read_to_string(photographs.write_list(dir.path()).unwrap()).unwrap();
        assert_eq!(list.lines().count(), 3);
    }

    #[test]
    fn repeats_photographs_without_class_folders() {
        let dir = folder(&["1.jpg", "2.jpg"]);
        let photographs = Photographs::find(Some(dir.path()), 2, false, &mut Vec::new()).unwrap().unwrap();
        assert!(photographs.classes.is_empty());
        assert_eq!(photographs.images.len(), 2 * REPEATS);
        assert_eq!(photographs.true_class(&photographs.images[0]), None);
    }

    #[test]
    fn the_error_names_an_empty_folder() {
        let dir = tempfile::tempdir().unwrap();
        let error = Photographs::find(Some(dir.path()), 2, false, &mut Vec::new()).err().unwrap().to_string();
        assert!(error.starts_with("--frames: ") && error.contains("no images here"), "{error}");
    }
}
