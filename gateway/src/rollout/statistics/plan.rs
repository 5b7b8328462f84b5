//! How much traffic an answer needs.

use crate::rollout::statistics::Level;
use crate::rollout::statistics::special::normal_quantile;
use serde::{Deserialize, Serialize};

/// More than this is never, for any traffic.
const NEVER: f64 = 1e15;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Outcome {
    /// A share of trials.
    Share {
        /// Of the control, in (0, 1).
        baseline: f64,
    },
    /// A number.
    Mean {
        /// Of the control, not 0.
        baseline: f64,
        /// Standard deviation of one observation, > 0.
        deviation: f64,
    },
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    /// What is counted.
    pub outcome: Outcome,
    /// Smallest change that is to be found, relative to the baseline: 0.1 is a tenth more, −0.1 a tenth less.
    pub effect: f64,
    /// Chance to find it, in (0, 1).
    pub power: f64,
    /// Chance to find what is not there, in (0, 1).
    pub alpha: f64,
    /// The treatment's share of the observations, in (0, 1).
    pub share: f64,
}

/// Observations needed, of both arms together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// One look, when all are there.
    pub fixed: u64,
    /// Where the confidence sequence excludes no effect on average, looking all the time.
    pub expected: u64,
    /// By when it has done so with the asked power, at the latest.
    pub sequential: u64,
    /// Where to tune the sequence to be narrowest: N*.
    pub tuning: u64,
}

impl Question {
    /// The first number that is out of its range, and the range.
    pub fn refusal(&self) -> Option<(&'static str, &'static str)> {
        let within = |value: f64| value > 0.0 && value < 1.0;
        let treated = match self.outcome {
            Outcome::Share { baseline } if !within(baseline) => return Some(("baseline", "a share between 0 and 1")),
            Outcome::Share { baseline } => within(baseline * (1.0 + self.effect)),
            Outcome::Mean { baseline, .. } if !baseline.is_finite() || baseline == 0.0 => {
                return Some(("baseline", "a number other than 0, since the effect is relative to it"));
            }
            Outcome::Mean { deviation, .. } if !(deviation > 0.0 && deviation.is_finite()) => {
                return Some(("deviation", "a number above 0"));
            }
            Outcome::Mean { .. } => true,
        };
        if !self.effect.is_finite() || self.effect == 0.0 || !treated {
            return Some(("effect", "a relative change other than 0 that keeps a share between 0 and 1, such as 0.1"));
        }
        [("power", self.power), ("alpha", self.alpha), ("share", self.share)]
            .into_iter()
            .find(|(_, value)| !within(*value))
            .map(|(name, _)| (name, "a number between 0 and 1"))
    }
}

/// None where the question is refused, and where no traffic would do.
///
/// Fixed: for shares Fleiss, Levin and Paik, "Statistical methods for rates and proportions" (2003), chapter 4, without
/// continuity correction and with arms of unequal size; for means (z₁₋α/₂ + z_power)² times the variance over the squared change.
/// Sequential: the sequence's radius at n observations r(n)·s, with s² = v_c/(1 − share) + v_t/share, meets the change δ on
/// average (simulated tests end there within a tenth), and meets δ − z_power·s/√n at the latest: a bound, since the sequence may
/// have ended at any time before. It is tuned to the fixed size.
pub fn plan(question: &Question) -> Option<Plan> {
    if question.refusal().is_some() {
        return None;
    }
    let (share, rest) = (question.share, 1.0 - question.share);
    let (change, pooled, spread) = match question.outcome {
        Outcome::Share { baseline } => {
            let treated = baseline * (1.0 + question.effect);
            let middle = rest * baseline + share * treated;
            let of = |p: f64| p * (1.0 - p);
            (baseline - treated, of(middle) / (share * rest), of(baseline) / rest + of(treated) / share)
        }
        Outcome::Mean { baseline, deviation } => {
            let spread = deviation * deviation / (share * rest);
            (baseline * question.effect, spread, spread)
        }
    };
    let change = change.abs();
    let (z_alpha, z_power) = (-normal_quantile(0.5 * question.alpha), normal_quantile(question.power));
    // A power below α needs no observation.
    let fixed = ((z_alpha * pooled.sqrt() + z_power * spread.sqrt()).max(0.0) / change).powi(2).max(2.0);
    let level = Level { alpha: question.alpha, tuning: fixed };
    let deviation = spread.sqrt();
    let expected = first(|n| level.radius(n) * deviation <= change)?;
    let sequential = first(|n| level.radius(n) * deviation + z_power.max(0.0) * deviation / n.sqrt() <= change)?;
    // Below 10¹⁵ a double counts exactly.
    let whole = |n: f64| n.ceil() as u64;
    (fixed < NEVER).then(|| Plan {
        fixed: whole(fixed),
        expected: whole(expected),
        sequential: whole(sequential),
        tuning: whole(fixed),
    })
}

