//! Requests for models that other servers answer: asked again, asked elsewhere, or given up before the first byte, and passed on as they
//! come after it.

mod account;
mod passing;

use crate::http::answer::json;
use crate::http::app::App;
use crate::http::assigned::{self, Shape};
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::generate::{Asked, enter};
use crate::http::limits::{LONG_WORK, off_path};
use crate::http::sse;
use crate::openai::about::About;
use crate::openai::collected::cancelled;
use crate::openai::completions::{PromptInput, prompts};
use crate::openai::fields::Fields;
use crate::openai::generation::{MAX_N, count, stream_options};
use crate::openai::messages;
use crate::recording::{Level, RemoteRecord};
use crate::upstream::remote::chunk::{Rewriter, begins};
use crate::upstream::remote::request::{self, Endpoint};
use crate::upstream::remote::retry::{Failure, Next};
use crate::upstream::remote::server::Turn;
use crate::upstream::remote::stream::{ChunkStream, Said};
use crate::upstream::{RemoteModel, Upstream};
use account::Account;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use metrics::counter;
use passing::Passing;
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use tidemill_store::records::Status;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

/// Most bytes of an answer that is not streamed.
const MOST_ANSWER: usize = 64 << 20;
/// Most chunks without a token that are held back before the first one.
const MOST_HELD: usize = 64;

/// A request that was looked through.
struct RemoteCall {
    asked: Asked,
    endpoint: Endpoint,
    body: Arc<Map<String, Value>>,
    model: Arc<RemoteModel>,
    about: About,
    stream: bool,
    /// The client wants to know of tokens.
    usage: bool,
    id: Uuid,
    choice_ids: Vec<Uuid>,
    prefix: u64,
    /// The prompt as it is recorded: messages, or a text.
    prompt: Value,
    /// Bytes of it.
    length: usize,
}

/// Who answers in the end.
enum Answerer {
    /// Another server has answered.
    Remote(Response),
    /// A model in this process is to: its name is in the body.
    Local {
        /// The client's, with that name.
        body: Value,
        /// It takes its time to be prepared.
        long: bool,
        /// As it came.
        asked: Box<Asked>,
        /// As it came.
        in_flight: InFlight,
    },
}

/// Why one model gave no answer.
enum Stop {
    /// Another one may.
    Next(ApiError),
    /// No other one can.
    Tell(ApiError),
}

/// An answer that has begun.
enum Opening {
    Stream(ChunkStream, VecDeque<Value>),
    Whole(Value),
}

/// The same, with its account and the time at which it must be over.
struct Begun {
    opening: Opening,
    account: Account,
    end: Instant,
}

/// A request that was prepared for whoever answers it.
enum Prepared<T> {
    Remote(Box<RemoteCall>),
    Local(T),
}

/// Answers a request as the variant that its model's name is assigned to: another server does where that is one of its, else `run` does
/// what `prepare` has made of it.
pub async fn serve<T, F>(
    app: &App,
    request: Request,
    endpoint: Endpoint,
    prepare: fn(Asked, &Value) -> Result<T, ApiError>,
    run: fn(T, InFlight) -> F,
) -> Result<Response, ApiError>
where
    T: Send + 'static,
    F: Future<Output = Result<Response, ApiError>> + Send + 'static,
{
    let (in_flight, asked) = (enter(app)?, Asked::new(app, &request));
    let look = move |asked: Asked, body: Value| match asked.remote(&body) {
        Some(model) => RemoteCall::parse(asked, model, endpoint, body).map(|call| Prepared::Remote(Box::new(call))),
        None => prepare(asked, &body).map(Prepared::Local),
    };
    let first = move |body: Value| {
        let (plan, body) = assigned::plan(asked, Shape::of(endpoint), body)?;
        plan.prepare(body, look)
    };
    let first = app.body.parsed(request, first).await?;
    let answered = move |prepared: Prepared<T>, in_flight: InFlight| async move {
        match prepared {
            Prepared::Local(prepared) => run(prepared, in_flight).await,
            Prepared::Remote(call) => match Box::pin(call.answer(in_flight)).await? {
                Answerer::Remote(response) => Ok(response),
                Answerer::Local { body, long, asked, in_flight } => {
                    let prepared = off_path(long, move || prepare(*asked, &body)).await??;
                    run(prepared, in_flight).await
                }
            },
        }
    };
    assigned::answer(app, first, in_flight, look, answered).await
}

