//! Admission of models: the one function through which a model is loaded, whether it was pushed, installed by hand or is read
//! at the start.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use super::UpdateOptions;
use super::model::{DeviceBackbone, LoadedModel, ModelMetadata};
use super::store::State;
use crate::bundle::selftest::SelfTestError;
use crate::bundle::signature::{KeyError, Keyring, UntrustedSigner};
use crate::bundle::{Bundle, BundleError, Identity, Manifest};
use crate::decide::UnknownClass;
use crate::system::memory;
use crate::update::protocol::{ModelSource, identity};
use crate::vision::backbone::MOBILENET_V2;
use crate::vision::{BackboneError, CompiledBackbone};

/// Runs of each network when it is timed.
const TIMED_RUNS: usize = 5;
/// A difference in processor time that timing cannot resolve.
const TIMING_NOISE: Duration = Duration::from_millis(10);
/// Bytes of memory that a network needs while it is loaded, for each byte of its file: 74 MiB were measured for one of 9.
const MEMORY_PER_BYTE: u64 = 8;

/// Reason why a model is not admitted.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The file is not a bundle, was altered, or fits neither this program nor this backbone.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The backbone cannot be loaded.
    #[error(transparent)]
    Backbone(#[from] BackboneError),
    /// The trusted keys cannot be read.
    #[error("model.trusted_keys: {0}")]
    Keys(#[from] KeyError),
    /// No trusted key signed it.
    #[error(transparent)]
    UntrustedSigner(#[from] UntrustedSigner),
    /// Thresholds are configured for a class that it does not have.
    #[error("decide.classes: {0}")]
    Classes(#[from] UnknownClass),
    /// It does not fit the free memory.
    #[error("the model needs about {needed} MiB of memory, {free} MiB are free")]
    Memory {
        /// Estimated memory that it needs, in MiB.
        needed: u64,
        /// Available memory, in MiB.
        free: u64,
    },
    /// It has no self-test.
    #[error("the bundle contains no self-test; train the model again")]
    NoSelfTest,
    /// It fails its self-test.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// A frame takes too much processor time.
    #[error(
        "the model needs {cpu_ms} ms of processor time per frame, the active model {active_ms} ms: more than model.slowdown_max = {slowdown_max} allows"
    )]
    Slow {
        /// Its processor time per frame, in milliseconds.
        cpu_ms: u128,
        /// Processor time per frame of the active model, in milliseconds.
        active_ms: u128,
        /// Largest allowed ratio of the two.
        slowdown_max: f64,
    },
    /// A library panicked while it processed the model.
    #[error("the model made the program panic; see the message above in the log")]
    Panicked,
}

/// Reason why a model must not replace the active one unless it is forced.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpgradeRefused {
    /// It was rolled back on this device.
    #[error("{0} was rolled back on this device, or failed its trial")]
    RolledBack(String),
    /// Its version is not above the active model's.
    #[error("{model} is not newer than {active}")]
    NotNewer {
        /// Name and version of the new model.
        model: String,
        /// Name and version of the active model.
        active: String,
    },
    /// Its version is not above the highest that was confirmed.
    #[error("{model} is not newer than version {highest_confirmed_version}, which was confirmed on this device before")]
    BelowConfirmed {
        /// Name and version of the new model.
        model: String,
        /// The highest version that was confirmed on this device.
        highest_confirmed_version: u64,
    },
}

/// A bundle to be admitted.
pub struct Candidate<'a> {
    /// Name of the file, for messages.
    pub file: &'a str,
    /// Content of the bundle file.
    pub bytes: &'a [u8],
    /// Origin of the model.
    pub source: ModelSource,
}

/// The checks of an admission.
pub enum Checks<'a> {
    /// Checks that a model is complete and fits the backbone: for a model that was admitted before it was stored, and for
    /// the configured and the built-in one.
    Integrity {
        /// A model whose backbone is used again if it is the same.
        reuse: Option<&'a ModelMetadata>,
    },
    /// Checks a new model: signature, classes, memory, self-test, and processor time beside the active model.
    Full {
        /// Options of the update agent.
        options: &'a UpdateOptions,
        /// The active model.
        active: &'a ModelMetadata,
        /// Whether a trusted key must have signed the model.
        signature_required: bool,
    },
}

/// A model that was admitted.
pub struct Admitted {
    /// The model.
    pub loaded: LoadedModel,
    /// The most processor time that a frame may take during the trial; `None` after [`Checks::Integrity`].
    pub cpu_time_max: Option<Duration>,
}

/// Admits a model: verifies it, calls `accept` with its identity, loads it and validates it. A panic of a library, which a
/// malformed file may cause, is a refusal.
///
/// # Errors
/// If a check or `accept` fails.
pub fn admit<E: From<Refusal>>(
    candidate: &Candidate<'_>,
    backbone: &DeviceBackbone,
    checks: &Checks<'_>,
    accept: impl FnOnce(&Identity) -> Result<(), E>,
) -> Result<Admitted, E> {
    let caught = |work: &mut dyn FnMut() -> Result<Admitted, E>| {
        let panicked = |_| Err(Refusal::Panicked.into());
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked)
    };
    let mut accept = Some(accept);
    caught(&mut || {
        let bundle = verify(candidate, checks)?;
        if let Some(accept) = accept.take() {
            accept(&identity(bundle.manifest(), bundle.sha256()))?;
        }
        Ok(match checks {
            Checks::Integrity { reuse } => Admitted {
                loaded: LoadedModel::new(bundle, candidate.source, backbone, *reuse).map_err(Refusal::from)?,
                cpu_time_max: None,
            },
            Checks::Full { options, active, .. } => validate(bundle, candidate.source, options, backbone, active)?,
        })
    })
}

