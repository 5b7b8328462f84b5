//! Files, and batches of requests in them.

use crate::openapi::Topic;
use crate::openapi::generation::metadata;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, count, flag, just, list, named, nullable, number, page, seconds, text, text_of, whole, word,
};
use serde_json::{Value, json};
use tidemill_store::Scope;

const FILES: &str = "files";
const BATCHES: &str = "batches";
/// An hour to thirty days.
const KEEP: (i64, i64) = (3600, 2_592_000);

/// `/v1/files` and `/v1/batches`
pub fn topic() -> Topic {
    let of_chat = |operation: Operation| operation.scope(Scope::Chat).refuses(&[503]);
    let of_files = |operation: Operation| operation.either_scope([Scope::Chat, Scope::Train]).refuses(&[503]);
    let one = |operation: Operation| of_chat(operation).refuses(&[404]);
    let one_file = |operation: Operation| of_files(operation).refuses(&[404]);
    let pages = |item: &str| {
        let ids = page(named(item)).with("first_id", nullable(text())).with("last_id", nullable(text()));
        ids.with("has_more", flag()).schema()
    };
    let expiry = Object::request().with("anchor", just("created_at")).with("seconds", whole(KEEP.0, KEEP.1));
    let new = Object::request()
        .with("input_file_id", text())
        .with("endpoint", word(&["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]))
        .with("completion_window", just("24h"))
        .may("metadata", metadata())
        .may("output_expires_after", expiry.schema());
    let deleted = Object::answer().with("id", text()).with("object", just("file")).with("deleted", flag());
    let operations = vec![
        of_files(Operation::post("/v1/files", FILES, "Send a file")).takes_as("multipart/form-data", upload()).answers(
            200,
            "The file.",
            named("File"),
        ),
        of_files(Operation::get("/v1/files", FILES, "Files, the newest first"))
            .query("purpose", text())
            .query("after", text())
            .query("limit", whole(1, 10_000))
            .query("order", word(&["asc", "desc"]))
            .answers(200, "A page of them.", pages("File")),
        one_file(Operation::get("/v1/files/{id}", FILES, "One file")).answers(200, "The file.", named("File")),
        one_file(Operation::delete("/v1/files/{id}", FILES, "Remove a file"))
            .answers(200, "It is gone.", deleted.schema())
            .refuses(&[400]),
        one_file(Operation::get("/v1/files/{id}/content", FILES, "What is in a file"))
            .answers_as(200, "The bytes that were sent.", "application/octet-stream", json!({}))
            .refuses(&[409]),
        of_chat(Operation::post("/v1/batches", BATCHES, "Answer a file of requests in the background"))
            .takes(new.schema())
            .answers(200, "The batch.", named("Batch"))
            .refuses(&[409, 429]),
        of_chat(Operation::get("/v1/batches", BATCHES, "Batches, the newest first"))
            .query("after", text())
            .query("limit", whole(1, 100))
            .answers(200, "A page of them.", pages("Batch")),
        one(Operation::get("/v1/batches/{id}", BATCHES, "How far a batch is")).answers(200, "The batch.", named("Batch")),
        one(Operation::post("/v1/batches/{id}/cancel", BATCHES, "Stop a batch"))
            .answers(200, "The batch.", named("Batch"))
            .refuses(&[400]),
    ];
    Topic { operations, schemas: vec![("File", file()), ("Batch", batch())] }
}

fn upload() -> Value {
    json!({
        "type": "object",
        "required": ["file", "purpose"],
        "additionalProperties": false,
        "properties": {
            "file": {"type": "string", "contentMediaType": "application/octet-stream"},
            "purpose": word(&["batch", "fine-tune", "user_data"]),
            "expires_after[anchor]": just("created_at"),
            "expires_after[seconds]": whole(KEEP.0, KEEP.1),
        },
        "dependentRequired": {
            "expires_after[anchor]": ["expires_after[seconds]"],
            "expires_after[seconds]": ["expires_after[anchor]"],
        },
    })
}

fn file() -> Value {
    Object::answer()
        .with("id", text())
        .with("object", just("file"))
        .with("bytes", count())
        .with("created_at", seconds())
        .with("expires_at", nullable(seconds()))
        .with("filename", text_of(0, 512))
        .with("purpose", text())
        .with("status", just("processed"))
        .with("status_details", nullable(text()))
        .schema()
}

fn batch() -> Value {
    let error = Object::answer().with("code", nullable(text())).with("message", nullable(text()));
    let errors = Object::answer().sometimes("object", text()).with("data", list(error.schema()));
    let counts = Object::answer().with("total", count()).with("completed", count()).with("failed", count());
    let moments = ["in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at"];
    let states = ["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"];
    let object = Object::answer()
        .with("id", text())
        .with("object", just("batch"))
        .with("endpoint", text())
        .with("model", nullable(text()))
        .with("errors", nullable(errors.schema()))
        .with("input_file_id", text())
        .with("completion_window", just("24h"))
        .with("status", word(&states))
        .with("output_file_id", nullable(text()))
        .with("error_file_id", nullable(text()))
        .with("created_at", seconds())
        .with("expires_at", seconds())
        .with("request_counts", counts.schema())
        .with("usage", any())
        .with("metadata", any());
    moments.into_iter().fold(object, |object, name| object.with(name, nullable(number()))).schema()
}
