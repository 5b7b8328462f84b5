//! A rollout as a table for people.

use crate::cli::when;
use serde_json::Value;

/// Decisions that are shown; the rest is in the JSON.
const DECISIONS: usize = 12;

/// One line: what it is and where it stands.
pub fn line(rollout: &Value) -> String {
    let text = |key: &str| rollout[key].as_str().unwrap_or("?").to_owned();
    let status = match rollout["reason"].as_str() {
        Some(reason) => format!("{} ({})", text("status").replace('_', " "), reason.replace('_', " ")),
        None => text("status").replace('_', " "),
    };
    let shares: Vec<String> = rollout["arms"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|arm| format!("{} {}", arm["variant"].as_str().unwrap_or("?"), percent(&arm["share"])))
        .collect();
    format!("{:20} {} on {}: {status}; {}", text("name"), text("kind"), text("model"), shares.join(", "))
}

/// All that there is to see.
pub fn table(rollout: &Value) -> String {
    let latest = &rollout["latest"];
    let steps = rollout["spec"]["steps"].as_array().map_or(0, Vec::len);
    let mut lines = vec![line(rollout)];
    let began = when(rollout["created_at"].as_i64().unwrap_or(0) * 1_000_000);
    let step = match (steps, rollout["state"]["step"].as_u64()) {
        (0, _) | (_, None) => String::new(),
        (_, Some(step)) => format!(", {} of {steps} steps done", step.min(steps as u64)),
    };
    lines.push(format!("{:20} since {began}{step}; {}", "", latest["reason"].as_str().unwrap_or_default()));

    lines.push(format!("\n{:10} {:24} {:>8} {:>9}", "arm", "variant", "share", "units"));
    for (index, arm) in rollout["arms"].as_array().into_iter().flatten().enumerate() {
        let role = if index == 0 { "control" } else { "treatment" };
        let variant = arm["variant"].as_str().unwrap_or("?");
        lines.push(format!("{role:10} {variant:24} {:>8} {:>9}", percent(&arm["share"]), arm["units"].to_string()));
    }
    if let Some(p) = latest["sample_ratio"]["p_value"].as_f64() {
        lines.push(format!("{:10} the units fit the shares with p = {}", "", number(p)));
    }

    let judgements: Vec<&Value> = latest["judgements"].as_array().into_iter().flatten().collect();
    if !judgements.is_empty() {
        lines.push(format!(
            "\n{:26} {:>9} {:>9} {:>9}  {:20}  {:26} {:>7}  says",
            "metric", "control", "arm", "value", "interval", "must be", "samples"
        ));
    }
    for judgement in judgements {
        let value = |key: &str| judgement[key].as_f64().map_or_else(|| "-".to_owned(), number);
        let interval = match (judgement["interval"]["low"].as_f64(), judgement["interval"]["high"].as_f64()) {
            (Some(low), Some(high)) => format!("{} to {}", number(low), number(high)),
            _ => "-".to_owned(),
        };
        let arm = judgement["arm"].as_u64().filter(|arm| *arm > 1).map_or_else(String::new, |arm| format!(" [{arm}]"));
        let dry = if judgement["dry_run"] == true { ", dry run" } else { "" };
        let note =
            judgement["note"].as_str().filter(|note| !note.is_empty()).map_or_else(String::new, |note| format!(": {note}"));
        lines.push(format!(
            "{:26} {:>9} {:>9} {:>9}  {interval:20}  {:26} {:>7}  {}{dry}{note}",
            format!("{}{arm}", judgement["metric"].as_str().unwrap_or("?")),
            value("control"),
            value("treatment"),
            value("value"),
            condition(&judgement["condition"]),
            judgement["samples"].to_string(),
            judgement["verdict"].as_str().unwrap_or("?"),
        ));
    }

    let decisions: Vec<&Value> =
        rollout["decisions"].as_array().into_iter().flatten().filter(|row| row["action"]["kind"] != "hold").collect();
    if !decisions.is_empty() {
        lines.push(String::new());
    }
    for row in decisions.iter().skip(decisions.len().saturating_sub(DECISIONS)) {
        let by = row["by"].as_str().map_or_else(String::new, |by| format!(" ({by})"));
        let action = row["action"]["kind"].as_str().unwrap_or("?").replace('_', " ");
        let at = row["at"].as_i64().unwrap_or(0);
        lines.push(format!("{}  {action:14} {}{by}", when(at), row["reason"].as_str().unwrap_or_default()));
    }
    lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

/// What must hold, in words.
fn condition(condition: &Value) -> String {
    let bounds = [(">=", "min"), ("<=", "max")];
    let bounds =
        bounds.iter().filter_map(|(sign, key)| condition[*key].as_f64().map(|bound| format!("{sign} {}", number(bound))));
    let of = condition["of"].as_str().filter(|of| *of != "value").unwrap_or_default();
    format!("{of} {}", bounds.collect::<Vec<_>>().join(", ")).trim_start().to_owned()
}

fn percent(share: &Value) -> String {
    share.as_f64().map_or_else(|| "?".to_owned(), |share| format!("{} %", number((share * 1e6).round() / 1e4)))
}

/// Few digits, and no zeros behind them.
fn number(value: f64) -> String {
    let text = match value.abs() {
        0.0 => return "0".to_owned(),
        small if small < 0.001 => return format!("{value:.1e}"),
        middle if middle < 100.0 => format!("{value:.3}"),
        _ => format!("{value:.0}"),
    };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_rollout_is_a_table() {
        let rollout = json!({
            "name": "brief", "model": "assistant", "kind": "canary", "status": "paused", "reason": "sample_ratio", "created_at": 60,
            "arms": [{"variant": "base", "share": 0.05, "units": 400}, {"variant": "brief@1", "share": 0.05, "units": 301}],
            "spec": {"steps": [1, 2, 3]}, "state": {"step": 2},
            "latest": {
                "reason": "step 3: 12 of 60 s", "sample_ratio": {"p_value": 0.00019},
                "judgements": [
                    {"metric": "error_rate", "arm": 1, "control": 0.0, "treatment": 0.25, "value": 0.25, "interval": {"low": 0.1, "high": 0.4},
                     "condition": {"of": "value", "min": null, "max": 0.02}, "samples": 301, "verdict": "fail", "dry_run": false, "note": ""},
                    {"metric": "goal feedback.thumb", "arm": 1, "control": null, "treatment": null, "value": null, "interval": null,
                     "condition": {"of": "difference", "min": 0.0, "max": null}, "samples": 7, "verdict": "waiting", "dry_run": true,
                     "note": "7 of 50 observations"},
                ],
            },
            "decisions": [
                {"at": 60_000_000, "action": {"kind": "start"}, "reason": "it begins", "by": "key ann"},
                {"at": 61_000_000, "action": {"kind": "hold"}, "reason": "step 2: 1 of 60 s", "by": null},
                {"at": 120_000_000, "action": {"kind": "step"}, "reason": "step 2 is done", "by": null},
            ],
        });
        let wanted = "\
brief                canary on assistant: paused (sample ratio); base 5 %, brief@1 5 %
                     since 1970-01-01 00:01, 2 of 3 steps done; step 3: 12 of 60 s

arm        variant                     share     units
control    base                          5 %       400
treatment  brief@1                       5 %       301
           the units fit the shares with p = 1.9e-4

metric                       control       arm     value  interval              must be                    samples  says
error_rate                         0      0.25      0.25  0.1 to 0.4            <= 0.02                        301  fail
goal feedback.thumb                -         -         -  -                     difference >= 0                  7  waiting, dry run: 7 of 50 observations

1970-01-01 00:01  start          it begins (key ann)
1970-01-01 00:02  step           step 2 is done";
        assert_eq!(table(&rollout), wanted, "\n{}", table(&rollout));
    }

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.05, "0.05"),
            (-0.125, "-0.125"),
            (12.5, "12.5"),
            (1234.5, "1234"),
            (0.00002, "2.0e-5"),
            (100.0, "100"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }
}
