//! Why answers could not be judged.

use std::path::PathBuf;

use crate::model::ModelError;

/// Each says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum RewardError {
    /// A field of a function.
    #[error("reward_funcs: {name}: {detail}")]
    Field {
        /// The function.
        name: String,
        /// What is wrong and what would be right.
        detail: String,
    },
    /// The functions and their weights together.
    #[error("{0}")]
    Setting(String),
    /// A reward that is no number.
    #[error("the reward {name} gave {reward}; rewards are finite numbers")]
    NotFinite {
        /// The function.
        name: String,
        /// What it gave.
        reward: f64,
    },
    /// Nothing was judged.
    #[error("none of the reward functions had an opinion about any answer; give the rows what they look for, as an \"answer\"")]
    NoOpinion,
    /// A program failed for every answer.
    #[error("the reward program {command} failed for every answer: {detail}")]
    Program {
        /// What was started.
        command: String,
        /// How one of them failed.
        detail: String,
    },
    /// A grader could ask no model about any answer.
    #[error("the grader {name} could ask no model: {detail}")]
    Grader {
        /// Which.
        name: String,
        /// Why not.
        detail: String,
    },
    /// A reward model's files.
    #[error("the reward model in {}: {detail}", path.display())]
    Model {
        /// Its folder.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A reward model's arithmetic.
    #[error("the reward model could not compute: {0}")]
    Compute(Box<ModelError>),
}

impl From<candle_core::Error> for RewardError {
    fn from(error: candle_core::Error) -> Self {
        Self::Compute(Box::new(error.into()))
    }
}
