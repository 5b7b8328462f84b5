//! What the verdicts of a queue say about the people, the guidelines and the page.

use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use tidemill_rlhf::quality::agreement::{self, Judgement as Label, Level};
use tidemill_rlhf::random::Random;
use tidemill_rlhf::statistics::{Interval, Proportion};
use tidemill_store::label::{Judgement, Verdict};

/// Rounds of the bootstrap, for its cost to stay small in large queues.
const ROUNDS: usize = 400;
const ROUNDS_LARGE: usize = 60;
const LARGE: usize = 5000;

/// Statistics of a queue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Statistics {
    /// How often each verdict was given, by the side that was shown.
    pub verdicts: Verdicts,
    /// How far people agree.
    pub agreement: Agreement,
    /// Whether the side of the screen decides.
    pub position: Position,
    /// From seeing to judging; `None` without verdicts.
    pub seconds: Option<Seconds>,
    /// By person, by name.
    pub raters: Vec<Rater>,
    /// Why tasks were skipped, the most frequent first.
    pub skips: Vec<Skip>,
}

/// How often each verdict was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdicts {
    /// The left answer is better.
    pub left: u64,
    /// The right answer is better.
    pub right: u64,
    /// Equally good.
    pub tie: u64,
    /// Neither is acceptable.
    pub both_bad: u64,
}

/// How far people agree, over tasks that several judged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// Tasks with two verdicts or more.
    pub tasks: usize,
    /// Krippendorff's α over the four verdicts: 1 is perfect, 0 is chance. `None` where it is not defined.
    pub alpha: Option<f64>,
    /// 95 % bootstrap interval of α over tasks.
    pub alpha_interval: Option<Interval>,
    /// Cohen's κ, when exactly two people judged.
    pub kappa: Option<f64>,
}

/// Whether the side of the screen decides.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Position {
    /// Share of left among verdicts for one side, with its 95 % Wilson interval; `None` without such verdicts.
    pub left: Option<Proportion>,
    /// The interval leaves out one half.
    pub biased: bool,
}

/// Durations in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Seconds {
    /// Half were faster.
    pub median: f64,
    /// Nine in ten were faster.
    pub p90: f64,
}

/// One person.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rater {
    /// Name.
    pub annotator: String,
    /// Verdicts, on gold tasks too.
    pub judged: u64,
    /// Tasks passed over.
    pub skipped: u64,
    /// Right verdicts among those on gold tasks, with the 95 % Wilson interval; `None` without gold.
    pub gold: Option<Proportion>,
    /// Share of left among verdicts for one side.
    pub left: Option<Proportion>,
    /// From seeing to judging.
    pub seconds: Option<Seconds>,
}

/// A reason for skipping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skip {
    /// As given.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// Computes the statistics of finished assignments.
pub fn statistics(judgements: &[Judgement]) -> Statistics {
    let mut verdicts = Verdicts::default();
    for judgement in judgements {
        match (judgement.verdict, chose_left(judgement)) {
            (Some(Verdict::Tie), _) => verdicts.tie += 1,
            (Some(Verdict::BothBad), _) => verdicts.both_bad += 1,
            (Some(_), Some(true)) => verdicts.left += 1,
            (Some(_), _) => verdicts.right += 1,
            (None, _) => {}
        }
    }
    let left = left_share(judgements.iter());
    let mut reasons: BTreeMap<&str, u64> = BTreeMap::new();
    for judgement in judgements.iter().filter(|judgement| judgement.verdict.is_none()) {
        *reasons.entry(judgement.reason.as_deref().unwrap_or_default()).or_default() += 1;
    }
    let mut skips: Vec<Skip> = reasons.into_iter().map(|(reason, count)| Skip { reason: reason.to_owned(), count }).collect();
    skips.sort_by_key(|skip| std::cmp::Reverse(skip.count));
    let mut people: BTreeMap<&str, Vec<&Judgement>> = BTreeMap::new();
    for judgement in judgements {
        people.entry(&judgement.annotator).or_default().push(judgement);
    }
    Statistics {
        verdicts,
        agreement: agree(judgements),
        position: Position { left, biased: left.is_some_and(|left| left.interval.distance(0.5) > 0.0) },
        seconds: seconds(judgements.iter()),
        raters: people.into_iter().map(|(annotator, own)| rater(annotator, &own)).collect(),
        skips,
    }
}

/// Whether the left answer was chosen; `None` for ties, both bad and skips.
fn chose_left(judgement: &Judgement) -> Option<bool> {
    match judgement.verdict? {
        Verdict::A => Some(judgement.a_is_left),
        Verdict::B => Some(!judgement.a_is_left),
        Verdict::Tie | Verdict::BothBad => None,
    }
}

fn left_share<'a>(judgements: impl Iterator<Item = &'a Judgement>) -> Option<Proportion> {
    let sides: Vec<bool> = judgements.filter_map(chose_left).collect();
    let left = sides.iter().filter(|left| **left).count();
    agreement::position_bias(left as u64, sides.len() as u64)
}

