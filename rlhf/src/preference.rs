//! Losses of training on comparisons, and their gradients.
//!
//! Δ is a completion's log-ratio: the sum over its tokens of (log π − log π_ref). A loss is a function of the two log-ratios of a
//! pair, so its gradient with respect to them is all that a trainer needs to run backwards through the model.

use crate::statistics::sigmoid;

/// The two completions of a comparison.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// Log-ratio of the preferred completion.
    pub chosen: f64,
    /// Log-ratio of the other.
    pub rejected: f64,
    /// Tokens of the preferred completion, > 0.
    pub chosen_tokens: f64,
    /// Tokens of the other, > 0.
    pub rejected_tokens: f64,
}

/// A loss and its derivatives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gradient {
    /// The loss.
    pub loss: f64,
    /// Its derivative with respect to [`Pair::chosen`].
    pub chosen: f64,
    /// Its derivative with respect to [`Pair::rejected`].
    pub rejected: f64,
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
    /// 1 − σ(βΔc) + σ(βΔr) (D'Oosterlinck et al. 2024).
    ApoZero,
}

/// log σ(x), without overflow.
fn log_sigmoid(x: f64) -> f64 {
    -(-x.abs()).exp().ln_1p() + x.min(0.0)
}

impl PairLoss {
    /// The loss of one pair.
    pub fn evaluate(self, beta: f64, pair: Pair) -> Gradient {
        let logit = beta * (pair.chosen - pair.rejected);
        // d/dx −log σ(x) = −σ(−x); along chosen it counts once, along rejected with the sign turned.
        let along = |loss: f64, slope: f64| Gradient { loss, chosen: slope, rejected: -slope };
        match self {
            PairLoss::Sigmoid => along(-log_sigmoid(logit), -beta * sigmoid(-logit)),
            PairLoss::Hinge => along((1.0 - logit).max(0.0), if logit < 1.0 { -beta } else { 0.0 }),
            PairLoss::Ipo => {
                let distance = pair.chosen / pair.chosen_tokens - pair.rejected / pair.rejected_tokens - 0.5 / beta;
                Gradient {
                    loss: distance * distance,
                    chosen: 2.0 * distance / pair.chosen_tokens,
                    rejected: -2.0 * distance / pair.rejected_tokens,
                }
            }
            PairLoss::Robust { epsilon } => {
                let scale = 1.0 / (1.0 - 2.0 * epsilon);
                let loss = -(1.0 - epsilon) * log_sigmoid(logit) + epsilon * log_sigmoid(-logit);
                let slope = -(1.0 - epsilon) * sigmoid(-logit) - epsilon * sigmoid(logit);
                along(loss * scale, beta * slope * scale)
            }
            PairLoss::Conservative { epsilon } => {
                let loss = -(1.0 - epsilon) * log_sigmoid(logit) - epsilon * log_sigmoid(-logit);
                let slope = -(1.0 - epsilon) * sigmoid(-logit) + epsilon * sigmoid(logit);
                along(loss, beta * slope)
            }
            PairLoss::SigmoidNorm => {
                let logit = beta * (pair.chosen / pair.chosen_tokens - pair.rejected / pair.rejected_tokens);
                let slope = -beta * sigmoid(-logit);
                Gradient {
                    loss: -log_sigmoid(logit),
                    chosen: slope / pair.chosen_tokens,
                    rejected: -slope / pair.rejected_tokens,
                }
            }
            PairLoss::ApoZero => {
                let (c, r) = (sigmoid(beta * pair.chosen), sigmoid(beta * pair.rejected));
                Gradient { loss: 1.0 - c + r, chosen: -beta * c * (1.0 - c), rejected: beta * r * (1.0 - r) }
            }
        }
    }
}

/// −log σ(rc − rr − margin) + centring · (rc + rr)², the reward model's loss (Bradley and Terry 1952; Eisenstein et al. 2023 for the
/// centring), with its derivatives along the two rewards.
pub fn bradley_terry(chosen: f64, rejected: f64, margin: f64, centring: f64) -> Gradient {
    let logit = chosen - rejected - margin;
    let (sum, slope) = (chosen + rejected, -sigmoid(-logit));
    let pull = 2.0 * centring * sum;
    Gradient { loss: -log_sigmoid(logit) + centring * sum * sum, chosen: slope + pull, rejected: -slope + pull }
}

