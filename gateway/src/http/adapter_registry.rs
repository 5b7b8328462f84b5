//! `/v1/adapters` and `/v1/adapter_aliases`: what `tidemill adapter` does, over HTTP. A change is in force for every request that comes
//! to this server after its answer, and on other servers within seconds.

use crate::http::answer::{answer, list as list_page};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::fine_tuning::sees_job;
use crate::http::limits::parse_json;
use crate::http::query::parameters;
use crate::openai::fields::Fields;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use axum::routing::{delete, get, post};
use axum::{Extension, Router};
use hyper::StatusCode;
use serde_json::{Value, json};
use std::path::PathBuf;
use tidemill_engine::AdapterError;
use tidemill_rlhf::registry::{Lineage, Registry, RegistryError};
use tidemill_store::{AdapterFilter, AdapterRefusal, AdapterState, Alias, RegisteredAdapter};
use uuid::Uuid;

/// Most adapters of one answer.
const MAX_LIST: usize = 100;
/// Longest path, base or reference that is taken, in characters.
const MAX_TEXT: usize = 4096;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/adapters", get(list).post(register))
        .route("/v1/adapters/{id}", get(one))
        .route("/v1/adapters/{id}/serve", post(serve))
        .route("/v1/adapters/{id}/retire", post(retire))
        .route("/v1/adapters/{id}/revoke", post(revoke))
        .route("/v1/adapter_aliases", get(aliases).post(alias))
        .route("/v1/adapter_aliases/{*alias}", delete(unalias))
}

/// An adapter as the API shows it; a list leaves the lineage out.
fn shown(app: &App, adapter: &RegisteredAdapter, aliases: &[Alias], whole: bool) -> Value {
    let seconds = |micros: i64| micros.div_euclid(1_000_000);
    let names: Vec<&str> = aliases.iter().filter(|alias| alias.adapter == adapter.id).map(|alias| alias.name.as_str()).collect();
    let mut value = json!({
        "object": "adapter",
        "id": adapter.id,
        "name": adapter.name,
        "generation": format!("{:016x}", adapter.generation),
        "base": adapter.base,
        "state": adapter.state,
        "aliases": names,
        "created_at": seconds(adapter.created),
        "updated_at": seconds(adapter.updated),
        "served_at": adapter.served.map(seconds),
        "base_hash": adapter.base_hash,
        "content_hash": adapter.content_hash,
        "job": adapter.job,
        "metrics": adapter.metrics,
        "tainted": adapter.tainted,
        "problem": app.adapters.problem(adapter.id),
        "files_removed_at": adapter.files_removed.map(seconds),
    });
    if whole {
        value["lineage"] = adapter.lineage.clone();
    }
    value
}

async fn show(app: &App, adapter: &RegisteredAdapter) -> Result<Value, ApiError> {
    let aliases = app.adapters.registry().aliases().await.map_err(unavailable)?;
    Ok(shown(app, adapter, &aliases, true))
}

/// `GET /v1/adapters?base=…&name=…&state=…&after=ID&limit=N`, the newest first.
async fn list(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let mut filter = AdapterFilter { limit: Some(20), ..AdapterFilter::default() };
    for parameter in parameters(query.as_deref(), &["base", "name", "state", "after", "limit"])? {
        match parameter.name.as_ref() {
            "base" => filter.base = Some(parameter.value.into_owned()),
            "name" => filter.name = Some(parameter.value.into_owned()),
            "state" => filter.state = Some(parameter.one_of(&AdapterState::ALL.map(|state| (state.as_str(), state)))?),
            "after" => filter.before = Some(parameter.parse::<Uuid>("the id of an adapter")?),
            _ => filter.limit = Some(parameter.number(1..=MAX_LIST)?),
        }
    }
    let page = app.adapters.registry().list(&filter).await.map_err(unavailable)?;
    let aliases = app.adapters.registry().aliases().await.map_err(unavailable)?;
    Ok(list_page(page.items.iter().map(|adapter| shown(&app, adapter, &aliases, false)).collect(), page.has_more))
}

