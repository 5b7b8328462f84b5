//! A chat answer as server-sent events, in the order that clients rely on: a role chunk per choice, content deltas, a finish
//! chunk per choice, the usage chunk if asked for, `[DONE]`.

use crate::http::error::ApiError;
use crate::http::sse::EventEncoder;
use crate::openai::chat_output::{ChatCollected, ChatEvent, ChatFinish, ChatOutput, Delta, OutputFormat};
use crate::openai::collected::Flow;
use crate::openai::wire::{AnswerHead, TokenLogprob, UsageJson, put};
use bytes::{BufMut, BytesMut};
use serde::Serialize;
use serde_json::{Value, json};
use std::pin::Pin;
use std::task::{Context, Poll};
use tidemill_engine::{Event, TokenRecord, Tokenizer};

/// What a chat answer reports beside text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatReport {
    /// `Some(n)`: log-probabilities with the n likeliest tokens.
    pub logprobs: Option<u32>,
    /// The prompt's token ids, when token ids are wanted.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// A usage chunk at the end.
    pub include_usage: bool,
    /// Text that each choice starts with (`echo`).
    pub echo: Option<String>,
    /// Ids of the choices, shown when they are made to be compared.
    pub choice_ids: Option<Vec<String>>,
    /// Calls are written as the older `function_call`.
    pub legacy_calls: bool,
}

/// What a choice carries that OpenAI's do not.
#[derive(Serialize)]
pub struct OwnFields<'a> {
    /// The choice's own id, for feedback.
    pub id: &'a str,
}

impl ChatReport {
    /// Whether someone reads the tokens behind the text.
    pub fn keeps_records(&self) -> bool {
        self.logprobs.is_some() || self.prompt_token_ids.is_some()
    }

    /// OpenAI's word for the end.
    pub fn finish_reason(&self, reason: ChatFinish) -> &'static str {
        match reason {
            ChatFinish::ToolCalls if self.legacy_calls => "function_call",
            other => other.as_str(),
        }
    }

    /// Beside choice `index`.
    pub fn own_fields(&self, index: usize) -> Option<OwnFields<'_>> {
        self.choice_ids.as_ref()?.get(index).map(|id| OwnFields { id })
    }
}

/// Turns the events of one chat request into chunks.
pub struct ChatStream {
    output: ChatOutput,
    writer: Writer,
    keeping: Option<Keeping>,
}

/// Work that a stream's last chunks wait for.
pub type Saving = Pin<Box<dyn Future<Output = Result<(), ApiError>> + Send>>;

/// Gathers the answer to have it stored before its end is told.
struct Keeping {
    collected: ChatCollected,
    save: Option<Box<dyn FnOnce(ChatCollected) -> Saving + Send>>,
    saving: Option<Saving>,
    /// What waits for that.
    last: BytesMut,
}

/// Writes chunks.
struct Writer {
    prefix: BytesMut,
    suffix: &'static [u8],
    tokenizer: Tokenizer,
    report: ChatReport,
    n: usize,
}

impl ChatStream {
    /// For an answer of `n` choices.
    pub fn new(head: &AnswerHead, n: usize, report: ChatReport, format: OutputFormat, tokenizer: Tokenizer) -> Self {
        let mut prefix = BytesMut::from(&b"data: "[..]);
        prefix.extend_from_slice(&head.to_json_prefix());
        let suffix: &[u8] = if report.include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        let output = ChatOutput::new(format, n, report.keeps_records());
        Self { output, writer: Writer { prefix, suffix, tokenizer, report, n }, keeping: None }
    }

    /// The same, with the whole answer given to `save`; the end is told when that is done.
    pub fn keeping(self, save: impl FnOnce(ChatCollected) -> Saving + Send + 'static) -> Self {
        let collected = ChatCollected::empty(self.writer.n);
        let keeping = Keeping { collected, save: Some(Box::new(save)), saving: None, last: BytesMut::new() };
        Self { keeping: Some(keeping), ..self }
    }
}

impl Writer {
    fn open(&self, out: &mut BytesMut, choice: usize) {
        out.extend_from_slice(&self.prefix);
        out.put_slice(b"{\"index\":");
        put(out, &choice);
        out.put_slice(b",\"delta\":{");
    }

    fn role(&self, out: &mut BytesMut, choice: usize) {
        self.open(out, choice);
        out.put_slice(b"\"role\":\"assistant\",\"content\":\"\",\"refusal\":null},\"logprobs\":null,\"finish_reason\":null");
        if let Some(own) = self.report.own_fields(choice) {
            out.put_slice(b",\"tidemill\":");
            put(out, &own);
        }
        out.put_u8(b'}');
        match &self.report.prompt_token_ids {
            // vLLM's place for them: beside the choices of the first chunk.
            Some(ids) if choice == 0 => {
                out.put_slice(b"],\"prompt_token_ids\":");
                put(out, ids);
                out.extend_from_slice(&self.suffix[1..]);
            }
            _ => out.extend_from_slice(self.suffix),
        }
    }

    fn content(&self, out: &mut BytesMut, choice: usize, text: &str, records: &[TokenRecord], marks: &[u32]) {
        self.open(out, choice);
        out.put_slice(b"\"content\":");
        put(out, text);
        self.close(out, Some(records), records, marks);
    }

    fn reasoning(&self, out: &mut BytesMut, choice: usize, text: &str, records: &[TokenRecord], marks: &[u32]) {
        self.open(out, choice);
        out.put_slice(b"\"reasoning_content\":");
        put(out, text);
        self.close(out, None, records, marks);
    }

