//! Shares for a bandit: each arm gets the traffic that it deserves by chance of being the best.

use crate::rollout::statistics::Sample;
use crate::rollout::statistics::special::{beta_quantile, normal_quantile};
use serde::{Deserialize, Serialize};

/// Successes and failures from which on a Beta distribution is taken for a normal one: its skewness is below 0.07 then, and its
/// quantile would take longer with every observation.
const MANY: u64 = 1000;

/// What is believed of an arm's mean reward.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Belief {
    /// A share of successes: Beta(1 + s, 1 + n − s), from a flat prior.
    Share {
        /// s
        successes: u64,
        /// n
        trials: u64,
    },
    /// A mean of many: normal about it.
    Mean(
        /// With a variance.
        Sample,
    ),
}

impl Belief {
    /// The value below which the mean lies with probability p.
    fn quantile(&self, p: f64) -> f64 {
        match self {
            Self::Share { successes, trials } => {
                let failures = trials.saturating_sub(*successes);
                let (a, b) = (1.0 + *successes as f64, 1.0 + failures as f64);
                if (*successes).min(failures) < MANY {
                    return beta_quantile(p, a, b);
                }
                let n = a + b;
                a / n + normal_quantile(p) * (a * b / (n * n * (n + 1.0))).sqrt()
            }
            Self::Mean(sample) => sample.mean + normal_quantile(p) * (sample.variance / sample.count as f64).sqrt(),
        }
    }
}

/// How often each arm is the best of `rounds` joint draws (Thompson 1933). `uniform` gives numbers in [0, 1); for a given
/// sequence of them the result is the same. Sums to 1; even without rounds or where the draws are no numbers.
pub fn thompson(beliefs: &[Belief], rounds: usize, uniform: &mut dyn FnMut() -> f64) -> Vec<f64> {
    let mut wins = vec![0u64; beliefs.len()];
    for _ in 0..rounds {
        let mut best: Option<(usize, f64)> = None;
        for (arm, belief) in beliefs.iter().enumerate() {
            // Off the ends, where a quantile is infinite.
            let draw = belief.quantile(uniform().clamp(f64::EPSILON, 1.0 - f64::EPSILON));
            if draw.is_finite() && best.is_none_or(|(_, most)| draw > most) {
                best = Some((arm, draw));
            }
        }
        if let Some((arm, _)) = best {
            wins[arm] += 1;
        }
    }
    let total: u64 = wins.iter().sum();
    if total == 0 {
        return vec![1.0 / beliefs.len() as f64; beliefs.len()];
    }
    wins.iter().map(|count| *count as f64 / total as f64).collect()
}

/// p = f + (1 − n·f)·w: no arm falls below the floor f, so that each goes on being measured. A floor above 1/n is 1/n.
pub fn floored(shares: &[f64], floor: f64) -> Vec<f64> {
    let n = shares.len() as f64;
    let floor = floor.clamp(0.0, 1.0 / n);
    shares.iter().map(|share| floor + (1.0 - n * floor) * share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::statistics::special::normal_cdf;
    use tidemill_rlhf::random::Random;

    #[test]
    fn the_share_of_an_arm_is_its_chance_of_being_the_best() {
        let mut random = Random::new(31);
        // Two normals a deviation of the difference apart: Φ(1).
        let arm = |mean| Belief::Mean(Sample { count: 50, mean, variance: 25.0 });
        let shares = thompson(&[arm(0.0), arm(1.0)], 20_000, &mut || random.unit());
        assert!((shares[1] - normal_cdf(1.0)).abs() < 0.01, "{shares:?}");
        // Beta(2, 1) beats Beta(1, 2) with probability 5/6.
        let coin = |successes| Belief::Share { successes, trials: 1 };
        let shares = thompson(&[coin(0), coin(1)], 20_000, &mut || random.unit());
        assert!((shares[1] - 5.0 / 6.0).abs() < 0.01, "{shares:?}");
    }

    #[test]
    fn many_trials_make_a_normal_distribution_of_nearly_the_same_quantiles() {
        let exact = |p| beta_quantile(p, 1501.0, 4501.0);
        let belief = Belief::Share { successes: 1500, trials: 6000 };
        // A twentieth of the standard deviation.
        assert!([0.001, 0.025, 0.5, 0.9, 0.999].iter().all(|p| (belief.quantile(*p) - exact(*p)).abs() < 2.8e-4));
    }

    #[test]
    fn the_floor_is_kept_and_shares_sum_to_one() {
        let shares = floored(&[1.0, 0.0, 0.0, 0.0], 0.05);
        assert!((shares[0] - 0.85).abs() < 1e-12 && (shares[1] - 0.05).abs() < 1e-12);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert_eq!(floored(&[0.9, 0.1], 0.9), [0.5, 0.5]);
        assert_eq!(floored(&[0.9, 0.1], 0.0), [0.9, 0.1]);
    }

    #[test]
    fn the_same_numbers_give_the_same_shares_and_nothing_known_gives_even_ones() {
        let arms = [Belief::Share { successes: 0, trials: 0 }, Belief::Share { successes: 30, trials: 90 }];
        let draw = || {
            let mut random = Random::new(1);
            thompson(&arms, 500, &mut || random.unit())
        };
        assert_eq!(draw(), draw());
        assert_eq!(thompson(&arms, 0, &mut || 0.5), [0.5, 0.5]);
        assert_eq!(thompson(&[], 9, &mut || 0.5), Vec::<f64>::new());
    }
}
