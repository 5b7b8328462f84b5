//! `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them.

use crate::clock::now;
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::openai::fields::Fields;
use crate::upstream::LocalModel;
use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use hyper::StatusCode;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use tidemill_engine::{AdapterError, AdapterRefused};

/// Longest path that is taken, in characters.
const MAX_PATH: usize = 4096;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new().route("/v1/load_lora_adapter", post(load)).route("/v1/unload_lora_adapter", post(unload))
}

async fn load(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let actor = Caller::of(&request).actor();
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let name = fields.require("lora_name")?.string()?;
    let path = PathBuf::from(fields.require("lora_path")?.short_string(MAX_PATH)?);
    let in_place = fields.bool_or("load_inplace", false)?;
    let pinned = fields.bool_or("pinned", false)?;
    let base = fields.string("base_model_name")?;
    fields.finish()?;
    let model = base_model(&app, base)?;
    if app.registry.states().any(|(served, _)| served == name) {
        let message = format!("Invalid 'lora_name': `{name}` is the name of a model that is served here; choose another.");
        return Err(ApiError::invalid("lora_name", "invalid_value", message));
    }
    if name.contains('@') {
        return Err(ApiError::invalid("lora_name", "invalid_value", "Invalid 'lora_name': a name holds no '@'; choose another."));
    }
    if is_registered(&app, &model, name) {
        let message = format!("Invalid 'lora_name': `{name}` is a registered adapter or an alias; choose another.");
        return Err(ApiError::invalid("lora_name", "adapter_exists", message));
    }
    if !in_place && model.engine().adapters().iter().any(|adapter| adapter.name() == name) {
        let message = format!(
            "The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to true."
        );
        return Err(ApiError::invalid("lora_name", "adapter_exists", message));
    }
    let (engine, name, folder) = (model.engine().clone(), name.to_owned(), path.clone());
    let work = {
        let name = name.clone();
        move || engine.load_adapter(&name, &folder, pinned, now().unsigned_abs() / 1_000_000)
    };
    let loaded =
        tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::fault("The adapter's files could not be read."))?;
    let adapter = loaded.map_err(|error| refused(&name, &error))?;
    let detail = json!({"model": model.name(), "path": path, "generation": adapter.generation().to_string()});
    app.store.audit(&actor, "adapter.load", &name, detail).await.map_err(unavailable)?;
    Ok(done(format!("Success: LoRA adapter '{name}' added successfully.")))
}

async fn unload(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let actor = Caller::of(&request).actor();
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let name = fields.require("lora_name")?.string()?;
    let base = fields.string("base_model_name")?;
    // vLLM's own number of the adapter: the name is enough.
    fields.ignore(&["lora_int_id"]);
    fields.finish()?;
    let model = base_model(&app, base)?;
    if name.contains('@') || is_registered(&app, &model, name) {
        let message =
            format!("`{name}` is a registered adapter or an alias; POST /v1/adapters/{name}/retire takes it out of service.");
        return Err(ApiError::invalid("lora_name", "registered_adapter", message));
    }
    model.engine().unload_adapter(name).map_err(|error| refused(name, &error))?;
    app.store.audit(&actor, "adapter.unload", name, json!({"model": model.name()})).await.map_err(unavailable)?;
    Ok(done(format!("Success: LoRA adapter '{name}' removed successfully.")))
}

/// Whether the name is the registry's to give.
fn is_registered(app: &App, model: &LocalModel, name: &str) -> bool {
    app.registry.adapter_names(model.name()).get(name).is_some() || app.registry.offered(model.name()).contains_key(name)
}

fn base_model(app: &App, name: Option<&str>) -> Result<Arc<LocalModel>, ApiError> {
    app.registry.find_local_base(name)
}

/// Plain text, as vLLM answers.
fn done(text: String) -> Response {
    (StatusCode::OK, text).into_response()
}

fn refused(name: &str, error: &AdapterRefused) -> ApiError {
    let named = |param: &str, code: &'static str, status: StatusCode| ApiError {
        param: Some(param.to_owned()),
        ..ApiError::client(status, Some(code), format!("The lora adapter '{name}' was not loaded: {error}."))
    };
    match error {
        AdapterRefused::Unknown(_) => ApiError {
            param: Some("lora_name".to_owned()),
            ..ApiError::client(
                StatusCode::NOT_FOUND,
                Some("adapter_not_found"),
                format!("The lora adapter '{name}' cannot be found. GET /v1/models lists those that are loaded."),
            )
        },
        AdapterRefused::Files(AdapterError::Folder { .. }) => named("lora_path", "adapter_not_found", StatusCode::NOT_FOUND),
        AdapterRefused::Files(_) | AdapterRefused::Rank { .. } | AdapterRefused::Generation { .. } => {
            named("lora_path", "invalid_adapter", StatusCode::BAD_REQUEST)
        }
        AdapterRefused::Name(_) => named("lora_name", "invalid_value", StatusCode::BAD_REQUEST),
        AdapterRefused::Full(_) | AdapterRefused::Off => named("lora_name", "no_room", StatusCode::CONFLICT),
        AdapterRefused::Draining(_) | AdapterRefused::Stopped => ApiError::unavailable(Some("busy"), format!("{error}."), 1),
        AdapterRefused::Backend(_) => ApiError::fault(format!("The lora adapter '{name}' was not loaded: {error}.")),
    }
}
