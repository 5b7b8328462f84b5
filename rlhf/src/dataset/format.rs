//! One row as a line of JSON: TRL and Hugging Face, OpenAI fine-tuning, and our own columns.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::query::RowKind;
use super::stored::{self, StoredRow};
use super::{Example, Message, Origin, Row};
use crate::quality::{Keep, Split};

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// TRL and Hugging Face: `{prompt, chosen, rejected}`, `{prompt, completion, label}`, `{prompt, completion}`, all conversational,
    /// with `tools` where a conversation has them.
    #[default]
    Trl,
    /// OpenAI fine-tuning: `{messages}`, and `{input, preferred_output, non_preferred_output}`. It has no form for thumbs, and no keys
    /// but its own. Of a conversation it would learn every answer, so those that are context have weight 0.
    Openai,
    /// Every column, lineage included: what `tidemill dataset import` takes back without loss.
    Tidemill,
}

/// A line that is no row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BadLine {
    /// Counted from 1; of a table, the row.
    pub line: u64,
    /// What is wrong.
    pub what: String,
    /// What to do about it.
    pub fix: String,
}

/// What is wrong with a line, and what to do about it.
type Wrong = (String, &'static str);

const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool"];

/// A row in a form; none when the form has no place for it.
pub fn line(stored: &StoredRow, format: Format) -> Option<Map<String, Value>> {
    let example = &stored.row.example;
    let said = |answer: &[Message]| -> Vec<Message> { answer.iter().map(Message::structured).collect() };
    let value = match format {
        Format::Tidemill => return Some(stored::to_object(stored)),
        Format::Trl => {
            let (prompt, carried) = lift(example.prompt());
            let mut line = match example {
                Example::Preference { chosen, rejected, .. } => {
                    json!({ "prompt": prompt, "chosen": said(chosen), "rejected": said(rejected) })
                }
                Example::Unpaired { completion, label, .. } => {
                    json!({ "prompt": prompt, "completion": said(completion), "label": label })
                }
                Example::Demonstration { completion, .. } => json!({ "prompt": prompt, "completion": said(completion) }),
            };
            put(&mut line, carried);
            line
        }
        Format::Openai => {
            let (mut prompt, carried) = lift(example.prompt());
            keep_known(&mut prompt);
            let known = |answer: &[Message]| {
                let mut answer = said(answer);
                keep_known(&mut answer);
                answer
            };
            match example {
                Example::Preference { chosen, rejected, .. } => {
                    let mut input = json!({ "messages": prompt });
                    put(&mut input, carried);
                    json!({ "input": input, "preferred_output": known(chosen), "non_preferred_output": known(rejected) })
                }
                Example::Unpaired { .. } => return None,
                Example::Demonstration { completion, .. } => {
                    for context in prompt.iter_mut().filter(|message| message.role == "assistant") {
                        context.extra.entry(WEIGHT).or_insert(json!(0));
                    }
                    prompt.extend(known(completion));
                    let mut line = json!({ "messages": prompt });
                    put(&mut line, carried);
                    line
                }
            }
        }
    };
    match value {
        Value::Object(object) => Some(object),
        _ => None,
    }
}

/// Whether an answer in a conversation is learnt, in OpenAI's lines: 1, as without it, or 0.
const WEIGHT: &str = "weight";
/// Keys that a message of OpenAI's lines may have beside its role and content; its reader refuses a file with any other.
const KNOWN: [&str; 6] = ["name", "tool_calls", "tool_call_id", "function_call", "refusal", WEIGHT];

fn keep_known(messages: &mut [Message]) {
    for message in messages {
        message.extra.retain(|key, _| KNOWN.contains(&key.as_str()));
        // Records hold arguments as chat templates read them, OpenAI's lines hold their JSON text.
        for call in message.extra.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(arguments) = call.pointer_mut("/function/arguments").filter(|arguments| !arguments.is_string()) {
                *arguments = arguments.to_string().into();
            }
        }
    }
}

/// Keys of a line that belong to the whole conversation; here its first message carries them.
const CARRIED: [&str; 2] = ["tools", "parallel_tool_calls"];

