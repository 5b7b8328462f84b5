//! Every kind, and every rejection by its field.

use super::*;
use crate::feedback::{MetricKind, Optimize};
use serde_json::{Value, json};

const A: Uuid = Uuid::from_u128(0xa);
const B: Uuid = Uuid::from_u128(0xb);
const C: Uuid = Uuid::from_u128(0xc);

fn metrics() -> Metrics {
    let metric = |kind, min, max, closed, level| Metric { kind, optimize: Optimize::Max, min, max, closed, level };
    [
        ("score".to_owned(), metric(MetricKind::Number, Some(0.0), Some(10.0), false, None)),
        ("solved".to_owned(), metric(MetricKind::Boolean, None, None, false, Some(TargetKind::Conversation))),
        ("old".to_owned(), metric(MetricKind::Boolean, None, None, true, None)),
    ]
    .into()
}

fn parse(body: Value) -> Result<Submission, ApiError> {
    let metrics = metrics();
    let issued = |id| [A, B, C].contains(&id);
    Submission::parse(Fields::root(&body)?, &Rules { metrics: &metrics, issued: &issued })
}

fn made(body: Value) -> Feedback {
    parse(body).unwrap().into_feedback(C, 7, Some("key".into()))
}

#[test]
fn thumbs_are_flags_or_words() {
    for (value, up) in [(json!(true), true), (json!(false), false), (json!("up"), true), (json!("down"), false)] {
        let feedback = made(json!({"target": format!("chatcmpl-{A}"), "kind": "thumb", "value": value}));
        assert_eq!((&feedback.value, feedback.number), (&json!(up), Some(f64::from(u8::from(up)))));
        assert_eq!((feedback.target, feedback.target_kind), (A.to_string(), TargetKind::Completion));
        assert_eq!((feedback.source.as_deref(), feedback.key_id.as_deref()), (Some("api"), Some("key")));
    }
}

#[test]
fn a_rating_counts_from_0_to_1_and_its_scale_is_kept() {
    assert_eq!(made(json!({"target": A, "kind": "rating", "value": 0.3})).number, Some(0.3));
    let stars = made(json!({"target": A, "kind": "rating", "value": 4, "scale": [1, 5]}));
    assert_eq!((stars.number, stars.value), (Some(0.75), json!({"given": 4, "scale": [1, 5]})));
}

#[test]
fn a_comparison_has_every_candidate_in_its_place() {
    let value = |extra: Value| {
        let mut value = json!({"candidates": [A, format!("chatcmpl-{B}"), C]});
        value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({"kind": "comparison", "value": value})
    };
    for (said, ranking, both_bad) in [
        (json!({"ranking": [C, [A, B]]}), json!([[C], [A, B]]), false),
        (json!({"winner": B}), json!([[B], [A, C]]), false),
        (json!({"tie": true}), json!([[A, B, C]]), false),
        (json!({"both_bad": true}), json!([[A, B, C]]), true),
        (json!({"both_bad": true, "winner": A}), json!([[A], [B, C]]), true),
    ] {
        let feedback = made(value(said));
        assert_eq!(feedback.value, json!({"candidates": [A, B, C], "ranking": ranking, "both_bad": both_bad}));
        assert_eq!(feedback.targets, [A, B, C].map(|id| id.to_string()));
        assert_eq!((feedback.target, feedback.number), (A.to_string(), None));
    }
    let mut with_order = value(json!({"tie": true}));
    with_order["shown"] = json!([C, A, B]);
    assert_eq!(made(with_order).value["shown"], json!([C, A, B]));
}

#[test]
fn everything_else_is_kept_as_it_was_sent() {
    let feedback = made(json!({
        "target": "chat-17", "kind": "metric", "metric": "solved", "value": true, "author": "ann", "source": "app", "latency_ms": 900,
        "tags": ["a", "b"], "idempotency_key": "k",
    }));
    assert_eq!((feedback.target.as_str(), feedback.target_kind), ("chat-17", TargetKind::Conversation));
    assert_eq!((feedback.metric.as_deref(), feedback.number), (Some("solved"), Some(1.0)));
    assert_eq!(
        (feedback.author.as_deref(), feedback.source.as_deref(), feedback.latency_ms),
        (Some("ann"), Some("app"), Some(900))
    );
    assert_eq!((feedback.tags, feedback.idempotency_key.as_deref()), (vec!["a".to_owned(), "b".to_owned()], Some("k")));
    assert_eq!((feedback.id, feedback.created, feedback.revision, feedback.withdrawn), (C, 7, 1, false));
    for kind in ["correction", "comment"] {
        assert_eq!(made(json!({"target": A, "kind": kind, "value": "better"})).value, json!("better"));
    }
}

