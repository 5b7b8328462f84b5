//! Models that other servers answer, over real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use crate::far::{Conn, Far, delta, finish, usage, whole};
use crate::support;
use crate::support::{MODEL, Reply, Setup, get, merged, post};
use axum::Router;
use axum::body::Body;
use http_body_util::BodyExt;
use hyper::Request;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tidemill::http::{App, router};
use tidemill::limits::Price;
use tidemill::upstream::remote::balance::Balance;
use tidemill::upstream::remote::breaker::BreakerRule;
use tidemill::upstream::remote::{KeySource, Kind, RemoteSpec, Remotes, ServerSpec};
use tidemill_store::Store;
use tidemill_store::records::{Inference, Status};
use tokio::sync::{Notify, mpsc};
use tower::ServiceExt;
use uuid::Uuid;

const CHAT: &str = "/v1/chat/completions";

/// A server with the models `far`, answered by the first upstream, `other`, answered by the second, and so on.
fn app(servers: Vec<ServerSpec>, change: impl Fn(&mut RemoteSpec)) -> App {
    let names = ["far", "other", "third"];
    let model = |(name, server): (&str, &ServerSpec)| {
        let mut model = RemoteSpec { retries: 0, ..RemoteSpec::new(name, vec![server.name.clone()]) };
        change(&mut model);
        model
    };
    let models = names.into_iter().zip(&servers).map(model).collect();
    Setup { remotes: Remotes { servers, models }, ..Setup::default() }.app()
}

fn ask(extra: Value) -> Value {
    merged(json!({"model": "far", "messages": [{"role": "user", "content": "hello"}]}), extra)
}

async fn recorded(store: &Store, id: &Value) -> Inference {
    find(store, id).await.expect("not recorded")
}

async fn find(store: &Store, id: &Value) -> Option<Inference> {
    let id = id.as_str().unwrap().rsplit_once("cmpl-").unwrap().1;
    store.flush().await;
    store.inference(Uuid::parse_str(id).unwrap()).await.unwrap()
}

/// A machine with other work may take long for what takes no time; what never happens fails all the same.
async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("in time")
}

