//! A remote server at work: its key, its breaker, what it is answering, and one question put to it.

use crate::upstream::remote::balance::Replica;
use crate::upstream::remote::breaker::{Breaker, BreakerState};
use crate::upstream::remote::client::{Client, cause, client};
use crate::upstream::remote::request::{Endpoint, first_bits, headers, url};
use crate::upstream::remote::retry::{Failure, Refused};
use crate::upstream::remote::secret::{Secret, SecretError};
use crate::upstream::remote::spec::ServerSpec;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::RETRY_AFTER;
use hyper::{Method, Request, Response};
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use rustls::ClientConfig;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most bytes of an error that are read.
const MOST_ERROR: usize = 64 * 1024;
/// How long the rest of an error may take.
const ERROR_TIME: Duration = Duration::from_secs(5);

/// A server.
pub struct Server {
    spec: ServerSpec,
    secret: Option<Secret>,
    client: Client,
    breaker: Mutex<Breaker>,
    running: AtomicUsize,
    seed: u64,
    start: Instant,
    metrics: Metrics,
}

struct Metrics {
    requests: Counter,
    running: Gauge,
    breaker: Gauge,
    first_token: Histogram,
    latency: Histogram,
    input: Counter,
    cached: Counter,
    output: Counter,
    cost: Counter,
}

impl Metrics {
    fn new(server: &str) -> Self {
        let name = || server.to_owned();
        let tokens = |kind: &'static str| counter!("tidemill:upstream_tokens_total", "upstream" => name(), "kind" => kind);
        Self {
            requests: counter!("tidemill:upstream_requests_total", "upstream" => name()),
            running: gauge!("tidemill:upstream_requests_running", "upstream" => name()),
            breaker: gauge!("tidemill:upstream_breaker_state", "upstream" => name()),
            first_token: histogram!("tidemill:upstream_time_to_first_token_seconds", "upstream" => name()),
            latency: histogram!("tidemill:upstream_request_seconds", "upstream" => name()),
            input: tokens("input"),
            cached: tokens("cached_input"),
            output: tokens("output"),
            cost: counter!("tidemill:upstream_cost_nanodollars_total", "upstream" => name()),
        }
    }
}

impl Server {
    /// Ready to be asked; its key is read.
    pub fn new(spec: ServerSpec, trust: ClientConfig) -> Result<Self, SecretError> {
        let secret = spec.key.clone().map(Secret::open).transpose()?;
        Ok(Self {
            secret,
            client: client(trust, spec.connect_timeout),
            breaker: Mutex::new(Breaker::new(spec.breaker)),
            running: AtomicUsize::new(0),
            seed: first_bits(&blake3::hash(spec.name.as_bytes())),
            start: Instant::now(),
            metrics: Metrics::new(&spec.name),
            spec,
        })
    }

    /// As configured.
    pub fn spec(&self) -> &ServerSpec {
        &self.spec
    }

    /// For the choice among several.
    pub fn replica(&self) -> Replica {
        Replica { seed: self.seed, weight: self.spec.weight, running: self.running.load(Ordering::Relaxed) }
    }

    /// Whether it would take a request. Takes nothing.
    pub fn has_room(&self) -> bool {
        let room = self.spec.max_concurrent.is_none_or(|most| self.running.load(Ordering::Relaxed) < most);
        room && self.breaker().admits(self.now())
    }

    /// What its breaker does with the next request.
    pub fn breaker_state(&self) -> BreakerState {
        self.breaker().state()
    }

    /// Until a request has a chance again.
    pub fn wait(&self) -> Duration {
        self.breaker().wait(self.now())
    }

