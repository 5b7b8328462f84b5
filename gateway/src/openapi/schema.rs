//! JSON Schemas (2020-12, as OpenAPI 3.1 takes them), written like sentences.

use serde_json::{Map, Value, json};

/// Any JSON.
pub fn any() -> Value {
    json!({})
}

/// A string.
pub fn text() -> Value {
    json!({"type": "string"})
}

/// A string of so many characters.
pub fn text_of(min: u64, max: u64) -> Value {
    json!({"type": "string", "minLength": min, "maxLength": max})
}

/// A string with something to see in it.
pub fn filled(max: u64) -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": max, "pattern": "\\S"})
}

/// One of the words.
pub fn word(words: &[&str]) -> Value {
    json!({"type": "string", "enum": words})
}

/// Always this word.
pub fn just(word: &str) -> Value {
    json!({"type": "string", "const": word})
}

/// An id of ours without its prefix.
pub fn uuid() -> Value {
    json!({"type": "string", "format": "uuid"})
}

/// A boolean.
pub fn flag() -> Value {
    json!({"type": "boolean"})
}

/// A whole number in the range.
pub fn whole(min: i64, max: i64) -> Value {
    json!({"type": "integer", "minimum": min, "maximum": max})
}

/// A whole number from 0 on, in answers.
pub fn count() -> Value {
    json!({"type": "integer", "minimum": 0})
}

/// Seconds since 1970.
pub fn seconds() -> Value {
    json!({"type": "integer", "description": "Seconds since 1970."})
}

/// A number.
pub fn number() -> Value {
    json!({"type": "number"})
}

/// A number in the range.
pub fn number_in(min: f64, max: f64) -> Value {
    json!({"type": "number", "minimum": min, "maximum": max})
}

/// A list.
pub fn list(items: Value) -> Value {
    json!({"type": "array", "items": items})
}

/// A list of so many items.
pub fn list_of(min: u64, max: u64, items: Value) -> Value {
    json!({"type": "array", "items": items, "minItems": min, "maxItems": max})
}

/// An object whose keys are the caller's.
pub fn map(values: Value) -> Value {
    json!({"type": "object", "additionalProperties": values})
}

/// One of several forms.
pub fn either(forms: impl IntoIterator<Item = Value>) -> Value {
    json!({"anyOf": forms.into_iter().collect::<Vec<_>>()})
}

/// The schema, or null.
pub fn nullable(schema: Value) -> Value {
    either([schema, json!({"type": "null"})])
}

/// Only null: a field that is known and cannot be used.
pub fn nothing() -> Value {
    json!({"type": "null"})
}

/// A schema among the document's components.
pub fn named(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// The same with a sentence about it.
pub fn about(description: &str, mut schema: Value) -> Value {
    if let Some(map) = schema.as_object_mut() {
        map.insert("description".to_owned(), description.into());
    }
    schema
}

/// An object, field by field.
#[derive(Clone, Debug)]
pub struct Object {
    properties: Map<String, Value>,
    required: Vec<&'static str>,
    closed: bool,
}

impl Object {
    /// Of a request: a field that is not listed is refused.
    pub fn request() -> Self {
        Self { properties: Map::new(), required: Vec::new(), closed: true }
    }

    /// Of an answer: later versions may add fields.
    pub fn answer() -> Self {
        Self { closed: false, ..Self::request() }
    }

    /// A field that is always there.
    pub fn with(mut self, name: &'static str, schema: Value) -> Self {
        self.properties.insert(name.to_owned(), schema);
        self.required.push(name);
        self
    }

    /// A field of an answer that is there when there is something to say.
    pub fn sometimes(mut self, name: &'static str, schema: Value) -> Self {
        self.properties.insert(name.to_owned(), schema);
        self
    }

    /// A field that may be left out; null is the same.
    pub fn may(self, name: &'static str, schema: Value) -> Self {
        let schema = if schema == nothing() || schema == any() { schema } else { nullable(schema) };
        self.sometimes(name, schema)
    }

    /// All fields of another.
    pub fn and(mut self, other: Self) -> Self {
        self.properties.extend(other.properties);
        self.required.extend(other.required);
        self
    }

    /// The schema.
    pub fn schema(self) -> Value {
        let mut schema = json!({"type": "object", "properties": self.properties});
        if !self.required.is_empty() {
            schema["required"] = json!(self.required);
        }
        if self.closed {
            schema["additionalProperties"] = false.into();
        }
        schema
    }
}

/// A page of a list.
pub fn page(items: Value) -> Object {
    Object::answer().with("object", just("list")).with("data", list(items))
}
