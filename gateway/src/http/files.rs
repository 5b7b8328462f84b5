//! `/v1/files`: what clients upload, and what batches make.

use crate::clock::now;
use crate::http::answer::{answer, list as list_page};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::generate::enter;
use crate::http::query::{Parameter, parameters};
use crate::http::upload::Upload;
use axum::body::Body;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use hyper::StatusCode;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use serde_json::{Value, json};
use tidemill_store::{FileDraft, FileRecord, Order};
use tokio::io::AsyncReadExt;
use uuid::Uuid;

/// Most files of one list, and the default, as OpenAI has it.
const MAX_LIST: usize = 10_000;
/// An input of a batch is kept for 30 days unless its sender says otherwise.
const BATCH_SECONDS: i64 = 30 * 24 * 3600;
/// What is read from the disk at once.
const CHUNK: usize = 64 * 1024;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/files", post(create).get(list))
        .route("/v1/files/{id}", get(show).delete(delete))
        .route("/v1/files/{id}/content", get(content))
}

async fn create(State(app): State<App>, Extension(caller): Extension<Caller>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let key_id = caller.key_id();
    let upload = Upload::receive(request, &app.files, app.file_limits, app.store.issue_id()).await?;
    let now = now();
    let keep = upload.keep_seconds.or((upload.purpose == "batch").then_some(BATCH_SECONDS));
    let draft = FileDraft {
        key_id,
        filename: upload.filename,
        purpose: upload.purpose.to_owned(),
        expires: keep.map(|seconds| now + seconds * 1_000_000),
    };
    let file = upload.content.finish(draft, now).await.map_err(unavailable)?;
    Ok(answer(StatusCode::OK, &shown(&file)))
}

async fn list(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let (mut purpose, mut last, mut limit, mut order) = (None, None, MAX_LIST, Order::NewestFirst);
    for parameter in parameters(query.as_deref(), &["after", "limit", "order", "purpose"])? {
        match parameter.name.as_ref() {
            "after" => last = Some(after(&parameter, "file-")?),
            "limit" => limit = parameter.number(1..=MAX_LIST)?,
            "order" => order = parameter.one_of(&[("asc", Order::OldestFirst), ("desc", Order::NewestFirst)])?,
            _ => purpose = Some(parameter.value.into_owned()),
        }
    }
    let page = app.files.list(&caller.viewer(), purpose.as_deref(), last, limit, order, now()).await.map_err(unavailable)?;
    Ok(list_page(page.items.iter().map(shown).collect(), page.has_more))
}

async fn show(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    Ok(answer(StatusCode::OK, &shown(&find(&app, &caller, &id, StatusCode::NOT_FOUND, "id").await?)))
}

async fn delete(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let file = find(&app, &caller, &id, StatusCode::NOT_FOUND, "id").await?;
    // Its name is the client's words, and may be a person's.
    let detail = json!({ "purpose": file.purpose, "bytes": file.bytes });
    let act = app.store.act(caller.actor(), "file.delete").to(name(file.id)).with(detail);
    if !app.files.delete(&file, act).await.map_err(unavailable)? {
        let message = format!(
            "The file `{}` is the input of a batch that runs, or of a fine-tuning job that looks through it; cancel that first.",
            name(file.id)
        );
        return Err(ApiError::invalid("id", "file_in_use", message));
    }
    Ok(answer(StatusCode::OK, &json!({ "id": name(file.id), "object": "file", "deleted": true })))
}

async fn content(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let file = find(&app, &caller, &id, StatusCode::NOT_FOUND, "id").await?;
    let open = match here(&app, &file) {
        Ok(()) => tokio::fs::File::open(app.files.path(file.id)).await,
        Err(error) => return Err(error),
    };
    let open = open.map_err(|error| {
        tracing::error!(%error, file = %file.id, "a file's content cannot be opened");
        ApiError::fault("The file's content cannot be read.")
    })?;
    let body = futures_util::stream::try_unfold(open, |mut open| async move {
        let mut data = bytes::BytesMut::with_capacity(CHUNK);
        let read = open.read_buf(&mut data).await.inspect_err(|error| tracing::error!(%error, "a file's content broke off"))?;
        Ok::<_, std::io::Error>((read > 0).then(|| (data.freeze(), open)))
    });
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(file.bytes));
    Ok(response)
}

/// The file that a client names, if it is there for them.
pub async fn find(
    app: &App,
    caller: &Caller,
    text: &str,
    status: StatusCode,
    param: &'static str,
) -> Result<FileRecord, ApiError> {
    let found = match text.strip_prefix("file-").and_then(|id| Uuid::try_parse(id).ok()) {
        Some(id) => app.files.find(id, &caller.viewer(), now()).await.map_err(unavailable)?,
        None => None,
    };
    found.ok_or_else(|| {
        let shown: String = text.chars().take(100).collect();
        let message = format!("No such File object: {shown}. GET /v1/files lists what is there.");
        ApiError { param: Some(param.into()), ..ApiError::client(status, Some("file_not_found"), message) }
    })
}

/// Fails when the content lies in another server's data directory.
pub fn here(app: &App, file: &FileRecord) -> Result<(), ApiError> {
    if file.place == app.files.place() {
        return Ok(());
    }
    let message = "This file's content is on another server of this database; send the request to the one that took it.";
    Err(ApiError::client(StatusCode::CONFLICT, Some("not_here"), message))
}

/// A file's id in the API.
pub fn name(id: Uuid) -> String {
    format!("file-{id}")
}

/// The id behind which a list goes on.
pub fn after(parameter: &Parameter<'_>, prefix: &str) -> Result<Uuid, ApiError> {
    let id = parameter.value.strip_prefix(prefix).and_then(|id| Uuid::try_parse(id).ok());
    id.ok_or_else(|| parameter.invalid("the id of an object of this list"))
}

fn shown(file: &FileRecord) -> Value {
    json!({
        "id": name(file.id),
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created / 1_000_000,
        "expires_at": file.expires.map(|at| at / 1_000_000),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": null,
    })
}
