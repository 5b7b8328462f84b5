//! What is known of a request once it is over: its log line and its spans.

use crate::upstream::LocalModel;
use hyper::{HeaderMap, Method, StatusCode};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tidemill_engine::{EmbedRequest, Event, RequestId, SamplingParams};
use uuid::Uuid;

/// The operation that has vectors for an answer.
const EMBEDDINGS: &str = "embeddings";

/// Begins trails. Cloning is cheap.
#[derive(Clone)]
pub struct Observer {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    content: bool,
}

impl Default for Observer {
    fn default() -> Self {
        Self::new(super::outbox::silent(), false)
    }
}

impl Observer {
    /// Spans go to `provider`. `content`: prompts and answers are written to the log.
    pub fn new(provider: SdkTracerProvider, content: bool) -> Self {
        Self { tracer: provider.tracer("tidemill"), provider, content }
    }

    /// A request to a route such as `/v1/feedback/{id}`; its trace goes on from the caller's `traceparent`.
    pub fn begin(&self, method: &Method, route: &str, headers: &HeaderMap, request_id: &str) -> Trail {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        let attributes = [
            KeyValue::new("http.request.method", method_label(method)),
            KeyValue::new("http.route", route.to_owned()),
            KeyValue::new("tidemill.request_id", request_id.to_owned()),
        ];
        let builder = self.tracer.span_builder(format!("{} {route}", method_label(method)));
        let span = builder.with_kind(SpanKind::Server).with_attributes(attributes).start_with_context(&self.tracer, &parent);
        let facts = Facts { key: None, generations: Vec::new() };
        Trail(Arc::new(Inner {
            tracer: self.tracer.clone(),
            content: self.content,
            context: span.span_context().clone(),
            span: Mutex::new(span),
            facts: Mutex::new(facts),
        }))
    }

    /// Sends what waits. Blocks for some seconds at most.
    pub fn close(&self) {
        if let Err(error) = self.provider.shutdown() {
            tracing::debug!(%error, "spans were not closed");
        }
    }
}

/// Methods are the client's to invent; labels are not.
pub fn method_label(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        "DELETE" => "DELETE",
        "PATCH" => "PATCH",
        _ => "other",
    }
}

/// A request under way; an extension of it. Whoever handles it adds what it learns.
#[derive(Clone)]
pub struct Trail(Arc<Inner>);

struct Inner {
    tracer: SdkTracer,
    content: bool,
    context: SpanContext,
    span: Mutex<Span>,
    facts: Mutex<Facts>,
}

struct Facts {
    key: Option<String>,
    generations: Vec<Generation>,
}

/// How a request ended.
pub struct Outcome {
    /// Of the response.
    pub status: StatusCode,
    /// From the request's head to the answer's last byte.
    pub taken: Duration,
    /// The client took all of the answer.
    pub complete: bool,
}

/// What a request was, for the log.
pub struct Line {
    /// Id of the key that was sent.
    pub key: Option<String>,
    /// Who answered.
    pub model: Option<String>,
    /// Tokens of all prompts.
    pub input_tokens: Option<u64>,
    /// Tokens of all answers.
    pub output_tokens: Option<u64>,
}

impl Trail {
    /// Sixteen bytes in hexadecimal digits.
    pub fn trace_id(&self) -> String {
        self.0.context.trace_id().to_string()
    }

