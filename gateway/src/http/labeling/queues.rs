//! Making, filling and watching queues.

use super::{TaskPage, is_operator, optional_text};
use crate::clock::now;
use crate::http::App;
use crate::http::answer::answer;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::limits::off_path;
use crate::labeling::rule::{From as Source, Rule};
use crate::labeling::statistics::statistics as compute;
use crate::openai::fields::{Field, Fields};
use crate::openai::messages;
use axum::Extension;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use hyper::StatusCode;
use serde_json::{Value, json};
use tidemill_store::label::{Labels, NewDraft, NewQueue, NewTask, Progress, Queue, Verdict};
use uuid::Uuid;

const MOST_ITEMS: usize = 10_000;

/// `GET /v1/labeling/queues`
pub async fn list(State(app): State<App>, Extension(caller): Extension<Caller>) -> Result<Response, ApiError> {
    let operator = is_operator(&caller);
    let labels = Labels::new(app.store.database());
    let mut data = Vec::new();
    for queue in labels.list_queues().await? {
        data.push(if operator { for_operators(&labels, &queue).await? } else { for_annotators(&queue) });
    }
    Ok(answer(StatusCode::OK, &json!({"object": "list", "data": data})))
}

/// Nothing that hints at models, variants or gold.
fn for_annotators(queue: &Queue) -> Value {
    json!({"id": queue.id, "name": queue.name, "guidelines": queue.guidelines, "closed": queue.closed.is_some()})
}

async fn for_operators(labels: &Labels, queue: &Queue) -> Result<Value, ApiError> {
    let progress = labels.progress(queue.id, now()).await?;
    Ok(json!({
        "id": queue.id,
        "object": "labeling.queue",
        "name": queue.name,
        "created": queue.created / 1_000_000,
        "closed": queue.closed.is_some(),
        "rule": queue.rule,
        "guidelines": queue.guidelines,
        "overlap": queue.overlap,
        "gold_share": queue.gold_share,
        "lease_seconds": queue.lease_seconds,
        "progress": shown(queue, &progress),
    }))
}

fn shown(queue: &Queue, progress: &Progress) -> Value {
    let mut value = serde_json::to_value(progress).unwrap_or_default();
    if let Some(map) = value.as_object_mut() {
        map.insert("wanted".into(), (progress.tasks * u64::from(queue.overlap)).into());
    }
    value
}

/// `POST /v1/labeling/queues`
pub async fn create(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let name = fields.require("name")?;
    let text = name.short_string(100)?.trim();
    if text.is_empty() || text.chars().any(char::is_control) || Uuid::parse_str(text).is_ok() {
        return Err(name.invalid("invalid_value", "expected a name of 1 to 100 characters that is no id."));
    }
    let rule = match fields.get("rule") {
        None => Rule::default(),
        Some(field) => serde_json::from_value(field.value.clone()).map_err(|error| field.invalid("invalid_value", error))?,
    };
    rule.check().map_err(|(field, why)| ApiError::invalid(field, "invalid_value", format!("Invalid '{field}': {why}.")))?;
    let past = fields.bool_or("include_past", true)?;
    let new = NewQueue {
        name: text.to_owned(),
        rule: serde_json::to_value(&rule).unwrap_or_default(),
        guidelines: optional_text(&mut fields, "guidelines", 50_000)?.unwrap_or_default().to_owned(),
        overlap: fields.integer("overlap", 1..=50)?.and_then(|n| u32::try_from(n).ok()).unwrap_or(1),
        gold_share: fields.decimal("gold_share", 0.0..=0.5)?.map_or(0.1, f64::from),
        lease_seconds: fields.integer("lease_seconds", 10..=86_400)?.and_then(|n| u32::try_from(n).ok()).unwrap_or(1800),
        filled_until: if past { String::new() } else { app.store.issue_id().to_string() },
    };
    fields.finish()?;
    let labels = Labels::new(app.store.database());
    let detail = json!({"rule": new.rule, "overlap": new.overlap, "gold_share": new.gold_share});
    let act = app.store.act(caller.actor(), "labeling.create").to(&new.name).with(detail);
    let queue = labels.create_queue(new, now(), act).await?;
    Ok(answer(StatusCode::CREATED, &for_operators(&labels, &queue).await?))
}

/// `GET /v1/labeling/queues/{queue}`, by id or name.
pub async fn show(State(app): State<App>, Path(queue): Path<String>) -> Result<Response, ApiError> {
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(&queue).await?;
    let mut value = for_operators(&labels, &queue).await?;
    let failures = labels.failures(queue.id, 20).await?;
    let failures: Vec<Value> = failures.into_iter().map(|(source, reason)| json!({"source": source, "reason": reason})).collect();
    if let Some(map) = value.as_object_mut() {
        map.insert("failures".into(), failures.into());
    }
    Ok(answer(StatusCode::OK, &value))
}

/// `PATCH /v1/labeling/queues/{queue}`: `closed`, `guidelines`.
pub async fn change(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(queue): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(&queue).await?;
    let closed = if fields.bool_or("closed", queue.closed.is_some())? { queue.closed.or(Some(now())) } else { None };
    let guidelines = optional_text(&mut fields, "guidelines", 50_000)?;
    fields.finish()?;
    let detail = json!({"closed": closed.is_some(), "was_closed": queue.closed.is_some(), "guidelines": guidelines.is_some()});
    let act = app.store.act(caller.actor(), "labeling.change").to(&queue.name).with(detail);
    labels.change_queue(queue.id, closed, guidelines, act).await?;
    let queue = labels.queue(&queue.id.to_string()).await?;
    Ok(answer(StatusCode::OK, &for_operators(&labels, &queue).await?))
}

