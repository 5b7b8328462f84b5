//! What a promotion does to an alias, and the way back from it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use crate::support;
use crate::support::{Reply, Setup, ask, post};
use crate::tiny;
use axum::Router;
use serde_json::{Value, json};
use std::sync::Arc;
use tempfile::TempDir;
use tidemill::adapters::AdapterKeeper;
use tidemill::clock::now;
use tidemill::http::{App, router};
use tidemill::rollout::decision::Act;
use tidemill::rollout::keeper::Keeper;
use tidemill_store::{DataDir, Rollouts};

/// The adapters `a`, `b` and `c`, which are served, and the alias `champion`, which leads to `a`.
async fn server() -> (TempDir, App, Router) {
    let folder = tempfile::tempdir().unwrap();
    let app = tiny::app(folder.path(), Setup::default());
    let router = router(app.clone());
    for (name, adapter) in [("a", "all"), ("b", "some"), ("c", "patterns")] {
        let body = json!({"name": name, "path": tiny::golden("adapters").join(adapter)});
        assert_eq!(post(&router, "/v1/adapters", body).await.status, 201);
        assert_eq!(ask(&router, "POST", &format!("/v1/adapters/{name}/serve"), None, json!({})).await.status, 200);
    }
    alias(&router, "a").await;
    (folder, app, router)
}

async fn alias(router: &Router, adapter: &str) {
    let body = json!({"alias": "champion", "adapter": adapter});
    assert!(post(router, "/v1/adapter_aliases", body).await.status.is_success());
}

async fn started(router: &Router, name: &str, to: Value) {
    let spec = json!({
        "name": name, "model": "champion", "kind": "ab", "arms": [{"variant": "champion"}, to],
        "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
    });
    let reply = post(router, "/v1/rollouts", spec).await;
    assert_eq!(reply.status, 201, "{}", reply.json());
}

async fn promoted(app: &App, router: &Router, name: &str, to: Value) {
    started(router, name, to).await;
    app.rollouts.act(name, Act::Promote { arm: 1 }, "ann").await.unwrap();
}

async fn undo(router: &Router, name: &str) -> Reply {
    post(router, &format!("/v1/rollouts/{name}/rollback"), json!({})).await
}

