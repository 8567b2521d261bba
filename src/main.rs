//! Parses, sets up the log, dispatches, and turns errors into exit codes.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let command = cli::Cli::parse();
    match command.run() {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read what was written has seen enough.
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            // Each error names its cause itself.
            eprintln!("error: {}", failure.error);
            ExitCode::from(failure.code)
        }
    }
}
