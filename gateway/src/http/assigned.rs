//! Where an assignment turns into what is asked: a request that names a public model is written for the variant that answers it, and for
//! the stable one in its place when that gives no answer. Everything behind it sees a request for a model of the registry.

use crate::clock::now;
use crate::http::answer::json;
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::beside;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::generate::{Asked, enter};
use crate::http::limits::off_path;
use crate::http::mirror::ShadowCopy;
use crate::recording::{hand_over, micros};
use crate::rollout::assignment::{Mode, Reason, Unit};
use crate::rollout::table::{Running, Variant};
use crate::rollout::under_way::Counting;
use crate::upstream::remote::request::Endpoint;
use axum::response::Response;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::header::{HeaderName, HeaderValue};
use hyper::{HeaderMap, StatusCode};
use metrics::counter;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tidemill_store::Scope;
use tidemill_store::records::{Exposure, Inference, Status};

/// Who answered; of a tester's request, who is to.
pub const VARIANT: HeaderName = HeaderName::from_static("x-tidemill-variant");
/// The unit of a request whose body names no user.
const UNIT: HeaderName = HeaderName::from_static("x-tidemill-unit");
/// The secret of testers whose key is not the administrator's.
const TESTER: HeaderName = HeaderName::from_static("x-tidemill-tester");
/// The code of a model that is not there yet, or has given way to others.
const LOADING: &str = "model_loading";
/// Longest unit that a header names, in bytes.
const MAX_UNIT: usize = 256;

/// How an endpoint writes what an assignment needs to know and to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completion,
    /// `/v1/responses`
    Response,
    /// `/v1/messages`
    Message,
}

impl Shape {
    /// Of an endpoint that other servers have, too. Vectors of different models cannot be mixed: they are not assigned.
    pub fn of(endpoint: Endpoint) -> Option<Self> {
        match endpoint {
            Endpoint::Chat => Some(Self::Chat),
            Endpoint::Completions => Some(Self::Completion),
            Endpoint::Embeddings => None,
        }
    }

    /// What records call the endpoint.
    fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completion => "completion",
            Self::Response => "response",
            Self::Message => "messages",
        }
    }

    /// The person and the conversation that a body names. What is no text is refused where the body is checked.
    fn keys(self, body: &Value) -> (Option<&str>, Option<&str>) {
        let filled = |path: &str| body.pointer(path).and_then(Value::as_str).filter(|text| !text.is_empty());
        if self == Self::Message {
            return (filled("/metadata/user_id"), None);
        }
        let conversation = filled("/tidemill/conversation").or_else(|| filled("/metadata/conversation_id"));
        (filled("/safety_identifier").or_else(|| filled("/user")), conversation)
    }

    /// What this endpoint calls a sampling parameter of chat, and the other names of the same; `None` where it has none.
    fn parameter(self, key: &str) -> Option<(&'static str, &'static [&'static str])> {
        Some(match (self, key) {
            (_, "temperature") => ("temperature", &[]),
            (_, "top_p") => ("top_p", &[]),
            (Self::Message, _) => return None,
            (_, "presence_penalty") => ("presence_penalty", &[]),
            (_, "frequency_penalty") => ("frequency_penalty", &[]),
            (Self::Chat, "max_tokens") => ("max_tokens", &["max_completion_tokens"]),
            (Self::Completion, "max_tokens") => ("max_tokens", &[]),
            (Self::Response, "max_tokens") => ("max_output_tokens", &[]),
            _ => return None,
        })
    }

    /// Puts the variant's model and defaults into a body.
    fn write(self, body: &mut Map<String, Value>, variant: &Variant) {
        body.insert("model".into(), variant.model.as_str().into());
        for (key, value) in &variant.defaults {
            let Some((name, others)) = self.parameter(key) else { continue };
            let said = |name: &str| body.get(name).is_some_and(|value| !value.is_null());
            if said(name) || others.iter().any(|other| said(other)) {
                continue;
            }
            let value = match (self, name) {
                // The widest that these endpoints take.
                (Self::Message, "temperature") => value.as_f64().map_or(Value::Null, |t| t.min(1.0).into()),
                (Self::Response, "max_output_tokens") => {
                    value.as_i64().map_or(Value::Null, |most| most.max(crate::responses::request::MIN_OUTPUT).into())
                }
                _ => value.clone(),
            };
            body.insert(name.into(), value);
        }
    }
}

/// What a request's headers say of its assignment.
#[derive(Clone, Debug, Default)]
pub struct Hints {
    unit: Option<String>,
    /// The variant that a tester asks for.
    variant: Option<String>,
    /// The tester's secret.
    secret: Option<String>,
}