/// The body of a streamed answer, whose next parts come as they are sent.
async fn stream(router: &Router, body: Value) -> Body {
    let request = Request::post(CHAT).body(Body::from(body.to_string())).unwrap();
    let response = within(router.clone().oneshot(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    response.into_body()
}

/// What comes until a text appears.
async fn until(body: &mut Body, text: &str) -> String {
    let mut all = String::new();
    while !all.contains(text) {
        let frame = within(body.frame()).await.unwrap_or_else(|| panic!("the stream ended after: {all}")).unwrap();
        all.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
    }
    all
}

/// The stream's last event, an error.
fn last_error(reply: &Reply) -> Value {
    let last: Value = serde_json::from_str(reply.data().last().unwrap()).unwrap();
    assert!(last["error"]["message"].is_string(), "{last}");
    last["error"].clone()
}

#[tokio::test]
async fn chunks_pass_as_they_come_and_are_recorded() {
    let go = Arc::new(Notify::new());
    let wait = Arc::clone(&go);
    let far = Far::new(move |_, mut conn: Conn| {
        let wait = Arc::clone(&wait);
        async move {
            conn.begin().await;
            conn.event(&delta(json!({"role": "assistant", "content": ""}))).await;
            conn.event(&delta(json!({"content": "Hel"}))).await;
            wait.notified().await;
            conn.event(&delta(json!({"content": "lo"}))).await;
            conn.event(&finish("stop")).await;
            conn.event(&json!({"choices": [], "usage": usage()})).await;
            conn.bytes("data: [DONE]\n\n").await;
            conn.end().await;
        }
    })
    .await;
    let mut app = app(vec![far.spec("u")], |model| model.model = Some("big-1".into()));
    let prices = [("far".to_owned(), Price { input: 150, cached_input: 75, output: 600 })].into();
    app.limits = Arc::new(tidemill::limits::Limiter::new(app.store.clone(), Default::default(), prices));
    let (store, router) = (app.store.clone(), router(app));
    let extra =
        json!({"stream": true, "user": "u", "temperature": 0.5, "metadata": {"a": "b"}, "tidemill": {"conversation": "c"}});
    let mut body = stream(&router, ask(extra)).await;
    let mut text = until(&mut body, "\"Hel\"").await;
    assert!(!text.contains("\"lo\""));
    go.notify_one();
    text.push_str(&until(&mut body, "[DONE]").await);
    assert!(within(body.frame()).await.is_none());
    let lines: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let chunks: Vec<Value> = lines[..lines.len() - 1].iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(chunks.len(), 4, "what says only the usage was not asked for: {text}");
    let id = &chunks[0]["id"];
    assert!(chunks.iter().all(|chunk| chunk["id"] == *id && chunk["model"] == "far" && chunk.get("usage").is_none()), "{text}");
    let sent = &far.seen()[0];
    assert_eq!(sent.path, "/v1/chat/completions");
    assert_eq!(
        sent.body,
        json!({
            "model": "big-1", "messages": [{"role": "user", "content": "hello"}], "stream": true, "user": "u", "temperature": 0.5,
            "stream_options": {"include_usage": true},
        })
    );
    assert!(sent.headers["traceparent"].starts_with("00-"));
    let record = recorded(&store, id).await;
    assert_eq!((record.status, record.endpoint.as_str(), record.model.as_str()), (Status::Ok, "chat", "far"));
    assert_eq!((record.prompt_tokens, record.cached_tokens, record.output_tokens), (1000, 400, 200));
    assert_eq!((record.user_key.as_deref(), record.conversation.as_deref()), (Some("u"), Some("c")));
    assert_eq!(record.messages, Some(json!([{"role": "user", "content": "hello"}])));
    assert_eq!(record.choices[0].output_text.as_deref(), Some("Hello"));
    assert_eq!((record.choices[0].finish_reason.as_deref(), record.choices[0].tokens), (Some("stop"), 200));
    assert!(record.first_token_us.unwrap() <= record.duration_us);
    let params = record.params.unwrap();
    // 600 × $0.15, 400 × $0.075 and 200 × $0.60 per million.
    let upstream = json!({"name": "u", "model": "big-1-0613", "usage": "reported", "cost": 0.00024});
    assert_eq!((&params["upstream"], &params["temperature"]), (&upstream, &json!(0.5)));
    assert!(params.get("user").is_none());
}

#[tokio::test]
async fn whole_answers_keep_what_the_server_says() {
    let message = json!({"role": "assistant", "content": null, "refusal": null,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]});
    let answer = message.clone();
    let far = Far::new(move |_, conn| conn.reply(200, "", whole(answer.clone(), "tool_calls"))).await;
    let app = app(vec![far.spec("u")], |model| {
        model.prompt_prefix = Some("Be brief.".into());
        model.defaults = json!({"temperature": 0.25}).as_object().unwrap().clone();
    });
    let (store, router) = (app.store.clone(), router(app));
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let reply = post(&router, CHAT, ask(json!({"tools": tools}))).await.json();
    assert_eq!((&reply["model"], &reply["odd"], &reply["usage"]), (&json!("far"), &json!(true), &usage()));
    assert_eq!((&reply["choices"][0]["message"], &reply["choices"][0]["finish_reason"]), (&message, &json!("tool_calls")));
    let sent = &far.seen()[0].body;
    assert_eq!(sent["messages"][0], json!({"role": "system", "content": "Be brief."}));
    assert_eq!((&sent["temperature"], &sent["tools"], sent.get("stream_options")), (&json!(0.25), &tools, None));
    let record = recorded(&store, &reply["id"]).await;
    assert_eq!(
        record.messages,
        Some(json!([{"role": "user", "content": "hello"}])),
        "the prefix is the model's, not the client's"
    );
    let recorded = record.choices[0].message.as_ref().unwrap();
    assert_eq!(recorded["tool_calls"][0]["function"], json!({"name": "f", "arguments": {"a": 1}}));
    assert_eq!((record.first_token_us, &record.params.unwrap()["tools"]), (None, &tools));
    // Usage is shown in a stream to those who ask for it, and choices to be compared have ids.
    let far = Far::saying("Hi").await;
    let router = tidemill::http::router(self::app(vec![far.spec("u")], |_| {}));
    let extra = json!({"stream": true, "stream_options": {"include_usage": true}, "n": 2, "tidemill": {"compare": true}});
    let chunks = post(&router, CHAT, ask(extra)).await.chunks();
    assert_eq!(chunks.last().unwrap()["usage"], usage());
    assert_eq!(chunks[0]["choices"][0]["tidemill"]["id"], chunks[0]["id"]);
    assert!(chunks[1]["choices"][0].get("tidemill").is_none());
}

#[tokio::test]
async fn the_key_is_sent_as_the_kind_wants_and_told_to_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key");
    std::fs::write(&path, "sk-very-secret\n").unwrap();
    let key = Some(KeySource::File(path));
    let script = |_, conn: Conn| async move {
        match conn.seen.body["messages"][0]["content"].as_str() {
            Some("refuse") => {
                conn.reply(401, "", json!({"error": {"message": "Incorrect API key provided: sk-very-secret"}})).await
            }
            Some("echo") => {
                let error = json!({"message": "you sent sk-very-secret", "param": "sk-very-secret", "code": "bad_thing"});
                conn.reply(400, "", json!({"error": error})).await;
            }
            Some("mid") => {
                let mut conn = conn;
                conn.begin().await;
                conn.event(&delta(json!({"content": "a"}))).await;
                conn.event(&json!({"error": {"message": "sk-very-secret has no money"}})).await;
                conn.end().await;
            }
            _ => conn.say("fine").await,
        }
    };
    let (plain, azure) = (Far::new(script).await, Far::saying("fine").await);
    let servers = vec![
        ServerSpec { key: key.clone(), ..plain.spec("plain") },
        ServerSpec {
            key,
            kind: Kind::Azure { api_version: "2024-10-21".into() },
            url: azure.url.trim_end_matches("/v1").to_owned(),
            ..azure.spec("azure")
        },
    ];
    let router = router(app(servers, |model| model.model = Some("gpt-4.1".into())));
    assert_eq!(post(&router, CHAT, ask(json!({}))).await.status, 200);
    assert_eq!(post(&router, CHAT, ask(json!({"model": "other"}))).await.status, 200);
    assert_eq!(plain.seen()[0].headers["authorization"], "Bearer sk-very-secret");
    let sent = &azure.seen()[0];
    assert_eq!(sent.path, "/openai/deployments/gpt-4.1/chat/completions?api-version=2024-10-21");
    assert_eq!(sent.headers["api-key"], "sk-very-secret");
    assert!(!sent.headers.contains_key("authorization"));
    for (content, stream, status, code) in [
        ("refuse", false, 502, Some("upstream_key_refused")),
        ("refuse", true, 502, Some("upstream_key_refused")),
        ("echo", false, 400, Some("bad_thing")),
        ("mid", true, 200, Some("upstream_error")),
    ] {
        let reply = post(&router, CHAT, ask(json!({"stream": stream, "messages": [{"role": "user", "content": content}]}))).await;
        assert_eq!(reply.status, status, "{content}");
        assert!(!String::from_utf8_lossy(&reply.body).contains("very-secret"), "{content}");
        let error = if status == 200 { last_error(&reply) } else { reply.json()["error"].clone() };
        assert_eq!(error["code"].as_str(), code, "{content}");
    }
}

