//! One streamed chat completion over HTTP.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::api_client::ApiClient;
pub use crate::api_client::ClientError;

/// How an answer went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// All of its text.
    pub text: String,
    /// Tokens, as the server counts them (pieces, where it does not).
    pub tokens: usize,
    /// Seconds to the first piece.
    pub first_s: f64,
    /// Seconds for everything.
    pub total_s: f64,
    /// `finish_reason`, or "interrupted".
    pub finish: String,
}

/// A server and the model to talk to.
#[derive(Debug)]
pub struct ChatClient {
    api: ApiClient,
    /// Fields that every request carries beside model and messages.
    pub extra: serde_json::Map<String, Value>,
    /// The model's name.
    pub model: String,
}

impl ChatClient {
    /// Connects lazily: nothing is sent. `base_url` ends in `/v1` as clients of the API expect it.
    pub fn new(base_url: &str, key: Option<String>) -> Self {
        Self { api: ApiClient::new(base_url, key), extra: serde_json::Map::new(), model: String::new() }
    }

    /// The ids that the server lists.
    pub fn models(&self) -> Result<Vec<String>, ClientError> {
        let list = self.api.get("models")?;
        let ids = list["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str());
        Ok(ids.map(str::to_owned).collect())
    }

    /// Streams an answer; `piece` sees each bit of text as it comes. Setting `stop` ends it early, which also tells the server.
    pub fn stream(&self, messages: Value, stop: &AtomicBool, mut piece: impl FnMut(&str)) -> Result<Answer, ClientError> {
        let mut body = self.extra.clone();
        body.insert("model".into(), json!(self.model));
        body.insert("messages".into(), messages);
        body.insert("stream".into(), json!(true));
        body.insert("stream_options".into(), json!({"include_usage": true}));
        let started = Instant::now();
        let mut response = self.api.send("chat/completions", Some(&Value::Object(body)))?;
        let mut answer = Answer::default();
        let mut pieces = 0;
        for line in BufReader::new(response.body_mut().as_reader()).lines() {
            if stop.load(Ordering::Relaxed) {
                answer.finish = "interrupted".into();
                break;
            }
            let line = line.map_err(|error| ClientError::Broken(error.to_string()))?;
            let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
            if data == "[DONE]" {
                break;
            }
            let chunk: Value = serde_json::from_str(data).map_err(|error| ClientError::Broken(error.to_string()))?;
            if let Some(message) = chunk["error"]["message"].as_str() {
                return Err(ClientError::Broken(message.to_owned()));
            }
            if let Some(text) = chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
                if pieces == 0 {
                    answer.first_s = started.elapsed().as_secs_f64();
                }
                pieces += 1;
                answer.text.push_str(text);
                piece(text);
            }
            if let Some(reason) = chunk["choices"][0]["finish_reason"].as_str() {
                answer.finish = reason.to_owned();
            }
            if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
                answer.tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
            }
        }
        if answer.finish.is_empty() {
            return Err(ClientError::Broken("the connection closed before the end".into()));
        }
        answer.total_s = started.elapsed().as_secs_f64();
        if answer.tokens == 0 {
            answer.tokens = pieces;
        }
        Ok(answer)
    }
}
