//! `POST /v1/responses`: the request.

use crate::http::error::ApiError;
use crate::openai::chat::{ChatPrompt, REASONING_EFFORTS};
use crate::openai::fields::Fields;
use crate::openai::generation::{Generation, MAX_TOP_LOGPROBS};
use crate::openai::response_format::Constrained;
use crate::openai::tools::{Tool, ToolChoice};
use crate::responses::{id, item, tools};
use serde_json::{Map, Value};
use uuid::Uuid;

/// What an answer can hold beyond itself. Only the first exists here; the others belong to tools that this server does not have, or,
/// as encrypted reasoning, to models that hide theirs.
const INCLUDABLE: [&str; 8] = [
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];
const LOGPROBS: &str = "message.output_text.logprobs";
/// Least `max_output_tokens`, as OpenAI has it.
pub const MIN_OUTPUT: i64 = 16;

/// A request whose every field was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ResponseRequest {
    /// Which model.
    pub model: String,
    /// What is new, as items.
    pub input: Vec<Value>,
    /// Put before everything else, in this response only.
    pub instructions: Option<String>,
    /// The response that this one goes on from.
    pub previous: Option<Uuid>,
    /// Sampling, stopping, the caller.
    pub generation: Generation,
    /// `Some(n)`: report log-probabilities with the n likeliest tokens.
    pub logprobs: Option<u32>,
    /// For templates that read it.
    pub reasoning_effort: Option<String>,
    /// More variables for the template.
    pub template_kwargs: Map<String, Value>,
    /// What the model may call.
    pub tools: Vec<Tool>,
    /// Whether it may or must, and what.
    pub tool_choice: ToolChoice,
    /// Several calls in one answer.
    pub parallel_tool_calls: bool,
    /// What the text must look like.
    pub constraint: Option<Constrained>,
    /// Leave out the beginning of a conversation that has grown too long.
    pub truncate: bool,
    /// Keep the response, if the request says so.
    pub store: Option<bool>,
    /// Answer at once and work afterwards.
    pub background: bool,
    /// What the response repeats of the request.
    pub echo: Map<String, Value>,
}

impl ResponseRequest {
    /// Checks the body.
    pub fn parse(body: &Value) -> Result<Self, ApiError> {
        let mut fields = Fields::root(body)?;
        let model = fields.require("model")?.string()?.to_owned();
        let mut echo = Map::new();
        let previous = previous(&mut fields)?;
        let input = match fields.get("input") {
            Some(input) => item::parse(&input)?,
            None if previous.is_some() => Vec::new(),
            None => return Err(fields.require("input").err().unwrap_or_else(|| ApiError::fault("input was there"))),
        };
        let instructions = fields.string("instructions")?.map(str::to_owned);
        elsewhere(&mut fields)?;
        let stream = fields.bool_or("stream", false)?;
        stream_options(&mut fields, stream)?;
        let background = fields.bool_or("background", false)?;
        let store = fields.get("store").map(|store| store.bool()).transpose()?;
        if background && store == Some(false) {
            let message =
                "Invalid 'background': only a response that is stored can be made in the background; leave out 'store'.";
            return Err(ApiError::invalid("background", "invalid_value", message));
        }
        if background && stream {
            let message = "Unsupported parameter: 'stream' is not supported together with 'background': fetch the response until it has ended.";
            return Err(ApiError::unsupported("stream", message));
        }
        let mut generation = Generation::sampled(&mut fields)?;
        if generation.about.compare {
            let message = "Invalid 'tidemill.compare': a response is one answer, and there is nothing to compare it with.";
            return Err(ApiError::invalid("tidemill.compare", "invalid_value", message));
        }
        generation.stream = stream;
        generation.max_tokens = fields
            .integer("max_output_tokens", MIN_OUTPUT..=i64::from(u32::MAX))?
            .and_then(|tokens| usize::try_from(tokens).ok());
        // Counts calls of OpenAI's own tools, of which there are none; functions are called by the client.
        fields.integer("max_tool_calls", 1..=i64::from(u32::MAX))?;
        let included = include(&mut fields)?;
        let top = fields.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?.and_then(|top| u32::try_from(top).ok());
        let logprobs = if included { Some(top.unwrap_or(0)) } else { top.filter(|top| *top > 0) };
        let reasoning_effort = reasoning(&mut fields)?;
        let (constraint, text) = tools::text(&mut fields)?;
        let (tools, tool_choice, parallel_tool_calls) = tools::parse(&mut fields)?;
        let truncate = match fields.get("truncation") {
            None => false,
            Some(field) => field.one_of(&["auto", "disabled"])? == "auto",
        };
        let template_kwargs = ChatPrompt::template_kwargs(&mut fields)?;
        fields.finish()?;
        for key in [
            "instructions",
            "max_output_tokens",
            "max_tool_calls",
            "metadata",
            "parallel_tool_calls",
            "previous_response_id",
            "prompt_cache_key",
            "prompt_cache_retention",
            "reasoning",
            "safety_identifier",
            "tool_choice",
            "tools",
            "truncation",
            "user",
        ] {
            if let Some(value) = body.get(key).filter(|value| !value.is_null()) {
                echo.insert(key.into(), value.clone());
            }
        }
        echo.insert("background".into(), background.into());
        echo.insert("text".into(), text);
        echo.insert("top_logprobs".into(), top.unwrap_or(0).into());
        Ok(Self {
            model,
            input,
            instructions,
            previous,
            generation,
            logprobs,
            reasoning_effort,
            template_kwargs,
            tools,
            tool_choice,
            parallel_tool_calls,
            constraint,
            truncate,
            store,
            background,
            echo,
        })
    }
}

