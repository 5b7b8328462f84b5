//! From measurements to what happens next: a state machine of values.
//!
//! [`start`] makes a state, [`measure`] takes it on by what was measured, [`act`] by what a person wants. Each gives the next
//! [`State`] and a [`Decision`], the row that says what was done and the numbers it stood on. The order of what is asked of a
//! measurement is fixed:
//!
//! 1. A guardrail that is surely broken rolls back, whatever else is the case, also while paused.
//! 2. Arms that did not get their share of the units (SRM) pause, and nothing that compares them is believed.
//! 3. A goal that no treatment can reach any more rolls back.
//! 4. After the deadline nothing goes on by itself.
//! 5. Nothing goes on beside a control that is not what the name serves any more.
//! 6. Data that stay missing or unclear pause.
//! 7. Only then may weights rise, and a goal that is surely met promote.
//!
//! A state that is over never changes, unless a person takes its promotion back.

mod judge;
mod machine;
mod state;
#[cfg(test)]
mod tests;

pub use judge::{Judgement, Measure, Verdict};
pub use machine::{act, measure, start};
pub use state::{Act, ActError, Action, AliasMove, Decision, Measured, PauseReason, State, Status};
