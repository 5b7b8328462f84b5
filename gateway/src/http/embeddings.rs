//! `POST /v1/embeddings`, and the honest answer of `POST /v1/moderations`.

use crate::http::answer::json;
use crate::http::app::App;
use crate::http::deadline;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::generate::Asked;
use crate::http::limits::{LONG_WORK, off_path};
use crate::http::remote;
use crate::limits::Meter;
use crate::openai::collected::cancelled;
use crate::openai::completions::PromptInput;
use crate::openai::embeddings::{self, EmbeddingsRequest};
use crate::openai::fields::Fields;
use crate::telemetry::Follower;
use crate::upstream::LocalModel;
use crate::upstream::remote::request::Endpoint;
use axum::extract::{Request, State};
use axum::response::Response;
use futures_util::stream::{StreamExt, TryStreamExt};
use hyper::StatusCode;
use serde_json::Value;
use std::sync::Arc;
use tidemill_engine::{EmbedError, EmbedRequest, RequestId};

/// Texts of one request that are with the engine at once: enough to fill its steps, and few beside others in its queue.
const AT_ONCE: usize = 32;

/// `POST /v1/embeddings`
pub async fn embeddings(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    remote::serve(&app, request, Endpoint::Embeddings, |asked, body| Prepared::new(&asked, body), answer).await
}

async fn answer(prepared: Prepared, _in_flight: InFlight) -> Result<Response, ApiError> {
    let Prepared { model, texts, asked: wanted, mut meter, mut follower } = prepared;
    let pooling = model.engine().pooling().clone().map_err(|why| no_embeddings(&model, &why))?;
    let tokens = texts.iter().map(|text| text.tokens.len()).sum();
    let at_once = model.engine().limits().max_seqs.min(AT_ONCE);
    // Dropped with the request when its client leaves, which cancels what is under way.
    let vectors: Result<Vec<Vec<f32>>, ApiError> = futures_util::stream::iter(texts)
        .map(|text| async { model.engine().embed(text)?.wait().await.map_err(failed) })
        .buffered(at_once)
        .enumerate()
        .map(|(index, vector)| {
            // Counted one by one: a client that leaves has used what was computed until then.
            meter.prompt(index, 0);
            vector
        })
        .map_ok(|vector| pooling.finish(vector, wanted.dimensions))
        .try_collect()
        .await;
    if let (Err(error), Some(follower)) = (&vectors, &mut follower)
        && error.status == StatusCode::INTERNAL_SERVER_ERROR
    {
        follower.failed();
    }
    drop(follower);
    let vectors = vectors?;
    let many = vectors.len() * model.engine().width() * 4 > LONG_WORK;
    let name = model.name().to_owned();
    Ok(json(off_path(many, move || embeddings::to_json(&name, &vectors, wanted.encoding, tokens)).await?))
}

struct Prepared {
    model: Arc<LocalModel>,
    texts: Vec<EmbedRequest>,
    asked: EmbeddingsRequest,
    meter: Meter,
    follower: Option<Follower>,
}

impl Prepared {
    /// Everything that can be refused is refused here.
    fn new(asked: &Asked, body: &Value) -> Result<Self, ApiError> {
        let request = EmbeddingsRequest::parse(body)?;
        let model = asked.model(&request.model)?;
        let engine = model.engine();
        let pooling = engine.pooling().as_ref().map_err(|why| no_embeddings(&model, why))?;
        if engine.width() == 0 {
            return Err(no_embeddings(&model, "it has no hidden states to give"));
        }
        if let Some(dimensions) = request.dimensions
            && !pooling.allows(dimensions, engine.width())
        {
            let message = format!(
                "Invalid 'dimensions': the vectors of the model `{}` have {} numbers and cannot be cut to {dimensions}.",
                model.name(),
                engine.width()
            );
            return Err(ApiError::invalid("dimensions", "invalid_value", message));
        }
        let text = |input: &PromptInput| {
            let tokens = match input {
                PromptInput::Text(text) => model.encode(text, true, "input")?,
                PromptInput::Tokens(tokens) => {
                    model.check_tokens(tokens, "input")?;
                    tokens.clone()
                }
            };
            model.check_fit(tokens.len(), None, "input")?;
            let id = RequestId(asked.app.store.issue_id().as_u128());
            let priority = asked.priority(asked.caller.tier(None), request.priority);
            Ok(EmbedRequest {
                id,
                tokens,
                adapter: model.adapter().cloned(),
                priority,
                tenant: asked.caller.tenant(),
                deadline: asked.deadline,
            })
        };
        let texts = request.input.iter().map(text).collect::<Result<Vec<_>, ApiError>>()?;
        let meter = asked.admit(model.base(), texts.iter().map(|text| text.tokens.len()).collect())?;
        let dimensions = request.dimensions.unwrap_or(engine.width());
        let follower = asked.follow_embeddings(&model, &texts, dimensions, request.encoding.as_str());
        Ok(Self { model: model.clone(), texts, asked: request, meter, follower })
    }
}

fn no_embeddings(model: &LocalModel, why: &str) -> ApiError {
    let message = format!("The model `{}` gives no embeddings: {why}.", model.name());
    ApiError::invalid("model", "unsupported_model", message)
}

fn failed(error: EmbedError) -> ApiError {
    match error {
        EmbedError::Cancelled => cancelled(),
        EmbedError::Expired => deadline::expired(),
        EmbedError::Failed(message) => ApiError::fault(message),
    }
}

/// `POST /v1/moderations`: no model that this server can load classifies, and a guess would be worse than no answer.
pub async fn moderations(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let body = app.body.json(request).await?;
    let mut fields = Fields::root(&body)?;
    let model = fields.string("model")?.unwrap_or("omni-moderation-latest");
    fields.require("input")?;
    fields.finish()?;
    let shown: String = model.chars().take(200).collect();
    let message = format!("The model `{shown}` is not served here as a classifier: this server has no moderation model.");
    let error = ApiError::client(StatusCode::NOT_FOUND, Some("model_not_found"), message);
    Err(ApiError { param: Some("model".into()), ..error })
}
