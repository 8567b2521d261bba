//! Downloads that go on where they were broken off, and are checked before anybody sees them.

pub mod flower_photos;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

/// How long a server may take to answer, and to send anything at all.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest that one connection may last; what came so far is kept.
const CONNECTION: Duration = Duration::from_secs(3600);
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
    #[error("{url}: got {got}, expected {expected}; what came was deleted")]
    Other { url: String, got: String, expected: String },
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
    let mut attempt = 1;
    loop {
        let there = file.metadata().map_err(failed)?.len();
        if there >= wanted.bytes {
            break;
        }
        match go_on(wanted, &mut file, there, progress) {
            Ok(()) => {}
            Err(error @ FetchError::Http { .. }) => {
                let came = file.metadata().map_err(failed)?.len() > there;
                if attempt >= ATTEMPTS || !came {
                    return Err(error);
                }
                attempt += 1;
            }
            Err(error) => return Err(error),
        }
    }
    drop(file);
    check(wanted, &part)?;
    fs::rename(&part, to).map_err(|source| FetchError::Io { path: to.into(), source })
}

/// Asks for what is missing, and adds it. A server that cannot begin in the middle sends all of it.
fn go_on(wanted: &Wanted, file: &mut File, there: u64, progress: &dyn Fn(u64, u64)) -> Result<(), FetchError> {
    let http = |reason: String| FetchError::Http { url: wanted.url.clone(), reason };
    let io = |source| FetchError::Io { path: PathBuf::from(&wanted.url), source };
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_resolve(Some(PATIENCE))
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_recv_body(Some(CONNECTION))
        .build()
        .into();
    let mut request = agent.get(&wanted.url);
    if there > 0 {
        request = request.header("Range", format!("bytes={there}-"));
    }
    let response = request.call().map_err(|e| http(e.to_string()))?;
    let mut have = there;
    if there > 0 && response.status() != 206 {
        file.set_len(0).map_err(io)?;
        have = 0;
    }
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

/// The size and the hash; what is another file is deleted.
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
    let sha256: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if bytes == wanted.bytes && sha256 == wanted.sha256 {
        return Ok(());
    }
    fs::remove_file(part).map_err(failed)?;
    let told = |bytes: u64, sha256: &str| format!("{bytes} bytes, sha256 {sha256}");
    Err(FetchError::Other {
        url: wanted.url.clone(),
        got: told(bytes, &sha256),
        expected: told(wanted.bytes, &wanted.sha256),
    })
}
