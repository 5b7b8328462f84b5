//! What a server's answer says, gathered while it passes, and what is changed in it on the way. Pure.

use crate::openai::chat_output::{ChatChoice, Delta};
use serde_json::{Value, json};

/// Most choices that are gathered; clients cannot ask for more.
const MOST_CHOICES: usize = 128;

/// Tokens as the server counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemoteUsage {
    /// Of the prompt.
    pub prompt: usize,
    /// Of these, from the server's cache.
    pub cached: usize,
    /// Generated.
    pub output: usize,
}

impl RemoteUsage {
    fn read(json: &Value) -> Option<Self> {
        let count = |path: &str| Some(usize::try_from(json.pointer(path)?.as_u64()?).unwrap_or(usize::MAX));
        Some(Self {
            prompt: count("/prompt_tokens")?,
            cached: count("/prompt_tokens_details/cached_tokens").unwrap_or(0),
            output: count("/completion_tokens").unwrap_or(0),
        })
    }
}

/// One choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gathered {
    /// Content, reasoning and calls.
    pub choice: ChatChoice,
    /// As the server said it.
    pub finish: Option<String>,
    logprob_sum: f64,
    logprobs: u32,
}

impl Gathered {
    /// Mean log-probability of the tokens whose log-probabilities were reported.
    pub fn mean_logprob(&self) -> Option<f64> {
        (self.logprobs > 0).then(|| self.logprob_sum / f64::from(self.logprobs))
    }
}

/// An answer, as far as it has come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gathering {
    /// In the order of their indices.
    pub choices: Vec<Gathered>,
    /// As the server counted.
    pub usage: Option<RemoteUsage>,
    /// What the server says it is.
    pub model: Option<String>,
    /// Chunks that brought something: about one per token.
    pub pieces: usize,
}

impl Gathering {
    /// For an answer of `n` choices.
    pub fn new(n: usize) -> Self {
        Self { choices: vec![Gathered::default(); n.min(MOST_CHOICES)], ..Self::default() }
    }

    /// Takes a chunk, or a whole answer.
    pub fn take(&mut self, answer: &Value) {
        if let Some(usage) = answer.get("usage").and_then(RemoteUsage::read) {
            self.usage = Some(usage);
        }
        if self.model.is_none() {
            self.model = answer.get("model").and_then(Value::as_str).filter(|model| !model.is_empty()).map(str::to_owned);
        }
        let mut said = false;
        for (place, json) in answer.get("choices").and_then(Value::as_array).into_iter().flatten().enumerate() {
            let index =
                json.get("index").and_then(Value::as_u64).map_or(place, |index| usize::try_from(index).unwrap_or(usize::MAX));
            if let Some(gathered) = self.choices.get_mut(index) {
                said |= says_something(json);
                gathered.take(json);
            }
        }
        self.pieces += usize::from(said);
    }

    /// Whether every choice has ended.
    pub fn is_whole(&self) -> bool {
        self.choices.iter().all(|gathered| gathered.finish.is_some())
    }
}

impl Gathered {
    fn take(&mut self, json: &Value) {
        let part = json.get("delta").or_else(|| json.get("message"));
        let text = |key: &str| part.unwrap_or(json).get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let choice = &mut self.choice;
        choice.text.push_str(&if part.is_some() { text("content") } else { text("text") });
        choice.reasoning.push_str(&match text("reasoning_content") {
            // vLLM's newer name.
            older if older.is_empty() => text("reasoning"),
            thought => thought,
        });
        let calls = part.and_then(|part| part.get("tool_calls")).and_then(Value::as_array);
        for (place, call) in calls.into_iter().flatten().enumerate() {
            let at = call.get("index").and_then(Value::as_u64).map_or(place, |at| usize::try_from(at).unwrap_or(usize::MAX));
            add_call(choice, at, call.get("id"), call.get("function"));
        }
        if let Some(function) = part.and_then(|part| part.get("function_call")).filter(|function| function.is_object()) {
            add_call(choice, 0, None, Some(function));
        }
        for entry in json.pointer("/logprobs/content").and_then(Value::as_array).into_iter().flatten() {
            self.add_logprob(entry.get("logprob"));
        }
        for logprob in json.pointer("/logprobs/token_logprobs").and_then(Value::as_array).into_iter().flatten() {
            self.add_logprob(Some(logprob));
        }
        if let Some(finish) = json.get("finish_reason").and_then(Value::as_str) {
            self.finish = Some(finish.to_owned());
        }
    }

