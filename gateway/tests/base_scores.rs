//! What the base model says of answers: measured for real, in nobody's way, and a drifted adapter is gone by it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::support::{MODEL, Setup, ask, merged, post};
use crate::tiny;
use axum::Router;
use serde_json::{Value, json};
use std::time::Duration;
use tempfile::TempDir;
use tidemill::clock::now;
use tidemill::http::{App, router};
use tidemill::recording::{Level, Recording};
use tidemill::rollout::decision::Act;
use tidemill::rollout::scorer::Scorer;
use tidemill::upstream::remote::{RemoteSpec, Remotes, ServerSpec};
use tidemill_store::records::Inference;
use tidemill_store::{BaseScores, Exposures, InferenceFilter, Rollout, UnitSums, UnitValue};

/// The tiny model, an adapter that has moved far from it, and the model `far` of another server.
async fn server(change: impl FnOnce(&mut Setup)) -> (TempDir, App, Router) {
    let remotes = Remotes {
        servers: vec![ServerSpec::new("u", "http://127.0.0.1:1")],
        models: vec![RemoteSpec::new("far", vec!["u".into()])],
    };
    let mut setup = Setup { remotes, ..Setup::default() };
    change(&mut setup);
    let folder = tempfile::tempdir().unwrap();
    let app = tiny::app(folder.path(), setup);
    let router = router(app.clone());
    let body = json!({"name": "drifted", "path": tiny::golden("adapters/all")});
    assert_eq!(post(&router, "/v1/adapters", body).await.status, 201);
    assert_eq!(ask(&router, "POST", "/v1/adapters/drifted/serve", None, json!({})).await.status, 200);
    (folder, app, router)
}

fn scorer(app: &App) -> Scorer {
    Scorer::new(&app.store, app.registry.clone(), app.rollouts.clone(), app.drain.clone())
}

fn spec(metrics: Value, more: Value) -> Value {
    let base = json!({
        "name": "r", "model": "tiny", "kind": "canary", "arms": [{"variant": "tiny"}, {"variant": "drifted"}], "interval": 1,
        "steps": [{"set_weight": 50}, {"pause": {"samples": 5}}], "min_exposure": 10, "tuning": 40, "metrics": metrics,
    });
    merged(base, more)
}

async fn started(router: &Router, spec: Value) {
    let reply = post(router, "/v1/rollouts", spec).await;
    assert_eq!(reply.status, 201, "{}", reply.json());
}

