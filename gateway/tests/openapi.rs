//! `/openapi.json` and the router say the same.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking; the lint knows test functions only")]

use crate::support::{Setup, get, send};
use axum::body::Body;
use hyper::{Method, Request, StatusCode};
use std::collections::{BTreeMap, BTreeSet};

/// Paths of a router, which shows them only to people who debug.
fn paths(router: &axum::Router) -> BTreeSet<String> {
    let shown = format!("{router:?}");
    let quoted = shown.split('"').skip(1).step_by(2);
    // What stands for "no route" has a route inside the framework: the root, and everything.
    let own = quoted.filter(|text| text.starts_with('/') && *text != "/" && !text.contains("__private"));
    own.map(str::to_owned).collect()
}

/// What a request to this path is sent to.
fn filled(path: &str) -> String {
    path.split('/').map(|part| if part.starts_with('{') { "x" } else { part }).collect::<Vec<_>>().join("/")
}

#[tokio::test]
async fn every_route_is_in_the_document_and_nothing_else() {
    let router = Setup::default().router();
    let mut served: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in paths(&router) {
        // A method that no route has: the answer names those that it has.
        let request = Request::builder().method(Method::TRACE).uri(filled(&path)).body(Body::empty()).unwrap();
        let reply = send(&router, request).await;
        assert_eq!(reply.status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
        let allowed = reply.headers["allow"].to_str().unwrap().split(',').map(str::to_lowercase);
        let methods = allowed.filter(|method| method != "head").collect();
        served.insert(path.replace("{*", "{"), methods);
    }
    assert!(served.contains_key("/v1/chat/completions"), "{served:?}");

    let document = get(&router, "/openapi.json").await.json();
    let methods = |object: &serde_json::Value| object.as_object().unwrap().keys().cloned().collect();
    let described: BTreeMap<String, BTreeSet<String>> =
        document["paths"].as_object().unwrap().iter().map(|(path, object)| (path.clone(), methods(object))).collect();
    let missing: Vec<_> = served.iter().filter(|(path, methods)| described.get(*path) != Some(methods)).collect();
    let invented: Vec<_> = described.iter().filter(|(path, methods)| served.get(*path) != Some(methods)).collect();
    assert!(missing.is_empty() && invented.is_empty(), "served, but not described so: {missing:?}\ndescribed: {invented:?}");
}
