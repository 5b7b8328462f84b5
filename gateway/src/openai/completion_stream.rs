//! A text completion as server-sent events.

use crate::http::deadline;
use crate::http::error::ApiError;
use crate::http::sse::EventEncoder;
use crate::openai::collected::{Flow, add_usage, cancelled, is_end_marker};
use crate::openai::completion_answer::{CompletionReport, LogprobArrays, LogprobWriter};
use crate::openai::wire::{AnswerHead, UsageJson, put};
use bytes::{BufMut, BytesMut};
use tidemill_engine::{Event, FinishReason, TokenRecord, Tokenizer, Usage};

/// Turns the events of one completion request into chunks.
pub struct CompletionStream {
    prefix: BytesMut,
    suffix: &'static [u8],
    report: CompletionReport,
    n: usize,
    choices: Vec<ChoiceState>,
    usage: Usage,
    done: usize,
}

struct ChoiceState {
    /// Tokens whose text is not certain yet, kept only when they will be reported.
    held: Vec<TokenRecord>,
    logprobs: Option<LogprobWriter>,
}

impl CompletionStream {
    /// For `n` choices of each prompt in the report.
    pub fn new(head: &AnswerHead, n: usize, report: CompletionReport, tokenizer: &Tokenizer) -> Self {
        let mut prefix = BytesMut::from(&b"data: "[..]);
        prefix.extend_from_slice(&head.to_json_prefix());
        let suffix: &[u8] = if report.include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        let state = || ChoiceState {
            held: Vec::new(),
            logprobs: report.logprobs.map(|top| LogprobWriter::new(tokenizer, top, report.skip_special_tokens)),
        };
        let choices = (0..n * report.prompts.len()).map(|_| state()).collect();
        Self { prefix, suffix, report, n, choices, usage: Usage::default(), done: 0 }
    }

    fn chunk(&self, out: &mut BytesMut, index: usize, text: &str, part: &Part<'_>) {
        out.extend_from_slice(&self.prefix);
        out.put_slice(b"{\"index\":");
        put(out, &index);
        out.put_slice(b",\"text\":");
        put(out, text);
        out.put_slice(b",\"logprobs\":");
        put(out, &part.logprobs);
        out.put_slice(b",\"finish_reason\":");
        put(out, &part.finish.map(|reason| reason.to_string()));
        if self.report.token_ids {
            out.put_slice(b",\"token_ids\":");
            put(out, &part.token_ids);
            if let Some(ids) = part.prompt_token_ids {
                out.put_slice(b",\"prompt_token_ids\":");
                put(out, ids);
            }
        }
        out.put_u8(b'}');
        out.extend_from_slice(self.suffix);
    }

    /// A chunk of generated text with the records it is made of.
    fn content(&mut self, out: &mut BytesMut, index: usize, text: &str, records: &[TokenRecord]) {
        let mut part = Part { token_ids: records.iter().map(|r| r.token).collect(), ..Part::default() };
        if let Some(writer) = self.choices.get_mut(index).and_then(|c| c.logprobs.as_mut()) {
            let mut arrays = LogprobArrays::default();
            for record in records {
                writer.push(&mut arrays, record.token, Some(record));
            }
            part.logprobs = Some(arrays);
        }
        self.chunk(out, index, text, &part);
    }

    /// The chunk that shows the prompt again, for each choice of the prompt.
    fn prompt(&mut self, out: &mut BytesMut, prompt: usize, logprobs: Option<&[Option<TokenRecord>]>) {
        let Some(echo) = self.report.prompts.get_mut(prompt).map(std::mem::take) else { return };
        if echo.text.is_none() && !self.report.token_ids {
            return;
        }
        for index in prompt * self.n..(prompt + 1) * self.n {
            let mut part = Part { prompt_token_ids: Some(&echo.tokens), ..Part::default() };
            let writer = self.choices.get_mut(index).and_then(|c| c.logprobs.as_mut());
            if let (Some(writer), Some(_)) = (writer, &echo.text) {
                let mut arrays = LogprobArrays::default();
                for (at, token) in echo.tokens.iter().enumerate() {
                    let record = logprobs.and_then(|records| records.get(at)).and_then(Option::as_ref);
                    writer.push(&mut arrays, *token, record);
                }
                part.logprobs = Some(arrays);
            }
            self.chunk(out, index, echo.text.as_deref().unwrap_or_default(), &part);
        }
    }

    fn token(&mut self, out: &mut BytesMut, index: usize, record: TokenRecord, text: &str) {
        if self.report.prompt_only {
            return;
        }
        let keeps = self.report.logprobs.is_some() || self.report.token_ids;
        let mut records = Vec::new();
        if keeps && let Some(choice) = self.choices.get_mut(index) {
            choice.held.push(record);
            if !text.is_empty() {
                records = std::mem::take(&mut choice.held);
            }
        }
        if !text.is_empty() {
            self.content(out, index, text, &records);
        }
    }
}

/// What a chunk carries beside text.
#[derive(Default)]
struct Part<'a> {
    logprobs: Option<LogprobArrays>,
    finish: Option<FinishReason>,
    token_ids: Vec<u32>,
    prompt_token_ids: Option<&'a [u32]>,
}

impl EventEncoder for CompletionStream {
    fn encode(&mut self, prompt: usize, event: Event, out: &mut BytesMut) -> Result<Flow, ApiError> {
        match event {
            Event::Prompt { logprobs, .. } => self.prompt(out, prompt, logprobs.as_deref()),
            Event::Token { choice, record, text } => self.token(out, prompt * self.n + choice, record, &text),
            Event::Finished { reason: FinishReason::Cancelled, .. } => return Err(cancelled()),
            Event::Finished { choice, reason, stop, text, .. } => {
                let index = prompt * self.n + choice;
                let mut records = self.choices.get_mut(index).map(|c| std::mem::take(&mut c.held)).unwrap_or_default();
                let end_marker = records.pop_if(|last| is_end_marker(stop.as_ref(), last.token)).map(|last| last.token);
                if !self.report.prompt_only && (!text.is_empty() || !records.is_empty()) {
                    self.content(out, index, &text, &records);
                }
                let part = Part { finish: Some(reason), token_ids: end_marker.into_iter().collect(), ..Part::default() };
                self.chunk(out, index, "", &part);
            }
            Event::Done(usage) => {
                add_usage(&mut self.usage, usage);
                self.done += 1;
                if self.done * self.n < self.choices.len() {
                    return Ok(Flow::More);
                }
                if self.report.include_usage {
                    if self.report.prompt_only {
                        self.usage.completion_tokens = 0;
                    }
                    out.extend_from_slice(&self.prefix);
                    out.put_slice(b"],\"usage\":");
                    put(out, &UsageJson::from(self.usage));
                    out.put_slice(b"}\n\n");
                }
                out.put_slice(b"data: [DONE]\n\n");
                return Ok(Flow::End);
            }
            Event::Failed(message) => return Err(ApiError::fault(message)),
            Event::Expired => return Err(deadline::expired()),
        }
        Ok(Flow::More)
    }
}
