//! Turns of Anthropic's conversations, made of content blocks, as the messages that chat templates read.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use serde_json::{Map, Value, json};

/// Hints for Anthropic's own cache and citations; the text is the same with or without.
const HINTS: [&str; 2] = ["cache_control", "citations"];

/// Checks `messages`; a system text goes first.
pub(super) fn messages(field: &Field<'_>, system: Option<String>) -> Result<Vec<Value>, ApiError> {
    let mut out: Vec<Value> = system.into_iter().map(|text| json!({"role": "system", "content": text})).collect();
    for (i, value) in field.filled_array(usize::MAX)?.iter().enumerate() {
        let mut fields = field.item(i, value).object()?;
        let role = fields.require("role")?.one_of(&["user", "assistant", "system"])?;
        let content = fields.require("content")?;
        match role {
            "assistant" => out.push(assistant(&content)?),
            "user" => user(&content, &mut out)?,
            _ => out.push(json!({"role": role, "content": text(&content)?})),
        }
        fields.ignore(&["cache_control"]);
        fields.finish()?;
    }
    Ok(out)
}

/// A text, or a list of text blocks, joined by line breaks.
pub(super) fn text(field: &Field<'_>) -> Result<String, ApiError> {
    if let Value::String(text) = field.value {
        return Ok(text.clone());
    }
    let block = |(i, value)| {
        let mut fields = field.item(i, value).object()?;
        let kind = fields.require("type")?;
        match kind.string()? {
            "text" => text_block(fields),
            other => Err(unreadable(&kind, other, &["text"])),
        }
    };
    let texts: Vec<&str> = blocks(field)?.iter().enumerate().map(block).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

fn blocks<'a>(field: &Field<'a>) -> Result<&'a [Value], ApiError> {
    match field.value {
        Value::Array(blocks) => Ok(blocks),
        _ => {
            let message = format!("Invalid type for '{}': expected a string or an array of content blocks.", field.path);
            Err(ApiError::invalid(field.path.clone(), "invalid_type", message))
        }
    }
}

fn unreadable(kind: &Field<'_>, name: &str, supported: &[&str]) -> ApiError {
    match name {
        "image" | "document" | "search_result" | "container_upload" => {
            kind.unsupported("names a block that no model here can read: send text blocks only.")
        }
        _ => kind.unknown_value(name, supported),
    }
}

fn text_block<'a>(mut fields: Fields<'a>) -> Result<&'a str, ApiError> {
    let text = fields.require("text")?.string()?;
    fields.ignore(&HINTS);
    fields.finish()?;
    Ok(text)
}

/// Results of calls become messages of their own, before the words that follow them. Turns of one speaker are joined: templates
/// want them to alternate.
fn user(content: &Field<'_>, out: &mut Vec<Value>) -> Result<(), ApiError> {
    if let Value::String(text) = content.value {
        say(text, out);
        return Ok(());
    }
    let blocks = blocks(content)?;
    if blocks.is_empty() {
        return Err(content.invalid("empty_array", "a turn of the user's has at least one block."));
    }
    for (i, value) in blocks.iter().enumerate() {
        let mut fields = content.item(i, value).object()?;
        let kind = fields.require("type")?;
        match kind.string()? {
            "text" => say(text_block(fields)?, out),
            "tool_result" => {
                let id = fields.require("tool_use_id")?.string()?.to_owned();
                let result = fields.get("content").map_or(Ok(String::new()), |content| text(&content))?;
                let failed = fields.bool_or("is_error", false)?;
                fields.ignore(&HINTS);
                fields.finish()?;
                let result = if failed { format!("Error: {result}") } else { result };
                out.push(json!({"role": "tool", "tool_call_id": id, "content": result}));
            }
            other => return Err(unreadable(&kind, other, &["text", "tool_result"])),
        }
    }
    Ok(())
}

fn say(text: &str, out: &mut Vec<Value>) {
    match out.last_mut().filter(|last| last["role"] == "user") {
        Some(last) => last["content"] = format!("{}\n{text}", last["content"].as_str().unwrap_or_default()).into(),
        None => out.push(json!({"role": "user", "content": text})),
    }
}

fn assistant(content: &Field<'_>) -> Result<Value, ApiError> {
    let mut message = Map::from_iter([("role".to_owned(), "assistant".into())]);
    if let Value::String(text) = content.value {
        message.insert("content".into(), text.as_str().into());
        return Ok(Value::Object(message));
    }
    let (mut texts, mut thoughts, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for (i, value) in blocks(content)?.iter().enumerate() {
        let mut fields = content.item(i, value).object()?;
        let kind = fields.require("type")?;
        match kind.string()? {
            "text" => texts.push(text_block(fields)?),
            "thinking" => {
                thoughts.push(fields.require("thinking")?.string()?);
                fields.ignore(&["signature"]);
                fields.finish()?;
            }
            // Anthropic's own secret: nothing here wrote it or can read it.
            "redacted_thinking" => {}
            "tool_use" => {
                let id = fields.require("id")?.string()?;
                let name = fields.require("name")?.string()?;
                let input = fields.require("input")?;
                input.map()?;
                calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input.value}}));
                fields.ignore(&["cache_control", "caller"]);
                fields.finish()?;
            }
            other => return Err(unreadable(&kind, other, &["text", "thinking", "redacted_thinking", "tool_use"])),
        }
    }
    message.insert("content".into(), texts.join("\n").into());
    if !thoughts.is_empty() {
        message.insert("reasoning_content".into(), thoughts.join("\n").into());
    }
    if !calls.is_empty() {
        message.insert("tool_calls".into(), calls.into());
    }
    Ok(Value::Object(message))
}
