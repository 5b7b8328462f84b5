//! The closed loop: a fixed number of streams, each sending its next request when the last one has ended.

use crate::client::{Client, Exchange};
use crate::interrupt::Interrupt;
use crate::measurement::Measurement;
use crate::prompts::Prompts;
use crate::target::Target;
use bytes::Bytes;
use serde_json::{Map, Value, json};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::LocalSet;

/// Which endpoint takes the prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Endpoint {
    /// `/completions`: the prompt as it is, the same tokens on every server.
    #[default]
    Completions,
    /// `/chat/completions`: one user message, behind whatever template the server applies.
    Chat,
}

/// One load on one server.
#[derive(Debug, Clone)]
pub struct Load {
    /// The server.
    pub target: Target,
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The model's name as the server knows it.
    pub model: String,
    /// Fields added to every request body.
    pub body: Map<String, Value>,
    /// The prompts.
    pub prompts: Prompts,
    /// Requests in flight.
    pub streams: usize,
    /// Requests in total.
    pub requests: u64,
    /// Requests before the measurement, at most `streams` at a time.
    pub warmup: u64,
    /// `max_tokens` of each request.
    pub max_tokens: u64,
    /// No request starts after this time.
    pub duration: Option<Duration>,
    /// Longest time that one request may take.
    pub request_timeout: Duration,
}

impl Load {
    /// Runs warm-up and measurement; `progress` hears of every measured request.
    ///
    /// An interrupt abandons the requests in flight and reports those that ended.
    pub async fn run(&self, interrupt: &Interrupt, progress: impl Fn(&Exchange)) -> Measurement {
        // A server that fails its warm-up fails the measurement too: that is where it is reported.
        self.send_all(Phase::Warmup, interrupt, |_| {}).await;
        let started = Instant::now();
        let exchanges = self.send_all(Phase::Measured, interrupt, progress).await;
        let cut_short = (exchanges.len() as u64) < self.requests;
        Measurement::of(self.streams, self.max_tokens, started.elapsed(), &exchanges, cut_short)
    }

    async fn send_all(&self, phase: Phase, interrupt: &Interrupt, progress: impl Fn(&Exchange)) -> Vec<Exchange> {
        let (requests, duration) = match phase {
            Phase::Warmup => (self.warmup, None),
            Phase::Measured => (self.requests, self.duration),
        };
        let (started, next, load) = (Instant::now(), Rc::new(Cell::new(0_u64)), Rc::new(self.clone()));
        let (results, mut arrivals) = tokio::sync::mpsc::unbounded_channel();
        let tasks = LocalSet::new();
        for _ in 0..(self.streams as u64).min(requests) {
            let mut client = Client::new(self.target.clone(), self.endpoint.path());
            let (load, next, results, mut interrupt) = (Rc::clone(&load), Rc::clone(&next), results.clone(), interrupt.clone());
            tasks.spawn_local(async move {
                loop {
                    let index = next.get();
                    let late = duration.is_some_and(|duration| started.elapsed() >= duration);
                    if index >= requests || late || interrupt.requested() {
                        return;
                    }
                    next.set(index + 1);
                    let prompt = match phase {
                        Phase::Warmup => load.prompts.warmup(index),
                        Phase::Measured => load.prompts.get(index),
                    };
                    let exchange = tokio::select! {
                        exchange = client.stream(load.request_body(&prompt), load.request_timeout) => exchange,
                        () = interrupt.wait() => return,
                    };
                    if results.send(exchange).is_err() {
                        return;
                    }
                }
            });
        }
        drop(results);
        let collect = async {
            let mut exchanges = Vec::new();
            while let Some(exchange) = arrivals.recv().await {
                progress(&exchange);
                exchanges.push(exchange);
            }
            exchanges
        };
        tasks.run_until(collect).await
    }

    fn request_body(&self, prompt: &str) -> Bytes {
        let mut body = json!({
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if let Some(fields) = body.as_object_mut() {
            match self.endpoint {
                Endpoint::Completions => fields.insert("prompt".into(), prompt.into()),
                Endpoint::Chat => fields.insert("messages".into(), json!([{"role": "user", "content": prompt}])),
            };
            fields.extend(self.body.clone());
        }
        body.to_string().into()
    }
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Warmup,
    Measured,
}

impl Endpoint {
    /// The endpoint's path below the base URL.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/completions",
            Self::Chat => "/chat/completions",
        }
    }
}

#[cfg(test)]
#[path = "load/tests.rs"]
mod tests;
