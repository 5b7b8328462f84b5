//! Chat, text completions, and tokens.

use crate::openapi::Topic;
use crate::openapi::operation::Operation;
use crate::openapi::schema::{
    Object, about, any, count, either, filled, flag, just, list, list_of, map, named, nothing, nullable, number, number_in,
    seconds, text, text_of, whole, word,
};
use serde_json::{Value, json};
use tidemill_store::Scope;

const TAG: &str = "generation";
/// Most of whatever counts tokens.
pub const MOST_TOKENS: i64 = u32::MAX as i64;

/// Endpoints that ask a model.
pub fn topic() -> Topic {
    let generates = |operation: Operation| operation.scope(Scope::Chat).refuses(&[404, 429]);
    let operations = vec![
        generates(Operation::post("/v1/chat/completions", TAG, "Answer a conversation"))
            .takes(named("ChatRequest"))
            .answers(200, "The answer, or with `stream` its pieces as events.", named("ChatAnswer"))
            .answers_as(200, "The answer, or with `stream` its pieces as events.", "text/event-stream", any()),
        generates(Operation::post("/v1/completions", TAG, "Continue a text"))
            .takes(named("CompletionRequest"))
            .answers(200, "The continuation, or with `stream` its pieces as events.", named("CompletionAnswer"))
            .answers_as(200, "The continuation, or with `stream` its pieces as events.", "text/event-stream", any()),
        generates(Operation::post("/v1/embeddings", TAG, "Vectors of texts")).takes(embedding_request()).answers(
            200,
            "The vectors.",
            embeddings(),
        ),
        Operation::post("/v1/moderations", TAG, "Always refused: no model here classifies")
            .scope(Scope::Chat)
            .takes(Object::request().may("model", text()).with("input", any()).schema())
            .refuses(&[404, 429]),
        generates(Operation::post("/tokenize", TAG, "Tokens of a text or a conversation"))
            .takes(either([
                tokenizing().with("prompt", text()).schema(),
                tokenizing().and(prompt()).may("prompt", nothing()).schema(),
            ]))
            .answers(200, "The tokens.", tokens()),
        generates(Operation::post("/detokenize", TAG, "The text of tokens"))
            .takes(Object::request().may("model", text()).with("tokens", list(token())).schema())
            .answers(200, "The text.", Object::answer().with("prompt", text()).schema()),
    ];
    let schemas = vec![
        ("ChatRequest", chat_request()),
        ("Message", message()),
        ("ToolCalls", tool_calls()),
        ("CompletionRequest", completion_request()),
        ("ChatAnswer", answer("chat.completion", chat_choice()).sometimes("prompt_token_ids", list(token())).schema()),
        ("CompletionAnswer", answer("text_completion", completion_choice()).schema()),
        ("PromptLogprobs", list(nullable(map(any())))),
    ];
    Topic { operations, schemas }
}

/// A token's id.
pub fn token() -> Value {
    whole(0, MOST_TOKENS)
}

fn tokenizing() -> Object {
    Object::request().may("model", text()).may("return_token_strs", flag()).may("add_special_tokens", flag())
}

fn tokens() -> Value {
    Object::answer()
        .with("count", count())
        .with("max_model_len", count())
        .with("tokens", list(token()))
        .with("token_strs", nullable(list(text())))
        .schema()
}

/// A client's own pairs.
pub fn metadata() -> Value {
    json!({
        "type": "object",
        "maxProperties": 16,
        "propertyNames": {"maxLength": 64},
        "additionalProperties": text_of(0, 512),
    })
}

/// A text, texts, tokens, or lists of tokens; texts have at least so many characters.
fn inputs(least: u64) -> Value {
    let a_text = || text_of(least, u64::from(u32::MAX));
    let ids = || json!({"type": "array", "items": token(), "minItems": 1});
    either([a_text(), list_of(1, 2048, a_text()), ids(), list_of(1, 2048, ids())])
}

fn embedding_request() -> Value {
    Object::request()
        .with("model", text())
        .with("input", inputs(1))
        .may("encoding_format", word(&["float", "base64"]))
        .may("dimensions", whole(1, 65_536))
        .may("priority", whole(i64::from(i32::MIN), i64::from(i32::MAX)))
        .may("user", text())
        .schema()
}

fn embeddings() -> Value {
    let one = Object::answer()
        .with("object", just("embedding"))
        .with("index", count())
        .with("embedding", either([list(number()), text()]));
    let usage = Object::answer().with("prompt_tokens", count()).with("total_tokens", count());
    Object::answer()
        .with("object", just("list"))
        .with("data", list(one.schema()))
        .with("model", text())
        .with("usage", usage.schema())
        .schema()
}

