//! `GET /v1/models`, `GET /v1/models/{id}`, and `DELETE` of those that were made here.

use crate::http::answer::answer;
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::fine_tuning::delete_model;
use crate::upstream::{LoadState, Upstream};
use axum::extract::{Path, Request, State};
use axum::response::Response;
use hyper::StatusCode;
use serde::Serialize;
use std::sync::Arc;

#[derive(Serialize)]
struct ModelCard {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// vLLM's; clients size their prompts by it. Unknown while the model loads, and of one that another server answers.
    max_model_len: Option<usize>,
    /// vLLM's: the base model of an adapter.
    parent: Option<String>,
    /// Names an adapter's contents, as records do.
    generation: Option<String>,
}

#[derive(Serialize)]
struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

/// Base models, then adapters: by their own name where that leads to them, else as `base:adapter`; then what only rollouts know.
fn cards(app: &App) -> Vec<ModelCard> {
    let mut cards: Vec<ModelCard> = app.registry.states().map(|(name, state)| base_card(name, &state)).collect();
    for model in app.registry.local() {
        // What is in the engine by its generation has a name in the registry's list.
        let loaded = model.engine().adapters().into_iter().filter(|adapter| !adapter.name().contains('@'));
        let loaded = loaded.map(|adapter| (adapter.name().to_owned(), adapter));
        let registered = app.registry.adapter_names(model.name());
        let registered = registered.listed().map(|(name, adapter)| (name.to_owned(), adapter.clone())).collect::<Vec<_>>();
        let found = loaded.chain(registered).map(|(name, adapter)| (name, adapter.created(), adapter.generation()));
        let mut found: Vec<_> = found.collect();
        // What gave way can be asked for all the same.
        for (name, meant) in app.registry.offered(model.name()).iter().filter(|(_, meant)| meant.listed) {
            if found.iter().all(|(known, ..)| known != name) {
                found.push((name.clone(), meant.created, meant.generation));
            }
        }
        for (name, created, generation) in found {
            let taken = cards.iter().any(|card| card.id == name);
            cards.push(ModelCard {
                id: if taken { format!("{}:{name}", model.name()) } else { name },
                created,
                parent: Some(model.name().to_owned()),
                generation: Some(generation.to_string()),
                ..base_card(model.name(), &LoadState::Ready(Upstream::Local(Arc::clone(model))))
            });
        }
    }
    // Names that lead to something by a rollout alone.
    for (name, public) in app.rollouts.tables().models() {
        if let (false, Ok(upstream)) = (cards.iter().any(|card| card.id == name), app.registry.find(Some(&public.stable().model)))
        {
            cards.push(base_card(name, &LoadState::Ready(upstream)));
        }
    }
    cards
}

fn base_card(name: &str, state: &LoadState) -> ModelCard {
    let (created, owned_by, max_model_len) = match state {
        LoadState::Loading => (0, "tidemill", None),
        LoadState::Ready(Upstream::Local(model)) => (model.created(), "tidemill", Some(model.context())),
        LoadState::Ready(Upstream::Remote(model)) => (model.created(), "remote", None),
    };
    let id = name.to_owned();
    ModelCard { id, object: "model", created, owned_by, max_model_len, parent: None, generation: None }
}

impl ModelCard {
    /// Whether a request could name it so.
    fn is_called(&self, name: &str) -> bool {
        let whole = |base: &String| name.strip_prefix(base.as_str()).and_then(|rest| rest.strip_prefix(':')) == Some(&self.id);
        self.id == name || self.parent.as_ref().is_some_and(whole)
    }
}

/// What requests of the caller may name.
pub fn names(app: &App, caller: &Caller) -> Vec<String> {
    cards(app).into_iter().map(|card| card.id).filter(|name| caller.check_model(name).is_ok()).collect()
}

/// `GET /v1/models`: those that the caller may use.
pub async fn list(State(app): State<App>, request: Request) -> Response {
    let caller = Caller::of(&request);
    let data = cards(&app).into_iter().filter(|card| caller.check_model(&card.id).is_ok()).collect();
    answer(StatusCode::OK, &ModelList { object: "list", data })
}

/// `GET /v1/models/{id}`; the id may hold slashes, plain or as `%2F`.
pub async fn get(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    Caller::of(&request).check_model(&id)?;
    let card = cards(&app).into_iter().find(|card| card.is_called(&id)).ok_or_else(|| ApiError::model_not_found(&id))?;
    Ok(answer(StatusCode::OK, &card))
}

/// `DELETE /v1/models/{id}`: a model that a fine-tuning job of the caller's made.
pub async fn delete(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let caller = Caller::of(&request);
    caller.check_model(&id)?;
    delete_model(&app, &caller, &id).await
}
