//! Why the registry did not do what was asked.

use std::path::PathBuf;

use tidemill_engine::AdapterError;
use tidemill_store::{AdapterRefusal, StoreError};

/// Errors of the registry. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The state of adapters and aliases does not allow it.
    #[error(transparent)]
    Refused(#[from] AdapterRefusal),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The files are not right, or do not fit the base model.
    #[error(transparent)]
    Files(#[from] AdapterError),
    /// A name that cannot be one.
    #[error(
        "'{0}' cannot be an adapter's name: use up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit"
    )]
    Name(String),
    /// An alias that cannot be one.
    #[error("'{0}' cannot be an alias: use 1 to 200 visible characters without spaces and '@'")]
    Alias(String),
    /// Nothing is called so.
    #[error("there is no adapter '{0}'; `tidemill adapter list` shows those that there are")]
    NotFound(String),
    /// The text means several adapters.
    #[error("'{reference}' could be {}; say which", meanings.join(" or "))]
    Ambiguous {
        /// As it was given.
        reference: String,
        /// What it could mean.
        meanings: Vec<String>,
    },
    /// The dataset of the lineage.
    #[error("there is no dataset '{0}'; `tidemill dataset list` shows those that there are")]
    Dataset(String),
    /// The files are not those that were registered.
    #[error("{}: is not what was registered as {reference}; restore the folder from a backup, or import the adapter again", folder.display())]
    Changed {
        /// The adapter.
        reference: String,
        /// Its folder.
        folder: PathBuf,
    },
    /// The weights of the base are others.
    #[error(
        "{adapter} was made for a base with other weights ({}… and not {}…); train it again on these, or, where they are the same model in \
         another form, import it with --any-base",
        short(wanted),
        short(found)
    )]
    OtherBase {
        /// The adapter, or its folder.
        adapter: String,
        /// Hash of the weights that it was made for.
        wanted: String,
        /// Hash of those that there are.
        found: String,
    },
    /// There is something at the place already.
    #[error("{} is there already; name a new folder", .0.display())]
    Exists(PathBuf),
    /// The data directory.
    #[error("{}: {source}; see that it is there, has room and may be written", path.display())]
    Folder {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A fault of ours.
    #[error("the files could not be handled because of an internal error; try again")]
    Interrupted,
}

/// Enough of a hash to tell it from another.
fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}
