//! `tidemill audit`

use std::io::Write;

use tidemill_rlhf::dataset::query::time;
use tidemill_store::{Audit, AuditEntry, AuditFilter, MAX_PAGE};

use crate::cli::store_args::{StoreArgs, StoreCommandError};
use crate::cli::when;
use crate::clock::now;
use crate::http::shown_act;

/// Who did what to what, the newest first. Rows are only ever added.
#[derive(Debug, clap::Args)]
pub struct AuditArgs {
    /// Done since: 2026-11-30, 2026-11-30T12:00:00Z, or a span such as 30d
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<i64>,
    /// Done before
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<i64>,
    /// Done by: a key's name or id, or `command line`, `server`, `open server`
    #[arg(long, value_name = "WHO")]
    by: Option<String>,
    /// An action such as key.create, or all of a topic such as key
    #[arg(long, value_name = "ACTION")]
    what: Option<String>,
    /// Done to
    #[arg(long, value_name = "SUBJECT")]
    on: Option<String>,
    /// Most that are shown
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: usize,
    /// A JSON object a line, as GET /v1/audit has it
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

fn moment(text: &str) -> Result<i64, String> {
    time(text, now())
}

/// Runs the command.
pub fn run(args: &AuditArgs) -> Result<(), StoreCommandError> {
    let acts = args.store.with(|store| async move {
        let audit = Audit::new(store.database());
        let mut filter = AuditFilter {
            since: args.since,
            until: args.until,
            by: args.by.clone(),
            what: args.what.clone(),
            on: args.on.clone(),
            ..AuditFilter::default()
        };
        let mut acts = Vec::new();
        while acts.len() < args.limit {
            filter.limit = Some((args.limit - acts.len()).min(MAX_PAGE));
            let page = audit.list(&filter).await?;
            filter.after = page.items.last().map(|act| act.id);
            acts.extend(page.items);
            if !page.has_more {
                break;
            }
        }
        Ok(acts)
    })?;
    let mut out = std::io::stdout().lock();
    let shown: fn(&AuditEntry) -> String = if args.json { |act| shown_act(act).to_string() } else { line };
    if !args.json {
        let _ = writeln!(out, "{:16}  {:20}  {:20}  {:32}  with", "when", "who", "what", "to what");
    }
    for act in &acts {
        // A closed standard output is no reason to fail.
        let _ = writeln!(out, "{}", shown(act));
    }
    Ok(())
}

fn line(act: &AuditEntry) -> String {
    let detail = if act.detail.is_null() { String::new() } else { act.detail.to_string() };
    let line = format!("{}  {:20}  {:20}  {:32}  {detail}", when(act.at), act.actor.name, act.action, act.subject);
    // Whatever a name holds, a line stays a line.
    line.trim_end().chars().map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use uuid::Uuid;

    #[test]
    fn an_act_is_a_line_whatever_its_names_hold() {
        let mut act = AuditEntry {
            id: Uuid::nil(),
            at: 60_000_000,
            actor: "key a\nb".into(),
            action: "key.revoke".into(),
            subject: "app".into(),
            detail: json!({"id": 1}),
        };
        let text = line(&act);
        assert!(text.starts_with("1970-01-01 00:01  key a\u{FFFD}b ") && text.ends_with(r#"  {"id":1}"#), "{text}");
        act.detail = Value::Null;
        assert!(line(&act).ends_with("app"));
    }
}
