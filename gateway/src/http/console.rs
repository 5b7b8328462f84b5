//! `/v1/console/…`: the parts of the operators' pages, each a document that the console's shell fetches with the visitor's key.

use crate::clock::now;
use crate::console::overview::{Overview, Variant, WINDOWS, Work};
use crate::console::part::count;
use crate::console::playground::Candidate;
use crate::console::{adapters, datasets, loops, playground, rollouts, sent, trainings};
use crate::http::adapter_registry::refused;
use crate::http::answer::answer;
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::fine_tuning::find as find_job;
use crate::http::limits::off_path_waiting;
use crate::http::loops as http_loops;
use crate::http::query::parameters;
use crate::http::rollouts as http_rollouts;
use crate::http::{job_name, models, probes};
use axum::extract::{Path, RawQuery, State};
use axum::response::Response;
use axum::routing::get;
use axum::{Extension, Router};
use hyper::StatusCode;
use serde_json::json;
use tidemill_store::{
    AdapterFilter, Exposures, FineTuningJob, Jobs, RegisteredAdapter, RolloutFilter, Rollouts, Scope, Traffic, Viewer,
};

/// Items of a list; older ones are the API's.
const LISTED: usize = 100;
/// Rows of the overview for which it is looked up how long answers took.
const TIMED: usize = 30;
/// Newest answers that this is looked up of.
const TIMES: usize = 1000;
/// Events of a training from which its curves are drawn.
const EVENTS: usize = 3000;
/// Adapters before an adapter.
const ANCESTORS: usize = 20;

/// The routes. They show what all keys did.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/v1/console/me", get(me))
        .route("/v1/console/parts/overview", get(overview))
        .route("/v1/console/parts/rollouts", get(rollout_list))
        .route("/v1/console/parts/rollouts/{rollout}", get(rollout))
        .route("/v1/console/parts/loops", get(loop_list))
        .route("/v1/console/parts/loops/{name}", get(one_loop))
        .route("/v1/console/parts/datasets", get(dataset_list))
        .route("/v1/console/parts/datasets/{reference}", get(dataset))
        .route("/v1/console/parts/trainings", get(training_list))
        .route("/v1/console/parts/trainings/{id}", get(training))
        .route("/v1/console/parts/adapters", get(adapter_list))
        .route("/v1/console/parts/adapters/{id}", get(adapter))
        .route("/v1/console/parts/playground", get(ask))
}

fn acts(caller: &Caller) -> bool {
    caller.allows(Scope::Admin)
}

/// Who the server takes the caller for.
async fn me(Extension(caller): Extension<Caller>) -> Response {
    // As the labeling page means it.
    let operator = caller.allows(Scope::Train);
    let body = json!({"annotator": caller.name(), "keyed": caller.key.is_some(), "operator": operator});
    answer(StatusCode::OK, &body)
}

async fn overview(State(app): State<App>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let (_, (mut hours, mut minutes)) = WINDOWS[1];
    for parameter in parameters(query.as_deref(), &["hours"])? {
        (hours, minutes) = parameter.one_of(&WINDOWS)?;
    }
    let (now, width) = (now(), minutes * 60_000_000);
    // From the begin of a whole stretch: sums are of those.
    let window = ((now - hours * 3_600_000_000) / width * width, now, width);
    let traffic = Traffic::new(app.store.database());
    let mut variants = Variant::all(traffic.sums(window.0, window.1, window.2).await.map_err(unavailable)?);
    for (place, variant) in variants.iter_mut().enumerate() {
        let (model, name) = (&variant.total.model, variant.total.variant.as_deref());
        variant.remote = app.registry.remote(model).map(|remote| remote.spec().servers.join(", "));
        variant.price = app.limits.price(model);
        if place < TIMED {
            variant.latencies = traffic.latencies(model, name, window.0, TIMES).await.map_err(unavailable)?;
        }
    }
    let page = Overview {
        hours,
        window,
        variants,
        rollouts: Rollouts::new(&app.store).running().await.map_err(unavailable)?,
        work: work(&app, now).await?,
        models: probes::states(&app).map(|(name, state)| (name.to_owned(), state)).collect(),
        database: !app.store.is_away(),
    };
    Ok(sent(&page.part()))
}

/// Trainings of this server and builds of all.
async fn work(app: &App, now: i64) -> Result<Vec<Work>, ApiError> {
    let job = |job: FineTuningJob| {
        let name = job_name(job.draft.id);
        Work {
            what: "training",
            path: vec!["trainings".to_owned(), name.clone()],
            name,
            state: job.state.as_str().to_owned(),
            progress: if job.steps > 0 { format!("{} of {} steps", count(job.step), count(job.steps)) } else { String::new() },
            since: job.draft.created,
        }
    };
    let jobs = app.fine_tuning.rows().open(app.files.place()).await.map_err(unavailable)?;
    let builds = Jobs::new(app.store.database()).open(now).await.map_err(unavailable)?;
    Ok(jobs.into_iter().map(job).chain(builds.iter().map(Work::of_build)).collect())
}

