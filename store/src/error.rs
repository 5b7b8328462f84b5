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
    /// The database does not answer in time.
    #[error("the database does not answer; try again shortly, and see that it runs")]
    Away,
    /// The queue and the spill log are full while the database is away.
    #[error(transparent)]
    Full(#[from] Full),
    /// The writer of this store has stopped.
    #[error("the store is closed; the server is shutting down")]
    Closed,
    /// A row that cannot be what we wrote.
    #[error("{table} {id} in the database cannot be read: {reason}; restore it from a backup, or delete it")]
    Row {
        /// Where.
        table: &'static str,
        /// Which.
        id: String,
        /// What is wrong.
        reason: String,
    },
    /// A key of this name is in use.
    #[error("there is a key named '{0}' already; revoke it first, or choose another name")]
    KeyName(String),
    /// A scope that is none.
    #[error("'{0}' is not a scope: use chat, feedback, label, train, look or admin")]
    Scope(String),
    /// The operating system gives no random bytes.
    #[error("the operating system gives no random numbers: {0}; see that /dev/urandom is there")]
    Random(String),
    /// The database is away, slow or broken.
    #[error("the database failed: {0}; see that it runs and has room, and try again")]
    Database(#[source] sqlx::Error),
    /// The tables cannot be brought up to date.
    #[error("the database's tables cannot be brought up to date: {0}; was it made by a newer tidemill?")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            // No connection became free in time: all of them wait for a database that does not answer.
            sqlx::Error::PoolTimedOut => Self::Away,
            error => Self::Database(error),
        }
    }
}

/// Nothing more can be taken: the database is away or slow, and the queue and the spill log have no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the record store is full: the database is away or slow and the spill log has reached its limit; try again later, bring the database back, or give the spill log more room"
)]
pub struct Full;

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &std::path::Path, source: std::io::Error) -> Self {
        StoreError::Io { action, path: path.to_owned(), source }
    }
}
