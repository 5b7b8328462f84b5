//! Direct preference optimisation: losses on pairs of completions.

use candle_core::{Result, Tensor};

use super::{log_sigmoid, sigmoid};

/// What a batch of pairs is judged by. Δ is a completion's log-ratio: the sum over its tokens of (log π − log π_ref).
#[derive(Clone, Debug)]
pub struct LogRatios {
    /// Δ of the preferred completions, `[pairs]`.
    pub chosen: Tensor,
    /// Δ of the others, `[pairs]`.
    pub rejected: Tensor,
    /// Tokens of the preferred completions, `[pairs]`, > 0.
    pub chosen_tokens: Tensor,
    /// Tokens of the others, `[pairs]`, > 0.
    pub rejected_tokens: Tensor,
}

/// The family of direct preference optimisation. β is how strongly the policy is held to the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PairLoss {
    /// −log σ(β(Δc − Δr)) (Rafailov et al. 2023, eq. 7).
    Sigmoid,
    /// max(0, 1 − β(Δc − Δr)) (Zhao et al. 2023).
    Hinge,
    /// (Δc/Lc − Δr/Lr − 1/2β)² (Azar et al. 2023, eq. 17, per token).
    Ipo,
    /// Unbiased under labels that are wrong with this probability below one half (Chowdhury et al. 2024, eq. 8).
    Robust {
        /// Probability that a label is wrong.
        epsilon: f64,
    },
    /// Labels smoothed by this much (Mitchell 2023).
    Conservative {
        /// Probability that a label is wrong.
        epsilon: f64,
    },
    /// −log σ(β(Δc/Lc − Δr/Lr)).
    SigmoidNorm,
    /// 1 − σ(βΔc) + σ(βΔr) (D'Oosterlinck et al. 2024, eq. 7).
    ApoZero,
}

impl PairLoss {
    /// The loss of each pair, `[pairs]`.
    pub fn evaluate(self, beta: f64, ratios: &LogRatios) -> Result<Tensor> {
        let logits = || (&ratios.chosen - &ratios.rejected)? * beta;
        let per_token = || (&ratios.chosen / &ratios.chosen_tokens)? - (&ratios.rejected / &ratios.rejected_tokens)?;
        // −(1 − right) log σ(x) − wrong · log σ(−x)
        let smoothed = |right: f64, wrong: f64| -> Result<Tensor> {
            let logits = logits()?;
            (log_sigmoid(&logits)? * -right)? - (log_sigmoid(&logits.neg()?)? * wrong)?
        };
        match self {
            Self::Sigmoid => log_sigmoid(&logits()?)?.neg(),
            Self::Hinge => logits()?.affine(-1.0, 1.0)?.relu(),
            Self::Ipo => (per_token()? - 0.5 / beta)?.sqr(),
            Self::Robust { epsilon } => smoothed(1.0 - epsilon, -epsilon)? / (1.0 - 2.0 * epsilon),
            Self::Conservative { epsilon } => smoothed(1.0 - epsilon, epsilon),
            Self::SigmoidNorm => log_sigmoid(&(per_token()? * beta)?)?.neg(),
            Self::ApoZero => {
                let (chosen, rejected) = (sigmoid(&(&ratios.chosen * beta)?)?, sigmoid(&(&ratios.rejected * beta)?)?);
                (rejected - chosen)? + 1.0
            }
        }
    }
}
