//! `/v1/fine_tuning/jobs`: models made from files, in the background.

use crate::clock::now;
use crate::fine_tuning::{Kind, Method, Wish, last_name, withdraw};
use crate::graders::check_models;
use crate::http::adapter_registry::refused;
use crate::http::answer::{answer, list as list_page};
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::files;
use crate::http::generate::enter;
use crate::http::query::parameters;
use crate::openai::about;
use crate::openai::fields::{Field, Fields};
use crate::openai::listing::{Extra, Listing};
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::Response;
use axum::routing::{MethodRouter, get, post};
use axum::{Extension, Router};
use hyper::StatusCode;
use serde_json::{Value, json};
use tidemill_store::{
    FileRecord, FineTuningCheckpoint, FineTuningDraft, FineTuningEvent, FineTuningJob, FineTuningState, News, Order, Viewer,
};
use uuid::Uuid;

const PREFIX: &str = "ftjob-";
const EVENT: &str = "ftevent-";
const CHECKPOINT: &str = "ftckpt_";
/// Jobs of a server in which something is still to be done; more are refused.
const MAX_OPEN: usize = 64;
/// Most events or checkpoints of one page.
const MAX_PAGE: usize = 1000;
/// Longest suffix, as OpenAI has it.
const MAX_SUFFIX: usize = 64;
/// Largest seed, as OpenAI has it.
const MAX_SEED: i64 = i32::MAX as i64;
/// OpenAI's objects name an organisation; here there is one.
const ORGANISATION: &str = "org-tidemill";

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/fine_tuning/jobs", post(create).get(list))
        .route("/v1/fine_tuning/jobs/{id}", get(show))
        .route("/v1/fine_tuning/jobs/{id}/cancel", wanting(Wish::Cancel))
        .route("/v1/fine_tuning/jobs/{id}/pause", wanting(Wish::Pause))
        .route("/v1/fine_tuning/jobs/{id}/resume", wanting(Wish::Resume))
        .route("/v1/fine_tuning/jobs/{id}/events", get(events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(checkpoints))
}

async fn create(State(app): State<App>, Extension(caller): Extension<Caller>, request: Request) -> Result<Response, ApiError> {
    let _in_flight = enter(&app)?;
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let model = fields.require("model")?.string()?;
    let training = fields.require("training_file")?.string()?;
    let validation = fields.string("validation_file")?;
    let method = Method::parse(&mut fields)?;
    let suffix = fields.get("suffix").map(|field| suffix(&field)).transpose()?;
    let seed = fields.integer("seed", 0..=MAX_SEED)?;
    let metadata = fields.get("metadata").map(|field| about::metadata(&field)).transpose()?;
    if let Some(field) = fields.get("integrations").filter(|field| field.value.as_array().is_none_or(|list| !list.is_empty())) {
        return Err(field.unsupported("names services that this server does not know; GET the job's events instead."));
    }
    fields.finish()?;
    let base = check_model(&app, &caller, model, &method).await?;
    if let Some(grader) = &method.grader {
        check_models(&app, &caller, grader, "method.reinforcement.grader")?;
        check_evaluation(&method, validation.is_some())?;
    }
    let training = file(&app, &caller, training, "training_file").await?;
    let validation = match validation {
        Some(text) => Some(file(&app, &caller, text, "validation_file").await?),
        None => None,
    };
    let rows = app.fine_tuning.rows();
    // Those who count at once would each find room.
    let _turn = app.fine_tuning.making().await;
    let open = rows.open(app.files.place()).await.map_err(unavailable)?;
    check_room(&open, caller.key_id().as_deref(), app.fine_tuning.options().jobs_per_key)?;
    let id = app.store.issue_id();
    let draft = FineTuningDraft {
        id,
        created: now(),
        key_id: caller.key_id(),
        model: model.to_owned(),
        base,
        method: method.to_json(),
        suffix: suffix.map(str::to_owned),
        // An id ends in bits that are as good as random.
        seed: seed.unwrap_or_else(|| (id.as_u128() as i64) & MAX_SEED),
        training_file: training.id,
        validation_file: validation.map(|file| file.id),
        metadata,
        result_file: app.store.issue_id(),
        place: training.place,
    };
    let news = [News::info(format!("Created fine-tuning job: {}.", name(id))), News::info("The files are looked through.")];
    let detail = json!({
        "model": draft.model, "method": draft.method["type"], "training_file": files::name(draft.training_file),
        "validation_file": draft.validation_file.map(files::name),
    });
    let act = app.store.act(caller.actor(), "fine_tuning.create").to(name(id)).with(detail);
    if !rows.insert(&draft, &news, act).await.map_err(unavailable)? {
        return Err(ApiError::invalid("training_file", "file_not_found", "A file of this job was deleted just now."));
    }
    app.fine_tuning.wake();
    Ok(answer(StatusCode::OK, &shown(&find(&app, &caller.viewer(), &name(id)).await?)))
}

