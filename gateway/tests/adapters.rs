//! Registered adapters over HTTP, on a tiny model with adapters that PEFT made.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use crate::tiny;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{Reply, Setup, send};
use crate::tiny::golden;
use axum::Router;
use axum::body::Body;
use hyper::{Request, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill::http::{App, router};
use tidemill_engine::ModelFiles;
use tidemill_rlhf::registry::{Base, Lineage};
use tidemill_store::Scope;

const TOKENS: usize = 16;

fn expected(place: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(place)).unwrap()).unwrap()
}

/// What PEFT answered with an adapter, or transformers without one.
fn greedy(adapter: &str) -> Value {
    let place = if adapter.is_empty() { "expected.json".to_owned() } else { format!("adapters/{adapter}/expected.json") };
    json!(expected(&place)["greedy"].as_array().unwrap()[..TOKENS])
}

struct Server {
    folder: TempDir,
    app: App,
    router: Router,
    key: Option<String>,
}

impl Server {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let app = tiny::app(folder.path(), Setup::default());
        Self { folder, router: router(app.clone()), app, key: None }
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> Reply {
        let mut request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        send(&self.router, request.body(body).unwrap()).await
    }

    async fn register(&self, name: &str, adapter: &str) -> Value {
        let body = json!({"name": name, "path": golden("adapters").join(adapter), "metrics": {"eval_loss": 0.5}});
        let reply = self.call("POST", "/v1/adapters", body).await;
        assert_eq!(reply.status, 201, "{}", reply.json());
        reply.json()
    }

    async fn alias(&self, alias: &str, adapter: &str) -> Reply {
        self.call("POST", "/v1/adapter_aliases", json!({"alias": alias, "adapter": adapter})).await
    }

    async fn change(&self, adapter: &str, what: &str) -> Reply {
        self.call("POST", &format!("/v1/adapters/{adapter}/{what}"), Value::Null).await
    }

