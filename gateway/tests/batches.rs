//! `/v1/batches` through the real router and runner.

#![cfg(test)]

use crate::support::{MODEL, Setup, chat, get, post, says, send};
use axum::Router;
use axum::body::Body;
use hyper::Request;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tidemill::http::{App, router};
use tidemill_store::{FileDraft, Scope};
use uuid::Uuid;

const URL: &str = "/v1/chat/completions";

fn line(id: &str, body: Value) -> String {
    json!({"custom_id": id, "method": "POST", "url": URL, "body": body}).to_string() + "\n"
}

/// Puts an input in its place, as an upload does.
async fn input(app: &App, key_id: Option<String>, text: &str) -> String {
    let id = app.store.issue_id();
    let mut content = app.files.receive(id).await.unwrap();
    content.write(text.as_bytes()).await.unwrap();
    let draft = FileDraft { key_id, filename: "in.jsonl".into(), purpose: "batch".into(), expires: None };
    content.finish(draft, 1).await.unwrap();
    format!("file-{id}")
}

fn order(file: &str) -> Value {
    json!({"input_file_id": file, "endpoint": URL, "completion_window": "24h", "metadata": {"job": "7"}})
}

async fn settled(router: &Router, id: &str, state: &str) -> Value {
    let begin = Instant::now();
    loop {
        let batch = get(router, &format!("/v1/batches/{id}")).await.json();
        if batch["status"] == state {
            return batch;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{batch}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The rows of a batch's file by custom id; fails when a line is there twice.
async fn rows(router: &Router, file: &Value) -> BTreeMap<String, Value> {
    let Some(id) = file.as_str() else { return BTreeMap::new() };
    let text = String::from_utf8(get(router, &format!("/v1/files/{id}/content")).await.body).unwrap();
    let mut rows = BTreeMap::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        assert!(rows.insert(row["custom_id"].as_str().unwrap().to_owned(), row).is_none());
    }
    rows
}

fn start(app: &App) -> Router {
    tokio::spawn(app.batches.clone().run(app.clone(), None));
    router(app.clone())
}

#[tokio::test]
async fn every_line_is_answered_once_and_errors_go_to_their_own_file() {
    let app = Setup::script(says("Hi")).app();
    let router = start(&app);
    let mut text: String = (0..100).map(|n| line(&format!("good-{n}"), chat(json!({})))).collect();
    text += &line("unknown model", json!({"model": "nope", "messages": [{"role": "user", "content": "x"}]}));
    text += "\n";
    text += &line("no messages", json!({"model": MODEL}));
    let file = input(&app, None, &text).await;
    let made = post(&router, "/v1/batches", order(&file)).await.json();
    assert_eq!(
        (&made["object"], &made["input_file_id"], &made["metadata"]["job"]),
        (&"batch".into(), &file.clone().into(), &"7".into())
    );
    let batch = settled(&router, made["id"].as_str().unwrap(), "completed").await;
    assert_eq!(batch["request_counts"], json!({"total": 102, "completed": 100, "failed": 2}));
    // "Hi" and the end of the turn are three tokens.
    assert_eq!(batch["usage"]["output_tokens"], 300);
    for key in ["in_progress_at", "finalizing_at", "completed_at"] {
        assert!(batch[key].is_i64(), "{key}: {batch}");
    }
    let answers = rows(&router, &batch["output_file_id"]).await;
    assert_eq!(answers.len(), 100);
    for row in answers.values() {
        assert_eq!((&row["response"]["status_code"], &row["error"]), (&200.into(), &Value::Null));
        assert_eq!(row["response"]["body"]["choices"][0]["message"]["content"], "Hi");
        assert_eq!(row["response"]["request_id"], row["id"]);
    }
    let errors = rows(&router, &batch["error_file_id"]).await;
    assert_eq!(errors["unknown model"]["response"]["status_code"], 404);
    assert_eq!(errors["no messages"]["response"]["body"]["error"]["param"], "messages");
    let output = get(&router, &format!("/v1/files/{}", batch["output_file_id"].as_str().unwrap())).await.json();
    assert_eq!(output["purpose"], "batch_output");
    let listed = get(&router, "/v1/batches?limit=1").await.json();
    assert_eq!((&listed["data"][0], &listed["has_more"]), (&batch, &Value::Bool(false)));
}

#[tokio::test]
async fn a_bad_input_fails_before_anything_runs() {
    let app = Setup::default().app();
    let router = start(&app);
    let text = line("a", chat(json!({}))) + "nonsense\n" + &line("a", chat(json!({})));
    let file = input(&app, None, &text).await;
    let made = post(&router, "/v1/batches", order(&file)).await.json();
    let batch = settled(&router, made["id"].as_str().unwrap(), "failed").await;
    let problems: Vec<_> =
        batch["errors"]["data"].as_array().unwrap().iter().map(|p| (p["line"].clone(), p["code"].clone())).collect();
    assert_eq!(problems, [(json!(2), json!("invalid_json_line")), (json!(3), json!("duplicate_custom_id"))]);
    assert_eq!(app.store.list_inferences(&Default::default()).await.unwrap().items.len(), 0);
}

#[tokio::test]
async fn a_bad_order_names_its_field() {
    let app = Setup::default().app();
    let router = start(&app);
    let file = input(&app, None, "x").await;
    for (key, value, param) in [
        ("input_file_id", json!("file-0"), "input_file_id"),
        ("input_file_id", json!(null), "input_file_id"),
        ("endpoint", json!("/v1/feedback"), "endpoint"),
        ("completion_window", json!("1h"), "completion_window"),
        ("metadata", json!({"a": 1}), "metadata.a"),
        ("output_expires_after", json!({"anchor": "created_at", "seconds": 1}), "output_expires_after.seconds"),
        ("colour", json!(1), "colour"),
    ] {
        let mut body = order(&file);
        body[key] = value;
        let (status, named, _) = post(&router, "/v1/batches", body).await.error();
        assert_eq!((status, named.as_deref()), (400, Some(param)));
    }
    assert_eq!(get(&router, "/v1/batches/batch_0").await.error().0, 404);
}

#[tokio::test]
async fn a_cancelled_batch_keeps_what_was_answered_and_names_what_was_not() {
    let app = Setup { max_seqs: 2, ..Setup::slow(20, 5) }.app();
    let router = start(&app);
    let text: String = (0..200).map(|n| line(&n.to_string(), chat(json!({"max_tokens": 20})))).collect();
    let file = input(&app, None, &text).await;
    let made = post(&router, "/v1/batches", order(&file)).await.json();
    let id = made["id"].as_str().unwrap();
    let begin = Instant::now();
    while get(&router, &format!("/v1/batches/{id}")).await.json()["request_counts"]["completed"].as_u64() == Some(0) {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let delete = send(&router, Request::delete(format!("/v1/files/{file}")).body(Body::empty()).unwrap()).await;
    assert_eq!(delete.error().2.as_deref(), Some("file_in_use"));
    let cancelling = post(&router, &format!("/v1/batches/{id}/cancel"), json!({})).await.json();
    assert_eq!(cancelling["status"], "cancelling");
    let batch = settled(&router, id, "cancelled").await;
    let (answers, errors) = (rows(&router, &batch["output_file_id"]).await, rows(&router, &batch["error_file_id"]).await);
    assert!(!answers.is_empty() && answers.len() < 200, "{}", answers.len());
    assert_eq!((answers.len() + errors.len(), batch["request_counts"]["completed"].as_u64()), (200, Some(answers.len() as u64)));
    assert!(errors.values().all(|row| row["error"]["code"] == "batch_cancelled" && row["response"].is_null()));
    assert_eq!(post(&router, &format!("/v1/batches/{id}/cancel"), json!({})).await.error().2.as_deref(), Some("batch_ended"));
}

#[tokio::test]
async fn whoever_waits_goes_before_a_batch() {
    // A line takes four seconds, a request of somebody who waits a tenth of that.
    let app = Setup { max_seqs: 2, ..Setup::slow(400, 10) }.app();
    let router = start(&app);
    let text: String = (0..6).map(|n| line(&n.to_string(), chat(json!({"max_tokens": 400})))).collect();
    let file = input(&app, None, &text).await;
    let made = post(&router, "/v1/batches", order(&file)).await.json();
    let id = made["id"].as_str().unwrap();
    settled(&router, id, "in_progress").await;
    let stats = || app.registry.local().next().expect("the model is loaded").engine().stats();
    let begin = Instant::now();
    while stats().running < 2 {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let before = stats();
    // Both places are taken by lines: they give way, and none of them ends before these two.
    let (a, b) =
        tokio::join!(post(&router, URL, chat(json!({"max_tokens": 40}))), post(&router, URL, chat(json!({"max_tokens": 40}))));
    assert_eq!((a.status.as_u16(), b.status.as_u16()), (200, 200));
    let after = stats();
    assert!(after.preemptions > before.preemptions, "a line gave up its place");
    // The two, and at most the two lines that were about to end when they came.
    assert!(after.finished - before.finished <= 4, "{} requests ended meanwhile", after.finished - before.finished);
    let batch = settled(&router, id, "completed").await;
    assert_eq!(batch["request_counts"]["completed"], 6);
}

#[tokio::test]
async fn lines_run_with_the_rights_of_the_key_that_made_the_batch() {
    let app = Setup { max_seqs: 2, ..Setup::slow(20, 5) }.app();
    let (chat_key, secret) = app.store.create_key("chat", &[Scope::Chat]).await.unwrap();
    let (_, other) = app.store.create_key("other", &[Scope::Chat]).await.unwrap();
    let router = start(&app);
    let text: String = (0..2000).map(|n| line(&n.to_string(), chat(json!({"max_tokens": 20})))).collect();
    let file = input(&app, Some(chat_key.id.to_string()), &text).await;
    let call = async |method: &str, path: &str, key: &str, body: Value| {
        let request = Request::builder().method(method).uri(path).header("authorization", format!("Bearer {key}"));
        send(&router, request.header("content-type", "application/json").body(Body::from(body.to_string())).unwrap()).await
    };
    assert_eq!(call("POST", "/v1/batches", &other, order(&file)).await.error().2.as_deref(), Some("file_not_found"));
    let made = call("POST", "/v1/batches", &secret, order(&file)).await.json();
    let path = format!("/v1/batches/{}", made["id"].as_str().unwrap());
    assert_eq!(call("GET", &path, &other, json!(null)).await.error().0, 404);
    assert_eq!(call("POST", &format!("{path}/cancel"), &other, json!(null)).await.error().0, 404);
    let begin = Instant::now();
    while call("GET", &path, &secret, json!(null)).await.json()["request_counts"]["completed"].as_u64() == Some(0) {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    app.store.flush().await;
    let recorded = app.store.list_inferences(&Default::default()).await.unwrap();
    assert!(recorded.items.iter().all(|answer| answer.key_id == Some(chat_key.id.to_string())) && !recorded.items.is_empty());
    // Without the key, the batch ends.
    app.store.revoke_key("chat", "boss").await.unwrap();
    let id: Uuid = made["id"].as_str().unwrap().strip_prefix("batch_").unwrap().parse().unwrap();
    loop {
        let batch = app.batches.rows().find(id, &tidemill_store::Viewer::Anyone).await.unwrap().unwrap();
        if batch.state == tidemill_store::BatchState::Cancelled {
            assert!(batch.has_errors && batch.progress.completed < 2000);
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(90), "{batch:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_batch_whose_input_is_gone_from_the_disk_ends() {
    let app = Setup::default().app();
    let file = input(&app, None, &line("a", chat(json!({})))).await;
    let made = post(&router(app.clone()), "/v1/batches", order(&file)).await.json();
    let id = made["id"].as_str().unwrap();
    // It was looked through, and then somebody tidied up.
    let bare: Uuid = id.strip_prefix("batch_").unwrap().parse().unwrap();
    app.batches.rows().begin(bare, 1, Some(MODEL), 1).await.unwrap();
    std::fs::remove_file(app.files.path(file.strip_prefix("file-").unwrap().parse().unwrap())).unwrap();
    let batch = settled(&start(&app), id, "failed").await;
    assert_eq!(batch["errors"]["data"][0]["code"], "input_file_missing");
    assert_eq!((&batch["output_file_id"], &batch["request_counts"]["total"]), (&Value::Null, &json!(1)));
}
