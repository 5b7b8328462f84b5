//! Errors as Anthropic's clients know them.

use crate::http::error::ApiError;
use axum::body::Body;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use hyper::header::{CONTENT_LENGTH, HeaderName};
use serde_json::{Value, json};

const OUR_ID: HeaderName = HeaderName::from_static("x-request-id");
const THEIR_ID: HeaderName = HeaderName::from_static("request-id");

/// Anthropic's word for the kind of error.
fn kind(error: &ApiError) -> &'static str {
    match error.status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 | 405 => "not_found_error",
        408 => "timeout_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        status if status >= 500 => "api_error",
        _ => "invalid_request_error",
    }
}

/// `{"type": "error", "error": {"type", "message"}}`
pub fn to_json(error: &ApiError, request_id: Option<&str>) -> Value {
    let mut json = json!({"type": "error", "error": {"type": kind(error), "message": error.message}});
    if let Some(id) = request_id {
        json["request_id"] = id.into();
    }
    json
}

/// Middleware around all others: under `/v1/messages`, whatever went wrong and wherever, is said in Anthropic's words.
pub async fn in_their_words(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let theirs = path.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let mut response = next.run(request).await;
    if !theirs {
        return response;
    }
    let id = response.headers().get(OUR_ID).cloned();
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        let json = to_json(&error, id.as_ref().and_then(|id| id.to_str().ok()));
        *response.body_mut() = Body::from(json.to_string());
        response.headers_mut().remove(CONTENT_LENGTH);
    }
    if let Some(id) = id {
        response.headers_mut().insert(THEIR_ID, id);
    }
    response
}

/// An error outside any request, for streams.
pub fn event(error: &ApiError) -> Value {
    to_json(error, None)
}
