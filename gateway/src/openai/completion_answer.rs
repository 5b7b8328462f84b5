//! A text completion as one JSON object, and the log-probability arrays that its stream shares.

use crate::openai::chat_answer::prompt_logprobs;
use crate::openai::collected::Collected;
use crate::openai::wire::{AnswerHead, UsageJson, decimal, finite, put, token_text};
use bytes::{BufMut, Bytes};
use serde::Serialize;
use serde_json::{Map, Value};
use tidemill_engine::{TokenRecord, Tokenizer};

/// What a completion reports beside text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompletionReport {
    /// `Some(n)`: log-probabilities with the n likeliest tokens.
    pub logprobs: Option<u32>,
    /// `prompt_logprobs` was asked for.
    pub prompt_logprobs: bool,
    /// Report token ids.
    pub token_ids: bool,
    /// A usage chunk at the end of a stream.
    pub include_usage: bool,
    /// Control tokens have no text.
    pub skip_special_tokens: bool,
    /// Nothing was to be generated: the engine's one token is not shown.
    pub prompt_only: bool,
    /// Per prompt.
    pub prompts: Vec<PromptEcho>,
}

/// A prompt as it is shown again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptEcho {
    /// With `echo`: its text.
    pub text: Option<String>,
    /// Its token ids.
    pub tokens: Vec<u32>,
}

/// Parallel arrays, one entry per token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LogprobArrays {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

/// Fills [`LogprobArrays`] and counts characters as it goes.
#[derive(Clone, Debug)]
pub struct LogprobWriter {
    tokenizer: Tokenizer,
    top: u32,
    skip_special_tokens: bool,
    offset: usize,
}

impl LogprobWriter {
    /// Starts at the first character.
    pub fn new(tokenizer: &Tokenizer, top: u32, skip_special_tokens: bool) -> Self {
        Self { tokenizer: tokenizer.clone(), top, skip_special_tokens, offset: 0 }
    }

    /// Appends a token; the first of a prompt has no record.
    pub fn push(&mut self, arrays: &mut LogprobArrays, token: u32, record: Option<&TokenRecord>) {
        arrays.tokens.push(token_text(&self.tokenizer, token));
        arrays.token_logprobs.push(record.map(|r| finite(r.logprob)));
        arrays.top_logprobs.push(record.map(|r| self.alternatives(r)));
        arrays.text_offset.push(self.offset);
        if !(self.skip_special_tokens && self.tokenizer.is_special(token)) {
            // Characters are counted at their first byte, so that one split over tokens counts once.
            self.offset += self.tokenizer.token_bytes(token).iter().filter(|byte| **byte & 0xC0 != 0x80).count();
        }
    }

    /// The likeliest tokens, and the sampled one if it is not among them.
    fn alternatives(&self, record: &TokenRecord) -> Map<String, Value> {
        let listed = record.top.iter().take(self.top as usize).copied();
        let sampled = std::iter::once((record.token, record.logprob));
        let mut map = Map::new();
        for (token, logprob) in listed.chain(sampled) {
            map.entry(token_text(&self.tokenizer, token)).or_insert_with(|| decimal(logprob));
        }
        map
    }
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<LogprobArrays>,
    finish_reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
}

/// The body of the response: the `n` likeliest choices of each prompt.
pub fn to_json(head: &AnswerHead, report: &CompletionReport, tokenizer: &Tokenizer, collected: &Collected, n: usize) -> Bytes {
    let mut out = head.to_json_prefix();
    let mut index = 0;
    for (prompt, echo) in collected.prompts.iter().zip(&report.prompts) {
        let mut choices: Vec<_> = prompt.choices.iter().collect();
        if choices.len() > n {
            // best_of: by mean log-probability per token, as OpenAI defines it; a stable sort keeps ties in order.
            choices.sort_by(|a, b| b.mean_logprob().total_cmp(&a.mean_logprob()));
            choices.truncate(n);
        }
        for choice in choices {
            let shown: &[TokenRecord] = if report.prompt_only { &[] } else { &choice.records };
            let generated = if report.prompt_only { &[] } else { choice.text_records() };
            let text = match (&echo.text, report.prompt_only) {
                (Some(echo), true) => echo.clone(),
                (Some(echo), false) => format!("{echo}{}", choice.text),
                (None, _) => choice.text.clone(),
            };
            let logprobs = report.logprobs.map(|top| {
                let mut writer = LogprobWriter::new(tokenizer, top, report.skip_special_tokens);
                let mut arrays = LogprobArrays::default();
                if echo.text.is_some() {
                    let records = prompt.logprobs.as_deref().unwrap_or_default();
                    for (at, token) in echo.tokens.iter().enumerate() {
                        writer.push(&mut arrays, *token, records.get(at).and_then(Option::as_ref));
                    }
                }
                for record in generated {
                    writer.push(&mut arrays, record.token, Some(record));
                }
                arrays
            });
            if index > 0 {
                out.put_u8(b',');
            }
            let json = Choice {
                index,
                text: &text,
                logprobs,
                finish_reason: choice.finish.map(|reason| reason.to_string()),
                token_ids: report.token_ids.then(|| shown.iter().map(|r| r.token).collect()),
                prompt_token_ids: report.token_ids.then_some(&echo.tokens),
                prompt_logprobs: match &prompt.logprobs {
                    Some(records) if report.prompt_logprobs => Some(prompt_logprobs(tokenizer, records)),
                    _ => None,
                },
            };
            put(&mut out, &json);
            index += 1;
        }
    }
    let mut usage = collected.usage;
    if report.prompt_only {
        usage.completion_tokens = 0;
    }
    out.put_slice(b"],\"usage\":");
    put(&mut out, &UsageJson::from(usage));
    out.put_u8(b'}');
    out.freeze()
}
