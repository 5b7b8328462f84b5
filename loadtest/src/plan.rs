//! The plan of a comparison: servers, loads and rounds, read from TOML.

use crate::error::LoadtestError;
use crate::load::Endpoint;
use crate::prompts::Prefix;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A comparison as its author wrote it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// How often each server is started and measured.
    #[serde(default = "three")]
    pub rounds: usize,
    /// Seed of the first round's prompts; later rounds use other prompts, every server the same ones.
    #[serde(default)]
    pub seed: u64,
    /// Tokens to generate per request.
    #[serde(default = "tokens_out")]
    pub max_tokens: u64,
    /// Tokens of each prompt's own text.
    #[serde(default = "tokens_in")]
    pub prompt_tokens: usize,
    /// Tokens of the beginning that prompts with a shared prefix have in common.
    #[serde(default = "shared_tokens")]
    pub shared_tokens: usize,
    /// Seconds that a server may take to become ready.
    #[serde(default = "ready_timeout")]
    pub ready_timeout_s: u64,
    /// Seconds after which a load starts no further request.
    #[serde(default = "load_timeout")]
    pub load_timeout_s: u64,
    /// The loads, in the order in which a started server meets them.
    #[serde(rename = "load")]
    pub loads: Vec<PlannedLoad>,
    /// The servers, in the order of the tables.
    #[serde(rename = "server")]
    pub servers: Vec<PlannedServer>,
}

/// One load of the plan.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedLoad {
    /// Whether prompts share a long beginning.
    pub prefix: Prefix,
    /// Requests kept in flight.
    pub streams: usize,
    /// Requests in total.
    pub requests: u64,
    /// Requests sent first and not counted.
    #[serde(default = "one")]
    pub warmup: u64,
}

/// One server of the plan.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedServer {
    /// Its name in the tables.
    pub name: String,
    /// Whether it is the one that the others are compared with.
    #[serde(default)]
    pub ours: bool,
    /// How it is spoken to.
    #[serde(default)]
    pub kind: Kind,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment variables added to ours.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Files without which it cannot run: missing ones are reported, not tried.
    #[serde(default)]
    pub requires: Vec<PathBuf>,
    /// A file that says why it could not be installed; its text goes into the report.
    pub install_error: Option<PathBuf>,
    /// A URL that answers 200 once it serves.
    #[serde(default)]
    pub ready_url: String,
    /// Base URL of its API.
    #[serde(default)]
    pub base_url: String,
    /// The model's name as the server knows it.
    #[serde(default)]
    pub model: String,
    /// Which endpoint takes the prompts.
    #[serde(default)]
    pub endpoint: Endpoint,
    /// Fields added to every request.
    #[serde(default)]
    pub body: Map<String, Value>,
    /// What the reader should know of its build and weights: version, format, flags.
    #[serde(default)]
    pub note: String,
    /// A program whose first line of output is the version.
    #[serde(default)]
    pub version_command: Vec<String>,
}

/// How a server is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// OpenAI-compatible HTTP.
    #[default]
    Http,
    /// A program without a server of its own, that takes loads as JSON lines (see `harness`).
    Lines,
}

fn one() -> u64 {
    1
}
fn three() -> usize {
    3
}
fn tokens_out() -> u64 {
    64
}
fn tokens_in() -> usize {
    128
}
fn shared_tokens() -> usize {
    1000
}
fn ready_timeout() -> u64 {
    180
}
fn load_timeout() -> u64 {
    120
}

impl Plan {
    /// Reads a plan; `${NAME}` in commands, environments, URLs and paths stands for that environment variable.
    pub fn read(path: &Path) -> Result<Self, LoadtestError> {
        let text = std::fs::read_to_string(path).map_err(LoadtestError::file(path))?;
        Self::parse(&text, |name| std::env::var(name).ok()).map_err(|why| LoadtestError::Plan { path: path.to_owned(), why })
    }

    fn parse(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let mut plan: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if plan.rounds == 0 || plan.loads.is_empty() || plan.servers.is_empty() {
            return Err("it needs at least one round, one [[load]] and one [[server]]".into());
        }
        if plan.servers.iter().filter(|server| server.ours).count() > 1 {
            return Err("`ours = true` belongs to one server".into());
        }
        for server in &mut plan.servers {
            let name = server.name.clone();
            let expand = |text: &mut String| {
                *text = expand(text, &variable).map_err(|why| format!("server `{name}`: {why}"))?;
                Ok::<_, String>(())
            };
            if server.command.is_empty() {
                return Err(format!("server `{name}`: `command` is empty"));
            }
            if server.kind == Kind::Http && (server.ready_url.is_empty() || server.base_url.is_empty()) {
                return Err(format!("server `{name}`: `ready_url` and `base_url` are needed"));
            }
            server.command.iter_mut().chain(&mut server.version_command).try_for_each(expand)?;
            server.env.values_mut().try_for_each(expand)?;
            [&mut server.ready_url, &mut server.base_url, &mut server.model].into_iter().try_for_each(expand)?;
            for path in server.requires.iter_mut().chain(&mut server.install_error) {
                let mut text = path.to_string_lossy().into_owned();
                expand(&mut text)?;
                *path = text.into();
            }
        }
        Ok(plan)
    }
}

fn expand(text: &str, variable: &impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once("${") {
        let (name, after) = after.split_once('}').ok_or_else(|| format!("`{text}` has `${{` without `}}`"))?;
        out += before;
        out += &variable(name).ok_or_else(|| format!("`{text}` needs the environment variable {name}, which is not set"))?;
        rest = after;
    }
    Ok(out + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = r#"
        [[load]]
        prefix = "shared"
        streams = 8
        requests = 16
        [[server]]
        name = "A"
        ours = true
        command = ["${BIN}/a", "--port", "1"]
        env = { HOME = "${BIN}" }
        requires = ["${BIN}/a"]
        ready_url = "http://127.0.0.1:1/health"
        base_url = "http://127.0.0.1:1/v1"
        body = { ignore_eos = true }
    "#;

    fn bin(name: &str) -> Option<String> {
        (name == "BIN").then(|| "/opt".into())
    }

    #[test]
    fn a_plan_has_defaults_and_its_variables_are_filled_in() {
        let plan = Plan::parse(PLAN, bin).unwrap();
        assert_eq!((plan.rounds, plan.max_tokens, plan.prompt_tokens, plan.shared_tokens), (3, 64, 128, 1000));
        let server = &plan.servers[0];
        assert_eq!(server.command, ["/opt/a", "--port", "1"]);
        assert_eq!((server.env["HOME"].as_str(), server.requires[0].as_path()), ("/opt", Path::new("/opt/a")));
        assert_eq!(server.body["ignore_eos"], true);
        assert_eq!(plan.loads[0].prefix, Prefix::Shared);
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (plan, part) in [
            (PLAN.to_owned(), "BIN, which is not set"),
            (PLAN.replace("streams", "strems"), "strems"),
            (PLAN.replace("prefix = \"shared\"", "prefix = \"warm\""), "line 3"),
            (PLAN.replace("ready_url", "# ready_url"), "`ready_url` and `base_url` are needed"),
            (PLAN.replace("[\"${BIN}/a\", \"--port\", \"1\"]", "[]"), "`command` is empty"),
            (format!("rounds = 0\n{PLAN}"), "at least one round"),
        ] {
            let why = Plan::parse(&plan, |name| bin(name).filter(|_| part != "BIN, which is not set")).unwrap_err();
            assert!(why.contains(part), "{why}");
        }
    }
}
