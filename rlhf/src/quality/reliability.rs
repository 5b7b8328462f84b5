//! How reliable each rater is, by expectation maximisation over the labels that nobody knows for sure (Dawid and Skene 1979).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    Judgement, Thresholds,
    agreement::MOST_LABELS,
    corpus::Findings,
    report::{Check, Keep, Status},
};
use crate::{
    dataset::Row,
    statistics::{Interval, Z95},
};

/// A rater beside the estimated truth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rater {
    /// Who.
    pub rater: String,
    /// Labels that they gave on items that others judged too.
    pub judgements: usize,
    /// Share of their labels that are right: chance + skill · (1 − chance).
    pub accuracy: f64,
    /// (right − chance) / (best − chance), from −1 to 1. Right is the expected share of their labels that are so by what the others'
    /// labels make of the truth, chance what guessing with their habits would get, best what the truth itself would get: the others
    /// err too, and who disagrees with one who errs is not wrong for it. 1 is always right, 0 is guessing, below 0 is against the truth.
    pub skill: f64,
    /// 95 % interval of the skill; wide where the others cannot tell right from wrong themselves.
    pub interval: Interval,
}

/// The estimate of a Dawid-Skene model.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// The labels, sorted.
    pub labels: Vec<String>,
    /// Share of the items whose truth is each label.
    pub prevalence: Vec<f64>,
    /// Per rater, sorted by name: `[truth][given]`, rows sum to 1.
    pub confusion: BTreeMap<String, Vec<Vec<f64>>>,
    /// Per item, sorted by name: the probability of each label.
    pub items: BTreeMap<String, Vec<f64>>,
}

/// Cells of all confusion matrices together, 80 MB of them.
const MOST_CELLS: usize = 10_000_000;
/// Rounds after which the estimate is taken as it stands.
const ROUNDS: usize = 100;
/// Largest change of an item's probability at which the estimate has settled.
const SETTLED: f64 = 1e-6;
/// Weight of the prior count on each label that keeps a rater with few judgements from certainty.
const SMOOTHING: f64 = 0.01;

/// Fits the model to all judgements; several labels by one rater for one item all count. None without judgements, and for more
/// than [`MOST_LABELS`] labels or ten million cells in all matrices.
///
/// Starts at each item's vote shares; `smoothing` is added to each cell of each rater's confusion matrix.
pub fn dawid_skene(judgements: &[Judgement], smoothing: f64) -> Option<Estimate> {
    let index = |names: &mut dyn Iterator<Item = &String>| -> BTreeMap<String, usize> {
        let mut sorted: BTreeMap<String, usize> = names.map(|name| (name.clone(), 0)).collect();
        sorted.values_mut().enumerate().for_each(|(place, value)| *value = place);
        sorted
    };
    let labels = index(&mut judgements.iter().map(|judgement| &judgement.label));
    let raters = index(&mut judgements.iter().map(|judgement| &judgement.rater));
    let items = index(&mut judgements.iter().map(|judgement| &judgement.item));
    let given: Vec<(usize, usize, usize)> =
        judgements.iter().map(|j| (items[&j.item], raters[&j.rater], labels[&j.label])).collect();
    let size = labels.len();
    if size == 0 || size > MOST_LABELS || raters.len().saturating_mul(size * size) > MOST_CELLS {
        return None;
    }

    let mut truth = vec![vec![0.0; size]; items.len()];
    for (item, _, label) in &given {
        truth[*item][*label] += 1.0;
    }
    truth.iter_mut().for_each(|row| normalise(row));
    let mut prevalence = vec![0.0; size];
    let mut confusion = vec![vec![vec![0.0; size]; size]; raters.len()];
    for _ in 0..ROUNDS {
        prevalence.iter_mut().enumerate().for_each(|(label, share)| *share = truth.iter().map(|row| row[label]).sum());
        normalise(&mut prevalence);
        confusion.iter_mut().flatten().flatten().for_each(|cell| *cell = smoothing);
        for (item, rater, label) in &given {
            for (row, weight) in confusion[*rater].iter_mut().zip(&truth[*item]) {
                row[*label] += weight;
            }
        }
        confusion.iter_mut().flatten().for_each(|row| normalise(row));
        // In logarithms: a thousand raters on one item would underflow a product.
        let prior: Vec<f64> = prevalence.iter().map(|share| share.ln()).collect();
        let mut next = vec![prior; items.len()];
        for (item, rater, label) in &given {
            for (row, chance) in next[*item].iter_mut().zip(&confusion[*rater]) {
                *row += chance[*label].ln();
            }
        }
        for row in &mut next {
            let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter_mut().for_each(|value| *value = (*value - top).exp());
            normalise(row);
        }
        // Of the items and not of the prevalence, which stands still from the start where the labels are in balance.
        let settled = truth.iter().flatten().zip(next.iter().flatten()).all(|(old, new)| (old - new).abs() < SETTLED);
        truth = next;
        if settled {
            break;
        }
    }
    Some(Estimate {
        labels: labels.into_keys().collect(),
        prevalence,
        confusion: raters.into_keys().zip(confusion).collect(),
        items: items.into_keys().zip(truth).collect(),
    })
}

