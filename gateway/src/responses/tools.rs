//! What a request says about functions and the form of the text, in this API's flatter spelling.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use crate::openai::response_format::{self, Constrained};
use crate::openai::tools::{self, Tool, ToolChoice};
use serde_json::{Value, json};
use tidemill_engine::Constraint;

/// Most tools of a request, as OpenAI has it.
const MAX_TOOLS: usize = 128;
/// OpenAI's own tools, which `tool_choice` may name there.
const HOSTED: [&str; 12] = [
    "file_search",
    "web_search_preview",
    "web_search_preview_2025_03_11",
    "web_search",
    "computer_use_preview",
    "computer",
    "code_interpreter",
    "image_generation",
    "mcp",
    "custom",
    "shell",
    "apply_patch",
];

/// `tools`, `tool_choice` and `parallel_tool_calls`.
pub fn parse(fields: &mut Fields<'_>) -> Result<(Vec<Tool>, ToolChoice, bool), ApiError> {
    let parallel = fields.bool_or("parallel_tool_calls", true)?;
    let tools = fields.get("tools").map_or(Ok(Vec::new()), |field| functions(&field))?;
    let choice = fields.get("tool_choice").map_or(Ok(ToolChoice::Auto), |field| choice(&field, &tools))?;
    Ok((tools, choice, parallel))
}

fn functions(field: &Field<'_>) -> Result<Vec<Tool>, ApiError> {
    let one = |(index, value)| {
        let mut fields = field.item(index, value).object()?;
        function(&mut fields)?;
        Tool::parse(fields)
    };
    let tools: Vec<Tool> = field.array(MAX_TOOLS)?.iter().enumerate().map(one).collect::<Result<_, _>>()?;
    tools::distinct(&tools, field)?;
    Ok(tools)
}

/// `"type": "function"`, the one kind of tool that the client runs itself.
fn function(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    let kind = fields.require("type")?;
    match kind.string()? {
        "function" => Ok(()),
        word if HOSTED.contains(&word) => {
            Err(kind.unsupported(&format!("can only be 'function' here: this server has no tool of type '{word}'.")))
        }
        other => Err(kind.unknown_value(other, &["function"])),
    }
}

fn choice(field: &Field<'_>, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
    let choice = if field.value.is_string() {
        match field.one_of(&["none", "auto", "required"])? {
            "none" => ToolChoice::None,
            "required" => ToolChoice::Required,
            _ => ToolChoice::Auto,
        }
    } else {
        let mut fields = field.object()?;
        let kind = fields.require("type")?;
        let choice = match kind.string()? {
            "allowed_tools" => {
                let required = fields.require("mode")?.one_of(&["auto", "required"])? == "required";
                let list = fields.require("tools")?;
                let one = |(index, value)| {
                    let mut fields = list.item(index, value).object()?;
                    function(&mut fields)?;
                    let name = named(&mut fields, tools)?;
                    fields.finish()?;
                    Ok(name)
                };
                let names = list.filled_array(MAX_TOOLS)?.iter().enumerate().map(one).collect::<Result<_, ApiError>>()?;
                ToolChoice::Allowed { required, names }
            }
            _ => {
                function(&mut fields)?;
                ToolChoice::Named(named(&mut fields, tools)?)
            }
        };
        fields.finish()?;
        choice
    };
    if choice.is_forced() && tools.is_empty() {
        return Err(field.invalid("invalid_value", "asks for a call, but there are no 'tools' to call."));
    }
    Ok(choice)
}

fn named(fields: &mut Fields<'_>, tools: &[Tool]) -> Result<String, ApiError> {
    let field = fields.require("name")?;
    let name = field.string()?;
    tools::known(tools, name, &field)?;
    Ok(name.to_owned())
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