/// Returns the bundle if it is complete and, where required, signed by a trusted key.
fn verify(candidate: &Candidate<'_>, checks: &Checks<'_>) -> Result<Bundle, Refusal> {
    let bundle = Bundle::from_bytes(candidate.file, candidate.bytes)?;
    if let Checks::Full { options, signature_required: true, .. } = checks {
        Keyring::read(&options.trusted_keys)?.verify_signer(bundle.signer())?;
    }
    Ok(bundle)
}

/// Loads a verified model and checks that it fits this device, passes its self-test and is not too slow.
fn validate(
    bundle: Bundle,
    source: ModelSource,
    options: &UpdateOptions,
    backbone: &DeviceBackbone,
    active: &ModelMetadata,
) -> Result<Admitted, Refusal> {
    options.policy.rules(&bundle.manifest().classes)?;
    check_memory(&bundle, backbone, active)?;
    let mut loaded = LoadedModel::new(bundle, source, backbone, Some(active))?;
    loaded.self_test.take().ok_or(Refusal::NoSelfTest)?.verify(&mut loaded.classifier)?;
    let cpu_time_max = check_cpu_time(&loaded.model, active, options.slowdown_max)?;
    Ok(Admitted { loaded, cpu_time_max: Some(cpu_time_max) })
}

/// Refuses a network that does not fit the free memory; another head alone needs little memory and is not checked.
fn check_memory(bundle: &Bundle, backbone: &DeviceBackbone, active: &ModelMetadata) -> Result<(), Refusal> {
    if active.has_same_features(bundle.manifest()) {
        return Ok(());
    }
    let network_bytes = match (&bundle.contents().backbone, &backbone.file) {
        (Some(embedded), _) => embedded.len() as u64,
        (None, Some(file)) => std::fs::metadata(file).map_or(0, |file| file.len()),
        (None, None) => MOBILENET_V2.len() as u64,
    };
    let needed = network_bytes * MEMORY_PER_BYTE;
    match memory::available() {
        Some(free) if needed > free => Err(Refusal::Memory { needed: needed >> 20, free: free >> 20 }),
        _ => Ok(()),
    }
}

/// Returns the most processor time that a frame may take; refuses a network that takes more.
fn check_cpu_time(model: &ModelMetadata, active: &ModelMetadata, slowdown_max: f64) -> Result<Duration, Refusal> {
    let active_time = cpu_time(&active.backbone, &active.manifest)?;
    let limit = active_time.mul_f64(slowdown_max).max(active_time + TIMING_NOISE);
    if active.has_same_features(&model.manifest) {
        return Ok(limit);
    }
    let time = cpu_time(&model.backbone, &model.manifest)?;
    if time > limit {
        let (cpu_ms, active_ms) = (time.as_millis(), active_time.as_millis());
        return Err(Refusal::Slow { cpu_ms, active_ms, slowdown_max });
    }
    Ok(limit)
}

/// Returns the least processor time of some runs of a network on zeros.
fn cpu_time(backbone: &CompiledBackbone, manifest: &Manifest) -> Result<Duration, BackboneError> {
    let input = vec![0.0; manifest.preprocess.input_len()];
    let mut session = backbone.session()?;
    let mut least = Duration::MAX;
    for _ in 0..TIMED_RUNS {
        session.run(&input)?;
        least = least.min(session.cpu_time());
    }
    Ok(least)
}

/// Checks that a model is newer than the active one and was not rolled back.
///
/// # Errors
/// If the model is not newer, or was rolled back.
pub fn check_upgrade(model: &Identity, active: &Identity, state: &State) -> Result<(), UpgradeRefused> {
    let named = model.to_string();
    if state.rolled_back.contains(&model.sha256) {
        Err(UpgradeRefused::RolledBack(named))
    } else if model.version <= active.version {
        Err(UpgradeRefused::NotNewer { model: named, active: active.to_string() })
    } else if model.version <= state.highest_confirmed_version {
        Err(UpgradeRefused::BelowConfirmed { model: named, highest_confirmed_version: state.highest_confirmed_version })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_models_that_are_not_newer_or_were_rolled_back() {
        let model = |version, sha256: &str| Identity { name: "m".into(), version, sha256: sha256.into() };
        let state = State { rolled_back: vec!["bad".into()], highest_confirmed_version: 5, ..State::default() };
        let refused = |new| check_upgrade(&new, &model(3, "active"), &state).unwrap_err().to_string();
        assert_eq!(check_upgrade(&model(6, "new"), &model(3, "active"), &state), Ok(()));
        assert_eq!(refused(model(6, "bad")), "m 6 was rolled back on this device, or failed its trial");
        assert_eq!(refused(model(3, "same")), "m 3 is not newer than m 3");
        let before = "m 5 is not newer than version 5, which was confirmed on this device before";
        assert_eq!(refused(model(5, "older")), before);
    }
}
