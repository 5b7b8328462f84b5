//! The items of a request's `input`: checked one by one, and brought into the form in which they are stored, listed and replayed.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use crate::responses::id::{ItemId, Side};
use serde_json::{Map, Value, json};
use uuid::Uuid;

/// Items that only OpenAI's own tools make or read.
const FOREIGN: [&str; 24] = [
    "file_search_call",
    "computer_call",
    "computer_call_output",
    "web_search_call",
    "tool_search_call",
    "tool_search_output",
    "additional_tools",
    "configuration_update",
    "compaction",
    "image_generation_call",
    "code_interpreter_call",
    "local_shell_call",
    "local_shell_call_output",
    "shell_call",
    "shell_call_output",
    "apply_patch_call",
    "apply_patch_call_output",
    "mcp_list_tools",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "custom_tool_call",
    "custom_tool_call_output",
    "program",
];
const KNOWN: [&str; 5] = ["message", "function_call", "function_call_output", "reasoning", "item_reference"];
const STATUSES: [&str; 3] = ["in_progress", "completed", "incomplete"];

/// The items of `input`, which is a text of the user's or an array. Ids that are missing are given by [`number`].
pub fn parse(field: &Field<'_>) -> Result<Vec<Value>, ApiError> {
    if let Some(text) = field.value.as_str() {
        let content = json!([{"type": "input_text", "text": text}]);
        return Ok(vec![json!({"type": "message", "status": "completed", "role": "user", "content": content})]);
    }
    if !field.value.is_array() {
        let message = format!("Invalid type for '{}': expected one of a string or an array of input items.", field.path);
        return Err(ApiError::invalid(field.path.clone(), "invalid_type", message));
    }
    let items = field.array(usize::MAX)?;
    items.iter().enumerate().map(|(index, value)| item(&field.item(index, value))).collect()
}

/// Gives the items without an id one that says where they are.
pub fn number(items: &mut [Value], response: Uuid) {
    for (index, item) in items.iter_mut().enumerate() {
        let Some(map) = item.as_object_mut() else { continue };
        if !map.contains_key("id") {
            let id = ItemId { response, side: Side::Input, index }.shown(map["type"].as_str().unwrap_or_default());
            map.insert("id".into(), id.into());
        }
    }
}

fn item(field: &Field<'_>) -> Result<Value, ApiError> {
    let mut fields = field.object()?;
    let kind = match fields.get("type") {
        Some(kind) => match kind.string()? {
            word if KNOWN.contains(&word) => word,
            word if FOREIGN.contains(&word) => {
                return Err(kind.unsupported(&format!(
                    "is `{word}`, an item that no tool here makes or reads: functions are the tools of this server."
                )));
            }
            word => return Err(kind.unknown_value(word, &KNOWN)),
        },
        // As OpenAI does: a message may leave its type out, and so may a reference.
        None if field.value.get("role").is_none() && field.value.get("id").is_some() => "item_reference",
        None => "message",
    };
    let mut out = Map::from_iter([("type".to_owned(), kind.into())]);
    if let Some(id) = fields.get("id") {
        out.insert("id".into(), id.short_string(256)?.into());
    }
    match kind {
        "message" => message(&mut fields, &mut out)?,
        "function_call" => {
            out.insert("call_id".into(), filled(&fields.require("call_id")?)?.into());
            out.insert("name".into(), filled(&fields.require("name")?)?.into());
            out.insert("arguments".into(), fields.require("arguments")?.string()?.into());
            fields.ignore(&["caller", "namespace", "created_by", "async"]);
        }
        "function_call_output" => {
            out.insert("call_id".into(), filled(&fields.require("call_id")?)?.into());
            out.insert("output".into(), call_output(&fields.require("output")?)?);
            fields.ignore(&["caller", "name", "namespace", "created_by"]);
        }
        "reasoning" => {
            out.insert("summary".into(), texts(&fields.require("summary")?, "summary_text")?);
            let content = fields.get("content").map(|content| texts(&content, "reasoning_text")).transpose()?;
            out.insert("content".into(), content.unwrap_or_else(|| json!([])));
            fields.string("encrypted_content")?;
        }
        _ => {
            fields.require("id")?;
        }
    }
    if kind != "item_reference" {
        let status = fields.get("status").map(|status| status.one_of(&STATUSES)).transpose()?;
        out.insert("status".into(), status.unwrap_or("completed").into());
    }
    fields.finish()?;
    Ok(Value::Object(out))
}

fn filled<'a>(field: &Field<'a>) -> Result<&'a str, ApiError> {
    match field.string()? {
        "" => Err(field.invalid("string_below_min_length", "empty string. Expected at least 1 character.")),
        text => Ok(text),
    }
}

fn message(fields: &mut Fields<'_>, out: &mut Map<String, Value>) -> Result<(), ApiError> {
    let role = fields.require("role")?.one_of(&["user", "assistant", "system", "developer"])?;
    out.insert("role".into(), role.into());
    let content = fields.require("content")?;
    let text_type = if role == "assistant" { "output_text" } else { "input_text" };
    let parts = match content.value {
        Value::String(text) => vec![part(text_type, text)],
        Value::Array(values) => values
            .iter()
            .enumerate()
            .map(|(index, value)| message_part(&content.item(index, value), role))
            .collect::<Result<_, _>>()?,
        _ => {
            let message = format!("Invalid type for '{}': expected one of a string or an array of content parts.", content.path);
            return Err(ApiError::invalid(content.path, "invalid_type", message));
        }
    };
    out.insert("content".into(), Value::Array(parts));
    if let Some(phase) = fields.get("phase") {
        out.insert("phase".into(), phase.one_of(&["commentary", "final_answer"])?.into());
    }
    Ok(())
}

