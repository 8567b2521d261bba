//! The user's folders, after the XDG base directory specification.

use std::path::PathBuf;

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
