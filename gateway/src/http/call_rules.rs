//! What the calls of an answer must be: compiled before the engine is asked, so that a schema that cannot be honoured is a 400.

use crate::http::error::ApiError;
use crate::openai::chat::ChatRequest;
use crate::openai::parse::OutputFormat;
use crate::openai::response_format::Constrained;
use crate::openai::tool_grammar::{Shape, Signature, lark};
use crate::openai::tools::{Tool, ToolChoice};
use crate::upstream::LocalModel;
use serde_json::{Value, json};
use tidemill_engine::{Constraint, for_lark};

/// Calls that are demanded, or whose arguments must fit, or that stand beside an answer that must.
pub(super) struct CallRules {
    tools: Vec<Tool>,
    forced: bool,
    single: bool,
}

impl CallRules {
    /// `None` where the model may write what it likes.
    pub(super) fn of(chat: &ChatRequest) -> Option<Self> {
        let choice = &chat.tool_choice;
        let tools: Vec<Tool> = chat.tools.iter().filter(|tool| choice.allows(&tool.name)).cloned().collect();
        let forced = choice.is_forced();
        if tools.is_empty() || !(forced || chat.constraint.is_some() || tools.iter().any(|tool| tool.strict)) {
            return None;
        }
        // One that is named is called once.
        let single = !chat.parallel_tool_calls || matches!(choice, ToolChoice::Named(_));
        Some(Self { tools, forced, single })
    }

    /// The grammar of the whole answer. `answer`: what it must be where it is no call.
    pub(super) async fn constraint(
        &self,
        model: &LocalModel,
        format: &OutputFormat,
        answer: Option<&Constrained>,
    ) -> Result<Constrained, ApiError> {
        let mut functions = Vec::with_capacity(self.tools.len());
        for tool in &self.tools {
            functions.push(signature(model, tool).await?);
        }
        if let Some(answer) = answer {
            // What is wrong with it is said in its own words.
            model.grammar(answer).await?;
        }
        let (forced, single) = (self.forced, self.single);
        let shape = Shape { format, forced, single, answer: answer.map(|answer| &answer.constraint) };
        let grammar = lark(&shape, &functions, &|mark| model.control_token(mark)).ok_or_else(|| {
            let param = answer.map_or("tools", |answer| answer.param.as_str());
            let why = "a regular expression or grammar for the answer cannot be combined with 'tools'.";
            ApiError::invalid(param, "invalid_value", format!("Invalid '{param}': {why}"))
        })?;
        Ok(Constrained { constraint: Constraint::Lark(grammar), param: "tools".into() })
    }
}

/// The schema of a function's arguments. One that cannot be honoured is refused when the tool is strict; else any object will do.
async fn signature(model: &LocalModel, tool: &Tool) -> Result<Signature, ApiError> {
    let schema = if tool.strict { tool.schema() } else { closed(tool.schema()) };
    let written = for_lark(&schema, tool.strict);
    let alone = Constrained { constraint: Constraint::JsonSchema { schema, strict: tool.strict }, param: tool.param.clone() };
    let name = tool.name.clone();
    match (model.grammar(&alone).await, written) {
        (Ok(_), Ok(arguments)) => Ok(Signature { name, arguments }),
        (Err(error), _) if tool.strict || error.status.is_server_error() => Err(error),
        (_, Err(error)) if tool.strict => Err(alone.refused(&error)),
        _ => {
            let any = for_lark(&json!({"type": "object"}), false).map_err(|error| alone.refused(&error))?;
            Ok(Signature { name, arguments: any })
        }
    }
}

/// A function takes the arguments that it names: where its schema does not speak of others, none are written.
fn closed(mut schema: Value) -> Value {
    const SPEAK: [&str; 8] =
        ["$ref", "additionalProperties", "allOf", "anyOf", "if", "oneOf", "patternProperties", "unevaluatedProperties"];
    let named = schema.get("properties").and_then(Value::as_object);
    let required = schema.get("required").and_then(Value::as_array).into_iter().flatten();
    let complete = named.is_some_and(|named| required.filter_map(Value::as_str).all(|key| named.contains_key(key)));
    if complete
        && let Some(schema) = schema.as_object_mut()
        && !SPEAK.iter().any(|key| schema.contains_key(*key))
    {
        schema.insert("additionalProperties".into(), false.into());
    }
    schema
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_that_names_its_arguments_takes_no_others() {
        let names = json!({"type": "object", "properties": {"a": {}}, "required": ["a"]});
        assert_eq!(closed(names.clone())["additionalProperties"], false);
        assert_eq!(closed(json!({"properties": {}}))["additionalProperties"], false);
        for (key, value) in [
            ("additionalProperties", json!({"type": "string"})),
            ("patternProperties", json!({"^x": {}})),
            ("allOf", json!([{"properties": {"b": {}}}])),
            ("required", json!(["b"])),
        ] {
            let mut open = names.clone();
            open[key] = value;
            assert_eq!(closed(open.clone()), open);
        }
        assert_eq!(closed(json!({"type": "object"})), json!({"type": "object"}));
    }
}
