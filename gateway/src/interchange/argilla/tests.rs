//! Against what the SDK `argilla` 2.8.0 wrote.

use super::*;
use tidemill_store::label::{Outcome, Verdict};
use uuid::Uuid;

/// What is spoilt, and what the error names.
type Case<'a> = (&'a dyn Fn(&mut Value), &'a str, &'a str);

fn records(text: &str) -> Vec<Value> {
    let records: Value = serde_json::from_str(text).unwrap();
    records.as_array().unwrap().clone()
}

fn flat() -> Vec<Value> {
    records(include_str!("../../../tests/samples/argilla-2.8.0/flat.json"))
}

fn nested() -> Vec<Value> {
    records(include_str!("../../../tests/samples/argilla-2.8.0/nested.json"))
}

fn task_number(n: u128) -> Uuid {
    Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + n)
}

fn user(n: u128) -> String {
    format!("argilla:{}", Uuid::from_u128(n))
}

#[test]
fn a_flat_export_says_who_said_what() {
    let reading = read_records(&flat(), false);
    assert_eq!((reading.refused.len(), reading.silent), (0, 1));
    let said: Vec<_> = reading.judgements.iter().map(|j| (j.task_id, j.annotator.clone(), j.outcome, j.a_is_left)).collect();
    assert_eq!(
        said,
        [
            (task_number(0), user(5), Outcome::Judged(Verdict::A), true),
            (task_number(0), user(6), Outcome::Judged(Verdict::Tie), true),
            (task_number(1), user(5), Outcome::Judged(Verdict::B), false),
            (task_number(1), user(6), Outcome::Open, false),
            (task_number(1), user(7), Outcome::Skipped, false),
        ]
    );
    assert_eq!(reading.judgements[0].comment.as_deref(), Some("it is shorter"));
    assert_eq!((reading.judgements[0].version, reading.judgements[0].finished), (None, None));
}

#[test]
fn without_a_status_nothing_is_taken_unless_all_were_submitted() {
    let careful = read_records(&nested(), false);
    assert_eq!((careful.judgements.len(), careful.refused.len(), careful.silent), (0, 5, 1));
    assert!(careful.refused[0].message.contains("to_list(flatten=True)"), "{}", careful.refused[0].message);
    let trusting = read_records(&nested(), true);
    assert_eq!(trusting.refused, []);
    assert_eq!(trusting.judgements[..3], read_records(&flat(), false).judgements[..3]);
    assert_eq!(trusting.judgements[4].outcome, Outcome::Open, "discarded without a value");
}

#[test]
fn records_of_the_api_bring_their_times() {
    let record = json!({
        "id": "b1c2d3e4-0000-4000-8000-000000000001", "external_id": task_number(1), "status": "completed",
        "fields": {}, "metadata": {"tidemill_answer1": "b"},
        "responses": [
            {"id": "r", "user_id": Uuid::from_u128(5), "status": "submitted", "values": {"preference": {"value": "answer2"}, "comment": {"value": " "}},
             "inserted_at": "2026-11-22T14:00:00", "updated_at": "2026-11-22T14:04:53.469505"},
            {"id": "s", "user_id": Uuid::from_u128(6), "status": "discarded", "values": null, "updated_at": "2026-11-22T14:04:53"},
        ],
    });
    let reading = read_records(&[record], false);
    assert_eq!(reading.refused, []);
    let first = &reading.judgements[0];
    assert_eq!(
        (first.outcome, first.version, first.comment.as_deref()),
        (Outcome::Judged(Verdict::A), Some(1_795_356_293_469_505), None)
    );
    assert_eq!(first.id, format!("{}/{}", task_number(1), Uuid::from_u128(5)));
    assert_eq!(reading.judgements[1].outcome, Outcome::Skipped);
}

#[test]
fn what_cannot_be_read_is_refused_with_its_place() {
    let cases: [Case<'_>; 7] = [
        (&|r| r["id"] = json!("7"), "entry 0", "not the id of a task"),
        (&|r| r["id"] = Value::Null, "entry 0", "no `id`"),
        (&|r| r["tidemill_answer1"] = json!("x"), "record 0190", "neither \"a\" nor \"b\""),
        (&|r| r["preference.responses"][0] = json!("left"), "record 0190", "none of answer1"),
        (&|r| r["preference.responses"][0] = Value::Null, "record 0190", "without an answer"),
        (&|r| r["preference.responses.users"] = json!([]), "record 0190", "different lengths"),
        (&|r| r["preference.responses.status"][0] = json!("late"), "record 0190", "'late' is unknown"),
    ];
    for (change, place, message) in cases {
        let mut record = flat().remove(0);
        change(&mut record);
        let reading = read_records(&[record], false);
        let refusal = reading.refused.first().unwrap_or_else(|| panic!("{message}: {:?}", reading.judgements));
        assert!(refusal.place.starts_with(place) && refusal.message.contains(message), "{refusal:?}");
    }
    assert!(read_records(&[json!({"id": task_number(0)})], false).refused[0].message.contains("include=responses"));
}
