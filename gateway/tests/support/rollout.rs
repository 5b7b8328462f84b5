//! A rollout of another server's model on the parrot's name.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking; the lint knows test functions only")]

use crate::support::{self, MODEL, Reply, Setup, merged, post};
use axum::Router;
use serde_json::{Value, json};
use std::time::Duration;
use tidemill::clock::now;
use tidemill::http::App;
use tidemill::upstream::remote::breaker::BreakerRule;
use tidemill::upstream::remote::{RemoteSpec, Remotes, ServerSpec};
use tidemill_store::records::{Feedback, Inference, Kind};
use tidemill_store::{Rollout, Store};

pub const CHAT: &str = "/v1/chat/completions";
pub const SECOND: i64 = 1_000_000;

/// The parrot, and beside it the model `far`, which another server answers.
pub fn app(server: ServerSpec) -> App {
    setup(server, |_| {}).app()
}

pub fn setup(server: ServerSpec, change: impl FnOnce(&mut Setup)) -> Setup {
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
pub fn spec(more: Value) -> Value {
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

pub async fn started(router: &Router, more: Value) -> Value {
    let reply = post(router, "/v1/rollouts", spec(more)).await;
    assert_eq!(reply.status, 201, "{}", reply.json());
    reply.json()
}

pub fn question(user: &str) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "user": user})
}

pub async fn answered(router: &Router, user: &str) -> Reply {
    post(router, CHAT, question(user)).await
}

pub fn variant(reply: &Reply) -> &str {
    reply.headers["x-tidemill-variant"].to_str().unwrap()
}

pub async fn recorded(store: &Store, reply: &Reply) -> Inference {
    let id = reply.json()["id"].as_str().unwrap().rsplit_once("cmpl-").unwrap().1.to_owned();
    store.flush().await;
    store.inference(id.parse().unwrap()).await.unwrap().expect("not recorded")
}

/// What the leader does when the rollout's interval is over.
pub async fn measured(app: &App, name: &str, after_s: i64) -> Rollout {
    app.store.flush().await;
    app.rollouts.measure_due(now() + after_s * SECOND).await.unwrap();
    app.rollouts.rollouts().find(name).await.unwrap()
}

/// A thumb.
pub fn thumb(app: &App, target: &Inference, up: bool) -> Feedback {
    support::judged(&app.store, target.id, Some("someone"), Kind::Thumb, json!(up))
}
