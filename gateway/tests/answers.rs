//! What answers look like, streamed and whole.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support::{END, MODEL, Setup, chat, completion, get, post, says};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn content(chunks: &[Value], choice: usize) -> String {
    let choices = chunks.iter().flat_map(|c| c["choices"].as_array().unwrap()).filter(|c| c["index"] == choice);
    choices.filter_map(|c| c["delta"]["content"].as_str()).collect()
}

#[tokio::test]
async fn a_stream_is_role_content_finish_and_done() {
    let router = Setup::default().router();
    let reply = post(&router, CHAT, chat(json!({"stream": true}))).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(reply.headers["cache-control"], "no-cache");
    assert_eq!(reply.headers["x-accel-buffering"], "no");
    assert!(reply.headers.contains_key("openai-processing-ms"));
    let chunks = reply.chunks();
    let first = &chunks[0];
    assert!(first["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(first["model"], MODEL);
    assert!(first["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    let role = json!({"index": 0, "delta": {"role": "assistant", "content": "", "refusal": null}, "logprobs": null, "finish_reason": null});
    assert_eq!(first["choices"], json!([role]));
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([{"index": 0, "delta": {}, "logprobs": null, "finish_reason": "stop"}]));
    assert_eq!(content(&chunks, 0), "Hi 🌊!");
    for chunk in &chunks {
        assert_eq!((&chunk["id"], &chunk["created"]), (&first["id"], &first["created"]));
        assert!(chunk.get("usage").is_none());
    }
    for chunk in &chunks[1..] {
        assert!(chunk["choices"][0]["delta"].get("role").is_none());
    }
    // Four bytes of one character are four tokens and one delta.
    assert_eq!(chunks.len(), 1 + 5 + 1);
}

#[tokio::test]
async fn usage_comes_last_and_alone_when_asked_for() {
    let router = Setup::default().router();
    let reply = post(&router, CHAT, chat(json!({"stream": true, "stream_options": {"include_usage": true}}))).await;
    let mut chunks = reply.chunks();
    let last = chunks.pop().unwrap();
    assert_eq!(last["choices"], json!([]));
    let whole = post(&router, CHAT, chat(json!({}))).await.json();
    assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    assert_eq!(last["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"]);
    assert_eq!(last["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
    assert!(last["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64());
    assert!(chunks.iter().all(|c| c.as_object().unwrap().contains_key("usage") && c["usage"].is_null()));
}

#[tokio::test]
async fn a_whole_answer_has_every_field() {
    let router = Setup::default().router();
    let reply = post(&router, CHAT, chat(json!({"n": 2}))).await;
    let json = reply.json();
    assert_eq!(reply.headers["content-type"], "application/json");
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["service_tier"], "default");
    assert_eq!(json["choices"].as_array().unwrap().len(), 2);
    let message = json!({"role": "assistant", "content": "Hi 🌊!", "refusal": null, "annotations": []});
    assert_eq!(json["choices"][1], json!({"index": 1, "message": message, "logprobs": null, "finish_reason": "stop"}));
    let usage = &json["usage"];
    let tokens = says("Hi 🌊!").len() as u64;
    assert_eq!(usage["completion_tokens"], 2 * tokens);
    assert_eq!(usage["total_tokens"], usage["prompt_tokens"].as_u64().unwrap() + 2 * tokens);
}

#[tokio::test]
async fn every_choice_has_one_role_and_one_finish_and_appears_in_order() {
    let router = Setup::default().router();
    let chunks = post(&router, CHAT, chat(json!({"stream": true, "n": 3}))).await.chunks();
    let choices: Vec<&Value> = chunks.iter().map(|c| &c["choices"][0]).collect();
    let firsts: Vec<u64> = choices.iter().take(3).map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(firsts, [0, 1, 2]);
    for index in 0..3 {
        let own = || choices.iter().filter(|c| c["index"] == index);
        assert_eq!(own().filter(|c| c["delta"].get("role").is_some()).count(), 1);
        assert_eq!(own().filter(|c| !c["finish_reason"].is_null()).count(), 1);
        assert_eq!(content(&chunks, index), "Hi 🌊!");
    }
}

#[tokio::test]
async fn max_tokens_ends_with_length_and_a_stop_string_with_stop() {
    let router = Setup::default().router();
    let cut = post(&router, CHAT, chat(json!({"max_tokens": 2}))).await.json();
    assert_eq!((&cut["choices"][0]["message"]["content"], &cut["choices"][0]["finish_reason"]), (&json!("Hi"), &json!("length")));
    for stream in [false, true] {
        let reply = post(&router, CHAT, chat(json!({"stop": "🌊", "stream": stream}))).await;
        let text = if stream {
            content(&reply.chunks(), 0)
        } else {
            reply.json()["choices"][0]["message"]["content"].as_str().unwrap().into()
        };
        assert_eq!(text, "Hi ");
    }
}

#[tokio::test]
async fn logprobs_are_the_same_streamed_and_whole_and_leave_out_the_end_of_turn() {
    let router = Setup::default().router();
    let asked = json!({"logprobs": true, "top_logprobs": 2});
    let whole = post(&router, CHAT, chat(asked.clone())).await.json();
    let entries = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e["bytes"].as_array().unwrap()).map(|b| b.as_u64().unwrap() as u8).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), "Hi 🌊!");
    assert_eq!(entries[0]["token"], "H");
    assert_eq!(entries[0]["logprob"], -0.125);
    assert_eq!(entries[3]["token"], "bytes:\\xf0");
    assert_eq!(entries[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(entries[0]["top_logprobs"][0], json!({"token": "a", "logprob": -0.5, "bytes": [97]}));
    let mut streaming = asked;
    streaming["stream"] = true.into();
    let chunks = post(&router, CHAT, chat(streaming)).await.chunks();
    let streamed: Vec<Value> =
        chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array()).flatten().cloned().collect();
    assert_eq!(streamed, entries);
    let none = post(&router, CHAT, chat(json!({"logprobs": true}))).await.json();
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn token_ids_and_prompt_logprobs_are_reported_on_request() {
    let router = Setup::default().router();
    let json = post(&router, CHAT, chat(json!({"return_token_ids": true, "prompt_logprobs": 1}))).await.json();
    assert_eq!(json["choices"][0]["token_ids"], json!(says("Hi 🌊!")));
    let prompt = json["prompt_token_ids"].as_array().unwrap();
    assert_eq!(json["usage"]["prompt_tokens"], prompt.len());
    let scored = json["prompt_logprobs"].as_array().unwrap();
    assert_eq!(scored.len(), prompt.len());
    assert!(scored[0].is_null());
    assert!(scored[1][prompt[1].to_string()]["logprob"].is_number());
    let chunks = post(&router, CHAT, chat(json!({"return_token_ids": true, "stream": true}))).await.chunks();
    assert_eq!(chunks[0]["prompt_token_ids"], json["prompt_token_ids"]);
    let ids: Vec<Value> = chunks.iter().filter_map(|c| c["choices"][0]["token_ids"].as_array()).flatten().cloned().collect();
    assert_eq!(json!(ids), json["choices"][0]["token_ids"]);
}

#[tokio::test]
async fn an_answer_can_go_on_from_the_last_message() {
    let router = Setup::default().router();
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "I say: "}]);
    let json =
        post(&router, CHAT, chat(json!({"messages": messages, "continue_final_message": true, "echo": true}))).await.json();
    assert_eq!(json["choices"][0]["message"]["content"], "I say: Hi 🌊!");
}

#[tokio::test]
async fn a_failing_engine_ends_the_stream_with_an_error_and_without_done() {
    let router = Setup::default().router();
    let asked = json!({"prompt": [5, 0, 5]});
    let whole = post(&router, COMPLETIONS, completion(asked.clone())).await;
    assert_eq!(whole.error().0, 500);
    let mut streaming = asked;
    streaming["stream"] = true.into();
    let reply = post(&router, COMPLETIONS, completion(streaming)).await;
    let data = reply.data();
    let last: Value = serde_json::from_str(data.last().unwrap()).unwrap();
    assert_eq!(last["error"].as_object().unwrap().keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
    assert_eq!(last["error"]["type"], "server_error");
}

#[tokio::test]
async fn completions_of_several_prompts_are_numbered_by_prompt_then_choice() {
    let router = Setup::default().router();
    let json =
        post(&router, COMPLETIONS, completion(json!({"prompt": ["a", "b"], "n": 2, "echo": true, "max_tokens": 2}))).await.json();
    assert!(json["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(json["object"], "text_completion");
    let texts: Vec<_> = json["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["aHi", "aHi", "bHi", "bHi"]);
    assert_eq!(json["choices"][3]["index"], 3);
    assert_eq!((&json["usage"]["prompt_tokens"], &json["usage"]["completion_tokens"]), (&json!(2), &json!(8)));
    let chunks = post(
        &router,
        COMPLETIONS,
        completion(json!({"prompt": ["a", "b"], "n": 2, "echo": true, "max_tokens": 2, "stream": true})),
    )
    .await;
    let chunks = chunks.chunks();
    for (index, expected) in texts.iter().enumerate() {
        let own = chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == index);
        assert_eq!(own.filter_map(|c| c["text"].as_str()).collect::<String>(), *expected);
    }
}

#[tokio::test]
async fn sixteen_tokens_are_the_default_of_completions() {
    let router = Setup::slow(100, 0).router();
    let json = post(&router, COMPLETIONS, completion(json!({}))).await.json();
    assert_eq!((&json["choices"][0]["finish_reason"], &json["usage"]["completion_tokens"]), (&json!("length"), &json!(16)));
}

#[tokio::test]
async fn completion_logprobs_are_parallel_arrays_with_character_offsets() {
    let router = Setup::default().router();
    let asked = json!({"prompt": "é", "echo": true, "logprobs": 1});
    let json = post(&router, COMPLETIONS, completion(asked.clone())).await.json();
    let logprobs = &json["choices"][0]["logprobs"];
    assert_eq!(json["choices"][0]["text"], "éHi 🌊!");
    // Two bytes of é, H, i, space, four bytes of the wave, !
    assert_eq!(logprobs["text_offset"], json!([0, 1, 1, 2, 3, 4, 5, 5, 5, 5]));
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    assert_eq!(logprobs["top_logprobs"][2], json!({"a": -0.5, "H": -0.125}));
    let lengths: Vec<_> =
        ["tokens", "token_logprobs", "top_logprobs"].iter().map(|k| logprobs[*k].as_array().unwrap().len()).collect();
    assert_eq!(lengths, [10; 3]);
    let mut streaming = asked;
    streaming["stream"] = true.into();
    let chunks = post(&router, COMPLETIONS, completion(streaming)).await.chunks();
    let parts = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["text_offset"].as_array());
    assert_eq!(json!(parts.flatten().cloned().collect::<Vec<_>>()), logprobs["text_offset"]);
}

#[tokio::test]
async fn a_prompt_can_be_scored_without_generating() {
    let router = Setup::default().router();
    let json = post(&router, COMPLETIONS, completion(json!({"echo": true, "logprobs": 0, "max_tokens": 0}))).await.json();
    assert_eq!(json["choices"][0]["text"], "abc");
    assert_eq!(json["choices"][0]["logprobs"]["tokens"], json!(["a", "b", "c"]));
    assert_eq!(json["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn best_of_returns_n_and_counts_all() {
    let router = Setup::default().router();
    let json = post(&router, COMPLETIONS, completion(json!({"best_of": 3, "n": 1, "max_tokens": 2}))).await.json();
    assert_eq!(json["choices"].as_array().unwrap().len(), 1);
    assert_eq!(json["usage"]["completion_tokens"], 6);
}

#[tokio::test]
async fn harmless_fields_of_real_clients_are_accepted() {
    let router = Setup::default().router();
    let extra = json!({
        "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}, "service_tier": "auto",
        "store": false, "tools": [], "tool_choice": "none", "parallel_tool_calls": true, "response_format": {"type": "text"},
        "modalities": ["text"], "verbosity": "low", "prediction": {"type": "content", "content": "x"}, "seed": -5,
        "logit_bias": {"5": -100}, "temperature": null, "stop": null, "max_tokens": null, "top_k": -1, "min_p": 0.1,
        "repetition_penalty": 1.1, "min_tokens": 0, "ignore_eos": false, "stop_token_ids": [], "priority": -3, "cache_salt": "x",
        "skip_special_tokens": true, "chat_template_kwargs": {"enable_thinking": false}, "top_p": 0, "n": 1.0
    });
    let reply = post(&router, CHAT, chat(extra)).await;
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
}

#[tokio::test]
async fn models_are_listed_and_found_with_slashes_of_both_kinds() {
    let router = Setup::default().router();
    let list = get(&router, "/v1/models").await.json();
    // A base model has no parent, and says so as vLLM does.
    let card = json!({
        "id": MODEL, "object": "model", "created": 7, "owned_by": "tidemill", "max_model_len": 512, "parent": null, "generation": null
    });
    assert_eq!(list, json!({"object": "list", "data": [card]}));
    assert_eq!(get(&router, "/v1/models/org/parrot").await.json(), card);
    assert_eq!(get(&router, "/v1/models/org%2Fparrot").await.json(), card);
}

#[tokio::test]
async fn text_to_tokens_and_back() {
    let router = Setup::default().router();
    let tokens = post(&router, "/tokenize", json!({"prompt": "a<|im_end|>", "return_token_strs": true})).await.json();
    assert_eq!(tokens, json!({"count": 2, "max_model_len": 512, "tokens": [97, END], "token_strs": ["a", "<|im_end|>"]}));
    let chat = post(&router, "/tokenize", json!({"model": MODEL, "messages": [{"role": "user", "content": "a"}]})).await.json();
    let text = post(&router, "/detokenize", json!({"tokens": chat["tokens"]})).await.json();
    assert_eq!(text, json!({"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"}));
}

#[tokio::test]
async fn probes() {
    let router = Setup::default().router();
    assert_eq!(get(&router, "/health").await.json(), json!({"status": "ok"}));
    let ready = get(&router, "/ready").await;
    assert_eq!((ready.status.as_u16(), ready.json()), (200, json!({"status": "ready", "models": {MODEL: "ready"}})));
    assert_eq!(get(&router, "/version").await.json(), json!({"version": env!("CARGO_PKG_VERSION")}));
}
