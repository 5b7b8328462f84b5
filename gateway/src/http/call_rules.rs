//! What the calls of an answer must be: compiled before the engine is asked, so that a schema that cannot be honoured is a 400.

use crate::http::error::ApiError;
use crate::openai::chat::ChatRequest;
use crate::openai::parse::OutputFormat;
use crate::openai::response_format::Constrained;
use crate::openai::tool_grammar::{Shape, Signature, lark};
use crate::openai::tools::{Tool, ToolChoice};
use crate::upstream::LocalModel;
use serde_json::json;
use tidemill_engine::Constraint;

/// Calls that are demanded, or whose arguments must fit, or that stand beside an answer that must.
pub(super) struct CallRules {
    tools: Vec<Tool>,
    forced: bool,
    single: bool,
    no_reasoning: bool,
}

impl CallRules {
    /// `None` where the model may write what it likes. `prompt` is the templated conversation.
    pub(super) fn of(chat: &ChatRequest, format: &OutputFormat, prompt: &str) -> Option<Self> {
        let choice = &chat.tool_choice;
        let tools: Vec<Tool> = chat.tools.iter().filter(|tool| choice.allows(&tool.name)).cloned().collect();
        let forced = choice.is_forced();
        if tools.is_empty() || !(forced || chat.constraint.is_some() || tools.iter().any(|tool| tool.strict)) {
            return None;
        }
        // One that is named is called once.
        let single = !chat.parallel_tool_calls || matches!(choice, ToolChoice::Named(_));
        let no_reasoning = format.reasoning.is_some_and(|tags| prompt.trim_end().ends_with(tags.close));
        Some(Self { tools, forced, single, no_reasoning })
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
        let special = |mark: &str| model.tokenizer().id(mark).filter(|&id| model.tokenizer().is_special(id));
        let (forced, single, no_reasoning) = (self.forced, self.single, self.no_reasoning);
        let shape = Shape { format, no_reasoning, forced, single, answer: answer.map(|answer| &answer.constraint) };
        let grammar = lark(&shape, &functions, &special).ok_or_else(|| {
            let param = answer.map_or("tools", |answer| answer.param.as_str());
            let why = "a regular expression or grammar for the answer cannot be combined with 'tools'.";
            ApiError::invalid(param, "invalid_value", format!("Invalid '{param}': {why}"))
        })?;
        Ok(Constrained { constraint: Constraint::Lark(grammar), param: "tools".into() })
    }
}

/// The schema of a function's arguments. One that cannot be honoured is refused when the tool is strict; else any object will do.
async fn signature(model: &LocalModel, tool: &Tool) -> Result<Signature, ApiError> {
    let schema = tool.schema();
    let constraint = Constraint::JsonSchema { schema: schema.clone(), strict: tool.strict };
    let alone = Constrained { constraint, param: tool.param.clone() };
    let name = tool.name.clone();
    match model.grammar(&alone).await {
        Ok(_) => Ok(Signature { name, schema }),
        Err(error) if tool.strict || error.status.is_server_error() => Err(error),
        Err(_) => Ok(Signature { name, schema: json!({"type": "object"}) }),
    }
}
