//! Loading and unloading adapters, and the registry of them.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, filled, flag, just, list, map, named, nullable, page, seconds, text, text_of, uuid, whole, word,
};
use serde_json::Value;
use tidemill_store::{AdapterState, Scope};

const TAG: &str = "adapters";

/// vLLM's two calls, and those of the registry.
pub fn topic() -> Topic {
    let of_admin = |path, summary| {
        let operation = Operation::post(path, TAG, summary).scope(Scope::Admin);
        operation.refuses(&[404]).answers_as(200, "Done.", "text/plain", text())
    };
    let load = Object::request()
        .with("lora_name", filled(200))
        .with("lora_path", filled(4096))
        .may("load_inplace", flag())
        .may("pinned", flag())
        .may("base_model_name", text());
    let unload = Object::request().with("lora_name", filled(200)).may("base_model_name", text()).may("lora_int_id", any());
    let mut operations = vec![
        of_admin("/v1/load_lora_adapter", "Load an adapter from a folder of the server's machine")
            .takes(load.schema())
            .refuses(&[409]),
        of_admin("/v1/unload_lora_adapter", "Take an adapter away; requests that use it finish").takes(unload.schema()),
    ];
    operations.extend(registry());
    Topic { operations, schemas: vec![("Adapter", adapter()), ("AdapterAlias", alias())] }
}

fn registry() -> Vec<Operation> {
    let get = |path, summary| Operation::get(path, TAG, summary).either_scope([Scope::Train, Scope::Look]).refuses(&[503]);
    let change = |path, summary| {
        let operation = Operation::post(path, TAG, summary).scope(Scope::Admin).refuses(&[400, 404, 408, 409, 413, 503]);
        operation.answers(200, "The adapter as it is now.", named("Adapter"))
    };
    let states = word(&AdapterState::ALL.map(AdapterState::as_str));
    let new = Object::request()
        .with("name", text_of(1, 100))
        .with("path", filled(4096))
        .may("base_model_name", text())
        .may("dataset", text_of(0, 4096))
        .may("parent", text_of(0, 4096))
        .may("code_version", text_of(0, 4096))
        .may("config", map(any()))
        .may("metrics", map(any()));
    let lead = Object::request().with("alias", text_of(1, 200)).with("adapter", text_of(1, 4096));
    vec![
        get("/v1/adapters", "The registered adapters, the newest first")
            .query("base", text())
            .query("name", text())
            .query("state", states)
            .query("after", uuid())
            .query("limit", whole(1, 100))
            .answers(200, "Without their lineage.", page(named("Adapter")).with("has_more", flag()).schema()),
        Operation::post("/v1/adapters", TAG, "Register an adapter from a folder of the server's machine")
            .scope(Scope::Admin)
            .takes(new.schema())
            .answers(201, "A candidate, with its lineage.", named("Adapter"))
            .refuses(&[404, 409]),
        get("/v1/adapters/{id}", "One adapter: by id, name, name@generation or alias").refuses(&[400, 404]).answers(
            200,
            "With its lineage.",
            named("Adapter"),
        ),
        change("/v1/adapters/{id}/serve", "Put an adapter into service in the place of others of its name")
            .takes(Object::request().may("though_tainted", flag()).schema())
            .optional_body(),
        change("/v1/adapters/{id}/retire", "Take an adapter out of service"),
        change("/v1/adapters/{id}/revoke", "Take an adapter out of service for good, and its aliases with it"),
        get("/v1/adapter_aliases", "Names that lead to adapters").answers(
            200,
            "All of them.",
            page(named("AdapterAlias")).with("has_more", flag()).schema(),
        ),
        change("/v1/adapter_aliases", "Lead an alias to an adapter that is served").takes(lead.schema()),
        Operation::delete("/v1/adapter_aliases/{alias}", TAG, "Remove an alias")
            .scope(Scope::Admin)
            .query("base", text())
            .refuses(&[404, 503])
            .answers(200, "As it was.", named("AdapterAlias")),
    ]
}

fn adapter() -> Value {
    Object::answer()
        .with("object", just("adapter"))
        .with("id", uuid())
        .with("name", text())
        .with("generation", text())
        .with("base", text())
        .with("state", text())
        .with("aliases", list(text()))
        .with("created_at", seconds())
        .with("updated_at", seconds())
        .with("served_at", nullable(seconds()))
        .with("base_hash", nullable(text()))
        .with("content_hash", text())
        .with("job", nullable(text()))
        .with("metrics", any())
        .with("tainted", any())
        .with("problem", nullable(text()))
        .with("files_removed_at", nullable(seconds()))
        .sometimes("lineage", any())
        .schema()
}

fn alias() -> Value {
    Object::answer()
        .with("object", just("adapter.alias"))
        .with("alias", text())
        .with("base", text())
        .with("adapter", uuid())
        .with("updated_at", seconds())
        .schema()
}
