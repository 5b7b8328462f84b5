//! Limits as a client meets them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use crate::support::{MODEL, Reply, Setup, chat, completion, merged, not_at_midnight, says, send};
use axum::Router;
use axum::body::Body;
use http_body_util::BodyExt;
use hyper::Request;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidemill::http::{App, router};
use tidemill::limits::{Limiter, Price, Subject};
use tidemill_store::{ApiKey, KeyTerms, Limits, Money, Scope, Tier, Usage};
use tower::ServiceExt;

const CHAT: &str = "/v1/chat/completions";

async fn key(app: &App, name: &str, terms: KeyTerms) -> (ApiKey, String) {
    app.store.create_key_with(name, &[Scope::Chat], None, terms, "boss").await.unwrap()
}

fn limited(limits: Limits) -> KeyTerms {
    KeyTerms { limits, ..KeyTerms::default() }
}

fn asking(secret: &str, path: &str, body: &Value) -> Request<Body> {
    Request::post(path).header("authorization", format!("Bearer {secret}")).body(Body::from(body.to_string())).unwrap()
}

async fn ask(router: &Router, secret: &str, body: &Value) -> Reply {
    send(router, asking(secret, CHAT, body)).await
}

fn header<'a>(reply: &'a Reply, name: &str) -> &'a str {
    reply.headers[name].to_str().unwrap()
}

#[tokio::test]
async fn requests_per_minute_are_counted_down_in_headers_and_then_refused() {
    let app = Setup::default().app();
    let terms = limited(Limits { requests_per_minute: Some(2), input_tokens_per_minute: Some(10_000), ..Limits::default() });
    let (_, secret) = key(&app, "app", terms).await;
    let (_, other) = key(&app, "other", KeyTerms::default()).await;
    let router = router(app);
    for left in ["1", "0"] {
        let reply = ask(&router, &secret, &chat(json!({}))).await;
        assert_eq!(reply.status, 200);
        assert_eq!(header(&reply, "x-ratelimit-limit-requests"), "2");
        assert_eq!(header(&reply, "x-ratelimit-remaining-requests"), left);
        assert_eq!(header(&reply, "x-ratelimit-limit-tokens"), "10000");
        assert!(header(&reply, "x-ratelimit-reset-requests").ends_with('s'));
        let prompt = reply.json()["usage"]["prompt_tokens"].as_u64().unwrap();
        assert!(header(&reply, "x-ratelimit-remaining-tokens").parse::<u64>().unwrap() <= 10_000 - prompt);
    }
    let refused = ask(&router, &secret, &chat(json!({}))).await;
    assert_eq!(refused.error(), (429, None, Some("rate_limit_exceeded".into())));
    assert_eq!(refused.json()["error"]["type"], "requests");
    assert!((1..=30).contains(&header(&refused, "retry-after").parse::<u32>().unwrap()));
    assert_eq!(header(&refused, "x-ratelimit-remaining-requests"), "0");
    assert!(!refused.headers.contains_key("x-should-retry"));
    // Refused before its body is looked at.
    assert_eq!(send(&router, asking(&secret, CHAT, &json!("nonsense"))).await.error().0, 429);
    assert_eq!(ask(&router, &other, &chat(json!({}))).await.status, 200);
}

#[tokio::test]
async fn what_is_refused_for_another_reason_costs_no_request() {
    let app = Setup::default().app();
    let (_, secret) = key(&app, "app", limited(Limits { requests_per_minute: Some(1), ..Limits::default() })).await;
    let router = router(app);
    assert_eq!(ask(&router, &secret, &chat(json!({"temperature": 9}))).await.error().0, 400);
    assert_eq!(ask(&router, &secret, &chat(json!({}))).await.status, 200);
    assert_eq!(ask(&router, &secret, &chat(json!({}))).await.status, 429);
}

