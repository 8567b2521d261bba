//! The user's folders, after the XDG base directory specification; paths for people.

use std::path::{Path, PathBuf};

/// Returns the folder for files that can be made again: `$XDG_CACHE_HOME/bloomcast`, else `~/.cache/bloomcast`.
/// `None` if neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn user_cache() -> Option<PathBuf> {
    user_folder("XDG_CACHE_HOME", ".cache")
}

/// Returns the folder for keys and settings: `$XDG_CONFIG_HOME/bloomcast`, else `~/.config/bloomcast`.
/// `None` if neither `XDG_CONFIG_HOME` nor `HOME` is set.
pub fn user_config() -> Option<PathBuf> {
    user_folder("XDG_CONFIG_HOME", ".config")
}

fn user_folder(variable: &str, in_home: &str) -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = folder(variable).or_else(|| folder("HOME").map(|home| home.join(in_home)));
    base.map(|base| base.join("bloomcast"))
}

/// Returns a path to be shown: without line breaks and escape codes, which a file name from elsewhere may have.
pub fn printable(path: &Path) -> String {
    without_controls(&path.to_string_lossy())
}

/// Returns a text with its control characters escaped.
pub fn without_controls(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            control if control.is_control() => shown.extend(control.escape_default()),
            other => shown.push(other),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_with_escape_codes_is_one_harmless_line() {
        assert_eq!(printable(Path::new("a\n\u{1b}[31mb.jpg")), "a\\n\\u{1b}[31mb.jpg");
        assert_eq!(printable(Path::new("Gänse/ä.jpg")), "Gänse/ä.jpg");
    }
}
