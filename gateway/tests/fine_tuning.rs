//! `/v1/fine_tuning/jobs` through the real router and runner; the program that trains is a few lines of shell.

#![cfg(test)]

#[path = "../src/fine_tuning/stand_in.rs"]
mod stand_in;
mod support;

use axum::Router;
use serde_json::{Value, json};
use stand_in::program;
use std::time::{Duration, Instant};
use support::{MODEL, Setup, get, no_training, post};
use tempfile::TempDir;
use tidemill::fine_tuning::FineTuningOptions;
use tidemill::http::{App, router};
use tidemill_store::FileDraft;

const JOBS: &str = "/v1/fine_tuning/jobs";
const CHAT: &str = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;

/// A file in its place, as an upload leaves it.
async fn file(app: &App, text: &str) -> String {
    let id = app.store.issue_id();
    let mut content = app.files.receive(id).await.unwrap();
    content.write(text.as_bytes()).await.unwrap();
    let draft = FileDraft { key_id: None, filename: "in.jsonl".into(), purpose: "fine-tune".into(), expires: None };
    content.finish(draft, 1).await.unwrap();
    format!("file-{id}")
}

/// A server whose trainings are this script; `$3` is the job's folder.
fn start(script: &str) -> (App, Router, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let options = FineTuningOptions { program: program(folder.path(), script), jobs: 1, ..no_training() };
    let app = Setup { fine_tuning: Some(options), ..Setup::default() }.app();
    tokio::spawn(app.fine_tuning.clone().run(app.clone()));
    let router = router(app.clone());
    (app, router, folder)
}

async fn make(app: &App, router: &Router) -> String {
    let order = json!({"model": MODEL, "training_file": file(app, CHAT).await, "seed": 1});
    post(router, JOBS, order).await.json()["id"].as_str().unwrap().to_owned()
}

