//! Whether the rows say many things or few things many times.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    QualityOptions,
    corpus::Corpus,
    report::{Check, EXAMPLES},
    words::sequence,
};
use crate::{random::Random, statistics::entropy};

/// Words of chosen answers over which different word pairs are counted: the ratio falls with the number of words, so that number is
/// fixed.
const SAMPLED: usize = 20_000;

/// The checks over prompt clusters, different word pairs, and one answer to many prompts.
pub(super) fn check(corpus: &Corpus<'_>, options: &QualityOptions) -> [Check; 3] {
    [clusters(corpus, options), distinct(corpus, options), repeated(corpus, options)]
}

/// e to the entropy of the prompt clusters: how many equally common prompts there are as many of as rows.
fn clusters(corpus: &Corpus<'_>, options: &QualityOptions) -> Check {
    const NAME: &str = "diversity";
    let size = corpus.rows.len();
    if size < options.thresholds.minimum {
        return Check::not_applicable(NAME, format!("Fewer than {} rows.", options.thresholds.minimum));
    }
    let mut counts: BTreeMap<usize, u64> = BTreeMap::new();
    corpus.clusters.iter().for_each(|cluster| *counts.entry(*cluster).or_default() += 1);
    let effective = entropy(counts.values().copied()).exp();
    let (largest, most) = counts.iter().max_by_key(|(_, count)| **count).map_or((0, 0), |(cluster, count)| (*cluster, *count));
    let text = format!(
        "{} clusters of alike prompts, in their sizes as diverse as {effective:.0} equal ones for {size} rows; the largest has {most} \
         rows. Few clusters teach few things: sample more prompts.",
        counts.len()
    );
    let value = effective / size as f64;
    let mut check = Check::held(NAME, value, value, options.thresholds.diversity, text);
    if most > 1 {
        let members = corpus.clusters.iter().enumerate().filter(|(_, cluster)| **cluster == largest);
        check.examples = members.take(EXAMPLES).map(|(row, _)| corpus.rows[row].id.clone()).collect();
    }
    check
}

/// Different word pairs per word pair (distinct-2, Li et al. 2016) of chosen answers drawn at random.
fn distinct(corpus: &Corpus<'_>, options: &QualityOptions) -> Check {
    const NAME: &str = "distinct";
    let mut order: Vec<usize> = (0..corpus.rows.len()).collect();
    Random::new(options.seed).shuffle(&mut order);
    let mut seen: [HashSet<u64>; 3] = Default::default();
    let mut totals = [0usize; 3];
    for answer in order.into_iter().filter_map(|row| corpus.taught(row)) {
        let words = &answer.words[..answer.words.len().min(SAMPLED - totals[0])];
        for (n, (seen, total)) in seen.iter_mut().zip(&mut totals).enumerate() {
            let grams = words.windows(n + 1);
            *total += grams.len();
            seen.extend(grams.map(sequence));
        }
        if totals[0] >= SAMPLED {
            break;
        }
    }
    if totals[0] < SAMPLED / 10 {
        return Check::not_applicable(NAME, format!("The answers have fewer than {} words.", SAMPLED / 10));
    }
    let ratio = |n: usize| seen[n].len() as f64 / totals[n].max(1) as f64;
    let text = format!(
        "Different word pairs per word pair in {} words of answers to learn from (single words {:.2}, triples {:.2}). Low values come from \
         templates and loops.",
        totals[0],
        ratio(0),
        ratio(2)
    );
    Check::held(NAME, ratio(1), ratio(1), options.thresholds.distinct, text)
}

/// The share of prompt clusters that get the most common answer.
fn repeated(corpus: &Corpus<'_>, options: &QualityOptions) -> Check {
    const NAME: &str = "repeated_answer";
    let mut answers: HashMap<u64, (HashSet<usize>, usize)> = HashMap::new();
    let mut clusters = HashSet::new();
    for row in 0..corpus.rows.len() {
        if let Some(answer) = corpus.taught(row).filter(|answer| !answer.words.is_empty()) {
            clusters.insert(corpus.clusters[row]);
            let entry = answers.entry(sequence(&answer.words)).or_insert_with(|| (HashSet::new(), row));
            entry.0.insert(corpus.clusters[row]);
        }
    }
    if clusters.len() < options.thresholds.minimum {
        return Check::not_applicable(NAME, format!("Fewer than {} different prompts.", options.thresholds.minimum));
    }
    let most = answers
        .values()
        .map(|(prompts, first)| (prompts.len(), *first))
        .max_by_key(|(count, first)| (*count, usize::MAX - first));
    let (count, first) = most.unwrap_or_default();
    let share = count as f64 / clusters.len() as f64;
    let text = format!("One answer, word by word, is the one to learn for {count} of {} different prompts.", clusters.len());
    let mut check = Check::held(NAME, share, share, options.thresholds.repeated_answer, text);
    if count > 1 {
        check.examples = vec![corpus.rows[first].id.clone()];
    }
    check
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataset::Row,
        quality::{generate, report::Status},
    };

    fn run(rows: &[Row]) -> [Check; 3] {
        check(&Corpus::new(rows, 0.6), &QualityOptions::default())
    }

    #[test]
    fn clean_rows_are_diverse() {
        for size in [300, 3000] {
            let checks = run(&generate::clean(size, 1));
            assert!(checks.iter().all(|check| check.status == Status::Pass), "{checks:?}");
        }
        assert!(run(&[]).iter().all(|check| check.status == Status::NotApplicable));
    }

    #[test]
    fn few_prompts_are_found() {
        let prompts = generate::clean(5, 2);
        let rows: Vec<Row> = generate::clean(1000, 3)
            .iter()
            .enumerate()
            .map(|(index, row)| {
                generate::with_prompt(row, |_| crate::dataset::row::text(&prompts[index % 5].example.prompt()[1..]))
            })
            .collect();
        let [clusters, distinct, repeated] = run(&rows);
        assert_eq!(clusters.status, Status::Fail, "{clusters:?}");
        assert!((clusters.value.unwrap() - 0.005).abs() < 1e-9);
        assert_eq!((distinct.status, repeated.status), (Status::Pass, Status::NotApplicable));
    }

    #[test]
    fn one_answer_to_everything_is_found() {
        let rows: Vec<Row> = generate::clean(1000, 4)
            .iter()
            .enumerate()
            .map(|(index, row)| match index % 10 {
                0 => generate::with_answers(row, |_, rejected| {
                    ("I am sorry, I cannot help with that.".to_owned(), rejected.to_owned())
                }),
                _ => row.clone(),
            })
            .collect();
        let [_, _, repeated] = run(&rows);
        assert_eq!(repeated.status, Status::Warn, "{repeated:?}");
        assert!((repeated.value.unwrap() - 0.1).abs() < 0.01);
    }

    #[test]
    fn answers_from_a_template_are_found() {
        let rows: Vec<Row> = generate::clean(1000, 5)
            .iter()
            .enumerate()
            .map(|(index, row)| {
                let page = index % 20;
                let answer =
                    format!("Thank you for asking. The answer to this question is in the manual on page {page}. Please read it.");
                generate::with_answers(row, |_, rejected| (answer, rejected.to_owned()))
            })
            .collect();
        let [_, distinct, _] = run(&rows);
        assert_ne!(distinct.status, Status::Pass, "{distinct:?}");
    }
}