/// Each rater's reliability on the items that have two raters or more, worst skill first.
pub fn raters(judgements: &[Judgement]) -> Vec<Rater> {
    let mut people: BTreeMap<&str, (&str, bool)> = BTreeMap::new();
    for judgement in judgements {
        let (first, shared) = people.entry(&judgement.item).or_insert((&judgement.rater, false));
        *shared |= *first != judgement.rater;
    }
    let shared: Vec<Judgement> =
        judgements.iter().filter(|judgement| people.get(judgement.item.as_str()).is_some_and(|item| item.1)).cloned().collect();
    let Some(estimate) = dawid_skene(&shared, SMOOTHING) else { return Vec::new() };
    let place: BTreeMap<&str, usize> = estimate.labels.iter().enumerate().map(|(place, label)| (label.as_str(), place)).collect();
    let size = place.len();
    // A rater is held against what the others make true: their own vote taken out of the posterior, or each would confirm itself.
    let mut tallies: BTreeMap<&str, Tally> = BTreeMap::new();
    for judgement in &shared {
        let label = place[judgement.label.as_str()];
        let own = &estimate.confusion[&judgement.rater];
        let mut others: Vec<f64> = estimate.items[&judgement.item]
            .iter()
            .enumerate()
            .map(|(truth, chance)| chance / own[truth][label].max(f64::MIN_POSITIVE))
            .collect();
        normalise(&mut others);
        let tally = tallies.entry(&judgement.rater).or_insert_with(|| Tally::new(size));
        tally.count += 1;
        tally.right += others[label];
        tally.best += others.iter().map(|chance| chance * chance).sum::<f64>();
        tally.given[label] += 1.0;
        tally.truth.iter_mut().zip(&others).for_each(|(sum, chance)| *sum += chance);
    }
    let mut raters: Vec<Rater> = tallies.into_iter().map(|(rater, tally)| tally.rater(rater)).collect();
    raters.sort_by(|a, b| a.skill.total_cmp(&b.skill).then_with(|| a.rater.cmp(&b.rater)));
    raters
}

/// Sums over one rater's judgements.
struct Tally {
    count: usize,
    right: f64,
    best: f64,
    given: Vec<f64>,
    truth: Vec<f64>,
}

impl Tally {
    fn new(size: usize) -> Self {
        Self { count: 0, right: 0.0, best: 0.0, given: vec![0.0; size], truth: vec![0.0; size] }
    }

    fn rater(&self, name: &str) -> Rater {
        let n = self.count as f64;
        let (right, best) = (self.right / n, self.best / n);
        let chance: f64 = self.given.iter().zip(&self.truth).map(|(given, truth)| given * truth).sum::<f64>() / (n * n);
        // Where the truth itself would do no better than habit, as with one label only, nothing tells skill from it.
        let skill = |right: f64| {
            if best - chance > 1e-9 { ((right - chance) / (best - chance)).clamp(-1.0, 1.0) } else { 1.0 }
        };
        let (z2, share) = (Z95 * Z95, right.clamp(0.0, 1.0));
        let half = Z95 * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
        let end = |sign: f64| skill(((share + z2 / (2.0 * n) + sign * half) / (1.0 + z2 / n)).clamp(0.0, 1.0));
        Rater {
            rater: name.to_owned(),
            judgements: self.count,
            accuracy: (chance + skill(right) * (1.0 - chance)).clamp(0.0, 1.0),
            skill: skill(right),
            interval: Interval { low: end(-1.0), high: end(1.0) },
        }
    }
}

