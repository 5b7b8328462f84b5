//! Around every request: an id, a trace, the time taken, a count, a log line, and a 500 in the right shape if a handler breaks.

use crate::http::error::ApiError;
use crate::telemetry::{Line, Observer, Outcome, Trail, method_label};
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::StatusCode;
use hyper::header::{HeaderName, HeaderValue};
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Instant;
use tracing::Instrument;
use uuid::Uuid;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
/// Log lines of requests, for filters.
const REQUESTS: &str = "tidemill::requests";
/// Longer ids are replaced: they go into every log line.
const MAX_ID: usize = 128;

/// The caller's id where it is one, otherwise a UUIDv7.
fn request_id(request: &Request) -> HeaderValue {
    let sane = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        !bytes.is_empty() && bytes.len() <= MAX_ID && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:/=+".contains(b))
    };
    match request.headers().get(REQUEST_ID).filter(sane) {
        Some(value) => value.clone(),
        None => HeaderValue::try_from(Uuid::now_v7().to_string()).unwrap_or(HeaderValue::from_static("unknown")),
    }
}

/// Middleware over all routes, fallbacks included.
pub async fn observe(State(observer): State<Observer>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(&request);
    let method = method_label(request.method());
    let route = request.extensions().get::<MatchedPath>().map_or_else(|| "unmatched".to_owned(), |p| p.as_str().to_owned());
    let trail = observer.begin(request.method(), &route, request.headers(), id.to_str().unwrap_or_default());
    let span = tracing::error_span!("request", trace_id = trail.trace_id());
    request.extensions_mut().insert(trail.clone());
    let mut response = unless_it_panics(next.run(request)).instrument(span.clone()).await.unwrap_or_else(|| {
        tracing::error!(request_id = ?id, method, route, "a handler panicked");
        ApiError::fault("The server made a mistake while handling this request.").into_response()
    });
    let status = response.status();
    let headers = response.headers_mut();
    let taken = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    headers.insert(PROCESSING_MS, HeaderValue::from(taken));
    headers.insert(REQUEST_ID, id.clone());
    metrics::counter!("tidemill:http_requests_total", "method" => method, "handler" => route.clone(), "status" => status.as_str().to_owned())
        .increment(1);
    response.map(|body| {
        let complete = body.is_end_stream();
        Body::new(Observed { body, end: End { trail, span, start, id, method, route, status, complete } })
    })
}

/// Probes come every second and say nothing while they succeed.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];

/// Writes a request's log line when its answer is over.
struct End {
    trail: Trail,
    span: tracing::Span,
    start: Instant,
    id: HeaderValue,
    method: &'static str,
    route: String,
    status: StatusCode,
    complete: bool,
}

impl Drop for End {
    fn drop(&mut self) {
        let Self { trail, start, id, method, route, status, complete, .. } = self;
        let taken = start.elapsed();
        let Line { key, model, input_tokens, output_tokens } =
            trail.end(&Outcome { status: *status, taken, complete: *complete });
        let (ms, status, trace_id, request_id) =
            ((taken.as_secs_f64() * 1e6).round() / 1e3, status.as_u16(), trail.trace_id(), id.to_str().unwrap_or_default());
        let left = (!*complete).then_some(true);
        if PROBES.contains(&route.as_str()) && status < 500 {
            tracing::debug!(target: REQUESTS, method, route, status, ms, trace_id, request_id, "request");
        } else {
            tracing::info!(
                target: REQUESTS,
                method, route, status, ms, key, model, input_tokens, output_tokens, trace_id, request_id, client_left = left, "request"
            );
        }
    }
}

/// An answer on its way; it is over when it is dropped.
struct Observed {
    // Before `end`: what is dropped with it still adds to the trail.
    body: Body,
    end: End,
}

impl http_body::Body for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let polled = this.end.span.in_scope(|| Pin::new(&mut this.body).poll_frame(context));
        this.end.complete = matches!(polled, Poll::Ready(None)) || this.body.is_end_stream();
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The future's result, or `None` when it panicked. A panic must not take down the other requests of the connection, nor reach
/// the client as a closed socket, which clients retry.
async fn unless_it_panics<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(output)) => Poll::Ready(Some(output)),
        Err(_) => Poll::Ready(None),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_for(sent: &'static str) -> String {
        let request = Request::builder().header("x-request-id", sent).body(axum::body::Body::empty()).unwrap();
        request_id(&request).to_str().unwrap().to_owned()
    }

    #[test]
    fn a_sane_id_is_echoed_and_any_other_replaced() {
        assert_eq!(id_for("req-7:a/b"), "req-7:a/b");
        for bad in ["", "two words", "<script>"] {
            assert_eq!(Uuid::parse_str(&id_for(bad)).unwrap().get_version_num(), 7, "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_panic_becomes_none() {
        assert_eq!(unless_it_panics(async { 7 }).await, Some(7));
        let broken = async {
            tokio::task::yield_now().await;
            assert_eq!(1 + 1, 3, "on purpose");
        };
        assert!(unless_it_panics(broken).await.is_none());
    }
}
