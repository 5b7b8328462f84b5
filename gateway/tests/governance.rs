//! Who may look, who did what, and where an answer comes from.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test stops at the first surprise")]

use crate::support::{MODEL, Reply, Setup, answered, ask, judged};
use axum::Router;
use serde_json::{Value, json};
use std::time::Duration;
use tidemill::http::{App, Auth, router};
use tidemill_store::records::{Exposure, Inference, Kind};
use tidemill_store::{Adapters, FileDraft, RegisteredAdapter, Rollout, RolloutDecision, Rollouts, Scope, Snapshots};
use uuid::Uuid;

struct Server {
    app: App,
    router: Router,
    boss: String,
    look: String,
}

impl Server {
    async fn new() -> Self {
        let mut app = Setup::default().app();
        let (_, boss) = app.store.create_key("boss", &[Scope::Admin]).await.unwrap();
        let (_, look) = app.store.create_key("auditor", &[Scope::Look]).await.unwrap();
        app.auth = Auth::new(app.store.clone(), true);
        Self { router: router(app.clone()), app, boss, look }
    }

    async fn boss(&self, method: &str, path: &str, body: Value) -> Reply {
        ask(&self.router, method, path, Some(&self.boss), body).await
    }

    async fn look(&self, method: &str, path: &str, body: Value) -> Reply {
        ask(&self.router, method, path, Some(&self.look), body).await
    }

    async fn get(&self, path: &str) -> Value {
        let reply = self.look("GET", path, Value::Null).await;
        assert_eq!(reply.status, 200, "{path}: {}", String::from_utf8_lossy(&reply.body));
        reply.json()
    }

    /// Builds a dataset and waits for the end.
    async fn build(&self, name: &str) {
        let started = self.boss("POST", "/v1/datasets", json!({"name": name, "query": {"since": "2023-01-01"}})).await.json();
        let path = format!("/v1/datasets/builds/{}", started["id"].as_str().unwrap());
        for _ in 0..2400 {
            match self.get(&path).await["status"].as_str().unwrap() {
                "queued" | "running" => tokio::time::sleep(Duration::from_millis(50)).await,
                status => return assert_eq!(status, "succeeded"),
            }
        }
        panic!("the build did not end");
    }
}

