//! Snapshots of feedback.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, count, flag, just, list, map, named, nullable, number, number_in, page, seconds, text, uuid, whole, word,
};
use serde_json::{Value, json};
use tidemill_store::Scope;

const TAG: &str = "datasets";

/// `/v1/datasets`
pub fn topic() -> Topic {
    let of_train = |operation: Operation| operation.scope(Scope::Train).refuses(&[503]);
    let looks = |operation: Operation| operation.either_scope([Scope::Train, Scope::Look]).refuses(&[404, 503]);
    let selected = |operation: Operation| {
        operation.query("kind", word(&["preference", "unpaired", "demonstration"])).query("split", word(&["train", "held_out"]))
    };
    let new = Object::request().with("name", text()).may("query", named("DatasetQuery"));
    let listed =
        page(named("Dataset")).with("first_id", nullable(text())).with("last_id", nullable(text())).with("has_more", flag());
    let rows = page(map(any())).with("offset", count()).with("has_more", flag());
    let operations = vec![
        of_train(Operation::post("/v1/datasets", TAG, "Build a snapshot")).takes(new.schema()).answers(
            202,
            "The build that was begun.",
            named("DatasetBuild"),
        ),
        looks(Operation::get("/v1/datasets", TAG, "Snapshots, the newest first"))
            .query("name", text())
            .query("after", text())
            .query("limit", whole(0, 100))
            .answers(200, "A page of them.", listed.schema()),
        looks(Operation::get("/v1/datasets/builds/{id}", TAG, "How far a build is")).answers(
            200,
            "The build.",
            named("DatasetBuild"),
        ),
        of_train(Operation::post("/v1/datasets/builds/{id}/cancel", TAG, "Stop a build"))
            .refuses(&[404])
            .answers(200, "The build.", named("DatasetBuild"))
            .refuses(&[409]),
        looks(Operation::get("/v1/datasets/{reference}", TAG, "One snapshot, as NAME, NAME@VERSION or its hash")).answers(
            200,
            "The snapshot, with its report.",
            named("Dataset"),
        ),
        selected(looks(Operation::get("/v1/datasets/{reference}/rows", TAG, "Its rows")))
            .query("offset", json!({"type": "integer", "minimum": 0, "maximum": i64::MAX}))
            .query("limit", whole(0, 1000))
            .answers(200, "A page of them.", rows.schema()),
        looks(Operation::get("/v1/datasets/{reference}/report", TAG, "What is good and bad about it"))
            .query("format", word(&["json", "html"]))
            .answers(200, "The report.", any())
            .answers_as(200, "The report.", "text/html", text()),
        selected(looks(Operation::get("/v1/datasets/{reference}/export", TAG, "Its rows in a trainer's form")))
            .query("format", word(&["trl", "openai", "tidemill"]))
            .answers_as(200, "One object a line.", "application/jsonl", text())
            .refuses(&[410]),
    ];
    Topic { operations, schemas: vec![("Dataset", dataset()), ("DatasetBuild", build()), ("DatasetQuery", query())] }
}

fn dataset() -> Value {
    Object::answer()
        .with("id", text())
        .with("object", just("dataset"))
        .with("name", text())
        .with("version", count())
        .with("created", seconds())
        .with("content_hash", text())
        .with("location", text())
        .with("table_version", count())
        .with("counts", any())
        .with("verdict", any())
        .with("tainted", any())
        .with("query", any())
        .sometimes("report", any())
        .schema()
}

fn build() -> Value {
    Object::answer()
        .with("id", uuid())
        .with("object", just("dataset.build"))
        .with("created", seconds())
        .with("status", text())
        .with("name", text())
        .with("query", any())
        .with("dataset", any())
        .with("verdict", any())
        .with("progress", any())
        .with("error", nullable(text()))
        .schema()
}

/// Here null is not the same as nothing, but for what may be absent.
fn query() -> Value {
    let words = |words: &[&str]| list(word(words));
    let texts = || list(text());
    let time = || nullable(json!({"type": ["integer", "string"]}));
    let range = Object::request().with("name", text()).may("min", number()).may("max", number());
    let label = Object::request().with("name", text()).with("good", number()).with("bad", number());
    let most = whole(1, i64::MAX);
    Object::request()
        .sometimes("rows", words(&["preference", "unpaired", "demonstration"]))
        .sometimes("from", words(&["comparison", "correction", "rating", "thumb", "metric"]))
        .sometimes("models", texts())
        .sometimes("variants", texts())
        .sometimes("tags", texts())
        .sometimes("exclude_tags", texts())
        .sometimes("sources", texts())
        .sometimes("exclude_users", texts())
        .sometimes("exclude_raters", texts())
        .sometimes("since", time())
        .sometimes("until", time())
        .sometimes("min_raters", most.clone())
        .sometimes("raters", word(&["majority", "each"]))
        .sometimes("margin", json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1}))
        .sometimes("max_pairs_per_prompt", most.clone())
        .sometimes("metrics", list(range.schema()))
        .sometimes("labels", list(label.schema()))
        .may("max_rows_per_user", most.clone())
        .may("max_rows_per_rater", most)
        .sometimes("truncated", flag())
        .sometimes("held_out", number_in(0.0, 0.5))
        .sometimes("seed", whole(0, i64::MAX))
        .schema()
}
