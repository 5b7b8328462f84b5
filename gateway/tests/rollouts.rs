//! Rollouts at work: who answers a request, and what it counts for.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::far;
use crate::far::{Conn, Far};
use crate::rollout::{CHAT, answered, app, measured, question, recorded, setup, spec, started, thumb, variant};
use crate::support::{MODEL, ask, get, merged, post, send};
use hyper::Request;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tidemill::http::router;
use tidemill::recording::{Level, Recording};
use tidemill::rollout::decision::Act;
use tidemill::rollout::keeper::Keeper;
use tidemill_store::Scope;

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
    // What a request refers to and is not there is no fault of who was to answer it.
    for id in 0..30 {
        let input = json!([{"type": "item_reference", "id": "msg_none"}, {"role": "user", "content": "hello"}]);
        let gone = json!({"model": MODEL, "input": input, "user": format!("user-{id}")});
        assert_eq!(post(&router, "/v1/responses", gone).await.error().0, 404);
    }
    store.flush().await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    let counts = tidemill_store::Exposures::new(store.database()).counts(row.id, 0).await.unwrap();
    assert!(counts.is_empty(), "{counts:?}");
}

#[tokio::test]
async fn who_gives_up_on_a_slow_variant_was_exposed_to_it() {
    let far = Far::new(|_, conn: Conn| conn.closed()).await;
    let slow = setup(far.spec("u"), |setup| setup.remotes.models[0].timeout = Duration::from_secs(60));
    let app = slow.app();
    let router = router(app.clone());
    started(&router, json!({})).await;
    let mut given_up = 0;
    for id in 0..8 {
        let request = Request::post(CHAT).header("x-request-timeout-ms", "200");
        let body = question(&format!("user-{id}")).to_string();
        given_up += u64::from(send(&router, request.body(body.into()).unwrap()).await.status == 504);
    }
    app.store.flush().await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    let counts = tidemill_store::Exposures::new(app.store.database()).counts(row.id, 0).await.unwrap();
    // Of the variant they say nothing, but how long they waited.
    assert!(given_up > 0 && counts[1].units == given_up && counts[1].answers == 0, "{given_up} {counts:?}");
    assert_eq!(counts[0].units, 8 - given_up);
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
    // What comes next has what was promoted as its control, which may be called as the model.
    let wrong =
        post(&router, "/v1/rollouts", spec(json!({"name": "s", "arms": [{"variant": "else"}, {"variant": "far"}]}))).await;
    assert_eq!((wrong.error().1.as_deref(), wrong.status.as_u16()), (Some("arms.0.variant"), 400));
    let back = json!({"name": "back", "arms": [{"variant": "far"}, {"variant": MODEL}]});
    assert_eq!(started(&router, back).await["arms"][0]["variant"], "far");
    // A promotion that another one stands on cannot be taken back; one after the other they can.
    let undo = async |name: &str| post(&router, &format!("/v1/rollouts/{name}/rollback"), json!({})).await;
    app.rollouts.act("back", Act::Promote { arm: 1 }, "ann").await.unwrap();
    assert_eq!(variant(&answered(&router, "ann").await), MODEL);
    let built = undo("r").await;
    assert_eq!((built.status.as_u16(), built.error().2.as_deref()), (409, Some("rollout_superseded")), "{}", built.json());
    assert!(built.json().to_string().contains("`back` was promoted on"), "{}", built.json());
    for (name, serves) in [("back", Some("far")), ("r", None)] {
        let taken = undo(name).await;
        assert_eq!((taken.status.as_u16(), &taken.json()["status"]), (200, &json!("rolled_back")), "{}", taken.json());
        let reply = answered(&router, "ann").await;
        assert_eq!(reply.headers.get("x-tidemill-variant").map(|name| name.to_str().unwrap()), serves);
        assert_eq!(undo(name).await.error().2.as_deref(), Some("rollout_over"));
    }
    again.follow().await.unwrap();
    assert_eq!(again.stable(MODEL).name, MODEL);
    let shown = get(&router, "/v1/rollouts/r").await.json();
    assert_eq!(shown["latest"]["reason"], "a person took the promotion back");
    let audit = get(&router, "/v1/audit").await.json().to_string();
    assert_eq!(audit.matches("rollout.roll_back").count(), 2, "{audit}");
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
