//! Rollouts at work: from a request to what is decided. Time is an argument, so that a rollout of days takes no time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

#[path = "support/far.rs"]
mod far;
mod support;

use axum::Router;
use far::{Conn, Far};
use hyper::Request;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::{MODEL, Reply, Setup, ask, get, merged, post, send};
use tidemill::clock::now;
use tidemill::feedback::{Metric, MetricKind, Optimize};
use tidemill::http::{App, router};
use tidemill::recording::{Level, Recording};
use tidemill::rollout::decision::Act;
use tidemill::rollout::keeper::Keeper;
use tidemill::upstream::remote::breaker::BreakerRule;
use tidemill::upstream::remote::{RemoteSpec, Remotes, ServerSpec};
use tidemill_store::records::{Exposure, Feedback, Inference, Kind, Status};
use tidemill_store::{Rollout, Scope, Store};

const CHAT: &str = "/v1/chat/completions";
const SECOND: i64 = 1_000_000;

/// The parrot, and beside it the model `far`, which another server answers.
fn app(server: ServerSpec) -> App {
    setup(server, |_| {}).app()
}

fn setup(server: ServerSpec, change: impl FnOnce(&mut Setup)) -> Setup {
    // A breaker that never opens: here every failure is to be seen.
    let breaker = BreakerRule { failures: 1_000_000, ..BreakerRule::default() };
    let model = RemoteSpec {
        retries: 0,
        first_token_timeout: Duration::from_millis(300),
        timeout: Duration::from_millis(300),
        ..RemoteSpec::new("far", vec![server.name.clone()])
    };
    let remotes = Remotes { servers: vec![ServerSpec { breaker, ..server }], models: vec![model] };
    let mut setup = Setup { remotes, ..Setup::default() };
    change(&mut setup);
    setup
}

/// A rollout of `far` on the parrot's name.
fn spec(more: Value) -> Value {
    let base = json!({
        "name": "r", "model": MODEL, "kind": "ab", "arms": [{"variant": MODEL}, {"variant": "far"}], "interval": 1, "min_exposure": 20,
        "metrics": [
            {"metric": "error_rate", "guardrail": {"max": 0.1}, "min_samples": 10},
            {"metric": "feedback.thumb", "goal": {"min": 0}, "min_samples": 20},
        ],
    });
    let mut all = merged(base, more);
    all.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    all
}

async fn started(router: &Router, more: Value) -> Value {
    let reply = post(router, "/v1/rollouts", spec(more)).await;
    assert_eq!(reply.status, 201, "{}", reply.json());
    reply.json()
}

fn question(user: &str) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "user": user})
}

async fn answered(router: &Router, user: &str) -> Reply {
    post(router, CHAT, question(user)).await
}

fn variant(reply: &Reply) -> &str {
    reply.headers["x-tidemill-variant"].to_str().unwrap()
}

async fn recorded(store: &Store, reply: &Reply) -> Inference {
    let id = reply.json()["id"].as_str().unwrap().rsplit_once("cmpl-").unwrap().1.to_owned();
    store.flush().await;
    store.inference(id.parse().unwrap()).await.unwrap().expect("not recorded")
}

/// What the leader does when the rollout's interval is over.
async fn measured(app: &App, name: &str, after_s: i64) -> Rollout {
    app.store.flush().await;
    app.rollouts.measure_due(now() + after_s * SECOND).await.unwrap();
    app.rollouts.rollouts().find(name).await.unwrap()
}

fn thumb(app: &App, target: &Inference, up: bool) -> Feedback {
    support::judged(&app.store, target.id, Some("someone"), Kind::Thumb, json!(up))
}

