//! Feedback in, adapters out.
//!
//! [`dataset`] turns feedback into immutable snapshots of training rows. [`quality`] says whether a snapshot may be trained on.
//! [`collate`] makes tokens and packed [`batch`]es of rows. [`loss`] holds what every trainer minimises, as functions of tensors that
//! know their gradients; [`reward`] judges answers that are sampled while training; [`optimizer`] moves the [`parameters`] along
//! them; [`train`] is the one loop around it all, and [`job`] one training from its specification to its adapter; [`evaluate`] says
//! what the adapter is worth. [`registry`] keeps those that come out. [`chart`] draws what was measured on the way.
//! [`flywheel`] is the loop through all of it, as a state machine; [`workplace`] says where models and engines compute.

pub mod batch;
pub mod chart;
pub mod collate;
pub mod dataset;
mod durable;
pub mod evaluate;
pub mod flywheel;
pub mod job;
pub mod loss;
pub mod model;
pub mod optimizer;
pub mod parameters;
pub mod quality;
pub mod random;
pub mod registry;
pub mod reward;
pub mod statistics;
mod tensors;
pub mod train;
pub mod workplace;
