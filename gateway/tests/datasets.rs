//! `/v1/datasets` over a real store and real tables.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support::{Setup, answered, ask, get, judged, post};
use axum::Router;
use hyper::StatusCode;
use serde_json::{Value, json};
use std::time::Duration;
use tidemill::http::{App, router};
use tidemill_store::Scope;
use tidemill_store::records::Kind;

/// An answer to `user`, and a better text by `r`.
async fn corrected(app: &App, user: &str, prompt: &str) {
    let answer = answered(&app.store, user, prompt, &["Helo."], -0.5);
    let better = judged(&app.store, answer.id, Some("r"), Kind::Correction, json!(format!("Hello to {prompt}")));
    app.store.record(answer).unwrap();
    app.store.flush().await;
    app.store.add_feedback(vec![better]).await.unwrap();
}

/// Builds and waits for the end.
async fn built(router: &Router, body: Value) -> Value {
    let started = post(router, "/v1/datasets", body).await;
    assert_eq!(started.status, StatusCode::ACCEPTED, "{}", String::from_utf8_lossy(&started.body));
    let id = started.json()["id"].as_str().unwrap().to_owned();
    for _ in 0..2400 {
        let job = get(router, &format!("/v1/datasets/builds/{id}")).await.json();
        if !["queued", "running"].contains(&job["status"].as_str().unwrap()) {
            return job;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the build did not end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dataset_is_built_read_exported_and_refused_once_a_person_is_erased() {
    let app = Setup::default().app();
    for (user, prompt) in [("ann", "one"), ("bob", "two"), ("cid", "three")] {
        corrected(&app, user, prompt).await;
    }
    let router = router(app.clone());
    let job = built(&router, json!({"name": "d", "query": {"since": "2023-01-01"}})).await;
    assert_eq!((&job["status"], &job["dataset"], &job["error"]), (&json!("succeeded"), &json!("d@1"), &Value::Null));

    let shown = get(&router, "/v1/datasets/d").await.json();
    assert_eq!(shown["counts"]["kinds"], json!({"preference": 3, "demonstration": 3}));
    assert_eq!((&shown["id"], &shown["version"], &shown["tainted"]), (&json!("d@1"), &json!(1), &Value::Null));
    assert!(shown["report"]["checks"].as_array().is_some_and(|checks| !checks.is_empty()));
    let rows = get(&router, "/v1/datasets/d@1/rows?kind=preference&offset=1&limit=1").await.json();
    assert_eq!((rows["data"].as_array().unwrap().len(), &rows["has_more"]), (1, &json!(true)));
    assert_eq!(rows["data"][0]["origin"]["raters"], json!(["r"]));
    let page = get(&router, "/v1/datasets/d/report?format=html").await;
    assert!(page.headers["content-type"].to_str().unwrap().starts_with("text/html"));
    let report = get(&router, "/v1/datasets/d/report").await.json();
    assert_eq!(report["rows"].as_array().unwrap().len(), 6);
    let exported = get(&router, "/v1/datasets/d/export?format=tidemill").await;
    let lines = std::str::from_utf8(&exported.body).unwrap().lines().count();
    let dropped = report["rows"].as_array().unwrap().iter().filter(|row| row["verdict"] == "drop").count();
    assert_eq!(lines, 6 - dropped);
    let list = get(&router, "/v1/datasets?limit=1").await.json();
    assert_eq!((&list["first_id"], &list["has_more"]), (&json!("d@1"), &json!(false)));

    app.store.erase_user("ann", "operator").await.unwrap();
    assert_eq!(get(&router, "/v1/datasets/d/export?kind=preference").await.error().0, 410);
    assert!(get(&router, "/v1/datasets/d@1").await.json()["tainted"].is_object());
    let job = built(&router, json!({"name": "d"})).await;
    assert_eq!(job["dataset"], "d@2");
    assert_eq!(get(&router, "/v1/datasets/d").await.json()["counts"]["rows"], 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_that_finds_nothing_fails_with_the_reason() {
    let router = Setup::default().router();
    let job = built(&router, json!({"name": "empty"})).await;
    assert_eq!(job["status"], "failed");
    assert!(job["error"].as_str().unwrap().contains("no feedback matches the query"), "{job}");
    assert_eq!(get(&router, "/v1/datasets/empty").await.error().0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_name_what_is_wrong() {
    let router = Setup::default().router();
    for (body, param) in [
        (json!({}), "name"),
        (json!({"name": 1}), "name"),
        (json!({"name": "../up"}), "name"),
        (json!({"name": "builds"}), "name"),
        (json!({"name": "a", "querry": {}}), "querry"),
        (json!({"name": "a", "query": []}), "query"),
        (json!({"name": "a", "query": {"modles": []}}), "query"),
        (json!({"name": "a", "query": {"since": "soon"}}), "query.since"),
        (json!({"name": "a", "query": {"held_out": 0.9}}), "query.held_out"),
    ] {
        let (status, found, _) = post(&router, "/v1/datasets", body.clone()).await.error();
        assert_eq!((status, found.as_deref()), (400, Some(param)), "{body}");
    }
    for (path, status, param) in [
        ("/v1/datasets?limit=many", 400, Some("limit")),
        ("/v1/datasets?colour=red", 400, Some("colour")),
        ("/v1/datasets/none", 404, None),
        ("/v1/datasets/none@x/rows", 404, None),
        ("/v1/datasets/none/rows?kind=best", 400, Some("kind")),
        ("/v1/datasets/none/report?format=pdf", 400, Some("format")),
        ("/v1/datasets/builds/none", 404, None),
    ] {
        let (found, named, _) = get(&router, path).await.error();
        assert_eq!((found, named.as_deref()), (status, param), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_key_of_scope_train_may() {
    let app = Setup::default().app();
    let (_, label) = app.store.create_key("annotator", &[Scope::Label]).await.unwrap();
    let (_, train) = app.store.create_key("trainer", &[Scope::Train]).await.unwrap();
    let router = router(app);
    for (secret, status) in [(label.as_str(), 403), (&train, 200), ("tm-no", 401)] {
        assert_eq!(ask(&router, "GET", "/v1/datasets", Some(secret), Value::Null).await.status.as_u16(), status);
    }
}