/// What every endpoint takes about sampling, stopping and the caller.
pub fn sampling() -> Object {
    let stop = either([text_of(1, u64::from(u32::MAX)), list_of(0, 4, text_of(1, u64::from(u32::MAX)))]);
    let bias = json!({
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": number_in(-100.0, 100.0),
    });
    Object::request()
        .with("model", text())
        .may("stream", flag())
        .may("temperature", number_in(0.0, 2.0))
        .may("top_p", number_in(0.0, 1.0))
        .may("top_k", whole(-1, MOST_TOKENS))
        .may("min_p", number_in(0.0, 1.0))
        .may("frequency_penalty", number_in(-2.0, 2.0))
        .may("presence_penalty", number_in(-2.0, 2.0))
        .may("repetition_penalty", json!({"type": "number", "exclusiveMinimum": 0, "maximum": 100}))
        .may("min_tokens", whole(0, MOST_TOKENS))
        .may("seed", whole(i64::MIN, i64::MAX))
        .may("stop", stop)
        .may("stop_token_ids", list_of(0, 1024, token()))
        .may("include_stop_str_in_output", flag())
        .may("ignore_eos", flag())
        .may("skip_special_tokens", flag())
        .may("logit_bias", bias)
        .may("priority", about("Lower runs first.", whole(i64::from(i32::MIN), i64::from(i32::MAX))))
        .may("cache_salt", text_of(1, 512))
        .may("service_tier", word(&["auto", "default", "flex", "scale", "priority"]))
        .may("user", text())
        .may("safety_identifier", text())
        .may("prompt_cache_key", text())
        .may("prompt_cache_retention", text())
        .may("metadata", metadata())
}

/// What chat and completions share.
fn shared() -> Object {
    let own = Object::request().may("conversation", text_of(1, 256)).may("compare", flag());
    let options = Object::request().may("include_usage", flag()).may("include_obfuscation", flag());
    sampling()
        .may("stream_options", options.schema())
        .may("n", whole(1, 128))
        .may("prompt_logprobs", whole(0, 20))
        .may("logprobs_mode", word(&["raw_logprobs", "processed_logprobs"]))
        .may("return_token_ids", flag())
        .may("tidemill", own.schema())
        .and(form())
}

/// Names of schemas and functions, as a pattern.
pub fn form_names() -> &'static str {
    "^[A-Za-z0-9_-]{1,64}$"
}

/// What the answer must look like.
fn form() -> Object {
    let kind = |name: &str| Object::request().with("type", just(name));
    let name = json!({"type": "string", "pattern": form_names()});
    let json_schema = Object::request()
        .with("name", name)
        .may("description", text())
        .may("strict", flag())
        .with("schema", json!({"type": "object"}));
    let format = either([
        kind("text").schema(),
        kind("json_object").schema(),
        kind("json_schema").with("json_schema", json_schema.schema()).schema(),
    ]);
    let filled_text = || text_of(1, u64::from(u32::MAX));
    let schema_or_text = || either([json!({"type": ["object", "boolean"]}), text()]);
    let choice = || list_of(1, 10_000, filled_text());
    let outputs = Object::request()
        .may("json", schema_or_text())
        .may("regex", filled_text())
        .may("choice", choice())
        .may("grammar", filled_text())
        .may("json_object", flag())
        .may("structural_tag", nothing())
        .may("whitespace_pattern", nothing())
        .may("disable_fallback", flag())
        .may("disable_any_whitespace", flag())
        .may("disable_additional_properties", flag());
    Object::request()
        .may("response_format", format)
        .may("structured_outputs", outputs.schema())
        .may("guided_json", schema_or_text())
        .may("guided_regex", filled_text())
        .may("guided_choice", choice())
        .may("guided_grammar", filled_text())
        .may("guided_whitespace_pattern", nothing())
        .may("guided_decoding_backend", text())
}

/// What makes the prompt of a conversation.
fn prompt() -> Object {
    let own = ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"];
    let kwargs = json!({"type": "object", "propertyNames": {"not": {"enum": own}}});
    Object::request()
        .with("messages", json!({"type": "array", "items": named("Message"), "minItems": 1}))
        .may("add_generation_prompt", flag())
        .may("continue_final_message", flag())
        .may("chat_template_kwargs", kwargs)
        .may("reasoning_effort", word(&["none", "minimal", "low", "medium", "high", "xhigh"]))
}

fn chat_request() -> Value {
    shared()
        .and(prompt())
        .may("max_completion_tokens", whole(1, MOST_TOKENS))
        .may("max_tokens", whole(1, MOST_TOKENS))
        .may("logprobs", flag())
        .may("top_logprobs", whole(0, 20))
        .may("echo", flag())
        .may("modalities", list_of(0, 8, just("text")))
        .may("audio", nothing())
        .may("web_search_options", nothing())
        .may("store", flag())
        .and(tools())
        .may("parallel_tool_calls", flag())
        .may("verbosity", word(&["low", "medium", "high"]))
        .may("prediction", any())
        .schema()
}

