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
    /// A database address that is neither of the two kinds.
    #[error(
        "'{0}' is no database that tidemill knows: use postgres://USER:PASSWORD@HOST/NAME, or leave it out for SQLite in the data directory"
    )]
    Url(String),
    /// The database is away, slow or broken.
    #[error("the database failed: {0}; see that it runs and has room, and try again")]
    Database(#[from] sqlx::Error),
    /// The tables cannot be brought up to date.
    #[error("the database's tables cannot be brought up to date: {0}; was it made by a newer tidemill?")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &std::path::Path, source: std::io::Error) -> Self {
        StoreError::Io { action, path: path.to_owned(), source }
    }
}
