//! One request's side towards its client: the channel, the text of its choices, its times.

use crate::choice::{ChoiceText, End};
use crate::detokenizer::Detokenizer;
use crate::request::{Event, FinishReason, Request, Usage};
use crate::stats::{Ended, Metrics};
use crate::tokenizer::Tokenizer;
use flume::Sender;
use std::sync::Arc;
use std::time::Instant;

/// Events that a client may be behind, beside those of the next steps.
const BACKLOG: usize = 256;

/// Room for every event that one step can cause: a token and an end per choice, the prompt, the last word.
fn events_per_step(choices: usize) -> usize {
    2 * choices + 2
}

/// Capacity of the channel of a request with `n` choices: when it is found to be behind, one step may run and another be planned.
pub(crate) fn capacity(n: usize) -> usize {
    BACKLOG + 2 * events_per_step(n)
}

pub(crate) struct Client {
    pub(crate) request: Arc<Request>,
    pub(crate) arrived: Instant,
    /// When it first ran.
    pub(crate) admitted: Option<Instant>,
    pub(crate) paused: bool,
    events: Sender<Event>,
    gone: bool,
    choices: Vec<Option<Choice>>,
    first_token: Option<Instant>,
    prompt_sent: bool,
    usage: Usage,
}

struct Choice {
    text: ChoiceText,
    last: Option<Instant>,
}

impl Client {
    pub(crate) fn new(
        request: Arc<Request>,
        events: Sender<Event>,
        arrived: Instant,
        tokenizer: &Tokenizer,
        max_model_len: usize,
    ) -> Self {
        let sampling = &request.sampling;
        let limit = sampling.max_tokens.unwrap_or(usize::MAX).min(max_model_len.saturating_sub(request.prompt.len()));
        let choice = || {
            let stream = Detokenizer::continuing(tokenizer, sampling.skip_special_tokens, &request.prompt);
            let stream = stream.showing(&sampling.shown_special);
            Some(Choice { text: ChoiceText::new(stream, sampling, limit), last: None })
        };
        let choices = (0..sampling.n).map(|_| choice()).collect();
        let usage = Usage { prompt_tokens: request.prompt.len(), ..Usage::default() };
        Self {
            request,
            arrived,
            admitted: None,
            paused: false,
            events,
            gone: false,
            choices,
            first_token: None,
            prompt_sent: false,
            usage,
        }
    }

    /// The receiver was dropped.
    pub(crate) fn has_left(&self) -> bool {
        self.gone || self.events.is_disconnected()
    }

    /// The channel may not hold the events of more steps than are under way.
    pub(crate) fn is_behind(&self) -> bool {
        self.prompt_sent && self.events.len() > BACKLOG
    }

    /// Every choice ended.
    pub(crate) fn is_finished(&self) -> bool {
        self.choices.iter().all(Option::is_none)
    }

    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }

    pub(crate) fn prompt(&mut self, cached_tokens: usize, logprobs: Option<Vec<Option<crate::TokenRecord>>>) {
        self.usage.cached_tokens = cached_tokens;
        self.prompt_sent = true;
        self.send(Event::Prompt { cached_tokens, logprobs });
    }

    /// Passes on a token; returns whether its choice ended.
    pub(crate) fn token(
        &mut self,
        index: usize,
        record: crate::TokenRecord,
        end_of_turn: &[u32],
        now: Instant,
        metrics: &Metrics,
    ) -> bool {
        let Some(Some(choice)) = self.choices.get_mut(index) else { return false };
        let piece = choice.text.push(record.token, &self.request.sampling, end_of_turn);
        match choice.last.replace(now) {
            Some(last) => metrics.token(false, now - last),
            None if self.first_token.is_none() => metrics.token(true, now - self.arrived),
            None => {}
        }
        self.first_token.get_or_insert(now);
        self.usage.completion_tokens += 1;
        self.send(Event::Token { choice: index, record, text: piece.text });
        match piece.end {
            Some(end) => {
                self.end_choice(index, end, metrics);
                true
            }
            None => false,
        }
    }

    /// Ends a choice whose text is whole.
    pub(crate) fn complete(&mut self, index: usize, metrics: &Metrics) {
        let Some(Some(choice)) = self.choices.get_mut(index) else { return };
        let end = choice.text.end(FinishReason::Stop, None);
        self.end_choice(index, end, metrics);
    }

    /// Ends all choices that are left, for a reason from outside.
    pub(crate) fn cancel(&mut self, metrics: &Metrics) {
        if !self.prompt_sent {
            self.prompt(0, None);
        }
        for index in 0..self.choices.len() {
            if let Some(mut choice) = self.choices[index].take() {
                let end = choice.text.end(FinishReason::Cancelled, None);
                self.end_choice(index, End { reason: FinishReason::Cancelled, stop: None, ..end }, metrics);
            }
        }
    }

    /// The last word, unless the client left.
    pub(crate) fn done(&mut self, now: Instant, metrics: &Metrics) {
        let (usage, first_token) = (self.usage, self.first_token);
        let (prompt_tokens, generated) = (usage.prompt_tokens, usage.completion_tokens);
        metrics.ended(&Ended { arrived: self.arrived, admitted: self.admitted, first_token, prompt_tokens, generated }, now);
        self.send(Event::Done(usage));
    }

    /// The deadline has passed.
    pub(crate) fn expire(&mut self) {
        self.send(Event::Expired);
    }

    pub(crate) fn fail(&mut self, message: String) {
        self.send(Event::Failed(message));
    }

    fn end_choice(&mut self, index: usize, end: End, metrics: &Metrics) {
        self.choices[index] = None;
        metrics.finished_choice(end.reason);
        let End { reason, stop, text } = end;
        self.send(Event::Finished { choice: index, reason, stop, text, adapter: self.request.generation() });
    }

    fn send(&mut self, event: Event) {
        // The channel has room, because a request whose channel may fill up is not scheduled. So an error is a client that left.
        if !self.gone && self.events.try_send(event).is_err() {
            self.gone = true;
        }
    }
}