fn previous(fields: &mut Fields<'_>) -> Result<Option<Uuid>, ApiError> {
    let Some(field) = fields.get("previous_response_id") else { return Ok(None) };
    let text = field.string()?;
    let not_ours = || field.invalid("invalid_value", format!("expected an id that begins with '{}'.", id::PREFIX));
    let rest = text.strip_prefix(id::PREFIX).ok_or_else(not_ours)?;
    // Well formed or not, an id that is not ours names nothing here.
    Ok(Some(Uuid::try_parse(rest).unwrap_or_default()))
}

/// What OpenAI keeps or does for its clients, and this server does not.
fn elsewhere(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    for (key, why) in [
        ("conversation", "is not supported: go on from a response with 'previous_response_id'."),
        ("prompt", "is not supported: this server keeps no prompts; send 'instructions' and 'input'."),
        ("context_management", "is not supported: 'truncation' is the way to stay within the context here."),
        ("moderation", "is not supported: this server serves no moderation model."),
        ("access_programs", "is not supported here."),
        ("background_options", "is not supported: work in the background begins as soon as it can."),
        ("image", "is not supported: no model here can read images."),
    ] {
        fields.refuse(key, why)?;
    }
    Ok(())
}

fn stream_options(fields: &mut Fields<'_>, stream: bool) -> Result<(), ApiError> {
    let Some(options) = fields.get("stream_options") else { return Ok(()) };
    if !stream {
        return Err(options.invalid("invalid_value", "only allowed when 'stream' is true."));
    }
    let mut options = options.object()?;
    // Padding against traffic analysis, which OpenAI's edge adds; there is nothing to turn off here.
    options.bool_or("include_obfuscation", false)?;
    options.finish()
}

/// Whether log-probabilities are wanted.
fn include(fields: &mut Fields<'_>) -> Result<bool, ApiError> {
    let Some(field) = fields.get("include") else { return Ok(false) };
    let mut logprobs = false;
    for (index, value) in field.array(INCLUDABLE.len() * 4)?.iter().enumerate() {
        logprobs |= field.item(index, value).one_of(&INCLUDABLE)? == LOGPROBS;
    }
    Ok(logprobs)
}

