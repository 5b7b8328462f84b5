//! The events of a request's prompts as one stream.

use crate::limits::Meter;
use crate::recording::Recorder;
use crate::telemetry::Follower;
use flume::r#async::RecvStream;
use futures_core::Stream;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use tidemill_engine::Event;

/// Events of one or more engine requests. Dropping it cancels all of them.
pub struct Events {
    sources: Vec<Source>,
    /// Where to look first, so that no prompt's events wait behind another's.
    next: usize,
    /// Sees what passes.
    recorder: Option<Recorder>,
    /// Counts what passes, and holds the request's place within the limits.
    meter: Option<Meter>,
    /// Takes note of what passes for the log and the trace.
    follower: Option<Follower>,
    /// Log-probabilities are shown as they were after processing.
    processed: bool,
}

struct Source {
    stream: RecvStream<'static, Event>,
    over: bool,
}

impl Events {
    /// Over the receivers that the engine gave, one per prompt.
    pub fn new(receivers: Vec<flume::Receiver<Event>>) -> Self {
        let sources = receivers.into_iter().map(|r| Source { stream: r.into_stream(), over: false }).collect();
        Self { sources, next: 0, recorder: None, meter: None, follower: None, processed: false }
    }

    /// The same, with everything that passes shown to `recorder`. It is dropped with the events, which ends the record.
    pub fn recorded(mut self, recorder: Option<Recorder>) -> Self {
        self.recorder = recorder;
        self
    }

    /// The same, counted by `meter`, which is dropped with the events.
    pub fn metered(mut self, meter: Meter) -> Self {
        self.meter = Some(meter);
        self
    }

    /// The same, counted for the log and the trace.
    pub fn followed(mut self, follower: Option<Follower>) -> Self {
        self.follower = follower;
        self
    }

    /// The same, with processed log-probabilities in the place of raw ones when `processed` says so. The record keeps both.
    pub fn showing(mut self, processed: bool) -> Self {
        self.processed = processed;
        self
    }

    /// The next event and the index of its prompt; `None` when every prompt is done. An engine that goes away without a last word
    /// shows as [`Event::Failed`].
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Event)>> {
        let mut next = self.poll_sources(context);
        if let Poll::Ready(Some((prompt, event))) = &mut next {
            if let Some(recorder) = &mut self.recorder {
                recorder.see(*prompt, event);
            }
            if let Some(follower) = &mut self.follower {
                follower.see(*prompt, event);
            }
            if let Some(meter) = &mut self.meter {
                meter.see(*prompt, event);
            }
            if let (true, Event::Token { record, .. }) = (self.processed, event) {
                record.logprob = record.processed_logprob;
                // Plain greedy choice processes nothing, and then there is one list.
                if !record.processed_top.is_empty() {
                    record.top = std::mem::take(&mut record.processed_top);
                }
            }
        }
        next
    }

    fn poll_sources(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Event)>> {
        let count = self.sources.len();
        let mut waiting = false;
        for step in 0..count {
            let index = (self.next + step) % count;
            let Some(source) = self.sources.get_mut(index).filter(|s| !s.over) else { continue };
            match Pin::new(&mut source.stream).poll_next(context) {
                Poll::Ready(Some(event)) => {
                    source.over = matches!(event, Event::Done(_) | Event::Failed(_) | Event::Expired);
                    self.next = index;
                    return Poll::Ready(Some((index, event)));
                }
                Poll::Ready(None) => {
                    source.over = true;
                    let message = "The engine stopped before the answer was complete.".to_owned();
                    return Poll::Ready(Some((index, Event::Failed(message))));
                }
                Poll::Pending => waiting = true,
            }
        }
        if waiting { Poll::Pending } else { Poll::Ready(None) }
    }

    /// The same, to be awaited.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        poll_fn(|context| self.poll_next(context)).await
    }
}

impl Drop for Events {
    /// A client that leaves has used what was made for it, taken or not.
    fn drop(&mut self) {
        let mut context = Context::from_waker(Waker::noop());
        for (prompt, source) in self.sources.iter_mut().enumerate().filter(|(_, source)| !source.over) {
            while let Poll::Ready(Some(event)) = Pin::new(&mut source.stream).poll_next(&mut context) {
                if let Some(follower) = &mut self.follower {
                    follower.see(prompt, &event);
                }
                if let Some(meter) = &mut self.meter {
                    meter.see(prompt, &event);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidemill_engine::{TokenRecord, Usage};

    #[tokio::test]
    async fn processed_log_probabilities_are_shown_when_asked_for() {
        let record = TokenRecord {
            token: 7,
            logprob: -2.0,
            processed_logprob: -0.5,
            top: vec![(1, -1.0)],
            processed_top: vec![(7, -0.5)],
        };
        for (processed, logprob, top) in [(false, -2.0, (1, -1.0)), (true, -0.5, (7, -0.5))] {
            let (sender, receiver) = flume::bounded(1);
            sender.send(Event::Token { choice: 0, record: record.clone(), text: String::new() }).unwrap();
            let mut events = Events::new(vec![receiver]).showing(processed);
            let Some((0, Event::Token { record, .. })) = events.next().await else { panic!("a token was sent") };
            assert_eq!((record.logprob, record.top[0]), (logprob, top));
        }
    }

    #[tokio::test]
    async fn an_engine_that_vanishes_is_a_failure_and_not_an_end() {
        let (a, a_events) = flume::bounded(4);
        let (b, b_events) = flume::bounded(4);
        a.send(Event::Done(Usage::default())).unwrap();
        drop(b);
        let mut events = Events::new(vec![a_events, b_events]);
        assert_eq!(events.next().await, Some((0, Event::Done(Usage::default()))));
        assert!(matches!(events.next().await, Some((1, Event::Failed(_)))));
        assert_eq!(events.next().await, None);
    }
}
