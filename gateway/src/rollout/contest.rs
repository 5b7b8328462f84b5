//! What people said of two arms' answers beside each other, as verdicts on the treatment. Values only.

use crate::rollout::statistics::Verdicts;
use serde_json::Value;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use tidemill_store::{Candidate, Comparison};

/// Verdicts on the treatment by the place where it was shown: first, and second. Who said something often counts once, by what they
/// said more often, at the place where they saw it first.
pub fn verdicts(comparisons: &[Comparison]) -> (Verdicts, Verdicts) {
    let mut units: BTreeMap<i64, (i64, bool)> = BTreeMap::new();
    for comparison in comparisons {
        let of = |arm: u32| comparison.candidates.iter().find(|candidate| candidate.arm == arm);
        let (Some(control), Some(treatment)) = (of(0), of(1)) else { continue };
        let (Some(better), Some(first)) =
            (better(&comparison.value, treatment, control), shown_first(&comparison.value, treatment, control))
        else {
            continue;
        };
        let entry = units.entry(comparison.unit).or_insert((0, first));
        entry.0 += better as i64;
    }
    let (mut first, mut second) = (Verdicts::default(), Verdicts::default());
    for (score, shown_first) in units.into_values() {
        let place = if shown_first { &mut first } else { &mut second };
        match score.cmp(&0) {
            Ordering::Greater => place.won += 1,
            Ordering::Equal => place.tied += 1,
            Ordering::Less => place.lost += 1,
        }
    }
    (first, second)
}

/// Whether the treatment is better, by the judgement's ranking, which has the best first and ties together. Two that are both bad and
/// not ranked are tied; of what was not judged nothing is known.
fn better(value: &Value, treatment: &Candidate, control: &Candidate) -> Option<Ordering> {
    let ranking = value["ranking"].as_array();
    let rank = |candidate: &Candidate| ranking?.iter().position(|group| holds(group, &candidate.id));
    match (rank(treatment), rank(control)) {
        (Some(treatment), Some(control)) => Some(control.cmp(&treatment)),
        _ => (value["both_bad"] == true).then_some(Ordering::Equal),
    }
}

/// By what whoever judged says to have been shown, else as they were given out.
fn shown_first(value: &Value, treatment: &Candidate, control: &Candidate) -> Option<bool> {
    let shown = value["shown"].as_array();
    let seen = |candidate: &Candidate| shown?.iter().position(|id| id == candidate.id.as_str());
    let places = seen(treatment).zip(seen(control)).map(|(treatment, control)| treatment < control);
    places.or_else(|| treatment.place.zip(control.place).map(|(treatment, control)| treatment < control))
}

fn holds(group: &Value, id: &str) -> bool {
    group.as_array().is_some_and(|ids| ids.iter().any(|known| known == id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The control's answer is `c`, the treatment's `t`, which stood at this place.
    fn said(unit: i64, treatment_place: u32, value: Value) -> Comparison {
        let candidate = |id: &str, arm, place| Candidate { id: id.into(), arm, place: Some(place) };
        let candidates = vec![candidate("c", 0, 1 - treatment_place), candidate("t", 1, treatment_place)];
        Comparison { unit, value, candidates }
    }

    fn won() -> Value {
        json!({"ranking": [["t"], ["c"]]})
    }

    fn lost() -> Value {
        json!({"ranking": [["c"], ["t"]]})
    }

    #[test]
    fn verdicts_are_told_apart_by_place_and_a_person_counts_once() {
        let all = [
            said(1, 0, won()),
            said(2, 1, won()),
            said(3, 1, lost()),
            said(4, 0, json!({"ranking": [["c", "t"]]})),
            said(5, 0, json!({"both_bad": true})),
            // Twice better, once worse.
            said(6, 0, won()),
            said(6, 0, lost()),
            said(6, 0, won()),
            // As often better as worse.
            said(7, 1, won()),
            said(7, 1, lost()),
        ];
        let (first, second) = verdicts(&all);
        assert_eq!(first, Verdicts { won: 2, tied: 2, lost: 0 });
        assert_eq!(second, Verdicts { won: 1, tied: 1, lost: 1 });
    }

    #[test]
    fn what_was_really_shown_goes_before_what_was_given_out_and_half_a_pair_is_none() {
        let turned = said(1, 0, json!({"ranking": [["t"], ["c"]], "shown": ["c", "t"]}));
        assert_eq!(verdicts(&[turned]).1.won, 1);
        let mut half = said(1, 0, won());
        half.candidates.pop();
        let unknown = said(2, 0, json!({"ranking": [["t"]]}));
        let mut nowhere = said(3, 0, won());
        nowhere.candidates[0].place = None;
        assert_eq!(verdicts(&[half, unknown, nowhere]), (Verdicts::default(), Verdicts::default()));
    }
}
