//! `[upstreams.NAME]`, `[models.NAME]` and `upstream`: servers elsewhere, and the models that they answer.

use crate::config::layer::{Layer, NamedTable, Origin, Setting};
use crate::config::tables::{known, tables};
use crate::config::{ConfigError, value};
use crate::upstream::remote::balance::Balance;
use crate::upstream::remote::breaker::BreakerRule;
use crate::upstream::remote::{KeySource, Kind, RemoteSpec, Remotes, ServerSpec};
use hyper::Uri;
use hyper::header::{HeaderName, HeaderValue};
use serde_json::{Map, Value};
use std::path::PathBuf;

/// What `[upstreams.NAME]` can say.
const SERVER_KEYS: [&str; 14] = [
    "url",
    "kind",
    "api_version",
    "key_env",
    "key_file",
    "key_header",
    "headers",
    "model",
    "weight",
    "max_concurrent",
    "connect_timeout",
    "breaker_failures",
    "breaker_rest",
    "stream_usage",
];
/// What `[models.NAME]` can say, beside [`DECIMALS`] and [`COUNTS`].
const MODEL_KEYS: [&str; 9] = [
    "upstreams",
    "model",
    "prompt_prefix",
    "first_token_timeout",
    "timeout",
    "retries",
    "fallback",
    "balance",
    "reasoning_effort",
];
/// Sampling defaults with their bounds.
const DECIMALS: [(&str, f64, f64); 4] =
    [("temperature", 0.0, 2.0), ("top_p", 0.0, 1.0), ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0)];
/// Both are the most tokens of an answer; which of them a server takes depends on the server.
const COUNTS: [&str; 2] = ["max_tokens", "max_completion_tokens"];
/// Keys of tables that may have several values.
pub(super) const TABLE_LISTS: [(&str, &str); 3] = [("upstreams", "headers"), ("models", "upstreams"), ("models", "fallback")];

/// Everything remote that the layers name.
pub fn remotes(layers: &[Layer]) -> Result<Remotes, ConfigError> {
    let mut remotes = Remotes::default();
    for table in tables(layers, "upstreams") {
        remotes.servers.push(server(table)?);
    }
    for table in tables(layers, "models") {
        remotes.models.push(model(table, &remotes.servers)?);
    }
    for (text, origin) in layers.iter().map(|layer| layer.list("upstream")).find(|list| !list.is_empty()).unwrap_or_default() {
        let refused = |message: String| ConfigError::Value { place: origin.to_string(), message };
        let (server, model) = short(&text).map_err(|expected| refused(format!("{expected}, not `{text}`")))?;
        let taken = remotes.servers.iter().any(|other| other.name == server.name)
            || remotes.models.iter().any(|other| other.name == model.name);
        if taken {
            return Err(refused(format!("two upstreams or models are called `{}`; give one of them another name", model.name)));
        }
        remotes.servers.push(server);
        remotes.models.push(model);
    }
    Ok(remotes)
}

/// `NAME=[MODEL@]URL[#VARIABLE]`: a server and the model that it answers, both called NAME.
fn short(text: &str) -> Result<(ServerSpec, RemoteSpec), String> {
    let expected =
        || "expected NAME=[MODEL@]URL[#VARIABLE], such as big=gpt-4.1@https://api.openai.com/v1#OPENAI_API_KEY".to_owned();
    let (name, rest) = text.split_once('=').filter(|(name, _)| is_name(name)).ok_or_else(expected)?;
    let (rest, variable) = rest.split_once('#').map_or((rest, None), |(rest, variable)| (rest, Some(variable)));
    let (model, address) = match rest.split_once('@').filter(|(model, _)| !model.contains("://")) {
        Some((model, address)) => (Some(model).filter(|model| !model.is_empty()), address),
        None => (None, rest),
    };
    let key = match variable {
        Some("") => return Err(expected()),
        variable => variable.map(|variable| KeySource::Env(variable.to_owned())),
    };
    let server = ServerSpec { key, ..ServerSpec::new(name, self::address(address).map_err(|_| expected())?) };
    let model = RemoteSpec { model: model.map(str::to_owned), ..RemoteSpec::new(name, vec![name.to_owned()]) };
    Ok((server, model))
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.chars().any(|c| c.is_control() || c.is_whitespace())
}

fn wrong(setting: Option<&Setting>, table: &NamedTable, message: impl Into<String>) -> ConfigError {
    let place = setting.map_or(&table.origin, |setting| &setting.origin);
    ConfigError::Value { place: place.to_string(), message: message.into() }
}