/// A message by its role.
fn message() -> Value {
    let part = |kind: &'static str| {
        Object::request()
            .with("type", just(kind))
            .with(kind, text())
            .may("cache_control", any())
            .may("annotations", any())
            .schema()
    };
    let parts = |forms: Vec<Value>| json!({"type": "array", "items": either(forms), "minItems": 1});
    let content = || either([text(), parts(vec![part("text")])]);
    let said = |roles: &[&str]| Object::request().with("role", word(roles)).with("content", content()).may("name", text());
    let answered = Object::request()
        .with("role", just("assistant"))
        .may("content", either([text(), parts(vec![part("text"), part("refusal")])]))
        .may("name", text())
        .may("refusal", text())
        .may("tool_calls", named("ToolCalls"))
        .may("function_call", function())
        .may("reasoning_content", text())
        .may("reasoning", text())
        .may("audio", nothing())
        .may("annotations", any());
    either([
        said(&["developer", "system", "user", "function"]).schema(),
        said(&["tool"]).with("tool_call_id", text()).schema(),
        answered.schema(),
    ])
}

/// What the model may call.
fn tools() -> Object {
    let arguments = json!({"type": "object", "properties": {"type": {"const": "object"}}});
    let name = json!({"type": "string", "pattern": form_names()});
    let function = Object::request()
        .with("name", name)
        .may("description", text())
        .may("parameters", arguments)
        .may("strict", flag())
        .schema();
    let tool = |function: Value| Object::request().with("type", just("function")).with("function", function).schema();
    let named = || Object::request().with("name", text()).schema();
    let allowed =
        Object::request().with("mode", word(&["auto", "required"])).with("tools", list_of(1, 128, tool(named()))).schema();
    let allowed = Object::request().with("type", just("allowed_tools")).with("allowed_tools", allowed).schema();
    Object::request()
        .may("tools", list_of(0, 128, tool(function.clone())))
        .may("tool_choice", either([word(&["none", "auto", "required"]), tool(named()), allowed]))
        .may("functions", list_of(0, 128, function))
        .may("function_call", either([word(&["none", "auto"]), named()]))
}

fn function() -> Value {
    Object::request().with("name", text()).with("arguments", text()).schema()
}

fn tool_calls() -> Value {
    let call =
        Object::request().with("id", text()).may("type", just("function")).with("function", function()).may("index", any());
    list(call.schema())
}

fn completion_request() -> Value {
    shared()
        .with("prompt", inputs(0))
        .may("max_tokens", about("With `echo`, 0 scores the prompt.", whole(0, MOST_TOKENS)))
        .may("logprobs", whole(0, 20))
        .may("echo", flag())
        .may("best_of", whole(1, 128))
        .may("add_special_tokens", flag())
        .may("suffix", nothing())
        .schema()
}

fn answer(object: &str, choice: Value) -> Object {
    let details =
        |names: &[&'static str]| names.iter().fold(Object::answer(), |object, name| object.with(name, count())).schema();
    let usage = Object::answer()
        .with("prompt_tokens", count())
        .with("completion_tokens", count())
        .with("total_tokens", count())
        .with("prompt_tokens_details", details(&["cached_tokens", "audio_tokens"]))
        .with(
            "completion_tokens_details",
            details(&["reasoning_tokens", "audio_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens"]),
        );
    Object::answer()
        .with("id", text())
        .with("object", just(object))
        .with("created", seconds())
        .with("model", text())
        .with("service_tier", text())
        .with("system_fingerprint", text())
        .with("choices", list(choice))
        .with("usage", usage.schema())
        .sometimes("prompt_logprobs", named("PromptLogprobs"))
}

fn chat_choice() -> Value {
    let top = || Object::answer().with("token", text()).with("logprob", number()).with("bytes", nullable(list(whole(0, 255))));
    let entry = top().with("top_logprobs", list(top().schema())).schema();
    let logprobs = Object::answer().with("content", nullable(list(entry))).with("refusal", nullable(list(any())));
    let message = Object::answer()
        .with("role", just("assistant"))
        .with("content", nullable(text()))
        .with("refusal", nullable(text()))
        .with("annotations", list(any()))
        .sometimes("reasoning_content", nullable(text()))
        .sometimes("tool_calls", list(any()))
        .sometimes("function_call", any());
    Object::answer()
        .with("index", count())
        .with("message", message.schema())
        .with("logprobs", nullable(logprobs.schema()))
        .with("finish_reason", nullable(word(&["stop", "length", "tool_calls", "function_call", "content_filter"])))
        .sometimes("token_ids", list(token()))
        .sometimes("tidemill", any())
        .schema()
}

fn completion_choice() -> Value {
    let logprobs = Object::answer()
        .with("tokens", list(text()))
        .with("token_logprobs", list(nullable(number())))
        .with("top_logprobs", list(nullable(map(number()))))
        .with("text_offset", list(count()));
    Object::answer()
        .with("index", count())
        .with("text", text())
        .with("logprobs", nullable(logprobs.schema()))
        .with("finish_reason", nullable(filled(32)))
        .sometimes("token_ids", list(token()))
        .sometimes("prompt_token_ids", list(token()))
        .sometimes("prompt_logprobs", named("PromptLogprobs"))
        .schema()
}