impl Hints {
    /// Of these headers.
    pub fn of(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).filter(|text| !text.is_empty());
        Self {
            unit: text(UNIT).filter(|unit| unit.len() <= MAX_UNIT).map(str::to_owned),
            variant: text(VARIANT).map(str::to_owned),
            secret: text(TESTER).map(str::to_owned),
        }
    }

    /// The variant that is asked for, if the caller may ask.
    fn forced(&self, app: &App, caller: &Caller) -> Result<Option<&str>, ApiError> {
        let Some(variant) = self.variant.as_deref() else { return Ok(None) };
        let knows = match (&app.tester_secret, &self.secret) {
            // By their hashes, so that the time says nothing of how much of it was right.
            (Some(secret), Some(given)) => blake3::hash(secret.as_bytes()) == blake3::hash(given.as_bytes()),
            _ => false,
        };
        if knows || caller.allows(Scope::Admin) {
            return Ok(Some(variant));
        }
        let message = "The header 'x-tidemill-variant' is for testers: send a key with the scope `admin`, or the testers' secret as 'x-tidemill-tester'.";
        Err(ApiError::client(StatusCode::FORBIDDEN, Some("insufficient_permissions"), message))
    }
}

/// Who answers a request in the place of the public model that it names.
#[derive(Debug)]
pub struct Assigned {
    /// What the client calls the model.
    pub public: String,
    /// Who answers.
    pub variant: Arc<Variant>,
    /// What the answer counts for.
    pub exposure: Option<Exposure>,
    /// The rollout that it counts for.
    rollout: Option<String>,
    shape: Shape,
    /// A record that has the exposure has begun.
    recorded: AtomicBool,
    /// Held until that record is the store's.
    counting: Option<Arc<Counting>>,
}

impl Assigned {
    /// What whoever records the answer holds until the record is the store's.
    pub fn counting(&self) -> Option<Arc<Counting>> {
        self.counting.clone()
    }

    /// A record that has the exposure has begun: it will say how the answer ended.
    pub fn is_recorded(&self) {
        self.recorded.store(true, Ordering::Release);
    }

    /// Whether there is one.
    fn has_record(&self) -> bool {
        self.recorded.load(Ordering::Acquire)
    }

    /// The variant gave no answer. That counts against its arm, also where the client got another one's.
    pub fn failed(&self, asked: &Asked) {
        if self.exposure.is_none() {
            return;
        }
        let labels = (self.rollout.clone().unwrap_or_default(), self.variant.name.clone());
        counter!("tidemill:rollout_variant_failures_total", "rollout" => labels.0, "variant" => labels.1).increment(1);
        self.without_answer(asked, Status::Failed);
    }

    /// The variant was not let answer: it was exposed, and nothing is known of it.
    pub fn called_off(&self, asked: &Asked) {
        self.without_answer(asked, Status::Cancelled);
    }

    fn without_answer(&self, asked: &Asked, status: Status) {
        let Some(exposure) = self.exposure else { return };
        if self.recorded.swap(true, Ordering::AcqRel) {
            return;
        }
        let store = &asked.app.store;
        let record = Inference {
            id: store.issue_id(),
            created: now().saturating_sub(micros(asked.arrived)),
            endpoint: self.shape.name().to_owned(),
            model: self.variant.model.clone(),
            adapter: 0,
            variant: Some(self.variant.name.clone()),
            conversation: None,
            key_id: asked.caller.key_id(),
            user_key: None,
            status,
            compare: false,
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            first_token_us: None,
            duration_us: micros(asked.arrived),
            config_hash: String::new(),
            metadata: Map::new(),
            params: None,
            messages: None,
            prompt_text: None,
            prompt_ids: Vec::new(),
            exposure: Some(exposure),
            choices: Vec::new(),
        };
        hand_over(store, record);
    }
}

/// Whose affair an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Of who was to answer: another variant may.
    Variant,
    /// Of the request, or of a variant that cannot do what others can.
    Request,
    /// Of the whole server, or of the caller's limits.
    Elsewhere,
}

impl Fault {
    fn of(error: &ApiError) -> Self {
        const BUSY: [&str; 8] = [
            "queue_full",
            "draining",
            "cancelled",
            "records_full",
            "bodies_full",
            "background_full",
            "deadline_unreachable",
            "deadline_exceeded",
        ];
        match (error.status.as_u16(), error.code.as_deref()) {
            (_, Some(code)) if code.starts_with("upstream_") => Self::Variant,
            (_, Some(code)) if BUSY.contains(&code) || code.starts_with("store_") => Self::Elsewhere,
            (401 | 403 | 429, _) => Self::Elsewhere,
            // Of what else is not there, the request speaks.
            (404, Some("model_not_found")) | (500.., _) => Self::Variant,
            _ => Self::Request,
        }
    }
}

