//! Against what Label Studio 1.23.2 wrote.

use super::*;
use crate::interchange::Choice;
use serde_json::json;
use tidemill_store::label::{External, Outcome, Verdict};
use uuid::Uuid;

/// What is spoilt, and what the error names.
type Case<'a> = (&'a dyn Fn(&mut Value), &'a str, &'a str);

fn sample(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn export() -> Vec<Value> {
    let export = sample(include_str!("../../../tests/samples/label-studio-1.23.2/export.json"));
    export.as_array().unwrap().clone()
}

fn created() -> Value {
    sample(include_str!("../../../tests/samples/label-studio-1.23.2/created.json"))
}

fn judged(event: Event) -> Vec<External> {
    match event {
        Event::Judged(reading) => {
            assert_eq!(reading.refused, []);
            reading.judgements
        }
        other => panic!("{other:?}"),
    }
}

fn task_number(n: u128) -> Uuid {
    Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + n)
}

fn queue() -> Queue {
    Queue {
        id: Uuid::from_u128(1),
        name: "pairs".into(),
        created: 1,
        closed: None,
        rule: json!({}),
        guidelines: "Prefer <b>short</b> & true.".into(),
        overlap: 3,
        gold_share: 0.1,
        lease_seconds: 60,
        filled_until: String::new(),
    }
}

fn pair(id: Uuid) -> Task {
    Task {
        id,
        queue_id: Uuid::from_u128(1),
        created: 1,
        source: "s".into(),
        prompt: json!([{"role": "user", "content": "Why?"}]),
        answer_a: "of A".into(),
        answer_b: "of B".into(),
        candidate_a: Some(Uuid::from_u128(91)),
        candidate_b: Some(Uuid::from_u128(92)),
        gold: Some(Verdict::A),
        verdicts: 0,
        done: false,
    }
}

#[test]
fn a_task_shows_prompt_and_answers_and_nothing_else() {
    let mut sides = [0, 0];
    for n in 0..64 {
        let exported = task(&queue(), &pair(task_number(n)));
        let keys: Vec<&String> = exported["data"].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["prompt", "answer1", "answer2", "tidemill_task"]);
        let text = exported.to_string();
        assert!(!text.contains("gold") && !text.contains(&Uuid::from_u128(91).to_string()), "{text}");
        let answer1 = exported["meta"]["tidemill"]["answer1"].as_str().unwrap();
        assert_eq!(exported["data"]["answer1"], format!("of {}", answer1.to_uppercase()));
        assert_ne!(exported["data"]["answer1"], exported["data"]["answer2"]);
        sides[usize::from(answer1 == "a")] += 1;
    }
    assert!(sides[0] > 16 && sides[1] > 16, "{sides:?}");
}

#[test]
fn the_project_has_the_overlap_and_guidelines_that_are_text() {
    let project = project(&queue());
    assert_eq!(project["maximum_annotations"], 3);
    assert!(project["expert_instruction"].as_str().unwrap().contains("Prefer &lt;b&gt;short&lt;/b&gt; &amp; true."));
    assert_eq!(project["show_instruction"], true);
    let plain = super::project(&Queue { guidelines: " ".into(), ..queue() });
    let long = super::project(&Queue { name: "ä".repeat(80), ..queue() });
    assert_eq!(long["title"].as_str().unwrap().chars().count(), 50, "the most that Label Studio takes");
    assert_eq!((&plain["expert_instruction"], &plain["show_instruction"]), (&json!(""), &json!(false)));
}

#[test]
fn an_export_says_who_judged_what() {
    let reading = read_export(&export());
    let refusals: Vec<(&str, bool)> =
        reading.refused.iter().map(|refusal| (refusal.place.as_str(), refusal.message.contains("nonsense"))).collect();
    assert_eq!(refusals, []);
    assert_eq!(reading.silent, 1, "the task whose annotations were deleted");
    // The n-th task has answer A first for even n.
    let said: Vec<_> = reading
        .judgements
        .iter()
        .map(|j| (j.task_id, j.annotator.as_str(), j.outcome, j.a_is_left, j.comment.as_deref(), j.latency_ms))
        .collect();
    let (one, two) = ("label-studio:1", "label-studio:2");
    assert_eq!(
        said,
        [
            (task_number(0), one, Outcome::Judged(Verdict::B), true, None, Some(3250)),
            (task_number(0), two, Outcome::Judged(Verdict::Tie), true, None, Some(6000)),
            (task_number(1), one, Outcome::Judged(Verdict::A), false, Some("it is shorter"), Some(1500)),
            (task_number(3), one, Outcome::Judged(Verdict::BothBad), false, None, Some(2125)),
            (task_number(4), one, Outcome::Skipped, true, Some("it is shorter"), Some(9000)),
            (task_number(5), one, Outcome::Gold(Verdict::B), false, None, Some(4000)),
        ]
    );
    assert!(reading.judgements.iter().all(|j| j.tool == "label-studio" && j.id.starts_with("2/") && j.version == j.finished));
}

#[test]
fn a_webhook_says_the_same_as_the_export_of_that_moment() {
    let first = judged(read_event(&created()).unwrap()).remove(0);
    assert_eq!((first.outcome, first.id.as_str()), (Outcome::Judged(Verdict::A), "2/7"));
    let updated = sample(include_str!("../../../tests/samples/label-studio-1.23.2/updated.json"));
    let second = judged(read_event(&updated).unwrap()).remove(0);
    assert!(second.version > first.version);
    assert_eq!(second, read_export(&export()).judgements[0]);
    let deleted = sample(include_str!("../../../tests/samples/label-studio-1.23.2/deleted.json"));
    assert_eq!(read_event(&deleted).unwrap(), Event::Deleted(vec!["2/9".into(), "2/14".into()]));
}