/// Whom the registry knows under the alias, and the tokens that a request for it gets.
async fn served(router: &Router, model: &str) -> Value {
    let body = json!({"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 12, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let reply = post(router, "/v1/completions", body).await;
    assert_eq!(reply.status, 200, "{}", reply.json());
    reply.json()["choices"][0]["token_ids"].clone()
}

#[tokio::test]
async fn a_promotion_that_moved_the_alias_is_taken_back_with_it() {
    let (_folder, app, router) = server().await;
    let aliases = || app.adapters.registry().aliases();
    let before = aliases().await.unwrap();
    let [a, b] = [served(&router, "a").await, served(&router, "b").await];
    assert_ne!(a, b);
    promoted(&app, &router, "r", json!({"variant": "b"})).await;
    assert_ne!(aliases().await.unwrap(), before);
    assert_eq!(served(&router, "champion").await, b);
    let reply = undo(&router, "r").await;
    assert_eq!((reply.status.as_u16(), &reply.json()["status"]), (200, &json!("rolled_back")), "{}", reply.json());
    assert_eq!(served(&router, "champion").await, a, "the next request is on what was there before");
    // With its time, by which it is told whether it or an older promotion has the last word.
    assert_eq!(aliases().await.unwrap(), before);
    let led: Vec<Value> = support::get(&router, "/v1/audit?what=adapter.alias&on=champion&order=asc").await.json()["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|act| act["actor"].clone())
        .collect();
    assert_eq!(led, [json!("open server"), json!("rollouts"), json!("open server")], "who took it back led it back");
}

#[tokio::test]
async fn an_older_promotion_of_another_kind_is_served_again() {
    let (_folder, app, router) = server().await;
    let loud = json!({"variant": "loud", "model": "a", "defaults": {"max_tokens": 3}});
    promoted(&app, &router, "first", loud).await;
    assert_eq!(app.rollouts.stable("champion").name, "loud");
    promoted(&app, &router, "second", json!({"variant": "b"})).await;
    assert_eq!(app.rollouts.stable("champion").name, "champion");
    assert_eq!(undo(&router, "first").await.error().2.as_deref(), Some("rollout_superseded"));
    // One that runs has what was promoted as its control.
    started(&router, "third", json!({"variant": "c"})).await;
    let refused = undo(&router, "second").await;
    assert!(refused.status == 409 && refused.json().to_string().contains("`third` runs on"), "{}", refused.json());
    assert_eq!(undo(&router, "third").await.status, 200);
    assert_eq!(undo(&router, "second").await.status, 200);
    assert_eq!(app.rollouts.stable("champion").name, "loud");
    assert_eq!(undo(&router, "first").await.status, 200);
    assert_eq!(served(&router, "champion").await, served(&router, "a").await);
}

/// What a running rollout says when it is measured so many minutes from now.
async fn said(app: &App, name: &str, minutes: i64) -> String {
    app.rollouts.measure_due(now() + minutes * 60_000_000).await.unwrap();
    let row = app.rollouts.rollouts().find(name).await.unwrap();
    row.latest["reason"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn beside_another_promotion_or_a_moved_alias_a_rollout_waits_until_its_control_is_served_again() {
    let (_folder, app, router) = server().await;
    started(&router, "beside", json!({"variant": "c"})).await;
    let waits = "is not the control any more";
    assert!(!said(&app, "beside", 1).await.contains(waits));
    promoted(&app, &router, "r", json!({"variant": "loud", "model": "b", "defaults": {"max_tokens": 3}})).await;
    assert!(said(&app, "beside", 2).await.contains(waits));
    assert_eq!(undo(&router, "r").await.status, 200);
    assert!(!said(&app, "beside", 3).await.contains(waits));
    alias(&router, "b").await;
    assert!(said(&app, "beside", 4).await.contains(waits));
}

#[tokio::test]
async fn what_was_moved_since_or_is_gone_is_not_overwritten() {
    let (_folder, app, router) = server().await;
    promoted(&app, &router, "r", json!({"variant": "b"})).await;
    alias(&router, "c").await;
    let refused = undo(&router, "r").await;
    assert_eq!(refused.error().2.as_deref(), Some("rollout_superseded"));
    assert!(refused.json().to_string().contains("somebody has led the alias"), "{}", refused.json());
    assert_eq!(served(&router, "champion").await, served(&router, "c").await);
    // Back at what was promoted, nothing newer stands there; but what was there before is not served any more.
    alias(&router, "b").await;
    assert_eq!(ask(&router, "POST", "/v1/adapters/a/retire", None, json!({})).await.status, 200);
    let refused = undo(&router, "r").await;
    assert_eq!(refused.error().2.as_deref(), Some("rollout_superseded"));
    assert!(refused.json().to_string().contains("cannot be led back"), "{}", refused.json());
    assert_eq!(served(&router, "champion").await, served(&router, "b").await);
    assert_eq!(ask(&router, "POST", "/v1/adapters/a/serve", None, json!({})).await.status, 200);
    assert_eq!(undo(&router, "r").await.status, 200);
    assert_eq!(served(&router, "champion").await, served(&router, "a").await);
}

#[tokio::test]
async fn a_promotion_whose_server_was_killed_before_it_led_the_alias_is_finished_by_the_next_one() {
    let (folder, app, router) = server().await;
    let registry = app.adapters.registry();
    let before = registry.aliases().await.unwrap();
    promoted(&app, &router, "r", json!({"variant": "b"})).await;
    let after = registry.aliases().await.unwrap();
    // As a kill between the row and the alias leaves it.
    registry.alias_back("champion", before[0].adapter, before[0].updated).await.unwrap();
    assert_eq!(registry.aliases().await.unwrap(), before);
    let successor = || {
        let adapters = AdapterKeeper::new(&app.store, &DataDir::new(folder.path()), Arc::clone(&app.registry));
        Keeper::new(&app.store, Arc::clone(&app.registry), adapters, Arc::default())
    };
    // The name serves what was promoted all the same, and who has just begun to lead leaves time to whoever is about to lead it.
    let next = successor();
    let at = now();
    for after in [0, 9] {
        next.finish_promotions(at + after * 1_000_000).await.unwrap();
        assert_eq!(registry.aliases().await.unwrap(), before);
    }
    next.follow().await.unwrap();
    assert_eq!(next.stable("champion").name, "b");
    // Who begins on what was promoted is not disturbed.
    app.rollouts.follow().await.unwrap();
    started(&router, "later", json!({"variant": "c"})).await;
    let [later] = &Rollouts::new(&app.store).running().await.unwrap()[..] else { panic!("one runs") };
    next.finish_promotions(at + 10_000_000).await.unwrap();
    let led = registry.aliases().await.unwrap();
    assert_eq!((led[0].adapter, led.len()), (after[0].adapter, 1));
    assert!(!Rollouts::new(&app.store).is_displaced(later).await.unwrap());
    app.adapters.follow().await.unwrap();
    assert_eq!(undo(&router, "later").await.status, 200);
    assert_eq!(served(&router, "champion").await, served(&router, "b").await);
    // Once; and an alias that somebody leads elsewhere afterwards stays there.
    next.finish_promotions(at + 20_000_000).await.unwrap();
    assert_eq!(registry.aliases().await.unwrap(), led);
    alias(&router, "a").await;
    let elsewhere = registry.aliases().await.unwrap();
    for keeper in [next, successor()] {
        for after in [30, 60] {
            keeper.finish_promotions(at + after * 1_000_000).await.unwrap();
        }
    }
    assert_eq!(registry.aliases().await.unwrap(), elsewhere);
}
