//! The record of an answer that another server gave: its texts and numbers, without tokens.

use crate::recording::recorder::{hand_over, micros};
use crate::recording::refusal::refuses;
use crate::recording::{Level, only_counted};
use crate::rollout::under_way::Counting;
use crate::upstream::remote::chunk::{Gathered, Gathering, RemoteUsage};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Instant;
use tidemill_store::records::{Choice, Inference, Status};
use tidemill_store::{Money, Store};
use uuid::Uuid;

/// A record while its answer is being made.
pub struct RemoteRecord {
    /// Where it goes.
    pub store: Store,
    /// How much of it.
    pub level: Level,
    /// When the request came.
    pub arrived: Instant,
    /// What is known before the first token. `choices` is empty, and `params` is what the server was sent.
    pub inference: Inference,
    /// Ids of the choices, the answer's own first.
    pub choice_ids: Vec<Uuid>,
    /// Of an answer that counts in a rollout.
    pub counting: Option<Arc<Counting>>,
}

/// What there is of an answer at its end.
pub struct RemoteAnswer<'a> {
    /// What has come.
    pub gathering: &'a Gathering,
    /// The server's count, or a guess.
    pub usage: RemoteUsage,
    /// What it costs.
    pub cost: Money,
    /// Who answered.
    pub upstream: Option<&'a str>,
    /// The model that the client asked for, where another one took its place.
    pub instead_of: Option<&'a str>,
}

impl RemoteRecord {
    /// The first token has come.
    pub fn first_token(&mut self) {
        self.inference.first_token_us.get_or_insert_with(|| micros(self.arrived));
    }

    /// The answer is over, and the record is the store's.
    pub fn finish(self, status: Status, answer: &RemoteAnswer<'_>) {
        let (store, arrived) = (self.store.clone(), self.arrived);
        let _counting = self.counting.clone();
        hand_over(&store, self.into_record(status, micros(arrived), answer));
    }

    fn into_record(self, status: Status, duration_us: i64, answer: &RemoteAnswer<'_>) -> Inference {
        let Self { level, mut inference, choice_ids, .. } = self;
        let RemoteUsage { prompt, cached, output } = answer.usage;
        let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
        inference.status = status;
        inference.duration_us = duration_us;
        (inference.prompt_tokens, inference.cached_tokens) = (count(prompt), count(cached));
        inference.output_tokens = count(output);
        inference.params = Some(with_upstream(inference.params.take(), answer));
        if let (Some(exposure), Some(first), Status::Ok) = (&mut inference.exposure, answer.gathering.choices.first(), status) {
            exposure.refused = Some(refuses(&first.choice.text));
        }
        let (full, alone) = (level == Level::Full, choice_ids.len() == 1);
        let choice = |(id, gathered): (Uuid, &Gathered)| Choice {
            id,
            finish_reason: gathered.finish.clone(),
            output_text: full.then(|| gathered.choice.text.clone()),
            message: full.then(|| gathered.choice.structured()).flatten(),
            output_ids: Vec::new(),
            logprobs: Vec::new(),
            raw_logprobs: Vec::new(),
            mean_logprob: gathered.mean_logprob(),
            // Of several choices, a server tells the sum.
            tokens: if alone { count(output) } else { 0 },
        };
        inference.choices = choice_ids.into_iter().zip(&answer.gathering.choices).map(choice).collect();
        if !full {
            inference.messages = None;
            inference.prompt_text = None;
            if let Some(params) = inference.params.as_mut().and_then(Value::as_object_mut) {
                params.retain(|key, _| !matches!(key.as_str(), "tools" | "functions"));
            }
        }
        if level == Level::Counted {
            only_counted(&mut inference);
        }
        inference
    }
}

/// The parameters with who answered, and at what price, so that closed and own models can be compared.
fn with_upstream(params: Option<Value>, answer: &RemoteAnswer<'_>) -> Value {
    let mut params = match params {
        Some(Value::Object(params)) => params,
        _ => Map::new(),
    };
    let counted = if answer.gathering.usage.is_some() { "reported" } else { "estimated" };
    let mut upstream = json!({
        "name": answer.upstream,
        "model": answer.gathering.model,
        "usage": counted,
        "cost": answer.cost.dollars(),
    });
    if let Some(asked) = answer.instead_of {
        upstream["instead_of"] = asked.into();
    }
    params.insert("upstream".into(), upstream);
    Value::Object(params)
}
