//! The feedback API over a store, and keys.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support::{Reply, Setup, ask, chat, get, post, send};
use axum::Router;
use axum::body::Body;
use hyper::Request;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tidemill::feedback::{Metric, MetricKind, Optimize};
use tidemill::http::{App, Auth, router};
use tidemill_store::{Scope, Store};

const FEEDBACK: &str = "/v1/feedback";

fn setup() -> (Store, Router) {
    let metric = |closed| Metric {
        kind: MetricKind::Number,
        optimize: Optimize::Max,
        min: Some(0.0),
        max: Some(10.0),
        closed,
        level: None,
    };
    let metrics = [("score".to_owned(), metric(false)), ("old".to_owned(), metric(true))].into();
    let app = Setup { metrics, ..Setup::default() }.app();
    (app.store.clone(), router(app))
}

async fn answer(router: &Router, extra: Value) -> String {
    post(router, "/v1/chat/completions", chat(extra)).await.json()["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn every_kind_is_taken_shown_and_listed() {
    let (store, router) = setup();
    let id = answer(&router, json!({"tidemill": {"conversation": "c-9"}})).await;
    store.flush().await;
    let bare = id.strip_prefix("chatcmpl-").unwrap();
    let pair = post(&router, "/v1/chat/completions", chat(json!({"n": 2, "tidemill": {"compare": true}}))).await.json();
    let (a, b) = (&pair["choices"][0]["tidemill"]["id"], &pair["choices"][1]["tidemill"]["id"]);
    let bodies = [
        json!({"target": id, "kind": "thumb", "value": "down", "author": "ann", "tags": ["t"]}),
        json!({"target": bare, "kind": "rating", "value": 4, "scale": [1, 5]}),
        json!({"kind": "comparison", "value": {"candidates": [a, b], "winner": b}, "shown": [b, a]}),
        json!({"target": id, "kind": "correction", "value": "Hi there."}),
        json!({"target": id, "kind": "comment", "value": "too short"}),
        json!({"target": "c-9", "kind": "metric", "metric": "score", "value": 7}),
    ];
    for body in &bodies {
        let reply = post(&router, FEEDBACK, body.clone()).await;
        assert_eq!(reply.status, 201, "{body} {}", reply.json());
        let made = reply.json();
        let shown = get(&router, &format!("{FEEDBACK}/{}", made["id"].as_str().unwrap())).await.json();
        assert_eq!(shown, made, "what was acknowledged is what is there");
    }
    let all = &router;
    let list = |query: &'static str| async move {
        get(all, &format!("{FEEDBACK}?{query}")).await.json()["data"].as_array().unwrap().len()
    };
    assert_eq!(list("").await, 6);
    assert_eq!(
        (list("kind=thumb").await, list("author=ann").await, list("tag=t").await, list("metric=score").await),
        (1, 1, 1, 1)
    );
    assert_eq!((list("target=c-9").await, list("source=api").await, list("until=1").await), (1, 6, 0));
    let of_b = get(&router, &format!("{FEEDBACK}?target={}", b.as_str().unwrap())).await.json();
    assert_eq!(of_b["data"][0]["kind"], "comparison", "a comparison is found by each of its candidates");
    let mut seen = Vec::new();
    let mut after = String::new();
    loop {
        let page = get(&router, &format!("{FEEDBACK}?limit=4&order=asc{after}")).await.json();
        seen.extend(page["data"].as_array().unwrap().iter().map(|item| item["kind"].as_str().unwrap().to_owned()));
        if page["has_more"] == false {
            break;
        }
        after = format!("&after={}", page["last_id"].as_str().unwrap());
    }
    assert_eq!(seen, ["thumb", "rating", "comparison", "correction", "comment", "metric"]);
    assert_eq!(
        get(&router, "/v1/feedback?colour=red").await.error(),
        (400, Some("colour".into()), Some("unknown_parameter".into()))
    );
}

#[tokio::test]
async fn what_only_the_store_knows_is_checked_too() {
    let (store, router) = setup();
    let id = answer(&router, json!({})).await;
    let other = answer(&router, json!({"messages": [{"role": "user", "content": "something else"}]})).await;
    store.flush().await;
    for (body, status, param, code) in [
        (
            json!({"target": "chatcmpl-0198c0de-0000-7000-8000-000000000000", "kind": "thumb", "value": true}),
            404,
            "target",
            "target_not_found",
        ),
        (json!({"target": "no-such-conversation", "kind": "thumb", "value": true}), 404, "target", "target_not_found"),
        (json!({"target": id, "kind": "metric", "metric": "old", "value": 1}), 400, "metric", "metric_closed"),
        (
            json!({"kind": "comparison", "value": {"candidates": [id, other], "tie": true}}),
            400,
            "value.candidates.1",
            "different_prompts",
        ),
    ] {
        let reply = post(&router, FEEDBACK, body).await;
        assert_eq!(reply.error(), (status, Some(param.into()), Some(code.into())));
    }
    // Same prompt, other request: comparable.
    let again = answer(&router, json!({})).await;
    store.flush().await;
    let body = json!({"kind": "comparison", "value": {"candidates": [id, again], "both_bad": true}});
    assert_eq!(post(&router, FEEDBACK, body).await.status, 201);
    // An id that was issued is a target before its answer is there.
    let early = json!({"target": store.issue_id(), "kind": "thumb", "value": true});
    assert_eq!(post(&router, FEEDBACK, early).await.status, 201);
    for path in ["/v1/feedback/nonsense", "/v1/feedback/0198c0de-0000-7000-8000-000000000000"] {
        assert_eq!(get(&router, path).await.error().2.as_deref(), Some("feedback_not_found"));
    }
}

