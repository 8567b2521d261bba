//! Parses the command line, runs the command, prints its error and returns its exit code.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

use bloomcast::system::paths::without_controls;
use clap::Parser;

fn main() -> ExitCode {
    let command = cli::Cli::parse();
    match command.run() {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of standard output has closed it.
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            // Each error names its cause itself. An error may name a file with any name.
            let lines: Vec<String> = failure.error.to_string().split('\n').map(without_controls).collect();
            eprintln!("error: {}", lines.join("\n"));
            ExitCode::from(failure.code)
        }
    }
}
