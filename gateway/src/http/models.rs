//! `GET /v1/models` and `GET /v1/models/{id}`.

use crate::http::answer::answer;
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::upstream::{LoadState, Upstream};
use axum::extract::{Path, Request, State};
use axum::response::Response;
use hyper::StatusCode;
use serde::Serialize;

#[derive(Serialize)]
struct ModelCard {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// vLLM's; clients size their prompts by it. Unknown while the model loads.
    max_model_len: Option<usize>,
}

#[derive(Serialize)]
struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

fn cards(app: &App) -> impl Iterator<Item = ModelCard> {
    app.registry.states().map(|(name, state)| {
        let (created, max_model_len) = match state {
            LoadState::Loading => (0, None),
            LoadState::Ready(Upstream::Local(model)) => (model.created(), Some(model.context())),
        };
        ModelCard { id: name.to_owned(), object: "model", created, owned_by: "tidemill", max_model_len }
    })
}

/// `GET /v1/models`: those that the caller may use.
pub async fn list(State(app): State<App>, request: Request) -> Response {
    let caller = Caller::of(&request);
    let data = cards(&app).filter(|card| caller.check_model(&card.id).is_ok()).collect();
    answer(StatusCode::OK, &ModelList { object: "list", data })
}

/// `GET /v1/models/{id}`; the id may hold slashes, plain or as `%2F`.
pub async fn get(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    Caller::of(&request).check_model(&id)?;
    let card = cards(&app).find(|card| card.id == id).ok_or_else(|| ApiError::model_not_found(&id))?;
    Ok(answer(StatusCode::OK, &card))
}
