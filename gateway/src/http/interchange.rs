//! `/v1/labeling/queues/{queue}/label-studio/…` and `…/argilla/…`: queues in other people's tools.
//!
//! Exports hand out a whole queue and need `train`, as all that operators of queues do. Webhooks and imports speak in the name of
//! raters and set gold verdicts; they need `feedback`, which annotators' keys do not have.

use crate::clock::now;
use crate::http::answer::{answer, json};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::labeling::TaskPage;
use crate::http::limits::off_path;
use crate::http::query::parameters;
use crate::interchange::label_studio::{self, Event};
use crate::interchange::{Format, Summary, take};
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{StatusCode, Uri};
use serde_json::{Value, json};
use tidemill_store::label::{Labels, Queue};

/// Says where the next page begins; absent on the last.
const NEXT: HeaderName = HeaderName::from_static("x-next-after");
const PAGE: u32 = 1000;
const MOST: u32 = 10_000;

/// The routes.
pub fn routes() -> Router<App> {
    const QUEUE: &str = "/v1/labeling/queues/{queue}";
    Router::new()
        .route(&format!("{QUEUE}/label-studio/config"), get(label_studio_config))
        .route(&format!("{QUEUE}/label-studio/project"), get(label_studio_project))
        .route(&format!("{QUEUE}/label-studio/tasks"), get(label_studio_tasks))
        .route(&format!("{QUEUE}/argilla/settings"), get(argilla_settings))
        .route(&format!("{QUEUE}/argilla/records"), get(argilla_records))
        .route(&format!("{QUEUE}/label-studio/import"), post(label_studio_import))
        .route(&format!("{QUEUE}/label-studio/webhook"), post(label_studio_webhook))
        .route(&format!("{QUEUE}/argilla/import"), post(argilla_import))
}

async fn label_studio_config(State(app): State<App>, Path(queue): Path<String>) -> Result<Response, ApiError> {
    find(&app, &queue).await?;
    let mut response = label_studio::CONFIG.into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/xml"));
    Ok(response)
}

async fn label_studio_project(State(app): State<App>, Path(queue): Path<String>) -> Result<Response, ApiError> {
    Ok(answer(StatusCode::OK, &Format::LabelStudio.project(&find(&app, &queue).await?.1)))
}

async fn argilla_settings(State(app): State<App>, Path(queue): Path<String>) -> Result<Response, ApiError> {
    Ok(answer(StatusCode::OK, &Format::Argilla.project(&find(&app, &queue).await?.1)))
}

async fn label_studio_tasks(State(app): State<App>, Path(queue): Path<String>, uri: Uri) -> Result<Response, ApiError> {
    tasks(&app, &queue, &uri, Format::LabelStudio).await
}

async fn argilla_records(State(app): State<App>, Path(queue): Path<String>, uri: Uri) -> Result<Response, ApiError> {
    tasks(&app, &queue, &uri, Format::Argilla).await
}

async fn label_studio_import(
    State(app): State<App>,
    Path(queue): Path<String>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    import(&app, &queue, &caller, request, Format::LabelStudio).await
}

async fn argilla_import(
    State(app): State<App>,
    Path(queue): Path<String>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    import(&app, &queue, &caller, request, Format::Argilla).await
}

/// A page of tasks, in a form that the tool imports as it is.
async fn tasks(app: &App, queue: &str, uri: &Uri, format: Format) -> Result<Response, ApiError> {
    let page = TaskPage::of(uri.query(), PAGE, MOST)?;
    let (labels, queue) = find(app, queue).await?;
    let (tasks, more) = page.fetch(&labels, &queue).await?;
    let next = tasks.last().filter(|_| more).map(|task| task.id);
    let body = off_path(tasks.len() > 10, move || {
        let exported: Vec<Value> = tasks.iter().map(|task| format.task(&queue, task)).collect();
        Value::Array(exported).to_string()
    });
    let mut response = json(Bytes::from(body.await?));
    if let Some(value) = next.and_then(|id| HeaderValue::from_str(&id.to_string()).ok()) {
        response.headers_mut().insert(NEXT, value);
    }
    Ok(response)
}

async fn import(app: &App, queue: &str, caller: &Caller, request: Request, format: Format) -> Result<Response, ApiError> {
    let mut all_submitted = false;
    for parameter in parameters(request.uri().query(), &["all_submitted"])? {
        all_submitted = parameter.one_of(&[("true", true), ("false", false)])?;
    }
    let (labels, queue) = find(app, queue).await?;
    let read = move |body| format.read(&body, all_submitted).map_err(ApiError::bad_request);
    let reading = app.body.parsed(request, read).await?;
    let summary = take(&labels, &queue, reading, now(), caller.key_id().as_deref()).await?;
    Ok(answer(StatusCode::OK, &summary))
}

/// Label Studio waits one second for the answer and does not ask again; an import of its export brings what was missed.
async fn label_studio_webhook(
    State(app): State<App>,
    Path(queue): Path<String>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let (labels, queue) = find(&app, &queue).await?;
    let read = |body| label_studio::read_event(&body).map_err(ApiError::bad_request);
    let summary = match app.body.parsed(request, read).await? {
        Event::Judged(reading) => take(&labels, &queue, reading, now(), caller.key_id().as_deref()).await?,
        Event::Deleted(ids) => {
            let mut summary = Summary::default();
            let applied = labels.delete_external(&queue, label_studio::TOOL, &ids, now()).await?;
            applied.into_iter().for_each(|applied| summary.count(applied));
            summary
        }
        Event::Other(action) => return Ok(answer(StatusCode::OK, &json!({"ignored": action}))),
    };
    match summary.refusals.first() {
        // A single annotation that cannot be taken is the caller's error; a bulk action says what it did and what not.
        Some(refusal) if summary == (Summary { refused: 1, refusals: vec![refusal.clone()], ..Summary::default() }) => {
            let message = format!("{}: {}", refusal.place, refusal.message);
            Err(ApiError::client(StatusCode::UNPROCESSABLE_ENTITY, Some("annotation_refused"), message))
        }
        _ => Ok(answer(StatusCode::OK, &summary)),
    }
}

async fn find(app: &App, queue: &str) -> Result<(Labels, Queue), ApiError> {
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(queue).await?;
    Ok((labels, queue))
}
