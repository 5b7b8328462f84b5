//! Pieces of JSON that every answer is made of, written straight into the output buffer.
//!
//! A stream writes one chunk per token, thousands a second on the cores that also compute: the parts that never change are
//! serialised once per request.

use crate::openai::chat_output::ChatUsage;
use bytes::{BufMut, BytesMut};
use serde::Serialize;
use serde_json::Value;
use tidemill_engine::{TokenRecord, Tokenizer, Usage};
use tidemill_store::Tier;

/// Appends a value as JSON.
pub fn put<T: Serialize + ?Sized>(out: &mut BytesMut, value: &T) {
    // Into memory, and only strings, numbers and lists: nothing can fail.
    let _ = serde_json::to_writer(out.writer(), value);
}

/// Appends a server-sent event that has a name.
pub fn put_event(out: &mut BytesMut, name: &str, data: &impl Serialize) {
    out.put_slice(b"event: ");
    out.put_slice(name.as_bytes());
    out.put_slice(b"\ndata: ");
    put(out, data);
    out.put_slice(b"\n\n");
}

/// What identifies an answer: the same in each of its chunks.
#[derive(Clone, Debug)]
pub struct AnswerHead {
    /// Such as `chatcmpl-0198…`.
    pub id: String,
    /// Such as `chat.completion.chunk`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// Model name, as asked for.
    pub model: String,
    /// Stable for one model and configuration.
    pub system_fingerprint: String,
    /// The tier that the request was given.
    pub service_tier: Tier,
}

impl AnswerHead {
    /// `{"id":…,…,"choices":[` — all that precedes the choices.
    pub fn to_json_prefix(&self) -> BytesMut {
        let mut out = BytesMut::with_capacity(256);
        out.put_slice(b"{\"id\":");
        put(&mut out, &self.id);
        out.put_slice(b",\"object\":");
        put(&mut out, self.object);
        out.put_slice(b",\"created\":");
        put(&mut out, &self.created);
        out.put_slice(b",\"model\":");
        put(&mut out, &self.model);
        out.put_slice(b",\"service_tier\":");
        put(&mut out, self.service_tier.as_str());
        out.put_slice(b",\"system_fingerprint\":");
        put(&mut out, &self.system_fingerprint);
        out.put_slice(b",\"choices\":[");
        out
    }
}

/// `usage`, as OpenAI has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct UsageJson {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
    audio_tokens: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct CompletionDetails {
    reasoning_tokens: usize,
    audio_tokens: usize,
    accepted_prediction_tokens: usize,
    rejected_prediction_tokens: usize,
}

impl From<Usage> for UsageJson {
    fn from(tokens: Usage) -> Self {
        Self::from(ChatUsage { tokens, reasoning_tokens: 0 })
    }
}

impl From<ChatUsage> for UsageJson {
    fn from(ChatUsage { tokens: usage, reasoning_tokens }: ChatUsage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_tokens, audio_tokens: 0 },
            completion_tokens_details: CompletionDetails {
                reasoning_tokens,
                audio_tokens: 0,
                accepted_prediction_tokens: 0,
                rejected_prediction_tokens: 0,
            },
        }
    }
}

/// A token's text: its bytes as UTF-8, or OpenAI's `bytes:\x..` spelling where they are part of a character.
pub fn token_text(tokenizer: &Tokenizer, token: u32) -> String {
    let bytes = token_bytes(tokenizer, token);
    match std::str::from_utf8(&bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let mut text = String::from("bytes:");
            for byte in bytes.iter() {
                text.push_str(&format!("\\x{byte:02x}"));
            }
            text
        }
    }
}

/// A token's bytes. A control token such as `<|im_end|>` adds nothing to a text and is shown by its name.
fn token_bytes(tokenizer: &Tokenizer, token: u32) -> std::borrow::Cow<'_, [u8]> {
    let bytes = tokenizer.token_bytes(token);
    match tokenizer.token(token) {
        Some(name) if bytes.is_empty() => name.into_bytes().into(),
        _ => bytes.into(),
    }
}

#[derive(Serialize)]
struct TopLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// One entry of a chat answer's `logprobs.content`.
#[derive(Serialize)]
pub struct TokenLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<TopLogprob>,
}

impl TokenLogprob {
    /// The record with the `top` likeliest alternatives.
    pub fn new(tokenizer: &Tokenizer, record: &TokenRecord, top: u32) -> Self {
        let alternative = |&(token, logprob): &(u32, f32)| TopLogprob {
            token: token_text(tokenizer, token),
            logprob: finite(logprob),
            bytes: token_bytes(tokenizer, token).into_owned(),
        };
        Self {
            token: token_text(tokenizer, record.token),
            logprob: finite(record.logprob),
            bytes: token_bytes(tokenizer, record.token).into_owned(),
            top_logprobs: record.top.iter().take(top as usize).map(alternative).collect(),
        }
    }
}

/// JSON has no −∞; OpenAI writes −9999 for what is impossible.
pub fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// The same number inside a [`Value`], which holds doubles: the double with the fewest digits that names this single, so that one
/// number reads alike wherever an answer has it.
pub fn decimal(logprob: f32) -> Value {
    finite(logprob).to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
