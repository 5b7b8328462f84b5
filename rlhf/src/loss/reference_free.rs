//! Losses on pairs that need no reference model. They compare mean log-probabilities per token, so that length does not win.

use candle_core::{Result, Tensor};

use super::{log_sigmoid, pointwise::log_complement};

/// log(odds of chosen / odds of rejected), `[pairs]`, of mean log-probabilities per token; odds(p) = p / (1 − p).
pub fn log_odds_ratio(chosen: &Tensor, rejected: &Tensor) -> Result<Tensor> {
    (chosen - rejected)? - (log_complement(chosen)? - log_complement(rejected)?)?
}

/// The odds-ratio term of ORPO, −β log σ(log-odds ratio), `[pairs]` (Hong et al. 2024, eq. 6 and 7); the other term is [`super::nll`] of
/// the chosen completion.
pub fn orpo(beta: f64, log_odds_ratio: &Tensor) -> Result<Tensor> {
    log_sigmoid(log_odds_ratio)? * -beta
}

/// SimPO: −log σ(β(chosen − rejected) − γ), `[pairs]`, of mean log-probabilities per token (Meng et al. 2024, eq. 6).
pub fn simpo(beta: f64, gamma: f64, chosen: &Tensor, rejected: &Tensor) -> Result<Tensor> {
    log_sigmoid(&(chosen - rejected)?.affine(beta, -gamma)?)?.neg()
}
