//! The conversation: checked message by message and brought into the form that chat templates expect.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use serde_json::{Map, Value, json};

const ROLES: [&str; 6] = ["developer", "system", "user", "assistant", "tool", "function"];

/// Checks `messages` and returns them as chat templates read them: `developer` is `system`, `function` is `tool`, text parts are
/// joined to one string, a missing assistant content is empty, and arguments of tool calls are objects, not strings.
pub fn parse(field: &Field<'_>) -> Result<Vec<Value>, ApiError> {
    let items = field.filled_array(usize::MAX)?;
    items.iter().enumerate().map(|(i, value)| message(&field.item(i, value))).collect()
}

fn message(field: &Field<'_>) -> Result<Value, ApiError> {
    let mut fields = field.object()?;
    let role = fields.require("role")?.one_of(&ROLES)?;
    let mut out = Map::new();
    let template_role = match role {
        "developer" => "system",
        "function" => "tool",
        other => other,
    };
    out.insert("role".into(), template_role.into());
    let mut text = match fields.get("content") {
        Some(content) => Some(content_text(&content, role)?),
        None => None,
    };
    if let Some(name) = fields.string("name")? {
        out.insert("name".into(), name.into());
    }
    match role {
        "assistant" => {
            if let Some(refusal) = fields.string("refusal")? {
                text.get_or_insert_with(|| refusal.to_owned());
            }
            if let Some(calls) = tool_calls(&mut fields)? {
                out.insert("tool_calls".into(), calls);
            }
            for key in ["reasoning_content", "reasoning"] {
                if let Some(thought) = fields.string(key)? {
                    out.insert("reasoning_content".into(), thought.into());
                }
            }
            fields.refuse("audio", "is not supported: this server takes text only.")?;
            fields.ignore(&["annotations"]);
            text.get_or_insert_default();
        }
        "tool" => {
            let id = fields.require("tool_call_id")?.string()?;
            out.insert("tool_call_id".into(), id.into());
        }
        _ => {}
    }
    match text {
        Some(text) => out.insert("content".into(), text.into()),
        None => return Err(fields.require("content").err().unwrap_or_else(|| ApiError::fault("content was there"))),
    };
    fields.finish()?;
    Ok(Value::Object(out))
}

/// The text of a content that is a string or a list of parts. Parts are joined by line breaks, as vLLM does for templates that
/// take strings.
fn content_text(field: &Field<'_>, role: &str) -> Result<String, ApiError> {
    if let Value::String(text) = field.value {
        return Ok(text.clone());
    }
    let Value::Array(_) = field.value else {
        let message = format!("Invalid type for '{}': expected one of a string or an array of content parts.", field.path);
        return Err(ApiError::invalid(field.path.clone(), "invalid_type", message));
    };
    let mut text = String::new();
    for (i, value) in field.filled_array(usize::MAX)?.iter().enumerate() {
        let part = field.item(i, value);
        let piece = part_text(&part, role)?;
        if i > 0 {
            text.push('\n');
        }
        text.push_str(piece);
    }
    Ok(text)
}

fn part_text<'a>(part: &Field<'a>, role: &str) -> Result<&'a str, ApiError> {
    let mut fields = part.object()?;
    let kind = fields.require("type")?;
    let text = match kind.string()? {
        "text" => fields.require("text")?.string()?,
        "refusal" if role == "assistant" => fields.require("refusal")?.string()?,
        "image_url" | "input_audio" | "file" | "video_url" | "audio_url" => {
            return Err(kind.unsupported("names a part that no model here can read: send text parts only."));
        }
        other => return Err(kind.unknown_value(other, &["text"])),
    };
    // OpenAI's and Anthropic's hints for their own caches and citations; the text is the same with or without.
    fields.ignore(&["cache_control", "annotations"]);
    fields.finish()?;
    Ok(text)
}

