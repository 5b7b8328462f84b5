//! What can go wrong with datasets.

use std::path::PathBuf;

use super::import::BadLines;
use super::query::InvalidQuery;

/// Errors of datasets.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The query cannot be meant.
    #[error("the query's {0}")]
    Query(#[from] InvalidQuery),
    /// A name that cannot be a folder.
    #[error(
        "'{0}' is not a dataset name: use up to 64 lower-case letters, digits, '.', '_' and '-', starting with a letter or digit"
    )]
    Name(String),
    /// No such snapshot.
    #[error("there is no dataset {0}; `tidemill dataset list` shows what there is")]
    NotFound(String),
    /// The query found nothing to make rows from.
    #[error("no rows: {0}")]
    Empty(String),
    /// A table's address.
    #[error("'{location}' cannot hold or give a dataset: {reason}")]
    Location {
        /// The address.
        location: String,
        /// Why not.
        reason: String,
    },
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Content that is not rows.
    #[error("{what} cannot be read: {reason}")]
    Unreadable {
        /// Which.
        what: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// Lines that are no rows.
    #[error("{0}; mend them, or leave them out with --skip-bad")]
    Lines(BadLines),
    /// More than fits.
    #[error(
        "the query finds more than {0} judgements, which do not fit in memory at once; narrow it with --since, --until or --model"
    )]
    TooMuch(usize),
    /// Stopped on request.
    #[error("interrupted; nothing was kept")]
    Interrupted,
    /// The table or its storage.
    #[error("the Delta table failed: {0}; see that its storage is there, has room and may be written")]
    Delta(#[from] Box<deltalake::DeltaTableError>),
    /// The store.
    #[error(transparent)]
    Store(#[from] tidemill_store::StoreError),
}

impl From<deltalake::DeltaTableError> for DatasetError {
    fn from(error: deltalake::DeltaTableError) -> Self {
        Self::Delta(Box::new(error))
    }
}