#[tokio::test]
async fn a_batch_has_a_result_for_each_item() {
    let (_, router) = setup();
    let id = answer(&router, json!({})).await;
    let good = json!({"target": id, "kind": "thumb", "value": true});
    let reply = post(&router, FEEDBACK, json!([good, {"target": id, "kind": "rating", "value": 2}, 5, good])).await;
    assert_eq!(reply.status, 207);
    let data = reply.json()["data"].clone();
    assert_eq!(
        data.as_array().unwrap().iter().map(|item| item["status"].as_u64().unwrap()).collect::<Vec<_>>(),
        [201, 400, 400, 201]
    );
    assert_eq!((&data[1]["error"]["param"], &data[2]["error"]["param"]), (&json!("1.value"), &json!("2")));
    assert_ne!(data[0]["id"], data[3]["id"]);
    assert_eq!(post(&router, FEEDBACK, json!([good, good])).await.status, 201);
    assert_eq!(post(&router, FEEDBACK, json!([])).await.status, 400);
    assert_eq!(get(&router, FEEDBACK).await.json()["data"].as_array().unwrap().len(), 4);
}

#[tokio::test]
async fn a_batch_waits_once_for_conversations_that_may_be_on_their_way() {
    let (_, router) = setup();
    let item = |n: usize| json!({"target": format!("nobody-{n}"), "kind": "thumb", "value": true});
    let start = Instant::now();
    let reply = post(&router, FEEDBACK, (0..400).map(item).collect()).await;
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let data = reply.json()["data"].as_array().unwrap().clone();
    assert!(data.len() == 400 && data.iter().all(|item| item["error"]["code"] == "target_not_found"));
}

#[tokio::test]
async fn the_same_idempotency_key_is_the_same_feedback() {
    let (_, router) = setup();
    let id = answer(&router, json!({})).await;
    let mut body = json!({"target": id, "kind": "thumb", "value": true, "idempotency_key": "k-1"});
    let first = post(&router, FEEDBACK, body.clone()).await.json();
    body["value"] = false.into();
    let reply = post(&router, FEEDBACK, body).await;
    let second = reply.json();
    assert_eq!((reply.status.as_u16(), &second["id"], &second["value"]), (200, &first["id"], &json!(true)));
    assert_eq!(second["duplicate"], true);
    let with_header = || {
        let body = json!([{"target": id, "kind": "thumb", "value": true}, {"target": id, "kind": "comment", "value": "x"}]);
        Request::post(FEEDBACK).header("idempotency-key", "h-1").body(Body::from(body.to_string())).unwrap()
    };
    let ids = |reply: Reply| reply.json()["data"].as_array().unwrap().iter().map(|item| item["id"].clone()).collect::<Vec<_>>();
    let first = ids(send(&router, with_header()).await);
    assert_eq!(ids(send(&router, with_header()).await), first);
    assert_ne!(first[0], first[1]);
}

#[tokio::test]
async fn feedback_can_be_edited_and_withdrawn() {
    let (_, router) = setup();
    let id = answer(&router, json!({})).await;
    let made = post(&router, FEEDBACK, json!({"target": id, "kind": "rating", "value": 0.5})).await.json();
    let path = format!("{FEEDBACK}/{}", made["id"].as_str().unwrap());
    let edited =
        ask(&router, "PATCH", &path, None, json!({"value": 3, "scale": [1, 5], "tags": ["second thought"]})).await.json();
    assert_eq!((&edited["number"], &edited["revision"], &edited["tags"]), (&json!(0.5), &json!(2), &json!(["second thought"])));
    let again = ask(&router, "PATCH", &path, None, json!({"value": 1})).await.json();
    assert_eq!((&again["value"], &again["number"]), (&json!({"given": 1, "scale": [1, 5]}), &json!(0.0)), "on the same scale");
    assert_eq!(ask(&router, "PATCH", &path, None, json!({"value": 6})).await.error().1.as_deref(), Some("value"));
    for _ in 0..2 {
        let gone = ask(&router, "DELETE", &path, None, json!({})).await;
        assert_eq!((gone.status.as_u16(), gone.json()["withdrawn"].clone()), (200, json!(true)));
    }
    assert_eq!(ask(&router, "PATCH", &path, None, json!({"value": 1})).await.error(), (409, None, Some("withdrawn".into())));
    assert_eq!(get(&router, "/v1/feedback?withdrawn=false").await.json()["data"], json!([]));
}

