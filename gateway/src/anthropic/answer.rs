//! A whole message.

use super::{Head, stop_reason, usage};
use crate::openai::chat_output::{ChatChoice, ChatCollected, ChatFinish, ToolCall};
use bytes::Bytes;
use serde_json::{Map, Value, json};

/// The body of the response. `thinking`: reasoning is shown; `max_tokens` is the request's.
pub fn to_json(head: &Head, collected: &ChatCollected, thinking: bool, max_tokens: usize) -> Bytes {
    let nothing = ChatChoice::default();
    let choice = collected.choices.first().unwrap_or(&nothing);
    let limited = collected.usage.tokens.completion_tokens >= max_tokens;
    let (reason, sequence) = stop_reason(choice.finish.unwrap_or(ChatFinish::Stop), choice.stop.as_ref(), limited);
    let message = json!({
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content(choice, thinking),
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": usage(&collected.usage),
    });
    Bytes::from(message.to_string())
}

fn content(choice: &ChatChoice, thinking: bool) -> Vec<Value> {
    let mut blocks = Vec::with_capacity(2 + choice.calls.len());
    if thinking && !choice.reasoning.is_empty() {
        blocks.push(json!({"type": "thinking", "thinking": choice.reasoning, "signature": ""}));
    }
    if !choice.text.is_empty() {
        blocks.push(json!({"type": "text", "text": choice.text}));
    }
    blocks.extend(choice.calls.iter().map(tool_use));
    blocks
}

fn tool_use(call: &ToolCall) -> Value {
    // Arguments that were cut off have no form of their own here: `stop_reason` says what happened.
    let input: Map<String, Value> = serde_json::from_str(&call.arguments).unwrap_or_default();
    json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input})
}
