//! `POST /v1/chat/completions` and `POST /v1/completions`: from a body to a stream of events or one JSON object.

use crate::http::app::App;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::limits::{LONG_WORK, off_path, parse_json};
use crate::http::sse;
use crate::openai::chat::ChatRequest;
use crate::openai::chat_answer;
use crate::openai::chat_stream::{ChatReport, ChatStream};
use crate::openai::collected::{Collected, Flow};
use crate::openai::completion_answer::{self, CompletionReport, PromptEcho};
use crate::openai::completion_stream::CompletionStream;
use crate::openai::completions::{CompletionRequest, PromptInput};
use crate::openai::generation::Generation;
use crate::openai::wire::AnswerHead;
use crate::upstream::{Events, LocalModel, Registry, Upstream};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tidemill_engine::{AdapterGeneration, RequestId, SamplingParams};
use uuid::Uuid;

/// `POST /v1/chat/completions`
pub async fn chat(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let in_flight = enter(&app)?;
    let body = app.body.read(request).await?;
    let registry = Arc::clone(&app.registry);
    let prepared = off_path(body.len() > LONG_WORK, move || PreparedChat::new(&registry, &body)).await??;
    let events = prepared.model.submit(vec![prepared.request])?;
    let tokenizer = prepared.model.tokenizer();
    if prepared.stream {
        let encoder = ChatStream::new(&prepared.head, prepared.n, prepared.report, tokenizer.clone());
        return Ok(sse::response(events, encoder, in_flight));
    }
    let keep = prepared.report.logprobs.is_some() || prepared.report.prompt_token_ids.is_some();
    let collected = collect(events, Collected::new(1, prepared.n, keep)).await?;
    let tokenizer = tokenizer.clone();
    let body = off_path(keep, move || chat_answer::to_json(&prepared.head, &prepared.report, &tokenizer, &collected)).await?;
    Ok(json(body))
}

/// `POST /v1/completions`
pub async fn completions(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let in_flight = enter(&app)?;
    let body = app.body.read(request).await?;
    let registry = Arc::clone(&app.registry);
    let prepared = off_path(body.len() > LONG_WORK, move || PreparedCompletion::new(&registry, &body)).await??;
    let prompts = prepared.requests.len();
    let events = prepared.model.submit(prepared.requests)?;
    let tokenizer = prepared.model.tokenizer();
    if prepared.stream {
        let encoder = CompletionStream::new(&prepared.head, prepared.n, prepared.report, tokenizer);
        return Ok(sse::response(events, encoder, in_flight));
    }
    let keep = prepared.report.logprobs.is_some() || prepared.report.token_ids;
    let collected = collect(events, Collected::new(prompts, prepared.best_of, keep)).await?;
    let (tokenizer, n) = (tokenizer.clone(), prepared.n);
    let body =
        off_path(keep, move || completion_answer::to_json(&prepared.head, &prepared.report, &tokenizer, &collected, n)).await?;
    Ok(json(body))
}

fn enter(app: &App) -> Result<InFlight, ApiError> {
    let message = "The server is shutting down; send the request again, or to another replica.";
    app.drain.enter().ok_or_else(|| ApiError::unavailable(Some("draining"), message, 5))
}

async fn collect(mut events: Events, mut collected: Collected) -> Result<Collected, ApiError> {
    while let Some((prompt, event)) = events.next().await {
        if collected.event(prompt, event)? == Flow::End {
            return Ok(collected);
        }
    }
    Err(ApiError::fault("The engine stopped before the answer was complete."))
}

/// A response with a JSON body.
pub fn json(body: Bytes) -> Response {
    let mut response = body.into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn head(model: &LocalModel, id: Uuid, prefix: &str, object: &'static str) -> AnswerHead {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    AnswerHead {
        id: format!("{prefix}-{id}"),
        object,
        created,
        model: model.name().to_owned(),
        system_fingerprint: model.fingerprint().to_owned(),
    }
}

