//! One request at a time over one kept-alive connection, with the moments at which text arrived.

use crate::chunk::{Chunk, Usage};
use crate::sse::DataLines;
use crate::target::Target;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response, StatusCode, body::Incoming};
use hyper_util::rt::TokioIo;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// Longest piece of an error body that is kept for the report.
const ERROR_EXCERPT: usize = 300;

/// What one streamed request gave.
#[derive(Debug, Clone, Default)]
pub struct Exchange {
    /// From sending to the first event with text.
    pub first: Option<Duration>,
    /// Between consecutive events with text.
    pub gaps: Vec<Duration>,
    /// Events with text.
    pub chunks: u64,
    /// The server's own counts.
    pub usage: Option<Usage>,
    /// Why the request counts as failed.
    pub error: Option<String>,
}

impl Exchange {
    fn failed(error: impl Into<String>) -> Self {
        Self { error: Some(error.into()), ..Self::default() }
    }

    /// Tokens generated, as the server counts them or, without usage, one per event.
    pub fn completion_tokens(&self) -> u64 {
        self.usage.map_or(self.chunks, |usage| usage.completion_tokens)
    }
}

/// A client of one server with at most one connection.
pub struct Client {
    target: Target,
    path: String,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    /// A client that posts to `path`, relative to the base URL.
    pub fn new(target: Target, path: &str) -> Self {
        Self { path: format!("{}{path}", target.path), target, sender: None }
    }

    /// Posts `body` and reads the stream to its end, or until `limit`. Failures are in the result.
    pub async fn stream(&mut self, body: Bytes, limit: Duration) -> Exchange {
        match tokio::time::timeout(limit, self.exchange(body)).await {
            Ok(exchange) => exchange,
            Err(_) => {
                self.sender = None;
                Exchange::failed(format!("no end of the answer within {} s", limit.as_secs_f32()))
            }
        }
    }

    /// Posts `body` and reads the whole answer within `limit`.
    pub async fn post(&mut self, body: Bytes, limit: Duration) -> Result<(StatusCode, Bytes), String> {
        let exchange = async {
            let response = self.send(Method::POST, body).await?;
            let status = response.status();
            let body = response.into_body().collect().await.map_err(|error| format!("the answer broke off: {error}"))?;
            Ok((status, body.to_bytes()))
        };
        let result = tokio::time::timeout(limit, exchange).await;
        let result = result.unwrap_or_else(|_| Err(format!("no end of the answer within {} s", limit.as_secs_f32())));
        if result.is_err() {
            self.sender = None;
        }
        result
    }

    async fn exchange(&mut self, body: Bytes) -> Exchange {
        let started = Instant::now();
        let response = match self.send(Method::POST, body).await {
            Ok(response) => response,
            Err(why) => return Exchange::failed(why),
        };
        let status = response.status();
        let content_type = response.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or("").to_owned();
        if !status.is_success() || !content_type.starts_with("text/event-stream") {
            let text = match response.into_body().collect().await {
                Ok(body) => excerpt(&body.to_bytes()),
                Err(error) => error.to_string(),
            };
            let what = if status.is_success() { format!("not an event stream but `{content_type}`") } else { status.to_string() };
            return Exchange::failed(format!("{what}: {text}"));
        }
        self.read_events(response.into_body(), started).await
    }

    async fn read_events(&mut self, mut body: Incoming, started: Instant) -> Exchange {
        let mut exchange = Exchange::default();
        let (mut lines, mut done, mut last) = (DataLines::default(), false, started);
        while let Some(frame) = body.frame().await {
            let frame = match frame {
                Ok(frame) => frame,
                Err(error) => {
                    self.sender = None;
                    exchange.error = Some(format!("the stream broke off: {error}"));
                    return exchange;
                }
            };
            let now = Instant::now();
            let Some(data) = frame.data_ref() else { continue };
            lines.push(data, |payload| {
                let chunk = Chunk::read(payload);
                done |= chunk.is_done;
                exchange.usage = chunk.usage.or(exchange.usage);
                if chunk.is_error {
                    exchange.error = Some(format!("error event: {}", excerpt(payload)));
                }
                if chunk.has_content {
                    exchange.chunks += 1;
                    match exchange.first {
                        None => exchange.first = Some(now - started),
                        Some(_) => exchange.gaps.push(now - last),
                    }
                    last = now;
                }
            });
        }
        if exchange.error.is_none() {
            exchange.error = match () {
                () if lines.has_partial_line() => Some("the stream ended inside an event".into()),
                () if !done => Some("the stream ended without [DONE]".into()),
                () if exchange.completion_tokens() == 0 => Some("the answer is empty".into()),
                () => None,
            };
        }
        exchange
    }

    /// Sends on the kept connection; where the server has closed that one meanwhile, once more on a new one.
    async fn send(&mut self, method: Method, body: Bytes) -> Result<Response<Incoming>, String> {
        if let Some(mut sender) = self.sender.take()
            && sender.ready().await.is_ok()
        {
            match sender.try_send_request(self.request(method.clone(), body.clone())?).await {
                Ok(response) => {
                    self.sender = Some(sender);
                    return Ok(response);
                }
                Err(error) => {
                    // Closed or reset without an answer: the server had given up the idle connection. One that is down
                    // fails the new connection, too.
                    let error = error.into_error();
                    if error.is_parse() {
                        return Err(format!("no answer: {error}"));
                    }
                }
            }
        }
        let mut sender = self.connect().await?;
        let response = sender.send_request(self.request(method, body)?).await.map_err(|error| format!("no answer: {error}"))?;
        self.sender = Some(sender);
        Ok(response)
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let failed = |error: &dyn std::fmt::Display| format!("connecting to {}: {error}", self.target.address);
        let stream = TcpStream::connect(self.target.address).await.map_err(|error| failed(&error))?;
        stream.set_nodelay(true).map_err(|error| failed(&error))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
        // Its errors reach the request that is waiting on it.
        tokio::spawn(connection);
        Ok(sender)
    }

    fn request(&self, method: Method, body: Bytes) -> Result<Request<Full<Bytes>>, String> {
        Request::builder()
            .method(method)
            .uri(&self.path)
            .header("host", &self.target.host)
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| format!("{}: {error}", self.path))
    }

    /// Whether a GET of this client's path answers 200 within `limit`.
    pub async fn is_ready(&mut self, limit: Duration) -> bool {
        let answer = async {
            let response = self.send(Method::GET, Bytes::new()).await.ok()?;
            let ready = response.status() == 200;
            response.into_body().collect().await.ok()?;
            Some(ready)
        };
        let ready = tokio::time::timeout(limit, answer).await.ok().flatten().unwrap_or(false);
        if !ready {
            self.sender = None;
        }
        ready
    }
}

fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim().chars().take(ERROR_EXCERPT).collect()
}
