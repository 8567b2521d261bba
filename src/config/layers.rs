//! Layers of settings, one over the other, and the places of errors in them.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use config::{FileFormat, Map, Source, Value, ValueKind};
use serde::de::DeserializeOwned;
use toml_edit::{Document, Item, TableLike};

use super::ConfigError;
use super::key::{Key, Known, RENAMED, ValueType, WrongValue};

/// First part of a variable's name: `BLOOMCAST__CAMERA__DEVICE=/dev/video2`.
const ENV_PREFIX: &str = "BLOOMCAST__";

/// Environment variables that were removed, and the keys that replace them.
const REMOVED_VARIABLES: [(&str, &str); 1] = [("BLOOMCAST_KERNELS", "model.kernels")];

/// Characters of a wrong value that an error repeats.
const SHOWN_CHARS_MAX: usize = 64;

/// Merges `defaults` under `file` under the environment's `BLOOMCAST__…` under `overrides` (`key=value`). Returns the settings
/// and their places.
///
/// # Errors
/// The file cannot be read or is not TOML, a key is not among the defaults, or a value has the wrong type or is out of range;
/// the error names the place.
pub fn merge<T: DeserializeOwned>(
    defaults: &str,
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    overrides: &[String],
) -> Result<(T, Places), ConfigError> {
    let (known, mut places) = (Known::from_defaults(defaults), Places::default());
    let mut builder = config::Config::builder().add_source(config::File::from_str(defaults, FileFormat::Toml));
    if let Some(path) = file {
        builder = builder.add_source(places.add(from_file(path, &known)?));
    }
    let mut variables = from_environment(environment, &known, &mut places.warnings)?;
    places.name_classes_alike(&mut variables);
    builder = builder.add_source(places.add(variables));
    builder = builder.add_source(places.add(from_flags(overrides, &known)?));
    let merged = builder.build().map_err(|e| ConfigError::Value(e.to_string()))?;
    let settings = merged.try_deserialize().map_err(|e| ConfigError::Value(e.to_string()))?;
    Ok((settings, places))
}

/// A setting of a layer, or a table of it.
#[derive(Debug, Clone)]
struct LayerEntry {
    key: Key,
    value: ValueKind,
    place: String,
}

/// The settings of one layer, in their order; a later one replaces an earlier one of the same key.
#[derive(Debug, Clone, Default)]
struct Layer(Vec<LayerEntry>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        let mut tables = Map::new();
        for LayerEntry { key, value, .. } in &self.0 {
            insert(&mut tables, key.names(), value);
        }
        Ok(tables)
    }
}

fn insert(table: &mut Map<String, Value>, names: &[String], value: &ValueKind) {
    let [name, inner @ ..] = names else { return };
    let is_table = !inner.is_empty() || matches!(value, ValueKind::Table(_));
    if !is_table {
        table.insert(name.clone(), Value::new(None, value.clone()));
        return;
    }
    let entry = table.entry(name.clone()).or_insert_with(|| Value::new(None, ValueKind::Table(Map::new())));
    if let ValueKind::Table(table) = &mut entry.kind {
        insert(table, inner, value);
    }
}

fn from_file(path: &Path, known: &Known) -> Result<Layer, ConfigError> {
    let text = fs::read_to_string(path).map_err(|e| ConfigError::Read { path: path.into(), reason: e.to_string() })?;
    // A byte-order mark, as editors on Windows write.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let document = Document::parse(text).map_err(|e| {
        let line = e.span().map_or(1, |span| line_of(text, span.start));
        let reason = e.message().trim().to_owned();
        ConfigError::Syntax { place: format!("{}:{line}", path.display()), reason }
    })?;
    let mut file = FileReader { path, text, known, layer: Layer::default() };
    file.read(&Key::default(), document.as_table())?;
    Ok(file.layer)
}

/// Walks a file's tables by key.
struct FileReader<'a> {
    path: &'a Path,
    text: &'a str,
    known: &'a Known,
    layer: Layer,
}

impl FileReader<'_> {
    fn read(&mut self, table: &Key, entries: &dyn TableLike) -> Result<(), ConfigError> {
        for (name, item) in entries.iter() {
            let key = table.child(name);
            let span = entries.get_key_value(name).and_then(|(key, _)| key.span()).or(item.span());
            let line = span.map_or(1, |span| line_of(self.text, span.start));
            let place = format!("{}:{line}", self.path.display());
            let kind = self.known.kind(&key).ok_or_else(|| unknown(&place, &key, self.known))?;
            let value = match (&kind, item.as_table_like(), item) {
                (ValueType::Table, Some(_), _) => Ok(ValueKind::Table(Map::new())),
                (_, None, Item::Value(value)) => kind.value(value),
                _ => Err((&kind).into()),
            };
            let value = value.map_err(|reason| {
                let shown = item.span().map_or("", |span| &self.text[span]);
                invalid(&place, &key, shown.lines().next().unwrap_or_default(), &reason)
            })?;
            self.layer.0.push(LayerEntry { key: key.clone(), value, place });
            if let Some(inner) = item.as_table_like() {
                self.read(&key, inner)?;
            }
        }
        Ok(())
    }
}

fn from_environment(
    environment: impl Iterator<Item = (String, String)>,
    known: &Known,
    warnings: &mut Vec<String>,
) -> Result<Layer, ConfigError> {
    let mut layer = Layer::default();
    for (name, text) in environment {
        if let Some(variable) = name.strip_prefix(ENV_PREFIX) {
            layer.0.push(from_text(Key::from_variable(variable), &text, format!("the environment's {name}"), known)?);
        } else if name.starts_with(ENV_PREFIX.trim_end_matches('_')) {
            warnings.push(ignored_variable(&name, known));
        }
    }
    Ok(layer)
}