#[tokio::test]
async fn a_request_is_sent_again_only_before_the_first_token() {
    let far = Far::new(|number, mut conn: Conn| async move {
        match number {
            0 => conn.reply(500, "", json!({"error": {"message": "oh"}})).await,
            1 => {
                // A role is no token yet.
                conn.begin().await;
                conn.event(&delta(json!({"role": "assistant", "content": ""}))).await;
            }
            2 => conn.say("at last").await,
            _ => {
                conn.begin().await;
                conn.event(&delta(json!({"content": "half"}))).await;
            }
        }
    })
    .await;
    let app = app(vec![far.spec("u")], |model| model.retries = 2);
    let (store, router) = (app.store.clone(), router(app));
    let chunks = post(&router, CHAT, ask(json!({"stream": true}))).await.chunks();
    assert_eq!((far.count(), &chunks[1]["choices"][0]["delta"]["content"]), (3, &json!("at last")));
    let roles = chunks.iter().filter(|chunk| chunk["choices"][0]["delta"].get("role").is_some()).count();
    assert_eq!(roles, 1, "what came of an attempt that failed is not shown");
    let reply = post(&router, CHAT, ask(json!({"stream": true}))).await;
    assert_eq!(far.count(), 4, "after the first token nobody is asked again");
    let data = reply.data();
    let first: Value = serde_json::from_str(&data[0]).unwrap();
    assert_eq!((data.len(), last_error(&reply)["code"].as_str()), (2, Some("upstream_broken")));
    let record = recorded(&store, &first["id"]).await;
    assert_eq!((record.status, record.choices[0].output_text.as_deref()), (Status::Failed, Some("half")));
    assert_eq!(record.params.unwrap()["upstream"]["usage"], "estimated");
    assert!(record.output_tokens == 1 && record.prompt_tokens > 0);
}

