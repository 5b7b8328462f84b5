//! Whether the arms got the shares of the traffic that they were given.

use crate::rollout::statistics::special::chi_square_tail;
use serde::{Deserialize, Serialize};

/// Pearson's test of the arms' counts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRatio {
    /// Σ (observed − expected)² / expected.
    pub chi_square: f64,
    /// Arms with a weight, less one.
    pub degrees: u32,
    /// Small where the counts do not fit the weights: below 0.001 something is broken, and no comparison of the arms is to be
    /// believed.
    pub p_value: f64,
}

/// Sample ratio mismatch (Fabijan et al. 2019, "Diagnosing sample ratio mismatch in online controlled experiments"): χ² of the
/// counts against the weights, which need not sum to 1. Arms without weight count neither in the total nor as a degree of
/// freedom. None with fewer than two arms of weight, and without any count.
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
    Some(SampleRatio { chi_square, degrees, p_value: chi_square_tail(chi_square, f64::from(degrees)) })
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn arms_without_weight_are_no_part_of_it() {
        let all = sample_ratio(&[135, 999, 115], &[0.5, 0.0, 0.5]).unwrap();
        assert_eq!(all, sample_ratio(&[135, 115], &[1.0, 1.0]).unwrap());
        assert_eq!(sample_ratio(&[135, 5], &[1.0, 0.0]), None);
        assert_eq!(sample_ratio(&[0, 0], &[0.5, 0.5]), None);
        assert_eq!(sample_ratio(&[], &[]), None);
    }
}