fn server(table: &NamedTable) -> Result<ServerSpec, ConfigError> {
    known(table, &SERVER_KEYS)?;
    let get = |key: &str| table.get(key);
    let Some(url) = get("url") else {
        return Err(wrong(None, table, "needs `url`, such as \"https://api.openai.com/v1\""));
    };
    let usual = ServerSpec::new(table.name.clone(), url.parse(address)?);
    let azure = get("kind").map_or(Ok(false), |s| s.parse(|text| value::choice(text, &[("openai", false), ("azure", true)])))?;
    let kind = match (azure, get("api_version")) {
        (false, None) => Kind::OpenAi,
        (true, Some(version)) => Kind::Azure { api_version: version.parse(api_version)? },
        (true, None) => return Err(wrong(get("kind"), table, "needs `api_version` beside it, such as \"2024-10-21\"")),
        (false, version) => return Err(wrong(version, table, "is for `kind = \"azure\"` only")),
    };
    let key = match (get("key_env"), get("key_file")) {
        (None, None) => None,
        (Some(variable), None) => Some(KeySource::Env(variable.text.clone())),
        (None, Some(file)) => Some(KeySource::File(PathBuf::from(&file.text))),
        (Some(_), file) => return Err(wrong(file, table, "there is `key_env` already; keep one of the two")),
    };
    Ok(ServerSpec {
        kind,
        key,
        key_header: get("key_header").map(|s| s.parse(header_name)).transpose()?,
        headers: table.list("headers").map(header).collect::<Result<_, _>>()?,
        model: get("model").map(|s| s.text.clone()),
        weight: get("weight").map_or(Ok(usual.weight), |s| s.parse(|text| small(text, 0)))?,
        max_concurrent: get("max_concurrent").map(|s| s.parse(|text| value::count(text, 1))).transpose()?,
        connect_timeout: get("connect_timeout").map_or(Ok(usual.connect_timeout), |s| s.parse(value::some_time))?,
        breaker: BreakerRule {
            failures: get("breaker_failures").map_or(Ok(usual.breaker.failures), |s| s.parse(|text| small(text, 1)))?,
            rest: get("breaker_rest").map_or(Ok(usual.breaker.rest), |s| s.parse(value::some_time))?,
        },
        stream_usage: get("stream_usage").map_or(Ok(true), |s| s.parse(value::switch))?,
        ..usual
    })
}

fn model(table: &NamedTable, servers: &[ServerSpec]) -> Result<RemoteSpec, ConfigError> {
    let samplings = DECIMALS.iter().map(|(key, ..)| *key).chain(COUNTS);
    known(table, &MODEL_KEYS.into_iter().chain(samplings).collect::<Vec<_>>())?;
    let get = |key: &str| table.get(key);
    let names = |key: &str| table.list(key).map(|setting| setting.text.clone()).collect::<Vec<_>>();
    let usual = RemoteSpec::new(table.name.clone(), names("upstreams"));
    if usual.servers.is_empty() {
        return Err(wrong(get("upstreams"), table, "needs `upstreams`, a list of names that have a table [upstreams.NAME]"));
    }
    for setting in table.list("upstreams") {
        if !servers.iter().any(|server| server.name == setting.text) {
            return Err(wrong(Some(setting), table, format!("there is no table [upstreams.{}]", setting.text)));
        }
    }
    if let Some(itself) = table.list("fallback").find(|setting| setting.text == table.name) {
        return Err(wrong(Some(itself), table, "a model cannot fall back to itself"));
    }
    let mut defaults = Map::new();
    for (key, least, most) in DECIMALS {
        if let Some(setting) = get(key) {
            defaults.insert(key.to_owned(), setting.parse(|text| between(text, least, most))?.into());
        }
    }
    for key in COUNTS {
        if let Some(setting) = get(key) {
            defaults.insert(key.to_owned(), setting.parse(|text| value::count(text, 1))?.into());
        }
    }
    if let Some(setting) = get("reasoning_effort") {
        defaults.insert("reasoning_effort".to_owned(), Value::from(setting.text.as_str()));
    }
    let balances = [("weighted", Balance::Weighted), ("least-loaded", Balance::LeastLoaded), ("prefix", Balance::Prefix)];
    Ok(RemoteSpec {
        model: get("model").map(|s| s.text.clone()),
        prompt_prefix: get("prompt_prefix").map(|s| s.text.clone()).filter(|text| !text.is_empty()),
        defaults,
        first_token_timeout: get("first_token_timeout").map_or(Ok(usual.first_token_timeout), |s| s.parse(value::some_time))?,
        timeout: get("timeout").map_or(Ok(usual.timeout), |s| s.parse(value::some_time))?,
        retries: get("retries").map_or(Ok(usual.retries), |s| s.parse(retries))?,
        fallback: names("fallback"),
        balance: get("balance").map_or(Ok(usual.balance), |s| s.parse(|text| value::choice(text, &balances)))?,
        ..usual
    })
}

