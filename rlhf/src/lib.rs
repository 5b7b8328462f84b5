//! Feedback in, adapters out.
//!
//! [`dataset`] turns feedback into immutable snapshots of training rows. [`quality`] says whether a snapshot may be trained on.
//! [`loss`] holds what every trainer minimises, as functions of tensors that know their gradients; [`optimizer`] moves the
//! [`parameters`] along them.

pub mod batch;
pub mod collate;
pub mod dataset;
pub mod loss;
pub mod optimizer;
pub mod parameters;
pub mod quality;
pub mod random;
pub mod statistics;
mod tensors;
