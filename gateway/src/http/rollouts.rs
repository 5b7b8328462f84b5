//! `/v1/rollouts` and `/v1/rollout_plan`: what `tidemill rollout` does, over HTTP.

use crate::http::answer::{answer, list as list_page};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::limits::parse_json;
use crate::http::query::parameters;
use crate::openai::fields::Fields;
use crate::rollout::decision::{Act, ActError, PauseReason, State as RolloutState, Status};
use crate::rollout::keeper::{Acted, KeeperError};
use crate::rollout::spec::Spec;
use crate::rollout::statistics::{Outcome, Question, plan as planned};
use crate::rollout::table::{BadRow, read};
use axum::Router;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use hyper::StatusCode;
use serde_json::{Map, Value, json};
use tidemill_store::{Rollout, RolloutDecision, RolloutFilter, RolloutRefusal, StoreError};
use uuid::Uuid;

/// Most rollouts of one answer.
const MAX_LIST: usize = 100;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/rollouts", get(list).post(start))
        .route("/v1/rollouts/{id}", get(one))
        .route("/v1/rollout_plan", post(plan))
        .route("/v1/rollouts/{id}/pause", post(pause))
        .route("/v1/rollouts/{id}/resume", post(resume))
        .route("/v1/rollouts/{id}/approve", post(approve))
        .route("/v1/rollouts/{id}/promote", post(promote))
        .route("/v1/rollouts/{id}/rollback", post(roll_back))
}

/// A rollout as the API shows it: what was asked for, where it stands, and its newest decision.
pub fn shown(row: &Rollout) -> Value {
    let seconds = |micros: i64| micros.div_euclid(1_000_000);
    let mut value = json!({
        "object": "rollout",
        "id": row.id,
        "name": row.name,
        "model": row.model,
        "kind": row.spec["kind"],
        "status": Value::Null,
        "reason": Value::Null,
        "created_at": seconds(row.created),
        "updated_at": seconds(row.updated),
        "ended_at": row.ended.map(seconds),
        "version": row.version,
        "arms": [],
        "spec": row.spec,
        "state": row.state,
        "latest": row.latest,
    });
    if let Ok((spec, state)) = read(row) {
        let (status, reason) = words(&state);
        value["status"] = status.into();
        value["reason"] = reason.into();
        let units = |arm: usize| row.latest["exposures"].get(arm).cloned().unwrap_or(Value::from(0));
        let arms = spec.arms.iter().enumerate().map(|(index, arm)| {
            let share = state.weights.get(index).copied().unwrap_or(0.0) * state.coverage;
            json!({"variant": arm.variant, "share": share, "units": units(index)})
        });
        value["arms"] = arms.collect();
    }
    value
}

/// The words for where a rollout stands, and why it is paused.
fn words(state: &RolloutState) -> (&'static str, Option<&'static str>) {
    match state.status {
        Status::Running if state.awaiting => ("awaiting_approval", None),
        Status::Running => ("running", None),
        Status::Paused { reason } => {
            let reason = match reason {
                PauseReason::Person => "person",
                PauseReason::Inconclusive => "inconclusive",
                PauseReason::SampleRatio => "sample_ratio",
                PauseReason::Deadline => "deadline",
            };
            ("paused", Some(reason))
        }
        Status::Promoted { .. } => ("promoted", None),
        Status::RolledBack => ("rolled_back", None),
        Status::Completed => ("completed", None),
    }
}

fn shown_decision(decision: &RolloutDecision) -> Value {
    let mut body = decision.body.clone();
    body["version"] = decision.version.into();
    body
}

/// `GET /v1/rollouts?model=…&over=…&after=ID&limit=N`, the newest first.
async fn list(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let mut filter = RolloutFilter { limit: Some(20), ..RolloutFilter::default() };
    for parameter in parameters(query.as_deref(), &["model", "over", "after", "limit"])? {
        match parameter.name.as_ref() {
            "model" => filter.model = Some(parameter.value.into_owned()),
            "over" => filter.over = Some(parameter.one_of(&[("true", true), ("false", false)])?),
            "after" => filter.before = Some(parameter.parse::<Uuid>("the id of a rollout")?),
            _ => filter.limit = Some(parameter.number(1..=MAX_LIST)?),
        }
    }
    let page = app.rollouts.rollouts().list(&filter).await.map_err(unavailable)?;
    Ok(list_page(page.items.iter().map(shown).collect(), page.has_more))
}

/// `GET /v1/rollouts/{id}`: by id or name, with every decision that has a row.
async fn one(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let row = app.rollouts.rollouts().find(&id).await.map_err(refused)?;
    let decisions = app.rollouts.rollouts().decisions(row.id).await.map_err(unavailable)?;
    let mut value = shown(&row);
    value["decisions"] = decisions.iter().map(shown_decision).collect();
    Ok(answer(StatusCode::OK, &value))
}

/// `POST /v1/rollouts`
async fn start(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let by = Caller::of(&request).actor();
    let spec = Spec::parse(&app.body.json(request).await?)?;
    let row = app.rollouts.start(spec, &by).await.map_err(ApiError::from)?;
    Ok(answer(StatusCode::CREATED, &shown(&row)))
}

async fn pause(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    act(&app, &id, request, Act::Pause).await
}

async fn resume(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    act(&app, &id, request, Act::Resume).await
}

async fn approve(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    act(&app, &id, request, Act::Approve).await
}

async fn roll_back(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    act(&app, &id, request, Act::RollBack).await
}

/// The body of an act, which may be left out.
async fn body(app: &App, request: Request) -> Result<Value, ApiError> {
    let body = app.body.read(request).await?;
    if body.is_empty() { Ok(Value::Object(Map::new())) } else { parse_json(&body) }
}