fn part(kind: &str, text: &str) -> Value {
    if kind == "output_text" {
        json!({"type": kind, "text": text, "annotations": []})
    } else {
        json!({"type": kind, "text": text})
    }
}

fn message_part(field: &Field<'_>, role: &str) -> Result<Value, ApiError> {
    let mut fields = field.object()?;
    let kind = fields.require("type")?;
    let supported: &[&str] = if role == "assistant" { &["output_text", "refusal"] } else { &["input_text"] };
    let made = match kind.string()? {
        word @ ("input_text" | "output_text") if supported.contains(&word) => part(word, fields.require("text")?.string()?),
        "refusal" if role == "assistant" => json!({"type": "refusal", "refusal": fields.require("refusal")?.string()?}),
        "input_image" | "input_file" | "input_audio" => {
            return Err(kind.unsupported("names a part that no model here can read: send text parts only."));
        }
        other => return Err(kind.unknown_value(other, supported)),
    };
    // Of an answer that is sent back; and hints for a cache that needs none.
    fields.ignore(&["annotations", "logprobs", "prompt_cache_breakpoint"]);
    fields.finish()?;
    Ok(made)
}

/// A function's result: a text, or parts that are texts.
fn call_output(field: &Field<'_>) -> Result<Value, ApiError> {
    match field.value {
        Value::String(text) => Ok(text.as_str().into()),
        Value::Array(values) => {
            values.iter().enumerate().map(|(index, value)| message_part(&field.item(index, value), "tool")).collect()
        }
        _ => {
            let message = format!("Invalid type for '{}': expected one of a string or an array of content parts.", field.path);
            Err(ApiError::invalid(field.path.clone(), "invalid_type", message))
        }
    }
}

fn texts(field: &Field<'_>, kind: &'static str) -> Result<Value, ApiError> {
    let one = |(index, value)| {
        let field = field.item(index, value);
        let mut fields = field.object()?;
        fields.require("type")?.one_of(&[kind])?;
        let text = fields.require("text")?.string()?;
        fields.finish()?;
        Ok(json!({"type": kind, "text": text}))
    };
    field.array(usize::MAX)?.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(input: Value) -> Result<Vec<Value>, ApiError> {
        let body = json!({ "input": input });
        let mut root = Fields::root(&body)?;
        parse(&root.require("input")?)
    }

    #[test]
    fn a_text_is_a_users_message_and_items_get_ids_where_they_have_none() {
        let response = Uuid::nil();
        let mut items = run(json!([
            {"role": "user", "content": "a"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "message", "id": "msg_x", "role": "assistant", "status": "incomplete", "content": [
                {"type": "output_text", "text": "b", "annotations": [], "logprobs": []}, {"type": "refusal", "refusal": "no"}]},
        ]))
        .unwrap();
        number(&mut items, response);
        let zeros = "0".repeat(32);
        assert_eq!(
            items[0],
            json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}], "status": "completed",
                   "id": format!("msg_{zeros}i0000")})
        );
        assert_eq!(items[1]["id"], format!("fc_{zeros}i0001"));
        assert_eq!((&items[2]["id"], &items[2]["status"]), (&json!("msg_x"), &json!("incomplete")));
        assert_eq!(items[2]["content"][1], json!({"type": "refusal", "refusal": "no"}));
        let text = run(json!("hi")).unwrap();
        assert_eq!(text[0]["content"], json!([{"type": "input_text", "text": "hi"}]));
        assert_eq!(run(json!([{"id": "msg_1"}])).unwrap(), [json!({"type": "item_reference", "id": "msg_1"})]);
    }

    #[test]
    fn each_rejection_names_its_path() {
        let cases = [
            (json!(3), "input", "invalid_type"),
            (json!([3]), "input.0", "invalid_type"),
            (json!([{"content": "x"}]), "input.0.role", "missing_required_parameter"),
            (json!([{"role": "tool", "content": "x"}]), "input.0.role", "invalid_value"),
            (json!([{"role": "user"}]), "input.0.content", "missing_required_parameter"),
            (json!([{"role": "user", "content": 5}]), "input.0.content", "invalid_type"),
            (
                json!([{"role": "user", "content": [{"type": "input_text"}]}]),
                "input.0.content.0.text",
                "missing_required_parameter",
            ),
            (
                json!([{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]),
                "input.0.content.0.type",
                "invalid_value",
            ),
            (
                json!([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
                "input.0.content.0.type",
                "unsupported_parameter",
            ),
            (json!([{"role": "user", "content": "x", "colour": 1}]), "input.0.colour", "unknown_parameter"),
            (json!([{"type": "web_search_call", "id": "x"}]), "input.0.type", "unsupported_parameter"),
            (json!([{"type": "smell"}]), "input.0.type", "invalid_value"),
            (
                json!([{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]),
                "input.0.arguments",
                "invalid_type",
            ),
            (json!([{"type": "function_call_output", "output": "x"}]), "input.0.call_id", "missing_required_parameter"),
            (
                json!([{"type": "function_call_output", "call_id": "", "output": "x"}]),
                "input.0.call_id",
                "string_below_min_length",
            ),
            (json!([{"type": "reasoning", "id": "r"}]), "input.0.summary", "missing_required_parameter"),
            (
                json!([{"type": "reasoning", "summary": [], "content": [{"type": "text", "text": "x"}]}]),
                "input.0.content.0.type",
                "invalid_value",
            ),
            (json!([{"type": "item_reference"}]), "input.0.id", "missing_required_parameter"),
        ];
        for (input, param, code) in cases {
            let error = run(input.clone()).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{input}");
        }
    }
}
