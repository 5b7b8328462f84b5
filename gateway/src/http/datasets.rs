//! `/v1/datasets`: building snapshots, and reading them.

use crate::datasets::{self, Refused};
use crate::http::app::App;
use crate::http::auth::{Caller, require};
use crate::http::error::ApiError;
use crate::http::generate::json as json_bytes;
use crate::http::query::{number, parameters};
use axum::body::Body;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tidemill_rlhf::dataset::format::{self, Format, Selection};
use tidemill_rlhf::dataset::query::{RowKind, time};
use tidemill_rlhf::dataset::{DatasetError, Query};
use tidemill_rlhf::quality::{QualityOptions, Split};
use tidemill_store::{Job, JobState, Scope, Snapshot};
use uuid::Uuid;

/// Most rows of one answer.
const MAX_ROWS: usize = 1000;
/// Most snapshots of one answer.
const MAX_LIST: usize = 100;

/// The routes, which need a key of scope `train`.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/datasets", post(build).get(list))
        .route("/v1/datasets/builds/{id}", get(job))
        .route("/v1/datasets/builds/{id}/cancel", post(cancel))
        .route("/v1/datasets/{reference}", get(show))
        .route("/v1/datasets/{reference}/rows", get(rows))
        .route("/v1/datasets/{reference}/report", get(report))
        .route("/v1/datasets/{reference}/export", get(export))
        .route_layer(require(Scope::Train))
}

impl From<DatasetError> for ApiError {
    fn from(error: DatasetError) -> Self {
        match &error {
            DatasetError::NotFound(_) => Self::client(
                StatusCode::NOT_FOUND,
                Some("dataset_not_found"),
                "There is no such dataset. GET /v1/datasets lists them.",
            ),
            DatasetError::Query(invalid) => Self::invalid(format!("query.{}", invalid.field), "invalid_value", error.to_string()),
            DatasetError::Name(_) => Self::invalid("name", "invalid_value", error.to_string()),
            DatasetError::Store(_) => {
                tracing::error!(%error, "cannot reach the datasets' rows");
                Self::unavailable(Some("database_unavailable"), "The database does not answer; send the request again.", 2)
            }
            _ => {
                tracing::error!(%error, "a dataset cannot be read");
                Self::fault(format!("The dataset cannot be read: {}", datasets::public(&error)))
            }
        }
    }
}

fn answer(status: StatusCode, value: &Value) -> Response {
    let mut response = json_bytes(Bytes::from(value.to_string()));
    *response.status_mut() = status;
    response
}

async fn build(State(app): State<App>, Extension(caller): Extension<Caller>, request: Request) -> Result<Response, ApiError> {
    let body = app.body.read(request).await?;
    let mut body: Map<String, Value> = serde_json::from_slice(&body)
        .map_err(|error| ApiError::bad_request(format!("The request body is no JSON object: {error}")))?;
    let name = match body.remove("name") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(ApiError::invalid("name", "invalid_type", "'name' must be a string.")),
        None => {
            return Err(ApiError::invalid(
                "name",
                "missing_required_parameter",
                "'name' is missing: what the dataset is called.",
            ));
        }
    };
    let mut query = match body.remove("query") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(query)) => query,
        Some(_) => return Err(ApiError::invalid("query", "invalid_type", "'query' must be an object.")),
    };
    if let Some(key) = body.keys().next() {
        let shown: String = key.chars().take(100).collect();
        return Err(ApiError::invalid(shown, "unknown_parameter", "Only 'name' and 'query' are known here."));
    }
    for key in ["since", "until"] {
        if let Some(Value::String(text)) = query.get(key) {
            let at =
                time(text, datasets::now()).map_err(|why| ApiError::invalid(format!("query.{key}"), "invalid_value", why))?;
            query.insert(key.to_owned(), json!(at));
        }
    }
    let query: Query = serde_json::from_value(Value::Object(query))
        .map_err(|error| ApiError::invalid("query", "invalid_value", format!("'query' cannot be read: {error}.")))?;
    query.check().map_err(DatasetError::from)?;
    app.datasets.datasets().check_name(&name)?;
    let started = app.datasets.start(name.clone(), query, QualityOptions::default()).await;
    let job = started.map_err(|error| match error {
        Refused::Full => ApiError::unavailable(Some("queue_full"), error.to_string(), 10),
        Refused::Closing => ApiError::unavailable(Some("draining"), error.to_string(), 5),
        Refused::Store(error) => DatasetError::Store(error).into(),
    })?;
    let actor = caller.key_id().unwrap_or_else(|| "anyone".to_owned());
    if let Err(error) = app.store.audit(&actor, "dataset.build", &name, json!({ "job": job.id })).await {
        tracing::warn!(%error, "cannot write to the audit");
    }
    Ok(answer(StatusCode::ACCEPTED, &shown_job(&job)))
}

