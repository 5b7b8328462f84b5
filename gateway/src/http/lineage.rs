//! `GET /v1/lineage/{id}`: where an answer comes from, and what came of a judgement.

use crate::http::answer::answer;
use crate::http::app::App;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::limits::off_path_waiting;
use crate::http::query::parameters;
use crate::lineage::{TraceError, Tracer, Want};
use axum::Router;
use axum::extract::{Path, RawQuery, State};
use axum::response::Response;
use axum::routing::get;
use hyper::StatusCode;
use tidemill_rlhf::registry::RegistryError;

/// Most rows of a dataset in one answer.
const MAX_ROWS: usize = 1000;
/// Rows of a dataset where ids are asked for and no number is.
const ROWS: usize = 100;

/// The route.
pub fn routes() -> Router<App> {
    Router::new().route("/v1/lineage/{*id}", get(show))
}

async fn show(State(app): State<App>, Path(id): Path<String>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let (mut rows, mut limit) = (false, ROWS);
    for parameter in parameters(query.as_deref(), &["rows", "limit"])? {
        match parameter.name.as_ref() {
            "rows" => rows = parameter.one_of(&[("true", true), ("false", false)])?,
            _ => limit = parameter.number(1..=MAX_ROWS)?,
        }
    }
    let tracer = Tracer::new(&app.store, app.datasets.datasets(), app.adapters.registry());
    // Reading a dataset's rows decompresses them.
    let trace = off_path_waiting(async move { tracer.trace(&id, Want { rows: rows.then_some(limit) }).await }).await?;
    Ok(answer(StatusCode::OK, &trace?))
}

impl From<TraceError> for ApiError {
    fn from(error: TraceError) -> Self {
        match error {
            TraceError::Store(error) => unavailable(error),
            TraceError::NotFound(text) => {
                let shown: String = text.chars().take(100).collect();
                let message = format!(
                    "Nothing here is called `{shown}`. Name an answer's id, an adapter, a dataset as NAME@VERSION, a job, a judgement's id, a row's id, or a person as rater:NAME."
                );
                Self { param: Some("id".into()), ..Self::client(StatusCode::NOT_FOUND, Some("not_found"), message) }
            }
            TraceError::Registry(error @ RegistryError::Ambiguous { .. }) => {
                Self::invalid("id", "ambiguous", format!("Invalid 'id': {error}."))
            }
            error @ (TraceError::Registry(_) | TraceError::Dataset(_)) => {
                tracing::error!(%error, "a lineage cannot be followed");
                Self::fault("The server could not read what this comes from.")
            }
        }
    }
}
