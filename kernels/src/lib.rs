//! The arithmetic of Tidemill.
//!
//! [`Ops`] lists the operations a decoder needs. `reference` is the scalar oracle that tests compare with; `cpu` is the backend
//! that serves on processors, with instruction paths chosen at run time. This is the only crate with `unsafe` code: SIMD, memory
//! maps and the thread pool live here, behind safe interfaces.
//!
//! Invariants: a step allocates nothing; a row's result does not depend on which other rows share its step.

pub mod activations;
pub mod aligned;
pub mod blocks;
pub mod cpu;
pub mod error;
pub mod isa;
pub mod linear;
pub mod mmap;
pub mod ops;
pub mod packed;
pub mod random;
pub mod reference;
mod shapes;
pub mod token_mask;
pub mod train;

pub use error::KernelError;
pub use ops::*;
pub use token_mask::{MaskPromise, TokenMask};
