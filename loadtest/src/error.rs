//! What can go wrong before a measurement starts. Failures of single requests are part of the result, not of this enum.

use std::path::{Path, PathBuf};

/// Errors of the load generator and of the comparison.
#[derive(Debug, thiserror::Error)]
pub enum LoadtestError {
    /// The server's address cannot be used.
    #[error("base URL `{url}`: {why}")]
    BaseUrl {
        /// The address as given.
        url: String,
        /// What is wrong with it and what would be right.
        why: String,
    },
    /// The comparison's description cannot be used.
    #[error("{path}: {why}")]
    Plan {
        /// The description's file.
        path: PathBuf,
        /// What is wrong with it, with the line where there is one.
        why: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// `--body` is not a JSON object.
    #[error("--body: {0}; give a JSON object such as '{{\"ignore_eos\": true}}'")]
    Body(String),
    /// No answer to judge.
    #[error("the server gave no answer that could be judged: {0}")]
    Answer(String),
    /// The document has no place for the results.
    #[error("{path} has no `{begin}` … `{end}` markers; add the two lines where the results belong")]
    Markers {
        /// The document.
        path: PathBuf,
        /// Opening marker.
        begin: &'static str,
        /// Closing marker.
        end: &'static str,
    },
    /// The terminal or pipe we print to is gone, or the runtime cannot start.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A result could not be written as JSON.
    #[error("results as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl LoadtestError {
    /// Names the file in an operating system error.
    pub fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::File { path: path.to_owned(), source }
    }
}
