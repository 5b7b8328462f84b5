//! `tidemill dataset export`

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use tidemill_rlhf::dataset::Datasets;
use tidemill_rlhf::dataset::format::{self, Format, Lines, Selection};
use tidemill_rlhf::dataset::query::RowKind;
use tidemill_rlhf::quality::Split;
use tidemill_store::Snapshot;

use super::build_args::named;
use super::{DatasetCommandError, say};
use crate::cli::store_args::StoreCommandError;

/// What `dataset export` is asked.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// NAME (its newest) or NAME@VERSION
    dataset: String,
    /// Form of the lines: trl (TRL and Hugging Face), openai (fine-tuning), tidemill (all columns with lineage)
    #[arg(long, value_name = "FORM", default_value = "trl", value_parser = named::<Format>)]
    format: Format,
    /// Folder to write to, one file per kind and part [default: standard output]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Only rows of this kind
    #[arg(long, value_name = "KIND", value_parser = named::<RowKind>)]
    kind: Option<RowKind>,
    /// Only this part: train, held_out
    #[arg(long, value_name = "PART", value_parser = named::<Split>)]
    split: Option<Split>,
    /// Rows that the quality report would drop, too
    #[arg(long)]
    dropped: bool,
    /// Although a person in it was erased since
    #[arg(long)]
    tainted: bool,
}

/// Writes rows, and says what became of the others.
pub async fn export(datasets: &Datasets, args: &ExportArgs) -> Result<ExitCode, DatasetCommandError> {
    let snapshot = datasets.find(&args.dataset).await?;
    let format = args.format;
    let reference = format!("{}@{}", snapshot.name, snapshot.version);
    if snapshot.tainted.is_some() && !args.tainted {
        return Err(DatasetCommandError::Tainted(reference));
    }
    let kinds: Vec<RowKind> = [RowKind::Preference, RowKind::Unpaired, RowKind::Demonstration]
        .into_iter()
        .filter(|kind| snapshot.row_counts["kinds"][kind.as_str()].is_u64() && args.kind.is_none_or(|wanted| wanted == *kind))
        .collect();
    let mut written = Lines::default();
    match &args.out {
        None if kinds.len() > 1 && format != Format::Tidemill => return Err(DatasetCommandError::Kinds(reference)),
        None => {
            let selection = Selection { kind: args.kind, split: args.split, dropped: args.dropped };
            // A reader such as `head` may have seen enough; that is no failure.
            let mut out = std::io::stdout().lock();
            write(datasets, &snapshot, selection, format, &mut written, |bytes| Ok(out.write_all(bytes).is_ok())).await?;
        }
        Some(folder) => {
            std::fs::create_dir_all(folder).map_err(failed(folder))?;
            for kind in kinds {
                for split in
                    [Split::Train, Split::HeldOut].into_iter().filter(|part| args.split.is_none_or(|wanted| wanted == *part))
                {
                    let part = match split {
                        Split::Train => "train",
                        Split::HeldOut => "held_out",
                    };
                    let path = folder.join(format!("{}-{part}.jsonl", kind.as_str()));
                    let selection = Selection { kind: Some(kind), split: Some(split), dropped: args.dropped };
                    if to_file(datasets, &snapshot, selection, format, &mut written, &path).await? {
                        say(&path.display().to_string());
                    }
                }
            }
        }
    }
    let mut note = format!("{} rows", written.rows);
    if written.dropped > 0 {
        note.push_str(&format!(", {} left out that the quality report drops (--dropped keeps them)", written.dropped));
    }
    if written.no_form > 0 {
        note.push_str(&format!(", {} left out that this form has no place for", written.no_form));
    }
    let _ = writeln!(std::io::stderr(), "{note}");
    Ok(ExitCode::SUCCESS)
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> DatasetCommandError {
    let failed = StoreCommandError::file(path);
    move |source| failed(source).into()
}

/// Streams selected rows to `out`, which answers whether it wants more, and counts them in `written`.
async fn write(
    datasets: &Datasets,
    snapshot: &Snapshot,
    selection: Selection,
    format: Format,
    written: &mut Lines,
    mut out: impl FnMut(&[u8]) -> Result<bool, DatasetCommandError>,
) -> Result<(), DatasetCommandError> {
    let mut stream = datasets.rows(snapshot).await?;
    while let Some(batch) = stream.next_rows().await? {
        let lines = format::lines(&batch, selection, format);
        written.rows += lines.rows;
        written.no_form += lines.no_form;
        written.dropped += lines.dropped;
        if !lines.bytes.is_empty() && !out(&lines.bytes)? {
            break;
        }
    }
    Ok(())
}

/// The same to a file, which is under its name only when it is whole; whether there was a row to write.
async fn to_file(
    datasets: &Datasets,
    snapshot: &Snapshot,
    selection: Selection,
    format: Format,
    written: &mut Lines,
    path: &Path,
) -> Result<bool, DatasetCommandError> {
    let beside = path.with_extension("new");
    let mut file: Option<BufWriter<File>> = None;
    write(datasets, snapshot, selection, format, written, |bytes| {
        let mut open = match file.take() {
            Some(open) => open,
            None => BufWriter::new(File::create(&beside).map_err(failed(&beside))?),
        };
        open.write_all(bytes).map_err(failed(&beside))?;
        file = Some(open);
        Ok(true)
    })
    .await?;
    let Some(mut file) = file else { return Ok(false) };
    file.flush().map_err(failed(&beside))?;
    std::fs::rename(&beside, path).map_err(failed(path))?;
    Ok(true)
}