    fn add_logprob(&mut self, logprob: Option<&Value>) {
        if let Some(logprob) = logprob.and_then(Value::as_f64).filter(|logprob| *logprob > -9999.0) {
            self.logprob_sum += logprob;
            self.logprobs += 1;
        }
    }
}

fn add_call(choice: &mut ChatChoice, at: usize, id: Option<&Value>, function: Option<&Value>) {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    let part = |key: &str| text(function.and_then(|function| function.get(key)));
    if at == choice.calls.len() {
        choice.add(Delta::Call { index: at, id: text(id), name: part("name") });
    }
    choice.add(Delta::Arguments { index: at, text: part("arguments") });
}

/// Whether a choice of a chunk brings more than its role.
fn says_something(choice: &Value) -> bool {
    let filled = |value: &Value| match value {
        Value::Null | Value::Bool(_) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => true,
    };
    let parts = choice.get("delta").or_else(|| choice.get("message")).and_then(Value::as_object);
    let said = parts.into_iter().flatten().any(|(key, value)| key != "role" && filled(value));
    said || choice.get("text").is_some_and(filled) || choice.get("finish_reason").is_some_and(filled)
}

/// Whether a chunk brings the answer's first part, or its end: from here on the client has something.
pub fn begins(chunk: &Value) -> bool {
    let choices = chunk.get("choices").and_then(Value::as_array);
    choices.is_none_or(|choices| choices.iter().any(says_something)) || chunk.get("usage").is_some_and(|usage| !usage.is_null())
}

/// Makes a server's answer this gateway's: its id, by which feedback comes, and the model's public name.
#[derive(Clone, Debug)]
pub struct Rewriter {
    /// Such as `chatcmpl-0198…`; a vector has none.
    pub id: Option<String>,
    /// Public name of the model that answers.
    pub model: String,
    /// Of choices that are made to be compared; each is shown once.
    pub choice_ids: Vec<Option<String>>,
    /// The client wants to know of tokens.
    pub usage: bool,
}

