//! Labeling over HTTP: who may see what, and queues that fill themselves.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking; the lint knows test functions only")]

use crate::support::{Setup, answered, ask, get, judged, post};
use axum::Router;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tidemill::http::{App, router};
use tidemill::labeling::filler::keep_filling;
use tidemill_store::Scope;
use tidemill_store::records::Kind;
use uuid::Uuid;

fn pair(source: &str) -> Value {
    json!({"source": source, "prompt": "Why?", "answer_a": "because", "answer_b": "why not"})
}

async fn make(router: &Router, name: &str, rule: Value) -> String {
    let reply = post(router, "/v1/labeling/queues", json!({"name": name, "rule": rule})).await;
    assert_eq!(reply.status.as_u16(), 201, "{}", reply.json());
    reply.json()["id"].as_str().unwrap().to_owned()
}

async fn tasks(router: &Router, queue: &str) -> Vec<Value> {
    get(router, &format!("/v1/labeling/queues/{queue}/tasks")).await.json()["data"].as_array().unwrap().clone()
}

/// Lets the filler work until `ready` says so.
async fn fill(app: &App, ready: impl AsyncFn() -> bool) {
    let filler = tokio::spawn(keep_filling(app.clone()));
    let start = Instant::now();
    while !ready().await {
        assert!(start.elapsed() < Duration::from_secs(60), "the queues did not fill");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    filler.abort();
}

#[tokio::test]
async fn annotators_see_sides_and_nothing_that_tells_them_apart() {
    let app = Setup::default().app();
    let (_, label) = app.store.create_key("ann", &[Scope::Label]).await.unwrap();
    let (_, train) = app.store.create_key("boss", &[Scope::Train]).await.unwrap();
    let router = router(app);
    assert_eq!(get(&router, "/v1/labeling/queues").await.error().0, 401);
    let queue = json!({"name": "q", "guidelines": "Be fair.", "gold_share": 0.5, "overlap": 2});
    assert_eq!(ask(&router, "POST", "/v1/labeling/queues", Some(&label), queue.clone()).await.error().0, 403);
    let made = ask(&router, "POST", "/v1/labeling/queues", Some(&train), queue.clone()).await;
    assert_eq!((made.status.as_u16(), made.json()["overlap"].as_u64()), (201, Some(2)));
    let again = ask(&router, "POST", "/v1/labeling/queues", Some(&train), queue).await.error();
    assert_eq!((again.0, again.1.as_deref(), again.2.as_deref()), (409, Some("name"), Some("name_taken")));
    let mut gold = pair("g");
    gold["gold"] = "a".into();
    // A gold task comes by chance: forty turns at one in two leave it out once in 10^12 runs.
    let tasks: Vec<Value> = std::iter::once(gold).chain((0..40).map(|n| pair(&format!("p{n}")))).collect();
    let added = ask(&router, "POST", "/v1/labeling/queues/q/tasks", Some(&train), json!({ "tasks": tasks })).await;
    assert_eq!(added.json(), json!({"added": 41, "known": 0}));

    for (method, path) in [("GET", "q"), ("GET", "q/tasks"), ("POST", "q/tasks"), ("GET", "q/statistics"), ("PATCH", "q")] {
        let path = format!("/v1/labeling/queues/{path}");
        assert_eq!(ask(&router, method, &path, Some(&label), json!({})).await.error().0, 403, "{method} {path}");
    }
    let me = ask(&router, "GET", "/v1/labeling/me", Some(&train), json!({})).await.json();
    assert_eq!(me, json!({"annotator": "boss", "keyed": true, "operator": true}));
    let list = ask(&router, "GET", "/v1/labeling/queues", Some(&label), json!({})).await.json();
    let keys: Vec<&String> = list["data"][0].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["id", "name", "guidelines", "closed"]);
    for _ in 0..41 {
        let next = ask(&router, "POST", "/v1/labeling/queues/q/next", Some(&label), json!({})).await.json();
        let keys: Vec<&String> = next["task"].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["assignment", "prompt", "left", "right"], "a gold task looks like any other");
        let path = format!("/v1/labeling/assignments/{}/verdict", next["task"]["assignment"].as_str().unwrap());
        let wrong = ask(&router, "POST", &path, Some(&label), json!({"choice": "middle"})).await.error();
        assert_eq!((wrong.0, wrong.1.as_deref()), (400, Some("choice")));
        assert_eq!(ask(&router, "POST", &path, Some(&train), json!({"choice": "tie"})).await.error().0, 403);
        let before = next["progress"]["completed"].as_u64().unwrap();
        let done = ask(&router, "POST", &path, Some(&label), json!({"choice": "tie", "next": true})).await.json();
        assert_eq!(done["progress"]["completed"].as_u64().unwrap(), before + 1, "gold counts like any other");
        let other = ask(&router, "POST", &path, Some(&label), json!({"choice": "left"})).await.error();
        assert_eq!((other.0, other.2.as_deref()), (409, Some("already_judged")));
    }
    let end = ask(&router, "POST", "/v1/labeling/queues/q/next", Some(&label), json!({})).await.json();
    assert_eq!((&end["task"], &end["why"]), (&Value::Null, &json!("yours_done")));
    let statistics = ask(&router, "GET", "/v1/labeling/queues/q/statistics", Some(&train), json!({})).await.json();
    assert_eq!(statistics["raters"][0]["annotator"], "ann");
    assert_eq!(statistics["raters"][0]["gold"]["trials"], 1);
}

