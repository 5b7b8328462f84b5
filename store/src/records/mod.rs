//! What the rows hold.

mod feedback;
mod inference;

pub use feedback::{Feedback, Kind, TargetKind};
pub use inference::{Choice, Exposure, Inference, Status};
