//! What a server is sent: address, headers, body. Pure.

use crate::upstream::remote::spec::{Kind, RemoteSpec, ServerSpec};
use hyper::HeaderMap;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value, json};

/// What a remote server is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
}

impl Endpoint {
    fn path(self) -> &'static str {
        match self {
            Self::Chat => "chat/completions",
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
        }
    }

    /// What records call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completion",
            Self::Embeddings => "embedding",
        }
    }

    /// What traces call it.
    pub fn operation(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "text_completion",
            Self::Embeddings => "embeddings",
        }
    }
}

/// What is this gateway's own affair: notes for its records, and places in its queues.
const OURS: [&str; 5] = ["tidemill", "metadata", "store", "priority", "service_tier"];

/// Where `endpoint` of the model that the server calls `model` is.
pub fn url(server: &ServerSpec, endpoint: Endpoint, model: &str) -> String {
    let (base, path) = (&server.url, endpoint.path());
    match &server.kind {
        Kind::OpenAi => match base.split_once('?') {
            // Such as a version that some endpoints want in every address.
            Some((base, query)) => format!("{}/{path}?{query}", base.trim_end_matches('/')),
            None => format!("{base}/{path}"),
        },
        Kind::Azure { api_version } => {
            let deployment = utf8_percent_encode(model, NON_ALPHANUMERIC).to_string().replace("%2D", "-").replace("%2E", ".");
            format!("{base}/openai/deployments/{deployment}/{path}?api-version={api_version}")
        }
    }
}

/// The headers, among them the key where there is one, and the trace that the request belongs to. The operator's own go before ours.
pub fn headers(server: &ServerSpec, key: Option<&str>, traceparent: Option<&str>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ACCEPT, HeaderValue::from_static("application/json, text/event-stream"));
    headers.insert(USER_AGENT, HeaderValue::from_static(concat!("tidemill/", env!("CARGO_PKG_VERSION"))));
    if let Some(value) = traceparent.and_then(|text| HeaderValue::try_from(text).ok()) {
        headers.insert(HeaderName::from_static("traceparent"), value);
    }
    let (name, value) = match (&server.key_header, &server.kind) {
        (Some(name), _) => (name.clone(), key.map(str::to_owned)),
        (None, Kind::OpenAi) => (AUTHORIZATION, key.map(|key| format!("Bearer {key}"))),
        (None, Kind::Azure { .. }) => (HeaderName::from_static("api-key"), key.map(str::to_owned)),
    };
    if let Some(mut value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    for (name, value) in &server.headers {
        headers.insert(name.clone(), value.clone());
    }
    headers
}

/// What the server is sent of `asked`, the client's body: its own name for the model, the prefix and the defaults, without what is not
/// its affair. A stream always reports its usage, where the server can: that is how tokens and cost are known.
pub fn body(asked: &Map<String, Value>, endpoint: Endpoint, model: &RemoteSpec, server: &ServerSpec) -> Map<String, Value> {
    let mut body = asked.clone();
    body.retain(|key, _| !OURS.contains(&key.as_str()));
    body.insert("model".into(), model.model_at(server).into());
    if endpoint == Endpoint::Embeddings {
        return body;
    }
    for (key, value) in &model.defaults {
        let same = |key: &str| body.get(key).is_some_and(|value| !value.is_null());
        // The two names of one limit.
        let other = match key.as_str() {
            "max_tokens" => "max_completion_tokens",
            "max_completion_tokens" => "max_tokens",
            other => other,
        };
        if !same(key) && !same(other) {
            body.insert(key.clone(), value.clone());
        }
    }
    if let (Some(prefix), Some(messages)) = (&model.prompt_prefix, body.get_mut("messages").and_then(Value::as_array_mut)) {
        put_before(prefix, messages);
    }
    if body.get("stream").and_then(Value::as_bool).unwrap_or(false) {
        if server.stream_usage {
            let options = body.entry("stream_options").or_insert_with(|| json!({}));
            if !options.is_object() {
                *options = json!({});
            }
            options["include_usage"] = true.into();
        } else {
            body.remove("stream_options");
        }
    } else {
        body.remove("stream_options");
    }
    body
}

/// The prefix as the conversation's first words; a system prompt that is there goes on after it, since some models take only one.
pub fn put_before(prefix: &str, messages: &mut Vec<Value>) {
    let theirs = messages.first_mut().filter(|first| matches!(first["role"].as_str(), Some("system" | "developer")));
    if let Some(text) = theirs.and_then(|first| first.get_mut("content"))
        && let Some(rest) = text.as_str()
    {
        *text = format!("{prefix}\n\n{rest}").into();
    } else {
        messages.insert(0, json!({"role": "system", "content": prefix}));
    }
}

