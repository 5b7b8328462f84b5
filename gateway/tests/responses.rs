//! The Responses API over the whole stack: shapes, state, events, work in the background, and whose it is.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support::{MODEL, Reply, Setup, TwoKeys, ask, get, merged, post, says};
use axum::Router;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tidemill::http::router;
use tidemill::recording::{Level, Recording};
use tidemill_store::{ResponseStatus, StoredResponse};
use uuid::Uuid;

const RESPONSES: &str = "/v1/responses";

fn asking(extra: Value) -> Value {
    merged(json!({"model": MODEL, "input": "hello"}), extra)
}

fn path(response: &Value) -> String {
    format!("{RESPONSES}/{}", response["id"].as_str().unwrap())
}

/// The events of a stream, numbered from 0.
fn events(reply: &Reply) -> Vec<Value> {
    let events = reply.events();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    events
}

fn kinds(events: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    kinds.dedup();
    kinds
}

#[tokio::test]
async fn a_response_has_everything_and_is_kept() {
    let router = Setup::default().router();
    let asked = json!({
        "instructions": "be brief", "metadata": {"a": "b"}, "max_output_tokens": 100, "temperature": 0.5, "user": "u", "store": true,
        "include": ["message.output_text.logprobs"], "top_logprobs": 1, "reasoning": {"summary": "auto"}, "truncation": "auto",
    });
    let made = post(&router, RESPONSES, asking(asked)).await.json();
    assert!(made["id"].as_str().unwrap().starts_with("resp_"));
    for (key, value) in [
        ("object", json!("response")),
        ("status", json!("completed")),
        ("error", Value::Null),
        ("incomplete_details", Value::Null),
        ("instructions", json!("be brief")),
        ("max_output_tokens", json!(100)),
        ("metadata", json!({"a": "b"})),
        ("model", json!(MODEL)),
        ("parallel_tool_calls", json!(true)),
        ("previous_response_id", Value::Null),
        ("reasoning", json!({"summary": "auto", "effort": null})),
        ("store", json!(true)),
        ("temperature", json!(0.5)),
        ("top_p", json!(1.0)),
        ("text", json!({"format": {"type": "text"}, "verbosity": "medium"})),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("top_logprobs", json!(1)),
        ("truncation", json!("auto")),
        ("user", json!("u")),
    ] {
        assert_eq!(made[key], value, "{key}");
    }
    let message = &made["output"][0];
    assert_eq!(
        (&message["type"], &message["role"], &message["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    assert_eq!(message["content"][0]["text"], "Hi 🌊!");
    assert_eq!(message["content"][0]["logprobs"][0]["token"], "H");
    let usage = &made["usage"];
    assert_eq!(usage["total_tokens"], usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap());
    assert!(usage["input_tokens_details"]["cached_tokens"].is_u64() && usage["output_tokens_details"]["reasoning_tokens"] == 0);
    assert_eq!(get(&router, &path(&made)).await.json(), made);

    let counting = format!("{RESPONSES}/input_tokens");
    let counted = post(&router, &counting, json!({"model": MODEL, "input": "hello", "instructions": "be brief"})).await;
    assert_eq!(counted.json(), json!({"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}));
}

#[tokio::test]
async fn events_tell_of_the_items_as_they_come_and_the_last_of_what_is_kept() {
    let router = Setup::default().router();
    let reply = post(&router, RESPONSES, asking(json!({"stream": true, "previous_response_id": null}))).await;
    assert_eq!(reply.headers["content-type"], "text/event-stream; charset=utf-8");
    let events = events(&reply);
    assert_eq!(
        kinds(&events),
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let text: String = deltas.map(|event| event["delta"].as_str().unwrap()).collect();
    let last = &events.last().unwrap()["response"];
    assert_eq!((text.as_str(), &last["output"][0]["content"][0]["text"]), ("Hi 🌊!", &json!("Hi 🌊!")));
    let item = &last["output"][0]["id"];
    assert!(events.iter().filter(|event| event["item_id"].is_string()).all(|event| event["item_id"] == *item));
    assert_eq!(events[0]["response"]["status"], "in_progress");
    assert_eq!((&events[0]["response"]["id"], &last["status"]), (&last["id"], &json!("completed")));
    assert_eq!(get(&router, &path(last)).await.json(), *last);
}

#[tokio::test]
async fn a_conversation_goes_on_from_a_response() {
    let app = Setup::default().app();
    let (store, router) = (app.store.clone(), router(app));
    let first = post(&router, RESPONSES, asking(json!({"instructions": "once", "input": "one"}))).await.json();
    let second = post(&router, RESPONSES, asking(json!({"previous_response_id": first["id"], "input": "two"}))).await.json();
    let third = json!({
        "previous_response_id": second["id"], "instructions": "now",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "three"}]}],
    });
    let third = post(&router, RESPONSES, asking(third)).await.json();
    assert_eq!(third["previous_response_id"], second["id"]);
    store.flush().await;
    let id = Uuid::parse_str(third["id"].as_str().unwrap().strip_prefix("resp_").unwrap()).unwrap();
    let record = store.inference(id).await.unwrap().unwrap();
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let answer = said("assistant", "Hi 🌊!");
    let expected =
        json!([said("system", "now"), said("user", "one"), answer, said("user", "two"), answer, said("user", "three"),]);
    assert_eq!((record.messages, record.endpoint.as_str()), (Some(expected), "response"));

    let items = get(&router, &format!("{}/input_items?order=asc", path(&third))).await.json();
    let texts: Vec<&Value> = items["data"].as_array().unwrap().iter().map(|item| &item["content"][0]["text"]).collect();
    assert_eq!(texts, ["one", "Hi 🌊!", "two", "Hi 🌊!", "three"]);
    let latest = get(&router, &format!("{}/input_items?limit=1", path(&third))).await.json();
    assert_eq!((&latest["data"][0]["content"][0]["text"], &latest["has_more"]), (&json!("three"), &json!(true)));
    let next = get(&router, &format!("{}/input_items?limit=1&after={}", path(&third), latest["last_id"].as_str().unwrap())).await;
    assert_eq!(next.json()["data"][0]["role"], "assistant");

    let deleted = ask(&router, "DELETE", &path(&first), None, Value::Null).await.json();
    assert_eq!(deleted, json!({"id": first["id"], "object": "response", "deleted": true}));
    assert_eq!(get(&router, &path(&first)).await.error(), (404, Some("response_id".into()), Some("not_found".into())));
    let broken = post(&router, RESPONSES, asking(json!({"previous_response_id": third["id"]}))).await;
    let not_found = (400, Some("previous_response_id".to_owned()), Some("previous_response_not_found".to_owned()));
    assert_eq!(broken.error(), not_found);
    let unknown = json!({"previous_response_id": format!("resp_{}", Uuid::now_v7().simple())});
    assert_eq!(post(&router, RESPONSES, asking(unknown)).await.error(), not_found);
}

#[tokio::test]
async fn an_item_can_be_referred_to() {
    let router = Setup::default().router();
    let first = post(&router, RESPONSES, asking(json!({}))).await.json();
    let reference = json!({"type": "item_reference", "id": first["output"][0]["id"]});
    let input = json!([{"role": "user", "content": "a"}, reference, {"role": "user", "content": "b"}]);
    let second = post(&router, RESPONSES, asking(json!({"input": input}))).await.json();
    let items = get(&router, &format!("{}/input_items?order=asc", path(&second))).await.json();
    assert_eq!(items["data"][1], first["output"][0]);
    for foreign in ["msg_1".to_owned(), format!("msg_{}o0000", Uuid::now_v7().simple())] {
        let input = json!([{"type": "item_reference", "id": foreign}]);
        let reply = post(&router, RESPONSES, asking(json!({"input": input}))).await;
        assert_eq!(reply.error(), (404, Some("input.0.id".into()), Some("item_not_found".into())));
    }
}

#[tokio::test]
async fn an_answer_that_meets_its_limit_is_incomplete() {
    let router = Setup { script: says(&"x".repeat(40)), ..Setup::default() }.router();
    let made = post(&router, RESPONSES, asking(json!({"max_output_tokens": 16}))).await.json();
    assert_eq!((&made["status"], &made["incomplete_details"]), (&json!("incomplete"), &json!({"reason": "max_output_tokens"})));
    assert_eq!((&made["output"][0]["status"], &made["usage"]["output_tokens"]), (&json!("incomplete"), &json!(16)));
    let reply = post(&router, RESPONSES, asking(json!({"max_output_tokens": 16, "stream": true}))).await;
    let events = events(&reply);
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
    assert_eq!(get(&router, &path(&events[0]["response"])).await.json()["status"], "incomplete");
}

#[tokio::test]
async fn a_conversation_that_is_too_long_loses_its_beginning_or_is_refused() {
    let app = Setup::default().app();
    let (store, router) = (app.store.clone(), router(app));
    let mut input = vec![json!({"role": "developer", "content": "rule"})];
    for turn in 0..20 {
        input.push(json!({"role": "user", "content": format!("question {turn} {}", "q".repeat(30))}));
        input.push(json!({"role": "assistant", "content": "answer"}));
    }
    input.push(json!({"role": "user", "content": "last"}));
    let refused = post(&router, RESPONSES, asking(json!({"input": input}))).await;
    assert_eq!(refused.error(), (400, Some("input".into()), Some("context_length_exceeded".into())));
    let made = post(&router, RESPONSES, asking(json!({"input": input, "truncation": "auto"}))).await.json();
    assert_eq!(made["status"], "completed");
    store.flush().await;
    let id = Uuid::parse_str(made["id"].as_str().unwrap().strip_prefix("resp_").unwrap()).unwrap();
    let record = store.inference(id).await.unwrap().unwrap();
    let messages = record.messages.unwrap();
    let messages = messages.as_array().unwrap();
    assert_eq!((&messages[0]["content"], &messages[1]["role"]), (&json!("rule"), &json!("user")));
    assert_eq!(messages.last().unwrap()["content"], "last");
    assert!((4..40).contains(&messages.len()) && record.prompt_tokens <= 512 - 16, "{} {}", messages.len(), record.prompt_tokens);
    // One more turn would not have fitted.
    assert!(record.prompt_tokens > 512 - 16 - 120, "{}", record.prompt_tokens);
    let alone = json!({"input": "x".repeat(600), "truncation": "auto"});
    assert_eq!(post(&router, RESPONSES, asking(alone)).await.error().2.as_deref(), Some("context_length_exceeded"));
}

#[tokio::test]
async fn what_is_not_to_be_stored_is_not() {
    let router = Setup::default().router();
    let made = post(&router, RESPONSES, asking(json!({"store": false}))).await.json();
    assert_eq!((&made["store"], get(&router, &path(&made)).await.error().0), (&json!(false), 404));

    let recording = Recording { level: Level::Metadata, ..Recording::default() };
    let router = Setup { recording, ..Setup::default() }.router();
    let made = post(&router, RESPONSES, asking(json!({}))).await.json();
    assert_eq!((&made["store"], get(&router, &path(&made)).await.error().0), (&json!(false), 404));
    let made = post(&router, RESPONSES, asking(json!({"store": true}))).await.json();
    assert_eq!((&made["store"], get(&router, &path(&made)).await.status.as_u16()), (&json!(true), 200));
}

#[tokio::test]
async fn a_failure_is_an_error_or_the_last_event() {
    let router = Setup::default().router();
    let whole = post(&router, RESPONSES, asking(json!({"input": "\u{0}"}))).await;
    assert_eq!(whole.error().0, 500);
    let events = events(&post(&router, RESPONSES, asking(json!({"input": "\u{0}", "stream": true}))).await);
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(last["response"]["error"]["code"], "server_error");
    assert_eq!(get(&router, &path(&last["response"])).await.json(), last["response"]);
}

/// Asks until the response has ended.
async fn ended(router: &Router, path: &str) -> Value {
    let begin = Instant::now();
    loop {
        let now = get(router, path).await.json();
        if now["status"] != "in_progress" {
            return now;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{now}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_response_in_the_background_is_fetched_when_it_has_ended() {
    let app = Setup::default().app();
    let (background, router) = (app.background.clone(), router(app));
    let begun = post(&router, RESPONSES, asking(json!({"background": true}))).await.json();
    assert_eq!((&begun["status"], &begun["background"], &begun["output"]), (&json!("in_progress"), &json!(true), &json!([])));
    let made = ended(&router, &path(&begun)).await;
    assert_eq!((&made["status"], &made["output"][0]["content"][0]["text"]), (&json!("completed"), &json!("Hi 🌊!")));
    let again = ask(&router, "POST", &format!("{}/cancel", path(&begun)), None, Value::Null).await.json();
    assert_eq!(again, made, "what has ended stays as it is");
    while background.running() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let sync = post(&router, RESPONSES, asking(json!({}))).await.json();
    let reply = ask(&router, "POST", &format!("{}/cancel", path(&sync)), None, Value::Null).await;
    assert_eq!(reply.error(), (400, Some("response_id".into()), Some("invalid_value".into())));
}

#[tokio::test]
async fn a_cancelled_or_deleted_response_frees_its_place() {
    let app = Setup::slow(400, 100).app();
    let (background, router) = (app.background.clone(), router(app));
    let idle = async || {
        let begin = Instant::now();
        while background.running() > 0 {
            // Forty seconds is what it would take by itself.
            assert!(begin.elapsed() < Duration::from_secs(30));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let begun = post(&router, RESPONSES, asking(json!({"background": true}))).await.json();
    let going_on = post(&router, RESPONSES, asking(json!({"previous_response_id": begun["id"]}))).await;
    assert_eq!(going_on.error().2.as_deref(), Some("response_in_progress"));
    let cancelled = ask(&router, "POST", &format!("{}/cancel", path(&begun)), None, Value::Null).await.json();
    assert_eq!(cancelled["status"], "cancelled");
    idle().await;
    assert_eq!(get(&router, &path(&begun)).await.json()["status"], "cancelled");

    let begun = post(&router, RESPONSES, asking(json!({"background": true}))).await.json();
    assert_eq!(ask(&router, "DELETE", &path(&begun), None, Value::Null).await.json()["deleted"], true);
    idle().await;
    assert_eq!(get(&router, &path(&begun)).await.error().0, 404);
}

#[tokio::test]
async fn a_response_whose_server_has_gone_has_failed() {
    let app = Setup::default().app();
    let (store, router) = (app.store.clone(), router(app));
    let id = store.issue_id();
    let shown = format!("resp_{}", id.simple());
    let row = StoredResponse {
        id,
        created: 1,
        owner: String::new(),
        user_key: None,
        previous: None,
        status: ResponseStatus::InProgress,
        alive_until: Some(1),
        input: Vec::new(),
        body: json!({"id": shown, "status": "in_progress", "background": true, "output": []}),
    };
    store.save_response(&row).await.unwrap();
    let found = get(&router, &format!("{RESPONSES}/{shown}")).await.json();
    assert_eq!((&found["status"], &found["error"]["code"]), (&json!("failed"), &json!("server_error")));
    assert_eq!(store.response("", id).await.unwrap().unwrap().status, ResponseStatus::Failed);
}

#[tokio::test]
async fn another_key_sees_nothing_of_it() {
    let keys = TwoKeys::new().await;
    let made = keys.ask_mine("POST", RESPONSES, asking(json!({}))).await.json();
    let path = path(&made);
    let reference = json!([{"type": "item_reference", "id": made["output"][0]["id"]}]);
    keys.hides(&[
        ("GET", &path, Value::Null),
        ("GET", &format!("{path}/input_items"), Value::Null),
        ("POST", &format!("{path}/cancel"), Value::Null),
        ("DELETE", &path, Value::Null),
        ("POST", RESPONSES, asking(json!({"input": reference}))),
    ])
    .await;
    let going_on = asking(json!({"previous_response_id": made["id"]}));
    let reply = keys.ask_other("POST", RESPONSES, going_on.clone()).await;
    assert_eq!(reply.error().2.as_deref(), Some("previous_response_not_found"));
    assert_eq!(keys.ask_mine("POST", RESPONSES, going_on).await.status.as_u16(), 200);
    assert_eq!(keys.ask_mine("GET", &path, Value::Null).await.json(), made);
}

#[tokio::test]
async fn a_response_says_the_tier_that_it_was_given() {
    let router = Setup::default().router();
    for (asked, given) in [(json!("flex"), "flex"), (json!("auto"), "default"), (Value::Null, "default")] {
        let made = post(&router, RESPONSES, asking(json!({"service_tier": asked}))).await.json();
        assert_eq!(made["service_tier"], given);
    }
}

#[tokio::test]
async fn short_references_cannot_name_more_than_fits_into_memory() {
    let app = Setup::default().app();
    let (store, router) = (app.store.clone(), router(app));
    let id = store.issue_id();
    let item = |name: &str| format!("msg_{}{name}", id.simple());
    let text = "x".repeat(1 << 20);
    let long = json!({"type": "message", "role": "user", "id": item("i0000"), "content": [{"type": "input_text", "text": text}]});
    let row = StoredResponse {
        id,
        created: 1,
        owner: String::new(),
        user_key: None,
        previous: None,
        status: ResponseStatus::Completed,
        alive_until: None,
        input: vec![long],
        body: json!({"output": []}),
    };
    store.save_response(&row).await.unwrap();
    let refer = async |times: usize| {
        let reference = json!({"type": "item_reference", "id": item("i0000")});
        post(&router, RESPONSES, asking(json!({"input": vec![reference; times]}))).await.error()
    };
    // 33 MB are refused as such; once, it is merely too long for the model.
    assert_eq!(refer(33).await, (400, Some("input".into()), Some("invalid_value".into())));
    assert_eq!(refer(1).await.2.as_deref(), Some("context_length_exceeded"));
}

#[tokio::test]
async fn an_item_that_came_twice_is_listed_once_and_every_page_leads_on() {
    let router = Setup::default().router();
    let first = post(&router, RESPONSES, asking(json!({}))).await.json();
    let reference = json!({"type": "item_reference", "id": first["output"][0]["id"]});
    let input = json!([reference, {"role": "user", "content": "again"}, reference]);
    let second = json!({"previous_response_id": first["id"], "input": input});
    let second = post(&router, RESPONSES, asking(second)).await.json();
    let (mut after, mut seen) = (String::new(), Vec::new());
    for _ in 0..3 {
        let page = get(&router, &format!("{}/input_items?order=asc&limit=1{after}", path(&second))).await.json();
        seen.push(page["data"][0]["content"][0]["text"].as_str().unwrap().to_owned());
        after = format!("&after={}", page["last_id"].as_str().unwrap());
        assert_eq!(page["has_more"], seen.len() < 3);
    }
    assert_eq!(seen, ["hello", "Hi 🌊!", "again"]);
}

#[tokio::test]
async fn bad_requests_are_refused_by_the_name_of_the_field() {
    let router = Setup::default().router();
    for (extra, status, param, code) in [
        (json!({"model": "other"}), 404, "model", "model_not_found"),
        (json!({"input": []}), 400, "input", "empty_array"),
        (json!({"input": "x".repeat(600)}), 400, "input", "context_length_exceeded"),
        (json!({"max_output_tokens": 510}), 400, "input", "context_length_exceeded"),
        (json!({"reasoning": {"effort": "low"}}), 400, "reasoning.effort", "unsupported_parameter"),
        (json!({"colour": 1}), 400, "colour", "unknown_parameter"),
    ] {
        let reply = post(&router, RESPONSES, asking(extra.clone())).await;
        assert_eq!(reply.error(), (status, Some(param.into()), Some(code.into())), "{extra}");
    }
    let made = post(&router, RESPONSES, asking(json!({}))).await.json();
    for (query, param) in [("stream=true", "stream"), ("colour=red", "colour")] {
        assert_eq!(get(&router, &format!("{}?{query}", path(&made))).await.error().1.as_deref(), Some(param));
    }
}

/// Writes tools and reasons, as Qwen 3's does in essence.
const CALLING_TEMPLATE: &str = "{% for tool in tools or [] %}<tool_call>: {{ tool | tojson }}\n{% endfor %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# <think> #}";
const CALLS: &str = "<think>\nhm\n</think>\nBoth:\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Emden\"}}\n</tool_call>\n\
    <tool_call>\n{\"name\": \"time\"}\n</tool_call>";

#[tokio::test]
async fn reasoning_text_and_calls_are_items_and_go_back_as_such() {
    let app = Setup { script: says(CALLS), template: Some(CALLING_TEMPLATE), ..Setup::default() }.app();
    let (store, router) = (app.store.clone(), router(app));
    let function = |name: &str| json!({"type": "function", "name": name, "parameters": {"type": "object"}, "strict": false});
    let tools = json!([function("weather"), function("time")]);
    let made = post(&router, RESPONSES, asking(json!({"tools": tools}))).await.json();
    assert_eq!((&made["status"], &made["tools"]), (&json!("completed"), &tools));
    let output = made["output"].as_array().unwrap();
    let types: Vec<&str> = output.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["reasoning", "message", "function_call", "function_call"]);
    assert!(output[0]["content"][0]["text"].as_str().unwrap().contains("hm"));
    assert_eq!((&output[2]["name"], &output[2]["arguments"]), (&json!("weather"), &json!("{\"city\": \"Emden\"}")));
    assert!(output.iter().all(|item| item["status"] == "completed"));

    let results: Vec<Value> = output[2..]
        .iter()
        .map(|call| json!({"type": "function_call_output", "call_id": call["call_id"], "output": [{"type": "input_text", "text": "ok"}]}))
        .collect();
    let without = post(&router, RESPONSES, asking(json!({"tools": tools, "previous_response_id": made["id"]}))).await;
    assert_eq!(without.error(), (400, Some("input".into()), None));
    let second = json!({"tools": tools, "previous_response_id": made["id"], "input": results, "stream": true});
    let events = events(&post(&router, RESPONSES, asking(second)).await);
    let last = &events.last().unwrap()["response"];
    let of = |kind: &'static str| events.iter().filter(move |event| event["type"] == kind);
    assert_eq!(of("response.output_item.added").count(), 4);
    for (at, done) in of("response.function_call_arguments.done").enumerate() {
        let pieces = of("response.function_call_arguments.delta").filter(|event| event["item_id"] == done["item_id"]);
        let pieces: String = pieces.map(|event| event["delta"].as_str().unwrap()).collect();
        assert_eq!((pieces.as_str(), &done["item_id"]), (done["arguments"].as_str().unwrap(), &last["output"][at + 2]["id"]));
    }
    let thought: String = of("response.reasoning_text.delta").map(|event| event["delta"].as_str().unwrap()).collect();
    assert_eq!(last["output"][0]["content"][0]["text"], thought);
    let items: Vec<&Value> = of("response.output_item.done").map(|event| &event["item"]).collect();
    assert_eq!(json!(items), last["output"]);

    store.flush().await;
    let id = Uuid::parse_str(last["id"].as_str().unwrap().strip_prefix("resp_").unwrap()).unwrap();
    let messages = store.inference(id).await.unwrap().unwrap().messages.unwrap();
    let roles: Vec<&str> = messages.as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "assistant", "tool", "tool"]);
    let answer = &messages[1];
    assert_eq!(answer["tool_calls"][0]["function"], json!({"name": "weather", "arguments": {"city": "Emden"}}));
    assert!(
        answer["reasoning_content"].as_str().unwrap().contains("hm") && answer["content"].as_str().unwrap().contains("Both:")
    );
    assert_eq!((&messages[2]["content"], &messages[2]["tool_call_id"]), (&json!("ok"), &output[2]["call_id"]));
}
