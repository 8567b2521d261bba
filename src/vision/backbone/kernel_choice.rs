//! The choice of the kernels that run a backbone, as given in a setting or an argument.

use std::fmt;
use std::str::FromStr;

use bloomcast_kernels::Isa;
use serde::Deserialize;

/// The kernels that run a backbone: those of an instruction set, or tract's operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub enum KernelChoice {
    /// The fastest instruction set that the processor supports.
    #[default]
    Auto,
    /// The kernels of one instruction set.
    Isa(Isa),
    /// tract's own operators.
    Tract,
}

/// An error of a name that is not one of [`KernelChoice::NAMES`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?}: unknown kernels, expected one of {}", KernelChoice::NAMES.join(", "))]
pub struct UnknownKernels {
    /// The name.
    pub name: String,
}

/// An error of kernels for an instruction set that this processor lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this processor lacks {}; \"auto\" would select {}", .0.name(), Isa::best().name())]
pub struct UnsupportedKernels(pub Isa);

impl KernelChoice {
    /// The names that [`KernelChoice::from_str`] accepts.
    pub const NAMES: [&str; 6] = ["auto", "avx512", "avx2", "neon", "portable", "tract"];

    /// Returns the instruction set, or `None` for tract's operators.
    ///
    /// # Errors
    /// If this processor lacks the chosen instruction set.
    pub fn resolve(self) -> Result<Option<Isa>, UnsupportedKernels> {
        match self {
            KernelChoice::Auto => Ok(Some(Isa::best())),
            KernelChoice::Isa(isa) if isa.is_supported() => Ok(Some(isa)),
            KernelChoice::Isa(isa) => Err(UnsupportedKernels(isa)),
            KernelChoice::Tract => Ok(None),
        }
    }

    fn name(self) -> &'static str {
        match self {
            KernelChoice::Auto => "auto",
            KernelChoice::Isa(isa) => isa.name(),
            KernelChoice::Tract => "tract",
        }
    }
}

/// Resolved kernels as a choice, for example to display them.
impl From<Option<Isa>> for KernelChoice {
    fn from(kernels: Option<Isa>) -> Self {
        kernels.map_or(KernelChoice::Tract, KernelChoice::Isa)
    }
}

impl fmt::Display for KernelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for KernelChoice {
    type Err = UnknownKernels;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(KernelChoice::Auto),
            "tract" => Ok(KernelChoice::Tract),
            _ => Isa::ALL
                .into_iter()
                .find(|isa| isa.name() == name)
                .map(KernelChoice::Isa)
                .ok_or_else(|| UnknownKernels { name: name.into() }),
        }
    }
}

impl TryFrom<String> for KernelChoice {
    type Error = UnknownKernels;

    fn try_from(name: String) -> Result<Self, Self::Error> {
        name.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_parses_to_the_choice_that_displays_it() {
        for name in KernelChoice::NAMES {
            assert_eq!(name.parse::<KernelChoice>().unwrap().to_string(), name);
        }
        assert_eq!("auto".parse(), Ok(KernelChoice::default()));
        assert_eq!("avx2".parse(), Ok(KernelChoice::Isa(Isa::Avx2)));
        let named = |isa: &Isa| KernelChoice::NAMES.contains(&isa.name());
        assert!(Isa::ALL.iter().all(named));
    }

    #[test]
    fn an_unknown_name_is_an_error_that_lists_the_names() {
        for name in ["sse9", "", "AVX2", "plain"] {
            let error = name.parse::<KernelChoice>().unwrap_err().to_string();
            let expected = "unknown kernels, expected one of auto, avx512, avx2, neon, portable, tract";
            assert_eq!(error, format!("{name:?}: {expected}"));
        }
    }

    #[test]
    fn deserializes_from_a_string() {
        assert_eq!(serde_json::from_str::<KernelChoice>("\"tract\"").unwrap(), KernelChoice::Tract);
        let error = serde_json::from_str::<KernelChoice>("\"sse9\"").unwrap_err().to_string();
        assert!(error.starts_with("\"sse9\": unknown kernels, expected one of auto, "), "{error}");
    }

    #[test]
    fn resolves_to_a_supported_instruction_set_or_an_error() {
        assert_eq!(KernelChoice::Auto.resolve(), Ok(Some(Isa::best())));
        assert_eq!(KernelChoice::Tract.resolve(), Ok(None));
        for isa in Isa::ALL {
            match KernelChoice::Isa(isa).resolve() {
                Ok(resolved) => assert!(isa.is_supported() && resolved == Some(isa)),
                Err(error) => {
                    assert!(!isa.is_supported());
                    let best = Isa::best().name();
                    let expected = format!("this processor lacks {}; \"auto\" would select {best}", isa.name());
                    assert_eq!(error.to_string(), expected);
                }
            }
        }
    }

    #[test]
    fn resolved_kernels_display_their_name() {
        assert_eq!(KernelChoice::from(None).to_string(), "tract");
        assert_eq!(KernelChoice::from(Some(Isa::Portable)).to_string(), "portable");
    }
}