#[tokio::test]
async fn prompt_and_generated_tokens_have_limits_of_their_own() {
    let app = Setup::script(says("twelve chars")).app();
    let (_, long) = key(&app, "long", limited(Limits { input_tokens_per_minute: Some(4), ..Limits::default() })).await;
    let (_, chatty) = key(&app, "chatty", limited(Limits { output_tokens_per_minute: Some(5), ..Limits::default() })).await;
    let router = router(app);
    let too_large = ask(&router, &long, &chat(json!({}))).await;
    assert_eq!(too_large.error(), (429, None, Some("rate_limit_exceeded".into())));
    assert_eq!((header(&too_large, "x-should-retry"), &too_large.json()["error"]["type"]), ("false", &json!("tokens")));
    let small = send(&router, asking(&long, "/v1/completions", &completion(json!({})))).await;
    assert_eq!((small.status.as_u16(), header(&small, "x-ratelimit-remaining-tokens")), (200, "1"));
    // The first answer overdraws; the next request waits until that is worked off: 12 and the end of the turn, of 5.
    assert_eq!(ask(&router, &chatty, &chat(json!({}))).await.status, 200);
    let refused = ask(&router, &chatty, &chat(json!({}))).await;
    assert_eq!(refused.error().0, 429);
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("generated tokens per minute"));
    assert!(header(&refused, "retry-after").parse::<u32>().unwrap() > 60);
}

#[tokio::test]
async fn a_stream_holds_its_place_until_it_ends_or_the_client_leaves() {
    let app = Setup::slow(400, 5).app();
    let (one, secret) = key(&app, "app", limited(Limits { concurrent: Some(1), ..Limits::default() })).await;
    let (limits, router) = (Arc::clone(&app.limits), router(app));
    let body = chat(json!({"stream": true}));
    let mut response = router.clone().oneshot(asking(&secret, CHAT, &body)).await.unwrap();
    assert_eq!(response.status(), 200);
    response.body_mut().frame().await.unwrap().unwrap();
    assert_eq!(limits.running(&Subject::Key(one.id)), 1);
    let refused = ask(&router, &secret, &chat(json!({}))).await;
    assert_eq!(refused.error(), (429, None, Some("rate_limit_exceeded".into())));
    assert_eq!(header(&refused, "retry-after"), "1");
    drop(response);
    assert_eq!(limits.running(&Subject::Key(one.id)), 0);
    // What ends by itself lets go, too; so does a request that fails after it was let in.
    assert_eq!(ask(&router, &secret, &chat(json!({"max_tokens": 3}))).await.status, 200);
    assert_eq!(ask(&router, &secret, &chat(json!({"max_tokens": 3, "stream": true}))).await.status, 200);
    let choked = json!({"model": MODEL, "prompt": [0]});
    assert_eq!(send(&router, asking(&secret, "/v1/completions", &choked)).await.status, 500);
    assert_eq!(limits.running(&Subject::Key(one.id)), 0);
}

