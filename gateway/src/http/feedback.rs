//! `/v1/feedback`: judgements in, acknowledged once they are durable, and out.

use crate::clock::now;
use crate::feedback::{self, Edit, Rules, Submission, Target};
use crate::http::answer::{answer, list as list_page};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::generate::enter;
use crate::openai::fields::{Field, Fields};
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use hyper::StatusCode;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Duration;
use tidemill_store::records::{Feedback, Inference};
use tidemill_store::{Acknowledged, Scope, Store, StoreError};
use uuid::Uuid;

/// Most items of one request.
const MAX_BATCH: usize = 1000;
/// A conversation may be asked for before its first answer is written: answers are written together, some milliseconds later.
const WRITE_TIME: Duration = Duration::from_millis(100);

/// `POST /v1/feedback`: one object, or an array with a result for each.
pub async fn create(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let sender = Sender::of(&request)?;
    match &app.body.json(request).await? {
        Value::Array(items) => create_batch(&app, &sender, items).await,
        one => create_one(&app, &sender, one).await,
    }
}

async fn create_one(app: &App, sender: &Sender, body: &Value) -> Result<Response, ApiError> {
    let submission = sender.parse(app, Fields::root(body)?, None)?;
    let made = admit(app, sender, submission, None, &mut false).await?;
    let acknowledged = app.store.add_feedback(vec![made.clone()]).await.map_err(unavailable)?;
    match acknowledged.first() {
        Some(Acknowledged { id, duplicate: true }) => {
            let kept = app.store.feedback(*id).await.map_err(unavailable)?.ok_or_else(|| unknown(*id))?;
            let mut shown = feedback::to_json(&kept);
            shown["duplicate"] = true.into();
            Ok(answer(StatusCode::OK, &shown))
        }
        _ => Ok(answer(StatusCode::CREATED, &feedback::to_json(&made))),
    }
}

/// 201 when all were written, 207 when some were not; each item has its own `status`.
async fn create_batch(app: &App, sender: &Sender, items: &[Value]) -> Result<Response, ApiError> {
    if items.is_empty() || items.len() > MAX_BATCH {
        let message = format!("The array must have 1 to {MAX_BATCH} items, but has {}.", items.len());
        return Err(ApiError::bad_request(message));
    }
    let mut results: Vec<Option<Value>> = vec![None; items.len()];
    let mut accepted = Vec::with_capacity(items.len());
    let mut waited = false;
    for (index, value) in items.iter().enumerate() {
        let fields = Field { value, path: index.to_string().into() };
        let parsed = fields.object().and_then(|fields| sender.parse(app, fields, Some(index)));
        let admitted = match parsed {
            Ok(submission) => admit(app, sender, submission, Some(index), &mut waited).await,
            Err(error) => Err(error),
        };
        match admitted {
            Ok(made) => accepted.push((index, made)),
            Err(error) if error.status.is_server_error() => return Err(error),
            Err(error) => {
                let shown: Value = serde_json::from_slice(&error.to_json()).unwrap_or_default();
                if let Some(result) = results.get_mut(index) {
                    *result = Some(json!({"index": index, "status": error.status.as_u16(), "error": shown["error"]}));
                }
            }
        }
    }
    let all = accepted.len() == items.len();
    let (places, made): (Vec<usize>, Vec<Feedback>) = accepted.into_iter().unzip();
    let acknowledged = if made.is_empty() { Vec::new() } else { app.store.add_feedback(made).await.map_err(unavailable)? };
    for (index, Acknowledged { id, duplicate }) in places.into_iter().zip(acknowledged) {
        if let Some(result) = results.get_mut(index) {
            let status = if duplicate { 200 } else { 201 };
            *result = Some(json!({"index": index, "status": status, "id": id, "duplicate": duplicate}));
        }
    }
    let status = if all { StatusCode::CREATED } else { StatusCode::MULTI_STATUS };
    let data: Vec<Value> = results.into_iter().flatten().collect();
    Ok(answer(status, &json!({"object": "list", "data": data})))
}

