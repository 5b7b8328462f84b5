//! A share of trials that is watched all the time, exactly.

use crate::rollout::statistics::special::ln_beta;
use tidemill_rlhf::statistics::Interval;

/// Halvings of a search in [0, 1]: beyond a double's precision.
const HALVINGS: usize = 60;

/// All shares p that s successes of n trials do not exclude: those with B(1 + s, 1 + n − s) / (pˢ(1 − p)ⁿ⁻ˢ) < 1/α. The left side
/// is the likelihood ratio of a uniform mixture against p, a martingale under p, so the chance that p is ever excluded is at most
/// α, whenever one looks and however rare the events (Robbins 1970, "Statistical methods related to the law of the iterated
/// logarithm"; Ville's inequality). None without trials, and with more successes than trials.
pub fn exact_sequence(successes: u64, trials: u64, alpha: f64) -> Option<Interval> {
    if trials == 0 || successes > trials {
        return None;
    }
    let (s, f) = (successes as f64, (trials - successes) as f64);
    let mixture = ln_beta(1.0 + s, 1.0 + f);
    // x ln p with 0·ln 0 = 0.
    let power = |x: f64, ln: f64| if x > 0.0 { x * ln } else { 0.0 };
    let excluded = |p: f64| mixture - power(s, p.ln()) - power(f, (-p).ln_1p()) >= -alpha.ln();
    let best = s / (s + f);
    // The likelihood falls away from the observed share on both sides.
    let edge = |outside: f64| {
        let (mut out, mut within) = (outside, best);
        for _ in 0..HALVINGS {
            let middle = 0.5 * (out + within);
            if excluded(middle) { out = middle } else { within = middle }
        }
        out
    };
    Some(Interval { low: if successes == 0 { 0.0 } else { edge(0.0) }, high: if successes == trials { 1.0 } else { edge(1.0) } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_rlhf::random::Random;
    use tidemill_rlhf::statistics::{Z95, wilson};

    #[test]
    fn all_or_nothing_has_a_closed_form() {
        // s = n: B(1 + n, 1) = 1/(n + 1), so p is excluded where pⁿ ≤ α/(n + 1).
        for n in [1u64, 5, 200] {
            let edge = (0.05 / (n + 1) as f64).powf(1.0 / n as f64);
            let (all, none) = (exact_sequence(n, n, 0.05).unwrap(), exact_sequence(0, n, 0.05).unwrap());
            assert!((all.low - edge).abs() < 1e-12 && all.high == 1.0, "{n}: {all:?}");
            assert!((none.high - (1.0 - edge)).abs() < 1e-12 && none.low == 0.0, "{n}: {none:?}");
        }
        assert_eq!(exact_sequence(0, 0, 0.05), None);
        assert_eq!(exact_sequence(2, 1, 0.05), None);
    }

    #[test]
    fn it_is_wider_than_an_interval_for_one_look() {
        for (successes, trials) in [(1u64, 10u64), (30, 100), (5, 5000)] {
            let (all, one) = (exact_sequence(successes, trials, 0.05).unwrap(), wilson(successes, trials, Z95).unwrap());
            assert!(all.low < one.low && all.high > one.high, "{successes}/{trials}");
        }
    }

    /// 1,000 streams of rare events, looked at after every trial.
    #[test]
    fn the_true_share_is_ever_missed_in_at_most_five_of_a_hundred_streams() {
        let mut random = Random::new(5);
        let missed = (0..1000)
            .filter(|_| {
                let mut successes = 0;
                (1..=600).any(|n| {
                    successes += u64::from(random.unit() < 0.03);
                    // Only the likelihood at the true share decides, so the interval need not be searched.
                    let (s, f) = (successes as f64, (n - successes) as f64);
                    ln_beta(1.0 + s, 1.0 + f) - s * 0.03f64.ln() - f * 0.97f64.ln() >= -(0.05f64.ln())
                })
            })
            .count();
        assert!(missed <= 50, "{missed}");
    }
}
