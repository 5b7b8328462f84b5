//! Why an adapter was not read, written or accepted.

use std::path::{Path, PathBuf};

use crate::load_error::LoadError;

/// Everything that can be wrong with an adapter. The text names the file or tensor, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The folder or one of its files cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The folder holds no adapter, or another one where a new one was to be written.
    #[error("{}: {detail}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong, and what would be right.
        detail: String,
    },
    /// A field of `adapter_config.json` is missing or makes no sense.
    #[error("{}: {field}: {detail}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong, and what would be right.
        detail: String,
    },
    /// The adapter is fine, but does what is not done here.
    #[error("{}: {field}: {detail} is not supported; {instead}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field or tensor.
        field: String,
        /// What was found.
        detail: String,
        /// What is supported.
        instead: String,
    },
    /// The file of tensors is damaged.
    #[error(transparent)]
    File(#[from] LoadError),
    /// A tensor does not fit its configuration or the model.
    #[error("{tensor}: {detail}")]
    Tensor {
        /// Its name in the file.
        tensor: String,
        /// What is wrong.
        detail: String,
    },
}

impl AdapterError {
    pub(super) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    pub(super) fn config(path: &Path, field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Config { path: path.to_owned(), field: field.into(), detail: detail.into() }
    }

    pub(super) fn unsupported(
        path: &Path,
        field: impl Into<String>,
        detail: impl Into<String>,
        instead: impl Into<String>,
    ) -> Self {
        Self::Unsupported { path: path.to_owned(), field: field.into(), detail: detail.into(), instead: instead.into() }
    }

    pub(super) fn tensor(tensor: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Tensor { tensor: tensor.into(), detail: detail.into() }
    }
}
