//! The loop that closes by itself: feedback becomes a snapshot, the snapshot an adapter, the adapter a rollout, and people's next
//! feedback is about what won.
//!
//! [`step`] is a state machine of values: (where a loop stands, what is seen of the work, now) gives the next [`State`] with a [`Note`] of
//! the numbers it stood on, or the [`Act`] that is to be done. A [`Policy`] says when a cycle begins, on what, how and behind which gates; a
//! cycle keeps the one that it began with.
//!
//! Invariants: a state is left only for what was seen of the work of its own cycle; nothing that a gate shuts is rolled out; an act is asked
//! for again until its outcome is seen, so it must do nothing a second time, and its [`Key`] (loop, cycle, state) is what tells whoever
//! does it that it is the same.

mod key;
mod machine;
mod policy;
mod state;
#[cfg(test)]
mod tests;

pub use key::Key;
pub use machine::{step, wish};
pub use policy::{Counts, Measuring, Need, Policy, Progress, QualityRule, TimeOfDay, When};
pub use state::{Act, Cycle, Finding, Flywheel, Note, Seen, State, Step, Wish, WishError, Word, Work};
