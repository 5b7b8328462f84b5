//! A whole answer, gathered from the engine's events.

use crate::http::deadline;
use crate::http::error::ApiError;
use tidemill_engine::{Event, FinishReason, StopCause, TokenRecord, Usage};

/// Whether more events are of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// More is to come.
    More,
    /// That was the last.
    End,
}

/// One choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChoiceOutput {
    /// All its text.
    pub text: String,
    /// All its tokens, when they are kept.
    pub records: Vec<TokenRecord>,
    /// Sum of the tokens' raw log-probabilities.
    pub logprob_sum: f64,
    /// Tokens generated.
    pub tokens: usize,
    /// Why it ended.
    pub finish: Option<FinishReason>,
    /// The last record only ended the choice.
    ends_with_marker: bool,
}

impl ChoiceOutput {
    /// The tokens that the text is made of: without an end-of-turn token.
    pub fn text_records(&self) -> &[TokenRecord] {
        match self.records.split_last() {
            Some((_, rest)) if self.ends_with_marker => rest,
            _ => &self.records,
        }
    }

    /// Mean raw log-probability per token.
    pub fn mean_logprob(&self) -> f64 {
        self.logprob_sum / self.tokens.max(1) as f64
    }
}

/// One prompt's results.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptOutput {
    /// One entry per prompt token when asked for.
    pub logprobs: Option<Vec<Option<TokenRecord>>>,
    /// Its choices, in order.
    pub choices: Vec<ChoiceOutput>,
}

/// The answers to all prompts of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Collected {
    /// In the order of the request.
    pub prompts: Vec<PromptOutput>,
    /// Over all prompts.
    pub usage: Usage,
    keep_records: bool,
    done: usize,
}

impl Collected {
    /// For `prompts` prompts with `n` choices each. Tokens are kept only when someone will report them.
    pub fn new(prompts: usize, n: usize, keep_records: bool) -> Self {
        let prompt = PromptOutput { logprobs: None, choices: vec![ChoiceOutput::default(); n] };
        Self { prompts: vec![prompt; prompts], usage: Usage::default(), keep_records, done: 0 }
    }

    /// Takes an event of prompt `index`.
    pub fn event(&mut self, index: usize, event: Event) -> Result<Flow, ApiError> {
        let keep_records = self.keep_records;
        let Some(prompt) = self.prompts.get_mut(index) else { return Ok(Flow::More) };
        match event {
            Event::Prompt { logprobs, .. } => prompt.logprobs = logprobs,
            Event::Token { choice, record, text } => {
                if let Some(choice) = prompt.choices.get_mut(choice) {
                    choice.text.push_str(&text);
                    choice.tokens += 1;
                    choice.logprob_sum += f64::from(record.logprob);
                    if keep_records {
                        choice.records.push(record);
                    }
                }
            }
            Event::Finished { reason: FinishReason::Cancelled, .. } => return Err(cancelled()),
            Event::Finished { choice, reason, stop, text, .. } => {
                if let Some(choice) = prompt.choices.get_mut(choice) {
                    choice.text.push_str(&text);
                    choice.ends_with_marker = choice.records.last().is_some_and(|last| is_end_marker(stop.as_ref(), last.token));
                    choice.finish = Some(reason);
                }
            }
            Event::Done(usage) => {
                add_usage(&mut self.usage, usage);
                self.done += 1;
                if self.done == self.prompts.len() {
                    return Ok(Flow::End);
                }
            }
            Event::Failed(message) => return Err(ApiError::fault(message)),
            Event::Expired => return Err(deadline::expired()),
        }
        Ok(Flow::More)
    }
}

/// Sums the counts of several prompts.
pub fn add_usage(sum: &mut Usage, usage: Usage) {
    sum.prompt_tokens += usage.prompt_tokens;
    sum.cached_tokens += usage.cached_tokens;
    sum.completion_tokens += usage.completion_tokens;
}

/// What a client is told whose answer was cut off by the server's end.
pub fn cancelled() -> ApiError {
    ApiError::unavailable(
        Some("cancelled"),
        "The server is shutting down and ended this answer early; send the request again.",
        5,
    )
}

/// Whether `token` only ended the choice: it is in the record of tokens, but no part of the text or of its log-probabilities.
pub fn is_end_marker(stop: Option<&StopCause>, token: u32) -> bool {
    matches!(stop, Some(StopCause::EndOfTurn(end) | StopCause::Token(end)) if *end == token)
}