fn reasoning(fields: &mut Fields<'_>) -> Result<Option<String>, ApiError> {
    let Some(field) = fields.get("reasoning") else { return Ok(None) };
    let mut fields = field.object()?;
    let effort = fields.get("effort").map(|effort| effort.one_of(REASONING_EFFORTS)).transpose()?;
    // Reasoning is shown whole, as the model wrote it: nobody writes summaries here, whichever kind is preferred.
    for key in ["summary", "generate_summary"] {
        if let Some(summary) = fields.get(key) {
            summary.one_of(&["auto", "concise", "detailed"])?;
        }
    }
    fields.refuse("context", "is not supported: the model's template says what earlier reasoning it sees.")?;
    fields.refuse("mode", "is not supported here.")?;
    fields.finish()?;
    Ok(effort.map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(extra: Value) -> Result<ResponseRequest, ApiError> {
        let mut body = json!({"model": "m", "input": "hi"});
        if let (Some(body), Value::Object(extra)) = (body.as_object_mut(), extra) {
            body.extend(extra);
        }
        ResponseRequest::parse(&body)
    }

    #[test]
    fn what_is_asked_is_read_and_repeated() {
        let id = Uuid::now_v7();
        let asked = parse(json!({
            "previous_response_id": id::shown(id), "instructions": "be brief", "max_output_tokens": 16, "metadata": {"a": "b"},
            "include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "top_logprobs": 3, "user": "u", "store": false,
            "reasoning": {"effort": "low", "summary": "auto"}, "text": {"verbosity": "low"}, "truncation": "auto", "tools": [],
            "stream": true, "stream_options": {"include_obfuscation": false}, "prompt_cache_key": "k", "max_tool_calls": 2,
        }))
        .unwrap();
        assert_eq!((asked.previous, asked.instructions.as_deref(), asked.store), (Some(id), Some("be brief"), Some(false)));
        assert_eq!((asked.generation.max_tokens, asked.logprobs, asked.truncate), (Some(16), Some(3), true));
        assert_eq!((asked.reasoning_effort.as_deref(), asked.generation.stream), (Some("low"), true));
        assert_eq!(asked.echo["reasoning"], json!({"effort": "low", "summary": "auto"}));
        assert_eq!(asked.echo["text"], json!({"format": {"type": "text"}, "verbosity": "low"}));
        assert_eq!((&asked.echo["metadata"], &asked.echo["prompt_cache_key"]), (&json!({"a": "b"}), &json!("k")));
        assert_eq!(parse(json!({"top_logprobs": 0})).unwrap().logprobs, None);
        assert_eq!(parse(json!({"top_logprobs": 2})).unwrap().logprobs, Some(2));
    }

    #[test]
    fn each_rejection_names_its_field() {
        for (extra, param, code) in [
            (json!({"input": null}), "input", "missing_required_parameter"),
            (json!({"model": null}), "model", "missing_required_parameter"),
            (json!({"previous_response_id": "msg_1"}), "previous_response_id", "invalid_value"),
            (json!({"max_output_tokens": 15}), "max_output_tokens", "integer_below_min_value"),
            (json!({"max_tokens": 20}), "max_tokens", "unknown_parameter"),
            (json!({"messages": []}), "messages", "unknown_parameter"),
            (json!({"n": 2}), "n", "unknown_parameter"),
            (json!({"include": ["everything"]}), "include.0", "invalid_value"),
            (json!({"top_logprobs": 21}), "top_logprobs", "integer_above_max_value"),
            (json!({"truncation": "some"}), "truncation", "invalid_value"),
            (json!({"reasoning": {"effort": "huge"}}), "reasoning.effort", "invalid_value"),
            (json!({"reasoning": {"depth": 1}}), "reasoning.depth", "unknown_parameter"),
            (json!({"conversation": "conv_1"}), "conversation", "unsupported_parameter"),
            (json!({"prompt": {"id": "p"}}), "prompt", "unsupported_parameter"),
            (json!({"background": true, "store": false}), "background", "invalid_value"),
            (json!({"background": true, "stream": true}), "stream", "unsupported_parameter"),
            (json!({"stream_options": {}}), "stream_options", "invalid_value"),
            (
                json!({"stream": true, "stream_options": {"include_usage": true}}),
                "stream_options.include_usage",
                "unknown_parameter",
            ),
            (json!({"tidemill": {"compare": true}}), "tidemill.compare", "invalid_value"),
            (json!({"temperature": 3}), "temperature", "decimal_above_max_value"),
            (json!({"metadata": {"a": 1}}), "metadata.a", "invalid_type"),
            (json!({"colour": 1}), "colour", "unknown_parameter"),
        ] {
            let error = parse(extra.clone()).unwrap_err();
            assert_eq!((error.param.as_deref(), error.code.as_deref()), (Some(param), Some(code)), "{extra}");
        }
    }
}
