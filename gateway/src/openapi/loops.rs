//! Loops from feedback to adapters.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{Object, any, count, flag, just, list, map, named, nullable, page, seconds, text, whole, word};
use serde_json::Value;
use tidemill_rlhf::flywheel::Word;
use tidemill_store::Scope;

const TAG: &str = "loops";

/// `/v1/loops`
pub fn topic() -> Topic {
    let looks = |operation: Operation| operation.scope(Scope::Look).refuses(&[503]);
    let one = |operation: Operation| operation.refuses(&[404]).answers(200, "The loop.", named("Loop"));
    let want = |path, summary| one(Operation::post(path, TAG, summary).scope(Scope::Admin).refuses(&[503])).refuses(&[409]);
    let operations = vec![
        looks(Operation::get("/v1/loops", TAG, "The loops, by name")).answers(
            200,
            "Each with its last cycle.",
            page(named("Loop"))
                .with("first_id", nullable(text()))
                .with("last_id", nullable(text()))
                .with("has_more", flag())
                .schema(),
        ),
        one(looks(Operation::get("/v1/loops/{name}", TAG, "Where a loop stands, what it waits for, and its last cycles")))
            .query("cycles", whole(1, 100))
            .refuses(&[400]),
        want("/v1/loops/{name}/run", "Have a loop begin a cycle, whatever it waits for"),
        want("/v1/loops/{name}/pause", "Have a loop begin nothing more"),
        want("/v1/loops/{name}/resume", "Have a paused loop go on"),
    ];
    Topic { operations, schemas: vec![("Loop", shown()), ("LoopCycle", cycle())] }
}

fn words() -> Value {
    word(&Word::ALL.map(Word::as_str))
}

fn shown() -> Value {
    Object::answer()
        .with("id", text())
        .with("object", just("loop"))
        .with("configured", flag())
        .with("model", nullable(text()))
        .with("base", nullable(text()))
        .with("dataset", nullable(text()))
        .with("state", words())
        .with("paused", flag())
        .with("asked", nullable(text()))
        .with("cycle", count())
        .with("created_at", nullable(seconds()))
        .with("updated_at", nullable(seconds()))
        .with("waits_for", map(any()))
        .with("policy", nullable(map(any())))
        .with("cycles", list(named("LoopCycle")))
        .with("problem", nullable(text()))
        .schema()
}

fn cycle() -> Value {
    let finding = Object::answer().with("of", text()).with("found", text()).with("change", text());
    let step = Object::answer()
        .with("at", seconds())
        .with("state", words())
        .with("action", text())
        .with("by", text())
        .with("why", text())
        .with("numbers", any());
    Object::answer()
        .with("cycle", count())
        .with("began_at", nullable(seconds()))
        .with("ended_at", nullable(seconds()))
        .with("outcome", nullable(words()))
        .with("why", nullable(text()))
        .with("findings", nullable(list(finding.schema())))
        .with("steps", list(step.schema()))
        .schema()
}