#[test]
fn a_bulk_webhook_has_lists() {
    let mut bulk = created();
    bulk["action"] = json!("ANNOTATIONS_CREATED");
    let (one, mut two) = (bulk["annotation"].clone(), bulk["annotation"].clone());
    two["id"] = json!(70);
    bulk["annotation"] = json!([one, two]);
    bulk["task"] = json!([bulk["task"]]);
    assert_eq!(judged(read_event(&bulk).unwrap()).len(), 2);
}

#[test]
fn other_actions_are_named_and_webhooks_without_payload_say_what_to_switch_on() {
    assert_eq!(read_event(&json!({"action": "TASKS_CREATED"})), Ok(Event::Other("TASKS_CREATED".into())));
    assert!(read_event(&json!({"action": "ANNOTATION_CREATED"})).unwrap_err().contains("Send payload"));
    assert!(
        read_event(&json!({"action": "ANNOTATIONS_DELETED", "annotations": [], "project": {}}))
            .unwrap_err()
            .contains("project.id")
    );
    assert!(read_event(&json!([])).unwrap_err().contains("'action' is missing"));
}

#[test]
fn what_cannot_be_read_is_refused_with_its_place() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut tasks = export();
        change(&mut tasks[0]);
        let reading = read_export(&tasks[..1]);
        assert!(!reading.refused.is_empty(), "{:?}", reading.judgements);
        (reading.refused[0].place.clone(), reading.refused[0].message.clone())
    };
    let cases: [Case<'_>; 9] = [
        (&|t| t["data"] = json!({"prompt": "x"}), "task 8", "no `data.tidemill_task`"),
        (&|t| t["data"]["tidemill_task"] = json!("12"), "task 8", "not the id of a task"),
        (&|t| t["meta"]["tidemill"]["answer1"] = json!("c"), "task 8", "neither \"a\" nor \"b\""),
        (&|t| t["annotations"][0]["updated_at"] = json!("yesterday"), "task 8, annotation 7", "not a time"),
        (&|t| t["annotations"][0]["completed_by"] = Value::Null, "task 8, annotation 7", "nobody made"),
        (
            &|t| t["annotations"][0]["result"][0]["value"] = json!({"selected": "up"}),
            "task 8, annotation 7",
            "neither left nor right",
        ),
        (
            &|t| t["annotations"][1]["result"][0]["value"] = json!({"choices": ["nonsense"]}),
            "task 8, annotation 13",
            "neither tie nor both_bad",
        ),
        (&|t| t["annotations"][0] = json!(7), "task 8, annotation null", "cannot be read"),
        (
            &|t| *t = sample(include_str!("../../../tests/samples/label-studio-1.23.2/export-min.json"))[0].clone(),
            "task 8",
            "JSON-MIN",
        ),
    ];
    for (change, place, message) in cases {
        let (at, said) = refused(change);
        assert_eq!(at, place);
        assert!(said.contains(message), "{said}");
    }
}

#[test]
fn a_side_and_a_verdict_together_are_refused_and_twice_the_same_is_not() {
    let with = |items: Value| {
        let mut tasks = export();
        tasks[0]["annotations"][0]["result"] = items;
        read_export(&tasks[..1])
    };
    let left = json!({"from_name": "comparison", "type": "pairwise", "value": {"selected": "left"}});
    let tie = json!({"from_name": "verdict", "type": "choices", "value": {"choices": ["Tie"]}});
    let bad = json!({"from_name": "verdict", "type": "choices", "value": {"choices": ["Both bad"]}});
    assert!(with(json!([left, tie])).refused[0].message.contains("which one is meant"));
    assert_eq!(with(json!([left, left])).judgements[0].outcome, Outcome::Judged(Choice::First.verdict(true)));
    assert_eq!(with(json!([bad])).judgements[0].outcome, Outcome::Judged(Verdict::BothBad));
    assert_eq!(with(json!([{"from_name": "topic", "value": {"choices": ["law"]}}])).judgements[0].outcome, Outcome::Open);
    assert_eq!(with(json!([])).judgements[0].outcome, Outcome::Open);
}

#[test]
fn a_rater_is_known_by_email_where_there_is_one_and_by_number_else() {
    let mut tasks = export();
    tasks[0]["annotations"][0]["completed_by"] = json!({"id": 9, "email": "eve@example.org", "first_name": ""});
    tasks[0]["annotations"][1]["completed_by"] = json!({"id": 9, "email": ""});
    let people: Vec<String> = read_export(&tasks[..1]).judgements.into_iter().map(|judgement| judgement.annotator).collect();
    assert_eq!(people, ["label-studio:eve@example.org", "label-studio:9"]);
}

#[test]
fn a_task_that_lost_its_meta_has_the_sides_that_its_id_says() {
    let mut tasks = export();
    tasks[0].as_object_mut().unwrap().remove("meta");
    assert_eq!(read_export(&tasks[..1]).judgements[0].a_is_left, first_is_a(task_number(0)));
}

#[test]
fn odd_lead_times_stay_in_range() {
    let mut tasks = export();
    for (lead, expected) in [(json!(-5.0), Some(0)), (json!(1e300), Some(86_400_000)), (Value::Null, None)] {
        tasks[0]["annotations"][0]["lead_time"] = lead;
        assert_eq!(read_export(&tasks[..1]).judgements[0].latency_ms, expected);
    }
}
