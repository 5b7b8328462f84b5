//! What every endpoint that generates has in common: being let in, the record, the engine's request, waiting for the answer.

use crate::clock::{now, seconds};
use crate::http::app::App;
use crate::http::assigned::{Assigned, Hints};
use crate::http::auth::Caller;
use crate::http::deadline;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::tier::{self, BATCH_PRIORITY, SHADOW_PRIORITY};
use crate::limits::Meter;
use crate::limits::headers::RateSlot;
use crate::openai::about::About;
use crate::openai::collected::{Collected, Flow};
use crate::openai::generation::Generation;
use crate::openai::wire::AnswerHead;
use crate::recording::{self, Draft, Level, Recorder};
use crate::telemetry::{Follower, Trail};
use crate::upstream::{Events, LocalModel, RemoteModel};
use axum::extract::Request;
use serde_json::Value;
use std::sync::Arc;
use std::time::Instant;
use tidemill_engine::{EmbedRequest, RequestId, SamplingParams, Tenant};
use tidemill_store::records::{Inference, Status};
use tidemill_store::{Store, Tier};
use uuid::Uuid;

/// Lets a request in, unless the server is leaving.
pub fn enter(app: &App) -> Result<InFlight, ApiError> {
    let message = "The server is shutting down; send the request again, or to another replica.";
    app.drain.enter().ok_or_else(|| ApiError::unavailable(Some("draining"), message, 5))
}

/// Waits for the whole answer.
pub async fn collect(mut events: Events, mut collected: Collected) -> Result<Collected, ApiError> {
    while let Some((prompt, event)) = events.next().await {
        if collected.event(prompt, event)? == Flow::End {
            return Ok(collected);
        }
    }
    Err(ApiError::fault("The engine stopped before the answer was complete."))
}

/// What identifies the answer `id`.
pub fn head(model: &LocalModel, id: Uuid, prefix: &str, object: &'static str) -> AnswerHead {
    AnswerHead {
        id: format!("{prefix}-{id}"),
        object,
        created: seconds(),
        model: model.name().to_owned(),
        system_fingerprint: model.fingerprint().to_owned(),
        service_tier: Tier::Default,
    }
}

/// The engine's form of a request.
pub fn engine_request(
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
        adapter: model.adapter().cloned(),
        tenant: Tenant::default(),
        deadline: None,
    }
}

/// What a request brings beside its body.
#[derive(Clone)]
pub struct Asked {
    /// Shared state.
    pub app: App,
    /// Who asks.
    pub caller: Caller,
    /// When the request came.
    pub arrived: Instant,
    /// Nobody waits for the answer.
    pub background: bool,
    /// When the answer is of no more use.
    pub deadline: Option<Instant>,
    /// Who answers in the place of the public model, where that is not decided by the name alone.
    pub assigned: Option<Arc<Assigned>>,
    /// What the headers say of that.
    pub hints: Hints,
    standing: Standing,
    /// Where the levels of its limits are left for the response.
    rate: RateSlot,
    trail: Option<Trail>,
}

/// On whose account a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// The caller's.
    Own,
    /// The operator's, who wants a second answer beside the caller's.
    Beside,
    /// The operator's, and nobody waits for it or is to feel it.
    Shadow,
}

/// Of all that nobody sees: it shares what is left, and takes nothing of a key's share.
pub const SHADOW_TENANT: Tenant = Tenant { id: u64::MAX, weight: 1 };

/// An extension of requests that a batch sends: whatever anybody waits for goes before them.
#[derive(Clone, Copy, Debug)]
pub struct Background;

impl Asked {
    /// Of a request whose body is not read yet.
    pub fn new(app: &App, request: &Request) -> Self {
        let background = request.extensions().get::<Background>().is_some();
        let arrived = Instant::now();
        let rate = request.extensions().get::<RateSlot>().cloned().unwrap_or_default();
        let deadline = deadline::of(request.headers(), arrived);
        let hints = Hints::of(request.headers());
        Self {
            app: app.clone(),
            caller: Caller::of(request),
            arrived,
            background,
            deadline,
            assigned: None,
            hints,
            standing: Standing::Own,
            rate,
            trail: request.extensions().get().cloned(),
        }
    }