#[tokio::test]
async fn who_may_look_sees_what_is_governed_and_acts_on_nothing() {
    let server = Server::new().await;
    for path in [
        "/v1/audit",
        "/v1/adapters",
        "/v1/adapter_aliases",
        "/v1/datasets",
        "/v1/fine_tuning/jobs",
        "/v1/models",
        "/v1/lineage/rater:ann",
    ] {
        assert_eq!(server.look("GET", path, Value::Null).await.status, 200, "{path}");
    }
    for (method, path, scope) in [
        ("POST", "/v1/chat/completions", "chat"),
        ("POST", "/v1/datasets", "train"),
        ("POST", "/v1/datasets/builds/x/cancel", "train"),
        ("POST", "/v1/fine_tuning/jobs", "train"),
        ("POST", "/v1/fine_tuning/jobs/x/cancel", "train"),
        ("DELETE", "/v1/models/x", "train"),
        ("POST", "/v1/adapters", "admin"),
        ("POST", "/v1/adapters/x/serve", "admin"),
        ("DELETE", "/v1/adapter_aliases/x", "admin"),
        ("POST", "/v1/load_lora_adapter", "admin"),
        ("GET", "/v1/admin/keys", "admin"),
        ("POST", "/v1/admin/keys", "admin"),
        ("GET", "/v1/feedback", "feedback"),
        ("GET", "/v1/files", "chat` or `train"),
    ] {
        let reply = server.look(method, path, json!({})).await;
        assert_eq!(reply.error(), (403, None, Some("insufficient_permissions".into())), "{method} {path}");
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(&format!("lacks the scope `{scope}`")), "{method} {path}: {message}");
    }
    // Looking is asked for by its own name; what others may do does not let them see it.
    let (_, train) = server.app.store.create_key("trainer", &[Scope::Train, Scope::Chat]).await.unwrap();
    for path in ["/v1/audit", "/v1/lineage/rater:ann"] {
        let reply = ask(&server.router, "GET", path, Some(&train), Value::Null).await;
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains("lacks the scope `look`"), "{path}");
    }
    assert_eq!(server.look("POST", "/v1/audit", json!({})).await.error().0, 405);
    assert_eq!(server.boss("DELETE", "/v1/audit", json!({})).await.error().0, 405, "nobody changes a row");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acts_are_told_with_the_key_and_found_page_by_page() {
    let server = Server::new().await;
    let made = server.boss("POST", "/v1/admin/keys", json!({"name": "app", "scopes": ["chat"]})).await.json();
    let (id, secret) = (made["id"].as_str().unwrap(), made["key"].as_str().unwrap());
    server.boss("PATCH", "/v1/admin/keys/app", json!({"weight": 2})).await;
    server.boss("POST", "/v1/admin/keys/app/rotate", json!({})).await;
    server.boss("DELETE", "/v1/admin/keys/app", Value::Null).await;
    assert_eq!(server.boss("DELETE", "/v1/admin/keys/app", Value::Null).await.error().0, 404);
    server.boss("POST", "/v1/datasets", json!({"name": "d"})).await;
    assert_eq!(server.boss("POST", "/v1/labeling/queues", json!({"name": "q"})).await.status, 201);
    assert_eq!(server.boss("PATCH", "/v1/labeling/queues/q", json!({"closed": true})).await.status, 200);
    let content = server.app.files.receive(server.app.store.issue_id()).await.unwrap();
    let draft = FileDraft { key_id: None, filename: "ann.jsonl".into(), purpose: "batch".into(), expires: None };
    let file = format!("file-{}", content.finish(draft, 1).await.unwrap().id);
    assert_eq!(server.boss("DELETE", &format!("/v1/files/{file}"), Value::Null).await.status, 200);

    let mine = server.get("/v1/audit?by=boss&order=asc").await;
    let told: Vec<_> = mine["data"].as_array().unwrap().iter().map(|act| act["action"].as_str().unwrap()).collect();
    assert_eq!(
        told,
        [
            "key.create",
            "key.change",
            "key.rotate",
            "key.revoke",
            "dataset.build",
            "labeling.create",
            "labeling.change",
            "file.delete",
        ]
    );
    let (closed, deleted) = (&mine["data"][6], &mine["data"][7]);
    assert_eq!((&closed["subject"], &closed["detail"]["closed"]), (&json!("q"), &json!(true)));
    assert_eq!((&deleted["subject"], &deleted["detail"]["purpose"]), (&json!(file), &json!("batch")));
    assert!(!mine.to_string().contains("ann.jsonl"), "a file's name is its owner's words");
    let first = &mine["data"][0];
    assert_eq!(
        (&first["object"], &first["actor"], &first["subject"]),
        (&json!("audit.entry"), &json!("key boss"), &json!("app"))
    );
    assert_eq!((&first["detail"]["id"], &first["detail"]["scopes"]), (&json!(id), &json!(["chat"])));
    let boss = first["key_id"].as_str().unwrap();
    assert_eq!(server.get(&format!("/v1/audit?by={boss}&order=asc")).await["data"], mine["data"]);
    assert!(!mine.to_string().contains(secret));

    let page = server.get("/v1/audit?what=key&on=app&limit=3").await;
    assert_eq!((page["data"].as_array().unwrap().len(), &page["has_more"]), (3, &json!(true)));
    let rest = server.get(&format!("/v1/audit?what=key&on=app&limit=3&after={}", page["last_id"].as_str().unwrap())).await;
    assert_eq!((&rest["data"][0]["action"], &rest["has_more"]), (&json!("key.create"), &json!(false)));
    let keys = server.get("/v1/audit?what=key.create&by=server").await;
    assert_eq!(keys["data"].as_array().unwrap().len(), 2, "those of the test itself");
    assert_eq!(server.look("GET", "/v1/audit?colour=red", Value::Null).await.error().1.as_deref(), Some("colour"));
}

