//! AdamW with groups, clipping and schedules. Its state can be read, so that training goes on where it was.

mod adamw;
mod schedule;
mod state;
#[cfg(test)]
mod tests;

pub use adamw::{AdamW, Group, Optimizer};
pub use schedule::{Schedule, SchedulerType};
pub use state::StateError;
