//! What a client asks of the answer's form: `response_format`, `structured_outputs`, and the older `guided_*` fields of vLLM.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use serde_json::Value;
use tidemill_engine::{Constraint, GrammarError};

/// Most texts to choose from.
const MAX_CHOICES: usize = 10_000;

/// A constraint, and the caller's field that asked for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Constrained {
    /// What the text must look like.
    pub constraint: Constraint,
    /// The field that errors name, such as `response_format.json_schema.schema`.
    pub param: String,
}

impl Constrained {
    /// The rejection of a constraint that the engine cannot honour.
    pub fn refused(&self, error: &GrammarError) -> ApiError {
        if error.busy {
            let message = format!("The constraint of '{}' was not compiled: {}.", self.param, error.message);
            return ApiError::unavailable(Some("grammars_busy"), message, 5);
        }
        let param = if error.path.is_empty() { self.param.clone() } else { format!("{}.{}", self.param, error.path) };
        let code = match self.constraint {
            Constraint::JsonSchema { .. } | Constraint::JsonObject => "invalid_json_schema",
            _ => "invalid_grammar",
        };
        let message = format!("Invalid '{param}': {}", error.message);
        ApiError::invalid(param, code, message)
    }
}

/// Reads every field that can constrain the answer; at most one may.
pub fn parse(fields: &mut Fields<'_>) -> Result<Option<Constrained>, ApiError> {
    let mut found: Option<Constrained> = None;
    let mut add = |more: Option<Constrained>| match (&found, more) {
        (_, None) => Ok(()),
        (Some(first), Some(second)) => {
            let message = format!("Invalid '{}': the answer is already constrained by '{}'.", second.param, first.param);
            Err(ApiError::invalid(second.param, "invalid_value", message))
        }
        (None, more) => {
            found = more;
            Ok(())
        }
    };
    if let Some(field) = fields.get("response_format") {
        add(response_format(&field)?)?;
    }
    if let Some(field) = fields.get("structured_outputs") {
        let mut inner = field.object()?;
        for (key, read) in OUTPUTS {
            add(inner.get(key).map(|field| read(&field)).transpose()?.flatten())?;
        }
        for key in ["structural_tag", "whitespace_pattern"] {
            inner.refuse(key, "is not supported by this server.")?;
        }
        // How vLLM's backends differ; there is one here.
        for key in ["disable_fallback", "disable_any_whitespace", "disable_additional_properties"] {
            inner.bool_or(key, false)?;
        }
        inner.finish()?;
    }
    for (key, (_, read)) in ["guided_json", "guided_regex", "guided_choice", "guided_grammar"].into_iter().zip(OUTPUTS) {
        add(fields.get(key).map(|field| read(&field)).transpose()?.flatten())?;
    }
    fields.refuse("guided_whitespace_pattern", "is not supported by this server.")?;
    fields.string("guided_decoding_backend")?;
    Ok(found)
}

