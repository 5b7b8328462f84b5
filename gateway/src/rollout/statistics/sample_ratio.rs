//! Whether the arms got the shares of the traffic that they were given.

use crate::rollout::statistics::special::chi_square_tail;
use libm::lgamma;
use serde::{Deserialize, Serialize};

/// How closely shares that are wrong are expected to lie around those that were given, in units: the fewer, the sooner a large mismatch is
/// seen, and the later a small one. With 100 a missing tenth of one of two arms is seen after about 4,000 units, and an arm that is missing
/// after 40.
const CONCENTRATION: f64 = 100.0;

/// Two tests of the arms' counts: Pearson's, and one that may be looked at after every unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRatio {
    /// Σ (observed − expected)² / expected.
    pub chi_square: f64,
    /// Arms with a weight, less one.
    pub degrees: u32,
    /// For one look: small where the counts do not fit the weights. Who looks a thousand times finds less than 0.001 in one healthy
    /// experiment of forty.
    pub p_value: f64,
    /// For any number of looks: in an experiment that is as it should be, it is ever below p with a probability of at most p. 1 in rows from
    /// before it was measured.
    #[serde(default = "certain")]
    pub anytime_p: f64,
}

fn certain() -> f64 {
    1.0
}

/// Sample ratio mismatch (Fabijan et al. 2019, "Diagnosing sample ratio mismatch in online controlled experiments"): χ² of the
/// counts against the weights, which need not sum to 1. Arms without weight count neither in the total nor as a degree of
/// freedom. None with fewer than two arms of weight, and without any count. The test for any number of looks is the inverse Bayes factor
/// of the given shares against a Dirichlet distribution around them (Lindon, Malek 2022, "Anytime-valid inference for multinomial count
/// data", equation 6).
pub fn sample_ratio(observed: &[u64], weights: &[f64]) -> Option<SampleRatio> {
    let arms: Vec<(f64, f64)> = observed
        .iter()
        .zip(weights)
        .filter(|(_, weight)| **weight > 0.0)
        .map(|(count, weight)| (*count as f64, *weight))
        .collect();
    let total: f64 = arms.iter().map(|(count, _)| count).sum();
    let weight: f64 = arms.iter().map(|(_, weight)| weight).sum();
    let degrees = u32::try_from(arms.len().checked_sub(1)?).ok().filter(|degrees| *degrees > 0)?;
    if total == 0.0 || !weight.is_finite() {
        return None;
    }
    let chi_square = arms
        .iter()
        .map(|(count, share)| {
            let expected = total * share / weight;
            (count - expected).powi(2) / expected
        })
        .sum();
    // ln of the counts' probability under the mixture, over that under the given shares.
    let factor = lgamma(CONCENTRATION) - lgamma(CONCENTRATION + total)
        + arms
            .iter()
            .map(|(count, share)| {
                let prior = CONCENTRATION * share / weight;
                lgamma(prior + count) - lgamma(prior) - count * (share / weight).ln()
            })
            .sum::<f64>();
    let anytime_p = (-factor).exp().min(1.0);
    Some(SampleRatio { chi_square, degrees, p_value: chi_square_tail(chi_square, f64::from(degrees)), anytime_p })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_rlhf::random::Random;

    /// Reference values of GrowthBook's statistics engine (`gbstats`, sample ratio check).
    #[test]
    fn it_has_the_published_values() {
        let cases: [(&[u64], &[f64], f64, f64); 4] = [
            (&[1000, 1200], &[0.5, 0.5], 2.0079e-5, 5e-10),
            (&[135, 115], &[0.5, 0.5], 0.205_903, 5e-7),
            (&[310, 98], &[0.75, 0.25], 0.647_434, 5e-7),
            (&[500, 500, 600], &[0.34, 0.33, 0.33], 0.000_592_638, 5e-10),
        ];
        for (observed, weights, expected, half_digit) in cases {
            let test = sample_ratio(observed, weights).unwrap();
            assert!((test.p_value - expected).abs() <= half_digit, "{observed:?}: {test:?}");
        }
    }

    /// By hand: with 100 in all and halves, ln of B(50 + a, 50 + b) / B(50, 50) · 2^(a + b).
    #[test]
    fn the_test_for_any_number_of_looks_is_a_bayes_factor() {
        use crate::rollout::statistics::special::ln_beta;
        for (a, b) in [(0u64, 40u64), (9000, 8100), (500, 500), (1, 0)] {
            let (x, y) = (a as f64, b as f64);
            let factor = ln_beta(50.0 + x, 50.0 + y) - ln_beta(50.0, 50.0) + (x + y) * 2f64.ln();
            let found = sample_ratio(&[a, b], &[0.5, 0.5]).unwrap().anytime_p;
            assert!((found.ln() - (-factor).min(0.0)).abs() < 1e-9, "{a} {b}: {found} {factor}");
        }
        assert!(sample_ratio(&[0, 40], &[0.5, 0.5]).unwrap().anytime_p < 0.01, "an arm is missing");
        assert!(sample_ratio(&[2600, 2340], &[0.5, 0.5]).unwrap().anytime_p < 0.01, "a tenth of an arm is missing");
    }

    /// 2,000 healthy experiments, and a look after every fifth of 3,000 units.
    #[test]
    fn looking_often_makes_pearsons_test_cry_wolf_and_not_the_other() {
        let mut random = Random::new(7);
        let mut cried = [0, 0];
        for _ in 0..2000 {
            let (mut counts, mut least) = ([0u64; 2], [1.0f64; 2]);
            for unit in 1..=3000 {
                counts[usize::from(random.unit() < 0.25)] += 1;
                if unit % 5 == 0 && unit >= 20 {
                    let test = sample_ratio(&counts, &[0.75, 0.25]).unwrap();
                    least = [least[0].min(test.p_value), least[1].min(test.anytime_p)];
                }
            }
            cried[0] += u32::from(least[0] < 0.001);
            cried[1] += u32::from(least[1] < 0.01);
        }
        assert!(cried[0] > 30 && cried[1] <= 20, "{cried:?} of 2000");
    }

    #[test]
    fn arms_without_weight_are_no_part_of_it() {
        let all = sample_ratio(&[135, 999, 115], &[0.5, 0.0, 0.5]).unwrap();
        assert_eq!(all, sample_ratio(&[135, 115], &[1.0, 1.0]).unwrap());
        assert_eq!(sample_ratio(&[135, 5], &[1.0, 0.0]), None);
        assert_eq!(sample_ratio(&[0, 0], &[0.5, 0.5]), None);
        assert_eq!(sample_ratio(&[], &[]), None);
    }
}