#[tokio::test]
async fn only_the_key_that_sent_a_feedback_and_an_administrator_change_it() {
    let (store, router) = setup();
    let id = answer(&router, json!({})).await;
    let early = post(&router, FEEDBACK, json!({"target": id, "kind": "thumb", "value": true})).await.json();
    let mut secrets = Vec::new();
    for (name, scope) in [("own", Scope::Feedback), ("other", Scope::Feedback), ("boss", Scope::Admin)] {
        secrets.push(store.create_key(name, &[scope]).await.unwrap().1);
    }
    let [own, other, boss] = &secrets[..] else { panic!("three were made") };
    let thumb = json!({"target": id, "kind": "thumb", "value": true});
    let made = ask(&router, "POST", FEEDBACK, Some(own), thumb).await.json();
    let path = format!("{FEEDBACK}/{}", made["id"].as_str().unwrap());
    let refused = (403, None, Some("insufficient_permissions".to_owned()));
    for method in ["PATCH", "DELETE"] {
        assert_eq!(ask(&router, method, &path, Some(other), json!({"value": false})).await.error(), refused, "{method}");
    }
    let shown = ask(&router, "GET", &path, Some(other), json!({})).await.json();
    assert_eq!((&shown["value"], &shown["withdrawn"]), (&json!(true), &json!(false)), "anyone may read it");
    assert_eq!(ask(&router, "PATCH", &path, Some(own), json!({"value": false})).await.status, 200);
    let (_, rotated) = store.rotate_key("own", Duration::ZERO, "boss").await.unwrap().unwrap();
    assert_eq!(ask(&router, "PATCH", &path, Some(&rotated), json!({"value": true})).await.status, 200, "one key, another secret");
    assert_eq!(ask(&router, "DELETE", &path, Some(boss), json!({})).await.status, 200);
    // From before there were keys: it is nobody's.
    let path = format!("{FEEDBACK}/{}", early["id"].as_str().unwrap());
    assert_eq!(ask(&router, "DELETE", &path, Some(&rotated), json!({})).await.error(), refused);
    assert_eq!(ask(&router, "DELETE", &path, Some(boss), json!({})).await.status, 200);
}

#[tokio::test]
async fn keys_open_what_their_scopes_say() {
    let (store, router) = setup();
    let id = answer(&router, json!({})).await;
    let thumb = json!({"target": id, "kind": "thumb", "value": true});
    let (_, chatter) = store.create_key("app", &[Scope::Chat]).await.unwrap();
    let (judge_key, judge) = store.create_key("judge", &[Scope::Feedback]).await.unwrap();
    let (_, admin) = store.create_key("boss", &[Scope::Admin]).await.unwrap();
    let with = async |secret: &str, path: &str, body: &Value| ask(&router, "POST", path, Some(secret), body.clone()).await;
    let say = chat(json!({}));
    for secret in ["", "tm-wrong"] {
        let reply = with(secret, FEEDBACK, &thumb).await;
        assert_eq!(reply.error(), (401, None, Some("invalid_api_key".into())));
        assert_eq!(reply.headers["www-authenticate"], "Bearer");
        assert!(!String::from_utf8_lossy(&reply.body).contains("tm-wrong"));
    }
    assert_eq!(get(&router, "/v1/models").await.error().0, 401);
    for open in ["/health", "/ready", "/version"] {
        assert_eq!(get(&router, open).await.status, 200, "{open}");
    }
    assert_eq!(with(&chatter, "/v1/chat/completions", &say).await.status, 200);
    assert_eq!(with(&chatter, FEEDBACK, &thumb).await.error(), (403, None, Some("insufficient_permissions".into())));
    assert_eq!(with(&judge, "/v1/chat/completions", &say).await.error().0, 403);
    let made = with(&judge, FEEDBACK, &thumb).await;
    assert_eq!(made.status, 201);
    let kept = store.feedback(made.json()["id"].as_str().unwrap().parse().unwrap()).await.unwrap().unwrap();
    assert_eq!(kept.key_id, Some(judge_key.id.to_string()));
    assert_eq!(
        (with(&admin, FEEDBACK, &thumb).await.status.as_u16(), with(&admin, "/v1/chat/completions", &say).await.status.as_u16()),
        (201, 200)
    );
    store.revoke_key("judge", "boss").await.unwrap().unwrap();
    assert_eq!(with(&judge, FEEDBACK, &thumb).await.error().0, 401);
    store.revoke_key("app", "boss").await.unwrap().unwrap();
    store.revoke_key("boss", "boss").await.unwrap().unwrap();
    assert_eq!(with("", FEEDBACK, &thumb).await.error().0, 401, "revoking the last key opens nothing");
    let again = App { auth: Auth::new(store.clone(), false), ..Setup::default().app() };
    let reply = post(&tidemill::http::router(again), FEEDBACK, thumb).await;
    assert_eq!(reply.error().0, 401, "nor does a restart after it");
}