type Read = fn(&Field<'_>) -> Result<Option<Constrained>, ApiError>;

/// The ways to constrain that `structured_outputs` has; the first four have an older name.
const OUTPUTS: [(&str, Read); 5] = [
    ("json", |field| schema_or_text(field).map(Some)),
    ("regex", |field| Ok(Some(constrained(field, Constraint::Regex(text(field)?))))),
    ("choice", |field| choice(field).map(Some)),
    ("grammar", |field| Ok(Some(constrained(field, Constraint::Lark(text(field)?))))),
    ("json_object", |field| Ok(field.bool()?.then(|| constrained(field, Constraint::JsonObject)))),
];

fn constrained(field: &Field<'_>, constraint: Constraint) -> Constrained {
    Constrained { constraint, param: field.path.clone().into_owned() }
}

fn response_format(field: &Field<'_>) -> Result<Option<Constrained>, ApiError> {
    let mut format = field.object()?;
    let kind = format.require("type")?.one_of(&["text", "json_object", "json_schema"])?;
    let found = match kind {
        "json_schema" => Some(json_schema(&mut format.require("json_schema")?.object()?)?),
        "json_object" => Some(constrained(field, Constraint::JsonObject)),
        _ => None,
    };
    format.finish()?;
    Ok(found)
}

/// `name`, `description`, `schema`, `strict`: the content of `json_schema` here, and of `text.format` in the responses API (which
/// reads its `type` before).
pub fn json_schema(format: &mut Fields<'_>) -> Result<Constrained, ApiError> {
    let name = format.require("name")?;
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.short_string(64)?.is_empty() || !name.string()?.chars().all(good) {
        return Err(name.invalid("invalid_value", "must be 1 to 64 letters, digits, underscores and dashes."));
    }
    format.string("description")?;
    let strict = format.bool_or("strict", false)?;
    let schema = format.require("schema")?;
    schema.map()?;
    Ok(constrained(&schema, Constraint::JsonSchema { schema: schema.value.clone(), strict }))
}

/// A schema, or the JSON text of one.
fn schema_or_text(field: &Field<'_>) -> Result<Constrained, ApiError> {
    let schema = match field.value {
        Value::String(text) => serde_json::from_str(text)
            .map_err(|error| field.invalid("invalid_value", format!("the string is not JSON: {error}.")))?,
        other => other.clone(),
    };
    if !schema.is_object() && !schema.is_boolean() {
        return Err(field.invalid("invalid_type", "expected a JSON schema, which is an object, or its JSON text."));
    }
    Ok(constrained(field, Constraint::JsonSchema { schema, strict: false }))
}

fn text(field: &Field<'_>) -> Result<String, ApiError> {
    match field.string()? {
        "" => Err(field.invalid("string_below_min_length", "empty string. Expected at least 1 character.")),
        text => Ok(text.to_owned()),
    }
}

fn choice(field: &Field<'_>) -> Result<Constrained, ApiError> {
    let items = field.filled_array(MAX_CHOICES)?;
    let texts: Result<_, _> = items.iter().enumerate().map(|(i, value)| text(&field.item(i, value))).collect();
    Ok(constrained(field, Constraint::Choice(texts?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Value) -> Result<Option<Constrained>, ApiError> {
        let mut fields = Fields::root(body)?;
        let found = parse(&mut fields)?;
        fields.finish()?;
        Ok(found)
    }

    #[test]
    fn every_spelling_says_which_field_asked() {
        let schema = json!({"type": "object"});
        let json = |strict| Constraint::JsonSchema { schema: schema.clone(), strict };
        let format = json!({"type": "json_schema", "json_schema": {"name": "a-b_1", "schema": schema, "strict": true}});
        let cases = [
            (json!({"response_format": format}), "response_format.json_schema.schema", json(true)),
            (json!({"response_format": {"type": "json_object"}}), "response_format", Constraint::JsonObject),
            (json!({"structured_outputs": {"json": "{\"type\": \"object\"}"}}), "structured_outputs.json", json(false)),
            (json!({"structured_outputs": {"json_object": true}}), "structured_outputs.json_object", Constraint::JsonObject),
            (json!({"guided_json": schema}), "guided_json", json(false)),
            (json!({"guided_regex": "a+"}), "guided_regex", Constraint::Regex("a+".into())),
            (json!({"guided_choice": ["a", "b"]}), "guided_choice", Constraint::Choice(vec!["a".into(), "b".into()])),
            (
                json!({"structured_outputs": {"grammar": "start: /a/"}}),
                "structured_outputs.grammar",
                Constraint::Lark("start: /a/".into()),
            ),
        ];
        for (body, param, constraint) in cases {
            assert_eq!(read(&body).unwrap(), Some(Constrained { constraint, param: param.into() }), "{body}");
        }
        let nothing =
            json!({"response_format": {"type": "text"}, "structured_outputs": {"json_object": false}, "guided_json": null});
        assert_eq!(read(&nothing).unwrap(), None);
    }

    #[test]
    fn a_server_that_is_busy_blames_no_field() {
        let constrained = Constrained { constraint: Constraint::JsonObject, param: "response_format".into() };
        let error = GrammarError { busy: true, ..GrammarError::whole("the server is busy") };
        let refused = constrained.refused(&error);
        assert_eq!((refused.status.as_u16(), refused.retry_after, refused.param), (503, Some(5), None));
        let refused = constrained.refused(&GrammarError::whole("no text satisfies it"));
        assert_eq!((refused.status.as_u16(), refused.param.as_deref()), (400, Some("response_format")));
    }

    #[test]
    fn rejections_name_the_field() {
        let cases = [
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}),
                "response_format.json_schema.name",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"response_format": {"type": "json_object", "schema": {}}}), "response_format.schema"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_choice": ["a", ""]}), "guided_choice.1"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_json": {}, "guided_regex": "a"}), "guided_regex"),
            (json!({"structured_outputs": {"jason": {}}}), "structured_outputs.jason"),
        ];
        for (body, param) in cases {
            assert_eq!(read(&body).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }
}
