//! Layers of settings, one over the other, and the places of errors in them.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use config::builder::DefaultState;
use config::{ConfigBuilder, Environment, FileFormat};
use serde::de::DeserializeOwned;
use toml_edit::{Document, TableLike};

use super::ConfigError;

/// First part of a variable's name: `BLOOMCAST__CAMERA__DEVICE=/dev/video2`.
const ENV_PREFIX: &str = "BLOOMCAST";
/// Separator of the parts of a variable's name.
const ENV_SEPARATOR: &str = "__";

/// Keys that were renamed: the old name is still read.
const RENAMED: [(&str, &str); 1] = [("mqtt.farewell_ms", "mqtt.shutdown_timeout_ms")];

/// Environment variables that were removed, and the keys that replace them.
const REMOVED_VARIABLES: [(&str, &str); 1] = [("BLOOMCAST_KERNELS", "model.kernels")];

/// Merges `defaults` under `file` under the environment's `BLOOMCAST__…` under `overrides` (`key=value`). Returns the settings
/// and their places.
///
/// # Errors
/// The file cannot be read or is not TOML, a key is not among the defaults, or a value has the wrong type; the error names the
/// place.
pub fn merge<'a, T: DeserializeOwned>(
    defaults: &str,
    file: Option<&'a Path>,
    environment: impl Iterator<Item = (String, String)>,
    overrides: &[String],
) -> Result<(T, Places<'a>), ConfigError> {
    let (known, mut places) = (Known::from_defaults(defaults), Places::default());
    let mut builder = config::Config::builder().add_source(config::File::from_str(defaults, FileFormat::Toml));
    if let Some(path) = file {
        let text =
            fs::read_to_string(path).map_err(|e| ConfigError::Read { path: path.into(), reason: e.to_string() })?;
        known.expect_file(path, &text)?;
        builder = builder.add_source(config::File::from_str(&text, FileFormat::Toml));
        for renamed in renamed_in_file(path, &text, &mut places.warnings) {
            builder = builder.add_source(config::File::from_str(&renamed, FileFormat::Toml));
        }
        places.file = Some((path, text));
    }
    builder = builder.add_source(variables(environment, &known, &mut places)?);
    builder = flags(builder, overrides, &known, &mut places)?;
    let merged = builder.build().map_err(|e| ConfigError::Value(e.to_string()))?;
    let settings = merged.try_deserialize().map_err(|e| places.wrong_value(&e))?;
    Ok((settings, places))
}

fn variables(
    environment: impl Iterator<Item = (String, String)>,
    known: &Known,
    places: &mut Places<'_>,
) -> Result<Environment, ConfigError> {
    let prefix = format!("{ENV_PREFIX}{ENV_SEPARATOR}");
    let mut ours: HashMap<String, String> = HashMap::new();
    for (name, value) in environment {
        if let Some((_, key)) = REMOVED_VARIABLES.iter().find(|(removed, _)| name == *removed) {
            let present = format!("{prefix}{}", key.to_uppercase().replace('.', ENV_SEPARATOR));
            places.warnings.push(format!("the environment variable {name} is ignored; use {key} or {present}"));
        }
        if !name.starts_with(&prefix) {
            continue;
        }
        let key = name[prefix.len()..].to_lowercase().replace(ENV_SEPARATOR, ".");
        let place = format!("the environment's {name}");
        known.expect(&key, || place.clone())?;
        let present = places.present_name(key.clone(), &place);
        if present == key {
            ours.insert(name, value);
        } else {
            let present = format!("{prefix}{}", present.to_uppercase().replace('.', ENV_SEPARATOR));
            ours.entry(present).or_insert(value);
        }
        places.outer.push((present, place));
    }
    let source = Environment::with_prefix(ENV_PREFIX).prefix_separator(ENV_SEPARATOR).separator(ENV_SEPARATOR);
    Ok(source.source(Some(ours)))
}

fn flags(
    mut builder: ConfigBuilder<DefaultState>,
    overrides: &[String],
    known: &Known,
    places: &mut Places<'_>,
) -> Result<ConfigBuilder<DefaultState>, ConfigError> {
    for text in overrides {
        let place = format!("--set {text}");
        let (key, value) = text.split_once('=').ok_or_else(|| {
            ConfigError::Value(format!("{place}: expected KEY=VALUE, like camera.device=/dev/video2"))
        })?;
        known.expect(key, || place.clone())?;
        let (given, key) = (key, places.present_name(key.to_owned(), &place));
        let is_given =
            |name: &str| overrides.iter().any(|other| other.split_once('=').is_some_and(|(key, _)| key == name));
        if given != key && is_given(&key) {
            continue;
        }
        builder = builder.set_override(&key, value).map_err(|e| ConfigError::Value(e.to_string()))?;
        places.outer.push((key, place));
    }
    Ok(builder)
}

/// Returns, for each renamed key in the file, a TOML line under the new name, unless the file has that too. Adds a warning for
/// each renamed key.
fn renamed_in_file(path: &Path, text: &str, warnings: &mut Vec<String>) -> Vec<String> {
    let Ok(document) = Document::parse(text) else { return Vec::new() };
    let find = |key: &str| key.split('.').try_fold(document.as_item(), |item, name| item.get(name));
    let mut renamed = Vec::new();
    for (old, new) in RENAMED {
        let Some(span) = find(old).and_then(toml_edit::Item::span) else { continue };
        warnings.push(rename_warning(&format!("{}:{}", path.display(), line_of(text, span.start)), old, new));
        if find(new).is_none() {
            renamed.push(format!("{new} = {}\n", &text[span]));
        }
    }
    renamed
}

