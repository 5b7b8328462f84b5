//! The arithmetic of training on a device: what [`crate::train`] computes on slices, on memory of a card.
//!
//! Operations are launched when they are called and done in that order; only reading waits. Results differ from the processor's in the
//! order of sums alone: products round their operands to bf16 where the processor's do, and dropout draws the same masks.

mod attention;
mod log_probs;
mod matmul;
mod memory;
mod params;
mod rows;

pub use attention::Seen;
pub use log_probs::LogProbs;
pub use matmul::{Operand, Product};
pub use memory::{Matrix, Region, Values};
pub use rows::Turns;

use std::sync::Arc;

use self::memory::Pool;
use super::device::{Address, Device, Kernel, Launch, Params};
use crate::error::KernelError;
use crate::train::Precision;

/// Most logits that exist at once, unless told otherwise.
const LOGITS: usize = 1 << 24;

/// A device that computes trainings.
pub struct DeviceCompute {
    device: Box<dyn Device>,
    precision: Precision,
    pool: Arc<Pool>,
    /// All that was reserved and not given back to the device.
    owned: Vec<Address>,
    held: usize,
    most_held: usize,
    /// The most bytes that were in use at once; what is held beyond them is unused.
    most_used: usize,
    /// Bytes that may be held.
    most: usize,
    /// What this keeps to of them, once that is known.
    settled: Option<usize>,
    most_logits: usize,
}

fn fits(op: &'static str, fits: bool) -> Result<(), KernelError> {
    if fits { Ok(()) } else { Err(KernelError::Shape { op, detail: "operands do not fit together".to_owned() }) }
}

impl DeviceCompute {
    /// On `device`, rounding products' operands as `precision` says.
    pub fn new(device: Box<dyn Device>, precision: Precision) -> Self {
        let (pool, owned) = (Arc::new(Pool::default()), Vec::new());
        let (held, most_held, most_used, most, settled) = (0, 0, 0, usize::MAX, None);
        Self { device, precision, pool, owned, held, most_held, most_used, most, settled, most_logits: LOGITS }
    }

    /// Holding so many bytes of the device's memory, at most.
    pub fn within(mut self, most: usize) -> Self {
        self.most = most;
        self
    }

    /// Keeps to what is held now, or was in use at once: the rest is for others. Passes over no more rows than the largest that has been
    /// fit, whatever their sizes: each of their regions is no larger than that pass's, and what is unused is given back before more than
    /// this is held.
    pub fn settle(&mut self) {
        self.settled = Some(self.held.max(self.most_used));
    }

    /// Bytes that may be held.
    fn bound(&self) -> usize {
        self.settled.unwrap_or(self.most).min(self.most)
    }

    /// With so many logits at once, at most (one row's of 128 tokens at the least).
    pub fn with_logits(mut self, most_logits: usize) -> Self {
        self.most_logits = most_logits;
        self
    }

    /// What computes, for people.
    pub fn describe(&self) -> String {
        self.device.describe()
    }

    /// Bytes of the device's memory that are held, or may be again: see [`Self::settle`].
    pub fn bytes(&self) -> usize {
        self.held.max(self.settled.unwrap_or(0))
    }

    /// The most that were held at once.
    pub fn most_bytes(&self) -> usize {
        self.most_held
    }

    /// Bytes that may still be taken beside [these](Self::bytes): what is free on the device, and within the bound that was given.
    pub fn left(&self) -> Result<usize, KernelError> {
        let bytes = self.bytes();
        Ok(self.free()?.saturating_sub(bytes - self.held).min(self.most.saturating_sub(bytes)))
    }

    /// Bytes that are free on the device.
    pub fn free(&self) -> Result<usize, KernelError> {
        Ok(self.device.memory()?.0)
    }

    /// What products round their operands to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    fn launch<P: Params>(&mut self, kernel: Kernel, launch: Launch, params: P) -> Result<(), KernelError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.device.launch(kernel, launch, params.bytes())
    }
}

impl Drop for DeviceCompute {
    fn drop(&mut self) {
        self.owned.drain(..).for_each(|at| self.device.free(at));
    }
}
