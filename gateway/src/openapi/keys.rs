//! The administration of keys.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, count, filled, flag, just, list, list_of, map, named, nullable, number, number_in, page, seconds, text, text_of,
    uuid, whole, word,
};
use serde_json::{Value, json};
use tidemill_store::{MAX_WEIGHT, Scope, Tier};

const TAG: &str = "keys";

/// `/v1/admin/keys`
pub fn topic() -> Topic {
    let of_admin = |operation: Operation| operation.scope(Scope::Admin).refuses(&[503]);
    let one = |operation: Operation| of_admin(operation).refuses(&[404]);
    let secret = || json!({"allOf": [named("Key"), Object::answer().with("key", text()).schema()]});
    let scopes = list_of(1, Scope::ALL.len() as u64, word(&Scope::ALL.map(Scope::as_str)));
    let new = terms().with("name", filled(100)).with("scopes", scopes.clone());
    let overlap = Object::request().may("overlap_seconds", whole(0, 366 * 24 * 3600));
    let used = ["requests", "input_tokens", "cached_tokens", "output_tokens"];
    let used = used.into_iter().fold(Object::answer(), |object, name| object.with(name, count())).with("cost", number());
    let operations = vec![
        of_admin(Operation::post("/v1/admin/keys", TAG, "Make a key"))
            .takes(new.schema())
            .answers(201, "The key with its secret, which is shown this once.", secret())
            .refuses(&[409]),
        of_admin(Operation::get("/v1/admin/keys", TAG, "All keys, without their secrets")).answers(
            200,
            "All of them.",
            page(named("Key")).with("has_more", flag()).schema(),
        ),
        one(Operation::get("/v1/admin/keys/{id}", TAG, "One key, by id or name")).answers(
            200,
            "The key, and what it has used today.",
            json!({"allOf": [named("Key"), Object::answer().with("usage_today", used.schema()).schema()]}),
        ),
        one(Operation::patch("/v1/admin/keys/{id}", TAG, "Change what a key may do; null goes back to what a new key has"))
            .takes(terms().may("scopes", scopes).schema())
            .answers(200, "As it is now.", named("Key")),
        one(Operation::delete("/v1/admin/keys/{id}", TAG, "Take a key back")).answers(200, "As it was.", named("Key")),
        one(Operation::post("/v1/admin/keys/{id}/rotate", TAG, "A new secret; the old one works a while longer"))
            .takes(overlap.schema())
            .optional_body()
            .answers(200, "The key with its new secret.", secret()),
    ];
    Topic { operations, schemas: vec![("Key", key()), ("Limits", limits())] }
}

fn terms() -> Object {
    let models = json!({
        "type": "object",
        "maxProperties": 256,
        "additionalProperties": named("Limits"),
    });
    Object::request()
        .may("expires_at", whole(0, 32_503_680_000))
        .may("models", list_of(1, 256, text_of(0, 256)))
        .may("limits", named("Limits"))
        .may("model_limits", models)
        .may("service_tier", word(&Tier::ALL.map(Tier::as_str)))
        .may("weight", whole(1, i64::from(MAX_WEIGHT)))
}

fn limits() -> Value {
    let counts = ["requests_per_minute", "input_tokens_per_minute", "output_tokens_per_minute", "concurrent"];
    let counts = counts.into_iter().fold(Object::request(), |object, name| object.may(name, whole(0, i64::from(u32::MAX))));
    counts.may("cost_per_day", number_in(0.0, 1e9)).schema()
}

fn key() -> Value {
    Object::answer()
        .with("object", just("api_key"))
        .with("id", uuid())
        .with("name", text())
        .with("prefix", text())
        .with("scopes", list(text()))
        .with("created_at", seconds())
        .with("expires_at", nullable(seconds()))
        .with("revoked_at", nullable(seconds()))
        .with("models", nullable(list(text())))
        .with("limits", any())
        .with("model_limits", map(any()))
        .with("service_tier", text())
        .with("weight", count())
        .schema()
}