impl Rewriter {
    /// Changes a chunk or an answer; `false` when nothing of it is for the client.
    pub fn rewrite(&mut self, answer: &mut Value) -> bool {
        let Some(answer) = answer.as_object_mut() else { return true };
        if let Some(id) = &self.id {
            answer.insert("id".into(), id.as_str().into());
        }
        answer.insert("model".into(), self.model.as_str().into());
        if !self.usage
            && let Some(usage) = answer.shift_remove("usage")
        {
            let empty = answer.get("choices").and_then(Value::as_array).is_none_or(Vec::is_empty);
            if empty && !usage.is_null() {
                return false;
            }
        }
        for choice in answer.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten() {
            let index = choice.get("index").and_then(Value::as_u64).and_then(|index| usize::try_from(index).ok());
            let own = index.and_then(|index| self.choice_ids.get_mut(index)).and_then(Option::take);
            if let (Some(own), Some(choice)) = (own, choice.as_object_mut()) {
                choice.insert("tidemill".into(), json!({"id": own}));
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(index: usize, delta: Value, finish: Value) -> Value {
        json!({"id": "x", "model": "big-1", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]})
    }

    #[test]
    fn text_reasoning_and_calls_are_gathered_out_of_chunks() {
        let mut gathering = Gathering::new(1);
        let call = |call: Value| delta(0, json!({"tool_calls": [call]}), Value::Null);
        for chunk in [
            delta(0, json!({"role": "assistant", "content": ""}), Value::Null),
            delta(0, json!({"reasoning_content": "hm"}), Value::Null),
            delta(0, json!({"content": "He"}), Value::Null),
            delta(0, json!({"content": "llo"}), Value::Null),
            call(json!({"index": 0, "id": "c0", "type": "function", "function": {"name": "f", "arguments": ""}})),
            call(json!({"index": 0, "function": {"arguments": "{\"a\""}})),
            call(json!({"index": 0, "function": {"arguments": ":1}"}})),
            call(json!({"index": 1, "id": "c1", "function": {"name": "g", "arguments": "{}"}})),
            delta(7, json!({"content": "not asked for"}), Value::Null),
        ] {
            gathering.take(&chunk);
        }
        assert!(!gathering.is_whole());
        gathering.take(&delta(0, json!({}), json!("tool_calls")));
        gathering.take(&json!({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}}));
        assert!(gathering.is_whole());
        assert_eq!(gathering.usage, Some(RemoteUsage { prompt: 5, cached: 4, output: 7 }));
        assert_eq!((gathering.model.as_deref(), gathering.pieces), (Some("big-1"), 8));
        let choice = &gathering.choices[0].choice;
        assert_eq!((choice.text.as_str(), choice.reasoning.as_str()), ("Hello", "hm"));
        let calls: Vec<_> =
            choice.calls.iter().map(|call| (call.id.as_str(), call.name.as_str(), call.arguments.as_str())).collect();
        assert_eq!(calls, [("c0", "f", "{\"a\":1}"), ("c1", "g", "{}")]);
    }

    #[test]
    fn whole_answers_of_both_kinds_are_gathered() {
        let mut chat = Gathering::new(2);
        chat.take(&json!({"choices": [
            {"index": 1, "message": {"role": "assistant", "content": "b"}, "finish_reason": "stop"},
            {"index": 0, "message": {"content": null, "function_call": {"name": "f", "arguments": "{}"}}, "finish_reason": "function_call",
             "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}, {"logprob": -9999.0}]}},
        ]}));
        assert!(chat.is_whole());
        assert_eq!((chat.choices[1].choice.text.as_str(), chat.choices[0].choice.calls[0].name.as_str()), ("b", "f"));
        assert_eq!((chat.choices[0].mean_logprob(), chat.choices[1].mean_logprob()), (Some(-1.5), None));
        let mut text = Gathering::new(1);
        text.take(&json!({"choices": [{"index": 0, "text": "once", "finish_reason": "length", "logprobs": {"token_logprobs": [null, -0.5]}}]}));
        assert_eq!((text.choices[0].choice.text.as_str(), text.choices[0].mean_logprob()), ("once", Some(-0.5)));
    }

    #[test]
    fn a_role_alone_does_not_begin_an_answer() {
        for (chunk, begun) in [
            (delta(0, json!({"role": "assistant", "content": "", "refusal": null}), Value::Null), false),
            (json!({"choices": [], "prompt_filter_results": []}), false),
            (delta(0, json!({"content": "a"}), Value::Null), true),
            (delta(0, json!({"reasoning": "a"}), Value::Null), true),
            (delta(0, json!({"tool_calls": [{}]}), Value::Null), true),
            (delta(0, json!({}), json!("stop")), true),
            (json!({"choices": [{"index": 0, "text": "a"}]}), true),
            (json!({"choices": [], "usage": {}}), true),
        ] {
            assert_eq!(begins(&chunk), begun, "{chunk}");
        }
    }

    #[test]
    fn an_answer_gets_our_id_and_name_and_keeps_the_rest() {
        let mut rewriter =
            Rewriter { id: Some("chatcmpl-1".into()), model: "assistant".into(), choice_ids: vec![], usage: false };
        let mut rewritten = |mut chunk: Value| rewriter.rewrite(&mut chunk).then_some(chunk);
        let mut chunk = delta(0, json!({"content": "a", "odd": [1]}), Value::Null);
        chunk["usage"] = Value::Null;
        chunk["system_fingerprint"] = "fp".into();
        let passed = rewritten(chunk).unwrap();
        assert_eq!(
            (&passed["id"], &passed["model"], &passed["system_fingerprint"]),
            (&json!("chatcmpl-1"), &json!("assistant"), &json!("fp"))
        );
        assert!(passed["choices"][0]["delta"]["odd"][0] == 1 && passed.get("usage").is_none());
        assert_eq!(rewritten(json!({"choices": [], "usage": {"prompt_tokens": 1}})), None, "asked for by us, not by the client");
        rewriter.usage = true;
        rewriter.choice_ids = vec![None, Some("chatcmpl-2".into())];
        let mut shown = || {
            let mut chunk = delta(1, json!({"content": "b"}), Value::Null);
            assert!(rewriter.rewrite(&mut chunk));
            chunk["choices"][0].get("tidemill").cloned()
        };
        assert_eq!((shown(), shown()), (Some(json!({"id": "chatcmpl-2"})), None));
    }
}
