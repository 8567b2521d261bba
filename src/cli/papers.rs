//! What a package has beside the program: man pages and completions, from the commands' definitions.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate_to};

use super::{Cli, Failure};

#[derive(Debug, Args)]
pub struct PapersArgs {
    /// A folder, which is made
    out: PathBuf,
}

pub fn papers(args: &PapersArgs) -> Result<(), Failure> {
    let at = |path: &Path, error: std::io::Error| anyhow!("{}: {error}", path.display());
    fs::create_dir_all(&args.out).map_err(|e| at(&args.out, e))?;
    clap_mangen::generate_to(Cli::command(), &args.out).map_err(|e| at(&args.out, e))?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut Cli::command(), "bloomcast", &args.out).map_err(|e| at(&args.out, e))?;
    }
    Ok(())
}
