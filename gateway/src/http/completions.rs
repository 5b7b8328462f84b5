//! `POST /v1/completions`: from a body to a stream of events or one JSON object.

use crate::http::answer::json;
use crate::http::app::App;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::generate::{Asked, Pending, collect, engine_request, head};
use crate::http::limits::off_path;
use crate::http::remote;
use crate::http::sse;
use crate::limits::Meter;
use crate::openai::collected::Collected;
use crate::openai::completion_answer::{self, CompletionReport, PromptEcho};
use crate::openai::completion_stream::CompletionStream;
use crate::openai::completions::{CompletionRequest, PromptInput};
use crate::openai::response_format::Constrained;
use crate::openai::wire::AnswerHead;
use crate::recording::{self, Draft, Level};
use crate::telemetry::Follower;
use crate::upstream::LocalModel;
use crate::upstream::remote::request::Endpoint;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::Value;
use std::sync::Arc;

/// `POST /v1/completions`
pub async fn completions(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    remote::serve(&app, request, Endpoint::Completions, PreparedCompletion::new, PreparedCompletion::answer).await
}

struct PreparedCompletion {
    model: Arc<LocalModel>,
    head: AnswerHead,
    requests: Vec<tidemill_engine::Request>,
    report: CompletionReport,
    n: usize,
    best_of: usize,
    stream: bool,
    constraint: Option<Constrained>,
    processed: bool,
    record: Option<Pending>,
    follower: Option<Follower>,
    meter: Meter,
}

impl PreparedCompletion {
    async fn answer(mut self, in_flight: InFlight) -> Result<Response, ApiError> {
        let prompts = self.requests.len();
        if let Some(constraint) = &self.constraint {
            let grammar = self.model.grammar(constraint).await?;
            self.requests.iter_mut().for_each(|request| request.sampling.grammar = Some(grammar.clone()));
        }
        let events = self
            .model
            .submit(self.requests)?
            .recorded(self.record.map(Pending::start))
            .metered(self.meter)
            .followed(self.follower)
            .showing(self.processed);
        let tokenizer = self.model.tokenizer();
        if self.stream {
            let encoder = CompletionStream::new(&self.head, self.n, self.report, tokenizer);
            return Ok(sse::response(events, encoder, in_flight));
        }
        let keep = self.report.logprobs.is_some() || self.report.token_ids;
        let collected = collect(events, Collected::new(prompts, self.best_of, keep)).await?;
        let (tokenizer, n) = (tokenizer.clone(), self.n);
        let body =
            off_path(keep, move || completion_answer::to_json(&self.head, &self.report, &tokenizer, &collected, n)).await?;
        Ok(json(body))
    }

    fn new(asked: Asked, body: &Value) -> Result<Self, ApiError> {
        let completion = CompletionRequest::parse(body)?;
        let model = asked.model(&completion.model)?;
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
        let level = asked.level("completion", model.base(), id)?;
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
            let request = asked.placed(request, generation);
            if level != Level::Off {
                let mut inference = asked.inference("completion", &model, &request, &generation.about);
                if let Some(constrained) = &completion.constraint {
                    recording::constrained(&mut inference.params, &constrained.constraint);
                }
                inference.prompt_text = (level == Level::Full).then(text);
                let choice_ids = asked.choice_ids(own, generation.n);
                drafts.push(Draft { inference, choice_ids, candidates: completion.best_of, prompt_only, format: None });
            }
            requests.push(request);
            echoes.push(PromptEcho { text: completion.echo.then(text), tokens });
        }
        let meter = asked.admit(model.base(), requests.iter().map(|request| request.prompt.len()).collect())?;
        let head = head(&model, id, "cmpl", "text_completion");
        Ok(Self {
            head: AnswerHead { service_tier: asked.tier(generation), ..head },
            meter,
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
            constraint: completion.constraint.clone(),
            processed: generation.processed_logprobs,
            follower: asked.follow("text_completion", &model, &requests),
            record: (level != Level::Off).then(|| asked.pending(level, drafts)),
            requests,
            model,
        })
    }
}