#[tokio::test]
async fn what_breaks_off_or_is_nonsense_ends_with_an_error() {
    let far = Far::new(|_, mut conn: Conn| async move {
        let kind = conn.seen.body["messages"][0]["content"].as_str().unwrap().to_owned();
        conn.begin().await;
        conn.event(&delta(json!({"content": "x"}))).await;
        match kind.as_str() {
            // The connection closes without the end that HTTP wants.
            "cut" => {}
            "ended" => conn.end().await,
            "nonsense" => {
                conn.bytes("data: {\"choices\": [\n\n").await;
                conn.closed().await;
            }
            "reported" => {
                conn.event(&json!({"error": {"message": "overloaded", "type": "server_error"}})).await;
                conn.closed().await;
            }
            _ => {
                // All is said, only the last word is missing: some servers have none.
                conn.event(&finish("stop")).await;
                conn.end().await;
            }
        }
    })
    .await;
    let app = app(vec![far.spec("u")], |_| {});
    let (store, router) = (app.store.clone(), router(app));
    for (kind, code) in [
        ("cut", "upstream_broken"),
        ("ended", "upstream_broken"),
        ("nonsense", "upstream_broken"),
        ("reported", "upstream_error"),
    ] {
        let body = ask(json!({"stream": true, "messages": [{"role": "user", "content": kind}]}));
        let reply = within(post(&router, CHAT, body)).await;
        let first: Value = serde_json::from_str(&reply.data()[0]).unwrap();
        let error = last_error(&reply);
        assert_eq!((error["code"].as_str(), reply.data().len()), (Some(code), 2), "{kind}");
        assert!(kind != "reported" || error["message"].as_str().unwrap().contains("overloaded"));
        assert_eq!(recorded(&store, &first["id"]).await.status, Status::Failed, "{kind}");
    }
    let body = ask(json!({"stream": true, "messages": [{"role": "user", "content": "silent end"}]}));
    let chunks = post(&router, CHAT, body).await.chunks();
    assert_eq!(recorded(&store, &chunks[0]["id"]).await.status, Status::Ok);
}

