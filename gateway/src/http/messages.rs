//! `POST /v1/messages` and `POST /v1/messages/count_tokens`, Anthropic's API.

use crate::anthropic::{CountRequest, Head, MessageStream, MessagesRequest, to_json};
use crate::http::answer::json;
use crate::http::app::App;
use crate::http::assigned::{self, Shape};
use crate::http::chat::ChatRun;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::generate::{Asked, enter};
use crate::http::sse;
use crate::openai::chat_output::ChatCollected;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use serde_json::Value;

/// A message, streamed or whole.
pub async fn create(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let (in_flight, asked) = (enter(&app)?, Asked::new(&app, &request));
    let first = move |body: Value| {
        let (plan, body) = assigned::plan(asked, Some(Shape::Message), body)?;
        plan.prepare(body, prepare)
    };
    let first = app.body.parsed(request, first).await?;
    assigned::answer(&app, first, in_flight, prepare, answer).await
}

fn prepare(asked: Asked, body: Value) -> Result<(MessagesRequest, ChatRun), ApiError> {
    let request = MessagesRequest::parse(&body)?;
    let run = ChatRun::prepare(asked, "messages", &request.chat)?;
    Ok((request, run))
}

async fn answer((request, run): (MessagesRequest, ChatRun), in_flight: InFlight) -> Result<Response, ApiError> {
    let head = Head { id: format!("msg_{}", run.id.simple()), model: run.model.name().to_owned() };
    let (format, prompt_tokens) = (run.format.clone(), run.prompt_ids().len());
    let MessagesRequest { stream, thinking, max_tokens, .. } = request;
    let events = run.start().await?;
    if stream {
        return Ok(sse::response(events, MessageStream::new(head, prompt_tokens, &format, thinking, max_tokens), in_flight));
    }
    let collected = ChatCollected::of(events, format, 1, false).await?;
    Ok(json(to_json(&head, &collected, thinking, max_tokens)))
}

/// How many tokens a conversation is.
pub async fn count_tokens(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let asked = Asked::new(&app, &request);
    let count = move |body: Value| {
        let CountRequest(chat) = CountRequest::parse(&body)?;
        let model = asked.model(&chat.model)?;
        let (_, tokens) = model.chat_tokens(&chat.prompt, &chat.offered_tools())?;
        Ok(tokens.len())
    };
    let tokens = app.body.parsed(request, count).await?;
    Ok(json(Bytes::from(serde_json::json!({"input_tokens": tokens}).to_string())))
}
