//! Rows that say the same twice, and rows that contradict each other.

use std::collections::{BTreeMap, HashMap};

use super::{
    Thresholds, address,
    corpus::{Corpus, Findings},
    minhash,
    report::{Check, Keep},
    words::{pairs, similarity},
};
use crate::dataset::{Example, Row};

const EXACT: &str = "exact_duplicates";
const NEAR: &str = "near_duplicates";
const CONTRADICTION: &str = "contradictions";

/// The checks over exact duplicates, near duplicates, and contradictions.
///
/// Exact: equal but for white space; all but the first are dropped. Near: both the prompt and each answer are alike; all but the
/// first are for review. A contradiction is a near or exact duplicate with the opposite preference; all its rows are for review,
/// since nobody but a person can say which is right.
///
/// A query may ask for a row of each judgement; what two people said about the same answers is none of these.
pub(super) fn check(corpus: &Corpus<'_>, thresholds: &Thresholds, seed: u64, findings: &mut Findings) -> [Check; 3] {
    let size = corpus.rows.len();
    let mut first: HashMap<blake3::Hash, usize> = HashMap::new();
    let mut repeats = vec![false; size];
    for (index, row) in corpus.rows.iter().enumerate() {
        let earlier = *first.entry(address::of(&row.example)).or_insert(index);
        if earlier != index && !is_each(&corpus.rows[earlier], row) {
            repeats[index] = true;
            findings.add(index, EXACT, Keep::Drop, format!("the same as row number {earlier} ({})", corpus.rows[earlier].id));
        }
    }

    let sets: Vec<Vec<u32>> = (0..size).map(|index| if repeats[index] { Vec::new() } else { content(corpus, index) }).collect();
    let mut links: Vec<Link> = Vec::new();
    let mut groups = minhash::group(&sets, seed, |earlier, later| {
        let prompts = similarity(&corpus.prompt_pairs[earlier], &corpus.prompt_pairs[later]);
        if prompts < thresholds.near_similarity || similarity(&sets[earlier], &sets[later]) < thresholds.near_similarity {
            return false;
        }
        if is_each(&corpus.rows[earlier], &corpus.rows[later]) {
            return false;
        }
        let Some(opposite) = relation(corpus, earlier, later, thresholds.near_similarity) else { return false };
        links.push(Link { earlier, later, opposite });
        true
    });
    let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for link in &links {
        members.entry(groups.find(link.earlier)).or_default().extend([link.earlier, link.later]);
    }
    let opposite = sides(size, &links);
    for (root, mut group) in members {
        group.sort_unstable();
        group.dedup();
        let against = group.iter().copied().find(|row| opposite[*row] != opposite[root]);
        for row in group {
            match against {
                Some(against) => {
                    let other = if opposite[row] == opposite[root] { against } else { root };
                    let detail = format!("row {} says the opposite about the same answers", corpus.rows[other].id);
                    findings.add(row, CONTRADICTION, Keep::Review, detail);
                }
                None if row != root => findings.add(
                    row,
                    NEAR,
                    Keep::Review,
                    format!("nearly the same as row number {root} ({})", corpus.rows[root].id),
                ),
                None => {}
            }
        }
    }
    [
        findings.share(EXACT, size, thresholds.exact_duplicates, |found| {
            format!("Word by word the same as an earlier row, and would count twice: {found}. Leave them out.")
        }),
        findings.share(NEAR, size, thresholds.near_duplicates, |found| {
            format!(
                "At least {:.0} % alike to an earlier row in prompt and answers: {found}. Keep one of each, unless the repeats are \
                 wanted.",
                100.0 * thresholds.near_similarity
            )
        }),
        findings.share(CONTRADICTION, size, thresholds.contradictions, |found| {
            format!("Prefer the answer that another row, about the same two, rejects: {found}. Decide which holds.")
        }),
    ]
}

