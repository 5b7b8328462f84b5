//! What a chat answer is made of: the engine's text, split into reasoning, content and tool calls.
//!
//! Every endpoint that converses (chat, responses, messages) writes these same events in its own form.

use crate::http::deadline;
use crate::http::error::ApiError;
use crate::openai::collected::{cancelled, is_end_marker};
use crate::openai::messages::arguments;
pub use crate::openai::parse::OutputFormat;
use crate::openai::parse::Parser;
use crate::upstream::Events;
use serde_json::{Map, Value, json};
use tidemill_engine::{Event, FinishReason, StopCause, TokenRecord, Usage};

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// More of the model's reasoning.
    Reasoning(String),
    /// More content.
    Text(String),
    /// A tool call begins.
    Call {
        /// Which of the choice's calls, from 0.
        index: usize,
        /// Its id, `call_…`.
        id: String,
        /// The function's name, whole.
        name: String,
    },
    /// More of a call's arguments, which are JSON text.
    Arguments {
        /// Which call.
        index: usize,
        /// What is added.
        text: String,
    },
}

/// Why a choice ended, as the API says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatFinish {
    /// By itself, or at a stop string or token.
    Stop,
    /// At a limit.
    Length,
    /// To have tools called.
    ToolCalls,
}

impl ChatFinish {
    /// OpenAI's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// Counts of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChatUsage {
    /// The engine's counts.
    pub tokens: Usage,
    /// Of the generated tokens, those of reasoning.
    pub reasoning_tokens: usize,
}

/// What happens to a chat answer.
#[derive(Clone, Debug, PartialEq)]
pub enum ChatEvent {
    /// The prompt is computed.
    Prompt {
        /// Of its tokens, those found in the prefix cache.
        cached_tokens: usize,
        /// Log-probabilities of its tokens when asked for.
        logprobs: Option<Vec<Option<TokenRecord>>>,
    },
    /// A choice goes on.
    Delta {
        /// Which choice.
        choice: usize,
        /// With what.
        delta: Delta,
        /// The tokens that became certain with it, when they are kept.
        records: Vec<TokenRecord>,
        /// Before them, tokens that only were marks, such as `<tool_call>`.
        marks: Vec<u32>,
    },
    /// A choice ended.
    Finished {
        /// Which choice.
        choice: usize,
        /// Why.
        reason: ChatFinish,
        /// What stopped it.
        stop: Option<StopCause>,
        /// Tokens since the last delta that only were marks, when tokens are kept.
        marks: Vec<u32>,
        /// The token that only ended it, when tokens are kept.
        end_marker: Option<u32>,
    },
    /// The answer is complete.
    Done(ChatUsage),
}

/// Turns the engine's events for one conversation into those of its answer.
#[derive(Debug)]
pub struct ChatOutput {
    choices: Vec<Parser>,
    keep_records: bool,
    deltas: Vec<Delta>,
}

impl ChatOutput {
    /// For an answer of `n` choices; tokens are kept only where someone reports them.
    pub fn new(format: OutputFormat, n: usize, keep_records: bool) -> Self {
        let choices = (0..n).map(|choice| Parser::new(&format, choice)).collect();
        Self { choices, keep_records, deltas: Vec::new() }
    }

    /// Calls `sink` with what `event` makes. The error becomes the answer's end.
    pub fn push(&mut self, event: Event, sink: &mut impl FnMut(ChatEvent)) -> Result<(), ApiError> {
        match event {
            Event::Prompt { cached_tokens, logprobs } => sink(ChatEvent::Prompt { cached_tokens, logprobs }),
            Event::Token { choice, record, text } => {
                let Some(parser) = self.choices.get_mut(choice) else { return Ok(()) };
                parser.token(record, self.keep_records, &text, &mut self.deltas);
                self.emit(choice, sink);
            }
            Event::Finished { reason: FinishReason::Cancelled, .. } => return Err(cancelled()),
            Event::Finished { choice, reason, stop, text, .. } => {
                let Some(parser) = self.choices.get_mut(choice) else { return Ok(()) };
                let end_marker = parser.take_end_marker(|token| is_end_marker(stop.as_ref(), token));
                parser.end(&text, &mut self.deltas);
                let reason = match reason {
                    FinishReason::Length => ChatFinish::Length,
                    _ if parser.called() => ChatFinish::ToolCalls,
                    _ => ChatFinish::Stop,
                };
                self.emit(choice, sink);
                let marks = self.choices.get_mut(choice).map(|parser| parser.take_tokens().1).unwrap_or_default();
                sink(ChatEvent::Finished { choice, reason, stop, marks, end_marker });
            }
            Event::Done(tokens) => {
                let reasoning_tokens = self.choices.iter().map(Parser::reasoning_tokens).sum();
                sink(ChatEvent::Done(ChatUsage { tokens, reasoning_tokens }));
            }
            Event::Failed(message) => return Err(ApiError::fault(message)),
            Event::Expired => return Err(deadline::expired()),
        }
        Ok(())
    }

