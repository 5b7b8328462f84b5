//! The commands that ask a running server.

use crate::api_client::{ApiClient, ClientError};
use crate::cli::rollout::say;
use crate::cli::rollout::status::{self, line};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value, json};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

/// How often `--watch` looks.
const LOOK: Duration = Duration::from_secs(1);
/// Steps of a canary that nobody described: percent and how long it stays there.
const STEPS: &str = "5:10m,20:30m,50:1h";

/// Which server. The key comes from `OPENAI_API_KEY`, so that it shows in no process list.
#[derive(Debug, clap::Args)]
pub struct ServerArgs {
    /// Where the API is
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080/v1", env = "OPENAI_BASE_URL")]
    base_url: String,
    /// Print the server's JSON
    #[arg(long)]
    json: bool,
}

impl ServerArgs {
    fn client(&self) -> ApiClient {
        ApiClient::new(&self.base_url, std::env::var("OPENAI_API_KEY").ok())
    }
}

/// Start a rollout: one that a file describes, or a canary of one variant.
#[derive(Debug, clap::Args)]
pub struct StartArgs {
    /// The rollout as TOML or JSON
    #[arg(value_name = "FILE", conflicts_with_all = ["model", "to"], required_unless_present_all = ["model", "to"])]
    file: Option<PathBuf>,
    /// The public model name whose traffic it is about
    #[arg(long, requires = "to")]
    model: Option<String>,
    /// The variant that is to get the traffic: a model, an adapter, an alias
    #[arg(long, value_name = "VARIANT", requires = "model")]
    to: Option<String>,
    /// Its name [default: the variant's]
    #[arg(long, conflicts_with = "file")]
    name: Option<String>,
    /// Shares in percent, each with the time that it stays
    #[arg(long, value_name = "PERCENT:TIME,…", default_value = STEPS, conflicts_with = "file")]
    steps: String,
    /// What must not get worse for a promotion, such as feedback.thumb
    #[arg(long, value_name = "METRIC", conflicts_with = "file")]
    goal: Option<String>,
    /// A person must approve the promotion
    #[arg(long, conflicts_with = "file")]
    approval: bool,
    /// Print what would be started, and start nothing
    #[arg(long)]
    print: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Show where a rollout stands, what was measured and what was decided.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Its name or id
    name: String,
    /// Look again every second until it is over
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// List rollouts, the newest first.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Those that are over, too
    #[arg(long)]
    all: bool,
    /// Only of this public model name
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Which rollout.
#[derive(Debug, clap::Args)]
pub struct OneArgs {
    /// Its name or id
    name: String,
    #[command(flatten)]
    server: ServerArgs,
}

/// Give a treatment all the traffic, whatever the numbers say.
#[derive(Debug, clap::Args)]
pub struct PromoteArgs {
    /// Of several treatments, which
    #[arg(long)]
    variant: Option<String>,
    #[command(flatten)]
    one: OneArgs,
}

/// Starts a rollout.
pub fn start(args: &StartArgs) -> Result<(), String> {
    let spec = args.spec()?;
    if args.print {
        say(&format!("{spec:#}"));
        return Ok(());
    }
    let made = args.server.client().post("rollouts", Some(&spec)).map_err(told)?;
    if args.server.json {
        say(&format!("{made:#}"));
    } else {
        let name = made["name"].as_str().unwrap_or_default();
        say(&format!("{}\n\n`tidemill rollout status {name} --watch` follows it.", line(&made)));
    }
    Ok(())
}

impl StartArgs {
    /// The rollout as the server takes it. What is wrong with it the server says.
    fn spec(&self) -> Result<Value, String> {
        if let Some(path) = &self.file {
            let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            let bad = |error: String| format!("{}: {error}", path.display());
            return if text.trim_start().starts_with('{') {
                serde_json::from_str(&text).map_err(|error| bad(error.to_string()))
            } else {
                toml::from_str(&text).map_err(|error| bad(error.to_string()))
            };
        }
        let (model, to) = (self.model.as_deref().unwrap_or_default(), self.to.as_deref().unwrap_or_default());
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
        let name = self.name.clone().unwrap_or_else(|| to.chars().map(plain).collect());
        let mut metrics = vec![
            json!({"metric": "error_rate", "guardrail": {"of": "difference", "max": 0.02}}),
            json!({"metric": "refusal_rate", "guardrail": {"of": "difference", "max": 0.05}}),
            json!({"metric": "truncation_rate", "guardrail": {"of": "difference", "max": 0.1}}),
            json!({"metric": "output_tokens", "guardrail": {"of": "relative", "min": -0.5, "max": 0.5}}),
        ];
        metrics.extend(self.goal.as_ref().map(|goal| json!({"metric": goal, "goal": {"min": 0}})));
        Ok(json!({
            "name": name,
            "model": model,
            "kind": "canary",
            // Called as the model: what that serves now.
            "arms": [{"variant": model}, {"variant": to}],
            "steps": steps(&self.steps)?,
            "metrics": metrics,
            "approval": self.approval,
        }))
    }
}

/// `5:10m,20:30m`
fn steps(text: &str) -> Result<Vec<Value>, String> {
    let mut steps = Vec::new();
    for part in text.split(',') {
        let bad = || format!("--steps: expected PERCENT:TIME such as {STEPS}, not `{part}`");
        let (percent, time) = part.split_once(':').ok_or_else(bad)?;
        let percent: f64 = percent.trim().trim_end_matches('%').parse().map_err(|_| bad())?;
        steps.push(json!({"set_weight": percent}));
        steps.push(json!({"pause": time.trim()}));
    }
    Ok(steps)
}

/// Shows a rollout, once or until it is over.
pub fn show(args: &StatusArgs) -> Result<(), String> {
    let (client, path) = (args.server.client(), path(&args.name, None));
    let screen = args.watch && std::io::stdout().is_terminal();
    let mut before = Value::Null;
    loop {
        let rollout = client.get(&path).map_err(told)?;
        let text = if args.server.json { format!("{rollout:#}") } else { status::table(&rollout) };
        if screen {
            // From the top of an empty screen.
            let _ = write!(std::io::stdout(), "\x1b[2J\x1b[H");
            say(&text);
        } else if before["version"] != rollout["version"] {
            say(&text);
        }
        if !args.watch || !rollout["ended_at"].is_null() {
            return Ok(());
        }
        before = rollout;
        std::thread::sleep(LOOK);
    }
}

/// Lists rollouts.
pub fn list(args: &ListArgs) -> Result<(), String> {
    let mut query = vec!["limit=100".to_owned()];
    if !args.all {
        query.push("over=false".to_owned());
    }
    query.extend(args.model.as_ref().map(|model| format!("model={}", utf8_percent_encode(model, NON_ALPHANUMERIC))));
    let page = args.server.client().get(&format!("rollouts?{}", query.join("&"))).map_err(told)?;
    if args.server.json {
        say(&format!("{page:#}"));
        return Ok(());
    }
    let rows: Vec<&Value> = page["data"].as_array().into_iter().flatten().collect();
    if rows.is_empty() {
        say("No rollout runs. `tidemill rollout start --model MODEL --to VARIANT` starts one.");
    }
    rows.iter().for_each(|row| say(&line(row)));
    Ok(())
}

/// Does what a person wants with a rollout; `act` is the last part of the address.
pub fn act(args: &OneArgs, act: &str) -> Result<(), String> {
    acted(args, act, None)
}

/// Promotes a treatment.
pub fn promote(args: &PromoteArgs) -> Result<(), String> {
    let body = Map::from_iter(args.variant.iter().map(|variant| ("variant".to_owned(), Value::from(variant.as_str()))));
    acted(&args.one, "promote", Some(Value::Object(body)))
}

fn acted(args: &OneArgs, act: &str, body: Option<Value>) -> Result<(), String> {
    let rollout = args.server.client().post(&path(&args.name, Some(act)), body.as_ref()).map_err(told)?;
    if args.server.json {
        say(&format!("{rollout:#}"));
        return Ok(());
    }
    let count = |key: &str| rollout["servers"][key].as_u64().unwrap_or(1);
    let (all, serving) = (count("all"), count("serving"));
    let late = match all.saturating_sub(serving) {
        0 => String::new(),
        late => format!(
            "\n{late} of {all} servers have not said yet that they follow; they do within a second of reaching the database."
        ),
    };
    say(&format!("{}{late}", line(&rollout)));
    Ok(())
}

fn path(name: &str, act: Option<&str>) -> String {
    let name = utf8_percent_encode(name, NON_ALPHANUMERIC);
    act.map_or_else(|| format!("rollouts/{name}"), |act| format!("rollouts/{name}/{act}"))
}

fn told(error: ClientError) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::spec::{Kind, Spec, Step};
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        start: StartArgs,
    }

    fn line(words: &[&str]) -> Result<StartArgs, clap::Error> {
        Line::try_parse_from([&["start"], words].concat()).map(|line| line.start)
    }

    #[test]
    fn one_line_is_a_canary_that_the_server_takes() {
        let args =
            line(&["--model", "assistant", "--to", "base:new", "--steps", "5:10m,50%:1h", "--goal", "feedback.thumb"]).unwrap();
        let spec = Spec::parse(&args.spec().unwrap()).unwrap();
        assert_eq!((spec.name.as_str(), spec.kind, spec.arms[1].variant.as_str()), ("base-new", Kind::Canary, "base:new"));
        assert_eq!(spec.steps, [Step::SetWeight(0.05), Step::PauseFor(600), Step::SetWeight(0.5), Step::PauseFor(3600)]);
        assert_eq!(spec.metrics.last().unwrap().name(), "goal feedback.thumb");
        let usual = line(&["--model", "m", "--to", "n", "--name", "x"]).unwrap().spec().unwrap();
        assert_eq!((Spec::parse(&usual).unwrap().steps.len(), &usual["name"]), (6, &json!("x")));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        assert!(
            line(&[]).is_err() && line(&["--model", "m"]).is_err() && line(&["a.toml", "--model", "m", "--to", "n"]).is_err()
        );
        assert!(line(&["a.toml"]).is_ok());
        let bad = line(&["--model", "m", "--to", "n", "--steps", "5"]).unwrap().spec().unwrap_err();
        assert!(bad.contains("--steps") && bad.contains("`5`"), "{bad}");
    }
}
