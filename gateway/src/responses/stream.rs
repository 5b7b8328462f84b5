//! A response as server-sent events, from `response.created` to `response.completed`, `response.incomplete` or `response.failed`.

use crate::clock::seconds;
use crate::http::error::ApiError;
use crate::http::sse::EventEncoder;
use crate::openai::chat_output::ChatOutput;
use crate::openai::chat_stream::Saving;
use crate::openai::collected::Flow;
use crate::responses::output::EventLog;
use crate::responses::{Ending, Output, Template, object};
use bytes::BytesMut;
use serde_json::{Value, json};
use std::task::{Context, Poll, ready};
use tidemill_engine::Event;
use tidemill_store::ResponseStatus;

/// Keeps a response that has ended.
pub type Save = Box<dyn FnOnce(ResponseStatus, Value) -> Saving + Send>;

/// Turns the events of one request into the response's. Its end is told when the response is stored, so that the next request can go
/// on from it.
pub struct ResponseStream {
    answer: ChatOutput,
    output: Output,
    template: Template,
    log: EventLog,
    begun: bool,
    save: Option<Save>,
    saving: Option<Saving>,
    ended: Option<(Ending, Value)>,
}

impl ResponseStream {
    /// With `save`, the response is kept.
    pub fn new(answer: ChatOutput, output: Output, template: Template, save: Option<Save>) -> Self {
        Self { answer, output, template, log: EventLog::default(), begun: false, save, saving: None, ended: None }
    }

    fn end(&mut self, failure: Option<String>) {
        let (ending, items, usage) = self.output.end(failure, &mut self.log);
        let object = self.template.ended(&ending, items, usage, seconds());
        self.saving = self.save.take().map(|save| save(ending.status(), object.clone()));
        self.ended = Some((ending, object));
    }
}

impl EventEncoder for ResponseStream {
    fn encode(&mut self, _prompt: usize, event: Event, out: &mut BytesMut) -> Result<Flow, ApiError> {
        if !self.begun {
            self.begun = true;
            for kind in ["response.created", "response.in_progress"] {
                self.log.put(kind, json!({"response": self.template.in_progress()}));
            }
        }
        let Self { answer, output, log, .. } = self;
        let mut done = false;
        let result = answer.push(event, &mut |event| done |= output.take(event, log));
        if let Err(error) = result {
            self.end(Some(error.message));
        } else if done {
            self.end(None);
        }
        out.unsplit(self.log.bytes.split());
        Ok(if self.ended.is_some() { Flow::End } else { Flow::More })
    }

    fn poll_last(&mut self, context: &mut Context<'_>, out: &mut BytesMut) -> Poll<Result<(), ApiError>> {
        if let Some(saving) = &mut self.saving {
            let saved = ready!(saving.as_mut().poll(context));
            self.saving = None;
            if let (Err(error), Some((ending, object))) = (saved, &mut self.ended) {
                *ending = Ending::Failed(error.message);
                object::end(object, ending, 0);
            }
        }
        if let Some((ending, object)) = self.ended.take() {
            self.log.put(ending.event(), json!({"response": object}));
            out.unsplit(self.log.bytes.split());
        }
        Poll::Ready(Ok(()))
    }
}
