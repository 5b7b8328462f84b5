//! Responses with a JSON body.

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde::Serialize;
use serde_json::Value;

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

/// A page of a list, in OpenAI's form; each item has its id.
pub fn list(items: Vec<Value>, has_more: bool) -> Response {
    let id = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    let (first, last) = (id(items.first()), id(items.last()));
    let page = serde_json::json!({"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more});
    answer(StatusCode::OK, &page)
}
