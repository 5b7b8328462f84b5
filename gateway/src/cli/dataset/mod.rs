//! `tidemill dataset`

mod bar;
mod build_args;
mod export;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde_json::Value;
use tidemill_rlhf::dataset::format::{self, Format};
use tidemill_rlhf::dataset::import::Input;
use tidemill_rlhf::dataset::query::date;
use tidemill_rlhf::dataset::snapshot::ImportOptions;
use tidemill_rlhf::dataset::{DatasetError, Datasets, Watch};
use tidemill_store::{DataDir, Snapshot, Store, StoreError};

use super::COMMAND_LINE;
use super::store_args::{DatasetStoreArgs, StoreCommandError};
use bar::watched;
use build_args::{BuildArgs, QualityArgs};
use export::ExportArgs;

/// Build, read and exchange immutable datasets of what people said about answers.
#[derive(Debug, Args)]
pub struct DatasetArgs {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    place: DatasetStoreArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a snapshot of feedback
    Build(Box<BuildArgs>),
    /// List the snapshots
    List {
        /// Only those of this name
        name: Option<String>,
    },
    /// Show what is in a snapshot
    Show {
        /// NAME (its newest) or NAME@VERSION
        dataset: String,
        /// Print this many rows, too
        #[arg(long, value_name = "N", default_value_t = 0)]
        rows: usize,
    },
    /// Write a snapshot as JSONL
    Export(ExportArgs),
    /// Make a snapshot of a file: JSONL (TRL, OpenAI), Parquet, or a Delta table
    Import(ImportArgs),
    /// Show the quality report of a snapshot
    Report(ReportArgs),
}

#[derive(Debug, Args)]
struct ImportArgs {
    /// What it is called
    name: String,
    /// File, folder of Parquet files, or folder or URL of a Delta table
    place: String,
    /// Version of a Delta table [default: the newest]
    #[arg(long, value_name = "VERSION")]
    at: Option<u64>,
    /// Leave bad lines out instead of refusing the file
    #[arg(long)]
    skip_bad: bool,
    /// Share to hold out for evaluation [default: rows keep the part they come with]
    #[arg(long, value_name = "0..0.5")]
    held_out: Option<f64>,
    /// For the choice of what is held out
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    quality: QualityArgs,
}

#[derive(Debug, Args)]
struct ReportArgs {
    /// NAME (its newest) or NAME@VERSION
    dataset: String,
    /// The whole report as JSON
    #[arg(long, conflicts_with = "html")]
    json: bool,
    /// Write the report's page to a file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Exit with 0 for pass, 1 for warn, 2 for fail or tainted, 3 when there is no answer
    #[arg(long)]
    gate: bool,
}

/// Why the command ended without what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum DatasetCommandError {
    /// The store, its configuration, or a file.
    #[error(transparent)]
    Store(#[from] StoreCommandError),
    /// The datasets.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// Several kinds and one output.
    #[error("{0} has rows of several kinds, which trainers want in files of their own; say --kind KIND or --out DIR")]
    Kinds(String),
    /// A person in it was erased.
    #[error("{0} holds rows of a person who was erased since; build the dataset again, or say --tainted")]
    Tainted(String),
}

impl From<StoreError> for DatasetCommandError {
    fn from(error: StoreError) -> Self {
        StoreCommandError::from(error).into()
    }
}

/// Runs the command; the exit status is the gate's, where one was asked for.
pub fn run(args: &DatasetArgs) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let gate = match &args.command {
        Command::Build(build) => build.quality.gate,
        Command::Import(import) => import.quality.gate,
        Command::Report(report) => report.gate,
        Command::List { .. } | Command::Show { .. } | Command::Export(_) => false,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match runtime.block_on(command(args)) {
        Err(error) if gate => {
            // 1 and 2 are verdicts; without one the pipeline gets a number of its own.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            Ok(ExitCode::from(3))
        }
        result => Ok(result?),
    }
}

async fn command(args: &DatasetArgs) -> Result<ExitCode, DatasetCommandError> {
    let config = args.place.config()?;
    let store = Store::open_for_command(&DataDir::new(&config.data), config.database.as_deref()).await?;
    let datasets = Datasets::new(store.clone(), config.datasets_root()).acting_as(COMMAND_LINE);
    let result = match &args.command {
        Command::Build(args) => Box::pin(build(&datasets, args)).await,
        Command::List { name } => list(&datasets, name.as_deref()).await,
        Command::Show { dataset, rows } => show(&datasets, dataset, *rows).await,
        Command::Export(args) => export::export(&datasets, args).await,
        Command::Import(args) => Box::pin(import(&datasets, args)).await,
        Command::Report(args) => report(&datasets, args).await,
    };
    store.close().await;
    result
}

/// A closed standard output is no reason to stop.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

async fn build(datasets: &Datasets, args: &BuildArgs) -> Result<ExitCode, DatasetCommandError> {
    let query = args.query()?;
    let options = args.quality.options().await?;
    let watch = Arc::new(Watch::default());
    let snapshot = watched(&watch, Box::pin(datasets.build(&args.name, &query, &options, &watch))).await?;
    say(&described(&snapshot));
    Ok(if args.quality.gate { gate(&snapshot) } else { ExitCode::SUCCESS })
}

