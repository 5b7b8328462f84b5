//! The one shape in which everything that goes wrong reaches a client.

use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use serde::Serialize;
use std::borrow::Cow;
use tidemill_engine::SubmitError;

/// An error as OpenAI clients know it: `{"error":{"message","type","param","code"}}`, all four keys always.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// `type`.
    pub kind: &'static str,
    /// Names the thing and the next step.
    pub message: String,
    /// Path of the offending parameter, such as `messages.0.content`.
    pub param: Option<String>,
    /// `code`.
    pub code: Option<Cow<'static, str>>,
    /// Seconds, for `Retry-After`.
    pub retry_after: Option<u32>,
    /// Sending the same again cannot help: clients that would retry by themselves are told not to.
    pub no_retry: bool,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(Serialize)]
struct Body<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    /// A 400 without a parameter or code, as for a body that is not JSON.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "invalid_request_error",
            message: message.into(),
            param: None,
            code: None,
            retry_after: None,
            no_retry: false,
        }
    }

    /// A 400 that names a parameter.
    pub fn invalid(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), code: Some(Cow::Borrowed(code)), ..Self::bad_request(message) }
    }

    /// A 400 for something that this server does not do.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::invalid(param, "unsupported_parameter", message)
    }

    /// Any other client error.
    pub fn client(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, code: code.map(Cow::Borrowed), ..Self::bad_request(message) }
    }

    /// 404 for a model that is not served here.
    pub fn model_not_found(model: &str) -> Self {
        let shown: String = model.chars().take(200).collect();
        Self {
            status: StatusCode::NOT_FOUND,
            ..Self::invalid(
                "model",
                "model_not_found",
                format!("The model `{shown}` does not exist. GET /v1/models lists what is served."),
            )
        }
    }

    /// 503: try again, here or on another replica.
    pub fn unavailable(code: Option<&'static str>, message: impl Into<String>, retry_after: u32) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            kind: "server_error",
            code: code.map(Cow::Borrowed),
            retry_after: Some(retry_after),
            ..Self::bad_request(message)
        }
    }

    /// 500: a fault of ours.
    pub fn fault(message: impl Into<String>) -> Self {
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, kind: "server_error", ..Self::bad_request(message) }
    }

    /// Writes the JSON object.
    pub fn write_json(&self, out: &mut BytesMut) {
        let envelope = Envelope {
            error: Body { message: &self.message, r#type: self.kind, param: self.param.as_deref(), code: self.code.as_deref() },
        };
        // Strings into memory: neither the serialiser nor the writer can fail.
        let _ = serde_json::to_writer(out.writer(), &envelope);
    }

    /// The JSON object.
    pub fn to_json(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(128 + self.message.len());
        self.write_json(&mut out);
        out.freeze()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.to_json()).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.no_retry {
            headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
        }
        // For those who say it in another API's words.
        response.extensions_mut().insert(self);
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { retry_after_s, .. } => {
                Self::unavailable(Some("queue_full"), error.to_string(), retry_after_s)
            }
            SubmitError::TooLate { retry_after_s, .. } => {
                Self::unavailable(Some("deadline_unreachable"), error.to_string(), retry_after_s)
            }
            SubmitError::Draining => Self::unavailable(Some("draining"), error.to_string(), 5),
            SubmitError::TooLong { prompt, limit } => Self::context_length(limit, prompt, None, "messages"),
            SubmitError::Invalid { param, message } => {
                Self::invalid(param, "invalid_value", format!("Invalid '{param}': {message}"))
            }
            SubmitError::Stopped(_) => Self::fault(error.to_string()),
        }
    }
}

impl ApiError {
    /// Prompt, or prompt and asked-for output, do not fit the context of `limit` tokens.
    pub fn context_length(limit: usize, prompt: usize, output: Option<usize>, param: &'static str) -> Self {
        let asked = match output {
            None => format!("your {param} resulted in {prompt} tokens. Please reduce the length of the {param}."),
            Some(output) => format!(
                "you requested {} tokens ({prompt} in the {param}, {output} in the completion). Please reduce the length of the {param} or of the completion.",
                prompt.saturating_add(output)
            ),
        };
        Self::invalid(
            param,
            "context_length_exceeded",
            format!("This model's maximum context length is {limit} tokens. However, {asked}"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_keys_are_there_even_when_null() {
        let json: serde_json::Value = serde_json::from_slice(&ApiError::bad_request("no \"JSON\"").to_json()).unwrap();
        let error = json["error"].as_object().unwrap();
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert_eq!(error["message"], "no \"JSON\"");
        assert!(error["param"].is_null() && error["code"].is_null());
    }

    #[test]
    fn a_full_queue_is_a_503_with_whole_seconds_to_wait() {
        let error = ApiError::from(SubmitError::QueueFull { waiting: 9, limit: 9, retry_after_s: 0 });
        let response = error.into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
    }

    #[test]
    fn both_numbers_are_in_the_context_error() {
        let error = ApiError::from(SubmitError::TooLong { prompt: 9000, limit: 8192 });
        assert_eq!(error.code.as_deref(), Some("context_length_exceeded"));
        assert!(error.message.contains("9000") && error.message.contains("8192"));
    }
}
