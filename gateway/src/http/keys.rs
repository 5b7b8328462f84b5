//! `/v1/admin/keys`: what `tidemill key` does, over HTTP.

use crate::http::answer::answer;
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::limits::parse_json;
use crate::keys::{self, KeySpec};
use crate::limits::{Subject, today};
use crate::openai::fields::Fields;
use axum::Router;
use axum::extract::{Path, Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use hyper::StatusCode;
use serde_json::{Value, json};
use std::time::Duration;
use tidemill_store::{ApiKey, KeyTerms, StoreError, Usage};

/// How long the old secret of a rotated key works, unless the request says otherwise.
const OVERLAP: Duration = Duration::from_secs(24 * 3600);
/// Longest overlap, in seconds.
const MAX_OVERLAP: i64 = 366 * 24 * 3600;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/admin/keys", post(create).get(list))
        .route("/v1/admin/keys/{id}", get(one).patch(change).delete(revoke))
        .route("/v1/admin/keys/{id}/rotate", post(rotate))
}

async fn create(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let actor = Caller::of(&request).actor();
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let name = fields.require("name")?;
    let Some(name) = keys::check_name(name.string()?) else {
        return Err(name.invalid("invalid_value", "expected 1 to 100 visible characters that are no id."));
    };
    let spec = KeySpec::parse(&body, &mut fields)?;
    if spec.scopes.is_none() {
        fields.require("scopes")?;
    }
    fields.finish()?;
    let mut terms = KeyTerms::default();
    spec.change_terms(&mut terms);
    let scopes = spec.scopes.unwrap_or_default();
    let made = app.store.create_key_with(name, &scopes, spec.expires.flatten(), terms, actor).await;
    let (key, secret) = made.map_err(failed)?;
    Ok(answer(StatusCode::CREATED, &with_secret(&key, secret)))
}

async fn list(State(app): State<App>) -> Result<Response, ApiError> {
    let keys = app.store.list_keys().await.map_err(failed)?;
    Ok(answer(StatusCode::OK, &json!({"object": "list", "data": keys.iter().map(shown).collect::<Vec<_>>(), "has_more": false})))
}

/// With what it has used today, on all servers.
async fn one(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let keys = app.store.list_keys().await.map_err(failed)?;
    let named = |key: &&ApiKey| key.id.to_string() == id || (key.name == id && key.revoked.is_none());
    let key = keys.iter().find(named).ok_or_else(|| unknown(&id))?;
    app.limits.ledger().flush().await.map_err(failed)?;
    let Usage { requests, input_tokens, cached_tokens, output_tokens, cost } =
        app.store.usage(None, &Subject::Key(key.id).to_string(), today()).await.map_err(failed)?;
    let mut body = shown(key);
    body["usage_today"] = json!({
        "requests": requests, "input_tokens": input_tokens, "cached_tokens": cached_tokens, "output_tokens": output_tokens,
        "cost": cost,
    });
    Ok(answer(StatusCode::OK, &body))
}

async fn change(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let actor = Caller::of(&request).actor();
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let spec = KeySpec::parse(&body, &mut fields)?;
    fields.finish()?;
    let changed = app.store.change_key(&id, |key| spec.change(key), actor).await.map_err(failed)?;
    let key = changed.ok_or_else(|| unknown(&id))?;
    Ok(answer(StatusCode::OK, &shown(&key)))
}

async fn rotate(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let actor = Caller::of(&request).actor();
    let body = app.body.read(request).await?;
    let body = if body.is_empty() { json!({}) } else { parse_json(&body)? };
    let mut fields = Fields::root(&body)?;
    let seconds = fields.integer("overlap_seconds", 0..=MAX_OVERLAP)?.and_then(|seconds| u64::try_from(seconds).ok());
    fields.finish()?;
    let overlap = seconds.map_or(OVERLAP, Duration::from_secs);
    let rotated = app.store.rotate_key(&id, overlap, actor).await.map_err(failed)?;
    let (key, secret) = rotated.ok_or_else(|| unknown(&id))?;
    Ok(answer(StatusCode::OK, &with_secret(&key, secret)))
}

async fn revoke(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let actor = Caller::of(&request).actor();
    let revoked = app.store.revoke_key(&id, actor).await.map_err(failed)?;
    let key = revoked.ok_or_else(|| unknown(&id))?;
    Ok(answer(StatusCode::OK, &shown(&key)))
}

/// The key as the API shows it.
fn shown(key: &ApiKey) -> Value {
    let seconds = |micros: i64| micros.div_euclid(1_000_000);
    let KeyTerms { models, limits, model_limits, tier, weight } = &key.terms;
    json!({
        "object": "api_key",
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "scopes": key.scopes,
        "created_at": seconds(key.created),
        "expires_at": key.expires.map(seconds),
        "revoked_at": key.revoked.map(seconds),
        "models": models,
        "limits": limits,
        "model_limits": model_limits,
        "service_tier": tier,
        "weight": weight,
    })
}

/// The same with the secret, which is shown only once.
fn with_secret(key: &ApiKey, secret: String) -> Value {
    let mut body = shown(key);
    body["key"] = Value::from(secret);
    body
}

fn unknown(id: &str) -> ApiError {
    let shown: String = id.chars().take(100).collect();
    let message = format!("No key in use has the id or name `{shown}`. GET /v1/admin/keys lists them.");
    ApiError::client(StatusCode::NOT_FOUND, Some("not_found"), message)
}

fn failed(error: StoreError) -> ApiError {
    match error {
        StoreError::KeyName(_) => ApiError {
            param: Some("name".into()),
            ..ApiError::client(StatusCode::CONFLICT, Some("name_taken"), format!("{error}."))
        },
        error => unavailable(error),
    }
}
