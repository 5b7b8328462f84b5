//! KTO: a completion judged by itself, good or bad.

use candle_core::{Result, Tensor};

/// The reference point: the mean log-ratio of prompts answered with other prompts' completions, an estimate of the policy's divergence,
/// not below 0. It carries no gradient. 0 of nothing.
pub fn reference_point(mismatched_log_ratios: &[f64]) -> f64 {
    let count = mismatched_log_ratios.len().max(1) as f64;
    (mismatched_log_ratios.iter().sum::<f64>() / count).max(0.0)
}

/// 1 − σ(β(Δ − z)) for good completions, 1 − σ(β(z − Δ)) for bad ones, `[completions]` (Ethayarajh et al. 2024, eq. 8). `sign`,
/// `[completions]`, is 1 for good and −1 for bad.
pub fn kto(beta: f64, log_ratio: &Tensor, z: f64, sign: &Tensor) -> Result<Tensor> {
    // 1 − σ(x) = σ(−x).
    super::sigmoid(&((log_ratio - z)? * sign)?.affine(-beta, 0.0)?)
}
