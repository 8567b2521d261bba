//! The settings that exist: their keys, and the types and ranges of their values.

use std::fmt;
use std::ops::RangeInclusive;

use bloomcast_kernels::THREADS_MAX;
use config::ValueKind;
use toml_edit::{Document, TableLike, Value};
use unicode_normalization::UnicodeNormalization;

use crate::bundle::archive;
use crate::vision::backbone::KernelChoice;
use crate::vision::decode::{FILE_BYTES_MAX, SIDE_MAX};

/// The longest time of a setting, in milliseconds: one hour.
const MS_MAX: i64 = 3_600_000;

/// The ranges of the whole numbers.
const RANGES: [(&str, RangeInclusive<i64>); 28] = [
    ("camera.interval_ms", 0..=MS_MAX),
    ("camera.stall_ms", 1..=MS_MAX),
    ("camera.reopen_ms_min", 1..=MS_MAX),
    ("camera.reopen_ms_max", 1..=MS_MAX),
    ("camera.frame_bytes_max", 1024..=FILE_BYTES_MAX as i64),
    ("camera.width", 1..=SIDE_MAX as i64),
    ("camera.height", 1..=SIDE_MAX as i64),
    ("camera.fps", 1..=1000),
    ("camera.rotate", 0..=270),
    ("model.threads", 0..=THREADS_MAX as i64),
    ("model.offer_bytes_max", 4096..=archive::FILE_BYTES_MAX as i64),
    ("model.trial_frames", 1..=1_000_000),
    ("model.trial_s_max", 1..=86_400),
    ("decide.smoothing_ms", 0..=24 * MS_MAX),
    ("decide.enter_dwell_ms", 0..=24 * MS_MAX),
    ("decide.leave_dwell_ms", 0..=24 * MS_MAX),
    ("decide.state_interval_ms", 0..=24 * MS_MAX),
    ("mqtt.port", 1..=65535),
    ("mqtt.connect_timeout_s", 1..=3600),
    ("mqtt.keep_alive_s", 1..=65535),
    ("mqtt.reconnect_ms_min", 1..=MS_MAX),
    ("mqtt.reconnect_ms_max", 1..=MS_MAX),
    ("mqtt.packet_bytes_max", 1024..=256 << 20),
    ("mqtt.inflight_max", 1..=1000),
    ("mqtt.outbox_entries_max", 1..=1_000_000),
    ("mqtt.outbox_bytes_max", 4096..=1 << 30),
    ("mqtt.shutdown_timeout_ms", 0..=MS_MAX),
    ("log.counters_interval_s", 1..=MS_MAX),
];

/// The texts that are one of a few.
const CHOICES: [(&str, &[&str]); 6] = [
    ("camera.source", &["v4l2", "rpicam", "replay"]),
    ("camera.flip", &["none", "horizontal", "vertical"]),
    ("camera.format", &["auto", "mjpeg", "yuyv", "rgb"]),
    ("model.kernels", &KernelChoice::NAMES),
    ("model.view", &["auto", "whole", "scan"]),
    ("log.level", &["error", "warn", "info", "debug"]),
];

/// Keys that were renamed: the old name is still read.
pub(super) const RENAMED: [(&str, &str); 1] = [("mqtt.farewell_ms", "mqtt.shutdown_timeout_ms")];

/// The path of a setting or table: the names of the tables around it, then its own. Class names are in Unicode's composed form
/// (NFC), whichever form they were written in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Key(Vec<String>);

impl Key {
    /// Returns the key of these names.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<String> = names.into_iter().collect();
        if let [decide, classes, class, ..] = names.as_mut_slice()
            && decide == "decide"
            && classes == "classes"
        {
            *class = class.nfc().collect();
        }
        Key(names)
    }

    /// Parses a dotted key, in which a name with dots is in quotes.
    pub fn parse(text: &str) -> Self {
        match toml_edit::Key::parse(text) {
            Ok(keys) => Key::new(keys.iter().map(|key| key.get().to_owned())),
            // TOML would have umlauts in quotes.
            Err(_) => Key::new(text.split('.').map(str::to_owned)),
        }
    }

    /// Returns the key of an environment variable, whose prefix is removed: levels are separated by `__`. Keys are lower case;
    /// names of classes and groups are as written.
    pub fn from_variable(name: &str) -> Self {
        let names: Vec<&str> = name.split("__").collect();
        let mut lower: Vec<String> = names.iter().map(|name| name.to_lowercase()).collect();
        if lower.len() > 2 && matches!((&*lower[0], &*lower[1]), ("decide", "classes") | ("fleet", "groups")) {
            names[2].clone_into(&mut lower[2]);
        }
        Key::new(lower)
    }

    /// Returns the key of a setting or table in this table.
    pub fn child(&self, name: &str) -> Self {
        Key::new(self.0.iter().cloned().chain([name.to_owned()]))
    }

    /// The names, the outermost table first.
    pub fn names(&self) -> &[String] {
        &self.0
    }
}

