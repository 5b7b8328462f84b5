//! What an arm gave, and how two arms differ.

use serde::{Deserialize, Serialize};

/// Mean and variance of an arm's observations.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Observations, at least 1.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Variance of one observation, not of the mean; 0 or more.
    pub variance: f64,
}

impl Sample {
    /// A share of trials. Its variance is p(1 − p), as GrowthBook has it; an arm in which all trials ended the same way has an
    /// unknown variance and no zero one, so there p is Laplace's (s + 1)/(n + 2). None without trials, and with more successes
    /// than trials.
    pub fn proportion(successes: u64, trials: u64) -> Option<Self> {
        if trials == 0 || successes > trials {
            return None;
        }
        let mean = successes as f64 / trials as f64;
        let spread = if successes == 0 || successes == trials { (successes + 1) as f64 / (trials + 2) as f64 } else { mean };
        Some(Self { count: trials, mean, variance: spread * (1.0 - spread) })
    }

    /// A mean, with the unbiased variance. None below two observations and for sums that are no numbers.
    pub fn mean(sum: f64, sum_squares: f64, count: u64) -> Option<Self> {
        if count < 2 {
            return None;
        }
        let n = count as f64;
        let (mean, variance) = (sum / n, (sum_squares - sum * sum / n) / (n - 1.0));
        // Rounding makes the variance of equal numbers slightly negative.
        (mean.is_finite() && variance.is_finite()).then_some(Self { count, mean, variance: variance.max(0.0) })
    }

    /// The mean as an estimate. None without a variance.
    pub fn estimate(&self) -> Option<Estimate> {
        Estimate::new(self.mean, self.variance / self.count as f64, self.count)
    }
}

/// How a difference is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Treatment − control.
    Difference,
    /// (Treatment − control) / control.
    Relative,
}

/// A number that was estimated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// Variance of the estimate itself, > 0.
    pub variance: f64,
    /// Observations behind it, of all arms.
    pub count: u64,
}

impl Estimate {
    /// None where nothing is known: without observations, without variance, or where a number is none.
    pub fn new(value: f64, variance: f64, count: u64) -> Option<Self> {
        (count > 0 && value.is_finite() && variance.is_finite() && variance > 0.0).then_some(Self { value, variance, count })
    }
}

/// How a treatment differs from its control. The variance of a relative effect m_t/m_c − 1 is the delta method's,
/// v_t/(n_t·m_c²) + v_c·m_t²/(n_c·m_c⁴) (Deng, Knoblich and Lu 2018, "Applying the delta method in metric analytics").
/// None where it is not defined, as relative to nothing.
pub fn contrast(control: &Sample, treatment: &Sample, effect: Effect) -> Option<Estimate> {
    let (v_c, v_t) = (control.variance / control.count as f64, treatment.variance / treatment.count as f64);
    let (m_c, m_t) = (control.mean, treatment.mean);
    let (value, variance) = match effect {
        Effect::Difference => (m_t - m_c, v_t + v_c),
        Effect::Relative => ((m_t - m_c) / m_c.abs(), v_t / m_c.powi(2) + v_c * m_t.powi(2) / m_c.powi(4)),
    };
    Estimate::new(value, variance, control.count + treatment.count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_defined_is_none() {
        assert_eq!(Sample::proportion(0, 0), None);
        assert_eq!(Sample::proportion(3, 2), None);
        assert_eq!(Sample::mean(1.0, 1.0, 1), None);
        assert_eq!(Sample::mean(f64::NAN, 1.0, 9), None);
        let same = Sample::mean(0.3 * 7.0, 0.09 * 7.0, 7).unwrap();
        assert!(same.variance >= 0.0 && same.variance < 1e-15);
        let (none, some) = (Sample::proportion(0, 50).unwrap(), Sample::proportion(5, 50).unwrap());
        assert_eq!(contrast(&none, &some, Effect::Relative), None, "relative to nothing");
        assert!(contrast(&none, &some, Effect::Difference).is_some(), "a control without events still compares");
        let flat = Sample { count: 9, mean: 1.0, variance: 0.0 };
        assert_eq!(contrast(&flat, &flat, Effect::Difference), None);
    }

    #[test]
    fn a_relative_effect_of_a_negative_control_has_the_sign_of_the_change() {
        let sample = |mean| Sample { count: 100, mean, variance: 1.0 };
        assert_eq!(contrast(&sample(-2.0), &sample(-1.0), Effect::Relative).unwrap().value, 0.5);
    }
}
