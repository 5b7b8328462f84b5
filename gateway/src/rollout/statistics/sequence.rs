//! Confidence sequences: intervals that hold at all times at once, so that one may look after every observation and stop when one
//! likes.

use crate::rollout::statistics::{Effect, Estimate, Sample, contrast};
use serde::{Deserialize, Serialize};
use tidemill_rlhf::statistics::Interval;

/// How sure a sequence is, and where it is narrowest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Level {
    /// Chance that the sequence ever misses the true value, in (0, 1).
    pub alpha: f64,
    /// Observations of all arms at which the sequence is to be narrowest, > 0; GrowthBook's N*, 5,000 unless said.
    pub tuning: f64,
}

impl Level {
    /// ρ², the variance of the mixture. Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit theory and
    /// asymptotic confidence sequences" (arXiv 2103.06476), the approximate optimum of its appendix: (−2 ln α + ln(1 − 2 ln α)) /
    /// N*.
    fn mixture(self) -> f64 {
        let twice = -2.0 * self.alpha.ln();
        (twice + twice.ln_1p()) / self.tuning
    }

    /// Half the width after n observations of variance 1: the same paper's asymptotic confidence sequence,
    /// √(2(nρ² + 1)/(n²ρ²) · ln(√(nρ² + 1)/α)).
    pub fn radius(self, n: f64) -> f64 {
        let rho2 = self.mixture();
        let grown = n * rho2 + 1.0;
        (2.0 * grown / (n * n * rho2) * (0.5 * grown.ln() - self.alpha.ln())).sqrt()
    }
}

/// What a sequence says at one time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sequence {
    /// The estimate.
    pub value: f64,
    /// All that is not excluded.
    pub interval: Interval,
    /// Always-valid p-value against 0: at most α exactly when 0 lies outside the interval.
    pub p_value: f64,
}

/// The sequence of an estimate at its time. The p-value is one over the mixture's e-value, e^(n²ρ²d²/(2s²(nρ² + 1)))/√(nρ² + 1).
pub fn confidence_sequence(estimate: &Estimate, level: Level) -> Sequence {
    let n = estimate.count as f64;
    // Variance of one observation, as if the estimate were a mean of n.
    let variance = estimate.variance * n;
    let radius = level.radius(n) * variance.sqrt();
    let rho2 = level.mixture();
    let grown = n * rho2 + 1.0;
    let ln_e = n * n * rho2 * estimate.value.powi(2) / (2.0 * variance * grown) - 0.5 * grown.ln();
    Sequence {
        value: estimate.value,
        interval: Interval { low: estimate.value - radius, high: estimate.value + radius },
        p_value: (-ln_e).exp().min(1.0),
    }
}

