//! Training: one loop for all methods ([`train`]), told by a [`TrainConfig`], fed by a [`Trainer`], over a model that is a [`Policy`].
//! [`Offline`] learns from a dataset, [`Online`] from answers that the model samples while it is trained.
//!
//! A training lives in a folder: `metrics.jsonl`, checkpoints, `report.html`. Killed at any moment and started again with the same
//! configuration, rows and model, it gives the same log and the same parameters, bit for bit, as one that was never killed: rows and
//! dropout are functions of the seed and the step's number, and everything else is in the checkpoint.

mod checkpoint;
mod config;
mod error;
mod metrics;
mod objective;
mod offline;
mod online;
mod policy;
mod reference;
mod report;
mod run;
#[cfg(test)]
mod tests;
mod watch;

pub use config::{
    Advantages, Algorithm, Correction, CorrectionMode, Draw, LossType, Method, Objective, Reinforcement, RewardScale, TrainConfig,
};
pub use error::TrainError;
pub use metrics::{Metrics, line};
pub use offline::{Offline, OfflineBatch, Prepare};
pub use online::{
    ADAPTERS, Ask, Drawn, EngineSampler, Online, OnlineBatch, Prompt, Question, Sampler, encode, questions, read_questions,
    sampling,
};
pub use policy::{Head, Pass, Policy};
pub(crate) use reference::sums;
pub use report::{charts, report};
pub use run::{Ending, Outcome, Trainer, train};
pub(crate) use run::{LOG, STACK};
pub use watch::{Control, Progress, Stage, remaining};