fn engine_request(id: Uuid, prompt: Vec<u32>, sampling: SamplingParams, generation: &Generation) -> tidemill_engine::Request {
    tidemill_engine::Request {
        id: RequestId(id.as_u128()),
        prompt,
        sampling,
        priority: generation.priority,
        cache_salt: generation.cache_salt.clone(),
        adapter: AdapterGeneration::default(),
    }
}

struct PreparedChat {
    model: Arc<LocalModel>,
    head: AnswerHead,
    request: tidemill_engine::Request,
    report: ChatReport,
    n: usize,
    stream: bool,
}

impl PreparedChat {
    fn new(registry: &Registry, body: &[u8]) -> Result<Self, ApiError> {
        let chat = ChatRequest::parse(&parse_json(body)?)?;
        let Upstream::Local(model) = registry.find(Some(&chat.model))?;
        let generation = &chat.generation;
        model.check_choices(generation.n, "n")?;
        let prompt = model.chat_tokens(&chat.prompt)?;
        model.check_fit(prompt.len(), generation.max_tokens, "messages")?;
        let id = Uuid::now_v7();
        let object = if generation.stream { "chat.completion.chunk" } else { "chat.completion" };
        Ok(Self {
            head: head(&model, id, "chatcmpl", object),
            report: ChatReport {
                logprobs: chat.logprobs,
                prompt_token_ids: generation.return_token_ids.then(|| prompt.clone()),
                include_usage: generation.include_usage,
                echo: chat.echoed_text().map(str::to_owned),
            },
            n: generation.n,
            stream: generation.stream,
            request: engine_request(id, prompt, generation.sampling(model.defaults(), chat.logprobs), generation),
            model,
        })
    }
}

struct PreparedCompletion {
    model: Arc<LocalModel>,
    head: AnswerHead,
    requests: Vec<tidemill_engine::Request>,
    report: CompletionReport,
    n: usize,
    best_of: usize,
    stream: bool,
}

impl PreparedCompletion {
    fn new(registry: &Registry, body: &[u8]) -> Result<Self, ApiError> {
        let asked = CompletionRequest::parse(&parse_json(body)?)?;
        let Upstream::Local(model) = registry.find(Some(&asked.model))?;
        let generation = &asked.generation;
        model.check_choices(asked.best_of, if asked.best_of > generation.n { "best_of" } else { "n" })?;
        model.check_prompts(asked.prompts.len())?;
        let mut sampling = generation.sampling(model.defaults(), asked.logprobs);
        sampling.n = asked.best_of;
        let prompt_only = sampling.max_tokens == Some(0);
        if prompt_only {
            // The engine always generates: one token is the least, and it is not shown.
            sampling.max_tokens = Some(1);
        }
        if asked.echo && asked.logprobs.is_some() {
            sampling.prompt_logprobs = sampling.prompt_logprobs.max(asked.logprobs);
        }
        let id = Uuid::now_v7();
        let mut requests = Vec::with_capacity(asked.prompts.len());
        let mut echoes = Vec::with_capacity(asked.prompts.len());
        for (at, prompt) in asked.prompts.iter().enumerate() {
            let tokens = model.prompt_tokens(prompt, asked.add_special_tokens)?;
            model.check_fit(tokens.len(), generation.max_tokens, "prompt")?;
            let text = asked.echo.then(|| match prompt {
                PromptInput::Text(text) => text.clone(),
                PromptInput::Tokens(tokens) => model.tokenizer().decode(tokens, false),
            });
            // The first prompt carries the answer's id; the engine needs one for each.
            let own = if at == 0 { id } else { Uuid::now_v7() };
            requests.push(engine_request(own, tokens.clone(), sampling.clone(), generation));
            echoes.push(PromptEcho { text, tokens });
        }
        Ok(Self {
            head: head(&model, id, "cmpl", "text_completion"),
            report: CompletionReport {
                logprobs: asked.logprobs,
                prompt_logprobs: generation.prompt_logprobs.is_some(),
                token_ids: generation.return_token_ids,
                include_usage: generation.include_usage,
                skip_special_tokens: sampling.skip_special_tokens,
                prompt_only,
                prompts: echoes,
            },
            n: generation.n,
            best_of: asked.best_of,
            stream: generation.stream,
            requests,
            model,
        })
    }
}
