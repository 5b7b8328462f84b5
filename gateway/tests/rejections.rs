//! What is refused, before any 200, and how it says so.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support::{MODEL, Setup, chat, completion, get, post, post_bytes, send};
use hyper::Request;
use proptest::prelude::*;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

async fn refused(path: &str, cases: Vec<(Value, u16, Option<&str>, Option<&str>)>) {
    let router = Setup::default().router();
    for (body, status, param, code) in cases {
        let reply = post(&router, path, body.clone()).await;
        let expected = (status, param.map(str::to_owned), code.map(str::to_owned));
        assert_eq!(reply.error(), expected, "{body} -> {}", String::from_utf8_lossy(&reply.body));
    }
}

#[tokio::test]
async fn chat_requests_out_of_range_or_of_the_wrong_type() {
    let bad = |extra: Value, param: &'static str, code: &'static str| (chat(extra), 400, Some(param), Some(code));
    refused(
        CHAT,
        vec![
            (json!({"model": MODEL}), 400, Some("messages"), Some("missing_required_parameter")),
            (json!({"messages": [{"role": "user", "content": "x"}]}), 400, Some("model"), Some("missing_required_parameter")),
            (json!([]), 400, None, None),
            (json!("x"), 400, None, None),
            bad(json!({"model": 7}), "model", "invalid_type"),
            bad(json!({"messages": []}), "messages", "empty_array"),
            bad(json!({"messages": {}}), "messages", "invalid_type"),
            bad(json!({"messages": [{"role": "user", "content": 3}]}), "messages.0.content", "invalid_type"),
            bad(json!({"temperature": 2.1}), "temperature", "decimal_above_max_value"),
            bad(json!({"temperature": -0.1}), "temperature", "decimal_below_min_value"),
            bad(json!({"temperature": "hot"}), "temperature", "invalid_type"),
            bad(json!({"top_p": 1.01}), "top_p", "decimal_above_max_value"),
            bad(json!({"frequency_penalty": -2.5}), "frequency_penalty", "decimal_below_min_value"),
            bad(json!({"presence_penalty": 3}), "presence_penalty", "decimal_above_max_value"),
            bad(json!({"repetition_penalty": 0}), "repetition_penalty", "decimal_below_min_value"),
            bad(json!({"min_p": 2}), "min_p", "decimal_above_max_value"),
            bad(json!({"top_k": -2}), "top_k", "integer_below_min_value"),
            bad(json!({"n": 0}), "n", "integer_below_min_value"),
            bad(json!({"n": 129}), "n", "integer_above_max_value"),
            bad(json!({"n": 17}), "n", "integer_above_max_value"),
            bad(json!({"n": 1.5}), "n", "invalid_type"),
            bad(json!({"max_tokens": 0}), "max_tokens", "integer_below_min_value"),
            bad(json!({"max_completion_tokens": "many"}), "max_completion_tokens", "invalid_type"),
            bad(json!({"seed": 18_446_744_073_709_551_615_u64}), "seed", "integer_above_max_value"),
            bad(json!({"stop": ["a", "b", "c", "d", "e"]}), "stop", "array_above_max_length"),
            bad(json!({"stop": ["a", 1]}), "stop.1", "invalid_type"),
            bad(json!({"stop": ""}), "stop", "string_below_min_length"),
            bad(json!({"stop_token_ids": [-1]}), "stop_token_ids.0", "integer_below_min_value"),
            bad(json!({"stop_token_ids": [100_000]}), "stop_token_ids", "invalid_value"),
            bad(json!({"logit_bias": {"5": 101}}), "logit_bias.5", "decimal_above_max_value"),
            bad(json!({"logit_bias": {"five": 1}}), "logit_bias.five", "invalid_value"),
            bad(json!({"logit_bias": []}), "logit_bias", "invalid_type"),
            bad(json!({"logprobs": 3}), "logprobs", "invalid_type"),
            bad(json!({"top_logprobs": 3}), "top_logprobs", "invalid_value"),
            bad(json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "integer_above_max_value"),
            bad(json!({"stream": "yes"}), "stream", "invalid_type"),
            bad(json!({"stream_options": {"include_usage": true}}), "stream_options", "invalid_value"),
            bad(json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x", "unknown_parameter"),
            bad(json!({"stream": true, "prompt_logprobs": 1}), "prompt_logprobs", "invalid_value"),
            bad(json!({"metadata": {"k": 1}}), "metadata.k", "invalid_type"),
            bad(json!({"metadata": {"k": "v".repeat(513)}}), "metadata.k", "string_above_max_length"),
            bad(json!({"service_tier": "gold"}), "service_tier", "invalid_value"),
            bad(json!({"cache_salt": ""}), "cache_salt", "string_below_min_length"),
            bad(json!({"priority": 1e12}), "priority", "integer_above_max_value"),
            bad(json!({"user": 5}), "user", "invalid_type"),
            bad(json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages", "invalid_value"),
            bad(
                json!({"add_generation_prompt": true, "continue_final_message": true}),
                "continue_final_message",
                "invalid_value",
            ),
            bad(json!({"reasoning_effort": "enormous"}), "reasoning_effort", "invalid_value"),
            bad(json!({"max_token": 5}), "max_token", "unknown_parameter"),
            bad(json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools.0.function.name", "invalid_value"),
            bad(json!({"tool_choice": "required"}), "tool_choice", "invalid_value"),
        ],
    )
    .await;
}

#[tokio::test]
async fn what_does_not_exist_yet_is_refused_by_name() {
    let unsupported = |extra: Value, param: &'static str| (chat(extra), 400, Some(param), Some("unsupported_parameter"));
    refused(
        CHAT,
        vec![
            unsupported(json!({"tools": [{"type": "custom", "custom": {"name": "f"}}]}), "tools.0.type"),
            unsupported(json!({"modalities": ["text", "audio"]}), "modalities"),
            unsupported(json!({"audio": {"voice": "x"}}), "audio"),
            unsupported(json!({"web_search_options": {}}), "web_search_options"),
            unsupported(json!({"structured_outputs": {"structural_tag": {}}}), "structured_outputs.structural_tag"),
            unsupported(json!({"guided_whitespace_pattern": " "}), "guided_whitespace_pattern"),
            unsupported(json!({"reasoning_effort": "low"}), "reasoning_effort"),
            unsupported(
                json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}),
                "messages.0.content.0.type",
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn constraints_that_cannot_be_honoured_are_refused_by_the_keyword() {
    let bad = |extra: Value, param: &'static str, code: &'static str| (chat(extra), 400, Some(param), Some(code));
    let format = |schema: Value, strict: bool| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}});
    let object = json!({"type": "object", "properties": {"a": {"not": {}}}});
    refused(
        CHAT,
        vec![
            bad(json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema", "missing_required_parameter"),
            bad(format(object, false), "response_format.json_schema.schema.properties.a.not", "invalid_json_schema"),
            bad(
                format(json!({"type": "object"}), true),
                "response_format.json_schema.schema.additionalProperties",
                "invalid_json_schema",
            ),
            bad(json!({"guided_json": {"minLength": "x"}}), "guided_json.minLength", "invalid_json_schema"),
            bad(json!({"guided_regex": "a("}), "guided_regex", "invalid_grammar"),
            bad(json!({"structured_outputs": {"grammar": "root ::= x"}}), "structured_outputs.grammar", "invalid_grammar"),
            bad(json!({"guided_regex": "a", "response_format": {"type": "json_object"}}), "guided_regex", "invalid_value"),
        ],
    )
    .await;
    let both = json!({"prompt": "a", "guided_choice": ["a"], "guided_regex": "b"});
    refused(COMPLETIONS, vec![(completion(both), 400, Some("guided_choice"), Some("invalid_value"))]).await;
}

#[tokio::test]
async fn completion_requests() {
    let bad = |extra: Value, param: &'static str, code: &'static str| (completion(extra), 400, Some(param), Some(code));
    refused(
        COMPLETIONS,
        vec![
            (json!({"model": MODEL}), 400, Some("prompt"), Some("missing_required_parameter")),
            bad(json!({"prompt": {}}), "prompt", "invalid_type"),
            bad(json!({"prompt": []}), "prompt", "empty_array"),
            bad(json!({"prompt": ""}), "prompt", "invalid_value"),
            bad(json!({"prompt": [1, "a"]}), "prompt.1", "invalid_type"),
            bad(json!({"prompt": ["a", 1]}), "prompt.1", "invalid_type"),
            bad(json!({"prompt": [[1], []]}), "prompt.1", "empty_array"),
            bad(json!({"prompt": [1, 5000]}), "prompt", "invalid_value"),
            bad(json!({"best_of": 1, "n": 2}), "best_of", "invalid_value"),
            bad(json!({"best_of": 2, "stream": true}), "best_of", "invalid_value"),
            bad(json!({"max_tokens": 0}), "max_tokens", "integer_below_min_value"),
            bad(json!({"logprobs": 21}), "logprobs", "integer_above_max_value"),
            bad(json!({"suffix": "x"}), "suffix", "unsupported_parameter"),
            bad(json!({"messages": []}), "messages", "unknown_parameter"),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_prompt_beyond_the_context_names_both_numbers() {
    let router = Setup::default().router();
    let reply = post(&router, CHAT, chat(json!({"messages": [{"role": "user", "content": "x".repeat(600)}]}))).await;
    assert_eq!(reply.error(), (400, Some("messages".into()), Some("context_length_exceeded".into())));
    let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("512 tokens") && message.contains("6"), "{message}");
    let reply = post(&router, CHAT, chat(json!({"max_tokens": 505}))).await;
    assert_eq!(reply.error().2.as_deref(), Some("context_length_exceeded"));
    let reply = post(&router, COMPLETIONS, completion(json!({"prompt": vec![5; 600]}))).await;
    assert_eq!(reply.error(), (400, Some("prompt".into()), Some("context_length_exceeded".into())));
}

#[tokio::test]
async fn bodies_that_are_not_json() {
    let router = Setup::default().router();
    let deep = "[".repeat(100_000);
    let bodies: [&[u8]; 7] = [b"", b"{", b"nonsense", b"{\"model\": \"\xff\xfe\"}", deep.as_bytes(), b"{\"a\": 1e999}", b"\0"];
    for body in bodies {
        let reply = post_bytes(&router, CHAT, body.to_vec()).await;
        assert_eq!(reply.error(), (400, None, None), "{:?}", &body[..body.len().min(40)]);
    }
    let large = vec![b' '; 10 * 1024 * 1024 + 1];
    assert_eq!(post_bytes(&router, CHAT, large).await.error().0, 413);
}

#[tokio::test]
async fn models_paths_and_methods_that_are_not_there() {
    let router = Setup::default().router();
    let unknown = Some("model_not_found".to_owned());
    assert_eq!(post(&router, CHAT, chat(json!({"model": "gpt-9"}))).await.error(), (404, Some("model".into()), unknown.clone()));
    assert_eq!(get(&router, "/v1/models/gpt-9").await.error(), (404, Some("model".into()), unknown));
    assert_eq!(get(&router, "/v1/nothing").await.error().0, 404);
    assert_eq!(get(&router, COMPLETIONS).await.error().0, 405);
    let delete = Request::delete("/health").body(axum::body::Body::empty()).unwrap();
    assert_eq!(send(&router, delete).await.error().0, 405);
}

#[tokio::test]
async fn a_model_without_a_template_says_what_to_use() {
    let router = Setup { template: None, ..Setup::default() }.router();
    let reply = post(&router, CHAT, chat(json!({}))).await;
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("/v1/completions"));
}

#[tokio::test]
async fn a_template_that_raises_is_the_clients_error() {
    let router = Setup { template: Some("{{ raise_exception('roles must alternate') }}"), ..Setup::default() }.router();
    let reply = post(&router, CHAT, chat(json!({}))).await;
    assert_eq!(reply.error(), (400, Some("messages".into()), Some("invalid_value".into())));
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("roles must alternate"));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z\u{0}-\u{ffff}]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::hash_map("role|content|type|text|[a-z_]{0,6}", inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

const FIELDS: [&str; 24] = [
    "messages",
    "model",
    "prompt",
    "temperature",
    "top_p",
    "n",
    "stop",
    "stream",
    "stream_options",
    "max_tokens",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "seed",
    "tools",
    "response_format",
    "metadata",
    "chat_template_kwargs",
    "stop_token_ids",
    "echo",
    "best_of",
    "priority",
    "modalities",
    "x",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// The model's name never comes out of the generator, so that no request can succeed.
    #[test]
    fn no_request_breaks_the_server_and_every_refusal_has_the_shape(
        fields in prop::collection::vec((prop::sample::select(&FIELDS[..]), any_json()), 0..8),
        whole in any_json(),
        wrapped in any::<bool>(),
    ) {
        let body = if wrapped { Value::Object(fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()) } else { whole };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            thread_local! { static ROUTER: axum::Router = Setup::default().router(); }
            let router = ROUTER.with(Clone::clone);
            for path in [CHAT, COMPLETIONS, "/tokenize", "/detokenize"] {
                let reply = post(&router, path, body.clone()).await;
                if reply.status.is_success() {
                    // Only /tokenize and /detokenize answer without a model's name.
                    assert!(path.ends_with("tokenize"), "{path} {body}");
                } else {
                    let (status, _, _) = reply.error();
                    assert!((400..500).contains(&status), "{path} {body} {status}");
                }
            }
        });
    }
}
