//! TensorFlow's five flowers.

use std::fs::{self, File};
use std::path::Path;

use super::{FetchError, Wanted, check, download};

/// 3,670 photographs in five folders, Creative Commons BY; its licence file lies beside the folders.
pub fn published() -> Wanted {
    Wanted {
        url: "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz".into(),
        // As TensorFlow Datasets lists them (`datasets/tf_flowers/checksums.tsv`).
        bytes: 228_813_984,
        sha256: "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c".into(),
    }
}

/// Downloads, unpacks to `folder`, and deletes the archive. The folder takes its name when all is unpacked: one that is
/// there is taken as it is.
pub fn fetch(wanted: &Wanted, folder: &Path, progress: &dyn Fn(u64, u64)) -> Result<(), FetchError> {
    // An empty folder is none.
    let filled = folder.read_dir().is_ok_and(|mut content| content.next().is_some());
    if filled {
        return Ok(());
    }
    // A name that nobody else gives to an archive of their own.
    let archive = folder.with_added_extension("fetched.tgz");
    if archive.exists() {
        check(wanted, &archive)?;
    } else {
        download(wanted, &archive, progress)?;
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
    // What is half unpacked serves nobody; why it is stands in the error.
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