/// Fails when a server has as many jobs to do as it takes, or as it takes of this key.
fn check_room(open: &[FineTuningJob], key: Option<&str>, most_per_key: usize) -> Result<(), ApiError> {
    let own = open.iter().filter(|job| key.is_some() && job.draft.key_id.as_deref() == key).count();
    let message = if own >= most_per_key {
        format!("{own} fine-tuning jobs of this key run, wait or are paused on this server, the most that it takes of one key; ")
    } else if open.len() >= MAX_OPEN {
        format!("{MAX_OPEN} fine-tuning jobs run, wait or are paused on this server, the most that it takes; ")
    } else {
        return Ok(());
    };
    let error = ApiError::client(StatusCode::TOO_MANY_REQUESTS, Some("too_many_jobs"), message + "cancel one, or wait.");
    Err(ApiError { retry_after: Some(60), ..error })
}

/// The base of a model that can be trained here.
async fn check_model(app: &App, caller: &Caller, name: &str, method: &Method) -> Result<String, ApiError> {
    caller.check_model(name)?;
    let model = app.registry.find_local(Some(name))?;
    let refused = |why: String| Err(ApiError::invalid("model", "model_not_available", format!("Invalid 'model': {why}")));
    let base = model.base();
    if model.adapter().is_some() {
        let made = app.fine_tuning.rows().find_model(last_name(name), &caller.viewer()).await.map_err(unavailable)?;
        if made.is_none_or(|job| job.draft.place != app.files.place()) {
            return refused(format!("`{name}` is an adapter that no job of yours made here; name its base, `{base}`."));
        }
    }
    if model.engine().options().max_adapters == 0 {
        return refused("this server serves no adapters, so no model can be made; start it with --max-loras above 0.".to_owned());
    }
    if !app.fine_tuning.trains(base) {
        return refused(format!("the files of `{base}` are not where this server could train them."));
    }
    if let Some(tokens) = method.hyperparameters.max_completion_tokens.filter(|tokens| *tokens as usize >= model.context()) {
        let param = "method.reinforcement.hyperparameters.max_completion_tokens";
        let message = format!(
            "Invalid '{param}': {tokens} leaves no room for a prompt, since the model takes {} tokens in all.",
            model.context()
        );
        return Err(ApiError::invalid(param, "integer_above_max_value", message));
    }
    Ok(base.to_owned())
}

/// What is said about evaluations needs prompts to evaluate on.
fn check_evaluation(method: &Method, has_file: bool) -> Result<(), ApiError> {
    let numbers = &method.hyperparameters;
    let said = [("eval_interval", numbers.eval_interval), ("eval_samples", numbers.eval_samples)];
    match said.into_iter().find(|(_, number)| number.is_some() && !has_file) {
        None => Ok(()),
        Some((name, _)) => {
            let param = format!("method.{}.hyperparameters.{name}", Kind::Reinforcement.as_str());
            let message =
                format!("Invalid '{param}': there is nothing to evaluate on; name a 'validation_file', or leave this out.");
            Err(ApiError::invalid(param, "invalid_value", message))
        }
    }
}

/// Characters that a model's name can have.
fn suffix<'a>(field: &Field<'a>) -> Result<&'a str, ApiError> {
    let text = field.short_string(MAX_SUFFIX)?;
    if text.is_empty() || !text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')) {
        return Err(field.invalid("invalid_value", "use letters of a to z, digits, '-', '_' and '.'."));
    }
    Ok(text)
}

/// A file to learn from.
async fn file(app: &App, caller: &Caller, text: &str, param: &'static str) -> Result<FileRecord, ApiError> {
    let file = files::find(app, caller, text, StatusCode::BAD_REQUEST, param).await?;
    if file.purpose != "fine-tune" {
        let message =
            format!("Invalid '{param}': the file's purpose is '{}'; upload it with the purpose 'fine-tune'.", file.purpose);
        return Err(ApiError::invalid(param, "invalid_value", message));
    }
    files::here(app, &file)?;
    Ok(file)
}

