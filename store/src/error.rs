//! What can go wrong with the data directory.

use std::path::PathBuf;

/// Errors of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Another process has the directory.
    #[error("{} is in use by another tidemill server; stop it, or give this one another --data directory", .0.display())]
    Locked(PathBuf),
    /// A record cannot be read back.
    #[error("{} is not a valid record ({reason}); remove it and run `tidemill pull` again", path.display())]
    Corrupt {
        /// The record.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A model name that would leave the models folder or cannot be a folder.
    #[error("'{0}' is not a model name: use letters, digits, '.', '_', '-' and at most one '/'")]
    Name(String),
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &std::path::Path, source: std::io::Error) -> Self {
        StoreError::Io { action, path: path.to_owned(), source }
    }
}
