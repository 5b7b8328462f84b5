//! How far raters agree: Krippendorff's α, Cohen's κ, and whether the side of the screen decides.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{QualityOptions, report::Check};
use crate::{
    random::Random,
    statistics::{Interval, Proportion, bootstrap},
};

/// Different labels up to which agreement is computed: with more, labels are texts and not a scale, and tables of all pairs grow.
pub const MOST_LABELS: usize = 100;

/// One rater's label for one item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// Who.
    pub rater: String,
    /// On what.
    pub item: String,
    /// What they said. For [`Level::Ordinal`] and [`Level::Interval`] a number, such as `-1`, `0`, `1` for worse, tie, better.
    pub label: String,
}

impl Judgement {
    /// A judgement of its parts.
    pub fn new(rater: impl Into<String>, item: impl Into<String>, label: impl Into<String>) -> Self {
        Self { rater: rater.into(), item: item.into(), label: label.into() }
    }
}

/// What the distance between two labels means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Same or different.
    Nominal,
    /// Ranks: labels are numbers of which only the order counts.
    Ordinal,
    /// Numbers whose differences count.
    Interval,
}

/// Krippendorff's α ("Computing Krippendorff's Alpha-Reliability", 2011): 1 is perfect agreement, 0 is chance, below 0 is against
/// each other. Ratings may be missing; of several labels by one rater for one item the last counts.
///
/// None when no item has two raters, when only one label was ever used (nothing can be said about agreement), when there are more
/// than [`MOST_LABELS`], or when the level needs numbers and a label is none.
pub fn krippendorff_alpha(judgements: &[Judgement], level: Level) -> Option<f64> {
    let table = Table::new(judgements);
    let values = table.values(level)?;
    let units: Vec<&Unit> = table.units.iter().map(AsRef::as_ref).collect();
    alpha(&units, &values, level)
}

/// 95 % percentile bootstrap over items of [`krippendorff_alpha`].
pub fn krippendorff_interval(judgements: &[Judgement], level: Level, rounds: usize, random: &mut Random) -> Option<Interval> {
    let table = Table::new(judgements);
    let values = table.values(level)?;
    let units: Vec<&Unit> = table.units.iter().map(AsRef::as_ref).filter(|unit| raters_of(unit) > 1).collect();
    bootstrap(units.len(), rounds, random, |indices| {
        let resampled: Vec<&Unit> = indices.iter().map(|index| units[*index]).collect();
        alpha(&resampled, &values, level)
    })
}

/// Items that have two or more raters.
pub fn overlapping_items(judgements: &[Judgement]) -> usize {
    Table::new(judgements).units.iter().filter(|unit| raters_of(unit) > 1).count()
}

/// Cohen's κ (1960) of two raters over the items that both judged: 1 is perfect agreement, 0 is chance.
///
/// None when they share no item, or when both always gave one and the same label.
pub fn cohen_kappa(judgements: &[Judgement], first: &str, second: &str) -> Option<f64> {
    let by = |rater: &str| -> BTreeMap<&str, &str> {
        let of_rater = judgements.iter().filter(|judgement| judgement.rater == rater);
        of_rater.map(|judgement| (judgement.item.as_str(), judgement.label.as_str())).collect()
    };
    let (first, second) = (by(first), by(second));
    let mut margins: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    let (mut shared, mut equal) = (0.0, 0.0);
    for (item, label) in &first {
        let Some(other) = second.get(item) else { continue };
        shared += 1.0;
        equal += f64::from(u8::from(label == other));
        margins.entry(label).or_default().0 += 1.0;
        margins.entry(other).or_default().1 += 1.0;
    }
    let chance: f64 = margins.values().map(|(a, b)| a * b).sum::<f64>() / (shared * shared);
    (shared > 0.0 && chance < 1.0).then(|| (equal / shared - chance) / (1.0 - chance))
}

/// The share of comparisons in which the left answer was chosen; ½ when the side does not matter. None without comparisons.
pub fn position_bias(left_chosen: u64, comparisons: u64) -> Option<Proportion> {
    Proportion::new(left_chosen, comparisons)
}

/// The check over Krippendorff's α of all judgements, nominal; the upper end of its interval is held against the threshold.
pub(super) fn check(options: &QualityOptions) -> Check {
    const NAME: &str = "agreement";
    const ROUNDS: usize = 200;
    let (judgements, thresholds) = (&options.judgements, &options.thresholds);
    let items = overlapping_items(judgements);
    if items < thresholds.minimum {
        let why = format!("Fewer than {} items were judged by two people; let raters overlap.", thresholds.minimum);
        return Check::not_applicable(NAME, why);
    }
    let Some(alpha) = krippendorff_alpha(judgements, Level::Nominal) else {
        return Check::not_applicable(
            NAME,
            format!("All judgements are the same label, or there are more than {MOST_LABELS} labels."),
        );
    };
    let mut text =
        format!("Krippendorff's α over {items} items that two or more people judged: 1 is perfect agreement, 0 is chance");
    if let Some(ordinal) = krippendorff_alpha(judgements, Level::Ordinal) {
        text += &format!("; {ordinal:.2} when near labels count as nearly agreed");
    }
    let mut raters: Vec<&str> = judgements.iter().map(|judgement| judgement.rater.as_str()).collect();
    raters.sort_unstable();
    raters.dedup();
    if let [first, second] = raters[..]
        && let Some(kappa) = cohen_kappa(judgements, first, second)
    {
        text += &format!("; Cohen's κ of the two raters is {kappa:.2}");
    }
    let interval = krippendorff_interval(judgements, Level::Nominal, ROUNDS, &mut Random::new(options.seed));
    let evidence = interval.map_or(alpha, |interval| interval.high);
    let text = text + ". When it is low, sharpen the guidelines before collecting more.";
    Check::held(NAME, alpha, evidence, thresholds.agreement, text).within(interval)
}

