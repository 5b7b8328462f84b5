//! `/v1/labeling/queues/{queue}/label-studio/…` and `…/argilla/…`: queues in other people's tools.
//!
//! Exports hand out a whole queue and need `train`, as all that operators of queues do. Webhooks and imports speak in the name of
//! raters and set gold verdicts; they need `feedback`, which annotators' keys do not have.

use crate::http::app::App;
use crate::http::auth::{Caller, require};
use crate::http::error::ApiError;
use crate::http::generate::json;
use crate::http::limits::{LONG_WORK, off_path, parse_json};
use crate::interchange::label_studio::{self, Event};
use crate::interchange::{Format, Summary, take};
use crate::labeling::filler::now;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{StatusCode, Uri};
use serde_json::{Value, json};
use tidemill_store::Scope;
use tidemill_store::label::{Labels, Queue, TaskState};
use uuid::Uuid;

/// Says where the next page begins; absent on the last.
const NEXT: HeaderName = HeaderName::from_static("x-next-after");
const PAGE: u32 = 1000;
const MOST: u32 = 10_000;

/// The routes, each behind its scope.
pub fn routes() -> Router<App> {
    const QUEUE: &str = "/v1/labeling/queues/{queue}";
    let out = Router::new()
        .route(&format!("{QUEUE}/label-studio/config"), get(label_studio_config))
        .route(&format!("{QUEUE}/label-studio/project"), get(label_studio_project))
        .route(&format!("{QUEUE}/label-studio/tasks"), get(label_studio_tasks))
        .route(&format!("{QUEUE}/argilla/settings"), get(argilla_settings))
        .route(&format!("{QUEUE}/argilla/records"), get(argilla_records))
        .route_layer(require(Scope::Train));
    let back = Router::new()
        .route(&format!("{QUEUE}/label-studio/import"), post(label_studio_import))
        .route(&format!("{QUEUE}/label-studio/webhook"), post(label_studio_webhook))
        .route(&format!("{QUEUE}/argilla/import"), post(argilla_import))
        .route_layer(require(Scope::Feedback));
    out.merge(back)
}

async fn label_studio_config(State(app): State<App>, Path(queue): Path<String>) -> Result<Response, ApiError> {
    find(&app, &queue).await?;
    let mut response = label_studio::CONFIG.into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/xml"));
    Ok(response)
}

async fn label_studio_project(State(app): State<App>, Path(queue): Path<String>) -> Result<Response, ApiError> {
    Ok(answer(&Format::LabelStudio.project(&find(&app, &queue).await?.1)))
}

async fn argilla_settings(State(app): State<App>, Path(queue): Path<String>) -> Result<Response, ApiError> {
    Ok(answer(&Format::Argilla.project(&find(&app, &queue).await?.1)))
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
    let page = Page::of(uri.query().unwrap_or_default())?;
    let (labels, queue) = find(app, queue).await?;
    // One more than asked for tells whether there is a next page.
    let mut tasks = labels.list_tasks(queue.id, page.state, page.after, page.limit + 1).await?;
    let more = tasks.len() > page.limit as usize;
    tasks.truncate(page.limit as usize);
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
    let all_submitted = match parameters(request.uri().query().unwrap_or_default(), &["all_submitted"])?.as_slice() {
        [] => false,
        [.., (_, "true")] => true,
        [.., (_, "false")] => false,
        _ => return Err(ApiError::invalid("all_submitted", "invalid_value", "Invalid 'all_submitted': use true or false.")),
    };
    let (labels, queue) = find(app, queue).await?;
    let body = app.body.read(request).await?;
    let reading =
        off_path(body.len() > LONG_WORK, move || format.read(&parse_json(&body)?, all_submitted).map_err(ApiError::bad_request));
    let summary = take(&labels, &queue, reading.await??, now(), caller.key_id().as_deref()).await?;
    Ok(answer(&json!(summary)))
}

