//! The audit and the lineage.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{Object, any, flag, just, map, named, nullable, number_in, page, seconds, text, uuid, whole, word};
use tidemill_store::Scope;

const TAG: &str = "governance";

/// `/v1/audit` and `/v1/lineage`
pub fn topic() -> Topic {
    let looks = |path, summary| Operation::get(path, TAG, summary).scope(Scope::Look).refuses(&[503]);
    let entry = Object::answer()
        .with("id", uuid())
        .with("object", just("audit.entry"))
        .with("created_at", seconds())
        .with("actor", text())
        .with("key_id", nullable(text()))
        .with("action", text())
        .with("subject", text())
        .with("detail", any());
    let listed =
        page(named("AuditEntry")).with("first_id", nullable(uuid())).with("last_id", nullable(uuid())).with("has_more", flag());
    let operations = vec![
        looks("/v1/audit", "Who did what to what, the newest first")
            .query("since", number_in(0.0, 1e11))
            .query("until", number_in(0.0, 1e11))
            .query("by", text())
            .query("what", text())
            .query("on", text())
            .query("after", uuid())
            .query("limit", whole(1, 1000))
            .query("order", word(&["asc", "desc"]))
            .answers(200, "A page of acts.", listed.schema()),
        looks("/v1/lineage/{id}", "Where an answer comes from, and what came of a judgement, a rater, a row or a dataset")
            .query("rows", flag())
            .query("limit", whole(1, 1000))
            .refuses(&[404])
            .answers(200, "What is known; `of` says of what.", map(any())),
    ];
    Topic { operations, schemas: vec![("AuditEntry", entry.schema())] }
}
