//! Queues of pairs that people compare, here and in other tools.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, count, either, flag, just, list, list_of, map, named, nullable, number, number_in, page, seconds, text, text_of,
    uuid, whole, word,
};
use serde_json::{Value, json};
use tidemill_store::Scope;

const TAG: &str = "labeling";
const TOOLS: &str = "labeling in other tools";

/// `/v1/labeling`
pub fn topic() -> Topic {
    let operations = queues().into_iter().chain(work()).chain(tools()).collect();
    let schemas = vec![
        ("Queue", queue()),
        ("Progress", progress()),
        ("Task", task()),
        ("Given", given().schema()),
        ("ImportSummary", summary()),
        ("PromptOrMessages", prompt()),
    ];
    Topic { operations, schemas }
}

fn of_train(operation: Operation) -> Operation {
    operation.scope(Scope::Train).refuses(&[404, 503])
}

fn queues() -> Vec<Operation> {
    let rule = Object::request()
        .with("from", word(&["traffic", "upload"]))
        .sometimes("share", json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1}))
        .sometimes("low_thumb", flag())
        .may("mean_logprob_below", json!({"type": "number", "maximum": 0}))
        .sometimes("models", list(text()))
        .sometimes("variants", list(text()))
        .sometimes("compare", flag())
        .sometimes("max_open", whole(1, 1_000_000));
    let new = Object::request()
        .with("name", json!({"type": "string", "minLength": 1, "maxLength": 100, "pattern": "\\S"}))
        .may("rule", rule.schema())
        .may("include_past", flag())
        .may("guidelines", text_of(0, 50_000))
        .may("overlap", whole(1, 50))
        .may("gold_share", number_in(0.0, 0.5))
        .may("lease_seconds", whole(10, 86_400));
    let change = Object::request().may("closed", flag()).may("guidelines", text_of(0, 50_000));
    let known = || Object::answer().with("added", count()).with("known", count()).schema();
    let pair = Object::request()
        .with("prompt", named("PromptOrMessages"))
        .with("answer_a", text())
        .with("answer_b", text())
        .may("gold", word(&["a", "b", "tie", "both_bad"]))
        .may("source", text_of(0, 500));
    let brief = Object::answer().with("id", uuid()).with("name", text()).with("guidelines", text()).with("closed", flag());
    let failure = Object::answer().with("source", text()).with("reason", text());
    vec![
        Operation::get("/v1/labeling/queues", TAG, "Queues; annotators see no more of them than they need")
            .either_scope([Scope::Label, Scope::Train])
            .answers(200, "All of them.", page(either([named("Queue"), brief.schema()])).schema())
            .refuses(&[503]),
        Operation::post("/v1/labeling/queues", TAG, "Make a queue")
            .scope(Scope::Train)
            .takes(new.schema())
            .answers(201, "The queue.", named("Queue"))
            .refuses(&[409]),
        of_train(Operation::get("/v1/labeling/queues/{queue}", TAG, "One queue, by id or name")).answers(
            200,
            "The queue.",
            json!({"allOf": [named("Queue"), Object::answer().with("failures", list(failure.schema())).schema()]}),
        ),
        of_train(Operation::patch("/v1/labeling/queues/{queue}", TAG, "Close, open, or explain it anew"))
            .takes(change.schema())
            .answers(200, "The queue.", named("Queue")),
        of_train(Operation::get("/v1/labeling/queues/{queue}/tasks", TAG, "Its pairs"))
            .query("state", word(&["open", "done"]))
            .query("after", uuid())
            .query("limit", whole(1, 1000))
            .answers(200, "A page of them.", page(named("Task")).with("has_more", flag()).schema()),
        of_train(Operation::post("/v1/labeling/queues/{queue}/tasks", TAG, "Add pairs"))
            .takes(Object::request().with("tasks", list_of(1, 10_000, pair.schema())).schema())
            .answers(201, "How many were new.", known()),
        of_train(Operation::post("/v1/labeling/queues/{queue}/prompts", TAG, "Add prompts, which get two fresh answers each"))
            .takes(
                Object::request()
                    .may("model", text_of(0, 500))
                    .with("prompts", list_of(1, 10_000, named("PromptOrMessages")))
                    .schema(),
            )
            .answers(202, "How many were new.", known())
            .refuses(&[409]),
        of_train(Operation::get("/v1/labeling/queues/{queue}/statistics", TAG, "What its verdicts say about people and page"))
            .answers(200, "Statistics.", statistics()),
    ]
}

/// A text, or messages.
fn prompt() -> Value {
    either([json!({"type": "string", "pattern": "\\S"}), json!({"type": "array", "items": named("Message"), "minItems": 1})])
}

fn queue() -> Value {
    Object::answer()
        .with("id", uuid())
        .with("object", just("labeling.queue"))
        .with("name", text())
        .with("created", seconds())
        .with("closed", flag())
        .with("rule", any())
        .with("guidelines", text())
        .with("overlap", count())
        .with("gold_share", number())
        .with("lease_seconds", count())
        .with("progress", named("Progress"))
        .schema()
}

fn progress() -> Value {
    let counts = ["tasks", "done", "verdicts", "leased", "gold", "gold_verdicts", "drafts", "failed", "wanted"];
    counts.into_iter().fold(Object::answer(), |object, name| object.with(name, count())).schema()
}

fn task() -> Value {
    Object::answer()
        .with("id", uuid())
        .with("queue_id", uuid())
        .with("created", count())
        .with("source", text())
        .with("prompt", any())
        .with("answer_a", text())
        .with("answer_b", text())
        .with("candidate_a", nullable(uuid()))
        .with("candidate_b", nullable(uuid()))
        .with("gold", nullable(text()))
        .with("verdicts", count())
        .with("done", flag())
        .schema()
}