#[test]
fn each_rejection_names_its_field() {
    let other = Uuid::from_u128(0xf);
    let compare = |value: Value| json!({"kind": "comparison", "value": value});
    let long = "x".repeat(257);
    let cases = [
        (json!({"target": A, "value": true}), "kind", "missing_required_parameter"),
        (json!({"target": A, "kind": "smile", "value": true}), "kind", "invalid_value"),
        (json!({"target": A, "kind": "thumb"}), "value", "missing_required_parameter"),
        (json!({"kind": "thumb", "value": true}), "target", "missing_required_parameter"),
        (json!({"target": A, "kind": "thumb", "value": 1}), "value", "invalid_type"),
        (json!({"target": A, "kind": "thumb", "value": "sideways"}), "value", "invalid_value"),
        (json!({"target": format!("chatcmpl-{other}"), "kind": "thumb", "value": true}), "target", "target_not_found"),
        (json!({"target": other, "target_kind": "completion", "kind": "thumb", "value": true}), "target", "target_not_found"),
        (json!({"target": A, "target_kind": "planet", "kind": "thumb", "value": true}), "target_kind", "invalid_value"),
        (json!({"target": "", "kind": "thumb", "value": true}), "target", "string_below_min_length"),
        (json!({"target": long, "kind": "thumb", "value": true}), "target", "string_above_max_length"),
        (json!({"target": A, "kind": "rating", "value": 1.1}), "value", "decimal_above_max_value"),
        (json!({"target": A, "kind": "rating", "value": 0, "scale": [1, 5]}), "value", "decimal_below_min_value"),
        (json!({"target": A, "kind": "rating", "value": 1, "scale": [5, 1]}), "scale", "invalid_value"),
        (json!({"target": A, "kind": "rating", "value": 1, "scale": [5]}), "scale", "array_below_min_length"),
        (json!({"target": A, "kind": "rating", "value": 1, "scale": [1, "x"]}), "scale.1", "invalid_type"),
        (json!({"target": A, "kind": "thumb", "value": true, "scale": [1, 5]}), "scale", "invalid_value"),
        (json!({"target": A, "kind": "thumb", "value": true, "shown": [A]}), "shown", "invalid_value"),
        (json!({"target": A, "kind": "comment", "value": " "}), "value", "string_below_min_length"),
        (json!({"target": A, "kind": "correction", "value": ""}), "value", "string_below_min_length"),
        (json!({"target": A, "kind": "metric", "value": 1}), "metric", "missing_required_parameter"),
        (json!({"target": A, "kind": "metric", "metric": "charm", "value": 1}), "metric", "unknown_metric"),
        (json!({"target": A, "kind": "metric", "metric": "old", "value": true}), "metric", "metric_closed"),
        (json!({"target": A, "kind": "metric", "metric": "score", "value": 11}), "value", "decimal_above_max_value"),
        (json!({"target": A, "kind": "metric", "metric": "score", "value": true}), "value", "invalid_type"),
        (json!({"target": A, "kind": "metric", "metric": "solved", "value": true}), "metric", "invalid_value"),
        (json!({"target": A, "kind": "thumb", "metric": "score", "value": true}), "metric", "invalid_value"),
        (compare(json!("left")), "value", "invalid_type"),
        (compare(json!({"candidates": [A], "tie": true})), "value.candidates", "array_below_min_length"),
        (compare(json!({"candidates": [A, A], "tie": true})), "value.candidates.1", "invalid_value"),
        (compare(json!({"candidates": [A, other], "tie": true})), "value.candidates.1", "target_not_found"),
        (compare(json!({"candidates": [A, B]})), "value", "invalid_value"),
        (compare(json!({"candidates": [A, B], "winner": A, "tie": true})), "value", "invalid_value"),
        (compare(json!({"candidates": [A, B], "winner": C})), "value.winner", "invalid_value"),
        (compare(json!({"candidates": [A, B], "ranking": [A]})), "value.ranking", "invalid_value"),
        (compare(json!({"candidates": [A, B], "ranking": [A, [A, B]]})), "value.ranking", "invalid_value"),
        (compare(json!({"candidates": [A, B], "ranking": [A, [C]]})), "value.ranking.1.0", "invalid_value"),
        (compare(json!({"candidates": [A, B], "tie": true, "shown": [A]})), "value.shown", "invalid_value"),
        (compare(json!({"candidates": [A, B], "tie": true, "mood": 1})), "value.mood", "unknown_parameter"),
        (json!({"target": C, "kind": "comparison", "value": {"candidates": [A, B], "tie": true}}), "target", "invalid_value"),
        (json!({"target": A, "kind": "thumb", "value": true, "latency_ms": -1}), "latency_ms", "integer_below_min_value"),
        (json!({"target": A, "kind": "thumb", "value": true, "tags": ["a", ""]}), "tags.1", "string_below_min_length"),
        (json!({"target": A, "kind": "thumb", "value": true, "author": ""}), "author", "string_below_min_length"),
        (json!({"target": A, "kind": "thumb", "value": true, "colour": 1}), "colour", "unknown_parameter"),
    ];
    for (body, param, code) in cases {
        let error = parse(body.clone()).unwrap_err();
        assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{body}");
        assert!(error.status.is_client_error());
    }
}