fn shown_job(job: &Job) -> Value {
    json!({
        "id": job.id,
        "object": "dataset.build",
        "created": job.created / 1_000_000,
        "status": job.state,
        "name": job.spec["name"],
        "query": job.spec["query"],
        "dataset": job.progress.get("dataset"),
        "verdict": job.progress.get("verdict"),
        "progress": if job.state == JobState::Running { job.progress.clone() } else { Value::Null },
        "error": job.error,
    })
}

fn missing_job() -> ApiError {
    ApiError::client(StatusCode::NOT_FOUND, Some("build_not_found"), "There is no dataset build of this id.")
}

async fn job(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let id: Uuid = id.parse().map_err(|_| missing_job())?;
    let job = app.datasets.find(id).await.map_err(DatasetError::from)?.ok_or_else(missing_job)?;
    Ok(answer(StatusCode::OK, &shown_job(&job)))
}

async fn cancel(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let id: Uuid = id.parse().map_err(|_| missing_job())?;
    let job = app.datasets.find(id).await.map_err(DatasetError::from)?.ok_or_else(missing_job)?;
    if !job.state.ended() && !app.datasets.cancel(id) {
        let message = "Another server runs this build; send the request to that one.";
        return Err(ApiError::client(StatusCode::CONFLICT, Some("not_here"), message));
    }
    Ok(answer(StatusCode::OK, &shown_job(&job)))
}

/// A snapshot as the API shows it; a list leaves the report's checks out.
fn shown(snapshot: &Snapshot, whole: bool) -> Value {
    let mut value = json!({
        "id": format!("{}@{}", snapshot.name, snapshot.version),
        "object": "dataset",
        "name": snapshot.name,
        "version": snapshot.version,
        "created": snapshot.created / 1_000_000,
        "content_hash": snapshot.content_hash,
        "location": snapshot.location,
        "table_version": snapshot.table_version,
        "counts": snapshot.row_counts,
        "verdict": snapshot.verdict,
        "tainted": snapshot.tainted,
        "query": snapshot.query,
    });
    if whole {
        value["report"] = snapshot.report.clone();
    }
    value
}

fn choice<T: DeserializeOwned>(parameters: &Map<String, Value>, key: &'static str, choices: &str) -> Result<Option<T>, ApiError> {
    match parameters.get(key) {
        None => Ok(None),
        Some(value) => serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|_| ApiError::invalid(key, "invalid_value", format!("'{key}' must be one of {choices}."))),
    }
}

async fn list(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let parameters = parameters(query, &["name", "after", "limit"])?;
    let limit = number(&parameters, "limit", 20, MAX_LIST)?.max(1);
    let name = parameters.get("name").and_then(Value::as_str);
    let before = match parameters.get("after").and_then(Value::as_str) {
        None => None,
        Some(reference) => Some(app.datasets.datasets().find(reference).await?.id),
    };
    let mut found = app.datasets.datasets().list(name, before, limit + 1).await?;
    let has_more = found.len() > limit;
    found.truncate(limit);
    let data: Vec<Value> = found.iter().map(|snapshot| shown(snapshot, false)).collect();
    let id = |value: Option<&Value>| value.map(|value| value["id"].clone());
    let (first_id, last_id) = (id(data.first()), id(data.last()));
    let body = json!({ "object": "list", "data": data, "first_id": first_id, "last_id": last_id, "has_more": has_more });
    Ok(answer(StatusCode::OK, &body))
}

