//! Whose rows they are: one person must not steer the model.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    Limit, QualityOptions, Thresholds,
    corpus::Findings,
    report::{Check, Keep},
};
use crate::{
    dataset::Row,
    random::{Random, mix},
};

/// One person's part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// The user key or rater.
    pub person: String,
    /// Rows; a row of several people counts for each by its part.
    pub rows: f64,
    /// `rows` of all rows that name somebody.
    pub share: f64,
}

/// Shares of the users whose requests the rows answer, largest first.
pub fn users(rows: &[Row]) -> Vec<Share> {
    shares(rows.iter().map(|row| row.origin.users.as_slice()))
}

/// Shares of the raters, largest first.
pub fn raters(rows: &[Row]) -> Vec<Share> {
    shares(rows.iter().map(|row| row.origin.raters.as_slice()))
}

fn shares<'a>(people: impl Iterator<Item = &'a [String]>) -> Vec<Share> {
    let mut rows: BTreeMap<&str, f64> = BTreeMap::new();
    let mut total = 0.0;
    for group in people.filter(|group| !group.is_empty()) {
        total += 1.0;
        group.iter().for_each(|person| *rows.entry(person).or_default() += 1.0 / group.len() as f64);
    }
    let mut shares: Vec<Share> =
        rows.into_iter().map(|(person, rows)| Share { person: person.to_owned(), rows, share: rows / total }).collect();
    shares.sort_by(|a, b| b.rows.total_cmp(&a.rows).then_with(|| a.person.cmp(&b.person)));
    shares
}

/// Rows to leave out so that no user has more than `cap` of what stays, picked at random by the seed.
///
/// Of k rows of one user beside m of others, c·m / (1 − c) may stay. When the cap cannot be met, as with two users and a cap below
/// one half, the largest users are cut to the size of the next.
pub fn surplus(rows: &[Row], cap: f64, seed: u64) -> Vec<bool> {
    let mut of_user: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, row) in rows.iter().enumerate() {
        if let Some(user) = row.origin.users.first() {
            of_user.entry(user).or_default().push(index);
        }
    }
    let mut sizes: Vec<usize> = of_user.values().map(Vec::len).collect();
    sizes.sort_unstable();
    let total: usize = sizes.iter().sum();
    // The cap as a count: the largest t with t ≤ cap · Σ min(size, t). The sum grows more slowly than t, so going down finds it.
    let kept = |t: usize| sizes.iter().map(|size| (*size).min(t)).sum::<usize>();
    let fits = |t: usize| t as f64 <= cap * kept(t) as f64;
    let largest = sizes.last().copied().unwrap_or(0);
    let next = sizes.len().checked_sub(2).map_or(largest, |second| sizes[second]);
    let allowed = if fits(largest) || total == 0 {
        largest
    } else {
        let (mut low, mut high) = (0, largest);
        while low + 1 < high {
            let middle = low.midpoint(high);
            if fits(middle) { low = middle } else { high = middle }
        }
        if low == 0 { next } else { low }
    };
    let mut out = vec![false; rows.len()];
    for (user, mut indices) in of_user {
        let name = user.bytes().fold(seed, |state, byte| mix(state ^ u64::from(byte)));
        Random::new(name).shuffle(&mut indices);
        indices.iter().skip(allowed).for_each(|index| out[*index] = true);
    }
    out
}

/// Marks the rows of users who have more than the first threshold allows, so that a builder can leave them out.
pub(super) fn mark_surplus(rows: &[Row], users: &[Share], options: &QualityOptions, findings: &mut Findings) {
    let cap = options.thresholds.user_share.warn;
    let named: f64 = users.iter().map(|user| user.rows).sum();
    if named >= options.thresholds.minimum as f64 && users.first().is_some_and(|user| user.share > cap) {
        for (row, out) in surplus(rows, cap, options.seed).into_iter().enumerate() {
            if out {
                findings.add(row, "user_share", Keep::Review, format!("its user has more than {:.0} % of the rows", 100.0 * cap));
            }
        }
    }
}