fn ignored_variable(name: &str, known: &Known) -> String {
    let variable = |key: &str| format!("{ENV_PREFIX}{}", key.to_uppercase().replace('.', "__"));
    if let Some((_, key)) = REMOVED_VARIABLES.iter().find(|(removed, _)| name == *removed) {
        return format!("the environment variable {name} is ignored; use {key} or {}", variable(key));
    }
    let expected = match known.spelled_like(name.trim_start_matches(ENV_PREFIX.trim_end_matches('_'))) {
        Some(key) => variable(key),
        None => format!("{ENV_PREFIX}TABLE__KEY"),
    };
    format!("the environment variable {name} is ignored; two underscores separate the parts of a name: {expected}")
}

fn from_flags(overrides: &[String], known: &Known) -> Result<Layer, ConfigError> {
    let mut layer = Layer::default();
    for text in overrides {
        let (key, value) = text.split_once('=').ok_or_else(|| {
            ConfigError::Value(format!("--set {text}: expected KEY=VALUE, like camera.device=/dev/video2"))
        })?;
        layer.0.push(from_text(Key::parse(key.trim()), value, "--set".into(), known)?);
    }
    Ok(layer)
}

fn from_text(key: Key, text: &str, place: String, known: &Known) -> Result<LayerEntry, ConfigError> {
    let kind = known.kind(&key).ok_or_else(|| unknown(&place, &key, known))?;
    let value = kind.parse(text).map_err(|reason| invalid(&place, &key, &format!("{text:?}"), &reason))?;
    Ok(LayerEntry { key, value, place })
}

fn unknown(place: &str, key: &Key, known: &Known) -> ConfigError {
    let key = key.to_string();
    let hint = known.nearest(&key).map_or(String::new(), |nearest| format!(", did you mean `{nearest}`?"));
    ConfigError::Unknown { place: place.into(), key, hint }
}

fn invalid(place: &str, key: &Key, value: &str, reason: &WrongValue) -> ConfigError {
    let value = value.chars().take(SHOWN_CHARS_MAX).collect();
    ConfigError::Invalid { place: format!("{place}: "), key: key.to_string(), value, reason: reason.to_string() }
}

/// The places of the settings that are not defaults, the outermost layer's last.
#[derive(Debug, Default)]
pub struct Places {
    places: Vec<(Key, String)>,
    /// The length of `places` before each layer.
    layers: Vec<usize>,
    /// Keys under an old name, and variables that are ignored.
    warnings: Vec<String>,
}

impl Places {
    /// Adds the places of a layer's settings. A setting under its old name gets the present one, with a warning, or is left out
    /// where the layer has that too.
    fn add(&mut self, mut layer: Layer) -> Layer {
        for (old, new) in RENAMED {
            let (old_key, new_key) = (Key::parse(old), Key::parse(new));
            let has_new = layer.0.iter().any(|entry| entry.key == new_key);
            for entry in layer.0.iter().filter(|entry| entry.key == old_key) {
                self.warnings.push(format!("{}: {old} is now called {new}; the old name still works", entry.place));
            }
            layer.0.retain(|entry| !(has_new && entry.key == old_key));
            for entry in layer.0.iter_mut().filter(|entry| entry.key == old_key) {
                entry.key = new_key.clone();
            }
        }
        self.layers.push(self.places.len());
        self.places.extend(layer.0.iter().map(|entry| (entry.key.clone(), entry.place.clone())));
        layer
    }

    /// Gives the classes of a layer the names that differ in case alone and that the layers before have: the names of environment
    /// variables are upper case.
    fn name_classes_alike(&self, layer: &mut Layer) {
        fn class(key: &Key) -> Option<&str> {
            match key.names() {
                [decide, classes, class, ..] if decide == "decide" && classes == "classes" => Some(class),
                _ => None,
            }
        }
        let known = || self.places.iter().filter_map(|(key, _)| class(key));
        for entry in &mut layer.0 {
            let Some(written) = class(&entry.key).filter(|written| !known().any(|known| known == *written)) else {
                continue;
            };
            let alike = known().find(|known| known.to_lowercase() == written.to_lowercase());
            if let Some(alike) = alike {
                let mut names = entry.key.names().to_vec();
                alike.clone_into(&mut names[2]);
                entry.key = Key::new(names);
            }
        }
    }

    /// Returns whether a setting is in the layer of another one or in one over it.
    pub fn is_in_same_or_outer_layer(&self, key: &Key, other: &Key) -> bool {
        let layer = |key: &Key| {
            let place = self.places.iter().rposition(|(there, _)| there == key)?;
            self.layers.iter().rposition(|start| *start <= place)
        };
        layer(key).is_some_and(|layer_of_key| layer(other).is_none_or(|layer| layer_of_key >= layer))
    }

    /// Adds the place of the value to an error of an invalid value.
    pub fn locate(&self, error: ConfigError) -> ConfigError {
        match error {
            ConfigError::Invalid { key, value, reason, .. } => {
                // The value of a table is the name of the invalid entry.
                let table = Key::parse(&key);
                let place = self.find(&table.child(&value)).or_else(|| self.find(&table));
                let place = place.map_or(String::new(), |place| format!("{place}: "));
                ConfigError::Invalid { place, key, value, reason }
            }
            error => error,
        }
    }

    /// Returns the place of the value that is in effect; `None` for a default.
    pub fn find(&self, key: &Key) -> Option<&str> {
        self.places.iter().rfind(|(there, _)| there == key).map(|(_, place)| place.as_str())
    }

    /// Returns the warnings, each once.
    pub fn into_warnings(self) -> Vec<String> {
        let mut seen = HashSet::new();
        self.warnings.into_iter().filter(|warning| seen.insert(warning.clone())).collect()
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}
