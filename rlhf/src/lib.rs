//! Feedback in, adapters out.
//!
//! [`dataset`] turns feedback into immutable snapshots of training rows. [`quality`] says whether a snapshot may be trained on.
//! [`preference`] holds the losses of training on comparisons,
//! as functions of values. Trainers and the registry join them here.

pub mod batch;
pub mod dataset;
pub mod preference;
pub mod quality;
pub mod random;
pub mod statistics;