async fn list(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let listing = Listing::parse(query.as_deref(), Order::NewestFirst, Extra::Jobs)?;
    let (rows, after) = (app.fine_tuning.rows(), listing.after_id(PREFIX)?);
    let page = rows.list(&caller.onlooker(), &listing.metadata, after, listing.limit).await.map_err(unavailable)?;
    Ok(list_page(page.items.iter().map(shown).collect(), page.has_more))
}

async fn show(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    Ok(answer(StatusCode::OK, &shown(&find(&app, &caller.onlooker(), &id).await?)))
}

/// What somebody wants of a job.
fn wanting(wish: Wish) -> MethodRouter<App> {
    post(move |app: State<App>, caller: Extension<Caller>, id: Path<String>| follow(app, caller, id, wish))
}

async fn follow(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    wish: Wish,
) -> Result<Response, ApiError> {
    let job = find(&app, &caller.viewer(), &id).await?;
    let written = wish.write(&app.store, job.draft.id, caller.actor()).await.map_err(unavailable)?;
    let job = find(&app, &caller.viewer(), &id).await?;
    if !written && let Some(why) = wish.refusal(job.state) {
        return Err(ApiError::invalid("id", "invalid_state", why));
    }
    app.fine_tuning.wake();
    Ok(answer(StatusCode::OK, &shown(&job)))
}

async fn events(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let job = find(&app, &caller.onlooker(), &id).await?.draft.id;
    let (before, limit) = part(query.as_deref(), EVENT, job, 20)?;
    let page = app.fine_tuning.rows().events(job, before, limit).await.map_err(unavailable)?;
    Ok(list_page(page.items.iter().map(|event| shown_event(job, event)).collect(), page.has_more))
}

async fn checkpoints(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let found = find(&app, &caller.onlooker(), &id).await?;
    let job = found.draft.id;
    let (before, limit) = part(query.as_deref(), CHECKPOINT, job, 10)?;
    if found.state == FineTuningState::Succeeded && !found.served {
        // They went with the model.
        return Ok(list_page(Vec::new(), false));
    }
    let page = app.fine_tuning.rows().checkpoints(job, before, limit).await.map_err(unavailable)?;
    Ok(list_page(page.items.iter().map(|checkpoint| shown_checkpoint(job, checkpoint)).collect(), page.has_more))
}

/// `after` and `limit` of a list whose items are numbered within their job.
fn part(query: Option<&str>, prefix: &str, job: Uuid, usual: usize) -> Result<(Option<u64>, usize), ApiError> {
    let (mut before, mut limit) = (None, usual);
    for parameter in parameters(query, &["after", "limit"])? {
        if parameter.name == "limit" {
            limit = parameter.number(1..=MAX_PAGE)?;
            continue;
        }
        let number = parameter.value.strip_prefix(&numbered(prefix, job, "")).and_then(|number| number.parse().ok());
        before = Some(number.ok_or_else(|| parameter.invalid("the id of an object of this list"))?);
    }
    Ok((before, limit))
}

fn numbered(prefix: &str, job: Uuid, number: impl std::fmt::Display) -> String {
    format!("{prefix}{}-{number}", job.simple())
}

/// A job's id in the API.
pub fn name(id: Uuid) -> String {
    format!("{PREFIX}{id}")
}

fn job_id(text: &str) -> Option<Uuid> {
    text.strip_prefix(PREFIX).and_then(|id| Uuid::try_parse(id).ok())
}

/// Whether the caller may look at what a job of this name did; what is no job of this API hides from nobody.
pub async fn sees_job(app: &App, caller: &Caller, job: &str) -> Result<bool, ApiError> {
    let (Some(id), viewer @ Viewer::Key(_)) = (job_id(job), caller.viewer()) else { return Ok(true) };
    Ok(app.fine_tuning.rows().find(id, &viewer).await.map_err(unavailable)?.is_some())
}