/// The smallest whole number for which something holds that holds for all larger ones.
fn first(holds: impl Fn(f64) -> bool) -> Option<f64> {
    let mut high = 1.0;
    while !holds(high) {
        high *= 2.0;
        if high > NEVER {
            return None;
        }
    }
    let mut low = 0.5 * high;
    while high - low > 1.0 {
        let middle = (0.5 * (low + high)).floor();
        if holds(middle) { high = middle } else { low = middle }
    }
    Some(high)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(outcome: Outcome, effect: f64, power: f64) -> Plan {
        plan(&Question { outcome, effect, power, alpha: 0.05, share: 0.5 }).unwrap()
    }

    #[test]
    fn fixed_sizes_are_the_published_ones() {
        // R's manual of power.prop.test: p1 = 0.50, p2 = 0.75, power = 0.90 needs n = 76.7 in each arm.
        assert_eq!(ask(Outcome::Share { baseline: 0.5 }, 0.5, 0.9).fixed, (2.0f64 * 76.693).ceil() as u64);
        // R's manual of power.t.test: delta = 1, sd = 1, power = 0.90 needs n = 22.02 in each arm; by the normal distribution
        // 21.01.
        assert_eq!(ask(Outcome::Mean { baseline: 1.0, deviation: 1.0 }, 1.0, 0.9).fixed, (2.0f64 * 21.0148).ceil() as u64);
    }

    #[test]
    fn less_is_as_hard_as_more_and_uneven_arms_are_harder() {
        let mean = Outcome::Mean { baseline: 4.0, deviation: 3.0 };
        assert_eq!(ask(mean, 0.1, 0.8), ask(mean, -0.1, 0.8));
        let question = Question { outcome: Outcome::Share { baseline: 0.2 }, effect: 0.1, power: 0.8, alpha: 0.05, share: 0.5 };
        let (even, uneven) = (plan(&question).unwrap(), plan(&Question { share: 0.05, ..question }).unwrap());
        assert!(uneven.fixed > 4 * even.fixed && uneven.sequential > 4 * even.sequential);
        assert!(even.fixed < even.expected && even.expected < even.sequential);
    }

    #[test]
    fn a_question_without_an_answer_names_the_number_that_is_wrong() {
        let good = Question { outcome: Outcome::Share { baseline: 0.2 }, effect: 0.1, power: 0.8, alpha: 0.05, share: 0.5 };
        assert_eq!(good.refusal(), None);
        for (bad, name) in [
            (Question { outcome: Outcome::Share { baseline: 1.0 }, ..good }, "baseline"),
            (Question { outcome: Outcome::Mean { baseline: 0.0, deviation: 1.0 }, ..good }, "baseline"),
            (Question { outcome: Outcome::Mean { baseline: 1.0, deviation: f64::NAN }, ..good }, "deviation"),
            (Question { effect: 0.0, ..good }, "effect"),
            (Question { effect: 4.0, ..good }, "effect"),
            (Question { effect: f64::NAN, ..good }, "effect"),
            (Question { power: 1.0, ..good }, "power"),
            (Question { alpha: f64::NAN, ..good }, "alpha"),
            (Question { share: 0.0, ..good }, "share"),
        ] {
            assert_eq!(bad.refusal().map(|(name, _)| name), Some(name), "{bad:?}");
            assert_eq!(plan(&bad), None);
        }
        assert_eq!(plan(&Question { effect: 1e-9, ..good }), None, "no traffic would do");
    }
}
