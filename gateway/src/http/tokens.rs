//! `POST /tokenize` and `POST /detokenize`, in vLLM's shape.

use crate::http::answer::answer;
use crate::http::app::App;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::openai::chat::ChatPrompt;
use crate::openai::fields::Fields;
use crate::openai::tools::{self, Tool};
use crate::upstream::Registry;
use axum::extract::{Request, State};
use axum::response::Response;
use hyper::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

/// A text or a conversation to token ids.
pub async fn tokenize(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let caller = Caller::of(&request);
    with_body(app, request, move |registry, body| {
        let mut fields = Fields::root(body)?;
        let model = fields.string("model")?;
        let with_texts = fields.bool_or("return_token_strs", false)?;
        // A template writes its own special tokens, a plain text has none.
        let text = fields.string("prompt")?;
        let add_special = fields.bool_or("add_special_tokens", text.is_some())?;
        let chat = match text {
            Some(_) => None,
            None if body.get("messages").is_some() => Some((ChatPrompt::parse(&mut fields)?, tools::parse(&mut fields)?.tools)),
            None => return Err(fields.require("prompt").err().unwrap_or_else(|| ApiError::fault("prompt was there"))),
        };
        fields.finish()?;
        let model = caller.model(registry, model)?;
        let tokens = match &chat {
            Some((chat, tools)) => {
                let tools: Vec<&Tool> = tools.iter().collect();
                model.encode(&model.render(chat, &tools)?, add_special, "messages")?
            }
            None => model.encode(text.unwrap_or_default(), add_special, "prompt")?,
        };
        let spelt = |id: &u32| model.tokenizer().token(*id).unwrap_or_default();
        let texts: Option<Vec<String>> = with_texts.then(|| tokens.iter().map(spelt).collect());
        Ok(json!({"count": tokens.len(), "max_model_len": model.context(), "tokens": tokens, "token_strs": texts}))
    })
    .await
}

/// Token ids to text.
pub async fn detokenize(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let caller = Caller::of(&request);
    with_body(app, request, move |registry, body| {
        let mut fields = Fields::root(body)?;
        let model = fields.string("model")?;
        let tokens = fields.require("tokens")?.token_ids(usize::MAX)?;
        fields.finish()?;
        let model = caller.model(registry, model)?;
        model.check_tokens(&tokens, "tokens")?;
        Ok(json!({"prompt": model.tokenizer().decode(&tokens, false)}))
    })
    .await
}

async fn with_body(
    app: App,
    request: Request,
    work: impl FnOnce(&Registry, &Value) -> Result<Value, ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let registry = Arc::clone(&app.registry);
    let value = app.body.parsed(request, move |body| work(&registry, &body)).await?;
    Ok(answer(StatusCode::OK, &value))
}