fn lift(messages: &[Message]) -> (Vec<Message>, Vec<(&'static str, Value)>) {
    let mut messages = messages.to_vec();
    let carried = match messages.first_mut() {
        None => Vec::new(),
        Some(first) => CARRIED.into_iter().filter_map(|key| first.extra.shift_remove(key).map(|value| (key, value))).collect(),
    };
    (messages, carried)
}

fn put(object: &mut Value, carried: Vec<(&'static str, Value)>) {
    for (key, value) in carried {
        object[key] = value;
    }
}

/// Has the first message carry what belongs to the whole conversation.
pub(super) fn carry(from: &Map<String, Value>, prompt: &mut [Message], answer: &mut [Message]) {
    if let Some(first) = prompt.first_mut().or(answer.first_mut()) {
        for key in CARRIED {
            if let Some(value) = from.get(key).filter(|value| !value.is_null()) {
                first.extra.insert(key.to_owned(), value.clone());
            }
        }
    }
}

/// A row from a line in any of the forms; `place` says where it stood, for its origin.
pub fn parse(object: Map<String, Value>, place: &str) -> Result<StoredRow, (String, String)> {
    if object.contains_key("kind") && object.contains_key("split") {
        let stored =
            stored::from_object(object).map_err(|what| (what, "export it again, or use one of the other forms".to_owned()))?;
        check(&stored.row.example).map_err(|(what, fix)| (what, fix.to_owned()))?;
        // The id is what the content says, whoever wrote the line.
        let row = Row::new(stored.row.example, stored.row.origin);
        return Ok(StoredRow { row, ..stored });
    }
    let example = example(&object).map_err(|(what, fix)| (what, fix.to_owned()))?;
    check(&example).map_err(|(what, fix)| (what, fix.to_owned()))?;
    let origin = Origin { source: place.to_owned(), ..Origin::default() };
    Ok(StoredRow { row: Row::new(example, origin), split: Split::Train, verdict: None })
}

fn example(object: &Map<String, Value>) -> Result<Example, Wrong> {
    let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    if has("input") {
        let input =
            object["input"].as_object().ok_or_else(|| ("'input' is not an object".to_owned(), "write {\"messages\": […]}"))?;
        let mut prompt = list(input.get("messages"), "input.messages")?;
        let either = |names: [&'static str; 2]| names.into_iter().find(|name| has(name)).unwrap_or(names[0]);
        let (good, bad) =
            (either(["preferred_output", "preferred_completion"]), either(["non_preferred_output", "non_preferred_completion"]));
        let (mut chosen, rejected) = (list(object.get(good), good)?, list(object.get(bad), bad)?);
        carry(input, &mut prompt, &mut chosen);
        return Ok(Example::Preference { prompt, chosen, rejected });
    }
    if has("messages") {
        let mut messages = list(object.get("messages"), "messages")?;
        let Some(mut answer) = messages.pop().filter(|last| last.role == "assistant") else {
            return Err(("'messages' does not end with an assistant's message".to_owned(), "end with the answer to learn"));
        };
        let weighs = |message: &Message, weight| message.extra.get(WEIGHT).and_then(Value::as_i64) == Some(weight);
        if weighs(&answer, 0) {
            return Err((
                "the last message has weight 0".to_owned(),
                "give it weight 1, or remove the line: nothing is learnt from it",
            ));
        }
        // What a row here means without saying so: the last answer is learnt, and what comes before is context.
        if weighs(&answer, 1) {
            answer.extra.shift_remove(WEIGHT);
        }
        for context in messages.iter_mut().filter(|message| message.role == "assistant" && weighs(message, 0)) {
            context.extra.shift_remove(WEIGHT);
        }
        let mut completion = vec![answer];
        carry(object, &mut messages, &mut completion);
        return Ok(Example::Demonstration { prompt: messages, completion });
    }
    if has("chosen") || has("rejected") {
        let (mut chosen, rejected) = (answer(object, "chosen")?, answer(object, "rejected")?);
        let shared = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
        // UltraFeedback and its like name the prompt once more beside whole conversations that begin with it.
        let again = object.get("prompt").and_then(Value::as_str).is_some_and(|prompt| {
            chosen[0].role != "assistant" && chosen[..shared].iter().any(|message| message.content == prompt)
        });
        if has("prompt") && !again {
            let mut prompt = prompt(object)?;
            carry(object, &mut prompt, &mut chosen);
            return Ok(Example::Preference { prompt, chosen, rejected });
        }
        // TRL's implicit prompt: both are whole conversations, and the prompt is what they share.
        if shared == 0 {
            return Err(("there is no 'prompt', and 'chosen' and 'rejected' begin differently".to_owned(), "add 'prompt'"));
        }
        let shared = shared.min(chosen.len() - 1).min(rejected.len() - 1);
        let (mut prompt, mut chosen) = (chosen[..shared].to_vec(), chosen[shared..].to_vec());
        carry(object, &mut prompt, &mut chosen);
        return Ok(Example::Preference { prompt, chosen, rejected: rejected[shared..].to_vec() });
    }
    if has("completion") {
        let (mut prompt, mut completion) = (prompt(object)?, answer(object, "completion")?);
        carry(object, &mut prompt, &mut completion);
        return match object.get("label").unwrap_or(&Value::Null) {
            Value::Null => Ok(Example::Demonstration { prompt, completion }),
            Value::Bool(label) => Ok(Example::Unpaired { prompt, completion, label: *label }),
            other => Err((format!("'label' is {}", shown(other)), "use true for good and false for bad")),
        };
    }
    let keys = object.keys().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
    Err((
        format!("it is no form that is known; its keys are: {keys}"),
        "use {prompt, chosen, rejected}, {prompt, completion, label}, {prompt, completion}, {messages}, or {input, preferred_output, non_preferred_output}",
    ))
}

fn prompt(object: &Map<String, Value>) -> Result<Vec<Message>, Wrong> {
    match object.get("prompt") {
        None | Some(Value::Null) => Err(("there is no 'prompt'".to_owned(), "add it, as a string or a list of messages")),
        Some(Value::String(text)) => Ok(vec![message("user", text)]),
        value => list(value, "prompt"),
    }
}

fn answer(object: &Map<String, Value>, key: &'static str) -> Result<Vec<Message>, Wrong> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(vec![message("assistant", text)]),
        value => list(value, key),
    }
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned(), extra: Map::new() }
}

fn list(value: Option<&Value>, key: &str) -> Result<Vec<Message>, Wrong> {
    let fix = "write a list of {\"role\": …, \"content\": …}";
    match value {
        None | Some(Value::Null) => Err((format!("there is no '{key}'"), fix)),
        Some(Value::Array(values)) if !values.is_empty() => {
            values.iter().enumerate().map(|(index, value)| one(value, &format!("{key}[{index}]"))).collect()
        }
        Some(Value::Array(_)) => Err((format!("'{key}' is empty"), fix)),
        Some(other) => Err((format!("'{key}' is {}", shown(other)), fix)),
    }
}

fn one(value: &Value, place: &str) -> Result<Message, Wrong> {
    let object =
        value.as_object().ok_or_else(|| (format!("'{place}' is {}", shown(value)), "write {\"role\": …, \"content\": …}"))?;
    let mut extra = object.clone();
    let role = match extra.shift_remove("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role,
        Some(Value::String(role)) => {
            let shown: String = role.chars().take(40).collect();
            return Err((format!("the role of '{place}' is '{shown}'"), "use system, developer, user, assistant or tool"));
        }
        _ => return Err((format!("'{place}' has no role"), "use system, developer, user, assistant or tool")),
    };
    let content = match extra.shift_remove("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => joined(&parts).ok_or_else(|| {
            (format!("'{place}' has content that is not text"), "leave out images, audio and files: only text is trained on")
        })?,
        Some(other) => {
            return Err((format!("the content of '{place}' is {}", shown(&other)), "write a string, or a list of text parts"));
        }
    };
    Ok(Message { role, content, extra })
}

