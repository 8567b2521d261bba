//! Ed25519 signatures, and keys in PEM files that `openssl` reads as well.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey, KeypairBytes};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use crate::system::hash::{hex, sha256_hex};

/// Extension of the file of a public key.
pub const PUBLIC: &str = "pub";
/// Most bytes that are read of a key file; a key takes about 120.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Most keys in a folder of trusted keys.
const KEYS_MAX: usize = 64;

/// An error of a key file.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file or folder cannot be read or written, or a file is not a valid key.
    #[error("{path}: {reason}")]
    File {
        /// Path of the file or folder.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// A file of a new key pair exists already; its path.
    #[error("{0}: already exists; a key is never overwritten")]
    AlreadyExists(PathBuf),
    /// The group or other users may access a private key.
    #[error("{path}: other users may read the key (mode {mode:03o}), expected `chmod 600`")]
    Permissions {
        /// Path of the key file.
        path: PathBuf,
        /// Permission bits of the file.
        mode: u32,
    },
    /// The system's random number generator fails; its message.
    #[error("cannot get random numbers from the system: {0}")]
    Random(String),
}

impl KeyError {
    fn file(path: &Path, reason: impl fmt::Display) -> Self {
        KeyError::File { path: path.into(), reason: reason.to_string() }
    }
}

/// A private Ed25519 key; has no `Debug` so that it is never printed.
pub struct PrivateKey(SigningKey);

/// A public Ed25519 key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PrivateKey {
    /// Generates a key pair: writes the private key to `path` with mode 600 and the public key beside it with the extension
    /// `.pub`. Returns the path of the public key.
    ///
    /// # Errors
    /// If `path` has the extension `.pub`, a file exists already or cannot be written, or the system has no random numbers.
    pub fn generate(path: &Path) -> Result<PathBuf, KeyError> {
        let public = path.with_extension(PUBLIC);
        if public == path {
            return Err(KeyError::file(path, format_args!("expected another extension than .{PUBLIC}")));
        }
        if let Some(existing) = [path, &public].into_iter().find(|path| path.exists()) {
            return Err(KeyError::AlreadyExists(existing.into()));
        }
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|e| KeyError::Random(e.to_string()))?;
        let key = SigningKey::from_bytes(&seed);
        // Without the public key, which OpenSSL 3.0 does not accept in a private key's file.
        let private = KeypairBytes { secret_key: seed, public_key: None };
        let text = private.to_pkcs8_pem(LineEnding::LF).expect("a key can be encoded as PEM");
        create(path, 0o600, text.as_bytes())?;
        create(&public, 0o644, PublicKey(key.verifying_key()).to_pem().as_bytes()).inspect_err(|_| {
            // A private key without its public key would block the next attempt; the returned error has the cause.
            let _ = fs::remove_file(path);
        })?;
        Ok(public)
    }

    /// Reads a PKCS#8 PEM file.
    ///
    /// # Errors
    /// If the file cannot be read, is not a private Ed25519 key, or other users may access it.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let key = SigningKey::from_pkcs8_pem(&read(path)?);
        let key = key.map_err(|e| KeyError::file(path, format_args!("not a private Ed25519 key in PEM: {e}")))?;
        match fs::metadata(path).map_err(|e| KeyError::file(path, e))?.permissions().mode() & 0o777 {
            mode if mode & 0o077 != 0 => Err(KeyError::Permissions { path: path.into(), mode }),
            _ => Ok(PrivateKey(key)),
        }
    }

    /// Returns the public key.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    /// Signs a message.
    pub fn sign(&self, message: &[u8]) -> DetachedSignature {
        DetachedSignature { key: self.public(), signature: self.0.sign(message) }
    }
}

impl PublicKey {
    /// Reads an SPKI PEM file.
    ///
    /// # Errors
    /// If the file cannot be read or is not a public Ed25519 key.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let key = VerifyingKey::from_public_key_pem(&read(path)?);
        key.map(PublicKey).map_err(|e| KeyError::file(path, format_args!("not a public Ed25519 key in PEM: {e}")))
    }

    /// Returns the key's id: the first 16 hexadecimal digits of its SHA-256.
    pub fn id(&self) -> String {
        sha256_hex(self.0.as_bytes())[..16].to_owned()
    }

    fn to_pem(self) -> String {
        self.0.to_public_key_pem(LineEnding::LF).expect("a key can be encoded as PEM")
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.id())
    }
}

