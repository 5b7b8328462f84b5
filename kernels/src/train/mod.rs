//! The arithmetic of training: operations of a decoder with their derivatives.
//!
//! Unlike [`crate::Ops`], calls compute at once, on slices that the caller owns. Matrices are row-major; a batch is `[rows, width]` of f32.
//! Weights that are not trained stay in their file's own format and are decoded on their way into a product.

mod attention;
mod cross_entropy;
mod dropout;
mod matmul;
mod operand;
mod pack;
mod rows;
mod threads;
mod tile;

pub use attention::{Attention, Span};
pub use cross_entropy::LogProbs;
pub use dropout::Dropout;
pub use matmul::{LowRank, Product};
pub use operand::{Block, Operand, View};
pub use rows::{Pieces, Rotation};

use crate::aligned::AlignedBuf;
use crate::cpu::elementwise::Elementwise;
use crate::error::KernelError;
use crate::isa::Isa;
use matmul::Packed;
use rows::RowOps;
use threads::Threads;
use tile::Kernel;

/// What products round their operands to; sums are f32 in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Nothing is rounded.
    F32,
    /// bfloat16, on machines with a matrix unit; elsewhere as [`Precision::F32`].
    #[default]
    Bf16,
}

/// Threads, scratch memory and the machine's instruction path.
pub struct Compute {
    kernel: Kernel,
    elementwise: Elementwise,
    rows: RowOps,
    threads: Threads,
    packed: Packed,
    /// A piece of the logits.
    logits: AlignedBuf<f32>,
}

impl Compute {
    /// With `threads` threads (0: all that the process may use) on `isa` (`None`: the best of the machine).
    pub fn new(threads: usize, isa: Option<Isa>, precision: Precision) -> Result<Self, KernelError> {
        let best = Isa::detect();
        let isa = isa.unwrap_or(best);
        if isa > best {
            return Err(KernelError::Unsupported(format!("this machine has no {}", isa.name())));
        }
        let kernel = Kernel::new(isa, precision);
        Ok(Self {
            kernel,
            elementwise: Elementwise::new(kernel.level()),
            rows: RowOps(kernel.level()),
            threads: Threads::new(threads, kernel)?,
            packed: Packed::new()?,
            logits: AlignedBuf::zeroed(0, "logits")?,
        })
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.threads.count()
    }

    /// Bytes of scratch memory held.
    pub fn bytes(&self) -> usize {
        self.packed.bytes() + self.logits.bytes()
    }
}

#[cfg(test)]
mod tests;
