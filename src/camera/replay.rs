//! Replays image files in place of a camera: a folder or a list, at an interval, once or in a loop.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use std::{fs, io};

use super::{CameraError, FrameSource, NextFrame, Pace};
use crate::frame::picture_files::{EXTENSIONS, is_picture};
use crate::frame::{Frame, Picture};
use crate::system::paths::printable;

/// A [`FrameSource`] that reads image files in order.
pub struct Replay {
    images: Vec<PathBuf>,
    pace: Pace,
    looped: bool,
    file_bytes_max: u64,
    /// Index of the next image.
    next: usize,
    /// Time at which the last image was read.
    last: Option<Instant>,
}

impl Replay {
    /// Creates a replay of `images`, one every `pace`; if `looped`, it starts again after the last one. A file of more than
    /// `file_bytes_max` bytes is a broken frame.
    pub fn new(images: Vec<PathBuf>, pace: Pace, looped: bool, file_bytes_max: u64) -> Self {
        Replay { images, pace, looped, file_bytes_max, next: 0, last: None }
    }
}

impl FrameSource for Replay {
    fn open(&mut self) -> Result<(), CameraError> {
        Ok(())
    }

    fn next(&mut self, timeout: Duration) -> Result<NextFrame, CameraError> {
        if self.next == self.images.len() {
            if !self.looped {
                return Ok(NextFrame::Ended);
            }
            self.next = 0;
        }
        // The interval is read on each call, so that a change applies immediately.
        let elapsed = self.last.map_or(Duration::MAX, |last| last.elapsed());
        let remaining = self.pace.interval().saturating_sub(elapsed);
        std::thread::sleep(remaining.min(timeout));
        if remaining > timeout {
            return Ok(NextFrame::Pending);
        }
        self.last = Some(Instant::now());
        let path = self.images[self.next].clone();
        self.next += 1;
        let captured_at = SystemTime::now();
        Ok(match read(&path, self.file_bytes_max) {
            Ok(bytes) => NextFrame::Frame(Frame { captured_at, picture: Picture::Encoded(bytes), origin: Some(path) }),
            Err(error) => NextFrame::Broken(format!("{}: {error}", printable(&path))),
        })
    }

    fn close(&mut self) {}
}

/// An image file that cannot be read. The caller names the file.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{bytes} bytes, more than the {bytes_max} allowed")]
    TooLarge { bytes: u64, bytes_max: u64 },
}

fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, ReadError> {
    let bytes = fs::metadata(path)?.len();
    if bytes > bytes_max {
        return Err(ReadError::TooLarge { bytes, bytes_max });
    }
    Ok(fs::read(path)?)
}

/// Lists the images of `path`: all below a folder, sorted by name; one image file; or the paths that a text file lists, one
/// a line, relative to the text file's folder.
///
/// # Errors
///
/// [`CameraError::Replay`] if `path` cannot be read, a listed file does not exist, or there are no images.
pub fn images(path: &Path) -> Result<Vec<PathBuf>, CameraError> {
    let failed = |path: &Path, reason: String| CameraError::Replay { path: path.into(), reason };
    let metadata = fs::metadata(path).map_err(|e| failed(path, e.to_string()))?;
    let mut images = Vec::new();
    if metadata.is_dir() {
        collect(path, &mut images).map_err(|e| failed(path, e.to_string()))?;
    } else if is_picture(path) {
        images.push(path.to_owned());
    } else {
        let list = fs::read_to_string(path).map_err(|e| failed(path, e.to_string()))?;
        let base = path.parent().unwrap_or(Path::new(""));
        let lines = list.lines().map(str::trim).filter(|line| !line.is_empty());
        images.extend(lines.map(|line| base.join(line)));
        if let Some(missing) = images.iter().find(|image| !image.is_file()) {
            return Err(failed(missing, format!("listed in {}, but no such file", path.display())));
        }
    }
    if images.is_empty() {
        return Err(failed(path, format!("no images here, expected {}", EXTENSIONS.join(", "))));
    }
    Ok(images)
}

/// Appends the images below `folder` to `images`, sorted by name within each folder.
fn collect(folder: &Path, images: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        // A symbolic link to a folder is not followed: it may be a cycle.
        if entry.file_type()?.is_dir() {
            collect(&path, images)?;
        } else if is_picture(&path) && path.is_file() {
            images.push(path);
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
    fn lists_a_folder_sorted_and_a_text_file_in_its_order() {
        let dir = folder();
        let names = |images: Vec<PathBuf>| -> Vec<String> {
            images.iter().map(|p| p.strip_prefix(dir.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names(images(dir.path()).unwrap()), ["a/1.jpg", "b/2.JPG", "c.webp"]);
        let list = dir.path().join("list.txt");
        fs::write(&list, "c.webp\n\na/1.jpg\n").unwrap();
        assert_eq!(names(images(&list).unwrap()), ["c.webp", "a/1.jpg"]);
        fs::write(&list, "gone.jpg\n").unwrap();
        assert!(images(&list).unwrap_err().to_string().contains("gone.jpg: listed in"));
    }

    #[test]
    fn the_error_names_a_folder_without_images() {
        let dir = tempfile::tempdir().unwrap();
        let error = images(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&dir.path().display().to_string()) && error.contains("no images"), "{error}");
        assert!(images(&dir.path().join("none")).is_err());
    }

    #[test]
    fn ends_after_the_last_image_or_loops_and_reports_a_file_that_is_too_large() {
        let dir = folder();
        let paths = images(dir.path()).unwrap();
        let mut once = Replay::new(paths.clone(), Pace::new(0), false, 100);
        once.open().unwrap();
        let origin = |next: NextFrame| match next {
            NextFrame::Frame(frame) => frame.origin,
            _ => None,
        };
        for path in &paths {
            assert_eq!(origin(once.next(Duration::ZERO).unwrap()).as_ref(), Some(path));
        }
        assert!(matches!(once.next(Duration::ZERO), Ok(NextFrame::Ended)));

        let mut looped = Replay::new(paths[..1].to_vec(), Pace::new(0), true, 100);
        looped.open().unwrap();
        for _ in 0..3 {
            assert_eq!(origin(looped.next(Duration::ZERO).unwrap()).as_ref(), paths.first());
        }
        let mut bounded = Replay::new(paths, Pace::new(0), false, 3);
        let NextFrame::Broken(error) = bounded.next(Duration::ZERO).unwrap() else {
            panic!("expected a broken frame for a file that is too large")
        };
        assert!(error.contains("7 bytes, more than the 3 allowed"), "{error}");
    }
}
