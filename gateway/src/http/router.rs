//! Which path goes where.

use crate::anthropic::error::in_their_words;
use crate::http::app::App;
use crate::http::auth::{authenticate, require};
use crate::http::error::ApiError;
use crate::http::{
    adapter_registry, adapters, batches, chat, completions, console, datasets, embeddings, feedback, files, fine_tuning, graders,
    interchange, keys, labeling, loops, messages, models, observe, probes, responses, rollouts, stored_chats, tokens,
};
use crate::limits::shed;
use axum::Router;
use axum::extract::Request;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::StatusCode;
use percent_encoding::percent_decode_str;
use tidemill_store::Scope;

/// All routes. Whatever is not one answers in the error shape, too.
pub fn router(app: App) -> Router {
    let auth = app.auth.clone();
    let cors = app.origins.layer();
    // What generates meets the limits; looking, counting and calling off do not: whoever is at a limit must be able to free a place.
    let generating = Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/responses", post(responses::create))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/messages", post(messages::create))
        .route_layer(from_fn_with_state(app.clone(), shed))
        .route_layer(require(Scope::Chat));
    let around = Router::new()
        .route("/v1/chat/completions", get(stored_chats::list))
        .route("/v1/chat/completions/{id}", get(stored_chats::get).post(stored_chats::update).delete(stored_chats::delete))
        .route("/v1/chat/completions/{id}/messages", get(stored_chats::messages))
        .route("/v1/responses/input_tokens", post(responses::input_tokens))
        .route("/v1/responses/{id}", get(responses::get).delete(responses::delete))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/moderations", post(embeddings::moderations))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route_layer(require(Scope::Chat));
    let judging = Router::new()
        .route("/v1/feedback", post(feedback::create).get(feedback::list))
        .route("/v1/feedback/{id}", get(feedback::get).patch(feedback::edit).delete(feedback::withdraw))
        .route_layer(require(Scope::Feedback));
    Router::new()
        .merge(generating)
        .merge(around)
        .merge(judging)
        .merge(datasets::routes())
        .merge(files::routes())
        .merge(batches::routes())
        .merge(fine_tuning::routes())
        .merge(graders::routes())
        .merge(labeling::routes())
        .merge(interchange::routes())
        .merge(crate::console::routes())
        .merge(console::routes())
        .merge(keys::routes())
        .merge(adapters::routes())
        .merge(adapter_registry::routes())
        .merge(loops::routes())
        .merge(rollouts::routes())
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get).delete(models::delete))
        .route("/health", get(probes::health))
        .route("/ready", get(probes::ready))
        .route("/version", get(probes::version))
        .route("/metrics", get(probes::metrics))
        .route("/openapi.json", get(probes::description))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state((auth, app.origins.clone()), authenticate))
        .layer(from_fn(readable))
        // Around the keys: a browser asks for leave before it sends one, and may read why it was refused.
        .layer(tower::util::option_layer(cors))
        .layer(from_fn_with_state(app.observer.clone(), observe::observe))
        .layer(from_fn(in_their_words))
        .with_state(app)
}

/// What stands in a path is text; the parts of one that is not would be refused by the framework, in a shape of its own.
async fn readable(request: Request, next: Next) -> Response {
    match percent_decode_str(request.uri().path()).decode_utf8() {
        Ok(_) => next.run(request).await,
        Err(_) => unknown_path(request).await.into_response(),
    }
}

async fn unknown_path(request: Request) -> ApiError {
    let message = format!("Unknown request URL: {} {}.", request.method(), shown(&request));
    ApiError::client(StatusCode::NOT_FOUND, Some("unknown_url"), message)
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("Not allowed to {} on {}.", request.method(), shown(&request));
    ApiError::client(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
}

fn shown(request: &Request) -> String {
    request.uri().path().chars().take(200).collect()
}