async fn show(State(app): State<App>, Path(reference): Path<String>) -> Result<Response, ApiError> {
    let snapshot = app.datasets.datasets().find(&reference).await?;
    Ok(answer(StatusCode::OK, &shown(&snapshot, true)))
}

async fn rows(State(app): State<App>, Path(reference): Path<String>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let parameters = parameters(query, &["offset", "limit", "kind", "split"])?;
    let offset = number(&parameters, "offset", 0, usize::MAX)?;
    let limit = number(&parameters, "limit", 20, MAX_ROWS)?;
    let (kind, split) = selection(&parameters)?;
    let snapshot = app.datasets.datasets().find(&reference).await?;
    let mut stream = app.datasets.datasets().rows(&snapshot).await?;
    let (mut data, mut seen, mut has_more) = (Vec::new(), 0, false);
    'all: while let Some(rows) = stream.next_rows().await? {
        for row in rows {
            if kind.is_some_and(|kind| kind != row.kind()) || split.is_some_and(|split| split != row.split) {
                continue;
            }
            if data.len() == limit {
                has_more = true;
                break 'all;
            }
            if seen >= offset {
                data.push(json!(row));
            }
            seen += 1;
        }
    }
    Ok(answer(StatusCode::OK, &json!({ "object": "list", "data": data, "offset": offset, "has_more": has_more })))
}

fn selection(parameters: &Map<String, Value>) -> Result<(Option<RowKind>, Option<Split>), ApiError> {
    let kind = choice(parameters, "kind", "preference, unpaired, demonstration")?;
    Ok((kind, choice(parameters, "split", "train, held_out")?))
}

async fn report(State(app): State<App>, Path(reference): Path<String>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let parameters = parameters(query, &["format"])?;
    let page = match parameters.get("format").and_then(Value::as_str) {
        None | Some("json") => false,
        Some("html") => true,
        Some(_) => return Err(ApiError::invalid("format", "invalid_value", "'format' must be one of json, html.")),
    };
    let snapshot = app.datasets.datasets().find(&reference).await?;
    let bytes = app.datasets.datasets().report(&snapshot, page).await?;
    let mut response = json_bytes(Bytes::from(bytes));
    if page {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    }
    Ok(response)
}

async fn export(State(app): State<App>, Path(reference): Path<String>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let parameters = parameters(query, &["format", "kind", "split"])?;
    let format: Format = choice(&parameters, "format", "trl, openai, tidemill")?.unwrap_or_default();
    let (kind, split) = selection(&parameters)?;
    let snapshot = app.datasets.datasets().find(&reference).await?;
    if snapshot.tainted.is_some() {
        let message = "This snapshot holds rows of a person who was erased since; build the dataset again.";
        return Err(ApiError::client(StatusCode::GONE, Some("dataset_tainted"), message));
    }
    let several = snapshot.row_counts["kinds"].as_object().is_some_and(|kinds| kinds.len() > 1);
    if kind.is_none() && several && format != Format::Tidemill {
        let message = "This dataset has rows of several kinds, which trainers want in files of their own: say 'kind'.";
        return Err(ApiError::invalid("kind", "missing_required_parameter", message));
    }
    let selection = Selection { kind, split, dropped: false };
    let stream = app.datasets.datasets().rows(&snapshot).await?;
    let body = futures_util::stream::try_unfold(stream, move |mut stream| async move {
        let next = stream.next_rows().await.inspect_err(|error| tracing::error!(%error, "an export broke off"))?;
        Ok::<_, DatasetError>(next.map(|rows| (Bytes::from(format::lines(&rows, selection, format).bytes), stream)))
    });
    let mut response = Body::from_stream(body).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
    Ok(response)
}