#[test]
fn an_edit_keeps_to_the_kind_and_cannot_move_the_target() {
    let metrics = metrics();
    let issued = |id| [A, B, C].contains(&id);
    let rules = Rules { metrics: &metrics, issued: &issued };
    let before = made(json!({"target": A, "kind": "thumb", "value": true, "author": "ann"}));
    let edit = |body: &Value| Edit::parse(Fields::root(body).unwrap(), &before, &rules);
    let change = edit(&json!({"value": false, "tags": ["late"]})).unwrap().into_change();
    assert_eq!((change.value, change.tags, change.author), (Some((json!(false), Some(0.0))), Some(vec!["late".into()]), None));
    assert_eq!(edit(&json!({"value": 0.5})).unwrap_err().param.as_deref(), Some("value"));
    assert_eq!(edit(&json!({"target": B})).unwrap_err().param.as_deref(), Some("target"));
    assert_eq!(edit(&json!({"kind": "rating"})).unwrap_err().param.as_deref(), Some("kind"));
}

#[test]
fn an_edit_of_a_value_means_the_scale_and_the_order_that_it_had() {
    let metrics = metrics();
    let issued = |id| [A, B, C].contains(&id);
    let rules = Rules { metrics: &metrics, issued: &issued };
    let edit = |before: &Feedback, body: Value| -> Result<(Value, Option<f64>), ApiError> {
        Ok(Edit::parse(Fields::root(&body).unwrap(), before, &rules)?.into_change().value.unwrap())
    };
    let stars = made(json!({"target": A, "kind": "rating", "value": 4, "scale": [1, 5]}));
    assert_eq!(
        edit(&stars, json!({"value": 1})).unwrap(),
        (json!({"given": 1, "scale": [1, 5]}), Some(0.0)),
        "one star is the worst"
    );
    assert_eq!(edit(&stars, json!({"value": 1, "scale": [0, 1]})).unwrap().1, Some(1.0));
    assert_eq!(edit(&stars, json!({"value": 6})).unwrap_err().param.as_deref(), Some("value"));
    assert_eq!(edit(&stars, json!({"scale": [0, 9]})).unwrap_err().code.as_deref(), Some("invalid_value"));
    let compared = |candidates: Value, shown: Value| json!({"kind": "comparison", "value": {"candidates": candidates, "tie": true}, "shown": shown});
    let pair = made(compared(json!([A, B]), json!([B, A])));
    let again = |candidates: Value| edit(&pair, json!({"value": {"candidates": candidates, "winner": A}})).unwrap().0;
    assert_eq!(again(json!([A, B]))["shown"], json!([B, A]));
    assert_eq!(again(json!([A, C])).get("shown"), None, "other candidates were not shown in that order");
}
