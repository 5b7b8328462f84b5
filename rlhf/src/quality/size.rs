//! Whether there are rows enough to train on, by what they are trained for.

use super::{
    Limit, Status, Thresholds,
    corpus::Findings,
    report::{Check, Keep},
};
use crate::dataset::{Example, Row};

/// One way to train, and its rows.
struct Use {
    rows: usize,
    limit: Limit,
    text: String,
}

/// The check over the number of rows that are not dropped, so it comes last.
///
/// Rows of different kinds train different things, so each kind is held against its own limit, and the one that fares best decides:
/// three corrections beside a thousand comparisons are no fault of the comparisons. Of thumbs the rarer side counts, twice: without
/// its opposite a judgement says nothing.
pub(super) fn check(rows: &[Row], thresholds: &Thresholds, findings: &Findings) -> Check {
    let (mut preferences, mut demonstrations, mut good, mut bad) = (0, 0, 0, 0);
    for (_, row) in rows.iter().enumerate().filter(|(index, _)| findings.verdict(*index) != Keep::Drop) {
        match row.example {
            Example::Preference { .. } => preferences += 1,
            Example::Demonstration { .. } => demonstrations += 1,
            Example::Unpaired { label: true, .. } => good += 1,
            Example::Unpaired { label: false, .. } => bad += 1,
        }
    }
    let sizes = &thresholds.size;
    let both = 2 * good.min(bad);
    let uses = [
        (preferences, preferences, sizes.preferences, format!("{preferences} preferences")),
        (good + bad, both, sizes.unpaired, format!("{good} good and {bad} bad answers, which count as {both}")),
        (demonstrations, demonstrations, sizes.demonstrations, format!("{demonstrations} demonstrations")),
    ];
    let mut uses: Vec<Use> = uses
        .into_iter()
        .filter(|(any, ..)| *any > 0)
        .map(|(_, rows, limit, text)| {
            let text = format!("{text} ({:.0} wanted, {:.0} needed)", limit.warn, limit.fail);
            Use { rows, limit, text }
        })
        .collect();
    let rank = |of: &Use| match of.limit.status(of.rows as f64) {
        Status::Fail => 2,
        Status::Warn => 1,
        Status::Pass | Status::NotApplicable => 0,
    };
    uses.sort_by_key(rank);
    let Some(best) = uses.first() else {
        return Check::held("size", 0.0, 0.0, sizes.preferences, "There is no row to train on; widen the query.");
    };
    let advice = match rank(best) {
        0 => "Each kind trains a model of its own; what has enough of one kind passes.",
        1 => "With so few only a large gain can be told from chance: collect more before you trust one.",
        _ => "With so few no gain can be told from chance, and most checks here have too little to look at: collect more.",
    };
    let texts: Vec<&str> = uses.iter().map(|of| of.text.as_str()).collect();
    Check::held("size", best.rows as f64, best.rows as f64, best.limit, format!("To train on: {}. {advice}", texts.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataset::Origin,
        quality::generate::{self, message},
    };

    fn run(rows: &[Row]) -> Check {
        check(rows, &Thresholds::default(), &Findings::new(rows))
    }

    fn row(number: usize, label: Option<bool>) -> Row {
        let (prompt, completion) = (vec![message("user", format!("{number}"))], vec![message("assistant", "Yes.")]);
        let example = match label {
            Some(label) => Example::Unpaired { prompt, completion, label },
            None => Example::Demonstration { prompt, completion },
        };
        Row::new(example, Origin::default())
    }

    #[test]
    fn each_kind_has_limits_of_its_own() {
        for (count, status) in [(0, Status::Fail), (4, Status::Fail), (49, Status::Fail), (50, Status::Warn), (500, Status::Pass)]
        {
            assert_eq!(run(&generate::clean(count, 1)).status, status, "{count} preferences");
        }
        let demonstrations = |count| (0..count).map(|number| row(number, None)).collect::<Vec<_>>();
        for (count, status) in [(9, Status::Fail), (10, Status::Warn), (100, Status::Pass)] {
            assert_eq!(run(&demonstrations(count)).status, status, "{count} demonstrations");
        }
        let thumbs = |good, bad| (0..good + bad).map(|number| row(number, Some(number < good))).collect::<Vec<_>>();
        for (good, bad, status) in
            [(500, 500, Status::Pass), (2000, 400, Status::Warn), (2000, 40, Status::Fail), (5000, 0, Status::Fail)]
        {
            assert_eq!(run(&thumbs(good, bad)).status, status, "{good} good, {bad} bad");
        }
    }

    #[test]
    fn the_kind_with_enough_decides_and_the_others_are_told() {
        let mut rows = generate::clean(600, 2);
        rows.extend((0..3).map(|number| row(number, None)));
        let check = run(&rows);
        assert_eq!((check.status, check.value), (Status::Pass, Some(600.0)));
        assert!(check.explanation.contains("3 demonstrations (100 wanted, 10 needed)"), "{}", check.explanation);
    }

    #[test]
    fn rows_that_are_dropped_do_not_count() {
        let rows = generate::clean(60, 3);
        let mut findings = Findings::new(&rows);
        (0..20).for_each(|index| findings.add(index, "validity", Keep::Drop, "broken"));
        (20..40).for_each(|index| findings.add(index, "injection", Keep::Review, "odd"));
        let check = check(&rows, &Thresholds::default(), &findings);
        assert_eq!((check.status, check.value), (Status::Fail, Some(40.0)));
    }
}