fn statistics() -> Value {
    let verdicts =
        ["left", "right", "tie", "both_bad"].into_iter().fold(Object::answer(), |object, name| object.with(name, count()));
    Object::answer()
        .with("verdicts", verdicts.schema())
        .with("agreement", any())
        .with("position", any())
        .with("seconds", any())
        .with("raters", list(any()))
        .with("skips", list(Object::answer().with("reason", text()).with("count", count()).schema()))
        .with("queue", Object::answer().with("id", uuid()).with("name", text()).schema())
        .with("progress", named("Progress"))
        .schema()
}

/// A task as a page gets it, or why there is none.
fn given() -> Object {
    let turn = Object::answer().with("role", text()).with("text", text());
    let task = Object::answer()
        .with("assignment", uuid())
        .with("prompt", list(turn.schema()))
        .with("left", text())
        .with("right", text());
    let progress = Object::answer().with("completed", count()).with("wanted", count()).with("mine", count());
    Object::answer()
        .sometimes("task", nullable(task.schema()))
        .sometimes("why", word(&["closed", "waiting", "done", "yours_done"]))
        .sometimes("progress", progress.schema())
        .sometimes("assignment", uuid())
        .sometimes("feedback", nullable(uuid()))
        .sometimes("again", flag())
        .sometimes("withdrawn", nullable(uuid()))
}

fn work() -> Vec<Operation> {
    let of_label = |operation: Operation| operation.scope(Scope::Label).refuses(&[404, 409]);
    let who = || Object::request().may("annotator", text_of(0, 400));
    let sent = || who().may("latency_ms", whole(0, i64::from(u32::MAX))).may("next", flag());
    let verdict = sent().with("choice", word(&["left", "right", "tie", "both_bad"]));
    let skip = sent().with("reason", json!({"type": "string", "minLength": 1, "maxLength": 500, "pattern": "\\S"}));
    let me = Object::answer().with("annotator", nullable(text())).with("keyed", flag()).with("operator", flag());
    vec![
        Operation::get("/v1/labeling/me", TAG, "Who the server takes the caller for")
            .query("annotator", text())
            .answers(200, "The caller.", me.schema())
            .either_scope([Scope::Label, Scope::Train]),
        of_label(Operation::post("/v1/labeling/queues/{queue}/next", TAG, "A task, or why there is none"))
            .takes(who().schema())
            .answers(200, "The task.", named("Given")),
        of_label(Operation::post("/v1/labeling/queues/{queue}/undo", TAG, "Take the last judgement back"))
            .takes(who().schema())
            .answers(200, "Its task again, or another.", named("Given")),
        of_label(Operation::post("/v1/labeling/assignments/{id}/verdict", TAG, "Which answer is better"))
            .takes(verdict.schema())
            .answers(200, "It is kept.", named("Given")),
        of_label(Operation::post("/v1/labeling/assignments/{id}/skip", TAG, "Pass over a task, and say why"))
            .takes(skip.schema())
            .answers(200, "It is noted.", named("Given")),
    ]
}

fn summary() -> Value {
    let refusal = Object::answer().with("place", text()).with("message", text());
    let counts = ["recorded", "edited", "withdrawn", "skipped", "gold", "unchanged", "silent", "refused"];
    let counted = counts.into_iter().fold(Object::answer(), |object, name| object.with(name, count()));
    counted.with("refusals", list(refusal.schema())).schema()
}

fn tools() -> Vec<Operation> {
    let pages = |path: &'static str, summary: &'static str| {
        of_train(Operation::get(path, TOOLS, summary))
            .query("after", uuid())
            .query("limit", whole(1, 10_000))
            .query("state", word(&["any", "open", "done"]))
            .answers(200, "A page; `x-next-after` says where the next one begins.", list(map(any())))
    };
    let back = |operation: Operation| operation.scope(Scope::Feedback).refuses(&[404]).takes(any());
    let import = |path: &'static str, summary: &'static str| {
        back(Operation::post(path, TOOLS, summary)).query("all_submitted", flag()).answers(
            200,
            "What became of it.",
            named("ImportSummary"),
        )
    };
    vec![
        of_train(Operation::get("/v1/labeling/queues/{queue}/label-studio/config", TOOLS, "Label Studio's labeling interface"))
            .answers_as(200, "Its XML.", "application/xml", text()),
        of_train(Operation::get("/v1/labeling/queues/{queue}/label-studio/project", TOOLS, "A project for Label Studio"))
            .answers(200, "What its API takes.", map(any())),
        pages("/v1/labeling/queues/{queue}/label-studio/tasks", "Tasks for Label Studio"),
        import("/v1/labeling/queues/{queue}/label-studio/import", "Take Label Studio's export"),
        back(Operation::post("/v1/labeling/queues/{queue}/label-studio/webhook", TOOLS, "Label Studio's events"))
            .answers(
                200,
                "What became of it.",
                either([named("ImportSummary"), Object::answer().with("ignored", text()).schema()]),
            )
            .refuses(&[422]),
        of_train(Operation::get("/v1/labeling/queues/{queue}/argilla/settings", TOOLS, "A dataset for Argilla")).answers(
            200,
            "What its API takes.",
            map(any()),
        ),
        pages("/v1/labeling/queues/{queue}/argilla/records", "Records for Argilla"),
        import("/v1/labeling/queues/{queue}/argilla/import", "Take Argilla's export"),
    ]
}
