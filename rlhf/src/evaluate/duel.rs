//! Two models answer the same prompts, and somebody says whose answer is better.

use serde::{Deserialize, Serialize};

use crate::statistics::Interval;
use crate::statistics::{Z95, wilson};

/// What was said about one prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The first model's answer.
    First,
    /// The second's.
    Second,
    /// Neither, or not the same when asked again with positions swapped.
    Tie,
}

/// The score of a duel, for the first model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Won by the first.
    pub won: u64,
    /// Won by the second.
    pub lost: u64,
    /// Neither.
    pub tied: u64,
    /// Wins and half the ties as a share of all.
    pub win_rate: f64,
    /// 95 % Wilson interval of the share of wins among decided prompts; absent when none was decided.
    pub decided: Option<Interval>,
}

/// By the higher of two scores.
pub fn by_score(first: f64, second: f64) -> Verdict {
    match first.partial_cmp(&second) {
        Some(std::cmp::Ordering::Greater) => Verdict::First,
        Some(std::cmp::Ordering::Less) => Verdict::Second,
        _ => Verdict::Tie,
    }
}

/// What a judge said who saw each pair in both orders, each time from the place where it saw the better one. A judge who prefers a place
/// to an answer has said nothing.
pub fn by_judge(in_order: Verdict, swapped: Verdict) -> Verdict {
    match (in_order, swapped) {
        (Verdict::First, Verdict::Second) => Verdict::First,
        (Verdict::Second, Verdict::First) => Verdict::Second,
        _ => Verdict::Tie,
    }
}

/// Adds verdicts up. None without any.
pub fn score(verdicts: &[Verdict]) -> Option<Score> {
    let count = |wanted| verdicts.iter().filter(|verdict| **verdict == wanted).count() as u64;
    let (won, lost, tied) = (count(Verdict::First), count(Verdict::Second), count(Verdict::Tie));
    if verdicts.is_empty() {
        return None;
    }
    let win_rate = (won as f64 + 0.5 * tied as f64) / verdicts.len() as f64;
    Some(Score { won, lost, tied, win_rate, decided: wilson(won, won + lost, Z95) })
}
