//! The parts of the operators' pages through the real router: who gets them, and that no name in them becomes markup.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use crate::support::{MODEL, Setup, TwoKeys, answered, ask, get};
use axum::Router;
use hyper::StatusCode;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tidemill::clock::now;
use tidemill::http::{App, Auth, router};
use tidemill::rollout::decision::{Measure, Measured, measure, start};
use tidemill::rollout::spec::Spec;
use tidemill_store::records::{Inference, Status};
use tidemill_store::{Adapters, RegisteredAdapter, Rollout, RolloutDecision, Rollouts, Scope};
use uuid::Uuid;

const EVIL: &str = "<script>alert('x')</script>\"><img src=x>";
const PARTS: [&str; 7] = ["overview", "rollouts", "loops", "datasets", "trainings", "adapters", "playground"];

fn part(name: &str) -> String {
    format!("/v1/console/parts/{name}")
}

/// A part's text, which must be a document.
async fn shown(router: &Router, name: &str) -> String {
    let reply = get(router, &part(name)).await;
    let text = String::from_utf8(reply.body).unwrap();
    assert_eq!(reply.status, StatusCode::OK, "{name}: {text}");
    assert_eq!(reply.headers["content-type"], "text/html; charset=utf-8");
    assert!(text.starts_with("<!doctype html>") && text.ends_with("</html>\n"), "{text}");
    text
}

