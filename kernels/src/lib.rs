//! The arithmetic of Tidemill.
//!
//! [`Ops`] lists the operations a decoder needs. `reference` is the scalar oracle that tests compare with; `cpu` is the backend
//! that serves on processors, with instruction paths chosen at run time, `cuda` the one for NVIDIA cards. This is the only crate with
//! `unsafe` code: SIMD, memory maps, the thread pool and the driver's calls live here, behind safe interfaces.
//!
//! Invariants of the CPU backend: a step allocates nothing; a row's result does not depend on which other rows share its step. On a card
//! that holds for each kernel; from 17 rows on (65 for quantised weights) products are the library's, which adds in another order.

pub mod activations;
pub mod aligned;
pub mod blocks;
pub mod collective;
pub mod cpu;
pub mod cuda;
pub mod e4m3;
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

pub use collective::{Abort, Place};
pub use error::KernelError;
pub use ops::*;
pub use token_mask::{MaskPromise, TokenMask};