fn agree(judgements: &[Judgement]) -> Agreement {
    let label = |judgement: &Judgement| {
        Some(Label::new(judgement.annotator.clone(), judgement.task_id.to_string(), judgement.verdict?.as_str()))
    };
    let labels: Vec<Label> = judgements.iter().filter_map(label).collect();
    let people: BTreeSet<&str> = labels.iter().map(|label| label.rater.as_str()).collect();
    let tasks = agreement::overlapping_items(&labels);
    let rounds = if tasks > LARGE { ROUNDS_LARGE } else { ROUNDS };
    let kappa = match people.into_iter().collect::<Vec<_>>()[..] {
        [first, second] => agreement::cohen_kappa(&labels, first, second),
        _ => None,
    };
    Agreement {
        tasks,
        alpha: agreement::krippendorff_alpha(&labels, Level::Nominal),
        alpha_interval: agreement::krippendorff_interval(&labels, Level::Nominal, rounds, &mut Random::new(1)),
        kappa,
    }
}

fn seconds<'a>(judgements: impl Iterator<Item = &'a Judgement>) -> Option<Seconds> {
    let judged = judgements.filter(|judgement| judgement.verdict.is_some());
    let mut taken: Vec<f64> = judged.map(|judgement| (judgement.finished - judgement.started).max(0) as f64 / 1e6).collect();
    taken.sort_by(f64::total_cmp);
    let at = |share| tidemill_rlhf::statistics::quantile(&taken, share);
    Some(Seconds { median: at(0.5)?, p90: at(0.9)? })
}

fn rater(annotator: &str, own: &[&Judgement]) -> Rater {
    let judged = own.iter().filter(|judgement| judgement.verdict.is_some()).count() as u64;
    let gold: Vec<bool> = own.iter().filter_map(|judgement| Some(judgement.verdict? == judgement.gold?)).collect();
    let right = gold.iter().filter(|right| **right).count();
    Rater {
        annotator: annotator.to_owned(),
        judged,
        skipped: own.len() as u64 - judged,
        gold: Proportion::new(right as u64, gold.len() as u64),
        left: left_share(own.iter().copied()),
        seconds: seconds(own.iter().copied()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn judged(task: u128, who: &str, verdict: Option<Verdict>, a_is_left: bool) -> Judgement {
        Judgement {
            task_id: Uuid::from_u128(task),
            annotator: who.into(),
            verdict,
            reason: verdict.is_none().then(|| "unclear".to_owned()),
            a_is_left,
            gold: None,
            started: 0,
            finished: 2_000_000,
        }
    }

    #[test]
    fn agreement_is_of_the_answers_and_not_of_the_sides() {
        // Both always prefer answer a on even and b on odd tasks, shown on different sides.
        let verdict = |task: u128| Some(if task.is_multiple_of(2) { Verdict::A } else { Verdict::B });
        let rows: Vec<Judgement> = (0..20)
            .flat_map(|task| [judged(task, "ann", verdict(task), true), judged(task, "bob", verdict(task), false)])
            .collect();
        let all = statistics(&rows);
        assert_eq!((all.agreement.tasks, all.agreement.alpha, all.agreement.kappa), (20, Some(1.0), Some(1.0)));
        assert_eq!((all.verdicts.left, all.verdicts.right), (20, 20));
        assert!(!all.position.biased);
    }

    #[test]
    fn someone_who_always_takes_the_left_is_seen() {
        let rows: Vec<Judgement> = (0..40)
            .map(|task| judged(task, "ann", Some(if task.is_multiple_of(2) { Verdict::A } else { Verdict::B }), task % 2 == 0))
            .collect();
        let all = statistics(&rows);
        assert!(all.position.biased);
        let left = all.raters[0].left.unwrap();
        // Wilson interval of 40 out of 40: the lower end is 40 / (40 + 1.96²).
        assert_eq!(left.share, 1.0);
        assert!((left.interval.low - 40.0 / (40.0 + 3.841_459)).abs() < 1e-6, "{left:?}");
    }

    #[test]
    fn gold_is_counted_per_person() {
        let gold = |task, who, verdict| Judgement { gold: Some(Verdict::A), ..judged(task, who, Some(verdict), true) };
        let rows = [
            gold(1, "ann", Verdict::A),
            gold(2, "ann", Verdict::B),
            gold(1, "bob", Verdict::A),
            judged(3, "bob", Some(Verdict::B), true),
            judged(4, "bob", None, true),
        ];
        let all = statistics(&rows);
        let shown: Vec<_> = all
            .raters
            .iter()
            .map(|r| (r.annotator.as_str(), r.judged, r.skipped, r.gold.map(|g| (g.successes, g.trials))))
            .collect();
        assert_eq!(shown, [("ann", 2, 0, Some((1, 2))), ("bob", 2, 1, Some((1, 1)))]);
        assert_eq!(all.skips, [Skip { reason: "unclear".into(), count: 1 }]);
        assert_eq!(all.seconds, Some(Seconds { median: 2.0, p90: 2.0 }));
    }

    #[test]
    fn nothing_is_said_about_an_empty_queue() {
        let all = statistics(&[]);
        assert_eq!((all.agreement.alpha, all.position.left, all.seconds), (None, None, None));
        assert!(all.raters.is_empty() && !all.position.biased);
    }
}