    /// The trace for those who are asked on the request's behalf, as W3C's Trace Context writes it.
    pub fn traceparent(&self) -> String {
        let context = &self.0.context;
        format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags().to_u8())
    }

    /// The key that was sent.
    pub fn key(&self, id: Option<String>) {
        self.0.facts.lock().unwrap_or_else(PoisonError::into_inner).key = id;
    }

    /// Follows the answers to `requests`, which `model` is about to take. `operation` is the convention's name, such as `chat`.
    pub fn follow(&self, operation: &'static str, model: &LocalModel, requests: &[tidemill_engine::Request]) -> Follower {
        let asked = requests.first().map(|first| asked(&first.sampling)).unwrap_or_default();
        let prompts: Vec<_> = requests.iter().map(|request| (request.id, request.prompt.as_slice())).collect();
        self.begin(operation, model, &prompts, asked)
    }

    /// Follows the vectors of `texts`, which `model` is about to compute, to have so many `dimensions` and be written in `encoding`.
    pub fn follow_embeddings(&self, model: &LocalModel, texts: &[EmbedRequest], dimensions: usize, encoding: &str) -> Follower {
        let encodings = Array::String(vec![StringValue::from(encoding.to_owned())]);
        let asked = vec![
            KeyValue::new("gen_ai.embeddings.dimension.count", i64::try_from(dimensions).unwrap_or(i64::MAX)),
            KeyValue::new("gen_ai.request.encoding_formats", Value::Array(encodings)),
        ];
        let texts: Vec<_> = texts.iter().map(|text| (text.id, text.tokens.as_slice())).collect();
        self.begin(EMBEDDINGS, model, &texts, asked)
    }

    /// Follows an answer that another server gives to `prompt`; `model` is the public name.
    pub fn follow_remote(&self, operation: &'static str, model: &str, id: Option<Uuid>, prompt: &serde_json::Value) -> Follower {
        let (model, began) = (model.to_owned(), Some(SystemTime::now()));
        let generation = Generation { operation, model, id, began, ..Generation::default() };
        let content = self.0.content.then(|| Content { prompts: vec![prompt.to_string()], answers: Vec::new() });
        Follower { trail: self.clone(), begun: Instant::now(), generation, content }
    }

    fn begin(
        &self,
        operation: &'static str,
        model: &LocalModel,
        prompts: &[(RequestId, &[u32])],
        asked: Vec<KeyValue>,
    ) -> Follower {
        let generation = Generation {
            operation,
            model: model.name().to_owned(),
            id: prompts.first().map(|(id, _)| Uuid::from_u128(id.0)),
            began: Some(SystemTime::now()),
            input_tokens: prompts.iter().map(|(_, tokens)| tokens.len() as u64).sum(),
            asked,
            ..Generation::default()
        };
        let texts = || prompts.iter().map(|(_, tokens)| model.tokenizer().decode(tokens, false)).collect();
        let content = self.0.content.then(|| Content { prompts: texts(), answers: Vec::new() });
        Follower { trail: self.clone(), begun: Instant::now(), generation, content }
    }

    /// Ends the spans; what is left is for the log.
    pub fn end(&self, outcome: &Outcome) -> Line {
        let facts = {
            let mut facts = self.0.facts.lock().unwrap_or_else(PoisonError::into_inner);
            Facts { key: facts.key.take(), generations: std::mem::take(&mut facts.generations) }
        };
        let sum = |count: fn(&Generation) -> u64| match &facts.generations[..] {
            [] => None,
            some => Some(some.iter().map(count).sum()),
        };
        let line = Line {
            model: facts.generations.first().map(|generation| generation.model.clone()),
            input_tokens: sum(|generation| generation.input_tokens),
            output_tokens: sum(|generation| generation.output_tokens),
            key: facts.key,
        };
        let mut span = self.0.span.lock().unwrap_or_else(PoisonError::into_inner);
        if span.is_recording() {
            let parent = Context::new().with_remote_span_context(self.0.context.clone());
            for generation in facts.generations {
                generation.export(&self.0.tracer, &parent);
            }
            span.set_attribute(KeyValue::new("http.response.status_code", i64::from(outcome.status.as_u16())));
            span.set_attributes(line.key.clone().map(|key| KeyValue::new("tidemill.key_id", key)));
            if outcome.status.is_server_error() {
                span.set_attribute(KeyValue::new("error.type", outcome.status.as_u16().to_string()));
                span.set_status(Status::error(outcome.status.canonical_reason().unwrap_or("error")));
            } else if !outcome.complete {
                span.set_attribute(KeyValue::new("error.type", "client_left"));
            }
        }
        span.end();
        line
    }
}

