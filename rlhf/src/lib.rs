//! Feedback in, adapters out.
//!
//! [`dataset`] turns feedback into immutable snapshots of training rows. [`preference`] holds the losses of training on comparisons,
//! as functions of values. Trainers and the registry join them here.

pub mod dataset;
pub mod preference;