impl RemoteCall {
    /// Checks what this gateway needs to know. The rest is between the client and the server, which may know more than this gateway.
    fn parse(asked: Asked, model: Arc<RemoteModel>, endpoint: Endpoint, body: Value) -> Result<Self, ApiError> {
        let mut fields = Fields::root(&body)?;
        let about = About::parse(&mut fields)?;
        let stream = endpoint != Endpoint::Embeddings && fields.bool_or("stream", false)?;
        let wanted = stream_options(&mut fields, stream)?;
        let n = count(&mut fields, "n", 1..=MAX_N)?.unwrap_or(1);
        if endpoint == Endpoint::Chat {
            about.check_choices(n)?;
        }
        if fields.bool_or("store", false)? {
            let message = "Unsupported parameter: 'store' is not supported with a model that another server answers.";
            return Err(ApiError::unsupported("store", message));
        }
        let prompt = match endpoint {
            Endpoint::Chat => {
                let field = fields.require("messages")?;
                field.filled_array(usize::MAX)?;
                // As datasets read them where they are only text, and otherwise as they are.
                messages::parse(&field).map_or_else(|_| field.value.clone(), Value::Array)
            }
            Endpoint::Completions => one_prompt(&mut fields)?,
            Endpoint::Embeddings => fields.require("input")?.value.clone(),
        };
        let id = asked.app.store.issue_id();
        let Value::Object(mut body) = body else {
            return Err(ApiError::bad_request("The request body must be a JSON object."));
        };
        if let (Some(prefix), Endpoint::Chat) = (asked.prompt_prefix(), endpoint)
            && let Some(messages) = body.get_mut("messages").and_then(Value::as_array_mut)
        {
            request::put_before(prefix, messages);
        }
        Ok(Self {
            choice_ids: asked.choice_ids(id, n),
            prefix: request::prefix_key(&body),
            length: prompt.to_string().len(),
            body: Arc::new(body),
            usage: !stream || wanted,
            asked,
            endpoint,
            model,
            about,
            stream,
            id,
            prompt,
        })
    }

    /// The answer: of the model itself, or of the first of its fallbacks that gives one. When none does, the client is told of the first
    /// failure: the others are the operator's affair.
    async fn answer(self, in_flight: InFlight) -> Result<Answerer, ApiError> {
        let cut_off = self.asked.app.drain.is_cut_off();
        tokio::select! {
            answer = Box::pin(self.any(in_flight)) => answer,
            () = cut_off => Err(cancelled()),
        }
    }

    async fn any(self, in_flight: InFlight) -> Result<Answerer, ApiError> {
        let app = self.asked.app.clone();
        let mut first = match self.of(&app, &self.model).await {
            Ok(begun) => return Ok(Answerer::Remote(self.pass_on(&self.model, begun, in_flight))),
            Err(Stop::Tell(error)) => return Err(error),
            Err(Stop::Next(error)) => error,
        };
        for name in &self.model.spec().fallback {
            // What a key may not use it may not use this way either.
            if self.asked.caller.check_model(name).is_err() {
                continue;
            }
            let upstream = match app.registry.find(Some(name)) {
                Ok(upstream) => upstream,
                Err(error) => {
                    tracing::warn!(
                        model = self.model.name(),
                        fallback = name,
                        error = error.message,
                        "a fallback cannot be asked"
                    );
                    continue;
                }
            };
            tracing::debug!(model = self.model.name(), fallback = name, "another model is asked");
            counter!("tidemill:upstream_fallbacks_total", "model" => self.model.name().to_owned(), "to" => name.clone())
                .increment(1);
            match upstream {
                Upstream::Remote(model) => match self.of(&app, &model).await {
                    Ok(begun) => return Ok(Answerer::Remote(self.pass_on(&model, begun, in_flight))),
                    Err(Stop::Tell(error)) => {
                        first = error;
                        break;
                    }
                    Err(Stop::Next(_)) => {}
                },
                Upstream::Local(_) => {
                    let mut body = Arc::unwrap_or_clone(self.body);
                    body.insert("model".into(), name.as_str().into());
                    let long = self.length > LONG_WORK;
                    return Ok(Answerer::Local { body: Value::Object(body), long, asked: Box::new(self.asked), in_flight });
                }
            }
        }
        Err(first)
    }

