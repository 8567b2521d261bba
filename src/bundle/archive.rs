//! The bundle as a file: a tar within limits, read from memory and written whole or not at all.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

/// A bundle that carries a ResNet50 stays below these.
pub const FILE_BYTES_MAX: u64 = 128 << 20;
pub const MEMBERS_MAX: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("larger than the {FILE_BYTES_MAX} bytes allowed")]
    TooLarge,
    #[error("no bundle: {0}")]
    Tar(String),
    #[error("{0}: not the name of a plain file")]
    Name(String),
    #[error("{0} stands in it twice")]
    Double(String),
    #[error("more than {MEMBERS_MAX} members")]
    TooMany,
    #[error("{0}: no member of a bundle, or out of its place")]
    Unexpected(String),
    #[error("{0} is missing")]
    Missing(String),
    #[error("{name}: {bytes} bytes, expected at most {max}")]
    LargeMember { name: &'static str, bytes: usize, max: usize },
    #[error("no bundle as this program writes it: byte {0} is another")]
    Strange(usize),
}

/// The members of a bundle by name, in the order of the file.
#[derive(Debug)]
pub struct Members(Vec<(String, Vec<u8>)>);

impl Members {
    pub fn take(&mut self, name: &str) -> Option<Vec<u8>> {
        let at = self.0.iter().position(|(there, _)| there == name);
        at.map(|at| self.0.remove(at).1)
    }

    pub fn require(&mut self, name: &str) -> Result<Vec<u8>, ArchiveError> {
        self.take(name).ok_or_else(|| ArchiveError::Missing(name.into()))
    }

    /// What [`Self::require`] gives, where it is no larger than `max`.
    pub fn require_small(&mut self, name: &'static str, max: usize) -> Result<Vec<u8>, ArchiveError> {
        let content = self.require(name)?;
        match content.len() {
            bytes if bytes > max => Err(ArchiveError::LargeMember { name, bytes, max }),
            _ => Ok(content),
        }
    }

    /// The members as [`pack`] takes them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, content)| (name.as_str(), content.as_slice()))
    }
}

/// Reads a file, no more of it than a bundle may have.
pub fn read_file(path: &Path) -> Result<Vec<u8>, ArchiveError> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(ArchiveError::TooLarge);
    }
    Ok(bytes)
}

/// in: a whole tar, as [`pack`] writes it, to the last byte. What a header claims is never allocated: a member is copied
/// from the bytes there.
pub fn unpack(bytes: &[u8]) -> Result<Members, ArchiveError> {
    let tar = |e: io::Error| ArchiveError::Tar(e.to_string());
    let mut archive = tar::Archive::new(bytes);
    let mut members: Vec<(String, Vec<u8>)> = Vec::new();
    for entry in archive.entries().map_err(tar)? {
        let mut entry = entry.map_err(tar)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if !entry.header().entry_type().is_file() || name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(ArchiveError::Name(name));
        }
        if members.iter().any(|(there, _)| *there == name) {
            return Err(ArchiveError::Double(name));
        }
        if members.len() == MEMBERS_MAX {
            return Err(ArchiveError::TooMany);
        }
        let claimed = entry.size();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).map_err(tar)?;
        if content.len() as u64 != claimed {
            return Err(ArchiveError::Tar(format!("{name} is cut short")));
        }
        members.push((name, content));
    }
    if members.is_empty() {
        return Err(ArchiveError::Tar("empty".into()));
    }
    let members = Members(members);
    expect_same(bytes, &members)?;
    Ok(members)
}

/// Refuses whatever differs from what these members are packed into: no byte of a bundle is without a meaning.
fn expect_same(bytes: &[u8], members: &Members) -> Result<(), ArchiveError> {
    let mut same = Same { rest: bytes };
    let packed = pack_to(&mut same, members.iter());
    let at = bytes.len() - same.rest.len();
    if packed.is_err() || !same.rest.is_empty() { Err(ArchiveError::Strange(at)) } else { Ok(()) }
}

/// Takes what is written to it only where it goes on with the same bytes.
struct Same<'a> {
    rest: &'a [u8],
}

impl Write for Same<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let same = bytes.iter().zip(self.rest).take_while(|(a, b)| a == b).count();
        self.rest = &self.rest[same..];
        if same == bytes.len() { Ok(same) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The same members give the same bytes: no times, no owners.
pub fn pack<'a>(members: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack_to(&mut bytes, members).expect("memory takes short names and their bytes");
    bytes
}

fn pack_to<'a>(out: &mut impl Write, members: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> io::Result<()> {
    let mut builder = tar::Builder::new(out);
    for (name, content) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        builder.append_data(&mut header, name, content)?;
    }
    builder.finish()
}

/// DeliveryStatus of a file that is being written.
pub const PART: &str = "part";

/// Writes beside the file, flushes to the disk, and renames: there is the old file or the new one.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), ArchiveError> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(ArchiveError::TooLarge);
    }
    let temporary = path.with_added_extension(PART);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The reason stands in the error that is returned; a part that cannot be removed adds nothing.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_tricks_doubles_and_crowds_are_refused() {
        let unpack_of = |members: &[(&str, &[u8])]| unpack(&pack(members.iter().copied())).map(|_| ());
        assert!(matches!(unpack_of(&[("a/b", b"x")]), Err(ArchiveError::Name(_))));
        assert!(matches!(unpack_of(&[(".hidden", b"x")]), Err(ArchiveError::Name(_))));
        assert!(matches!(unpack_of(&[("a", b"x"), ("a", b"y")]), Err(ArchiveError::Double(_))));
        let crowd: Vec<_> = ["a", "b", "c", "d", "e", "f", "g", "h", "i"].map(|n| (n, b"".as_slice())).into();
        assert!(matches!(unpack_of(&crowd), Err(ArchiveError::TooMany)));
        assert!(matches!(unpack(b""), Err(ArchiveError::Tar(_))));
    }

    #[test]
    fn a_member_that_claims_more_than_is_there_is_cut_short() {
        let mut bytes = pack([("a", [7; 100].as_slice())]);
        let mut header = tar::Header::new_ustar();
        header.set_path("a").unwrap();
        header.set_size(1 << 40);
        header.set_cksum();
        bytes[..512].copy_from_slice(header.as_bytes());
        assert!(matches!(unpack(&bytes), Err(ArchiveError::Tar(_))));
    }

    #[test]
    fn every_byte_counts() {
        let bytes = pack([("a", [7; 100].as_slice()), ("b", b"x")]);
        for at in 0..bytes.len() {
            for bit in [1, 32, 128] {
                let mut changed = bytes.clone();
                changed[at] ^= bit;
                let same = unpack(&changed).is_ok_and(|members| {
                    members.iter().collect::<Vec<_>>() == [("a", [7; 100].as_slice()), ("b", b"x")]
                });
                assert!(!same, "byte {at} means nothing");
            }
        }
        assert!(unpack(&[&bytes[..], &[0; 512]].concat()).is_err(), "longer");
        assert!(unpack(&bytes[..bytes.len() - 512]).is_err(), "shorter");
    }
}