fn tool_calls(fields: &mut Fields<'_>) -> Result<Option<Value>, ApiError> {
    // The older form of one call; beside the newer it says the same.
    let older = fields.get("function_call").map(|call| function_call(&call)).transpose()?;
    let mut calls = Vec::new();
    if let Some(field) = fields.get("tool_calls") {
        for (i, value) in field.array(usize::MAX)?.iter().enumerate() {
            calls.push(tool_call(&field.item(i, value))?);
        }
    }
    if let (Some(function), true) = (older, calls.is_empty()) {
        calls.push(json!({"type": "function", "function": function}));
    }
    Ok(Some(calls).filter(|calls| !calls.is_empty()).map(Value::Array))
}

fn tool_call(field: &Field<'_>) -> Result<Value, ApiError> {
    let mut fields = field.object()?;
    let id = fields.require("id")?.string()?;
    if let Some(kind) = fields.get("type") {
        kind.one_of(&["function"])?;
    }
    let function = function_call(&fields.require("function")?)?;
    fields.ignore(&["index"]); // some clients send back what they collected from deltas
    fields.finish()?;
    Ok(json!({"id": id, "type": "function", "function": function}))
}

/// `{name, arguments}` with the arguments as an object where they are one: templates write them with `tojson`, and a string
/// would come out quoted twice.
fn function_call(field: &Field<'_>) -> Result<Value, ApiError> {
    let mut fields = field.object()?;
    let name = fields.require("name")?.string()?;
    let arguments = fields.require("arguments")?.string()?;
    fields.finish()?;
    Ok(json!({"name": name, "arguments": self::arguments(arguments)}))
}

/// A call's arguments as templates read them.
pub fn arguments(text: &str) -> Value {
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(map)) => Value::Object(map),
        _ if text.is_empty() => Value::Object(Map::new()),
        _ => Value::String(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(messages: Value) -> Result<Vec<Value>, ApiError> {
        let body = json!({ "messages": messages });
        let mut root = Fields::root(&body)?;
        parse(&root.require("messages")?)
    }

    #[test]
    fn an_answer_of_ours_can_be_sent_back() {
        let out = run(json!([
            {"role": "assistant", "content": null, "refusal": null, "annotations": [], "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        ]))
        .unwrap();
        assert_eq!(out[0]["content"], "");
        assert_eq!(out[0]["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
        assert_eq!(out[1], json!({"role": "tool", "tool_call_id": "call_1", "content": "42"}));
    }

    #[test]
    fn developer_is_system_and_parts_are_joined() {
        let out = run(json!([{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]))
            .unwrap();
        assert_eq!(out[0], json!({"role": "system", "content": "a\nb"}));
    }

    #[test]
    fn each_rejection_names_its_path() {
        let cases = [
            (json!([]), "messages", "empty_array"),
            (json!([3]), "messages.0", "invalid_type"),
            (json!([{"content": "x"}]), "messages.0.role", "missing_required_parameter"),
            (json!([{"role": "robot", "content": "x"}]), "messages.0.role", "invalid_value"),
            (json!([{"role": "user"}]), "messages.0.content", "missing_required_parameter"),
            (json!([{"role": "user", "content": null}]), "messages.0.content", "missing_required_parameter"),
            (json!([{"role": "user", "content": 5}]), "messages.0.content", "invalid_type"),
            (json!([{"role": "user", "content": []}]), "messages.0.content", "empty_array"),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages.0.content.0.text", "missing_required_parameter"),
            (
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
                "messages.0.content.0.type",
                "unsupported_parameter",
            ),
            (json!([{"role": "user", "content": [{"type": "smell"}]}]), "messages.0.content.0.type", "invalid_value"),
            (json!([{"role": "user", "content": "x", "colour": 1}]), "messages.0.colour", "unknown_parameter"),
            (json!([{"role": "tool", "content": "x"}]), "messages.0.tool_call_id", "missing_required_parameter"),
            (
                json!([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]}]),
                "messages.1.tool_calls.0.function.arguments",
                "invalid_type",
            ),
        ];
        for (messages, param, code) in cases {
            let error = run(messages.clone()).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{messages}");
        }
    }
}