/// The check over all raters with enough judgements. Rows that only unreliable raters judged are for review. The explanation names
/// nobody: it is kept where a person's erasure does not reach.
pub(super) fn check(raters: &[Rater], rows: &[Row], thresholds: &Thresholds, findings: &mut Findings) -> Check {
    const NAME: &str = "reliability";
    let enough = || raters.iter().filter(|rater| rater.judgements >= thresholds.minimum);
    let Some(worst) = enough().min_by(|a, b| a.interval.high.total_cmp(&b.interval.high)) else {
        let why = format!("No rater has {} judgements on items that others judged too; let raters overlap.", thresholds.minimum);
        return Check::not_applicable(NAME, why);
    };
    let limit = thresholds.reliability;
    let unreliable: BTreeSet<&str> =
        enough().filter(|rater| limit.status(rater.interval.high) != Status::Pass).map(|rater| rater.rater.as_str()).collect();
    for (index, row) in rows.iter().enumerate() {
        let people = &row.origin.raters;
        if !people.is_empty() && people.iter().all(|rater| unreliable.contains(rater.as_str())) {
            findings.add(index, NAME, Keep::Review, format!("only {} judged it, who is unreliable", people.join(", ")));
        }
    }
    let explanation = format!(
        "Skill of the least reliable of {} raters, by Dawid-Skene: 1 is always right, 0 is guessing, below 0 is against the others. \
         Unreliable are {}; the upper end of the interval is held against the threshold.",
        enough().count(),
        unreliable.len()
    );
    let mut check = Check::held(NAME, worst.skill, worst.interval.high, limit, explanation).within(Some(worst.interval));
    check.examples = findings.ids(&findings.of(NAME));
    check
}

