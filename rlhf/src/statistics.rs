//! Statistics that the checks, gates and experiments share. Functions of values: chance comes in as [`Random`].

use serde::{Deserialize, Serialize};

use crate::random::Random;

/// Two-sided 95 % of the normal distribution.
pub const Z95: f64 = 1.959_963_984_540_054;

/// A range that holds the true value with a stated confidence, 95 % unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// How far the whole interval lies from a value; 0 when it contains it.
    pub fn distance(self, value: f64) -> f64 {
        (self.low - value).max(value - self.high).max(0.0)
    }
}

/// A share of trials, with its Wilson interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proportion {
    /// Trials with the outcome.
    pub successes: u64,
    /// All trials, > 0.
    pub trials: u64,
    /// `successes / trials`.
    pub share: f64,
    /// 95 % Wilson interval.
    pub interval: Interval,
}

impl Proportion {
    /// None without trials, and when there are more successes than trials.
    pub fn new(successes: u64, trials: u64) -> Option<Self> {
        let interval = wilson(successes, trials, Z95)?;
        Some(Self { successes, trials, share: successes as f64 / trials as f64, interval })
    }
}

/// Score interval of a proportion (Wilson 1927), without continuity correction. None without trials.
pub fn wilson(successes: u64, trials: u64, z: f64) -> Option<Interval> {
    if trials == 0 {
        return None;
    }
    wilson_share(successes as f64 / trials as f64, trials as f64, z)
}

/// The same for a share that counts halves, or stands for a number of trials that is not whole. None without trials and outside [0, 1].
pub fn wilson_share(share: f64, trials: f64, z: f64) -> Option<Interval> {
    if !(trials > 0.0 && (0.0..=1.0).contains(&share)) {
        return None;
    }
    let z2 = z * z;
    let centre = share + z2 / (2.0 * trials);
    let half = z * (share * (1.0 - share) / trials + z2 / (4.0 * trials * trials)).sqrt();
    let scale = 1.0 + z2 / trials;
    // The ends at none and at all are exact; rounding would make them 1e-19.
    let low = if share == 0.0 { 0.0 } else { ((centre - half) / scale).max(0.0) };
    let high = if share == 1.0 { 1.0 } else { ((centre + half) / scale).min(1.0) };
    Some(Interval { low, high })
}

/// Quantile by linear interpolation (Hyndman and Fan 1996, type 7) of sorted values; `at` in [0, 1]. None of nothing.
pub fn quantile(sorted: &[f64], at: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = at.clamp(0.0, 1.0) * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    Some(sorted[below] + (place - below as f64) * (sorted[above] - sorted[below]))
}

/// Percentile bootstrap, 95 %: `statistic` of resampled indices below `size`, `rounds` times; rounds without a value are left out.
pub fn bootstrap(
    size: usize,
    rounds: usize,
    random: &mut Random,
    mut statistic: impl FnMut(&[usize]) -> Option<f64>,
) -> Option<Interval> {
    let mut indices = vec![0; size];
    let mut values = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        indices.iter_mut().for_each(|index| *index = random.below(size));
        values.extend(statistic(&indices).filter(|value| value.is_finite()));
    }
    values.sort_by(f64::total_cmp);
    Some(Interval { low: quantile(&values, 0.025)?, high: quantile(&values, 0.975)? })
}

/// 1 / (1 + e^−x), exact at both ends.
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// Shannon entropy in nats of counts.
pub fn entropy(counts: impl IntoIterator<Item = u64>) -> f64 {
    let (mut total, mut sum) = (0.0, 0.0);
    for count in counts.into_iter().filter(|count| *count > 0) {
        let count = count as f64;
        total += count;
        sum += count * count.ln();
    }
    if total > 0.0 { (total.ln() - sum / total).max(0.0) } else { 0.0 }
}

/// Jensen-Shannon divergence in bits, in [0, 1], of two histograms over the same bins (Lin 1991). None when one is empty.
pub fn jensen_shannon(left: &[f64], right: &[f64]) -> Option<f64> {
    let (left_total, right_total): (f64, f64) = (left.iter().sum(), right.iter().sum());
    if left_total <= 0.0 || right_total <= 0.0 || left.len() != right.len() {
        return None;
    }
    let term = |p: f64, middle: f64| if p > 0.0 { p * (p / middle).log2() } else { 0.0 };
    let sum: f64 = left
        .iter()
        .zip(right)
        .map(|(l, r)| {
            let (p, q) = (l / left_total, r / right_total);
            let middle = 0.5 * (p + q);
            0.5 * (term(p, middle) + term(q, middle))
        })
        .sum();
    Some(sum.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_gives_the_published_intervals() {
        // Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
        for (successes, trials, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            let interval = wilson(successes, trials, Z95).unwrap();
            assert!(
                (interval.low - low).abs() < 5e-5 && (interval.high - high).abs() < 5e-5,
                "{successes}/{trials}: {interval:?}"
            );
        }
        assert_eq!(wilson(0, 0, Z95), None);
        assert_eq!(wilson(2, 1, Z95), None);
    }

    #[test]
    fn quantiles_interpolate_as_type_7_does() {
        // R: quantile(c(1, 2, 4, 8), c(0.25, 0.5, 0.9)) is 1.75, 3, 6.8.
        let values = [1.0, 2.0, 4.0, 8.0];
        for (at, expected) in [(0.0, 1.0), (0.25, 1.75), (0.5, 3.0), (0.9, 6.8), (1.0, 8.0)] {
            assert!((quantile(&values, at).unwrap() - expected).abs() < 1e-12);
        }
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn the_bootstrap_of_a_mean_is_about_two_standard_errors_wide() {
        let mut random = Random::new(3);
        let values: Vec<f64> = (0..400).map(|_| random.unit()).collect();
        let interval = bootstrap(values.len(), 1000, &mut random, |indices| {
            Some(indices.iter().map(|index| values[*index]).sum::<f64>() / indices.len() as f64)
        })
        .unwrap();
        // A uniform variable has variance 1/12, so 2·1.96 standard errors of 400 are 0.0566.
        assert!((interval.high - interval.low - 0.0566).abs() < 0.006, "{interval:?}");
    }

    #[test]
    fn divergence_and_entropy_have_their_known_values() {
        assert_eq!(jensen_shannon(&[1.0, 0.0], &[0.0, 5.0]), Some(1.0));
        assert_eq!(jensen_shannon(&[1.0, 3.0], &[2.0, 6.0]), Some(0.0));
        // H(3/4, 1/4) − ½H(1, 0) − ½H(½, ½) = 0.811278 − 0.5 bits.
        assert!((jensen_shannon(&[1.0, 0.0], &[1.0, 1.0]).unwrap() - 0.311_278).abs() < 1e-6);
        assert_eq!(jensen_shannon(&[0.0], &[1.0]), None);
        assert!((entropy([5, 5, 0, 5, 5]) - 4f64.ln()).abs() < 1e-12);
        assert_eq!(entropy([]), 0.0);
        assert!((sigmoid(800.0) - 1.0).abs() < 1e-12 && sigmoid(-800.0) == 0.0);
    }
}
