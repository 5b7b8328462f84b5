//! The test for one look at a size that was fixed beforehand.

use crate::rollout::statistics::special::{student_quantile, student_two_sided};
use crate::rollout::statistics::{Effect, Sample, contrast};
use serde::{Deserialize, Serialize};
use tidemill_rlhf::statistics::Interval;

/// What Welch's test says.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welch {
    /// The effect.
    pub value: f64,
    /// Its interval with confidence 1 − α.
    pub interval: Interval,
    /// Two-sided, against no effect.
    pub p_value: f64,
    /// Degrees of freedom.
    pub degrees: f64,
}

/// Welch's t-test (Welch 1947) with Satterthwaite's degrees of freedom. A relative effect has the delta method's variance. None
/// where the comparison is not defined, and below two observations in an arm.
pub fn welch(control: &Sample, treatment: &Sample, effect: Effect, alpha: f64) -> Option<Welch> {
    let estimate = contrast(control, treatment, effect)?;
    let part = |sample: &Sample| sample.variance / sample.count as f64;
    let square = |sample: &Sample| part(sample).powi(2) / (sample.count as f64 - 1.0);
    if control.count < 2 || treatment.count < 2 {
        return None;
    }
    let degrees = (part(control) + part(treatment)).powi(2) / (square(control) + square(treatment));
    let error = estimate.variance.sqrt();
    let half = student_quantile(1.0 - 0.5 * alpha, degrees) * error;
    Some(Welch {
        value: estimate.value,
        interval: Interval { low: estimate.value - half, high: estimate.value + half },
        p_value: student_two_sided(estimate.value / error, degrees),
        degrees,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reference values of GrowthBook's statistics engine (`gbstats`, two-sided t-test, relative effect).
    #[test]
    fn it_has_the_published_values() {
        let (control, treatment) = (Sample::proportion(14, 28).unwrap(), Sample::proportion(16, 30).unwrap());
        let test = welch(&control, &treatment, Effect::Relative, 0.05).unwrap();
        let five = |value: f64| (value * 1e5).round() / 1e5;
        assert_eq!((five(test.interval.low), five(test.interval.high), five(test.p_value)), (-0.47767, 0.61101, 0.80707));
    }

    #[test]
    fn a_textbook_example_of_unequal_variances_agrees() {
        // NIST/SEMATECH e-Handbook 1.3.5.3, "AUTO83B": 249 and 79 cars, means 20.14458 and 30.48101, deviations 6.414700 and
        // 6.107710. Welch's statistic is −12.94627 with 136.87 degrees of freedom.
        let sample = |count, mean, deviation: f64| Sample { count, mean, variance: deviation * deviation };
        let (first, second) = (sample(249, 20.14458, 6.414_700), sample(79, 30.48101, 6.107_710));
        let test = welch(&first, &second, Effect::Difference, 0.05).unwrap();
        let error = (first.variance / 249.0 + second.variance / 79.0).sqrt();
        assert!((test.value / error - 12.94627).abs() < 1e-4, "{}", test.value / error);
        assert!((test.degrees - 136.8750).abs() < 1e-2, "{}", test.degrees);
        assert!(test.p_value < 1e-20);
    }
}