    /// Passes the deltas on; the first takes all tokens that waited for their text.
    fn emit(&mut self, choice: usize, sink: &mut impl FnMut(ChatEvent)) {
        for delta in self.deltas.drain(..) {
            let (records, marks) = self.choices.get_mut(choice).map(Parser::take_tokens).unwrap_or_default();
            sink(ChatEvent::Delta { choice, delta, records, marks });
        }
    }
}

/// A call that a model wants made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCall {
    /// `call_…`
    pub id: String,
    /// The function.
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// One whole choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatChoice {
    /// Content.
    pub text: String,
    /// Reasoning.
    pub reasoning: String,
    /// Calls, in order.
    pub calls: Vec<ToolCall>,
    /// The tokens that the content is made of, when they are kept.
    pub records: Vec<TokenRecord>,
    /// All tokens, those of reasoning, calls and marks too, when they are kept.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish: Option<ChatFinish>,
    /// What stopped it.
    pub stop: Option<StopCause>,
}

impl ChatChoice {
    /// The whole text of a choice taken apart.
    pub fn read(format: &OutputFormat, text: &str) -> Self {
        let (mut choice, mut deltas) = (Self::default(), Vec::new());
        Parser::new(format, 0).end(text, &mut deltas);
        deltas.into_iter().for_each(|delta| choice.add(delta));
        choice
    }

    /// An assistant's message as chat templates read it, of an answer that is more than its content: fixed by the text alone, so that the
    /// ids of calls are their places.
    pub fn structured(&self) -> Option<Value> {
        if self.calls.is_empty() && self.reasoning.is_empty() {
            return None;
        }
        let mut message = Map::new();
        message.insert("content".into(), self.text.as_str().into());
        if !self.reasoning.is_empty() {
            message.insert("reasoning_content".into(), self.reasoning.as_str().into());
        }
        if !self.calls.is_empty() {
            let call = |(at, call): (usize, &ToolCall)| {
                let function = json!({"name": call.name, "arguments": arguments(&call.arguments)});
                json!({"id": format!("call_{at}"), "type": "function", "function": function})
            };
            message.insert("tool_calls".into(), self.calls.iter().enumerate().map(call).collect());
        }
        Some(Value::Object(message))
    }

    /// Goes on with a delta.
    pub fn add(&mut self, delta: Delta) {
        match delta {
            Delta::Text(text) => self.text.push_str(&text),
            Delta::Reasoning(text) => self.reasoning.push_str(&text),
            Delta::Call { id, name, .. } => self.calls.push(ToolCall { id, name, arguments: String::new() }),
            Delta::Arguments { index, text } => {
                if let Some(call) = self.calls.get_mut(index) {
                    call.arguments.push_str(&text);
                }
            }
        }
    }
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatCollected {
    /// In order.
    pub choices: Vec<ChatChoice>,
    /// Counts.
    pub usage: ChatUsage,
    /// Of the prompt, when asked for.
    pub prompt_logprobs: Option<Vec<Option<TokenRecord>>>,
}

impl ChatCollected {
    /// Waits for the whole answer.
    pub async fn of(mut events: Events, format: OutputFormat, n: usize, keep_records: bool) -> Result<Self, ApiError> {
        let mut output = ChatOutput::new(format, n, keep_records);
        let mut collected = Self::empty(n);
        let mut done = false;
        while let Some((_, event)) = events.next().await {
            output.push(event, &mut |event| done |= collected.take(event))?;
            if done {
                return Ok(collected);
            }
        }
        Err(ApiError::fault("The engine stopped before the answer was complete."))
    }

    /// Nothing yet, for `n` choices.
    pub fn empty(n: usize) -> Self {
        Self { choices: vec![ChatChoice::default(); n], ..Self::default() }
    }

    /// Adds an event; `true` when it was the last.
    pub fn take(&mut self, event: ChatEvent) -> bool {
        match event {
            ChatEvent::Prompt { logprobs, .. } => self.prompt_logprobs = logprobs,
            ChatEvent::Delta { choice, delta, records, marks } => {
                let Some(choice) = self.choices.get_mut(choice) else { return false };
                choice.token_ids.extend(marks);
                choice.token_ids.extend(records.iter().map(|record| record.token));
                if matches!(delta, Delta::Text(_)) {
                    choice.records.extend(records);
                }
                choice.add(delta);
            }
            ChatEvent::Finished { choice, reason, stop, marks, end_marker } => {
                if let Some(choice) = self.choices.get_mut(choice) {
                    choice.token_ids.extend(marks);
                    choice.token_ids.extend(end_marker);
                    (choice.finish, choice.stop) = (Some(reason), stop);
                }
            }
            ChatEvent::Done(usage) => {
                self.usage = usage;
                return true;
            }
        }
        false
    }
}