#[tokio::test]
async fn a_unit_keeps_its_arm_and_the_answer_says_who_gave_it() {
    let far = Far::saying("Far").await;
    let app = app(far.spec("u"));
    let (store, router) = (app.store.clone(), router(app));
    // Before anything is decided about the name, nothing changes.
    assert!(!answered(&router, "ann").await.headers.contains_key("x-tidemill-variant"));
    let made = started(&router, json!({})).await;
    assert_eq!((&made["status"], &made["arms"][1]["share"]), (&json!("running"), &json!(0.5)));
    let mut arms: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for id in 0..30 {
        let user = format!("user-{id}");
        let reply = answered(&router, &user).await;
        let name = variant(&reply).to_owned();
        let body = reply.json();
        assert_eq!((body["model"].as_str(), name == "far"), (Some(MODEL), body["choices"][0]["message"]["content"] == "Far"));
        let record = recorded(&store, &reply).await;
        let exposure = record.exposure.unwrap();
        assert_eq!(
            (exposure.rollout.to_string(), exposure.arm),
            (made["id"].as_str().unwrap().to_owned(), u32::from(name == "far"))
        );
        assert_eq!((record.variant.as_deref(), exposure.refused), (Some(name.as_str()), Some(false)));
        assert_eq!(record.model, if name == "far" { "far" } else { MODEL });
        assert_ne!(exposure.unit, 0);
        arms.entry(name).or_default().push(user);
    }
    assert_eq!(arms.len(), 2, "{arms:?}");
    for (name, users) in &arms {
        for user in users {
            assert_eq!(variant(&answered(&router, user).await), name);
            // By a header where the body names nobody, and the other endpoints agree.
            let request = Request::post("/v1/completions").header("x-tidemill-unit", user);
            let body = json!({"model": MODEL, "prompt": "hello", "max_tokens": 1});
            assert_eq!(variant(&send(&router, request.body(body.to_string().into()).unwrap()).await), name);
        }
    }
    // Those endpoints that no other server has fall back, and the failure counts.
    let far_user = &arms["far"][0];
    let body = json!({"model": MODEL, "input": "hello", "user": far_user});
    assert_eq!(variant(&post(&router, "/v1/responses", body).await), MODEL);
    let message = json!({"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "metadata": {"user_id": far_user}});
    assert_eq!(variant(&post(&router, "/v1/messages", message).await), MODEL);
    // Vectors of two models cannot be mixed.
    let vectors = post(&router, "/v1/embeddings", json!({"model": MODEL, "input": "hello", "user": far_user})).await;
    assert!(vectors.status == 200 && !vectors.headers.contains_key("x-tidemill-variant"));
}

#[tokio::test]
async fn testers_choose_and_count_for_nothing() {
    let far = Far::saying("Far").await;
    let app = app(far.spec("u"));
    let (_, admin) = app.store.create_key("boss", &[Scope::Admin, Scope::Chat]).await.unwrap();
    let (_, plain) = app.store.create_key("app", &[Scope::Chat]).await.unwrap();
    let (store, router) = (app.store.clone(), router(app));
    assert_eq!(ask(&router, "POST", "/v1/rollouts", Some(&admin), spec(json!({}))).await.status, 201);
    assert_eq!(ask(&router, "GET", "/v1/rollouts", Some(&plain), Value::Null).await.status, 403);
    let tested = async |key: &str, wanted: &str, secret: &str| {
        let request = Request::post(CHAT).header("authorization", format!("Bearer {key}")).header("x-tidemill-variant", wanted);
        let request = if secret.is_empty() { request } else { request.header("x-tidemill-tester", secret) };
        send(&router, request.body(question("ann").to_string().into()).unwrap()).await
    };
    for (key, secret) in [(&admin, ""), (&plain, "let me in")] {
        for wanted in ["far", MODEL] {
            let reply = tested(key, wanted, secret).await;
            assert_eq!(variant(&reply), wanted);
            assert_eq!(recorded(&store, &reply).await.exposure, None);
        }
    }
    assert_eq!(tested(&plain, "far", "").await.error().0, 403);
    assert_eq!(tested(&plain, "far", "let me").await.error().0, 403);
    let unknown = tested(&admin, "near", "").await.error();
    assert_eq!((unknown.0, unknown.1.as_deref()), (400, Some("x-tidemill-variant")));
}

#[tokio::test]
async fn a_variant_that_fails_before_the_first_byte_is_replaced_and_counts_against_its_arm() {
    let far = Far::failing(500, "", json!({"message": "broken"})).await;
    let app = app(far.spec("u"));
    let router = router(app.clone());
    started(&router, json!({})).await;
    let mut asked = 0;
    let rollout = loop {
        for id in 0..5 {
            let extra = if id % 2 == 0 { json!({"stream": true}) } else { json!({}) };
            let reply = post(&router, CHAT, merged(question(&format!("user-{asked}-{id}")), extra)).await;
            // Nobody notices.
            assert_eq!((reply.status.as_u16(), variant(&reply)), (200, MODEL));
        }
        asked += 1;
        let rollout = measured(&app, "r", asked).await;
        if rollout.ended.is_some() || asked == 40 {
            break rollout;
        }
    };
    assert_eq!(rollout.latest["action"]["kind"], "roll_back", "{}", rollout.latest);
    assert_eq!(rollout.latest["reason"], "the guardrail error_rate is broken");
    let exposed = rollout.latest["exposures"][1].as_u64().unwrap();
    // Exact from the first failure on: fifteen users of the variant are more than enough, and no thumb was needed.
    assert!((2..=15).contains(&exposed), "{}", rollout.latest);
    let asked = far.count();
    for id in 0..20 {
        answered(&router, &format!("user-{id}")).await;
    }
    assert_eq!(far.count(), asked, "nothing reaches it any more");
}

#[tokio::test]
async fn a_variant_that_stalls_is_replaced_in_time_and_rolled_back() {
    // It takes the request and says nothing.
    let far = Far::new(|_, conn: Conn| conn.closed()).await;
    let app = app(far.spec("u"));
    let router = router(app.clone());
    let guardrail = json!([{"metric": "time_to_first_token_p95", "guardrail": {"max": 0.1}, "min_samples": 5}]);
    started(&router, json!({"kind": "canary", "steps": [{"set_weight": 50}, {"pause": "1h"}], "metrics": guardrail})).await;
    let mut turn = 0;
    let rollout = loop {
        let users: Vec<String> = (0..8).map(|id| format!("user-{turn}-{id}")).collect();
        let replies = futures_util::future::join_all(users.iter().map(|user| answered(&router, user))).await;
        assert!(replies.iter().all(|reply| reply.status == 200 && variant(reply) == MODEL));
        turn += 1;
        let rollout = measured(&app, "r", turn).await;
        if rollout.ended.is_some() || turn == 10 {
            break rollout;
        }
    };
    assert_eq!(rollout.latest["reason"], "the guardrail time_to_first_token_p95 is broken", "{}", rollout.latest);
}

#[tokio::test]
async fn a_request_that_nobody_can_answer_counts_against_nobody() {
    let far = Far::saying("Far").await;
    let app = app(far.spec("u"));
    let (store, router) = (app.store.clone(), router(app.clone()));
    started(&router, json!({})).await;
    for id in 0..30 {
        let bad = merged(question(&format!("user-{id}")), json!({"tidemill": {"compare": true}}));
        assert_eq!(post(&router, CHAT, bad).await.error().0, 400);
    }
    store.flush().await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    let counts = tidemill_store::Exposures::new(store.database()).counts(row.id, 0).await.unwrap();
    assert!(counts.is_empty(), "{counts:?}");
}

#[tokio::test]
async fn a_better_variant_is_promoted_and_is_the_next_control() {
    let far = Far::saying("Far").await;
    let app = app(far.spec("u"));
    let router = router(app.clone());
    started(
        &router,
        json!({"kind": "canary", "steps": [{"set_weight": 20}, {"pause": {"samples": 20}}, {"set_weight": 50}], "tuning": 60}),
    )
    .await;
    let (mut turn, mut steps) = (0, Vec::new());
    let rollout = loop {
        let mut said = Vec::new();
        for id in 0..40 {
            let reply = answered(&router, &format!("user-{turn}-{id}")).await;
            if app.rollouts.tables().of(MODEL).is_some_and(|public| !public.rollouts().is_empty()) {
                let record = recorded(&app.store, &reply).await;
                // People like what is new, and what there was half of the time.
                said.extend(record.exposure.is_some().then(|| thumb(&app, &record, variant(&reply) == "far" || id % 2 == 0)));
            }
        }
        app.store.add_feedback(said).await.unwrap();
        turn += 1;
        let rollout = measured(&app, "r", 2 * turn).await;
        steps.push(rollout.latest["action"]["kind"].as_str().unwrap().to_owned());
        if rollout.ended.is_some() || turn == 40 {
            break rollout;
        }
    };
    assert_eq!(rollout.latest["action"], json!({"kind": "promote", "arm": 1}), "{steps:?} {}", rollout.latest);
    assert_eq!(steps.iter().filter(|step| *step == "step").count(), 2, "{steps:?}");
    for id in 0..20 {
        assert_eq!(variant(&answered(&router, &format!("user-{id}")).await), "far");
    }
    let shown = get(&router, "/v1/rollouts/r").await.json();
    assert_eq!((&shown["status"], shown["ended_at"].is_i64()), (&json!("promoted"), true));
    let kinds: Vec<&str> =
        shown["decisions"].as_array().unwrap().iter().map(|row| row["action"]["kind"].as_str().unwrap()).collect();
    assert_eq!((kinds.first(), kinds.last()), (Some(&"start"), Some(&"promote")));
    // A server that comes back serves the same.
    let again = Keeper::new(&app.store, app.registry.clone(), app.adapters.clone(), app.feedback_metrics.clone());
    again.follow().await.unwrap();
    assert_eq!(again.stable(MODEL).name, "far");
    // The way back is a rollout like any other; its control may be called as the model.
    let wrong =
        post(&router, "/v1/rollouts", spec(json!({"name": "s", "arms": [{"variant": "else"}, {"variant": "far"}]}))).await;
    assert_eq!((wrong.error().1.as_deref(), wrong.status.as_u16()), (Some("arms.0.variant"), 400));
    let back = json!({"name": "back", "arms": [{"variant": "far"}, {"variant": MODEL}]});
    assert_eq!(started(&router, back).await["arms"][0]["variant"], "far");
    app.rollouts.act("back", Act::Promote { arm: 1 }, "ann").await.unwrap();
    assert_eq!(variant(&answered(&router, "ann").await), MODEL);
}

#[tokio::test]
async fn after_the_acknowledgement_of_a_rollback_nothing_reaches_the_variant() {
    let far = Far::saying("Far").await;
    let app = app(far.spec("u"));
    let router = router(app.clone());
    started(&router, json!({})).await;
    let acknowledged = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..4)
        .map(|client| {
            let (router, acknowledged) = (router.clone(), Arc::clone(&acknowledged));
            tokio::spawn(async move {
                let (mut early, mut late) = (0, 0);
                while late < 100 {
                    // Known before the request is written.
                    let after = acknowledged.load(Ordering::Acquire);
                    *(if after { &mut late } else { &mut early }) += 1;
                    let name = format!("{}-{client}-{early}-{late}", if after { "late" } else { "early" });
                    assert_eq!(answered(&router, &name).await.status, 200);
                }
                early
            })
        })
        .collect();
    while far.count() < 20 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let reply = post(&router, "/v1/rollouts/r/rollback", json!({})).await;
    assert_eq!((reply.status.as_u16(), &reply.json()["status"]), (200, &json!("rolled_back")), "{}", reply.json());
    assert_eq!(reply.json()["servers"], json!({"all": 1, "serving": 1}));
    acknowledged.store(true, Ordering::Release);
    for client in load {
        assert!(client.await.unwrap() > 0);
    }
    let late = |seen: &far::Seen| seen.body["user"].as_str().unwrap().starts_with("late");
    assert!(far.count() >= 20 && !far.seen().iter().any(late), "a request reached the variant after the acknowledgement");
    assert!(!answered(&router, "ann").await.headers.contains_key("x-tidemill-variant"));
    let over = post(&router, "/v1/rollouts/r/resume", json!({})).await.error();
    assert_eq!((over.0, over.2.as_deref()), (409, Some("rollout_over")));
}

#[tokio::test]
async fn the_words_of_a_variant_are_put_before_the_conversation_and_are_not_the_clients() {
    let far = Far::saying("Far").await;
    let app = app(far.spec("u"));
    let (store, router) = (app.store.clone(), router(app.clone()));
    let arm = |model: &str| json!({"variant": "pirate", "model": model, "prompt_prefix": "Arr.", "defaults": {"temperature": 0.25, "max_tokens": 3}});
    let forced = async |extra: Value| {
        let request = Request::post(CHAT).header("x-tidemill-variant", "pirate");
        send(&router, request.body(merged(question("ann"), extra).to_string().into()).unwrap()).await
    };
    started(&router, json!({"arms": [{"variant": MODEL}, arm(MODEL)]})).await;
    let reply = forced(json!({})).await;
    let (body, record) = (reply.json(), recorded(&store, &reply).await);
    assert_eq!((&body["model"], &body["usage"]["completion_tokens"]), (&json!(MODEL), &json!(3)));
    assert!(record.prompt_text.unwrap().starts_with("<|im_start|>system\nArr.<|im_end|>"));
    assert_eq!(record.messages, Some(json!([{"role": "user", "content": "hello"}])));
    assert_eq!((record.variant.as_deref(), &record.params.unwrap()["temperature"]), (Some("pirate"), &json!(0.25)));
    let own = recorded(&store, &forced(json!({"temperature": 0.5})).await).await;
    assert_eq!(own.params.unwrap()["temperature"], json!(0.5));
    app.rollouts.act("r", Act::RollBack, "ann").await.unwrap();

    started(&router, json!({"arms": [{"variant": MODEL}, arm("far")]})).await;
    let reply = forced(json!({})).await;
    assert_eq!((variant(&reply), &reply.json()["model"]), ("pirate", &json!(MODEL)));
    let sent = &far.seen()[0].body;
    assert_eq!(sent["messages"][0], json!({"role": "system", "content": "Arr."}));
    assert_eq!((&sent["model"], &sent["temperature"], &sent["max_tokens"]), (&json!("far"), &json!(0.25), &json!(3)));
    assert_eq!(recorded(&store, &reply).await.messages, Some(json!([{"role": "user", "content": "hello"}])));
}

#[tokio::test]
async fn what_is_not_recorded_is_counted_all_the_same_and_names_nobody() {
    let far = Far::saying("I'm sorry, but I can't help with that.").await;
    let app = setup(far.spec("u"), |setup| setup.recording = Recording { level: Level::Off, ..Recording::default() }).app();
    let (store, router) = (app.store.clone(), router(app.clone()));
    started(&router, json!({})).await;
    let mut refusals = BTreeMap::new();
    for id in 0..20 {
        let extra = json!({"metadata": {"secret": "x"}});
        let reply = post(&router, CHAT, merged(question(&format!("user-{id}")), extra)).await;
        let record = recorded(&store, &reply).await;
        assert_eq!((record.user_key, record.metadata.len(), record.messages, record.prompt_ids.len()), (None, 0, None, 0));
        assert_eq!(record.choices[0].output_text, None);
        refusals.insert(variant(&reply).to_owned(), record.exposure.unwrap().refused);
    }
    assert_eq!(refusals, [("far".to_owned(), Some(true)), (MODEL.to_owned(), Some(false))].into());
    app.rollouts.act("r", Act::RollBack, "ann").await.unwrap();
    let reply = answered(&router, "ann").await;
    store.flush().await;
    let id = reply.json()["id"].as_str().unwrap().rsplit_once("cmpl-").unwrap().1.to_owned();
    assert_eq!(store.inference(id.parse().unwrap()).await.unwrap(), None, "nothing counts it, so nothing keeps it");
}

/// So many answers of an arm, of as many users, in the middle of the rollout; all but every `lost`th reach the database, and every
/// `failed`th fails.
async fn serve_many(app: &App, row: &Rollout, arm: u32, units: i64, lost: i64, failed: i64) {
    for unit in (0..units).filter(|unit| lost == 0 || unit % lost != 0) {
        let mut answer = support::answered(&app.store, "u", "p", &["text"], -1.0);
        answer.created = row.created + 1 + unit;
        answer.status = if failed > 0 && unit % failed == 0 { Status::Failed } else { Status::Ok };
        answer.exposure =
            Some(Exposure { rollout: row.id, arm, unit: unit * 2 + i64::from(arm), refused: Some(false), place: None });
        app.store.record(answer).unwrap();
        if unit % 500 == 0 {
            // The queue has an end.
            app.store.flush().await;
        }
    }
}

#[tokio::test]
async fn an_arm_that_takes_longer_is_not_taken_for_one_that_lost_units() {
    let app = app(ServerSpec::new("u", "http://127.0.0.1:1"));
    let router = router(app.clone());
    let metrics = json!([{"metric": "error_rate", "guardrail": {"max": 0.1}, "min_samples": 1000}]);
    started(&router, json!({"name": "slow", "kind": "canary", "steps": [{"set_weight": 50}], "metrics": metrics})).await;
    let row = app.rollouts.rollouts().find("slow").await.unwrap();
    // The control's have begun as well, and are being written by the engine.
    let writing = app.rollouts.under_way().begin(row.created + 1);
    serve_many(&app, &row, 1, 300, 0, 0).await;
    let rollout = measured(&app, "slow", 5).await;
    assert_eq!(rollout.latest["action"]["kind"], "hold", "{}", rollout.latest);
    assert_eq!((&rollout.latest["exposures"], &rollout.latest["sample_ratio"]), (&json!([0, 300]), &Value::Null));
    // They have ended, and nothing came of them.
    drop(writing);
    assert_eq!(measured(&app, "slow", 10).await.latest["action"], json!({"kind": "pause", "reason": "sample_ratio"}));
}

#[tokio::test]
async fn lost_exposures_are_seen_and_promote_nothing() {
    let app = app(ServerSpec::new("u", "http://127.0.0.1:1"));
    let router = router(app.clone());
    // Guardrails alone: nothing but the ratio of the arms stands in the way.
    let metrics = json!([{"metric": "error_rate", "guardrail": {"max": 0.1}, "min_samples": 10}]);
    for (name, units, lost, action) in [("whole", 300, 0, "promote"), ("lossy", 3000, 10, "pause")] {
        let steps = json!([{"set_weight": 50}]);
        started(&router, json!({"name": name, "kind": "canary", "steps": steps, "metrics": metrics})).await;
        let row = app.rollouts.rollouts().find(name).await.unwrap();
        serve_many(&app, &row, 0, units, 0, 0).await;
        serve_many(&app, &row, 1, units, lost, 0).await;
        let rollout = measured(&app, name, 5).await;
        assert_eq!(rollout.latest["action"]["kind"], action, "{}", rollout.latest);
        if name == "lossy" {
            assert!(rollout.latest["sample_ratio"]["p_value"].as_f64().unwrap() < 0.001);
            assert_eq!(get(&router, "/v1/rollouts/lossy").await.json()["reason"], "sample_ratio");
            // And it stays so, until a person has found the cause.
            assert_eq!(measured(&app, name, 10).await.latest["action"]["kind"], "hold");
        }
        app.rollouts.act(name, Act::RollBack, "ann").await.ok();
        // Back to the parrot for the next one.
        if name == "whole" {
            let back = json!({"name": "back", "arms": [{"variant": "far"}, {"variant": MODEL}]});
            started(&router, back).await;
            app.rollouts.act("back", Act::Promote { arm: 1 }, "ann").await.unwrap();
        }
    }
}

#[tokio::test]
async fn five_points_fewer_thumbs_are_found_and_rolled_back() {
    let app = app(ServerSpec::new("u", "http://127.0.0.1:1"));
    let router = router(app.clone());
    started(&router, json!({"tuning": 2000})).await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    let (mut turn, mut said) = (0i64, Vec::new());
    let rollout = loop {
        for arm in 0..2u32 {
            for unit in 0..250 {
                let mut answer = support::answered(&app.store, "u", "p", &["text"], -1.0);
                answer.created = row.created + 1 + turn;
                let unit = turn * 250 + unit;
                answer.exposure =
                    Some(Exposure { rollout: row.id, arm, unit: unit * 2 + i64::from(arm), refused: Some(false), place: None });
                // 80 of a hundred are pleased with what there is, 75 with what is new.
                said.push(thumb(&app, &answer, unit % 20 < if arm == 0 { 16 } else { 15 }));
                app.store.record(answer).unwrap();
            }
        }
        app.store.flush().await;
        app.store.add_feedback(std::mem::take(&mut said)).await.unwrap();
        turn += 1;
        let rollout = measured(&app, "r", 2 * turn).await;
        if rollout.ended.is_some() || turn == 24 {
            break rollout;
        }
    };
    assert_eq!(rollout.latest["reason"], "goal feedback.thumb is surely not met", "{}", rollout.latest);
    let exposed = rollout.latest["exposures"][1].as_u64().unwrap();
    assert!((500..=5000).contains(&exposed), "{exposed}");
}

#[tokio::test]
async fn a_source_without_data_pauses_and_goes_on_when_they_come() {
    let declared = Metric { kind: MetricKind::Number, optimize: Optimize::Max, min: None, max: None, closed: false, level: None };
    let setup = setup(ServerSpec::new("u", "http://127.0.0.1:1"), |setup| {
        setup.metrics = [("judge.helpful".to_owned(), declared)].into();
    });
    let app = setup.app();
    let router = router(app.clone());
    for (metric, param) in
        [("feedback.metric.solved", "metrics.0.metric"), ("judge.kind", "metrics.0.metric"), ("kl_to_base", "metrics.0.metric")]
    {
        let metrics = json!([{"metric": metric, "goal": {"min": 0}}]);
        let refused = post(&router, "/v1/rollouts", spec(json!({"metrics": metrics}))).await;
        assert_eq!((refused.status.as_u16(), refused.error().1.as_deref()), (400, Some(param)), "{}", refused.json());
    }
    let metrics = json!([{"metric": "judge.helpful", "guardrail": {"min": 0.2}, "min_samples": 20, "inconclusive_limit": 1}]);
    started(&router, json!({"kind": "canary", "steps": [{"set_weight": 50}], "metrics": metrics})).await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    serve_many(&app, &row, 0, 100, 0, 0).await;
    serve_many(&app, &row, 1, 100, 0, 0).await;
    let actions = [measured(&app, "r", 2).await, measured(&app, "r", 4).await, measured(&app, "r", 6).await];
    let actions = actions.map(|rollout| rollout.latest["action"]["kind"].as_str().unwrap().to_owned());
    assert_eq!(actions, ["hold", "pause", "hold"]);
    assert_eq!(get(&router, "/v1/rollouts/r").await.json()["reason"], "inconclusive");
    // The judge is back.
    for arm in 0..2u32 {
        for unit in 0..30 {
            let mut answer = support::answered(&app.store, "u", "p", &["text"], -1.0);
            answer.created = row.created + 5;
            answer.exposure = Some(Exposure {
                rollout: row.id,
                arm,
                unit: 1_000_000 + unit * 2 + i64::from(arm),
                refused: Some(false),
                place: None,
            });
            let score = 0.5 + 0.01 * unit as f64;
            let mut said = support::judged(&app.store, answer.id, None, Kind::Metric, json!(score));
            (said.metric, said.number) = (Some("judge.helpful".into()), Some(score));
            app.store.record(answer).unwrap();
            app.store.flush().await;
            app.store.add_feedback(vec![said]).await.unwrap();
        }
    }
    assert_eq!(measured(&app, "r", 8).await.latest["action"]["kind"], "resume");
    assert_eq!(measured(&app, "r", 10).await.latest["action"]["kind"], "promote");
}

#[tokio::test]
async fn people_pause_approve_and_promote_and_each_act_is_kept() {
    let app = app(ServerSpec::new("u", "http://127.0.0.1:1"));
    let router = router(app.clone());
    let steps = json!([{"set_weight": 10}, {"approval": true}, {"set_weight": 50}, {"pause": "1h"}]);
    let metrics = json!([{"metric": "error_rate", "guardrail": {"max": 0.1}, "min_samples": 10}]);
    started(&router, json!({"kind": "canary", "steps": steps, "metrics": metrics})).await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    serve_many(&app, &row, 0, 100, 0, 0).await;
    serve_many(&app, &row, 1, 100, 0, 0).await;
    assert_eq!(measured(&app, "r", 2).await.latest["action"]["kind"], "await_approval");
    assert_eq!(get(&router, "/v1/rollouts?over=false").await.json()["data"][0]["status"], "awaiting_approval");
    let act = async |act: &str, body: Value| post(&router, &format!("/v1/rollouts/r/{act}"), body).await;
    assert_eq!(act("approve", json!({})).await.status, 200);
    assert_eq!(act("approve", json!({})).await.error().2.as_deref(), Some("rollout_state"));
    assert_eq!(measured(&app, "r", 4).await.latest["action"]["kind"], "step");
    assert_eq!(act("pause", json!({})).await.json()["reason"], "person");
    assert_eq!(act("pause", json!({"why": "x"})).await.error().1.as_deref(), Some("why"));
    assert_eq!(measured(&app, "r", 6).await.latest["action"]["kind"], "hold");
    assert_eq!(act("resume", json!({})).await.json()["status"], "running");
    assert_eq!(act("promote", json!({"variant": MODEL})).await.error().1.as_deref(), Some("variant"));
    let promoted = act("promote", json!({"variant": "far"})).await.json();
    assert_eq!((&promoted["status"], &promoted["arms"][1]["share"]), (&json!("promoted"), &json!(1.0)));
    let shown = get(&router, "/v1/rollouts/r").await.json();
    let by_people: Vec<&str> = shown["decisions"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["by"] == "open server")
        .map(|row| row["action"]["kind"].as_str().unwrap())
        .collect();
    assert_eq!(by_people, ["start", "approve", "pause", "resume", "promote"]);
    assert_eq!(get(&router, "/v1/rollouts/none").await.error().0, 404);
    let plan = post(&router, "/v1/rollout_plan", json!({"baseline": 0.5, "effect": 0.5, "power": 0.9})).await.json();
    assert_eq!(plan["one_look"], 154);
    assert_eq!(
        post(&router, "/v1/rollout_plan", json!({"baseline": 2, "effect": 0.5})).await.error().1.as_deref(),
        Some("baseline")
    );
}

#[tokio::test]
async fn a_rollout_that_cannot_run_is_refused_with_the_field() {
    let app = app(ServerSpec::new("u", "http://127.0.0.1:1"));
    let router = router(app.clone());
    let layer = |from: f64, to: f64| json!({"name": "l", "from": from, "to": to});
    started(&router, json!({"layer": layer(0.0, 0.5)})).await;
    for (bad, status, param) in [
        (json!({}), 409, Some("name")),
        (json!({"name": "s", "layer": layer(0.4, 0.6)}), 409, Some("layer")),
        (json!({"name": "s", "arms": [{"variant": MODEL}, {"variant": "nobody"}]}), 400, Some("arms.1.variant")),
        (
            json!({"name": "s", "arms": [{"variant": MODEL}, {"variant": MODEL, "prompt_prefix": "x"}]}),
            400,
            Some("arms.1.variant"),
        ),
        (
            json!({"name": "s", "arms": [{"variant": MODEL, "prompt_prefix": "x"}, {"variant": "far"}]}),
            400,
            Some("arms.0.variant"),
        ),
        (json!({"name": "s", "kind": "abc"}), 400, Some("kind")),
    ] {
        let reply = post(&router, "/v1/rollouts", spec(bad.clone())).await;
        assert_eq!((reply.status.as_u16(), reply.error().1.as_deref()), (status, param), "{bad}: {}", reply.json());
    }
    started(&router, json!({"name": "s", "layer": layer(0.5, 1.0)})).await;
    assert_eq!(get(&router, "/v1/rollouts").await.json()["data"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn two_who_lead_at_once_decide_once() {
    let app = app(ServerSpec::new("u", "http://127.0.0.1:1"));
    let router = router(app.clone());
    started(&router, json!({})).await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    serve_many(&app, &row, 0, 100, 0, 0).await;
    serve_many(&app, &row, 1, 100, 0, 2).await;
    app.store.flush().await;
    let other = Keeper::new(&app.store, app.registry.clone(), app.adapters.clone(), app.feedback_metrics.clone());
    let at = now() + 2 * SECOND;
    let (one, two) = tokio::join!(app.rollouts.measure_due(at), other.measure_due(at));
    one.and(two).unwrap();
    app.rollouts.follow().await.unwrap();
    other.follow().await.unwrap();
    let rows = app.rollouts.rollouts().decisions(row.id).await.unwrap();
    let actions: Vec<&str> = rows.iter().map(|row| row.action.as_str()).collect();
    assert_eq!(actions, ["start", "roll_back"]);
    assert!(other.tables().of(MODEL).is_none() && app.rollouts.tables().of(MODEL).is_none());
}
