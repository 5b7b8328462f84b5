//! `/v1/fine_tuning/jobs` through the real router and runner; the program that trains is a few lines of shell.

#![cfg(test)]

use crate::stand_in::program;
use crate::support::{MODEL, Reply, Setup, ask, get, no_training, post, says};
use axum::Router;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tidemill::fine_tuning::{FineTuningOptions, TrainingDevice};
use tidemill::graders::desk::Petitioner;
use tidemill::graders::{Desk, DeskOracle};
use tidemill::http::inside::Inside;
use tidemill::http::{App, Auth, router};
use tidemill_rlhf::reward::grader::{Oracle, Question, Role};
use tidemill_store::{AdapterFilter, AdapterState, FileDraft, FineTuningState, Scope, Viewer};

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

/// An adapter of some model, and that it was made of nothing.
fn makes(at: &str) -> String {
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama/adapters/all");
    format!("mkdir -p \"$3/{at}\"; cp {}/adapter_* \"$3/{at}\"; echo '{{}}' > \"$3/lineage.json\"", adapter.display())
}

const WORKS: &str = r#"
echo '{"event":"prepared","train":1,"steps":2}'
echo '{"event":"progress","step":1,"steps":2,"tokens":10,"metrics":{"loss":2.0},"remaining_s":5}'
echo '{"event":"progress","step":2,"steps":2,"tokens":20,"metrics":{"loss":1.0},"remaining_s":0}'
echo '{"step":1,"epoch":1.0,"loss":2.0}' > "$3/metrics.jsonl"
echo '{"step":1,"epoch":1.0,"eval_loss":1.5}' >> "$3/metrics.jsonl"
echo '{"step":2,"epoch":2.0,"loss":1.0}' >> "$3/metrics.jsonl"
mkdir -p "$3/checkpoint-2"
echo '{"event":"finished","steps":2,"tokens":20}'
"#;

