//! Graders of OpenAI's API: how requests write them, and how those that want a model's opinion get it from this server.
//!
//! What a grader does is in `tidemill_rlhf`. A question to a model is an ordinary chat completion of the key that asked for the grading.
//! The process of a fine-tuning job has no key: it asks at a [`desk`], a socket in the job's folder.

mod asking;
pub mod desk;
mod wire;

pub use asking::InsideOracle;
pub use desk::{Desk, DeskOracle};
pub use wire::{check_models, parse};
