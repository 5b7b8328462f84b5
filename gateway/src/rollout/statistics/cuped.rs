//! Less noise from what was known of the units before (CUPED).

use crate::rollout::statistics::Sample;
use serde::{Deserialize, Serialize};

/// Sums over an arm's units of the metric y and of the same unit's value x from before the rollout, or of anything else that the
/// rollout cannot have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Covariate {
    /// Units.
    pub count: u64,
    /// Σ y
    pub sum: f64,
    /// Σ y²
    pub sum_squares: f64,
    /// Σ x
    pub before_sum: f64,
    /// Σ x²
    pub before_sum_squares: f64,
    /// Σ x·y
    pub product_sum: f64,
}

impl Covariate {
    /// Adds a unit.
    pub fn add(&mut self, before: f64, value: f64) {
        self.count += 1;
        self.sum += value;
        self.sum_squares += value * value;
        self.before_sum += before;
        self.before_sum_squares += before * before;
        self.product_sum += before * value;
    }

    fn covariance(&self) -> f64 {
        let n = self.count as f64;
        (self.product_sum - self.sum * self.before_sum / n) / (n - 1.0)
    }
}

/// What the adjustment did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cuped {
    /// The slope of y on x within arms.
    pub theta: f64,
    /// Each arm's adjusted sample, in the order given; to be compared as any other.
    pub arms: Vec<Sample>,
}

/// Deng, Xu, Kohavi and Walker 2013, "Improving the sensitivity of online controlled experiments by utilizing pre-experiment
/// data": y − θ(x − x̄) with θ = Σ cov(x, y) / Σ var(x) over the arms and x̄ of all units, so the variance is var y + θ² var x −
/// 2θ cov(x, y), which for equal arms is (1 − ρ²) var y. Without variation of x nothing is adjusted. None below two units in an
/// arm.
pub fn cuped(arms: &[Covariate]) -> Option<Cuped> {
    let samples = |of: fn(&Covariate) -> (f64, f64)| -> Option<Vec<Sample>> {
        arms.iter()
            .map(|arm| {
                let (sum, squares) = of(arm);
                Sample::mean(sum, squares, arm.count)
            })
            .collect()
    };
    let after = samples(|arm| (arm.sum, arm.sum_squares))?;
    let before = samples(|arm| (arm.before_sum, arm.before_sum_squares))?;
    let covariances: Vec<f64> = arms.iter().map(Covariate::covariance).collect();
    let spread: f64 = before.iter().map(|sample| sample.variance).sum();
    let theta = covariances.iter().sum::<f64>() / spread;
    let theta = if theta.is_finite() { theta } else { 0.0 };
    let units: f64 = arms.iter().map(|arm| arm.count as f64).sum();
    let centre = arms.iter().map(|arm| arm.before_sum).sum::<f64>() / units;
    let arms = after
        .iter()
        .zip(&before)
        .zip(&covariances)
        .map(|((after, before), covariance)| Sample {
            count: after.count,
            mean: after.mean - theta * (before.mean - centre),
            variance: (after.variance + theta * theta * before.variance - 2.0 * theta * covariance).max(0.0),
        })
        .collect();
    Some(Cuped { theta, arms })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::statistics::{Effect, contrast};
    use tidemill_rlhf::random::Random;

    #[test]
    fn what_was_known_before_is_taken_out_and_the_effect_stays() {
        let mut random = Random::new(17);
        let mut arms = [Covariate::default(), Covariate::default()];
        // y = 3x + noise, and 0.2 more in the treatment; the noise has a tenth of y's variance.
        for unit in 0..20_000 {
            let before = random.normal();
            let arm = unit % 2;
            arms[arm].add(before, 3.0 * before + random.normal() + 0.2 * arm as f64);
        }
        let adjusted = cuped(&arms).unwrap();
        assert!((adjusted.theta - 3.0).abs() < 0.05, "{}", adjusted.theta);
        for (arm, sample) in arms.iter().zip(&adjusted.arms) {
            let raw = Sample::mean(arm.sum, arm.sum_squares, arm.count).unwrap();
            // ρ² = 9/10: equation 4 of the paper.
            assert!((sample.variance / raw.variance - 0.1).abs() < 0.01);
        }
        let estimate = contrast(&adjusted.arms[0], &adjusted.arms[1], Effect::Difference).unwrap();
        assert!((estimate.value - 0.2).abs() < 3.0 * estimate.variance.sqrt() && estimate.variance.sqrt() < 0.015);
    }

    #[test]
    fn exact_numbers_of_a_small_example() {
        // x: 1 2 3 | 2 3 4; y: 2 4 7 | 5 7 8. cov 2.5 and 1.5, var x 1 and 1: θ = 2; x̄ = 2.5.
        let mut arms = [Covariate::default(), Covariate::default()];
        for (arm, before, value) in [(0, 1.0, 2.0), (0, 2.0, 4.0), (0, 3.0, 7.0), (1, 2.0, 5.0), (1, 3.0, 7.0), (1, 4.0, 8.0)] {
            arms[arm].add(before, value);
        }
        let adjusted = cuped(&arms).unwrap();
        assert!((adjusted.theta - 2.0).abs() < 1e-12);
        // 13/3 + 1 and 20/3 − 1; 19/3 + 4 − 10 and 7/3 + 4 − 6.
        for (sample, (mean, variance)) in adjusted.arms.iter().zip([(16.0 / 3.0, 1.0 / 3.0), (17.0 / 3.0, 1.0 / 3.0)]) {
            assert!((sample.mean - mean).abs() < 1e-12 && (sample.variance - variance).abs() < 1e-12, "{sample:?}");
        }
    }

    #[test]
    fn without_anything_known_nothing_changes() {
        let mut arm = Covariate::default();
        [1.0, 2.0, 6.0].iter().for_each(|value| arm.add(5.0, *value));
        let adjusted = cuped(&[arm, arm]).unwrap();
        assert_eq!((adjusted.theta, adjusted.arms[0].mean), (0.0, 3.0));
        assert_eq!(cuped(&[arm, Covariate::default()]), None);
    }
}
