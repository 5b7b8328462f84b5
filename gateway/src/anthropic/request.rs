//! `POST /v1/messages` and `/v1/messages/count_tokens`: the request.

use super::content;
use crate::http::error::ApiError;
use crate::openai::about::About;
use crate::openai::chat::{ChatPrompt, ChatRequest};
use crate::openai::fields::{Field, Fields};
use crate::openai::generation::{Generation, count};
use crate::openai::response_format::Constrained;
use crate::openai::tools::{Tool, ToolChoice, distinct, known, schema};
use serde_json::{Map, Value};
use tidemill_engine::Constraint;

/// Most tools of a request.
const MAX_TOOLS: usize = 512;
/// Longest name of a tool, in characters.
const MAX_NAME: usize = 128;
/// Most stop sequences.
const MAX_STOP: usize = 16;
/// What tells Anthropic's own service how to keep, place and price a request.
const HINTS: [&str; 7] =
    ["cache_control", "inference_geo", "context_management", "diagnostics", "user_profile_id", "workspace_id", "betas"];

/// A request whose every field was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct MessagesRequest {
    /// The conversation and how to go on with it.
    pub chat: ChatRequest,
    /// Send events as they come.
    pub stream: bool,
    /// Reasoning is shown: the caller asked for it and knows its blocks.
    pub thinking: bool,
    /// `max_tokens`.
    pub max_tokens: usize,
}

/// A request whose tokens are to be counted.
#[derive(Clone, Debug, PartialEq)]
pub struct CountRequest(
    /// The conversation.
    pub ChatRequest,
);

impl MessagesRequest {
    /// Checks the body.
    pub fn parse(body: &Value) -> Result<Self, ApiError> {
        let mut fields = Fields::root(body)?;
        let (mut chat, thinking) = conversation(&mut fields)?;
        let max_tokens = fields.require("max_tokens")?.integer(1..=i64::from(u32::MAX))?;
        let max_tokens = usize::try_from(max_tokens).unwrap_or(usize::MAX);
        let stream = fields.bool_or("stream", false)?;
        let user_key = metadata(&mut fields)?;
        if let Some(tier) = fields.get("service_tier") {
            tier.one_of(&["auto", "standard_only"])?;
        }
        if let Some(speed) = fields.get("speed") {
            speed.one_of(&["standard", "fast"])?;
        }
        chat.generation = Generation {
            max_tokens: Some(max_tokens),
            // Clients ask for as much as Anthropic's models can write, whatever this one's context is.
            shorten: true,
            stream,
            about: About { user_key, ..About::default() },
            temperature: fields.decimal("temperature", 0.0..=1.0)?,
            top_p: fields.decimal("top_p", 0.0..=1.0)?,
            top_k: count(&mut fields, "top_k", 0..=i64::from(u32::MAX))?.and_then(|k| u32::try_from(k).ok()),
            stop: fields.get("stop_sequences").map_or(Ok(Vec::new()), |field| stop_sequences(&field))?,
            ..Generation::default()
        };
        fields.refuse("container", "is not supported: this server runs no containers.")?;
        fields.refuse("mcp_servers", "is not supported: this server does not call tools itself.")?;
        fields.finish()?;
        Ok(Self { chat, stream, thinking, max_tokens })
    }
}

impl CountRequest {
    /// Checks the body.
    pub fn parse(body: &Value) -> Result<Self, ApiError> {
        let mut fields = Fields::root(body)?;
        let (chat, _) = conversation(&mut fields)?;
        fields.refuse("mcp_servers", "is not supported: this server does not call tools itself.")?;
        fields.ignore(&["speed"]);
        fields.finish()?;
        Ok(Self(chat))
    }
}

/// The fields that make the prompt and constrain the answer; and whether reasoning is shown.
fn conversation(fields: &mut Fields<'_>) -> Result<(ChatRequest, bool), ApiError> {
    let model = fields.require("model")?.string()?.to_owned();
    let system = fields.get("system").map(|field| content::text(&field)).transpose()?.filter(|text| !text.is_empty());
    let field = fields.require("messages")?;
    let messages = content::messages(&field, system)?;
    // A last turn of the assistant's is the start of the answer.
    let continues = messages.last().is_some_and(|last| last["role"] == "assistant");
    if continues && messages.last().is_some_and(|last| last["content"] == "" || last["tool_calls"].is_array()) {
        let why = "the last turn is the assistant's and has no text to go on with; end with a turn of the user's.";
        return Err(field.invalid("invalid_value", why));
    }
    let thinking = fields.get("thinking").map_or(Ok(false), |field| thinking(&field))?;
    let mut template_kwargs = Map::from_iter([("enable_thinking".to_owned(), Value::Bool(thinking))]);
    let constraint = fields.get("output_config").map(|field| output_config(&field, &mut template_kwargs)).transpose()?;
    let tools = fields.get("tools").map_or(Ok(Vec::new()), |field| tools(&field))?;
    let (tool_choice, parallel) = match fields.get("tool_choice") {
        Some(field) => tool_choice(&field, &tools)?,
        None => (ToolChoice::Auto, true),
    };
    fields.ignore(&HINTS);
    let prompt = ChatPrompt {
        messages,
        add_generation_prompt: !continues,
        continue_final_message: continues,
        template_kwargs,
        reasoning_effort: None,
    };
    let chat = ChatRequest {
        model,
        prompt,
        generation: Generation::default(),
        logprobs: None,
        echo: false,
        tools,
        tool_choice,
        parallel_tool_calls: parallel,
        legacy_calls: false,
        constraint: constraint.flatten(),
        store: false,
    };
    Ok((chat, thinking))
}