/// A signature with the public key of its signer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetachedSignature {
    key: PublicKey,
    signature: Signature,
}

/// An error of a [`DetachedSignature`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The signature is not [`DetachedSignature::BYTES`] long, or not hexadecimal; its length in bytes.
    #[error("{0} bytes, expected {len}", len = DetachedSignature::BYTES)]
    Length(usize),
    /// The first 32 bytes are not a public Ed25519 key.
    #[error("its first 32 bytes are not an Ed25519 key")]
    Key,
    /// The signature does not match the message and the key.
    #[error("does not match: the content, the signature or the key was changed")]
    Altered,
}

impl DetachedSignature {
    /// Length of the encoding: the key, 32 bytes, and the signature, 64 bytes.
    pub const BYTES: usize = 96;

    /// Returns the key followed by the signature.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..32].copy_from_slice(self.key.0.as_bytes());
        bytes[32..].copy_from_slice(&self.signature.to_bytes());
        bytes
    }

    /// Decodes a signature; does not verify it.
    ///
    /// # Errors
    /// If the length is wrong, or the key or signature is not one of Ed25519.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SignatureError> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().map_err(|_| SignatureError::Length(bytes.len()))?;
        let (key, signature) = bytes.split_at(32);
        let key: [u8; 32] = key.try_into().expect("32 bytes");
        let key = VerifyingKey::from_bytes(&key).map_err(|_| SignatureError::Key)?;
        let signature = Signature::from_slice(signature).map_err(|_| SignatureError::Altered)?;
        Ok(DetachedSignature { key: PublicKey(key), signature })
    }

    /// Verifies the signature of `message` and returns the signer's key, trusted or not; see [`Keyring::verify_signer`].
    ///
    /// # Errors
    /// If the signature does not match.
    pub fn verify(&self, message: &[u8]) -> Result<PublicKey, SignatureError> {
        self.key.0.verify_strict(message, &self.signature).map_err(|_| SignatureError::Altered)?;
        Ok(self.key)
    }

    /// Returns [`Self::to_bytes`] in hexadecimal.
    pub fn to_hex(&self) -> String {
        hex(&self.to_bytes())
    }

    /// Decodes [`Self::to_hex`].
    ///
    /// # Errors
    /// As [`Self::from_bytes`], or if the text is not hexadecimal.
    pub fn from_hex(text: &str) -> Result<Self, SignatureError> {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let pair = |pair: &[u8]| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?);
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        Self::from_bytes(&bytes.ok_or(SignatureError::Length(text.len() / 2))?)
    }
}

/// The trusted keys, by name.
#[derive(Debug, Clone, Default)]
pub struct Keyring(Vec<(String, PublicKey)>);

/// The reason why a signer is not trusted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UntrustedSigner {
    /// The bundle has no signature.
    #[error("the signature is missing")]
    Unsigned,
    /// The keyring is empty.
    #[error("no key is trusted: the folder of trusted keys has no *.pub file")]
    NoKeys,
    /// The key of the signer is not in the keyring.
    #[error("the signature is by the key {signer}, which is not trusted; trusted: {trusted}")]
    UnknownKey {
        /// Id of the signer's key.
        signer: String,
        /// Names and ids of the trusted keys.
        trusted: String,
    },
}

impl Keyring {
    /// Reads all `*.pub` files of a folder. The keyring is empty if `folder` is empty or does not exist.
    ///
    /// # Errors
    /// If the folder or a file cannot be read, a file is not a public key, or there are more than 64.
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
            if path.extension().is_some_and(|extension| extension == PUBLIC) {
                files.push(path);
            }
        }
        if files.len() > KEYS_MAX {
            return Err(KeyError::file(folder, format_args!("{} keys, expected at most {KEYS_MAX}", files.len())));
        }
        files.sort();
        files.iter().map(|path| read_named(path)).collect::<Result<_, _>>().map(Keyring)
    }

    /// Reads a single key.
    ///
    /// # Errors
    /// As [`PublicKey::read`].
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        Ok(Keyring(vec![read_named(path)?]))
    }

    /// Returns whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the name of the trusted key that is the signer's.
    ///
    /// # Errors
    /// If there is no signer, or its key is not trusted.
    pub fn verify_signer(&self, signer: Option<&PublicKey>) -> Result<&str, UntrustedSigner> {
        let signer = signer.ok_or(UntrustedSigner::Unsigned)?;
        let trusted = self.0.iter().find(|(_, key)| key == signer);
        trusted.map(|(name, _)| name.as_str()).ok_or_else(|| match self.0.is_empty() {
            true => UntrustedSigner::NoKeys,
            false => UntrustedSigner::UnknownKey { signer: signer.id(), trusted: self.names() },
        })
    }

    /// Returns the names and ids of the keys, for messages.
    fn names(&self) -> String {
        let names: Vec<String> = self.0.iter().map(|(name, key)| format!("{name} ({})", key.id())).collect();
        names.join(", ")
    }
}

