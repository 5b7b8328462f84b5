//! Label Studio's and Argilla's endpoints, with what the tools really wrote.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking; the lint knows test functions only")]

use crate::support::{Reply, Setup, ask, get, post, post_bytes};
use axum::Router;
use serde_json::{Value, json};
use tidemill::http::{App, router};
use tidemill_store::label::{Labels, NewQueue, NewTask, Task, TaskState};
use tidemill_store::{FeedbackFilter, Scope};

const AT: &str = "/v1/labeling/queues/pairs";

fn sample(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

async fn scene(pairs: u32) -> (App, Router, Vec<Task>) {
    let app = Setup::default().app();
    let labels = Labels::new(app.store.database());
    let queue = NewQueue {
        name: "pairs".into(),
        rule: json!({}),
        guidelines: "Be fair.".into(),
        overlap: 2,
        gold_share: 0.0,
        lease_seconds: 60,
        filled_until: String::new(),
    };
    let queue = labels.create_queue(queue, 1, app.store.act("ann", "labeling.create")).await.unwrap();
    let task = |n: u32| NewTask {
        source: format!("line {n}"),
        prompt: json!([{"role": "user", "content": format!("Question {n}?")}]),
        answer_a: format!("A{n}"),
        answer_b: format!("B{n}"),
        candidate_a: None,
        candidate_b: None,
        gold: None,
    };
    labels.add_tasks(queue.id, &(0..pairs).map(task).collect::<Vec<_>>(), 1).await.unwrap();
    let tasks = labels.list_tasks(queue.id, TaskState::Any, None, 100).await.unwrap();
    (app.clone(), router(app), tasks)
}

/// The sample webhook, about a task of ours with answer A on the left.
fn about(task: &Task, sample_text: &str) -> Value {
    let mut event = sample(sample_text);
    event["task"]["data"]["tidemill_task"] = json!(task.id);
    event["task"]["meta"]["tidemill"]["answer1"] = json!("a");
    event
}

const CREATED: &str = include_str!("samples/label-studio-1.23.2/created.json");
const UPDATED: &str = include_str!("samples/label-studio-1.23.2/updated.json");

async fn standing(app: &App) -> Vec<(String, Value)> {
    let filter = FeedbackFilter { withdrawn: Some(false), ..FeedbackFilter::default() };
    let page = app.store.list_feedback(&filter).await.unwrap();
    page.items.into_iter().map(|row| (row.author.unwrap_or_default(), row.value["ranking"].clone())).collect()
}

fn did(reply: &Reply) -> Vec<(String, u64)> {
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    let summary = reply.json();
    let counts = summary.as_object().unwrap().iter().filter_map(|(name, count)| Some((name.clone(), count.as_u64()?)));
    counts.filter(|(_, count)| *count > 0).collect()
}

#[tokio::test]
async fn a_webhook_records_edits_and_withdraws_and_says_so() {
    let (app, router, tasks) = scene(1).await;
    let hook = format!("{AT}/label-studio/webhook");
    let one = |name: &str| vec![(name.to_owned(), 1)];
    let (a, b) = (json!(format!("{}:a", tasks[0].id)), json!(format!("{}:b", tasks[0].id)));
    assert_eq!(did(&post(&router, &hook, about(&tasks[0], CREATED)).await), one("recorded"));
    assert_eq!(standing(&app).await, [("label-studio:1".to_owned(), json!([[a], [b]]))]);
    assert_eq!(did(&post(&router, &hook, about(&tasks[0], CREATED)).await), one("unchanged"));
    assert_eq!(did(&post(&router, &hook, about(&tasks[0], UPDATED)).await), one("edited"));
    assert_eq!(did(&post(&router, &hook, about(&tasks[0], CREATED)).await), one("unchanged"));
    assert_eq!(standing(&app).await, [("label-studio:1".to_owned(), json!([[b], [a]]))]);
    let deleted = json!({"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 7}], "project": {"id": 2}});
    assert_eq!(did(&post(&router, &hook, deleted.clone()).await), one("withdrawn"));
    assert_eq!(did(&post(&router, &hook, deleted).await), one("unchanged"));
    assert_eq!(standing(&app).await, []);
}

#[tokio::test]
async fn what_a_webhook_cannot_do_is_a_clear_4xx_and_changes_nothing() {
    let (app, router, tasks) = scene(1).await;
    let hook = format!("{AT}/label-studio/webhook");
    let error = post(&router, "/v1/labeling/queues/none/label-studio/webhook", about(&tasks[0], CREATED)).await;
    assert_eq!(error.error(), (404, None, Some("not_found".into())));
    // The sample's own task is of no queue here.
    let error = post(&router, &hook, sample(CREATED)).await;
    assert_eq!(error.error(), (422, None, Some("annotation_refused".into())));
    assert!(String::from_utf8_lossy(&error.body).contains("has no task 01900000-0000-7000-8000-000000000000"));
    let mut foreign = sample(CREATED);
    foreign["task"]["data"] = json!({"text": "someone else's project"});
    let error = post(&router, &hook, foreign).await;
    assert_eq!(error.status, 422);
    assert!(String::from_utf8_lossy(&error.body).contains("Import the queue's own export"));
    assert_eq!(post(&router, &hook, json!({"action": "ANNOTATION_CREATED"})).await.status, 400);
    assert_eq!(post_bytes(&router, &hook, "{").await.status, 400);
    assert_eq!(post_bytes(&router, &hook, vec![b' '; 11 << 20]).await.status, 413);
    assert_eq!(get(&router, &hook).await.status, 405);
    let other = post(&router, &hook, json!({"action": "TASKS_DELETED", "tasks": [{"id": 1}]})).await;
    assert_eq!((other.status.as_u16(), other.json()), (200, json!({"ignored": "TASKS_DELETED"})));
    assert_eq!(standing(&app).await, []);
}

#[tokio::test]
async fn an_export_is_paged_and_every_task_comes_once() {
    let (_, router, tasks) = scene(7).await;
    let mut seen = Vec::new();
    let mut path = format!("{AT}/label-studio/tasks?limit=3");
    for expected in [3, 3, 1] {
        let reply = get(&router, &path).await;
        let page = reply.json();
        assert_eq!(page.as_array().unwrap().len(), expected);
        seen.extend(page.as_array().unwrap().iter().map(|task| task["data"]["tidemill_task"].as_str().unwrap().to_owned()));
        match reply.headers.get("x-next-after") {
            Some(next) => path = format!("{AT}/label-studio/tasks?limit=3&after={}", next.to_str().unwrap()),
            None => assert_eq!(expected, 1),
        }
    }
    assert_eq!(seen, tasks.iter().map(|task| task.id.to_string()).collect::<Vec<_>>());
    let config = get(&router, &format!("{AT}/label-studio/config")).await;
    assert_eq!(config.headers["content-type"], "application/xml");
    let project = get(&router, &format!("{AT}/label-studio/project")).await.json();
    assert_eq!(project["label_config"].as_str().unwrap().as_bytes(), config.body);
    assert_eq!(get(&router, &format!("{AT}/argilla/settings")).await.json()["distribution"]["min_submitted"], 2);
    assert_eq!(get(&router, &format!("{AT}/argilla/records?state=done")).await.json(), json!([]));
    assert_eq!(get(&router, &format!("{AT}/argilla/records?page=2")).await.error().1.as_deref(), Some("page"));
}

#[tokio::test]
async fn records_of_argilla_come_back_once() {
    let (app, router, tasks) = scene(2).await;
    let mut records = sample(include_str!("samples/argilla-2.8.0/flat.json"));
    for (record, task) in records.as_array_mut().unwrap().iter_mut().zip(&tasks) {
        record["id"] = json!(task.id);
    }
    let expected = [("recorded", 3), ("skipped", 1), ("unchanged", 1), ("silent", 1)].map(|(name, n)| (name.to_owned(), n));
    assert_eq!(did(&post(&router, &format!("{AT}/argilla/import"), records.clone()).await), expected);
    let items = json!({"items": records});
    let again = [("unchanged", 5), ("silent", 1)].map(|(name, n)| (name.to_owned(), n));
    assert_eq!(did(&post(&router, &format!("{AT}/argilla/import"), items).await), again);
    assert_eq!(standing(&app).await.len(), 3);
    let trust = format!("{AT}/argilla/import?all_submitted=yes");
    assert_eq!(post(&router, &trust, json!([])).await.error().1.as_deref(), Some("all_submitted"));
    assert_eq!(post(&router, &format!("{AT}/argilla/import"), json!({"records": 1})).await.status, 400);
}

#[tokio::test]
async fn an_export_needs_a_key_for_training_and_a_webhook_one_for_feedback() {
    let (app, router, tasks) = scene(1).await;
    let mut keys = Vec::new();
    for (name, scope) in [("boss", Scope::Train), ("hook", Scope::Feedback), ("ann", Scope::Label)] {
        keys.push(app.store.create_key(name, &[scope]).await.unwrap().1);
    }
    let (out, back) = (format!("{AT}/label-studio/tasks"), format!("{AT}/label-studio/webhook"));
    for (key, export, hook) in
        [(None, 401, 401), (Some(&keys[0]), 200, 403), (Some(&keys[1]), 403, 200), (Some(&keys[2]), 403, 403)]
    {
        let key = key.map(String::as_str);
        assert_eq!(ask(&router, "GET", &out, key, Value::Null).await.status.as_u16(), export, "{key:?}");
        assert_eq!(ask(&router, "POST", &back, key, about(&tasks[0], CREATED)).await.status.as_u16(), hook, "{key:?}");
    }
    let page = app.store.list_feedback(&FeedbackFilter::default()).await.unwrap();
    assert_eq!(page.items.len(), 1);
    assert!(page.items[0].key_id.is_some());
}