/// The labels that an item got, and how often each.
type Unit = [(usize, u64)];

fn raters_of(unit: &Unit) -> u64 {
    unit.iter().map(|(_, count)| count).sum()
}

/// For each item, how often each label was given.
struct Table {
    labels: Vec<String>,
    units: Vec<Box<Unit>>,
}

impl Table {
    fn new(judgements: &[Judgement]) -> Self {
        let mut items: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
        let mut labels: BTreeMap<&str, usize> = BTreeMap::new();
        for judgement in judgements {
            items.entry(&judgement.item).or_default().insert(&judgement.rater, &judgement.label);
            labels.insert(&judgement.label, 0);
        }
        labels.values_mut().enumerate().for_each(|(index, value)| *value = index);
        let units = items.values().map(|raters| {
            let mut counts: BTreeMap<usize, u64> = BTreeMap::new();
            raters.values().for_each(|label| *counts.entry(labels[label]).or_default() += 1);
            counts.into_iter().collect()
        });
        Self { units: units.collect(), labels: labels.keys().map(|label| (*label).to_owned()).collect() }
    }

    /// The labels as numbers.
    fn values(&self, level: Level) -> Option<Vec<f64>> {
        if self.labels.len() > MOST_LABELS {
            return None;
        }
        if level == Level::Nominal {
            return Some((0..self.labels.len()).map(|index| index as f64).collect());
        }
        self.labels.iter().map(|label| label.trim().parse::<f64>().ok().filter(|value| value.is_finite())).collect()
    }
}