/// The parameters of `sent`, for the record: no texts of the conversation, nothing about the person.
pub fn params(sent: &Map<String, Value>) -> Map<String, Value> {
    const TEXTS: [&str; 9] =
        ["model", "messages", "prompt", "suffix", "prediction", "stream", "stream_options", "user", "safety_identifier"];
    sent.iter()
        .filter(|(key, value)| !TEXTS.contains(&key.as_str()) && !value.is_null())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// A hash of a conversation's beginning, which its later turns share: all up to the first thing that the person said.
pub fn prefix_key(body: &Map<String, Value>) -> u64 {
    /// Of a text, what is looked at.
    const HEAD: usize = 1024;
    let mut hasher = blake3::Hasher::new();
    for message in body.get("messages").and_then(Value::as_array).into_iter().flatten() {
        hasher.update(message.to_string().as_bytes());
        if message["role"] == "user" {
            break;
        }
    }
    if let Some(prompt) = body.get("prompt") {
        let text = prompt.to_string();
        hasher.update(&text.as_bytes()[..text.len().min(HEAD)]);
    }
    first_bits(&hasher.finalize())
}

/// A hash as a number.
pub fn first_bits(hash: &blake3::Hash) -> u64 {
    hash.as_bytes().iter().take(8).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn server() -> ServerSpec {
        ServerSpec::new("s", "https://api.example.com/v1")
    }

    fn model() -> RemoteSpec {
        RemoteSpec { model: Some("big-1".into()), ..RemoteSpec::new("assistant", vec!["s".into()]) }
    }

    #[test]
    fn addresses_are_those_of_the_kind() {
        assert_eq!(url(&server(), Endpoint::Chat, "m"), "https://api.example.com/v1/chat/completions");
        let query = ServerSpec { url: "https://x.example/v1/?v=2".into(), ..server() };
        assert_eq!(url(&query, Endpoint::Embeddings, "m"), "https://x.example/v1/embeddings?v=2");
        let azure = ServerSpec {
            url: "https://r.openai.azure.com".into(),
            kind: Kind::Azure { api_version: "2024-10-21".into() },
            ..server()
        };
        assert_eq!(
            url(&azure, Endpoint::Chat, "gpt-4.1 a/b"),
            "https://r.openai.azure.com/openai/deployments/gpt-4.1%20a%2Fb/chat/completions?api-version=2024-10-21"
        );
    }

    #[test]
    fn the_key_goes_where_the_kind_has_it_and_is_not_shown() {
        let bearer = headers(&server(), Some("sk-secret"), Some("00-a-b-01"));
        assert_eq!(
            (&bearer[AUTHORIZATION], &bearer["traceparent"]),
            (&HeaderValue::from_static("Bearer sk-secret"), &HeaderValue::from_static("00-a-b-01"))
        );
        assert!(!format!("{bearer:?}").contains("sk-secret"));
        let azure = ServerSpec { kind: Kind::Azure { api_version: "v".into() }, ..server() };
        let azure = headers(&azure, Some("sk-secret"), None);
        assert!(azure["api-key"] == "sk-secret" && !azure.contains_key(AUTHORIZATION));
        let own = ServerSpec {
            key_header: Some(HeaderName::from_static("x-key")),
            headers: vec![(USER_AGENT, HeaderValue::from_static("mine"))],
            ..server()
        };
        let own = headers(&own, Some("k"), None);
        assert!(own["x-key"] == "k" && !own.contains_key(AUTHORIZATION) && own[USER_AGENT] == "mine");
        assert!(!headers(&server(), None, None).contains_key(AUTHORIZATION));
    }

    #[test]
    fn the_body_is_the_clients_but_for_what_is_ours() {
        let asked = map(json!({
            "model": "assistant", "messages": [{"role": "user", "content": "hi"}], "stream": true, "temperature": null,
            "metadata": {"a": "b"}, "store": false, "tidemill": {}, "priority": 1, "service_tier": "flex", "logit_bias": {"1": 2},
        }));
        let mut model = model();
        model.defaults = map(json!({"temperature": 0.5, "max_tokens": 9}));
        assert_eq!(
            Value::Object(body(&asked, Endpoint::Chat, &model, &server())),
            json!({
                "model": "big-1", "messages": [{"role": "user", "content": "hi"}], "stream": true, "temperature": 0.5,
                "logit_bias": {"1": 2}, "max_tokens": 9, "stream_options": {"include_usage": true},
            })
        );
        let plain = ServerSpec { stream_usage: false, model: Some("own".into()), ..server() };
        let sent =
            body(&map(json!({"stream": true, "max_completion_tokens": 3, "temperature": 0})), Endpoint::Chat, &model, &plain);
        assert_eq!(Value::Object(sent), json!({"stream": true, "max_completion_tokens": 3, "temperature": 0, "model": "own"}));
        let sent = body(&map(json!({"input": "x", "model": "a"})), Endpoint::Embeddings, &model, &server());
        assert_eq!(Value::Object(sent), json!({"input": "x", "model": "big-1"}));
    }

    #[test]
    fn the_prefix_is_said_first() {
        let mut model = model();
        model.prompt_prefix = Some("Be brief.".into());
        let messages =
            |messages: Value| body(&map(json!({"messages": messages})), Endpoint::Chat, &model, &server())["messages"].clone();
        let user = json!({"role": "user", "content": "hi"});
        assert_eq!(messages(json!([user])), json!([{"role": "system", "content": "Be brief."}, user]));
        assert_eq!(
            messages(json!([{"role": "system", "content": "You are a pirate."}, user])),
            json!([{"role": "system", "content": "Be brief.\n\nYou are a pirate."}, user])
        );
        let parts = json!({"role": "system", "content": [{"type": "text", "text": "x"}]});
        assert_eq!(messages(json!([parts])), json!([{"role": "system", "content": "Be brief."}, parts]));
    }

    #[test]
    fn parameters_hold_no_texts_and_no_person() {
        let sent = map(
            json!({"model": "m", "messages": [], "user": "u", "temperature": 0.5, "top_p": null, "tools": [1], "stream": true}),
        );
        assert_eq!(Value::Object(params(&sent)), json!({"temperature": 0.5, "tools": [1]}));
    }

    #[test]
    fn the_turns_of_a_conversation_share_their_key() {
        let key = |messages: Value| prefix_key(&map(json!({"messages": messages})));
        let (system, user) = (json!({"role": "system", "content": "s"}), json!({"role": "user", "content": "u"}));
        let later = json!([system, user, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]);
        assert_eq!(key(json!([system, user])), key(later));
        assert_ne!(key(json!([system, user])), key(json!([user])));
        assert_ne!(prefix_key(&map(json!({"prompt": "a"}))), prefix_key(&map(json!({"prompt": "b"}))));
    }
}