/// Label Studio waits one second for the answer and does not ask again; an import of its export brings what was missed.
async fn label_studio_webhook(
    State(app): State<App>,
    Path(queue): Path<String>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let (labels, queue) = find(&app, &queue).await?;
    let body = app.body.read(request).await?;
    let event =
        off_path(body.len() > LONG_WORK, move || label_studio::read_event(&parse_json(&body)?).map_err(ApiError::bad_request));
    let summary = match event.await?? {
        Event::Judged(reading) => take(&labels, &queue, reading, now(), caller.key_id().as_deref()).await?,
        Event::Deleted(ids) => {
            let mut summary = Summary::default();
            let applied = labels.delete_external(&queue, label_studio::TOOL, &ids, now()).await?;
            applied.into_iter().for_each(|applied| summary.count(applied));
            summary
        }
        Event::Other(action) => return Ok(answer(&json!({"ignored": action}))),
    };
    match summary.refusals.first() {
        // A single annotation that cannot be taken is the caller's error; a bulk action says what it did and what not.
        Some(refusal) if summary == (Summary { refused: 1, refusals: vec![refusal.clone()], ..Summary::default() }) => {
            let message = format!("{}: {}", refusal.place, refusal.message);
            Err(ApiError::client(StatusCode::UNPROCESSABLE_ENTITY, Some("annotation_refused"), message))
        }
        _ => Ok(answer(&json!(summary))),
    }
}

async fn find(app: &App, queue: &str) -> Result<(Labels, Queue), ApiError> {
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(queue).await?;
    Ok((labels, queue))
}

fn answer(value: &Value) -> Response {
    json(Bytes::from(value.to_string()))
}

/// Which tasks.
#[derive(Debug, PartialEq, Eq)]
struct Page {
    after: Option<Uuid>,
    limit: u32,
    state: TaskState,
}

impl Page {
    fn of(query: &str) -> Result<Self, ApiError> {
        let mut page = Self { after: None, limit: PAGE, state: TaskState::Any };
        for (name, value) in parameters(query, &["after", "limit", "state"])? {
            let invalid =
                |expected: &str| ApiError::invalid(name, "invalid_value", format!("Invalid '{name}': expected {expected}."));
            match name {
                "after" => page.after = Some(value.parse().map_err(|_| invalid("the id of a task"))?),
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=MOST).contains(limit));
                    page.limit = limit.ok_or_else(|| invalid("a number from 1 to 10000"))?;
                }
                _ => {
                    page.state = match value {
                        "any" => TaskState::Any,
                        "open" => TaskState::Open,
                        "done" => TaskState::Done,
                        _ => return Err(invalid("any, open or done")),
                    }
                }
            }
        }
        Ok(page)
    }
}

/// `name=value` pairs; every name must be known. No value that is taken here needs escapes.
fn parameters<'a>(query: &'a str, known: &[&str]) -> Result<Vec<(&'a str, &'a str)>, ApiError> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs
        .map(|(name, value)| {
            if known.contains(&name) {
                return Ok((name, value));
            }
            let shown: String = name.chars().take(50).collect();
            let message = format!("Unknown parameter '{shown}'; known here: {}.", known.join(", "));
            Err(ApiError::invalid(shown, "unknown_parameter", message))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_what_is_wrong_with_it() {
        let id = Uuid::from_u128(7);
        let page = Page::of(&format!("limit=5&after={id}&state=open")).unwrap();
        assert_eq!(page, Page { after: Some(id), limit: 5, state: TaskState::Open });
        assert_eq!(Page::of("").unwrap(), Page { after: None, limit: PAGE, state: TaskState::Any });
        for (query, param) in [
            ("limit=0", "limit"),
            ("limit=10001", "limit"),
            ("limit", "limit"),
            ("after=x", "after"),
            ("state=new", "state"),
            ("x=1", "x"),
        ] {
            assert_eq!(Page::of(query).unwrap_err().param.as_deref(), Some(param), "{query}");
        }
    }
}