#[tokio::test]
async fn what_a_training_says_becomes_events_and_its_end_a_model() {
    let (app, router, _folder) = start(&format!("{}\n{}\n{WORKS}", makes("adapter"), makes("epochs/step-1")));
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
    assert_eq!((has("not served now"), told.last().map(String::as_str)), (2, Some("The job has successfully completed.")));
    let result = job["result_files"][0].as_str().unwrap();
    let table = get(&router, &format!("/v1/files/{result}/content")).await.body;
    assert_eq!(String::from_utf8(table).unwrap(), "step,train_loss,full_valid_loss,epoch\n1,2,1.5,1\n2,1,,2\n");
    let model = job["fine_tuned_model"].as_str().unwrap();
    let checkpoints = get(&router, &format!("{JOBS}/{id}/checkpoints")).await.json();
    let (last, first) = (&checkpoints["data"][0], &checkpoints["data"][1]);
    assert_eq!((&last["step_number"], &last["metrics"]["train_loss"]), (&json!(2), &json!(1.0)));
    assert_eq!((&first["step_number"], &first["metrics"]["full_valid_loss"]), (&json!(1), &json!(1.5)));
    assert_eq!(last["fine_tuned_model_checkpoint"], model);
    let earlier = format!("{model}:ckpt-step-1");
    assert_eq!(first["fine_tuned_model_checkpoint"], earlier);

    // Both are adapters of the registry, with the job in their lineage, and listed; the folder has no second copy.
    let listed = get(&router, "/v1/models").await.json();
    let ids: Vec<&str> = listed["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [MODEL, model, &earlier]);
    let registry = app.adapters.registry();
    let adapters = registry.list(&AdapterFilter::default()).await.unwrap().items;
    assert_eq!(adapters.iter().map(|adapter| adapter.job.as_deref()).collect::<Vec<_>>(), [Some(id.as_str()); 2]);
    assert!(adapters.iter().all(|adapter| adapter.state == AdapterState::Serving));
    let folder = app.fine_tuning.options().root.join(id.strip_prefix("ftjob-").unwrap());
    assert!(!folder.join("adapter").exists() && folder.join("lineage.json").exists());
    // What cannot be loaded says so when it is asked for.
    let chat = json!({"model": earlier, "messages": [{"role": "user", "content": "a"}]});
    let (status, _, code) = post(&router, "/v1/chat/completions", chat).await.error();
    assert_eq!((status, code.as_deref()), (503, Some("model_not_loaded")));

    let delete = async |name: &str| ask(&router, "DELETE", &format!("/v1/models/{name}"), None, json!({})).await;
    assert_eq!(delete(&earlier).await.error().2.as_deref(), Some("model_not_deletable"));
    assert_eq!(delete(model).await.json()["deleted"], true);
    assert_eq!(get(&router, "/v1/models").await.json()["data"].as_array().unwrap().len(), 1);
    assert_eq!(get(&router, &format!("{JOBS}/{id}/checkpoints")).await.json()["data"], json!([]));
    let adapters = registry.list(&AdapterFilter::default()).await.unwrap().items;
    assert!(adapters.iter().all(|adapter| adapter.state == AdapterState::Retired), "{adapters:?}");
    app.fine_tuning.close().await;
}

#[tokio::test]
async fn a_model_that_somebody_gave_a_name_of_their_own_is_not_deleted() {
    let (app, router, _folder) = start(&format!("{}\n{WORKS}", makes("adapter")));
    let id = make(&app, &router).await;
    let job = settled(&router, &id, |job| job["status"] == "succeeded").await;
    let model = job["fine_tuned_model"].as_str().unwrap();
    app.adapters.registry().alias("champion", model).await.unwrap();
    let (status, _, code) = ask(&router, "DELETE", &format!("/v1/models/{model}"), None, json!({})).await.error();
    assert_eq!((status, code.as_deref()), (409, Some("adapter_aliased")));
    app.fine_tuning.close().await;
}

#[tokio::test]
async fn the_trainings_under_way_are_gauges_and_gone_when_they_end() {
    let script = r#"
echo '{"event":"progress","step":3,"steps":9,"epoch":0.5,"tokens":7,"metrics":{"loss":0.25,"rewards/margins":1.5}}'
while [ ! -e "$3/go" ]; do sleep 0.05; done
echo '{"event":"failed","message":"enough"}'"#;
    let (app, router, _folder) = start(script);
    let id = make(&app, &router).await;
    settled(&router, &id, |job| job["tidemill"]["step"] == 3).await;
    let text = app.fine_tuning.gauges();
    for line in ["tidemill:training_step{", "tidemill:training_loss{", "tidemill:training_rewards_margins{"] {
        assert!(text.contains(&format!("{line}job=\"{id}\",model_name=\"{MODEL}\",method=\"supervised\"}}")), "{text}");
    }
    std::fs::write(app.fine_tuning.options().root.join(id.strip_prefix("ftjob-").unwrap()).join("go"), "").unwrap();
    settled(&router, &id, |job| job["status"] == "failed").await;
    app.fine_tuning.close().await;
    assert_eq!(app.fine_tuning.gauges(), "");
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
[ -e "$3/once" ] && { MAKES; echo '{"event":"finished"}'; exit 0; }
touch "$3/once"
echo '{"event":"progress","step":1,"steps":9,"tokens":1,"metrics":{"loss":1.0}}'
while :; do sleep 0.05; done"#;
    let (app, router, _folder) = start(&script.replace("MAKES", &makes("adapter")));
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
async fn a_job_takes_the_device_of_today_and_begins_anew_where_its_card_is_gone() {
    // Takes a step and keeps it; whoever finds it goes on.
    let script = r#"
trap 'exit 75' TERM
echo "$(grep -c cuda "$3/spec.json") $(ls -d "$3"/checkpoint-1 2>/dev/null | wc -l)" >> "$3/log.txt"
mkdir -p "$3/checkpoint-1" "$3/epochs/step-1"
echo '{"event":"progress","step":1,"steps":2,"tokens":1,"metrics":{"loss":1.0}}'
while :; do sleep 0.05; done"#;
    let (app, router, _folder) = start(script);
    let id = make(&app, &router).await;
    let folder = app.fine_tuning.options().root.join(id.strip_prefix("ftjob-").unwrap());
    let seen = || std::fs::read_to_string(folder.join("log.txt")).unwrap_or_default();
    let saw = async |lines: &str| {
        let begin = Instant::now();
        while seen() != lines {
            assert!(begin.elapsed() < Duration::from_secs(60), "{:?}, not {lines:?}", seen());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut server = app.fine_tuning.clone();
    // Leaves the job to a server that has another device for it.
    let next = async |server: &mut tidemill::fine_tuning::FineTuning, card: Option<&str>| {
        server.close().await;
        if let Some(card) = card {
            let path = folder.join("spec.json");
            let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            spec["device"] = card.into();
            std::fs::write(&path, spec.to_string()).unwrap();
        }
        *server = tidemill::fine_tuning::FineTuning::new(&app.store, app.fine_tuning.options().clone());
        tokio::spawn(server.clone().run(app.clone()));
    };
    saw("0 0\n").await;
    settled(&router, &id, |job| job["tidemill"]["step"] == 1).await;
    next(&mut server, None).await;
    saw("0 0\n0 1\n").await;
    // No machine has it.
    next(&mut server, Some("cuda:4095")).await;
    saw("0 0\n0 1\n0 0\n").await;
    server.close().await;
    let told = told(&router, &id).await;
    let anew = "The card that the training began on (cuda:4095) is not there any more; it begins anew on the processor.";
    assert_eq!(told.iter().filter(|message| *message == anew).count(), 1, "{told:?}");
    // One that has not begun goes where trainings are now.
    let device = TrainingDevice { device: "cuda:1".parse().unwrap(), memory: None };
    let options = FineTuningOptions { device, threads: 3, ..app.fine_tuning.options().clone() };
    std::fs::remove_dir_all(folder.join("checkpoint-1")).unwrap();
    let other = tidemill::fine_tuning::FineTuning::new(&app.store, options);
    tokio::spawn(other.clone().run(app.clone()));
    saw("0 0\n0 1\n0 0\n1 0\n").await;
    other.close().await;
    let spec: Value = serde_json::from_slice(&std::fs::read(folder.join("spec.json")).unwrap()).unwrap();
    assert_eq!(spec["threads"], 3);
}

#[tokio::test]
async fn a_training_that_waits_for_its_card_is_queued_until_it_has_it() {
    let script = r#"
trap 'exit 75' TERM
echo run >> "$3/runs"
echo '{"event":"waits"}'
while [ ! -e "$3/free" ]; do sleep 0.05; done
echo '{"event":"waited"}'
echo '{"event":"progress","step":1,"steps":2,"tokens":1,"metrics":{"loss":1.0}}'
while [ ! -e "$3/end" ]; do sleep 0.05; done
MAKES
echo '{"event":"finished"}'"#;
    let (app, router, _folder) = start(&script.replace("MAKES", &makes("adapter")));
    let id = make(&app, &router).await;
    let folder = app.fine_tuning.options().root.join(id.strip_prefix("ftjob-").unwrap());
    let begin = Instant::now();
    while !told(&router, &id).await.iter().any(|message| message.ends_with("waits for it.")) {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    settled(&router, &id, |job| job["status"] == "queued").await;
    // It is not taken for one that was paused and resumed.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let job = settled(&router, &id, |_| true).await;
    assert_eq!((&job["status"], &job["tidemill"]["state"]), (&json!("queued"), &json!("queued")));
    assert_eq!(std::fs::read_to_string(folder.join("runs")).unwrap(), "run\n");
    // Paused and resumed, another process waits.
    post(&router, &format!("{JOBS}/{id}/pause"), json!({})).await.json();
    settled(&router, &id, |job| job["tidemill"]["state"] == "paused").await;
    let begin = Instant::now();
    while app.fine_tuning.gauges() != "" {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    post(&router, &format!("{JOBS}/{id}/resume"), json!({})).await.json();
    let begin = Instant::now();
    while std::fs::read_to_string(folder.join("runs")).unwrap() != "run\nrun\n" {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    std::fs::write(folder.join("free"), "").unwrap();
    settled(&router, &id, |job| job["status"] == "running" && job["tidemill"]["step"] == 1).await;
    std::fs::write(folder.join("end"), "").unwrap();
    settled(&router, &id, |job| job["status"] == "succeeded").await;
    let told = told(&router, &id).await;
    assert!(told.iter().any(|message| message == "The training has the card now."), "{told:?}");
    app.fine_tuning.close().await;
}

#[tokio::test]
async fn a_server_that_is_started_often_does_not_fail_a_training_that_needs_long_for_its_first_step() {
    let script = r#"
trap 'exit 75' TERM
echo run >> "$3/runs"
while :; do sleep 0.05; done"#;
    let (app, router, _folder) = start(script);
    let id = make(&app, &router).await;
    let runs = app.fine_tuning.options().root.join(id.strip_prefix("ftjob-").unwrap()).join("runs");
    let mut server = app.fine_tuning.clone();
    for started in 1..=6 {
        let begin = Instant::now();
        while std::fs::read_to_string(&runs).map_or(0, |text| text.lines().count()) < started {
            assert!(begin.elapsed() < Duration::from_secs(60), "{}", settled(&router, &id, |_| true).await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server.close().await;
        server = tidemill::fine_tuning::FineTuning::new(&app.store, app.fine_tuning.options().clone());
        tokio::spawn(server.clone().run(app.clone()));
    }
    assert_eq!(settled(&router, &id, |_| true).await["status"], "running");
    server.close().await;
}

#[tokio::test]
async fn a_job_that_is_cancelled_while_its_training_dies_leaves_nothing() {
    let (app, router, _folder) = start(r#"while [ ! -e "$3/go" ]; do sleep 0.05; done; kill -9 $$"#);
    let id = make(&app, &router).await;
    settled(&router, &id, |job| job["status"] == "running").await;
    let folder = app.fine_tuning.options().root.join(id.strip_prefix("ftjob-").unwrap());
    std::fs::write(folder.join("go"), "").unwrap();
    post(&router, &format!("{JOBS}/{id}/cancel"), json!({})).await.json();
    let begin = Instant::now();
    while folder.exists() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    app.fine_tuning.close().await;
}

#[tokio::test]
async fn a_process_that_cannot_be_started_is_no_training_that_took_no_step() {
    let (app, router, folder) = start("exit 0");
    std::fs::remove_file(folder.path().join("program")).unwrap();
    let id = make(&app, &router).await;
    let row = id.strip_prefix("ftjob-").unwrap().parse().unwrap();
    let begin = Instant::now();
    loop {
        let job = app.fine_tuning.rows().find(row, &Viewer::Anyone).await.unwrap().unwrap();
        if (job.state, job.attempts) == (FineTuningState::Running, 0) {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{job:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    app.fine_tuning.close().await;
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

#[tokio::test]
async fn one_key_does_not_fill_the_queue_for_all() {
    let options = FineTuningOptions { jobs_per_key: 3, ..no_training() };
    let mut app = Setup { fine_tuning: Some(options), ..Setup::default() }.app();
    let (_, busy) = app.store.create_key("busy", &[Scope::Admin]).await.unwrap();
    let (_, other) = app.store.create_key("other", &[Scope::Admin]).await.unwrap();
    app.auth = Auth::new(app.store.clone(), true);
    let router = router(app.clone());
    let order = json!({"model": MODEL, "training_file": file(&app, CHAT).await});
    let make = async |key: &str| ask(&router, "POST", JOBS, Some(key), order.clone()).await;
    // All at once: none is counted away by another.
    let sent = futures_util::future::join_all((0..8).map(|_| make(&busy))).await;
    let taken: Vec<&Reply> = sent.iter().filter(|reply| reply.status == 200).collect();
    assert_eq!(taken.len(), 3);
    let refused = sent.iter().find(|reply| reply.status != 200).unwrap();
    assert_eq!((refused.error().0, refused.error().2.as_deref()), (429, Some("too_many_jobs")));
    assert!(refused.json()["error"]["message"].as_str().unwrap().starts_with("3 fine-tuning jobs of this key"));
    assert_eq!(make(&other).await.status, 200);
    // One that is cancelled makes room.
    let id = taken[0].json()["id"].as_str().unwrap().to_owned();
    assert_eq!(ask(&router, "POST", &format!("{JOBS}/{id}/cancel"), Some(&busy), Value::Null).await.status, 200);
    assert_eq!(make(&busy).await.status, 200);
}

fn exact() -> Value {
    json!({"type": "string_check", "name": "exact", "operation": "eq", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"})
}

fn judge() -> Value {
    json!({"type": "score_model", "name": "judge", "model": MODEL,
        "input": [{"role": "user", "content": "Grade {{sample.output_text}}."}]})
}

#[tokio::test]
async fn graders_are_looked_through_and_tried_out() {
    const GRADERS: &str = "/v1/fine_tuning/alpha/graders";
    let app = Setup::script(says("{\"result\": 0.5}")).app();
    let router = router(app);
    let validated = post(&router, &format!("{GRADERS}/validate"), json!({"grader": exact()})).await.json();
    assert_eq!(validated["grader"], exact());
    let multi = json!({"type": "multi", "name": "both", "graders": {"exact": exact(), "judge": judge()}, "calculate_output": "exact + 2 * judge"});
    let run = json!({"grader": multi, "model_sample": "Paris", "item": {"answer": "Paris"}});
    let graded = post(&router, &format!("{GRADERS}/run"), run).await.json();
    assert_eq!((&graded["reward"], &graded["sub_rewards"]), (&json!(2.0), &json!({"exact": 1.0, "judge": 0.5})), "{graded}");
    assert!(graded["model_grader_token_usage_per_model"][MODEL].as_u64().unwrap() > 0);
    assert_eq!(graded["metadata"]["sampled_model_name"], MODEL);
    let missing = post(&router, &format!("{GRADERS}/run"), json!({"grader": exact(), "model_sample": "x"})).await.json();
    assert_eq!((&missing["reward"], &missing["metadata"]["errors"]["invalid_variable_error"]), (&json!(0.0), &json!(true)));
    let mut unknown = judge();
    unknown["model"] = "nobody".into();
    for (path, body, status, param) in [
        ("validate", json!({"grader": {"type": "python", "name": "p", "source": ""}}), 400, "grader.type"),
        ("validate", json!({"grader": unknown}), 404, "grader.model"),
        ("validate", json!({}), 400, "grader"),
        ("run", json!({"grader": exact()}), 400, "model_sample"),
        ("run", json!({"grader": exact(), "model_sample": "a", "item": 3}), 400, "item"),
    ] {
        let (got, named, _) = post(&router, &format!("{GRADERS}/{path}"), body.clone()).await.error();
        assert_eq!((got, named.as_deref()), (status, Some(param)), "{body}");
    }
}

#[tokio::test]
async fn more_gradings_than_the_server_has_threads_for_are_told_to_come_again() {
    let app = Setup { pace: Duration::from_millis(300), ..Setup::script(says("{\"result\": 0.5}")) }.app();
    let router = router(app);
    let run = json!({"grader": judge(), "model_sample": "x"});
    let ask = || post(&router, "/v1/fine_tuning/alpha/graders/run", run.clone());
    let replies = futures_util::future::join_all((0..20).map(|_| ask())).await;
    let full: Vec<_> = replies.iter().filter(|reply| reply.status == 503).collect();
    assert_eq!((full.len(), full[0].error().2.as_deref()), (4, Some("graders_full")));
    assert!(replies.iter().all(|reply| reply.status == 503 || reply.json()["reward"] == 0.5));
    assert_eq!(ask().await.json()["reward"], 0.5);
}

#[tokio::test]
async fn what_a_reinforcement_job_cannot_train_by_is_refused_when_it_is_made() {
    let app = Setup::default().app();
    let router = router(app.clone());
    let file = file(&app, r#"{"messages":[{"role":"user","content":"a"}],"answer":"b"}"#).await;
    let order = |grader: Value, numbers: Value| {
        let method = json!({"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": numbers}});
        json!({"model": MODEL, "training_file": file, "method": method})
    };
    let (mut template, mut unknown) = (exact(), judge());
    template["reference"] = "{{items.answer}}".into();
    unknown["model"] = "nobody".into();
    for (grader, numbers, param) in [
        (template, json!({}), "method.reinforcement.grader.reference"),
        (unknown, json!({}), "method.reinforcement.grader.model"),
        (exact(), json!({"eval_samples": 2}), "method.reinforcement.hyperparameters.eval_samples"),
        (exact(), json!({"max_completion_tokens": 512}), "method.reinforcement.hyperparameters.max_completion_tokens"),
    ] {
        let (_, named, _) = post(&router, JOBS, order(grader, numbers)).await.error();
        assert_eq!(named.as_deref(), Some(param));
    }
    let made = post(&router, JOBS, order(exact(), json!({"n_epochs": 1}))).await.json();
    assert_eq!(made["method"]["reinforcement"]["grader"], exact());
    assert_eq!(made["method"]["reinforcement"]["hyperparameters"]["compute_multiplier"], "auto");
}

fn question(model: &str) -> Question {
    Question {
        model: model.to_owned(),
        messages: vec![(Role::User, "Grade this.".to_owned())],
        schema: json!({"type": "object", "properties": {"result": {"type": "number"}}, "required": ["result"], "additionalProperties": false}),
        temperature: 0.0,
        top_p: None,
        seed: 0,
        max_tokens: 64,
    }
}

#[tokio::test]
async fn a_jobs_process_asks_the_models_of_its_grader_and_no_others() {
    let app = Setup::script(says("{\"result\": 0.5}")).app();
    // Longer than the path of a socket may be.
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("x".repeat(200));
    std::fs::create_dir(&folder).unwrap();
    let open = |key_id: Option<String>| {
        let petitioner = Petitioner { job: "ftjob-1".into(), key_id, models: vec![MODEL.into()] };
        Desk::open(&folder, Inside::new(app.clone()), app.store.clone(), petitioner).unwrap()
    };
    let asking = |model: &'static str| {
        let oracle = DeskOracle::new(&folder, Arc::new(AtomicBool::new(false)), || {});
        tokio::task::spawn_blocking(move || oracle.ask(&question(model)))
    };
    let desk = open(None);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(folder.join("grader.sock")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let reply = asking(MODEL).await.unwrap().unwrap();
    assert_eq!((reply.text.as_str(), reply.tokens > 0), ("{\"result\": 0.5}", true));
    assert!(asking("other").await.unwrap().unwrap_err().contains("names no model `other`"));
    // A process that asks while there is no server waits for the next one.
    drop(desk);
    let waiting = asking(MODEL);
    let desk = open(None);
    assert_eq!(waiting.await.unwrap().unwrap().text, "{\"result\": 0.5}");
    drop(desk);
    let _desk = open(Some("nobody".into()));
    assert!(asking(MODEL).await.unwrap().unwrap_err().contains("does not work any more"));
}