/// An address without what does not belong into it. A key in the address would be in every log.
fn address(text: &str) -> Result<String, String> {
    let expected = || "expected an address such as https://api.openai.com/v1, without user and password".to_owned();
    let text = value::web_address(text).map_err(|_| expected())?;
    let uri: Uri = text.parse().map_err(|_| expected())?;
    let plain = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if plain { Ok(text.trim_end_matches('/').to_owned()) } else { Err(expected()) }
}

fn api_version(text: &str) -> Result<String, String> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    if plain { Ok(text.to_owned()) } else { Err("expected a version such as 2024-10-21".to_owned()) }
}

fn header_name(text: &str) -> Result<HeaderName, String> {
    HeaderName::try_from(text).map_err(|_| "expected the name of a header, such as x-api-key".to_owned())
}

/// `Name: value`. The value may be a secret: an error does not repeat it.
fn header(setting: &Setting) -> Result<(HeaderName, HeaderValue), ConfigError> {
    let read = || {
        let (name, value) = setting.text.split_once(':')?;
        let mut value = HeaderValue::try_from(value.trim()).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::try_from(name.trim()).ok()?, value))
    };
    let message = "expected a header such as \"OpenAI-Organization: org-1\"".to_owned();
    read().ok_or_else(|| ConfigError::Value { place: setting.origin.to_string(), message })
}

fn small(text: &str, least: usize) -> Result<u32, String> {
    let number = value::count(text, least)?;
    u32::try_from(number).map_err(|_| "expected a smaller number".to_owned())
}

fn retries(text: &str) -> Result<u32, String> {
    let expected = || "expected a whole number from 0 to 10".to_owned();
    text.parse().ok().filter(|number| *number <= 10).ok_or_else(expected)
}

fn between(text: &str, least: f64, most: f64) -> Result<f64, String> {
    let expected = || format!("expected a number from {least} to {most}");
    text.replace('_', "").parse().ok().filter(|number| (least..=most).contains(number)).ok_or_else(expected)
}

