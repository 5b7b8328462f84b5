//! The same comparison as a chance.

use crate::rollout::statistics::Estimate;
use crate::rollout::statistics::special::{normal_cdf, normal_density, normal_quantile};
use serde::{Deserialize, Serialize};
use tidemill_rlhf::statistics::Interval;

/// What is believed of an effect.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Posterior {
    /// The expected effect.
    pub value: f64,
    /// Holds the effect with probability 1 − α.
    pub interval: Interval,
    /// Probability that the treatment is better, when more is better.
    pub chance_to_win: f64,
    /// What is expected to be lost by choosing the control, and by choosing the treatment, in the effect's unit.
    pub risk: [f64; 2],
}

/// With a flat prior the posterior is normal about the estimate: mean m, deviation s. P(effect > 0) = Φ(m/s), and the loss of a
/// wrong choice is E[max(±effect, 0)] = ±m·Φ(±m/s) + s·φ(m/s) (GrowthBook, "Statistical details": chance to win and risk). As any
/// Bayesian number it is true for one look; [`confidence_sequence`](super::confidence_sequence) is for many.
pub fn posterior(estimate: &Estimate, alpha: f64) -> Posterior {
    let (mean, deviation) = (estimate.value, estimate.variance.sqrt());
    let z = mean / deviation;
    let half = -normal_quantile(0.5 * alpha) * deviation;
    let spread = deviation * normal_density(z);
    Posterior {
        value: mean,
        interval: Interval { low: mean - half, high: mean + half },
        chance_to_win: normal_cdf(z),
        // Far in a tail the difference rounds to a hair below nothing.
        risk: [(mean * normal_cdf(z) + spread).max(0.0), (spread - mean * normal_cdf(-z)).max(0.0)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::statistics::{Effect, Sample, contrast};

    /// Reference values of GrowthBook's statistics engine (`gbstats`, Bayesian test, flat prior, relative effect).
    #[test]
    fn it_has_the_published_values() {
        let (control, treatment) = (Sample::proportion(49, 100).unwrap(), Sample::proportion(51, 100).unwrap());
        let belief = posterior(&contrast(&control, &treatment, Effect::Relative).unwrap(), 0.05);
        let five = |value: f64| (value * 1e5).round() / 1e5;
        assert_eq!(five(belief.chance_to_win), 0.60918);
        assert_eq!(belief.risk.map(five), [0.0814, 0.04058]);
    }

    #[test]
    fn means_are_believed_by_the_same_rule_and_risks_differ_by_the_effect() {
        let (control, treatment) = (Sample::mean(100.0, 1002.25, 10).unwrap(), Sample::mean(105.0, 1111.5, 10).unwrap());
        for (first, second) in [(control, treatment), (treatment, control)] {
            let belief = posterior(&contrast(&first, &second, Effect::Difference).unwrap(), 0.05);
            assert!((belief.risk[0] - belief.risk[1] - belief.value).abs() < 1e-12);
            assert_eq!(belief.chance_to_win > 0.5, belief.value > 0.0);
        }
        let sure = posterior(&Estimate::new(1.0, 1e-8, 9).unwrap(), 0.05);
        assert_eq!((sure.chance_to_win, sure.risk[1]), (1.0, 0.0));
    }
}
