//! What an annotator's page asks for. Nothing here names a model, a variant or a gold task.

use super::{annotator, id, is_operator, optional_text};
use crate::clock::now;
use crate::http::App;
use crate::http::answer::answer;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::query::parameters;
use crate::interchange::transcript;
use crate::openai::fields::Fields;
use axum::Extension;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use hyper::StatusCode;
use serde_json::{Value, json};
use tidemill_store::label::{Assignment, LabelError, Labels, Lease, Progress, Queue, Verdict};

/// `GET /v1/labeling/me`: who the server takes the caller for; `annotator` is null when a name is still to be given.
pub async fn me(Extension(caller): Extension<Caller>, RawQuery(raw): RawQuery) -> Result<Response, ApiError> {
    let given = parameters(raw.as_deref(), &["annotator"])?.pop().map(|name| name.value);
    let name = match given {
        None if caller.name().is_none() => None,
        given => Some(annotator(&caller, given.as_deref())?),
    };
    let body = json!({"annotator": name, "keyed": caller.key.is_some(), "operator": is_operator(&caller)});
    Ok(answer(StatusCode::OK, &body))
}

/// Someone at work in a queue.
struct Desk {
    labels: Labels,
    queue: Queue,
    who: String,
}

impl Desk {
    /// Of a request that says nothing but, without keys, who sends it.
    async fn of(app: &App, caller: &Caller, queue: &str, request: Request) -> Result<Self, ApiError> {
        let body = app.body.json(request).await?;
        let mut fields = Fields::root(&body)?;
        let who = annotator(caller, optional_text(&mut fields, "annotator", 400)?)?;
        fields.finish()?;
        let labels = Labels::new(app.store.database());
        let queue = labels.queue(queue).await?;
        Ok(Self { labels, queue, who })
    }

    async fn lease(&self) -> Result<Lease, LabelError> {
        self.labels.lease(&self.queue, &self.who, now()).await
    }

    /// A task as the page gets it, with sides instead of candidates.
    async fn given(&self, lease: Lease) -> Result<Value, LabelError> {
        let progress = self.labels.progress(self.queue.id, now()).await?;
        let mine = self.labels.finished_by(self.queue.id, &self.who).await?;
        let shown = shown_progress(&self.queue, &progress, mine);
        Ok(match lease {
            Lease::Work(task, own) => {
                let (left, right) = if own.a_is_left { (task.answer_a, task.answer_b) } else { (task.answer_b, task.answer_a) };
                let turns = transcript::turns(&task.prompt).into_iter();
                let prompt: Vec<Value> = turns.map(|(role, text)| json!({"role": role, "text": text})).collect();
                let task = json!({"assignment": own.id, "prompt": prompt, "left": left, "right": right});
                json!({"task": task, "progress": shown})
            }
            Lease::Empty => json!({"task": null, "why": why_empty(&self.queue, &progress), "progress": shown}),
        })
    }
}

/// `POST /v1/labeling/queues/{queue}/next`: a task for the caller, or why there is none.
pub async fn next(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(queue): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let desk = Desk::of(&app, &caller, &queue, request).await?;
    let lease = desk.lease().await?;
    Ok(answer(StatusCode::OK, &desk.given(lease).await?))
}

/// `POST /v1/labeling/queues/{queue}/undo`: takes the last judgement back and brings its task again, or another one when someone
/// else has it now.
pub async fn undo(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(queue): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let desk = Desk::of(&app, &caller, &queue, request).await?;
    let undone = desk.labels.undo(&desk.queue, &desk.who, now()).await?;
    let again = undone.again != Lease::Empty;
    let lease = if again { undone.again } else { desk.lease().await? };
    let mut body = desk.given(lease).await?;
    body["again"] = again.into();
    body["withdrawn"] = json!(undone.feedback_id);
    Ok(answer(StatusCode::OK, &body))
}

