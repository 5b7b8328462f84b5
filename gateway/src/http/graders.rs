//! `/v1/fine_tuning/alpha/graders`: graders tried out before a job trains by them.

use crate::graders::{InsideOracle, check_models, parse};
use crate::http::answer::answer;
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::generate::enter;
use crate::http::inside::Inside;
use crate::openai::fields::Fields;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use axum::{Extension, Router};
use hyper::StatusCode;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::time::{Duration, Instant};
use tidemill_rlhf::reward::grader::{FaultKind, Grade, Graded, Grader};
use tokio::runtime::Handle;

/// The field that holds the grader.
const GRADER: &str = "grader";

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/fine_tuning/alpha/graders/validate", post(validate))
        .route("/v1/fine_tuning/alpha/graders/run", post(run))
}

/// `POST …/validate`: the grader as it was understood.
async fn validate(State(app): State<App>, Extension(caller): Extension<Caller>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let grader = parse(&fields.require(GRADER)?)?;
    fields.finish()?;
    check_models(&app, &caller, &grader, GRADER)?;
    Ok(answer(StatusCode::OK, &json!({ "grader": grader })))
}

/// `POST …/run`: what one answer is worth.
async fn run(State(app): State<App>, Extension(caller): Extension<Caller>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let grader = parse(&fields.require(GRADER)?)?;
    let sample = fields.require("model_sample")?.string()?.to_owned();
    let item = match fields.get("item") {
        Some(field) => Value::Object(field.map()?.clone()),
        None => json!({}),
    };
    fields.finish()?;
    check_models(&app, &caller, &grader, GRADER)?;
    let oracle = InsideOracle { inside: Inside::new(app), caller, runtime: Handle::current() };
    let work = move || {
        let began = Instant::now();
        let grade = grader.grade(&Graded::new(Cow::Owned(item), &sample), Some(&oracle));
        shown(&grader, &grade, began.elapsed())
    };
    let graded = tokio::task::spawn_blocking(work).await;
    Ok(answer(StatusCode::OK, &graded.map_err(|_| ApiError::fault("The grader broke off because of an internal error."))?))
}

fn shown(grader: &Grader, grade: &Grade, took: Duration) -> Value {
    let faulty = |kind: FaultKind| grade.faults.iter().any(|fault| fault.kind == kind);
    let details = grade.faults.iter().find(|fault| fault.kind == FaultKind::Model).map(|fault| fault.detail.as_str());
    let scores = if grade.parts.is_empty() { json!({ grader.name(): grade.reward }) } else { json!(grade.parts) };
    let models = grader.models();
    let sampled = models.first().filter(|_| models.len() == 1).map(|(_, model)| *model);
    json!({
        "reward": grade.reward,
        "sub_rewards": grade.parts,
        "model_grader_token_usage_per_model": grade.tokens,
        "metadata": {
            "name": grader.name(),
            "type": grader.kind(),
            "scores": scores,
            "execution_time": took.as_secs_f64(),
            "sampled_model_name": sampled,
            "token_usage": if grade.tokens.is_empty() { Value::Null } else { grade.tokens.values().sum::<u64>().into() },
            "errors": {
                "formula_parse_error": faulty(FaultKind::Formula),
                "sample_parse_error": faulty(FaultKind::Sample),
                "truncated_observation_error": false,
                "unresponsive_reward_error": false,
                "invalid_variable_error": faulty(FaultKind::Variable),
                "other_error": false,
                "python_grader_server_error": false,
                "python_grader_server_error_type": null,
                "python_grader_runtime_error": false,
                "python_grader_runtime_error_details": null,
                "model_grader_server_error": faulty(FaultKind::Model),
                "model_grader_refusal_error": false,
                "model_grader_parse_error": faulty(FaultKind::Reply),
                "model_grader_server_error_details": details,
            },
            "details": grade.faults.iter().map(|fault| format!("{}: {}", fault.grader, fault.detail)).collect::<Vec<_>>(),
        },
    })
}
