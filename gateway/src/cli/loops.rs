//! `tidemill loop`

use std::collections::BTreeSet;
use std::io::Write;

use clap::Subcommand;
use serde_json::{Value, json};
use tidemill_rlhf::flywheel::Wish;
use tidemill_store::{DataDir, Files, Loops, Store};

use crate::cli::store_args::{StoreArgs, StoreCommandError};
use crate::cli::{COMMAND_LINE, when};
use crate::clock::now;
use crate::config::Config;
use crate::flywheel::{WishRefusal, follow, standing};

/// Loops from feedback to adapters. A running server follows what is changed here within a second or two.
#[derive(Debug, clap::Args)]
pub struct LoopArgs {
    #[command(subcommand)]
    command: LoopCommand,
}

#[derive(Debug, Subcommand)]
enum LoopCommand {
    /// Where loops stand, what they wait for, and what became of their cycles
    Status {
        /// One of them [default: all]
        name: Option<String>,
        /// Most cycles that are shown
        #[arg(long, value_name = "N", default_value_t = 5)]
        cycles: u64,
        /// As the API has it
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Begin a cycle, whatever is waited for
    Run(NamedArgs),
    /// Begin nothing more; what runs ends by itself
    Pause(NamedArgs),
    /// Have a paused loop go on
    Resume(NamedArgs),
}

#[derive(Debug, clap::Args)]
struct NamedArgs {
    /// The loop
    name: String,
    /// Say where it stands as the API has it
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs the command.
pub fn run(args: &LoopArgs) -> Result<(), StoreCommandError> {
    match &args.command {
        LoopCommand::Status { name, cycles, json, store } => {
            let found = look(store, name.as_deref(), (*cycles).clamp(1, 100))?;
            match (json, name) {
                (true, Some(_)) => say(&pretty(found.first().unwrap_or(&Value::Null))),
                (true, None) => say(&pretty(&json!(found))),
                (false, _) if found.is_empty() => say("no loops; `[loop.NAME]` in tidemill.toml makes one"),
                (false, _) => say(&found.iter().map(described).collect::<Vec<_>>().join("\n\n")),
            }
        }
        LoopCommand::Run(named) => want(named, Wish::Run)?,
        LoopCommand::Pause(named) => want(named, Wish::Pause)?,
        LoopCommand::Resume(named) => want(named, Wish::Resume)?,
    }
    Ok(())
}

fn refused(error: WishRefusal) -> StoreCommandError {
    match error {
        WishRefusal::Store(error) => error.into(),
        error => StoreCommandError::Usage(error.to_string()),
    }
}

fn look(store: &StoreArgs, name: Option<&str>, cycles: u64) -> Result<Vec<Value>, StoreCommandError> {
    store.with_config(async |store, config| {
        let mut names: BTreeSet<String> = name.map(str::to_owned).into_iter().collect();
        if name.is_none() {
            names.extend(config.loops.keys().cloned());
            names.extend(Loops::new(&store).all().await?.into_iter().map(|row| row.name));
        }
        let here = place(&store, &config);
        let mut loops = Vec::with_capacity(names.len());
        for name in names {
            let found = standing(&store, &name, config.loops.get(&name), cycles, here.as_deref(), now()).await?;
            loops.push(found.ok_or_else(|| refused(WishRefusal::Unknown(name)))?);
        }
        Ok(loops)
    })
}

/// Of the data directory that is looked at, where a server has owned it.
fn place(store: &Store, config: &Config) -> Option<String> {
    Files::place_of(store, &DataDir::new(&config.data))
}

fn want(named: &NamedArgs, wish: Wish) -> Result<(), StoreCommandError> {
    let name = named.name.as_str();
    let found = named.store.with_config(async |store, config| {
        let configured = config.loops.contains_key(name);
        follow(&Loops::new(&store), name, configured, wish, &COMMAND_LINE.into(), now()).await.map_err(refused)?;
        let here = place(&store, &config);
        Ok(standing(&store, name, config.loops.get(name), 1, here.as_deref(), now()).await?.unwrap_or_default())
    })?;
    say(&if named.json { pretty(&found) } else { headline(&found) });
    Ok(())
}

fn pretty(value: &Value) -> String {
    format!("{value:#}")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// A time of day of seconds since 1970, with its date.
fn at(value: &Value) -> String {
    value.as_i64().map_or_else(String::new, |seconds| when(seconds * 1_000_000))
}

fn headline(found: &Value) -> String {
    let paused = if found["paused"] == true { " (paused)" } else { "" };
    let state = text(found, "state").replace('_', " ");
    format!("{}  {state}{paused}, cycle {}; waits for {}", text(found, "id"), found["cycle"], text(&found["waits_for"], "text"))
}

/// A loop in lines: its cycles the newest first, what happened in each the oldest first.
fn described(found: &Value) -> String {
    let mut lines = vec![headline(found)];
    lines.push(format!("  model {} · base {} · dataset {}", text(found, "model"), text(found, "base"), text(found, "dataset")));
    for cycle in found["cycles"].as_array().into_iter().flatten() {
        let took = cycle["ended_at"].as_i64().zip(cycle["began_at"].as_i64());
        let how = match (cycle["outcome"].as_str(), took) {
            (Some(outcome), Some((end, begin))) => format!("{} after {}", outcome.replace('_', " "), span(end - begin)),
            _ => "under way".to_owned(),
        };
        lines.push(format!("  cycle {}  {}  {how}", cycle["cycle"], at(&cycle["began_at"])));
        for step in cycle["steps"].as_array().into_iter().flatten() {
            lines.push(format!("    {}  {:11} {}", at(&step["at"]), text(step, "action").replace('_', " "), text(step, "why")));
        }
        for finding in cycle["findings"].as_array().into_iter().flatten() {
            lines.push(format!("      {:13} {}", text(finding, "of"), text(finding, "found")));
            lines.push(format!("      {:13} → {}", "", text(finding, "change")));
        }
    }
    lines.join("\n")
}

fn span(seconds: i64) -> String {
    match seconds {
        ..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

fn say(text: &str) {
    // A closed standard output is no reason to fail: the work is done.
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_is_shown_with_what_it_waits_for_and_why_it_was_refused() {
        let found = json!({
            "id": "shorter", "model": "assistant", "base": "smollm2", "dataset": "shorter", "state": "rolled_back", "paused": true, "cycle": 2,
            "waits_for": {"text": "a person: it is paused"},
            "cycles": [{
                "cycle": 2, "began_at": 60, "ended_at": 185, "outcome": "refused", "why": "accuracy: 9 of 20",
                "findings": [{"of": "accuracy", "found": "9 of 20", "change": "train on more"}],
                "steps": [{"at": 60, "state": "snapshot", "action": "snapshot", "by": "loop:shorter", "why": "20 new judgements of 3 people", "numbers": null}],
            }],
        });
        let expected = "shorter  rolled back (paused), cycle 2; waits for a person: it is paused\n\
            \x20 model assistant · base smollm2 · dataset shorter\n\
            \x20 cycle 2  1970-01-01 00:01  refused after 2 min 5 s\n\
            \x20   1970-01-01 00:01  snapshot    20 new judgements of 3 people\n\
            \x20     accuracy      9 of 20\n\
            \x20                   → train on more";
        assert_eq!(described(&found), expected);
        assert_eq!((span(59), span(3600 + 125)), ("59 s".into(), "1 h 2 min".into()));
    }
}
