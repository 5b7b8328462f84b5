//! One answer that the API gave.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Complete.
    Ok,
    /// The client left, or the server shut down; what had been generated is there.
    Cancelled,
    /// A fault of ours.
    Failed,
}

impl Status {
    /// The word that the database uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }

    /// Of that word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Ok, Self::Cancelled, Self::Failed].into_iter().find(|status| status.as_str() == word)
    }
}

/// One choice of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// The first choice has the answer's id.
    pub id: Uuid,
    /// As the API says it; `None` when the choice did not end.
    pub finish_reason: Option<String>,
    /// What the model wrote, marks of reasoning and calls included; `None` when only metadata is recorded.
    pub output_text: Option<String>,
    /// The text taken apart, where it holds reasoning or calls: `content`, `reasoning_content`, `tool_calls` of an assistant's message.
    #[serde(default)]
    pub message: Option<Value>,
    /// Every sampled token, the end-of-turn token included; empty when only metadata is recorded.
    pub output_ids: Vec<u32>,
    /// Per sampled token, its log-probability under the distribution that was sampled from.
    pub logprobs: Vec<f32>,
    /// Per sampled token, its log-probability under the model's own distribution.
    pub raw_logprobs: Vec<f32>,
    /// Mean of `raw_logprobs`: a cheap measure of certainty.
    pub mean_logprob: Option<f64>,
    /// Sampled tokens.
    pub tokens: u32,
}

/// What an answer counts for in a rollout. It is part of the answer's record, so it says what served, not what was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exposure {
    /// The rollout.
    pub rollout: Uuid,
    /// Which of its arms answered; 0 is the control.
    pub arm: u32,
    /// A hash of the key that keeps the arm: a person, a conversation, or the request itself.
    pub unit: i64,
    /// Whether the answer refuses, by its words; `None` while nobody has looked.
    pub refused: Option<bool>,
    /// Where it stood among answers that one person got at once, from 0; `None` where it was the only one.
    #[serde(default)]
    pub place: Option<u32>,
}

/// One answer: everything needed to reproduce it, to train on it, and to trace it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inference {
    /// UUIDv7; the API shows it after `chatcmpl-`, `cmpl-` or `resp_`.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// `chat`, `response` or `completion`.
    pub endpoint: String,
    /// Served name.
    pub model: String,
    /// Generation of the weights; 0 is the base.
    pub adapter: u64,
    /// Variant of a rollout.
    pub variant: Option<String>,
    /// Groups the turns of one conversation; the application's own id.
    pub conversation: Option<String>,
    /// The API key that asked.
    pub key_id: Option<String>,
    /// `safety_identifier` or `user`: the person whom erasure is about.
    pub user_key: Option<String>,
    /// How it ended.
    pub status: Status,
    /// Its choices were made to be compared.
    pub compare: bool,
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Of these, from the prefix cache.
    pub cached_tokens: u32,
    /// Sampled tokens over all choices.
    pub output_tokens: u32,
    /// From arrival to the first token, in microseconds.
    pub first_token_us: Option<i64>,
    /// From arrival to the end, in microseconds.
    pub duration_us: i64,
    /// Hash of the configuration of model and engine that answered.
    pub config_hash: String,
    /// The request's `metadata`.
    pub metadata: Map<String, Value>,
    /// Sampling parameters in force, defaults included.
    pub params: Option<Value>,
    /// The request's messages; `None` for text completions and when only metadata is recorded.
    pub messages: Option<Value>,
    /// The prompt as text, as the template wrote it.
    pub prompt_text: Option<String>,
    /// The exact prompt.
    pub prompt_ids: Vec<u32>,
    /// What it counts for in a rollout.
    #[serde(default)]
    pub exposure: Option<Exposure>,
    /// In order.
    pub choices: Vec<Choice>,
}