/// Reads a public key and its name, the file's name without the extension.
fn read_named(path: &Path) -> Result<(String, PublicKey), KeyError> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok((name, PublicKey::read(path)?))
}

/// Reads a text file, at most [`FILE_BYTES_MAX`].
fn read(path: &Path) -> Result<String, KeyError> {
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|e| KeyError::file(path, e))?;
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|e| KeyError::file(path, e))?;
    Ok(text)
}

/// Creates a file with this mode; removes it again if writing fails.
fn create(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), KeyError> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => KeyError::AlreadyExists(path.into()),
            _ => KeyError::file(path, e),
        })?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| {
        // The returned error has the cause.
        let _ = fs::remove_file(path);
        KeyError::file(path, e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generates_a_key_once_and_with_mode_600() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trainer.key");
        let public = PrivateKey::generate(&path).unwrap();
        assert_eq!(public, dir.path().join("trainer.pub"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let key = PrivateKey::read(&path).unwrap();
        assert_eq!(key.public(), PublicKey::read(&public).unwrap());
        let before = fs::read(&path).unwrap();
        assert!(matches!(PrivateKey::generate(&path), Err(KeyError::AlreadyExists(file)) if file == path));
        fs::remove_file(&path).unwrap();
        assert!(matches!(PrivateKey::generate(&path), Err(KeyError::AlreadyExists(file)) if file == public));
        fs::write(&path, before).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = PrivateKey::read(&path).err().unwrap().to_string();
        assert!(error.contains("mode 640"), "{error}");
        assert!(PrivateKey::generate(&public).is_err(), "a private key with the extension of a public one");
        assert!(PublicKey::read(&path).unwrap_err().to_string().contains("not a public Ed25519 key"));
    }

    #[test]
    fn trusts_only_signatures_of_trusted_keys() {
        let dir = tempfile::tempdir().unwrap();
        let key = |name: &str| {
            let path = dir.path().join(name);
            PrivateKey::generate(&path).unwrap();
            PrivateKey::read(&path).unwrap()
        };
        let (ours, theirs) = (key("ours.key"), key("theirs.secret"));
        fs::rename(dir.path().join("theirs.pub"), dir.path().join("theirs.pub.off")).unwrap();
        let keyring = Keyring::read(dir.path()).unwrap();
        let signature = ours.sign(b"flowers");
        assert_eq!(keyring.verify_signer(Some(&signature.verify(b"flowers").unwrap())), Ok("ours"));
        assert_eq!(signature.verify(b"flower"), Err(SignatureError::Altered));
        assert_eq!(DetachedSignature::from_hex(&signature.to_hex()), Ok(signature));
        for text in ["", "zz", "0", &signature.to_hex()[1..], &format!("{}ä", signature.to_hex())] {
            assert!(DetachedSignature::from_hex(text).is_err(), "{text}");
        }
        let unknown = theirs.sign(b"flowers").verify(b"flowers").unwrap();
        let error = keyring.verify_signer(Some(&unknown)).unwrap_err().to_string();
        assert!(error.contains(&unknown.id()) && error.contains("ours ("), "{error}");
        assert_eq!(keyring.verify_signer(None), Err(UntrustedSigner::Unsigned));
        let empty = Keyring::read(&dir.path().join("missing")).unwrap();
        assert_eq!(empty.verify_signer(Some(&unknown)), Err(UntrustedSigner::NoKeys));
        fs::write(dir.path().join("bad.pub"), "not a key").unwrap();
        assert!(Keyring::read(dir.path()).unwrap_err().to_string().contains("bad.pub: not a public Ed25519 key"));
    }
}
