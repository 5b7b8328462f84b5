//! One training example and where it came from.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A message as OpenAI's chat format has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text; an assistant's message that only calls tools has none.
    #[serde(default)]
    pub content: String,
    /// Everything else that the message carries: `name`, `tool_calls`, `tool_call_id`, `weight`, [`CUT_OFF`].
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Key of an answer's message under which lies what its text means, where the text holds reasoning or calls: `content`,
/// `reasoning_content` and `tool_calls` of the message as conversations have it. The text itself is as the model wrote it.
pub const PARSED: &str = "parsed";
/// Key of an answer's message that is true where something else than the model ended the text: a limit of tokens, a fault, a client that left.
pub const CUT_OFF: &str = "cut_off";

impl Message {
    /// An answer.
    pub fn assistant(text: &str) -> Self {
        Self { role: "assistant".to_owned(), content: text.to_owned(), extra: Map::new() }
    }

    /// The same, without an end of its own.
    pub fn cut_off(mut self) -> Self {
        self.extra.insert(CUT_OFF.to_owned(), Value::Bool(true));
        self
    }

    /// Whether the model wrote no end to it.
    pub fn is_cut_off(&self) -> bool {
        self.extra.get(CUT_OFF) == Some(&Value::Bool(true))
    }

    /// The message as conversations have it: reasoning and calls apart from the content, and nothing of how it ended.
    pub fn structured(&self) -> Self {
        let mut message = self.clone();
        message.extra.shift_remove(CUT_OFF);
        if let Some(Value::Object(mut parsed)) = message.extra.shift_remove(PARSED) {
            message.content = match parsed.shift_remove("content") {
                Some(Value::String(content)) => content,
                _ => String::new(),
            };
            message.extra.extend(parsed);
        }
        message
    }
}

/// What a row teaches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Example {
    /// Of two answers to one prompt, one is better: from comparisons, corrections, ratings of one prompt.
    Preference {
        /// The conversation so far.
        prompt: Vec<Message>,
        /// The better answer.
        chosen: Vec<Message>,
        /// The worse answer.
        rejected: Vec<Message>,
    },
    /// One answer, good or bad: from thumbs.
    Unpaired {
        /// The conversation so far.
        prompt: Vec<Message>,
        /// The answer.
        completion: Vec<Message>,
        /// Good.
        label: bool,
    },
    /// An answer to imitate: from corrections.
    Demonstration {
        /// The conversation so far.
        prompt: Vec<Message>,
        /// The answer.
        completion: Vec<Message>,
    },
}

/// Where on the rater's screen the chosen answer stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// First, or left.
    Left,
    /// Second, or right.
    Right,
}

/// The rows and people behind an example; all lists are sorted and without repeats.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// Ids of the answers.
    pub inferences: Vec<String>,
    /// Ids of the feedback.
    pub feedback: Vec<String>,
    /// Who judged.
    pub raters: Vec<String>,
    /// Whose requests the answers belong to.
    pub users: Vec<String>,
    /// Variants that wrote the answers.
    pub variants: Vec<String>,
    /// `comparison`, `correction`, `rating`, `thumb`, `metric:NAME`, or the file and line it was imported from.
    pub source: String,
    /// Where the chosen answer stood; for preferences that were shown side by side.
    pub chosen_position: Option<Position>,
    /// When the judgement was given, in microseconds since 1970; of several, the last.
    pub judged_at: i64,
}

/// One row of a dataset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Content address: the first 32 hexadecimal digits of BLAKE3 over the example's canonical JSON.
    pub id: String,
    /// What it teaches.
    #[serde(flatten)]
    pub example: Example,
    /// Where it came from.
    pub origin: Origin,
}

impl Example {
    /// The conversation so far.
    pub fn prompt(&self) -> &[Message] {
        match self {
            Self::Preference { prompt, .. } | Self::Unpaired { prompt, .. } | Self::Demonstration { prompt, .. } => prompt,
        }
    }

    /// The answers: chosen and rejected, or the one.
    pub fn answers(&self) -> Vec<&[Message]> {
        match self {
            Self::Preference { chosen, rejected, .. } => vec![chosen, rejected],
            Self::Unpaired { completion, .. } | Self::Demonstration { completion, .. } => vec![completion],
        }
    }
}

impl Row {
    /// A row with the id that its example gives it.
    pub fn new(example: Example, origin: Origin) -> Self {
        // Strings, numbers and maps with string keys: always JSON, and in one order, since structs and maps keep theirs.
        let canonical = serde_json::to_vec(&example).unwrap_or_default();
        let id = blake3::hash(&canonical).to_hex()[..32].to_owned();
        Self { id, example, origin }
    }
}

/// The text of messages, one after another, for checks that look at text only.
pub fn text(messages: &[Message]) -> String {
    messages.iter().map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n")
}
