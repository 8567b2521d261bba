//! Parses the command line, runs the command, prints its error and returns its exit code.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let command = cli::Cli::parse();
    match command.run() {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of standard output has closed it.
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            // Each error names its cause itself.
            eprintln!("error: {}", failure.error);
            ExitCode::from(failure.code)
        }
    }
}