#[tokio::test]
async fn a_wrong_field_is_named() {
    let router = Setup::default().router();
    for (body, param) in [
        (json!({}), "name"),
        (json!({"name": " "}), "name"),
        (json!({"name": "q", "overlap": 0}), "overlap"),
        (json!({"name": "q", "gold_share": 2}), "gold_share"),
        (json!({"name": "q", "rule": {"from": "moon"}}), "rule"),
        (json!({"name": "q", "rule": {"from": "traffic", "share": 0}}), "rule.share"),
        (json!({"name": "q", "colour": 1}), "colour"),
    ] {
        let error = post(&router, "/v1/labeling/queues", body.clone()).await.error();
        assert_eq!((error.0, error.1.as_deref()), (400, Some(param)), "{body}");
    }
    make(&router, "q", json!({"from": "upload"})).await;
    let error = post(&router, "/v1/labeling/queues/q/tasks", json!({"tasks": [{"prompt": "a", "answer_a": "b"}]})).await.error();
    assert_eq!((error.0, error.1.as_deref()), (400, Some("tasks.0.answer_b")));
    let error = post(&router, "/v1/labeling/queues/q/prompts", json!({"prompts": ["a", ""]})).await.error();
    assert_eq!((error.0, error.1.as_deref()), (400, Some("prompts.1")));
    assert_eq!(post(&router, "/v1/labeling/queues/q/next", json!({})).await.error().1.as_deref(), Some("annotator"));
    assert_eq!(post(&router, "/v1/labeling/queues/none/next", json!({"annotator": "a"})).await.error().0, 404);
    assert_eq!(get(&router, "/v1/labeling/queues/q/tasks?limit=0").await.error().1.as_deref(), Some("limit"));
}

