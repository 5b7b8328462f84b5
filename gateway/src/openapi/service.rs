//! Models, probes, and what is served beside the API.

use crate::console;
use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{Object, any, just, list, map, named, nullable, seconds, text, whole, word};

const TAG: &str = "service";

/// Everything that is about the server itself.
pub fn topic() -> Topic {
    let state = word(&["loading", "ready", "draining", "stopped"]);
    let ready = Object::answer().with("status", state.clone()).with("models", map(state)).schema();
    let ok = |name| Object::answer().with(name, text()).schema();
    let models = Object::answer().with("object", just("list")).with("data", list(named("Model"))).schema();
    let mut operations = vec![
        Operation::get("/v1/models", "models", "The models that are served").answers(200, "All of them.", models),
        Operation::get("/v1/models/{id}", "models", "One model; slashes in its id may be written plainly")
            .answers(200, "The model.", named("Model"))
            .refuses(&[404]),
        Operation::get("/health", TAG, "Whether the process lives").open().answers(200, "It does.", ok("status")).refuses(&[503]),
        Operation::get("/ready", TAG, "Whether every model answers").open().answers(200, "They do.", ready.clone()).answers(
            503,
            "Not yet, or no longer.",
            ready,
        ),
        Operation::get("/version", TAG, "The server's version").open().answers(200, "The version.", ok("version")),
        Operation::get("/metrics", TAG, "Metrics for Prometheus").open().answers_as(200, "Samples.", "text/plain", text()),
        Operation::get("/openapi.json", TAG, "This document").open().answers(200, "OpenAPI 3.1.", any()),
        Operation::get("/console", "console", "The pages of annotators").open().redirects(307),
    ];
    operations.extend(console::files().map(|(path, kind)| {
        let kind = kind.split(';').next().unwrap_or(kind);
        Operation::get(path, "console", "A file of the console").open().answers_as(200, "The file.", kind, text())
    }));
    let model = Object::answer()
        .with("id", text())
        .with("object", just("model"))
        .with("created", seconds())
        .with("owned_by", text())
        .with("max_model_len", nullable(whole(1, i64::from(u32::MAX))))
        .with("parent", nullable(text()))
        .with("generation", nullable(text()));
    Topic { operations, schemas: vec![("Model", model.schema())] }
}