    /// Takes a request in; `None` when it is full or to be left alone. A copy that nobody waits for leaves a place to those who wait, is
    /// not the one that tries whether the server is there again, and how it ends is not held against the server.
    pub fn enter(self: &Arc<Self>, is_copy: bool) -> Option<Turn> {
        let most = self.spec.max_concurrent.unwrap_or(usize::MAX).saturating_sub(usize::from(is_copy));
        let room = |running: usize| (running < most).then_some(running + 1);
        self.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).ok()?;
        self.metrics.running.increment(1);
        let number = if is_copy { None } else { self.change(|breaker, now| breaker.enter(now)) };
        let refused = if is_copy { self.breaker_state() != BreakerState::Closed } else { number.is_none() };
        // From here on dropping it gives the place back.
        let turn = Turn { server: Arc::clone(self), begun: Instant::now(), number, told: number.is_none() };
        if refused {
            return None;
        }
        self.metrics.requests.increment(1);
        Some(turn)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        // Each change is one assignment: a panic leaves nothing half done.
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Breaker, Duration) -> T) -> T {
        let now = self.now();
        let mut breaker = self.breaker();
        let before = breaker.state();
        let result = change(&mut breaker, now);
        let state = breaker.state();
        drop(breaker);
        self.metrics.breaker.set(match state {
            BreakerState::Closed => 0.0,
            BreakerState::HalfOpen => 1.0,
            BreakerState::Open => 2.0,
        });
        match (before, state) {
            (BreakerState::Closed, BreakerState::Open) => {
                tracing::warn!(upstream = self.spec.name, "an upstream keeps failing and is left alone for a while");
            }
            (BreakerState::HalfOpen, BreakerState::Closed) => {
                tracing::info!(upstream = self.spec.name, "an upstream answers again");
            }
            _ => {}
        }
        result
    }
}

/// A request's place at a server. Dropping it gives the place back.
pub struct Turn {
    server: Arc<Server>,
    begun: Instant,
    /// By which the breaker knows it; it knows nothing of copies.
    number: Option<u64>,
    /// The breaker knows how it went, as far as it is to.
    told: bool,
}

impl Turn {
    /// Where.
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    /// Puts the question. What comes back has a status of success; the body is not read yet.
    pub async fn ask(
        &self,
        endpoint: Endpoint,
        model: &str,
        body: Bytes,
        traceparent: Option<&str>,
    ) -> Result<Response<Incoming>, Failure> {
        let spec = &self.server.spec;
        let key = self.server.secret.as_ref().map(Secret::current);
        let request = Request::builder().method(Method::POST).uri(url(spec, endpoint, model)).body(Full::new(body));
        let mut request = request.map_err(|error| Failure::Connect(error.to_string()))?;
        *request.headers_mut() = headers(spec, key.as_deref(), traceparent);
        let response = self.server.client.request(request).await.map_err(|error| {
            let why = cause(&error);
            if error.is_connect() { Failure::Connect(why) } else { Failure::Broken(why) }
        })?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(self.refused(response, key.as_deref()).await)
    }

    async fn refused(&self, response: Response<Incoming>, key: Option<&str>) -> Failure {
        let (parts, body) = response.into_parts();
        let status = parts.status.as_u16();
        if let (401 | 403, Some(secret)) = (status, &self.server.secret) {
            secret.doubt();
        }
        let read = tokio::time::timeout(ERROR_TIME, Limited::new(body, MOST_ERROR).collect()).await;
        let bytes = read.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let wait = parts.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        Failure::Status(Refused::read(status, wait, &bytes).passable(key))
    }

    /// The same for an error in the middle of a stream.
    pub fn reported(&self, error: &serde_json::Value) -> Failure {
        let key = self.server.secret.as_ref().map(Secret::current);
        Failure::Status(Refused::of(error).passable(key.as_deref()))
    }

    /// The answer has begun.
    pub fn succeeded(&mut self) {
        self.told = true;
        if let Some(number) = self.number {
            self.server.change(|breaker, _| breaker.succeeded(number));
        }
    }

    /// There is no answer, or no more of it.
    pub fn failed(&mut self, failure: &Failure) {
        self.told = true;
        let kind = failure.kind();
        counter!("tidemill:upstream_errors_total", "upstream" => self.server.spec.name.clone(), "kind" => kind).increment(1);
        let Some(number) = self.number else { return };
        let wait = match failure {
            Failure::Status(refused) if refused.status == 429 || refused.status == 503 => refused.retry_after,
            _ => None,
        };
        self.server.change(|breaker, now| match wait {
            Some(wait) => breaker.told_to_wait(wait, now),
            None if failure.blames_server() => breaker.failed(number, now),
            // It took the request and said what it thinks of it: it is there.
            None if matches!(failure, Failure::Status(_)) => breaker.succeeded(number),
            None => breaker.abandoned(number, now),
        });
    }

