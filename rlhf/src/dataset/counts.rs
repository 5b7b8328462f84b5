//! What became of every judgement that a query selects: it is behind a row, or there is a reason why not.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Why a judgement is behind no row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftOut {
    /// Taken back.
    Withdrawn,
    /// The same person judged the same again later.
    Superseded,
    /// The value is not what its kind says.
    Malformed,
    /// About a whole conversation, not an answer.
    Conversation,
    /// The answer is not in the store.
    UnknownAnswer,
    /// The answer's texts were not recorded.
    NotRecorded,
    /// The conversation holds more than text, such as an image.
    NotText,
    /// The answer is to a text prompt, without messages.
    TextCompletion,
    /// By another model or variant, or to a person whom the query leaves out.
    NotSelected,
    /// The answers are to different prompts.
    DifferentPrompts,
    /// The two texts are equal.
    SameText,
    /// Neither is better.
    Tie,
    /// Neither is good.
    BothBad,
    /// As many for one side as for the other.
    Undecided,
    /// Fewer raters than the query wants.
    TooFewRaters,
    /// No other answer to the prompt is rated far enough away, or there were pairs enough.
    NoPair,
    /// The metric lies between good and bad.
    InBetween,
    /// It would be taught as good, but was cancelled or failed.
    Incomplete,
    /// It would be taught as good, but the token limit cut it off.
    CutOff,
    /// It would be taught as good, but a metric that the query asks for is missing or out of range.
    OutOfRange,
}

/// What became of the judgements.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Judgements that the query selects.
    pub judgements: usize,
    /// Behind a row, before caps.
    pub used: usize,
    /// The others.
    pub left_out: BTreeMap<LeftOut, usize>,
    /// Rows dropped because a person had more than the query allows.
    pub rows_over_cap: usize,
}

impl Counts {
    pub(super) fn leave(&mut self, reason: LeftOut, judgements: usize) {
        if judgements > 0 {
            self.judgements += judgements;
            *self.left_out.entry(reason).or_default() += judgements;
        }
    }

    pub(super) fn use_up(&mut self, judgements: usize) {
        self.judgements += judgements;
        self.used += judgements;
    }
}