/// So many users, who each ask once, with a seed of their own.
async fn asked(app: &App, router: &Router, users: usize) {
    for user in 0..users {
        let body = json!({"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 12, "seed": user, "user": format!("user-{user}"), "ignore_eos": true});
        let reply = post(router, "/v1/completions", body).await;
        assert_eq!(reply.status, 200, "{}", reply.json());
    }
    app.store.flush().await;
}

async fn rollout(app: &App) -> Rollout {
    app.rollouts.rollouts().find("r").await.unwrap()
}

async fn measured(app: &App, after_s: i64) -> Rollout {
    app.rollouts.measure_due(now() + after_s * 1_000_000).await.unwrap();
    rollout(app).await
}

async fn sums(app: &App, value: UnitValue) -> Vec<UnitSums> {
    Exposures::new(app.store.database()).unit_means(rollout(app).await.id, 0, value).await.unwrap()
}

async fn of_arm(app: &App, arm: u32) -> Vec<Inference> {
    let filter = InferenceFilter { limit: Some(1000), ..InferenceFilter::default() };
    let all = app.store.list_inferences(&filter).await.unwrap().items;
    all.into_iter().filter(|row| row.exposure.is_some_and(|exposure| exposure.arm == arm)).collect()
}

async fn score_all(app: &App) -> usize {
    let (scorer, mut scored) = (scorer(app), 0);
    loop {
        match scorer.score_waiting().await.unwrap() {
            0 => return scored,
            more => scored += more,
        }
    }
}

/// The base's log-probabilities of a prompt's tokens, as the API says them.
async fn echoed(router: &Router, tokens: &[u32]) -> Vec<f64> {
    let body = json!({"model": "tiny", "prompt": tokens, "echo": true, "logprobs": 0, "max_tokens": 0});
    let reply = post(router, "/v1/completions", body).await.json();
    let said = reply["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    said.iter().skip(1).map(|logprob| logprob.as_f64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_put_through_the_base_once_and_its_numbers_are_those_of_the_api() {
    let (_folder, app, router) = server(|_| {}).await;
    let metric =
        |name: &str, max: f64, share: f64| json!({"metric": name, "guardrail": {"max": max}, "min_samples": 5, "share": share});
    started(&router, spec(json!([metric("kl_to_base", 1e6, 1.0), metric("logprob_to_base", 1e6, 0.001)]), json!({}))).await;
    asked(&app, &router, 24).await;
    let answers = of_arm(&app, 1).await;
    assert!(answers.len() >= 5, "{}", answers.len());
    // The larger share of two metrics, and the control is compared with by none.
    assert_eq!(score_all(&app).await, answers.len());
    assert_eq!(score_all(&app).await, 0, "each once");
    let (kl, logprob) = (sums(&app, UnitValue::KlToBase).await, sums(&app, UnitValue::LogprobToBase).await);
    assert_eq!((kl.len(), kl[0].arm, kl[0].units), (1, 1, answers.len() as u64));
    // From here on the name is the base's alone, for everybody.
    app.rollouts.act("r", Act::RollBack, "ann").await.unwrap();
    let (mut differences, mut base) = (0.0, 0.0);
    for answer in &answers {
        let choice = &answer.choices[0];
        let tokens: Vec<u32> = answer.prompt_ids.iter().chain(&choice.output_ids).copied().collect();
        let said = echoed(&router, &tokens).await;
        let said = &said[answer.prompt_ids.len() - 1..];
        assert_eq!((said.len(), choice.raw_logprobs.len()), (12, 12));
        let own: f64 = choice.raw_logprobs.iter().map(|logprob| f64::from(*logprob)).sum();
        base += said.iter().sum::<f64>() / 12.0;
        differences += (own - said.iter().sum::<f64>()) / 12.0;
    }
    assert!((kl[0].sum - differences).abs() < 1e-3 && differences > 0.1, "{kl:?} {differences}");
    assert!((logprob[0].sum - base).abs() < 1e-3 && base < -1.0, "{logprob:?} {base}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drifted_adapter_is_rolled_back_and_the_base_itself_is_not() {
    let guardrail =
        |of: &str| json!([{"metric": "kl_to_base", "guardrail": {"of": of, "max": 0.001}, "min_samples": 10, "share": 1}]);
    let (_folder, app, router) = server(|_| {}).await;
    started(&router, spec(guardrail("value"), json!({}))).await;
    asked(&app, &router, 120).await;
    score_all(&app).await;
    let ended = measured(&app, 2).await;
    assert_eq!(ended.latest["reason"], "the guardrail kl_to_base is broken", "{}", ended.latest);
    assert_eq!(ended.latest["action"]["kind"], "roll_back");

    // The same model with other words has not moved at all; as a difference, the control is scored, too.
    let arms = json!({"name": "s", "arms": [{"variant": "tiny"}, {"variant": "same", "model": "tiny", "defaults": {"temperature": 0.9}}]});
    started(&router, spec(guardrail("difference"), arms)).await;
    asked(&app, &router, 60).await;
    assert!(score_all(&app).await >= 60);
    app.rollouts.measure_due(now() + 4_000_000).await.unwrap();
    let row = app.rollouts.rollouts().find("s").await.unwrap();
    let judged = &row.latest["judgements"][0];
    assert_eq!(
        (&judged["verdict"], &judged["value"], &judged["control"]),
        (&json!("pass"), &json!(0.0), &json!(0.0)),
        "{}",
        row.latest
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_has_scored_promotes_nothing() {
    let (_folder, app, router) = server(|_| {}).await;
    let metrics =
        json!([{"metric": "kl_to_base", "guardrail": {"max": 1e6}, "min_samples": 5, "inconclusive_limit": 1, "share": 1}]);
    started(&router, spec(metrics, json!({}))).await;
    asked(&app, &router, 60).await;
    let mut kinds = Vec::new();
    for turn in 1..=5 {
        kinds.push(measured(&app, 2 * turn).await.latest["action"]["kind"].as_str().unwrap().to_owned());
    }
    assert_eq!(kinds, ["hold", "pause", "hold", "hold", "hold"]);
    // When they come, it goes on.
    score_all(&app).await;
    let kinds: Vec<Value> =
        [measured(&app, 20).await, measured(&app, 22).await, measured(&app, 24).await, measured(&app, 26).await]
            .into_iter()
            .map(|row| row.latest["action"]["kind"].clone())
            .collect();
    assert_eq!((&kinds[0], kinds.contains(&json!("step"))), (&json!("resume"), true), "{kinds:?}");
}

#[tokio::test]
async fn what_the_base_cannot_score_is_refused_with_the_field() {
    let guardrail = |of: &str| json!([{"metric": "error_rate", "guardrail": {"max": 0.5}}, {"metric": "logprob_to_base", "guardrail": {"of": of, "min": -9}}]);
    let (_folder, app, router) = server(|_| {}).await;
    let refused = async |router: &Router, spec: Value| {
        let reply = post(router, "/v1/rollouts", spec).await;
        assert_eq!((reply.status.as_u16(), reply.error().1.as_deref()), (400, Some("metrics.1.metric")), "{}", reply.json());
        reply.json()["error"]["message"].as_str().unwrap().to_owned()
    };
    let far = json!({"arms": [{"variant": "tiny"}, {"variant": "far"}]});
    let why = refused(&router, spec(guardrail("value"), far)).await;
    assert!(why.contains("`logprob_to_base`") && why.contains("`far` come from another server"), "{why}");
    // As the control, another server's answers are in the way only where they are compared with.
    let ours = json!({"model": "far", "arms": [{"variant": "far"}, {"variant": "tiny"}]});
    let why = refused(&router, spec(guardrail("difference"), ours.clone())).await;
    assert!(why.contains("`far`, the control, come"), "{why}");
    started(&router, spec(guardrail("value"), ours)).await;
    drop(app);

    let texts = |setup: &mut Setup| setup.recording = Recording { level: Level::Metadata, ..Recording::default() };
    let (_folder, _app, router) = server(texts).await;
    let why = refused(&router, spec(guardrail("value"), json!({}))).await;
    assert!(why.contains("recorded without their tokens"), "{why}");
    for (share, param) in [(json!(0), "metrics.0.share"), (json!(1.5), "metrics.0.share")] {
        let metrics = json!([{"metric": "kl_to_base", "guardrail": {"max": 1}, "share": share}]);
        assert_eq!(post(&router, "/v1/rollouts", spec(metrics, json!({}))).await.error().1.as_deref(), Some(param));
    }
    let metrics = json!([{"metric": "error_rate", "guardrail": {"max": 0.5}, "share": 0.5}]);
    assert_eq!(post(&router, "/v1/rollouts", spec(metrics, json!({}))).await.error().1.as_deref(), Some("metrics.0.share"));
}

/// This parrot with a rollout whose arms are both scored, and one answer that counts in it.
async fn slow(setup: Setup) -> (App, Router) {
    let app = setup.app();
    let router = router(app.clone());
    let arms = json!([{"variant": MODEL}, {"variant": "loud", "model": MODEL, "defaults": {"temperature": 0.5}}]);
    let metrics = json!([{"metric": "kl_to_base", "guardrail": {"of": "difference", "max": 1}, "share": 1}]);
    started(&router, spec(metrics, json!({"model": MODEL, "arms": arms}))).await;
    assert_eq!(post(&router, "/v1/completions", hello(2)).await.status, 200);
    app.store.flush().await;
    (app, router)
}

fn hello(tokens: usize) -> Value {
    json!({"model": MODEL, "prompt": "hello ".repeat(10), "max_tokens": tokens, "user": "ann"})
}

/// Waits until the engine has something to do.
async fn busy(app: &App) {
    let engine = app.registry.find_local(Some(MODEL)).unwrap().engine().clone();
    while engine.stats().running == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scoring_waits_for_an_idle_engine() {
    let (app, router) = slow(Setup::slow(500, 20)).await;
    // Somebody's answer takes at least six seconds from here on.
    let (asking, long) = (router.clone(), hello(300));
    let asking = tokio::spawn(async move { post(&asking, "/v1/completions", long).await.status });
    busy(&app).await;
    let scorer = scorer(&app);
    let scoring = tokio::spawn(async move { scorer.score_waiting().await.unwrap() });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!asking.is_finished() && !scoring.is_finished());
    assert!(sums(&app, UnitValue::KlToBase).await.is_empty(), "the answer is waited for");
    assert_eq!(asking.await.unwrap(), 200);
    assert_eq!(scoring.await.unwrap(), 1);
    assert_eq!(sums(&app, UnitValue::KlToBase).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_score_that_is_called_off_midway_is_given_back_and_made_later() {
    let (app, router) = slow(Setup { max_seqs: 8, max_batch_tokens: 8, ..Setup::slow(20, 200) }).await;
    let (first, counted) = (rollout(&app).await.id, BaseScores::new(app.store.database()));
    let scoring = scorer(&app);
    let scoring = tokio::spawn(async move { scoring.score_waiting().await.unwrap() });
    // The base is at it, for more than a second: eight tokens a step.
    busy(&app).await;
    assert_eq!(counted.waiting(first, 0, now()).await.unwrap(), [], "taken by one, it waits for nobody else");
    assert_eq!(post(&router, "/v1/completions", hello(1)).await.status, 200);
    assert_eq!(scoring.await.unwrap(), 0, "it was let go for somebody's question");
    assert!(sums(&app, UnitValue::KlToBase).await.is_empty());
    app.store.flush().await;
    assert_eq!(counted.waiting(first, 0, now()).await.unwrap().len(), 2, "at once, and not when its promise has run out");
    assert_eq!((score_all(&app).await, counted.waiting(first, 0, now()).await.unwrap().len()), (2, 0));
    assert_eq!(sums(&app, UnitValue::KlToBase).await[0].units, 1);
}
