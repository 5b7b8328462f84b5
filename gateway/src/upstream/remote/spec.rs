//! What the configuration says of remote servers and of the models that they answer.

use crate::upstream::remote::balance::Balance;
use crate::upstream::remote::breaker::BreakerRule;
use hyper::header::{HeaderName, HeaderValue};
use serde_json::{Map, Value};
use std::path::PathBuf;
use std::time::Duration;

/// How a server is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `URL/chat/completions`, and the key after `Bearer`.
    OpenAi,
    /// `URL/openai/deployments/MODEL/chat/completions?api-version=…`, and the key as `api-key`.
    Azure {
        /// Such as `2024-10-21`.
        api_version: String,
    },
}

/// Where a key is kept; never the key itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// A variable of the environment.
    Env(String),
    /// A file, read again when it changes.
    File(PathBuf),
}

/// One remote server.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerSpec {
    /// What logs, metrics and records call it.
    pub name: String,
    /// Up to what the kind adds; without a slash at the end.
    pub url: String,
    /// How it is spoken to.
    pub kind: Kind,
    /// Where its key is.
    pub key: Option<KeySource>,
    /// The header of the key as it is, where it is neither `Authorization: Bearer` nor what the kind has.
    pub key_header: Option<HeaderName>,
    /// Sent with each request. Their values are not shown.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// What this server calls the model, where it is not what the model's table says.
    pub model: Option<String>,
    /// Share of the requests among the servers of one model.
    pub weight: u32,
    /// Requests at once; more go to others or are refused.
    pub max_concurrent: Option<usize>,
    /// Time for a connection.
    pub connect_timeout: Duration,
    /// When it is left alone.
    pub breaker: BreakerRule,
    /// It takes `stream_options`, and says at the end of a stream how many tokens there were.
    pub stream_usage: bool,
}

impl ServerSpec {
    /// A server at `url` with the usual patience.
    pub fn new(name: impl Into<String>, url: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            url: url.into(),
            kind: Kind::OpenAi,
            key: None,
            key_header: None,
            headers: Vec::new(),
            model: None,
            weight: 1,
            max_concurrent: None,
            connect_timeout: Duration::from_secs(5),
            breaker: BreakerRule::default(),
            stream_usage: true,
        }
    }
}

/// A public model name that remote servers answer.
#[derive(Clone, Debug, PartialEq)]
pub struct RemoteSpec {
    /// What clients call it.
    pub name: String,
    /// Names of the servers that answer it.
    pub servers: Vec<String>,
    /// What the servers call it; the public name where nothing is said.
    pub model: Option<String>,
    /// A system prompt that is put before every conversation.
    pub prompt_prefix: Option<String>,
    /// Sampling parameters of requests that are silent about them.
    pub defaults: Map<String, Value>,
    /// Time to the first token of a stream.
    pub first_token_timeout: Duration,
    /// Time to the end of an answer.
    pub timeout: Duration,
    /// Further attempts before the first byte.
    pub retries: u32,
    /// Models that are asked when this one gives no answer, in this order.
    pub fallback: Vec<String>,
    /// How one of several servers is chosen.
    pub balance: Balance,
}

impl RemoteSpec {
    /// A model with the usual patience.
    pub fn new(name: impl Into<String>, servers: Vec<String>) -> Self {
        Self {
            name: name.into(),
            servers,
            model: None,
            prompt_prefix: None,
            defaults: Map::new(),
            first_token_timeout: Duration::from_secs(60),
            timeout: Duration::from_secs(600),
            retries: 2,
            fallback: Vec::new(),
            balance: Balance::default(),
        }
    }

    /// What `server` calls the model.
    pub fn model_at<'a>(&'a self, server: &'a ServerSpec) -> &'a str {
        server.model.as_ref().or(self.model.as_ref()).unwrap_or(&self.name)
    }
}

/// All that is remote.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Remotes {
    /// The servers.
    pub servers: Vec<ServerSpec>,
    /// The models, in the order in which they are listed.
    pub models: Vec<RemoteSpec>,
}
