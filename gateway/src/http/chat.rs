//! `POST /v1/chat/completions`, and the run that every endpoint with a conversation goes through.

use crate::http::answer::json;
use crate::http::app::App;
use crate::http::call_rules::CallRules;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::generate::{Asked, Pending, engine_request, head};
use crate::http::limits::off_path;
use crate::http::remote;
use crate::http::sse;
use crate::http::stored_chats::KeptChat;
use crate::limits::Meter;
use crate::openai::chat::ChatRequest;
use crate::openai::chat_answer;
use crate::openai::chat_output::{ChatCollected, OutputFormat};
use crate::openai::chat_stream::{ChatReport, ChatStream};
use crate::openai::parse::CallFormat;
use crate::openai::response_format::Constrained;
use crate::openai::tool_grammar::thoughtful;
use crate::openai::tools::Tool;
use crate::openai::wire::AnswerHead;
use crate::recording::{self, Draft, Level};
use crate::telemetry::Follower;
use crate::upstream::remote::request::Endpoint;
use crate::upstream::{Events, LocalModel};
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::Value;
use std::sync::Arc;
use tidemill_engine::{Constraint, SamplingParams};
use tidemill_store::Tier;
use uuid::Uuid;

/// `POST /v1/chat/completions`
pub async fn chat(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    remote::serve(&app, request, Endpoint::Chat, PreparedChat::new, PreparedChat::answer).await
}

/// A conversation that was checked, templated and tokenised, with its record prepared: ready for the engine.
pub struct ChatRun {
    /// Who answers.
    pub model: Arc<LocalModel>,
    /// The answer, which is also its first choice.
    pub id: Uuid,
    /// One per choice.
    pub choice_ids: Vec<Uuid>,
    /// How the model writes reasoning and tool calls.
    pub format: OutputFormat,
    /// The tier that the request was given.
    pub tier: Tier,
    request: tidemill_engine::Request,
    meter: Meter,
    rules: Rules,
    processed: bool,
    record: Option<Pending>,
    follower: Option<Follower>,
}

/// What the answer must be.
struct Rules {
    constraint: Option<Constrained>,
    calls: Option<CallRules>,
    /// The constraint as a grammar that lets the model reason before.
    thoughtful: Option<String>,
}

impl ChatRun {
    /// Everything that can be refused is refused here. `endpoint` is what the record calls it, such as `chat`.
    pub fn prepare(asked: Asked, endpoint: &'static str, chat: &ChatRequest) -> Result<Self, ApiError> {
        let model = asked.model(&chat.model)?;
        let generation = &chat.generation;
        model.check_choices(generation.n, "n")?;
        let offered = chat.offered_tools();
        let (text, prompt) = model.chat_tokens(&chat.prompt, &offered)?;
        model.check_fit(prompt.len(), generation.max_tokens.filter(|_| !generation.shorten), "messages")?;
        let mut sampling = generation.sampling(model.defaults(), chat.logprobs);
        sampling.shown_special = Arc::clone(model.shown_special());
        if generation.about.compare && sampling.temperature == 0.0 {
            let message = "Invalid 'tidemill.compare': at temperature 0 all choices are the same; raise 'temperature'.";
            return Err(ApiError::invalid("tidemill.compare", "invalid_value", message));
        }
        let id = asked.app.store.issue_id();
        let single_call = !chat.parallel_tool_calls;
        let mut format = OutputFormat { single_call, ..model.parsers().format(&text, &offered, id.as_u128()) };
        let calls = CallRules::of(chat);
        if calls.is_some() {
            format.calls = format.calls.map(|calls| CallFormat::Json(calls.constrained()));
        }
        let answer = chat.constraint.as_ref().filter(|_| calls.is_none()).map(|answer| &answer.constraint);
        let thoughtful = answer.and_then(|answer| thoughtful(&format, answer, &|mark| model.control_token(mark)));
        if answer.is_some() && thoughtful.is_none() {
            // The answer begins at once, whatever the prompt ends with: nothing of it is reasoning.
            format.reasoning = None;
        }
        let level = asked.level(endpoint, model.base(), id)?;
        let choice_ids = asked.choice_ids(id, generation.n);
        let request = asked.placed(engine_request(&model, id, prompt, sampling, generation), generation);
        let (tier, meter) = (asked.tier(generation), asked.admit(model.base(), vec![request.prompt.len()])?);
        let draft = || {
            let mut inference = asked.inference(endpoint, &model, &request, &generation.about);
            if let Some(constrained) = &chat.constraint {
                recording::constrained(&mut inference.params, &constrained.constraint);
            }
            if level == Level::Full {
                inference.messages = Some(Value::Array(chat.prompt.messages.clone()));
                inference.params = inference.params.map(|params| with_tools(params, &offered));
                inference.prompt_text = Some(text);
            }
            let format = Some(format.clone());
            Draft { inference, candidates: choice_ids.len(), choice_ids: choice_ids.clone(), prompt_only: false, format }
        };
        let follower = asked.follow("chat", &model, std::slice::from_ref(&request));
        let drafts = (level != Level::Off).then(|| vec![draft()]);
        let record = drafts.map(|drafts| asked.pending(level, drafts));
        let (processed, constraint) = (generation.processed_logprobs, chat.constraint.clone());
        let rules = Rules { constraint, calls, thoughtful };
        Ok(Self { model, id, choice_ids, format, tier, request, meter, rules, processed, record, follower })
    }