#[tokio::test]
async fn parts_are_for_administrators_and_the_shell_is_for_everybody() {
    let keys = TwoKeys::new().await;
    for name in PARTS.into_iter().map(part).chain(["/v1/console/me".to_owned()]) {
        assert_eq!(ask(&keys.router, "GET", &name, None, Value::Null).await.error().0, 401, "{name}");
        assert_eq!(keys.ask_mine("GET", &name, Value::Null).await.error().0, 403, "{name}");
        let reply = keys.ask_other("GET", &name, Value::Null).await;
        assert_eq!(reply.status, StatusCode::OK, "{name}");
        if name != "/v1/console/me" {
            let policy = reply.headers["content-security-policy"].to_str().unwrap();
            assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
            assert_eq!(reply.headers["cache-control"], "no-store");
        }
    }
    let me = keys.ask_other("GET", "/v1/console/me", Value::Null).await.json();
    assert_eq!(me, json!({"annotator": "other", "keyed": true, "operator": true}));
    for page in ["/console", "/console/rollouts", "/console/rollouts/any", "/console/adapters/x", "/console/playground"] {
        let reply = get(&keys.router, page).await;
        assert_eq!(reply.status, StatusCode::OK, "{page}");
        assert!(String::from_utf8(reply.body).unwrap().contains("/console/console.js"), "{page}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_said_in_the_error_shape() {
    let router = Setup::default().router();
    for name in ["rollouts/none", "loops/none", "datasets/none", "trainings/none", "trainings/ftjob-x", "adapters/none"] {
        assert_eq!(get(&router, &part(name)).await.error().0, 404, "{name}");
    }
    let error = get(&router, &part("overview?hours=2")).await.error();
    assert_eq!((error.0, error.1.as_deref()), (400, Some("hours")));
    let me = get(&router, "/v1/console/me").await.json();
    assert_eq!(me, json!({"annotator": null, "keyed": false, "operator": true}));
}

/// A rollout after one measurement, as its keeper writes it; `ended` is when it did.
async fn roll_out(app: &App, ended: Option<i64>) -> Uuid {
    let spec = json!({
        "name": "brief", "model": EVIL, "kind": "ab", "arms": [{"variant": MODEL}, {"variant": EVIL}],
        "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
    });
    let spec = Spec::parse(&spec).unwrap();
    let (state, began) = start(&spec, EVIL, 1);
    let share = |successes: u64| Some(Measure::Share { successes, trials: 400 });
    let metrics = BTreeMap::from([("goal feedback.thumb".to_owned(), vec![share(200), share(210)])]);
    let measured = Measured { exposures: vec![400, 401], ended: vec![400, 401], metrics, displaced: false };
    let (state, latest) = measure(&spec, &state, &measured, 2, &mut || 0.5);
    let rollout = Rollout {
        id: app.store.issue_id(),
        created: 1,
        updated: 2,
        ended,
        name: EVIL.into(),
        model: EVIL.into(),
        spec: json!(spec),
        state: json!(state),
        version: 1,
        latest: json!(latest),
    };
    let first = RolloutDecision { version: 0, at: 1, action: "start".into(), actor: Some(EVIL.into()), body: json!(began) };
    Rollouts::new(&app.store).insert(&rollout, &first, EVIL).await.unwrap();
    rollout.id
}

#[tokio::test]
async fn who_only_looks_sees_the_pages_without_their_buttons() {
    let mut app = Setup::default().app();
    let rollout = roll_out(&app, None).await;
    let (_, look) = app.store.create_key("eyes", &[Scope::Look]).await.unwrap();
    app.auth = Auth::new(app.store.clone(), true);
    let router = router(app);
    for name in PARTS.into_iter().chain([format!("rollouts/{rollout}").as_str()]) {
        let reply = ask(&router, "GET", &part(name), Some(&look), Value::Null).await;
        let text = String::from_utf8(reply.body).unwrap();
        assert_eq!(reply.status, StatusCode::OK, "{name}: {text}");
        assert!(!text.contains("data-post") && !text.contains("<form"), "{name}: {text}");
    }
    let me = ask(&router, "GET", "/v1/console/me", Some(&look), Value::Null).await.json();
    assert_eq!(me, json!({"annotator": "eyes", "keyed": true, "operator": false}));
}

#[tokio::test]
async fn who_trains_is_led_to_the_queues_as_on_their_own_page() {
    let mut app = Setup::default().app();
    let (_, both) = app.store.create_key("trainer", &[Scope::Look, Scope::Train]).await.unwrap();
    app.auth = Auth::new(app.store.clone(), true);
    let router = router(app);
    for me in ["/v1/console/me", "/v1/labeling/me"] {
        assert_eq!(ask(&router, "GET", me, Some(&both), Value::Null).await.json()["operator"], true, "{me}");
    }
    let page = get(&router, "/console/queues").await;
    assert!(String::from_utf8(page.body).unwrap().contains("/console/console.js"));
}

#[tokio::test]
async fn a_rollout_that_runs_comes_before_whatever_has_ended_since() {
    let app = Setup::default().app();
    let running = roll_out(&app, None).await;
    for _ in 0..101 {
        roll_out(&app, Some(3)).await;
    }
    let text = shown(&router(app), "rollouts").await;
    let first = text.split("/console/rollouts/").nth(1).unwrap();
    assert!(first.starts_with(&running.to_string()) && text.contains("Older ones"), "{first}");
}

#[tokio::test]
async fn hostile_names_stay_text_on_every_page() {
    let app = Setup::default().app();
    let record = Inference {
        model: EVIL.into(),
        variant: Some(EVIL.into()),
        created: now() - 1_000_000,
        status: Status::Failed,
        ..answered(&app.store, EVIL, EVIL, &["x"], -1.0)
    };
    app.store.record(record).unwrap();
    app.store.flush().await;
    let rollout = roll_out(&app, None).await;
    let adapter = RegisteredAdapter {
        id: app.store.issue_id(),
        name: "brief".into(),
        base: EVIL.into(),
        lineage: json!({"dataset": EVIL, "raters": [EVIL], "config": {(EVIL): EVIL}}),
        metrics: json!({(EVIL): EVIL}),
        ..RegisteredAdapter::default()
    };
    let adapter = Adapters::new(&app.store).insert(&adapter, "ann").await.unwrap();

    let router = router(app);
    let (of_rollout, of_adapter) = (format!("rollouts/{rollout}"), format!("adapters/{}", adapter.id));
    for name in PARTS.into_iter().chain([of_rollout.as_str(), of_adapter.as_str()]) {
        let text = shown(&router, name).await;
        assert!(!text.contains("<script") && !text.contains("<img"), "{name}: {text}");
        let empty = ["loops", "datasets", "trainings", "playground"].contains(&name);
        assert!(empty || text.contains("&lt;script&gt;"), "{name}: {text}");
    }
    let overview = shown(&router, "overview?hours=1").await;
    assert!(overview.contains("<td>100 %</td>") && overview.contains("<svg"), "{overview}");
    let page = shown(&router, &of_rollout).await;
    assert!(page.contains("the goals are not decided yet") && page.contains("<svg") && page.contains("data-post"), "{page}");
}