/// `GET /v1/adapters/{id}`: an id, `NAME`, `NAME@GENERATION` or an alias.
async fn one(State(app): State<App>, Extension(caller): Extension<Caller>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let adapter = app.adapters.registry().get(&id).await.map_err(|error| refused("id", error))?;
    let mut shown = show(&app, &adapter).await?;
    // How a job of another key trains, its graders among it, is as much theirs as the job is.
    if let Some(job) = &adapter.job
        && !sees_job(&app, &caller, job).await?
    {
        shown["lineage"] = Value::Null;
    }
    Ok(answer(StatusCode::OK, &shown))
}

/// `POST /v1/adapters`: from a folder of the server's machine.
async fn register(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let registry = acting(&app, &request);
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let name = fields.require("name")?.short_string(100)?.to_owned();
    let path = PathBuf::from(fields.require("path")?.short_string(MAX_TEXT)?);
    let base = fields.string("base_model_name")?;
    let mut text = |key: &'static str| fields.get(key).map(|field| field.short_string(MAX_TEXT).map(str::to_owned)).transpose();
    let (snapshot, parent, code_version) = (text("dataset")?, text("parent")?, text("code_version")?);
    let mut object = |key: &'static str| fields.get(key).map(|field| field.map().cloned().map(Value::Object)).transpose();
    let (config, metrics) = (object("config")?, object("metrics")?);
    fields.finish()?;
    let model = app.registry.find_local_base(base)?;
    let plain = Lineage::new(name, app.adapters.base(&model).await);
    let lineage = Lineage {
        snapshot,
        parent,
        config: config.unwrap_or_default(),
        metrics: metrics.unwrap_or_else(|| plain.metrics.clone()),
        code_version: code_version.unwrap_or_else(|| "unknown".to_owned()),
        ..plain
    };
    let made = registry.register(&path, lineage).await.map_err(|error| refused("path", error))?;
    Ok(answer(StatusCode::CREATED, &show(&app, &made).await?))
}

async fn serve(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let registry = acting(&app, &request);
    let body = app.body.read(request).await?;
    let body = if body.is_empty() { json!({}) } else { parse_json(&body)? };
    let mut fields = Fields::root(&body)?;
    let though_tainted = fields.bool_or("though_tainted", false)?;
    fields.finish()?;
    let (adapter, _) = registry.serve(&id, though_tainted).await.map_err(|error| refused("id", error))?;
    app.adapters.try_again(adapter.id);
    changed(&app, &adapter).await
}

async fn retire(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let adapter = acting(&app, &request).retire(&id).await.map_err(|error| refused("id", error))?;
    changed(&app, &adapter).await
}

async fn revoke(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let (adapter, _) = acting(&app, &request).revoke(&id).await.map_err(|error| refused("id", error))?;
    changed(&app, &adapter).await
}

/// An alias as the API shows it.
fn shown_alias(alias: &Alias) -> Value {
    json!({
        "object": "adapter.alias",
        "alias": alias.name,
        "base": alias.base,
        "adapter": alias.adapter,
        "updated_at": alias.updated.div_euclid(1_000_000),
    })
}

async fn aliases(State(app): State<App>) -> Result<Response, ApiError> {
    let aliases = app.adapters.registry().aliases().await.map_err(unavailable)?;
    Ok(list_page(aliases.iter().map(shown_alias).collect(), false))
}

/// `POST /v1/adapter_aliases`: leads an alias to an adapter, in one step for whoever asks for it.
async fn alias(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let registry = acting(&app, &request);
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let alias = fields.require("alias")?.string()?;
    let adapter = fields.require("adapter")?.short_string(MAX_TEXT)?;
    fields.finish()?;
    if app.registry.states().any(|(served, _)| served == alias) {
        let message = format!("Invalid 'alias': `{alias}` is the name of a model that is served here; choose another.");
        return Err(ApiError::invalid("alias", "name_taken", message));
    }
    let (adapter, _) = registry.alias(alias, adapter).await.map_err(|error| refused("adapter", error))?;
    changed(&app, &adapter).await
}

