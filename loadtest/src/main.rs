//! Load generator for any OpenAI-compatible server, and side-by-side comparison of servers.
//!
//! `run` measures one server in a closed loop (`load`), `compare` starts several in turn from a plan and writes tables and
//! a plot, `prompts` prints the texts that both send, `feedback` measures how fast Tidemill takes judgements. It is one thread, because it shares its cores with the server: no
//! chunk is parsed as JSON, nothing is spawned per request. What holds: a number is never reported without the errors
//! that belong to it, and no server that `compare` started outlives it.

mod chunk;
mod cli;
mod client;
mod compare;
mod document;
mod error;
mod feedback;
mod harness;
mod interrupt;
mod load;
mod machine;
mod markdown;
mod measurement;
mod plan;
mod plot;
mod process;
mod prompts;
mod results;
mod run;
mod sse;
mod target;

use crate::cli::{Cli, Command};
use crate::error::LoadtestError;
use clap::Parser;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match start(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            // Standard error is all that is left to tell; where it is closed, the exit code tells.
            writeln!(std::io::stderr(), "tidemill-loadtest: {error}").ok();
            ExitCode::FAILURE
        }
    }
}

fn start(cli: &Cli) -> Result<ExitCode, LoadtestError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match &cli.command {
            Command::Run(args) => run::run(args).await,
            Command::Compare(args) => compare::compare(args).await,
            Command::Feedback(args) => feedback::run(args).await,
            Command::Prompts(args) => {
                let prompts = prompts::Prompts::new(args.seed, args.prefix, args.prompt_tokens, args.shared_tokens);
                let texts: Vec<String> = (0..args.requests).map(|index| prompts.get(index)).collect();
                writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&texts)?)?;
                Ok(ExitCode::SUCCESS)
            }
        }
    })
}
