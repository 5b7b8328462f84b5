//! What an annotator's page asks for. Nothing here names a model, a variant or a gold task.

use super::{annotator, answer, forbidden, id, is_operator, optional_text, query};
use crate::http::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::limits::parse_json;
use crate::labeling::filler::now;
use crate::openai::fields::Fields;
use axum::Extension;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use hyper::StatusCode;
use serde_json::{Value, json};
use tidemill_store::Scope;
use tidemill_store::label::{Assignment, Labels, Lease, Progress, Queue, Verdict};

/// `GET /v1/labeling/me`: who the server takes the caller for; `annotator` is null when a name is still to be given.
pub async fn me(Extension(caller): Extension<Caller>, RawQuery(raw): RawQuery) -> Result<Response, ApiError> {
    if !caller.allows(Scope::Label) && !is_operator(&caller) {
        return Err(forbidden(Scope::Label));
    }
    let given = query(raw.as_deref(), &["annotator"])?.pop().map(|(_, name)| name);
    let name = match given {
        None if caller.name().is_none() => None,
        given => Some(annotator(&caller, given.as_deref())?),
    };
    let body = json!({"annotator": name, "keyed": caller.key.is_some(), "operator": is_operator(&caller)});
    Ok(answer(StatusCode::OK, &body))
}

/// `POST /v1/labeling/queues/{queue}/next`: a task for the caller, or why there is none.
pub async fn next(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(queue): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = parse_json(&app.body.read(request).await?)?;
    let mut fields = Fields::root(&body)?;
    let who = annotator(&caller, optional_text(&mut fields, "annotator", 400)?)?;
    fields.finish()?;
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(&queue).await?;
    let lease = labels.lease(&queue, &who, now()).await?;
    Ok(answer(StatusCode::OK, &given(&labels, &queue, &who, lease).await?))
}

/// A task as the page gets it, with sides instead of candidates.
async fn given(labels: &Labels, queue: &Queue, who: &str, lease: Lease) -> Result<Value, ApiError> {
    let progress = labels.progress(queue.id, now()).await?;
    let mine = labels.finished_by(queue.id, who).await?;
    let shown = shown_progress(queue, &progress, mine);
    Ok(match lease {
        Lease::Work(task, own) => {
            let (left, right) = if own.a_is_left { (task.answer_a, task.answer_b) } else { (task.answer_b, task.answer_a) };
            let task = json!({"assignment": own.id, "prompt": shown_prompt(&task.prompt), "left": left, "right": right});
            json!({"task": task, "progress": shown})
        }
        Lease::Empty => json!({"task": null, "why": why_empty(queue, &progress), "progress": shown}),
    })
}

/// Gold tasks count as any other here: a bar that stands still after one would give it away. What is wanted is what the queue's
/// share of gold makes of it on average, so that it does not grow with each.
fn shown_progress(queue: &Queue, progress: &Progress, mine: u64) -> Value {
    let plain = progress.tasks * u64::from(queue.overlap);
    let share = if progress.gold > 0 { queue.gold_share.min(0.9) } else { 0.0 };
    let expected = (plain as f64 / (1.0 - share)).round() as u64;
    let left = plain.saturating_sub(progress.verdicts);
    let completed = progress.verdicts + progress.gold_verdicts;
    let wanted = if left == 0 { completed } else { expected.max(completed + left) };
    json!({"completed": completed, "wanted": wanted, "mine": mine})
}

fn why_empty(queue: &Queue, progress: &Progress) -> &'static str {
    if queue.closed.is_some() {
        "closed"
    } else if progress.drafts > 0 || progress.leased > 0 {
        "waiting"
    } else if progress.done == progress.tasks {
        "done"
    } else {
        "yours_done"
    }
}

/// Roles and texts.
fn shown_prompt(prompt: &Value) -> Vec<Value> {
    let turn = |message: &Value| {
        let text = match message.get("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => {
                parts.iter().filter_map(|part| part.get("text")?.as_str()).collect::<Vec<_>>().join("\n")
            }
            _ => String::new(),
        };
        json!({"role": message.get("role").and_then(Value::as_str).unwrap_or("user"), "text": text})
    };
    prompt.as_array().map(|messages| messages.iter().map(turn).collect()).unwrap_or_default()
}

/// What both kinds of judgement send.
struct Sent {
    who: String,
    latency_ms: Option<i64>,
    next: bool,
}

