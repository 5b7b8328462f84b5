//! The gates of all subjects.

use crate::clock;
use crate::http::error::ApiError;
use crate::limits::gate::{Gate, Level, Rate, Refusal};
use crate::limits::headers::RateLevels;
use crate::limits::ledger::{Ledger, today};
use crate::limits::meter::Meter;
use crate::limits::price::{Price, Prices};
use hyper::StatusCode;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidemill_store::{ApiKey, Limits, Store, Usage};
use uuid::Uuid;

/// Gates beyond this many are swept for those that nobody uses.
const SWEEP: usize = 10_000;

/// Whose use is limited.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A key, over all models.
    Key(Uuid),
    /// A model, over all callers.
    Model(String),
    /// A key's use of one model.
    KeyModel(Uuid, String),
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Subject::Key(key) => write!(f, "key:{key}"),
            Subject::Model(model) => write!(f, "model:{model}"),
            Subject::KeyModel(key, model) => write!(f, "key:{key}/model:{model}"),
        }
    }
}

/// Lets requests in, or not.
pub struct Limiter {
    start: Instant,
    gates: Mutex<HashMap<Subject, Gate>>,
    models: BTreeMap<String, Limits>,
    prices: Prices,
    ledger: Arc<Ledger>,
}

impl Limiter {
    /// With limits of models over all callers, and with prices.
    pub fn new(store: Store, models: BTreeMap<String, Limits>, prices: Prices) -> Self {
        let (gates, ledger) = (Mutex::default(), Arc::new(Ledger::new(store)));
        Self { start: Instant::now(), gates, models, prices, ledger }
    }

    /// What has been used.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    fn gates(&self) -> MutexGuard<'_, HashMap<Subject, Gate>> {
        // Counters: what a panic left half counted heals with the next minute.
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Whose limits a request meets. A key is among them without limits, too: its use is added up.
    fn subjects(&self, key: Option<&ApiKey>, model: &str) -> Vec<(Subject, Limits)> {
        let mut subjects = Vec::with_capacity(3);
        if let Some(key) = key {
            subjects.push((Subject::Key(key.id), key.terms.limits));
            if let Some(limits) = key.terms.model_limits.get(model) {
                subjects.push((Subject::KeyModel(key.id, model.to_owned()), *limits));
            }
        }
        if let Some(limits) = self.models.get(model) {
            subjects.push((Subject::Model(model.to_owned()), *limits));
        }
        subjects
    }

    /// Reads what other servers have counted against daily limits that this caller may meet.
    pub async fn refresh(&self, key: Option<&ApiKey>) {
        let day = today();
        let costs = |limits: &Limits| limits.cost_per_day.is_some();
        for (model, _) in self.models.iter().filter(|(_, limits)| costs(limits)) {
            self.ledger.refresh(&Subject::Model(model.clone()).to_string(), day).await;
        }
        let Some(key) = key else { return };
        if costs(&key.terms.limits) {
            self.ledger.refresh(&Subject::Key(key.id).to_string(), day).await;
        }
        for (model, _) in key.terms.model_limits.iter().filter(|(_, limits)| costs(limits)) {
            self.ledger.refresh(&Subject::KeyModel(key.id, model.clone()).to_string(), day).await;
        }
    }

    /// Whether a request of this key has a chance, before its body is read. Takes nothing.
    pub fn glance(&self, key: &ApiKey) -> (Result<(), ApiError>, RateLevels) {
        let now = self.now();
        let mut gates = self.gates();
        let gate = gate_of(&mut gates, &Subject::Key(key.id), &key.terms.limits, now);
        let spent = self.ledger.spent(&Subject::Key(key.id).to_string(), today());
        let checked = gate.check(0, spent, now).map_err(|refusal| refused(&Subject::Key(key.id), "", &refusal));
        (checked, RateLevels { requests: gate.requests(now), tokens: gate.tokens(now) })
    }

    /// Lets a request in whose prompts have so many tokens, or says why not. All its gates, or none of them, count it.
    pub fn admit(
        self: &Arc<Self>,
        key: Option<&ApiKey>,
        model: &str,
        inputs: Vec<usize>,
    ) -> (Result<Meter, ApiError>, RateLevels) {
        let (now, day) = (self.now(), today());
        let input = u32::try_from(inputs.iter().sum::<usize>()).unwrap_or(u32::MAX);
        let subjects = self.subjects(key, model);
        let mut gates = self.gates();
        if gates.len() > SWEEP {
            gates.retain(|_, gate| !gate.is_idle(now));
        }
        let mut refusal = None;
        for (subject, limits) in &subjects {
            let spent = self.ledger.spent(&subject.to_string(), day);
            if let Err(why) = gate_of(&mut gates, subject, limits, now).check(input, spent, now) {
                refusal = Some(refused(subject, model, &why));
                break;
            }
        }
        if refusal.is_none() {
            for (subject, limits) in &subjects {
                gate_of(&mut gates, subject, limits, now).enter(input, now);
                self.ledger.add(&subject.to_string(), day, Usage { requests: 1, ..Usage::default() });
            }
        }
        let mut levels = RateLevels::default();
        for (subject, limits) in &subjects {
            let gate = gate_of(&mut gates, subject, limits, now);
            levels.requests = scarcer(levels.requests, gate.requests(now));
            levels.tokens = scarcer(levels.tokens, gate.tokens(now));
        }
        drop(gates);
        let price = self.price(model);
        let subjects = subjects.into_iter().map(|(subject, _)| subject).collect();
        (refusal.map_or_else(|| Ok(Meter::new(Arc::clone(self), subjects, price, inputs)), Err), levels)
    }

