//! `POST /v1/responses`: from a body to a stream of events, one JSON object, or work in the background.

pub mod background;
mod context;
mod stored;

pub use stored::{cancel, delete, get, input_items};

use crate::clock::{now, seconds};
use crate::http::answer::answer;
use crate::http::app::App;
use crate::http::assigned::{self, Shape};
use crate::http::chat::ChatRun;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::generate::{Asked, enter};
use crate::http::limits::{LONG_WORK, off_path};
use crate::http::sse;
use crate::http::stored_chats::{can_store, owner};
use crate::openai::chat::{ChatPrompt, ChatRequest};
use crate::openai::chat_output::{ChatOutput, OutputFormat};
use crate::recording::Level;
use crate::responses::output::EventLog;
use crate::responses::stream::ResponseStream;
use crate::responses::{Ending, Output, ResponseRequest, Template, conversation, item};
use crate::upstream::{Events, LocalModel};
use axum::extract::{Request, State};
use axum::response::Response;
use context::Context;
use hyper::StatusCode;
use serde_json::{Value, json};
use tidemill_store::{ResponseStatus, StoredResponse};

/// What records call this endpoint.
const ENDPOINT: &str = "response";
/// Room that truncation leaves for an answer whose length nobody has said.
const ANSWER_ROOM: usize = 16;

/// `POST /v1/responses`
pub async fn create(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let (in_flight, asked) = (enter(&app)?, Asked::new(&app, &request));
    let first = move |body: Value| {
        let (plan, body) = assigned::plan(asked, Some(Shape::Response), body)?;
        plan.prepare(body, parse)
    };
    let first = app.body.parsed(request, first).await?;
    assigned::answer(&app, first, in_flight, parse, respond).await
}

fn parse(asked: Asked, body: Value) -> Result<(Asked, ResponseRequest), ApiError> {
    let request = ResponseRequest::parse(&body)?;
    Ok((asked, request))
}

async fn respond((asked, request): (Asked, ResponseRequest), in_flight: InFlight) -> Result<Response, ApiError> {
    let app = asked.app.clone();
    let context = Context::of(&app.store, &owner(&asked.caller), &request).await?;
    let long = context.bytes > LONG_WORK;
    let prepared = off_path(long, move || Prepared::new(asked, request, context)).await??;
    if prepared.background {
        let Some(row) = prepared.row else { return Err(ApiError::fault("A response in the background is always stored.")) };
        let work = background::Work { run: prepared.run, output: prepared.output, template: prepared.template };
        return Ok(answer(StatusCode::OK, &app.background.begin(&app.store, work, row, in_flight).await?));
    }
    let format = prepared.run.format.clone();
    let events = prepared.run.start().await.map_err(in_our_words)?;
    if prepared.stream {
        let row = prepared.row;
        let save = row.map(|row| -> crate::responses::stream::Save {
            let store = app.store.clone();
            Box::new(move |status, body| {
                Box::pin(async move { store.save_response(&StoredResponse { status, body, ..row }).await.map_err(unavailable) })
            })
        });
        let stream =
            ResponseStream::new(ChatOutput::new(format, 1, prepared.keep_records), prepared.output, prepared.template, save);
        return Ok(sse::response(events, stream, in_flight));
    }
    let (ending, body) = whole(events, format, prepared.keep_records, prepared.output, &prepared.template).await?;
    if let Some(row) = prepared.row {
        let row = StoredResponse { status: ending.status(), body: body.clone(), ..row };
        app.store.save_response(&row).await.map_err(unavailable)?;
    }
    Ok(answer(StatusCode::OK, &body))
}

/// `POST /v1/responses/input_tokens`: how many tokens a request's input has, without an answer.
pub async fn input_tokens(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let (_in_flight, asked) = (enter(&app)?, Asked::new(&app, &request));
    let request = app.body.parsed(request, |body| ResponseRequest::parse(&body)).await?;
    let context = Context::of(&app.store, &owner(&asked.caller), &request).await?;
    let long = context.bytes > LONG_WORK;
    let count = move || {
        let model = asked.model(&request.model)?;
        let chat = chat_request(&model, request, &context.items)?;
        model.chat_tokens(&chat.prompt, &chat.offered_tools()).map(|(_, tokens)| tokens.len()).map_err(in_our_words)
    };
    let tokens = off_path(long, count).await??;
    Ok(answer(StatusCode::OK, &json!({"object": "response.input_tokens", "input_tokens": tokens})))
}

/// Waits for the whole response.
async fn whole(
    mut events: Events,
    format: OutputFormat,
    keep_records: bool,
    mut output: Output,
    template: &Template,
) -> Result<(Ending, Value), ApiError> {
    let (mut chat, mut log) = (ChatOutput::new(format, 1, keep_records), EventLog::off());
    let mut done = false;
    while let Some((_, event)) = events.next().await {
        chat.push(event, &mut |event| done |= output.take(event, &mut log))?;
        if done {
            let (ending, items, usage) = output.end(None, &mut log);
            let object = template.ended(&ending, items, usage, seconds());
            return Ok((ending, object));
        }
    }
    Err(ApiError::fault("The engine stopped before the answer was complete."))
}