/// `DELETE /v1/adapter_aliases/{alias}?base=…`
async fn unalias(
    State(app): State<App>,
    Path(alias): Path<String>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, ApiError> {
    let parameters = parameters(query.as_deref(), &["base"])?;
    let base = parameters.first().map(|base| base.value.as_ref());
    let gone = acting(&app, &request).unalias(&alias, base).await.map_err(|error| refused("alias", error))?;
    follow(&app).await;
    Ok(answer(StatusCode::OK, &shown_alias(&gone)))
}

fn acting(app: &App, request: &Request) -> Registry {
    app.adapters.registry().acting_as(Caller::of(request).actor())
}

/// Puts a change into force, and shows the adapter.
async fn changed(app: &App, adapter: &RegisteredAdapter) -> Result<Response, ApiError> {
    follow(app).await;
    Ok(answer(StatusCode::OK, &show(app, adapter).await?))
}

async fn follow(app: &App) {
    // The change is made; where the store cannot be read now, it is in force as soon as that can be.
    if let Err(error) = app.adapters.follow().await {
        tracing::warn!(%error, "a change of adapters is not in force yet");
    }
}

/// `param` is the field that named the adapter or its files.
pub fn refused(param: &'static str, error: RegistryError) -> ApiError {
    let of = |param: &str, code: &'static str, status: StatusCode, error: &dyn std::fmt::Display| ApiError {
        param: Some(param.to_owned()),
        ..ApiError::client(status, Some(code), format!("{error}."))
    };
    let conflict = |code, error: &dyn std::fmt::Display| of(param, code, StatusCode::CONFLICT, error);
    match error {
        RegistryError::Store(error) | RegistryError::Refused(AdapterRefusal::Store(error)) => unavailable(error),
        RegistryError::Refused(error) => match &error {
            AdapterRefusal::Unknown(_) => of(param, "adapter_not_found", StatusCode::NOT_FOUND, &error),
            AdapterRefusal::NoAlias(_) => of("alias", "alias_not_found", StatusCode::NOT_FOUND, &error),
            AdapterRefusal::NameTaken { .. } => conflict("name_taken", &error),
            AdapterRefusal::Revoked(_) => conflict("adapter_revoked", &error),
            AdapterRefusal::Tainted(_) => conflict("adapter_tainted", &error),
            AdapterRefusal::Aliased { .. } => conflict("adapter_aliased", &error),
            AdapterRefusal::NotServed { .. } => conflict("adapter_not_served", &error),
            AdapterRefusal::FilesRemoved(_) => conflict("adapter_files_removed", &error),
            AdapterRefusal::InUse { .. } | AdapterRefusal::Changed(_) => conflict("adapter_in_use", &error),
            AdapterRefusal::Folder { .. } => {
                tracing::error!(%error, "the adapters' folder failed");
                ApiError::fault("The server could not read or write its adapters.")
            }
            AdapterRefusal::Store(_) => ApiError::fault("The server could not read or write its records."),
        },
        RegistryError::Files(error) => match &error {
            // A registered adapter's files are the server's affair, a folder that a request names is the request's.
            _ if param != "path" => conflict("adapter_damaged", &error),
            AdapterError::Folder { .. } => of(param, "adapter_not_found", StatusCode::NOT_FOUND, &error),
            _ => of(param, "invalid_adapter", StatusCode::BAD_REQUEST, &error),
        },
        RegistryError::Changed { .. } => conflict("adapter_damaged", &error),
        RegistryError::OtherBase { .. } => conflict("other_base", &error),
        RegistryError::Name(_) => of("name", "invalid_value", StatusCode::BAD_REQUEST, &error),
        RegistryError::Alias(_) => of("alias", "invalid_value", StatusCode::BAD_REQUEST, &error),
        RegistryError::NotFound(_) if param == "path" => of("parent", "adapter_not_found", StatusCode::NOT_FOUND, &error),
        RegistryError::NotFound(_) => of(param, "adapter_not_found", StatusCode::NOT_FOUND, &error),
        RegistryError::Ambiguous { .. } => of(param, "ambiguous", StatusCode::BAD_REQUEST, &error),
        RegistryError::Dataset(_) => of("dataset", "dataset_not_found", StatusCode::NOT_FOUND, &error),
        RegistryError::Folder { .. } | RegistryError::Exists(_) | RegistryError::Interrupted => {
            tracing::error!(%error, "the adapters' folder failed");
            ApiError::fault("The server could not read or write its adapters.")
        }
    }
}
