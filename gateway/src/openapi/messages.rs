//! Anthropic's API.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, any, count, either, flag, just, list, list_of, named, nothing, nullable, number_in, text, text_of, whole, word,
};
use serde_json::{Value, json};
use tidemill_store::Scope;

const TAG: &str = "messages";
const MOST: i64 = u32::MAX as i64;

/// `/v1/messages`
pub fn topic() -> Topic {
    let theirs = |operation: Operation| operation.words_of("MessagesError").scope(Scope::Chat).refuses(&[404, 429]);
    let counted = Object::answer().with("input_tokens", count());
    let operations = vec![
        theirs(Operation::post("/v1/messages", TAG, "Answer a conversation, in Anthropic's form"))
            .takes(named("MessagesRequest"))
            .answers(200, "The message, or with `stream` its pieces as events.", named("MessagesAnswer"))
            .answers_as(200, "The message, or with `stream` its pieces as events.", "text/event-stream", any()),
        theirs(Operation::post("/v1/messages/count_tokens", TAG, "How many tokens a conversation is"))
            .takes(conversation().may("speed", any()).schema())
            .answers(200, "The count.", counted.schema()),
    ];
    let error = Object::answer().with("type", text()).with("message", text());
    let error = Object::answer().with("type", just("error")).with("error", error.schema()).sometimes("request_id", text());
    Topic {
        operations,
        schemas: vec![("MessagesRequest", request()), ("MessagesAnswer", answer()), ("MessagesError", error.schema())],
    }
}

fn block(kind: &'static str) -> Object {
    Object::request().with("type", just(kind)).may("cache_control", any())
}

fn text_block() -> Value {
    block("text").with("text", text()).may("citations", any()).schema()
}

fn content(blocks: Vec<Value>) -> Value {
    either([text(), list(either(blocks))])
}

fn turn() -> Value {
    let said = |role: &str, blocks| {
        Object::request().with("role", just(role)).with("content", content(blocks)).may("cache_control", any()).schema()
    };
    let result = block("tool_result")
        .with("tool_use_id", text())
        .may("content", content(vec![text_block()]))
        .may("is_error", flag())
        .may("citations", any());
    let thought = Object::request().with("type", just("thinking")).with("thinking", text()).may("signature", any());
    let secret = Object::answer().with("type", just("redacted_thinking"));
    let used =
        block("tool_use").with("id", text()).with("name", text()).with("input", json!({"type": "object"})).may("caller", any());
    either([
        said("user", vec![text_block(), result.schema()]),
        said("assistant", vec![text_block(), thought.schema(), secret.schema(), used.schema()]),
        said("system", vec![text_block()]),
    ])
}

fn conversation() -> Object {
    let arguments = json!({"type": "object", "properties": {"type": {"const": "object"}}});
    let tool = Object::request()
        .with("name", json!({"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"}))
        .may("type", just("custom"))
        .may("description", text())
        .with("input_schema", arguments)
        .may("strict", flag());
    let hints = ["cache_control", "defer_loading", "eager_input_streaming", "input_examples", "allowed_callers"];
    let tool = hints.into_iter().fold(tool, |tool, name| tool.may(name, any()));
    let chosen = |kind: &'static str| Object::request().with("type", just(kind)).may("disable_parallel_tool_use", flag());
    let choice = either([
        chosen("auto").schema(),
        chosen("any").schema(),
        chosen("none").schema(),
        chosen("tool").with("name", text()).schema(),
    ]);
    let thinks = |kind: Value| Object::request().with("type", kind).may("display", any());
    let thinking = either([
        thinks(just("enabled")).with("budget_tokens", whole(1024, MOST)).schema(),
        thinks(word(&["adaptive", "between_tools", "disabled"])).may("budget_tokens", any()).schema(),
    ]);
    let format = Object::request().with("type", just("json_schema")).with("schema", json!({"type": "object"}));
    let output = Object::request().may("effort", word(&["low", "medium", "high", "xhigh", "max"])).may("format", format.schema());
    let object = Object::request()
        .with("model", text())
        .with("messages", json!({"type": "array", "items": turn(), "minItems": 1}))
        .may("system", content(vec![text_block()]))
        .may("thinking", thinking)
        .may("output_config", output.schema())
        .may("tools", list_of(0, 512, tool.schema()))
        .may("tool_choice", choice)
        .may("mcp_servers", nothing());
    let hints =
        ["cache_control", "inference_geo", "context_management", "diagnostics", "user_profile_id", "workspace_id", "betas"];
    hints.into_iter().fold(object, |object, name| object.may(name, any()))
}

fn request() -> Value {
    conversation()
        .with("max_tokens", whole(1, MOST))
        .may("stream", flag())
        .may("metadata", Object::request().may("user_id", text_of(0, 512)).schema())
        .may("service_tier", word(&["auto", "standard_only"]))
        .may("speed", word(&["standard", "fast"]))
        .may("temperature", number_in(0.0, 1.0))
        .may("top_p", number_in(0.0, 1.0))
        .may("top_k", whole(0, MOST))
        .may("stop_sequences", list_of(0, 16, text_of(1, u64::from(u32::MAX))))
        .may("container", nothing())
        .schema()
}

fn answer() -> Value {
    let usage = Object::answer().with("input_tokens", count()).with("output_tokens", count());
    Object::answer()
        .with("id", text())
        .with("type", just("message"))
        .with("role", just("assistant"))
        .with("model", text())
        .with("content", list(Object::answer().with("type", text()).schema()))
        .with("stop_reason", nullable(text()))
        .with("stop_sequence", nullable(text()))
        .with("usage", usage.schema())
        .schema()
}
