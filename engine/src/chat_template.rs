//! Conversations to prompts, with the Jinja template that the model's publisher ships.
//!
//! Templates are written for `transformers`, which renders them with Jinja2 (`trim_blocks`, `lstrip_blocks`, loop controls) and a
//! few names of its own. Here minijinja renders them, set up to give the same text.

mod clock;
mod python;

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde_json::{Map, Value};

/// Instructions a template may run for one conversation: seconds of work, thousands of messages.
const FUEL: u64 = 10_000_000;
const DEFAULT: &str = "chat_template";
const WITH_TOOLS: &str = "tool_use";

/// What a template is given.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChatInput<'a> {
    /// The conversation: an array of objects with `role` and `content`.
    pub messages: &'a [Value],
    /// Tool descriptions, as in the API.
    pub tools: Option<&'a [Value]>,
    /// Documents for templates that quote sources.
    pub documents: Option<&'a [Value]>,
    /// End with the header of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Leave the last message open, so that the model goes on with it.
    pub continue_final_message: bool,
    /// More variables (`chat_template_kwargs`).
    pub variables: Option<&'a Map<String, Value>>,
    /// Seconds since 1970 for `strftime_now`; `None` asks the clock.
    pub now: Option<u64>,
}

/// Why a conversation could not be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template called `raise_exception`: the text is the publisher's, and meant for the client.
    #[error("{0}")]
    Raised(String),
    /// The template does not fit the conversation, runs too long, or uses something unknown.
    #[error("the model's chat template failed: {0}")]
    Failed(String),
    /// `continue_final_message` cannot be done.
    #[error("continue_final_message: {0}")]
    Continue(String),
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    tool_source: Option<String>,
    variables: Map<String, Value>,
}

/// What `raise_exception` was called with, on its way through the template engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Compiles `source`, and `tool_use` for conversations with tools where the publisher ships two. `variables` are the names of
    /// special tokens (`bos_token`, …). The error says what is wrong with the template.
    pub fn new(source: &str, tool_use: Option<&str>, variables: Map<String, Value>) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|error| error.to_string())?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(python::write);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", python::to_json);
        environment.add_filter("string", |value: &minijinja::Value| python::to_text(value));
        // Whatever has a length and items, as in Python: texts and mappings too.
        environment.add_test("sequence", |value: &minijinja::Value| {
            matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
        });
        environment.add_function("raise_exception", |text: String| -> Result<minijinja::Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, "the template raised").with_source(Raised(text)))
        });
        let templates = [(DEFAULT, Some(source)), (WITH_TOOLS, tool_use)];
        for (name, source) in templates.into_iter().filter_map(|(name, source)| Some((name, source?))) {
            environment.add_template_owned(name, without_generation_tags(source)).map_err(|error| describe(&error))?;
        }
        Ok(Self { environment, source: source.to_owned(), tool_source: tool_use.map(str::to_owned), variables })
    }

    /// The template's text, as published.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of the template for conversations with tools, as published; `None` where no template knows of tools.
    pub fn tool_source(&self) -> Option<&str> {
        self.tool_source.as_deref().or_else(|| Some(self.source.as_str()).filter(|source| source.contains("tools")))
    }

    /// Renders a conversation to the text of a prompt, which is tokenised without adding special tokens.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, TemplateError> {
        if input.continue_final_message && input.add_generation_prompt {
            let detail = "cannot be combined with add_generation_prompt, which begins a new message; set one of them to false";
            return Err(TemplateError::Continue(detail.to_owned()));
        }
        let name = if input.tools.is_some() && self.tool_source.is_some() { WITH_TOOLS } else { DEFAULT };
        let template = self.environment.get_template(name).map_err(|error| failure(&error))?;
        let rendered = template.render(self.context(input)).map_err(|error| failure(&error))?;
        if input.continue_final_message { cut_after_last_message(rendered, input.messages) } else { Ok(rendered) }
    }

    fn context(&self, input: &ChatInput<'_>) -> minijinja::Value {
        let now = input.now.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()));
        let strftime_now = minijinja::Value::from_function(move |format: String| clock::format(&format, now));
        // A later entry replaces an earlier one: what we set cannot be replaced by the request.
        let tokens = self.variables.iter().chain(input.variables.into_iter().flatten());
        let mut context: Vec<(String, minijinja::Value)> =
            tokens.map(|(name, value)| (name.clone(), minijinja::Value::from(Serde(value)))).collect();
        context.push(("strftime_now".to_owned(), strftime_now));
        context.push(("messages".to_owned(), minijinja::Value::from(Serde(input.messages))));
        context.push(("tools".to_owned(), minijinja::Value::from(Serde(input.tools))));
        context.push(("documents".to_owned(), minijinja::Value::from(Serde(input.documents))));
        context.push(("add_generation_prompt".to_owned(), input.add_generation_prompt.into()));
        minijinja::Value::from_pairs(context)
    }
}

/// `{% generation %}` marks the assistant's words for training masks; for a prompt its content is all that matters.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        text.push_str(before);
        // From behind the opening, so that `{%}` does not close itself.
        let Some(end) = tag[2..].find("%}").map(|end| end + 4) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        let inner = &tag[2..tag.len() - 2];
        match inner.trim_matches(['-', '+']).trim() {
            "generation" => text.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => text.push_str(&tag.replace("endgeneration", "endif")),
            _ => text.push_str(tag),
        }
        rest = after;
    }
    text.push_str(rest);
    text
}

/// Cuts what the template writes after the last message, as transformers does: the content is found from the end; trailing white
/// space of it that the template trimmed stays away.
fn cut_after_last_message(mut rendered: String, messages: &[Value]) -> Result<String, TemplateError> {
    let content = messages.last().and_then(|message| message.get("content"));
    let text = match content {
        Some(Value::String(text)) => Some(text.as_str()),
        Some(Value::Array(parts)) => parts.iter().rev().find_map(|part| part.get("text")?.as_str()),
        _ => None,
    };
    let text = text.ok_or_else(|| TemplateError::Continue("the last message has no text to go on with".to_owned()))?;
    let start = rendered.rfind(text.trim()).ok_or_else(|| {
        TemplateError::Continue(
            "the model's chat template does not write the last message as it is, so it cannot be continued".to_owned(),
        )
    })?;
    let whole = rendered[start..].starts_with(text.trim_start());
    let kept = if whole { text.trim_start() } else { text.trim() };
    rendered.truncate(start + kept.len());
    Ok(rendered)
}

fn failure(error: &minijinja::Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(text)) = current.downcast_ref() {
            return TemplateError::Raised(text.clone());
        }
        cause = current.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::Failed("it runs too long on this conversation; shorten the conversation".to_owned());
    }
    TemplateError::Failed(describe(error))
}

/// One line: kind, detail and line.
fn describe(error: &minijinja::Error) -> String {
    let line = error.line().map_or_else(String::new, |line| format!(" (line {line} of the template)"));
    match error.detail() {
        Some(detail) => format!("{}: {detail}{line}", error.kind()),
        None => format!("{}{line}", error.kind()),
    }
}

#[cfg(test)]
mod tests;
