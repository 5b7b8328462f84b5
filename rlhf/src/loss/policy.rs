//! Losses on completions that the policy sampled: RLOO, GRPO, PPO.
//!
//! The ratio π / π_old is 1 with gradient while the policy is the one that sampled; clipping holds later updates near it (Schulman et
//! al. 2017, eq. 7).

use candle_core::{Result, Tensor};

/// −min(r·A, clip(r, 1 − low, 1 + high)·A), element by element; r = exp(log π − log π_old). Per label for GRPO and PPO, with each label
/// carrying its completion's advantage; for RLOO per completion, of summed log-probabilities.
pub fn clipped(log_probs: &Tensor, old: &Tensor, advantages: &Tensor, low: f64, high: f64) -> Result<Tensor> {
    let ratio = (log_probs - old)?.exp()?;
    let bounded = ratio.clamp(1.0 - low, 1.0 + high)?;
    (ratio * advantages)?.minimum(&(bounded * advantages)?)?.neg()
}

/// exp(ref − π) − (ref − π) − 1, element by element: an estimate of KL(π ‖ π_ref) from samples of π that is never negative (Schulman
/// 2020, "k3").
pub fn k3(log_probs: &Tensor, reference: &Tensor) -> Result<Tensor> {
    let difference = (reference - log_probs)?;
    (difference.exp()? - difference)? - 1.0
}

/// ½ max((v − R)², (clip(v, v_old ± range) − R)²), element by element: a value head that moves no further than the policy does.
pub fn value(values: &Tensor, old: &Tensor, returns: &Tensor, range: f64) -> Result<Tensor> {
    let bounded = (old + (values - old)?.clamp(-range, range)?)?;
    (values - returns)?.sqr()?.maximum(&(bounded - returns)?.sqr()?)? * 0.5
}
