//! Losses of every trainer, as functions of candle tensors that know their gradients; in f32 for training, in f64 for tests.
//!
//! A loss takes log-probabilities (natural logarithm) or rewards and returns one value per row or label; the loop divides the sum by
//! what the whole step holds, so that how a step is cut into batches does not change it. [`advantage`] is arithmetic on plain
//! numbers: no gradient runs through it.

pub mod advantage;
mod pointwise;
pub mod policy;
pub mod preference;
pub mod reference_free;
pub mod reward;
#[cfg(test)]
mod tests;
pub mod thumbs;

use candle_core::{Result, Tensor};

pub use pointwise::{log_sigmoid, sigmoid};
pub use preference::{LogRatios, PairLoss};

/// −log-probability of every label (`[labels]`, whatever its shape): the loss of supervised fine-tuning.
pub fn nll(log_probs: &Tensor) -> Result<Tensor> {
    log_probs.neg()
}

/// Sums `values` `[n]` by `owner` `[n]` (u32, below `owners`): per-label log-probabilities to those of completions.
pub fn sum_by(values: &Tensor, owner: &Tensor, owners: usize) -> Result<Tensor> {
    Tensor::zeros(owners, values.dtype(), values.device())?.index_add(owner, values, 0)
}
