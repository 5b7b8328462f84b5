//! Rollouts at work: from measurements to what is decided. Time is an argument, so that a rollout of days takes no time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::rollout::{SECOND, app, measured, setup, spec, started, thumb};
use crate::support;
use crate::support::{MODEL, get, post};
use serde_json::{Value, json};
use tidemill::clock::now;
use tidemill::feedback::{Metric, MetricKind, Optimize};
use tidemill::http::{App, router};
use tidemill::rollout::decision::Act;
use tidemill::rollout::keeper::Keeper;
use tidemill::upstream::remote::ServerSpec;
use tidemill_store::Rollout;
use tidemill_store::records::{Exposure, Kind, Status};

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
        // Back to the parrot for the next one.
        app.rollouts.act(name, Act::RollBack, "ann").await.unwrap();
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
async fn a_guardrail_does_not_wait_for_a_clock_that_was_ahead() {
    let app = app(ServerSpec::new("u", "http://127.0.0.1:1"));
    let router = router(app.clone());
    started(&router, json!({})).await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    serve_many(&app, &row, 0, 100, 0, 0).await;
    serve_many(&app, &row, 1, 100, 0, 2).await;
    // The server that wrote last was an hour ahead of the one that leads now.
    let rollout = measured(&app, "r", -3600).await;
    assert_eq!(rollout.latest["action"]["kind"], "roll_back", "{}", rollout.latest);
}

#[tokio::test]
async fn one_user_who_asks_more_than_all_others_decides_nothing_between_the_arms() {
    let app = app(ServerSpec::new("u", "http://127.0.0.1:1"));
    let router = router(app.clone());
    let metrics = json!([{"metric": "truncation_rate", "guardrail": {"of": "difference", "max": 0.1}, "min_samples": 30}]);
    started(&router, json!({"kind": "canary", "steps": [{"set_weight": 50}, {"pause": "1h"}], "metrics": metrics})).await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    let answered = async |arm: u32, unit: i64, finish: &str| {
        let mut answer = support::answered(&app.store, "u", "p", &["text"], -1.0);
        answer.created = row.created + 1;
        answer.choices[0].finish_reason = Some(finish.into());
        answer.exposure = Some(Exposure { rollout: row.id, arm, unit, refused: Some(false), place: None });
        app.store.record(answer).unwrap();
    };
    for unit in 0..60 {
        answered(0, 2 * unit, "stop").await;
        answered(1, 2 * unit + 1, "stop").await;
    }
    app.store.flush().await;
    // Somebody's program asks for one token each time, and fell into the treatment.
    for _ in 0..300 {
        answered(1, 1, "length").await;
    }
    let rollout = measured(&app, "r", 5).await;
    let judged = &rollout.latest["judgements"][0];
    assert_eq!((&judged["verdict"], &judged["samples"]), (&json!("pass"), &json!(60)), "{}", rollout.latest);
    // The same of everybody is another matter.
    for unit in 0..60 {
        for _ in 0..9 {
            answered(1, 2 * unit + 1, "length").await;
        }
        app.store.flush().await;
    }
    let rollout = measured(&app, "r", 10).await;
    assert_eq!(rollout.latest["reason"], "the guardrail truncation_rate is broken", "{}", rollout.latest);
}

#[tokio::test]
async fn a_quantile_beside_the_controls_does_not_fail_by_the_slowest_of_a_few() {
    let app = app(ServerSpec::new("u", "http://127.0.0.1:1"));
    let router = router(app.clone());
    let metrics = json!([{"metric": "time_to_first_token_p99", "guardrail": {"of": "relative", "max": 0.5}}]);
    started(&router, json!({"kind": "canary", "steps": [{"set_weight": 50}, {"pause": "1h"}], "metrics": metrics})).await;
    let row = app.rollouts.rollouts().find("r").await.unwrap();
    let served = async |from: i64, to: i64, slow: i64| {
        for unit in from..to {
            for arm in 0..2u32 {
                let mut answer = support::answered(&app.store, "u", "p", &["text"], -1.0);
                answer.created = row.created + 1;
                // From 0.1 s to 0.2 s; the treatment's largest is three times the control's.
                let us = 100_000 + unit % 100 * 1000;
                answer.first_token_us = Some(if arm == 1 && unit % slow == 0 { 3 * us + 300_000 } else { us });
                answer.exposure =
                    Some(Exposure { rollout: row.id, arm, unit: 2 * unit + i64::from(arm), refused: Some(false), place: None });
                app.store.record(answer).unwrap();
            }
            if unit % 200 == 0 {
                app.store.flush().await;
            }
        }
    };
    served(0, 60, 59).await;
    let rollout = measured(&app, "r", 5).await;
    let judged = &rollout.latest["judgements"][0];
    assert!(judged["value"].as_f64().unwrap() > 0.5, "{judged}");
    assert_eq!(judged["verdict"], "inconclusive", "{judged}");
    // A tenth of the answers is slow, and of so many that is no chance.
    served(60, 1500, 10).await;
    let rollout = measured(&app, "r", 10).await;
    assert_eq!(rollout.latest["reason"], "the guardrail time_to_first_token_p99 is broken", "{}", rollout.latest);
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