/// The job of this id in the API, if `viewer` may see it.
pub async fn find(app: &App, viewer: &Viewer, text: &str) -> Result<FineTuningJob, ApiError> {
    let found = match job_id(text) {
        Some(id) => app.fine_tuning.rows().find(id, viewer).await.map_err(unavailable)?,
        None => None,
    };
    found.ok_or_else(|| {
        let shown: String = text.chars().take(100).collect();
        let message = format!("Could not find fine-tuning job: '{shown}'. GET /v1/fine_tuning/jobs lists what is there.");
        ApiError::client(StatusCode::NOT_FOUND, Some("fine_tune_not_found"), message)
    })
}

/// Takes a fine-tuned model away, and those that it was after earlier epochs: `DELETE /v1/models/{id}`.
pub async fn delete_model(app: &App, caller: &Caller, model: &str) -> Result<Response, ApiError> {
    let rows = app.fine_tuning.rows();
    let not_deletable = |why: &str| {
        let message = format!("The model `{}` {why}", model.chars().take(200).collect::<String>());
        ApiError::client(StatusCode::FORBIDDEN, Some("model_not_deletable"), message)
    };
    let Some(job) = rows.find_model(last_name(model), &caller.viewer()).await.map_err(unavailable)? else {
        let served = app.registry.find(Some(model)).map(|_| ());
        let why = "was not made by a fine-tuning job of yours and cannot be deleted.";
        return Err(served.err().unwrap_or_else(|| not_deletable(why)));
    };
    if model != last_name(model) {
        return Err(not_deletable(&format!("is a checkpoint; delete `{}`, and its checkpoints go with it.", last_name(model))));
    }
    let checkpoints = rows.checkpoints(job.draft.id, None, MAX_PAGE).await.map_err(unavailable)?;
    let names: Vec<String> = checkpoints.items.into_iter().map(|checkpoint| checkpoint.model).collect();
    withdraw(app, &names, &caller.actor()).await.map_err(|error| refused("id", error))?;
    let news = [News::info(format!("The model `{model}` was deleted."))];
    let act = app.store.act(caller.actor(), "model.delete").to(model).with(json!({"job": name(job.draft.id)}));
    rows.unserve(job.draft.id, &news, act).await.map_err(unavailable)?;
    Ok(answer(StatusCode::OK, &json!({ "id": model, "object": "model", "deleted": true })))
}

fn shown(job: &FineTuningJob) -> Value {
    let draft = &job.draft;
    let seconds = |at: Option<i64>| at.map(|at| at / 1_000_000);
    // Clients know no other word for a job that waits.
    let status = if job.state == FineTuningState::Paused { FineTuningState::Queued } else { job.state };
    // Written here, so it can be read; and if not, the method is shown all the same.
    let hyperparameters = Method::stored(&draft.method).map(|method| method.common()).unwrap_or_else(|_| json!({}));
    let ended = job.state.ended();
    json!({
        "id": name(draft.id),
        "object": "fine_tuning.job",
        "model": draft.model,
        "created_at": draft.created / 1_000_000,
        "finished_at": seconds(job.finished),
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": ORGANISATION,
        "result_files": if job.has_result { vec![files::name(draft.result_file)] } else { Vec::new() },
        "status": status.as_str(),
        "validation_file": draft.validation_file.map(files::name),
        "training_file": files::name(draft.training_file),
        "hyperparameters": hyperparameters,
        "trained_tokens": job.trained_tokens.filter(|_| ended),
        "error": job.error,
        "user_provided_suffix": draft.suffix,
        "seed": draft.seed,
        "estimated_finish": seconds(job.estimated_finish),
        "integrations": [],
        "metadata": draft.metadata,
        "method": draft.method,
        "tidemill": { "state": job.state.as_str(), "step": job.step, "steps": job.steps },
    })
}

fn shown_event(job: Uuid, event: &FineTuningEvent) -> Value {
    json!({
        "id": numbered(EVENT, job, event.number),
        "object": "fine_tuning.job.event",
        "created_at": event.created / 1_000_000,
        "level": event.news.level,
        "message": event.news.message,
        "data": event.news.metrics,
        "type": if event.news.metrics.is_some() { "metrics" } else { "message" },
    })
}

fn shown_checkpoint(job: Uuid, checkpoint: &FineTuningCheckpoint) -> Value {
    json!({
        "id": numbered(CHECKPOINT, job, checkpoint.step),
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created / 1_000_000,
        "fine_tuned_model_checkpoint": checkpoint.model,
        "fine_tuning_job_id": name(job),
        "metrics": checkpoint.metrics,
        "step_number": checkpoint.step,
    })
}