/// KTO (Ethayarajh et al. 2024, eq. 8): a completion judged by itself against the batch's mean divergence `z`, which carries no gradient.
/// Returns the loss and its derivative along Δ.
pub fn kto(beta: f64, log_ratio: f64, z: f64, good: bool) -> (f64, f64) {
    let sign = if good { 1.0 } else { -1.0 };
    let s = sigmoid(sign * beta * (log_ratio - z));
    (1.0 - s, -sign * beta * s * (1.0 - s))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: Pair = Pair { chosen: 0.5, rejected: -0.3, chosen_tokens: 4.0, rejected_tokens: 5.0 };
    const ALL: [PairLoss; 7] = [
        PairLoss::Sigmoid,
        PairLoss::Hinge,
        PairLoss::Ipo,
        PairLoss::Robust { epsilon: 0.1 },
        PairLoss::Conservative { epsilon: 0.1 },
        PairLoss::SigmoidNorm,
        PairLoss::ApoZero,
    ];

    fn close(found: f64, expected: f64, tolerance: f64) {
        assert!((found - expected).abs() <= tolerance, "{found} instead of {expected}");
    }

    /// The values that TRL's formulas give, to six digits.
    #[test]
    fn losses_have_their_published_values() {
        let expected = [0.653947, 0.92, 23.184225, 0.643947, 0.661947, 0.683940, 0.980003];
        for (loss, expected) in ALL.into_iter().zip(expected) {
            close(loss.evaluate(0.1, PAIR).loss, expected, 5.1e-7);
        }
        close(bradley_terry(1.2, 0.4, 0.0, 0.0).loss, 0.371101, 5.1e-7);
        close(bradley_terry(1.2, 0.4, 0.0, 0.01).loss, 0.396701, 5.1e-7);
        close(kto(0.1, 0.5, 0.2, true).0, 0.492501, 5.1e-7);
        close(kto(0.1, -0.3, 0.2, false).0, 0.487503, 5.1e-7);
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let h = 1e-6;
        for beta in [0.1, 1.0, 7.0] {
            for (chosen, rejected) in [(0.5, -0.3), (-2.0, 1.5), (3.0, 3.0), (-0.4, -6.0)] {
                let pair = Pair { chosen, rejected, ..PAIR };
                for loss in ALL {
                    let found = loss.evaluate(beta, pair);
                    let at = |dc: f64, dr: f64| {
                        loss.evaluate(beta, Pair { chosen: chosen + dc, rejected: rejected + dr, ..pair }).loss
                    };
                    close(found.chosen, (at(h, 0.0) - at(-h, 0.0)) / (2.0 * h), 1e-6 * (1.0 + found.chosen.abs()));
                    close(found.rejected, (at(0.0, h) - at(0.0, -h)) / (2.0 * h), 1e-6 * (1.0 + found.rejected.abs()));
                }
                let found = bradley_terry(chosen, rejected, 0.3, 0.02);
                let at = |dc: f64, dr: f64| bradley_terry(chosen + dc, rejected + dr, 0.3, 0.02).loss;
                close(found.chosen, (at(h, 0.0) - at(-h, 0.0)) / (2.0 * h), 1e-6);
                close(found.rejected, (at(0.0, h) - at(0.0, -h)) / (2.0 * h), 1e-6);
                for good in [true, false] {
                    let slope = (kto(beta, chosen + h, 0.2, good).0 - kto(beta, chosen - h, 0.2, good).0) / (2.0 * h);
                    close(kto(beta, chosen, 0.2, good).1, slope, 1e-6);
                }
            }
        }
    }

    #[test]
    fn extreme_ratios_stay_finite() {
        for loss in ALL {
            for (chosen, rejected) in [(1e6, -1e6), (-1e6, 1e6)] {
                let found = loss.evaluate(0.5, Pair { chosen, rejected, ..PAIR });
                assert!(found.loss.is_finite() && found.chosen.is_finite() && found.rejected.is_finite(), "{loss:?} {found:?}");
            }
        }
    }
}
