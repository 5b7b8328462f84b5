//! What goes into the engine and what comes out.

use crate::adapters::AdapterLease;
use crate::grammar::Grammar;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// Identity of a request: the bytes of the UUIDv7 that the API returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u128);

/// Which weights a sequence uses: 0 is the base model, others name an immutable adapter generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterGeneration(pub u64);

impl std::fmt::Display for AdapterGeneration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// How tokens are drawn and when to stop. Ranges are checked by [`SamplingParams::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Completions of the one prompt, ≥ 1; the prompt is computed once.
    pub n: usize,
    /// Most tokens to generate; `None` is up to the context.
    pub max_tokens: Option<usize>,
    /// End-of-turn tokens and `stop_token_ids` are not drawn before this many tokens; stop strings do not match.
    pub min_tokens: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// −2..2, 0 is off.
    pub presence_penalty: f32,
    /// −2..2, 0 is off.
    pub frequency_penalty: f32,
    /// Token id, value added to its logit.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same request, same weights: same tokens. `None` draws a fresh one. Choice `i` uses stream `i`.
    pub seed: Option<u64>,
    /// Generation ends where one of these appears; the text before it is kept.
    pub stop: Vec<String>,
    /// Generation ends with one of these tokens.
    pub stop_token_ids: Vec<u32>,
    /// Keep the stop string in the text.
    pub include_stop_str_in_output: bool,
    /// Do not stop at end-of-turn tokens.
    pub ignore_eos: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Special tokens that stay in the text all the same: marks that someone downstream reads.
    pub shown_special: Arc<[u32]>,
    /// `Some(n)`: log-probabilities of sampled tokens with the n likeliest. (The sampled token's own is always recorded.)
    pub logprobs: Option<u32>,
    /// The same for the prompt's tokens; the first has none.
    pub prompt_logprobs: Option<u32>,
    /// What the text must look like. The choice ends when the grammar can only end; an end-of-turn token is not drawn before.
    pub grammar: Option<Arc<Grammar>>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            max_tokens: None,
            min_tokens: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            skip_special_tokens: true,
            shown_special: Arc::default(),
            logprobs: None,
            prompt_logprobs: None,
            grammar: None,
        }
    }
}

/// Whose request it is: those who share a full engine get equal parts of it, by weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Identity; 0 is everybody who has none.
    pub id: u64,
    /// Share beside others, ≥ 1.
    pub weight: u32,
}

impl Default for Tenant {
    fn default() -> Self {
        Self { id: 0, weight: 1 }
    }
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Identity.
    pub id: RequestId,
    /// Prompt, already templated and tokenised; not empty.
    pub prompt: Vec<u32>,
    /// Sampling.
    pub sampling: SamplingParams,
    /// Lower runs first; within a priority tenants share, and a tenant's requests run in order of arrival.
    pub priority: i32,
    /// Prefix-cache entries are shared only between equal salts.
    pub cache_salt: Option<String>,
    /// Weights; `None` is the base model. The adapter stays loaded as long as somebody holds the request.
    pub adapter: Option<AdapterLease>,
    /// Whose it is.
    pub tenant: Tenant,
    /// When the answer is of no more use: it is refused if it cannot come in time, and ended when the time has passed.
    pub deadline: Option<Instant>,
}

impl Request {
    /// Which weights it uses.
    pub fn generation(&self) -> AdapterGeneration {
        self.adapter.as_ref().map(AdapterLease::generation).unwrap_or_default()
    }
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-turn token, stop token or stop string.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
    /// The client left or the server is shutting down.
    Cancelled,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "abort",
        })
    }
}

/// What ended a choice with [`FinishReason::Stop`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// One of the model's end-of-turn tokens.
    EndOfTurn(u32),
    /// One of `stop_token_ids`.
    Token(u32),
    /// One of `stop`.
    Text(String),
}

/// One token's record.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRecord {
    /// Token id.
    pub token: u32,
    /// Raw log-probability: `log_softmax` of the model's logits.
    pub logprob: f32,
    /// Log-probability under the distribution that was sampled from (after bias, penalties, temperature and truncation).
    pub processed_logprob: f32,
    /// The likeliest tokens with raw log-probabilities; empty unless asked for.
    pub top: Vec<(u32, f32)>,
    /// The likeliest tokens after processing; empty unless asked for.
    pub processed_top: Vec<(u32, f32)>,
}

/// Token counts of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens, counted once whatever `n` is.
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache.
    pub cached_tokens: usize,
    /// Generated tokens over all choices.
    pub completion_tokens: usize,
}

/// What the engine says about a request, in this order: one `Prompt`, then `Token`s and one `Finished` per choice, then one `Done`.
/// `Failed` or `Expired` may come at any time and is the last.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt is computed.
    Prompt {
        /// Found in the prefix cache.
        cached_tokens: usize,
        /// One entry per prompt token when asked for; the first is `None`.
        logprobs: Option<Vec<Option<TokenRecord>>>,
    },
    /// A token was sampled. `text` is what became certain: it may be empty (half a character, a possible stop string) or hold
    /// the text of several tokens.
    Token {
        /// Which choice.
        choice: usize,
        /// The token.
        record: TokenRecord,
        /// New text.
        text: String,
    },
    /// A choice ended; `text` is what was held back and is now certain.
    Finished {
        /// Which choice.
        choice: usize,
        /// Why.
        reason: FinishReason,
        /// What stopped it.
        stop: Option<StopCause>,
        /// Last text.
        text: String,
        /// Weights that made it.
        adapter: AdapterGeneration,
    },
    /// All choices ended.
    Done(Usage),
    /// The request failed for a reason of ours; the text is fit for the client.
    Failed(String),
    /// Its deadline passed; the last word.
    Expired,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The waiting queue is full.
    #[error("the server is busy: {waiting} requests are waiting, the limit is {limit}; retry after {retry_after_s} s")]
    QueueFull {
        /// Waiting now.
        waiting: usize,
        /// Most that may wait.
        limit: usize,
        /// A guess from the queue's speed.
        retry_after_s: u32,
    },
    /// By the speed of the queue it would be too late.
    #[error(
        "the server is busy: an answer could begin in about {expected_ms} ms, the deadline is in {left_ms} ms; retry after {retry_after_s} s, or allow more time"
    )]
    TooLate {
        /// Until the first token, by estimate.
        expected_ms: u64,
        /// Until the deadline.
        left_ms: u64,
        /// When the queue may be shorter.
        retry_after_s: u32,
    },
    /// The server finishes what it has and takes nothing new.
    #[error("the server is shutting down; retry on another replica")]
    Draining,
    /// Prompt and output do not fit.
    #[error("the model's context is {limit} tokens, the prompt has {prompt}")]
    TooLong {
        /// Tokens in the prompt.
        prompt: usize,
        /// Most tokens of prompt and output together.
        limit: usize,
    },
    /// A parameter is out of range.
    #[error("{param}: {message}")]
    Invalid {
        /// Name as in the API.
        param: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
    /// The engine is gone.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}