/// Whether two rows are two judgements of the same thing, each with a row of its own: the same texts, from the same kind of feedback,
/// and yet from different feedback. Where judgements are joined, rows of one kind about the same texts are one row.
fn is_each(left: &Row, right: &Row) -> bool {
    let (a, b) = (&left.origin, &right.origin);
    let apart = !a.feedback.is_empty() && !b.feedback.is_empty() && a.feedback.iter().all(|id| !b.feedback.contains(id));
    if !apart || a.source != b.source || left.example.prompt() != right.example.prompt() {
        return false;
    }
    let (one, mut other) = (left.example.answers(), right.example.answers());
    one == other || {
        other.reverse();
        one == other
    }
}

/// Two rows that are alike.
struct Link {
    earlier: usize,
    later: usize,
    opposite: bool,
}

/// Which of two sides each row is on, so that linked rows are on one side unless they are opposite. Links form a forest.
fn sides(size: usize, links: &[Link]) -> Vec<bool> {
    let mut neighbours: HashMap<usize, Vec<(usize, bool)>> = HashMap::new();
    for link in links {
        neighbours.entry(link.earlier).or_default().push((link.later, link.opposite));
        neighbours.entry(link.later).or_default().push((link.earlier, link.opposite));
    }
    let mut side: Vec<Option<bool>> = vec![None; size];
    for link in links {
        let mut open = vec![(link.earlier, false)];
        if side[link.earlier].is_some() {
            continue;
        }
        while let Some((row, on)) = open.pop() {
            if side[row].is_none() {
                side[row] = Some(on);
                open.extend(neighbours.get(&row).into_iter().flatten().map(|(next, opposite)| (*next, on ^ opposite)));
            }
        }
    }
    side.into_iter().map(Option::unwrap_or_default).collect()
}

/// Whether two rows with alike prompts are duplicates (`Some(false)`), opposites (`Some(true)`), or neither.
fn relation(corpus: &Corpus<'_>, left: usize, right: usize, threshold: f64) -> Option<bool> {
    let alike = |a: usize, b: usize| {
        similarity(&pairs(&corpus.answers[left][a].words), &pairs(&corpus.answers[right][b].words)) >= threshold
    };
    match (&corpus.rows[left].example, &corpus.rows[right].example) {
        (Example::Preference { .. }, Example::Preference { .. }) if alike(0, 0) && alike(1, 1) => Some(false),
        (Example::Preference { .. }, Example::Preference { .. }) => (alike(0, 1) && alike(1, 0)).then_some(true),
        (Example::Unpaired { label: one, .. }, Example::Unpaired { label: other, .. }) => alike(0, 0).then_some(one != other),
        (Example::Demonstration { .. }, Example::Demonstration { .. }) => alike(0, 0).then_some(false),
        _ => None,
    }
}

