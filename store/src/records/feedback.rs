//! One judgement of an answer, a pair of answers, or a conversation.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

/// What is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetKind {
    /// One answer, or one choice of it.
    Completion,
    /// A whole conversation.
    Conversation,
    /// A pair in a labeling queue whose answers are not ours.
    Task,
}

/// What sort of judgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `true` up, `false` down.
    Thumb,
    /// A number from 0 to 1, whatever scale was shown: 4 of 5 stars is 0.75.
    Rating,
    /// `{"candidates":[id…],"ranking":[[id…],…],"both_bad":bool,"shown":[id…]}`: the ranking has the best first and ties together.
    Comparison,
    /// The better text.
    Correction,
    /// Free text.
    Comment,
    /// A number or a flag under a name that the configuration declares.
    Metric,
}

impl TargetKind {
    /// The word that the API and the database use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completion => "completion",
            Self::Conversation => "conversation",
            Self::Task => "task",
        }
    }

    /// Of that word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Completion, Self::Conversation, Self::Task].into_iter().find(|kind| kind.as_str() == word)
    }
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Thumb, Self::Rating, Self::Comparison, Self::Correction, Self::Comment, Self::Metric];

    /// The word that the API and the database use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Thumb => "thumb",
            Self::Rating => "rating",
            Self::Comparison => "comparison",
            Self::Correction => "correction",
            Self::Comment => "comment",
            Self::Metric => "metric",
        }
    }

    /// Of that word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }
}

/// A feedback record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Feedback {
    /// UUIDv7.
    pub id: Uuid,
    /// Microseconds since 1970.
    pub created: i64,
    /// Of the last edit.
    pub updated: i64,
    /// 1, and one more per edit.
    pub revision: i64,
    /// Taken back; kept for the audit, and part of nothing else.
    pub withdrawn: bool,
    /// Bare id of the answer, choice or conversation; of a comparison, the first candidate's.
    pub target: String,
    /// All targets: of a comparison every candidate, otherwise the one.
    pub targets: Vec<String>,
    /// What the target is.
    pub target_kind: TargetKind,
    /// What sort of judgement.
    pub kind: Kind,
    /// Name, for metrics.
    pub metric: Option<String>,
    /// In the form that `kind` says.
    pub value: Value,
    /// The value as a number where it is one: thumbs and flags 0 or 1.
    pub number: Option<f64>,
    /// Who judged.
    pub author: Option<String>,
    /// Where: `api`, `console`, `label-studio`, `argilla`, or the application's word.
    pub source: Option<String>,
    /// From seeing to judging, in milliseconds.
    pub latency_ms: Option<i64>,
    /// The application's own.
    pub tags: Vec<String>,
    /// The API key that sent it.
    pub key_id: Option<String>,
    /// The same key again is the same feedback.
    pub idempotency_key: Option<String>,
    /// The labeling task.
    pub task_id: Option<Uuid>,
}