#[tokio::test]
async fn who_leaves_without_reading_has_used_what_was_made() {
    let app = Setup { script: says(&"x".repeat(100)), ..Setup::default() }.app();
    let (one, secret) = key(&app, "app", KeyTerms::default()).await;
    let (limits, registry, router) = (Arc::clone(&app.limits), Arc::clone(&app.registry), router(app));
    let response = router.clone().oneshot(asking(&secret, CHAT, &chat(json!({"stream": true})))).await.unwrap();
    assert_eq!(response.status(), 200);
    let model = registry.find_local(Some(MODEL)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while model.engine().stats().finished == 0 {
        assert!(Instant::now() < deadline, "a hundred tokens take a moment");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(response);
    let used = limits.ledger().used(&Subject::Key(one.id).to_string(), tidemill::limits::today());
    assert_eq!((used.requests, used.output_tokens), (1, 101));
    assert!(used.input_tokens > 0);
}

#[tokio::test]
async fn who_is_at_a_limit_may_still_look_count_and_call_off() {
    let app = Setup::slow(400, 20).app();
    let (_, secret) = key(&app, "app", limited(Limits { concurrent: Some(1), ..Limits::default() })).await;
    let router = router(app);
    let body = json!({"model": MODEL, "input": "hello", "background": true});
    let begun = send(&router, asking(&secret, "/v1/responses", &body)).await;
    assert_eq!(begun.status, 200);
    assert_eq!(ask(&router, &secret, &chat(json!({}))).await.error().0, 429);
    assert_eq!(send(&router, asking(&secret, "/tokenize", &json!({"prompt": "x"}))).await.status, 200);
    let path = format!("/v1/responses/{}/cancel", begun.json()["id"].as_str().unwrap());
    let cancelled = send(&router, asking(&secret, &path, &json!({}))).await;
    assert_eq!((cancelled.status.as_u16(), cancelled.json()["status"].clone()), (200, json!("cancelled")));
}

#[tokio::test]
async fn a_clock_that_goes_back_over_midnight_loses_no_count() {
    let store = Setup::default().app().store;
    let limiter = Arc::new(Limiter::new(store.clone(), Default::default(), Default::default()));
    let (ledger, yesterday) = (limiter.ledger(), tidemill::limits::today() - 1);
    let five = Usage { requests: 5, ..Usage::default() };
    for _ in 0..2 {
        ledger.add("key:x", yesterday, five);
        for _ in 0..2 {
            ledger.flush().await.unwrap();
        }
    }
    assert_eq!(store.usage(None, "key:x", yesterday).await.unwrap().requests, 10);
}

#[tokio::test]
async fn a_days_money_is_added_up_and_then_no_retry_helps() {
    let prices = [(MODEL.to_owned(), Price { input: 1000, cached_input: 500, output: 10_000 })];
    let app = Setup { script: says("ten chars!"), prices: prices.into(), ..Setup::default() }.app();
    let terms = limited(Limits { cost_per_day: Some(Money(150_000)), ..Limits::default() });
    let (one, secret) = key(&app, "app", terms).await;
    let (limits, store, router) = (Arc::clone(&app.limits), app.store.clone(), router(app));
    let ask_it = completion(json!({"max_tokens": 50}));
    not_at_midnight().await;
    // Three tokens in, eleven out with the end of the turn: 3 × 1000 + 11 × 10,000.
    assert_eq!(send(&router, asking(&secret, "/v1/completions", &ask_it)).await.status, 200);
    let subject = Subject::Key(one.id).to_string();
    let day = tidemill::limits::today();
    let used = limits.ledger().used(&subject, day);
    assert_eq!((used.requests, used.input_tokens, used.output_tokens, used.cost), (1, 3, 11, Money(113_000)));
    assert_eq!(send(&router, asking(&secret, "/v1/completions", &ask_it)).await.status, 200);
    let refused = send(&router, asking(&secret, "/v1/completions", &ask_it)).await;
    assert_eq!(refused.error(), (429, None, Some("insufficient_quota".into())));
    assert_eq!(header(&refused, "x-should-retry"), "false");
    assert!(!refused.headers.contains_key("retry-after"));
    assert_eq!(refused.json()["error"]["type"], "insufficient_quota");

    // Another server on the same database knows; so does this one after a restart.
    limits.ledger().flush().await.unwrap();
    let replica = Arc::new(Limiter::new(store.clone(), Default::default(), Default::default()));
    replica.refresh(Some(&one)).await;
    assert_eq!(replica.ledger().used(&subject, day), limits.ledger().used(&subject, day));
    assert!(replica.glance(&one).0.is_err());
    // Written twice is counted once, and what both spend is one sum.
    limits.ledger().flush().await.unwrap();
    let (meter, _) = replica.admit(None, MODEL, vec![1]);
    drop(meter);
    assert_eq!(store.usage(None, &subject, day).await.unwrap().cost, Money(226_000));
}

#[tokio::test]
async fn a_model_is_limited_over_all_its_callers_and_a_key_by_model() {
    let limits = [(MODEL.to_owned(), Limits { requests_per_minute: Some(3), ..Limits::default() })];
    let app = Setup { limits: limits.into(), ..Setup::default() }.app();
    let one = Limits { requests_per_minute: Some(1), ..Limits::default() };
    let by_model = KeyTerms { model_limits: [(MODEL.to_owned(), one), ("other".to_owned(), one)].into(), ..KeyTerms::default() };
    let (_, narrow) = key(&app, "narrow", by_model).await;
    let (_, wide) = key(&app, "wide", KeyTerms::default()).await;
    let router = router(app);
    assert_eq!(ask(&router, &narrow, &chat(json!({}))).await.status, 200);
    let refused = ask(&router, &narrow, &chat(json!({}))).await;
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("this API key's use of `org/parrot`"));
    assert_eq!(ask(&router, &wide, &chat(json!({}))).await.status, 200);
    assert_eq!(ask(&router, &wide, &chat(json!({}))).await.status, 200);
    let refused = ask(&router, &wide, &chat(json!({}))).await;
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("the model `org/parrot`"));
}

