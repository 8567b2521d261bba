//! The names of the classes, in the order of the head's outputs.

use serde::{Deserialize, Serialize};

/// What is said where no class holds; never a class's name.
pub const UNKNOWN: &str = "unknown";

/// More classes than this, or longer names, are no flower model.
pub const CLASSES_MAX: usize = 1000;
pub const NAME_BYTES_MAX: usize = 64;

/// At least two different names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Labels(Vec<String>);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelsError {
    #[error("{0} classes, expected 2 to {CLASSES_MAX}")]
    Count(usize),
    #[error("class name {0:?}: expected 1 to {NAME_BYTES_MAX} bytes without control characters")]
    Name(String),
    #[error("the class {0:?} stands twice")]
    Double(String),
    #[error("a class must not be called \"{UNKNOWN}\": that is said where no class holds")]
    Unknown,
}

impl Labels {
    pub fn new(names: Vec<String>) -> Result<Self, LabelsError> {
        if !(2..=CLASSES_MAX).contains(&names.len()) {
            return Err(LabelsError::Count(names.len()));
        }
        for (i, name) in names.iter().enumerate() {
            if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
                return Err(LabelsError::Name(name.chars().take(NAME_BYTES_MAX).collect()));
            }
            if name == UNKNOWN {
                return Err(LabelsError::Unknown);
            }
            if names[..i].contains(name) {
                return Err(LabelsError::Double(name.clone()));
            }
        }
        Ok(Labels(names))
    }

    pub fn names(&self) -> &[String] {
        &self.0
    }

    /// The name of a class, or `unknown`.
    pub fn name(&self, class: Option<usize>) -> &str {
        class.map_or(UNKNOWN, |class| &self.0[class])
    }

    pub fn position(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|known| known == name)
    }
}

impl TryFrom<Vec<String>> for Labels {
    type Error = LabelsError;

    fn try_from(names: Vec<String>) -> Result<Self, LabelsError> {
        Labels::new(names)
    }
}

impl From<Labels> for Vec<String> {
    fn from(labels: Labels) -> Self {
        labels.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let labels = |names: &[&str]| Labels::new(names.iter().map(|n| (*n).to_owned()).collect());
        assert_eq!(labels(&["daisy"]), Err(LabelsError::Count(1)));
        assert_eq!(labels(&["daisy", "daisy"]), Err(LabelsError::Double("daisy".into())));
        assert_eq!(labels(&["daisy", "unknown"]), Err(LabelsError::Unknown));
        assert_eq!(labels(&["daisy", ""]), Err(LabelsError::Name(String::new())));
        assert_eq!(labels(&["daisy", "a\nb"]), Err(LabelsError::Name("a\nb".into())));
        let good = labels(&["daisy", "Gänseblümchen"]).unwrap();
        assert_eq!((good.name(Some(1)), good.name(None)), ("Gänseblümchen", "unknown"));
    }
}