/// The check over one kind of people. It names nobody: the explanation is kept where a person's erasure does not reach.
pub(super) fn check(name: &str, who: &str, shares: &[Share], limit: Limit, thresholds: &Thresholds) -> Check {
    let total: f64 = shares.iter().map(|share| share.rows).sum();
    match shares.first() {
        Some(first) if total >= thresholds.minimum as f64 => {
            let explanation = format!(
                "Of {} {who}s, one has {:.0} of {total:.0} rows. One person must not steer the model; collect from more people, or cap \
                 what one person gives.",
                shares.len(),
                first.rows
            );
            Check::held(name, first.share, first.share, limit, explanation)
        }
        _ => Check::not_applicable(name, format!("Fewer than {} rows name a {who}.", thresholds.minimum)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Example, Origin};

    fn rows(users: &[(&str, usize)]) -> Vec<Row> {
        let example = || Example::Demonstration { prompt: Vec::new(), completion: Vec::new() };
        let row = |user: &str| Row::new(example(), Origin { users: vec![user.to_owned()], ..Origin::default() });
        users.iter().flat_map(|(user, count)| (0..*count).map(|_| row(user))).collect()
    }

    fn kept(rows: &[Row], cap: f64) -> BTreeMap<String, usize> {
        let mut kept = BTreeMap::new();
        for (row, out) in rows.iter().zip(surplus(rows, cap, 5)) {
            *kept.entry(row.origin.users[0].clone()).or_default() += usize::from(!out);
        }
        kept
    }

    #[test]
    fn a_row_of_two_raters_counts_half_for_each() {
        let mut rows = rows(&[("u", 3)]);
        rows[0].origin.raters = vec!["a".into(), "b".into()];
        rows[1].origin.raters = vec!["a".into()];
        let shares = raters(&rows);
        assert_eq!(
            shares.iter().map(|share| (share.person.as_str(), share.share)).collect::<Vec<_>>(),
            [("a", 0.75), ("b", 0.25)]
        );
    }

    #[test]
    fn what_stays_after_the_cap_keeps_the_cap() {
        let rows = rows(&[("big", 600), ("a", 100), ("b", 100), ("c", 100), ("d", 100)]);
        let kept = kept(&rows, 0.25);
        let total: usize = kept.values().sum();
        assert!(kept["big"] as f64 <= 0.25 * total as f64 && kept["big"] >= 130, "{kept:?}");
        assert_eq!(kept["a"], 100);
    }

    #[test]
    fn a_cap_that_cannot_be_met_evens_out_instead_of_emptying() {
        assert_eq!(kept(&rows(&[("a", 50), ("b", 10)]), 0.25), BTreeMap::from([("a".into(), 10), ("b".into(), 10)]));
        assert_eq!(kept(&rows(&[("a", 50)]), 0.25), BTreeMap::from([("a".into(), 50)]));
        assert!(surplus(&[], 0.25, 1).is_empty());
    }

    #[test]
    fn one_person_with_most_rows_fails_and_many_people_pass() {
        use crate::quality::report::Status;
        let thresholds = Thresholds::default();
        let check =
            |counts: &[(&str, usize)]| check("user_share", "user", &users(&rows(counts)), thresholds.user_share, &thresholds);
        let status = |counts: &[(&str, usize)]| check(counts).status;
        assert_eq!(status(&[("a", 60), ("b", 40)]), Status::Fail);
        assert_eq!(status(&[("a", 30), ("b", 25), ("c", 25), ("d", 20)]), Status::Warn);
        assert_eq!(status(&[("a", 20), ("b", 20), ("c", 20), ("d", 20), ("e", 20)]), Status::Pass);
        assert_eq!(status(&[("a", 5)]), Status::NotApplicable);
        let named = check(&[("maria@lopez.es", 60), ("b", 40)]);
        assert!(named.explanation.starts_with("Of 2 users, one has 60 of 100 rows."), "{}", named.explanation);
    }
}