/// Writes a dotted key; a name that TOML has in quotes is in quotes.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, name) in self.0.iter().enumerate() {
            let bare = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-');
            let dot = if i == 0 { "" } else { "." };
            if bare { write!(f, "{dot}{name}")? } else { write!(f, "{dot}{name:?}")? }
        }
        Ok(())
    }
}

/// A value of another type or out of range: what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct WrongValue(String);

impl From<&ValueType> for WrongValue {
    fn from(expected: &ValueType) -> Self {
        WrongValue(expected.to_string())
    }
}

/// The type of a setting's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ValueType {
    Table,
    Bool,
    Integer(RangeInclusive<i64>),
    Float,
    Text,
    /// One of these, in any case.
    Choice(&'static [&'static str]),
    /// A list of texts.
    Texts,
    /// A list of this many numbers.
    Floats(usize),
}

impl ValueType {
    fn from_default(key: &Key, default: &toml_edit::Item) -> Self {
        let key = key.to_string();
        let range = || RANGES.iter().find(|(known, _)| *known == key).map(|(_, range)| range.clone());
        let choices = || CHOICES.iter().find(|(known, _)| *known == key).map(|(_, choices)| *choices);
        match default {
            item if item.is_table_like() => ValueType::Table,
            item if item.is_bool() => ValueType::Bool,
            item if item.is_float() => ValueType::Float,
            item if item.is_array() => ValueType::Floats(item.as_array().map_or(0, toml_edit::Array::len)),
            item if item.is_integer() => ValueType::Integer(range().expect("each whole number has a range")),
            _ => choices().map_or(ValueType::Text, ValueType::Choice),
        }
    }

    /// Returns the value of a file.
    ///
    /// # Errors
    /// If it has another type or is not in the range; the error is what was expected.
    pub fn value(&self, value: &Value) -> Result<ValueKind, WrongValue> {
        match (self, value) {
            (ValueType::Bool, Value::Boolean(value)) => Ok((*value.value()).into()),
            (ValueType::Integer(range), Value::Integer(value)) => in_range(*value.value(), range),
            (ValueType::Float, Value::Integer(value)) => Ok((*value.value() as f64).into()),
            (ValueType::Float, Value::Float(value)) => Ok((*value.value()).into()),
            (ValueType::Text, Value::String(value)) => Ok(value.value().as_str().into()),
            (ValueType::Choice(choices), Value::String(value)) => one_of(value.value(), choices),
            (ValueType::Texts, Value::Array(list)) => {
                let text = |value: &Value| value.as_str().map(|text| config::Value::new(None, text));
                let texts: Option<Vec<_>> = list.iter().map(text).collect();
                texts.map(ValueKind::Array).ok_or_else(|| self.into())
            }
            (ValueType::Floats(count), Value::Array(list)) if list.len() == *count => {
                let number = |value: &Value| value.as_float().or_else(|| value.as_integer().map(|value| value as f64));
                floats(list.iter().map(number)).ok_or_else(|| self.into())
            }
            _ => Err(self.into()),
        }
    }

    /// Returns the value that a variable or flag gives as text.
    ///
    /// # Errors
    /// As [`ValueType::value`].
    pub fn parse(&self, text: &str) -> Result<ValueKind, WrongValue> {
        let trimmed = text.trim();
        let expected = || WrongValue::from(self);
        match self {
            ValueType::Bool => match trimmed.to_lowercase().as_str() {
                "true" | "on" | "yes" | "1" => Ok(true.into()),
                "false" | "off" | "no" | "0" => Ok(false.into()),
                _ => Err(expected()),
            },
            ValueType::Integer(range) => {
                trimmed.parse().map_err(|_| expected()).and_then(|value| in_range(value, range))
            }
            ValueType::Float => trimmed.parse::<f64>().map(Into::into).map_err(|_| expected()),
            ValueType::Text => Ok(text.into()),
            ValueType::Choice(choices) => one_of(trimmed, choices),
            ValueType::Texts => {
                let texts = trimmed.split(',').map(|text| config::Value::new(None, text.trim()));
                Ok(ValueKind::Array(texts.collect()))
            }
            ValueType::Floats(count) => {
                let numbers = trimmed.trim_start_matches('[').trim_end_matches(']').split(',');
                let parsed = floats(numbers.clone().map(|number| number.trim().parse().ok()));
                parsed.filter(|_| numbers.count() == *count).ok_or_else(expected)
            }
            ValueType::Table => Err(expected()),
        }
    }
}

/// Returns a list of numbers; `None` if one is missing.
fn floats(numbers: impl Iterator<Item = Option<f64>>) -> Option<ValueKind> {
    let values: Option<Vec<_>> = numbers.map(|number| Some(config::Value::new(None, number?))).collect();
    values.map(ValueKind::Array)
}

