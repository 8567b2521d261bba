//! Man pages and shell completions for a package, generated from the definitions of the commands.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate_to};

use super::{Cli, Failure};

#[derive(Debug, Args)]
pub struct ManpagesArgs {
    /// Output folder; it is created if it does not exist
    out: PathBuf,
}

/// Writes the man pages, and completions for bash, zsh and fish.
///
/// # Errors
///
/// [`Failure`] if a file or the folder cannot be written.
pub fn manpages(args: &ManpagesArgs) -> Result<(), Failure> {
    let failed = |path: &Path, error: std::io::Error| anyhow!("{}: {error}", path.display());
    fs::create_dir_all(&args.out).map_err(|e| failed(&args.out, e))?;
    clap_mangen::generate_to(Cli::command(), &args.out).map_err(|e| failed(&args.out, e))?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut Cli::command(), "bloomcast", &args.out).map_err(|e| failed(&args.out, e))?;
    }
    Ok(())
}
