//! Anthropic's Messages API: its requests become chat requests, chat events become its content blocks.

mod answer;
mod content;
pub mod error;
mod request;
mod stream;

pub use answer::to_json;
pub use request::{CountRequest, MessagesRequest};
pub use stream::MessageStream;

use crate::openai::chat_output::{ChatFinish, ChatUsage};
use serde_json::{Value, json};
use tidemill_engine::StopCause;

/// What identifies a message.
#[derive(Clone, Debug)]
pub struct Head {
    /// `msg_…`
    pub id: String,
    /// Model name, as asked for.
    pub model: String,
}

/// `stop_reason` and `stop_sequence`. `limited`: the request's own limit came before the context's.
fn stop_reason(reason: ChatFinish, stop: Option<&StopCause>, limited: bool) -> (&'static str, Option<&str>) {
    match (reason, stop) {
        (ChatFinish::ToolCalls, _) => ("tool_use", None),
        (ChatFinish::Length, _) if limited => ("max_tokens", None),
        (ChatFinish::Length, _) => ("model_context_window_exceeded", None),
        (ChatFinish::Stop, Some(StopCause::Text(text))) => ("stop_sequence", Some(text)),
        (ChatFinish::Stop, _) => ("end_turn", None),
    }
}

/// `usage`: cached tokens are counted apart from the others.
fn usage(usage: &ChatUsage) -> Value {
    json!({
        "input_tokens": usage.tokens.prompt_tokens.saturating_sub(usage.tokens.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.tokens.cached_tokens,
        "output_tokens": usage.tokens.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    })
}
