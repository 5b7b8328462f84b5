//! What a request says about functions and the form of the text, in this API's flatter spelling.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use crate::openai::response_format::{self, Constrained};
use crate::openai::tools::{Spelling, Tool, ToolChoice};
use serde_json::{Value, json};
use tidemill_engine::Constraint;

/// `tools`, `tool_choice` and `parallel_tool_calls`.
pub fn parse(fields: &mut Fields<'_>) -> Result<(Vec<Tool>, ToolChoice, bool), ApiError> {
    let parallel = fields.bool_or("parallel_tool_calls", true)?;
    let spelling = Spelling::RESPONSES;
    let tools = fields.get("tools").map_or(Ok(Vec::new()), |field| spelling.tools(&field))?;
    let choice = fields.get("tool_choice").map_or(Ok(ToolChoice::Auto), |field| spelling.choice(&field, &tools))?;
    Ok((tools, choice, parallel))
}

/// `text`: what the answer must look like, and the field as the response repeats it.
pub fn text(fields: &mut Fields<'_>) -> Result<(Option<Constrained>, Value), ApiError> {
    let (mut constraint, mut format, mut verbosity) = (None, json!({"type": "text"}), "medium");
    if let Some(field) = fields.get("text") {
        let mut fields = field.object()?;
        if let Some(asked) = fields.get("format") {
            constraint = text_format(&asked)?;
            format = asked.value.clone();
        }
        if let Some(asked) = fields.get("verbosity") {
            verbosity = asked.one_of(&["low", "medium", "high"])?;
        }
        fields.finish()?;
    }
    Ok((constraint, json!({"format": format, "verbosity": verbosity})))
}

fn text_format(field: &Field<'_>) -> Result<Option<Constrained>, ApiError> {
    let mut fields = field.object()?;
    let constraint = match fields.require("type")?.one_of(&["text", "json_object", "json_schema"])? {
        "json_schema" => Some(response_format::json_schema(&mut fields)?),
        "json_object" => Some(Constrained { constraint: Constraint::JsonObject, param: field.path.clone().into_owned() }),
        _ => None,
    };
    fields.finish()?;
    Ok(constraint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(body: Value) -> Result<(Vec<Tool>, ToolChoice, bool), ApiError> {
        let mut fields = Fields::root(&body)?;
        let found = parse(&mut fields)?;
        text(&mut fields)?;
        fields.finish()?;
        Ok(found)
    }

    fn weather() -> Value {
        json!({"type": "function", "name": "weather", "description": "d", "parameters": {"type": "object"}, "strict": true})
    }

    #[test]
    fn functions_are_flat_and_can_be_chosen() {
        let (tools, choice, parallel) = run(json!({
            "tools": [weather()], "tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": false,
        }))
        .unwrap();
        assert_eq!((tools[0].name.as_str(), tools[0].strict, parallel), ("weather", true, false));
        assert_eq!(choice, ToolChoice::Named("weather".into()));
        let allowed = json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]});
        let (_, choice, _) = run(json!({"tools": [weather()], "tool_choice": allowed})).unwrap();
        assert_eq!(choice, ToolChoice::Allowed { required: true, names: vec!["weather".into()] });
        assert_eq!(run(json!({})).unwrap(), (Vec::new(), ToolChoice::Auto, true));
    }

    #[test]
    fn the_form_of_the_text_is_a_constraint() {
        let constraint = |format: Value| {
            let body = json!({"text": {"format": format}});
            text(&mut Fields::root(&body).unwrap()).unwrap().0
        };
        let schema =
            constraint(json!({"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": false})).unwrap();
        assert_eq!(schema.param, "text.format.schema");
        assert_eq!(constraint(json!({"type": "json_object"})).unwrap().constraint, Constraint::JsonObject);
        assert_eq!(constraint(json!({"type": "text"})), None);
    }

    #[test]
    fn each_rejection_names_its_path() {
        let choice = |choice: Value| json!({"tools": [weather()], "tool_choice": choice});
        for (body, param, code) in [
            (json!({"tools": [{}]}), "tools.0.type", "missing_required_parameter"),
            (json!({"tools": [{"type": "web_search"}]}), "tools.0.type", "unsupported_parameter"),
            (json!({"tools": [{"type": "smell"}]}), "tools.0.type", "invalid_value"),
            (json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), "tools.0.name", "missing_required_parameter"),
            (json!({"tools": [weather(), weather()]}), "tools", "invalid_value"),
            (json!({"tool_choice": "required"}), "tool_choice", "invalid_value"),
            (choice(json!("any")), "tool_choice", "invalid_value"),
            (choice(json!({"type": "function", "name": "x"})), "tool_choice.name", "invalid_value"),
            (choice(json!({"type": "mcp"})), "tool_choice.type", "unsupported_parameter"),
            (choice(json!({"type": "allowed_tools", "mode": "auto", "tools": []})), "tool_choice.tools", "empty_array"),
            (json!({"text": {"format": {"type": "xml"}}}), "text.format.type", "invalid_value"),
            (
                json!({"text": {"format": {"type": "json_schema", "name": "x"}}}),
                "text.format.schema",
                "missing_required_parameter",
            ),
            (json!({"text": {"format": {"type": "text", "tone": 1}}}), "text.format.tone", "unknown_parameter"),
            (json!({"text": {"tone": "warm"}}), "text.tone", "unknown_parameter"),
        ] {
            let error = run(body.clone()).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{body}");
        }
    }
}
