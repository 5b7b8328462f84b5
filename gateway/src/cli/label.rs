//! `tidemill label`

use crate::cli::store_args::{StoreArgs, StoreCommandError};
use crate::clock::now;
use crate::interchange::{Format, Summary, label_studio, take};
use serde_json::Value;
use std::fmt::Display;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tidemill_store::Store;
use tidemill_store::label::{LabelError, Labels, Queue, TaskState};

/// Tasks that are read and written in one go.
const PAGE: u32 = 1000;

/// Moves labeling queues to Label Studio or Argilla, and what people said there back.
#[derive(Debug, clap::Args)]
pub struct LabelArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write a queue's tasks, and what a project is made from, as the tool imports them.
    Export(ExportArgs),
    /// Read what people said; the same file again changes nothing.
    Import(ImportArgs),
}

/// Which queue of which store.
#[derive(Debug, clap::Args)]
struct Place {
    /// Name or id of the queue
    #[arg(long, value_name = "QUEUE")]
    queue: String,
    /// The other tool
    #[arg(long, value_enum)]
    format: Format,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, clap::Args)]
struct ExportArgs {
    #[command(flatten)]
    place: Place,
    /// Only tasks that still lack verdicts
    #[arg(long)]
    open: bool,
    /// Also write the project: Label Studio's labeling configuration (FILE.xml) or the body of its POST /api/projects (FILE.json),
    /// Argilla's settings (FILE.json)
    #[arg(long, value_name = "FILE")]
    project: Option<PathBuf>,
    /// Where the tasks go
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

#[derive(Debug, clap::Args)]
struct ImportArgs {
    #[command(flatten)]
    place: Place,
    /// Argilla: take responses without a status (`records.to_json`) as submitted
    #[arg(long)]
    all_submitted: bool,
    /// Label Studio's JSON export, or Argilla's records
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Runs the command.
pub fn run(args: &LabelArgs) -> Result<(), StoreCommandError> {
    match &args.command {
        Command::Export(args) => args.place.store.with(|store| export(store, args)),
        Command::Import(args) => import(args),
    }
}

async fn export(store: Store, args: &ExportArgs) -> Result<(), StoreCommandError> {
    let (labels, queue) = args.place.find(&store).await?;
    let format = args.place.format;
    if let Some(path) = &args.project {
        let xml = format == Format::LabelStudio && path.extension().is_some_and(|extension| extension == "xml");
        let text = if xml { label_studio::CONFIG.to_owned() } else { format!("{:#}\n", format.project(&queue)) };
        std::fs::write(path, text).map_err(|error| unusable("write", path, error))?;
    }
    let state = if args.open { TaskState::Open } else { TaskState::Any };
    let failed = |error| unusable("write", &args.file, error);
    let mut out = BufWriter::new(File::create(&args.file).map_err(failed)?);
    let (mut after, mut count) = (None, 0_u64);
    loop {
        let tasks = labels.list_tasks(queue.id, state, after, PAGE).await.map_err(refused)?;
        for task in &tasks {
            let comma = if count == 0 { "[" } else { "," };
            write!(out, "{comma}\n{}", format.task(&queue, task)).map_err(failed)?;
            count += 1;
        }
        match tasks.last() {
            Some(last) if tasks.len() == PAGE as usize => after = Some(last.id),
            _ => break,
        }
    }
    writeln!(out, "{}", if count == 0 { "[]" } else { "\n]" }).map_err(failed)?;
    out.flush().map_err(failed)?;
    say(&format!("{count} tasks of queue '{}' are in {}", queue.name, args.file.display()));
    Ok(())
}

fn import(args: &ImportArgs) -> Result<(), StoreCommandError> {
    let path = &args.file;
    let text = std::fs::read(path).map_err(|error| unusable("read", path, error))?;
    let file: Value =
        serde_json::from_slice(&text).map_err(|error| unusable("import", path, format!("it is not JSON ({error})")))?;
    drop(text);
    let reading = args.place.format.read(&file, args.all_submitted).map_err(|reason| unusable("import", path, reason))?;
    drop(file);
    let summary = args.place.store.with(|store| async move {
        let (labels, queue) = args.place.find(&store).await?;
        take(&labels, &queue, reading, now(), None).await.map_err(refused)
    })?;
    report(&summary)
}

fn report(summary: &Summary) -> Result<(), StoreCommandError> {
    for refusal in &summary.refusals {
        say(&format!("{}: {}", refusal.place, refusal.message));
    }
    say(&summary.to_string());
    if summary.refused == 0 {
        return Ok(());
    }
    let text = format!("{} entries could not be taken; the first are listed above, everything else was taken", summary.refused);
    Err(StoreCommandError::Usage(text))
}

impl Place {
    async fn find(&self, store: &Store) -> Result<(Labels, Queue), StoreCommandError> {
        let labels = Labels::new(store.database());
        let queue = labels.queue(&self.queue).await.map_err(refused)?;
        Ok((labels, queue))
    }
}

fn refused(error: LabelError) -> StoreCommandError {
    match error {
        LabelError::Database(error) => StoreCommandError::Store(error.into()),
        LabelError::Store(error) => StoreCommandError::Store(error),
        other => StoreCommandError::Usage(other.to_string()),
    }
}

fn unusable(action: &str, path: &Path, reason: impl Display) -> StoreCommandError {
    StoreCommandError::Usage(format!("cannot {action} {}: {reason}", path.display()))
}

fn say(text: &str) {
    // A closed standard output is no reason to stop.
    let _ = writeln!(std::io::stdout(), "{text}");
}
