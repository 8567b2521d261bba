//! TensorFlow's `flower_photos` dataset, five classes of flowers.

use std::fs::{self, File};
use std::path::Path;

use super::{Download, FetchError, download, verify};

/// Returns the published archive: 3,670 photographs in five folders, Creative Commons BY; its licence file lies beside the
/// folders.
pub fn archive() -> Download {
    Download {
        url: "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz".into(),
        // Size and checksum from TensorFlow Datasets (`datasets/tf_flowers/checksums.tsv`).
        bytes: 228_813_984,
        sha256: "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c".into(),
    }
}

/// Downloads the archive, unpacks it to `folder`, and deletes it. Calls `progress` with the number of downloaded bytes and
/// the total. The folder is renamed into place when it is complete; an existing folder that is not empty is left unchanged.
///
/// # Errors
///
/// [`FetchError`] if the archive cannot be downloaded, verified or unpacked.
pub fn fetch(source: &Download, folder: &Path, progress: &dyn Fn(u64, u64)) -> Result<(), FetchError> {
    let exists = folder.read_dir().is_ok_and(|mut entries| entries.next().is_some());
    if exists {
        return Ok(());
    }
    // The extension avoids an archive of the user's own beside the folder.
    let archive = folder.with_added_extension("fetched.tgz");
    if archive.exists() {
        verify(source, &archive)?;
    } else {
        download(source, &archive, progress)?;
    }
    let unpacked = folder.with_added_extension("fetched");
    let io = |path: &Path, result: std::io::Result<()>| {
        result.map_err(|source| FetchError::Io { path: path.into(), source })
    };
    if unpacked.exists() {
        io(&unpacked, fs::remove_dir_all(&unpacked))?;
    }
    let result = unpack(&archive, &unpacked).and_then(|()| {
        let inner = unpacked.join("flower_photos");
        io(folder, fs::rename(&inner, folder))
    });
    // Removed after a failure as well; the error that is returned is the first one.
    let _ = fs::remove_dir_all(&unpacked);
    result?;
    io(&archive, fs::remove_file(&archive))
}

fn unpack(archive: &Path, to: &Path) -> Result<(), FetchError> {
    let file = File::open(archive).map_err(|source| FetchError::Io { path: archive.into(), source })?;
    tar::Archive::new(flate2::read::GzDecoder::new(file))
        .unpack(to)
        .map_err(|e| FetchError::Unpack { path: archive.into(), reason: e.to_string() })
}