/// Whether it is the variant's affair that it gave no answer. While a server starts, nothing is there yet.
pub fn is_the_variants(error: &ApiError) -> bool {
    Fault::of(error) == Fault::Variant && error.code.as_deref() != Some(LOADING)
}

/// Whether two variants gave no answer for a reason that lies in neither of them.
fn is_nobodys(first: &ApiError, second: &ApiError) -> bool {
    let loading = |error: &ApiError| error.code.as_deref() == Some(LOADING);
    (Fault::of(first) == Fault::Request && Fault::of(second) == Fault::Request) || (loading(first) && loading(second))
}

/// A request as it is to be asked, and as it is to be asked again when the first one gives no answer.
pub struct Plan {
    /// Who asks, and of whom.
    asked: Asked,
    again: Option<Box<(Asked, Value)>>,
    besides: Option<Besides>,
}

/// What is asked besides the answer.
enum Besides {
    /// A shadow's treatment, whose answer nobody sees.
    Copy(Box<ShadowCopy>),
    /// The other arm of an interleaved rollout, whose answer is shown second.
    Second(Box<Second>),
}

/// The answer that is shown second.
struct Second {
    asked: Asked,
    body: Value,
    stream: bool,
}

/// Decides who answers a request. A model name about which nothing is to be decided leaves everything as it is.
pub fn plan(mut asked: Asked, shape: Option<Shape>, mut body: Value) -> Result<(Plan, Value), ApiError> {
    let forced = asked.hints.forced(&asked.app, &asked.caller)?.map(str::to_owned);
    let tables = asked.app.rollouts.tables();
    let named = body.get("model").and_then(Value::as_str).unwrap_or_default().to_owned();
    let (Some(shape), Some(public)) = (shape, tables.of(&named)) else {
        return match forced {
            Some(variant) if variant != named => Err(no_such_variant(&variant, &named)),
            _ => Ok((Plan { asked, again: None, besides: None }, body)),
        };
    };
    // What exists behind a name that is not the caller's is not the caller's business.
    asked.caller.check_model(&named)?;
    if let Some(variant) = forced.as_deref().filter(|variant| !public.table().knows(variant)) {
        return Err(no_such_variant(variant, &named));
    }
    let request = asked.app.store.issue_id().to_string();
    let (user, conversation) = shape.keys(&body);
    let user = user.or(asked.hints.unit.as_deref());
    let unit = Unit { user, conversation, request: &request, forced: forced.as_deref() };
    let chosen = public.choose(&unit);
    let why = match chosen.assignment.reason {
        Reason::Stable => "stable",
        Reason::Holdout => "holdout",
        Reason::Forced => "tester",
        Reason::Arm { .. } => "arm",
    };
    counter!(
        "tidemill:variant_requests_total", "model" => named.clone(), "variant" => chosen.variant.name.clone(), "why" => why
    )
    .increment(1);
    let counts = |running: &Running, arm: usize, key: &str, place| {
        let (arm, unit) = (u32::try_from(arm).unwrap_or(u32::MAX), asked.app.store.unit_of(key));
        Some((running.name.clone(), Exposure { rollout: running.id, arm, unit, refused: None, place }))
    };
    let assigned = |variant: &Arc<Variant>, counts: Option<(String, Exposure)>| {
        let (public, variant, recorded) = (named.clone(), Arc::clone(variant), AtomicBool::new(false));
        let (rollout, exposure) = counts.unzip();
        let counting = exposure.map(|_| asked.app.rollouts.under_way().begin(now()));
        Some(Arc::new(Assigned { public, variant, exposure, rollout, shape, recorded, counting }))
    };
    let single = is_single(shape, &body);
    let (mut variant, mut own) =
        (Arc::clone(chosen.variant), chosen.counts.and_then(|(running, arm, key)| counts(running, arm, key, None)));
    let mut besides = None;
    if let (Reason::Arm { experiment, .. }, Some((running, arm, key))) = (chosen.assignment.reason, chosen.counts)
        && public.table().experiments().get(experiment).is_some_and(|experiment| experiment.mode == Mode::Both)
    {
        // Two answers where one was asked for can be shown; of anything else the control gives what was asked for, and it counts nowhere.
        match running.arms.get(1 - arm.min(1)).filter(|_| single && shape == Shape::Chat) {
            Some(other) => {
                own = counts(running, arm, key, Some(0));
                let asked = asked.beside(assigned(other, counts(running, 1 - arm.min(1), key, Some(1))));
                let (mut body, stream) = (body.clone(), body["stream"] == true);
                if let Some(fields) = body.as_object_mut() {
                    shape.write(fields, other);
                }
                besides = Some(Besides::Second(Box::new(Second { asked, body, stream })));
            }
            None => (variant, own) = (running.arms.first().map_or(variant, Arc::clone), None),
        }
    }
    // A copy counts beside the answer of the control, which is the stable variant; where another rollout counts that, there is none.
    if let Some(mirror) = chosen.assignment.mirror.filter(|_| chosen.assignment.reason == Reason::Stable && single)
        && let (Some(running), Some(experiment)) = (public.rollouts().get(mirror), public.table().experiments().get(mirror))
        && let Some(treatment) = running.arms.get(1)
        && let Some(place) = asked.app.rollouts.mirrors().reserve(&asked.app.registry)
    {
        let key = experiment.key_of(&unit);
        own = counts(running, 0, key, None);
        let asked = asked.shadow(assigned(treatment, counts(running, 1, key, None)));
        let mut body = body.clone();
        if let Some(fields) = body.as_object_mut() {
            fields.retain(|name, _| !matches!(name.as_str(), "stream" | "stream_options" | "store"));
            shape.write(fields, treatment);
        }
        besides = Some(Besides::Copy(Box::new(ShadowCopy { asked, body, place })));
    }
    // A tester wants the variant, or to know what is wrong with it.
    let again = (variant != *public.stable() && forced.is_none() && !matches!(besides, Some(Besides::Second(_)))).then(|| {
        let (stable, mut body) = (public.stable(), body.clone());
        if let Some(fields) = body.as_object_mut() {
            shape.write(fields, stable);
        }
        let mut again = asked.clone();
        again.assigned = assigned(stable, None);
        Box::new((again, body))
    });
    if let Some(fields) = body.as_object_mut() {
        shape.write(fields, &variant);
    }
    let assigned = assigned(&variant, own);
    asked.assigned = assigned;
    Ok((Plan { asked, again, besides }, body))
}

