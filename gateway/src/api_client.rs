//! Calls of a server's API by the commands that speak to one.

use serde_json::Value;
use std::time::Duration;
use ureq::http::Response;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, RequestBuilder};

/// Why a server gave no answer.
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

/// A server.
#[derive(Clone, Debug)]
pub struct ApiClient {
    agent: Agent,
    base_url: String,
    key: Option<String>,
}

impl ApiClient {
    /// Connects lazily: nothing is sent. `base_url` ends in `/v1` as clients of the API expect it.
    pub fn new(base_url: &str, key: Option<String>) -> Self {
        let agent = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .timeout_connect(Some(Duration::from_secs(10)))
            .http_status_as_error(false)
            .build()
            .into();
        Self { agent, base_url: base_url.trim_end_matches('/').to_owned(), key }
    }

    fn keyed<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.key {
            Some(key) => request.header("authorization", format!("Bearer {key}")),
            None => request,
        }
    }

    fn unreachable(&self, error: &ureq::Error) -> ClientError {
        ClientError::Unreachable { url: self.base_url.clone(), reason: error.to_string() }
    }

    /// What lies at `path`, such as `models`.
    pub fn get(&self, path: &str) -> Result<Value, ClientError> {
        let request = self.keyed(self.agent.get(format!("{}/{path}", self.base_url)));
        read(request.call().map_err(|error| self.unreachable(&error))?)
    }

    /// The answer to a JSON body, or to none.
    pub fn post(&self, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        read(self.send(path, body)?)
    }

    /// The same before it is read, where it may come bit by bit.
    pub fn send(&self, path: &str, body: Option<&Value>) -> Result<Response<Body>, ClientError> {
        let request = self.keyed(self.agent.post(format!("{}/{path}", self.base_url)));
        let sent = match body {
            Some(body) => request.header("content-type", "application/json").send(body.to_string()),
            None => request.send_empty(),
        };
        let mut response = sent.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.body_mut().read_to_string().unwrap_or_default();
        Err(refused(status.as_u16(), &text))
    }
}

fn read(mut response: Response<Body>) -> Result<Value, ClientError> {
    let status = response.status();
    let broken = |error: String| ClientError::Broken(error);
    let text = response.body_mut().read_to_string().map_err(|error| broken(error.to_string()))?;
    if !status.is_success() {
        return Err(refused(status.as_u16(), &text));
    }
    serde_json::from_str(&text).map_err(|error| broken(error.to_string()))
}

fn refused(status: u16, text: &str) -> ClientError {
    let message = serde_json::from_str::<Value>(text)
        .ok()
        .and_then(|body| body["error"]["message"].as_str().map(str::to_owned))
        .unwrap_or_else(|| text.chars().take(200).collect());
    ClientError::Refused { status, message }
}
