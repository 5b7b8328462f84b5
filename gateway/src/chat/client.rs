//! One streamed chat completion over HTTP.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ureq::tls::{RootCerts, TlsConfig};

/// Errors of the chat client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("cannot reach {url}: {reason}\nStart a server with `tidemill serve`, or name another with --base-url")]
    Unreachable {
        /// Where.
        url: String,
        /// Why not.
        reason: String,
    },
    /// The server refused or failed; its own words.
    #[error("the server answered {status}: {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The error's message.
        message: String,
    },
    /// The stream broke off.
    #[error("the answer broke off: {0}")]
    Broken(String),
}

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
    agent: ureq::Agent,
    base_url: String,
    key: Option<String>,
    /// Fields that every request carries beside model and messages.
    pub extra: serde_json::Map<String, Value>,
    /// The model's name.
    pub model: String,
}

impl ChatClient {
    /// Connects lazily: nothing is sent. `base_url` ends in `/v1` as clients of the API expect it.
    pub fn new(base_url: &str, key: Option<String>) -> Self {
        let agent = ureq::Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .timeout_connect(Some(Duration::from_secs(10)))
            .http_status_as_error(false)
            .build()
            .into();
        Self {
            agent,
            base_url: base_url.trim_end_matches('/').to_owned(),
            key,
            extra: serde_json::Map::new(),
            model: String::new(),
        }
    }

    fn unreachable(&self, error: &ureq::Error) -> ClientError {
        ClientError::Unreachable { url: self.base_url.clone(), reason: error.to_string() }
    }

    /// The ids that the server lists.
    pub fn models(&self) -> Result<Vec<String>, ClientError> {
        let mut request = self.agent.get(format!("{}/models", self.base_url));
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.call().map_err(|error| self.unreachable(&error))?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().map_err(|error| ClientError::Broken(error.to_string()))?;
        if status != 200 {
            return Err(refused(status, &text));
        }
        let list: Value = serde_json::from_str(&text).map_err(|error| ClientError::Broken(error.to_string()))?;
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
        let mut request =
            self.agent.post(format!("{}/chat/completions", self.base_url)).header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let started = Instant::now();
        let mut response = request.send(Value::Object(body).to_string()).map_err(|error| self.unreachable(&error))?;
        let status = response.status().as_u16();
        if status != 200 {
            let text = response.body_mut().read_to_string().unwrap_or_default();
            return Err(refused(status, &text));
        }
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

fn refused(status: u16, text: &str) -> ClientError {
    let message = serde_json::from_str::<Value>(text)
        .ok()
        .and_then(|body| body["error"]["message"].as_str().map(str::to_owned))
        .unwrap_or_else(|| text.chars().take(200).collect());
    ClientError::Refused { status, message }
}
