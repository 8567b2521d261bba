//! Class names, in the order of the head's outputs.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use unicode_normalization::UnicodeNormalization;

/// The published class of an image that matches no class of the model; reserved, so no class of a model has this name.
pub const UNKNOWN: &str = "unknown";

/// Names that are no class names: [`UNKNOWN`], and the states that Home Assistant gives a meaning of their own.
const RESERVED: [&str; 3] = [UNKNOWN, "None", "unavailable"];

/// The most classes of a model.
pub const CLASSES_MAX: usize = 1000;
/// The longest class name, in bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 64;

/// The class names of a model: 2 to [`CLASSES_MAX`], all different. A clone shares them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Labels(Arc<[String]>);

/// An error of the class names of a model.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelsError {
    /// There are too few or too many classes; their number.
    #[error("{0} classes, expected 2 to {CLASSES_MAX}")]
    Count(usize),
    /// A name is empty, too long, or has control characters or blanks at its ends; its first [`NAME_BYTES_MAX`] characters.
    #[error(
        "class name {0:?}: expected 1 to {NAME_BYTES_MAX} bytes without control characters and without blanks at the ends"
    )]
    Name(String),
    /// Two classes have the same name; the name.
    #[error("duplicate class name {0:?}")]
    Duplicate(String),
    /// A class has a name that stands for no class; the name.
    #[error("class name {0:?} is reserved: MQTT messages and Home Assistant use {names} for frames that match no class and for devices that are gone", names = RESERVED.join(", "))]
    Reserved(String),
}

/// The name of one class of a model. It dereferences to `str`; a clone shares the model's names and allocates nothing.
#[derive(Clone)]
pub struct ClassName {
    labels: Labels,
    class: usize,
}

impl Labels {
    /// Validates the names and creates the labels. Names are converted to Unicode's composed form (NFC).
    ///
    /// # Errors
    /// If there are fewer than two names or more than [`CLASSES_MAX`], or a name is a duplicate, reserved, empty, too long
    /// or has control characters or blanks at its ends.
    pub fn new(names: Vec<String>) -> Result<Self, LabelsError> {
        if !(2..=CLASSES_MAX).contains(&names.len()) {
            return Err(LabelsError::Count(names.len()));
        }
        let names: Vec<String> = names.into_iter().map(|name| name.nfc().collect()).collect();
        for (i, name) in names.iter().enumerate() {
            let has_blanks = name.trim() != name;
            if name.is_empty() || name.len() > NAME_BYTES_MAX || has_blanks || name.chars().any(char::is_control) {
                return Err(LabelsError::Name(name.chars().take(NAME_BYTES_MAX).collect()));
            }
            if RESERVED.contains(&name.as_str()) {
                return Err(LabelsError::Reserved(name.clone()));
            }
            if names[..i].contains(name) {
                return Err(LabelsError::Duplicate(name.clone()));
            }
        }
        Ok(Labels(names.into()))
    }

    /// Returns the names, in the order of the head's outputs.
    pub fn names(&self) -> &[String] {
        &self.0
    }

    /// Returns the name of a class, or [`UNKNOWN`].
    ///
    /// # Panics
    /// If `class` is not below the number of classes.
    pub fn name(&self, class: Option<usize>) -> &str {
        class.map_or(UNKNOWN, |class| &self.0[class])
    }

    /// Returns the name of a class as a value that shares the names of the model.
    ///
    /// # Panics
    /// If `class` is not below the number of classes.
    pub fn class_name(&self, class: usize) -> ClassName {
        assert!(class < self.0.len(), "class {class} of {}", self.0.len());
        ClassName { labels: self.clone(), class }
    }

    /// Returns the index of the class of this name; `None` if the model has no such class.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|known| known == name)
    }
}

impl Deref for ClassName {
    type Target = str;

    fn deref(&self) -> &str {
        &self.labels.0[self.class]
    }
}

impl PartialEq for ClassName {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for ClassName {}

impl fmt::Debug for ClassName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
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
        labels.0.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let labels = |names: &[&str]| Labels::new(names.iter().map(|n| (*n).to_owned()).collect());
        assert_eq!(labels(&["daisy"]), Err(LabelsError::Count(1)));
        assert_eq!(labels(&["daisy", "daisy"]), Err(LabelsError::Duplicate("daisy".into())));
        for reserved in ["unknown", "None", "unavailable"] {
            assert_eq!(labels(&["daisy", reserved]), Err(LabelsError::Reserved(reserved.into())));
        }
        for blank in [" daisy", "daisy ", "daisy\u{a0}"] {
            assert_eq!(labels(&["tulips", blank]), Err(LabelsError::Name(blank.into())));
        }
        assert_eq!(labels(&["daisy", ""]), Err(LabelsError::Name(String::new())));
        assert_eq!(labels(&["daisy", "a\nb"]), Err(LabelsError::Name("a\nb".into())));
        let good = labels(&["daisy", "Gänseblümchen"]).unwrap();
        assert_eq!((good.name(Some(1)), good.name(None)), ("Gänseblümchen", "unknown"));
        // Folder names of macOS are decomposed.
        let decomposed = labels(&["daisy", "Ga\u{308}nseblu\u{308}mchen"]).unwrap();
        assert_eq!(decomposed, good);
        assert_eq!(labels(&["a\u{308}", "ä"]), Err(LabelsError::Duplicate("ä".into())));
    }
}