/// The text of content parts, if all are text.
fn joined(parts: &[Value]) -> Option<String> {
    parts
        .iter()
        .map(|part| match part {
            Value::String(text) => Some(text.as_str()),
            part if part["type"] == "text" => part["text"].as_str(),
            _ => None,
        })
        .collect()
}

fn check(example: &Example) -> Result<(), Wrong> {
    if example.prompt().is_empty() {
        return Err(("the prompt is empty".to_owned(), "add at least the user's message"));
    }
    for answer in example.answers() {
        if answer.first().is_none_or(|first| first.role != "assistant") {
            return Err(("an answer does not begin with an assistant's message".to_owned(), "give it the role assistant"));
        }
    }
    Ok(())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "true or false".to_owned(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

/// The prompt of a line that may have no answer.
pub fn prompt_of(value: &Value) -> Option<Vec<Message>> {
    match (&value["prompt"], &value["messages"]) {
        (Value::String(text), _) => Some(vec![message("user", text)]),
        (Value::Null, Value::Null) => None,
        (Value::Null, messages) | (messages, _) => {
            let mut messages = self::messages(messages)?;
            while messages.last().is_some_and(|last| last.role == "assistant") {
                messages.pop();
            }
            (!messages.is_empty()).then_some(messages)
        }
    }
}

/// Recorded messages of a request; none when they cannot be trained on.
pub fn messages(value: &Value) -> Option<Vec<Message>> {
    let messages = list(Some(value), "messages").ok()?;
    (!messages.is_empty()).then_some(messages)
}

/// Which rows to write.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection {
    /// One kind, or all.
    pub kind: Option<RowKind>,
    /// One part, or both.
    pub split: Option<Split>,
    /// Rows that the quality report would drop, too.
    pub dropped: bool,
}

/// Lines, and how many rows they hold and leave out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lines {
    /// JSON objects, each with a line's end.
    pub bytes: Vec<u8>,
    /// Rows in them.
    pub rows: u64,
    /// Selected rows that the form has no place for.
    pub no_form: u64,
    /// Selected rows that the quality report would drop.
    pub dropped: u64,
}

/// Writes those rows that are selected.
pub fn lines<'r>(rows: impl IntoIterator<Item = &'r StoredRow>, selection: Selection, format: Format) -> Lines {
    let mut lines = Lines::default();
    for stored in rows {
        if selection.kind.is_some_and(|kind| kind != stored.kind()) || selection.split.is_some_and(|split| split != stored.split)
        {
            continue;
        }
        if stored.verdict == Some(Keep::Drop) && !selection.dropped {
            lines.dropped += 1;
            continue;
        }
        match line(stored, format) {
            None => lines.no_form += 1,
            Some(object) => {
                // A map with string keys, into memory: neither can fail.
                lines.bytes.extend(serde_json::to_vec(&object).unwrap_or_default());
                lines.bytes.push(b'\n');
                lines.rows += 1;
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests;