fn adapter(app: &App, name: &str, generation: u64) -> RegisteredAdapter {
    RegisteredAdapter {
        id: app.store.issue_id(),
        name: name.into(),
        generation,
        base: MODEL.into(),
        base_hash: Some("ba5e".into()),
        content_hash: "c0".into(),
        location: format!("adapters/{generation:016x}"),
        lineage: json!({"code_version": "tidemill 0.1.0", "config": {"train": {"method": "dpo"}}}),
        ..RegisteredAdapter::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_leads_to_its_adapter_dataset_rows_and_raters_and_back() {
    let server = Server::new().await;
    let app = &server.app;
    // What people said becomes a dataset.
    let mut judgements = Vec::new();
    for (user, rater, prompt) in [("ann", "rita", "one"), ("bob", "rob", "two"), ("cid", "rita", "three")] {
        let answer = answered(&app.store, user, prompt, &["Helo."], -0.5);
        let better = judged(&app.store, answer.id, Some(rater), Kind::Correction, json!(format!("Hello to {prompt}")));
        judgements.push((answer.id, better.id));
        app.store.record(answer).unwrap();
        app.store.flush().await;
        app.store.add_feedback(vec![better]).await.unwrap();
    }
    server.build("d").await;
    let snapshot = Snapshots::new(app.store.database()).find("d", None).await.unwrap().unwrap();
    // It becomes an adapter, and that one another, which a rollout gives to people.
    let adapters = Adapters::new(&app.store);
    let parent = RegisteredAdapter { snapshot: Some(snapshot.id), ..adapter(app, "short", 0x11) };
    let child = RegisteredAdapter { parent: Some(parent.id), job: Some("ftjob-x".into()), ..adapter(app, "short", 0x22) };
    for new in [&parent, &child] {
        adapters.insert(new, "server").await.unwrap();
    }
    let rollout = Rollout {
        id: app.store.issue_id(),
        created: 10,
        updated: 10,
        ended: None,
        name: "shorter".into(),
        model: "assistant".into(),
        spec: json!({"kind": "canary", "arms": [{"variant": MODEL}, {"variant": "short"}]}),
        state: json!({}),
        version: 0,
        latest: json!({}),
    };
    let start = RolloutDecision { version: 0, at: 10, action: "start".into(), actor: None, body: json!({}) };
    Rollouts::new(&app.store).insert(&rollout, &start, "server").await.unwrap();
    let answer = Inference {
        model: MODEL.into(),
        adapter: 0x22,
        variant: Some("short".into()),
        exposure: Some(Exposure { rollout: rollout.id, arm: 1, unit: 5, refused: None, place: None }),
        ..answered(&app.store, "dan", "four", &["Hi.", "Hello."], -0.5)
    };
    app.store.record(answer.clone()).unwrap();
    app.store.flush().await;

    let trace = server.get(&format!("/v1/lineage/chatcmpl-{}?rows=true", answer.id)).await;
    assert_eq!((&trace["of"], &trace["answer"]["generation"]), (&json!("answer"), &json!("0000000000000022")));
    let arm = &trace["rollout"];
    assert_eq!((&arm["name"], &arm["arm"], &arm["variant"]), (&json!("shorter"), &json!(1), &json!("short")));
    let found = &trace["adapters"][0];
    assert_eq!((&found["id"], &found["base_hash"]), (&json!("short@0000000000000022"), &json!("ba5e")));
    assert_eq!((&found["job"]["id"], &found["dataset"]), (&json!("ftjob-x"), &Value::Null));
    let first = &found["parent"];
    assert_eq!((&first["code_version"], &first["method"]), (&json!("tidemill 0.1.0"), &json!("dpo")));
    let dataset = &first["dataset"];
    assert_eq!((&dataset["id"], &dataset["rows"], &dataset["raters"]), (&json!("d@1"), &json!(6), &json!(["rita", "rob"])));
    assert_eq!((&dataset["sources"]["rater"], &dataset["sources"]["feedback"]), (&json!(2), &json!(3)));
    let rows = dataset["row_ids"].as_array().unwrap();
    assert_eq!((rows.len(), &dataset["has_more"]), (6, &json!(false)));
    assert!(rows.iter().any(|row| row["raters"] == json!(["rob"]) && row["answers"] == json!([judgements[1].0])));
    // The second choice is the same answer, and without ids there are counts.
    let again = server.get(&format!("/v1/lineage/{}", answer.choices[1].id)).await;
    assert_eq!(again["answer"], trace["answer"]);
    assert!(again["adapters"][0]["parent"]["dataset"].get("raters").is_none());
    let few = server.get(&format!("/v1/lineage/{}?rows=true&limit=2", answer.id)).await;
    let few = &few["adapters"][0]["parent"]["dataset"];
    assert_eq!((few["row_ids"].as_array().unwrap().len(), &few["has_more"]), (2, &json!(true)));

    // And back: from the person, the judgement, the row, the dataset, and an answer that was learnt from.
    let total = json!({"datasets": 1, "adapters": 2, "answers": 1});
    let row = rows[0]["id"].as_str().unwrap();
    for id in ["rater:rob", &judgements[1].1.to_string(), row] {
        let back = server.get(&format!("/v1/lineage/{id}")).await;
        assert_eq!(back["total"], total, "{back}");
        let made = &back["used_in"][0]["adapters"][0];
        assert_eq!((&made["id"], &made["answers"]["count"]), (&json!("short@0000000000000011"), &json!(0)));
        assert_eq!(made["continued"][0]["answers"]["count"], 1);
    }
    assert_eq!(server.get(&format!("/v1/lineage/{}", judgements[0].0)).await["used_in"][0]["dataset"]["id"], "d@1");
    assert_eq!(server.get("/v1/lineage/d@1").await["adapters"][0]["id"], "short@0000000000000011");
    assert_eq!(server.get("/v1/lineage/short@0000000000000022").await["made"]["answers"]["count"], 1);
    assert_eq!(server.get("/v1/lineage/rater:nobody").await["total"]["adapters"], 0);
    for missing in ["chatcmpl-x", "nothing", "d@9", &Uuid::nil().to_string(), &"0".repeat(32), "ftjob-1"] {
        assert_eq!(server.look("GET", &format!("/v1/lineage/{missing}"), Value::Null).await.error().0, 404, "{missing}");
    }

    // An erased person is found by nobody's name, and the rows that held theirs are shown no more.
    app.store.erase_user("rob", "operator").await.unwrap();
    assert_eq!(server.get("/v1/lineage/rater:rob").await["total"]["datasets"], 0);
    let after = server.get(&format!("/v1/lineage/{}?rows=true", answer.id)).await;
    let dataset = &after["adapters"][0]["parent"]["dataset"];
    assert!(dataset["tainted"].is_object() && dataset.get("row_ids").is_none() && !after.to_string().contains("rob"), "{after}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_four_eyes_another_key_promotes_and_who_looks_sees_it() {
    let server = Server::new().await;
    let (_, second) = server.app.store.create_key("second", &[Scope::Admin]).await.unwrap();
    let spec = json!({
        "name": "r", "model": MODEL, "kind": "ab", "four_eyes": true,
        "arms": [{"variant": MODEL}, {"variant": "pirate", "model": MODEL, "prompt_prefix": "Arr."}],
        "metrics": [{"metric": "feedback.thumb", "goal": {"min": 0}}],
    });
    let started = server.boss("POST", "/v1/rollouts", spec.clone()).await;
    assert_eq!((started.status.as_u16(), &started.json()["spec"]["approval"]), (201, &json!(true)));
    let refused = server.boss("POST", "/v1/rollouts/r/promote", json!({})).await;
    assert_eq!(refused.error(), (403, None, Some("four_eyes".into())));
    assert!(
        refused.json()["error"]["message"].as_str().unwrap().contains("the key that started it may neither approve nor promote")
    );
    assert_eq!(
        server.look("POST", "/v1/rollouts/r/promote", json!({})).await.error().2.as_deref(),
        Some("insufficient_permissions")
    );
    let promoted = ask(&server.router, "POST", "/v1/rollouts/r/promote", Some(&second), json!({})).await;
    assert_eq!((promoted.status.as_u16(), &promoted.json()["status"]), (200, &json!("promoted")));
    assert_eq!(server.get("/v1/rollouts/r").await["status"], "promoted");
    let told = server.get("/v1/audit?what=rollout&on=r&order=asc").await;
    let told: Vec<_> = told["data"].as_array().unwrap().iter().map(|act| (&act["action"], &act["actor"])).collect();
    assert_eq!(told, [(&json!("rollout.start"), &json!("key boss")), (&json!("rollout.promote"), &json!("key second"))]);
    // What took two to promote takes another one to take back, too.
    let refused = server.boss("POST", "/v1/rollouts/r/rollback", json!({})).await;
    assert_eq!(refused.error(), (403, None, Some("four_eyes".into())));
    // To stop what one began needs nobody else.
    let arms = json!([{"variant": "pirate", "model": MODEL, "prompt_prefix": "Arr."}, {"variant": "plain", "model": MODEL}]);
    let mut again = spec;
    again["arms"] = arms;
    assert_eq!(server.boss("POST", "/v1/rollouts", again).await.status, 201);
    assert_eq!(server.boss("POST", "/v1/rollouts/r/rollback", json!({})).await.status, 200);
    let first = format!("/v1/rollouts/{}/rollback", started.json()["id"].as_str().unwrap());
    assert_eq!(ask(&server.router, "POST", &first, Some(&second), json!({})).await.json()["status"], "rolled_back");
}
