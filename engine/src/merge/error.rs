//! Why a model was not merged.

use std::path::PathBuf;

use tidemill_kernels::KernelError;

use crate::adapter::AdapterError;
use crate::load_error::LoadError;

/// Everything that can go wrong with a merge. Nothing is left behind then.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The base's files, or those that were written.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The adapter does not fit the base.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A storage that cannot be written.
    #[error("{0}; choose f32, f16, bf16, q8_0, q4_0 or q4_1")]
    Kernel(#[from] KernelError),
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is something at the place already.
    #[error("{} is there already; name a new file or folder", .0.display())]
    Exists(PathBuf),
    /// The sum is beyond what f16 holds.
    #[error("{tensor}: {value} is more than f16 holds; store merged matrices as bf16 or f32")]
    Range {
        /// The tensor.
        tensor: String,
        /// Its number.
        value: f32,
    },
    /// What is not done here, and what is.
    #[error("{0}")]
    Unsupported(String),
}
