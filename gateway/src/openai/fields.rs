//! Reading a JSON request field by field, so that each rejection names the field's path and OpenAI's code for what is wrong.

use crate::http::error::ApiError;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::ops::RangeInclusive;

/// A value and where it lies in the request.
#[derive(Clone, Debug)]
pub struct Field<'a> {
    /// Never JSON null: null means the default, so such a field reads as absent.
    pub value: &'a Value,
    /// Such as `messages.0.content`.
    pub path: Cow<'static, str>,
}

/// An object whose every field must be asked for: what nobody asked for is unknown to this server.
#[derive(Debug)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: Option<String>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The request itself.
    pub fn root(value: &'a Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, prefix: None, known: Vec::with_capacity(64) }),
            other => {
                Err(ApiError::bad_request(format!("The request body must be a JSON object, but got {} instead.", kind(other))))
            }
        }
    }

    /// Where a field of this object lies in the request.
    pub fn path(&self, key: &'static str) -> Cow<'static, str> {
        match &self.prefix {
            None => Cow::Borrowed(key),
            Some(prefix) => Cow::Owned(format!("{prefix}.{key}")),
        }
    }

    /// The field, unless it is absent or null.
    pub fn get(&mut self, key: &'static str) -> Option<Field<'a>> {
        self.known.push(key);
        match self.map.get(key) {
            None | Some(Value::Null) => None,
            Some(value) => Some(Field { value, path: self.path(key) }),
        }
    }

    /// The field, which must be there.
    pub fn require(&mut self, key: &'static str) -> Result<Field<'a>, ApiError> {
        let path = self.path(key);
        self.get(key).ok_or_else(|| missing(&path))
    }

    /// Accepts the fields without reading them.
    pub fn ignore(&mut self, keys: &'static [&'static str]) {
        self.known.extend_from_slice(keys);
    }

    /// Refuses the field when it is set.
    pub fn refuse(&mut self, key: &'static str, why: &str) -> Result<(), ApiError> {
        match self.get(key) {
            None => Ok(()),
            Some(field) => Err(field.unsupported(why)),
        }
    }

    /// A boolean, or the default.
    pub fn bool_or(&mut self, key: &'static str, default: bool) -> Result<bool, ApiError> {
        self.get(key).map_or(Ok(default), |f| f.bool())
    }

    /// A number in the range, if set.
    pub fn decimal(&mut self, key: &'static str, range: RangeInclusive<f32>) -> Result<Option<f32>, ApiError> {
        self.get(key).map(|f| f.decimal(range)).transpose()
    }

    /// An integer in the range, if set.
    pub fn integer(&mut self, key: &'static str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        self.get(key).map(|f| f.integer(range)).transpose()
    }

    /// A string, if set.
    pub fn string(&mut self, key: &'static str) -> Result<Option<&'a str>, ApiError> {
        self.get(key).map(|f| f.string()).transpose()
    }

    /// Fails on the first field that nobody asked for.
    pub fn finish(self) -> Result<(), ApiError> {
        for key in self.map.keys() {
            if !self.known.contains(&key.as_str()) {
                let shown: String = key.chars().take(100).collect();
                let path = self.prefix.as_ref().map_or_else(|| shown.clone(), |prefix| format!("{prefix}.{shown}"));
                let message = format!("Unknown parameter: '{path}'.");
                return Err(ApiError::invalid(path, "unknown_parameter", message));
            }
        }
        Ok(())
    }
}

fn missing(path: &str) -> ApiError {
    ApiError::invalid(path, "missing_required_parameter", format!("Missing required parameter: '{path}'."))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a decimal",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl<'a> Field<'a> {
    fn wrong_type(&self, expected: &str) -> ApiError {
        let message = format!("Invalid type for '{}': expected {expected}, but got {} instead.", self.path, kind(self.value));
        ApiError::invalid(self.path.clone(), "invalid_type", message)
    }

    /// A rejection of this field: `Invalid 'path': ` and the reason.
    pub fn invalid(&self, code: &'static str, why: impl std::fmt::Display) -> ApiError {
        ApiError::invalid(self.path.clone(), code, format!("Invalid '{}': {why}", self.path))
    }

    /// A rejection of a value that is not one of the known ones.
    pub fn unknown_value(&self, value: &str, supported: &[&str]) -> ApiError {
        let shown: String = value.chars().take(100).collect();
        let list: Vec<String> = supported.iter().map(|s| format!("'{s}'")).collect();
        let message = format!("Invalid value: '{shown}'. Supported values are: {}.", list.join(", "));
        ApiError::invalid(self.path.clone(), "invalid_value", message)
    }

    /// A rejection of something that exists elsewhere but not here.
    pub fn unsupported(&self, why: &str) -> ApiError {
        ApiError::unsupported(self.path.clone(), format!("Unsupported parameter: '{}' {why}", self.path))
    }

    /// A string.
    pub fn string(&self) -> Result<&'a str, ApiError> {
        self.value.as_str().ok_or_else(|| self.wrong_type("a string"))
    }

    /// A string of at most `max` characters.
    pub fn short_string(&self, max: usize) -> Result<&'a str, ApiError> {
        let text = self.string()?;
        let length = text.chars().count();
        if length > max {
            return Err(self.invalid(
                "string_above_max_length",
                format!(
                    "string too long. Expected a string with maximum length {max}, but got a string with length {length} instead."
                ),
            ));
        }
        Ok(text)
    }

    /// One of the strings.
    pub fn one_of(&self, supported: &[&'static str]) -> Result<&'static str, ApiError> {
        let text = self.string()?;
        supported.iter().find(|s| **s == text).copied().ok_or_else(|| self.unknown_value(text, supported))
    }

    /// A boolean.
    pub fn bool(&self) -> Result<bool, ApiError> {
        self.value.as_bool().ok_or_else(|| self.wrong_type("a boolean"))
    }

    /// A number in the range, in the precision that answers and parameters have.
    pub fn decimal(&self, range: RangeInclusive<f32>) -> Result<f32, ApiError> {
        let number = self.double(f64::from(*range.start())..=f64::from(*range.end()))?;
        // The range is checked in f64: here only precision is given up.
        Ok(number as f32)
    }

    /// A number in the range.
    pub fn double(&self, range: RangeInclusive<f64>) -> Result<f64, ApiError> {
        let Some(number) = self.value.as_f64() else { return Err(self.wrong_type("a decimal")) };
        if number > *range.end() {
            let why = format!("decimal above maximum value. Expected a value <= {}, but got {number} instead.", range.end());
            return Err(self.invalid("decimal_above_max_value", why));
        }
        if number < *range.start() {
            let why = format!("decimal below minimum value. Expected a value >= {}, but got {number} instead.", range.start());
            return Err(self.invalid("decimal_below_min_value", why));
        }
        Ok(number)
    }

    /// An integer in the range. `3.0` counts as 3: some clients keep every number as a double.
    pub fn integer(&self, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
        let above = || {
            let why =
                format!("integer above maximum value. Expected a value <= {}, but got {} instead.", range.end(), self.value);
            self.invalid("integer_above_max_value", why)
        };
        let below = || {
            let why =
                format!("integer below minimum value. Expected a value >= {}, but got {} instead.", range.start(), self.value);
            self.invalid("integer_below_min_value", why)
        };
        let Value::Number(number) = self.value else { return Err(self.wrong_type("an integer")) };
        let number = match (number.as_i64(), number.as_f64()) {
            (Some(number), _) => number,
            (None, _) if number.is_u64() => return Err(above()),
            (None, Some(float)) if float.fract() == 0.0 && float.abs() < 9.0e15 => {
                // Whole and below 2^53: the cast loses nothing.
                float as i64
            }
            // Whole, but far beyond any range.
            (None, Some(float)) if float.fract() == 0.0 => return Err(if float > 0.0 { above() } else { below() }),
            _ => return Err(self.wrong_type("an integer")),
        };
        if number > *range.end() {
            return Err(above());
        }
        if number < *range.start() {
            return Err(below());
        }
        Ok(number)
    }

    /// The items of an array of at most `max` entries.
    pub fn array(&self, max: usize) -> Result<&'a [Value], ApiError> {
        let Value::Array(items) = self.value else { return Err(self.wrong_type("an array")) };
        if items.len() > max {
            return Err(self.invalid(
                "array_above_max_length",
                format!(
                    "array too long. Expected an array with maximum length {max}, but got an array with length {} instead.",
                    items.len()
                ),
            ));
        }
        Ok(items)
    }

    /// The same, with at least one entry.
    pub fn filled_array(&self, max: usize) -> Result<&'a [Value], ApiError> {
        let items = self.array(max)?;
        if items.is_empty() {
            let why = "empty array. Expected an array with minimum length 1, but got an empty array instead.";
            return Err(self.invalid("empty_array", why));
        }
        Ok(items)
    }

    /// Entry `index` of this array.
    pub fn item(&self, index: usize, value: &'a Value) -> Field<'a> {
        Field { value, path: Cow::Owned(format!("{}.{index}", self.path)) }
    }

    /// Entry `key` of this object, when keys are the caller's own.
    pub fn entry(&self, key: &str, value: &'a Value) -> Field<'a> {
        let shown: String = key.chars().take(100).collect();
        Field { value, path: Cow::Owned(format!("{}.{shown}", self.path)) }
    }

    /// An object with fields of the API.
    pub fn object(&self) -> Result<Fields<'a>, ApiError> {
        Ok(Fields { map: self.map()?, prefix: Some(self.path.clone().into_owned()), known: Vec::with_capacity(8) })
    }

    /// An object with keys of the caller's own.
    pub fn map(&self) -> Result<&'a Map<String, Value>, ApiError> {
        self.value.as_object().ok_or_else(|| self.wrong_type("an object"))
    }

    /// Token ids below 2³².
    pub fn token_ids(&self, max: usize) -> Result<Vec<u32>, ApiError> {
        self.array(max)?
            .iter()
            .enumerate()
            .map(|(i, value)| {
                // The path is made only for a bad entry: a prompt may hold a hundred thousand good ones.
                match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
                    Some(id) => Ok(id),
                    None => self.item(i, value).integer(0..=i64::from(u32::MAX)).map(|id| u32::try_from(id).unwrap_or(u32::MAX)),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn field(value: &Value) -> Field<'_> {
        Field { value, path: Cow::Borrowed("x") }
    }

    #[test]
    fn null_reads_as_absent_and_is_still_a_known_name() {
        let value = json!({"a": null});
        let mut fields = Fields::root(&value).unwrap();
        assert!(fields.get("a").is_none());
        fields.finish().unwrap();
    }

    #[test]
    fn integers_may_be_written_as_whole_decimals() {
        assert_eq!(field(&json!(3.0)).integer(1..=5).unwrap(), 3);
        assert_eq!(field(&json!(3.5)).integer(1..=5).unwrap_err().code.unwrap(), "invalid_type");
        assert_eq!(field(&json!(u64::MAX)).integer(i64::MIN..=i64::MAX).unwrap_err().code.unwrap(), "integer_above_max_value");
        assert_eq!(field(&json!(1e300)).integer(i64::MIN..=i64::MAX).unwrap_err().code.unwrap(), "integer_above_max_value");
        assert_eq!(field(&json!(-1e300)).integer(i64::MIN..=i64::MAX).unwrap_err().code.unwrap(), "integer_below_min_value");
    }

    #[test]
    fn nested_paths_are_dotted() {
        let value = json!({"messages": [{"rôle": 1}]});
        let mut root = Fields::root(&value).unwrap();
        let messages = root.require("messages").unwrap();
        let first = messages.item(0, &messages.array(9).unwrap()[0]);
        let mut message = first.object().unwrap();
        assert_eq!(message.require("role").unwrap_err().param.unwrap(), "messages.0.role");
        assert_eq!(message.finish().unwrap_err().param.unwrap(), "messages.0.rôle");
    }
}
