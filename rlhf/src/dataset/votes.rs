//! Rankings as votes on pairs of answers.

use serde::Deserialize;
use tidemill_store::records::Feedback;

use super::Position;
use super::answer::Answer;
use super::counts::LeftOut;

/// What a person said about two answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The first or the second is better.
    Better(usize),
    /// Neither is better.
    Tie,
    /// Neither is good.
    BothBad,
}

impl Verdict {
    /// 0 or 1.
    pub fn winner(self) -> Option<usize> {
        match self {
            Self::Better(side) => Some(side),
            Self::Tie | Self::BothBad => None,
        }
    }

    /// As a category.
    pub fn label(self) -> &'static str {
        match self {
            Self::Better(0) => "first",
            Self::Better(_) => "second",
            Self::Tie => "tie",
            Self::BothBad => "both_bad",
        }
    }

    /// Why a verdict without a winner makes no row.
    pub fn why_no_row(self) -> LeftOut {
        match self {
            Self::BothBad => LeftOut::BothBad,
            Self::Tie | Self::Better(_) => LeftOut::Tie,
        }
    }
}

/// One person's vote on one pair.
#[derive(Clone, Debug)]
pub struct Ballot<'a> {
    /// Where it comes from.
    pub feedback: &'a Feedback,
    /// Ids of the two answers.
    pub ids: [&'a str; 2],
    /// What was said.
    pub verdict: Verdict,
    shown: [Option<usize>; 2],
}

impl Ballot<'_> {
    /// The same with the two answers in the other order.
    pub fn turned(self) -> Self {
        let verdict = match self.verdict {
            Verdict::Better(side) => Verdict::Better(1 - side),
            other => other,
        };
        Self { ids: [self.ids[1], self.ids[0]], shown: [self.shown[1], self.shown[0]], verdict, ..self }
    }

    /// Where an answer stood beside the other, if the order was told.
    pub fn position(&self, side: usize) -> Option<Position> {
        match (self.shown[side], self.shown[1 - side]) {
            (Some(this), Some(other)) if this < other => Some(Position::Left),
            (Some(this), Some(other)) if this > other => Some(Position::Right),
            _ => None,
        }
    }
}

/// All votes on one pair of texts.
#[derive(Clone, Debug)]
pub struct PairVotes<'a> {
    /// The two, by their text.
    pub answers: [&'a Answer; 2],
    /// The votes; ids and verdicts are in the order of `answers`.
    pub ballots: Vec<Ballot<'a>>,
}

impl<'a> PairVotes<'a> {
    /// A pair without votes.
    pub fn new(first: &'a Answer, second: &'a Answer) -> Self {
        Self { answers: [first, second], ballots: Vec::new() }
    }

    /// The side with more votes.
    pub fn majority(&self) -> Option<usize> {
        let votes = |side| self.ballots.iter().filter(|ballot| ballot.verdict == Verdict::Better(side)).count();
        match votes(0).cmp(&votes(1)) {
            std::cmp::Ordering::Greater => Some(0),
            std::cmp::Ordering::Less => Some(1),
            std::cmp::Ordering::Equal => None,
        }
    }
}

#[derive(Deserialize)]
struct Comparison<'a> {
    #[serde(borrow)]
    candidates: Vec<&'a str>,
    #[serde(borrow, default)]
    ranking: Vec<Vec<&'a str>>,
    #[serde(default)]
    both_bad: bool,
    #[serde(borrow, default)]
    shown: Vec<&'a str>,
}

/// The votes in a comparison, one per pair of candidates that it ranks; none when its value is no comparison.
pub fn ballots(feedback: &Feedback) -> Option<Vec<Ballot<'_>>> {
    let said = Comparison::deserialize(&feedback.value).ok()?;
    let tier = |id: &str| said.ranking.iter().position(|tier| tier.contains(&id));
    let shown = |id: &str| said.shown.iter().position(|other| *other == id);
    let mut ballots = Vec::new();
    for (index, first) in said.candidates.iter().copied().enumerate() {
        for second in said.candidates[index + 1..].iter().copied().filter(|second| *second != first) {
            let verdict = match (said.both_bad, tier(first), tier(second)) {
                (true, _, _) => Verdict::BothBad,
                (false, Some(a), Some(b)) if a < b => Verdict::Better(0),
                (false, Some(a), Some(b)) if a > b => Verdict::Better(1),
                (false, Some(_), Some(_)) => Verdict::Tie,
                (false, _, _) => continue,
            };
            ballots.push(Ballot { feedback, ids: [first, second], verdict, shown: [shown(first), shown(second)] });
        }
    }
    (!ballots.is_empty()).then_some(ballots)
}
