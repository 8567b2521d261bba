//! Several layers of settings, one over the other, and where in them a mistake stands.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use config::builder::DefaultState;
use config::{ConfigBuilder, Environment, FileFormat};
use serde::de::DeserializeOwned;
use toml_edit::{Document, TableLike};

use super::ConfigError;

/// `BLOOMCAST__CAMERA__DEVICE=/dev/video2`
const ENV_PREFIX: &str = "BLOOMCAST";
const ENV_SEPARATOR: &str = "__";

/// `defaults` under `file` under the environment's `BLOOMCAST__…` under `overrides` (`key=value`). A key
/// that the defaults do not have, and a value of the wrong kind, are named with their place.
pub fn merge<T: DeserializeOwned>(
    defaults: &str,
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    overrides: &[String],
) -> Result<T, ConfigError> {
    let (known, mut places) = (Known::of(defaults), Places::default());
    let mut builder = config::Config::builder().add_source(config::File::from_str(defaults, FileFormat::Toml));
    if let Some(path) = file {
        let text =
            fs::read_to_string(path).map_err(|e| ConfigError::Read { path: path.into(), reason: e.to_string() })?;
        known.expect_file(path, &text)?;
        builder = builder.add_source(config::File::from_str(&text, FileFormat::Toml));
        places.file = Some((path, text));
    }
    builder = builder.add_source(variables(environment, &known, &mut places)?);
    builder = flags(builder, overrides, &known, &mut places)?;
    let merged = builder.build().map_err(|e| ConfigError::Value(e.to_string()))?;
    merged.try_deserialize().map_err(|e| places.wrong_value(&e))
}

fn variables(
    environment: impl Iterator<Item = (String, String)>,
    known: &Known,
    places: &mut Places<'_>,
) -> Result<Environment, ConfigError> {
    let prefix = format!("{ENV_PREFIX}{ENV_SEPARATOR}");
    let ours: HashMap<String, String> = environment.filter(|(name, _)| name.starts_with(&prefix)).collect();
    for name in ours.keys() {
        let key = name[prefix.len()..].to_lowercase().replace(ENV_SEPARATOR, ".");
        let place = format!("the environment's {name}");
        known.expect(&key, || place.clone())?;
        places.outer.push((key, place));
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
        builder = builder.set_override(key, value).map_err(|e| ConfigError::Value(e.to_string()))?;
        places.outer.push((key.to_owned(), place));
    }
    Ok(builder)
}

/// Where settings were made: in the file, and in the layers over it, the outermost last.
#[derive(Default)]
struct Places<'a> {
    file: Option<(&'a Path, String)>,
    outer: Vec<(String, String)>,
}

impl Places<'_> {
    /// The place whose value counts.
    fn of(&self, key: &str) -> Option<String> {
        let outer = self.outer.iter().rfind(|(there, _)| there == key);
        outer.map(|(_, place)| place.clone()).or_else(|| self.line(key))
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

    /// Names the key and the place of a value of the wrong kind.
    fn wrong_value(&self, error: &config::ConfigError) -> ConfigError {
        let (key, reason) = match error {
            config::ConfigError::At { key: Some(key), error, .. } => (key, error.to_string()),
            config::ConfigError::Type { key: Some(key), unexpected, expected, .. } => {
                (key, format!("invalid type: {unexpected}, expected {expected}"))
            }
            other => return ConfigError::Value(other.to_string()),
        };
        let place = self.of(key).map_or(String::new(), |place| format!("{place}: "));
        ConfigError::Value(format!("{place}{key}: {reason}"))
    }
}

/// Every key of the defaults.
struct Known(Vec<String>);

impl Known {
    fn of(defaults: &str) -> Self {
        let defaults = Document::parse(defaults).expect("the defaults inside the program are TOML");
        let mut keys = Vec::new();
        walk("", defaults.as_table(), &mut |key, _| keys.push(key.to_owned()));
        Known(keys)
    }

    /// Names the first key of a file that is not among them, with its line.
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

    /// Refuses a key that is neither among them nor one of those whose names are free: a threshold of a single class, a group
    /// of devices.
    fn expect(&self, key: &str, place: impl FnOnce() -> String) -> Result<(), ConfigError> {
        let threshold = |class: &str| matches!(class.rsplit_once('.'), None | Some((_, "enter" | "leave")));
        let group = |name: &str| !name.contains('.');
        let free = key == "decide.classes"
            || key.strip_prefix("decide.classes.").is_some_and(threshold)
            || key.strip_prefix("fleet.groups.").is_some_and(group);
        if free || self.0.iter().any(|known| known == key) {
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

/// Visits every key below `table`, a table's before those in it, each with its place in the text.
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

/// How many letters must be changed, put in or taken out (Levenshtein).
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