    /// The same for a second answer that is shown beside the caller's, on the operator's account.
    pub fn beside(&self, assigned: Option<Arc<Assigned>>) -> Self {
        Self { assigned, standing: Standing::Beside, rate: RateSlot::default(), ..self.clone() }
    }

    /// The same for an answer that nobody sees.
    pub fn shadow(&self, assigned: Option<Arc<Assigned>>) -> Self {
        let standing = Standing::Shadow;
        Self { assigned, standing, background: true, deadline: None, trail: None, rate: RateSlot::default(), ..self.clone() }
    }

    /// Nobody waits for the answer or sees it.
    pub fn is_copy(&self) -> bool {
        self.standing == Standing::Shadow
    }

    /// Follows the answers to `requests` for the log and the trace; give it to the events with [`Events::followed`]. `operation` is
    /// `chat` or `text_completion`.
    pub fn follow(&self, operation: &'static str, model: &LocalModel, requests: &[tidemill_engine::Request]) -> Option<Follower> {
        self.trail.as_ref().map(|trail| trail.follow(operation, model, requests))
    }

    /// The same for vectors.
    pub fn follow_embeddings(
        &self,
        model: &LocalModel,
        texts: &[EmbedRequest],
        dimensions: usize,
        encoding: &str,
    ) -> Option<Follower> {
        self.trail.as_ref().map(|trail| trail.follow_embeddings(model, texts, dimensions, encoding))
    }

    /// The remote model that a body names, if it names one and the caller may use it.
    pub fn remote(&self, body: &Value) -> Option<Arc<RemoteModel>> {
        let name = body.get("model")?.as_str()?;
        if self.assigned_to(name).is_none() {
            self.caller.check_model(name).ok()?;
        }
        self.app.registry.remote(name).cloned()
    }

    /// The assignment, if it is what leads to the model of this name: then the key was asked about the public name already.
    fn assigned_to(&self, name: &str) -> Option<&Assigned> {
        self.assigned.as_deref().filter(|assigned| assigned.variant.model == name)
    }

    /// What the client calls the model `name` that answers it.
    pub fn public_name<'a>(&'a self, name: &'a str) -> &'a str {
        self.assigned_to(name).map_or(name, |assigned| &assigned.public)
    }

    /// A system prompt that is put before the conversation, whoever answers it.
    pub fn prompt_prefix(&self) -> Option<&str> {
        self.assigned.as_ref()?.variant.prompt_prefix.as_deref()
    }

    /// Follows an answer that another server gives to `prompt`, as `follow` does one of ours.
    pub fn follow_remote(&self, operation: &'static str, model: &str, id: Option<Uuid>, prompt: &Value) -> Option<Follower> {
        self.trail.as_ref().map(|trail| trail.follow_remote(operation, model, id, prompt))
    }

    /// The trace that the request belongs to, for the server that is asked next.
    pub fn traceparent(&self) -> Option<String> {
        self.trail.as_ref().map(Trail::traceparent)
    }

    /// The model of this name, if the caller may use it.
    pub fn model(&self, name: &str) -> Result<Arc<LocalModel>, ApiError> {
        let Some(assigned) = self.assigned_to(name) else { return self.caller.model(&self.app.registry, Some(name)) };
        let model = self.app.registry.find_local(Some(name))?;
        Ok(Arc::new(model.called(&assigned.public, assigned.variant.prompt_prefix.clone())))
    }

    /// Lets a request for a model of this base in whose prompts have so many tokens each, or says which limit it would break. The place within the limits is
    /// held until the meter is dropped: give it to the events with [`Events::metered`].
    pub fn admit(&self, base: &str, inputs: Vec<usize>) -> Result<Meter, ApiError> {
        if self.standing != Standing::Own {
            return Ok(self.app.limits.free(base, inputs));
        }
        let (admitted, levels) = self.app.limits.admit(self.caller.key.as_deref(), base, inputs);
        self.rate.set(levels);
        admitted
    }

    /// The tier that a request gets.
    pub fn tier(&self, generation: &Generation) -> Tier {
        self.caller.tier(generation.about.tier)
    }

    /// The priority in the engine of a request that gives itself `own` within `tier`; lower runs first.
    pub fn priority(&self, tier: Tier, own: i32) -> i32 {
        match self.standing {
            Standing::Shadow => SHADOW_PRIORITY,
            _ if self.background => BATCH_PRIORITY,
            _ => tier::priority(tier, own, self.caller.may_hurry()),
        }
    }