/// Gold tasks count as any other here: a step that differs after one would give it away. What is wanted is what the queue's share of
/// gold makes of it on average; people who have had more gold than that wait at the last step until the rest is done.
fn shown_progress(queue: &Queue, progress: &Progress, mine: u64) -> Value {
    let plain = progress.tasks * u64::from(queue.overlap);
    let given = progress.verdicts + progress.gold_verdicts;
    let share = if progress.gold > 0 { queue.gold_share.min(0.9) } else { 0.0 };
    let (completed, wanted) = match (plain as f64 / (1.0 - share)).round() as u64 {
        0 => (given, given),
        wanted if progress.verdicts >= plain => (wanted, wanted),
        wanted => (given.min(wanted - 1), wanted),
    };
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

/// What a person says of a task.
enum Said {
    /// `left`, `right`, `tie` or `both_bad`.
    Choice(&'static str),
    /// Passed over, and why.
    Skip(String),
}

/// `POST /v1/labeling/assignments/{id}/verdict`: `{"choice": "left|right|tie|both_bad"}`. With `"next": true` the answer brings the
/// next task.
pub async fn verdict(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(assignment): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let choice =
        |fields: &mut Fields<'_>| Ok(Said::Choice(fields.require("choice")?.one_of(&["left", "right", "tie", "both_bad"])?));
    judge(&app, &caller, &assignment, request, choice).await
}

/// `POST /v1/labeling/assignments/{id}/skip`: `{"reason": "…"}`.
pub async fn skip(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(assignment): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let reason = |fields: &mut Fields<'_>| {
        let field = fields.require("reason")?;
        match field.short_string(500)?.trim() {
            "" => Err(field.invalid("invalid_value", "say why the task is skipped.")),
            reason => Ok(Said::Skip(reason.to_owned())),
        }
    };
    judge(&app, &caller, &assignment, request, reason).await
}

/// Takes what is said of an assignment, and gives the next task if that is wanted.
async fn judge(
    app: &App,
    caller: &Caller,
    assignment: &str,
    request: Request,
    said: impl FnOnce(&mut Fields<'_>) -> Result<Said, ApiError>,
) -> Result<Response, ApiError> {
    let assignment = id(assignment)?;
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let said = said(&mut fields)?;
    let who = annotator(caller, optional_text(&mut fields, "annotator", 400)?)?;
    let latency_ms = fields.integer("latency_ms", 0..=i64::from(u32::MAX))?;
    let next = fields.bool_or("next", false)?;
    fields.finish()?;
    let labels = Labels::new(app.store.database());
    let own = labels.assignment(assignment).await?.ok_or(LabelError::NoAssignment(assignment))?;
    let finished = finished(&own, latency_ms);
    let mut answered = match said {
        Said::Choice(choice) => {
            let verdict = match choice {
                "tie" => Verdict::Tie,
                "both_bad" => Verdict::BothBad,
                side if (side == "left") == own.a_is_left => Verdict::A,
                _ => Verdict::B,
            };
            let own = labels.submit(assignment, &who, verdict, finished, caller.key_id().as_deref()).await?;
            json!({"assignment": own.id, "feedback": own.feedback_id})
        }
        Said::Skip(reason) => json!({"assignment": labels.skip(assignment, &who, &reason, finished).await?.id}),
    };
    if next {
        let queue = labels.queue(&own.queue_id.to_string()).await?;
        let desk = Desk { labels, queue, who };
        let lease = desk.lease().await?;
        if let (Some(answered), Value::Object(more)) = (answered.as_object_mut(), desk.given(lease).await?) {
            answered.extend(more);
        }
    }
    Ok(answer(StatusCode::OK, &answered))
}

/// When the person decided: what the page measured, but never later than now. A verdict that waited for the network was made earlier.
fn finished(own: &Assignment, latency_ms: Option<i64>) -> i64 {
    let decided = |latency: i64| own.started.saturating_add(latency.saturating_mul(1000));
    latency_ms.map_or(i64::MAX, decided).min(now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn shown(tasks: u64, verdicts: u64, gold_verdicts: u64) -> (u64, u64) {
        let queue = Queue {
            id: Uuid::from_u128(1),
            name: "q".into(),
            created: 0,
            closed: None,
            rule: Value::Null,
            guidelines: String::new(),
            overlap: 2,
            gold_share: 0.1,
            lease_seconds: 60,
            filled_until: String::new(),
        };
        let progress = Progress { tasks, verdicts, gold_verdicts, gold: 50, ..Progress::default() };
        let shown = shown_progress(&queue, &progress, 0);
        (shown["completed"].as_u64().unwrap(), shown["wanted"].as_u64().unwrap())
    }

    #[test]
    fn a_step_is_the_same_after_a_gold_task_and_after_a_plain_one() {
        for verdicts in 0..18 {
            for gold in 0..60 {
                assert_eq!(shown(10, verdicts, gold + 1), shown(10, verdicts + 1, gold), "{verdicts} {gold}");
                let (completed, wanted) = shown(10, verdicts, gold);
                assert!(completed < wanted && wanted == 22, "{completed} of {wanted}");
            }
        }
        assert_eq!((shown(10, 20, 0), shown(10, 20, 60)), ((22, 22), (22, 22)));
        assert_eq!((shown(0, 0, 0), shown(0, 0, 3)), ((0, 0), (3, 3)));
    }
}