fn in_range(value: i64, range: &RangeInclusive<i64>) -> Result<ValueKind, WrongValue> {
    if range.contains(&value) {
        return Ok(value.into());
    }
    Err(WrongValue(format!("expected {} to {}", range.start(), range.end())))
}

fn one_of(text: &str, choices: &'static [&'static str]) -> Result<ValueKind, WrongValue> {
    let found = choices.iter().find(|choice| choice.eq_ignore_ascii_case(text));
    found.map(|choice| (*choice).into()).ok_or_else(|| (&ValueType::Choice(choices)).into())
}

/// Writes what a value is expected to be.
impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueType::Table => f.write_str("expected a table"),
            ValueType::Bool => f.write_str("expected true or false"),
            ValueType::Integer(range) => write!(f, "expected a whole number, {} to {}", range.start(), range.end()),
            ValueType::Float => f.write_str("expected a number"),
            ValueType::Text => f.write_str("expected a text in quotes"),
            ValueType::Choice(choices) => write!(f, "expected one of {}", choices.join(", ")),
            ValueType::Texts => f.write_str("expected a list of texts in quotes"),
            ValueType::Floats(count) => write!(f, "expected a list of {count} numbers"),
        }
    }
}

/// The settings and tables that exist.
pub(super) struct Known(Vec<(String, ValueType)>);

impl Known {
    /// Returns the keys and types of the defaults.
    pub fn from_defaults(defaults: &str) -> Self {
        let defaults = Document::parse(defaults).expect("the defaults inside the program are TOML");
        let mut known = Vec::new();
        walk(&Key::default(), defaults.as_table(), &mut known);
        Known(known)
    }

    /// Returns the type of a setting or table, also of one under its old name; `None` if there is none. The names of classes and
    /// groups are free.
    pub fn kind(&self, key: &Key) -> Option<ValueType> {
        let names: Vec<&str> = key.names().iter().map(String::as_str).collect();
        match names[..] {
            ["decide", "classes"] | ["decide", "classes", _] => return Some(ValueType::Table),
            ["decide", "classes", _, "enter" | "leave"] => return Some(ValueType::Float),
            ["fleet", "groups", _] => return Some(ValueType::Texts),
            _ => {}
        }
        let name = key.to_string();
        let present = RENAMED.iter().find(|(old, _)| *old == name).map_or(&*name, |(_, new)| *new);
        self.0.iter().find(|(known, _)| known == present).map(|(_, kind)| kind.clone())
    }

    /// Returns the key that is most like this text, if one is.
    pub fn nearest(&self, key: &str) -> Option<&str> {
        let nearest = self.0.iter().map(|(known, _)| (distance(known, key), known)).min_by_key(|(far, _)| *far);
        nearest.filter(|(far, _)| *far <= 3).map(|(_, known)| known.as_str())
    }

    /// Returns the setting whose key has these letters, apart from separators and case.
    pub fn spelled_like(&self, name: &str) -> Option<&str> {
        let letters = |text: &str| text.to_lowercase().replace(['_', '.'], "");
        let settings = self.0.iter().filter(|(_, kind)| *kind != ValueType::Table);
        settings.map(|(known, _)| known.as_str()).find(|known| letters(known) == letters(name))
    }
}

fn walk(table: &Key, entries: &dyn TableLike, known: &mut Vec<(String, ValueType)>) {
    for (name, item) in entries.iter() {
        let key = table.child(name);
        known.push((key.to_string(), ValueType::from_default(&key, item)));
        if let Some(inner) = item.as_table_like() {
            walk(&key, inner, known);
        }
    }
}

/// Returns the Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DEFAULTS;

    #[test]
    fn ranges_and_choices_are_of_settings_that_exist() {
        let known = Known::from_defaults(DEFAULTS);
        for (key, range) in RANGES {
            assert_eq!(known.kind(&Key::parse(key)), Some(ValueType::Integer(range)), "{key}");
        }
        for (key, choices) in CHOICES {
            assert_eq!(known.kind(&Key::parse(key)), Some(ValueType::Choice(choices)), "{key}");
        }
    }

    #[test]
    fn a_class_name_with_dots_or_umlauts_is_one_name_of_a_key() {
        let class = |key: &Key| key.names()[2].clone();
        let quoted = Key::parse("decide.classes.\"Rosa sp.\".enter");
        assert_eq!((class(&quoted), quoted.names().len()), ("Rosa sp.".into(), 4));
        assert_eq!(quoted.to_string(), "decide.classes.\"Rosa sp.\".enter");
        let decomposed = Key::parse("decide.classes.Ga\u{308}nseblümchen.enter");
        assert_eq!(class(&decomposed), "Gänseblümchen");
        assert_eq!(class(&Key::from_variable("DECIDE__CLASSES__Rosa__ENTER")), "Rosa");
    }
}