/// One call of a model, in the terms of OpenTelemetry's conventions for generative AI.
#[derive(Default)]
struct Generation {
    operation: &'static str,
    model: String,
    id: Option<Uuid>,
    began: Option<SystemTime>,
    ended: Option<SystemTime>,
    first_token: Option<Duration>,
    input_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    finish_reasons: Vec<String>,
    failed: bool,
    asked: Vec<KeyValue>,
    /// The other server that answers, its kind, and what it says it is.
    upstream: Option<(String, &'static str)>,
    answered: Option<String>,
}

/// <https://opentelemetry.io/docs/specs/semconv/registry/attributes/gen-ai/>
fn asked(sampling: &SamplingParams) -> Vec<KeyValue> {
    let whole = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let mut asked = vec![
        KeyValue::new("gen_ai.request.choice.count", whole(sampling.n)),
        KeyValue::new("gen_ai.request.temperature", f64::from(sampling.temperature)),
        KeyValue::new("gen_ai.request.top_p", f64::from(sampling.top_p)),
        KeyValue::new("gen_ai.request.top_k", i64::from(sampling.top_k)),
        KeyValue::new("gen_ai.request.frequency_penalty", f64::from(sampling.frequency_penalty)),
        KeyValue::new("gen_ai.request.presence_penalty", f64::from(sampling.presence_penalty)),
    ];
    asked.extend(sampling.max_tokens.map(|most| KeyValue::new("gen_ai.request.max_tokens", whole(most))));
    // The convention counts in 64 bits with a sign; seeds are bits.
    asked.extend(sampling.seed.map(|seed| KeyValue::new("gen_ai.request.seed", seed.cast_signed())));
    asked
}

impl Generation {
    fn export(self, tracer: &SdkTracer, parent: &Context) {
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let mut attributes = self.asked;
        let (provider, kind, failure) = match &self.upstream {
            Some((_, provider)) => (*provider, SpanKind::Client, "upstream_failed"),
            None => ("tidemill", SpanKind::Internal, "engine_failed"),
        };
        attributes.extend(self.upstream.map(|(upstream, _)| KeyValue::new("tidemill.upstream", upstream)));
        attributes.extend([
            KeyValue::new("gen_ai.operation.name", self.operation),
            KeyValue::new("gen_ai.provider.name", provider),
            KeyValue::new("gen_ai.request.model", self.model.clone()),
            KeyValue::new("gen_ai.response.model", self.answered.unwrap_or_else(|| self.model.clone())),
            KeyValue::new("gen_ai.usage.input_tokens", whole(self.input_tokens)),
        ]);
        attributes.extend(self.id.map(|id| KeyValue::new("gen_ai.response.id", id.to_string())));
        attributes.extend(self.first_token.map(|time| KeyValue::new("gen_ai.response.time_to_first_chunk", time.as_secs_f64())));
        if self.operation != EMBEDDINGS {
            let reasons = self.finish_reasons.into_iter().map(StringValue::from).collect();
            attributes.extend([
                KeyValue::new("gen_ai.usage.cache_read.input_tokens", whole(self.cached_tokens)),
                KeyValue::new("gen_ai.usage.output_tokens", whole(self.output_tokens)),
                KeyValue::new("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons))),
            ]);
        }
        if self.failed {
            attributes.push(KeyValue::new("error.type", failure));
        }
        let builder = tracer.span_builder(format!("{} {}", self.operation, self.model));
        let mut builder = builder.with_kind(kind).with_attributes(attributes);
        builder.start_time = self.began;
        let mut span = builder.start_with_context(tracer, parent);
        if self.failed {
            span.set_status(Status::error(failure));
        }
        span.end_with_timestamp(self.ended.unwrap_or_else(SystemTime::now));
    }
}

struct Content {
    prompts: Vec<String>,
    answers: Vec<(usize, usize, String)>,
}

/// Counts an answer's events as they pass; dropping it ends the count.
pub struct Follower {
    trail: Trail,
    begun: Instant,
    generation: Generation,
    content: Option<Content>,
}

impl Follower {
    /// Takes note of an event of prompt `index`.
    pub fn see(&mut self, index: usize, event: &Event) {
        let generation = &mut self.generation;
        match event {
            Event::Prompt { cached_tokens, .. } => generation.cached_tokens += *cached_tokens as u64,
            Event::Token { choice, text, .. } => {
                generation.first_token.get_or_insert_with(|| self.begun.elapsed());
                generation.output_tokens += 1;
                self.say(index, *choice, text);
            }
            Event::Finished { choice, reason, text, .. } => {
                generation.finish_reasons.push(reason.to_string());
                self.say(index, *choice, text);
            }
            Event::Failed(_) => generation.failed = true,
            Event::Done(_) | Event::Expired => {}
        }
    }

    /// Another server is asked, of a kind that the convention has a word for.
    pub fn asks(&mut self, upstream: &str, provider: &'static str) {
        self.generation.upstream = Some((upstream.to_owned(), provider));
    }

    /// The first token of another server's answer has come.
    pub fn first_token(&mut self) {
        self.generation.first_token.get_or_insert_with(|| self.begun.elapsed());
    }

    /// All that there is of another server's answer: its tokens, who it says gave it, and of each choice the text and how it ended.
    pub fn answered<'a>(
        &mut self,
        (input, cached, output): (usize, usize, usize),
        model: Option<String>,
        choices: impl Iterator<Item = (&'a str, Option<&'a str>)>,
    ) {
        let generation = &mut self.generation;
        (generation.input_tokens, generation.cached_tokens) = (input as u64, cached as u64);
        (generation.output_tokens, generation.answered) = (output as u64, model);
        for (index, (text, finish)) in choices.enumerate() {
            self.generation.finish_reasons.extend(finish.map(str::to_owned));
            self.say(0, index, text);
        }
    }

    /// The answer has failed, and there is no event that says so.
    pub fn failed(&mut self) {
        self.generation.failed = true;
    }

    fn say(&mut self, index: usize, choice: usize, text: &str) {
        let Some(content) = &mut self.content else { return };
        match content.answers.iter_mut().find(|(prompt, of, _)| (*prompt, *of) == (index, choice)) {
            Some((_, _, said)) => said.push_str(text),
            None => content.answers.push((index, choice, text.to_owned())),
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if let Some(Content { prompts, answers }) = self.content.take() {
            let answers: Vec<_> = answers.into_iter().map(|(_, _, text)| text).collect();
            tracing::info!(target: "tidemill::content", trace_id = self.trail.trace_id(), ?prompts, ?answers, "content");
        }
        let facts = &self.trail.0.facts;
        let ended = Generation { ended: Some(SystemTime::now()), ..std::mem::take(&mut self.generation) };
        facts.lock().unwrap_or_else(PoisonError::into_inner).generations.push(ended);
    }
}