#[tokio::test]
async fn the_next_model_answers_when_one_cannot() {
    let busy = Far::failing(429, "retry-after: 30\r\n", json!({"message": "slow down"})).await;
    let good = Far::saying("I can").await;
    let servers = || vec![busy.spec("busy"), ServerSpec::new("nobody", "http://127.0.0.1:1/v1"), good.spec("good")];
    let app = app(servers(), |model| model.fallback = vec!["other".into(), "no-such-model".into(), "third".into()]);
    let (store, router) = (app.store.clone(), router(app));
    let reply = post(&router, CHAT, ask(json!({}))).await.json();
    assert_eq!((&reply["model"], &reply["choices"][0]["message"]["content"]), (&json!("third"), &json!("I can")));
    let record = recorded(&store, &reply["id"]).await;
    assert_eq!((record.model.as_str(), &record.params.unwrap()["upstream"]["instead_of"]), ("third", &json!("far")));
    // The busy server asked for half a minute.
    assert_eq!(post(&router, CHAT, ask(json!({}))).await.status, 200);
    assert_eq!((busy.count(), good.count()), (1, 2));
    // A model of this process can be the last resort, streamed or not.
    let app = self::app(servers(), |model| model.fallback = vec![MODEL.into()]);
    let (store, router) = (app.store.clone(), tidemill::http::router(app));
    let reply = post(&router, CHAT, ask(json!({}))).await.json();
    assert_eq!((&reply["model"], &reply["choices"][0]["message"]["content"]), (&json!(MODEL), &json!("Hi 🌊!")));
    assert_eq!(recorded(&store, &reply["id"]).await.model, MODEL);
    assert_eq!(post(&router, CHAT, ask(json!({"stream": true}))).await.chunks()[0]["model"], MODEL);
    // When nobody can, the client is told what is wrong with the model that it asked for.
    let router = tidemill::http::router(self::app(servers(), |model| model.fallback = vec!["other".into()]));
    let reply = post(&router, CHAT, ask(json!({}))).await;
    assert_eq!(reply.error(), (429, None, Some("upstream_rate_limited".into())));
    assert_eq!(reply.headers["retry-after"], "30");
    let reply = post(&router, CHAT, ask(json!({"model": "other"}))).await;
    assert_eq!(reply.error(), (502, None, Some("upstream_unreachable".into())));
}

#[tokio::test]
async fn a_request_that_is_wrong_is_refused_in_the_servers_words_and_asked_nowhere_else() {
    let error = json!({"message": "'colour' is unknown", "param": "colour", "code": "unknown_parameter", "type": "x"});
    let (strict, other) = (Far::failing(400, "", error).await, Far::saying("no").await);
    let router = router(app(vec![strict.spec("a"), other.spec("b")], |model| {
        model.retries = 2;
        model.fallback = vec!["other".into(), "far".into()];
    }));
    let reply = post(&router, CHAT, ask(json!({"colour": "red"}))).await;
    assert_eq!(reply.error(), (400, Some("colour".into()), Some("unknown_parameter".into())));
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("'colour' is unknown"));
    assert_eq!((strict.count(), other.count()), (1, 0));
    // What this gateway knows to be wrong does not leave it.
    for (extra, param) in [
        (json!({"messages": []}), "messages"),
        (json!({"n": 0}), "n"),
        (json!({"metadata": {"a": 1}}), "metadata.a"),
        (json!({"store": true}), "store"),
        (json!({"tidemill": {"compare": true}}), "tidemill.compare"),
    ] {
        let reply = post(&router, CHAT, ask(extra.clone())).await;
        assert_eq!((reply.status.as_u16(), reply.error().1.as_deref()), (400, Some(param)), "{extra}");
    }
    assert_eq!(strict.count(), 1);
}

#[tokio::test]
async fn a_slow_first_token_is_given_up_for_another_model() {
    let (told, mut closed) = mpsc::unbounded_channel();
    let slow = Far::new(move |_, mut conn: Conn| {
        let told = told.clone();
        async move {
            conn.begin().await;
            conn.event(&delta(json!({"role": "assistant", "content": ""}))).await;
            conn.closed().await;
            told.send(()).unwrap();
        }
    })
    .await;
    let good = Far::saying("quick").await;
    let router = router(app(vec![slow.spec("slow"), good.spec("good")], |model| {
        if model.name == "far" {
            model.first_token_timeout = Duration::from_millis(300);
            model.fallback = vec!["other".into()];
        }
    }));
    let chunks = within(post(&router, CHAT, ask(json!({"stream": true})))).await.chunks();
    assert_eq!((&chunks[0]["model"], slow.count()), (&json!("other"), 1));
    within(closed.recv()).await.expect("the slow answer is called off");
    // Without another model it is a timeout.
    let router = tidemill::http::router(app(vec![slow.spec("slow")], |model| model.timeout = Duration::from_millis(300)));
    let reply = within(post(&router, CHAT, ask(json!({})))).await;
    assert_eq!(reply.error(), (504, None, Some("upstream_timeout".into())));
    // The client's own deadline is the client's.
    let request = Request::post(CHAT).header("x-request-timeout-ms", "300").body(Body::from(ask(json!({})).to_string())).unwrap();
    let router = tidemill::http::router(app(vec![slow.spec("slow"), good.spec("good")], |_| {}));
    let reply = within(support::send(&router, request)).await;
    assert_eq!(reply.error(), (504, None, Some("deadline_exceeded".into())));
}

