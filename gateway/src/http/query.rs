//! Parameters behind the question mark.

use crate::http::error::ApiError;
use serde_json::{Map, Value};

/// The parameters of a query string, each at most once.
pub fn parameters(query: Option<String>, known: &[&'static str]) -> Result<Map<String, Value>, ApiError> {
    let mut found = Map::new();
    for (key, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        if !known.contains(&key.as_ref()) {
            let shown: String = key.chars().take(100).collect();
            return Err(ApiError::invalid(shown, "unknown_parameter", format!("Known here are: {}.", known.join(", "))));
        }
        found.insert(key.into_owned(), Value::String(value.into_owned()));
    }
    Ok(found)
}

/// A number up to `most`, or the default.
pub fn number(parameters: &Map<String, Value>, key: &'static str, default: usize, most: usize) -> Result<usize, ApiError> {
    match parameters.get(key).and_then(Value::as_str) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .ok()
            .filter(|number| *number <= most)
            .ok_or_else(|| ApiError::invalid(key, "invalid_value", format!("'{key}' must be a number from 0 to {most}."))),
    }
}
