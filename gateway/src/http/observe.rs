//! Around every request: an id, the time taken, a count, and a 500 in the right shape if a handler breaks.

use crate::http::error::ApiError;
use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::header::{HeaderName, HeaderValue};
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;
use std::time::Instant;
use uuid::Uuid;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
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
pub async fn observe(request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(&request);
    let method = request.method().clone();
    let path = request.extensions().get::<MatchedPath>().map_or_else(|| "unmatched".to_owned(), |p| p.as_str().to_owned());
    let mut response = unless_it_panics(next.run(request)).await.unwrap_or_else(|| {
        tracing::error!(request_id = ?id, %method, path, "a handler panicked");
        ApiError::fault("The server made a mistake while handling this request.").into_response()
    });
    let status = response.status();
    let taken = start.elapsed();
    let headers = response.headers_mut();
    headers.insert(PROCESSING_MS, HeaderValue::from(u64::try_from(taken.as_millis()).unwrap_or(u64::MAX)));
    tracing::debug!(request_id = ?id, %method, path, status = status.as_u16(), ms = taken.as_secs_f64() * 1e3, "request");
    headers.insert(REQUEST_ID, id);
    metrics::counter!("tidemill:http_requests_total", "method" => method_label(&method), "handler" => path, "status" => status.as_str().to_owned())
        .increment(1);
    response
}

/// Methods are the client's to invent; labels are not.
fn method_label(method: &hyper::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        "DELETE" => "DELETE",
        "PATCH" => "PATCH",
        _ => "other",
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
