//! Chats with `store: true` can be read, found, changed and deleted by the key that made them, and by no other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support::{Setup, TwoKeys, ask, chat, get, post};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_chat_is_kept_as_it_was_answered_streamed_or_not() {
    let router = Setup::default().router();
    let asked = json!({"store": true, "metadata": {"topic": "sea"}, "seed": 7, "temperature": 0.5, "user": "u"});
    let whole = post(&router, CHAT, chat(asked.clone())).await.json();
    let mut streamed = asked;
    streamed["stream"] = true.into();
    let chunks = post(&router, CHAT, chat(streamed)).await.chunks();
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "stop");

    for id in [&whole["id"], &chunks[0]["id"]] {
        let path = format!("{CHAT}/{}", id.as_str().unwrap());
        let kept = get(&router, &path).await.json();
        assert_eq!((&kept["id"], &kept["object"]), (id, &json!("chat.completion")));
        for key in ["model", "choices", "usage", "system_fingerprint"] {
            assert_eq!(kept[key], whole[key], "{key}");
        }
        assert_eq!((&kept["metadata"], &kept["seed"]), (&json!({"topic": "sea"}), &json!(7)));
        assert_eq!((&kept["temperature"], &kept["input_user"], &kept["tools"]), (&json!(0.5), &json!("u"), &Value::Null));

        let messages = get(&router, &format!("{path}/messages")).await.json();
        let shown = json!({"id": format!("{}-0", id.as_str().unwrap()), "role": "user", "content": "hello", "name": null, "content_parts": null});
        assert_eq!((&messages["data"], &messages["has_more"]), (&json!([shown]), &json!(false)));
    }
}

#[tokio::test]
async fn what_is_not_asked_to_be_kept_is_not() {
    let router = Setup::default().router();
    let answer = post(&router, CHAT, chat(json!({}))).await.json();
    let reply = get(&router, &format!("{CHAT}/{}", answer["id"].as_str().unwrap())).await;
    assert_eq!(reply.error(), (404, Some("completion_id".into()), Some("not_found".into())));
    assert_eq!(get(&router, CHAT).await.json()["data"], json!([]));
}

#[tokio::test]
async fn chats_are_listed_in_pages_changed_and_deleted() {
    let router = Setup::default().router();
    let mut ids = Vec::new();
    for topic in ["a", "b", "b"] {
        let answer = post(&router, CHAT, chat(json!({"store": true, "metadata": {"topic": topic}}))).await.json();
        ids.push(answer["id"].as_str().unwrap().to_owned());
    }
    let listed = async |query: &str| {
        let list = get(&router, &format!("{CHAT}?{query}")).await.json();
        let found: Vec<String> =
            list["data"].as_array().unwrap().iter().map(|chat| chat["id"].as_str().unwrap().to_owned()).collect();
        assert_eq!((list["object"].as_str(), list["last_id"].as_str()), (Some("list"), found.last().map(String::as_str)));
        (found, list["has_more"].as_bool().unwrap())
    };
    assert_eq!(listed("limit=2").await, (ids[..2].to_vec(), true));
    assert_eq!(listed(&format!("limit=2&after={}", ids[1])).await, (ids[2..].to_vec(), false));
    assert_eq!(listed("order=desc&limit=1").await, (ids[2..].to_vec(), true));
    assert_eq!(listed("metadata[topic]=a").await.0, ids[..1]);
    assert!(listed("model=other").await.0.is_empty());
    assert_eq!(get(&router, &format!("{CHAT}?limit=101")).await.error().1.as_deref(), Some("limit"));
    assert_eq!(get(&router, &format!("{CHAT}?after=x")).await.error().1.as_deref(), Some("after"));

    let path = format!("{CHAT}/{}", ids[0]);
    let changed = post(&router, &path, json!({"metadata": {"topic": "b"}})).await.json();
    assert_eq!((&changed["metadata"], changed["id"].as_str()), (&json!({"topic": "b"}), Some(ids[0].as_str())));
    assert_eq!(listed("metadata[topic]=b").await.0, ids);
    assert_eq!(post(&router, &path, json!({})).await.error().2.as_deref(), Some("missing_required_parameter"));
    assert_eq!(post(&router, &path, json!({"metadata": {}, "model": "m"})).await.error().1.as_deref(), Some("model"));

    let deleted = ask(&router, "DELETE", &path, None, Value::Null).await.json();
    assert_eq!(deleted, json!({"object": "chat.completion.deleted", "id": ids[0], "deleted": true}));
    assert_eq!(ask(&router, "DELETE", &path, None, Value::Null).await.error().0, 404);
    assert_eq!(listed("").await.0, ids[1..]);
}

#[tokio::test]
async fn another_key_sees_nothing_of_it() {
    let keys = TwoKeys::new().await;
    let answer = keys.ask_mine("POST", CHAT, chat(json!({"store": true}))).await.json();
    let path = format!("{CHAT}/{}", answer["id"].as_str().unwrap());
    assert_eq!(keys.ask_mine("GET", &path, Value::Null).await.json()["id"], answer["id"]);
    assert_eq!(keys.ask_other("GET", CHAT, Value::Null).await.json()["data"], json!([]));
    keys.hides(&[
        ("GET", &path, Value::Null),
        ("GET", &format!("{path}/messages"), Value::Null),
        ("POST", &path, json!({"metadata": {"a": "b"}})),
        ("DELETE", &path, Value::Null),
    ])
    .await;
    assert_eq!(keys.ask_mine("GET", &path, Value::Null).await.json()["metadata"], json!({}));
}

#[tokio::test]
async fn a_kept_chat_says_the_tier_that_it_had() {
    let router = Setup::default().router();
    let made = post(&router, CHAT, chat(json!({"store": true, "service_tier": "flex"}))).await.json();
    let chunks = post(&router, CHAT, chat(json!({"store": true, "service_tier": "flex", "stream": true}))).await.chunks();
    for id in [&made["id"], &chunks[0]["id"]] {
        assert_eq!(get(&router, &format!("{CHAT}/{}", id.as_str().unwrap())).await.json()["service_tier"], "flex");
    }
}
