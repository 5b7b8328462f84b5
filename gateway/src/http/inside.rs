//! Requests of this process to itself: a batch's lines, and questions of graders. They go through the same router as everybody's, as the
//! key that they are made for and behind everyone else in the engine's queue.

use crate::http::generate::Background;
use crate::http::{App, Caller, router};
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use std::time::Duration;
use tokio::time::sleep;
use tower::ServiceExt;
use uuid::Uuid;

/// The router. Cloning is cheap.
#[derive(Clone)]
pub struct Inside {
    router: Router,
    app: App,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Sent {
    /// Of the answer.
    pub status: StatusCode,
    /// Names the request in the log.
    pub request_id: String,
    /// JSON.
    pub body: Bytes,
}

impl Inside {
    /// Over what every handler sees.
    pub fn new(app: App) -> Self {
        Self { router: router(app.clone()), app }
    }

    /// An id for a request of the process's own.
    pub fn issue_id(&self) -> Uuid {
        self.app.store.issue_id()
    }

    /// Posts JSON on behalf of `caller` until there is an answer that is about the request, and not about how busy the server is; `None`
    /// when the server left before.
    pub async fn send(&self, caller: &Caller, endpoint: &str, id: &str, body: Bytes) -> Option<Sent> {
        loop {
            let mut request = Request::new(Body::from(body.clone()));
            *request.method_mut() = hyper::Method::POST;
            *request.uri_mut() = endpoint.parse().ok()?;
            let headers = request.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            headers.insert("x-request-id", HeaderValue::try_from(id).ok()?);
            request.extensions_mut().insert(caller.clone());
            request.extensions_mut().insert(Background);
            let Ok(response) = self.router.clone().oneshot(request).await;
            match pause(&response) {
                Some(_) if self.app.drain.is_draining() => return None,
                Some(pause) => sleep(pause).await,
                None => {
                    let status = response.status();
                    let request_id =
                        response.headers().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or(id).to_owned();
                    let body = response.into_body().collect().await.ok()?.to_bytes();
                    return Some(Sent { status, request_id, body });
                }
            }
        }
    }
}

/// How long to wait before the request is sent again; `None` when the answer is final.
fn pause(response: &Response) -> Option<Duration> {
    let busy = matches!(response.status(), StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS);
    let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    if !busy || text("x-should-retry") == Some("false") {
        return None;
    }
    let seconds = text(RETRY_AFTER.as_str()).and_then(|text| text.parse().ok()).unwrap_or(1);
    Some(Duration::from_secs(u64::clamp(seconds, 1, 30)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::error::ApiError;
    use axum::response::IntoResponse;

    #[test]
    fn a_busy_server_is_asked_again_and_a_spent_quota_is_not() {
        let busy = ApiError::unavailable(Some("queue_full"), "busy", 7).into_response();
        assert_eq!(pause(&busy), Some(Duration::from_secs(7)));
        let far = ApiError::unavailable(None, "busy", 3600).into_response();
        assert_eq!(pause(&far), Some(Duration::from_secs(30)));
        let limited = ApiError::client(StatusCode::TOO_MANY_REQUESTS, None, "slow down").into_response();
        assert_eq!(pause(&limited), Some(Duration::from_secs(1)));
        let mut spent = ApiError::client(StatusCode::TOO_MANY_REQUESTS, Some("insufficient_quota"), "spent").into_response();
        spent.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
        assert_eq!(pause(&spent), None);
        assert_eq!(pause(&ApiError::fault("broken").into_response()), None);
    }
}
