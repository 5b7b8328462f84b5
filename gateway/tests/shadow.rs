//! Rollouts whose treatment nobody sees, and those whose answers one person gets both of.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::far::{Conn, Far};
use crate::support::{MODEL, Setup, merged, post};
use axum::Router;
use serde_json::{Value, json};
use std::time::Duration;
use tidemill::http::{App, router};
use tidemill::upstream::remote::breaker::BreakerRule;
use tidemill::upstream::remote::{RemoteSpec, Remotes, ServerSpec};
use tidemill_store::records::{Inference, Status};
use tidemill_store::{Comparisons, InferenceFilter};
use uuid::Uuid;

const CHAT: &str = "/v1/chat/completions";

/// The parrot, and beside it the model `far`, which another server answers.
fn app(server: ServerSpec) -> App {
    let breaker = BreakerRule { failures: 1_000_000, ..BreakerRule::default() };
    let model = RemoteSpec { retries: 0, ..RemoteSpec::new("far", vec![server.name.clone()]) };
    let remotes = Remotes { servers: vec![ServerSpec { breaker, ..server }], models: vec![model] };
    Setup { remotes, ..Setup::default() }.app()
}

async fn started(router: &Router, more: Value) -> Uuid {
    let base = json!({"name": "r", "model": MODEL, "arms": [{"variant": MODEL}, {"variant": "far"}]});
    let reply = post(router, "/v1/rollouts", merged(base, more)).await;
    assert_eq!(reply.status, 201, "{}", reply.json());
    reply.json()["id"].as_str().unwrap().parse().unwrap()
}

fn shadow() -> Value {
    json!({"kind": "shadow", "metrics": [{"metric": "error_rate", "guardrail": {"max": 0.1}}]})
}

fn interleaved() -> Value {
    json!({"kind": "interleaved", "metrics": [{"metric": "comparison", "goal": {"min": 0.5}}]})
}

