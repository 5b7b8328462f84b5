//! Judgements.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, count, either, filled, flag, just, list, list_of, named, nothing, nullable, number, number_in, page, seconds,
    text, uuid, whole, word,
};
use serde_json::{Value, json};
use tidemill_store::Scope;

const TAG: &str = "feedback";
const KINDS: [&str; 6] = ["thumb", "rating", "comparison", "correction", "metric", "comment"];

/// `/v1/feedback`
pub fn topic() -> Topic {
    let one = "/v1/feedback/{id}";
    let judges = |operation: Operation| operation.scope(Scope::Feedback).refuses(&[404, 503]);
    let result = Object::answer()
        .with("index", count())
        .with("status", whole(200, 499))
        .sometimes("id", uuid())
        .sometimes("duplicate", flag())
        .sometimes("error", any());
    let results = || page(result.clone().schema()).schema();
    let operations = vec![
        judges(Operation::post("/v1/feedback", TAG, "Judge an answer, a conversation or candidates; an array judges several"))
            .header("Idempotency-Key", json!({"type": "string", "pattern": "^[!-~]{1,200}$"}))
            .takes(either([named("NewFeedback"), list_of(1, 1000, any())]))
            .answers(200, "It was known by its idempotency key.", named("Feedback"))
            .answers(201, "It is kept; of an array, all are.", either([named("Feedback"), results()]))
            .answers(207, "Some of the array are kept.", results()),
        judges(Operation::get("/v1/feedback", TAG, "Judgements, the newest first"))
            .query("target", text())
            .query("kind", word(&KINDS))
            .query("metric", text())
            .query("author", text())
            .query("source", text())
            .query("tag", text())
            .query("task_id", uuid())
            .query("since", number_in(0.0, 1e11))
            .query("until", number_in(0.0, 1e11))
            .query("withdrawn", flag())
            .query("after", uuid())
            .query("limit", whole(1, 1000))
            .query("order", word(&["asc", "desc"]))
            .answers(200, "A page of them.", {
                let ids = page(named("Feedback")).with("first_id", nullable(uuid())).with("last_id", nullable(uuid()));
                ids.with("has_more", flag()).schema()
            }),
        judges(Operation::get(one, TAG, "One judgement")).answers(200, "It.", named("Feedback")),
        judges(Operation::patch(one, TAG, "Say it differently"))
            .takes(named("FeedbackEdit"))
            .answers(200, "As it is now.", named("Feedback"))
            .refuses(&[409]),
        judges(Operation::delete(one, TAG, "Withdraw it: it stays, marked, and counts for nothing")).answers(
            200,
            "As it is now.",
            named("Feedback"),
        ),
    ];
    Topic { operations, schemas: vec![("Feedback", feedback()), ("NewFeedback", new()), ("FeedbackEdit", edit())] }
}

fn feedback() -> Value {
    let text_or_none = || nullable(text());
    Object::answer()
        .with("id", uuid())
        .with("object", just("feedback"))
        .with("created", seconds())
        .with("updated", seconds())
        .with("revision", count())
        .with("withdrawn", flag())
        .with("target", text())
        .with("target_kind", word(&["completion", "conversation"]))
        .with("kind", word(&KINDS))
        .with("metric", text_or_none())
        .with("value", any())
        .with("number", nullable(number()))
        .with("author", text_or_none())
        .with("source", text_or_none())
        .with("latency_ms", nullable(count()))
        .with("tags", list(text()))
        .with("task_id", nullable(uuid()))
        .sometimes("duplicate", flag())
        .schema()
}

/// What comes with every judgement.
fn around() -> Object {
    Object::request()
        .may("author", filled(256))
        .may("source", filled(256))
        .may("latency_ms", whole(0, 31 * 24 * 3600 * 1000))
        .may("tags", list_of(0, 32, filled(64)))
}

fn ids() -> Value {
    list_of(2, 16, text())
}

fn comparison() -> Value {
    let place = either([text(), list_of(1, 16, text())]);
    Object::request()
        .with("candidates", ids())
        .may("ranking", list_of(1, 16, place))
        .may("winner", text())
        .may("tie", flag())
        .may("both_bad", flag())
        .may("shown", ids())
        .schema()
}

fn thumb() -> Value {
    either([flag(), word(&["up", "down"])])
}

fn scale() -> Value {
    list_of(2, 2, number_in(-1e9, 1e9))
}

fn new() -> Value {
    let kind =
        |name: &str, value: Value| around().with("kind", just(name)).with("value", value).may("idempotency_key", filled(256));
    let of_target = |object: Object| {
        object.with("target", filled(256)).may("target_kind", word(&["completion", "conversation"])).may("metric", nothing())
    };
    let plain = |name: &str, value: Value| of_target(kind(name, value)).may("scale", nothing()).may("shown", nothing()).schema();
    either([
        plain("thumb", thumb()),
        plain("correction", json!({"type": "string", "minLength": 1})),
        plain("comment", json!({"type": "string", "pattern": "\\S"})),
        // Without a scale, a rating goes from 0 to 1.
        of_target(kind("rating", number_in(0.0, 1.0))).may("scale", nothing()).may("shown", nothing()).schema(),
        of_target(kind("rating", number())).with("scale", scale()).may("shown", nothing()).schema(),
        of_target(kind("metric", either([flag(), number()])))
            .with("metric", text())
            .may("scale", nothing())
            .may("shown", nothing())
            .schema(),
        kind("comparison", comparison())
            .may("shown", ids())
            .may("scale", nothing())
            .may("metric", nothing())
            .may("target", text())
            .may("target_kind", word(&["completion", "conversation"]))
            .schema(),
    ])
}

fn edit() -> Value {
    let value = either([thumb(), number(), json!({"type": "string", "minLength": 1}), comparison()]);
    around()
        .may("value", value)
        .may("scale", scale())
        .may("shown", ids())
        .may("target", nothing())
        .may("target_kind", nothing())
        .may("kind", nothing())
        .may("metric", nothing())
        .may("idempotency_key", nothing())
        .schema()
}
