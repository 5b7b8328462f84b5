//! Variants of a model on the traffic: who gets which, what is measured, and what follows from it.
//!
//! [`assignment`] is a pure function of a unit's key, so replicas agree without talking; [`spec`] is what an operator writes;
//! [`decision`] goes from measurements to the next state and says why, with [`statistics`] that hold however often one looks.
//!
//! Invariants: a rollout that is over never comes back; the treatment's share only rises until then; data that are missing never
//! promote. Nothing here knows the time, the store or HTTP: time and random numbers are arguments.

pub mod assignment;
pub mod decision;
pub mod hash;
pub mod spec;
pub mod statistics;