    /// What tokens of a model cost.
    pub fn price(&self, model: &str) -> Price {
        self.prices.get(model).copied().unwrap_or_default()
    }

    /// A request on nobody's account: it meets no limit, and only what it costs is known.
    pub fn free(self: &Arc<Self>, model: &str, inputs: Vec<usize>) -> Meter {
        Meter::new(Arc::clone(self), Vec::new(), self.price(model), inputs)
    }

    /// A request has used more.
    pub(super) fn count(&self, subjects: &[Subject], usage: Usage) {
        let (now, day) = (self.now(), today());
        for subject in subjects {
            self.ledger.add(&subject.to_string(), day, usage);
        }
        let output = u32::try_from(usage.output_tokens).unwrap_or(u32::MAX);
        let mut gates = self.gates();
        for subject in subjects {
            if let Some(gate) = gates.get_mut(subject) {
                gate.generated(output, now);
            }
        }
    }

    /// A request is over.
    pub(super) fn leave(&self, subjects: &[Subject]) {
        let mut gates = self.gates();
        for subject in subjects {
            if let Some(gate) = gates.get_mut(subject) {
                gate.leave();
            }
        }
    }

    /// Requests of a subject that are being answered.
    pub fn running(&self, subject: &Subject) -> u32 {
        self.gates().get(subject).map_or(0, Gate::running)
    }
}

fn gate_of<'a>(gates: &'a mut HashMap<Subject, Gate>, subject: &Subject, limits: &Limits, now: Duration) -> &'a mut Gate {
    let gate = gates.entry(subject.clone()).or_insert_with(|| Gate::new(*limits, now));
    gate.set_limits(limits, now);
    gate
}

fn scarcer(a: Option<Level>, b: Option<Level>) -> Option<Level> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b.part() < a.part() { b } else { a }),
        (one, other) => one.or(other),
    }
}

/// What a client is told. A wait is rounded up: who comes back in time gets in.
fn refused(subject: &Subject, model: &str, refusal: &Refusal) -> ApiError {
    let whose = match subject {
        Subject::Key(_) => "this API key".to_owned(),
        Subject::KeyModel(_, _) => format!("this API key's use of `{model}`"),
        Subject::Model(_) => format!("the model `{model}`"),
    };
    let error =
        |kind, code, message: String| ApiError { kind, ..ApiError::client(StatusCode::TOO_MANY_REQUESTS, Some(code), message) };
    match refusal {
        Refusal::Rate { of, limit, wait } => {
            let (kind, what) = match of {
                Rate::Requests => ("requests", "requests per minute"),
                Rate::Input => ("tokens", "prompt tokens per minute"),
                Rate::Output => ("tokens", "generated tokens per minute"),
            };
            let seconds = u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1);
            let message = format!("Rate limit reached for {whose}: {limit} {what}. Please try again in {seconds} s.");
            ApiError { retry_after: Some(seconds), ..error(kind, "rate_limit_exceeded", message) }
        }
        Refusal::TooLarge { limit, asked } => {
            let message = format!(
                "Request too large for {whose}: the limit is {limit} prompt tokens per minute, and this prompt has {asked}. Make it shorter."
            );
            ApiError { no_retry: true, ..error("tokens", "rate_limit_exceeded", message) }
        }
        Refusal::Concurrent { limit } => {
            let message =
                format!("Rate limit reached for {whose}: {limit} requests at once. Send the next one when an answer has ended.");
            ApiError { retry_after: Some(1), ..error("requests", "rate_limit_exceeded", message) }
        }
        Refusal::Cost { limit } => {
            let hours = 24 - clock::now().div_euclid(3_600_000_000).rem_euclid(24);
            let message = format!(
                "You exceeded the quota of {whose}: {limit} per day. The next day begins at midnight UTC, in less than {hours} h; an administrator can raise the limit."
            );
            ApiError { no_retry: true, ..error("insufficient_quota", "insufficient_quota", message) }
        }
    }
}
