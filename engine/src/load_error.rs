//! Why a model could not be loaded.

use std::path::{Path, PathBuf};

use tidemill_kernels::KernelError;

/// Everything that can be wrong with a model on disk. The text names the file, the field, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The path cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The path holds no model that we know.
    #[error("{}: {detail}", path.display())]
    NotAModel {
        /// What was opened.
        path: PathBuf,
        /// What was looked for, and what would be right.
        detail: String,
    },
    /// A file is cut off, damaged, or not what its name says.
    #[error("{}: {field}: {detail}; the file is damaged or incomplete, fetch it again", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The part of it.
        field: String,
        /// What is wrong.
        detail: String,
    },
    /// A value is missing or contradicts the others.
    #[error("{}: {field}: {detail}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key or tensor.
        field: String,
        /// What is wrong, and what would be right.
        detail: String,
    },
    /// The file is fine, but Tidemill cannot run it.
    #[error("{}: {field}: {detail} is not supported; {instead}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key or tensor.
        field: String,
        /// What was found.
        detail: String,
        /// What is supported.
        instead: String,
    },
    /// The backend refused.
    #[error("{}: {what}: {source}", path.display())]
    Kernel {
        /// The model.
        path: PathBuf,
        /// Which weight or buffer.
        what: String,
        /// What the backend said.
        source: KernelError,
    },
}

impl LoadError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn not_a_model(path: &Path, detail: impl Into<String>) -> Self {
        Self::NotAModel { path: path.to_owned(), detail: detail.into() }
    }

    pub(crate) fn corrupt(path: &Path, field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), field: field.into(), detail: detail.into() }
    }

    pub(crate) fn invalid(path: &Path, field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_owned(), field: field.into(), detail: detail.into() }
    }

    pub(crate) fn unsupported(
        path: &Path,
        field: impl Into<String>,
        detail: impl Into<String>,
        instead: impl Into<String>,
    ) -> Self {
        Self::Unsupported { path: path.to_owned(), field: field.into(), detail: detail.into(), instead: instead.into() }
    }
}
