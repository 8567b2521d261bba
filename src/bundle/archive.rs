//! The container of a bundle: a canonical tar within limits, read from memory and written atomically.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Largest bundle file, in bytes; a bundle with a ResNet50 inside is smaller.
pub const FILE_BYTES_MAX: u64 = 128 << 20;
/// Most members of a bundle.
pub const MEMBERS_MAX: usize = 8;

/// An error of reading or writing the container of a bundle.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file cannot be read or written.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The file is larger than [`FILE_BYTES_MAX`].
    #[error("larger than the {FILE_BYTES_MAX} bytes allowed")]
    TooLarge,
    /// The file is not a tar, is truncated, or has no members; the reason.
    #[error("not a bundle: {0}")]
    Tar(String),
    /// A member is not a regular file, or its name has a path separator or begins with a dot; the name.
    #[error("{0}: not the name of a plain file")]
    Name(String),
    /// Two members have the same name; the name.
    #[error("duplicate member {0}")]
    Duplicate(String),
    /// There are more than [`MEMBERS_MAX`] members.
    #[error("more members than the {MEMBERS_MAX} allowed")]
    TooMany,
    /// A member is not part of the format, or is in the wrong place; its name.
    #[error("{0}: unknown member, or in the wrong order")]
    Unexpected(String),
    /// A required member is missing; its name.
    #[error("{0} is missing")]
    Missing(String),
    /// A member is larger than allowed.
    #[error("{name}: {bytes} bytes, expected at most {max}")]
    LargeMember {
        /// Name of the member.
        name: &'static str,
        /// Size of the member, in bytes.
        bytes: usize,
        /// Largest allowed size, in bytes.
        max: usize,
    },
    /// The bytes are not those that [`pack`] writes for these members; the offset of the first difference.
    #[error("not a canonical tar: unexpected content at byte {0}")]
    NotCanonical(usize),
}

/// The members of a bundle by name, in the order of the file.
#[derive(Debug)]
pub struct Members(Vec<(String, Vec<u8>)>);

impl Members {
    /// Returns the content of a member, if there is one of this name.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().find(|(member, _)| *member == name).map(|(_, content)| content)
    }

    /// Removes a member and returns its content, if there is one of this name.
    pub fn take(&mut self, name: &str) -> Option<Vec<u8>> {
        let index = self.0.iter().position(|(member, _)| member == name);
        index.map(|index| self.0.remove(index).1)
    }

    /// Removes a member and returns its content.
    ///
    /// # Errors
    /// If there is no member of this name.
    pub fn require(&mut self, name: &str) -> Result<Vec<u8>, ArchiveError> {
        self.take(name).ok_or_else(|| ArchiveError::Missing(name.into()))
    }

    /// Removes a member of at most `max` bytes and returns its content.
    ///
    /// # Errors
    /// If there is no member of this name, or it is larger.
    pub fn require_at_most(&mut self, name: &'static str, max: usize) -> Result<Vec<u8>, ArchiveError> {
        let content = self.require(name)?;
        match content.len() {
            bytes if bytes > max => Err(ArchiveError::LargeMember { name, bytes, max }),
            _ => Ok(content),
        }
    }

    /// Returns the names and contents, as [`pack`] takes them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, content)| (name.as_str(), content.as_slice()))
    }
}

/// Reads a file of at most [`FILE_BYTES_MAX`] bytes.
///
/// # Errors
/// If the file cannot be read or is too large.
pub fn read_file(path: &Path) -> Result<Vec<u8>, ArchiveError> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(ArchiveError::TooLarge);
    }
    Ok(bytes)
}

/// Reads the members of a tar. Allocates for a member as many bytes as there are, not the size in its header.
///
/// # Errors
/// If the bytes are not exactly those that [`pack`] writes for these members, a name is duplicate or not that of a plain file, or
/// there are more than [`MEMBERS_MAX`] members.
pub fn unpack(bytes: &[u8]) -> Result<Members, ArchiveError> {
    let invalid = |e: io::Error| ArchiveError::Tar(e.to_string());
    // The library's message quotes the bytes of the header.
    let invalid_header = |_: io::Error| ArchiveError::Tar("invalid tar header".into());
    let mut archive = tar::Archive::new(bytes);
    let mut members: Vec<(String, Vec<u8>)> = Vec::new();
    for entry in archive.entries().map_err(invalid)? {
        let mut entry = entry.map_err(invalid_header)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if !entry.header().entry_type().is_file() || name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(ArchiveError::Name(name));
        }
        if members.iter().any(|(member, _)| *member == name) {
            return Err(ArchiveError::Duplicate(name));
        }
        if members.len() == MEMBERS_MAX {
            return Err(ArchiveError::TooMany);
        }
        let declared_bytes = entry.size();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).map_err(invalid)?;
        if content.len() as u64 != declared_bytes {
            return Err(ArchiveError::Tar(format!("{name} is truncated")));
        }
        members.push((name, content));
    }
    if members.is_empty() {
        return Err(ArchiveError::Tar("empty".into()));
    }
    let members = Members(members);
    expect_canonical(bytes, &members)?;
    Ok(members)
}

