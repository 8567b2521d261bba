//! Who vouches for a model: Ed25519 keys in files that `openssl` reads as well, and signatures.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey, KeypairBytes};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use crate::system::hash::{hex, sha256_hex};

/// DeliveryStatus of a public key's file.
pub const PUBLIC: &str = "pub";
/// A key's file is far smaller.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Keys in a folder that are trusted; more are a mistake.
const KEYS_MAX: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("{path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("{0}: is there already; a key is never overwritten")]
    There(PathBuf),
    #[error("{path}: others may read it (mode {mode:03o}); `chmod 600` makes it yours alone")]
    Open { path: PathBuf, mode: u32 },
    #[error("no random numbers from the system: {0}")]
    Random(String),
}

impl KeyError {
    fn file(path: &Path, reason: impl fmt::Display) -> Self {
        KeyError::File { path: path.into(), reason: reason.to_string() }
    }
}

/// What signs. Never printed.
pub struct PrivateKey(SigningKey);

/// What a signature is checked against.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PrivateKey {
    /// A new key in `path`, which only its owner may read, and its public half beside it, whose path is given.
    pub fn generate(path: &Path) -> Result<PathBuf, KeyError> {
        let public = path.with_extension(PUBLIC);
        if public == path {
            return Err(KeyError::file(path, format_args!("expected another ending than .{PUBLIC}")));
        }
        if let Some(there) = [path, &public].into_iter().find(|path| path.exists()) {
            return Err(KeyError::There(there.into()));
        }
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|e| KeyError::Random(e.to_string()))?;
        let key = SigningKey::from_bytes(&seed);
        // Without the public half, which OpenSSL 3.0 does not take in a private key's file.
        let alone = KeypairBytes { secret_key: seed, public_key: None };
        let text = alone.to_pkcs8_pem(LineEnding::LF).expect("a key can be written as PEM");
        create(path, 0o600, text.as_bytes())?;
        create(&public, 0o644, PublicKey(key.verifying_key()).to_pem().as_bytes()).inspect_err(|_| {
            // Half a pair is none, and would be in the way; the reason stands in the error that is returned.
            let _ = fs::remove_file(path);
        })?;
        Ok(public)
    }

    /// Reads a PKCS#8 PEM file that nobody else may read.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let key = SigningKey::from_pkcs8_pem(&read(path)?);
        let key = key.map_err(|e| KeyError::file(path, format_args!("no private Ed25519 key in PEM: {e}")))?;
        match fs::metadata(path).map_err(|e| KeyError::file(path, e))?.permissions().mode() & 0o777 {
            mode if mode & 0o077 != 0 => Err(KeyError::Open { path: path.into(), mode }),
            _ => Ok(PrivateKey(key)),
        }
    }

    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    pub fn sign(&self, message: &[u8]) -> Signed {
        Signed { key: self.public(), signature: self.0.sign(message) }
    }
}

impl PublicKey {
    /// Reads an SPKI PEM file.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let key = VerifyingKey::from_public_key_pem(&read(path)?);
        key.map(PublicKey).map_err(|e| KeyError::file(path, format_args!("no public Ed25519 key in PEM: {e}")))
    }

    /// What people call it: the first half of its hash.
    pub fn id(&self) -> String {
        sha256_hex(self.0.as_bytes())[..16].to_owned()
    }

    fn to_pem(self) -> String {
        self.0.to_public_key_pem(LineEnding::LF).expect("a key can be written as PEM")
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.id())
    }
}

/// A signature, and the key that it says it was made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signed {
    key: PublicKey,
    signature: Signature,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("{0} bytes, expected {len}", len = Signed::BYTES)]
    Length(usize),
    #[error("its first 32 bytes are no key")]
    Key,
    #[error("does not fit: the content, the signature or the key was altered")]
    Altered,
}

impl Signed {
    /// The key, 32, and the signature, 64.
    pub const BYTES: usize = 96;

    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..32].copy_from_slice(self.key.0.as_bytes());
        bytes[32..].copy_from_slice(&self.signature.to_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SignatureError> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().map_err(|_| SignatureError::Length(bytes.len()))?;
        let (key, signature) = bytes.split_at(32);
        let key: [u8; 32] = key.try_into().expect("split at 32");
        let key = VerifyingKey::from_bytes(&key).map_err(|_| SignatureError::Key)?;
        let signature = Signature::from_slice(signature).map_err(|_| SignatureError::Altered)?;
        Ok(Signed { key: PublicKey(key), signature })
    }

    /// The key that vouches for `message`, which is not thereby a key that anybody trusts.
    pub fn check(&self, message: &[u8]) -> Result<PublicKey, SignatureError> {
        self.key.0.verify_strict(message, &self.signature).map_err(|_| SignatureError::Altered)?;
        Ok(self.key)
    }

    /// In hexadecimal, for a message.
    pub fn to_text(&self) -> String {
        hex(&self.to_bytes())
    }

    pub fn from_text(text: &str) -> Result<Self, SignatureError> {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let pair = |pair: &[u8]| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?);
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        Self::from_bytes(&bytes.ok_or(SignatureError::Length(text.len() / 2))?)
    }
}

