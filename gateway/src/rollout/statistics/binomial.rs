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
    (successes <= trials).then(|| bounded_sequence(successes as f64, trials, alpha))?
}

/// The same for the mean of numbers between 0 and 1, of which the sum is given: (q/p)ˣ((1 − q)/(1 − p))¹⁻ˣ is convex in x, so that its mean
/// is at most that of a trial with the same mean, and the ratio a supermartingale. None for a sum that no such numbers have.
pub fn bounded_sequence(sum: f64, count: u64, alpha: f64) -> Option<Interval> {
    let n = count as f64;
    // Means of units are added up with rounding.
    if count == 0 || !(0.0..=n * (1.0 + 1e-9)).contains(&sum) {
        return None;
    }
    let s = sum.min(n);
    let mixture = mixture(s, n);
    let excluded = |p: f64| mixture - likelihood(s, n, p) >= -alpha.ln();
    let best = s / n;
    // The likelihood falls away from the observed share on both sides.
    let edge = |outside: f64| {
        let (mut out, mut within) = (outside, best);
        for _ in 0..HALVINGS {
            let middle = 0.5 * (out + within);
            if excluded(middle) { out = middle } else { within = middle }
        }
        out
    };
    Some(Interval { low: if s == 0.0 { 0.0 } else { edge(0.0) }, high: if s == n { 1.0 } else { edge(1.0) } })
}

/// ln of the mixture's likelihood: of all shares alike.
fn mixture(s: f64, n: f64) -> f64 {
    ln_beta(1.0 + s, 1.0 + n - s)
}

/// ln pˢ(1 − p)ⁿ⁻ˢ
fn likelihood(s: f64, n: f64, p: f64) -> f64 {
    // x ln p with 0·ln 0 = 0.
    let power = |x: f64, ln: f64| if x > 0.0 { x * ln } else { 0.0 };
    power(s, p.ln()) + power(n - s, (-p).ln_1p())
}

/// Between which weights of n units a quantile lies at all times: the observations that do not exceed it weigh more than the first, and
/// those below it no more than the second. A unit weighs 1 and shares that among its observations, so what weighs is a sum of numbers between
/// 0 and 1, whose mean is the quantile's share; the sums that [`bounded_sequence`] excludes are too small or too large (Howard and Ramdas
/// 2022, "Sequential estimation of quantiles with applications to A/B testing and best-arm identification", have it for other sequences). None
/// at an end where even the first observation, or the last, may lie beyond it.
pub fn quantile_weights(at: f64, count: u64, alpha: f64) -> (Option<f64>, Option<f64>) {
    let n = count as f64;
    let excluded = |s: f64| mixture(s, n) - likelihood(s, n, at) >= -alpha.ln();
    // Between what is excluded and what is not there is one edge on each side.
    let edge = |outside: f64| {
        let (mut out, mut within) = (outside, at * n);
        for _ in 0..HALVINGS {
            let middle = 0.5 * (out + within);
            if excluded(middle) { out = middle } else { within = middle }
        }
        within
    };
    let found = |outside: f64| (count > 0 && excluded(outside)).then(|| edge(outside));
    (found(0.0), found(n))
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

    #[test]
    fn numbers_between_0_and_1_have_the_sequence_of_trials_and_those_outside_have_none() {
        assert_eq!(bounded_sequence(3.0, 9, 0.05), exact_sequence(3, 9, 0.05));
        let (less, half, more) =
            (exact_sequence(2, 9, 0.05).unwrap(), bounded_sequence(2.5, 9, 0.05).unwrap(), exact_sequence(3, 9, 0.05).unwrap());
        assert!(less.low < half.low && half.low < more.low && less.high < half.high && half.high < more.high);
        for (sum, count) in [(-0.1, 3), (3.1, 3), (f64::NAN, 3), (0.0, 0)] {
            assert_eq!(bounded_sequence(sum, count, 0.05), None, "{sum} {count}");
        }
        assert_eq!(bounded_sequence(3.0 + 1e-12, 3, 0.05).unwrap().high, 1.0);
    }

    #[test]
    fn a_quantile_lies_between_the_observations_that_its_sequence_does_not_exclude() {
        for (at, count) in [(0.5, 40u64), (0.99, 3000), (0.95, 500)] {
            let (few, most) = quantile_weights(at, count, 0.05);
            let holds = |s: u64| {
                let share = exact_sequence(s, count, 0.05).unwrap();
                share.low <= at && at <= share.high
            };
            let (few, most) = (few.unwrap().ceil() as u64, most.unwrap() as u64);
            assert!(holds(few) && !holds(few - 1) && holds(most) && !holds(most + 1), "{at} {count}: {few} {most}");
        }
        // Of a hundred the largest may lie below the 99th percentile, and of three nothing is known.
        assert_eq!(
            (quantile_weights(0.99, 100, 0.05).1, quantile_weights(0.5, 3, 0.05), quantile_weights(0.5, 0, 0.05)),
            (None, (None, None), (None, None))
        );
    }

    /// 1,000 streams, looked at after every tenth unit; a third of the units have many observations, and each is of a kind of its own.
    #[test]
    fn a_quantile_is_ever_missed_in_at_most_five_of_a_hundred_streams() {
        for busy in [1, 50] {
            let mut random = Random::new(9);
            let missed = (0..1000)
                .filter(|_| {
                    // How many of each lie below the 90th percentile: all of most units' observations, half of a fifth of them.
                    let mut below = 0.0;
                    (1..=600u64).any(|n| {
                        let answers = if n % 3 == 0 { busy } else { 1 };
                        let own = if random.unit() < 0.8 { 1.0 } else { 0.5 };
                        below += (0..answers).filter(|_| random.unit() < own).count() as f64 / f64::from(answers);
                        n % 10 == 0 && {
                            let (few, most) = quantile_weights(0.9, n, 0.05);
                            few.is_some_and(|few| below <= few) || most.is_some_and(|most| below > most)
                        }
                    })
                })
                .count();
            assert!(missed <= 50, "{missed} of 1000, with {busy}");
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