fn question(user: &str, more: Value) -> Value {
    merged(json!({"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "user": user}), more)
}

/// The records of a rollout, when there are so many.
async fn records(app: &App, rollout: Uuid, count: usize) -> Vec<Inference> {
    for _ in 0..1200 {
        app.store.flush().await;
        let all = app.store.list_inferences(&InferenceFilter { limit: Some(1000), ..InferenceFilter::default() }).await.unwrap();
        let counted: Vec<Inference> =
            all.items.into_iter().filter(|row| row.exposure.is_some_and(|exposure| exposure.rollout == rollout)).collect();
        if counted.len() >= count {
            assert_eq!(counted.len(), count);
            return counted;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{count} records of the rollout never came");
}

fn of_arm(rows: &[Inference], arm: u32) -> Vec<&Inference> {
    rows.iter().filter(|row| row.exposure.is_some_and(|exposure| exposure.arm == arm)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shadow_answers_a_copy_that_nobody_sees() {
    let far = Far::saying("theirs").await;
    let app = app(far.spec("a"));
    let router = router(app.clone());
    let id = started(&router, shadow()).await;
    for (user, stream) in [("ann", false), ("bob", true)] {
        let reply = post(&router, CHAT, question(user, json!({"stream": stream, "max_tokens": 9}))).await;
        assert_eq!((reply.status.as_u16(), reply.headers["x-tidemill-variant"].to_str().unwrap()), (200, MODEL));
        assert!(!String::from_utf8_lossy(&reply.body).contains("theirs"));
    }
    let rows = records(&app, id, 4).await;
    let (control, treatment) = (of_arm(&rows, 0), of_arm(&rows, 1));
    assert_eq!((control.len(), treatment.len()), (2, 2));
    assert!(rows.iter().all(|row| row.status == Status::Ok), "{rows:?}");
    assert!(treatment.iter().all(|row| row.choices[0].output_text.as_deref() == Some("theirs") && row.model == "far"));
    let units = |rows: &[&Inference]| {
        let mut units: Vec<i64> = rows.iter().map(|row| row.exposure.unwrap().unit).collect();
        units.sort_unstable();
        units
    };
    assert_eq!(units(&control), units(&treatment));
    // The copy asks what was asked, and for nothing of its way to the person.
    for seen in far.seen() {
        assert_eq!((&seen.body["max_tokens"], seen.body.get("stream").is_some_and(|stream| *stream == true)), (&json!(9), false));
    }
    // What asks for several answers is not copied, and counts nowhere.
    assert_eq!(post(&router, CHAT, question("cleo", json!({"n": 2}))).await.status, 200);
    assert_eq!((records(&app, id, 4).await.len(), far.count()), (4, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shadow_that_fails_or_stalls_is_not_felt_and_there_are_only_a_few_copies() {
    let broken = Far::failing(500, "", json!({"message": "broken"})).await;
    let app_of = app(broken.spec("a"));
    let router_of = router(app_of.clone());
    let id = started(&router_of, shadow()).await;
    assert_eq!(post(&router_of, CHAT, question("ann", json!({}))).await.status, 200);
    let rows = records(&app_of, id, 2).await;
    assert_eq!((of_arm(&rows, 0)[0].status, of_arm(&rows, 1)[0].status), (Status::Ok, Status::Failed));

    // One that never says anything holds its place; with all places taken, people are answered as if there were no shadow.
    let stalling = Far::new(|_, conn| conn.closed()).await;
    let app = app(stalling.spec("a"));
    let router = router(app.clone());
    let id = started(&router, shadow()).await;
    for user in 0..9 {
        let asked = post(&router, CHAT, question(&format!("u{user}"), json!({})));
        let reply = tokio::time::timeout(Duration::from_secs(30), asked).await.expect("nobody waits for a shadow");
        assert_eq!(reply.status, 200);
    }
    let rows = records(&app, id, 4).await;
    assert_eq!((of_arm(&rows, 0).len(), of_arm(&rows, 1).len()), (4, 0));
    assert!(stalling.count() <= 4);
    // The server leaves: copies are called off, which counts as an exposure and as nothing else.
    app.drain.start();
    let rows = records(&app, id, 8).await;
    assert!(of_arm(&rows, 1).iter().all(|row| row.status == Status::Cancelled), "{rows:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shadow_takes_no_place_and_no_trust_from_those_who_ask_the_same_server() {
    let far = Far::new(|number, conn: Conn| async move {
        match number {
            // The copies.
            0..2 => conn.reply(if number == 0 { 500 } else { 429 }, "retry-after: 60\r\n", json!({})).await,
            _ => conn.say("theirs").await,
        }
    })
    .await;
    let model = RemoteSpec { retries: 0, ..RemoteSpec::new("far", vec!["a".into()]) };
    let rule = BreakerRule { failures: 1, ..BreakerRule::default() };
    let setup = |most: usize| {
        let server = ServerSpec { breaker: rule, max_concurrent: Some(most), ..far.spec("a") };
        let remotes = Remotes { servers: vec![server], models: vec![model.clone()] };
        Setup { remotes, ..Setup::default() }.app()
    };
    let app = setup(2);
    let router_of = router(app.clone());
    let id = started(&router_of, shadow()).await;
    for turn in 1..=2 {
        assert_eq!(post(&router_of, CHAT, question("ann", json!({}))).await.status, 200);
        let rows = records(&app, id, 2 * turn).await;
        assert!(of_arm(&rows, 1).iter().all(|row| row.status == Status::Failed), "{rows:?}");
    }
    let reply = post(&router_of, CHAT, question("bob", json!({"model": "far"}))).await;
    assert_eq!((reply.status.as_u16(), far.count()), (200, 3), "{}", reply.json());

    // Where there is one place, it is for people.
    let app = setup(1);
    let router_of = router(app.clone());
    let id = started(&router_of, shadow()).await;
    assert_eq!(post(&router_of, CHAT, question("ann", json!({}))).await.status, 200);
    let rows = records(&app, id, 2).await;
    assert_eq!((of_arm(&rows, 1)[0].status, far.count()), (Status::Cancelled, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_control_gives_no_answer_both_sides_are_exposed() {
    let far = Far::failing(500, "", json!({"message": "broken"})).await;
    let app = app(far.spec("a"));
    let router = router(app.clone());
    let arms = json!([{"variant": "far"}, {"variant": MODEL}]);
    let id = started(&router, merged(shadow(), json!({"model": "far", "arms": arms}))).await;
    assert_eq!(post(&router, CHAT, question("ann", json!({"model": "far"}))).await.status, 502);
    let rows = records(&app, id, 2).await;
    assert_eq!((of_arm(&rows, 0)[0].status, of_arm(&rows, 1)[0].status), (Status::Failed, Status::Cancelled));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shadow_of_ones_own_engine_runs_when_it_has_nothing_else_to_do() {
    let far = Far::saying("unused").await;
    let app = app(far.spec("a"));
    let router = router(app.clone());
    let arms = json!([{"variant": MODEL}, {"variant": "pirate", "model": MODEL, "prompt_prefix": "Arr."}]);
    let id = started(&router, merged(shadow(), json!({"arms": arms}))).await;
    assert_eq!(post(&router, CHAT, question("ann", json!({}))).await.status, 200);
    let rows = records(&app, id, 2).await;
    let treatment = of_arm(&rows, 1)[0];
    assert_eq!((treatment.status, treatment.variant.as_deref()), (Status::Ok, Some("pirate")));
    assert!(treatment.prompt_text.as_deref().unwrap().contains("Arr.") && far.count() == 0);
    // Nobody's limits were touched: there is no key, and nothing else was counted either.
    assert!(!app.rollouts.mirrors().are_in_the_way(&app.registry));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_person_gets_both_answers_in_an_order_of_their_own_and_names_the_better() {
    let far = Far::saying("theirs").await;
    let app = app(far.spec("a"));
    let router = router(app.clone());
    let id = started(&router, interleaved()).await;
    let mut firsts = Vec::new();
    for user in 0..12 {
        let name = format!("user-{user}");
        let reply = post(&router, CHAT, question(&name, json!({}))).await;
        let variants = reply.headers["x-tidemill-variant"].to_str().unwrap().to_owned();
        let answer = reply.json();
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!((choices.len(), &choices[1]["index"], &answer["model"]), (2, &json!(1), &json!(MODEL)));
        let texts: Vec<&str> = choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap()).collect();
        let far_first = texts[0] == "theirs";
        assert_eq!(texts.iter().filter(|text| **text == "theirs").count(), 1);
        assert_eq!(variants, if far_first { format!("far, {MODEL}") } else { format!("{MODEL}, far") });
        assert_eq!(
            (&choices[0]["tidemill"]["id"], answer["usage"]["completion_tokens"].as_u64().unwrap() > 200),
            (&answer["id"], true)
        );
        // The same person, the same order.
        let again = post(&router, CHAT, question(&name, json!({}))).await.json();
        assert_eq!(again["choices"][0]["message"]["content"] == "theirs", far_first);
        let ids: Vec<&Value> = choices.iter().map(|choice| &choice["tidemill"]["id"]).collect();
        let winner = ids[usize::from(!far_first)];
        let said = json!({"kind": "comparison", "value": {"candidates": ids, "winner": winner}, "author": name});
        assert_eq!(post(&router, "/v1/feedback", said).await.status, 201);
        firsts.push(far_first);
    }
    assert!(firsts.contains(&true) && firsts.contains(&false), "{firsts:?}");
    let rows = records(&app, id, 48).await;
    for row in &rows {
        let exposure = row.exposure.unwrap();
        assert_eq!((row.choices.len(), row.model == "far"), (1, exposure.arm == 1));
        assert!(exposure.place.is_some());
    }
    let said = Comparisons::new(app.store.database()).of(id, 0).await.unwrap();
    let (first, second) = tidemill::rollout::contest::verdicts(&said);
    let shown_first = firsts.iter().filter(|first| **first).count() as u64;
    assert_eq!((first.won, second.won), (shown_first, 12 - shown_first));
    assert_eq!((first.lost + second.lost, first.tied + second.tied), (0, 0));

    // Streamed, as one stream; and where several answers are asked for, the control gives them and nothing counts.
    let chunks = post(&router, CHAT, question("user-0", json!({"stream": true}))).await.chunks();
    let text_of = |index: u64| -> String {
        let of = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        chunks.iter().filter(of).filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
    };
    let mut texts = [text_of(0), text_of(1)];
    texts.sort();
    assert_eq!(texts, ["Hi 🌊!", "theirs"]);
    let three = post(&router, CHAT, question("user-0", json!({"n": 3}))).await.json();
    assert_eq!(three["choices"].as_array().unwrap().len(), 3);
    assert_eq!(records(&app, id, 50).await.len(), 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_one_arm_gives_no_answer_the_other_ones_is_given_alone() {
    let broken = Far::failing(500, "", json!({"message": "broken"})).await;
    let app = app(broken.spec("a"));
    let router = router(app.clone());
    let id = started(&router, interleaved()).await;
    for user in 0..4 {
        let reply = post(&router, CHAT, question(&format!("user-{user}"), json!({}))).await;
        assert_eq!((reply.status.as_u16(), reply.headers["x-tidemill-variant"].to_str().unwrap()), (200, MODEL));
        assert_eq!(reply.json()["choices"].as_array().unwrap().len(), 1);
    }
    let rows = records(&app, id, 8).await;
    assert!(of_arm(&rows, 1).iter().all(|row| row.status == Status::Failed) && of_arm(&rows, 0).len() == 4);
}
