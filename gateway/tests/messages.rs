//! Anthropic's Messages API on the wire.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support::{MODEL, Setup, get, merged, post, says, send};
use axum::body::Body;
use hyper::Request;
use serde_json::{Value, json};
use tidemill::http::{Auth, router};

const MESSAGES: &str = "/v1/messages";
const ANSWER: &str = "<think>\nHm.\n</think>\n\nLet me look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}}\n</tool_call>";
/// Knows tools and reasons.
const TEMPLATE: &str = "{% for tool in tools or [] %}<tool_call>: {{ tool | tojson }}\n{% endfor %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# <think> #}";

fn setup(script: &str) -> Setup {
    Setup { script: says(script), template: Some(TEMPLATE), ..Setup::default() }
}

fn body(extra: Value) -> Value {
    merged(json!({"model": MODEL, "max_tokens": 300, "messages": [{"role": "user", "content": "Hi"}]}), extra)
}

fn with_tool(extra: Value) -> Value {
    let tool = json!({"tools": [{"name": "weather", "input_schema": {"type": "object"}}], "thinking": {"type": "adaptive"}});
    merged(body(tool), extra)
}

#[tokio::test]
async fn a_whole_message_is_made_of_blocks() {
    let reply = post(&setup(ANSWER).router(), MESSAGES, with_tool(json!({}))).await;
    assert_eq!(reply.status, 200);
    let message = reply.json();
    assert!(message["id"].as_str().unwrap().starts_with("msg_"));
    assert_eq!((&message["type"], &message["role"], &message["model"]), (&json!("message"), &json!("assistant"), &json!(MODEL)));
    assert_eq!((&message["stop_reason"], &message["stop_sequence"]), (&json!("tool_use"), &Value::Null));
    let blocks = message["content"].as_array().unwrap();
    assert_eq!(blocks[0], json!({"type": "thinking", "thinking": "Hm.", "signature": ""}));
    assert_eq!(blocks[1], json!({"type": "text", "text": "Let me look."}));
    assert_eq!(
        (&blocks[2]["type"], &blocks[2]["name"], &blocks[2]["input"]),
        (&json!("tool_use"), &json!("weather"), &json!({"city": "Emden"}))
    );
    assert!(blocks[2]["id"].is_string() && blocks.len() == 3);
    assert_eq!(message["usage"]["output_tokens"], ANSWER.len() + 1);
    assert!(message["usage"]["output_tokens_details"]["thinking_tokens"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn who_does_not_ask_for_thinking_does_not_see_it() {
    let router = setup("<think>Hm.</think>Yes").router();
    let message = post(&router, MESSAGES, body(json!({}))).await.json();
    assert_eq!(message["content"], json!([{"type": "text", "text": "Yes"}]));
    let events = post(&router, MESSAGES, body(json!({"stream": true}))).await.events();
    assert!(events.iter().all(|event| event["delta"]["type"] != "thinking_delta"));
}

#[tokio::test]
async fn a_stream_opens_and_closes_each_block_in_turn() {
    let reply = post(&setup(ANSWER).router(), MESSAGES, with_tool(json!({"stream": true}))).await;
    assert_eq!(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    let events = reply.events();
    assert_eq!(events[0]["type"], "message_start");
    assert_eq!(events[0]["message"]["content"], json!([]));
    assert!(events[0]["message"]["usage"]["input_tokens"].as_u64().unwrap() > 0);
    assert_eq!(events.last().unwrap(), &json!({"type": "message_stop"}));
    let end = &events[events.len() - 2];
    assert_eq!(
        (&end["type"], &end["delta"]),
        (&json!("message_delta"), &json!({"stop_reason": "tool_use", "stop_sequence": null}))
    );
    assert_eq!(end["usage"]["output_tokens"], ANSWER.len() + 1);
    let mut blocks: Vec<(String, String)> = Vec::new();
    let mut open = None;
    for event in &events[1..events.len() - 2] {
        let index = event["index"].as_u64().unwrap() as usize;
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!((open, index), (None, blocks.len()));
                open = Some(index);
                blocks.push((event["content_block"]["type"].as_str().unwrap().to_owned(), String::new()));
            }
            "content_block_delta" => {
                assert_eq!(open, Some(index));
                let delta = &event["delta"];
                let text = ["text", "thinking", "partial_json"].iter().find_map(|key| delta[key].as_str()).unwrap();
                blocks[index].1.push_str(text);
            }
            "content_block_stop" => assert_eq!(open.take(), Some(index)),
            other => panic!("{other}"),
        }
    }
    let expected = [("thinking", "Hm."), ("text", "Let me look."), ("tool_use", "{\"city\": \"Emden\"}")];
    assert_eq!(blocks, expected.map(|(kind, text)| (kind.to_owned(), text.to_owned())));
}

#[tokio::test]
async fn each_end_has_its_reason() {
    let router = setup("one two three").router();
    for (extra, reason, sequence) in [
        (json!({}), "end_turn", None),
        (json!({"max_tokens": 3}), "max_tokens", None),
        (json!({"stop_sequences": ["two"]}), "stop_sequence", Some("two")),
    ] {
        let message = post(&router, MESSAGES, body(extra)).await.json();
        assert_eq!((message["stop_reason"].as_str(), message["stop_sequence"].as_str()), (Some(reason), sequence));
    }
    // More than the context holds is asked for: the answer ends where the context does.
    let router = Setup { template: Some(TEMPLATE), ..Setup::slow(600, 0) }.router();
    let message = post(&router, MESSAGES, body(json!({"max_tokens": 100_000}))).await.json();
    assert_eq!(message["stop_reason"], "model_context_window_exceeded");
}

#[tokio::test]
async fn tokens_are_counted_as_they_will_be_used() {
    let router = setup("x").router();
    let conversation = json!({"model": MODEL, "system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}]});
    let counted = post(&router, "/v1/messages/count_tokens", conversation.clone()).await.json()["input_tokens"].clone();
    let mut asked = conversation;
    asked["max_tokens"] = json!(5);
    let usage = post(&router, MESSAGES, asked).await.json()["usage"].clone();
    assert_eq!(
        counted.as_u64(),
        Some(usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap())
    );
}

#[tokio::test]
async fn errors_are_in_their_words() {
    let router = setup("x").router();
    let cases = [
        (post(&router, MESSAGES, body(json!({"max_tokens": 0}))).await, 400, "invalid_request_error"),
        (post(&router, MESSAGES, body(json!({"model": "nobody"}))).await, 404, "not_found_error"),
        (post(&router, "/v1/messages/count_tokens", json!({})).await, 400, "invalid_request_error"),
        (get(&router, MESSAGES).await, 405, "not_found_error"),
    ];
    for (reply, status, kind) in cases {
        let json = reply.json();
        assert_eq!((reply.status.as_u16(), &json["type"], &json["error"]["type"]), (status, &json!("error"), &json!(kind)));
        assert!(json["error"]["message"].as_str().is_some_and(|message| !message.is_empty()));
        assert_eq!(json["request_id"].as_str(), reply.headers["request-id"].to_str().ok());
    }
    // Others keep OpenAI's shape.
    assert_eq!(post(&router, "/v1/chat/completions", json!({})).await.error().0, 400);
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_an_error_event() {
    let router = setup("x").router();
    // The parrot chokes on a zero byte.
    let reply = post(&router, MESSAGES, body(json!({"messages": [{"role": "user", "content": "\u{0}"}], "stream": true}))).await;
    let events = reply.events();
    assert_eq!((&events[0]["type"], &events[0]["error"]["type"]), (&json!("error"), &json!("api_error")));
    assert_eq!(events.len(), 1);
}

#[tokio::test]
async fn a_key_may_come_as_x_api_key() {
    let mut app = setup("x").app();
    app.auth = Auth::new(app.store.clone(), true);
    let router = router(app);
    let ask = |key: Option<&str>| {
        let mut request = Request::post(MESSAGES).header("content-type", "application/json");
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        request.body(Body::from(body(json!({})).to_string())).unwrap()
    };
    for key in [None, Some("sk-unknown")] {
        let reply = send(&router, ask(key)).await;
        assert_eq!((reply.status.as_u16(), reply.json()["error"]["type"].clone()), (401, json!("authentication_error")));
    }
}
