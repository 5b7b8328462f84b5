//! `POST /v1/completions`: the request.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use crate::openai::generation::{Generation, MAX_TOP_LOGPROBS, count};
use crate::openai::response_format::{self, Constrained};
use serde_json::Value;

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Most prompts in one request.
const MAX_PROMPTS: usize = 2048;

/// One prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum PromptInput {
    /// To be encoded, with what the model wants around a text.
    Text(String),
    /// Encoded by the client.
    Tokens(Vec<u32>),
}

/// A completion request whose every field was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    /// Which model.
    pub model: String,
    /// Each makes `generation.n` choices, in order.
    pub prompts: Vec<PromptInput>,
    /// Sampling, stopping, reporting.
    pub generation: Generation,
    /// Candidates per prompt, of which the `n` likeliest are returned.
    pub best_of: usize,
    /// `Some(n)`: report log-probabilities with the n likeliest tokens.
    pub logprobs: Option<u32>,
    /// Return the prompt before the completion.
    pub echo: bool,
    /// Put what the model wants around a text (a BOS token) around prompts given as text.
    pub add_special_tokens: bool,
    /// What each completion must look like.
    pub constraint: Option<Constrained>,
}

impl CompletionRequest {
    /// Checks the body.
    pub fn parse(body: &Value) -> Result<Self, ApiError> {
        let mut fields = Fields::root(body)?;
        let model = fields.require("model")?.string()?.to_owned();
        let prompts = prompts(&fields.require("prompt")?)?;
        let mut generation = Generation::parse(&mut fields)?;
        if generation.about.compare {
            let message = "Unsupported parameter: 'tidemill.compare' is for /v1/chat/completions only.";
            return Err(ApiError::unsupported("tidemill.compare", message));
        }
        let echo = fields.bool_or("echo", false)?;
        // With `echo`, 0 scores the prompt and generates nothing.
        let least = i64::from(!echo);
        let max_tokens = count(&mut fields, "max_tokens", least..=i64::from(u32::MAX))?;
        generation.max_tokens = Some(max_tokens.unwrap_or(DEFAULT_MAX_TOKENS));
        let logprobs = fields.integer("logprobs", 0..=MAX_TOP_LOGPROBS)?.and_then(|n| u32::try_from(n).ok());
        let best_of = best_of(&mut fields, &generation)?;
        let add_special_tokens = fields.bool_or("add_special_tokens", true)?;
        fields.refuse("suffix", "is not supported: no model here fills in the middle.")?;
        let constraint = response_format::parse(&mut fields)?;
        fields.finish()?;
        Ok(Self { model, prompts, generation, best_of, logprobs, echo, add_special_tokens, constraint })
    }
}

fn best_of(fields: &mut Fields<'_>, generation: &Generation) -> Result<usize, ApiError> {
    let Some(field) = fields.get("best_of") else { return Ok(generation.n) };
    let best_of = usize::try_from(field.integer(1..=128)?).unwrap_or(1);
    if best_of < generation.n {
        return Err(field.invalid("invalid_value", format!("must be at least 'n' ({}), but got {best_of}.", generation.n)));
    }
    if generation.stream && best_of > generation.n {
        return Err(field.invalid("invalid_value", "cannot be above 'n' when 'stream' is true."));
    }
    Ok(best_of)
}

/// A string, strings, token ids, or lists of token ids.
pub fn prompts(field: &Field<'_>) -> Result<Vec<PromptInput>, ApiError> {
    if let Value::String(text) = field.value {
        return Ok(vec![PromptInput::Text(text.clone())]);
    }
    let Value::Array(_) = field.value else {
        let message = format!(
            "Invalid type for '{}': expected one of a string, an array of strings, an array of token ids, or an array of arrays of token ids.",
            field.path
        );
        return Err(ApiError::invalid(field.path.clone(), "invalid_type", message));
    };
    let items = field.filled_array(usize::MAX)?;
    if items.first().is_some_and(Value::is_number) {
        return Ok(vec![PromptInput::Tokens(field.token_ids(usize::MAX)?)]);
    }
    field.array(MAX_PROMPTS)?;
    let one = |(i, value): (usize, &Value)| {
        let item = field.item(i, value);
        match value {
            Value::Array(_) => {
                item.filled_array(usize::MAX)?;
                item.token_ids(usize::MAX).map(PromptInput::Tokens)
            }
            _ => item.string().map(|text| PromptInput::Text(text.to_owned())),
        }
    };
    items.iter().enumerate().map(one).collect()
}
