//! Keys over HTTP: made, changed, rotated, revoked, and remembered.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use crate::support::{MODEL, Reply, Setup, chat, not_at_midnight, send};
use axum::Router;
use axum::body::Body;
use hyper::Request;
use serde_json::{Value, json};
use tidemill::http::router;
use tidemill_store::Scope;

const KEYS: &str = "/v1/admin/keys";

struct Admin {
    router: Router,
    secret: String,
}

impl Admin {
    async fn new() -> Self {
        let app = Setup::default().app();
        let (_, secret) = app.store.create_key("boss", &[Scope::Admin]).await.unwrap();
        Self { router: router(app), secret }
    }

    async fn with(&self, secret: &str, method: &str, path: &str, body: Value) -> Reply {
        let request = Request::builder().method(method).uri(path).header("authorization", format!("Bearer {secret}"));
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        send(&self.router, request.body(body).unwrap()).await
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> Reply {
        self.with(&self.secret, method, path, body).await
    }

    async fn chats(&self, secret: &str) -> u16 {
        self.with(secret, "POST", "/v1/chat/completions", chat(json!({}))).await.status.as_u16()
    }
}

#[tokio::test]
async fn a_key_is_made_read_changed_rotated_and_revoked() {
    not_at_midnight().await;
    let admin = Admin::new().await;
    let made = admin
        .call(
            "POST",
            KEYS,
            json!({"name": "app", "scopes": ["chat"], "limits": {"concurrent": 2}, "weight": 3, "expires_at": 4_000_000_000_u64}),
        )
        .await;
    assert_eq!(made.status, 201);
    let key = made.json();
    let secret = key["key"].as_str().unwrap().to_owned();
    let path = format!("{KEYS}/{}", key["id"].as_str().unwrap());
    assert_eq!(
        (&key["limits"], &key["weight"], &key["expires_at"]),
        (&json!({"concurrent": 2}), &json!(3), &json!(4_000_000_000_u64))
    );
    assert_eq!(admin.chats(&secret).await, 200);
    let read = admin.call("GET", &path, Value::Null).await.json();
    assert!(read.get("key").is_none());
    assert_eq!((&read["usage_today"]["requests"], &read["prefix"]), (&json!(1), &json!(secret[..8])));
    assert_eq!(
        admin.call("POST", KEYS, json!({"name": "app", "scopes": ["chat"]})).await.error(),
        (409, Some("name".into()), Some("name_taken".into()))
    );

    let changed =
        admin.call("PATCH", &path, json!({"models": ["other"], "service_tier": "flex", "expires_at": null})).await.json();
    assert_eq!(
        (&changed["models"], &changed["service_tier"], &changed["expires_at"]),
        (&json!(["other"]), &json!("flex"), &Value::Null)
    );
    assert_eq!(changed["limits"], json!({"concurrent": 2}), "what is not named stays");
    assert_eq!(admin.chats(&secret).await, 403, "a change takes hold at once");
    admin.call("PATCH", &path, json!({"models": [MODEL]})).await;
    assert_eq!(admin.chats(&secret).await, 200);

    let rotated = admin.call("POST", &format!("{path}/rotate"), json!({"overlap_seconds": 3600})).await.json();
    let newer = rotated["key"].as_str().unwrap().to_owned();
    assert_eq!((&rotated["id"], &rotated["limits"]), (&key["id"], &json!({"concurrent": 2})));
    assert_eq!((admin.chats(&secret).await, admin.chats(&newer).await), (200, 200));
    // Without overlap both older secrets end.
    let newest = admin.call("POST", &format!("{path}/rotate"), json!({"overlap_seconds": 0})).await.json()["key"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!((admin.chats(&secret).await, admin.chats(&newer).await, admin.chats(&newest).await), (401, 401, 200));
    let read = admin.call("GET", &path, Value::Null).await.json();
    assert_eq!(read["usage_today"]["requests"], 5, "one key, whatever its secret");

    assert_eq!(admin.call("DELETE", &path, Value::Null).await.status, 200);
    assert_eq!(admin.chats(&newest).await, 401);
    assert_eq!(admin.call("PATCH", &path, json!({"weight": 2})).await.error().0, 404);
    let all = admin.call("GET", KEYS, Value::Null).await.json();
    let names: Vec<_> = all["data"].as_array().unwrap().iter().map(|key| key["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["boss", "app"]);
    assert!(all["data"][1]["revoked_at"].is_u64());
}

#[tokio::test]
async fn an_expired_key_is_refused_and_says_so() {
    let admin = Admin::new().await;
    let made = admin.call("POST", KEYS, json!({"name": "old", "scopes": ["chat"]})).await.json();
    let secret = made["key"].as_str().unwrap();
    assert_eq!(admin.chats(secret).await, 200);
    admin.call("PATCH", &format!("{KEYS}/old"), json!({"expires_at": 1_600_000_000})).await;
    let reply = admin.with(secret, "POST", "/v1/chat/completions", chat(json!({}))).await;
    assert_eq!(reply.error(), (401, None, Some("invalid_api_key".into())));
}

#[tokio::test]
async fn only_an_administrator_touches_keys_and_each_mistake_is_named() {
    let admin = Admin::new().await;
    let made = admin.call("POST", KEYS, json!({"name": "app", "scopes": ["chat", "train", "label", "feedback"]})).await.json();
    let secret = made["key"].as_str().unwrap();
    for (method, path) in [
        ("GET", KEYS.to_owned()),
        ("POST", KEYS.to_owned()),
        ("DELETE", format!("{KEYS}/app")),
        ("POST", format!("{KEYS}/app/rotate")),
    ] {
        assert_eq!(admin.with(secret, method, &path, json!({})).await.error().0, 403, "{method} {path}");
    }
    for (body, param) in [
        (json!({"scopes": ["chat"]}), "name"),
        (json!({"name": "x"}), "scopes"),
        (json!({"name": " \u{7} ", "scopes": ["chat"]}), "name"),
        (json!({"name": "x", "scopes": ["chat"], "colour": 1}), "colour"),
        (json!({"name": "x", "scopes": ["chat"], "limits": {"concurrent": "2"}}), "limits.concurrent"),
    ] {
        assert_eq!(admin.call("POST", KEYS, body.clone()).await.error().1.as_deref(), Some(param), "{body}");
    }
    assert_eq!(admin.call("POST", &format!("{KEYS}/nobody/rotate"), Value::Null).await.error().0, 404);
    assert_eq!(
        admin.call("POST", &format!("{KEYS}/app/rotate"), json!({"overlap_seconds": -1})).await.error().1.as_deref(),
        Some("overlap_seconds")
    );
}

#[tokio::test]
async fn a_key_counts_tokens_of_its_own_models_only() {
    let admin = Admin::new().await;
    let made = admin.call("POST", KEYS, json!({"name": "app", "scopes": ["chat"], "models": ["other"]})).await.json();
    let secret = made["key"].as_str().unwrap();
    let messages = json!([{"role": "user", "content": "x"}]);
    for (path, model, status) in [
        ("/v1/messages/count_tokens", MODEL, 403),
        // What exists here is not its business.
        ("/v1/messages/count_tokens", "nothing", 403),
        ("/tokenize", MODEL, 403),
        ("/tokenize", "nothing", 403),
        ("/v1/responses/input_tokens", MODEL, 403),
        ("/v1/messages/count_tokens", "other", 404),
        ("/tokenize", "other", 404),
    ] {
        let key = if path.starts_with("/v1/responses") { "input" } else { "messages" };
        let reply = admin.with(secret, "POST", path, json!({"model": model, key: messages})).await;
        assert_eq!(reply.status, status, "{path} {model}");
    }
}
