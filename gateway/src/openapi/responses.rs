//! Responses, and stored chats.

use crate::openapi::Topic;
use crate::openapi::generation::{MOST_TOKENS, form_names, metadata, sampling};
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, count, either, flag, just, list, list_of, named, nothing, nullable, number, page, seconds, text, text_of, whole,
    word,
};
use serde_json::{Value, json};
use tidemill_store::Scope;

const TAG: &str = "responses";
const CHATS: &str = "stored chats";

/// `/v1/responses`, and what `/v1/chat/completions` keeps.
pub fn topic() -> Topic {
    let of_chat = |operation: Operation| operation.scope(Scope::Chat).refuses(&[400, 503]);
    let one = |operation: Operation| of_chat(operation).refuses(&[404]);
    let pages = |items: Value| {
        let ids = page(items).with("first_id", nullable(text())).with("last_id", nullable(text()));
        ids.with("has_more", flag()).schema()
    };
    let listed = |operation: Operation| {
        let after = operation.query("after", text()).query("limit", whole(1, 100));
        after.query("order", word(&["asc", "desc"]))
    };
    let gone = |object: &str| Object::answer().with("id", text()).with("object", just(object)).with("deleted", flag()).schema();
    let counted = Object::answer().with("object", just("response.input_tokens")).with("input_tokens", count());
    let response = "The response, or with `stream` its events.";
    let operations = vec![
        of_chat(Operation::post("/v1/responses", TAG, "Answer, and remember the conversation"))
            .takes(named("ResponseRequest"))
            .answers(200, response, named("Response"))
            .answers_as(200, response, "text/event-stream", any())
            .refuses(&[404, 429]),
        of_chat(Operation::post("/v1/responses/input_tokens", TAG, "How many tokens a request's input has"))
            .takes(named("ResponseRequest"))
            .answers(200, "The count.", counted.schema())
            .refuses(&[404, 429]),
        one(Operation::get("/v1/responses/{id}", TAG, "A stored response")).answers(200, "As it is now.", named("Response")),
        one(Operation::delete("/v1/responses/{id}", TAG, "Forget a response")).answers(200, "It is gone.", gone("response")),
        one(Operation::post("/v1/responses/{id}/cancel", TAG, "Stop a response in the background")).answers(
            200,
            "As it is now.",
            named("Response"),
        ),
        listed(one(Operation::get("/v1/responses/{id}/input_items", TAG, "All that a response was made from"))).answers(
            200,
            "A page of items.",
            pages(any()),
        ),
        listed(of_chat(Operation::get("/v1/chat/completions", CHATS, "Stored chats"))).query("model", text()).answers(
            200,
            "A page of them.",
            pages(named("StoredChat")),
        ),
        one(Operation::get("/v1/chat/completions/{id}", CHATS, "A stored chat")).answers(200, "The chat.", named("StoredChat")),
        one(Operation::post("/v1/chat/completions/{id}", CHATS, "Replace a stored chat's metadata"))
            .takes(Object::request().with("metadata", nullable(metadata())).schema())
            .answers(200, "The chat.", named("StoredChat")),
        one(Operation::delete("/v1/chat/completions/{id}", CHATS, "Forget a stored chat")).answers(
            200,
            "It is gone.",
            gone("chat.completion.deleted"),
        ),
        listed(one(Operation::get("/v1/chat/completions/{id}/messages", CHATS, "What a stored chat was asked"))).answers(
            200,
            "A page of messages.",
            pages(any()),
        ),
    ];
    let schemas = vec![("ResponseRequest", request()), ("Response", response_object()), ("StoredChat", stored_chat())];
    Topic { operations, schemas }
}

fn request() -> Value {
    let item = json!({"type": "object", "properties": {"type": {"type": ["string", "null"]}}});
    let name = json!({"type": "string", "pattern": form_names()});
    let function = Object::request()
        .with("type", just("function"))
        .with("name", name)
        .may("description", text())
        .may("parameters", json!({"type": "object"}))
        .may("strict", flag());
    let kind = |name: &str| Object::request().with("type", just(name));
    let schema = kind("json_schema")
        .with("name", json!({"type": "string", "pattern": form_names()}))
        .may("description", text())
        .may("strict", flag())
        .with("schema", json!({"type": "object"}));
    let format = either([kind("text").schema(), kind("json_object").schema(), schema.schema()]);
    let written = Object::request().may("format", format).may("verbosity", word(&["low", "medium", "high"]));
    let kinds = ["auto", "concise", "detailed"];
    let reasoning = Object::request()
        .may("effort", word(&["none", "minimal", "low", "medium", "high", "xhigh"]))
        .may("summary", word(&kinds))
        .may("generate_summary", word(&kinds))
        .may("context", nothing())
        .may("mode", nothing());
    let own = Object::request().may("conversation", text_of(1, 256)).may("compare", json!({"type": "boolean", "const": false}));
    let refused =
        ["conversation", "prompt", "context_management", "moderation", "access_programs", "background_options", "image"];
    let object = sampling()
        .may("input", either([text(), json!({"type": "array", "items": item})]))
        .may("previous_response_id", text())
        .may("instructions", text())
        .may("stream_options", Object::request().may("include_obfuscation", flag()).schema())
        .may("background", flag())
        .may("store", flag())
        .may("max_output_tokens", whole(16, MOST_TOKENS))
        .may("max_tool_calls", whole(1, MOST_TOKENS))
        .may("include", list(text()))
        .may("top_logprobs", whole(0, 20))
        .may("reasoning", reasoning.schema())
        .may("text", written.schema())
        .may("tools", list_of(0, 128, function.schema()))
        .may("tool_choice", either([word(&["none", "auto", "required"]), json!({"type": "object"})]))
        .may("parallel_tool_calls", flag())
        .may("truncation", word(&["auto", "disabled"]))
        .may("chat_template_kwargs", json!({"type": "object"}))
        .may("prompt_cache_options", any())
        .may("tidemill", own.schema());
    refused.into_iter().fold(object, |object, name| object.may(name, nothing())).schema()
}

fn response_object() -> Value {
    Object::answer()
        .with("id", text())
        .with("object", just("response"))
        .with("created_at", number())
        .with("status", word(&["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"]))
        .with("model", text())
        .with("output", list(Object::answer().with("id", text()).with("type", text()).schema()))
        .with("error", nullable(any()))
        .with("incomplete_details", nullable(any()))
        .sometimes("usage", any())
        .schema()
}

fn stored_chat() -> Value {
    Object::answer()
        .with("id", text())
        .with("object", just("chat.completion"))
        .with("created", seconds())
        .with("model", text())
        .with("choices", list(any()))
        .with("metadata", any())
        .schema()
}
