//! Responses with a JSON body.

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde::Serialize;

/// 200 with JSON that is written already.
pub fn json(body: Bytes) -> Response {
    let mut response = body.into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A status with a value of ours.
pub fn answer(status: StatusCode, body: &impl Serialize) -> Response {
    // The keys of our values are strings: the serialiser cannot fail.
    let mut response = json(serde_json::to_vec(body).unwrap_or_default().into());
    *response.status_mut() = status;
    response
}