    /// The tokens that a model answers, or the status of the refusal.
    async fn answer(&self, model: &str) -> Value {
        let prompt = &expected("expected.json")["prompt_ids"];
        let body = json!({"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
        let reply = self.call("POST", "/v1/completions", body).await;
        match reply.status.as_u16() {
            200 => reply.json()["choices"][0]["token_ids"].clone(),
            status => json!(status),
        }
    }

    async fn models(&self) -> Vec<String> {
        let list = self.call("GET", "/v1/models", Value::Null).await.json();
        list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap().to_owned()).collect()
    }
}

#[tokio::test]
async fn an_adapter_is_registered_served_named_and_revoked() {
    let server = Server::new();
    let some = server.register("support", "some").await;
    assert_eq!((&some["state"], &some["base"], &some["lineage"]["lora"]["r"]), (&json!("candidate"), &json!("tiny"), &json!(8)));
    assert_eq!(some["base_hash"].as_str().map(str::len), Some(64));
    assert_eq!(server.answer("support").await, 404, "a candidate is not served");
    assert_eq!(server.alias("champion", "support").await.error().2.as_deref(), Some("adapter_not_served"));

    assert_eq!(server.change("support", "serve").await.json()["state"], "serving");
    let whole = format!("support@{}", some["generation"].as_str().unwrap());
    assert_eq!(server.alias("champion", "support").await.json()["aliases"], json!(["champion"]));
    for model in ["support", "tiny:support", &whole, &format!("tiny:{whole}"), "champion", "tiny:champion"] {
        assert_eq!(server.answer(model).await, greedy("some"), "{model}");
    }
    assert_eq!(server.answer("tiny").await, greedy(""));
    assert_eq!(server.models().await, ["tiny", "champion", "support"]);

    // Another generation of the name: the name moves, the alias stays.
    let all = server.register("support", "all").await;
    let newer = format!("support@{}", all["generation"].as_str().unwrap());
    server.change(&newer, "serve").await;
    assert_eq!((server.answer("support").await, server.answer("champion").await), (greedy("all"), greedy("some")));
    assert_eq!(server.answer(&whole).await, greedy("some"));
    assert_eq!(server.alias("champion", &newer).await.status, 200);
    assert_eq!(server.answer("champion").await, greedy("all"), "from the next request on");
    assert_eq!(server.change(&newer, "retire").await.error().2.as_deref(), Some("adapter_aliased"));

    let revoked = server.change("champion", "revoke").await.json();
    assert_eq!(
        (&revoked["state"], &revoked["generation"], &revoked["aliases"]),
        (&json!("revoked"), &all["generation"], &json!([]))
    );
    for model in ["champion", &newer] {
        assert_eq!(server.answer(model).await, 404, "{model}");
    }
    assert_eq!(server.answer("support").await, greedy("some"), "the one that is still served");
    assert_eq!(server.change(&newer, "serve").await.error().2.as_deref(), Some("adapter_revoked"));
    assert_eq!(server.change("support", "retire").await.json()["state"], "retired");
    assert_eq!(server.answer("support").await, 404);
    assert_eq!(server.models().await, ["tiny"]);
    let model = server.app.registry.find_local_base(None).unwrap();
    assert!(model.engine().adapters().is_empty(), "memory is freed");

    let listed = server.call("GET", "/v1/adapters?base=tiny", Value::Null).await.json();
    let states: Vec<&str> = listed["data"].as_array().unwrap().iter().map(|adapter| adapter["state"].as_str().unwrap()).collect();
    assert_eq!((states, &listed["data"][0]["metrics"]["eval_loss"]), (vec!["revoked", "retired"], &json!(0.5)));
    assert!(listed["data"][0].get("lineage").is_none());
}

#[tokio::test]
async fn places_are_taken_over_and_names_of_loaded_adapters_are_kept_apart() {
    let server = Server::new();
    for (name, adapter) in [("a", "all"), ("b", "some"), ("c", "patterns")] {
        server.register(name, adapter).await;
        assert_eq!(server.change(name, "serve").await.json()["problem"], Value::Null);
    }
    // All three places are taken: a new generation of a name takes the place of the one that it replaces.
    let replaced = server.register("a", "some").await;
    let reply = server.change(&format!("a@{}", replaced["generation"].as_str().unwrap()), "serve").await.json();
    assert_eq!((&reply["problem"], server.answer("a").await), (&Value::Null, greedy("some")));
    server.register("d", "all").await;
    let refused = server.change("d", "serve").await.json();
    assert!(refused["problem"].as_str().unwrap().contains("all 3 places"), "{refused}");
    assert_eq!((server.answer("d").await, server.answer("c").await), (json!(404), greedy("patterns")));
    // Room again: it is served without being asked for twice.
    server.change("c", "retire").await;
    assert_eq!(server.answer("d").await, greedy("all"));

    let load = json!({"lora_name": "b", "lora_path": golden("adapters/all")});
    let reply = server.call("POST", "/v1/load_lora_adapter", load).await;
    assert_eq!(reply.error(), (400, Some("lora_name".into()), Some("adapter_exists".into())));
    let reply = server.call("POST", "/v1/unload_lora_adapter", json!({"lora_name": "b"})).await;
    assert_eq!((reply.status.as_u16(), server.answer("b").await), (400, greedy("some")));
    assert_eq!(server.alias("tiny", "b").await.error().2.as_deref(), Some("name_taken"));
}

#[tokio::test]
async fn a_name_leads_to_the_generation_before_until_the_new_one_can_be_loaded() {
    let server = Server::new();
    let registry = server.app.adapters.registry().clone();
    let old = server.register("a", "some").await;
    server.change("a", "serve").await;
    assert_eq!(server.answer("a").await, greedy("some"));
    // Of other weights, as after the base was replaced.
    let base = Base { hash: Some("f".repeat(64)), ..Base::named("tiny") };
    let new = registry.register(&golden("adapters/all"), Lineage::new("a", base)).await.unwrap();
    let served = server.change(&new.reference(), "serve").await.json();
    assert!(served["problem"].as_str().unwrap().contains("other weights"), "{served}");
    for _ in 0..2 {
        assert_eq!(server.answer("a").await, greedy("some"), "requests go on");
        server.app.adapters.follow().await.unwrap();
    }
    let whole = format!("a@{}", old["generation"].as_str().unwrap());
    assert_eq!((server.answer(&whole).await, server.models().await), (json!(404), vec!["tiny".to_owned(), "a".to_owned()]));
    // The place is needed by nobody else, and is kept while others come.
    for (name, adapter) in [("b", "all"), ("c", "patterns")] {
        server.register(name, adapter).await;
        assert_eq!(server.change(name, "serve").await.json()["problem"], Value::Null);
    }
    assert_eq!(server.answer("a").await, greedy("some"));
    // What must not be served is not, whatever the name leads to then.
    assert_eq!(server.change(&whole, "revoke").await.json()["state"], "revoked");
    assert_eq!(server.answer("a").await, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_only_a_job_gave_leads_somewhere_at_every_moment() {
    let server = Server::new();
    server.register("ft-1", "all").await;
    server.change("ft-1", "serve").await;
    let name = "ft:tiny::1";
    assert_eq!(server.alias(name, "ft-1").await.status, 200);
    assert_eq!(server.answer(name).await, greedy("all"));
    let (registry, stop) = (Arc::clone(&server.app.registry), Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    let asking = std::thread::spawn(move || {
        let (mut asked, mut lost) = (0, 0);
        while !stopped.load(Ordering::Relaxed) {
            asked += 1;
            // One that is being loaded is asked for again.
            lost += usize::from(registry.find(Some(name)).is_err_and(|error| error.status != StatusCode::SERVICE_UNAVAILABLE));
        }
        (asked, lost)
    });
    for _ in 0..20 {
        // There at any time, and on demand again.
        assert_eq!(server.alias("champion", "ft-1").await.status, 200);
        assert_eq!(server.call("DELETE", "/v1/adapter_aliases/champion", Value::Null).await.status, 200);
    }
    stop.store(true, Ordering::Relaxed);
    let (asked, lost) = asking.join().unwrap();
    assert_eq!(lost, 0, "of {asked}");
    assert_eq!(server.answer(name).await, greedy("all"));
    // It is one adapter, whatever leads to it: in records, too.
    let variant = || server.app.registry.find_local(Some(name)).unwrap().variant();
    assert_eq!(variant().as_deref(), Some("tiny:ft-1"));
    server.alias("champion", "ft-1").await;
    assert_eq!(variant().as_deref(), Some("tiny:ft-1"));
    let model = server.app.registry.find_local_base(None).unwrap();
    assert_eq!(model.engine().adapters().len(), 1);
    let shadow = json!({"lora_name": name, "lora_path": golden("adapters/some"), "load_inplace": true});
    assert_eq!(server.call("POST", "/v1/load_lora_adapter", shadow).await.status, 400);
}

#[tokio::test]
async fn a_damaged_adapter_keeps_nothing_else_from_being_served() {
    let server = Server::new();
    let (good, bad) = (server.register("good", "some").await, server.register("bad", "all").await);
    let registry = server.app.adapters.registry().clone();
    for name in ["good", "bad"] {
        registry.serve(name, false).await.unwrap();
    }
    let tensors = |adapter: &Value| {
        let folder = server.folder.path().join("adapters").join(adapter["generation"].as_str().unwrap());
        folder.join("adapter_model.safetensors")
    };
    let whole = std::fs::read(tensors(&bad)).unwrap();
    // The files of the other: read well, and not what was registered.
    for damaged in [whole[..1000].to_vec(), std::fs::read(tensors(&good)).unwrap()] {
        std::fs::write(tensors(&bad), damaged).unwrap();
        server.app.adapters.follow().await.unwrap();
        assert_eq!((server.answer("good").await, server.answer("bad").await), (greedy("some"), json!(404)));
        let shown = server.call("GET", "/v1/adapters/bad", Value::Null).await.json();
        assert!(shown["state"] == "serving" && shown["problem"].is_string(), "{shown}");
        let refused = server.change("bad", "serve").await;
        assert_eq!(refused.error().2.as_deref(), Some("adapter_damaged"));
    }
    std::fs::write(tensors(&bad), whole).unwrap();
    assert_eq!(server.change("bad", "serve").await.json()["problem"], Value::Null);
    assert_eq!(server.answer("bad").await, greedy("all"));
}

#[tokio::test]
async fn an_adapter_of_other_weights_under_the_same_shapes_is_not_served() {
    let server = Server::new();
    let registry = server.app.adapters.registry().clone();
    let config = ModelFiles::open(&golden("")).unwrap().config().clone();
    let of = |hash: Option<&str>| Base { hash: hash.map(str::to_owned), config: Some(config.clone()), ..Base::named("tiny") };
    registry.register(&golden("adapters/all"), Lineage::new("foreign", of(Some(&"f".repeat(64))))).await.unwrap();
    registry.register(&golden("adapters/some"), Lineage::new("unknown", of(None))).await.unwrap();
    let own = server.register("own", "patterns").await;
    let refused = server.change("foreign", "serve").await.json();
    let problem = refused["problem"].as_str().unwrap();
    for part in ["other weights", "ffffffffffff…", &own["base_hash"].as_str().unwrap()[..12], "--any-base"] {
        assert!(problem.contains(part), "{part}: {problem}");
    }
    assert_eq!(server.answer("foreign").await, 404);
    // Where nobody said what it was made for, shapes are all that there is.
    assert_eq!(server.change("unknown", "serve").await.json()["problem"], Value::Null);
    assert_eq!(server.change("own", "serve").await.json()["problem"], Value::Null);
    assert_eq!((server.answer("unknown").await, server.answer("own").await), (greedy("some"), greedy("patterns")));
}

#[tokio::test]
async fn training_keys_look_and_administrators_change() {
    let mut server = Server::new();
    server.register("a", "all").await;
    let mut secrets = Vec::new();
    for scope in [Scope::Chat, Scope::Train, Scope::Admin] {
        secrets.push(server.app.store.create_key(scope.as_str(), &[scope]).await.unwrap().1);
    }
    for (secret, look, change) in [(&secrets[0], 403, 403), (&secrets[1], 200, 403), (&secrets[2], 200, 200)] {
        server.key = Some(secret.clone());
        for path in ["/v1/adapters", "/v1/adapters/a", "/v1/adapter_aliases"] {
            assert_eq!(server.call("GET", path, Value::Null).await.status, look, "{path}");
        }
        assert_eq!(server.change("a", "serve").await.status, change);
    }
    // What a job of somebody else's trained by is for those who see the job.
    let of_job =
        Lineage { job: Some(format!("ftjob-{}", server.app.store.issue_id())), ..Lineage::new("j", Base::named("tiny")) };
    server.app.adapters.registry().register(&golden("adapters/some"), of_job).await.unwrap();
    for (secret, name, whole) in [(&secrets[1], "a", true), (&secrets[1], "j", false), (&secrets[2], "j", true)] {
        server.key = Some(secret.clone());
        let shown = server.call("GET", &format!("/v1/adapters/{name}"), Value::Null).await.json();
        assert_eq!(shown["lineage"].is_object(), whole, "{shown}");
    }
    assert_eq!(server.alias("x@1", "a").await.error().1.as_deref(), Some("alias"));
    assert_eq!(server.alias("org/best:1", "a").await.status, 200);
    assert_eq!(server.call("DELETE", "/v1/adapter_aliases/org/best:1", Value::Null).await.json()["alias"], "org/best:1");
    for (method, path, body, status) in [
        ("GET", "/v1/adapters/none", Value::Null, 404),
        ("GET", "/v1/adapters?state=x", Value::Null, 400),
        ("GET", "/v1/adapters?after=x", Value::Null, 400),
        ("POST", "/v1/adapters/none/revoke", Value::Null, 404),
        ("DELETE", "/v1/adapter_aliases/none", Value::Null, 404),
        ("POST", "/v1/adapters", json!({"name": "a b", "path": golden("adapters/all")}), 400),
        ("POST", "/v1/adapters", json!({"name": "b", "path": "/nowhere"}), 404),
        ("POST", "/v1/adapters", json!({"name": "b", "path": golden("adapters/all"), "dataset": "d@1"}), 404),
        ("POST", "/v1/adapters", json!({"name": "b", "path": golden("adapters/all"), "base_model_name": "none"}), 404),
        ("POST", "/v1/adapters/a/serve", json!({"though_tainted": 1}), 400),
    ] {
        assert_eq!(server.call(method, path, body.clone()).await.status, status, "{method} {path} {body}");
    }
}
