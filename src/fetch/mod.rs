//! Downloads that go on where they were broken off, and are checked before anybody sees them.

pub mod flower_photos;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::system::hash::hex;

/// How long a server may take to answer, and how long it may send nothing.
const PATIENCE: Duration = Duration::from_secs(20);
/// Broken connections that are made again, each from where the last one ended.
const ATTEMPTS: usize = 5;

/// A file as its publisher lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub url: String,
    pub bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("{url}: {reason}")]
    Http { url: String, reason: String },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} from {url}: got {got}, expected {expected}")]
    Other { path: PathBuf, url: String, got: String, expected: String },
    #[error("{url}: the server's file is shorter than what is there of it")]
    NoPart { url: String },
    #[error("{0}: another download writes it")]
    Busy(PathBuf),
    #[error("{path}: {reason}")]
    Unpack { path: PathBuf, reason: String },
}

/// Downloads to `to`, through a file beside it that ends in `.part`; a later call goes on with that. `progress` is
/// told how many bytes of how many are there.
pub fn download(wanted: &Wanted, to: &Path, progress: &dyn Fn(u64, u64)) -> Result<(), FetchError> {
    let part = to.with_added_extension("part");
    let failed = |source| FetchError::Io { path: part.clone(), source };
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).map_err(|source| FetchError::Io { path: folder.into(), source })?;
    }
    let mut file = OpenOptions::new().create(true).append(true).open(&part).map_err(failed)?;
    if file.try_lock().is_err() {
        return Err(FetchError::Busy(part));
    }
    let found = file.metadata().map_err(failed)?.len();
    let mut result = complete(wanted, &mut file, &part, progress).and_then(|()| check(wanted, &part));
    if found > 0 && matches!(result, Err(FetchError::Other { .. } | FetchError::NoPart { .. })) {
        // What was there may have been the beginning of another file.
        file.set_len(0).map_err(failed)?;
        result = complete(wanted, &mut file, &part, progress).and_then(|()| check(wanted, &part));
    }
    if matches!(result, Err(FetchError::Other { .. })) {
        fs::remove_file(&part).map_err(failed)?;
    }
    result?;
    fs::rename(&part, to).map_err(|source| FetchError::Io { path: to.into(), source })
}

/// Asks until all is there, as long as something comes.
fn complete(wanted: &Wanted, file: &mut File, part: &Path, progress: &dyn Fn(u64, u64)) -> Result<(), FetchError> {
    let length = |file: &File| {
        let data = file.metadata().map_err(|source| FetchError::Io { path: part.into(), source })?;
        Ok::<_, FetchError>(data.len())
    };
    let mut attempt = 1;
    loop {
        let there = length(file)?;
        if there >= wanted.bytes {
            return Ok(());
        }
        match go_on(wanted, file, part, there, progress) {
            Err(error @ FetchError::Http { .. }) if attempt >= ATTEMPTS || length(file)? <= there => return Err(error),
            Err(FetchError::Http { .. }) => attempt += 1,
            result => result?,
        }
    }
}

/// Asks for what is missing, and adds it. A server that cannot begin in the middle sends all of it.
fn go_on(
    wanted: &Wanted,
    file: &mut File,
    part: &Path,
    there: u64,
    progress: &dyn Fn(u64, u64),
) -> Result<(), FetchError> {
    let http = |reason: String| FetchError::Http { url: wanted.url.clone(), reason };
    let io = |source| FetchError::Io { path: part.into(), source };
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_resolve(Some(PATIENCE))
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .http_status_as_error(false)
        .build()
        .into();
    let mut request = agent.get(&wanted.url);
    if there > 0 {
        request = request.header("Range", format!("bytes={there}-"));
    }
    let response = request.call().map_err(|e| http(e.to_string()))?;
    let mut have = match response.status().as_u16() {
        206 => there,
        200 => {
            file.set_len(0).map_err(io)?;
            0
        }
        // What is there is longer than the server's file.
        416 => return Err(FetchError::NoPart { url: wanted.url.clone() }),
        status => return Err(http(format!("the server answers {status}"))),
    };
    // One byte more than listed shows that it is another file.
    let mut body = response.into_body().into_reader().take(wanted.bytes + 1 - have);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = body.read(&mut buffer).map_err(|e| http(e.to_string()))?;
        if read == 0 {
            break;
        }
        file.write_all(&buffer[..read]).map_err(io)?;
        have += read as u64;
        progress(have.min(wanted.bytes), wanted.bytes);
    }
    if have < wanted.bytes {
        return Err(http(format!("ended after {have} of {} bytes", wanted.bytes)));
    }
    Ok(())
}

/// The size and the hash.
fn check(wanted: &Wanted, part: &Path) -> Result<(), FetchError> {
    let failed = |source| FetchError::Io { path: part.into(), source };
    let mut file = File::open(part).map_err(failed)?;
    let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 16]);
    loop {
        let read = file.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        bytes += read as u64;
    }
    let sha256 = hex(&hash.finalize());
    if bytes == wanted.bytes && sha256.eq_ignore_ascii_case(&wanted.sha256) {
        return Ok(());
    }
    let told = |bytes: u64, sha256: &str| format!("{bytes} bytes, sha256 {sha256}");
    Err(FetchError::Other {
        path: part.into(),
        url: wanted.url.clone(),
        got: told(bytes, &sha256),
        expected: told(wanted.bytes, &wanted.sha256),
    })
}