/// `GET /v1/feedback/{id}`
pub async fn get(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let id = feedback_id(&id)?;
    let found = app.store.feedback(id).await.map_err(unavailable)?.ok_or_else(|| unknown(id))?;
    Ok(answer(StatusCode::OK, &feedback::to_json(&found)))
}

/// `GET /v1/feedback`
pub async fn list(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let filter = feedback::filter(query.as_deref())?;
    let page = app.store.list_feedback(&filter).await.map_err(unavailable)?;
    Ok(list_page(page.items.iter().map(feedback::to_json).collect(), page.has_more))
}

/// `PATCH /v1/feedback/{id}`
pub async fn edit(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let (id, caller) = (feedback_id(&id)?, Caller::of(&request));
    let body = app.body.json(request).await?;
    let before = app.store.feedback(id).await.map_err(unavailable)?.ok_or_else(|| unknown(id))?;
    check_sender(&caller, &before)?;
    if before.withdrawn {
        let message = format!("The feedback `{id}` is withdrawn; send a new one.");
        return Err(ApiError::client(StatusCode::CONFLICT, Some("withdrawn"), message));
    }
    let edit = Edit::parse(Fields::root(&body)?, &before, &rules(&app, &|id| app.store.issued(id)))?;
    if let Some(candidates) = edit.candidates() {
        same_prompt(&app.store, candidates, None).await?;
    }
    let after = app.store.edit_feedback(id, edit.into_change()).await.map_err(unavailable)?.ok_or_else(|| unknown(id))?;
    Ok(answer(StatusCode::OK, &feedback::to_json(&after)))
}

/// `DELETE /v1/feedback/{id}`: it stays, marked, and counts for nothing.
pub async fn withdraw(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let id = feedback_id(&id)?;
    let before = app.store.feedback(id).await.map_err(unavailable)?.ok_or_else(|| unknown(id))?;
    check_sender(&Caller::of(&request), &before)?;
    let after = app.store.withdraw_feedback(id).await.map_err(unavailable)?.ok_or_else(|| unknown(id))?;
    Ok(answer(StatusCode::OK, &feedback::to_json(&after)))
}

/// Whoever may send feedback reads all of it; what another key has sent is only the administrator's to change. On a server without keys
/// everybody is one.
fn check_sender(caller: &Caller, feedback: &Feedback) -> Result<(), ApiError> {
    let own = feedback.key_id.is_some() && feedback.key_id == caller.key_id();
    if own || caller.allows(Scope::Admin) {
        return Ok(());
    }
    let message = format!(
        "The feedback `{}` was not sent with this API key: only the key that sent it, or one with the scope `admin`, may change or withdraw it.",
        feedback.id
    );
    Err(ApiError::client(StatusCode::FORBIDDEN, Some("insufficient_permissions"), message))
}

/// What a request says beside its body.
struct Sender {
    key_id: Option<String>,
    idempotency_key: Option<String>,
}

impl Sender {
    fn of(request: &Request) -> Result<Self, ApiError> {
        let refused = || {
            let message = "Invalid header 'Idempotency-Key': expected 1 to 200 visible characters.";
            ApiError::invalid("Idempotency-Key", "invalid_value", message)
        };
        let idempotency_key = match request.headers().get("idempotency-key") {
            None => None,
            Some(value) => {
                let text = value.to_str().map_err(|_| refused())?.trim();
                Some(text).filter(|text| (1..=200).contains(&text.len())).map(str::to_owned).map(Some).ok_or_else(refused)?
            }
        };
        Ok(Self { key_id: Caller::of(request).key_id(), idempotency_key })
    }

    fn parse(&self, app: &App, fields: Fields<'_>, index: Option<usize>) -> Result<Submission, ApiError> {
        let mut submission = Submission::parse(fields, &rules(app, &|id| app.store.issued(id)))?;
        let from_header = || {
            let key = self.idempotency_key.as_ref()?;
            Some(index.map_or_else(|| key.clone(), |index| format!("{key}/{index}")))
        };
        let key = submission.idempotency_key.take().or_else(from_header);
        // Two applications may count from one: their keys must not meet.
        submission.idempotency_key = key.map(|key| match &self.key_id {
            Some(own) => format!("{own}/{key}"),
            None => key,
        });
        Ok(submission)
    }
}