#[tokio::test]
async fn a_client_that_leaves_closes_the_servers_connection() {
    let (told, mut closed) = mpsc::unbounded_channel();
    let far = Far::new(move |_, mut conn: Conn| {
        let told = told.clone();
        async move {
            if conn.seen.body["stream"] == true {
                conn.begin().await;
                conn.event(&delta(json!({"content": "begun"}))).await;
            } else {
                told.send("asked").unwrap();
            }
            conn.closed().await;
            told.send("closed").unwrap();
        }
    })
    .await;
    let app = app(vec![ServerSpec { max_concurrent: Some(1), ..far.spec("u") }], |_| {});
    let (store, drain, router) = (app.store.clone(), app.drain.clone(), router(app));
    let mut body = stream(&router, ask(json!({"stream": true}))).await;
    let text = until(&mut body, "begun").await;
    assert_eq!(drain.in_flight(), 1);
    // The server takes one at a time.
    let full = post(&router, CHAT, ask(json!({}))).await;
    assert_eq!(full.error(), (503, None, Some("upstream_unavailable".into())));
    assert!(full.headers.contains_key("retry-after"));
    drop(body);
    assert_eq!(within(closed.recv()).await, Some("closed"));
    let chunk: Value = serde_json::from_str(text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap()).unwrap();
    let record = recorded(&store, &chunk["id"]).await;
    assert_eq!((record.status, record.choices[0].output_text.as_deref()), (Status::Cancelled, Some("begun")));
    let asking = tokio::spawn({
        let router = router.clone();
        async move { post(&router, CHAT, ask(json!({}))).await }
    });
    assert_eq!(within(closed.recv()).await, Some("asked"));
    asking.abort();
    assert_eq!(within(closed.recv()).await, Some("closed"));
    assert_eq!(drain.in_flight(), 0);
    // A server that leaves ends what is left.
    let mut body = stream(&router, ask(json!({"stream": true}))).await;
    until(&mut body, "begun").await;
    drain.cut_off();
    assert!(until(&mut body, "error").await.contains("shutting down"));
    assert!(within(body.frame()).await.is_none());
}