    /// How it is sampled, defaults included.
    pub fn sampling(&self) -> &SamplingParams {
        &self.request.sampling
    }

    /// The prompt's tokens.
    pub fn prompt_ids(&self) -> &[u32] {
        &self.request.prompt
    }

    /// Compiles its constraint, if it has one, and hands it to the engine. The record begins once the engine has taken it: what is
    /// refused is no answer.
    pub async fn start(mut self) -> Result<Events, ApiError> {
        let Rules { constraint, calls, thoughtful } = &self.rules;
        let model = &self.model;
        self.request.sampling.grammar = match (calls, constraint) {
            (Some(calls), answer) => Some(model.grammar(&calls.constraint(model, &self.format, answer.as_ref()).await?).await?),
            (None, None) => None,
            (None, Some(constraint)) => {
                // By itself first: what is wrong with it is said in its own words.
                let grammar = model.grammar(constraint).await?;
                match thoughtful {
                    None => Some(grammar),
                    Some(lark) => {
                        let (constraint, param) = (Constraint::Lark(lark.clone()), constraint.param.clone());
                        Some(model.grammar(&Constrained { constraint, param }).await?)
                    }
                }
            }
        };
        let events = self.model.submit(vec![self.request])?;
        let events = events.recorded(self.record.map(Pending::start)).metered(self.meter).followed(self.follower);
        Ok(events.showing(self.processed))
    }
}

/// Parameters for the record, with the tools that the model was told of.
fn with_tools(mut params: Value, offered: &[&Tool]) -> Value {
    if let (Some(params), false) = (params.as_object_mut(), offered.is_empty()) {
        params.insert("tools".into(), offered.iter().map(|tool| tool.to_template()).collect());
    }
    params
}

struct PreparedChat {
    run: ChatRun,
    head: AnswerHead,
    report: ChatReport,
    stream: bool,
    keep: Option<KeptChat>,
}

impl PreparedChat {
    fn new(asked: Asked, body: &Value) -> Result<Self, ApiError> {
        let chat = ChatRequest::parse(body)?;
        let run = ChatRun::prepare(asked.clone(), "chat", &chat)?;
        let generation = &chat.generation;
        let object = if generation.stream { "chat.completion.chunk" } else { "chat.completion" };
        let choice_ids = || run.choice_ids.iter().map(|id| format!("chatcmpl-{id}")).collect();
        let report = ChatReport {
            logprobs: chat.logprobs,
            prompt_token_ids: generation.return_token_ids.then(|| run.prompt_ids().to_vec()),
            include_usage: generation.include_usage,
            echo: chat.echoed_text().map(str::to_owned),
            choice_ids: generation.about.compare.then(choice_ids),
            legacy_calls: chat.legacy_calls,
        };
        let head = AnswerHead { service_tier: run.tier, ..head(&run.model, run.id, "chatcmpl", object) };
        let keep = chat.store.then(|| KeptChat::new(&asked, body, &generation.about, &run, &report)).transpose()?;
        Ok(Self { head, report, stream: generation.stream, keep, run })
    }

    async fn answer(self, in_flight: InFlight) -> Result<Response, ApiError> {
        let Self { run, head, report, stream, keep } = self;
        let (format, n, tokenizer) = (run.format.clone(), run.choice_ids.len(), run.model.tokenizer().clone());
        let events = run.start().await?;
        if stream {
            let mut stream = ChatStream::new(&head, n, report, format, tokenizer);
            if let Some(keep) = keep {
                stream = stream.keeping(|collected| Box::pin(keep.save(collected)));
            }
            return Ok(sse::response(events, stream, in_flight));
        }
        let records = report.keeps_records();
        let collected = ChatCollected::of(events, format, n, records).await?;
        let body = off_path(records, move || chat_answer::to_json(&head, &report, &tokenizer, &collected)).await?;
        if let Some(keep) = keep {
            keep.save_body(&body).await?;
        }
        Ok(json(body))
    }
}
