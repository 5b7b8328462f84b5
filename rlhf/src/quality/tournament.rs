//! Preferences that go in a circle: a over b, b over c, c over a. No ranking of the answers can satisfy them all.

use std::collections::{BTreeMap, HashMap};

use super::{
    Thresholds,
    corpus::{Corpus, Findings},
    report::{Check, Keep},
    words::sequence,
};
use crate::dataset::Example;

const NAME: &str = "cycles";

/// The check over comparisons that lie on a cycle, of all comparisons among three or more answers to one prompt.
///
/// Comparisons of one pair of answers are netted first: two that contradict each other are a contradiction, not a cycle.
pub(super) fn check(corpus: &Corpus<'_>, thresholds: &Thresholds, findings: &mut Findings) -> Check {
    let mut prompts: BTreeMap<u64, Vec<(usize, u64, u64)>> = BTreeMap::new();
    for (index, chosen, rejected) in corpus.comparisons() {
        let Example::Preference { prompt, .. } = &corpus.rows[index].example else { continue };
        // The instructions of the system count here: under others, another answer may be the better one.
        let key =
            prompt.iter().fold(0, |state, message| sequence(&[state as u32, (state >> 32) as u32, text_key(&message.content)]));
        prompts.entry(key).or_default().push((index, sequence(&chosen.words), sequence(&rejected.words)));
    }
    let mut looked_at = 0;
    for comparisons in prompts.into_values().filter(|comparisons| comparisons.len() > 2) {
        let mut place: HashMap<u64, usize> = HashMap::new();
        let mut node = |answer: u64| {
            let next = place.len();
            *place.entry(answer).or_insert(next)
        };
        let rows: Vec<(usize, usize, usize)> =
            comparisons.iter().map(|(row, chosen, rejected)| (*row, node(*chosen), node(*rejected))).collect();
        let size = place.len();
        if size < 3 {
            continue;
        }
        looked_at += rows.len();
        let mut net: BTreeMap<(usize, usize), i64> = BTreeMap::new();
        for (_, better, worse) in rows.iter().filter(|(_, better, worse)| better != worse) {
            *net.entry((*better.min(worse), *better.max(worse))).or_default() += if better < worse { 1 } else { -1 };
        }
        // Pairs come in ascending order, so each list of losers does too.
        let mut edges = vec![Vec::new(); size];
        for ((low, high), votes) in net {
            match votes.signum() {
                1 => edges[low].push(high),
                -1 => edges[high].push(low),
                _ => {}
            }
        }
        let component = components(&edges);
        for (row, better, worse) in rows {
            if better != worse && component[better] == component[worse] && edges[better].binary_search(&worse).is_ok() {
                findings.add(row, NAME, Keep::Review, "it is part of a circle of preferences among the answers to its prompt");
            }
        }
    }
    if looked_at < 3 {
        return Check::not_applicable(NAME, "No prompt has three comparisons among three answers.");
    }
    findings.share(NAME, looked_at, thresholds.cycles, |found| {
        format!(
            "Of {looked_at} comparisons among three or more answers to one prompt these lie on a circle: {found}, such as a over b, b over c, c \
             over a. At least one of each circle is wrong."
        )
    })
}

/// A word-level key of a text.
fn text_key(text: &str) -> u32 {
    sequence(&super::words::words(text)) as u32
}

/// The strongly connected component of each node (Kosaraju's two passes, without recursion).
fn components(edges: &[Vec<usize>]) -> Vec<usize> {
    let size = edges.len();
    let mut reversed = vec![Vec::new(); size];
    for (from, targets) in edges.iter().enumerate() {
        targets.iter().for_each(|to| reversed[*to].push(from));
    }
    let mut finished = Vec::with_capacity(size);
    let mut seen = vec![false; size];
    for start in 0..size {
        if std::mem::replace(&mut seen[start], true) {
            continue;
        }
        let mut path = vec![(start, 0)];
        while let Some((node, next)) = path.last_mut() {
            match edges[*node].get(*next) {
                Some(to) => {
                    *next += 1;
                    if !std::mem::replace(&mut seen[*to], true) {
                        path.push((*to, 0));
                    }
                }
                None => {
                    finished.push(*node);
                    path.pop();
                }
            }
        }
    }
    let mut component = vec![usize::MAX; size];
    for root in finished.into_iter().rev() {
        let mut open = vec![root];
        while let Some(node) = open.pop() {
            if component[node] == usize::MAX {
                component[node] = root;
                open.extend(reversed[node].iter().filter(|from| component[**from] == usize::MAX));
            }
        }
    }
    component
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataset::{Origin, Row},
        quality::{
            generate::{self, message},
            report::Status,
        },
    };

    fn run(rows: &[Row]) -> (Check, Vec<usize>) {
        let mut findings = Findings::new(rows);
        let check = check(&Corpus::new(rows, 0.6), &Thresholds::default(), &mut findings);
        let found = findings.of(NAME);
        (check, found)
    }

    fn prefers(prompt: &str, better: &str, worse: &str) -> Row {
        let says = |text: &str| vec![message("assistant", text)];
        let example = Example::Preference { prompt: vec![message("user", prompt)], chosen: says(better), rejected: says(worse) };
        Row::new(example, Origin::default())
    }

    #[test]
    fn rankings_have_no_cycles() {
        assert_eq!(run(&generate::clean(200, 1)).0.status, Status::NotApplicable);
        let answers = ["one", "two", "three", "four", "five"];
        let mut rows = Vec::new();
        for prompt in 0..30 {
            for better in 0..5 {
                rows.extend((better + 1..5).map(|worse| prefers(&format!("prompt {prompt}"), answers[better], answers[worse])));
            }
        }
        let (check, found) = run(&rows);
        assert_eq!((check.status, found.len()), (Status::Pass, 0));
    }

    #[test]
    fn a_circle_is_found_and_its_rows_are_named() {
        let rows = [
            prefers("p", "a", "b"),
            prefers("p", "b", "c"),
            prefers("p", "c", "a"),
            prefers("p", "a", "d"),
            prefers("q", "a", "b"),
            prefers("q", "b", "c"),
            prefers("q", "a", "c"),
        ];
        let (check, found) = run(&rows);
        assert_eq!((check.status, found), (Status::Warn, vec![0, 1, 2]));
        let circles: Vec<Row> =
            (0..20).flat_map(|n| [("a", "b"), ("b", "c"), ("c", "a")].map(|(x, y)| prefers(&format!("p{n}"), x, y))).collect();
        assert_eq!(run(&circles).0.status, Status::Fail);
    }

    #[test]
    fn a_pair_judged_both_ways_is_no_circle_and_the_majority_counts() {
        let rows = [prefers("p", "a", "b"), prefers("p", "b", "a"), prefers("p", "b", "c"), prefers("p", "c", "a")];
        assert_eq!(run(&rows).1.len(), 0);
        let rows = [
            prefers("p", "a", "b"),
            prefers("p", "a", "b"),
            prefers("p", "b", "a"),
            prefers("p", "b", "c"),
            prefers("p", "c", "a"),
        ];
        assert_eq!(run(&rows).1, [0, 1, 3, 4]);
    }
}
