//! `/v1/datasets`: building snapshots, and reading them.

use crate::clock::now;
use crate::datasets::{self, Refused};
use crate::http::answer::{answer, json as json_bytes, list as list_page};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::limits::off_path_waiting;
use crate::http::query::parameters;
use crate::openai::fields::Fields;
use axum::body::Body;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde_json::{Value, json};
use tidemill_rlhf::dataset::format::{self, Format, Selection};
use tidemill_rlhf::dataset::query::{RowKind, time};
use tidemill_rlhf::dataset::{DatasetError, Query};
use tidemill_rlhf::quality::{QualityOptions, Split};
use tidemill_store::{Job, JobState, Snapshot};
use uuid::Uuid;

const KINDS: [(&str, RowKind); 3] =
    [("preference", RowKind::Preference), ("unpaired", RowKind::Unpaired), ("demonstration", RowKind::Demonstration)];
const SPLITS: [(&str, Split); 2] = [("train", Split::Train), ("held_out", Split::HeldOut)];
const FORMATS: [(&str, Format); 3] = [("trl", Format::Trl), ("openai", Format::Openai), ("tidemill", Format::Tidemill)];
/// Most rows of one answer.
const MAX_ROWS: usize = 1000;
/// Most snapshots of one answer.
const MAX_LIST: usize = 100;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/datasets", post(build).get(list))
        .route("/v1/datasets/builds/{id}", get(job))
        .route("/v1/datasets/builds/{id}/cancel", post(cancel))
        .route("/v1/datasets/{reference}", get(show))
        .route("/v1/datasets/{reference}/rows", get(rows))
        .route("/v1/datasets/{reference}/report", get(report))
        .route("/v1/datasets/{reference}/export", get(export))
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

async fn build(State(app): State<App>, Extension(caller): Extension<Caller>, request: Request) -> Result<Response, ApiError> {
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let name = fields.require("name")?.string()?.to_owned();
    let mut query = fields.get("query").map(|field| field.map().cloned()).transpose()?.unwrap_or_default();
    fields.finish()?;
    for key in ["since", "until"] {
        if let Some(Value::String(text)) = query.get(key) {
            let at = time(text, now()).map_err(|why| ApiError::invalid(format!("query.{key}"), "invalid_value", why))?;
            query.insert(key.to_owned(), json!(at));
        }
    }
    let query: Query = serde_json::from_value(Value::Object(query))
        .map_err(|error| ApiError::invalid("query", "invalid_value", format!("'query' cannot be read: {error}.")))?;
    query.check().map_err(DatasetError::from)?;
    app.datasets.datasets().check_name(&name)?;
    let started = app.datasets.start(name, query, QualityOptions::default(), caller.actor()).await;
    let job = started.map_err(|error| match error {
        Refused::Full => ApiError::unavailable(Some("queue_full"), error.to_string(), 10),
        Refused::Closing => ApiError::unavailable(Some("draining"), error.to_string(), 5),
        Refused::Store(error) => DatasetError::Store(error).into(),
    })?;
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

async fn cancel(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let id: Uuid = id.parse().map_err(|_| missing_job())?;
    let job = app.datasets.find(id).await.map_err(DatasetError::from)?.ok_or_else(missing_job)?;
    if !job.state.ended() {
        if !app.datasets.cancel(id) {
            let message = "Another server runs this build; send the request to that one.";
            return Err(ApiError::client(StatusCode::CONFLICT, Some("not_here"), message));
        }
        let name = job.spec["name"].as_str().unwrap_or_default();
        app.store.audit(caller.actor(), "dataset.cancel", name, json!({ "job": id })).await.map_err(DatasetError::from)?;
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

async fn list(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let (mut name, mut before, mut limit) = (None, None, 20);
    for parameter in parameters(query.as_deref(), &["name", "after", "limit"])? {
        match parameter.name.as_ref() {
            "name" => name = Some(parameter.value.into_owned()),
            "after" => before = Some(app.datasets.datasets().find(&parameter.value).await?.id),
            _ => limit = parameter.number(1..=MAX_LIST)?,
        }
    }
    let mut found = app.datasets.datasets().list(name.as_deref(), before, limit + 1).await?;
    let has_more = found.len() > limit;
    found.truncate(limit);
    let data: Vec<Value> = found.iter().map(|snapshot| shown(snapshot, false)).collect();
    Ok(list_page(data, has_more))
}

async fn show(State(app): State<App>, Path(reference): Path<String>) -> Result<Response, ApiError> {
    let snapshot = app.datasets.datasets().find(&reference).await?;
    Ok(answer(StatusCode::OK, &shown(&snapshot, true)))
}

async fn rows(State(app): State<App>, Path(reference): Path<String>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let (mut offset, mut limit, mut kind, mut split) = (0, 20, None, None);
    for parameter in parameters(query.as_deref(), &["offset", "limit", "kind", "split"])? {
        match parameter.name.as_ref() {
            "offset" => offset = parameter.number(0..=usize::MAX)?,
            "limit" => limit = parameter.number(0..=MAX_ROWS)?,
            "kind" => kind = Some(parameter.one_of(&KINDS)?),
            _ => split = Some(parameter.one_of(&SPLITS)?),
        }
    }
    let datasets = app.datasets.datasets().clone();
    let reading = off_path_waiting(async move {
        let snapshot = datasets.find(&reference).await?;
        let mut stream = datasets.rows(&snapshot).await?;
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
        Ok::<_, DatasetError>((data, has_more))
    });
    let (data, has_more) = reading.await??;
    Ok(answer(StatusCode::OK, &json!({ "object": "list", "data": data, "offset": offset, "has_more": has_more })))
}

async fn report(State(app): State<App>, Path(reference): Path<String>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let mut page = false;
    for parameter in parameters(query.as_deref(), &["format"])? {
        page = parameter.one_of(&[("json", false), ("html", true)])?;
    }
    let datasets = app.datasets.datasets().clone();
    let reading = off_path_waiting(async move { datasets.report(&datasets.find(&reference).await?, page).await });
    let mut response = json_bytes(Bytes::from(reading.await??));
    if page {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    }
    Ok(response)
}

async fn export(State(app): State<App>, Path(reference): Path<String>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let (mut format, mut kind, mut split) = (Format::default(), None, None);
    for parameter in parameters(query.as_deref(), &["format", "kind", "split"])? {
        match parameter.name.as_ref() {
            "format" => format = parameter.one_of(&FORMATS)?,
            "kind" => kind = Some(parameter.one_of(&KINDS)?),
            _ => split = Some(parameter.one_of(&SPLITS)?),
        }
    }
    let datasets = app.datasets.datasets().clone();
    let snapshot = datasets.find(&reference).await?;
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
    let stream = off_path_waiting(async move { datasets.rows(&snapshot).await }).await??;
    let body = futures_util::stream::try_unfold(stream, move |mut stream| async move {
        let reading = off_path_waiting(async move {
            let next = stream.next_rows().await.inspect_err(|error| tracing::error!(%error, "an export broke off"))?;
            Ok::<_, DatasetError>(next.map(|rows| (Bytes::from(format::lines(&rows, selection, format).bytes), stream)))
        });
        reading.await.map_err(|error| std::io::Error::other(error.message))?.map_err(std::io::Error::other)
    });
    let mut response = Body::from_stream(body).into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
    Ok(response)
}
