//! Models, probes, and what is served beside the API.

use crate::console;
use crate::console::overview::WINDOWS;
use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{Object, any, flag, just, list, map, named, nullable, seconds, text, whole, word};
use tidemill_store::Scope;

const TAG: &str = "service";

/// Everything that is about the server itself.
pub fn topic() -> Topic {
    let state = word(&["loading", "ready", "short_of_memory", "draining", "stopped"]);
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
    ];
    operations.extend(parts());
    operations.extend(console::files().map(|(path, kind)| {
        let kind = kind.split(';').next().unwrap_or(kind);
        Operation::get(path, "console", "A page or file of the console").open().answers_as(200, "The file.", kind, text())
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

/// What the console's pages fetch.
fn parts() -> Vec<Operation> {
    let part = |path, summary| {
        let operation = Operation::get(path, "console", summary).scope(Scope::Look).refuses(&[503]);
        operation.answers_as(200, "A document, of which the page takes the body.", "text/html", text())
    };
    let one = |path, summary| part(path, summary).refuses(&[404]);
    let me = Object::answer().with("annotator", nullable(text())).with("keyed", flag()).with("operator", flag());
    vec![
        Operation::get("/v1/console/me", "console", "Who the server takes the caller for").scope(Scope::Look).answers(
            200,
            "That.",
            me.schema(),
        ),
        part("/v1/console/parts/overview", "Traffic and cost by model and variant, and what is at work")
            .query("hours", word(&WINDOWS.map(|(hours, _)| hours))),
        part("/v1/console/parts/rollouts", "The newest rollouts"),
        one("/v1/console/parts/rollouts/{rollout}", "A rollout with its metrics over time and its decisions"),
        part("/v1/console/parts/loops", "The loops"),
        one("/v1/console/parts/loops/{name}", "A loop with what it waits for and its last cycles"),
        part("/v1/console/parts/datasets", "The newest datasets"),
        one("/v1/console/parts/datasets/{reference}", "A dataset with its quality"),
        part("/v1/console/parts/trainings", "The newest fine-tuning jobs"),
        one("/v1/console/parts/trainings/{id}", "A fine-tuning job with its curves"),
        part("/v1/console/parts/adapters", "The newest adapters"),
        one("/v1/console/parts/adapters/{id}", "An adapter with its lineage"),
        part("/v1/console/parts/playground", "The form of the playground"),
    ]
}
