//! Counts one request while it runs.

use crate::limits::limiter::{Limiter, Subject};
use crate::limits::price::Price;
use std::sync::Arc;
use tidemill_engine::Event;
use tidemill_store::{Money, Usage};

/// Tokens that are counted together: the books are shared by all requests.
const BATCH: usize = 16;

/// A request's place within the limits. Dropping it gives the place back: the answer has ended, or the client has left.
pub struct Meter {
    limiter: Arc<Limiter>,
    subjects: Vec<Subject>,
    price: Price,
    /// Tokens of each prompt.
    inputs: Vec<usize>,
    /// Generated, and not counted yet.
    pending: usize,
}

impl Meter {
    pub(super) fn new(limiter: Arc<Limiter>, subjects: Vec<Subject>, price: Price, inputs: Vec<usize>) -> Self {
        Self { limiter, subjects, price, inputs, pending: 0 }
    }

    /// Takes note of an event of prompt `index`.
    pub fn see(&mut self, index: usize, event: &Event) {
        match event {
            Event::Prompt { cached_tokens, .. } => self.prompt(index, *cached_tokens),
            Event::Token { .. } => {
                self.pending += 1;
                if self.pending >= BATCH {
                    self.settle();
                }
            }
            _ => {}
        }
    }

    /// Prompt `index` has been computed, `cached` of its tokens being found in the prefix cache.
    pub fn prompt(&mut self, index: usize, cached: usize) {
        // A prompt is computed once, whatever is said twice.
        let Some(input) = self.inputs.get_mut(index).map(std::mem::take).filter(|input| *input > 0) else { return };
        let cached = cached.min(input);
        self.limiter.count(
            &self.subjects,
            Usage {
                input_tokens: size(input),
                cached_tokens: size(cached),
                cost: self.price.of(input, cached, 0),
                ..Usage::default()
            },
        );
    }

    /// Another server has answered: what it counted, or what is guessed where it did not say. Returns what that costs.
    pub fn answered(&mut self, input: usize, cached: usize, output: usize) -> Money {
        let cached = cached.min(input);
        let cost = self.price.of(input, cached, output);
        self.inputs.clear();
        let (input_tokens, cached_tokens, output_tokens) = (size(input), size(cached), size(output));
        self.limiter.count(&self.subjects, Usage { input_tokens, cached_tokens, output_tokens, cost, ..Usage::default() });
        cost
    }

    fn settle(&mut self) {
        let tokens = std::mem::take(&mut self.pending);
        if tokens > 0 {
            let usage = Usage { output_tokens: size(tokens), cost: self.price.of(0, 0, tokens), ..Usage::default() };
            self.limiter.count(&self.subjects, usage);
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.settle();
        self.limiter.leave(&self.subjects);
    }
}

fn size(tokens: usize) -> i64 {
    i64::try_from(tokens).unwrap_or(i64::MAX)
}
