//! What a new model must show before it may decide: who vouches for it, that it fits this device, that it answers as it
//! did where it was trained, and that it is not too slow.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::bundle::selftest::SelfTestError;
use crate::bundle::signature::{KeyError, Keyring, UntrustedSigner};
use crate::bundle::{Bundle, BundleError, Manifest};
use crate::config::{Config, ConfigError};
use crate::decide::Rules;
use crate::system::memory;
use crate::update::device::model_loader::{Loaded, Model, ModelError, ModelLoader};
use crate::update::protocol::Source;
use crate::vision::backbone::MOBILENET_V2;
use crate::vision::{Backbone, BackboneError};

/// How often either network runs while they are timed.
const RUNS: usize = 5;
/// A difference below this is the clock's.
const NOISE: Duration = Duration::from_millis(10);
/// Memory that a network needs for a byte of its file while it is loaded: 74 MiB were measured for one of 9.
const MEMORY_PER_BYTE: u64 = 8;

#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    #[error("model.trusted_keys: {0}")]
    Keys(#[from] KeyError),
    #[error(transparent)]
    UntrustedSigner(#[from] UntrustedSigner),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("it needs about {needed} MiB of memory, {free} are free")]
    Memory { needed: u64, free: u64 },
    #[error("it carries no self-test; a model that is trained anew does")]
    NoSelfTest,
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    #[error(
        "it works {took_ms} ms for a frame, the present model {present_ms} ms: more than model.slowdown_max = {slowdown_max} allows"
    )]
    Slow { took_ms: u128, present_ms: u128, slowdown_max: f64 },
    #[error("it made the program panic; its message stands in the log")]
    Panicked,
}

/// A model that may decide.
pub struct Proven {
    pub loaded: Loaded,
    pub rules: Rules,
    /// How long the network may work for a frame.
    pub limit: Duration,
}

/// Whom a model needs to be signed by.
pub enum Trust {
    /// One of the keys that the configuration names.
    Keys,
    /// Nobody: whoever asks vouches for it.
    Caller,
}

/// A model that was read and that somebody vouches for.
pub fn vouched(file: &str, bytes: &[u8], trust: &Trust, config: &Config) -> Result<Bundle, Refusal> {
    let read = || {
        let bundle = Bundle::from_bytes(file, bytes)?;
        if let Trust::Keys = trust {
            Keyring::read(&config.model.trusted_keys)?.trust(bundle.signer())?;
        }
        Ok(bundle)
    };
    caught(read)
}

/// Lets a model show what it can do, beside the `present` one.
pub fn prove(bundle: Bundle, config: &Config, shelf: &ModelLoader, present: &Model) -> Result<Proven, Refusal> {
    caught(|| {
        let rules = config.rules(&bundle.manifest().classes)?;
        expect_room(&bundle, shelf, present)?;
        let mut loaded = Loaded::new(bundle, Source::Store, shelf, Some(present))?;
        loaded.self_test.take().ok_or(Refusal::NoSelfTest)?.check(&mut loaded.classifier)?;
        let limit = expect_pace(&loaded.model, present, config.model.slowdown_max)?;
        Ok(Proven { loaded, rules, limit })
    })
}

/// A file that lies may make a library panic: that is a refusal here.
fn caught<T>(work: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Refusal::Panicked))
}

/// Another head takes nothing worth to be asked for.
fn expect_room(bundle: &Bundle, shelf: &ModelLoader, present: &Model) -> Result<(), Refusal> {
    if present.gives_the_features_of(bundle.manifest()) {
        return Ok(());
    }
    let network = match (&bundle.parts().backbone, &shelf.backbone) {
        (Some(carried), _) => carried.len() as u64,
        (None, Some(file)) => std::fs::metadata(file).map_or(0, |file| file.len()),
        (None, None) => MOBILENET_V2.len() as u64,
    };
    let needed = network * MEMORY_PER_BYTE;
    match memory::available() {
        Some(free) if needed > free => Err(Refusal::Memory { needed: needed >> 20, free: free >> 20 }),
        _ => Ok(()),
    }
}

/// The longest that a frame may take from now on; refuses a network that takes longer already.
fn expect_pace(model: &Model, present: &Model, slowdown_max: f64) -> Result<Duration, Refusal> {
    let ours = timed(&present.backbone, &present.manifest)?;
    let limit = ours.mul_f64(slowdown_max).max(ours + NOISE);
    if present.gives_the_features_of(&model.manifest) {
        return Ok(limit);
    }
    let took = timed(&model.backbone, &model.manifest)?;
    if took > limit {
        let (took_ms, present_ms) = (took.as_millis(), ours.as_millis());
        return Err(Refusal::Slow { took_ms, present_ms, slowdown_max });
    }
    Ok(limit)
}

/// How long a network works for the quickest of some runs on nothing.
fn timed(backbone: &Backbone, manifest: &Manifest) -> Result<Duration, BackboneError> {
    let input = vec![0.0; manifest.preprocess.input_len()];
    let mut session = backbone.session()?;
    let mut quickest = Duration::MAX;
    for _ in 0..RUNS {
        session.features(&input)?;
        quickest = quickest.min(session.worked());
    }
    Ok(quickest)
}