async fn import(datasets: &Datasets, args: &ImportArgs) -> Result<ExitCode, DatasetCommandError> {
    let input = Input::at(&args.place, args.at)?;
    let options = args.quality.options().await?;
    let import = ImportOptions { skip_bad: args.skip_bad, held_out: args.held_out, seed: args.seed };
    let watch = Arc::new(Watch::default());
    let imported = watched(&watch, Box::pin(datasets.import(&args.name, &input, &import, &options, &watch))).await?;
    if imported.skipped.count > 0 {
        let _ = writeln!(std::io::stderr(), "{} and were left out", imported.skipped);
    }
    say(&described(&imported.snapshot));
    Ok(if args.quality.gate { gate(&imported.snapshot) } else { ExitCode::SUCCESS })
}

fn gate(snapshot: &Snapshot) -> ExitCode {
    match (snapshot.tainted.is_some(), snapshot.verdict.as_str()) {
        (false, "pass") => ExitCode::SUCCESS,
        (false, "warn") => ExitCode::from(1),
        _ => ExitCode::from(2),
    }
}

async fn list(datasets: &Datasets, name: Option<&str>) -> Result<ExitCode, DatasetCommandError> {
    let mut before = None;
    loop {
        let page = datasets.list(name, before, 100).await?;
        for snapshot in &page {
            let tainted = if snapshot.tainted.is_some() { "  tainted" } else { "" };
            say(&format!(
                "{:32} {:>9} rows  {:4}  {}  {}{tainted}",
                format!("{}@{}", snapshot.name, snapshot.version),
                snapshot.row_counts["rows"],
                snapshot.verdict,
                &snapshot.content_hash[..12.min(snapshot.content_hash.len())],
                date(snapshot.created),
            ));
        }
        before = page.last().map(|last| last.id);
        if page.len() < 100 {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

async fn show(datasets: &Datasets, reference: &str, rows: usize) -> Result<ExitCode, DatasetCommandError> {
    let snapshot = datasets.find(reference).await?;
    say(&described(&snapshot));
    say(&format!("  query        {}", snapshot.query));
    if rows > 0 {
        let mut stream = datasets.rows(&snapshot).await?;
        let mut left = rows;
        while left > 0
            && let Some(batch) = stream.next_rows().await?
        {
            batch.iter().take(left).for_each(|row| {
                if let Some(line) = format::line(row, Format::Tidemill) {
                    say(&Value::Object(line).to_string());
                }
            });
            left = left.saturating_sub(batch.len());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Several lines about a snapshot.
fn described(snapshot: &Snapshot) -> String {
    let counts = &snapshot.row_counts;
    let listed = |object: &Value| {
        let entries = object.as_object().into_iter().flatten();
        entries.map(|(name, count)| format!("{count} {}", name.replace('_', " "))).collect::<Vec<_>>().join(", ")
    };
    let mut lines = vec![
        format!("{}@{}  {}", snapshot.name, snapshot.version, date(snapshot.created)),
        format!("  rows         {}: {}; {}", counts["rows"], listed(&counts["kinds"]), listed(&counts["splits"])),
        format!("  people       {} raters, {} users", counts["raters"], counts["users"]),
        format!("  content      {}", snapshot.content_hash),
        format!("  table        {} at version {}", snapshot.location, snapshot.table_version),
    ];
    if counts["judgements"].is_number() {
        let left = listed(&counts["left_out"]);
        let left = if left.is_empty() { "none left out".to_owned() } else { format!("left out: {left}") };
        lines.insert(2, format!("  judgements   {}, of which {} used; {left}", counts["judgements"], counts["used"]));
    }
    if counts["rows_over_cap"].as_u64().is_some_and(|over| over > 0) {
        lines.insert(3, format!("  over the cap {} rows", counts["rows_over_cap"]));
    }
    if let Some(tainted) = &snapshot.tainted {
        lines.push(format!("  tainted      {}; do not train on it", tainted["reason"].as_str().unwrap_or("yes")));
    }
    lines.push(format!("  quality      {}", snapshot.verdict));
    for check in snapshot.report["checks"].as_array().into_iter().flatten() {
        if matches!(check["status"].as_str(), Some("warn" | "fail")) {
            let text = |key: &str| check[key].as_str().unwrap_or_default();
            lines.push(format!("    {:4}  {}: {}", text("status"), text("name"), text("explanation")));
        }
    }
    lines.join("\n")
}

async fn report(datasets: &Datasets, args: &ReportArgs) -> Result<ExitCode, DatasetCommandError> {
    let snapshot = datasets.find(&args.dataset).await?;
    if args.json {
        let bytes = datasets.report(&snapshot, false).await?;
        let _ = std::io::stdout().write_all(&bytes);
        say("");
    } else if let Some(path) = &args.html {
        let bytes = datasets.report(&snapshot, true).await?;
        std::fs::write(path, bytes).map_err(StoreCommandError::file(path))?;
        say(&path.display().to_string());
    } else {
        say(&described(&snapshot));
    }
    Ok(if args.gate { gate(&snapshot) } else { ExitCode::SUCCESS })
}