#[tokio::test]
async fn a_server_that_keeps_failing_is_left_alone_and_tried_again() {
    let far = Far::new(|number, conn: Conn| async move {
        if number < 2 { conn.reply(503, "", json!({})).await } else { conn.say("better").await }
    })
    .await;
    let rest = Duration::from_secs(4);
    let spec = ServerSpec { breaker: BreakerRule { failures: 2, rest }, ..far.spec("u") };
    let router = router(app(vec![spec], |_| {}));
    for _ in 0..2 {
        assert_eq!(post(&router, CHAT, ask(json!({}))).await.status, 502);
    }
    let reply = post(&router, CHAT, ask(json!({}))).await;
    assert_eq!(reply.error(), (503, None, Some("upstream_unavailable".into())));
    assert!((1..=4).contains(&reply.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap()));
    assert_eq!(far.count(), 2, "nobody asks while it rests");
    within(async {
        while post(&router, CHAT, ask(json!({}))).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    assert_eq!(far.count(), 3, "one request was enough");
}

#[tokio::test]
async fn one_of_several_servers_is_asked_and_the_next_when_it_fails() {
    let (a, b) = (Far::saying("a").await, Far::saying("b").await);
    let servers = vec![a.spec("a"), b.spec("b"), ServerSpec { weight: 5, ..ServerSpec::new("gone", "http://127.0.0.1:1/v1") }];
    let setup = |balance, servers: Vec<ServerSpec>| {
        let names = servers.iter().map(|server| server.name.clone()).collect();
        let models = vec![RemoteSpec { retries: 2, balance, ..RemoteSpec::new("far", names) }];
        router(Setup { remotes: Remotes { servers, models }, ..Setup::default() }.app())
    };
    let answer = async |router: &Router, content: &str| {
        let reply = post(router, CHAT, ask(json!({"messages": [{"role": "user", "content": content}]}))).await;
        assert_eq!(reply.status, 200, "{}", reply.json());
        reply.json()["choices"][0]["message"]["content"].clone()
    };
    let prefix = setup(Balance::Prefix, servers.clone());
    let mut seen = std::collections::BTreeSet::new();
    for conversation in 0..16 {
        let first = answer(&prefix, &conversation.to_string()).await;
        assert_eq!(answer(&prefix, &conversation.to_string()).await, first, "a conversation stays with its server");
        seen.insert(first.to_string());
    }
    assert_eq!(seen.len(), 2, "and conversations are spread");
    for balance in [Balance::Weighted, Balance::LeastLoaded] {
        let router = setup(balance, servers.clone());
        for _ in 0..8 {
            answer(&router, "x").await;
        }
    }
}

#[tokio::test]
async fn completions_and_embeddings_pass_and_what_needs_an_engine_is_refused() {
    let far = Far::new(|_, conn: Conn| async move {
        let path = conn.seen.path.clone();
        let choices = json!([{"index": 0, "text": " time", "finish_reason": "length", "logprobs": null}]);
        match path.as_str() {
            "/v1/completions" => conn.reply(200, "", json!({"id": "x", "object": "text_completion", "choices": choices, "usage": usage()})).await,
            _ => conn.reply(200, "", json!({"object": "list", "data": [{"embedding": [0.5], "index": 0}], "model": "x", "usage": {"prompt_tokens": 3, "total_tokens": 3}})).await,
        }
    })
    .await;
    let app = app(vec![far.spec("u")], |_| {});
    let (store, router) = (app.store.clone(), router(app));
    let reply = post(&router, "/v1/completions", json!({"model": "far", "prompt": "Once upon a", "max_tokens": 1})).await.json();
    assert_eq!((&reply["model"], &reply["choices"][0]["text"]), (&json!("far"), &json!(" time")));
    let record = recorded(&store, &reply["id"]).await;
    assert_eq!((record.endpoint.as_str(), record.prompt_text.as_deref()), ("completion", Some("Once upon a")));
    assert_eq!(record.choices[0].output_text.as_deref(), Some(" time"));
    let refused = post(&router, "/v1/completions", json!({"model": "far", "prompt": ["a", "b"]})).await;
    assert_eq!(refused.error().1.as_deref(), Some("prompt"));
    let reply = post(&router, "/v1/embeddings", json!({"model": "far", "input": "a"})).await.json();
    assert_eq!(
        reply,
        json!({"object": "list", "data": [{"embedding": [0.5], "index": 0}], "model": "far", "usage": {"prompt_tokens": 3, "total_tokens": 3}})
    );
    for (path, body) in [
        ("/v1/responses", json!({"model": "far", "input": "a"})),
        ("/v1/messages", json!({"model": "far", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]})),
        ("/tokenize", json!({"model": "far", "prompt": "a"})),
    ] {
        let reply = post(&router, path, body).await;
        assert_eq!(reply.status, 400, "{path}");
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains("answered by another server"), "{path}");
    }
    assert_eq!(far.count(), 2);
    let models = get(&router, "/v1/models").await.json();
    let card = models["data"].as_array().unwrap().iter().find(|card| card["id"] == "far").unwrap().clone();
    assert_eq!((&card["owned_by"], &card["max_model_len"]), (&json!("remote"), &Value::Null));
    assert_eq!(get(&router, "/ready").await.json()["models"]["far"], "ready");
}

#[tokio::test]
async fn feedback_finds_the_answer_of_another_server() {
    let far = Far::saying("Hi").await;
    let app = app(vec![far.spec("u")], |_| {});
    let (store, router) = (app.store.clone(), router(app));
    let id = post(&router, CHAT, ask(json!({}))).await.json()["id"].clone();
    store.flush().await;
    let reply = post(&router, "/v1/feedback", json!({"target": id, "kind": "thumb", "value": "up"})).await;
    assert_eq!(reply.status, 201, "{}", reply.json());
    let listed = get(&router, &format!("/v1/feedback?target={}", id.as_str().unwrap())).await.json();
    assert_eq!(listed["data"].as_array().unwrap().len(), 1);
}
