//! Photographs instead of a camera: a folder or a list of images, at an interval, once or looped.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::{CameraError, FrameSource, Next, Pace};
use crate::frame::files::{EXTENSIONS, is_picture};
use crate::frame::{Frame, Picture};

/// A list of images and the place in it.
pub struct Replay {
    images: Vec<PathBuf>,
    pace: Pace,
    looped: bool,
    file_bytes_max: u64,
    next: usize,
    last: Option<Instant>,
}

impl Replay {
    pub fn new(images: Vec<PathBuf>, pace: Pace, looped: bool, file_bytes_max: u64) -> Self {
        Replay { images, pace, looped, file_bytes_max, next: 0, last: None }
    }
}

impl FrameSource for Replay {
    fn open(&mut self) -> Result<(), CameraError> {
        Ok(())
    }

    fn next(&mut self, wait: Duration) -> Result<Next, CameraError> {
        if self.next == self.images.len() {
            if !self.looped {
                return Ok(Next::Ended);
            }
            self.next = 0;
        }
        // Asked for each time, so that a change of pace counts at once.
        let elapsed = self.last.map_or(Duration::MAX, |last| last.elapsed());
        let early = self.pace.interval().saturating_sub(elapsed);
        std::thread::sleep(early.min(wait));
        if early > wait {
            return Ok(Next::Pending);
        }
        self.last = Some(Instant::now());
        let path = self.images[self.next].clone();
        self.next += 1;
        let captured_at = SystemTime::now();
        Ok(match read(&path, self.file_bytes_max) {
            Ok(bytes) => Next::Frame(Frame { captured_at, picture: Picture::Encoded(bytes), origin: Some(path) }),
            Err(reason) => Next::Broken(format!("{}: {reason}", path.display())),
        })
    }

    fn close(&mut self) {}
}

fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, String> {
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size > bytes_max {
        return Err(format!("{size} bytes, more than the {bytes_max} allowed"));
    }
    fs::read(path).map_err(|e| e.to_string())
}

/// The images that `path` means: all below a folder, sorted; or those a text file lists, a path a
/// line, relative to the file. None at all is an error.
pub fn images(path: &Path) -> Result<Vec<PathBuf>, CameraError> {
    let failed = |path: &Path, reason: String| CameraError::Replay { path: path.into(), reason };
    let meta = fs::metadata(path).map_err(|e| failed(path, e.to_string()))?;
    let mut found = Vec::new();
    if meta.is_dir() {
        collect(path, &mut found).map_err(|e| failed(path, e.to_string()))?;
    } else if is_picture(path) {
        found.push(path.to_owned());
    } else {
        let list = fs::read_to_string(path).map_err(|e| failed(path, e.to_string()))?;
        let base = path.parent().unwrap_or(Path::new(""));
        let lines = list.lines().map(str::trim).filter(|line| !line.is_empty());
        found.extend(lines.map(|line| base.join(line)));
        if let Some(missing) = found.iter().find(|image| !image.is_file()) {
            return Err(failed(missing, format!("listed in {}, but no such file", path.display())));
        }
    }
    if found.is_empty() {
        return Err(failed(path, format!("no images here ({})", EXTENSIONS.join(", "))));
    }
    Ok(found)
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let path = entry.path();
        // A link to a folder is not followed: it may lead back here.
        if entry.file_type()?.is_dir() {
            collect(&path, found)?;
        } else if is_picture(&path) && path.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b/2.JPG", "a/1.jpg", "a/notes.txt", "c.webp"] {
            fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            fs::write(dir.path().join(name), name).unwrap();
        }
        dir
    }

    #[test]
    fn a_folder_gives_its_images_in_order_and_a_list_those_it_names() {
        let dir = folder();
        let names = |found: Vec<PathBuf>| -> Vec<String> {
            found.iter().map(|p| p.strip_prefix(dir.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names(images(dir.path()).unwrap()), ["a/1.jpg", "b/2.JPG", "c.webp"]);
        let list = dir.path().join("list.txt");
        fs::write(&list, "c.webp\n\na/1.jpg\n").unwrap();
        assert_eq!(names(images(&list).unwrap()), ["c.webp", "a/1.jpg"]);
        fs::write(&list, "gone.jpg\n").unwrap();
        assert!(images(&list).unwrap_err().to_string().contains("gone.jpg: listed in"));
    }

    #[test]
    fn a_folder_without_images_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = images(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&dir.path().display().to_string()) && error.contains("no images"), "{error}");
        assert!(images(&dir.path().join("none")).is_err());
    }

    #[test]
    fn once_ends_looped_begins_again_and_a_giant_file_is_refused() {
        let dir = folder();
        let found = images(dir.path()).unwrap();
        let mut once = Replay::new(found.clone(), Pace::new(0), false, 100);
        once.open().unwrap();
        let origin = |next: Next| match next {
            Next::Frame(frame) => frame.origin,
            _ => None,
        };
        for path in &found {
            assert_eq!(origin(once.next(Duration::ZERO).unwrap()).as_ref(), Some(path));
        }
        assert!(matches!(once.next(Duration::ZERO), Ok(Next::Ended)));

        let mut looped = Replay::new(found[..1].to_vec(), Pace::new(0), true, 100);
        looped.open().unwrap();
        for _ in 0..3 {
            assert_eq!(origin(looped.next(Duration::ZERO).unwrap()).as_ref(), found.first());
        }
        let mut bounded = Replay::new(found, Pace::new(0), false, 3);
        let Next::Broken(error) = bounded.next(Duration::ZERO).unwrap() else { panic!("a giant file is broken") };
        assert!(error.contains("7 bytes, more than the 3 allowed"), "{error}");
    }
}
