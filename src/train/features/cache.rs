//! Extracted features on disk: a file per image, named by its content hash, in a folder per cache key.
//!
//! A file holds `MAGIC`, the values, and the SHA-256 of both. A truncated or altered file counts as missing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::system::hash::hex;
use crate::train::data::image_set::ContentHash;

const MAGIC: &[u8; 8] = b"bloomft1";
/// Bytes of a SHA-256 digest.
const DIGEST_BYTES: usize = 32;
/// Part of the name of a file that is being written.
const PARTIAL: &str = "part-";
/// Age after which a partial file belongs to a run that was killed.
const STALE_AFTER: Duration = Duration::from_secs(3600);

/// The folder of one cache key.
#[derive(Debug)]
pub struct FeatureCache {
    folder: PathBuf,
}

impl FeatureCache {
    /// Opens `root/key`, creating it if needed, and removes stale partial files. `key` names everything besides the image
    /// content that the values depend on.
    ///
    /// # Errors
    /// Fails if the folder cannot be created or read.
    pub fn open(root: &Path, key: &str) -> io::Result<Self> {
        let folder = root.join(key);
        fs::create_dir_all(&folder)?;
        let cache = FeatureCache { folder };
        cache.remove_stale()?;
        Ok(cache)
    }

    /// Removes the partial files that killed runs left.
    fn remove_stale(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let old = || {
                entry
                    .metadata()
                    .and_then(|data| data.modified())
                    .is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > STALE_AFTER))
            };
            if entry.file_name().to_string_lossy().contains(PARTIAL) && old() {
                // Another run may have removed it first.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// Returns the cached bytes of an image, or `None` if they are missing or damaged.
    pub fn read(&self, hash: &ContentHash) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.path(hash)).ok()?;
        let values = bytes.len().checked_sub(DIGEST_BYTES + MAGIC.len())?;
        let digest = bytes.split_off(MAGIC.len() + values);
        if !bytes.starts_with(MAGIC) || Sha256::digest(&bytes)[..] != digest[..] {
            return None;
        }
        bytes.drain(..MAGIC.len());
        Some(bytes)
    }

    /// Writes the bytes of an image to a temporary file and renames it. The file is not synced: the digest detects a write
    /// that a power failure interrupted.
    ///
    /// # Errors
    /// Fails if the file cannot be written or renamed.
    pub fn write(&self, hash: &ContentHash, values: &[u8]) -> io::Result<()> {
        let path = self.path(hash);
        let mut digest = Sha256::new();
        digest.update(MAGIC);
        digest.update(values);
        // The process id keeps concurrent runs from writing to the same temporary file.
        let partial = path.with_extension(format!("{PARTIAL}{}", std::process::id()));
        let written = File::create(&partial)
            .and_then(|mut file| {
                file.write_all(MAGIC)?;
                file.write_all(values)?;
                file.write_all(&digest.finalize())
            })
            .and_then(|()| fs::rename(&partial, &path));
        if written.is_err() {
            // The returned error names the cause; a failure to clean up adds nothing.
            let _ = fs::remove_file(&partial);
        }
        written
    }

    fn path(&self, hash: &ContentHash) -> PathBuf {
        self.folder.join(hex(hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_or_altered_files_count_as_missing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = FeatureCache::open(dir.path(), "key").unwrap();
        let hash = [7; 32];
        assert_eq!(cache.read(&hash), None);
        cache.write(&hash, b"values").unwrap();
        assert_eq!(cache.read(&hash).unwrap(), b"values");
        assert_eq!(fs::read_dir(dir.path().join("key")).unwrap().count(), 1, "no partial file is left");
        let path = cache.path(&hash);
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(cache.read(&hash), None, "truncated at {len}");
        }
        for at in 0..whole.len() {
            let mut altered = whole.clone();
            altered[at] ^= 1;
            fs::write(&path, altered).unwrap();
            assert_eq!(cache.read(&hash), None, "altered at {at}");
        }
        cache.write(&hash, b"again").unwrap();
        assert_eq!(cache.read(&hash).unwrap(), b"again");
        assert_eq!(FeatureCache::open(dir.path(), "other").unwrap().read(&hash), None);
        fs::remove_dir_all(dir.path().join("key")).unwrap();
        assert!(cache.write(&hash, b"x").is_err());
    }
}
