//! The items that a model's answer becomes, and the events that tell of them as they come.

use crate::openai::chat_output::{ChatEvent, ChatFinish, ChatUsage, Delta};
use crate::openai::wire::{TokenLogprob, put_event};
use crate::responses::Ending;
use crate::responses::id::{ItemId, Side};
use bytes::BytesMut;
use serde::Serialize;
use serde_json::{Value, json};
use tidemill_engine::{TokenRecord, Tokenizer};
use uuid::Uuid;

/// Events as they go out: named, numbered, one after the other.
#[derive(Debug, Default)]
pub struct EventLog {
    /// What was written and not yet taken.
    pub bytes: BytesMut,
    /// Nobody reads events: none is written.
    pub off: bool,
    number: u64,
}

#[derive(Serialize)]
struct Event<'a, T> {
    r#type: &'a str,
    sequence_number: u64,
    #[serde(flatten)]
    fields: T,
}

impl EventLog {
    /// For an answer that is told at once.
    pub fn off() -> Self {
        Self { off: true, ..Self::default() }
    }

    /// Writes an event.
    pub fn put(&mut self, kind: &str, fields: impl Serialize) {
        if self.off {
            return;
        }
        put_event(&mut self.bytes, kind, &Event { r#type: kind, sequence_number: self.number, fields });
        self.number += 1;
    }
}

/// Where a piece belongs.
#[derive(Serialize)]
struct Place<'a> {
    item_id: &'a str,
    output_index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_index: Option<usize>,
}

#[derive(Serialize)]
struct Piece<'a> {
    #[serde(flatten)]
    place: Place<'a>,
    delta: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [Value]>,
}

/// The item that is being made.
enum Open {
    Reasoning(String),
    Message(String, Vec<Value>),
    Call { id: String, name: String, arguments: String },
}

impl Open {
    fn item_type(&self) -> &'static str {
        match self {
            Self::Reasoning(_) => "reasoning",
            Self::Message(..) => "message",
            Self::Call { .. } => "function_call",
        }
    }

    fn item(&self, id: &str, status: &str) -> Value {
        let started = status != "in_progress";
        match self {
            Self::Reasoning(text) => {
                let content = if started { json!([reasoning_part(text)]) } else { json!([]) };
                json!({"id": id, "type": "reasoning", "summary": [], "content": content, "encrypted_content": null, "status": status})
            }
            Self::Message(text, logprobs) => {
                let content = if started { json!([text_part(text, logprobs)]) } else { json!([]) };
                json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
            }
            Self::Call { id: call_id, name, arguments } => {
                json!({"id": id, "type": "function_call", "status": status, "arguments": arguments, "call_id": call_id, "name": name})
            }
        }
    }
}

fn reasoning_part(text: &str) -> Value {
    json!({"type": "reasoning_text", "text": text})
}

fn text_part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text})
}

/// By way of its text, which gives a number the fewest digits that name it: it is the same wherever it is written, and when it is read
/// back from the store.
fn value_of(logprob: &TokenLogprob) -> Value {
    serde_json::to_string(logprob).and_then(|text| serde_json::from_str(&text)).unwrap_or_default()
}

/// Gathers the items of one response.
pub struct Output {
    response: Uuid,
    tokenizer: Tokenizer,
    /// Log-probabilities with this many alternatives.
    logprobs: Option<u32>,
    items: Vec<Value>,
    open: Option<(String, Open)>,
    ending: Ending,
    usage: Option<ChatUsage>,
}

impl Output {
    /// Nothing yet.
    pub fn new(response: Uuid, tokenizer: Tokenizer, logprobs: Option<u32>) -> Self {
        Self { response, tokenizer, logprobs, items: Vec::new(), open: None, ending: Ending::Completed, usage: None }
    }

    /// Whether someone reads the tokens behind the text.
    pub fn has_logprobs(&self) -> bool {
        self.logprobs.is_some()
    }

    /// Adds an event of the answer; `true` when it was the last.
    pub fn take(&mut self, event: ChatEvent, log: &mut EventLog) -> bool {
        match event {
            ChatEvent::Prompt { .. } => {}
            ChatEvent::Delta { delta, records, .. } => self.delta(delta, &records, log),
            ChatEvent::Finished { reason, .. } => {
                if self.items.is_empty() && self.open.is_none() {
                    // An answer without a word is still a message.
                    self.begin(Open::Message(String::new(), Vec::new()), log);
                }
                if reason == ChatFinish::Length {
                    self.ending = Ending::Length;
                }
                self.close(if reason == ChatFinish::Length { "incomplete" } else { "completed" }, log);
            }
            ChatEvent::Done(usage) => {
                self.usage = Some(usage);
                return true;
            }
        }
        false
    }

