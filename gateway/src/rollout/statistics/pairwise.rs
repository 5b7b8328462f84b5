//! Which of two answers is better, when the place where an answer is shown counts too.

use crate::rollout::statistics::Estimate;
use serde::{Deserialize, Serialize};
use tidemill_rlhf::statistics::{Interval, Z95, wilson_share};

/// Comparisons in which the candidate was shown at one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdicts {
    /// The candidate was better.
    pub won: u64,
    /// Neither.
    pub tied: u64,
    /// The other was better.
    pub lost: u64,
}

impl Verdicts {
    /// All of them.
    pub fn total(self) -> u64 {
        self.won + self.tied + self.lost
    }

    /// Mean and variance of the score, with ties for half.
    fn score(self) -> Option<(f64, f64)> {
        let n = self.total() as f64;
        let mean = (self.won as f64 + 0.5 * self.tied as f64) / n;
        let square = (self.won as f64 + 0.25 * self.tied as f64) / n;
        (n > 0.0).then(|| (mean, (square - mean * mean).max(0.0)))
    }
}

/// The candidate's win rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pairwise {
    /// Comparisons.
    pub total: u64,
    /// Wins and half the ties as a share, each place for half.
    pub win_rate: f64,
    /// 95 % Wilson interval of it, for one look.
    pub interval: Interval,
    /// What being shown first adds to a win rate; 0 where the place does not count. None while only one place was seen.
    pub position_bias: Option<f64>,
    /// 95 % interval of the bias.
    pub position_interval: Option<Interval>,
    /// The win rate less ½ as an estimate, for a confidence sequence.
    pub advantage: Option<Estimate>,
}

/// With the place's effect b added when the candidate is first and taken when it is second, the two places' win rates are w + b
/// and w − b: their mean is the win rate without it, half their difference the bias. Ties count half (as in MT-Bench's and
/// Arena's win rates, Zheng et al. 2023, which also names the bias). The Wilson interval is that of the harmonic number of
/// comparisons, which is all of them when the places are even. None without comparisons.
pub fn pairwise(shown_first: Verdicts, shown_second: Verdicts) -> Option<Pairwise> {
    let total = shown_first.total() + shown_second.total();
    let (n_first, n_second) = (shown_first.total() as f64, shown_second.total() as f64);
    let (win_rate, variance, trials, bias) = match (shown_first.score(), shown_second.score()) {
        (Some((first, v_first)), Some((second, v_second))) => {
            let variance = 0.25 * (v_first / n_first + v_second / n_second);
            let trials = 4.0 / (1.0 / n_first + 1.0 / n_second);
            (0.5 * (first + second), variance, trials, Some(0.5 * (first - second)))
        }
        (Some((only, v)), None) | (None, Some((only, v))) => (only, v / total as f64, total as f64, None),
        (None, None) => return None,
    };
    // Verdicts that are all alike have an unknown variance and no zero one: Laplace's, as for a share.
    let n = total as f64;
    let variance = if variance > 0.0 { variance } else { (n + 1.0) / (n * (n + 2.0).powi(2)) };
    let half = Z95 * variance.sqrt();
    Some(Pairwise {
        total,
        win_rate,
        interval: wilson_share(win_rate, trials, Z95)?,
        position_bias: bias,
        position_interval: bias.map(|bias| Interval { low: bias - half, high: bias + half }),
        advantage: Estimate::new(win_rate - 0.5, variance, total),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_rlhf::random::Random;
    use tidemill_rlhf::statistics::wilson;

    #[test]
    fn ties_count_half_and_without_them_it_is_wilsons_interval() {
        let even = pairwise(Verdicts { won: 30, tied: 0, lost: 20 }, Verdicts { won: 30, tied: 0, lost: 20 }).unwrap();
        assert!((even.win_rate - 0.6).abs() < 1e-15 && even.position_bias == Some(0.0));
        let plain = wilson(60, 100, Z95).unwrap();
        assert!((even.interval.low - plain.low).abs() < 1e-12 && (even.interval.high - plain.high).abs() < 1e-12);
        let ties = pairwise(Verdicts { won: 1, tied: 8, lost: 1 }, Verdicts { won: 2, tied: 8, lost: 0 }).unwrap();
        assert!((ties.win_rate - 0.55).abs() < 1e-15);
        assert_eq!(pairwise(Verdicts::default(), Verdicts::default()), None);
    }

    #[test]
    fn the_place_is_estimated_and_cancelled_however_often_each_was_used() {
        // Equal answers, and a reader who takes the first with 80 %: naively the candidate that is mostly shown first would win.
        let mut random = Random::new(23);
        let mut places = [Verdicts::default(); 2];
        for comparison in 0..9000 {
            let place = usize::from(comparison % 3 == 0);
            let first_wins = random.unit() < 0.8;
            if first_wins == (place == 0) { places[place].won += 1 } else { places[place].lost += 1 }
        }
        let naive = (places[0].won + places[1].won) as f64 / 9000.0;
        assert!(naive > 0.58);
        let result = pairwise(places[0], places[1]).unwrap();
        assert!((result.win_rate - 0.5).abs() < 0.02, "{result:?}");
        assert!((result.position_bias.unwrap() - 0.3).abs() < 0.02, "{result:?}");
        let interval = result.position_interval.unwrap();
        assert!(interval.low > 0.27 && interval.high < 0.33);
    }

    #[test]
    fn one_place_alone_tells_no_bias_and_verdicts_all_alike_are_not_certain() {
        let one = pairwise(Verdicts { won: 6, tied: 0, lost: 4 }, Verdicts::default()).unwrap();
        assert_eq!((one.win_rate, one.position_bias), (0.6, None));
        let alike = pairwise(Verdicts { won: 9, ..Verdicts::default() }, Verdicts { won: 9, ..Verdicts::default() }).unwrap();
        assert_eq!((alike.win_rate, alike.advantage.unwrap().value), (1.0, 0.5));
        assert!(alike.interval.low > 0.8 && alike.advantage.unwrap().variance > 0.002);
    }
}