/// Whether a request asks for one answer, which is kept nowhere but in the records.
fn is_single(shape: Shape, body: &Value) -> bool {
    let one = |name: &str| body.get(name).is_none_or(|value| value.is_null() || *value == 1);
    let prompt = match shape {
        Shape::Chat => true,
        Shape::Completion => body["prompt"].is_string(),
        Shape::Response | Shape::Message => false,
    };
    prompt && one("n") && one("best_of") && body["store"] != true
}

fn no_such_variant(variant: &str, model: &str) -> ApiError {
    let [variant, model] = [variant, model].map(|text| text.chars().take(200).collect::<String>());
    let message = format!(
        "Invalid header 'x-tidemill-variant': `{model}` has no variant `{variant}`. `tidemill rollout list` shows those of the rollouts that run."
    );
    ApiError::invalid("x-tidemill-variant", "invalid_value", message)
}

impl Plan {
    /// Who asks, and of whom.
    pub fn asked(&self) -> Asked {
        self.asked.clone()
    }

    /// Prepares the request, for the variant or else for the stable one.
    pub fn prepare<T>(mut self, body: Value, work: impl Fn(Asked, Value) -> Result<T, ApiError>) -> Result<(T, Self), ApiError> {
        let error = match work(self.asked(), body) {
            Ok(done) => return Ok((done, self)),
            Err(error) => error,
        };
        let Some((asked, body)) = self.instead(&error) else { return Err(error) };
        let done = work(asked.clone(), body);
        match &done {
            Err(second) if is_nobodys(&error, second) => {}
            _ => self.blame(),
        }
        Ok((done?, Self { asked, again: None, besides: None }))
    }

    /// Who is to be asked after this error, if anybody; where nobody is, and it is the variant's, it counts against its arm.
    fn instead(&mut self, error: &ApiError) -> Option<(Asked, Value)> {
        match (Fault::of(error), self.again.take()) {
            (Fault::Elsewhere, _) | (Fault::Request, None) => None,
            (Fault::Variant, None) => {
                if is_the_variants(error) {
                    self.blame();
                }
                None
            }
            (_, Some(again)) => Some(*again),
        }
    }

    fn blame(&self) {
        if let Some(assigned) = &self.asked.assigned {
            assigned.failed(&self.asked);
        }
    }

    /// The response with the name of who answered.
    fn marked(&self, response: Response) -> Response {
        marked(response, &[&self.asked])
    }
}

