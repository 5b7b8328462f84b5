//! `/v1/loops`: where loops stand, and what people want of them.

use crate::clock::now;
use crate::flywheel::{WishRefusal, follow, standing};
use crate::http::answer::{answer, list as list_page};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::query::parameters;
use axum::extract::{Path, RawQuery, State};
use axum::response::Response;
use axum::routing::{MethodRouter, get, post};
use axum::{Extension, Router};
use hyper::StatusCode;
use serde_json::Value;
use std::collections::BTreeSet;
use tidemill_rlhf::flywheel::Wish;

/// Cycles of one answer, unless asked, and most.
pub const CYCLES: u64 = 10;
const MAX_CYCLES: usize = 100;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/loops", get(list))
        .route("/v1/loops/{name}", get(one))
        .route("/v1/loops/{name}/run", wanting(Wish::Run))
        .route("/v1/loops/{name}/pause", wanting(Wish::Pause))
        .route("/v1/loops/{name}/resume", wanting(Wish::Resume))
}

async fn list(State(app): State<App>) -> Result<Response, ApiError> {
    Ok(list_page(all(&app).await?, false))
}

/// All of them, by name, each with its last cycle.
pub async fn all(app: &App) -> Result<Vec<Value>, ApiError> {
    let mut names: BTreeSet<String> = app.loops.policies().keys().cloned().collect();
    names.extend(app.loops.rows().all().await.map_err(unavailable)?.into_iter().map(|row| row.name));
    let mut loops = Vec::with_capacity(names.len());
    for name in names {
        loops.extend(shown(app, &name, 1).await?);
    }
    Ok(loops)
}

/// `GET /v1/loops/{name}?cycles=N`
async fn one(State(app): State<App>, Path(name): Path<String>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let mut cycles = CYCLES;
    for parameter in parameters(query.as_deref(), &["cycles"])? {
        cycles = parameter.number(1..=MAX_CYCLES)? as u64;
    }
    show(&app, &name, cycles).await
}

async fn show(app: &App, name: &str, cycles: u64) -> Result<Response, ApiError> {
    Ok(answer(StatusCode::OK, &find(app, name, cycles).await?))
}

/// The loop of this name with its last cycles.
pub async fn find(app: &App, name: &str, cycles: u64) -> Result<Value, ApiError> {
    let found = shown(app, name, cycles).await?;
    found.ok_or_else(|| refused(WishRefusal::Unknown(name.chars().take(100).collect())))
}

/// With what is in its way at this server.
async fn shown(app: &App, name: &str, cycles: u64) -> Result<Option<Value>, ApiError> {
    let policy = app.loops.policies().get(name);
    let found = standing(&app.store, name, policy, cycles, Some(app.files.place()), now()).await.map_err(unavailable)?;
    Ok(found.map(|mut found| {
        found["problem"] = app.loops.problem(name).into();
        found
    }))
}

/// What somebody wants of a loop.
fn wanting(wish: Wish) -> MethodRouter<App> {
    post(move |app: State<App>, caller: Extension<Caller>, name: Path<String>| want(app, caller, name, wish))
}

async fn want(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    wish: Wish,
) -> Result<Response, ApiError> {
    let configured = app.loops.policies().contains_key(&name);
    follow(app.loops.rows(), &name, configured, wish, &caller.actor(), now()).await.map_err(refused)?;
    app.loops.wake();
    show(&app, &name, CYCLES).await
}

fn refused(error: WishRefusal) -> ApiError {
    let of = |status, code, error: &WishRefusal| ApiError {
        param: Some("name".to_owned()),
        ..ApiError::client(status, Some(code), format!("{error}."))
    };
    match error {
        WishRefusal::Store(error) => unavailable(error),
        WishRefusal::Unknown(_) => of(StatusCode::NOT_FOUND, "loop_not_found", &error),
        WishRefusal::Gone(_) => of(StatusCode::CONFLICT, "not_configured", &error),
        WishRefusal::Wish(_) => of(StatusCode::CONFLICT, "invalid_state", &error),
        WishRefusal::Changing => of(StatusCode::CONFLICT, "changing", &error),
    }
}
