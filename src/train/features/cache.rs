//! What the backbone said of a photograph, kept on the disk: a file a photograph, named by its content, in a
//! folder named by all else that decides the numbers.
//!
//! A file is `MAGIC`, the numbers, and the SHA-256 of both. One that was cut or altered counts as not there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::system::hash::hex;
use crate::train::data::photographs::Content;

const MAGIC: &[u8; 8] = b"bloomft1";
/// In the name of a file that is being written, and how old one is that nobody writes any more.
const PART: &str = "part-";
const ABANDONED: Duration = Duration::from_secs(3600);

/// The folder of one kind of numbers.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// `root/<kind>`, made where it is not there; `kind` names what decides the numbers beside the photograph.
    pub fn open(root: &Path, kind: &str) -> io::Result<Self> {
        let folder = root.join(kind);
        fs::create_dir_all(&folder)?;
        let cache = Cache { folder };
        cache.remove_abandoned()?;
        Ok(cache)
    }

    /// A run that was killed leaves the part that it was writing.
    fn remove_abandoned(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let old = || {
                entry
                    .metadata()
                    .and_then(|data| data.modified())
                    .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED))
            };
            if entry.file_name().to_string_lossy().contains(PART) && old() {
                // Another run may have been quicker.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// The numbers of a photograph, as they were written.
    pub fn read(&self, content: &Content) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(content)).ok()?;
        let numbers = bytes.len().checked_sub(32 + MAGIC.len())?;
        let sum = bytes.split_off(MAGIC.len() + numbers);
        if !bytes.starts_with(MAGIC) || Sha256::digest(&bytes)[..] != sum[..] {
            return None;
        }
        bytes.drain(..MAGIC.len());
        Some(bytes)
    }

    /// Writes beside the file and renames. Nothing is flushed to the disk: what a power cut tears is noticed.
    pub fn write(&self, content: &Content, numbers: &[u8]) -> io::Result<()> {
        let path = self.path(content);
        let mut sum = Sha256::new();
        sum.update(MAGIC);
        sum.update(numbers);
        // Two runs at once write the same numbers, each beside the file in its own.
        let part = path.with_extension(format!("{PART}{}", std::process::id()));
        let written = File::create(&part)
            .and_then(|mut file| {
                file.write_all(MAGIC)?;
                file.write_all(numbers)?;
                file.write_all(&sum.finalize())
            })
            .and_then(|()| fs::rename(&part, &path));
        if written.is_err() {
            // The reason stands in the error that is returned; a part that cannot be removed adds nothing.
            let _ = fs::remove_file(&part);
        }
        written
    }

    fn path(&self, content: &Content) -> PathBuf {
        self.folder.join(hex(content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_or_altered_counts_as_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), "kind").unwrap();
        let content = [7; 32];
        assert_eq!(cache.read(&content), None);
        cache.write(&content, b"numbers").unwrap();
        assert_eq!(cache.read(&content).unwrap(), b"numbers");
        assert_eq!(fs::read_dir(dir.path().join("kind")).unwrap().count(), 1, "no part is left");
        let path = cache.path(&content);
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(cache.read(&content), None, "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut altered = whole.clone();
            altered[at] ^= 1;
            fs::write(&path, altered).unwrap();
            assert_eq!(cache.read(&content), None, "altered at {at}");
        }
        cache.write(&content, b"again").unwrap();
        assert_eq!(cache.read(&content).unwrap(), b"again");
        assert_eq!(Cache::open(dir.path(), "other").unwrap().read(&content), None);
        fs::remove_dir_all(dir.path().join("kind")).unwrap();
        assert!(cache.write(&content, b"x").is_err());
    }
}
