//! A message as server-sent events: `message_start`, each content block with its start, deltas and stop, `message_delta`,
//! `message_stop`.

use super::{Head, error, stop_reason, usage};
use crate::http::error::ApiError;
use crate::http::sse::EventEncoder;
use crate::openai::chat_output::{ChatEvent, ChatFinish, ChatOutput, ChatUsage, Delta, OutputFormat};
use crate::openai::collected::Flow;
use crate::openai::wire::put_event;
use bytes::BytesMut;
use serde_json::{Value, json};
use tidemill_engine::{Event, StopCause, Usage};

/// Turns the engine's events into those of one message.
pub struct MessageStream {
    output: ChatOutput,
    writer: Writer,
}

struct Writer {
    head: Head,
    prompt_tokens: usize,
    thinking: bool,
    max_tokens: usize,
    /// The block that is open, and what it holds.
    open: Option<Block>,
    /// Blocks begun.
    blocks: usize,
    finish: Option<(ChatFinish, Option<StopCause>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    ToolUse,
}

impl MessageStream {
    /// For a prompt of so many tokens. `thinking`: reasoning is shown; `max_tokens` is the request's.
    pub fn new(head: Head, prompt_tokens: usize, format: &OutputFormat, thinking: bool, max_tokens: usize) -> Self {
        let output = ChatOutput::new(format.clone(), 1, false);
        Self { output, writer: Writer { head, prompt_tokens, thinking, max_tokens, open: None, blocks: 0, finish: None } }
    }
}

impl EventEncoder for MessageStream {
    fn encode(&mut self, _prompt: usize, event: Event, out: &mut BytesMut) -> Result<Flow, ApiError> {
        let Self { output, writer } = self;
        let mut flow = Flow::More;
        let pushed = output.push(event, &mut |event| {
            if writer.write(event, out) == Flow::End {
                flow = Flow::End;
            }
        });
        if let Err(failed) = pushed {
            put_event(out, "error", &error::event(&failed));
            return Ok(Flow::End);
        }
        Ok(flow)
    }
}

impl Writer {
    fn write(&mut self, event: ChatEvent, out: &mut BytesMut) -> Flow {
        match event {
            ChatEvent::Prompt { cached_tokens, .. } => self.start(cached_tokens, out),
            ChatEvent::Delta { delta, .. } => self.delta(delta, out),
            ChatEvent::Finished { reason, stop, .. } => {
                self.close(out);
                self.finish = Some((reason, stop));
            }
            ChatEvent::Done(usage) => {
                self.stop(&usage, out);
                return Flow::End;
            }
        }
        Flow::More
    }

    fn start(&self, cached_tokens: usize, out: &mut BytesMut) {
        let tokens = Usage { prompt_tokens: self.prompt_tokens, cached_tokens, completion_tokens: 0 };
        let message = json!({
            "id": self.head.id,
            "type": "message",
            "role": "assistant",
            "model": self.head.model,
            "content": [],
            "stop_reason": null,
            "stop_sequence": null,
            "usage": usage(&ChatUsage { tokens, reasoning_tokens: 0 }),
        });
        put_event(out, "message_start", &json!({"type": "message_start", "message": message}));
    }

    fn delta(&mut self, delta: Delta, out: &mut BytesMut) {
        match delta {
            Delta::Reasoning(_) if !self.thinking => {}
            Delta::Reasoning(text) => {
                self.ensure(Block::Thinking, out);
                self.add(&json!({"type": "thinking_delta", "thinking": text}), out);
            }
            Delta::Text(text) if text.is_empty() => {}
            Delta::Text(text) => {
                self.ensure(Block::Text, out);
                self.add(&json!({"type": "text_delta", "text": text}), out);
            }
            Delta::Call { id, name, .. } => {
                self.begin(Block::ToolUse, &json!({"type": "tool_use", "id": id, "name": name, "input": {}}), out);
            }
            Delta::Arguments { text, .. } => self.add(&json!({"type": "input_json_delta", "partial_json": text}), out),
        }
    }

    /// Opens a block of this kind unless it is open.
    fn ensure(&mut self, block: Block, out: &mut BytesMut) {
        if self.open != Some(block) {
            let start = match block {
                Block::Thinking => json!({"type": "thinking", "thinking": "", "signature": ""}),
                Block::Text | Block::ToolUse => json!({"type": "text", "text": ""}),
            };
            self.begin(block, &start, out);
        }
    }

    fn begin(&mut self, block: Block, start: &Value, out: &mut BytesMut) {
        self.close(out);
        let event = json!({"type": "content_block_start", "index": self.blocks, "content_block": start});
        put_event(out, "content_block_start", &event);
        self.open = Some(block);
        self.blocks += 1;
    }

    fn add(&self, delta: &Value, out: &mut BytesMut) {
        let index = self.blocks.saturating_sub(1);
        put_event(out, "content_block_delta", &json!({"type": "content_block_delta", "index": index, "delta": delta}));
    }

    fn close(&mut self, out: &mut BytesMut) {
        if self.open.take().is_some() {
            let index = self.blocks.saturating_sub(1);
            put_event(out, "content_block_stop", &json!({"type": "content_block_stop", "index": index}));
        }
    }

    fn stop(&self, counts: &ChatUsage, out: &mut BytesMut) {
        let (reason, stop) = self.finish.as_ref().map_or((ChatFinish::Stop, None), |(reason, stop)| (*reason, stop.as_ref()));
        let limited = counts.tokens.completion_tokens >= self.max_tokens;
        let (reason, sequence) = stop_reason(reason, stop, limited);
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        put_event(out, "message_delta", &json!({"type": "message_delta", "delta": delta, "usage": usage(counts)}));
        put_event(out, "message_stop", &json!({"type": "message_stop"}));
    }
}
