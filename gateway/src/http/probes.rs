//! `/health`, `/ready`, `/version`, `/metrics`, `/openapi.json`.

use crate::http::answer::{answer, json};
use crate::http::app::App;
use crate::http::error::ApiError;
use crate::openapi;
use crate::upstream::{LoadState, Upstream};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde_json::json;
use std::sync::LazyLock;
use tidemill_engine::Health;

/// Alive: the process answers. An engine that died is not alive any more; only a restart brings it back.
pub async fn health(State(app): State<App>) -> Result<Response, ApiError> {
    for model in app.registry.local() {
        if let Health::Stopped(why) = model.engine().health() {
            return Err(ApiError::unavailable(
                Some("engine_stopped"),
                format!("The engine of `{}` has stopped: {why}", model.name()),
                5,
            ));
        }
    }
    Ok(json(Bytes::from_static(b"{\"status\":\"ok\"}")))
}

/// The models, and what each is: `loading`, `ready`, `short_of_memory`, `draining` or `stopped`.
pub fn states(app: &App) -> impl Iterator<Item = (&str, &'static str)> {
    app.registry.states().map(|(name, state)| {
        let state = match state {
            LoadState::Loading => "loading",
            LoadState::Ready(Upstream::Local(model)) => match model.engine().health() {
                Health::Ready => "ready",
                Health::Short(_) => "short_of_memory",
                Health::Draining => "draining",
                Health::Stopped(_) => "stopped",
            },
            // Whether the other server is there shows with each request, and is no reason to restart this one.
            LoadState::Ready(Upstream::Remote(_)) => "ready",
        };
        (name, state)
    })
}

/// Ready for requests: 503 while weights load, while draining and while a card is short of memory.
pub async fn ready(State(app): State<App>) -> Response {
    let models: serde_json::Map<_, _> = states(&app).map(|(name, state)| (name.to_owned(), state.into())).collect();
    let status = if app.drain.is_draining() {
        "draining"
    } else if models.values().any(|state| state == "loading") {
        "loading"
    } else if models.values().all(|state| state == "ready") {
        "ready"
    } else if models.values().all(|state| state == "ready" || state == "short_of_memory") {
        "short_of_memory"
    } else {
        "stopped"
    };
    let code = if status == "ready" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    answer(code, &json!({"status": status, "models": models}))
}

/// The server's version.
pub async fn version() -> Response {
    json(Bytes::from_static(concat!("{\"version\":\"", env!("CARGO_PKG_VERSION"), "\"}").as_bytes()))
}

/// Prometheus text.
pub async fn metrics(State(app): State<App>) -> Result<Response, ApiError> {
    let Some(handle) = &app.metrics else { return Err(ApiError::fault("This server runs without metrics.")) };
    handle.run_upkeep();
    let mut response = (handle.render() + &app.fine_tuning.gauges() + &app.loops.gauges()).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    Ok(response)
}

/// The API's description.
pub async fn description() -> Response {
    static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(openapi::document().to_string()));
    json(DOCUMENT.clone())
}