fn rename_warning(place: &str, old: &str, new: &str) -> String {
    format!("{place}: {old} is now called {new}; the old name still works")
}

/// The places of settings: in the file, and in the layers over it, the outermost last.
#[derive(Default)]
pub struct Places<'a> {
    file: Option<(&'a Path, String)>,
    outer: Vec<(String, String)>,
    /// Keys under an old name.
    warnings: Vec<String>,
}

impl Places<'_> {
    /// Adds the place of the value to an error of an invalid value.
    pub fn locate(&self, error: ConfigError) -> ConfigError {
        match error {
            ConfigError::Invalid { key, value, reason, .. } => {
                // The value of a table is the name of the invalid entry.
                let place = self.find(&format!("{key}.{value}")).or_else(|| self.find(key));
                let place = place.map_or(String::new(), |place| format!("{place}: "));
                ConfigError::Invalid { place, key, value, reason }
            }
            error => error,
        }
    }

    /// Returns a warning for each key under an old name, and for each removed environment variable.
    pub fn into_warnings(self) -> Vec<String> {
        self.warnings
    }

    /// Returns the present name of a key, with a warning if it is an old one.
    fn present_name(&mut self, key: String, place: &str) -> String {
        let Some((old, new)) = RENAMED.iter().find(|(old, _)| *old == key) else { return key };
        self.warnings.push(rename_warning(place, old, new));
        (*new).to_owned()
    }

    /// Returns the place of the value that is in effect.
    fn find(&self, key: &str) -> Option<String> {
        let outer = self.outer.iter().rfind(|(there, _)| there == key);
        let old = RENAMED.iter().find(|(_, new)| *new == key).map(|(old, _)| *old);
        outer.map(|(_, place)| place.clone()).or_else(|| self.line(key)).or_else(|| self.line(old?))
    }

    fn line(&self, key: &str) -> Option<String> {
        let (path, text) = self.file.as_ref()?;
        let document = Document::parse(text.as_str()).ok()?;
        let mut item = document.as_item();
        for name in key.split('.') {
            item = item.get(name)?;
        }
        Some(format!("{}:{}", path.display(), line_of(text, item.span()?.start)))
    }

    /// Returns the error for a value of the wrong type, with key and place.
    fn wrong_value(&self, error: &config::ConfigError) -> ConfigError {
        let (key, reason) = match error {
            config::ConfigError::At { key: Some(key), error, .. } => (key, error.to_string()),
            config::ConfigError::Type { key: Some(key), unexpected, expected, .. } => {
                (key, format!("invalid type: {unexpected}, expected {expected}"))
            }
            other => return ConfigError::Value(other.to_string()),
        };
        let place = self.find(key).map_or(String::new(), |place| format!("{place}: "));
        ConfigError::Value(format!("{place}{key}: {reason}"))
    }
}

/// The keys of the defaults.
struct Known(Vec<String>);

impl Known {
    fn from_defaults(defaults: &str) -> Self {
        let defaults = Document::parse(defaults).expect("the defaults inside the program are TOML");
        let mut keys = Vec::new();
        walk("", defaults.as_table(), &mut |key, _| keys.push(key.to_owned()));
        Known(keys)
    }

    /// Refuses the first unknown key of a file, with its line.
    fn expect_file(&self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let at = |span: Option<Range<usize>>| match span {
            Some(span) => format!("{}:{}", path.display(), line_of(text, span.start)),
            None => path.display().to_string(),
        };
        let document = Document::parse(text)
            .map_err(|e| ConfigError::Syntax { place: at(e.span()), reason: e.message().trim().to_owned() })?;
        let mut found = Ok(());
        walk("", document.as_table(), &mut |key, span| {
            if found.is_ok() {
                found = self.expect(key, || at(span));
            }
        });
        found
    }

    /// Refuses an unknown key; the names of classes and groups are free.
    fn expect(&self, key: &str, place: impl FnOnce() -> String) -> Result<(), ConfigError> {
        let threshold = |class: &str| matches!(class.rsplit_once('.'), None | Some((_, "enter" | "leave")));
        let group = |name: &str| !name.contains('.');
        let free = key == "decide.classes"
            || key.strip_prefix("decide.classes.").is_some_and(threshold)
            || key.strip_prefix("fleet.groups.").is_some_and(group);
        let renamed = RENAMED.iter().any(|(old, _)| *old == key);
        if free || renamed || self.0.iter().any(|known| known == key) {
            return Ok(());
        }
        let nearest = self
            .0
            .iter()
            .map(|known| (distance(known, key), known))
            .min_by_key(|(far, _)| *far)
            .filter(|(far, _)| *far <= 3);
        let hint = nearest.map_or(String::new(), |(_, nearest)| format!(", did you mean `{nearest}`?"));
        Err(ConfigError::Unknown { place: place(), key: key.into(), hint })
    }
}

/// Visits every key below `table`, a table before its keys, each with its span in the text.
fn walk(prefix: &str, table: &dyn TableLike, visit: &mut dyn FnMut(&str, Option<Range<usize>>)) {
    for (name, item) in table.iter() {
        let key = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
        visit(&key, table.get_key_value(name).and_then(|(key, _)| key.span()).or(item.span()));
        if let Some(inner) = item.as_table_like() {
            walk(&key, inner, visit);
        }
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
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