async fn act(app: &App, id: &str, request: Request, act: Act) -> Result<Response, ApiError> {
    let by = Caller::of(&request).actor();
    Fields::root(&body(app, request).await?)?.finish()?;
    acted(app.rollouts.act(id, act, &by).await)
}

/// `POST /v1/rollouts/{id}/promote`: of several treatments the one that the body names.
async fn promote(State(app): State<App>, Path(id): Path<String>, request: Request) -> Result<Response, ApiError> {
    let by = Caller::of(&request).actor();
    let body = body(&app, request).await?;
    let mut fields = Fields::root(&body)?;
    let named = fields.get("variant").map(|field| field.short_string(100).map(str::to_owned)).transpose()?;
    fields.finish()?;
    let row = app.rollouts.rollouts().find(&id).await.map_err(refused)?;
    let (spec, _) = read(&row).map_err(|error| ApiError::from(KeeperError::from(error)))?;
    let treatments: Vec<&str> = spec.arms.iter().skip(1).map(|arm| arm.variant.as_str()).collect();
    let place = match &named {
        Some(named) => treatments.iter().position(|variant| variant == named),
        None => (treatments.len() == 1).then_some(0),
    };
    let Some(place) = place else {
        let message = format!("Invalid 'variant': name one of the treatments: {}.", treatments.join(", "));
        return Err(ApiError::invalid("variant", "invalid_value", message));
    };
    acted(app.rollouts.act(&id, Act::Promote { arm: place + 1 }, &by).await)
}

/// The rollout as it is now, and how many servers assign by it.
fn acted(acted: Result<Acted, KeeperError>) -> Result<Response, ApiError> {
    let Acted { rollout, servers } = acted?;
    let mut value = shown(&rollout);
    value["servers"] = json!({"all": servers.all, "serving": servers.serving});
    Ok(answer(StatusCode::OK, &value))
}

/// `POST /v1/rollout_plan`: how much traffic it takes to find a change.
async fn plan(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let any = -1e12..=1e12;
    let baseline = fields.require("baseline")?.double(any.clone())?;
    let effect = fields.require("effect")?.double(any.clone())?;
    let mut number = |key: &'static str| fields.get(key).map(|field| field.double(any.clone())).transpose();
    let (deviation, power, alpha, share) = (number("deviation")?, number("power")?, number("alpha")?, number("share")?);
    fields.finish()?;
    let outcome = match deviation {
        None => Outcome::Share { baseline },
        Some(deviation) => Outcome::Mean { baseline, deviation },
    };
    let question =
        Question { outcome, effect, power: power.unwrap_or(0.8), alpha: alpha.unwrap_or(0.05), share: share.unwrap_or(0.5) };
    if let Some((field, expected)) = question.refusal() {
        return Err(ApiError::invalid(field, "invalid_value", format!("Invalid '{field}': expected {expected}.")));
    }
    let Some(sizes) = planned(&question) else {
        let message = "Invalid 'effect': so small a change is found by no traffic; give a larger one.";
        return Err(ApiError::invalid("effect", "invalid_value", message));
    };
    let value = json!({
        "object": "rollout.plan",
        "one_look": sizes.fixed,
        "expected": sizes.expected,
        "at_the_latest": sizes.sequential,
        "tuning": sizes.tuning,
    });
    Ok(answer(StatusCode::OK, &value))
}

/// Why a rollout is not found or not changed.
pub fn refused(error: RolloutRefusal) -> ApiError {
    ApiError::from(KeeperError::from(error))
}

impl From<KeeperError> for ApiError {
    fn from(error: KeeperError) -> Self {
        let text = format!("{error}.");
        let of = |param: Option<String>, status: StatusCode, code: &'static str| Self {
            param,
            ..Self::client(status, Some(code), text.clone())
        };
        let conflict = |param: Option<&str>, code| of(param.map(str::to_owned), StatusCode::CONFLICT, code);
        match error {
            KeeperError::Refused(RolloutRefusal::Store(error)) => unavailable(error),
            KeeperError::Refused(RolloutRefusal::NameTaken(_)) => conflict(Some("name"), "name_taken"),
            KeeperError::Refused(RolloutRefusal::Changed) => conflict(None, "rollout_changed"),
            KeeperError::Refused(RolloutRefusal::Unknown(_)) => of(None, StatusCode::NOT_FOUND, "rollout_not_found"),
            KeeperError::Act(error) => match error {
                ActError::Over => conflict(None, "rollout_over"),
                ActError::NoKey | ActError::SameKey => of(None, StatusCode::FORBIDDEN, "four_eyes"),
                ActError::NoSuchArm(_) => of(Some("variant".to_owned()), StatusCode::BAD_REQUEST, "invalid_value"),
                _ => conflict(None, "rollout_state"),
            },
            KeeperError::Built { .. } => conflict(None, "rollout_superseded"),
            KeeperError::Row(BadRow::Clash(_)) => conflict(Some("layer"), "layer_taken"),
            KeeperError::Row(BadRow::Json { name, reason }) => {
                unavailable(StoreError::Row { table: "rollouts", id: name, reason })
            }
            KeeperError::Control { .. } => of(Some("arms.0.variant".to_owned()), StatusCode::BAD_REQUEST, "invalid_value"),
            KeeperError::Variant { arm, .. } => of(Some(format!("arms.{arm}.variant")), StatusCode::BAD_REQUEST, "invalid_value"),
            KeeperError::Metric { index, .. } => {
                of(Some(format!("metrics.{index}.metric")), StatusCode::BAD_REQUEST, "invalid_value")
            }
        }
    }
}
