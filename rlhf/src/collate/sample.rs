//! A row as tokens.

use serde::{Deserialize, Serialize};

/// Tokens that are learnt, all or some of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Which of them are learnt, one entry per token; `None` for all.
    pub learnt: Option<Vec<bool>>,
}

/// A row as tokens: a prompt and the completions that share it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// The row's id.
    pub id: String,
    /// Token ids of the prompt, up to where an answer begins.
    pub prompt: Vec<u32>,
    /// One completion, or chosen and rejected.
    pub completions: Vec<Completion>,
    /// For a completion that was judged by itself: whether it is good.
    pub good: bool,
    /// Factor of its loss; 1 on average over a dataset.
    pub weight: f64,
    /// Who judged.
    pub raters: Vec<String>,
    /// Whose request it was.
    pub users: Vec<String>,
}

/// What gives way when a row is longer than `max_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// The beginning of the prompt, and only when none of it is left the end of the completion.
    #[default]
    KeepCompletion,
    /// The end, as TRL does; a row without completion is left out.
    KeepStart,
}

impl Completion {
    /// Whether token `place` is learnt.
    pub fn learns(&self, place: usize) -> bool {
        self.learnt.as_ref().is_none_or(|learnt| learnt[place])
    }

    fn truncate(&mut self, length: usize) {
        self.tokens.truncate(length);
        if let Some(learnt) = &mut self.learnt {
            learnt.truncate(length);
        }
    }
}

impl Sample {
    /// Tokens of the prompt and of all completions.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.completions.iter().map(|completion| completion.tokens.len()).sum::<usize>()
    }

    /// Cuts every completion with its prompt to `max_length` tokens. Returns whether anything was cut.
    pub(crate) fn cut(&mut self, max_length: usize, mode: Truncation) -> bool {
        let longest = self.completions.iter().map(|completion| completion.tokens.len()).max().unwrap_or(0);
        if self.prompt.len() + longest <= max_length {
            return false;
        }
        if mode == Truncation::KeepCompletion {
            // One token of the prompt stays: it predicts the first of the completion.
            let kept = max_length.saturating_sub(longest).max(1).min(self.prompt.len());
            self.prompt.drain(..self.prompt.len() - kept);
        }
        let room = max_length.saturating_sub(self.prompt.len());
        self.completions.iter_mut().for_each(|completion| completion.truncate(room));
        true
    }

    /// Whether every completion has something to learn.
    pub(super) fn teaches(&self) -> bool {
        (0..self.completions.len()).all(|completion| self.labels(completion) > 0)
    }

    /// Labels of one completion. Without a prompt nothing predicts its first token.
    pub fn labels(&self, completion: usize) -> usize {
        let completion = &self.completions[completion];
        let first = usize::from(self.prompt.is_empty());
        (first..completion.tokens.len()).filter(|place| completion.learns(*place)).count()
    }
}