impl Sent {
    fn parse(fields: &mut Fields<'_>, caller: &Caller) -> Result<Self, ApiError> {
        Ok(Self {
            who: annotator(caller, optional_text(fields, "annotator", 400)?)?,
            latency_ms: fields.integer("latency_ms", 0..=i64::from(u32::MAX))?,
            next: fields.bool_or("next", false)?,
        })
    }

    /// When the person decided: what the page measured, but never later than now. A verdict that waited for the network was made
    /// earlier.
    async fn finished(&self, labels: &Labels, assignment: uuid::Uuid) -> Result<i64, ApiError> {
        let now = now();
        let own = labels.assignment(assignment).await?;
        Ok(match (own, self.latency_ms) {
            (Some(own), Some(latency)) => own.started.saturating_add(latency.saturating_mul(1000)).min(now),
            _ => now,
        })
    }
}

/// `POST /v1/labeling/assignments/{id}/verdict`: `{"choice": "left|right|tie|both_bad"}`. With `"next": true` the answer brings the
/// next task.
pub async fn verdict(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(assignment): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let assignment = id(&assignment)?;
    let body = parse_json(&app.body.read(request).await?)?;
    let mut fields = Fields::root(&body)?;
    let choice = fields.require("choice")?.one_of(&["left", "right", "tie", "both_bad"])?;
    let sent = Sent::parse(&mut fields, &caller)?;
    fields.finish()?;
    let labels = Labels::new(app.store.database());
    let a_is_left = labels.assignment(assignment).await?.is_some_and(|own| own.a_is_left);
    let verdict = match choice {
        "tie" => Verdict::Tie,
        "both_bad" => Verdict::BothBad,
        side if (side == "left") == a_is_left => Verdict::A,
        _ => Verdict::B,
    };
    let finished = sent.finished(&labels, assignment).await?;
    let own = labels.submit(assignment, &sent.who, verdict, finished, caller.key_id().as_deref()).await?;
    settled(&labels, &own, &sent, json!({"assignment": own.id, "feedback": own.feedback_id})).await
}

/// `POST /v1/labeling/assignments/{id}/skip`: `{"reason": "…"}`.
pub async fn skip(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(assignment): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let assignment = id(&assignment)?;
    let body = parse_json(&app.body.read(request).await?)?;
    let mut fields = Fields::root(&body)?;
    let field = fields.require("reason")?;
    let reason = field.short_string(500)?.trim();
    if reason.is_empty() {
        return Err(field.invalid("invalid_value", "say why the task is skipped."));
    }
    let sent = Sent::parse(&mut fields, &caller)?;
    fields.finish()?;
    let labels = Labels::new(app.store.database());
    let finished = sent.finished(&labels, assignment).await?;
    let own = labels.skip(assignment, &sent.who, reason, finished).await?;
    settled(&labels, &own, &sent, json!({"assignment": own.id})).await
}

async fn settled(labels: &Labels, own: &Assignment, sent: &Sent, mut body: Value) -> Result<Response, ApiError> {
    if sent.next {
        let queue = labels.queue(&own.queue_id.to_string()).await?;
        let lease = labels.lease(&queue, &sent.who, now()).await?;
        let more = given(labels, &queue, &sent.who, lease).await?;
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
    }
    Ok(answer(StatusCode::OK, &body))
}

/// `POST /v1/labeling/queues/{queue}/undo`: takes the last judgement back and brings its task again, or another one when someone
/// else has it now.
pub async fn undo(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(queue): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = parse_json(&app.body.read(request).await?)?;
    let mut fields = Fields::root(&body)?;
    let who = annotator(&caller, optional_text(&mut fields, "annotator", 400)?)?;
    fields.finish()?;
    let labels = Labels::new(app.store.database());
    let queue = labels.queue(&queue).await?;
    let undone = labels.undo(&queue, &who, now()).await?;
    let again = undone.again != Lease::Empty;
    let lease = if again { undone.again } else { labels.lease(&queue, &who, now()).await? };
    let mut body = given(&labels, &queue, &who, lease).await?;
    if let Some(map) = body.as_object_mut() {
        map.insert("again".into(), again.into());
        map.insert("withdrawn".into(), json!(undone.feedback_id));
    }
    Ok(answer(StatusCode::OK, &body))
}