/// Scales to a sum of 1; leaves zeros alone.
fn normalise(values: &mut [f64]) {
    let sum: f64 = values.iter().sum();
    if sum > 0.0 {
        values.iter_mut().for_each(|value| *value /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{quality::generate, random::Random};

    /// Dawid and Skene 1979, table 1: five anaesthetists grade the fitness of 45 patients from 1 to 4, the first of them three
    /// times. A line per anaesthetist, a word per patient.
    const ANAESTHETISTS: [&str; 5] = [
        "111 333 112 222 222 222 122 333 222 232 444 222 111 222 121 111 111 111 222 222 222 222 222 221 111 111 232 111 111 112 \
         111 333 111 222 222 433 221 232 333 111 111 121 232 121 222",
        "1 4 2 3 3 3 2 3 2 2 4 3 1 3 1 2 1 1 2 1 2 2 3 2 1 1 2 1 1 1 1 3 1 2 3 4 2 3 3 1 1 2 2 1 2",
        "1 3 1 1 2 3 1 4 2 2 4 3 1 2 1 1 1 1 2 3 2 2 2 2 1 1 2 1 1 1 1 2 1 2 2 3 2 2 4 1 1 1 2 1 2",
        "1 3 2 2 2 2 1 3 2 2 4 4 1 1 1 1 1 1 2 2 2 2 2 2 1 1 2 1 1 2 1 3 1 2 3 4 3 3 3 1 1 1 2 1 2",
        "1 4 2 1 2 2 1 3 3 3 4 3 1 2 1 1 1 1 1 2 2 1 2 2 1 1 2 1 1 1 1 3 1 2 2 3 2 3 2 1 1 1 2 1 2",
    ];

    #[test]
    fn the_estimate_gives_the_published_values() {
        let mut judgements = Vec::new();
        for (rater, patients) in ANAESTHETISTS.iter().enumerate() {
            for (patient, grades) in patients.split_whitespace().enumerate() {
                judgements.extend(grades.chars().map(|g| Judgement::new(rater.to_string(), patient.to_string(), g.to_string())));
            }
        }
        assert_eq!(judgements.len(), 45 * 7);
        let estimate = dawid_skene(&judgements, 0.0).unwrap();
        // Table 2 of the paper: marginal probabilities, and the first anaesthetist's error rates for truth 1 and 2.
        for (share, published) in estimate.prevalence.iter().zip([0.40, 0.42, 0.11, 0.07]) {
            assert!((share - published).abs() < 0.006, "{:?}", estimate.prevalence);
        }
        for (rates, published) in estimate.confusion["0"].iter().zip([[0.89, 0.11, 0.0, 0.0], [0.07, 0.88, 0.05, 0.0]]) {
            assert!(rates.iter().zip(published).all(|(rate, published)| (rate - published).abs() < 0.006), "{rates:?}");
        }
    }

    /// Judgements of `items` items by raters who are right with the given chances.
    fn panel(items: usize, chances: &[f64]) -> Vec<Judgement> {
        let mut random = Random::new(11);
        let mut judgements = Vec::new();
        for item in 0..items {
            let truth = random.below(2);
            for (rater, chance) in chances.iter().enumerate() {
                let label = if random.unit() < *chance { truth } else { 1 - truth };
                judgements.push(Judgement::new(format!("rater{rater}"), item.to_string(), label.to_string()));
            }
        }
        judgements
    }

    fn run(judgements: &[Judgement], rows: &[Row]) -> (Check, Vec<usize>) {
        let mut findings = Findings::new(rows);
        let check = check(&raters(judgements), rows, &Thresholds::default(), &mut findings);
        let found = findings.of("reliability");
        (check, found)
    }

    #[test]
    fn a_guessing_and_a_lying_rater_are_found_with_their_rows() {
        let mut rows = generate::clean(4, 1);
        for (row, people) in rows.iter_mut().zip([&["rater3"][..], &["rater0"], &["rater0", "rater3"], &[]]) {
            row.origin.raters = people.iter().map(|person| (*person).to_owned()).collect();
        }
        let guessing = panel(200, &[0.9, 0.9, 0.85, 0.5]);
        assert_eq!(raters(&guessing)[0].rater, "rater3");
        let (check, found) = run(&guessing, &rows);
        assert_eq!((check.status, found), (Status::Warn, vec![0]));

        let lying = panel(200, &[0.9, 0.9, 0.85, 0.1]);
        let (check, found) = run(&lying, &rows);
        assert_eq!((check.status, found), (Status::Fail, vec![0]));
        assert!(check.value.unwrap() < -0.5 && !check.explanation.contains("rater3"), "{check:?}");
    }

    #[test]
    fn two_raters_who_err_alike_are_not_blamed_for_each_other() {
        let two = panel(3000, &[0.85, 0.85]);
        for rater in raters(&two) {
            assert!((rater.skill - 0.7).abs() < 0.06 && (rater.accuracy - 0.85).abs() < 0.03, "{rater:?}");
        }
        assert_eq!(run(&two, &[]).0.status, Status::Pass);
        // With three who know something, each gets what is theirs, whoever else guesses.
        let four = raters(&panel(3000, &[0.9, 0.8, 0.7, 0.5]));
        for (rater, truth) in four.iter().zip([0.0, 0.4, 0.6, 0.8]) {
            assert!((rater.skill - truth).abs() < 0.1, "{four:?}");
        }
    }

    #[test]
    fn labels_in_balance_are_estimated_to_the_end() {
        // With each item its mirror image, so that every prevalence is one half in every round.
        let drawn = panel(1500, &[0.95, 0.65, 0.65, 0.65, 0.65]);
        let mirrored = drawn.iter().map(|judgement| {
            let label = if judgement.label == "0" { "1" } else { "0" };
            Judgement::new(&judgement.rater, format!("mirror of {}", judgement.item), label)
        });
        let estimate = dawid_skene(&drawn.iter().cloned().chain(mirrored).collect::<Vec<_>>(), SMOOTHING).unwrap();
        assert!((estimate.prevalence[0] - 0.5).abs() < 1e-9);
        assert!((estimate.confusion["rater0"][0][0] - 0.95).abs() < 0.03, "{:?}", estimate.confusion["rater0"]);
    }

    #[test]
    fn good_raters_pass_and_too_few_judgements_are_not_applicable() {
        let good = panel(200, &[0.9, 0.85, 0.8]);
        assert_eq!(run(&good, &[]).0.status, Status::Pass);
        assert!(raters(&good).iter().all(|rater| rater.interval.low < rater.skill && rater.skill < rater.interval.high));
        assert_eq!(run(&panel(10, &[0.5, 0.5]), &[]).0.status, Status::NotApplicable);
        assert_eq!(run(&panel(200, &[0.9]), &[]).0.status, Status::NotApplicable);
    }
}
