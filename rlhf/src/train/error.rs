//! Why a training ends without a result.

use std::path::{Path, PathBuf};

use tidemill_engine::{AdapterRefused, SubmitError};

use crate::{model::ModelError, optimizer::StateError, reward::RewardError, tensors::TensorsError};

/// Each says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A field of the configuration.
    #[error("training configuration: {0}")]
    Config(String),
    /// The rows.
    #[error("{0}")]
    Data(String),
    /// The model's arithmetic.
    #[error("the model could not compute a batch: {0}")]
    Model(#[from] candle_core::Error),
    /// A number that is not one.
    #[error("{what} is not finite at step {step}; lower learning_rate, or look at the rows of that step")]
    Diverged {
        /// The loss or the gradient.
        what: &'static str,
        /// The step, from 1.
        step: u64,
    },
    /// A file.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The folder's training is not this one.
    #[error("{} holds a training with another {what}; choose another folder, or remove it", path.display())]
    OtherTraining {
        /// The folder.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
    /// A second process.
    #[error("{} is in use by another training; wait for it, or choose another folder", .0.display())]
    InUse(PathBuf),
    /// A checkpoint's content.
    #[error("a checkpoint cannot be read: {0}; remove it to go on from the one before")]
    Checkpoint(String),
    /// Answers could not be judged.
    #[error("{0}")]
    Reward(Box<RewardError>),
    /// What is trained could not be given to the engine that samples.
    #[error("the engine that samples did not take the adapter: {0}")]
    Publish(Box<AdapterRefused>),
    /// The adapter could not be read off the model.
    #[error("the adapter could not be read off the model: {0}")]
    Adapter(Box<ModelError>),
    /// The engine did not take a prompt.
    #[error("the engine that samples refused a prompt: {0}")]
    Submit(Box<SubmitError>),
    /// The engine failed.
    #[error("the engine that samples failed: {0}")]
    Sample(String),
    /// The training's thread.
    #[error("the training stopped without a result; the log says why")]
    Thread,
}

// Boxed: an error is moved about more often than it is looked at.
impl From<RewardError> for TrainError {
    fn from(error: RewardError) -> Self {
        Self::Reward(Box::new(error))
    }
}

impl From<AdapterRefused> for TrainError {
    fn from(error: AdapterRefused) -> Self {
        Self::Publish(Box::new(error))
    }
}

impl From<ModelError> for TrainError {
    fn from(error: ModelError) -> Self {
        Self::Adapter(Box::new(error))
    }
}

impl From<SubmitError> for TrainError {
    fn from(error: SubmitError) -> Self {
        Self::Submit(Box::new(error))
    }
}

impl From<StateError> for TrainError {
    fn from(error: StateError) -> Self {
        Self::Checkpoint(error.to_string())
    }
}

impl From<TensorsError> for TrainError {
    fn from(error: TensorsError) -> Self {
        Self::Checkpoint(error.to_string())
    }
}

impl TrainError {
    /// For `map_err`.
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