/// The response with the names of those who answered.
fn marked(mut response: Response, asked: &[&Asked]) -> Response {
    let names: Vec<&str> =
        asked.iter().filter_map(|asked| asked.assigned.as_ref()).map(|assigned| assigned.variant.name.as_str()).collect();
    if let Some(value) = HeaderValue::from_bytes(names.join(", ").as_bytes()).ok().filter(|_| !names.is_empty()) {
        response.headers_mut().insert(VARIANT, value);
    }
    response
}

/// Runs what was prepared; where the variant gives no answer before the first byte, the stable one is prepared and run in its place.
pub async fn answer<T, F>(
    app: &App,
    (prepared, mut plan): (T, Plan),
    in_flight: InFlight,
    prepare: impl Fn(Asked, Value) -> Result<T, ApiError> + Send + 'static,
    run: impl Fn(T, InFlight) -> F + Send + Sync + 'static,
) -> Result<Response, ApiError>
where
    T: Send + 'static,
    F: Future<Output = Result<Response, ApiError>> + Send + 'static,
{
    let copy = match plan.besides.take() {
        Some(Besides::Second(second)) => {
            return Box::pin(together(app, (prepared, plan), in_flight, *second, prepare, run)).await;
        }
        Some(Besides::Copy(copy)) => Some(copy),
        None => None,
    };
    let error = match Box::pin(run(prepared, in_flight)).await {
        Ok(response) => {
            let response = plan.marked(response);
            return Ok(match copy {
                Some(copy) => copy.after(response, prepare, run),
                None => response,
            });
        }
        Err(error) => error,
    };
    let Some((asked, body)) = plan.instead(&error) else {
        if let Some(copy) = copy
            && plan.asked.assigned.as_ref().is_some_and(|assigned| assigned.has_record())
        {
            // Else the control alone would have been exposed.
            copy.is_not_made();
        }
        return Err(error);
    };
    let in_flight = enter(app)?;
    let again = asked.clone();
    // Rare enough that its length need not be known.
    let second = match off_path(true, move || prepare(again, body)).await? {
        Ok(prepared) => Box::pin(run(prepared, in_flight)).await,
        Err(error) => Err(error),
    };
    match &second {
        Err(second) if is_nobodys(&error, second) => {}
        _ => plan.blame(),
    }
    second.map(|response| marked(response, &[&asked]))
}

/// Both arms of an interleaved rollout answer, and the one who asked gets both; where one gives no answer, the other one's alone.
async fn together<T, F>(
    app: &App,
    (prepared, plan): (T, Plan),
    in_flight: InFlight,
    Second { asked, body, stream }: Second,
    prepare: impl Fn(Asked, Value) -> Result<T, ApiError> + Send + 'static,
    run: impl Fn(T, InFlight) -> F + Send + Sync + 'static,
) -> Result<Response, ApiError>
where
    T: Send + 'static,
    F: Future<Output = Result<Response, ApiError>> + Send + 'static,
{
    let second = async {
        let (in_flight, again) = (enter(app)?, asked.clone());
        let prepared = off_path(true, move || prepare(again, body)).await??;
        run(prepared, in_flight).await
    };
    let (first, second) = tokio::join!(Box::pin(run(prepared, in_flight)), Box::pin(second));
    let settle = |asked: &Asked, error: &ApiError| {
        let Some(assigned) = &asked.assigned else { return };
        if is_the_variants(error) { assigned.failed(asked) } else { assigned.called_off(asked) }
    };
    match (first, second) {
        (Ok(first), Ok(second)) => {
            let both = [&plan.asked, &asked];
            if stream {
                return Ok(marked(first.map(|first| beside::streamed(first, second.into_body())), &both));
            }
            let (first, second) = (whole(first).await?, whole(second).await?);
            Ok(marked(json(Bytes::from(beside::merged(first, second).to_string())), &both))
        }
        (Ok(first), Err(error)) => {
            settle(&asked, &error);
            Ok(plan.marked(first))
        }
        (Err(error), Ok(second)) => {
            settle(&plan.asked, &error);
            Ok(marked(second, &[&asked]))
        }
        (Err(first), Err(second)) => {
            settle(&plan.asked, &first);
            settle(&asked, &second);
            Err(first)
        }
    }
}

/// An answer of ours, read back.
async fn whole(response: Response) -> Result<Value, ApiError> {
    let broken = || ApiError::fault("An answer broke off.");
    let bytes = response.into_body().collect().await.map_err(|_| broken())?.to_bytes();
    serde_json::from_slice(&bytes).map_err(|_| broken())
}

#[cfg(test)]
mod tests;
