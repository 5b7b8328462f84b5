//! Which pairs enter a labeling queue, and what its verdicts say.
//!
//! [`rule`] and [`statistics`] are functions of values. [`filler`] reads traffic and feedback behind the rules and has the missing
//! answers generated; queues, tasks and leases are in `tidemill_store::label`.

pub mod filler;
mod generate;
pub mod rule;
pub mod statistics;