    /// What there is when the answer is over: how it ended, its items and its counts. With `failure`, that is how.
    pub fn end(&mut self, failure: Option<String>, log: &mut EventLog) -> (Ending, Vec<Value>, Option<ChatUsage>) {
        if self.open.is_some() {
            self.close("incomplete", log);
        }
        let ending = match failure {
            Some(message) => Ending::Failed(message),
            None => self.ending.clone(),
        };
        (ending, std::mem::take(&mut self.items), self.usage)
    }

    fn delta(&mut self, delta: Delta, records: &[TokenRecord], log: &mut EventLog) {
        match delta {
            Delta::Reasoning(more) => {
                if !matches!(self.open, Some((_, Open::Reasoning(_)))) {
                    self.begin(Open::Reasoning(String::new()), log);
                }
                let output_index = self.items.len();
                let Some((item_id, Open::Reasoning(text))) = &mut self.open else { return };
                text.push_str(&more);
                let place = Place { item_id, output_index, content_index: Some(0) };
                log.put("response.reasoning_text.delta", Piece { place, delta: &more, logprobs: None });
            }
            Delta::Text(more) => {
                let made: Vec<Value> = match self.logprobs {
                    Some(top) => {
                        records.iter().map(|record| value_of(&TokenLogprob::new(&self.tokenizer, record, top))).collect()
                    }
                    None => Vec::new(),
                };
                if more.is_empty() && made.is_empty() {
                    return;
                }
                if !matches!(self.open, Some((_, Open::Message(..)))) {
                    self.begin(Open::Message(String::new(), Vec::new()), log);
                }
                let output_index = self.items.len();
                let Some((item_id, Open::Message(text, logprobs))) = &mut self.open else { return };
                text.push_str(&more);
                let place = Place { item_id, output_index, content_index: Some(0) };
                log.put("response.output_text.delta", Piece { place, delta: &more, logprobs: Some(&made) });
                logprobs.extend(made);
            }
            Delta::Call { id, name, .. } => self.begin(Open::Call { id, name, arguments: String::new() }, log),
            // A call's arguments come before whatever follows it.
            Delta::Arguments { text: more, .. } => {
                let output_index = self.items.len();
                let Some((item_id, Open::Call { arguments, .. })) = &mut self.open else { return };
                arguments.push_str(&more);
                let place = Place { item_id, output_index, content_index: None };
                log.put("response.function_call_arguments.delta", Piece { place, delta: &more, logprobs: None });
            }
        }
    }

    fn begin(&mut self, open: Open, log: &mut EventLog) {
        self.close("completed", log);
        let output_index = self.items.len();
        let id = ItemId { response: self.response, side: Side::Output, index: output_index }.shown(open.item_type());
        log.put("response.output_item.added", json!({"output_index": output_index, "item": open.item(&id, "in_progress")}));
        let part = match &open {
            Open::Reasoning(_) => Some(reasoning_part("")),
            Open::Message(..) => Some(text_part("", &[])),
            Open::Call { .. } => None,
        };
        if let Some(part) = part {
            let fields = json!({"item_id": id, "output_index": output_index, "content_index": 0, "part": part});
            log.put("response.content_part.added", fields);
        }
        self.open = Some((id, open));
    }

    fn close(&mut self, status: &str, log: &mut EventLog) {
        let Some((id, open)) = self.open.take() else { return };
        let item = open.item(&id, status);
        if !log.off {
            let output_index = self.items.len();
            let mut fields = json!({"item_id": id, "output_index": output_index, "content_index": 0});
            let with = |mut fields: Value, key: &str, value: Value| {
                fields[key] = value;
                fields
            };
            match &open {
                Open::Reasoning(text) => {
                    log.put("response.reasoning_text.done", with(fields.clone(), "text", text.as_str().into()));
                    log.put("response.content_part.done", with(fields, "part", reasoning_part(text)));
                }
                Open::Message(text, logprobs) => {
                    let done = with(with(fields.clone(), "text", text.as_str().into()), "logprobs", json!(logprobs));
                    log.put("response.output_text.done", done);
                    log.put("response.content_part.done", with(fields, "part", text_part(text, logprobs)));
                }
                Open::Call { name, arguments, .. } => {
                    if let Some(fields) = fields.as_object_mut() {
                        fields.remove("content_index");
                    }
                    let fields = with(fields, "name", name.as_str().into());
                    log.put("response.function_call_arguments.done", with(fields, "arguments", arguments.as_str().into()));
                }
            }
            log.put("response.output_item.done", json!({"output_index": output_index, "item": item}));
        }
        self.items.push(item);
    }
}
