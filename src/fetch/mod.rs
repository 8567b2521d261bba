//! Downloads that resume after an interruption and are verified before they take their final name.

pub mod flower_photos;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::system::hash::hex;

/// Timeout of each step of a request: name resolution, connection, response header, and each read of the body.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The most connections for one download, each of which resumes where the previous one ended.
const ATTEMPTS: usize = 5;

/// A file to download, with the size and the checksum that its publisher lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// HTTP or HTTPS address.
    pub url: String,
    /// Size, in bytes.
    pub bytes: u64,
    /// SHA-256, 64 hexadecimal digits.
    pub sha256: String,
}

/// An error of a download.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The server cannot be reached, answers with an error, or closes the connection early.
    #[error("{url}: {reason}")]
    Http {
        /// Address of the file.
        url: String,
        /// HTTP status or cause.
        reason: String,
    },
    /// A local file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The downloaded file has another size or checksum.
    #[error("{path} from {url}: got {got}, expected {expected}")]
    Mismatch {
        /// Path of the downloaded file.
        path: PathBuf,
        /// Address of the file.
        url: String,
        /// Actual size and SHA-256.
        got: String,
        /// Listed size and SHA-256.
        expected: String,
    },
    /// The server's file is not longer than the partial download (HTTP status 416).
    #[error("{url}: range not satisfiable: the server's file is not longer than the partial download")]
    RangeNotSatisfiable {
        /// Address of the file.
        url: String,
    },
    /// Another process holds the lock of the partial download; its path.
    #[error("{0}: another process is downloading this file")]
    Busy(PathBuf),
    /// The archive cannot be unpacked.
    #[error("{path}: {reason}")]
    Unpack {
        /// Path of the archive.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
}

/// Downloads to `to`, through a file beside it with the extension `part`, from which a later call resumes. Calls `progress`
/// with the number of downloaded bytes and the total.
///
/// # Errors
///
/// [`FetchError`] if the file cannot be downloaded or written, or differs from the listed size and checksum; such a file is
/// deleted.
pub fn download(source: &Download, to: &Path, progress: &dyn Fn(u64, u64)) -> Result<(), FetchError> {
    let part = to.with_added_extension("part");
    let failed = |source| FetchError::Io { path: part.clone(), source };
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).map_err(|source| FetchError::Io { path: folder.into(), source })?;
    }
    let mut file = OpenOptions::new().create(true).append(true).open(&part).map_err(failed)?;
    if file.try_lock().is_err() {
        return Err(FetchError::Busy(part));
    }
    let resumed = file.metadata().map_err(failed)?.len() > 0;
    let mut result = complete(source, &mut file, &part, progress).and_then(|()| verify(source, &part));
    if resumed && matches!(result, Err(FetchError::Mismatch { .. } | FetchError::RangeNotSatisfiable { .. })) {
        // The partial download may have been of another file: starts again from the first byte.
        file.set_len(0).map_err(failed)?;
        result = complete(source, &mut file, &part, progress).and_then(|()| verify(source, &part));
    }
    if matches!(result, Err(FetchError::Mismatch { .. })) {
        fs::remove_file(&part).map_err(failed)?;
    }
    result?;
    fs::rename(&part, to).map_err(|source| FetchError::Io { path: to.into(), source })
}

/// Sends requests until the file is complete, as long as each one receives some bytes.
fn complete(source: &Download, file: &mut File, part: &Path, progress: &dyn Fn(u64, u64)) -> Result<(), FetchError> {
    let length = |file: &File| {
        let metadata = file.metadata().map_err(|source| FetchError::Io { path: part.into(), source })?;
        Ok::<_, FetchError>(metadata.len())
    };
    let mut attempt = 1;
    loop {
        let offset = length(file)?;
        if offset >= source.bytes {
            return Ok(());
        }
        match resume(source, file, part, offset, progress) {
            Err(error @ FetchError::Http { .. }) if attempt >= ATTEMPTS || length(file)? <= offset => {
                return Err(error);
            }
            Err(FetchError::Http { .. }) => attempt += 1,
            result => result?,
        }
    }
}

/// Requests the bytes from `offset` on and appends them. If the server does not support ranges, it sends the whole file,
/// which replaces the partial one.
fn resume(
    source: &Download,
    file: &mut File,
    part: &Path,
    offset: u64,
    progress: &dyn Fn(u64, u64),
) -> Result<(), FetchError> {
    let http = |reason: String| FetchError::Http { url: source.url.clone(), reason };
    let io = |source| FetchError::Io { path: part.into(), source };
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_resolve(Some(TIMEOUT))
        .timeout_connect(Some(TIMEOUT))
        .timeout_recv_response(Some(TIMEOUT))
        .timeout_per_read(Some(TIMEOUT))
        .http_status_as_error(false)
        .build()
        .into();
    let mut request = agent.get(&source.url);
    if offset > 0 {
        request = request.header("Range", format!("bytes={offset}-"));
    }
    let response = request.call().map_err(|e| http(e.to_string()))?;
    let mut received = match response.status().as_u16() {
        206 => offset,
        200 => {
            file.set_len(0).map_err(io)?;
            0
        }
        416 => return Err(FetchError::RangeNotSatisfiable { url: source.url.clone() }),
        status => return Err(http(format!("HTTP status {status}, expected 200 or 206"))),
    };
    // One byte more than listed suffices to detect a file that is too long.
    let mut body = response.into_body().into_reader().take(source.bytes + 1 - received);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = body.read(&mut buffer).map_err(|e| http(e.to_string()))?;
        if read == 0 {
            break;
        }
        file.write_all(&buffer[..read]).map_err(io)?;
        received += read as u64;
        progress(received.min(source.bytes), source.bytes);
    }
    if received < source.bytes {
        return Err(http(format!("ended after {received} of {} bytes", source.bytes)));
    }
    Ok(())
}

/// Verifies the size and the checksum of the file at `path`.
fn verify(source: &Download, path: &Path) -> Result<(), FetchError> {
    let failed = |source| FetchError::Io { path: path.into(), source };
    let mut file = File::open(path).map_err(failed)?;
    let (mut hasher, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 16]);
    loop {
        let read = file.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        bytes += read as u64;
    }
    let sha256 = hex(&hasher.finalize());
    if bytes == source.bytes && sha256.eq_ignore_ascii_case(&source.sha256) {
        return Ok(());
    }
    let describe = |bytes: u64, sha256: &str| format!("{bytes} bytes, sha256 {sha256}");
    Err(FetchError::Mismatch {
        path: path.into(),
        url: source.url.clone(),
        got: describe(bytes, &sha256),
        expected: describe(source.bytes, &source.sha256),
    })
}
