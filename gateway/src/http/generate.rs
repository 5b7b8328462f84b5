//! `POST /v1/chat/completions` and `POST /v1/completions`: from a body to a stream of events or one JSON object.

use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::limits::{LONG_WORK, off_path, parse_json};
use crate::http::sse;
use crate::openai::about::About;
use crate::openai::chat::ChatRequest;
use crate::openai::chat_answer;
use crate::openai::chat_stream::{ChatReport, ChatStream};
use crate::openai::collected::{Collected, Flow};
use crate::openai::completion_answer::{self, CompletionReport, PromptEcho};
use crate::openai::completion_stream::CompletionStream;
use crate::openai::completions::{CompletionRequest, PromptInput};
use crate::openai::generation::Generation;
use crate::openai::wire::AnswerHead;
use crate::recording::{self, Draft, Level, Recorder};
use crate::upstream::{Events, LocalModel, Upstream};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tidemill_engine::{AdapterGeneration, RequestId, SamplingParams};
use tidemill_store::Store;
use tidemill_store::records::{Inference, Status};
use uuid::Uuid;

/// `POST /v1/chat/completions`
pub async fn chat(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let (in_flight, asked) = (enter(&app)?, Asked::new(&app, &request));
    let body = app.body.read(request).await?;
    let prepared = off_path(body.len() > LONG_WORK, move || PreparedChat::new(asked, &body)).await??;
    let events =
        prepared.model.submit(vec![prepared.request])?.recorded(prepared.record.map(Pending::start)).showing(prepared.processed);
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
    let (in_flight, asked) = (enter(&app)?, Asked::new(&app, &request));
    let body = app.body.read(request).await?;
    let prepared = off_path(body.len() > LONG_WORK, move || PreparedCompletion::new(asked, &body)).await??;
    let prompts = prepared.requests.len();
    let events =
        prepared.model.submit(prepared.requests)?.recorded(prepared.record.map(Pending::start)).showing(prepared.processed);
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

/// Lets a request in, unless the server is leaving.
pub fn enter(app: &App) -> Result<InFlight, ApiError> {
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

fn engine_request(
    model: &LocalModel,
    id: Uuid,
    prompt: Vec<u32>,
    mut sampling: SamplingParams,
    generation: &Generation,
) -> tidemill_engine::Request {
    // Drawn here where the request brings none, so that the record can say it.
    sampling.seed.get_or_insert_with(|| model.engine().draw_seed());
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
    processed: bool,
    record: Option<Pending>,
}

impl PreparedChat {
    fn new(asked: Asked, body: &[u8]) -> Result<Self, ApiError> {
        let chat = ChatRequest::parse(&parse_json(body)?)?;
        let Upstream::Local(model) = asked.app.registry.find(Some(&chat.model))?;
        let generation = &chat.generation;
        model.check_choices(generation.n, "n")?;
        let (text, prompt) = model.chat_tokens(&chat.prompt)?;
        model.check_fit(prompt.len(), generation.max_tokens, "messages")?;
        let sampling = generation.sampling(model.defaults(), chat.logprobs);
        let compare = generation.about.compare;
        if compare && sampling.temperature == 0.0 {
            let message = "Invalid 'tidemill.compare': at temperature 0 all choices are the same; raise 'temperature'.";
            return Err(ApiError::invalid("tidemill.compare", "invalid_value", message));
        }
        let id = asked.app.store.issue_id();
        let level = asked.level("chat", &model, id)?;
        let choice_ids = asked.choice_ids(id, generation.n);
        let report = ChatReport {
            logprobs: chat.logprobs,
            prompt_token_ids: generation.return_token_ids.then(|| prompt.clone()),
            include_usage: generation.include_usage,
            echo: chat.echoed_text().map(str::to_owned),
            choice_ids: compare.then(|| choice_ids.iter().map(|id| format!("chatcmpl-{id}")).collect()),
        };
        let object = if generation.stream { "chat.completion.chunk" } else { "chat.completion" };
        let request = engine_request(&model, id, prompt, sampling, generation);
        let draft = || {
            let mut inference = asked.inference("chat", &model, &request, &generation.about);
            if level == Level::Full {
                inference.messages = Some(Value::Array(chat.prompt.messages));
                inference.prompt_text = Some(text);
            }
            Draft { inference, candidates: choice_ids.len(), choice_ids, prompt_only: false }
        };
        let drafts = (level != Level::Off).then(|| vec![draft()]);
        Ok(Self {
            head: head(&model, id, "chatcmpl", object),
            report,
            n: generation.n,
            stream: generation.stream,
            processed: generation.processed_logprobs,
            record: drafts.map(|drafts| asked.pending(level, drafts)),
            request,
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
    processed: bool,
    record: Option<Pending>,
}

impl PreparedCompletion {
    fn new(asked: Asked, body: &[u8]) -> Result<Self, ApiError> {
        let completion = CompletionRequest::parse(&parse_json(body)?)?;
        let Upstream::Local(model) = asked.app.registry.find(Some(&completion.model))?;
        let generation = &completion.generation;
        model.check_choices(completion.best_of, if completion.best_of > generation.n { "best_of" } else { "n" })?;
        model.check_prompts(completion.prompts.len())?;
        let mut sampling = generation.sampling(model.defaults(), completion.logprobs);
        sampling.n = completion.best_of;
        let prompt_only = sampling.max_tokens == Some(0);
        if prompt_only {
            // The engine always generates: one token is the least, and it is not shown.
            sampling.max_tokens = Some(1);
        }
        if completion.echo && completion.logprobs.is_some() {
            sampling.prompt_logprobs = sampling.prompt_logprobs.max(completion.logprobs);
        }
        let id = asked.app.store.issue_id();
        let level = asked.level("completion", &model, id)?;
        let mut requests = Vec::with_capacity(completion.prompts.len());
        let mut echoes = Vec::with_capacity(completion.prompts.len());
        let mut drafts = Vec::new();
        for (at, prompt) in completion.prompts.iter().enumerate() {
            let tokens = model.prompt_tokens(prompt, completion.add_special_tokens)?;
            model.check_fit(tokens.len(), generation.max_tokens, "prompt")?;
            let text = || match prompt {
                PromptInput::Text(text) => text.clone(),
                PromptInput::Tokens(tokens) => model.tokenizer().decode(tokens, false),
            };
            // The first prompt carries the answer's id; each has a record of its own.
            let own = if at == 0 { id } else { asked.app.store.issue_id() };
            let request = engine_request(&model, own, tokens.clone(), sampling.clone(), generation);
            if level != Level::Off {
                let mut inference = asked.inference("completion", &model, &request, &generation.about);
                inference.prompt_text = (level == Level::Full).then(text);
                let choice_ids = asked.choice_ids(own, generation.n);
                drafts.push(Draft { inference, choice_ids, candidates: completion.best_of, prompt_only });
            }
            requests.push(request);
            echoes.push(PromptEcho { text: completion.echo.then(text), tokens });
        }
        Ok(Self {
            head: head(&model, id, "cmpl", "text_completion"),
            report: CompletionReport {
                logprobs: completion.logprobs,
                prompt_logprobs: generation.prompt_logprobs.is_some(),
                token_ids: generation.return_token_ids,
                include_usage: generation.include_usage,
                skip_special_tokens: sampling.skip_special_tokens,
                prompt_only,
                prompts: echoes,
            },
            n: generation.n,
            best_of: completion.best_of,
            stream: generation.stream,
            processed: generation.processed_logprobs,
            record: (level != Level::Off).then(|| asked.pending(level, drafts)),
            requests,
            model,
        })
    }
}

/// What a request brings beside its body.
struct Asked {
    app: App,
    caller: Caller,
    arrived: Instant,
}

impl Asked {
    fn new(app: &App, request: &Request) -> Self {
        Self { app: app.clone(), caller: Caller::of(request), arrived: Instant::now() }
    }

    /// How much of the answer is recorded; 503 when there is no room for what should be.
    fn level(&self, endpoint: &str, model: &LocalModel, id: Uuid) -> Result<Level, ApiError> {
        let level = self.app.recording.level(endpoint, model.name(), id);
        if level != Level::Off && !self.app.store.has_room() {
            let message =
                "The server cannot record answers right now: its database is away or slow. Send the request again later.";
            return Err(ApiError::unavailable(Some("records_full"), message, 5));
        }
        Ok(level)
    }

    /// The answer's own id and one for each further choice.
    fn choice_ids(&self, id: Uuid, n: usize) -> Vec<Uuid> {
        std::iter::once(id).chain((1..n).map(|_| self.app.store.issue_id())).collect()
    }

    /// What is known of an answer before its first token, without texts.
    fn inference(&self, endpoint: &str, model: &LocalModel, request: &tidemill_engine::Request, about: &About) -> Inference {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Inference {
            id: Uuid::from_u128(request.id.0),
            created: i64::try_from(created.as_micros()).unwrap_or(i64::MAX),
            endpoint: endpoint.to_owned(),
            model: model.name().to_owned(),
            adapter: request.adapter.0,
            variant: None,
            conversation: about.conversation.clone(),
            key_id: self.caller.key_id(),
            user_key: about.user_key.clone(),
            status: Status::Ok,
            compare: about.compare,
            prompt_tokens: u32::try_from(request.prompt.len()).unwrap_or(u32::MAX),
            cached_tokens: 0,
            output_tokens: 0,
            first_token_us: None,
            duration_us: 0,
            config_hash: model.fingerprint().to_owned(),
            metadata: about.metadata.clone(),
            params: Some(recording::to_json(&request.sampling)),
            messages: None,
            prompt_text: None,
            prompt_ids: request.prompt.clone(),
            choices: Vec::new(),
        }
    }

    fn pending(self, level: Level, drafts: Vec<Draft>) -> Pending {
        Pending { store: self.app.store, level, arrived: self.arrived, drafts }
    }
}

/// Records that begin once the engine has taken the request: what it refuses is no answer.
struct Pending {
    store: Store,
    level: Level,
    arrived: Instant,
    drafts: Vec<Draft>,
}

impl Pending {
    fn start(self) -> Recorder {
        Recorder::new(self.store, self.level, self.arrived, self.drafts)
    }
}
