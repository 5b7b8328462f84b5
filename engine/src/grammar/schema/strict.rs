//! OpenAI's rules for schemas with `strict: true`, in the words of their API.

use super::refused;
use crate::grammar::GrammarError;
use serde_json::{Map, Value};

/// The root must be an object, not a choice between several.
pub(super) fn root(schema: &Value) -> Result<(), GrammarError> {
    let kind = schema.get("type");
    if kind.and_then(Value::as_str) != Some("object") {
        let got = kind.map_or("None".to_owned(), Value::to_string);
        return Err(refused("", "type", format!("schema must be a JSON Schema of 'type: \"object\"', got 'type: {got}'.")));
    }
    match schema.get("anyOf") {
        Some(_) => Err(refused("", "anyOf", "schema must not have 'anyOf' at the top level.")),
        None => Ok(()),
    }
}

/// Every object is closed, and every one of its properties is required.
pub(super) fn object(schema: &Map<String, Value>, path: &str) -> Result<(), GrammarError> {
    let is_object = match schema.get("type") {
        Some(Value::String(kind)) => kind == "object",
        Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "object"),
        _ => schema.contains_key("properties"),
    };
    if !is_object {
        return Ok(());
    }
    if schema.get("additionalProperties") != Some(&Value::Bool(false)) {
        let message = "'additionalProperties' is required to be supplied and to be false.";
        return Err(refused(path, "additionalProperties", message));
    }
    let none = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
    let required: Vec<&str> =
        schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    if let Some(missing) = properties.keys().find(|name| !required.contains(&name.as_str())) {
        let message = format!(
            "'required' is required to be supplied and to be an array including every key in properties. Missing '{missing}'."
        );
        return Err(refused(path, "required", message));
    }
    match required.iter().find(|name| !properties.contains_key(**name)) {
        Some(extra) => Err(refused(path, "required", format!("Extra required key '{extra}' supplied."))),
        None => Ok(()),
    }
}
