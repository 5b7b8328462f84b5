//! `POST /v1/messages` and `POST /v1/messages/count_tokens`, Anthropic's API.

use crate::anthropic::{CountRequest, Head, MessageStream, MessagesRequest, to_json};
use crate::http::answer::json;
use crate::http::app::App;
use crate::http::chat::ChatRun;
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
    let prepare = move |body: Value| {
        let request = MessagesRequest::parse(&body)?;
        let run = ChatRun::prepare(asked, "messages", &request.chat)?;
        Ok((request, run))
    };
    let (request, run) = app.body.parsed(request, prepare).await?;
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