#[tokio::test]
async fn a_key_sees_and_uses_its_models_only() {
    let app = Setup::default().app();
    let (_, secret) = key(&app, "app", KeyTerms { models: Some(vec!["other".into()]), ..KeyTerms::default() }).await;
    let router = router(app);
    for (path, body) in [
        (CHAT, chat(json!({}))),
        ("/v1/completions", completion(json!({}))),
        ("/tokenize", json!({"prompt": "x"})),
        ("/detokenize", json!({"tokens": [65]})),
        ("/v1/responses", json!({"model": MODEL, "input": "x", "truncation": "auto"})),
        ("/v1/responses/input_tokens", json!({"model": MODEL, "input": "x"})),
        // Whether it exists is not this key's business.
        ("/v1/responses", json!({"model": "nobody", "input": "x"})),
    ] {
        let reply = send(&router, asking(&secret, path, &body)).await;
        assert_eq!(reply.error(), (403, Some("model".into()), Some("model_not_allowed".into())), "{path}");
    }
    // Whether a model that it may not use is there, it does not learn either.
    for model in [MODEL, "no/such"] {
        let message = json!([{"role": "user", "content": "x"}]);
        for (path, body) in [
            (CHAT, json!({"messages": message})),
            ("/v1/completions", json!({"prompt": "x"})),
            ("/v1/embeddings", json!({"input": "x"})),
            ("/v1/responses", json!({"input": "x"})),
            ("/v1/responses/input_tokens", json!({"input": "x"})),
            ("/v1/messages", json!({"messages": message, "max_tokens": 1})),
            ("/v1/messages/count_tokens", json!({"messages": message})),
            ("/tokenize", json!({"prompt": "x"})),
            ("/detokenize", json!({"tokens": [65]})),
        ] {
            let reply = send(&router, asking(&secret, path, &merged(json!({"model": model}), body))).await;
            assert_eq!(reply.status.as_u16(), 403, "{path} {model}");
        }
    }
    let get = |path: &str| Request::get(path).header("authorization", format!("Bearer {secret}")).body(Body::empty()).unwrap();
    assert_eq!(send(&router, get("/v1/models")).await.json()["data"], json!([]));
    assert_eq!(send(&router, get("/v1/models/org/parrot")).await.error().0, 403);
}

#[tokio::test]
async fn nobody_gets_a_more_urgent_tier_than_the_key_has() {
    let app = Setup::default().app();
    let mut secrets = Vec::new();
    for tier in Tier::ALL {
        secrets.push(key(&app, tier.as_str(), KeyTerms { tier, ..KeyTerms::default() }).await.1);
    }
    let router = router(app);
    let [first, usual, flex] = secrets.try_into().unwrap();
    for (secret, asked, given) in [
        (&first, "auto", "priority"),
        (&first, "flex", "flex"),
        (&usual, "auto", "default"),
        (&usual, "priority", "default"),
        (&usual, "flex", "flex"),
        (&flex, "auto", "flex"),
        (&flex, "priority", "flex"),
    ] {
        let reply = ask(&router, secret, &chat(json!({"service_tier": asked}))).await;
        assert_eq!(reply.json()["service_tier"], given, "{asked}");
        let reply = ask(&router, secret, &chat(json!({"service_tier": asked, "stream": true}))).await;
        assert!(reply.chunks().iter().all(|chunk| chunk["service_tier"] == given), "{asked}");
    }
}

#[tokio::test]
async fn a_deadline_ends_an_answer_that_is_not_complete() {
    let app = Setup::slow(400, 20).app();
    let router = router(app);
    let with = |milliseconds: &str, body: Value| {
        Request::post(CHAT).header("x-request-timeout-ms", milliseconds).body(Body::from(body.to_string())).unwrap()
    };
    let began = Instant::now();
    let reply = send(&router, with("700", chat(json!({})))).await;
    assert_eq!(reply.error(), (504, None, Some("deadline_exceeded".into())));
    assert_eq!(header(&reply, "x-should-retry"), "false");
    assert!(began.elapsed() >= Duration::from_millis(700), "{:?}", began.elapsed());
    // Long enough for the first token on a machine with other work, and half of what the answer takes.
    let reply = send(&router, with("4000", chat(json!({"stream": true})))).await;
    assert_eq!(reply.status, 200);
    let last: Value = serde_json::from_str(reply.data().last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "deadline_exceeded");
    let reply = send(&router, with("60000", chat(json!({"max_tokens": 2})))).await;
    assert_eq!(reply.status, 200);
}