    /// The request with its place in line: whose it is, how urgent, until when.
    pub fn placed(&self, mut request: tidemill_engine::Request, generation: &Generation) -> tidemill_engine::Request {
        request.tenant = if self.is_copy() { SHADOW_TENANT } else { self.caller.tenant() };
        request.priority = self.priority(self.tier(generation), generation.priority);
        request.deadline = self.deadline;
        request
    }

    /// How much of the answer is recorded; 503 when there is no room for what should be.
    pub fn level(&self, endpoint: &str, base: &str, id: Uuid) -> Result<Level, ApiError> {
        let level = self.app.recording.level(endpoint, base, id);
        if level == Level::Off && self.assigned.as_ref().is_some_and(|assigned| assigned.exposure.is_some()) {
            // A rollout counts every answer. Nobody's request is refused for that.
            return Ok(Level::Counted);
        }
        if level != Level::Off && !self.app.store.has_room() {
            let message =
                "The server cannot record answers right now: its database is away or slow. Send the request again later.";
            return Err(ApiError::unavailable(Some("records_full"), message, 5));
        }
        Ok(level)
    }

    /// The answer's own id and one for each further choice.
    pub fn choice_ids(&self, id: Uuid, n: usize) -> Vec<Uuid> {
        std::iter::once(id).chain((1..n).map(|_| self.app.store.issue_id())).collect()
    }

    /// What is known of an answer before its first token, without texts.
    pub fn inference(&self, endpoint: &str, model: &LocalModel, request: &tidemill_engine::Request, about: &About) -> Inference {
        Inference {
            adapter: request.generation().0,
            variant: self.variant().or_else(|| model.variant()),
            prompt_tokens: u32::try_from(request.prompt.len()).unwrap_or(u32::MAX),
            params: Some(recording::to_json(&request.sampling)),
            prompt_ids: request.prompt.clone(),
            ..self.blank(endpoint, Uuid::from_u128(request.id.0), model.base(), model.fingerprint(), about)
        }
    }

    /// The same of an answer that another server gives.
    pub fn remote_inference(&self, endpoint: &str, model: &RemoteModel, id: Uuid, about: &About) -> Inference {
        self.blank(endpoint, id, model.name(), model.fingerprint(), about)
    }

    /// What rollouts call who answers.
    fn variant(&self) -> Option<String> {
        self.assigned.as_ref().map(|assigned| assigned.variant.name.clone())
    }

    fn blank(&self, endpoint: &str, id: Uuid, model: &str, config_hash: &str, about: &About) -> Inference {
        Inference {
            id,
            created: now(),
            endpoint: endpoint.to_owned(),
            model: model.to_owned(),
            adapter: 0,
            variant: self.variant(),
            conversation: about.conversation.clone(),
            key_id: self.caller.key_id(),
            user_key: about.user_key.clone(),
            status: Status::Ok,
            compare: about.compare,
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            first_token_us: None,
            duration_us: 0,
            config_hash: config_hash.to_owned(),
            metadata: about.metadata.clone(),
            params: None,
            messages: None,
            prompt_text: None,
            prompt_ids: Vec::new(),
            exposure: self.assigned.as_ref().and_then(|assigned| assigned.exposure),
            choices: Vec::new(),
        }
    }

    /// The records of an answer that has not begun.
    pub fn pending(self, level: Level, drafts: Vec<Draft>) -> Pending {
        Pending { store: self.app.store, level, arrived: self.arrived, assigned: self.assigned, drafts }
    }
}

/// Records that begin once the engine has taken the request: what it refuses is no answer.
pub struct Pending {
    store: Store,
    level: Level,
    arrived: Instant,
    assigned: Option<Arc<Assigned>>,
    drafts: Vec<Draft>,
}

impl Pending {
    /// The engine has taken the request.
    pub fn start(self) -> Recorder {
        if let Some(assigned) = &self.assigned {
            assigned.is_recorded();
        }
        let counting = self.assigned.as_ref().and_then(|assigned| assigned.counting());
        Recorder::new(self.store, self.level, self.arrived, self.drafts, counting)
    }
}