fn rules<'a>(app: &'a App, issued: &'a dyn Fn(Uuid) -> bool) -> Rules<'a> {
    Rules { metrics: &app.feedback_metrics, issued }
}

/// Asks the store what only the store knows, and makes the record. `waited`: whether this request has given answers on their way the
/// time to be written.
async fn admit(
    app: &App,
    sender: &Sender,
    submission: Submission,
    index: Option<usize>,
    waited: &mut bool,
) -> Result<Feedback, ApiError> {
    match &submission.target {
        Target::Completion(_) => {}
        Target::Conversation(id) => {
            if !conversation_exists(&app.store, id, waited).await? {
                return Err(Submission::no_such_conversation(id, index));
            }
        }
        Target::Candidates(candidates) => same_prompt(&app.store, candidates, index).await?,
    }
    Ok(submission.into_feedback(app.store.issue_id(), now(), sender.key_id.clone()))
}

async fn conversation_exists(store: &Store, id: &str, waited: &mut bool) -> Result<bool, ApiError> {
    if !*waited {
        if store.conversation_exists(id).await.map_err(unavailable)? {
            return Ok(true);
        }
        tokio::time::sleep(WRITE_TIME).await;
        *waited = true;
    }
    store.conversation_exists(id).await.map_err(unavailable)
}

/// Answers to different prompts cannot be ranked. Rows that are not written yet, or hold no text, are taken on trust.
async fn same_prompt(store: &Store, candidates: &[Uuid], index: Option<usize>) -> Result<(), ApiError> {
    let mut known: HashMap<Uuid, usize> = HashMap::new();
    let mut answers: Vec<Inference> = Vec::new();
    for (at, candidate) in candidates.iter().enumerate() {
        if known.contains_key(candidate) {
            continue;
        }
        let found = match store.inference(*candidate).await {
            Ok(Some(found)) => found,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(%error, "cannot look up the candidates of a comparison; taking them on trust");
                return Ok(());
            }
        };
        if answers.first().is_some_and(|first| differ(first, &found)) {
            let path = index.map_or_else(String::new, |index| format!("{index}."));
            let param = format!("{path}value.candidates.{at}");
            let message = format!("Invalid '{param}': it answers another prompt than the candidates before it.");
            return Err(ApiError::invalid(param, "different_prompts", message));
        }
        known.extend(found.choices.iter().map(|choice| (choice.id, answers.len())));
        answers.push(found);
    }
    Ok(())
}

/// Whether two answers are known to be to different prompts. Messages go first: two models spell one conversation differently.
fn differ(a: &Inference, b: &Inference) -> bool {
    match (&a.messages, &b.messages) {
        (Some(a), Some(b)) => a != b,
        _ => matches!((&a.prompt_text, &b.prompt_text), (Some(a), Some(b)) if a != b),
    }
}

fn feedback_id(text: &str) -> Result<Uuid, ApiError> {
    Uuid::try_parse(text).map_err(|_| {
        let shown: String = text.chars().take(100).collect();
        no_feedback(&shown)
    })
}

fn unknown(id: Uuid) -> ApiError {
    no_feedback(&id.to_string())
}

fn no_feedback(id: &str) -> ApiError {
    let message = format!("No feedback `{id}` is known. GET /v1/feedback lists what is.");
    ApiError::client(StatusCode::NOT_FOUND, Some("feedback_not_found"), message)
}

/// The client learns that it should try again; the log learns why.
pub fn unavailable(error: StoreError) -> ApiError {
    match error {
        StoreError::Closed => ApiError::unavailable(
            Some("draining"),
            "The server is shutting down; send the request again, or to another replica.",
            5,
        ),
        StoreError::Row { .. } | StoreError::Io { .. } => {
            tracing::error!(%error, "the store failed");
            ApiError::fault("The server could not read or write its records.")
        }
        _ => {
            tracing::error!(%error, "the store is not available");
            let message = "The server cannot reach its records right now; send the request again.";
            ApiError::unavailable(Some("store_unavailable"), message, 2)
        }
    }
}
