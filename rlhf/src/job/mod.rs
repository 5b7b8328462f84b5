//! A training as one piece of work: a [`Spec`] says which model learns what from which rows; [`Job`] does it in a folder of its own and
//! leaves an adapter there, or a whole model.
//!
//! The folder holds what [`crate::train::train`] keeps, `adapter/` (PEFT's files) or `model/` (Hugging Face's) when the training has ended
//! by itself, and `lineage.json`: what came of it was made of this; and `epochs/`, adapters of earlier epochs, where the specification wants
//! them.

mod epochs;
mod error;
mod estimate;
mod head;
mod online;
mod rows;
mod run;
mod spec;
#[cfg(test)]
mod tests;

pub use epochs::{EpochAdapter, epoch_adapters};
pub use error::JobError;
pub use estimate::Estimate;
pub(crate) use head::{Asked, measured_model};
pub(crate) use online::judge_of;
pub use rows::Rows;
pub use run::{ADAPTER, Finished, Job, LINEAGE, MODEL, Prepared};
pub use spec::{Base, FinetuningType, Lora, Spec};
