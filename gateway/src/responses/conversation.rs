//! Items as a conversation: the messages that chat templates read.

use crate::http::error::ApiError;
use crate::openai::messages;
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// The messages of checked items, after `instructions`. One answer of the model's may be several items (reasoning, text, calls): here it
/// is one message again.
pub fn messages(instructions: Option<&str>, items: &[Value]) -> Result<Vec<Value>, ApiError> {
    let mut made = Messages::default();
    if let Some(text) = instructions {
        made.done.push(json!({"role": "system", "content": text}));
    }
    // What was cut off in the middle of a call can neither be answered nor repeated.
    let is_whole = |item: &&Value| item["type"] != "function_call" || item["status"] != "incomplete";
    for item in items.iter().filter(is_whole) {
        made.add(item)?;
    }
    made.finish()
}

/// Where the conversation may begin when its first items are left out: at each message of the user's but the first, as an index of
/// items. An answer is never parted from its question, nor a result from its call.
pub fn cuts(items: &[Value]) -> Vec<usize> {
    let users = items.iter().enumerate().filter(|(_, item)| item["role"] == "user").map(|(index, _)| index);
    users.filter(|index| *index > 0).collect()
}

/// The items from `cut` on, and what system and developer said before.
pub fn after(items: &[Value], cut: usize) -> Vec<Value> {
    let (before, rest) = items.split_at(cut.min(items.len()));
    let kept = before.iter().filter(|item| item["role"] == "system" || item["role"] == "developer");
    kept.chain(rest).cloned().collect()
}

#[derive(Default)]
struct Messages {
    done: Vec<Value>,
    answer: Option<Map<String, Value>>,
    called: Vec<String>,
    answered: HashSet<String>,
}

impl Messages {
    fn add(&mut self, item: &Value) -> Result<(), ApiError> {
        match item["type"].as_str().unwrap_or_default() {
            "reasoning" => {
                let text = joined(&item["content"], "");
                if !text.is_empty() {
                    self.answer_without(&["content", "tool_calls"]).insert("reasoning_content".into(), text.into());
                }
            }
            "function_call" => {
                let (id, name) = (&item["call_id"], &item["name"]);
                let arguments = messages::arguments(item["arguments"].as_str().unwrap_or_default());
                let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
                let calls = self.answer_without(&[]).entry("tool_calls").or_insert_with(|| json!([]));
                if let Some(calls) = calls.as_array_mut() {
                    calls.push(call);
                }
                self.called.push(id.as_str().unwrap_or_default().to_owned());
            }
            "function_call_output" => {
                self.flush();
                let id = item["call_id"].as_str().unwrap_or_default();
                if !self.called.iter().any(|called| called == id) {
                    return Err(about_input(format!("No tool call found for function call output with call_id {id}.")));
                }
                self.answered.insert(id.to_owned());
                let output = match &item["output"] {
                    Value::String(text) => text.clone(),
                    parts => joined(parts, "\n"),
                };
                self.done.push(json!({"role": "tool", "tool_call_id": id, "content": output}));
            }
            _ if item["role"] == "assistant" => {
                let text = joined(&item["content"], "");
                self.answer_without(&["content", "tool_calls"]).insert("content".into(), text.into());
            }
            _ => {
                self.flush();
                let role = if item["role"] == "user" { "user" } else { "system" };
                self.done.push(json!({"role": role, "content": joined(&item["content"], "\n")}));
            }
        }
        Ok(())
    }

    /// The answer under way; a new one when it has one of these fields, which come later.
    fn answer_without(&mut self, fields: &[&str]) -> &mut Map<String, Value> {
        if self.answer.as_ref().is_some_and(|answer| fields.iter().any(|field| answer.contains_key(*field))) {
            self.flush();
        }
        self.answer.get_or_insert_default()
    }

    fn flush(&mut self) {
        let Some(answer) = self.answer.take() else { return };
        let mut message = Map::from_iter([("role".to_owned(), Value::from("assistant"))]);
        message.extend(answer);
        message.entry("content").or_insert_with(|| "".into());
        self.done.push(Value::Object(message));
    }

    fn finish(mut self) -> Result<Vec<Value>, ApiError> {
        self.flush();
        match self.called.iter().find(|id| !self.answered.contains(*id)) {
            Some(id) => Err(about_input(format!("No tool output found for function call {id}."))),
            None => Ok(self.done),
        }
    }
}

fn about_input(message: String) -> ApiError {
    ApiError { param: Some("input".into()), ..ApiError::bad_request(message) }
}

/// The texts of parts.
fn joined(parts: &Value, between: &str) -> String {
    let text = |part: &Value| part.get("text").or(part.get("refusal"))?.as_str().map(str::to_owned);
    parts.as_array().into_iter().flatten().filter_map(text).collect::<Vec<_>>().join(between)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(role: &str, text: &str) -> Value {
        let kind = if role == "assistant" { "output_text" } else { "input_text" };
        json!({"type": "message", "role": role, "status": "completed", "content": [{"type": kind, "text": text}]})
    }

    fn call(id: &str) -> Value {
        json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{\"a\":1}", "status": "completed"})
    }

    fn result(id: &str) -> Value {
        json!({"type": "function_call_output", "call_id": id, "output": "42"})
    }

    fn thought(text: &str) -> Value {
        json!({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]})
    }

    #[test]
    fn the_items_of_one_answer_are_one_message() {
        let items = [
            said("developer", "d"),
            said("user", "q"),
            thought("hm"),
            said("assistant", "let me see"),
            call("1"),
            call("2"),
            result("1"),
            result("2"),
            thought("so"),
            said("assistant", "42"),
            said("assistant", "really"),
        ];
        let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": {"a": 1}}});
        assert_eq!(
            messages(Some("be brief"), &items).unwrap(),
            [
                json!({"role": "system", "content": "be brief"}),
                json!({"role": "system", "content": "d"}),
                json!({"role": "user", "content": "q"}),
                json!({"role": "assistant", "reasoning_content": "hm", "content": "let me see", "tool_calls": [call("1"), call("2")]}),
                json!({"role": "tool", "tool_call_id": "1", "content": "42"}),
                json!({"role": "tool", "tool_call_id": "2", "content": "42"}),
                json!({"role": "assistant", "reasoning_content": "so", "content": "42"}),
                json!({"role": "assistant", "content": "really"}),
            ]
        );
    }

    #[test]
    fn calls_and_results_belong_together() {
        let error = messages(None, &[result("1")]).unwrap_err();
        assert_eq!((error.param.as_deref(), error.message.contains("call_id 1")), (Some("input"), true));
        let error = messages(None, &[call("1"), call("2"), result("2")]).unwrap_err();
        assert!(error.message.ends_with("function call 1."), "{}", error.message);
        let mut cut_off = call("1");
        cut_off["status"] = "incomplete".into();
        assert_eq!(messages(None, &[said("user", "q"), cut_off]).unwrap().len(), 1);
    }

    #[test]
    fn a_conversation_is_cut_before_a_question() {
        let items = [said("system", "s"), said("user", "1"), said("assistant", "a"), said("user", "2"), call("1"), result("1")];
        assert_eq!(cuts(&items), [1, 3]);
        assert_eq!(after(&items, 3), [said("system", "s"), said("user", "2"), call("1"), result("1")]);
    }
}
