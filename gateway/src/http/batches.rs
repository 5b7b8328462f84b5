//! `/v1/batches`: requests in a file, answered in the background.

use crate::clock::now;
use crate::http::answer::{answer, list as list_page};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::files;
use crate::http::generate::enter;
use crate::http::upload::KEEP;
use crate::openai::about;
use crate::openai::fields::Fields;
use crate::openai::listing::{Extra, Listing};
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Extension, Router};
use hyper::StatusCode;
use serde_json::{Value, json};
use tidemill_store::{Batch, BatchDraft, BatchState, Order};
use uuid::Uuid;

/// Where the requests of a batch may go.
const ENDPOINTS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"];
/// The one window that OpenAI's API has.
const WINDOW: &str = "24h";
const WINDOW_US: i64 = 24 * 3600 * 1_000_000;
/// Batches of a server in which something is still to be done; more are refused.
const MAX_OPEN: usize = 256;
/// Before the id of a batch.
const PREFIX: &str = "batch_";

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/batches", post(create).get(list))
        .route("/v1/batches/{id}", get(show))
        .route("/v1/batches/{id}/cancel", post(cancel))
}

async fn create(State(app): State<App>, Extension(caller): Extension<Caller>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let input = fields.require("input_file_id")?.string()?;
    let endpoint = fields.require("endpoint")?.one_of(&ENDPOINTS)?;
    fields.require("completion_window")?.one_of(&[WINDOW])?;
    let metadata = fields.get("metadata").map(|field| about::metadata(&field)).transpose()?;
    let keep_seconds = match fields.get("output_expires_after") {
        None => None,
        Some(field) => {
            let mut rule = field.object()?;
            rule.require("anchor")?.one_of(&["created_at"])?;
            let seconds = rule.require("seconds")?.integer(KEEP)?;
            rule.finish()?;
            Some(seconds)
        }
    };
    fields.finish()?;
    let file = files::find(&app, &caller, input, StatusCode::BAD_REQUEST, "input_file_id").await?;
    if file.purpose != "batch" {
        let message =
            format!("Invalid 'input_file_id': the file's purpose is '{}'; upload it with the purpose 'batch'.", file.purpose);
        return Err(ApiError::invalid("input_file_id", "invalid_value", message));
    }
    files::here(&app, &file)?;
    let rows = app.batches.rows();
    if rows.open(app.files.place()).await.map_err(unavailable)?.len() >= MAX_OPEN {
        let message =
            format!("{MAX_OPEN} batches run or wait on this server, the most that it takes; try again when one has ended.");
        let error = ApiError::client(StatusCode::TOO_MANY_REQUESTS, Some("too_many_batches"), message);
        return Err(ApiError { retry_after: Some(60), ..error });
    }
    let created = now();
    let draft = BatchDraft {
        id: app.store.issue_id(),
        created,
        key_id: caller.key_id(),
        endpoint: endpoint.to_owned(),
        input_file: file.id,
        output_file: app.store.issue_id(),
        error_file: app.store.issue_id(),
        metadata: metadata.map(Value::Object),
        keep_seconds,
        expires: created + WINDOW_US,
        place: file.place,
    };
    if !rows.insert(&draft).await.map_err(unavailable)? {
        let message = format!("No such File object: {input}. It was deleted just now.");
        return Err(ApiError::invalid("input_file_id", "file_not_found", message));
    }
    app.batches.wake();
    Ok(answer(StatusCode::OK, &shown(&find(&app, &caller, &name(draft.id)).await?)))
}

async fn list(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let listing = Listing::parse(query.as_deref(), Order::NewestFirst, Extra::Batches)?;
    let page = app.batches.rows().list(&caller.viewer(), listing.after_id(PREFIX)?, listing.limit).await.map_err(unavailable)?;
    Ok(list_page(page.items.iter().map(shown).collect(), page.has_more))
}

async fn show(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    Ok(answer(StatusCode::OK, &shown(&find(&app, &caller, &id).await?)))
}

async fn cancel(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let batch = find(&app, &caller, &id).await?;
    if !app.batches.rows().cancel(batch.draft.id, now()).await.map_err(unavailable)? {
        let batch = find(&app, &caller, &id).await?;
        // Asked twice is fine; to undo what has ended is not.
        if batch.state.ended() {
            let message = format!("Cannot cancel a batch with status '{}'.", batch.state.as_str());
            return Err(ApiError::invalid("id", "batch_ended", message));
        }
    }
    Ok(answer(StatusCode::OK, &shown(&find(&app, &caller, &id).await?)))
}

fn name(id: Uuid) -> String {
    format!("{PREFIX}{id}")
}

async fn find(app: &App, caller: &Caller, text: &str) -> Result<Batch, ApiError> {
    let found = match text.strip_prefix(PREFIX).and_then(|id| Uuid::try_parse(id).ok()) {
        Some(id) => app.batches.rows().find(id, &caller.viewer()).await.map_err(unavailable)?,
        None => None,
    };
    found.ok_or_else(|| {
        let shown: String = text.chars().take(100).collect();
        let message = format!("No batch found with id '{shown}'. GET /v1/batches lists what is there.");
        ApiError::client(StatusCode::NOT_FOUND, Some("batch_not_found"), message)
    })
}

fn shown(batch: &Batch) -> Value {
    let draft = &batch.draft;
    let at = |state| batch.entered(state).map(|at| at / 1_000_000);
    json!({
        "id": name(draft.id),
        "object": "batch",
        "endpoint": draft.endpoint,
        "model": batch.model,
        "errors": batch.errors,
        "input_file_id": files::name(draft.input_file),
        "completion_window": WINDOW,
        "status": batch.state.as_str(),
        "output_file_id": batch.has_output.then(|| files::name(draft.output_file)),
        "error_file_id": batch.has_errors.then(|| files::name(draft.error_file)),
        "created_at": draft.created / 1_000_000,
        "in_progress_at": at(BatchState::InProgress),
        "expires_at": draft.expires / 1_000_000,
        "finalizing_at": at(BatchState::Finalizing),
        "completed_at": at(BatchState::Completed),
        "failed_at": at(BatchState::Failed),
        "expired_at": at(BatchState::Expired),
        "cancelling_at": at(BatchState::Cancelling),
        "cancelled_at": at(BatchState::Cancelled),
        "request_counts": {
            "total": batch.progress.total,
            "completed": batch.progress.completed,
            "failed": batch.progress.failed,
        },
        "usage": batch.usage,
        "metadata": draft.metadata,
    })
}