async fn rollout_list(State(app): State<App>) -> Result<Response, ApiError> {
    let rows = Rollouts::new(&app.store);
    // Those that run come first, however many have ended since they began.
    let mut found = rows.running().await.map_err(unavailable)?;
    found.reverse();
    let filter = RolloutFilter { limit: Some(LISTED), over: Some(true), ..RolloutFilter::default() };
    let over = rows.list(&filter).await.map_err(unavailable)?;
    found.extend(over.items);
    Ok(sent(&rollouts::list(&found, over.has_more)))
}

async fn rollout(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let rows = Rollouts::new(&app.store);
    let rollout = rows.find(&name).await.map_err(http_rollouts::refused)?;
    let decisions = rows.decisions(rollout.id).await.map_err(unavailable)?;
    let exposures = Exposures::new(app.store.database());
    let counts = exposures.counts(rollout.id, rollout.created).await.map_err(unavailable)?;
    Ok(sent(&rollouts::Shown { rollout, decisions, counts, acts: acts(&caller) }.part()))
}

async fn loop_list(State(app): State<App>) -> Result<Response, ApiError> {
    Ok(sent(&loops::list(&http_loops::all(&app).await?)))
}

async fn one_loop(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let found = http_loops::find(&app, &name, http_loops::CYCLES).await?;
    Ok(sent(&loops::page(&found, acts(&caller))))
}

async fn dataset_list(State(app): State<App>) -> Result<Response, ApiError> {
    let mut found = app.datasets.datasets().list(None, None, LISTED + 1).await?;
    let has_more = found.len() > LISTED;
    found.truncate(LISTED);
    Ok(sent(&datasets::list(&found, has_more)))
}

async fn dataset(State(app): State<App>, Path(reference): Path<String>) -> Result<Response, ApiError> {
    let snapshots = app.datasets.datasets().clone();
    let snapshot = snapshots.find(&reference).await?;
    if !datasets::has_report(&snapshot) {
        return Ok(sent(&datasets::page(&snapshot, None)));
    }
    let of = snapshot.clone();
    // The report has every row in it, and may lie elsewhere.
    let plots = off_path_waiting(async move { snapshots.plots(&of).await }).await?;
    if let Err(error) = &plots {
        tracing::warn!(dataset = reference, %error, "the plots of a quality report cannot be read");
    }
    Ok(sent(&datasets::page(&snapshot, plots.ok())))
}

async fn training_list(State(app): State<App>) -> Result<Response, ApiError> {
    let page = app.fine_tuning.rows().list(&Viewer::Anyone, &[], None, LISTED).await.map_err(unavailable)?;
    Ok(sent(&trainings::list(&page.items, page.has_more)))
}

async fn training(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let job = find_job(&app, &Viewer::Anyone, &id).await?;
    let rows = app.fine_tuning.rows();
    let events = rows.events(job.draft.id, None, EVENTS).await.map_err(unavailable)?;
    let checkpoints = rows.checkpoints(job.draft.id, None, LISTED).await.map_err(unavailable)?.items;
    let (events, older) = (events.items, events.has_more);
    Ok(sent(&trainings::Shown { job, events, older, checkpoints, acts: acts(&caller), now: now() }.part()))
}

async fn adapter_list(State(app): State<App>) -> Result<Response, ApiError> {
    let filter = AdapterFilter { limit: Some(LISTED), ..AdapterFilter::default() };
    let registry = app.adapters.registry();
    let page = registry.list(&filter).await.map_err(unavailable)?;
    let aliases = registry.aliases().await.map_err(unavailable)?;
    let shown = |adapter: RegisteredAdapter| {
        let problem = app.adapters.problem(adapter.id);
        adapters::Shown::new(adapter, &aliases, problem)
    };
    let found: Vec<adapters::Shown> = page.items.into_iter().map(shown).collect();
    Ok(sent(&adapters::list(&found, page.has_more)))
}

async fn adapter(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let registry = app.adapters.registry();
    let found = registry.get(&id).await.map_err(|error| refused("id", error))?;
    let mut ancestors: Vec<RegisteredAdapter> = Vec::new();
    let mut parent = found.parent;
    while let Some(id) = parent.filter(|_| ancestors.len() < ANCESTORS) {
        // One that is gone ends the line.
        let Ok(before) = registry.get(&id.to_string()).await else { break };
        parent = before.parent;
        ancestors.push(before);
    }
    let aliases = registry.aliases().await.map_err(unavailable)?;
    let problem = app.adapters.problem(found.id);
    Ok(sent(&adapters::Shown::new(found, &aliases, problem).part(&ancestors)))
}

async fn ask(State(app): State<App>, Extension(caller): Extension<Caller>) -> Result<Response, ApiError> {
    let running = Rollouts::new(&app.store).running().await.map_err(unavailable)?;
    let candidates = Candidate::all(&running, &models::names(&app, &caller));
    Ok(sent(&playground::part(&candidates, acts(&caller))))
}
