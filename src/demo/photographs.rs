//! Photographs for the demo: those named, those at hand, or those that can be fetched.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::camera::{CameraError, replay};
use crate::fetch::flower_photos;

/// Beside the project, one folder a class.
const AT_HAND: &str = "../shared/flowers/val";
/// Where Debian's package mate-backgrounds puts its photographs.
const MATE_BACKGROUNDS: &str = "/usr/share/backgrounds/mate";
/// A photograph of a folder without classes is shown so often in a row, for an event to come of it.
const HOLD: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum PhotographsError {
    #[error("--frames: {0}")]
    Named(CameraError),
    #[error(
        "no photographs: {AT_HAND} is not there, flower_photos cannot be fetched ({0}), and Debian's mate-backgrounds is not installed; name a folder with --frames"
    )]
    Nowhere(String),
    #[error("cannot write the list of photographs: {0}")]
    List(io::Error),
}

/// What is replayed, in order.
pub struct Photographs {
    pub folder: PathBuf,
    /// The folders that tell what is shown; none where the photographs lie in no such folders.
    pub classes: Vec<String>,
    pub images: Vec<PathBuf>,
}

impl Photographs {
    /// Looks where `named` says, or where photographs may be.
    pub fn find(named: Option<&Path>, per_class: usize, out: &mut dyn Write) -> Result<Self, PhotographsError> {
        if let Some(folder) = named {
            return Self::read(folder, per_class).map_err(PhotographsError::Named);
        }
        if let Ok(found) = Self::read(Path::new(AT_HAND), per_class) {
            return Ok(found);
        }
        match fetch(out) {
            Ok(folder) => Self::read(&folder, per_class).map_err(|e| PhotographsError::Nowhere(e.to_string())),
            Err(reason) => {
                Self::read(Path::new(MATE_BACKGROUNDS), per_class).map_err(|_| PhotographsError::Nowhere(reason))
            }
        }
    }

    /// Folders with images in them are classes; otherwise every image below `folder` is shown.
    fn read(folder: &Path, per_class: usize) -> Result<Self, CameraError> {
        let all = replay::images(folder)?;
        let class_of = |image: &Path| -> Option<String> {
            let parent = image.parent()?;
            (parent.parent()? == folder).then(|| parent.file_name().map(|n| n.to_string_lossy().into_owned()))?
        };
        let mut classes: Vec<String> = all.iter().filter_map(|image| class_of(image)).collect();
        classes.dedup();
        if classes.len() < 2 {
            return Ok(Photographs { folder: folder.into(), classes: Vec::new(), images: held(&all) });
        }
        let mut images = Vec::new();
        for class in &classes {
            let of_class: Vec<&PathBuf> = all.iter().filter(|image| class_of(image).as_ref() == Some(class)).collect();
            let wanted = per_class.clamp(1, of_class.len());
            // Evenly from the whole folder.
            images.extend((0..wanted).map(|i| of_class[i * of_class.len() / wanted].clone()));
        }
        Ok(Photographs { folder: folder.into(), classes, images })
    }

    /// Forgets the folders where one of them is no class of the model: they tell nothing then.
    pub fn told_by(mut self, labels: &[String]) -> Self {
        if !self.classes.is_empty() && !self.classes.iter().all(|class| labels.contains(class)) {
            self.classes.clear();
            self.images = held(&self.images);
        }
        self
    }

    /// What the photograph shows, by its folder's name.
    pub fn truth<'a>(&self, image: &'a Path) -> Option<&'a str> {
        let name = image.parent()?.file_name()?.to_str()?;
        self.classes.iter().any(|class| class == name).then_some(name)
    }

    /// The list as the replay reads it.
    pub fn write_list(&self) -> Result<tempfile::NamedTempFile, PhotographsError> {
        let mut list = tempfile::Builder::new().suffix(".txt").tempfile().map_err(PhotographsError::List)?;
        for image in &self.images {
            // Relative paths would be taken for relative to the list.
            let image = image.canonicalize().map_err(PhotographsError::List)?;
            writeln!(list, "{}", image.display()).map_err(PhotographsError::List)?;
        }
        list.flush().map_err(PhotographsError::List)?;
        Ok(list)
    }
}

fn held(images: &[PathBuf]) -> Vec<PathBuf> {
    images.iter().flat_map(|image| std::iter::repeat_n(image.clone(), HOLD)).collect()
}

/// TensorFlow's flower_photos, fetched once.
fn fetch(out: &mut dyn Write) -> Result<PathBuf, String> {
    let cache = crate::system::paths::user_cache().ok_or("no home directory")?;
    let folder = cache.join("flower_photos");
    if !folder.exists() {
        writeln!(out, "fetching flower_photos (218 MiB) to {} …", cache.display()).map_err(|e| e.to_string())?;
    }
    flower_photos::fetch(&flower_photos::published(), &folder, &|_, _| {}).map_err(|e| e.to_string())?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use std::fs;

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
    fn folders_are_classes_and_each_gives_its_share() {
        let dir = folder(&["a/1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg", "b/1.jpg"]);
        let found = Photographs::find(Some(dir.path()), 2, &mut Vec::new()).unwrap();
        assert_eq!(found.classes, ["a", "b"]);
        let names: Vec<_> =
            found.images.iter().map(|p| p.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a/1.jpg", "a/3.jpg", "b/1.jpg"]);
        assert_eq!(found.truth(&found.images[2]), Some("b"));
        let told_by = |labels: [&str; 2]| {
            let found = Photographs::find(Some(dir.path()), 2, &mut Vec::new()).unwrap();
            let found = found.told_by(&labels.map(str::to_owned));
            (found.classes.len(), found.images.len())
        };
        assert_eq!(told_by(["b", "a"]), (2, 3));
        assert_eq!(told_by(["b", "c"]), (0, 3 * HOLD), "each is held, since none is followed by its like");
        let list = fs::read_to_string(found.write_list().unwrap().path()).unwrap();
        assert_eq!(list.lines().count(), 3);
    }

    #[test]
    fn photographs_without_folders_are_held_and_tell_nothing() {
        let dir = folder(&["1.jpg", "2.jpg"]);
        let found = Photographs::find(Some(dir.path()), 2, &mut Vec::new()).unwrap();
        assert!(found.classes.is_empty());
        assert_eq!(found.images.len(), 2 * HOLD);
        assert_eq!(found.truth(&found.images[0]), None);
    }

    #[test]
    fn an_empty_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Photographs::find(Some(dir.path()), 2, &mut Vec::new()).err().unwrap().to_string();
        assert!(error.starts_with("--frames: ") && error.contains("no images here"), "{error}");
    }
}