    fn call(&self, out: &mut BytesMut, choice: usize, delta: &Delta, records: &[TokenRecord], marks: &[u32]) {
        self.open(out, choice);
        match (delta, self.report.legacy_calls) {
            (Delta::Call { name, .. }, true) => put_part(out, "function_call", &json!({"name": name, "arguments": ""})),
            (Delta::Arguments { text, .. }, true) => put_part(out, "function_call", &json!({"arguments": text})),
            (Delta::Call { index, id, name }, false) => {
                let function = json!({"name": name, "arguments": ""});
                put_part(out, "tool_calls", &json!([{"index": index, "id": id, "type": "function", "function": function}]));
            }
            (Delta::Arguments { index, text }, false) => {
                put_part(out, "tool_calls", &json!([{"index": index, "function": {"arguments": text}}]));
            }
            (Delta::Text(_) | Delta::Reasoning(_), _) => {}
        }
        self.close(out, None, records, marks);
    }

    /// The rest of a delta's chunk: `reported` has log-probabilities, `records` and `marks` are all its tokens.
    fn close(&self, out: &mut BytesMut, reported: Option<&[TokenRecord]>, records: &[TokenRecord], marks: &[u32]) {
        out.put_slice(b"},\"logprobs\":");
        match self.report.logprobs.zip(reported) {
            None => out.put_slice(b"null"),
            Some((top, reported)) => {
                let entries: Vec<_> = reported.iter().map(|r| TokenLogprob::new(&self.tokenizer, r, top)).collect();
                out.put_slice(b"{\"content\":");
                put(out, &entries);
                out.put_slice(b",\"refusal\":null}");
            }
        }
        out.put_slice(b",\"finish_reason\":null");
        self.token_ids(out, marks.iter().copied().chain(records.iter().map(|record| record.token)));
        out.put_slice(b"}");
        out.extend_from_slice(self.suffix);
    }

    fn token_ids(&self, out: &mut BytesMut, ids: impl Iterator<Item = u32>) {
        if self.report.prompt_token_ids.is_some() {
            out.put_slice(b",\"token_ids\":");
            put(out, &ids.collect::<Vec<u32>>());
        }
    }

    fn finish(&self, out: &mut BytesMut, choice: usize, reason: ChatFinish, marks: &[u32], end_marker: Option<u32>) {
        self.open(out, choice);
        out.put_slice(b"},\"logprobs\":null,\"finish_reason\":\"");
        out.put_slice(self.report.finish_reason(reason).as_bytes());
        out.put_slice(b"\"");
        self.token_ids(out, marks.iter().copied().chain(end_marker));
        out.put_slice(b"}");
        out.extend_from_slice(self.suffix);
    }
}

/// One member of a delta.
fn put_part(out: &mut BytesMut, name: &str, value: &Value) {
    put(out, name);
    out.put_u8(b':');
    put(out, value);
}

impl EventEncoder for ChatStream {
    fn encode(&mut self, _prompt: usize, event: Event, out: &mut BytesMut) -> Result<Flow, ApiError> {
        let Self { output, writer, keeping } = self;
        let mut flow = Flow::More;
        output.push(event, &mut |event| {
            let whole = keeping.as_mut().is_some_and(|keeping| keeping.collected.take(event.clone()));
            let out = match keeping {
                Some(keeping) if whole => {
                    keeping.saving = keeping.save.take().map(|save| save(std::mem::take(&mut keeping.collected)));
                    &mut keeping.last
                }
                _ => &mut *out,
            };
            if writer.write(event, out) == Flow::End {
                flow = Flow::End;
            }
        })?;
        Ok(flow)
    }

    fn poll_last(&mut self, context: &mut Context<'_>, out: &mut BytesMut) -> Poll<Result<(), ApiError>> {
        let Some(keeping) = &mut self.keeping else { return Poll::Ready(Ok(())) };
        if let Some(saving) = &mut keeping.saving {
            match saving.as_mut().poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(done) => {
                    keeping.saving = None;
                    done?;
                }
            }
        }
        out.extend_from_slice(&keeping.last);
        Poll::Ready(Ok(()))
    }
}

impl Writer {
    fn write(&mut self, event: ChatEvent, out: &mut BytesMut) -> Flow {
        match event {
            ChatEvent::Prompt { .. } => {
                for choice in 0..self.n {
                    self.role(out, choice);
                }
                if let Some(echo) = self.report.echo.take() {
                    for choice in 0..self.n {
                        self.content(out, choice, &echo, &[], &[]);
                    }
                }
            }
            ChatEvent::Delta { choice, delta, records, marks } => match &delta {
                Delta::Text(text) => self.content(out, choice, text, &records, &marks),
                Delta::Reasoning(text) => self.reasoning(out, choice, text, &records, &marks),
                Delta::Call { .. } | Delta::Arguments { .. } => self.call(out, choice, &delta, &records, &marks),
            },
            ChatEvent::Finished { choice, reason, marks, end_marker, .. } => {
                self.finish(out, choice, reason, &marks, end_marker);
            }
            ChatEvent::Done(usage) => {
                if self.report.include_usage {
                    out.extend_from_slice(&self.prefix);
                    out.put_slice(b"],\"usage\":");
                    put(out, &UsageJson::from(usage));
                    out.put_slice(b"}\n\n");
                }
                out.put_slice(b"data: [DONE]\n\n");
                return Flow::End;
            }
        }
        Flow::More
    }
}