/// The sequence of a relative effect that decisions stand on: all r for which the sequence of m_t − (1 + r)·m_c holds 0, found by
/// Fieller's quadratic (Fieller 1954, "Some problems in interval estimation"). At r = 0 it says what the difference's sequence
/// says. The delta method's interval, which is what is usually shown, takes the control's mean for certain where it is small:
/// looked at all the time it finds winners among equal rare events. None while the control's mean cannot be told from 0, when no
/// relative effect is excluded.
pub fn relative_sequence(control: &Sample, treatment: &Sample, level: Level) -> Option<Sequence> {
    let (v_c, v_t) = (control.variance / control.count as f64, treatment.variance / treatment.count as f64);
    let (m_c, m_t) = (control.mean, treatment.mean);
    let difference = contrast(control, treatment, Effect::Difference)?;
    let n = difference.count as f64;
    // As many standard errors as the sequence allows at this time.
    let k2 = level.radius(n).powi(2) * n;
    let leading = m_c * m_c - k2 * v_c;
    if leading <= 0.0 {
        return None;
    }
    // What is under the root is positive when the leading term is; rounding may say otherwise.
    let root = (k2 * (v_t * m_c * m_c + v_c * m_t * m_t - k2 * v_t * v_c)).max(0.0).sqrt();
    let ends = [(m_t * m_c - root) / leading - 1.0, (m_t * m_c + root) / leading - 1.0].map(|end| end * m_c.signum());
    Some(Sequence {
        value: (m_t - m_c) / m_c.abs(),
        interval: Interval { low: ends[0].min(ends[1]), high: ends[0].max(ends[1]) },
        p_value: confidence_sequence(&difference, level).p_value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn five(value: f64) -> f64 {
        (value * 1e5).round() / 1e5
    }

    /// Reference values of GrowthBook's statistics engine (`gbstats`, sequential two-sided tests, relative effect, 95 %).
    #[test]
    fn proportions_and_means_have_the_published_sequences() {
        let share = (Sample::proportion(1396, 3000).unwrap(), Sample::proportion(2422, 3461).unwrap(), 5000.0);
        let mean = (Sample::mean(1396.87, 52_377.976_7, 3000).unwrap(), Sample::mean(2422.7, 134_698.29, 3461).unwrap(), 1000.0);
        for ((control, treatment, tuning), expected) in
            [(share, (0.50386, 0.40098, 0.60675)), (mean, (0.50336, -0.55844, 1.56516))]
        {
            let estimate = contrast(&control, &treatment, Effect::Relative).unwrap();
            let sequence = confidence_sequence(&estimate, Level { alpha: 0.05, tuning });
            assert_eq!((five(sequence.value), five(sequence.interval.low), five(sequence.interval.high)), expected);
            assert_eq!(sequence.p_value < 0.05, sequence.interval.low > 0.0);
        }
    }

    #[test]
    fn a_relative_sequence_holds_exactly_the_effects_that_the_linear_contrast_does_not_exclude() {
        let level = Level { alpha: 0.05, tuning: 800.0 };
        let (control, treatment) = (Sample::proportion(120, 600).unwrap(), Sample::proportion(170, 500).unwrap());
        let sequence = relative_sequence(&control, &treatment, level).unwrap();
        for (end, step) in [(sequence.interval.low, 1e-6), (sequence.interval.high, -1e-6)] {
            let excluded = |relative: f64| {
                let factor = 1.0 + relative;
                let variance = treatment.variance / 500.0 + factor * factor * control.variance / 600.0;
                let estimate = Estimate::new(treatment.mean - factor * control.mean, variance, 1100).unwrap();
                confidence_sequence(&estimate, level).p_value < 0.05
            };
            assert!(excluded(end - step) && !excluded(end + step), "{sequence:?}");
        }
        // With many observations it is the delta method's.
        let (control, treatment) = (Sample::proportion(120_000, 600_000).unwrap(), Sample::proportion(120_700, 600_000).unwrap());
        let (fieller, delta) = (
            relative_sequence(&control, &treatment, level).unwrap().interval,
            confidence_sequence(&contrast(&control, &treatment, Effect::Relative).unwrap(), level).interval,
        );
        assert!((fieller.low - delta.low).abs() < 2e-4 && (fieller.high - delta.high).abs() < 2e-4, "{fieller:?} {delta:?}");
        // A control that may be 0 excludes nothing.
        assert_eq!(relative_sequence(&Sample::proportion(2, 600).unwrap(), &treatment, level), None);
    }

    #[test]
    fn a_negative_controls_rise_is_positive() {
        let level = Level { alpha: 0.05, tuning: 800.0 };
        let sample = |mean| Sample { count: 4000, mean, variance: 1.0 };
        let sequence = relative_sequence(&sample(-2.0), &sample(-1.0), level).unwrap();
        assert!(sequence.value == 0.5 && sequence.interval.low > 0.4 && sequence.interval.high < 0.6, "{sequence:?}");
    }

    #[test]
    fn the_p_value_is_alpha_where_the_interval_touches_zero() {
        let level = Level { alpha: 0.05, tuning: 700.0 };
        for n in [10u64, 900, 100_000] {
            let value = level.radius(n as f64);
            let estimate = Estimate::new(value, 1.0 / n as f64, n).unwrap();
            assert!((confidence_sequence(&estimate, level).p_value - 0.05).abs() < 1e-12);
        }
    }

    #[test]
    fn it_is_narrowest_against_a_fixed_interval_near_where_it_was_tuned() {
        let level = Level { alpha: 0.05, tuning: 1000.0 };
        // A fixed interval's half width is 1.96/√n.
        let ratio = |n: f64| level.radius(n) * n.sqrt();
        let best = (1..4000).map(|n| f64::from(n) * 5.0).min_by(|a, b| ratio(*a).total_cmp(&ratio(*b))).unwrap();
        assert!((best - 1000.0).abs() < 60.0, "{best}");
        assert!(ratio(1e6) > 1.2 * ratio(1000.0) && ratio(10.0) > 2.0 * ratio(1000.0));
    }
}