/// Checks that the bytes are those that [`pack`] writes for these members, so that every byte of a bundle is significant.
fn expect_canonical(bytes: &[u8], members: &Members) -> Result<(), ArchiveError> {
    let mut writer = CompareWriter { expected: bytes };
    let packed = pack_to(&mut writer, members.iter());
    let offset = bytes.len() - writer.expected.len();
    if packed.is_err() || !writer.expected.is_empty() { Err(ArchiveError::NotCanonical(offset)) } else { Ok(()) }
}

/// A writer that fails at the first byte that differs from the expected ones.
struct CompareWriter<'a> {
    /// The bytes that have not been compared yet.
    expected: &'a [u8],
}

impl Write for CompareWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let equal = bytes.iter().zip(self.expected).take_while(|(a, b)| a == b).count();
        self.expected = &self.expected[equal..];
        if equal == bytes.len() { Ok(equal) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a tar of these members. The result is deterministic: headers have no times and no owners.
///
/// # Panics
/// If a name does not fit into a tar header.
pub fn pack<'a>(members: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack_to(&mut bytes, members).expect("writing to memory cannot fail, and names are short");
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

/// Extension of a file that is being written.
pub const PART: &str = "part";

/// Replaces a file atomically: writes a temporary file beside it, syncs it to the disk, and renames it.
///
/// # Errors
/// If the bytes are more than [`FILE_BYTES_MAX`], or writing fails; the old file then stays and the temporary one is removed.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), ArchiveError> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(ArchiveError::TooLarge);
    }
    let temporary = path.with_added_extension(PART);
    // Readable for the daemon also if root installs a model with a strict umask.
    let readable = Permissions::from_mode(0o644);
    let written = File::create(&temporary)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.set_permissions(readable)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The returned error has the cause; a failure to remove the temporary file adds nothing.
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
    fn rejects_paths_duplicates_and_too_many_members() {
        let unpack_packed = |members: &[(&str, &[u8])]| unpack(&pack(members.iter().copied())).map(|_| ());
        assert!(matches!(unpack_packed(&[("a/b", b"x")]), Err(ArchiveError::Name(_))));
        assert!(matches!(unpack_packed(&[(".hidden", b"x")]), Err(ArchiveError::Name(_))));
        assert!(matches!(unpack_packed(&[("a", b"x"), ("a", b"y")]), Err(ArchiveError::Duplicate(_))));
        let nine: Vec<_> = ["a", "b", "c", "d", "e", "f", "g", "h", "i"].map(|n| (n, b"".as_slice())).into();
        assert!(matches!(unpack_packed(&nine), Err(ArchiveError::TooMany)));
        assert!(matches!(unpack(b""), Err(ArchiveError::Tar(_))));
    }

    #[test]
    fn rejects_a_member_shorter_than_its_header_states() {
        let mut bytes = pack([("a", [7; 100].as_slice())]);
        let mut header = tar::Header::new_ustar();
        header.set_path("a").unwrap();
        header.set_size(1 << 40);
        header.set_cksum();
        bytes[..512].copy_from_slice(header.as_bytes());
        assert!(matches!(unpack(&bytes), Err(ArchiveError::Tar(_))));
    }

    #[test]
    fn every_byte_is_significant() {
        let bytes = pack([("a", [7; 100].as_slice()), ("b", b"x")]);
        for offset in 0..bytes.len() {
            for mask in [1, 32, 128] {
                let mut changed = bytes.clone();
                changed[offset] ^= mask;
                let same = unpack(&changed).is_ok_and(|members| {
                    members.iter().collect::<Vec<_>>() == [("a", [7; 100].as_slice()), ("b", b"x")]
                });
                assert!(!same, "byte {offset} is not significant");
            }
        }
        assert!(unpack(&[&bytes[..], &[0; 512]].concat()).is_err(), "longer");
        assert!(unpack(&bytes[..bytes.len() - 512]).is_err(), "shorter");
    }
}