/// `GET /v1/labeling/queues/{queue}/tasks?state=any|open|done&after=ID&limit=N`
pub async fn tasks(State(app): State<App>, Path(queue): Path<String>, RawQuery(raw): RawQuery) -> Result<Response, ApiError> {
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(&queue).await?;
    let (data, has_more) = TaskPage::of(raw.as_deref(), 100, 1000)?.fetch(&labels, &queue).await?;
    Ok(answer(StatusCode::OK, &json!({"object": "list", "data": data, "has_more": has_more})))
}

/// `POST /v1/labeling/queues/{queue}/tasks`: whole pairs, gold ones among them.
pub async fn add_tasks(State(app): State<App>, Path(queue): Path<String>, request: Request) -> Result<Response, ApiError> {
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(&queue).await?;
    let read = |body: Value| {
        let mut fields = Fields::root(&body)?;
        let field = fields.require("tasks")?;
        let items = field.filled_array(MOST_ITEMS)?;
        let tasks: Result<Vec<NewTask>, ApiError> =
            items.iter().enumerate().map(|(i, value)| new_task(&field.item(i, value))).collect();
        fields.finish()?;
        tasks
    };
    let tasks = app.body.parsed(request, read).await?;
    let added = labels.add_tasks(queue.id, &tasks, now()).await?;
    Ok(answer(StatusCode::CREATED, &json!({"added": added, "known": tasks.len() as u64 - added})))
}

fn new_task(field: &Field<'_>) -> Result<NewTask, ApiError> {
    let mut fields = field.object()?;
    let prompt = prompt(&fields.require("prompt")?)?;
    let answer_a = fields.require("answer_a")?.string()?.to_owned();
    let answer_b = fields.require("answer_b")?.string()?.to_owned();
    let gold = match fields.get("gold") {
        None => None,
        Some(gold) => Some(match gold.one_of(&["a", "b", "tie", "both_bad"])? {
            "a" => Verdict::A,
            "b" => Verdict::B,
            "tie" => Verdict::Tie,
            _ => Verdict::BothBad,
        }),
    };
    let source = match optional_text(&mut fields, "source", 500)? {
        Some(source) => source.to_owned(),
        None => digest(&[&prompt.to_string(), &answer_a, &answer_b]),
    };
    fields.finish()?;
    Ok(NewTask { source, prompt, answer_a, answer_b, candidate_a: None, candidate_b: None, gold })
}

/// A text, or messages as the chat API takes them.
fn prompt(field: &Field<'_>) -> Result<Value, ApiError> {
    match field.value {
        Value::String(text) if !text.trim().is_empty() => Ok(json!([{"role": "user", "content": text}])),
        Value::String(_) => Err(field.invalid("invalid_value", "the prompt is empty.")),
        _ => messages::parse(field).map(Value::Array),
    }
}

/// The same content is the same source.
fn digest(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    format!("upload:{}", hasher.finalize().to_hex())
}

/// `POST /v1/labeling/queues/{queue}/prompts`: each gets two fresh answers.
pub async fn add_prompts(State(app): State<App>, Path(queue): Path<String>, request: Request) -> Result<Response, ApiError> {
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(&queue).await?;
    let registry = app.registry.clone();
    let read = move |body: Value| {
        let mut fields = Fields::root(&body)?;
        let model = optional_text(&mut fields, "model", 500)?;
        if let Some(model) = model
            && !registry.states().any(|(name, _)| name == model)
        {
            // An adapter, then.
            registry.find(Some(model))?;
        }
        let field = fields.require("prompts")?;
        let items = field.filled_array(MOST_ITEMS)?;
        let draft = |(i, value)| {
            let prompt = prompt(&field.item(i, value))?;
            let source = digest(&[&prompt.to_string(), model.unwrap_or_default()]);
            Ok(NewDraft { source, prompt, answer: None, model: model.map(str::to_owned) })
        };
        let drafts: Result<Vec<NewDraft>, ApiError> = items.iter().enumerate().map(draft).collect();
        fields.finish()?;
        drafts
    };
    let drafts = app.body.parsed(request, read).await?;
    if serde_json::from_value::<Rule>(queue.rule.clone()).is_ok_and(|rule| rule.from != Source::Upload) {
        let message = "Prompts go into a queue whose rule says `\"from\": \"upload\"`; this one fills itself from traffic.";
        return Err(ApiError::client(StatusCode::CONFLICT, Some("wrong_queue"), message));
    }
    let added = labels.add_drafts(queue.id, &drafts, now()).await?;
    Ok(answer(StatusCode::ACCEPTED, &json!({"added": added, "known": drafts.len() as u64 - added})))
}

/// `GET /v1/labeling/queues/{queue}/statistics`
pub async fn statistics(State(app): State<App>, Path(queue): Path<String>) -> Result<Response, ApiError> {
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(&queue).await?;
    let progress = labels.progress(queue.id, now()).await?;
    let judgements = labels.judgements(queue.id).await?;
    let computed = off_path(judgements.len() > 500, move || compute(&judgements)).await?;
    let mut value = serde_json::to_value(&computed).unwrap_or_default();
    if let Some(map) = value.as_object_mut() {
        map.insert("queue".into(), json!({"id": queue.id, "name": queue.name}));
        map.insert("progress".into(), shown(&queue, &progress));
    }
    Ok(answer(StatusCode::OK, &value))
}