/// The keys that a device, or whoever asks, trusts.
#[derive(Debug, Clone, Default)]
pub struct Keyring(Vec<(String, PublicKey)>);

/// Why a signature is not enough.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UntrustedSigner {
    #[error("it is not signed")]
    Unsigned,
    #[error("no key is trusted here")]
    NoKeys,
    #[error("it is signed by the key {signer}, which is not trusted here; trusted: {trusted}")]
    Stranger { signer: String, trusted: String },
}

impl Keyring {
    /// Every `*.pub` in a folder. A folder that is not there, or no folder at all, trusts nobody.
    pub fn read(folder: &Path) -> Result<Self, KeyError> {
        if folder.as_os_str().is_empty() {
            return Ok(Keyring::default());
        }
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Keyring::default()),
            entries => entries.map_err(|e| KeyError::file(folder, e))?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| KeyError::file(folder, e))?.path();
            if path.extension().is_some_and(|ending| ending == PUBLIC) {
                files.push(path);
            }
        }
        if files.len() > KEYS_MAX {
            return Err(KeyError::file(folder, format_args!("{} keys, expected at most {KEYS_MAX}", files.len())));
        }
        files.sort();
        let named = |path: &PathBuf| {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            Ok((name, PublicKey::read(path)?))
        };
        files.iter().map(named).collect::<Result<_, _>>().map(Keyring)
    }

    /// One key.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Keyring(vec![(name, PublicKey::read(path)?)]))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The name of the trusted key that signed.
    pub fn trust(&self, signer: Option<&PublicKey>) -> Result<&str, UntrustedSigner> {
        let signer = signer.ok_or(UntrustedSigner::Unsigned)?;
        let trusted = self.0.iter().find(|(_, key)| key == signer);
        trusted.map(|(name, _)| name.as_str()).ok_or_else(|| match self.0.is_empty() {
            true => UntrustedSigner::NoKeys,
            false => UntrustedSigner::Stranger { signer: signer.id(), trusted: self.names() },
        })
    }

    fn names(&self) -> String {
        let named: Vec<String> = self.0.iter().map(|(name, key)| format!("{name} ({})", key.id())).collect();
        named.join(", ")
    }
}

fn read(path: &Path) -> Result<String, KeyError> {
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|e| KeyError::file(path, e))?;
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|e| KeyError::file(path, e))?;
    Ok(text)
}

/// A new file, whole or not there.
fn create(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), KeyError> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => KeyError::There(path.into()),
            _ => KeyError::file(path, e),
        })?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| {
        // The reason stands in the error that is returned.
        let _ = fs::remove_file(path);
        KeyError::file(path, e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trainer.key");
        let public = PrivateKey::generate(&path).unwrap();
        assert_eq!(public, dir.path().join("trainer.pub"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let key = PrivateKey::read(&path).unwrap();
        assert_eq!(key.public(), PublicKey::read(&public).unwrap());
        let before = fs::read(&path).unwrap();
        assert!(matches!(PrivateKey::generate(&path), Err(KeyError::There(there)) if there == path));
        fs::remove_file(&path).unwrap();
        assert!(matches!(PrivateKey::generate(&path), Err(KeyError::There(there)) if there == public));
        fs::write(&path, before).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = PrivateKey::read(&path).err().unwrap().to_string();
        assert!(error.contains("mode 640"), "{error}");
        assert!(PrivateKey::generate(&public).is_err(), "a private key that is called public");
        assert!(PublicKey::read(&path).unwrap_err().to_string().contains("no public Ed25519 key"));
    }

    #[test]
    fn only_what_was_signed_by_a_trusted_key_is_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let key = |name: &str| {
            let path = dir.path().join(name);
            PrivateKey::generate(&path).unwrap();
            PrivateKey::read(&path).unwrap()
        };
        let (ours, theirs) = (key("ours.key"), key("theirs.secret"));
        fs::rename(dir.path().join("theirs.pub"), dir.path().join("theirs.pub.off")).unwrap();
        let ring = Keyring::read(dir.path()).unwrap();
        let signed = ours.sign(b"flowers");
        assert_eq!(ring.trust(Some(&signed.check(b"flowers").unwrap())), Ok("ours"));
        assert_eq!(signed.check(b"flower"), Err(SignatureError::Altered));
        assert_eq!(Signed::from_text(&signed.to_text()), Ok(signed));
        for text in ["", "zz", "0", &signed.to_text()[1..], &format!("{}ä", signed.to_text())] {
            assert!(Signed::from_text(text).is_err(), "{text}");
        }
        let stranger = theirs.sign(b"flowers").check(b"flowers").unwrap();
        let distrust = ring.trust(Some(&stranger)).unwrap_err().to_string();
        assert!(distrust.contains(&stranger.id()) && distrust.contains("ours ("), "{distrust}");
        assert_eq!(ring.trust(None), Err(UntrustedSigner::Unsigned));
        let nobody = Keyring::read(&dir.path().join("none")).unwrap();
        assert_eq!(nobody.trust(Some(&stranger)), Err(UntrustedSigner::NoKeys));
        fs::write(dir.path().join("bad.pub"), "no key").unwrap();
        assert!(Keyring::read(dir.path()).unwrap_err().to_string().contains("bad.pub: no public Ed25519 key"));
    }
}