/// α = 1 − D_o / D_e over the coincidences of pairable labels.
fn alpha(units: &[&Unit], values: &[f64], level: Level) -> Option<f64> {
    let size = values.len();
    let mut totals = vec![0.0; size];
    let mut observed_pairs = vec![0.0; size * size];
    for unit in units {
        let raters = raters_of(unit);
        if raters < 2 {
            continue;
        }
        for (c, count) in *unit {
            totals[*c] += *count as f64;
            for (k, other) in *unit {
                let pairs = *count as f64 * (*other as f64 - f64::from(u8::from(c == k)));
                observed_pairs[*c * size + *k] += pairs / (raters - 1) as f64;
            }
        }
    }
    // For ranks, the distance of two labels counts the labels given between them: half of the ends, all of what lies between.
    let mut order: Vec<usize> = (0..size).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut rank = vec![0.0; size];
    let mut below = 0.0;
    for tied in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let count: f64 = tied.iter().map(|label| totals[*label]).sum();
        tied.iter().for_each(|label| rank[*label] = below + count / 2.0);
        below += count;
    }
    let distance = |c: usize, k: usize| match level {
        Level::Nominal => f64::from(u8::from(c != k)),
        Level::Ordinal => (rank[c] - rank[k]).powi(2),
        Level::Interval => (values[c] - values[k]).powi(2),
    };
    let all: f64 = totals.iter().sum();
    let (mut observed, mut expected) = (0.0, 0.0);
    for c in 0..size {
        for k in 0..size {
            let apart = distance(c, k);
            observed += observed_pairs[c * size + k] * apart;
            expected += totals[c] * totals[k] * apart;
        }
    }
    (expected > 0.0).then(|| 1.0 - (all - 1.0) * observed / expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Krippendorff 2011, section D: four observers, twelve units, any number of values, missing data.
    fn published() -> Vec<Judgement> {
        let rows = [
            ("A", "1 2 3 3 2 1 4 1 2 . . ."),
            ("B", "1 2 3 3 2 2 4 1 2 5 . 3"),
            ("C", ". 3 3 3 2 3 4 2 2 5 1 ."),
            ("D", "1 2 3 3 2 4 4 1 2 5 1 ."),
        ];
        let labels = rows.iter().flat_map(|(rater, labels)| {
            let given = labels.split(' ').enumerate().filter(|(_, label)| *label != ".");
            given.map(|(unit, label)| Judgement::new(*rater, unit.to_string(), label))
        });
        labels.collect()
    }

    #[test]
    fn alpha_gives_the_published_values() {
        let judgements = published();
        for (level, expected) in [(Level::Nominal, 0.743), (Level::Ordinal, 0.815), (Level::Interval, 0.849)] {
            let alpha = krippendorff_alpha(&judgements, level).unwrap();
            assert!((alpha - expected).abs() < 5e-4, "{level:?}: {alpha}");
        }
    }

    #[test]
    fn binary_alpha_of_two_observers_gives_the_published_value() {
        // Krippendorff 2011, section A: α = 0.095.
        let (meg, owen) = ("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0");
        let judge = |rater: &'static str, labels: &'static str| {
            labels.split(' ').enumerate().map(move |(unit, label)| Judgement::new(rater, unit.to_string(), label))
        };
        let judgements: Vec<_> = judge("Meg", meg).chain(judge("Owen", owen)).collect();
        assert!((krippendorff_alpha(&judgements, Level::Nominal).unwrap() - 0.095).abs() < 5e-4);
    }

    #[test]
    fn the_interval_holds_alpha_and_narrows_with_more_items() {
        let many = |copies: usize| -> Vec<Judgement> {
            let copy = |copy| published().into_iter().map(move |j| Judgement { item: format!("{copy}/{}", j.item), ..j });
            (0..copies).flat_map(copy).collect()
        };
        let width = |copies| {
            let judgements = many(copies);
            let alpha = krippendorff_alpha(&judgements, Level::Nominal).unwrap();
            let interval = krippendorff_interval(&judgements, Level::Nominal, 400, &mut Random::new(1)).unwrap();
            assert!(interval.low < alpha && alpha < interval.high);
            interval.high - interval.low
        };
        assert!(width(20) < 0.5 * width(2));
    }

    #[test]
    fn agreement_of_nothing_is_not_a_number_but_none() {
        let judge = Judgement::new;
        assert_eq!(krippendorff_alpha(&[], Level::Nominal), None);
        assert_eq!(krippendorff_alpha(&[judge("a", "1", "x"), judge("b", "2", "y")], Level::Nominal), None);
        assert_eq!(krippendorff_alpha(&[judge("a", "1", "x"), judge("b", "1", "x")], Level::Nominal), None);
        assert_eq!(krippendorff_alpha(&[judge("a", "1", "x"), judge("b", "1", "y")], Level::Ordinal), None);
        assert_eq!(cohen_kappa(&[judge("a", "1", "x"), judge("b", "1", "x")], "a", "b"), None);
        assert_eq!(cohen_kappa(&[], "a", "b"), None);
        assert_eq!(overlapping_items(&[judge("a", "1", "x"), judge("a", "1", "y"), judge("b", "2", "y")]), 0);
    }

    /// Two raters on 200 items who give the label of the truth with this chance, and else one by coin.
    fn pair(chance: f64) -> QualityOptions {
        let mut random = Random::new(4);
        let mut judgements = Vec::new();
        for item in 0..200 {
            let truth = random.below(2);
            for rater in ["a", "b"] {
                let label = if random.unit() < chance { truth } else { random.below(2) };
                judgements.push(Judgement::new(rater, item.to_string(), label.to_string()));
            }
        }
        QualityOptions { judgements, ..QualityOptions::default() }
    }

    #[test]
    fn raters_who_agree_pass_and_raters_who_guess_fail() {
        use crate::quality::report::Status;
        assert_eq!(check(&pair(0.9)).status, Status::Pass);
        assert_eq!(check(&pair(0.5)).status, Status::Warn);
        let guessing = check(&pair(0.0));
        assert!(guessing.status != Status::Pass && guessing.value.unwrap().abs() < 0.15, "{guessing:?}");
        assert!(guessing.explanation.contains("Cohen"));
        assert_eq!(check(&QualityOptions::default()).status, Status::NotApplicable);
    }

    #[test]
    fn texts_as_labels_are_refused_instead_of_filling_memory() {
        let judgements: Vec<Judgement> =
            (0..20_000).map(|n| Judgement::new((n % 2).to_string(), (n / 2).to_string(), format!("comment {n}"))).collect();
        assert_eq!(krippendorff_alpha(&judgements, Level::Nominal), None);
    }

    #[test]
    fn kappa_gives_the_published_values() {
        // Fifty grant proposals (κ 0.40), and the two tables of Gwet 2002, "Kappa statistic is not satisfactory", that show how κ
        // depends on the margins (0.1304 and 0.2593); all three are the worked examples of Wikipedia's "Cohen's kappa".
        for (cells, expected) in [([20, 5, 10, 15], 0.4), ([45, 15, 25, 15], 0.1304), ([25, 35, 5, 35], 0.2593)] {
            let mut judgements = Vec::new();
            let kinds = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")];
            for ((first, second), count) in kinds.into_iter().zip(cells) {
                for _ in 0..count {
                    let item = judgements.len().to_string();
                    judgements.extend([Judgement::new("a", &item, first), Judgement::new("b", &item, second)]);
                }
            }
            let kappa = cohen_kappa(&judgements, "a", "b").unwrap();
            assert!((kappa - expected).abs() < 5e-5, "{kappa} is not {expected}");
        }
    }
}
