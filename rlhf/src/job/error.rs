//! Why a training did not come about.

use std::path::{Path, PathBuf};

use tidemill_engine::{AdapterError, LoadError, StartError};

use crate::dataset::DatasetError;
use crate::dataset::import::BadLines;
use crate::model::ModelError;
use crate::train::TrainError;

/// What can go wrong with a job.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// A field of the specification.
    #[error("{field}: {fix}")]
    Spec {
        /// Which.
        field: &'static str,
        /// What to do.
        fix: String,
    },
    /// A specification that cannot be read.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: serde_json::Error,
    },
    /// A file or folder.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The base model's files.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The model in training.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The rows.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// Lines that are no rows.
    #[error("{place}: {bad}")]
    Lines {
        /// The file.
        place: String,
        /// Which and why.
        bad: BadLines,
    },
    /// A person in it was erased.
    #[error("dataset {0} holds rows of a person who was erased since; build it again")]
    Tainted(String),
    /// The quality report says no.
    #[error(
        "dataset {0} failed its quality report; `tidemill dataset report {0}` says why, and --despite-report trains all the same"
    )]
    Quality(String),
    /// The model cannot chat.
    #[error("{0} has no chat template, so rows cannot be turned into its tokens; train an instruct model")]
    Template(String),
    /// The engine that samples did not start.
    #[error("the engine that samples did not start: {0}")]
    Engine(#[from] StartError),
    /// The engine does not fit on the card beside the model.
    #[error(
        "the engine that samples does not fit on the card: the model and its largest batch hold {held} bytes, {left} were left, and {what}; \
         give it more of the card (--device-memory; a server's training_memory), ask for shorter answers (max_completion_length; --max-tokens of \
         an evaluation), or, where `tidemill train` is told so, lower tokens_per_batch or keep less with --recompute"
    )]
    Beside {
        /// Bytes that the model holds.
        held: usize,
        /// Bytes that were left.
        left: usize,
        /// What did not fit, and its size.
        what: String,
    },
    /// The training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
}

impl JobError {
    /// For `map_err`.
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
