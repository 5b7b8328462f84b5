//! What a person types.

mod adapter;
mod audit;
mod banner;
mod bench;
mod chat;
mod data;
mod dataset;
mod eval;
mod jobs;
mod key;
mod label;
mod lineage;
mod loops;
mod prune;
mod pull;
mod rollout;
mod serve;
mod shutdown;
mod store_args;
mod train;

use crate::clock::when;
use clap::{Parser, Subcommand};
use std::io::Write;
use std::process::ExitCode;

/// What the audit calls whoever types commands.
const COMMAND_LINE: &str = "command line";

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
    /// Build, read and exchange datasets.
    Dataset(Box<dataset::DatasetArgs>),
    /// Train an adapter on a dataset.
    Train(Box<train::TrainArgs>),
    /// Measure adapters beside their base and each other.
    Eval(Box<eval::EvalArgs>),
    /// Keep adapters and say which are served; merge and export them.
    Adapter(Box<adapter::AdapterArgs>),
    /// Measure the engine alone on a model, without HTTP.
    Bench(bench::BenchArgs),
    /// List, cancel, pause and resume fine-tuning jobs.
    Jobs(jobs::JobsArgs),
    /// Make, list and revoke API keys.
    Key(key::KeyArgs),
    /// Erase a person's records.
    Data(data::DataArgs),
    /// Show who did what.
    Audit(audit::AuditArgs),
    /// Show where an answer comes from, and what came of a judgement.
    Lineage(lineage::LineageArgs),
    /// Move labeling queues to Label Studio or Argilla and back.
    Label(label::LabelArgs),
    /// Look at loops from feedback to adapters, and steer them.
    Loop(loops::LoopArgs),
    /// Start and watch rollouts of a running server; check an assignment, plan the traffic.
    Rollout(rollout::RolloutArgs),
}

/// Runs the command line and says how it ended.
pub fn run() -> ExitCode {
    let result: Result<(), Box<dyn std::error::Error>> = match Cli::parse().command {
        Command::Dataset(args) => match dataset::run(&args) {
            Ok(status) => return status,
            Err(error) => Err(error),
        },
        Command::Train(args) => match train::run(&args) {
            Ok(status) => return status,
            Err(error) => Err(error.into()),
        },
        Command::Eval(args) => match eval::run(&args) {
            Ok(status) => return status,
            Err(error) => Err(error.into()),
        },
        Command::Serve(args) => serve::run(&args).map_err(Into::into),
        Command::Pull(args) => pull::run(&args).map_err(Into::into),
        Command::Chat(args) => chat::run(&args).map_err(Into::into),
        Command::Adapter(args) => adapter::run(&args).map_err(Into::into),
        Command::Bench(args) => bench::run(&args).map_err(Into::into),
        Command::Jobs(args) => jobs::run(&args).map_err(Into::into),
        Command::Key(args) => key::run(&args).map_err(Into::into),
        Command::Data(args) => data::run(&args).map_err(Into::into),
        Command::Audit(args) => audit::run(&args).map_err(Into::into),
        Command::Lineage(args) => lineage::run(&args).map_err(Into::into),
        Command::Label(args) => label::run(&args).map_err(Into::into),
        Command::Loop(args) => loops::run(&args).map_err(Into::into),
        Command::Rollout(args) => rollout::run(&args).map_err(Into::into),
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