/// A request that is ready for the engine.
struct Prepared {
    run: ChatRun,
    output: Output,
    template: Template,
    keep_records: bool,
    stream: bool,
    background: bool,
    /// What will be stored, without what is not known yet.
    row: Option<StoredResponse>,
}

impl Prepared {
    fn new(asked: Asked, mut request: ResponseRequest, context: Context) -> Result<Self, ApiError> {
        let model = asked.model(&request.model)?;
        let (stream, background, logprobs) = (request.generation.stream, request.background, request.logprobs);
        // Where texts are not to be recorded, one that stores them has to say so.
        let store =
            background || request.store.unwrap_or_else(|| asked.app.recording.of(ENDPOINT, model.base()).0 == Level::Full);
        if store {
            can_store(&asked.app.store)?;
        }
        let (owner, previous) = (owner(&asked.caller), request.previous);
        let (user_key, echo) = (request.generation.about.user_key.clone(), std::mem::take(&mut request.echo));
        let chat = chat_request(&model, request, &context.items)?;
        let run = ChatRun::prepare(asked, ENDPOINT, &chat).map_err(in_our_words)?;
        let mut input = context.new;
        item::number(&mut input, run.id);
        let now = now();
        let row = store.then(|| StoredResponse {
            id: run.id,
            created: now,
            owner,
            user_key,
            previous,
            status: ResponseStatus::InProgress,
            alive_until: None,
            input,
            body: Value::Null,
        });
        Ok(Self {
            output: Output::new(run.id, model.tokenizer().clone(), logprobs),
            template: Template::new(run.id, now.unsigned_abs() / 1_000_000, model.name(), store, run.tier, run.sampling(), echo),
            keep_records: logprobs.is_some(),
            run,
            stream,
            background,
            row,
        })
    }
}

/// The conversation of `items`, without its beginning where the request allows that and it has to be.
fn chat_request(model: &LocalModel, request: ResponseRequest, items: &[Value]) -> Result<ChatRequest, ApiError> {
    let instructions = request.instructions.as_deref();
    let mut chat = ChatRequest {
        prompt: ChatPrompt {
            messages: conversation::messages(instructions, items)?,
            add_generation_prompt: true,
            continue_final_message: false,
            template_kwargs: request.template_kwargs,
            reasoning_effort: request.reasoning_effort,
        },
        model: request.model,
        generation: request.generation,
        logprobs: request.logprobs,
        echo: false,
        store: false,
        tools: request.tools,
        tool_choice: request.tool_choice,
        parallel_tool_calls: request.parallel_tool_calls,
        legacy_calls: false,
        constraint: request.constraint,
    };
    if request.truncate && !fits(model, &chat)? {
        // The earliest place to begin from which all that follows fits; when none does, the last, and the error says how long it is.
        let cuts = conversation::cuts(items);
        let (mut low, mut high) = (0, cuts.len().saturating_sub(1));
        let from = |place: usize| {
            let cut = cuts.get(place).copied().unwrap_or_default();
            conversation::messages(instructions, &conversation::after(items, cut))
        };
        while low < high {
            let middle = low.midpoint(high);
            chat.prompt.messages = from(middle)?;
            if fits(model, &chat)? { high = middle } else { low = middle + 1 }
        }
        chat.prompt.messages = from(low)?;
    }
    Ok(chat)
}

/// Whether the conversation leaves room for an answer.
fn fits(model: &LocalModel, chat: &ChatRequest) -> Result<bool, ApiError> {
    let room = chat.generation.max_tokens.unwrap_or(ANSWER_ROOM);
    let (_, tokens) = model.chat_tokens(&chat.prompt, &chat.offered_tools()).map_err(in_our_words)?;
    Ok(tokens.len().saturating_add(room) <= model.context())
}

/// A conversation's error under the names that this endpoint has.
fn in_our_words(mut error: ApiError) -> ApiError {
    let name = match error.param.as_deref() {
        Some("messages") => "input",
        Some("reasoning_effort") => "reasoning.effort",
        Some("max_tokens" | "max_completion_tokens") => "max_output_tokens",
        _ => return error,
    };
    if let Some(theirs) = error.param.replace(name.into()) {
        error.message = error.message.replace(&format!("'{theirs}'"), &format!("'{name}'"));
        for before in ["your ", "the "] {
            error.message = error.message.replace(&format!("{before}{theirs}"), &format!("{before}{name}"));
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_a_conversation_name_the_fields_of_a_response() {
        let error = in_our_words(ApiError::context_length(100, 200, None, "messages"));
        assert_eq!(error.param.as_deref(), Some("input"));
        assert!(error.message.contains("your input resulted in 200 tokens") && !error.message.contains("messages"));
        let error = in_our_words(ApiError::invalid("reasoning_effort", "x", "'reasoning_effort' is not"));
        assert_eq!((error.param.as_deref(), error.message.as_str()), (Some("reasoning.effort"), "'reasoning.effort' is not"));
    }
}