#[tokio::test]
async fn each_rule_draws_its_own_traffic() {
    let app = Setup::default().app();
    let router = router(app.clone());
    let sure = answered(&app.store, "u1", "hello", &["sure one", "sure two"], -0.2);
    let unsure = answered(&app.store, "u1", "hello", &["unsure one", "unsure two"], -3.0);
    let disliked = answered(&app.store, "u1", "hello", &["bad one", "bad two"], -0.2);
    for answer in [&sure, &unsure, &disliked] {
        app.store.record(answer.clone()).unwrap();
    }
    app.store.flush().await;
    app.store
        .add_feedback(vec![
            judged(&app.store, disliked.id, None, Kind::Thumb, json!(false)),
            judged(&app.store, sure.id, None, Kind::Thumb, json!(true)),
        ])
        .await
        .unwrap();
    let all = make(&router, "all", json!({"from": "traffic"})).await;
    let low = make(&router, "low", json!({"from": "traffic", "low_thumb": true})).await;
    let uncertain = make(&router, "uncertain", json!({"from": "traffic", "mean_logprob_below": -1.0})).await;
    let other = make(&router, "other", json!({"from": "traffic", "models": ["another"]})).await;
    // A pass takes the queues one by one, in the order in which they were made: what comes into the last one was there for all.
    let last = make(&router, "last", json!({"from": "traffic"})).await;
    fill(&app, async || tasks(&router, &last).await.len() == 3).await;
    assert_eq!((tasks(&router, &all).await.len(), tasks(&router, &low).await.len()), (3, 1));
    let sources = async |queue: &str| -> Vec<String> {
        tasks(&router, queue).await.iter().map(|task| task["source"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(sources(&low).await, [disliked.id.to_string()]);
    assert_eq!(sources(&uncertain).await, [unsure.id.to_string()]);
    assert!(sources(&other).await.is_empty());
    let task = &tasks(&router, &low).await[0];
    assert_eq!((&task["answer_a"], &task["candidate_a"]), (&json!("bad one"), &json!(disliked.id)));
    // What comes later enters, too; what is there does not enter twice.
    let late = answered(&app.store, "u1", "hello", &["late one", "late two"], -0.2);
    app.store.record(late.clone()).unwrap();
    fill(&app, async || tasks(&router, &all).await.len() >= 4).await;
    assert_eq!(tasks(&router, &all).await.len(), 4);
}

#[tokio::test]
async fn a_lone_answer_gets_a_fresh_second_one_that_is_recorded_for_the_same_person() {
    let app = Setup::default().app();
    let router = router(app.clone());
    let lone = answered(&app.store, "u1", "hello", &["what I said"], -0.2);
    app.store.record(lone.clone()).unwrap();
    app.store.flush().await;
    let queue = make(&router, "q", json!({"from": "traffic"})).await;
    fill(&app, async || !tasks(&router, &queue).await.is_empty()).await;
    let task = &tasks(&router, &queue).await[0];
    assert_eq!((&task["answer_a"], &task["answer_b"]), (&json!("what I said"), &json!("Hi 🌊!")));
    let fresh: Uuid = task["candidate_b"].as_str().unwrap().parse().unwrap();
    let recorded = app.store.inference(fresh).await.unwrap().unwrap();
    assert_eq!(recorded.user_key.as_deref(), Some("u1"), "erasure must find it");
    assert_eq!(recorded.choices[0].output_text.as_deref(), Some("Hi 🌊!"));
    assert!(!recorded.choices[0].logprobs.is_empty());
}

#[tokio::test]
async fn a_model_that_cannot_give_two_different_answers_is_said_to() {
    let app = Setup::default().app();
    let router = router(app.clone());
    let queue = make(&router, "q", json!({"from": "upload"})).await;
    let sent = post(&router, "/v1/labeling/queues/q/prompts", json!({"prompts": ["hello", "hello"]})).await;
    assert_eq!((sent.status.as_u16(), sent.json()), (202, json!({"added": 1, "known": 1})));
    let state = async || get(&router, &format!("/v1/labeling/queues/{queue}")).await.json();
    fill(&app, async || state().await["progress"]["failed"] == 1).await;
    assert!(state().await["failures"][0]["reason"].as_str().unwrap().contains("different"));
}

#[tokio::test]
async fn the_pages_are_open_and_strict() {
    let app = Setup::default().app();
    app.store.create_key("ann", &[Scope::Label]).await.unwrap();
    let router = router(app);
    for path in ["/console/label", "/console/queues", "/console/label.js", "/console/console.css"] {
        let page = get(&router, path).await;
        assert_eq!(page.status.as_u16(), 200, "{path}");
        let policy = page.headers["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    }
}