async fn settled(router: &Router, id: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let begin = Instant::now();
    loop {
        let job = get(router, &format!("{JOBS}/{id}")).await.json();
        if fits(&job) {
            return job;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{job}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What happened, the oldest first.
async fn told(router: &Router, id: &str) -> Vec<String> {
    let events = get(router, &format!("{JOBS}/{id}/events?limit=1000")).await.json();
    events["data"].as_array().unwrap().iter().rev().map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

const WORKS: &str = r#"
echo '{"event":"prepared","train":1,"steps":2}'
echo '{"event":"progress","step":1,"steps":2,"tokens":10,"metrics":{"loss":2.0},"remaining_s":5}'
echo '{"event":"progress","step":2,"steps":2,"tokens":20,"metrics":{"loss":1.0},"remaining_s":0}'
echo '{"step":2,"epoch":1.0,"loss":1.0}' > "$3/metrics.jsonl"
mkdir -p "$3/adapter" "$3/checkpoint-2"
echo '{"event":"finished","steps":2,"tokens":20}'
"#;

#[tokio::test]
async fn what_a_training_says_becomes_events_and_its_end_a_model() {
    let (app, router, _folder) = start(WORKS);
    let id = make(&app, &router).await;
    let job = settled(&router, &id, |job| job["status"] == "succeeded").await;
    assert!(job["fine_tuned_model"].as_str().unwrap().starts_with(&format!("ft:{MODEL}::")), "{job}");
    assert_eq!((&job["trained_tokens"], &job["hyperparameters"]["n_epochs"], &job["seed"]), (&json!(20), &json!(10), &json!(1)));
    let told = told(&router, &id).await;
    let has = |text: &str| told.iter().filter(|message| message.contains(text)).count();
    assert_eq!(
        (has("Step 1/2: training loss=2.0000"), has("Step 2/2"), has("Examples to learn: 1; steps: 2.")),
        (1, 1, 1),
        "{told:?}"
    );
    // The stand-in of the model takes no adapters.
    assert_eq!((has("not served now"), told.last().map(String::as_str)), (1, Some("The job has successfully completed.")));
    let result = job["result_files"][0].as_str().unwrap();
    let table = get(&router, &format!("/v1/files/{result}/content")).await.body;
    assert_eq!(String::from_utf8(table).unwrap(), "step,train_loss,epoch\n2,1,1\n");
    let checkpoints = get(&router, &format!("{JOBS}/{id}/checkpoints")).await.json();
    assert_eq!(
        (&checkpoints["data"][0]["step_number"], &checkpoints["data"][0]["metrics"]["train_loss"]),
        (&json!(2), &json!(1.0))
    );
    app.fine_tuning.close().await;
}

#[tokio::test]
async fn a_training_that_says_why_it_failed_fails_the_job_without_its_places() {
    let (app, router, _folder) = start(r#"echo "{\"event\":\"failed\",\"message\":\"$3/x is bad\"}"; exit 1"#);
    let id = make(&app, &router).await;
    let job = settled(&router, &id, |job| job["status"] == "failed").await;
    assert_eq!(job["error"]["message"], "The training failed: the job's folder/x is bad.");
    app.fine_tuning.close().await;
}

#[tokio::test]
async fn a_training_that_dies_goes_on_until_it_takes_no_step_any_more() {
    // The first time it takes a step and is killed; then it dies at once.
    let script = r#"
[ -e "$3/once" ] || { touch "$3/once"; echo '{"event":"progress","step":1,"steps":9,"tokens":1,"metrics":{"loss":1.0}}'; }
kill -9 $$"#;
    let (app, router, _folder) = start(script);
    let id = make(&app, &router).await;
    let job = settled(&router, &id, |job| job["status"] == "failed").await;
    assert!(job["error"]["message"].as_str().unwrap().contains("4 times without"), "{job}");
    let told = told(&router, &id).await;
    assert_eq!(told.iter().filter(|message| message.contains("before its time (signal: 9")).count(), 5, "{told:?}");
    app.fine_tuning.close().await;
}

#[tokio::test]
async fn a_paused_training_stops_and_goes_on_and_a_cancelled_one_leaves_nothing() {
    let script = r#"
trap 'echo "{\"event\":\"stopped\"}"; exit 75' TERM
echo '{"event":"progress","step":1,"steps":9,"tokens":1,"metrics":{"loss":1.0}}'
echo run >> "$3/runs"
while :; do sleep 0.05; done"#;
    let (app, router, _folder) = start(script);
    let id = make(&app, &router).await;
    let path = |verb: &str| format!("{JOBS}/{id}/{verb}");
    settled(&router, &id, |job| job["tidemill"]["step"] == 1).await;
    let paused = post(&router, &path("pause"), json!({})).await.json();
    assert_eq!((&paused["status"], &paused["tidemill"]["state"]), (&json!("queued"), &json!("paused")));
    // The other one has its turn as soon as this one has stopped.
    let other = make(&app, &router).await;
    settled(&router, &other, |job| job["tidemill"]["step"] == 1).await;
    assert_eq!(post(&router, &path("resume"), json!({})).await.json()["status"], "queued");
    assert_eq!(post(&router, &format!("{JOBS}/{other}/cancel"), json!({})).await.json()["status"], "cancelled");
    settled(&router, &id, |job| job["status"] == "running").await;
    assert_eq!(post(&router, &path("cancel"), json!({})).await.json()["status"], "cancelled");
    let (status, _, _) = post(&router, &path("resume"), json!({})).await.error();
    assert_eq!(status, 400);
    let folders = || std::fs::read_dir(&app.fine_tuning.options().root).unwrap().count();
    // One that never had its turn leaves nothing, either.
    let waiting = make(&app, &router).await;
    settled(&router, &waiting, |job| job["tidemill"]["state"] != "validating_files").await;
    post(&router, &format!("{JOBS}/{waiting}/cancel"), json!({})).await.json();
    let begin = Instant::now();
    while folders() > 0 {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    app.fine_tuning.close().await;
    let told = told(&router, &id).await;
    assert_eq!(told.iter().filter(|message| message.starts_with("Step 1/9")).count(), 1, "{told:?}");
}

#[tokio::test]
async fn a_leaving_server_stops_its_training_and_the_next_one_goes_on() {
    let script = r#"
trap 'echo "{\"event\":\"stopped\"}"; exit 75' TERM
[ -e "$3/once" ] && { mkdir -p "$3/adapter"; echo '{"event":"finished"}'; exit 0; }
touch "$3/once"
echo '{"event":"progress","step":1,"steps":9,"tokens":1,"metrics":{"loss":1.0}}'
while :; do sleep 0.05; done"#;
    let (app, router, _folder) = start(script);
    let id = make(&app, &router).await;
    settled(&router, &id, |job| job["tidemill"]["step"] == 1).await;
    app.fine_tuning.close().await;
    assert_eq!(settled(&router, &id, |_| true).await["status"], "running");
    let next = tidemill::fine_tuning::FineTuning::new(&app.store, app.fine_tuning.options().clone());
    tokio::spawn(next.clone().run(app.clone()));
    settled(&router, &id, |job| job["status"] == "succeeded").await;
    next.close().await;
}

#[tokio::test]
async fn only_so_many_jobs_may_be_open_and_files_that_are_looked_through_stay() {
    let app = Setup::default().app();
    let router = router(app.clone());
    let order = json!({"model": MODEL, "training_file": file(&app, CHAT).await});
    for _ in 0..64 {
        assert_eq!(post(&router, JOBS, order.clone()).await.status, 200);
    }
    let (status, _, code) = post(&router, JOBS, order).await.error();
    assert_eq!((status, code.as_deref()), (429, Some("too_many_jobs")));
    let page = get(&router, &format!("{JOBS}?limit=3")).await.json();
    assert_eq!((page["data"].as_array().unwrap().len(), &page["has_more"]), (3, &json!(true)));
    assert_eq!(get(&router, &format!("{JOBS}?order=asc")).await.error().0, 400);
}
