//! Variants of a model on the traffic: who gets which, what is measured, and what follows from it.
//!
//! [`assignment`] is a pure function of a unit's key, so replicas agree without talking; [`spec`] is what an operator writes;
//! [`decision`] goes from measurements to the next state and says why, with [`statistics`] that hold however often one looks.
//!
//! [`table`] is all that a server assigns by, made of the rows that there are. None of these knows the time, the store or HTTP: time and
//! random numbers are arguments. [`keeper`] is the shell around them: it reads and writes rows, and [`measure`] reads what was measured.
//! [`scorer`] has the base model say what it thinks of answers.
//!
//! Invariants: a rollout that is over never comes back; the treatment's share only rises until then; data that are missing never
//! promote.

pub mod assignment;
pub mod contest;
pub mod decision;
pub mod hash;
pub mod keeper;
pub mod measure;
pub mod mirrors;
pub mod scorer;
pub mod spec;
pub mod statistics;
pub mod table;
pub mod under_way;
