//! Vectors of texts: a request whose prompt is computed like any other, and whose hidden states are pooled on the way.
//!
//! It runs in the same batch as requests that generate. The engine always generates, so it draws one token, too, which nobody sees.

use crate::adapters::AdapterLease;
use crate::pooling::{Accumulator, PoolingMode};
use crate::request::{Event, FinishReason, Request, RequestId, SamplingParams, Tenant};
use flume::{Receiver, Sender};
use std::time::Instant;

/// A text whose vector is wanted.
#[derive(Clone, Debug)]
pub struct EmbedRequest {
    /// Identity.
    pub id: RequestId,
    /// The text, tokenised; not empty.
    pub tokens: Vec<u32>,
    /// Weights; `None` is the base model.
    pub adapter: Option<AdapterLease>,
    /// Lower runs first.
    pub priority: i32,
    /// Whose it is.
    pub tenant: Tenant,
    /// When the vector is of no more use.
    pub deadline: Option<Instant>,
}

impl EmbedRequest {
    pub(crate) fn into_request(self, mode: PoolingMode) -> Request {
        // A mean needs the hidden states of all tokens, and the prefix cache keeps none: a salt of its own shares nothing.
        let cache_salt = (mode == PoolingMode::Mean).then(|| format!("{:032x}", self.id.0));
        Request {
            id: self.id,
            prompt: self.tokens,
            sampling: SamplingParams { max_tokens: Some(1), temperature: 0.0, seed: Some(0), ..SamplingParams::default() },
            priority: self.priority,
            cache_salt,
            adapter: self.adapter,
            tenant: self.tenant,
            deadline: self.deadline,
        }
    }
}

/// Why there is no vector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EmbedError {
    /// The server is shutting down.
    #[error("the server is shutting down and ended this request early; send it again")]
    Cancelled,
    /// Its deadline passed.
    #[error("the deadline passed before the vector was complete")]
    Expired,
    /// A fault of ours; the text is fit for the client.
    #[error("{0}")]
    Failed(String),
}

/// A vector to come. Dropping it cancels the request.
#[derive(Debug)]
pub struct Embedding {
    events: Receiver<Event>,
    vector: Receiver<Vec<f32>>,
}

impl Embedding {
    pub(crate) fn new(events: Receiver<Event>, vector: Receiver<Vec<f32>>) -> Self {
        Self { events, vector }
    }

    /// Waits for the pooled vector, neither cut nor scaled: [`crate::Pooling::finish`] does that.
    pub async fn wait(self) -> Result<Vec<f32>, EmbedError> {
        let gone = || EmbedError::Failed("the engine stopped before the vector was complete".to_owned());
        loop {
            match self.events.recv_async().await.map_err(|_| gone())? {
                Event::Finished { reason: FinishReason::Cancelled, .. } => return Err(EmbedError::Cancelled),
                Event::Expired => return Err(EmbedError::Expired),
                Event::Failed(message) => return Err(EmbedError::Failed(message)),
                Event::Done(_) => return self.vector.try_recv().map_err(|_| gone()),
                Event::Prompt { .. } | Event::Token { .. } | Event::Finished { .. } => {}
            }
        }
    }
}

/// The engine's side of an [`Embedding`].
#[derive(Debug)]
pub(crate) struct Pooled {
    accumulator: Accumulator,
    vector: Sender<Vec<f32>>,
}

impl Pooled {
    pub(crate) fn new(mode: PoolingMode) -> (Self, Receiver<Vec<f32>>) {
        let (vector, receiver) = flume::bounded(1);
        (Self { accumulator: Accumulator::new(mode), vector }, receiver)
    }

    pub(crate) fn take(&mut self, start: usize, hidden: &[f32], width: usize) {
        self.accumulator.take(start, hidden, width);
    }

    /// The text is computed.
    pub(crate) fn send(&self) {
        // There is room for the one vector; a client that left needs none.
        self.vector.try_send(self.accumulator.pooled()).ok();
    }
}
