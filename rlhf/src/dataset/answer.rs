//! What the store knows about judged answers, as rows are made from it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde_json::{Map, Value};
use tidemill_store::records::Feedback;
use tidemill_store::{JudgedAnswer, JudgedTask};

use super::row::PARSED;
use super::{Message, format};

/// A conversation up to an answer, shared by all answers to it. The first message carries the request's `tools`, if it had any.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// The messages.
    pub messages: Vec<Message>,
    /// Equal for equal messages, in hexadecimal.
    pub key: String,
}

impl Prompt {
    /// A prompt with its key.
    pub fn new(messages: Vec<Message>) -> Self {
        // Strings, numbers and maps with string keys are always JSON.
        let canonical = serde_json::to_vec(&messages).unwrap_or_default();
        Self { key: blake3::hash(&canonical).to_hex()[..32].to_owned(), messages }
    }
}

/// An answer that somebody judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Id of the inference, or `TASK:a` and `TASK:b` for the texts of a labeling task that came from elsewhere.
    pub id: String,
    /// What it answers.
    pub prompt: Arc<Prompt>,
    /// What the model wrote.
    pub text: String,
    /// The same taken apart, where it holds reasoning or calls.
    pub parsed: Option<Box<Value>>,
    /// Who wrote it.
    pub model: Option<String>,
    /// The rollout's variant that wrote it.
    pub variant: Option<String>,
    /// Whose request it was.
    pub user: Option<String>,
    /// It came to an end, rather than to a fault or a client that left.
    pub whole: bool,
    /// The token limit ended it.
    pub cut_off: bool,
}

impl Answer {
    /// As a row teaches it: the text that the model wrote, because that is what it is trained on, and beside it the message that the
    /// text means, for whoever writes it in another way. One that the model did not end says so.
    pub fn message(&self) -> Message {
        let plain = Message::assistant(&self.text);
        let mut message = if self.cut_off || !self.whole { plain.cut_off() } else { plain };
        message.extra.extend(self.parsed.as_deref().map(|parsed| (PARSED.to_owned(), parsed.clone())));
        message
    }
}

/// What a judgement's target turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// An answer with its texts.
    Answer(Answer),
    /// An answer whose texts were not recorded.
    NotRecorded,
    /// An answer in a conversation that holds more than text, such as an image.
    NotText,
    /// A text completion: it has no messages to teach.
    TextCompletion,
}

/// Feedback and the answers that it is about.
#[derive(Clone, Debug, Default)]
pub struct Gathered {
    /// In any order.
    pub feedback: Vec<Feedback>,
    /// By the id that the feedback names. What is missing was erased, has aged out, or never came.
    pub targets: BTreeMap<String, Target>,
}

/// What a recorded choice is to a judgement. Prompts of one inference are shared through `prompts`.
pub fn target(judged: JudgedAnswer, prompts: &mut HashMap<String, Option<Arc<Prompt>>>) -> (String, Target) {
    // Every other endpoint answers a conversation.
    if judged.endpoint == "completion" {
        return (judged.id, Target::TextCompletion);
    }
    let prompt = prompts.entry(judged.inference.clone()).or_insert_with(|| {
        let value = serde_json::from_str(judged.messages.as_deref()?).ok()?;
        let mut messages = format::messages(&value)?;
        let params: Map<String, Value> =
            judged.params.as_deref().and_then(|params| serde_json::from_str(params).ok()).unwrap_or_default();
        format::carry(&params, &mut messages, &mut []);
        Some(Arc::new(Prompt::new(messages)))
    });
    let recorded = judged.messages.is_some();
    let target = match (prompt, judged.text) {
        (Some(prompt), Some(text)) => Target::Answer(Answer {
            id: judged.inference,
            prompt: prompt.clone(),
            text,
            parsed: judged.message.and_then(|message| serde_json::from_str(&message).ok()),
            model: Some(judged.model),
            variant: judged.variant,
            user: judged.user_key,
            whole: judged.status == "ok",
            cut_off: judged.finish_reason.as_deref() == Some("length"),
        }),
        (None, Some(_)) if recorded => Target::NotText,
        _ => Target::NotRecorded,
    };
    (judged.id, target)
}

/// The two answers of a labeling task, under the ids that its verdicts use.
pub fn task_targets(task: JudgedTask) -> [(String, Target); 2] {
    let prompt = format::messages(&task.prompt).map(|messages| Arc::new(Prompt::new(messages)));
    let target = |id: &str, text: String| match &prompt {
        None => Target::NotText,
        Some(prompt) => Target::Answer(Answer {
            id: id.to_owned(),
            prompt: prompt.clone(),
            text,
            parsed: None,
            model: None,
            variant: None,
            user: None,
            whole: true,
            cut_off: false,
        }),
    };
    let [a, b] = ["a", "b"].map(|side| format!("{}:{side}", task.id));
    let (first, second) = (target(&a, task.answer_a), target(&b, task.answer_b));
    [(a, first), (b, second)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn judged(params: Value, message: Value) -> JudgedAnswer {
        JudgedAnswer {
            id: "c".into(),
            inference: "i".into(),
            endpoint: "chat".into(),
            model: "m".into(),
            variant: None,
            user_key: None,
            status: "ok".into(),
            finish_reason: Some("stop".into()),
            messages: Some(json!([{"role": "user", "content": "Hi"}]).to_string()),
            text: Some("<tool_call>…".into()),
            message: Some(message.to_string()).filter(|_| !message.is_null()),
            params: Some(params.to_string()),
        }
    }

    fn read(params: Value, message: Value) -> Answer {
        match target(judged(params, message), &mut HashMap::new()) {
            (_, Target::Answer(answer)) => answer,
            (_, other) => panic!("no answer: {other:?}"),
        }
    }

    #[test]
    fn an_answer_brings_the_requests_tools_and_what_its_text_means() {
        let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
        let parsed = json!({"content": "", "tool_calls": [{"function": {"name": "f"}}]});
        let answer = read(json!({"n": 1, "tools": tools}), parsed.clone());
        assert_eq!(answer.prompt.messages[0].extra["tools"], tools);
        let message = answer.message();
        assert_eq!((message.content.as_str(), &message.extra[PARSED]), ("<tool_call>…", &parsed));
        let plain = read(json!({"n": 1}), Value::Null);
        assert!(plain.prompt.messages[0].extra.is_empty() && plain.message().extra.is_empty());
        assert_ne!(plain.prompt.key, answer.prompt.key, "with other tools it is another prompt");
    }
}