/// Fails when a remote model has the name of a local one.
pub fn check_names<'a>(remotes: &Remotes, mut local: impl Iterator<Item = &'a String>) -> Result<(), ConfigError> {
    let twice = local.find(|name| remotes.models.iter().any(|remote| remote.name == **name));
    twice.map_or(Ok(()), |name| {
        let place = Origin::Flag("model").to_string();
        let message = format!("`{name}` is also the name of a model that other servers answer; give one of the two another name");
        Err(ConfigError::Value { place, message })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_short_form_names_a_model_a_server_and_where_its_key_is() {
        let (server, model) = short("big=org/m-1@https://x.example/v1/#X_KEY").unwrap();
        assert_eq!((server.name.as_str(), server.url.as_str()), ("big", "https://x.example/v1"));
        assert_eq!(server.key, Some(KeySource::Env("X_KEY".into())));
        assert_eq!((model.name.as_str(), model.model.as_deref()), ("big", Some("org/m-1")));
        let (server, model) = short("m=http://127.0.0.1:8000/v1").unwrap();
        assert_eq!((server.key, model.model, model.servers), (None, None, vec!["m".to_owned()]));
        for wrong in
            ["", "m", "=http://x", "m=x", "m=ftp://x", "m=http://", "a b=http://x", "m=http://x#", "m=http://user:pass@x/v1"]
        {
            assert!(short(wrong).is_err(), "{wrong}");
        }
    }

    fn read(text: &str) -> Result<Remotes, String> {
        let layer = crate::config::file::parse(std::path::Path::new("t"), text).map_err(|error| error.to_string())?;
        remotes(&[layer]).map_err(|error| error.to_string())
    }

    #[test]
    fn tables_are_read_with_their_lists() {
        let remotes = read(
            "[upstreams.a]\nurl = \"https://a.example/v1/\"\nkey_file = \"/run/key\"\nheaders = [\"X-A: 1\", \"X-B: 2:3\"]\nweight = 3\n\
             max_concurrent = 7\nbreaker_failures = 2\nbreaker_rest = \"1m\"\nstream_usage = false\nmodel = \"own\"\n\
             [upstreams.b]\nurl = \"https://b.example\"\nkind = \"azure\"\napi_version = \"2024-10-21\"\nkey_env = \"B\"\n\
             [models.assistant]\nupstreams = [\"a\", \"b\"]\nmodel = \"big\"\nprompt_prefix = \" Be brief. \"\ntemperature = 0.5\nmax_tokens = 9\n\
             first_token_timeout = \"2s\"\ntimeout = \"1m\"\nretries = 1\nfallback = [\"other\", \"local\"]\nbalance = \"prefix\"\n\
             [models.other]\nupstreams = \"a\"\n",
        )
        .unwrap();
        let [a, b] = &remotes.servers[..] else { panic!("two servers") };
        assert_eq!((a.url.as_str(), a.weight, a.max_concurrent, a.stream_usage), ("https://a.example/v1", 3, Some(7), false));
        assert_eq!(a.breaker, BreakerRule { failures: 2, rest: Duration::from_secs(60) });
        assert_eq!(a.headers[1], (HeaderName::from_static("x-b"), HeaderValue::from_static("2:3")));
        assert!(!format!("{a:?}").contains("2:3"), "values of headers are not shown");
        assert_eq!(b.kind, Kind::Azure { api_version: "2024-10-21".into() });
        let [assistant, other] = &remotes.models[..] else { panic!("two models") };
        assert_eq!((assistant.model_at(a), assistant.model_at(b), other.model_at(b)), ("own", "big", "other"));
        assert_eq!(Value::Object(assistant.defaults.clone()), serde_json::json!({"temperature": 0.5, "max_tokens": 9}));
        assert_eq!(
            (assistant.prompt_prefix.as_deref(), assistant.retries, assistant.balance),
            (Some(" Be brief. "), 1, Balance::Prefix)
        );
        assert_eq!(
            (assistant.fallback.join(" "), assistant.timeout.as_secs(), assistant.first_token_timeout.as_secs()),
            ("other local".into(), 60, 2)
        );
    }

    #[test]
    fn what_is_wrong_names_its_line_and_repeats_no_secret() {
        let a = "[upstreams.a]\nurl = \"http://a\"\n";
        for (text, expected) in [
            ("[upstreams.a]\nweight = 1\n".to_owned(), "t:1: `upstreams.a`: needs `url`"),
            ("[upstreams.a]\nurl = \"a\"\n".to_owned(), "t:2: `upstreams.a.url`: expected an address"),
            (format!("{a}kind = \"azure\"\n"), "needs `api_version`"),
            (format!("{a}api_version = \"1\"\n"), "`upstreams.a.api_version`: is for"),
            (format!("{a}key_env = \"K\"\nkey_file = \"f\"\n"), "keep one of the two"),
            (format!("{a}key = \"sk-1\"\n"), "unknown key `key`"),
            (format!("{a}headers = [\"hunter2\"]\n"), "expected a header"),
            (format!("{a}[models.m]\n"), "needs `upstreams`"),
            (format!("{a}[models.m]\nupstreams = [\"b\"]\n"), "there is no table [upstreams.b]"),
            (format!("{a}[models.m]\nupstreams = [\"a\"]\nfallback = [\"m\"]\n"), "cannot fall back to itself"),
            (format!("{a}[models.m]\nupstreams = [\"a\"]\ntemperature = 3\n"), "expected a number from 0 to 2"),
            (format!("{a}[models.m]\nupstreams = [\"a\"]\nretries = 99\n"), "from 0 to 10"),
            (format!("upstream = \"a=http://x\"\n{a}"), "two upstreams or models are called `a`"),
        ] {
            let message = read(&text).unwrap_err();
            assert!(message.contains(expected) && !message.contains("hunter2"), "{text}: {message}");
        }
    }

    #[test]
    fn a_name_is_either_here_or_elsewhere() {
        let remotes = read("upstream = \"m=http://x\"").unwrap();
        assert!(check_names(&remotes, ["n".to_owned()].iter()).is_ok());
        assert!(check_names(&remotes, ["m".to_owned()].iter()).is_err());
    }
}