fn thinking(field: &Field<'_>) -> Result<bool, ApiError> {
    let mut fields = field.object()?;
    let kind = fields.require("type")?.one_of(&["enabled", "adaptive", "between_tools", "disabled"])?;
    if kind == "enabled" {
        fields.require("budget_tokens")?.integer(1024..=i64::from(u32::MAX))?;
    } else {
        fields.ignore(&["budget_tokens"]);
    }
    fields.ignore(&["display"]);
    fields.finish()?;
    Ok(kind != "disabled")
}

fn output_config(field: &Field<'_>, template_kwargs: &mut Map<String, Value>) -> Result<Option<Constrained>, ApiError> {
    let mut fields = field.object()?;
    if let Some(effort) = fields.get("effort") {
        // For the templates that read it; the others leave it.
        let effort = effort.one_of(&["low", "medium", "high", "xhigh", "max"])?;
        template_kwargs.insert("reasoning_effort".into(), effort.into());
    }
    let format = match fields.get("format") {
        None => None,
        Some(format) => {
            let mut format = format.object()?;
            format.require("type")?.one_of(&["json_schema"])?;
            let schema = format.require("schema")?;
            schema.map()?;
            format.finish()?;
            let constraint = Constraint::JsonSchema { schema: schema.value.clone(), strict: false };
            Some(Constrained { constraint, param: schema.path.into_owned() })
        }
    };
    fields.finish()?;
    Ok(format)
}

fn tools(field: &Field<'_>) -> Result<Vec<Tool>, ApiError> {
    let one = |(i, value)| {
        let mut fields = field.item(i, value).object()?;
        if let Some(kind) = fields.get("type")
            && kind.string()? != "custom"
        {
            return Err(kind.unsupported("can only be 'custom' here: this server has no tools of its own."));
        }
        let named = fields.require("name")?;
        let name = named.short_string(MAX_NAME)?.to_owned();
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') {
            return Err(named.invalid("invalid_value", "a tool's name is made of letters, digits, '_' and '-'."));
        }
        let description = fields.string("description")?.map(str::to_owned);
        let param = fields.path("input_schema").into_owned();
        let parameters = Some(schema(&fields.require("input_schema")?)?);
        let strict = fields.bool_or("strict", false)?;
        fields.ignore(&["cache_control", "defer_loading", "eager_input_streaming", "input_examples", "allowed_callers"]);
        fields.finish()?;
        Ok(Tool { name, description, parameters, strict, param })
    };
    let tools: Vec<Tool> = field.array(MAX_TOOLS)?.iter().enumerate().map(one).collect::<Result<_, _>>()?;
    distinct(&tools, field)?;
    Ok(tools)
}

/// The choice, and whether several tools may be used in one answer.
fn tool_choice(field: &Field<'_>, tools: &[Tool]) -> Result<(ToolChoice, bool), ApiError> {
    let mut fields = field.object()?;
    let choice = match fields.require("type")?.one_of(&["auto", "any", "tool", "none"])? {
        "any" => ToolChoice::Required,
        "none" => ToolChoice::None,
        "tool" => {
            let name = fields.require("name")?;
            known(tools, name.string()?, &name)?;
            ToolChoice::Named(name.string()?.to_owned())
        }
        _ => ToolChoice::Auto,
    };
    let parallel = !fields.bool_or("disable_parallel_tool_use", false)?;
    fields.finish()?;
    if choice.is_forced() && tools.is_empty() {
        return Err(field.invalid("invalid_value", "asks for a tool to be used, but there are no 'tools'."));
    }
    Ok((choice, parallel))
}

fn metadata(fields: &mut Fields<'_>) -> Result<Option<String>, ApiError> {
    let Some(field) = fields.get("metadata") else { return Ok(None) };
    let mut fields = field.object()?;
    let user = fields.get("user_id").map(|id| id.short_string(512).map(str::to_owned)).transpose()?;
    fields.finish()?;
    Ok(user.filter(|user| !user.is_empty()))
}

fn stop_sequences(field: &Field<'_>) -> Result<Vec<String>, ApiError> {
    let one = |(i, value)| {
        let field = field.item(i, value);
        match field.string()? {
            "" => Err(field.invalid("string_below_min_length", "empty string. Expected at least 1 character.")),
            text => Ok(text.to_owned()),
        }
    };
    field.array(MAX_STOP)?.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests;
