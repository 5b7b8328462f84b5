//! Feedback in, adapters out.
//!
//! So far: [`preference`], the losses of training on comparisons, as functions of values. Trainers, datasets and the registry join
//! it here.

pub mod preference;
