//! `/v1/labeling/…`: queues for those who train, tasks for annotators.

mod page;
mod queues;
mod work;

pub use page::TaskPage;

use crate::http::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use axum::Router;
use axum::routing::{get, post};
use hyper::StatusCode;
use tidemill_store::Scope;
use tidemill_store::label::LabelError;
use uuid::Uuid;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/labeling/queues/{queue}/next", post(work::next))
        .route("/v1/labeling/queues/{queue}/undo", post(work::undo))
        .route("/v1/labeling/assignments/{id}/verdict", post(work::verdict))
        .route("/v1/labeling/assignments/{id}/skip", post(work::skip))
        .route("/v1/labeling/queues/{queue}", get(queues::show).patch(queues::change))
        .route("/v1/labeling/queues/{queue}/tasks", get(queues::tasks).post(queues::add_tasks))
        .route("/v1/labeling/queues/{queue}/prompts", post(queues::add_prompts))
        .route("/v1/labeling/queues/{queue}/statistics", get(queues::statistics))
        // These are for annotators and operators, and show each what they may know.
        .route("/v1/labeling/me", get(work::me))
        .route("/v1/labeling/queues", get(queues::list).post(queues::create))
}

fn is_operator(caller: &Caller) -> bool {
    caller.allows(Scope::Train)
}

/// Whose work it is: the key's name, or without keys the name that the page sends.
fn annotator(caller: &Caller, given: Option<&str>) -> Result<String, ApiError> {
    if let Some(name) = caller.name() {
        return Ok(name.to_owned());
    }
    let name = given.map(str::trim).unwrap_or_default();
    if name.is_empty() || name.chars().count() > 100 || name.chars().any(char::is_control) {
        let message = "Invalid 'annotator': without API keys, say who judges, in 1 to 100 characters.";
        return Err(ApiError::invalid("annotator", "invalid_value", message));
    }
    Ok(name.to_owned())
}

fn optional_text<'a>(fields: &mut Fields<'a>, key: &'static str, most: usize) -> Result<Option<&'a str>, ApiError> {
    fields.get(key).map(|field: Field<'a>| field.short_string(most)).transpose()
}

fn id(text: &str) -> Result<Uuid, ApiError> {
    let shown: String = text.chars().take(100).collect();
    Uuid::parse_str(text)
        .map_err(|_| ApiError::client(StatusCode::NOT_FOUND, Some("not_found"), format!("There is no assignment `{shown}`.")))
}

impl From<LabelError> for ApiError {
    fn from(error: LabelError) -> Self {
        let message = sentence(&error.to_string());
        match error {
            LabelError::Database(_) | LabelError::Store(_) => {
                tracing::error!(%error, "labeling cannot reach its tables");
                Self::unavailable(Some("store_unavailable"), "The server cannot reach its database; try again.", 2)
            }
            LabelError::NameTaken(_) => {
                Self { param: Some("name".into()), ..Self::client(StatusCode::CONFLICT, Some("name_taken"), message) }
            }
            LabelError::NoQueue(_) | LabelError::NoTask(_) | LabelError::NoAssignment(_) => {
                Self::client(StatusCode::NOT_FOUND, Some("not_found"), message)
            }
            LabelError::LeaseLost => Self::client(StatusCode::CONFLICT, Some("lease_lost"), message),
            LabelError::AlreadyJudged => Self::client(StatusCode::CONFLICT, Some("already_judged"), message),
            LabelError::NothingToUndo => Self::client(StatusCode::CONFLICT, Some("nothing_to_undo"), message),
        }
    }
}

/// Starts with a capital and ends with a full stop, as the API's messages do.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| format!("{}{}.", first.to_uppercase(), chars.as_str()))
}