    /// The first token has come.
    pub fn first_token(&self) {
        self.server.metrics.first_token.record(self.begun.elapsed().as_secs_f64());
    }

    /// What the answer took.
    pub fn spent(&self, input: usize, cached: usize, output: usize, nanodollars: i64) {
        let metrics = &self.server.metrics;
        metrics.latency.record(self.begun.elapsed().as_secs_f64());
        metrics.input.increment(input as u64);
        metrics.cached.increment(cached as u64);
        metrics.output.increment(output as u64);
        metrics.cost.increment(nanodollars.unsigned_abs());
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.server.running.fetch_sub(1, Ordering::AcqRel);
        self.server.metrics.running.decrement(1);
        if let (Some(number), false) = (self.number, self.told) {
            self.server.change(|breaker, now| breaker.abandoned(number, now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::remote::breaker::BreakerRule;
    use crate::upstream::remote::client::trust;

    fn server(change: impl FnOnce(&mut ServerSpec)) -> Arc<Server> {
        let mut spec = ServerSpec::new("s", "http://127.0.0.1:1");
        change(&mut spec);
        Arc::new(Server::new(spec, trust(false).unwrap()).unwrap())
    }

    #[test]
    fn a_full_server_takes_no_more_until_a_place_is_given_back() {
        let server = server(|spec| spec.max_concurrent = Some(2));
        let (first, second) = (server.enter(false).unwrap(), server.enter(false).unwrap());
        assert!(server.enter(false).is_none() && !server.has_room());
        drop(first);
        assert!(server.enter(false).is_some());
        drop(second);
        assert_eq!(server.replica().running, 0);
    }

    #[test]
    fn a_server_that_fails_is_left_alone_and_holds_no_places_meanwhile() {
        let server = server(|spec| spec.breaker = BreakerRule { failures: 2, rest: Duration::from_secs(3600) });
        for _ in 0..2 {
            server.enter(false).unwrap().failed(&Failure::Broken("x".into()));
        }
        assert!(server.enter(false).is_none() && !server.has_room() && server.replica().running == 0);
        assert_eq!(server.breaker_state(), BreakerState::Open);
        assert!(server.wait() > Duration::from_secs(3000));
    }

    #[test]
    fn a_copy_takes_no_last_place_tries_nothing_and_breaks_nothing() {
        let rule = BreakerRule { failures: 1, rest: Duration::ZERO };
        let server = server(|spec| (spec.max_concurrent, spec.breaker) = (Some(2), rule));
        let mut copy = server.enter(true).unwrap();
        assert!(server.enter(true).is_none() && server.replica().running == 1);
        copy.failed(&Failure::Broken("x".into()));
        drop(copy);
        assert_eq!(server.breaker_state(), BreakerState::Closed);
        server.enter(false).unwrap().failed(&Failure::Broken("x".into()));
        assert!(server.enter(true).is_none(), "one that somebody waits for tries");
        assert!(server.enter(false).is_some() && server.replica().running == 0);
    }

    #[test]
    fn a_client_that_leaves_is_no_failure_of_the_server() {
        let server = server(|spec| spec.breaker = BreakerRule { failures: 1, rest: Duration::ZERO });
        drop(server.enter(false).unwrap());
        assert_eq!(server.breaker_state(), BreakerState::Closed);
        server.enter(false).unwrap().failed(&Failure::Broken("x".into()));
        drop(server.enter(false).unwrap());
        assert!(server.has_room(), "the one that tried has left: the next one tries");
    }

    #[tokio::test]
    async fn nobody_there_is_a_failure_to_connect() {
        // Nothing listens on port 1.
        let turn = server(|_| {}).enter(false).unwrap();
        let failure = turn.ask(Endpoint::Chat, "m", Bytes::new(), None).await.unwrap_err();
        assert!(matches!(failure, Failure::Connect(_)), "{failure:?}");
    }
}
