//! The response object.

use crate::openai::chat_output::ChatUsage;
use crate::openai::wire::decimal;
use crate::responses::id;
use serde_json::{Map, Value, json};
use tidemill_engine::SamplingParams;
use tidemill_store::{ResponseStatus, Tier};
use uuid::Uuid;

/// How a response ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By itself.
    Completed,
    /// At the limit of tokens.
    Length,
    /// It broke, and why.
    Failed(String),
    /// It was called off.
    Cancelled,
}

impl Ending {
    /// The status that says so.
    pub fn status(&self) -> ResponseStatus {
        match self {
            Self::Completed => ResponseStatus::Completed,
            Self::Length => ResponseStatus::Incomplete,
            Self::Failed(_) => ResponseStatus::Failed,
            Self::Cancelled => ResponseStatus::Cancelled,
        }
    }

    /// The last event of a stream that ends so.
    pub fn event(&self) -> &'static str {
        match self {
            Self::Completed => "response.completed",
            Self::Length => "response.incomplete",
            Self::Failed(_) | Self::Cancelled => "response.failed",
        }
    }
}

/// All of a response that is known before it is made.
#[derive(Clone, Debug, PartialEq)]
pub struct Template(Map<String, Value>);

impl Template {
    /// `created` is in seconds since 1970; `tier` is the one that the request was given; `echo` is what the request said.
    pub fn new(
        id: Uuid,
        created: u64,
        model: &str,
        store: bool,
        tier: Tier,
        sampling: &SamplingParams,
        mut echo: Map<String, Value>,
    ) -> Self {
        if let Some(reasoning) = echo.get_mut("reasoning").and_then(Value::as_object_mut) {
            for key in ["effort", "summary"] {
                reasoning.entry(key).or_insert(Value::Null);
            }
        }
        let mut said = |key: &str, otherwise: Value| echo.remove(key).unwrap_or(otherwise);
        let object = json!({
            "id": id::shown(id),
            "object": "response",
            "created_at": created,
            "status": ResponseStatus::InProgress.as_str(),
            "background": said("background", false.into()),
            "completed_at": null,
            "error": null,
            "incomplete_details": null,
            "instructions": said("instructions", Value::Null),
            "max_output_tokens": said("max_output_tokens", Value::Null),
            "max_tool_calls": said("max_tool_calls", Value::Null),
            "model": model,
            "output": [],
            "parallel_tool_calls": said("parallel_tool_calls", true.into()),
            "previous_response_id": said("previous_response_id", Value::Null),
            "prompt_cache_key": said("prompt_cache_key", Value::Null),
            "prompt_cache_retention": said("prompt_cache_retention", Value::Null),
            "reasoning": said("reasoning", json!({"effort": null, "summary": null})),
            "safety_identifier": said("safety_identifier", Value::Null),
            "service_tier": tier.as_str(),
            "store": store,
            "temperature": decimal(sampling.temperature),
            "text": said("text", Value::Null),
            "tool_choice": said("tool_choice", "auto".into()),
            "tools": said("tools", json!([])),
            "top_logprobs": said("top_logprobs", 0.into()),
            "top_p": decimal(sampling.top_p),
            "truncation": said("truncation", "disabled".into()),
            "usage": null,
            "user": said("user", Value::Null),
            "metadata": said("metadata", json!({})),
        });
        match object {
            Value::Object(map) => Self(map),
            _ => Self(Map::new()),
        }
    }

    /// While it is being made.
    pub fn in_progress(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// Ended at `now`, in seconds since 1970.
    pub fn ended(&self, ending: &Ending, output: Vec<Value>, usage: Option<ChatUsage>, now: u64) -> Value {
        let mut object = self.in_progress();
        object["output"] = Value::Array(output);
        object["usage"] = usage.map(usage_json).unwrap_or_default();
        end(&mut object, ending, now);
        object
    }
}

/// Writes into a response object how it ended.
pub fn end(object: &mut Value, ending: &Ending, now: u64) {
    object["status"] = ending.status().as_str().into();
    object["completed_at"] = Value::Null;
    match ending {
        Ending::Completed => object["completed_at"] = now.into(),
        Ending::Length => object["incomplete_details"] = json!({"reason": "max_output_tokens"}),
        Ending::Failed(message) => object["error"] = json!({"code": "server_error", "message": message}),
        Ending::Cancelled => {}
    }
}

fn usage_json(ChatUsage { tokens, reasoning_tokens }: ChatUsage) -> Value {
    json!({
        "input_tokens": tokens.prompt_tokens,
        "input_tokens_details": {"cached_tokens": tokens.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": tokens.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": tokens.prompt_tokens + tokens.completion_tokens,
    })
}
