//! What a person types.

mod banner;
mod bench;
mod chat;
mod pull;
mod serve;
mod shutdown;

use clap::{Parser, Subcommand};
use std::io::Write;
use std::process::ExitCode;

/// Serve open models behind OpenAI's API.
#[derive(Debug, Parser)]
#[command(name = "tidemill", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the server.
    Serve(Box<serve::ServeArgs>),
    /// Fetch a model into the data directory.
    Pull(pull::PullArgs),
    /// Chat in the terminal with any OpenAI-compatible server.
    Chat(chat::ChatArgs),
    /// Measure the engine alone on a model, without HTTP.
    Bench(bench::BenchArgs),
}

/// Runs the command line and says how it ended.
pub fn run() -> ExitCode {
    let result: Result<(), Box<dyn std::error::Error>> = match Cli::parse().command {
        Command::Serve(args) => serve::run(&args).map_err(Into::into),
        Command::Pull(args) => pull::run(&args).map_err(Into::into),
        Command::Chat(args) => chat::run(&args).map_err(Into::into),
        Command::Bench(args) => bench::run(&args).map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to tell it to when standard error is closed.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_setting_has_a_flag() {
        let mut command = Cli::command();
        let serve = command.find_subcommand_mut("serve").unwrap();
        let flags: Vec<String> = serve.get_arguments().filter_map(|a| a.get_long().map(str::to_owned)).collect();
        for key in crate::config::KEYS {
            assert!(flags.contains(&key.replace('_', "-")), "{key}");
        }
    }
}
