//! `POST /v1/chat/completions`: the request.

use crate::http::error::ApiError;
use crate::openai::fields::{Field, Fields};
use crate::openai::generation::{Generation, MAX_TOP_LOGPROBS, count};
use crate::openai::messages;
use crate::openai::response_format::{self, Constrained};
use crate::openai::tools::{self, Tool, ToolChoice, ToolUse};
use serde_json::{Map, Value};

/// How much a model may think, as the API says it.
pub const REASONING_EFFORTS: &[&str] = &["none", "minimal", "low", "medium", "high", "xhigh"];

/// A chat request whose every field was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// Which model.
    pub model: String,
    /// How the prompt is made.
    pub prompt: ChatPrompt,
    /// Sampling, stopping, reporting.
    pub generation: Generation,
    /// `Some(n)`: report log-probabilities with the n likeliest tokens.
    pub logprobs: Option<u32>,
    /// Start the answer with the last message's text when that message is the assistant's.
    pub echo: bool,
    /// Keep the answer, to be read again under its id.
    pub store: bool,
    /// What the model may call.
    pub tools: Vec<Tool>,
    /// Whether it may or must, and what.
    pub tool_choice: ToolChoice,
    /// Several calls in one answer.
    pub parallel_tool_calls: bool,
    /// Calls are answered as the older `function_call`.
    pub legacy_calls: bool,
    /// What the answer must look like.
    pub constraint: Option<Constrained>,
}

/// The part of a chat request that makes its prompt; `/tokenize` takes the same.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatPrompt {
    /// As chat templates read them.
    pub messages: Vec<Value>,
    /// End with the header of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Leave the last message open.
    pub continue_final_message: bool,
    /// More variables for the template.
    pub template_kwargs: Map<String, Value>,
    /// `reasoning_effort`, for templates that read it.
    pub reasoning_effort: Option<String>,
}

impl ChatRequest {
    /// Checks the body.
    pub fn parse(body: &Value) -> Result<Self, ApiError> {
        let mut fields = Fields::root(body)?;
        let prompt = ChatPrompt::parse(&mut fields)?;
        let model = fields.require("model")?.string()?.to_owned();
        let mut generation = Generation::parse(&mut fields)?;
        // The newer name goes first; with both, OpenAI's clients mean the newer.
        let newer = count(&mut fields, "max_completion_tokens", 1..=i64::from(u32::MAX))?;
        let older = count(&mut fields, "max_tokens", 1..=i64::from(u32::MAX))?;
        generation.max_tokens = newer.or(older);
        generation.about.check_choices(generation.n)?;
        let logprobs = logprobs(&mut fields)?;
        let echo = fields.bool_or("echo", false)?;
        let store = fields.bool_or("store", false)?;
        let constraint = response_format::parse(&mut fields)?;
        text_only(&mut fields)?;
        let ToolUse { tools, choice: tool_choice, parallel: parallel_tool_calls, legacy: legacy_calls } =
            tools::parse(&mut fields)?;
        if let Some(field) = fields.get("verbosity") {
            field.one_of(&["low", "medium", "high"])?;
        }
        fields.ignore(&["prediction"]);
        fields.finish()?;
        Ok(Self {
            model,
            prompt,
            generation,
            logprobs,
            echo,
            store,
            tools,
            tool_choice,
            parallel_tool_calls,
            legacy_calls,
            constraint,
        })
    }

    /// The tools that the model is told of: those that it may call. A named one is not told of alone, so that the prompt of a
    /// conversation stays the same when one turn names its tool.
    pub fn offered_tools(&self) -> Vec<&Tool> {
        let offered = |tool: &&Tool| match &self.tool_choice {
            ToolChoice::Named(_) => true,
            choice => choice.allows(&tool.name),
        };
        self.tools.iter().filter(offered).collect()
    }

    /// With `echo`: what the answer starts with.
    pub fn echoed_text(&self) -> Option<&str> {
        let last = self.prompt.messages.last()?;
        if !self.echo || last.get("role")?.as_str()? != "assistant" {
            return None;
        }
        last.get("content")?.as_str().filter(|text| !text.is_empty())
    }
}

impl ChatPrompt {
    /// Reads the fields that make the prompt.
    pub fn parse(fields: &mut Fields<'_>) -> Result<Self, ApiError> {
        let messages = messages::parse(&fields.require("messages")?)?;
        let continue_final_message = fields.bool_or("continue_final_message", false)?;
        let add_generation_prompt = fields.bool_or("add_generation_prompt", !continue_final_message)?;
        if continue_final_message && add_generation_prompt {
            return Err(ApiError::invalid(
                "continue_final_message",
                "invalid_value",
                "Invalid 'continue_final_message': cannot be true together with 'add_generation_prompt'.",
            ));
        }
        let template_kwargs = Self::template_kwargs(fields)?;
        let reasoning_effort = match fields.get("reasoning_effort") {
            None => None,
            Some(field) => Some(field.one_of(REASONING_EFFORTS)?.to_owned()),
        };
        Ok(Self { messages, add_generation_prompt, continue_final_message, template_kwargs, reasoning_effort })
    }

    /// `chat_template_kwargs`.
    pub fn template_kwargs(fields: &mut Fields<'_>) -> Result<Map<String, Value>, ApiError> {
        fields.get("chat_template_kwargs").map_or(Ok(Map::new()), |kwargs| template_kwargs(&kwargs))
    }
}

/// What the template gets from the request's own fields cannot be replaced by a variable of the same name.
fn template_kwargs(field: &Field<'_>) -> Result<Map<String, Value>, ApiError> {
    const OWN: [&str; 5] = ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"];
    let map = field.map()?;
    if let Some((key, value)) = map.iter().find(|(key, _)| OWN.contains(&key.as_str())) {
        return Err(field.entry(key, value).invalid("invalid_value", "has a field of its own in the request."));
    }
    Ok(map.clone())
}

fn logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool_or("logprobs", false)?;
    match fields.get("top_logprobs") {
        None => Ok(wanted.then_some(0)),
        Some(field) => {
            let top = field.integer(0..=MAX_TOP_LOGPROBS)?;
            if !wanted {
                return Err(field.invalid("invalid_value", "only allowed when 'logprobs' is true."));
            }
            Ok(u32::try_from(top).ok())
        }
    }
}

fn text_only(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    if let Some(field) = fields.get("modalities") {
        for (i, value) in field.array(8)?.iter().enumerate() {
            let item = field.item(i, value);
            if item.one_of(&["text", "audio"])? == "audio" {
                return Err(ApiError::unsupported(
                    "modalities",
                    "Unsupported parameter: 'modalities' can only hold 'text' here.",
                ));
            }
        }
    }
    fields.refuse("audio", "is not supported: this server answers with text only.")?;
    fields.refuse("moderation", "is not supported: this server serves no moderation model.")?;
    fields.refuse("web_search_options", "is not supported: this server does not search the web.")?;
    Ok(())
}