    /// Asks the servers of one model until one begins to answer.
    async fn of(&self, app: &App, model: &Arc<RemoteModel>) -> Result<Begun, Stop> {
        let spec = model.spec();
        let mut account = self.account(app, model)?;
        let end = Instant::now() + spec.timeout;
        let mut asked = Vec::new();
        let mut last: Option<Failure> = None;
        let mut attempt = 0;
        loop {
            let draw = self.draw(model, attempt);
            let Some((mut turn, elsewhere)) = model.choose(self.prefix, draw, &asked, self.asked.is_copy()) else {
                account.discard();
                return Err(Stop::Next(last.map_or_else(|| nobody(model), |failure| failure.tell(model.name()))));
            };
            let failure = match self.attempt(model, &turn, &mut account, end).await {
                Ok(opening) => {
                    turn.succeeded();
                    account.answers(turn);
                    return Ok(Begun { opening, account, end });
                }
                Err(failure) => failure,
            };
            turn.failed(&failure);
            let upstream = turn.server().spec().name.clone();
            tracing::debug!(model = model.name(), upstream, attempt, kind = failure.kind(), "an upstream gave no answer");
            drop(turn);
            // 53 bits are as many as a double holds.
            let jitter = (draw >> 11) as f64 / (1u64 << 53) as f64;
            match failure.next(attempt, spec.retries, jitter, elsewhere) {
                Next::Retry(pause) if Instant::now() + pause < end => sleep(pause).await,
                Next::Retry(_) | Next::GiveUp => {
                    account.discard();
                    return Err(Stop::Next(failure.tell(model.name())));
                }
                Next::Tell => {
                    if failure == Failure::Deadline {
                        // As if the client had left: it was exposed to whoever was so slow.
                        self.asked.assigned.iter().for_each(|assigned| assigned.is_recorded());
                        account.settle(Status::Cancelled);
                    } else {
                        account.discard();
                    }
                    return Err(Stop::Tell(failure.tell(model.name())));
                }
            }
            asked.push(upstream);
            last = Some(failure);
            attempt += 1;
        }
    }

    /// A number that is drawn for each attempt; the answer's id is drawn already.
    fn draw(&self, model: &RemoteModel, attempt: u32) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.id.as_bytes()).update(model.name().as_bytes()).update(&attempt.to_le_bytes());
        request::first_bits(&hasher.finalize())
    }

    /// A place within the limits, a record and a span.
    fn account(&self, app: &App, model: &Arc<RemoteModel>) -> Result<Account, Stop> {
        // Four bytes are about a token. What it was is counted when the server has said so.
        let estimate = self.length / 4 + 1;
        let meter = self.asked.admit(model.name(), vec![estimate]).map_err(Stop::Next)?;
        let endpoint = self.endpoint.name();
        let level = match self.endpoint {
            Endpoint::Embeddings => Level::Off,
            _ => self.asked.level(endpoint, model.name(), self.id).map_err(Stop::Tell)?,
        };
        let record = (level != Level::Off).then(|| {
            let mut inference = self.asked.remote_inference(endpoint, model, self.id, &self.about);
            match &self.prompt {
                Value::String(text) => inference.prompt_text = Some(text.clone()),
                Value::Array(_) if self.endpoint == Endpoint::Chat => inference.messages = Some(self.prompt.clone()),
                _ => {}
            }
            let (store, arrived, choice_ids) = (app.store.clone(), self.asked.arrived, self.choice_ids.clone());
            let counting = self.asked.assigned.as_ref().and_then(|assigned| assigned.counting());
            RemoteRecord { store, level, arrived, inference, choice_ids, counting }
        });
        let id = (self.endpoint != Endpoint::Embeddings).then_some(self.id);
        let follower = self.asked.follow_remote(self.endpoint.operation(), model.name(), id, &self.prompt);
        let instead_of = (model.name() != self.model.name()).then(|| self.model.name());
        Ok(Account::new(self.choice_ids.len(), estimate, meter, record, follower).instead_of(instead_of))
    }

    /// Asks one server once, and waits for the first token or the whole answer.
    async fn attempt(
        &self,
        model: &Arc<RemoteModel>,
        turn: &Turn,
        account: &mut Account,
        end: Instant,
    ) -> Result<Opening, Failure> {
        let (asked, endpoint, spec) = (Arc::clone(&self.body), self.endpoint, Arc::clone(model));
        let server = Arc::clone(turn.server());
        let write = move || {
            let body = request::body(&asked, endpoint, spec.spec(), server.spec());
            // A map of JSON values cannot fail to be written.
            (Bytes::from(serde_json::to_vec(&body).unwrap_or_default()), request::params(&body))
        };
        let written = off_path(self.length > LONG_WORK, write).await;
        let (body, params) = written.map_err(|error| Failure::Broken(error.message))?;
        account.asks(turn, Value::Object(params));
        let name = model.spec().model_at(turn.server().spec()).to_owned();
        let trace = self.asked.traceparent();
        let answer = async {
            let response = turn.ask(self.endpoint, &name, body, trace.as_deref()).await?;
            if self.stream { opened(turn, response.into_body()).await } else { whole(turn, response.into_body()).await }
        };
        let first = self.stream.then(|| {
            let time = model.spec().first_token_timeout;
            (Instant::now() + time, Failure::SlowStart(time))
        });
        let (limit, too_late) = self.limit(model, end, first);
        tokio::time::timeout_at(limit, answer).await.unwrap_or(Err(too_late))
    }

    /// The soonest of the times at which the answer is of no more use, and what is wrong then.
    fn limit(&self, model: &RemoteModel, end: Instant, first: Option<(Instant, Failure)>) -> (Instant, Failure) {
        let soonest = match first {
            Some(first) if first.0 < end => first,
            _ => (end, Failure::SlowEnd(model.spec().timeout)),
        };
        match self.asked.deadline.map(Instant::from_std) {
            Some(deadline) if deadline < soonest.0 => (deadline, Failure::Deadline),
            _ => soonest,
        }
    }

    /// What has begun, on its way to the client.
    fn pass_on(&self, model: &Arc<RemoteModel>, begun: Begun, in_flight: InFlight) -> Response {
        let Begun { opening, mut account, end } = begun;
        let (prefix, id) = match self.endpoint {
            Endpoint::Chat => ("chatcmpl", Some(self.id)),
            Endpoint::Completions => ("cmpl", Some(self.id)),
            Endpoint::Embeddings => ("", None),
        };
        let shown = |id: &Uuid| format!("{prefix}-{id}");
        let choice_ids = if self.about.compare { self.choice_ids.iter().map(|id| Some(shown(id))).collect() } else { Vec::new() };
        let public = self.asked.public_name(model.name()).to_owned();
        let mut rewriter = Rewriter { id: id.as_ref().map(shown), model: public, choice_ids, usage: self.usage };
        match opening {
            Opening::Whole(mut answer) => {
                account.take(&answer, false);
                account.settle(Status::Ok);
                rewriter.rewrite(&mut answer);
                json(Bytes::from(answer.to_string()))
            }
            Opening::Stream(chunks, held) => {
                let limit = self.limit(model, end, None);
                let source = Passing::new((chunks, held), rewriter, account, limit, &self.asked.app.drain);
                sse::of(source, in_flight)
            }
        }
    }
}

