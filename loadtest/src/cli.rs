//! The command line.

use crate::load::Endpoint;
use crate::prompts::Prefix;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Load generator for any OpenAI-compatible server, and side-by-side comparison of servers.
#[derive(Debug, Parser)]
#[command(name = "tidemill-loadtest", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure one server that is already running.
    Run(RunArgs),
    /// Start several servers in turn as a plan describes, measure each, write tables and a plot.
    Compare(CompareArgs),
    /// Measure how fast a Tidemill server takes and acknowledges feedback.
    Feedback(FeedbackArgs),
    /// Print prompts as a JSON array.
    Prompts(PromptArgs),
}

/// The texts to send.
#[derive(Debug, Clone, Args)]
pub struct PromptArgs {
    /// Whether prompts share a long beginning.
    #[arg(long, value_enum, default_value = "cold")]
    pub prefix: Prefix,
    /// Tokens of each prompt's own text, roughly.
    #[arg(long, default_value_t = 128)]
    pub prompt_tokens: usize,
    /// Tokens of the shared beginning, roughly.
    #[arg(long, default_value_t = 1000)]
    pub shared_tokens: usize,
    /// The same seed gives the same prompts.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Requests in total.
    #[arg(short = 'n', long, default_value_t = 64)]
    pub requests: u64,
}

/// Measure one server.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Base URL of the API, with its version part.
    #[arg(long, default_value = "http://127.0.0.1:8080/v1")]
    pub base_url: String,
    /// The model's name as the server knows it.
    #[arg(short, long, default_value = "default")]
    pub model: String,
    /// Which endpoint takes the prompts.
    #[arg(long, value_enum, default_value = "completions")]
    pub endpoint: Endpoint,
    /// Requests kept in flight.
    #[arg(short = 'c', long, default_value_t = 8)]
    pub streams: usize,
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// Requests sent first and not counted.
    #[arg(long, default_value_t = 1)]
    pub warmup: u64,
    /// Tokens to generate per request.
    #[arg(long, default_value_t = 64)]
    pub max_tokens: u64,
    /// Send `ignore_eos`, so that every answer has its full length.
    #[arg(long)]
    pub ignore_eos: bool,
    /// A JSON object of more request fields, such as '{"min_tokens": 64}'.
    #[arg(long, default_value = "{}")]
    pub body: String,
    /// Start no request after this many seconds.
    #[arg(long)]
    pub duration: Option<f64>,
    /// Seconds that one request may take.
    #[arg(long, default_value_t = 120.0)]
    pub request_timeout: f64,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
    /// Allow a server that is not on this machine.
    #[arg(long)]
    pub allow_remote: bool,
}

/// Measure feedback.
#[derive(Debug, Args)]
pub struct FeedbackArgs {
    /// Base URL of the API, with its version part.
    #[arg(long, default_value = "http://127.0.0.1:8080/v1")]
    pub base_url: String,
    /// A model, asked for the one answer that is judged.
    #[arg(short, long, default_value = "default")]
    pub model: String,
    /// Connections, each with one request at a time.
    #[arg(short = 'c', long, default_value_t = 16)]
    pub connections: usize,
    /// Judgements per request; more than one is sent as an array.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Seconds.
    #[arg(long, default_value_t = 10.0)]
    pub duration: f64,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
    /// Allow a server that is not on this machine.
    #[arg(long)]
    pub allow_remote: bool,
}

/// Compare servers.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// The plan: servers, loads and rounds, as TOML.
    pub plan: PathBuf,
    /// Write tables and plot into this document, between its `bench` markers; the plot lies beside it.
    #[arg(long)]
    pub document: Option<PathBuf>,
    /// Write all measurements to this file as JSON.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Measure nothing: write the document again from what an earlier comparison saved with `--json`.
    #[arg(long, value_name = "RESULTS.json", requires = "document")]
    pub from: Option<PathBuf>,
    /// Only servers whose name contains this text, in any case; may be repeated.
    #[arg(long)]
    pub only: Vec<String>,
    /// Rounds, instead of the plan's number.
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Take requests of each load down by this factor, for a rehearsal.
    #[arg(long, default_value_t = 1)]
    pub divide_requests: u64,
    /// Allow servers that are not on this machine.
    #[arg(long)]
    pub allow_remote: bool,
}