/// Word pairs of the answers, whichever was chosen, and those of the prompt as numbers of their own. When prompts and answers are
/// alike to some degree each, so is this; and a refusal that answers a thousand prompts does not bring them all together.
fn content(corpus: &Corpus<'_>, index: usize) -> Vec<u32> {
    let mut all: Vec<u32> = corpus.answers[index].iter().flat_map(|answer| pairs(&answer.words)).collect();
    all.extend(corpus.prompt_pairs[index].iter().map(|pair| pair.rotate_left(16) ^ 0x5bd1_e995));
    all.sort_unstable();
    all.dedup();
    all
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

    fn run(rows: &[Row]) -> ([Check; 3], Findings) {
        let mut findings = Findings::new(rows);
        let checks = check(&Corpus::new(rows, 0.6), &Thresholds::default(), 1, &mut findings);
        (checks, findings)
    }

    /// One word in the middle of both answers changed.
    fn reworded(row: &Row) -> Row {
        let swap = |text: &str| text.replacen(" the ", " that ", 1);
        generate::with_answers(row, |chosen, rejected| (swap(chosen), swap(rejected)))
    }

    #[test]
    fn clean_rows_repeat_and_contradict_nothing() {
        let (checks, _) = run(&generate::clean(3000, 5));
        assert!(checks.iter().all(|check| check.status == Status::Pass && check.value == Some(0.0)), "{checks:?}");
    }

    #[test]
    fn exact_duplicates_are_dropped_and_the_first_is_kept() {
        let mut rows = generate::clean(500, 6);
        let spaced = generate::with_answers(&rows[8], |chosen, rejected| (format!(" {chosen}\n"), rejected.replace(' ', "  ")));
        rows.extend([rows[7].clone(), rows[7].clone(), spaced]);
        let (checks, findings) = run(&rows);
        assert_eq!(findings.of(EXACT), [500, 501, 502]);
        assert_eq!((checks[0].status, checks[1].status, checks[2].status), (Status::Warn, Status::Pass, Status::Pass));
        let verdicts = findings.into_rows();
        assert_eq!((verdicts[7].verdict, verdicts[500].verdict), (Keep::Keep, Keep::Drop));
        assert!(verdicts[502].reasons[0].detail.contains(&rows[8].id));
    }

    #[test]
    fn near_duplicates_are_for_review() {
        let mut rows = generate::clean(500, 7);
        let planted: Vec<Row> = rows[..60].iter().map(reworded).collect();
        let changed: Vec<usize> = (0..60).filter(|row| planted[*row].id != rows[*row].id).map(|row| 500 + row).collect();
        rows.extend(planted);
        let (checks, findings) = run(&rows);
        let found = findings.of(NEAR);
        assert!(found.iter().all(|row| changed.contains(row)));
        assert!(found.len() * 10 >= changed.len() * 9, "{} of {}", found.len(), changed.len());
        assert_eq!(checks[1].status, Status::Warn);
    }

    #[test]
    fn exact_and_near_contradictions_are_found_on_both_sides() {
        let mut rows = generate::clean(400, 8);
        rows.push(generate::flipped(&rows[3]));
        let long = rows.iter().position(|row| crate::dataset::row::text(row.example.answers()[0]).len() > 700).unwrap();
        rows.push(generate::flipped(&generate::with_answers(&rows[long], |chosen, rejected| {
            (format!("{chosen} Indeed."), format!("{rejected} Indeed."))
        })));
        let answer = |label| {
            let prompt = vec![message("user", "Is water wet?")];
            let completion = vec![message("assistant", "Yes, by most definitions of the word.")];
            Row::new(Example::Unpaired { prompt, completion, label }, Origin::default())
        };
        rows.extend([answer(true), answer(false)]);
        let (checks, findings) = run(&rows);
        let mut expected = vec![3, long, 400, 401, 402, 403];
        expected.sort_unstable();
        assert_eq!(findings.of(CONTRADICTION), expected);
        assert_eq!(checks[2].status, Status::Warn);
        assert_eq!(checks[1].status, Status::Pass);
    }

    #[test]
    fn a_row_of_each_judgement_repeats_and_contradicts_nothing() {
        // Three raters on each pair, of whom the third disagrees.
        let mut rows: Vec<Row> =
            generate::clean(200, 10).iter().flat_map(|row| [row.clone(), row.clone(), generate::flipped(row)]).collect();
        let (imported, _) = run(&rows);
        assert!(imported.iter().all(|check| check.status != Status::Pass || check.name == NEAR), "{imported:?}");
        for (number, row) in rows.iter_mut().enumerate() {
            row.origin.feedback = vec![format!("feedback {number}")];
        }
        let (each, _) = run(&rows);
        assert!(each.iter().all(|check| check.value == Some(0.0)), "{each:?}");
    }

    #[test]
    fn the_same_answers_to_different_prompts_are_no_duplicates() {
        let rows = generate::clean(200, 9);
        let answers = rows[0].clone();
        let same: Vec<Row> = rows
            .iter()
            .map(|row| {
                let Example::Preference { chosen, rejected, .. } = &answers.example else { panic!("not a preference") };
                let prompt = row.example.prompt().to_vec();
                Row::new(Example::Preference { prompt, chosen: chosen.clone(), rejected: rejected.clone() }, Origin::default())
            })
            .collect();
        assert!(run(&same).0.iter().all(|check| check.value == Some(0.0)));
    }
}