/// Waits for the first token of a stream. What comes before it is held back, so that another server can still be asked.
async fn opened(turn: &Turn, body: Incoming) -> Result<Opening, Failure> {
    let (mut chunks, mut held) = (ChunkStream::new(body), VecDeque::new());
    loop {
        match poll_fn(|context| chunks.poll_next(context)).await? {
            Said::Chunk(chunk) => {
                let begun = begins(&chunk) || held.len() >= MOST_HELD;
                held.push_back(chunk);
                if begun {
                    return Ok(Opening::Stream(chunks, held));
                }
            }
            Said::Error(error) => return Err(turn.reported(&error)),
            Said::Done | Said::End => return Err(Failure::Broken("it ended before it began".into())),
        }
    }
}

/// Waits for a whole answer.
async fn whole(turn: &Turn, body: Incoming) -> Result<Opening, Failure> {
    let read = Limited::new(body, MOST_ANSWER).collect().await;
    let bytes = read.map_err(|error| Failure::Broken(error.to_string()))?.to_bytes();
    match serde_json::from_slice(&bytes) {
        Ok(answer @ Value::Object(_)) if answer.get("error").is_none_or(Value::is_null) => Ok(Opening::Whole(answer)),
        Ok(answer @ Value::Object(_)) => Err(turn.reported(&answer)),
        _ => Err(Failure::Broken("it is no JSON object".into())),
    }
}

/// The only prompt of a completion, a text or tokens: each answer is one record.
fn one_prompt(fields: &mut Fields<'_>) -> Result<Value, ApiError> {
    let field = fields.require("prompt")?;
    match prompts(&field)?.as_slice() {
        [PromptInput::Text(text)] => Ok(text.as_str().into()),
        [PromptInput::Tokens(tokens)] => Ok(json!(tokens)),
        _ => Err(field.unsupported("takes one prompt with a model that another server answers; send one request for each.")),
    }
}

fn nobody(model: &RemoteModel) -> ApiError {
    let wait = u32::try_from(model.wait().as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1);
    let message =
        format!("The servers that answer `{}` are full or have kept failing. Please try again in {wait} s.", model.name());
    ApiError::unavailable(Some("upstream_unavailable"), message, wait)
}
